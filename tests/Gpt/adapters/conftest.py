"""Adapters of the tiny base model with drawn weights, in float64."""

import pytest
import torch
from torch import Tensor

from Gpt.adapters.spec import AdapterModule, AdapterSpec, adapter_structure
from Gpt.seeds import rng


def pytest_collection_modifyitems(items):
    for item in items:  # peft reads a deprecated property of transformers
        item.add_marker(pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"))


@pytest.fixture
def drawn():
    """`drawn(spec, count, seed)`: adapters whose entries all differ from a fresh adapter's."""

    def draw(spec: AdapterSpec, count: int, seed: int = 0) -> Tensor:
        structure = adapter_structure("tiny", spec)
        fresh = structure.flatten(AdapterModule("tiny", spec).state_dict()).double()
        noise = torch.randn(count, structure.size, generator=rng("cpu", seed, "adapters"), dtype=torch.float64)
        return fresh * (1 + 0.1 * noise) + 0.05 * noise

    return draw
