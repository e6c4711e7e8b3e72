"""How well a sentence becomes a class mask: held-out splits of the vocabulary, then RPG's published demo sentences.

    python -m benchmarks.text_conditions --vocabulary cifar10 --demo

The demo sentences (`data/rpg_demo_prompts.tsv`, published with RPG's demo) are a reference test: nothing is trained or
selected on them, so run `--demo` only to report. Needs the extra `[text]`.
"""

import argparse
import csv
from pathlib import Path

import torch

from Gpt.text import SentenceEncoder, SentenceReader, reading_accuracy, train_reader, train_text_head
from Gpt.vocabulary import load_vocabulary, split_sentences

DEMO = Path(__file__).parent / "data" / "rpg_demo_prompts.tsv"


def splits_table(name: str, encoder: SentenceEncoder, seed: int) -> list[str]:
    """Markdown rows (class decisions, whole masks, fits or not, in percent) of a head trained on the training split."""
    vocabulary = load_vocabulary(name)
    splits = split_sentences(vocabulary, seed)
    head = train_text_head(encoder, splits["train"], vocabulary.classes, seed=seed)
    reader = SentenceReader(encoder, head)
    rows = []
    for split, sentences in splits.items():
        if split != "train":
            found = reading_accuracy(reader, sentences)
            rows.append(f"| {split} | " + " | ".join(f"{value:.1f}" for value in vars(found).values()) + " |")
    return rows


def demo_decisions(encoder: SentenceEncoder, seed: int) -> tuple[int, int]:
    """(right, all) class decisions on the demo sentences, with a head trained on the whole vocabulary."""
    reader = train_reader(encoder, "cifar10", seed)
    with DEMO.open() as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    names = load_vocabulary("cifar10").classes
    wanted = torch.tensor([[int(line[name]) for name in names] for line in lines], dtype=torch.bool)
    found = torch.stack([reading.mask for reading in reader.read_all([line["description"] for line in lines])])
    return int((found == wanted).sum()), wanted.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--demo", action="store_true", help="also measure the published demo sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="file that keeps sentence embeddings between calls")
    arguments = parser.parse_args()
    encoder = SentenceEncoder(cache=arguments.cache)
    header = ["| split | decisions | masks | fits |", "|---|---|---|---|"]
    print("\n".join(header + splits_table(arguments.vocabulary, encoder, arguments.seed)))
    if arguments.demo:
        right, total = demo_decisions(encoder, arguments.seed)
        print(f"\ndemo sentences: {right} of {total} class decisions ({100 * right / total:.1f} %)")


if __name__ == "__main__":
    main()
