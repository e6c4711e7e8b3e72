"""docs/adapters.md is true: its commands compose, and the task file that it points at can be copied as it stands."""

import json
import re
import shlex
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import main
from Gpt import adapters
from Gpt.adapters.peft_io import save_adapter
from Gpt.adapters.spec import AdapterSpec, adapter_structure
from Gpt.adapters.tools import main as tool
from Gpt.adapters.user import read_prompts
from Gpt.run.command_line import CONFIGS, compose
from Gpt.tasks import check_entry

PAGE = (Path(main.__file__).parent / "docs" / "adapters.md").read_text(encoding="utf-8")
COMMANDS = [
    re.split(r" {2,}", line.strip())[0]  # what a command is for stands behind it
    for line in re.sub(r" *\\\n *", " ", PAGE).splitlines()
    if "python main.py --config-name" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_compose(command):
    words = shlex.split(command)
    name, settings = words[words.index("--config-name") + 1], words[words.index("--config-name") + 2 :]
    assert (CONFIGS / f"{name}.yaml").is_file()
    compose(name, settings)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """An empty working folder, whose `prompts` are not those of another test's."""
    monkeypatch.chdir(tmp_path)
    read_prompts.cache_clear()
    yield
    read_prompts.cache_clear()


@pytest.mark.usefixtures("own_folder")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft reads it of transformers
def test_the_task_file_works_as_it_stands():
    pytest.importorskip("peft")
    for task in ("arc", "boolq"):
        samples = [{"prompt": f"{task} {i}?", "answer": str(i)} for i in range(20)]
        Path(f"{task}.jsonl").write_text("\n".join(map(json.dumps, samples)))
    commands = re.findall(r"python -m Gpt.adapters.tools (prepare .*)", adapters.__doc__)
    assert [tool(shlex.split(command)) for command in commands] == [0]
    spec = AdapterSpec(rank=2, targets=("q_proj",), train_a=True)
    save_adapter("adapters/arc/checkpoint-100", torch.ones(adapter_structure("tiny", spec).size), spec, "tiny")
    text = re.search(r"^    # my_tasks.py\n((?:    .*\n|\n)+?)\nand train", adapters.__doc__, re.MULTILINE)
    found: dict = {}
    exec(dedent(text[1]).replace('"smollm2"', '"tiny"'), found)  # the same where the small model is not installed
    entry = found["TASK_METADATA"]["mine"]
    assert check_entry("mine", entry).checkpoints == "adapters" and entry["recipe"].spec == spec
