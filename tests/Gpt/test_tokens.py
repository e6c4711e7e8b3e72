"""Tokens: the four policies on the published architectures, and exact round trips."""

import pytest
import torch
from torch import nn

from Gpt.errors import ConfigError
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.tokens import POLICIES, Tokenization, split_sizes

MNIST = (7840, 10, 100, 10)
CIFAR10 = (432, 4608, 320, 10)
CARTPOLE = (1, 128, 32, 1024, 32, 32, 1)
CODE = (257,)


@pytest.fixture
def structure() -> Structure:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    return Structure.of(network)


@pytest.mark.parametrize(
    "sizes, policy, chunk, expected",
    [
        (MNIST, "chunk_within_layer", 1000, (*[1000] * 7, 840, 10, 100, 10)),
        (CIFAR10, "chunk_within_layer", 576, (432, *[576] * 8, 320, 10)),
        (CARTPOLE, "layer_by_layer", None, CARTPOLE),
        (MNIST, "chunk", 1000, (*[1000] * 7, 960)),
        (MNIST, "chunk_within_input", 1000, (*[1000] * 7, 960)),
        (CIFAR10, "chunk", 5370, (5370,)),
    ],
)
def test_policies_on_the_published_architectures(sizes, policy, chunk, expected):
    assert split_sizes([sizes], policy, chunk) == expected


def test_policies_differ_in_what_a_token_may_straddle():
    groups = [(6, 3), (6, 3), (4,)]
    assert split_sizes(groups, "chunk", 5) == (5, 5, 5, 5, 2)
    assert split_sizes(groups, "chunk_within_input", 5) == (5, 4, 5, 4, 4)
    assert split_sizes(groups, "chunk_within_layer", 5) == (5, 1, 3, 5, 1, 3, 4)
    assert split_sizes(groups, "layer_by_layer") == (6, 3, 6, 3, 4)


@pytest.mark.parametrize(
    "sizes, policy, chunk, length",
    [(MNIST, "chunk_within_layer", 1000, 26), (CARTPOLE, "layer_by_layer", None, 18)],
)
def test_published_sequence_lengths(sizes, policy, chunk, length):
    assert len(split_sizes([sizes, sizes, CODE, CODE, CODE, CODE], policy, chunk)) == length


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
def test_encode_and_decode_are_inverse(structure, policy, chunk):
    tokens = Tokenization.of(structure, policy, chunk)
    weights = torch.randn(3, structure.size, generator=rng("cpu", 0, "weights"))
    encoded = tokens.encode(weights)
    assert encoded.shape == (3, len(tokens), tokens.width) == (3, *tokens.mask.shape)
    assert torch.equal(tokens.decode(encoded), weights)
    assert (encoded[:, ~tokens.mask] == 0).all() and tokens.mask.sum() == structure.size
    assert torch.equal(encoded[:, tokens.mask], weights), "tokens keep the order of the flat vector"
    assert torch.equal(tokens.decode(encoded.masked_fill(~tokens.mask, torch.nan)), weights)


def test_layer_by_layer_tokens_hold_one_tensor_each(structure):
    tokens = Tokenization.of(structure, "layer_by_layer")
    weights = torch.arange(2.0 * structure.size).reshape(2, -1)
    for token, spec in enumerate(structure.tensors):
        assert torch.equal(tokens.encode(weights)[:, token, : spec.numel], weights[:, spec.slice])


def test_gradients_pass_through_both_ways(structure):
    tokens = Tokenization.of(structure, "chunk", 8).double()
    weights = torch.randn(2, structure.size, dtype=torch.float64, generator=rng("cpu", 0, "w"), requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: tokens.decode(tokens.encode(w).sin()), (weights,))


def test_nothing_kept_is_as_long_as_the_vector():
    tokens = Tokenization((start, start + 1000) for start in range(0, 100_000, 1000))
    assert sum(buffer.numel() for buffer in tokens.buffers()) == len(tokens) == 100


def test_a_tokenization_adds_nothing_to_a_checkpoint(structure):
    assert not Tokenization.of(structure, "chunk", 8).state_dict()


@pytest.mark.parametrize("policy, chunk", [("neuron", 8), ("chunk", None), ("chunk_within_layer", 0), ("chunk", -3)])
def test_wrong_policies_are_named(policy, chunk):
    with pytest.raises(ConfigError, match=policy):
        split_sizes([MNIST], policy, chunk)


@pytest.mark.parametrize("splits", [[(1, 3)], [(0, 3), (4, 6)], [(0, 3), (2, 6)], [(0, 0), (0, 2)]])
def test_splits_with_gaps_or_overlaps_are_refused(splits):
    with pytest.raises(ValueError, match="consecutive"):
        Tokenization(splits)
