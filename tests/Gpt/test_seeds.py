"""Named seeds are for ever: zoos and runs on disk were drawn from them."""

import itertools

import pytest
import torch

from Gpt.seeds import derive_seed, own_random_state, rng


def test_seeds_never_change():
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(0, "batch", 17, 3) == 4384153616050075186
    assert derive_seed(7, "run", 123) == 6542735091609568248
    drawn = torch.randint(1 << 30, (3,), generator=rng("cpu", 0, "batch", 0))
    assert drawn.tolist() == [214560169, 530809463, 46809003]


def test_every_seed_and_name_counts_in_order():
    names = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), (1,), (1, 2), (12,), ("", "a"), ("a", "")]
    names += [("a/b",), ("a", "/b"), ("a/", "b"), ("/a", "b"), ("a/b", ""), ("/",), ("/", ""), ('a", "b/',), ("1/2",)]
    seeds = [derive_seed(seed, *n) for seed, n in itertools.product((0, 1, -1, 2**62), names)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=rng("cpu", 1, "x"))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_neighbouring_steps_are_unrelated():
    draws = torch.stack([torch.randn(10_000, generator=rng("cpu", 0, "batch", i)) for i in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.05


def test_what_draws_from_torchs_random_state_is_seeded_and_leaves_no_trace():
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (3, 3, 4):
        with own_random_state(seed):
            drawn.append(torch.rand(5))
    with pytest.raises(ValueError, match="inside"), own_random_state(3):
        torch.rand(5)
        raise ValueError("inside")
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nor_on_a_gpu():
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    with own_random_state(3):
        first = torch.rand(5, device="cuda")
    with own_random_state(3):
        assert torch.equal(first, torch.rand(5, device="cuda"))
    assert torch.equal(before, torch.cuda.get_rng_state())
