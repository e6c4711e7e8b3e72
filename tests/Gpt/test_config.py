"""The typed configuration: every key and type is checked, and what weights depend on is told from what they do not."""

from dataclasses import dataclass, field, fields, replace

import pytest

from Gpt.config import ConditionConfig, DataConfig, RunConfig, checked
from Gpt.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    free: dict[str, int] = field(default_factory=dict)


def test_nested_values_become_dataclasses():
    values = {"name": "y", "inner": {"sizes": [3, 4], "rate": 1}, "free": {"any": 1}}
    assert checked(Outer, values) == Outer("y", Inner((3, 4), 1.0), {"any": 1})
    assert checked(Outer, {}) == Outer()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nam": "y"}, ["'prefix.nam'", "did you mean 'name'?"]),
        ({"inner": {"size": [1]}}, ["'prefix.inner.size'", "did you mean 'sizes'?"]),
        ({"zzz": 1}, ["'prefix.zzz'", "known: free, inner, name"]),
        ({"inner": {"rate": "fast"}}, ["prefix.inner.rate='fast'", "number"]),
        ({"inner": {"sizes": [1, "b"]}}, ["prefix.inner.sizes.1='b'", "integer"]),
        ({"inner": {"sizes": 7}}, ["prefix.inner.sizes=7", "write a list, [7]"]),
        ({"inner": 3}, ["prefix.inner=3"]),
        ({"name": None}, ["prefix.name=None", "string"]),
    ],
)
def test_wrong_keys_and_values_are_named_with_their_place(values, words):
    with pytest.raises(ConfigError) as caught:
        checked(Outer, values, "prefix.")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_storage_is_refused_before_a_zoo_is_collected_for_it():
    with pytest.raises(ConfigError, match=r"zoo\.storage='tape'.*'ram'"):
        checked(RunConfig, {"zoo": {"storage": "tape"}})


def test_training_settings_hold_what_weights_depend_on_and_nothing_else():
    config = RunConfig()
    free = {"evaluation", "logger", "run", "beside", "device"}
    free |= {"resume", "resume_path", "test_only", "collect_only", "dry_run"}
    settings = config.training_settings()
    assert set(settings) == {f.name for f in fields(RunConfig)} - free
    assert replace(config, data=DataConfig("elsewhere"), device="cpu").training_settings() == settings
    moved = replace(config, zoo=replace(config.zoo, path="zoo", shard_runs=7, population=3, storage="disk"))
    assert moved.training_settings() == settings
    changes = {"zoo": replace(config.zoo, runs=7), "trainer": replace(config.trainer, steps=7)}
    for change in ({"seed": 1}, {"data": DataConfig(examples=9)}, *({key: value} for key, value in changes.items())):
        assert replace(config, **change).training_settings() != settings


def test_weights_depend_on_the_encoder_of_their_prompts_wherever_it_is():
    def settings(names, encoder):
        return RunConfig(condition=ConditionConfig(names, encoder=encoder)).training_settings()

    assert settings(("text",), "models/small") == settings(("text",), "elsewhere/small/")
    assert settings(("text",), "models/small") != settings(("text",), "models/wide")
    assert settings(("class_mask",), "models/small") == settings(("class_mask",), "models/wide")
