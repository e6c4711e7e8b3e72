"""How well a sentence becomes a class mask: held-out splits of the vocabulary, then RPG's published demo sentences.

    python -m benchmarks.text_conditions --vocabulary cifar10 --demo
    python -m benchmarks.text_conditions --run runs/cifar10_mask_rpg --device cuda --data DATA

The demo sentences (`data/rpg_demo_prompts.tsv`, published with RPG's demo) are a reference test: nothing is trained or
selected on them, so run `--demo` only to report. Some say what the vocabulary says too ("mammals", "things that can
fly"), in which nothing is new to the reader: the table tells them from the others. With `--run`, the generator of that
run, which main.py has trained, writes networks for what each sentence was read as; they are tested on what it was
published to mean. Needs the extra `[text]`.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from Gpt.errors import CheckpointError
from Gpt.evaluation.population import test_population
from Gpt.evaluation.writing import Request, Writer
from Gpt.run.experiment import Experiment
from Gpt.run.folder import stored_config
from Gpt.text import DEFAULT_MODEL, SentenceEncoder, SentenceReader, reading_accuracy, train_reader, train_text_head
from Gpt.vocabulary import CLASSES, WORDINGS, compose, load_vocabulary, split_sentences
from Gpt.vocabulary.grammar import clauses, parse

DEMO = Path(__file__).parent / "data" / "rpg_demo_prompts.tsv"
NETWORKS = 10  # for each sentence


def splits_table(name: str, encoder: SentenceEncoder, seed: int) -> list[str]:
    """Markdown rows (class decisions, whole masks, fits or not, in percent) of a head trained on the training split."""
    vocabulary = load_vocabulary(name)
    splits = split_sentences(vocabulary, seed)
    head = train_text_head(encoder, splits["train"], vocabulary.classes, seed=seed)
    reader = SentenceReader(encoder, head, vocabulary)
    rows = []
    for split, sentences in splits.items():
        if split != "train":
            found = reading_accuracy(reader, sentences)
            rows.append(f"| {split} | " + " | ".join(f"{value:.1f}" for value in vars(found).values()) + " |")
    return rows


def demo_sentences() -> tuple[list[str], Bool[Tensor, "sentences 10"]]:
    """The published sentences and the classes that they mean."""
    with DEMO.open() as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    masks = [[line[name] == "1" for name in CLASSES["cifar10"]] for line in lines]
    return [line["description"] for line in lines], torch.tensor(masks)


def in_vocabulary(sentences: Sequence[str], name: str = "cifar10") -> Bool[Tensor, " sentences"]:
    """Whether every clause of a sentence is, word for word, one that the reader is trained on."""
    words = load_vocabulary(name)
    trained = compose(words.names, words.attributes, WORDINGS, seed=0)
    known = {clause.lower() for sentence in trained for clause in clauses(parse(sentence.text))}
    return torch.tensor([all(clause.lower() in known for clause in clauses(parse(text))) for text in sentences])


def demo_table(
    sentences: Sequence[str],
    wanted: Bool[Tensor, "sentences 10"],
    read: Bool[Tensor, "sentences 10"],
    known: Bool[Tensor, " sentences"],
    columns: dict[str, Float[Tensor, " sentences"]],
) -> list[str]:
    """Markdown: right class decisions of every sentence and what was measured of its networks; sums and means last, of
    the sentences in `known` words, of the others, and of all."""
    right = (read == wanted).sum(1)
    rows = [["sentence", "right decisions", *columns], ["---"] * (2 + len(columns))]
    for i, sentence in enumerate(sentences):
        rows.append([sentence, f"{right[i]} of 10", *(f"{values[i]:.1f}" for values in columns.values())])
    for name, part in {"in the vocabulary's words": known, "in others": ~known, "all": known | ~known}.items():
        if part.any():
            count = 10 * int(part.sum())
            total = f"{right[part].sum()} of {count} ({100 * right[part].sum() / count:.1f} %)"
            means = (f"{values[part].mean():.2f}" for values in columns.values())
            rows.append([f"{name}: {part.sum()}", total, *means])
    return [f"| {' | '.join(row)} |" for row in rows]


def network_accuracy(
    experiment: Experiment, told: Bool[Tensor, "sentences 10"], wanted: Bool[Tensor, "sentences 10"]
) -> Float[Tensor, " sentences"]:
    """Test accuracy (percent) on the wanted masks, a mean over `NETWORKS` networks that were told the others."""
    settings, device = experiment.config.evaluation, experiment.device
    write = Writer(experiment.trained(), settings.steps, settings.guidance, settings.seed, settings.max_batch)
    prompt = told.repeat_interleave(NETWORKS, 0).float().to(device)
    weights = write(Request(len(prompt), {"class_mask": prompt}), "demo sentences")
    masks = wanted.repeat_interleave(NETWORKS, 0)
    error = test_population(experiment.task, weights, "test", masks, device=device)["test_error"]
    return 100 - error.view(-1, NETWORKS).mean(1)


def trained_run(folder: Path, device: str, data: str | None) -> Experiment:
    """A run of class masks of CIFAR-10.

    Raises:
        CheckpointError: there is none in the folder.
    """
    config = stored_config(folder)
    if config is None:
        command = f"python main.py --config-name cifar10_mask_rpg run.root={folder.parent} run.name={folder.name}"
        raise CheckpointError(f"there is no run in {folder}; train one with: {command}")
    place = replace(config.run, root=str(folder.parent), name=folder.name)
    found = replace(config.data, root=data or config.data.root)
    return Experiment(replace(config, run=place, data=found, device=device), folder.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--demo", action="store_true", help="also measure the published demo sentences")
    parser.add_argument("--run", type=Path, help="run folder whose generator writes networks for the demo sentences")
    parser.add_argument("--device", default="auto", help="of that generator")
    parser.add_argument("--data", help="folder with CIFAR-10; that of the run by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default=DEFAULT_MODEL, help="sentence encoder: a folder, or a name, see README.md")
    parser.add_argument("--cache", type=Path, help="file that keeps the encoder's sentence embeddings between calls")
    arguments = parser.parse_args()
    encoder = SentenceEncoder(arguments.encoder, arguments.cache)
    header = ["| split | decisions | masks | fits |", "|---|---|---|---|"]
    print("\n".join(header + splits_table(arguments.vocabulary, encoder, arguments.seed)))
    if arguments.demo or arguments.run:
        sentences, wanted = demo_sentences()
        readings = train_reader(encoder, "cifar10", arguments.seed).read_all(sentences)
        read, columns = torch.stack([reading.mask for reading in readings]), {}
        if arguments.run:
            experiment = trained_run(arguments.run, arguments.device, arguments.data)
            columns["accuracy of networks for what was read, %"] = network_accuracy(experiment, read, wanted)
            columns["for what was meant, %"] = network_accuracy(experiment, wanted, wanted)
        print("\n" + "\n".join(demo_table(sentences, wanted, read, in_vocabulary(sentences), columns)))


if __name__ == "__main__":
    main()
