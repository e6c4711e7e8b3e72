"""What is written does not depend on how, and what it takes is what a counting generator counts."""

import pytest
import torch
from torch import Tensor, nn

from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.diffusion.samplers import guided
from Gpt.evaluation.writing import Request, Writer
from Gpt.generator import Generator
from Gpt.structure import Structure

STRUCTURE = Structure.of(nn.Linear(3, 2))


class Counting(Generator):
    """Denoises with one matrix product, and counts how often; adds the start, the prompt and the identity.

    Another product, of which nothing is taken, prepares every batch, as prototypes are computed before they are used.
    """

    needs_start = False

    def __init__(self, sampler="euler", objective=None, steps=4, identities=0):
        super().__init__(STRUCTURE, objective or FlowMatching(), sampler, steps)
        self.layer = nn.Linear(STRUCTURE.size, STRUCTURE.size)
        self.identities = nn.Embedding(identities, 1) if identities else None
        self.calls, self.batches = 0, []

    def write(self, prompt, start, noise, solve, guidance, rng):
        assert not self.training
        self.batches.append(len(noise))
        told = sum(value.float().view(len(noise), -1).sum(1, keepdim=True) for value in prompt.values())

        def network(x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

        denoiser = self.objective.denoiser(network)
        prepared = 0 * self.layer(noise)
        written = solve(guided(denoiser, denoiser, guidance), noise) + told + prepared
        return written if start is None else written + start


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
@pytest.mark.parametrize("identities", [0, 5])
def test_a_network_is_a_function_of_the_seed_and_its_number(sampler, identities):
    generator = Counting(sampler, identities=identities)
    generator.needs_start = True
    request = Request(7, {"class_mask": torch.rand(7, 10)}, torch.randn(7, STRUCTURE.size))
    whole = Writer(generator, seed=1)(request, "noise")
    assert whole.shape == (7, STRUCTURE.size) and whole.std(0).min() > 0.1
    for max_batch in (1, 3):
        torch.testing.assert_close(Writer(generator, seed=1, max_batch=max_batch)(request, "noise"), whole)
        assert max(generator.batches[-3:]) == max_batch
    torch.testing.assert_close(Writer(generator, seed=1)(request[:3], "noise"), whole[:3])
    for another in (Writer(generator, seed=2)(request, "noise"), Writer(generator, seed=1)(request, "other noise")):
        assert ((another - whole).abs().amax(1) > 1e-3).all()


def test_identities_are_drawn_for_each_network(monkeypatch):
    generator, told = Counting(identities=5), []

    def noted(prompt, start, **settings):
        told.append(prompt["identity"])
        return Counting.sample(generator, prompt, start, **settings)

    monkeypatch.setattr(generator, "sample", noted)
    Writer(generator, max_batch=40)(Request(100), "noise")
    counts = torch.cat(told).bincount(minlength=5)
    assert len(counts) == 5 and counts.min() > 5


def test_networks_of_a_stochastic_sampler_are_reproduced():
    generator = Counting("ddpm", DDPM())
    written = Writer(generator, max_batch=3)(Request(7), "noise")
    assert torch.equal(written, Writer(generator, max_batch=3)(Request(7), "noise"))
    assert len(written.unique(dim=0)) == 7


@pytest.mark.parametrize(
    ("sampler", "objective", "steps", "guidance", "passes"),
    [
        ("euler", FlowMatching(), 5, 1.0, 5),
        ("ddim", FlowMatching(), 5, 1.0, 5),
        ("ddim", DDPM(), 5, 1.0, 5),
        ("ddpm", DDPM(), 5, 1.0, 5),
        ("heun", FlowMatching(), 5, 1.0, 9),
        ("heun", FlowMatching(), 1, 1.0, 1),
        ("euler", FlowMatching(), 5, 1.5, 10),
        ("heun", FlowMatching(), None, 0.0, 14),
    ],
)
def test_passes_and_operations_are_those_of_the_generator(sampler, objective, steps, guidance, passes):
    generator = Counting(sampler, objective)
    writer = Writer(generator, steps, guidance, max_batch=3)
    weights, price = writer.timed(Request(6), "noise")
    assert torch.equal(weights, writer(Request(6), "noise"))
    product = 2 * STRUCTURE.size**2
    assert price.flops == (1 + passes) * product and price.once_flops == (1 + 1) * product
    assert price.seconds > 0
    generator.calls = 0
    writer(Request(3), "noise")
    assert generator.calls == passes


def test_the_generators_mode_is_restored():
    generator = Counting()
    for mode in (True, False):
        generator.train(mode)
        Writer(generator)(Request(2), "noise")
        assert generator.training == mode
