"""Set algebra in sentences: "animals that cannot fly" is animals minus animals that can fly.

Mean-pooled sentence embeddings put a sentence beside its negation and blur lists, so those are taken apart here, and
only clauses without negation are embedded. Everything the rules do not know stays one clause.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Everything:
    """All classes: "things", "all classes", "anything"."""


@dataclass(frozen=True)
class Clause:
    """A phrase to be read as a whole."""

    text: str


@dataclass(frozen=True)
class Union:
    """Classes that fit any of the parts."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True)
class Difference:
    """Classes that fit the first and not the second."""

    kept: "Expression"
    removed: "Expression"


Expression = Everything | Clause | Union | Difference

_SPELLINGS = (
    (r"[’`]", "'"),
    (r"\bcan(?:not|'t)\b", "can not"),
    (r"n't\b", " not"),
    (r"\bnon[- ](\w+) (\w+)", r"\2 that are not \1"),
    (r"\bnon[- ](?=\w)", "not "),
    (r"\b(?:all|everything|anything) (?:but|except)\b", "everything except"),
    (r"\b(?:with|having|has|have) no\b", "without"),
    (r"\b(?:lacking|lack|lacks)\b", "without"),
    (r"\bnobody\b", "people do not"),
    # What stands around the classes without saying anything about them.
    (
        r",? (?:from|apart from|against|and discard|and ignore|and leave out) "
        r"(?:the rest|(?:all )?(?:the )?others|everything else)\b",
        "",
    ),
    (r"[.!?\s]+$", ""),
)  # fmt: skip
_VERBS = (
    "select|classif(?:y|ies)|find|choose|picks?(?: out)?|show(?:s|ing)?|detect|recogni[sz]es?|identif(?:y|ies)|"
    "separate|mark|keep|want|looking for|tells?|contain(?:s|ing)?|give me|list"
)
# A verb introduces the classes only after words of this kind: "animals that people keep" stays whole.
_FILLERS = (
    "please|i|we|you|am|can|could|would|like|need|to|an?|the|me|that|which|networks?|classifiers?|models?|help|build|generate|"
    "make|create|write|photos?|images?|pictures?|tell|whether|every|all|if|and"
)
_CARRIER = r"(?:a |an )?(?:every |all |any |only |the |these |those |me |please )*(?:the )?"
_PICTURES = r"(?:(?:pictures?|images?|photos?|kinds?|class(?:es)?|categor(?:y|ies)|types?) (?:of|with|showing) )?"
_QUESTION = r"(?:which (?:of (?:these|them|those) )?(?:are|is) |is it one of )?"
_NETWORK = r"(?:(?:network|classifier|model)s? (?:for|of) )?"
_PREFIX = re.compile(
    rf"^(?:(?:(?:{_FILLERS}) )*(?:{_VERBS}) )*{_QUESTION}{_CARRIER}{_NETWORK}{_CARRIER}{_PICTURES}{_CARRIER}"
)
_NEUTRAL = re.compile(
    r"^(?:(?:all|any|every|the|these|those|other|single|of|ten|kinds?|and)\b ?)*"
    r"(?:things?|objects?|items?|class(?:es)?|categor(?:y|ies)|pictures?|images?|photos?|everything|anything|something|"
    r"stuff|whatever)?"
    r"(?: (?:that|which) (?:are|is))?$"
)
_EXCEPTIONS = re.compile(
    r"^(?P<kept>.*?)\b(?:except(?: for)?|excluding|exclude|other than|apart from|aside from|besides|not including|"
    r"but not|and not|minus)\b(?P<removed>.+)$"
)
_WITHOUT = re.compile(r"^(?P<kept>.*?)\bwithout (?:a |an |any )?(?P<removed>.+)$")
_NEGATION = re.compile(
    r"^(?P<kept>.*?)\b(?:(?:that|which|who) )?(?:(?P<verb>are|is|do|does|can|could|was|were|will) )?"
    r"(?:not|never|no)\b(?P<removed>.+)$"
)
_AGAIN = re.compile(r"(?:,? (?:and|or|nor)|,) (?:not|no|without) (?:an? |any )?")
_DANGLING = re.compile(r"(?:\b(?:that|which|who)\b ?)?(?:\b(?:you|people|they|we|one|humans|are|is)\b)?$")
_MODIFIER = re.compile(
    r"\b(?:that|which|who|whose|with|for|from|in|on|at|by|to|used|made|found|you|people|between|into|against|than)\b"
)
_AND = re.compile(r"\s*,(?: and| or)?\s+|\s+(?:and also|as well as|together with|and|or|plus)\s+")


