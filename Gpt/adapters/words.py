"""The four hundred everyday English words that the synthetic tasks are about."""

from importlib.resources import files

WORDS = tuple(files("Gpt.adapters").joinpath("words.tsv").read_text(encoding="utf-8").split())
