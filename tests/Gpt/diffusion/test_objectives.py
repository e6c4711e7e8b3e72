"""Objectives against literal formulas, and against the least-squares optimum of Gaussian data."""

import pytest
import torch

from Gpt.diffusion.objectives import DDPM, DDPM_STEPS, MIN_TIME, FlowMatching, Objective
from Gpt.errors import ConfigError
from Gpt.seeds import rng

OBJECTIVES = {
    "ddpm-x0": lambda: DDPM("x0"),
    "ddpm-eps": lambda: DDPM("eps"),
    "flow-x0": lambda: FlowMatching("x0"),
    "flow-velocity": lambda: FlowMatching("velocity", loss_space="velocity"),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request) -> Objective:
    return OBJECTIVES[request.param]()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng("cpu", seed, "test"), dtype=torch.float64)


def some_times(objective: Objective, batch: int) -> torch.Tensor:
    return objective.draw_times(batch, rng("cpu", 0, "times"), "cpu").double()


def test_ddpm_schedule_is_the_product_of_one_minus_beta():
    alpha, sigma = DDPM().alpha_sigma(torch.arange(DDPM_STEPS).float())
    alpha_bar = 1.0
    for t in range(DDPM_STEPS):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / (DDPM_STEPS - 1))
        if t in (0, 1, 499, 998, 999):
            assert alpha[t].item() == pytest.approx(alpha_bar**0.5, rel=1e-6)
            assert sigma[t].item() == pytest.approx((1 - alpha_bar) ** 0.5, rel=1e-6)
    assert alpha_bar == pytest.approx(4.04e-5, rel=1e-2)


def test_flow_path_is_the_straight_line_between_data_and_noise():
    x0, noise = gaussian(3, 4), gaussian(3, 4, seed=1)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x_t = FlowMatching().noised(x0, t, noise)
    torch.testing.assert_close(x_t, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))


def test_a_perfect_prediction_has_no_loss_and_stands_for_the_data(objective):
    x0, noise, t = gaussian(6, 5, 2), gaussian(6, 5, 2, seed=1), some_times(objective, 6)

    def perfect(x_t, t):
        return objective.target(x0, noise)

    assert objective.loss(perfect, x0, t, noise).abs().max() == 0
    estimate = objective.denoiser(perfect)(objective.noised(x0, t, noise), t)
    torch.testing.assert_close(estimate, x0)


@pytest.mark.parametrize("kind, other", [(DDPM, "eps"), (FlowMatching, "velocity")])
def test_predictions_convert_into_one_another(kind, other):
    """A network that predicts x0, rewritten to predict noise or velocity, is the same denoiser."""
    by_x0, by_other = kind("x0"), kind(other)
    x_t, t = gaussian(6, 5), some_times(by_x0, 6)
    alpha, sigma = (scale.double()[:, None] for scale in by_x0.alpha_sigma(t))

    def network(x, t):
        return torch.tanh(x)

    def rewritten(x, t):
        eps = (x - alpha * network(x, t)) / sigma
        return eps if other == "eps" else eps - network(x, t)

    torch.testing.assert_close(by_other.denoiser(rewritten)(x_t, t), by_x0.denoiser(network)(x_t, t))


@pytest.mark.parametrize("prediction", FlowMatching.predictions)
@pytest.mark.parametrize("loss_space", FlowMatching.predictions)
def test_flow_loss_measures_the_space_it_names(prediction, loss_space):
    objective = FlowMatching(prediction, loss_space)
    x0, noise, t = gaussian(6, 5), gaussian(6, 5, seed=1), torch.linspace(0.1, 1, 6, dtype=torch.float64)
    x_t = objective.noised(x0, t, noise)

    def network(x, t):
        return torch.sin(3 * x)

    loss = objective.loss(network, x0, t, noise)
    estimate = objective.denoiser(network)(x_t, t)
    if loss_space == "x0":
        expected = (estimate - x0).square().mean(1)
    else:
        expected = ((x_t - estimate) / t[:, None] - (noise - x0)).square().mean(1)
    torch.testing.assert_close(loss, expected)


def test_velocity_weight_is_bounded_near_the_data():
    weight = FlowMatching("x0", loss_space="velocity").weight(torch.tensor([1e-6, MIN_TIME, 0.5]))
    torch.testing.assert_close(weight, torch.tensor([MIN_TIME**-2, MIN_TIME**-2, 4.0]))


def test_the_loss_is_least_where_the_denoiser_is_the_posterior_mean(objective):
    """Data N(m, s²): the affine network fitted by least squares at time t estimates E[x0 | x_t]."""
    mean, std, samples = 0.7, 0.3, 4000
    x0, noise = gaussian(samples, 1), gaussian(samples, 1, seed=1)
    # Exact sample moments make the closed form exact for this finite sample.
    x0, noise = ((v - v.mean()) / v.std(correction=0) for v in (x0, noise))
    noise = noise - (x0 * noise).mean() * x0
    x0, noise = mean + std * x0, noise / noise.std(correction=0)
    for value in (120.0, 800.0) if isinstance(objective, DDPM) else (0.2, 0.9):
        t = torch.full((samples,), value, dtype=torch.float64)
        x_t, target = objective.noised(x0, t, noise), objective.target(x0, noise)
        design = torch.cat([x_t, torch.ones_like(x_t)], 1)
        fit = torch.linalg.lstsq(design, target).solution

        def network(x, t, fit=fit):
            return x * fit[0] + fit[1]

        alpha, sigma = (scale[0].double() for scale in objective.alpha_sigma(t))
        posterior = mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * mean)
        torch.testing.assert_close(objective.denoiser(network)(x_t, t), posterior, rtol=1e-6, atol=1e-6)
        best = objective.loss(network, x0, t, noise).mean()
        for shift in (torch.tensor([[0.01], [0.0]]), torch.tensor([[0.0], [-0.01]])):
            assert objective.loss(lambda x, t, f=fit + shift: x * f[0] + f[1], x0, t, noise).mean() > best


