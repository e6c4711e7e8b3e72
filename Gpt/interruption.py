"""Ctrl-C, and the SIGTERM that schedulers send before they kill: both end a run in an orderly way.

While they are `handled`, either raises `Interrupted` wherever it finds the program, so that files are closed and claims
given up. A training would lose its steps since the last checkpoint; it has signals `held_back`, and ends after a step.

Of several processes none may end alone: the others would wait for it. Theirs are noted, but for those that come in the
midst of work that needs no other process, `at_once`; where they exchange something next, they tell each other, and all
raise at that place, see `Gpt.distributed`.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; not an Exception, as nothing that goes on after errors may go on after it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, where: str = ""):
        super().__init__(where)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:  # to tell other processes
        return Interrupted, (self.number, str(self))


class _Handler:
    """Of both signals.

    Attributes:
        shared: whether there are other processes, with which this one ends.
        number: the first signal that came, 0 while none has.
        notes: whether that one is only noted.
        training: whether a training is told of it, and nobody else.
        tells: whether this process says so.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared, self.notes, self.number = shared, shared, 0
        self.training, self.tells = False, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGTERM:
            return  # it is ending; schedulers and torchrun tell a process twice
        noted, self.number = self.notes and not self.number, self.number or number
        if not noted:
            raise Interrupted(number)
        if self.training and self.tells:  # past Python's streams, which may be in the middle of a line of theirs
            name = signal.Signals(number).name
            os.write(
                2, f"\n{name}: the training ends after a step and is stored; Ctrl-C now ends it at once\n".encode()
            )


def _current() -> _Handler:
    """The handler in charge; one that is told nothing where there is none."""
    return next((h for h in map(signal.getsignal, SIGNALS) if isinstance(h, _Handler)), _Handler())


@contextmanager
def handled(shared: bool = False) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise `Interrupted`; afterwards they do what they did before.

    Only the main thread can have that; in others nothing changes, nor for a signal that is ignored, as Ctrl-C is in the
    background of a script.

    Args:
        shared: there are other processes, with which this one ends: signals are noted, see `noted` and `at_once`.

    Raises:
        Interrupted: also at the end, where one was noted and the work inside was finished none the less.
    """
    former = {number: signal.getsignal(number) for number in SIGNALS}
    handler = _Handler(shared)
    mine = threading.current_thread() is threading.main_thread()
    replaced = {n: old for n, old in former.items() if mine and old not in (signal.SIG_IGN, None)}
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)
    if shared and handler.number:
        raise Interrupted(handler.number)


@contextmanager
def held_back(tells: bool = True) -> Iterator[Callable[[], int]]:
    """Inside, the first signal is noted only, and another one raises, unless it is SIGTERM again.

    Without `handled` signals are left alone.

    Args:
        tells: whether this process says that a signal came.

    Yields:
        what tells the number of the signal that came, 0 while none has.

    Raises:
        Interrupted: at the end, where one came and the work inside was finished none the less; of several processes,
            where they exchange something next.
    """
    handler = _current()
    handler.notes, handler.training, handler.tells = True, True, tells
    try:
        yield lambda: handler.number
    finally:
        handler.notes, handler.training = handler.shared, False
    if handler.number and not handler.shared:
        raise Interrupted(handler.number)


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, a signal is not noted but raises, as does one that was noted before; a training's stay held back."""
    handler = _current()
    notes = handler.notes
    try:
        handler.notes = notes and handler.training
        if number := noted():
            raise Interrupted(number)
        yield
    finally:
        handler.notes = notes


def noted() -> int:
    """The signal that all processes have to end with, where they exchange something; 0 for none, and in a training,
    whose processes ask each other."""
    handler = _current()
    return handler.number if handler.shared and not handler.training else 0
