"""Multi-query associative recall: how much can a recurrent state remember? (Arora et al. 2023, arXiv 2312.04927)

A sequence lists n key-value pairs, then asks for the value of every key. Attention looks it up; a recurrent model has
to have kept all pairs in its state. HGRN2 (arXiv 2404.07904) grows that state by its expand_ratio, at equal parameters.

    python -m benchmarks.mqar --output outputs/mqar               # the setting for a CPU, minutes per model
    python -m benchmarks.mqar --device cuda --vocabulary 8192 --length 256 --pairs 16 --width 128 --batch 256

Writes `mqar.png` (accuracy against the size of the state, and learning curves) and `mqar.md` (the same as a table).
Every model first learns to answer with *some* value of the sequence (1 / n) and then, suddenly, to recall: judge it by
its step budget, not by an early plateau. Recurrent models succeed in a narrow range of learning rates, each in its own
(arXiv 2508.19029), so each goes through several and its best on validation sequences is tested.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from Gpt.errors import ConfigError
from Gpt.seeds import derive_seed, rng
from rpg.backbones import build_backbone

UNASKED = -100  # the target where nothing is asked; what cross_entropy ignores
GAP_EXPONENT = 0.01  # queries cluster soon after the pairs, with a power-law tail, as in the paper


@dataclasses.dataclass(frozen=True)
class Setting:
    """The task, the size of the models and the training budget."""

    vocabulary: int = 32
    length: int = 16
    pairs: int = 4
    width: int = 32
    depth: int = 2
    batch: int = 32
    steps: int = 2000
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    weight_decay: float = 0.1
    test_sequences: int = 500
    evaluate_every: int = 100
    solved: float = 0.99
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if 4 * self.pairs > self.length:
            raise ConfigError(f"{self.pairs} pairs and queries need length {4 * self.pairs} or more, not {self.length}")
        if self.pairs >= self.vocabulary // 2:
            raise ConfigError(f"{self.pairs} pairs need a vocabulary above {2 * self.pairs}, not {self.vocabulary}")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A backbone of the comparison, and how many numbers one of its layers holds after the whole sequence."""

    label: str
    backbone: str
    options: dict[str, Any]
    state: int


