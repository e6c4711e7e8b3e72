"""Distances between adapters against the changes that they make, formed in full."""

import pytest
import torch

from Gpt.adapters.base import load_base
from Gpt.adapters.changes import apart, delta_cosine
from Gpt.adapters.spec import PREFIX, AdapterSpec, adapter_structure, draw_a, target_shapes
from Gpt.seeds import rng


def changes_of(spec, weights):
    structure = adapter_structure("tiny", spec)

    def change(row):
        tensors, parts = structure.unflatten(row), []
        for name, (_, inputs) in target_shapes("tiny", spec.targets).items():
            a = tensors.get(f"{PREFIX}{name}.lora_A.weight", draw_a(name, inputs, spec))
            parts.append((tensors[f"{PREFIX}{name}.lora_B.weight"] @ a).flatten())
        return torch.cat(parts).double()

    return torch.stack([change(row) for row in weights])


def some(spec):
    size = adapter_structure("tiny", spec).size
    weights = torch.randn(5, size, generator=rng("cpu", 0, "changes"))
    weights[3], weights[4] = 0, weights[0]
    if not spec.train_a:
        weights[4] *= 3  # the same direction
    return weights


@pytest.mark.parametrize("train_a", [False, True])
@pytest.mark.parametrize("base", ["tiny", load_base("tiny")], ids=["name", "model"])
def test_cosine_is_that_of_the_changes(base, train_a):
    spec = AdapterSpec(rank=3, train_a=train_a)
    weights = some(spec)
    changes = changes_of(spec, weights)
    unit = changes / changes.norm(dim=1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(delta_cosine(base, spec, weights[:2], weights), unit[:2] @ unit.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train_a", [False, True])
def test_pairs_are_apart_as_their_changes_are(train_a):
    spec = AdapterSpec(rank=3, train_a=train_a)
    weights = some(spec)
    written, own = weights[[0, 1, 3, 4]], weights[[0, 2, 1, 0]]
    x, y = changes_of(spec, written), changes_of(spec, own)
    distance, relative = apart("tiny", spec, written, own)
    torch.testing.assert_close(distance, 1 - torch.cosine_similarity(x, y), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(relative, (x - y).norm(dim=1) / y.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert relative[2] == 1 and distance[2] == 1, "an adapter without a change is the base model"
    if not train_a:
        assert distance[3] < 1e-6 and abs(relative[3] - 2) < 1e-5, "length counts beside direction"
