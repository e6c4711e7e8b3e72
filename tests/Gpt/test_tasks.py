"""The task registry: what an entry promises is checked, and every message names the task, the key and the remedy."""

import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from Gpt import tasks
from Gpt.data import sources
from Gpt.errors import TaskError
from Gpt.networks import MLP
from Gpt.population.functional import Population, stack_initial
from Gpt.scoring import METRIC_OF
from Gpt.seeds import rng
from Gpt.tasks import TASK_METADATA, check_entry, get_task, load_task_modules
from Gpt.vocabulary import CLASSES


def regression(x, y, net):
    return (net(x).squeeze(-1) - y).square().mean()


def data(seed: int):
    x = torch.randn(20, 4, generator=rng("cpu", seed))
    return x, x.sum(1)


def forgetful_walk(net, generator, permute_in_fn, permute_out_fn, permute_in_out_fn, register_fn):
    """Renames the hidden units in the first layer alone."""
    permute_out_fn((net.fc1.weight, net.fc1.bias), torch.randperm(3, generator=generator))
    register_fn((net.fc2.weight, net.fc2.bias))


ENTRY = {
    "task_test_fn": regression,
    "constructor": lambda: MLP(4, 3, 1),
    "data_fn": lambda: data(0),
    "minimize": True,
    "best_prompt": 0.0,
    "recursive_prompt": 0.0,
}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Whatever a test adds is gone afterwards."""
    monkeypatch.setattr(tasks, "TASK_METADATA", dict(TASK_METADATA))
    return tasks.TASK_METADATA


def test_the_required_keys_are_enough():
    task = check_entry("regression", ENTRY).verify()
    assert (task.metric, task.batched, task.zoo_name) == ("metric", False, "regression")
    assert task.structure.size == 4 * 3 + 3 + 3 + 1
    assert task.structure.groups == {"fc1": 3}
    assert torch.equal(task.score(task.template, "test"), regression(*data(0), task.template))
    assert torch.equal(task.data("validation")[0], task.data("test")[0])


def norm_of_weights(x, y, net):
    return sum(p.square().sum() for p in net.parameters())


def with_keywords(x, y, net):
    return (net(scale=2.0, x=x).squeeze(-1) - y).square().mean()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MLP(4, 3, 1)

    def forward(self, x, scale):
        return scale * self.net(x)


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ({"symmetry": {}}, {}),
        ({"aug_fn": forgetful_walk}, {"fc1": 3}),  # which `verify` refuses
        ({"task_test_fn": norm_of_weights}, {}),  # never calls the network
        ({"task_test_fn": lambda x, y, net: net(x.tolist())}, {}),  # fails in it, which `verify` says
        ({"constructor": Scaled, "task_test_fn": with_keywords}, {"net.fc1": 3}),
    ],
)
def test_hidden_units_are_read_off_how_the_test_function_calls_the_network(change, groups):
    assert check_entry("mine", ENTRY | change).structure.groups == groups


def test_the_template_does_not_depend_on_earlier_draws():
    with torch.random.fork_rng(devices=[]):
        first = check_entry("regression", ENTRY).template
        torch.manual_seed(1)
        second = check_entry("regression", ENTRY).template
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_splits_have_their_own_data_and_are_read_once():
    calls = []

    def reader(seed):
        def read():
            calls.append(seed)
            return data(seed)

        return read

    task = check_entry("regression", ENTRY | {
        "data_fn": reader(0), "validation_data_fn": reader(1), "train_data_fn": reader(2)})  # fmt: skip
    for seed, split in enumerate(("test", "validation", "train")):
        for _ in range(3):
            assert torch.equal(task.data(split)[0], data(seed)[0])
    assert calls == [0, 1, 2]
    with pytest.raises(TaskError, match="no split 'valid', expected train, validation or test"):
        task.data("valid")


def test_training_data_are_never_taken_from_the_test_part():
    with pytest.raises(TaskError, match="'regression' has no training data; add the key 'train_data_fn'"):
        check_entry("regression", ENTRY).data("train")


@pytest.mark.parametrize("key", ENTRY)
def test_a_missing_key_is_named_with_what_is_expected(key):
    with pytest.raises(TaskError, match=f"task 'mine': key '{key}' is missing, expected (a|True)"):
        check_entry("mine", {k: v for k, v in ENTRY.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task_test_fn", "loss"), ("constructor", MLP(4, 3, 1).state_dict()), ("data_fn", (1, 2)), ("data_fn", None),
        ("minimize", 1), ("best_prompt", "zero"), ("best_prompt", float("nan")), ("best_prompt", True),
        ("recursive_prompt", None), ("symmetry", [("fc1.weight", "hidden")]), ("symmetry", {"fc1.weight": "hidden"}),
        ("metric", "accuracy"), ("batched", "yes"), ("train_data_fn", 3), ("recipe", {"epochs": 3}), ("checkpoints", 3),
        ("zoo", 3), ("correct_fn", "yes"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named_with_what_is_expected(key, value):
    with pytest.raises(TaskError) as caught:
        check_entry("mine", ENTRY | {key: value})
    for part in ("task 'mine'", f"key {key!r}", "expected"):
        assert part in str(caught.value)


def test_every_key_has_a_description_of_what_is_expected():
    fields = {field for field in tasks.Task.__dataclass_fields__ if field != "name"}
    assert set(tasks._EXPECTED) == fields
    assert all(f"    {key} " in tasks.__doc__ for key in fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minimise": True}, r"task 'mine': unknown key 'minimise'; did you mean 'minimize'\?"),
        ({"xyzzy": True}, "task 'mine': unknown key 'xyzzy'; known: "),
        ({"constructor": nn.Linear}, r"'mine': key 'constructor' failed .*in_features.*; expected a function \(\)"),
        ({"constructor": lambda: 3}, "task 'mine': constructor returned int, expected a torch.nn.Module"),
        ({"constructor": nn.ReLU}, "task 'mine': .*nothing to generate"),
        ({"symmetry": {"fc7.weight": ("h", None)}}, r"task 'mine': symmetry: .*names \['fc7.weight'\]"),
    ],
)
def test_entries_that_cannot_be_are_refused(change, message):
    with pytest.raises(TaskError, match=message):
        check_entry("mine", ENTRY | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_fn": lambda: torch.zeros(3)}, r"'mine': .*test split returned Tensor, expected a tuple.*return \(x,\)"),
        ({"validation_data_fn": dict}, r"task 'mine': .*validation split returned dict, expected a tuple"),
        ({"task_test_fn": lambda x, y, net: net(x)}, "task 'mine': task_test_fn returned .*expected a finite"),
        ({"task_test_fn": lambda x, y, net: None}, "task 'mine': task_test_fn returned None .*expected a finite"),
        ({"task_test_fn": lambda x, y, net: float("nan")}, "task 'mine': task_test_fn returned nan .*a finite number"),
        ({"task_test_fn": lambda x, y, net: float("inf")}, "task 'mine': task_test_fn returned inf .*a finite number"),
        ({"task_test_fn": lambda x, net: 0}, r"'mine': key 'task_test_fn' failed .*TypeError.*; expected a function"),
        ({"constructor": lambda: MLP(5, 3, 1)}, r"key 'task_test_fn' failed in networks\.py, line .*\(20x4 and 5x3\)"),
        (
            {"correct_fn": lambda x, net: x > 0},
            r"'mine': key 'correct_fn' failed .*; expected a function .*bool tensor",
        ),
        ({"correct_fn": lambda x, y, net: y}, r"'mine': key 'correct_fn' returned torch.float32 of shape \(20,\), exp"),
        (
            {"correct_fn": lambda x, y, net: (y > 0).all()},
            r"'mine': key 'correct_fn' returned torch.bool of shape \(\)",
        ),
        (
            {"batched": True, "task_test_fn": lambda x, y, net: net(x).flatten() @ y},
            "key 'batched' failed .*; expected True",
        ),
        (
            {"symmetry": {"fc1.weight": ("h", None), "fc1.bias": ("h",)}},
            "'mine': key 'symmetry' renames .*; every axis",
        ),
        ({"aug_fn": lambda net: None}, r"'mine': key 'aug_fn' failed .*TypeError.*; expected a function, see"),
        ({"aug_fn": forgetful_walk}, "'mine': key 'aug_fn' renames hidden units in a way that changes the network"),
        ({"data_fn": lambda: data(0)[7]}, r"'mine': key 'data_fn' failed in test_tasks\.py, line \d+: IndexError"),
    ],
)
def test_functions_that_do_not_keep_their_promise_are_found_at_once(registry, change, message):
    registry["mine"] = ENTRY | change
    with pytest.raises(TaskError, match=f"(?s){message}"):
        get_task("mine")


def test_hidden_units_may_be_renamed_where_the_function_stays_or_measurements_vary(registry):
    whole = {"fc1.weight": ("h", None), "fc1.bias": ("h",), "fc2.weight": (None, "h")}
    registry["mine"] = ENTRY | {"symmetry": whole}
    assert get_task("mine").structure.groups == {"h": 3}
    draws = iter(range(1, 100))
    noisy = {"task_test_fn": lambda x, y, net: regression(x, y, net) * next(draws)}
    registry["mine"] = ENTRY | noisy | {"symmetry": {"fc1.weight": ("h", None)}}  # no measurement tells
    assert get_task("mine").structure.groups == {"h": 3}


def test_the_librarys_test_functions_name_their_metric():
    classes = ENTRY | {"data_fn": lambda: (data(0)[0], torch.zeros(20).long())}
    for function, metric in METRIC_OF.items():
        assert check_entry("mine", classes | {"task_test_fn": function}).metric == metric
        other = "loss" if metric == "error" else "error"
        with pytest.raises(TaskError, match=f"key 'metric' is '{other}', expected '{metric}': .* {function.__name__}"):
            check_entry("mine", classes | {"task_test_fn": function, "metric": other})


def test_unknown_tasks_are_answered_with_the_nearest():
    with pytest.raises(TaskError, match="no task 'mnist_los'; did you mean 'mnist_loss'.*task_modules"):
        get_task("mnist_los")
    with pytest.raises(TaskError, match="no task 'xyzzy'; known: cartpole"):
        get_task("xyzzy")


def test_looking_a_task_up_leaves_the_random_state_alone(registry):
    registry["mine"] = ENTRY
    before = torch.get_rng_state()
    assert get_task("mine").template is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["digits_loss", "digits_error", "cartpole"])
def test_built_in_tasks_keep_their_promises_for_populations_too(name):
    sources.configure(None, download=False)
    task = get_task(name)
    weights = stack_initial(task.constructor, task.structure, [0, 1, 2])
    with torch.no_grad():
        together = task.score(Population(task.template, task.structure, weights), "validation")
        assert together.shape == (3,)
        net = task.constructor()
        net.load_state_dict(task.structure.state_dict(weights[1]))
        assert float(together[1]) == pytest.approx(float(task.score(net.eval(), "validation")), rel=1e-4)


def needs_smollm2(name: str) -> None:
    """Skip a test of a task whose language model is not installed."""
    if getattr(TASK_METADATA[name]["recipe"], "base", None) == "smollm2":
        pytest.importorskip("gguf")


@pytest.mark.parametrize("name", TASK_METADATA)
def test_built_in_entries_are_well_formed(name):
    needs_smollm2(name)
    task = check_entry(name, TASK_METADATA[name])
    assert task.structure.groups or task.family or not task.batched  # small networks say which units may be renamed
    assert task.recipe is not None
    assert task.minimize == (task.metric != "return")


USER_FILE = """
    import torch
    from torch import nn

    def test(x, net):
        return net(x).mean()

    TASK_METADATA = {"mine": {
        "task_test_fn": test, "constructor": lambda: nn.Linear(3, 1), "data_fn": lambda: (torch.ones(2, 3),),
        "minimize": False, "best_prompt": 1.0, "recursive_prompt": 1.0,
    }}
