"""The three commands, as a user calls them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.peft_io import WEIGHTS, save_adapter
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.tools import main

pytest.importorskip("peft")
SPEC = AdapterSpec(rank=2, targets=("q_proj", "v_proj"))


def write_lines(file, samples):
    file.write_text("\n".join(json.dumps(sample) for sample in samples))
    return str(file)


def test_prepare_writes_a_folder_that_is_a_family(tmp_path, capsys):
    files = [
        write_lines(tmp_path / f"{task}.jsonl", [{"question": f"{task} {i}", "answer": i} for i in range(12)])
        for task in ("arc", "piqa")
    ]
    out = str(tmp_path / "prompts")
    options = ["--output-dir", out, "--samples-per-prompt", "4", "--test-ratio", "0.3", "--prompt-key", "question"]
    assert main(["prepare", "--source", *files, *options]) == 0
    assert "2 tasks, 4 prompt sets in train.jsonl, 2 prompt sets in test.jsonl" in capsys.readouterr().out
    family = AdapterFamily(out, unseen_rules=1, unseen_combinations=0, validation=1)
    assert [member.rule for member in family.members] == ["arc", "piqa"]


def test_a_missing_key_is_named_with_its_line(tmp_path, capsys):
    source = write_lines(tmp_path / "x.jsonl", [{"prompt": "a"}, {"text": "b"}])
    assert main(["prepare", "--source", source, "--output-dir", str(tmp_path / "o")]) == 2
    assert "line 2 has no 'prompt'; name the key with --prompt-key" in capsys.readouterr().err


def test_analyze_reports_sizes_and_the_gauge(tmp_path, drawn, capsys):
    for i, row in enumerate(drawn(SPEC, 2)):
        save_adapter(tmp_path / f"run {i}", row.float(), SPEC, "tiny")
    assert main(["analyze", "--adapters", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "run 0: 1,024 numbers, LoRA of rank 2, alpha 16" in out and "the adapters share a gauge" in out
    own = AdapterSpec(rank=2, targets=("q_proj", "v_proj"), a_seed=7)
    save_adapter(tmp_path / "stranger", drawn(SPEC, 1)[0].float(), own, "tiny")
    assert main(["analyze", "--adapters", str(tmp_path)]) == 0
    assert "warning: these 3 adapters do not share a gauge" in capsys.readouterr().out
    assert main(["analyze", "--adapters", str(tmp_path / "nothing")]) == 2


def test_the_round_trip_is_exact_and_notices_what_it_cannot_carry(tmp_path, drawn, capsys):
    folder = save_adapter(tmp_path / "a", drawn(SPEC, 1)[0].float(), SPEC, "tiny")
    assert main(["test", "--adapter", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "8 tensors, 1,024 numbers, 1,024 of them in the flat row: exact" in out
    assert "8 tokens of 2 x 64 cover 100% of it" in out
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / WEIGHTS)
    assert main(["test", "--adapter", str(folder)]) == 0
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    assert main(["test", "--adapter", str(folder)]) == 2
    assert "unexpected ['base_model.model.lm_head.lora_A.weight']" in capsys.readouterr().err


def test_a_manifest_is_written_once_and_compared_afterwards(tmp_path, drawn, capsys):
    first = save_adapter(tmp_path / "a", drawn(SPEC, 1)[0].float(), SPEC, "tiny")
    other = save_adapter(tmp_path / "b", drawn(SPEC, 1, seed=1)[0].float(), SPEC, "tiny")
    file = tmp_path / "tokens.json"
    for folder, said in ((first, "written"), (other, "the same tokens")):
        assert main(["test", "--adapter", str(folder), "--columns", "48", "--manifest", str(file)]) == 0
        assert f"{file}: {said}" in capsys.readouterr().out
    assert main(["test", "--adapter", str(first), "--manifest", str(file)]) == 2
    assert "columns is 48 there and 64 here" in capsys.readouterr().err
    file.write_text("no manifest")
    assert main(["test", "--adapter", str(first), "--manifest", str(file)]) == 2
    assert "not a readable manifest" in capsys.readouterr().err