def parse(sentence: str) -> Expression:
    """Take a sentence apart into clauses, unions and differences."""
    text = " ".join(sentence.lower().split())
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return _expression(_PREFIX.sub("", text, count=1) or text)


def evaluate(
    expression: Expression, probabilities: Mapping[str, Float[Tensor, " outputs"]], outputs: int
) -> Float[Tensor, " outputs"]:
    """Probabilities of an expression from those of its clauses: minimum, maximum, complement (Zadeh 1965).

    Args:
        probabilities: for every text of `clauses(expression)`, those of the classes and, last, that it fits any class.
        outputs: number of classes plus one.
    """
    match expression:
        case Clause(text):
            return probabilities[text]
        case Union(parts):
            return torch.stack([evaluate(part, probabilities, outputs) for part in parts]).amax(0)
        case Difference():
            parts = (expression.kept, expression.removed)
            kept, removed = (evaluate(part, probabilities, outputs) for part in parts)
            return torch.cat([kept.minimum(1 - removed)[:-1], kept[-1:]])
    return torch.ones(outputs)


def clauses(expression: Expression) -> list[str]:
    """The texts that `evaluate` needs to know about, in their order."""
    match expression:
        case Clause(text):
            return [text]
        case Union(parts):
            return [text for part in parts for text in clauses(part)]
        case Difference(kept, removed):
            return clauses(kept) + clauses(removed)
    return []


def _expression(text: str) -> Expression:
    text = re.sub(r"^(?:both|either) ", "", text.strip(" ,."))
    if _NEUTRAL.match(text):
        return Everything()
    if match := _EXCEPTIONS.match(text):
        return Difference(_expression(match["kept"]), _expression(_PREFIX.sub("", match["removed"].strip(), count=1)))
    if match := _WITHOUT.match(text):
        kept = _DANGLING.sub("", match["kept"].strip()).strip()
        return Difference(_expression(kept), _any(f"{kept or 'things'} with ", match["removed"]))
    if match := _NEGATION.match(text):
        return _negated(match["kept"].strip(), match["verb"], match["removed"].strip())
    return _listed(text)


def _negated(kept: str, verb: str | None, removed: str) -> Expression:
    if verb is None:
        return Difference(_expression(kept), _any("", removed))
    auxiliary = "" if verb in ("do", "does") else f"{verb} "
    noun = _DANGLING.sub("", kept)
    relative = (
        kept if noun != kept else f"{kept or 'things'} that"
    )  # "animals people do not ride": "animals people ride"
    return Difference(_expression(noun), _any(f"{relative} {auxiliary}", removed))


def _any(before: str, removed: str) -> Expression:
    """What is not to be: "cats", or each of "cats and no dogs"."""
    parts = tuple(_expression(before + part) for part in _AGAIN.split(removed))
    return parts[0] if len(parts) == 1 else Union(parts)


def _listed(text: str) -> Expression:
    """Plain lists ("cats, dogs and ships") are unions; an "and" inside a modifier may be anything and stays."""
    parts = [part.strip() for part in _AND.split(text) if part.strip()]
    if len(parts) < 2 or any(_MODIFIER.search(part) for part in parts[:-1]):
        return Clause(text)
    return Union(tuple(Everything() if _NEUTRAL.match(part) else Clause(part) for part in parts))