"""


def user_file(folder: Path, text: str = USER_FILE, name: str = "my_tasks.py") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def test_a_users_file_adds_its_tasks(tmp_path):
    load_task_modules([user_file(tmp_path)])
    task = get_task("mine")
    assert task.structure.size == 4
    load_task_modules([user_file(tmp_path)])  # a second run in one process
    assert get_task("mine").constructor is not task.constructor


def test_a_users_file_may_extend_the_registry_itself(tmp_path, registry):
    text = "from Gpt import tasks\n" + textwrap.dedent(USER_FILE).replace("TASK_METADATA =", "tasks.TASK_METADATA |=")
    load_task_modules([user_file(tmp_path, text)])
    assert get_task("mine").structure.size == 4


def test_a_users_file_takes_no_other_modules_name(tmp_path):
    import random

    load_task_modules([user_file(tmp_path, name="random.py")])
    import random as again

    assert again is random
    assert hasattr(random, "shuffle")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nonexistent_package", "importing .*my_tasks.py' failed: ModuleNotFoundError: .*nonexistent_package"),
        ("TASK_METADATA = {", "importing .*my_tasks.py' failed: SyntaxError"),
        ("x = 1", "my_tasks.py' adds no entry to TASK_METADATA"),
        ("TASK_METADATA = {'digits_loss': {}}", "'digits_loss', which the library has too; rename it"),
    ],
)
def test_a_users_broken_file_is_named(tmp_path, text, message):
    with pytest.raises(TaskError, match=message):
        load_task_modules([user_file(tmp_path, text)])


def test_a_file_that_is_not_there_is_named_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=rf"no file 'my_task.py' \(looked in {tmp_path}\)"):
        load_task_modules(["my_task.py"])
    (tmp_path / "notes.txt").write_text("not Python")
    with pytest.raises(TaskError, match="'notes.txt' is not a Python file"):
        load_task_modules(["notes.txt"])


class EntryPoint:
    """What importlib.metadata hands out."""

    name, value = "plugin", "plugin_package.tasks:TASK_METADATA"

    def __init__(self, load):
        self.load = load


def test_installed_packages_add_their_tasks(monkeypatch):
    groups = []

    def entry_points(group):
        groups.append(group)
        return [EntryPoint(lambda: {"plugged": ENTRY})]

    monkeypatch.setattr(tasks, "entry_points", entry_points)
    load_task_modules()
    assert get_task("plugged").structure.size == 19
    assert groups == ["gpt_weights.tasks"]


def raises():
    raise ImportError("no module named plugin_package")


@pytest.mark.parametrize(("load", "words"), [(raises, "ImportError: no module"), (lambda: 3, "TypeError")])
def test_a_broken_package_is_named(monkeypatch, load, words):
    monkeypatch.setattr(tasks, "entry_points", lambda group: [EntryPoint(load)])
    with pytest.raises(TaskError, match=rf"entry point plugin = plugin_package.tasks:TASK_METADATA .*failed: {words}"):
        load_task_modules()


def test_the_data_of_a_family_end_with_its_first_held_out_mask():
    task = get_task("digits_mask")
    x, y, mask = task.data("test")
    assert torch.equal(mask, task.family.test_masks[0])
    assert len(task.data("validation")) == 3 and len(task.data("train")) == 2
    assert x.shape[0] == y.shape[0] == 400
    for name in ("digits_mask", "mnist_mask", "cifar10_mask"):
        near, far = (check_entry(n, TASK_METADATA[n]) for n in (name, f"{name}_far"))
        assert near.family.radius == 0 and far.family.radius == 1
        assert near.zoo_name != far.zoo_name
        assert near.recipe.shared_init
        assert near.vocabulary in CLASSES
