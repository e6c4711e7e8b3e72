"""The commands, as a user calls them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_gen.collect import collect
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.importer import import_adapters
from Gpt.adapters.peft_io import CONFIG, WEIGHTS, save_adapter
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.tools import main
from Gpt.adapters.user import read_prompts
from Gpt.catalogue.adapters import adapter_entry
from Gpt.data.zoo import Zoo
from Gpt.recipes import AdapterRecipe
from Gpt.tasks import check_entry

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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"}\n\n{"text": "b"}', "line 3 has no text under 'prompt'; name the key with --prompt-key"),
        ('{"prompt": null}', "line 1 has no text under 'prompt'"),
        ('["a", "b"]', "line 1 has no text under 'prompt'"),
        ('{"prompt": "a"}\n{"prompt"', "line 2 is no JSON object"),
        ("\n\n", "is empty"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, capsys, content, said):
    (tmp_path / "x.jsonl").write_text(content)
    assert main(["prepare", "--source", str(tmp_path / "x.jsonl"), "--output-dir", str(tmp_path / "o")]) == 2
    assert f"x.jsonl, {said}" in (error := capsys.readouterr().err) or f"x.jsonl {said}" in error
    assert not (tmp_path / "o").exists()


def test_blank_lines_are_passed_over_and_null_is_no_answer(tmp_path):
    for name, answers in {"full": range(6), "null": [None] * 6}.items():
        samples = [{"prompt": f"{i}\u2028", "answer": answer} for i, answer in enumerate(answers)]
        lines = "\n\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples)
        (tmp_path / "x.jsonl").write_text(f"{lines}\n")
        options = ["--output-dir", str(tmp_path / name), "--samples-per-prompt", "1"]
        assert main(["prepare", "--source", str(tmp_path / "x.jsonl"), *options]) == 0
        found = {prompts.prompts[0]: prompts.answers for _, prompts in read_prompts(str(tmp_path / name)).sets}
        assert found == {f"{i}\u2028": (str(i),) if name == "full" else () for i in range(6)}


def test_samples_with_answers_and_samples_without_are_named(tmp_path, capsys):
    full = write_lines(tmp_path / "full.jsonl", [{"prompt": f"{i}", "answer": i} for i in range(9)])
    bare = write_lines(tmp_path / "bare.jsonl", [{"prompt": f"{i}"} for i in range(9)])
    out = ["--output-dir", str(tmp_path / "o")]
    assert main(["prepare", "--source", full, bare, *out]) == 2
    error = capsys.readouterr().err
    assert f"{bare}, line 1 has no answer, but {full}, line 1 has one" in error and "--answer-key none" in error
    assert main(["prepare", "--source", full, bare, *out, "--answer-key", "none"]) == 0
    assert "no sample has an answer under 'none': adapters for these prompts are imported" in capsys.readouterr().out


def test_prompts_that_were_prepared_before_are_not_overwritten(tmp_path, capsys):
    source = write_lines(tmp_path / "x.jsonl", [{"prompt": str(i)} for i in range(9)])
    command = ["prepare", "--source", source, "--output-dir", str(tmp_path / "o")]
    assert main(command) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "o").iterdir()}
    assert main([*command, "--samples-per-prompt", "1"]) == 2
    assert "o is not empty; give a new folder, or empty it" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path / "o").iterdir()} == before


def test_files_that_cannot_be_read_or_written_are_named(tmp_path, capsys):
    source = write_lines(tmp_path / "x.jsonl", [{"prompt": str(i)} for i in range(9)])
    assert main(["prepare", "--source", str(tmp_path / "y.jsonl"), "--output-dir", str(tmp_path / "o")]) == 2
    assert "y.jsonl cannot be read" in capsys.readouterr().err
    assert main(["prepare", "--source", source, "--output-dir", f"{source}/o"]) == 2
    assert "cannot be written" in capsys.readouterr().err


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


def test_an_adapter_that_names_no_base_model_is_told_one(tmp_path, drawn, capsys):
    folder = save_adapter(tmp_path / "a", drawn(SPEC, 1)[0].float(), SPEC, "tiny")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert main(["test", "--adapter", str(folder)]) == 2
    assert "does not say which base model it is for; name it with --base" in capsys.readouterr().err
    assert main(["test", "--adapter", str(folder), "--base", "tiny"]) == 0


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
    assert main(["test", "--adapter", str(first), "--manifest", str(tmp_path / "none" / "tokens.json")]) == 2
    assert "tokens.json cannot be written" in capsys.readouterr().err


def test_a_collected_library_becomes_folders_that_are_imported_again(tmp_path, capsys):
    family = AdapterFamily("mini", 1, 1, 1, train_examples=16, examples=2, prompts=1)
    recipe = AdapterRecipe("tiny", SPEC, iterations=3, examples=2)
    task = check_entry("adapters", adapter_entry(family, recipe))
    collect(task, tmp_path / "zoo", runs=7, snapshots=2, spacing="tail")
    assert main(["export", "--zoo", str(tmp_path / "zoo"), "--output-dir", str(tmp_path / "out")]) == 0
    assert "7 adapters" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert main(["export", "--zoo", str(tmp_path / "zoo"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "out is not empty; give a new folder" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    (tmp_path / "file").touch()
    assert main(["export", "--zoo", str(tmp_path / "zoo"), "--output-dir", str(tmp_path / "file")]) == 2
    assert "file cannot be written" in capsys.readouterr().err
    zoos = [tmp_path / "zoo", tmp_path / "again"]
    import_adapters(tmp_path / "out", zoos[1], task)
    ours, again = (Zoo.open(folder, task.structure) for folder in zoos)
    rows = torch.arange(7)
    assert torch.equal(ours.read(rows, torch.ones_like(rows)), again.read(rows, torch.zeros_like(rows)))
    assert main(["export", "--zoo", str(zoos[1]), "--output-dir", str(tmp_path / "more")]) == 2
    assert "is not a zoo of adapters that this library has trained" in capsys.readouterr().err
