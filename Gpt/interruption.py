"""Ctrl-C, and the SIGTERM that schedulers send before they kill: both end a run in an orderly way.

While they are `handled`, either raises `Interrupted` wherever it finds the program, so that files are closed and claims
given up. A training would lose its steps since the last checkpoint; it has signals `held_back`, and ends after a step.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from Gpt.distributed import primary

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; not an Exception, as nothing that goes on after errors may go on after it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, where: str = ""):
        super().__init__(where)
        self.number = number


class _Handler:
    """Of both signals.

    Attributes:
        number: the first signal that came, 0 while none has.
        holds: whether that one is only noted.
    """

    def __init__(self) -> None:
        self.number, self.holds = 0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGTERM:
            return  # it is ending; schedulers and torchrun tell a process twice
        noted, self.number = self.holds and not self.number, self.number or number
        if not noted:
            raise Interrupted(number)
        if primary():  # past Python's streams, which may be in the middle of a line of theirs
            name = signal.Signals(number).name
            os.write(
                2, f"\n{name}: the training ends after a step and is stored; Ctrl-C now ends it at once\n".encode()
            )


@contextmanager
def handled() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise `Interrupted`; afterwards they do what they did before.

    Only the main thread can have that; in others nothing changes, nor for a signal that is ignored, as Ctrl-C is in the
    background of a script.
    """
    former = {number: signal.getsignal(number) for number in SIGNALS}
    handler = _Handler()
    mine = threading.current_thread() is threading.main_thread()
    replaced = {n: old for n, old in former.items() if mine and old not in (signal.SIG_IGN, None)}
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)


@contextmanager
def held_back() -> Iterator[Callable[[], int]]:
    """Inside, the first signal is noted only, and another one raises, unless it is SIGTERM again.

    Without `handled` signals are left alone.

    Yields:
        what tells the number of the signal that came, 0 while none has.

    Raises:
        Interrupted: at the end, where one came and the work inside was finished none the less.
    """
    handler = next((h for h in map(signal.getsignal, SIGNALS) if isinstance(h, _Handler)), _Handler())
    handler.holds = True
    try:
        yield lambda: handler.number
    finally:
        handler.holds = False
    if handler.number:
        raise Interrupted(handler.number)
