"""What every generator does around the two verbs of its own: how many networks, out of which noise, in which mode."""

import pytest
import torch
from torch import nn

from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.errors import ConfigError
from Gpt.generator import Generator, evaluating
from Gpt.structure import Structure

STRUCTURE = Structure.of(nn.Linear(3, 2))


class Echo(Generator):
    """Writes the noise, after as many steps as it is asked for; they are counted."""

    def __init__(self, sampler="ddim", objective=None, needs_start=False):
        super().__init__(STRUCTURE, objective or FlowMatching(), sampler, 4)
        self.needs_start, self.steps = needs_start, 0
        self.layer = nn.Linear(1, 1)

    def write(self, prompt, start, noise, solve, guidance, rng):
        assert not torch.is_grad_enabled()

        def network(x, t):
            self.steps += 1
            return noise

        return solve(self.objective.denoiser(network), noise)


@pytest.mark.parametrize(
    ("prompt", "count", "noise", "expected"),
    [({}, 3, None, 3), ({"text": torch.zeros(5, 2)}, None, None, 5), ({}, None, torch.zeros(2, 8), 2)],
)
def test_whatever_says_how_many_networks_are_wanted_is_taken_at_its_word(prompt, count, noise, expected):
    assert Echo().sample(prompt, count=count, noise=noise).shape == (expected, STRUCTURE.size)
    start = torch.zeros(expected, STRUCTURE.size)
    assert len(Echo(needs_start=True).sample(prompt, start, count=count, noise=noise)) == expected


def test_what_does_not_fit_together_is_refused():
    rows = torch.zeros(4, STRUCTURE.size)
    with pytest.raises(ConfigError, match="how many networks to write"):
        Echo().sample({})
    with pytest.raises(ConfigError, match=r"different numbers of networks: .*'count': 3.*'text': 4"):
        Echo().sample({"text": rows}, count=3)
    with pytest.raises(ConfigError, match="different numbers"):
        Echo(needs_start=True).sample({"text": rows[:3]}, rows)
    with pytest.raises(ConfigError, match="needs the starting networks"):
        Echo(needs_start=True).sample({}, count=4)
    with pytest.raises(ConfigError, match="leave out `start`"):
        Echo().sample({}, rows)
    with pytest.raises(ConfigError, match="'heun' belongs to FlowMatching, not to DDPM"):
        Echo("heun", DDPM())


def test_noise_is_a_function_of_the_seed():
    first, again, other = (Echo().sample({}, count=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and ((first - other).abs().amax(1) > 1e-3).all()
    assert (first[0] - first[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("sampler", "objective"), [("euler", FlowMatching()), ("ddpm", DDPM())])
def test_given_noise_is_written_smoothly(sampler, objective):
    """The stochastic sampler makes way for its deterministic companion: the same noise, whatever the seed's draws."""
    generator, noise = Echo(sampler, objective), torch.randn(2, STRUCTURE.size)
    assert generator.smooth_sampler == ("ddim" if sampler == "ddpm" else sampler)
    shift = torch.randn(2, STRUCTURE.size, generator=torch.Generator().manual_seed(0)) * 1e-3
    near, far = (generator.sample({}, noise=noise + k * shift) for k in (0, 1))
    torch.testing.assert_close(far - near, shift, rtol=1e-2, atol=1e-5)


def test_the_number_of_steps_is_the_default_one_or_the_given_one():
    generator = Echo()
    for steps, expected in ((None, 4), (1, 1), (7, 7)):
        generator.steps = 0
        generator.sample({}, count=2, steps=steps)
        assert generator.steps == expected
    with pytest.raises(ConfigError, match="at least 1 step, not 0"):
        generator.sample({}, count=2, steps=0)


def test_the_mode_is_restored_even_by_an_error():
    generator = Echo()
    for mode in (True, False):
        generator.train(mode)
        with evaluating(generator):
            assert not generator.training and not generator.layer.training
        assert generator.training == generator.layer.training == mode
    generator.train()
    with pytest.raises(ValueError, match="inside"), evaluating(generator):
        raise ValueError("inside")
    assert generator.training
