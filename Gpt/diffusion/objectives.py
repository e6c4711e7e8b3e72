"""Objectives: what a denoiser network is trained to predict, at which noise levels, and how its errors are weighted.

An objective wraps any network and never looks inside. It moves data to noise, x_t = alpha(t) x0 + sigma(t) noise, and
fixes the unit of time, which is the unit the network is handed:

    DDPM            t in {0, …, 999}, as float32; 0 is almost clean
    FlowMatching    t in [0, 1]; 0 is clean, 1 is pure noise

The seam, with `network` any callable `(x_t [B, *shape], t [B]) -> [B, *shape]`:

    objective.draw_times(batch, rng, device) -> [B]             training times
    objective.loss(network, x0, t, noise, mask) -> [B]          the training loss of every example
    objective.loss_and_estimate(…) -> [B], [B, *shape]          and what the network takes x0 for
    objective.denoiser(network) -> (x_t, t) -> x0 estimate      what samplers take, whatever the network predicts
    objective.alpha_sigma(t) -> (alpha [B], sigma [B])          the path
    objective.grid(steps) -> [(t, alpha, sigma), …]             where a sampler evaluates, noisiest time first

Conditions are bound by the caller: `lambda x, t: model(x, t, prompt)` is a network.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Gpt.errors import ConfigError

Denoiser = Callable[[Tensor, Tensor], Tensor]

DDPM_STEPS = 1000
MIN_TIME = 0.05  # flow matching: below it, 1/t² no longer grows in the weighting (Li & He 2025)


class Objective(nn.Module, ABC):
    """A noising path, a prediction target and a weighting; holds no parameters."""

    predictions: tuple[str, ...]

    def __init__(self, prediction: str):
        super().__init__()
        self.prediction = _choice("prediction", prediction, self.predictions)

    @abstractmethod
    def draw_times(self, batch: int, rng: torch.Generator, device: torch.device | str) -> Float[Tensor, " batch"]:
        """Draw one training time per example; `rng` lives on `device`."""

    @abstractmethod
    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Signal and noise scale at times t."""

    @abstractmethod
    def grid(self, steps: int) -> list[tuple[float, float, float]]:
        """`steps` decreasing times with their alpha and sigma, in float64; the first is the noisiest time of training.

        Raises:
            ConfigError: the path does not have that many steps.
        """

    @abstractmethod
    def target(self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """What a perfect network would return."""

    @abstractmethod
    def estimate(
        self, prediction: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """The x0 that a network's prediction at (x_t, t) stands for."""

    def weight(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Factor on the squared error of the prediction at times t."""
        return torch.ones_like(t)

    def noised(
        self, x0: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], noise: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch ..."]:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        alpha, sigma = (_per_example(scale, x0) for scale in self.alpha_sigma(t))
        return alpha * x0 + sigma * noise

    def loss(
        self,
        network: Denoiser,
        x0: Float[Tensor, "batch ..."],
        t: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch ..."],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Weighted mean squared error of the network's prediction, per example; see `loss_and_estimate`."""
        return self.loss_and_estimate(network, x0, t, noise, mask)[0]

    def loss_and_estimate(
        self,
        network: Denoiser,
        x0: Float[Tensor, "batch ..."],
        t: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch ..."],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch ..."]]:
        """Weighted mean squared error of the network's prediction, per example, and the x0 that it stands for.

        Args:
            x0: clean data `[B, *shape]`.
            t: times in the objective's unit.
            noise: standard Gaussian, like x0.
            mask: broadcastable to x0; entries where it is False (padding, any finite value) are left out of the mean.
                An example without a True entry has loss 0.
        """
        x_t = self.noised(x0, t, noise)
        prediction = network(x_t, t).to(x0.dtype)
        error = (prediction - self.target(x0, noise)).square()
        return self.weight(t).to(x0.dtype) * _masked_mean(error, mask), self.estimate(prediction, x_t, t)

    def denoiser(self, network: Denoiser) -> Denoiser:
        """Turn a trained network into `(x_t, t) -> x0 estimate`."""

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self.estimate(network(x_t, t).to(x_t.dtype), x_t, t)

        return denoise


class DDPM(Objective):
    """Denoising diffusion with 1,000 steps and linear betas from 1e-4 to 0.02 (Ho et al. 2020, arXiv 2006.11239,
    section 4).

    alpha(t)² is the cumulative product of 1 - beta up to step t, sigma² = 1 - alpha². The loss is the unweighted
    squared error of the prediction: the data itself ("x0", what G.pt uses) or the noise ("eps", equation 14 there,
    what RPG uses).
    """

    predictions = ("x0", "eps")
    alphas: Tensor
    sigmas: Tensor

    def __init__(self, prediction: str = "x0"):
        super().__init__(prediction)
        alpha, sigma = _linear_schedule()
        self.register_buffer("alphas", alpha.float(), persistent=False)
        self.register_buffer("sigmas", sigma.float(), persistent=False)

    def draw_times(self, batch: int, rng: torch.Generator, device: torch.device | str) -> Float[Tensor, " batch"]:
        """Uniform over the steps 0 … 999."""
        return torch.randint(DDPM_STEPS, (batch,), generator=rng, device=device).float()

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Table look-up; t holds whole numbers, 0 … 999."""
        step = t.long()
        return self.alphas[step], self.sigmas[step]

    def grid(self, steps: int) -> list[tuple[float, float, float]]:
        """Evenly spaced, beginning with the last step, 999 ("trailing", Lin et al. 2024, arXiv 2305.08891)."""
        if not 1 <= steps <= DDPM_STEPS:
            raise ConfigError(f"sampling from DDPM takes 1 to {DDPM_STEPS} steps, not {steps}")
        times = [round(DDPM_STEPS * (steps - i) / steps) - 1 for i in range(steps)]
        alpha, sigma = _linear_schedule()
        return [(float(t), alpha[t].item(), sigma[t].item()) for t in times]

    def target(self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return x0 if self.prediction == "x0" else noise

    def estimate(
        self, prediction: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        if self.prediction == "x0":
            return prediction
        alpha, sigma = (_per_example(scale, x_t) for scale in self.alpha_sigma(t))
        return (x_t - sigma * prediction) / alpha


class FlowMatching(Objective):
    """The straight path x_t = (1 - t) x0 + t noise, with velocity noise - x0 (Lipman et al. 2023, arXiv 2210.02747;
    Liu et al. 2023, arXiv 2209.03003).

    What the network returns and what the loss measures are chosen apart (Li & He 2025, arXiv 2511.13720): the error
    of a velocity is the error of the x0 it stands for, divided by t.

    Args:
        prediction: the network returns "x0" or "velocity".
        loss_space: squared errors are those of "x0" or of "velocity".
        times: training times are "uniform" on (0, 1], or "logit_normal", the sigmoid of a standard Gaussian, which
            favours the middle of the path (Esser et al. 2024, arXiv 2403.03206, section 3.1).
        shift: sampling visits the times s t / (1 + (s - 1) t) for evenly spaced t, equation 23 there; above 1, its few
            steps stay where there is more noise.

    Raises:
        ConfigError: no such prediction, loss space or times, or a shift that is not positive.
    """

    predictions = ("x0", "velocity")

    def __init__(self, prediction: str = "x0", loss_space: str = "x0", times: str = "uniform", shift: float = 1.0):
        super().__init__(prediction)
        if not shift > 0:
            raise ConfigError(f"objective: shift is {shift}; it multiplies odds of noise to data, so it is above 0")
        self.shift = shift
        self.loss_space = _choice("loss_space", loss_space, self.predictions)
        self.times = _choice("times", times, ("uniform", "logit_normal"))

    def draw_times(self, batch: int, rng: torch.Generator, device: torch.device | str) -> Float[Tensor, " batch"]:
        """Independent draws from the density named by `times`; never 0, where a velocity is undefined."""
        if self.times == "logit_normal":
            return torch.randn(batch, generator=rng, device=device).sigmoid()
        return 1 - torch.rand(batch, generator=rng, device=device)

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """1 - t and t."""
        return 1 - t, t

    def grid(self, steps: int) -> list[tuple[float, float, float]]:
        """Times 1, 1 - 1/steps, …, 1/steps, shifted."""
        if steps < 1:
            raise ConfigError(f"sampling takes at least 1 step, not {steps}")
        even = [(steps - i) / steps for i in range(steps)]
        times = [self.shift * t / (1 + (self.shift - 1) * t) for t in even]
        return [(t, 1 - t, t) for t in times]

    def weight(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Turns the squared error of the prediction into that of `loss_space`: 1, t² or 1/max(t, MIN_TIME)²."""
        if self.prediction == self.loss_space:
            return torch.ones_like(t)
        return t.square() if self.loss_space == "x0" else t.clamp(min=MIN_TIME) ** -2

    def target(self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return x0 if self.prediction == "x0" else noise - x0

    def estimate(
        self, prediction: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        return prediction if self.prediction == "x0" else x_t - _per_example(t, x_t) * prediction


def _linear_schedule() -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """alpha and sigma of the 1,000 DDPM steps, in float64 on the CPU."""
    betas = torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64, device="cpu")
    alpha_bar = (1 - betas).cumprod(0)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _per_example(scale: Float[Tensor, " batch"], like: Float[Tensor, "batch ..."]) -> Tensor:
    """Reshape [B] to [B, 1, …] in the dtype of `like`, ready to multiply it."""
    return scale.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _masked_mean(error: Float[Tensor, "batch ..."], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, " batch"]:
    if mask is None:
        return error.flatten(1).mean(1)
    kept = mask.expand_as(error).flatten(1)
    return (error.flatten(1) * kept).sum(1) / kept.sum(1).clamp(min=1)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"objective: {name} is {value!r}; choose one of {', '.join(choices)}")
    return value
