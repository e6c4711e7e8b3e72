"""Low-rank adapters of language models: every task of a suite is one member of a family."""

from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from Gpt.adapters.answers import Answers, Scores, answer_scores
from Gpt.adapters.base import load_base
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.spec import AdapterModule, AdapterSpec, adapter_structure
from Gpt.errors import DataError
from Gpt.population.functional import Population
from Gpt.recipes import AdapterRecipe


def adapter_entry(family: AdapterFamily, recipe: AdapterRecipe) -> dict[str, Any]:
    """An entry for the adapters of one base model, one member of the family after the other.

    The data of the test function are the examples of all members and the number of one of them (or one for each network
    of a `Population`). Nothing is loaded before a network is made or measured. Where prompts have no answers, there is
    nothing to test: adapters are judged by their distance to those of the folder that the key "checkpoints" names.
    """
    return adapter_functions(family, recipe) | {
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "metric": "error" if family.answered else "distance",
        "batched": True,
        "recipe": recipe,
        "family": family,
    }


def adapter_functions(family: AdapterFamily, recipe: AdapterRecipe) -> dict[str, Any]:
    """What of such an entry depends on the base model and on the form of the adapters."""
    made = {"constructor": partial(AdapterModule, recipe.base, recipe.spec)}
    if not family.answered:
        return made | dict.fromkeys(("task_test_fn", "data_fn"), partial(untestable, family))
    return made | {
        "task_test_fn": partial(adapter_error, recipe),
        "correct_fn": partial(adapter_correct, recipe),
        "data_fn": partial(measured_examples, family, recipe.base, "test"),
        "validation_data_fn": partial(measured_examples, family, recipe.base, "validation"),
        "train_data_fn": partial(training_examples, family, recipe.base),
    }


def untestable(family: AdapterFamily, *data_and_net: object) -> NoReturn:
    """Raises:
    DataError: always.
    """
    raise DataError(
        f"the prompts of {family.suite} have no answers to test an adapter by; prepare them with answers, or judge "
        "adapters by their weights, as an evaluation does"
    )


def adapter_error(
    recipe: AdapterRecipe,
    tokens: Int[Tensor, "members N L"],
    positions: Int[Tensor, "members N K"],
    valid: Bool[Tensor, "members N K"],
    member: Int[Tensor, "..."],
    net: nn.Module | Population,
) -> tuple[Float[Tensor, "*P"], Float[Tensor, "*P"]]:
    """(answers that are not exactly right, percent; loss, nats a token of the answers), one number per adapter."""
    scores = _scores(recipe, Answers(tokens, positions, valid), member, net)
    error, loss = 100 * (1 - scores.exact.float().mean(1)), scores.loss.mean(1)
    return (error, loss) if isinstance(net, Population) else (error[0], loss[0])


def adapter_correct(
    recipe: AdapterRecipe,
    tokens: Int[Tensor, "members N L"],
    positions: Int[Tensor, "members N K"],
    valid: Bool[Tensor, "members N K"],
    member: Int[Tensor, "..."],
    net: nn.Module | Population,
) -> Bool[Tensor, "... N"]:
    """Which examples of its member an adapter answers exactly."""
    exact = _scores(recipe, Answers(tokens, positions, valid), member, net).exact
    return exact if isinstance(net, Population) else exact[0]


def _scores(recipe: AdapterRecipe, answers: Answers, member: Tensor, net: nn.Module | Population) -> Scores:
    if isinstance(net, Population):
        weights = net.weights
    else:
        weights = adapter_structure(recipe.base, recipe.spec).flatten(net.state_dict())[None]
    base = load_base(recipe.base, weights.device)
    return answer_scores(base, recipe.spec, weights, answers[member.expand(len(weights))])


def measured_examples(family: AdapterFamily, base: str, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The examples of all members, and the member of run 0."""
    answers = family.answers(base, split)
    return answers.tokens, answers.positions, answers.valid, family.member_of_runs(torch.tensor([0]))[0]


def training_examples(family: AdapterFamily, base: str) -> tuple[Tensor, Tensor, Tensor]:
    answers = family.answers(base, "train")
    return answers.tokens, answers.positions, answers.valid


BOTH = AdapterSpec(train_a=True)
MINI = AdapterFamily("mini", 1, 1, 1, train_examples=512, examples=32, encoder="hash")
TINY = AdapterRecipe("tiny", learning_rate=2e-2, iterations=240)
SMOLLM2 = AdapterRecipe(iterations=128)  # of 16 examples, each of the family's 2,048 once: hard rules overfit

TASKS = {
    "lora_rules": adapter_entry(AdapterFamily(), SMOLLM2),
    # What the shared, frozen A is worth: A trained as well, from one initialisation and from one of each run's own.
    "lora_rules_both": adapter_entry(AdapterFamily(), replace(SMOLLM2, spec=BOTH, learning_rate=1e-3)),
    "lora_rules_no_gauge": adapter_entry(AdapterFamily(), replace(SMOLLM2, spec=BOTH, learning_rate=1e-3, own_a=True)),
    "lora_rules_dora": adapter_entry(AdapterFamily(), replace(SMOLLM2, spec=AdapterSpec(dora=True))),
    "lora_tiny": adapter_entry(MINI, TINY),
    # For generators that read states of tokens or of sentences instead of pooled prompts; no prompt has more of them.
    "lora_rules_tokens": adapter_entry(AdapterFamily(tokens=56, prompts=48), SMOLLM2) | {"zoo": "lora_rules"},
    "lora_rules_sentences": adapter_entry(AdapterFamily(tokens=5, encoder="sentences"), SMOLLM2)
    | {"zoo": "lora_rules"},
    "lora_tiny_tokens": adapter_entry(replace(MINI, tokens=40), TINY) | {"zoo": "lora_tiny"},
}
