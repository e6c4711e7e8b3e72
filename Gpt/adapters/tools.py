"""Commands around adapters.

python -m Gpt.adapters.tools prepare --source arc.jsonl --output-dir prompts --samples-per-prompt 4 --test-ratio 0.1
python -m Gpt.adapters.tools analyze --adapters folder       statistics, and whether the adapters share a gauge
python -m Gpt.adapters.tools test --adapter folder           exact round trip of one adapter
python -m Gpt.adapters.tools export --zoo zoos/lora_rules --output-dir adapters      a collected library as PEFT folders
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.peft_io import adapter_folders, gauge_report, load_adapter, read_adapter, save_adapter, spec_of
from Gpt.adapters.spec import AdapterSpec, adapter_structure
from Gpt.adapters.tokens import AdapterTokens
from Gpt.adapters.user import FILES, prepare_prompts, write_prompts
from Gpt.data.shards import read_manifest
from Gpt.data.zoo import Zoo
from Gpt.errors import DataError, StructureError, UserError
from Gpt.files import write_text
from Gpt.recipes import AdapterRecipe


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        for line in options.command(options):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m Gpt.adapters.tools", description="Commands around adapters.")
    commands = parser.add_subparsers(required=True)
    prepared = commands.add_parser("prepare", help="sort a JSONL file of samples into prompt sets that share no prompt")
    prepared.add_argument("--source", nargs="+", type=Path, required=True, help="files with one JSON object a line")
    prepared.add_argument("--output-dir", type=Path, required=True)
    prepared.add_argument("--samples-per-prompt", type=int, default=4)
    prepared.add_argument("--test-ratio", type=float, default=0.1)
    prepared.add_argument("--prompt-key", default="prompt")
    prepared.add_argument("--answer-key", default="answer", help="all samples have one, or none")
    prepared.add_argument("--task-key", default="task", help="where a sample has none, its file is its task")
    prepared.set_defaults(command=prepare)
    analyzed = commands.add_parser("analyze", help="statistics of all adapters below a folder")
    analyzed.add_argument("--adapters", type=Path, required=True)
    analyzed.set_defaults(command=analyze)
    tested = commands.add_parser("test", help="exact round trip of one adapter, through its tokens")
    tested.add_argument("--adapter", type=Path, required=True)
    tested.add_argument("--base", help="name of the base model; by default the one that the adapter names")
    tested.add_argument("--columns", type=int, help="of a token; by default what divides every layer")
    tested.add_argument("--manifest", type=Path, help="what the tokens are: written, or compared if it is there")
    tested.set_defaults(command=round_trip)
    exported = commands.add_parser("export", help="the adapters of a collected zoo as PEFT folders, TASK/run-00000")
    exported.add_argument("--zoo", type=Path, required=True)
    exported.add_argument("--output-dir", type=Path, required=True)
    exported.set_defaults(command=export)
    return parser


def prepare(options: argparse.Namespace) -> list[str]:
    """Write the folder that `AdapterFamily(suite=folder)` reads.

    Raises:
        DataError: some samples have an answer and some have none, or there is something in the folder.
    """
    _check_empty(options.output_dir)
    samples = [sample for file in options.source for sample in _samples(file, options)]
    parts = prepare_prompts(samples, options.samples_per_prompt, options.test_ratio)
    with _written("--output-dir", options.output_dir):
        write_prompts(options.output_dir, parts)
    tasks = {found.task for sets in parts.values() for found in sets}
    counts = ", ".join(f"{len(sets)} prompt sets in {FILES[part]}" for part, sets in parts.items())
    lines = [f"{options.output_dir}: {len(tasks)} tasks, {counts}"]
    if not parts["train"][0].answers:
        lines.append(
            f"no sample has an answer under {options.answer_key!r}: adapters for these prompts are imported, not "
            "trained here, and what is written is judged by its distance to them"
        )
    return lines


def _check_empty(folder: Path) -> None:
    """Raises:
    DataError: there is something in it.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"--output-dir {folder} is not empty; give a new folder, or empty it")


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    """Raises:
    DataError: what is done in here cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{option} {path} cannot be written ({error}); name another place") from error


def _samples(file: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    try:
        # A text may hold what splitlines takes for the end of a line.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); it should hold one JSON object a line") from error
    samples = [_sample(f"{file}, line {i}", line, options) for i, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise DataError(f"{file} is empty; it should hold one JSON object a line")
    return [{"task": file.stem} | sample for sample in samples]


def _sample(where: str, line: str, options: argparse.Namespace) -> dict[str, str]:
    """Where it is; prompt and, if they are there, answer and task, under these names."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON object ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get(options.prompt_key), str):
        raise DataError(f"{where} has no text under {options.prompt_key!r}; name the key with --prompt-key")
    keys = {"prompt": options.prompt_key, "answer": options.answer_key, "task": options.task_key}
    return {"place": where} | {name: str(fields[key]) for name, key in keys.items() if fields.get(key) is not None}