def test_padding_does_not_touch_loss_or_gradient(objective):
    x0, noise, t = gaussian(4, 3, 2), gaussian(4, 3, 2, seed=1), some_times(objective, 4)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    scale = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)

    def network(x, t):
        return scale * x

    loss = objective.loss(network, x0, t, noise, mask)
    error = (objective.noised(x0, t, noise) - objective.target(x0, noise)).square()
    torch.testing.assert_close(loss, objective.weight(t) * error[:, mask].mean(1))
    assert torch.equal(loss, objective.loss(network, torch.where(mask, x0, 1e3), t, noise, mask))
    (gradient,) = torch.autograd.grad(loss.sum(), scale)
    assert torch.equal(gradient != 0, mask)


def test_mask_of_each_example_counts_on_its_own():
    x0, noise, t = gaussian(3, 4), gaussian(3, 4, seed=1), torch.full((3,), 0.5, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    objective = FlowMatching()
    loss = objective.loss(lambda x, t: torch.zeros_like(x), x0, t, noise, mask)
    torch.testing.assert_close(loss, torch.stack([x0[0].square().mean(), x0[1, 0].square(), torch.zeros_like(t[0])]))


def test_loss_keeps_its_precision_under_a_half_precision_network(objective):
    x0, noise, t = gaussian(4, 3).float(), gaussian(4, 3, seed=1).float(), some_times(objective, 4).float()
    loss = objective.loss(lambda x, t: x.bfloat16(), x0, t, noise)
    assert loss.dtype == torch.float32
    assert objective.denoiser(lambda x, t: x.bfloat16())(x0, t).dtype == torch.float32


def test_times_cover_their_range_and_follow_their_seed():
    steps = DDPM().draw_times(50_000, rng("cpu", 0, "t"), "cpu")
    assert steps.min() == 0 and steps.max() == DDPM_STEPS - 1
    assert torch.equal(steps, steps.round())
    uniform = FlowMatching().draw_times(50_000, rng("cpu", 0, "t"), "cpu")
    assert 0 < uniform.min() and uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.002)
    logit = torch.logit(FlowMatching(times="logit_normal").draw_times(50_000, rng("cpu", 0, "t"), "cpu"))
    assert logit.mean().item() == pytest.approx(0, abs=0.02)
    assert logit.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(uniform, FlowMatching().draw_times(50_000, rng("cpu", 0, "t"), "cpu"))


@pytest.mark.parametrize("steps", [1, 7, 20, 60, 999, 1000])
def test_ddpm_grid_begins_at_the_last_step_and_is_even(steps):
    grid = DDPM().grid(steps)
    times = [t for t, _, _ in grid]
    assert len(grid) == steps and times[0] == DDPM_STEPS - 1 and times[-1] >= 0
    assert all(earlier > later for earlier, later in zip(times, times[1:], strict=False))
    gaps = {earlier - later for earlier, later in zip(times, [*times[1:], -1], strict=True)}
    assert gaps <= {DDPM_STEPS // steps, DDPM_STEPS // steps + 1}  # even, the last one down to clean data too
    alpha, sigma = DDPM().alpha_sigma(torch.tensor(times))
    torch.testing.assert_close(torch.tensor([[a, s] for _, a, s in grid]), torch.stack([alpha, sigma], 1))


def test_flow_grid_is_even_and_never_reaches_zero():
    assert [t for t, _, _ in FlowMatching().grid(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("shift", [0.5, 2.0, 3.0])
def test_a_shift_multiplies_the_odds_of_noise_to_data(shift):
    for (t, _, _), (shifted, alpha, sigma) in zip(
        FlowMatching().grid(5), FlowMatching(shift=shift).grid(5), strict=True
    ):
        assert sigma == shifted and alpha == 1 - sigma
        assert sigma * (1 - t) == pytest.approx(shift * alpha * t)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DDPM("velocity"),
        lambda: FlowMatching("eps"),
        lambda: FlowMatching(loss_space="eps"),
        lambda: FlowMatching(times="cosine"),
        lambda: FlowMatching(shift=0.0),
        lambda: DDPM().grid(1001),
        lambda: DDPM().grid(0),
        lambda: FlowMatching().grid(0),
    ],
)
def test_wrong_choices_are_named(build):
    with pytest.raises(ConfigError):
        build()


def test_objectives_add_nothing_to_a_checkpoint(objective):
    assert not objective.state_dict() and not list(objective.parameters())
