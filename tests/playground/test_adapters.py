"""Adapters of a language model, for prompts."""

import json
from pathlib import Path

import pytest
from small_runs import LORA, experiment

import playground
from Gpt.errors import ConfigError
from playground import PlaygroundConfig, play


def test_an_adapter_is_written_for_a_prompt_a_file_and_a_batch(adapters, capsys):
    pytest.importorskip("peft")
    prompts = ["Give the first word.", "No brackets."]
    (adapters / "prompts.txt").write_text("\n\n".join(prompts))
    lines = [{"task": "a b", "prompts": prompts}, {"task": "c", "prompts": ["Last."]}]
    (adapters / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trained = playground.run_of(experiment("device=cpu", name="lora_tiny").config, "lora_tiny", [])
    assert trained.task.recipe.iterations == 7  # as it was trained

    def files(**options) -> dict[str, bytes]:
        folder = play(trained, PlaygroundConfig(**options))
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}

    name = "adapter_model.safetensors"
    one, file = files(prompt=prompts[0]), files(prompts="prompts.txt", out="file")
    batch = files(prompts="tasks.jsonl", out="batch")
    assert one.keys() == file.keys() == {name} and batch.keys() == {f"a b/{name}", f"c/{name}"}
    assert file[name] == batch[f"a b/{name}"] and len({one[name], *batch.values()}) == 3
    assert "batch/c: an adapter, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["prompt=", "prompts=FILE"]),
        ({"prompt": "a", "prompts": "b"}, ["prompt=", "prompts=FILE"]),
        ({"prompt": "a", "count": 3}, ["count", "one for each task"]),
        ({"prompt": "a", "wanted": 3.0}, ["wanted", "prompts alone"]),
        ({"prompt": "a", "updates": 2}, ["updates", "prompts alone"]),
        ({"prompt": "a", "guidance": 2.0}, ["guidance=2.0"]),
    ],
)
def test_wishes_that_no_adapter_fulfils_are_refused(adapters, options, words):
    with pytest.raises(ConfigError) as caught:
        play(experiment(*LORA, name="lora_tiny"), PlaygroundConfig(**options, out="out"))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not Path("out").exists()