def contenders(setting: Setting) -> list[Contender]:
    """HGRN2 by growing state (1 is HGRN); Mamba-2 with as large a state, then with as wide a key; attention."""
    width = setting.width
    expansions = [e for e in (1, 2, 4, 8, 16, 32, 128) if e <= width]
    labels = ["HGRN (e = 1)", *(f"HGRN2, e = {e}" for e in expansions[1:])]
    headdim = min(64, width // 2)
    return [
        *[Contender(name, "hgrn2", {"expand_ratio": e}, e * width) for name, e in zip(labels, expansions, strict=True)],
        *[
            Contender(f"Mamba-2, d_state = {d}", "mamba2", {"d_state": d, "headdim": headdim}, 2 * width * d)
            for d in (expansions[-1] // 2, expansions[-1])
        ],
        Contender("attention", "transformer", {"heads": 1, "mlp_ratio": 0.0}, 2 * width * setting.length),
    ]


def recall_batch(
    setting: Setting, count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Tokens and targets of `count` fresh sequences.

    Tokens: n times (key, value), keys below vocabulary / 2 and values from there on, no repeats; then every key once
    more, at even places, with 0 between. Targets: the key's value at its query, UNASKED elsewhere.
    """
    device, n, half = generator.device, setting.pairs, setting.vocabulary // 2

    def distinct(choices: int) -> Tensor:
        return torch.rand(count, choices, generator=generator, device=device).argsort(dim=1)[:, :n]

    keys, values = 1 + distinct(half - 1), half + distinct(setting.vocabulary - half)
    tokens = torch.zeros(count, setting.length, dtype=torch.long, device=device)
    tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values

    places = (setting.length - 2 * n) // 2
    # Gumbel-top-k: draws without replacement with these weights, in order (Vieira 2014)
    log_weights = (GAP_EXPONENT - 1) * torch.arange(1, places + 1, device=device).log()
    uniform = torch.rand(count, places, generator=generator, device=device).clamp_min(1e-20)
    queries = 2 * n + 2 * (log_weights - (-uniform.log()).log()).topk(n, dim=1).indices
    targets = torch.full_like(tokens, UNASKED)
    return tokens.scatter(1, queries, keys), targets.scatter(1, queries, values)


class RecallModel(nn.Module):
    """Embeddings (of positions too, for attention), a short convolution, the backbone, logits from the token embedding.

    The convolution lets a value meet the key before it, as in the hybrids of Arora et al.; what is left to the backbone
    is to remember. Backbones come without MLPs: they could not recall, only add parameters.
    """

    def __init__(self, setting: Setting, contender: Contender) -> None:
        super().__init__()
        self.tokens = nn.Embedding(setting.vocabulary, setting.width)
        self.positions = nn.Parameter(torch.zeros(setting.length, setting.width))
        self.positions.requires_grad_(contender.backbone == "transformer")
        self.convolution = nn.Conv1d(setting.width, setting.width, 4, groups=setting.width, bias=False)
        self.backbone = build_backbone(contender.backbone, setting.width, depth=setting.depth, **contender.options)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        x = self.tokens(tokens) + self.positions
        x = F.rms_norm(x, x.shape[-1:])
        x = x + self.convolution(F.pad(x.mT, (3, 0))).mT
        return self.backbone(x) @ self.tokens.weight.T


def build_model(setting: Setting, contender: Contender) -> RecallModel:
    """The untrained model, a function of the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(setting.seed, "mqar", "initialisation"))
        return RecallModel(setting, contender).to(setting.device)


def train(setting: Setting, model: RecallModel, learning_rate: float) -> Iterator[tuple[int, float]]:
    """(step, validation accuracy) every `evaluate_every` steps, until the budget is spent or the task is solved."""
    undecayed = {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in undecayed]},
        {"params": [p for name, p in model.named_parameters() if name in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=setting.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=setting.steps)
    for step in range(1, setting.steps + 1):
        tokens, targets = recall_batch(setting, setting.batch, rng(setting.device, setting.seed, "mqar", "train", step))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=UNASKED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % setting.evaluate_every == 0 or step == setting.steps:
            accuracy = evaluate(setting, model, "validation")
            yield step, accuracy
            if accuracy >= setting.solved:
                return


@torch.inference_mode()
def evaluate(setting: Setting, model: nn.Module, split: str) -> float:
    """Share of the queries of held-out sequences that are answered with the right value."""
    generator = rng(setting.device, setting.seed, "mqar", split)
    tokens, targets = recall_batch(setting, setting.test_sequences, generator)
    right = [model(x).argmax(-1) == y for x, y in zip(tokens.split(100), targets.split(100), strict=True)]
    return torch.cat(right)[targets != UNASKED].float().mean().item()


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained contender: validation accuracy by step, test accuracy at the end, and what it cost."""

    contender: Contender
    learning_rate: float
    parameters: int
    curve: list[tuple[int, float]]
    accuracy: float
    seconds: float


def run(setting: Setting, contender: Contender, learning_rate: float) -> Result:
    """Train and test one contender at one learning rate, and print how it goes."""
    model, start, curve = build_model(setting, contender), time.perf_counter(), []
    for step, accuracy in train(setting, model, learning_rate):
        curve.append((step, accuracy))
        print(f"{contender.label:24s} rate {learning_rate:g}  step {step:6d}  accuracy {accuracy:.3f}", flush=True)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = time.perf_counter() - start
    return Result(contender, learning_rate, parameters, curve, evaluate(setting, model, "test"), seconds)


def compare(setting: Setting, chosen: Sequence[Contender]) -> list[Result]:
    """The best of each contender over the learning rates, on the same sequences; a solved task ends its sweep."""
    results = []
    for contender in chosen:
        attempts: list[Result] = []
        for learning_rate in setting.learning_rates:
            attempts.append(run(setting, contender, learning_rate))
            if attempts[-1].curve[-1][1] >= setting.solved:
                break
        results.append(max(attempts, key=lambda attempt: attempt.curve[-1][1]))
    return results


def table(setting: Setting, results: Sequence[Result]) -> str:
    """The results as a markdown table under the setting that they were measured in."""
    lines = [
        f"Multi-query associative recall: {setting.pairs} pairs in {setting.length} tokens, vocabulary "
        f"{setting.vocabulary}; width {setting.width}, {setting.depth} layers, at most {setting.steps} steps of "
        f"{setting.batch} sequences, best of the learning rates {', '.join(map(str, setting.learning_rates))}, "
        f"seed {setting.seed}. "
        f"Guessing one of the values: {1 / setting.pairs:.3f}.",
        "",
        "| model | state per layer | parameters | accuracy | learning rate | steps | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        state = f"{result.contender.state:,}" + (" (grows)" if result.contender.backbone == "transformer" else "")
        lines.append(
            f"| {result.contender.label} | {state} | {result.parameters:,} | {result.accuracy:.3f} "
            f"| {result.learning_rate:g} | {result.curve[-1][0]:,} | {result.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(setting: Setting, results: Sequence[Result], path: Path) -> None:
    """Accuracy against the numbers in a layer's state on the left, against training steps on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_state, by_step = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["viridis"](torch.linspace(0, 0.9, len(results)).tolist())
    for result, colour in zip(results, colours, strict=True):
        marker = {"hgrn2": "o", "mamba2": "s", "transformer": "^"}[result.contender.backbone]
        style = {"color": colour, "markersize": 9, "markerfacecolor": "none"}
        by_state.plot(result.contender.state, result.accuracy, marker, **style)
        by_step.plot(*zip(*result.curve, strict=True), color=colour, label=result.contender.label)
    for axes in (by_state, by_step):
        axes.axhline(1 / setting.pairs, color="grey", linestyle=":", label="one of the values")
        axes.set_ylim(-0.02, 1.02)
    by_state.set_xscale("log", base=2)
    by_state.set(xlabel="numbers in the state of a layer", ylabel="accuracy of recall")
    by_step.set(xlabel="training step")
    by_step.legend(fontsize=8)
    figure.suptitle(f"{setting.pairs} key-value pairs, {setting.length} tokens")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description="Multi-query associative recall against state size.")
    parser.add_argument("--output", type=Path, default=Path("outputs/mqar"))
    parser.add_argument("--backbones", nargs="+", choices=["hgrn2", "mamba2", "transformer"], help="only these")
    for field in dataclasses.fields(Setting):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, tuple):
            parser.add_argument(flag, type=float, nargs="+", default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    output, backbones = options.pop("output"), options.pop("backbones")
    setting = Setting(**options | {"learning_rates": tuple(options["learning_rates"])})
    results = compare(setting, [c for c in contenders(setting) if backbones is None or c.backbone in backbones])
    output.mkdir(parents=True, exist_ok=True)
    (output / "mqar.md").write_text(table(setting, results))
    draw(setting, results, output / "mqar.png")
    print(table(setting, results))
    return results


if __name__ == "__main__":
    main()
