"""The task registry: adding an entry to TASK_METADATA is all that a new task takes.

An entry is a plain dict. Required keys, with G.pt's names and meanings:

    task_test_fn      (*data, net) -> number, or a tuple whose first item counts; the network is the last argument
    constructor       () -> nn.Module; its shapes and state_dict order are the architecture
    data_fn           () -> tuple or list of cached inputs of task_test_fn; the *test* part, only ever reported
    minimize          True for losses and errors, False for returns
    best_prompt       float, end of the prompt range of the one-step curve
    recursive_prompt  float, the constant prompt of recursive optimisation

Optional keys:

    aug_fn              G.pt's permutation walk, see `Gpt.data.augmentation`
    symmetry            {tensor name: (group of each axis)}, see `Gpt.structure`: what `aug_fn` does, in words (default:
                        read off the network's computation, see `Gpt.symmetry`); {} does without
    metric              what the test function returns: "loss", "error" or "return"; names columns (default:
                        what a function of `Gpt.scoring` returns, of others "metric")
    batched             True when task_test_fn also accepts a `Population` and then returns one number per network
    validation_data_fn  () -> tuple; labels, prompts and selection use it (default: data_fn, and the report says so)
    train_data_fn       () -> tuple (inputs, labels) that the recipe trains on
    recipe              a `Gpt.recipes` object: how one network is trained, so that a zoo can be collected
    checkpoints         folder of existing checkpoints to import instead of, or before, collecting; of adapters for
                        prompts without answers there has to be one
    zoo                 name of the zoo; tasks that share networks share a zoo (default: the task's name)
    correct_fn          (*data, net) -> bool [N] (or [P, N] for a Population): per-example correctness, for novelty
    behaviour           a `Gpt.behaviour.Behaviour`: what distillation compares networks by (default: the predictions
                        of classifiers, measured or trained as such, on training inputs)
    family              a `Gpt.masks.MaskSplit`: not one task but one for each class mask. task_test_fn and correct_fn
                        take the mask as last item of the data, (x, y, mask, net), Bool [classes], or [P, classes] with
                        a Population; run r of the zoo is trained on the mask `family.mask_of_runs` gives it.
                        Or a `Gpt.adapters.family.AdapterFamily`: one task for each instruction to a language model
    vocabulary          of a family: names its classes for sentences, see `Gpt.vocabulary` ("digits" or "cifar10")

A user's tasks come from `task_modules=[path/to/my_tasks.py]`, a file that adds to TASK_METADATA or defines one of its
own, or from packages that declare the entry-point group `gpt_weights.tasks`.
"""

import copy
import importlib.util
import logging
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Gpt.adapters.family import AdapterFamily
from Gpt.behaviour import Behaviour
from Gpt.catalogue import adapters, cartpole, vision, whole
from Gpt.data.augmentation import walk_index
from Gpt.errors import StructureError, TaskError, UserError, nearest
from Gpt.masks import MaskSplit
from Gpt.population.functional import Population
from Gpt.recipes import AdapterRecipe, Recipe
from Gpt.scoring import metric_of
from Gpt.seeds import own_random_state
from Gpt.structure import Structure
from Gpt.symmetry import hidden_units

logger = logging.getLogger(__name__)

METRICS = ("loss", "error", "return", "distance", "metric")


