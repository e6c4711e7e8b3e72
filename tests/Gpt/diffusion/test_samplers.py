"""Samplers on Gaussian data, where the best denoiser and the solution of the ODE are known in closed form."""

import math

import pytest
import torch

from Gpt.diffusion.objectives import DDPM, FlowMatching, Objective
from Gpt.diffusion.samplers import SAMPLERS, check_sampler, ddim, ddpm, euler, guided, heun
from Gpt.errors import ConfigError
from Gpt.seeds import rng

MEAN, STD = 0.7, 0.3
OBJECTIVE_OF = {"ddpm": DDPM, "ddim": DDPM, "euler": FlowMatching, "heun": FlowMatching}


def posterior_mean(objective: Objective, calls: list | None = None):
    """E[x0 | x_t] for x0 ~ N(MEAN, STD²); appends the times it is asked for to `calls`."""

    def denoise(x, t):
        if calls is not None:
            calls.append(t[0].item())
        alpha, sigma = (scale.to(x.dtype)[:, None] for scale in objective.alpha_sigma(t))
        return MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)

    return denoise


def affine_map(sampler, objective: Objective, steps: int) -> tuple[float, float]:
    """(offset, slope) of a deterministic sampler, which on Gaussian data maps noise to offset + slope · noise."""
    noise = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    x0 = sampler(posterior_mean(objective), objective, noise, steps)
    offset, slope = x0[0].item(), (x0[1] - x0[0]).item()
    assert x0[2].item() == pytest.approx(offset + 3 * slope, abs=1e-9)
    return offset, slope


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_flow_samplers_converge_at_their_order(sampler, order):
    errors = []
    for steps in (40, 80, 160):
        offset, slope = affine_map(sampler, FlowMatching(), steps)
        errors.append(max(abs(offset - MEAN), abs(slope - STD)))
    assert errors[-1] < 1e-2
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_ddim_converges_to_the_data_on_the_ddpm_path():
    exact = affine_map(ddim, DDPM(), 1000)
    assert exact == pytest.approx((MEAN, STD), abs=6e-3)  # alpha at step 999 is 0.006, not 0
    gaps = [abs(affine_map(ddim, DDPM(), steps)[1] - STD) for steps in (10, 20, 40)]
    assert gaps[0] > gaps[1] > gaps[2]


def test_ddim_on_the_straight_path_is_euler():
    noise = torch.randn(5, 3, 2, generator=rng("cpu", 0, "noise"), dtype=torch.float64)

    def denoise(x, t):
        return torch.tanh(x + t[:, None, None])

    objective = FlowMatching()
    torch.testing.assert_close(ddim(denoise, objective, noise, 7), euler(denoise, objective, noise, 7))


@pytest.mark.parametrize(
    "sample",
    [
        lambda denoise, noise, g: ddpm(denoise, DDPM(), noise, 1000, g),
        lambda denoise, noise, g: ddim(denoise, DDPM(), noise, 1000, g, eta=1.0),
        lambda denoise, noise, g: ddim(denoise, DDPM(), noise, 250, g, eta=0.3),
        lambda denoise, noise, g: ddim(denoise, FlowMatching(), noise, 1000, g, eta=1.0),
    ],
    ids=["ddpm-1000", "ddim-eta-1", "ddim-eta-0.3", "flow-ddim-eta-1"],
)
def test_stochastic_samplers_reproduce_mean_and_std(sample, request):
    objective = FlowMatching() if "flow" in request.node.callspec.id else DDPM()
    noise = torch.randn(20_000, 1, generator=rng("cpu", 0, "noise"), dtype=torch.float64)
    x0 = sample(posterior_mean(objective), noise, rng("cpu", 1, "steps"))
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert x0.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_ddpm_has_the_variance_of_its_betas(steps):
    """The chain is affine and Gaussian: its variance follows v' = decay² v + beta, computed here step by step."""
    objective = DDPM()
    grid = objective.grid(steps)
    variance = 1.0
    for (_, alpha, sigma), after in zip(grid, [*grid[1:], (None, 1.0, 0.0)], strict=True):
        _, next_alpha, next_sigma = after
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        alpha_step = (alpha / next_alpha) ** 2
        from_x = math.sqrt(alpha_step) * next_sigma**2 / sigma**2
        from_x0 = next_alpha * (1 - alpha_step) / sigma**2
        variance = (from_x + from_x0 * gain) ** 2 * variance + (1 - alpha_step) * (next_sigma > 0)
    noise = torch.randn(20_000, 1, generator=rng("cpu", 0, "noise"), dtype=torch.float64)
    x0 = ddpm(posterior_mean(objective), objective, noise, steps, rng("cpu", 1, "steps"))
    assert x0.var().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_number_and_order_of_evaluations(name, steps):
    calls = []
    objective = OBJECTIVE_OF[name]()
    SAMPLERS[name](posterior_mean(objective, calls), objective, torch.zeros(2, 3), steps, rng("cpu", 0, "steps"))
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)
    assert calls[0] == (999 if objective.__class__ is DDPM else 1)
    assert calls == sorted(calls, reverse=True) and calls[-1] >= (0 if objective.__class__ is DDPM else 1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_the_last_step_lands_on_the_estimate(name, steps):
    """A denoiser that always answers the same network gets exactly that network, with no noise left over."""
    answer = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3)
    noise = torch.randn(2, 3, generator=rng("cpu", 0, "noise"), dtype=torch.float64)
    x0 = SAMPLERS[name](lambda x, t: answer, OBJECTIVE_OF[name](), noise, steps, rng("cpu", 1, "steps"))
    torch.testing.assert_close(x0, answer)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_noise_and_seed_alone(name):
    objective = OBJECTIVE_OF[name]()
    noise = torch.randn(2, 3, generator=rng("cpu", 0, "noise"))
    before = torch.random.get_rng_state()
    first, second = (
        SAMPLERS[name](posterior_mean(objective), objective, noise, 5, rng("cpu", 1, "steps")) for _ in range(2)
    )
    assert torch.equal(first, second) and first.dtype == torch.float32
    assert torch.equal(before, torch.random.get_rng_state())