def analyze(options: argparse.Namespace) -> list[str]:
    """Size, form and norms of every adapter, their spread, and the gauge."""
    folders = adapter_folders(options.adapters)
    adapters = [read_adapter(folder)[0] for folder in folders]
    lines = []
    for folder, tensors in zip(folders, adapters, strict=True):
        spec = spec_of(folder)
        norms = ", ".join(f"|{factor}| {_norm(tensors, factor):.4g}" for factor in ("lora_A", "lora_B"))
        kind = ("rs" if spec.rslora else "") + ("DoRA" if spec.dora else "LoRA")
        lines.append(
            f"{folder.relative_to(options.adapters)}: {sum(t.numel() for t in tensors.values()):,} numbers, {kind} of "
            f"rank {spec.rank}, alpha {spec.alpha:g}, {norms}"
        )
    if len(adapters) > 1:
        report = gauge_report(adapters)
        lines.append(
            f"{report.adapters} adapters; mean cosines: A {report.cosine_a:.3f}, B {report.cosine_b:.3f}, "
            f"B A {report.cosine_change:.3f}"
        )
        lines.append(f"warning: {report.warning}" if report.warning else "the adapters share a gauge")
    return lines


def _norm(tensors: dict[str, torch.Tensor], factor: str) -> float:
    return float(sum(value.float().square().sum() for name, value in tensors.items() if factor in name)) ** 0.5


def round_trip(options: argparse.Namespace) -> list[str]:
    """Read an adapter, cut it into tokens, join and write it again, and compare every number of both files.

    Raises:
        StructureError: a number was lost or changed, or the tokens are not those of the manifest; names the tensor, or
            the difference.
    """
    spec, (before, config) = spec_of(options.adapter), read_adapter(options.adapter)
    base = options.base or config.get("base_model_name_or_path")
    if not base:
        raise DataError(f"{options.adapter} does not say which base model it is for; name it with --base")
    weights = load_adapter(options.adapter, spec, base)
    tokens = AdapterTokens(adapter_structure(base, spec), options.columns)
    joined = tokens.decode(tokens.encode(weights[None]))[0]
    with tempfile.TemporaryDirectory() as folder:
        after, _ = read_adapter(save_adapter(folder, joined, spec, base))
    for name, value in before.items():
        if name not in after or not torch.equal(after[name].float(), value.float()):
            raise StructureError(f"{options.adapter}: {name} does not survive the round trip")
    count, rows, columns = tokens.shape
    size, manifest = sum(value.numel() for value in before.values()), tokens.manifest()
    lines = [
        f"{options.adapter}: {len(before)} tensors, {size:,} numbers, {len(weights):,} of them in the flat row: exact",
        f"{count:,} tokens of {rows} x {columns} cover {manifest['coverage']:.0%} of it",
    ]
    return lines + ([_compared(tokens, manifest, options.manifest)] if options.manifest else [])


def _compared(tokens: AdapterTokens, manifest: dict[str, Any], file: Path) -> str:
    if not file.exists():
        with _written("--manifest", file):
            write_text(file, json.dumps(manifest))
        return f"{file}: written"
    try:
        tokens.check_manifest(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{file} is not a readable manifest ({error}); delete it") from error
    return f"{file}: the same tokens"


def export(options: argparse.Namespace) -> list[str]:
    """Write the last snapshot of every run below the name of its task; `import_adapters` reads such a folder.

    Raises:
        DataError: the zoo is not one that was collected for adapters, or there is something in the folder, whose
            adapters would be taken for these.
    """
    _check_empty(options.output_dir)
    recipe = read_manifest(options.zoo).recipe
    if recipe["type"] != AdapterRecipe.__name__:
        raise DataError(f"{options.zoo} is not a zoo of adapters that this library has trained")
    spec = AdapterSpec(**recipe["spec"] | {"targets": tuple(recipe["spec"]["targets"])})
    family = AdapterFamily(**recipe["family"])
    zoo = Zoo.open(options.zoo, adapter_structure(recipe["base"], spec), storage="disk")
    for row, member in enumerate(family.member_of_runs(zoo.run_ids).tolist()):
        weights = zoo.read(torch.tensor([row]), torch.tensor([zoo.snapshots - 1]))[0]
        folder = options.output_dir / family.members[member].name / f"run-{int(zoo.run_ids[row]):05d}"
        with _written("--output-dir", options.output_dir):
            save_adapter(folder, weights, spec, recipe["base"])
    return [f"{options.output_dir}: {zoo.runs} adapters"]


if __name__ == "__main__":
    sys.exit(main())