@dataclass(frozen=True, eq=False)
class Task:
    """A checked entry of TASK_METADATA; attributes are the entry's keys."""

    name: str
    task_test_fn: Callable[..., Any]
    constructor: Callable[[], nn.Module]
    data_fn: Callable[[], Sequence]
    minimize: bool
    best_prompt: float
    recursive_prompt: float
    aug_fn: Callable[..., None] | None = None
    symmetry: Mapping[str, tuple[str | None, ...]] | None = None
    metric: str = "metric"
    batched: bool = False
    validation_data_fn: Callable[[], Sequence] | None = None
    train_data_fn: Callable[[], Sequence] | None = None
    recipe: Recipe | None = None
    checkpoints: str | None = None
    zoo: str | None = None
    correct_fn: Callable[..., Tensor] | None = None
    behaviour: Behaviour | None = None
    family: MaskSplit | AdapterFamily | None = None
    vocabulary: str | None = None

    @cached_property
    def template(self) -> nn.Module:
        """One network of the architecture, always the same: what it is verified by does not depend on earlier draws.

        Raises:
            TaskError: the constructor fails, as it does where it needs arguments, or builds something else.
        """
        with own_random_state(0):
            net = self.call("constructor", self.constructor)
        if not isinstance(net, nn.Module):
            raise TaskError(
                f"task {self.name!r}: constructor returned {type(net).__name__}, expected a torch.nn.Module"
            )
        return net

    @cached_property
    def structure(self) -> Structure:
        """The architecture, with the symmetry that the entry names or, where it says nothing, that the network has."""
        plain = Structure.of(self.template, self.symmetry)
        if self.symmetry is not None or isinstance(self.family, AdapterFamily):
            return plain
        call = self._first_call()
        return plain if call is None else Structure.of(self.template, hidden_units(self.template, plain, *call.args))

    def _first_call(self) -> "_Called | None":
        """How the test function calls the network, which it does not get to, or None if it fails or never does."""
        net = copy.deepcopy(self.template)

        def stop(_: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
            raise _Called(inputs, keywords)

        net.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.task_test_fn(*self.data("validation"), net)
        except _Called as call:
            return call
        except Exception as error:  # `verify` says more of it; zoos are imported without a task's data, too
            logger.info("task %s: which hidden units may be renamed is not known: %s", self.name, error)
        return None

    @property
    def zoo_name(self) -> str:
        return self.zoo or self.name

    @cached_property
    def _data(self) -> dict[str, tuple]:
        return {}

    def data(self, split: str = "test", device: torch.device | str = "cpu") -> tuple:
        """The inputs of the test function for "train", "validation" or "test", with tensors on `device`; cached.

        For a family of masks, the items of the validation and test split are followed by the first held-out mask; an
        `AdapterFamily`'s functions end with the member themselves.

        Raises:
            TaskError: there is no such split, the task has no training data, or the split's function fails or does not
                return a tuple or list.
        """
        key = f"{split}/{device}"
        if key not in self._data:
            function = self._data_key(split)
            items = self.call(function, getattr(self, function))
            if not isinstance(items, tuple | list):
                raise TaskError(
                    f"task {self.name!r}: the data function of the {split} split returned {type(items).__name__}, "
                    "expected a tuple or list of the test function's inputs (write `return (x,)` for a single one)"
                )
            if isinstance(self.family, MaskSplit) and split != "train":
                items = (*items, self.family.mask_of_runs(torch.tensor([0]))[0])
            self._data[key] = tuple(i.to(device) if isinstance(i, Tensor) else i for i in items)
        return self._data[key]

    def _data_key(self, split: str) -> str:
        """The key whose function gives a split's data."""
        if split == "train":
            if self.train_data_fn is None:
                raise TaskError(f"task {self.name!r} has no training data; add the key 'train_data_fn'")
            return "train_data_fn"
        if split == "validation":
            return "validation_data_fn" if self.validation_data_fn else "data_fn"
        if split == "test":
            return "data_fn"
        raise TaskError(f"task {self.name!r}: there is no split {split!r}, expected train, validation or test")

    def score(self, net: nn.Module | Population, split: str, device: torch.device | str = "cpu") -> Any:
        """Raw result of the test function on one split, reduced to its first item when it is a tuple."""
        result = self.task_test_fn(*self.data(split, device), net)
        return result[0] if isinstance(result, tuple | list) else result

    def call(self, key: str, function: Callable[..., Any], *inputs: Any) -> Any:
        """What a function of the entry returns.

        Raises:
            TaskError: it fails; names the task, the key and the line.
        """
        try:
            return function(*inputs)
        except UserError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = [frame for frame in frames if "site-packages" not in frame.filename] or frames
            where = f"{Path(place[-1].filename).name}, line {place[-1].lineno}"
            raise TaskError(
                f"task {self.name!r}: key {key!r} failed in {where}: {type(error).__name__}: {error}; expected "
                f"{_EXPECTED[key]}"
            ) from error

    def with_recipe(self, recipe: Recipe) -> "Task":
        """The same with networks that are trained in another way; of adapters, their base model and form are in it."""
        changed = {}
        if isinstance(self.family, AdapterFamily) and isinstance(recipe, AdapterRecipe):
            changed = adapters.adapter_functions(self.family, recipe)
        return replace(self, recipe=recipe, **changed)

    def verify(self, device: torch.device | str = "cpu") -> "Task":
        """Run every function once on a fresh network, on a device: large networks take half a minute on a CPU.

        Raises:
            TaskError: a function fails, or returns something else than its key promises; names the task and the key.
        """
        net = copy.deepcopy(self.template).to(device).eval()
        weights = self.structure.flatten(net.state_dict())
        with torch.no_grad():
            value = self._number(net, "test", device)
            self._number(net, "validation", device)
            if self.batched:
                population = Population(net, self.structure, weights.expand(2, -1))
                self.call("batched", self.score, population, "test", device)
            if self.correct_fn:
                correct = torch.as_tensor(self.call("correct_fn", self.correct_fn, *self.data("test", device), net))
                if correct.dtype != torch.bool or correct.dim() != 1:
                    raise TaskError(
                        f"task {self.name!r}: key 'correct_fn' returned {correct.dtype} of shape "
                        f"{tuple(correct.shape)}, expected {_EXPECTED['correct_fn']}"
                    )
            for key, given in {"symmetry": self.structure.groups, "aug_fn": self.aug_fn}.items():
                if given and self.metric != "return":  # rounding decides where an episode leads
                    self._check_renaming(key, net, weights, value, device)
        return self

    def _number(self, net: nn.Module, split: str, device: torch.device | str) -> float:
        """What the test function returns of a fresh network, checked."""
        value = self.call("task_test_fn", self.score, net, split, device)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise TaskError(
                f"task {self.name!r}: task_test_fn returned {value!r} on a fresh network, expected a finite number "
                "(or a tuple whose first item is one)"
            )
        return number

    def _check_renaming(
        self, key: str, net: nn.Module, weights: Tensor, value: float, device: torch.device | str
    ) -> None:
        """With its hidden units renamed, a network must measure the same, unless it does not even the second time."""
        if key == "aug_fn":
            walk = (self.aug_fn, self.template, self.structure.size, torch.Generator().manual_seed(0))
            index = self.call(key, walk_index, *walk)
        else:
            order = {group: torch.arange(count).roll(1) for group, count in self.structure.groups.items()}
            index = self.structure.permutation_index(order)
        renamed = copy.deepcopy(net)
        renamed.load_state_dict(self.structure.state_dict(weights[index.to(weights.device)]))
        found, same = self._number(renamed, "test", device), partial(math.isclose, value, rel_tol=1e-3, abs_tol=1e-6)
        if not same(found) and same(self._number(net, "test", device)):
            raise TaskError(
                f"task {self.name!r}: key {key!r} renames hidden units in a way that changes the network: it "
                f"measured {value:.6g} before and {found:.6g} after; every axis of a hidden layer has to be named: "
                "its weight's and bias's first axis, the next weight's second axis; {} names none"
            )


class _Called(BaseException):
    """A network was called, with these inputs and keywords; no test function takes it for an error of its own."""


def check_entry(name: str, entry: Mapping[str, Any]) -> Task:
    """Turn one entry into a Task.

    Raises:
        TaskError: a key is missing, unknown or of the wrong type, or the constructor does not build a network without
            arguments; the message names the task, the key and what is expected.
    """
    known = {f.name: f for f in fields(Task) if f.name != "name"}
    for key in entry:
        if key not in known:
            raise TaskError(f"task {name!r}: unknown key {key!r}; {nearest(key, known)}")
    for key, spec in known.items():
        if key not in entry:
            if spec.default is MISSING:
                raise TaskError(f"task {name!r}: key {key!r} is missing, expected {_EXPECTED[key]}")
        elif entry[key] is not None or spec.default is MISSING:
            _check_value(name, key, entry[key])
    metric = metric_of(entry["task_test_fn"])
    if metric and entry.get("metric", metric) != metric:
        raise TaskError(
            f"task {name!r}: key 'metric' is {entry['metric']!r}, expected {metric!r}: that is what "
            f"{entry['task_test_fn'].__name__} returns first"
        )
    task = Task(name=name, **({"metric": metric} if metric else {}) | dict(entry))
    if isinstance(task.family, AdapterFamily) and not task.family.answered and not task.checkpoints:
        raise TaskError(
            f"task {name!r}: the prompts of {task.family.suite} have no answers, so no adapter can be trained for "
            "them; add the key 'checkpoints', a folder of adapters, or prepare the prompts with answers"
        )
    try:
        Structure.of(task.template, task.symmetry)
    except StructureError as error:
        raise TaskError(f"task {name!r}: symmetry: {error}") from error
    return task


_EXPECTED = {
    "task_test_fn": "a function (*data, net) -> number",
    "constructor": "a function () -> torch.nn.Module",
    "data_fn": "a function () -> tuple",
    "minimize": "True or False",
    "best_prompt": "a number",
    "recursive_prompt": "a number",
    "aug_fn": "a function, see Gpt.data.augmentation",
    "symmetry": "a dict {tensor name: tuple of group names or None}",
    "metric": f"one of {', '.join(METRICS)}",
    "batched": "True or False; True where task_test_fn takes a Population and returns one number per network",
    "validation_data_fn": "a function () -> tuple",
    "train_data_fn": "a function () -> tuple (inputs, labels) that suits the network",
    "recipe": "a recipe of Gpt.recipes",
    "checkpoints": "the path of a folder, as a string",
    "zoo": "a string",
    "correct_fn": "a function (*data, net) -> bool tensor [N]",
    "behaviour": "a Gpt.behaviour.Behaviour",
    "family": "a Gpt.masks.MaskSplit or Gpt.adapters.family.AdapterFamily",
    "vocabulary": "a string",
}


def _check_value(name: str, key: str, value: Any) -> None:
    if key.endswith("_fn") or key == "constructor":
        ok = callable(value)
    elif key in ("minimize", "batched"):
        ok = isinstance(value, bool)
    elif key in ("best_prompt", "recursive_prompt"):
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    elif key == "metric":
        ok = value in METRICS
    elif key == "behaviour":
        ok = isinstance(value, Behaviour)
    elif key == "recipe":
        ok = isinstance(value, Recipe)
    elif key == "symmetry":
        ok = isinstance(value, Mapping) and all(isinstance(groups, tuple) for groups in value.values())
    elif key == "family":
        ok = isinstance(value, MaskSplit | AdapterFamily)
    else:
        ok = isinstance(value, str)
    if not ok:
        raise TaskError(f"task {name!r}: key {key!r} is {value!r}, expected {_EXPECTED[key]}")


def get_task(name: str, device: torch.device | str = "cpu") -> Task:
    """Look a task up, check its entry and, but for adapters, run its functions once, on the device.

    Raises:
        TaskError: no such task (names the nearest), or the entry does not keep its promises.
    """
    if name not in TASK_METADATA:
        hint = f"{nearest(name, TASK_METADATA)} (your own: task_modules=[path/to/my_tasks.py])"
        raise TaskError(f"there is no task {name!r}; {hint}")
    task = check_entry(name, TASK_METADATA[name])
    # The functions of adapters are the library's own, and would load a language model before it is needed.
    return task if isinstance(task.family, AdapterFamily) else task.verify(device)


def load_task_modules(paths: Sequence[str] = ()) -> None:
    """Import users' task files, and packages of the entry-point group `gpt_weights.tasks`, into TASK_METADATA.

    Raises:
        TaskError: a file does not exist, does not import, or adds no task; names it.
    """
    for entry_point in entry_points(group="gpt_weights.tasks"):
        try:
            TASK_METADATA.update(entry_point.load())
        except Exception as error:
            raise TaskError(
                f"the entry point {entry_point.name} = {entry_point.value} of the group gpt_weights.tasks failed: "
                f"{type(error).__name__}: {error}; it must be a dict of entries of TASK_METADATA"
            ) from error
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise TaskError(f"task_modules: there is no file {path!r} (looked in {file.resolve().parent})")
        before = {name: id(entry) for name, entry in TASK_METADATA.items()}
        name = f"gpt_weights_tasks.{file.stem}"  # never the name of another module, such as random.py
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise TaskError(f"task_modules: {path!r} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise TaskError(f"task_modules: importing {path!r} failed: {type(error).__name__}: {error}") from error
        own = getattr(module, "TASK_METADATA", {})
        if clash := sorted(set(own) & BUILT_IN):
            raise TaskError(f"task_modules: {path!r} has an entry {clash[0]!r}, which the library has too; rename it")
        TASK_METADATA.update(own)
        if before == {name: id(entry) for name, entry in TASK_METADATA.items()}:
            raise TaskError(f"task_modules: {path!r} adds no entry to TASK_METADATA")


TASK_METADATA: dict[str, dict[str, Any]] = {**vision.TASKS, **cartpole.TASKS, **whole.TASKS, **adapters.TASKS}
BUILT_IN = frozenset(TASK_METADATA)