def test_half_precision_samples_see_unrounded_times():
    calls = []
    ddim(posterior_mean(DDPM(), calls), DDPM(), torch.zeros(1, 1, dtype=torch.bfloat16), 1000)
    assert calls == [float(t) for t in range(999, -1, -1)]


@pytest.mark.parametrize("name, wrong", [("ddpm", FlowMatching), ("euler", DDPM), ("heun", DDPM)])
def test_a_sampler_refuses_another_objective(name, wrong):
    with pytest.raises(ConfigError, match=wrong.__name__):
        SAMPLERS[name](posterior_mean(wrong()), wrong(), torch.zeros(1, 1), 2, rng("cpu", 0, "steps"))


def test_stochastic_samplers_ask_for_a_generator():
    with pytest.raises(ValueError, match="rng"):
        ddpm(posterior_mean(DDPM()), DDPM(), torch.zeros(1, 1), 2)
    with pytest.raises(ValueError, match="rng"):
        ddim(posterior_mean(DDPM()), DDPM(), torch.zeros(1, 1), 2, eta=0.5)
    with pytest.raises(ConfigError, match="eta"):
        ddim(posterior_mean(DDPM()), DDPM(), torch.zeros(1, 1), 2, eta=1.5)


def test_guidance_is_the_same_in_every_prediction_space():
    """Combining x0 estimates equals combining the noises they stand for."""
    objective = DDPM("eps")
    x, t = torch.randn(4, 3, generator=rng("cpu", 0, "x"), dtype=torch.float64), torch.full((4,), 300.0)

    def wanted(x, t):
        return torch.sin(x)

    def anything(x, t):
        return 0.2 * x

    combined = guided(objective.denoiser(wanted), objective.denoiser(anything), 3.0)(x, t)

    def guided_noise(x, t):
        return anything(x, t) + 3.0 * (wanted(x, t) - anything(x, t))

    torch.testing.assert_close(combined, objective.denoiser(guided_noise)(x, t))


def test_guidance_scale_zero_and_one():
    def wanted(x, t):
        return x + 1

    def anything(x, t):
        return x - 1

    x, t = torch.zeros(2, 3), torch.ones(2)
    torch.testing.assert_close(guided(wanted, anything, 0.0)(x, t), anything(x, t))
    assert guided(wanted, anything, 1.0) is wanted


def test_a_sampler_is_checked_on_the_cpu_whatever_the_default_device(monkeypatch):
    """Large generators are built on the device that they will live on."""
    tried = []
    monkeypatch.setitem(SAMPLERS, "probe", lambda denoise, objective, noise, steps, rng: tried.extend((noise, rng)))
    with torch.device("meta"):
        check_sampler("probe", DDPM(), 10)
    assert [where.device.type for where in tried] == ["cpu", "cpu"]
