"""Samplers: pure functions from noise to data.

    sampler(denoise, objective, noise, steps, rng=None) -> x0

`denoise` is `objective.denoiser(network)`, maybe combined by `guided`: `(x_t [B, *shape], t [B]) -> x0 estimate`.
`noise` is standard Gaussian `[B, *shape]`; its device and dtype are those of the whole computation. Stochastic samplers
draw from `rng`, a generator on the device of `noise`. NFE is the number of evaluations of `denoise`; each docstring
states it. Gradients flow when enabled: call under `torch.no_grad()` to save memory.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.diffusion.objectives import DDPM, Denoiser, FlowMatching, Objective
from Gpt.errors import ConfigError, nearest


def ddpm(
    denoise: Denoiser,
    objective: Objective,
    noise: Float[Tensor, "batch ..."],
    steps: int,
    rng: torch.Generator | None = None,
) -> Float[Tensor, "batch ..."]:
    """Ancestral sampling with variance beta, the larger of the two fixed ones (Ho et al. 2020, arXiv 2006.11239,
    algorithm 2).

    With fewer than 1,000 steps, the betas are those of the subsequence of `objective.grid` (Nichol & Dhariwal 2021,
    arXiv 2102.09672, section 4). NFE = steps.
    """
    _require(objective, DDPM, "ddpm")
    x = noise
    for t, (alpha, sigma), (next_alpha, next_sigma) in _levels(objective, steps):
        x0 = denoise(x, _times(t, x))
        decay = alpha / next_alpha
        beta = 1 - decay**2
        x = (next_alpha * beta / sigma**2) * x0 + (decay * next_sigma**2 / sigma**2) * x
        if next_sigma > 0:
            x = x + math.sqrt(beta) * _fresh_noise(x, rng, "ddpm")
    return x


def ddim(
    denoise: Denoiser,
    objective: Objective,
    noise: Float[Tensor, "batch ..."],
    steps: int,
    rng: torch.Generator | None = None,
    *,
    eta: float = 0.0,
) -> Float[Tensor, "batch ..."]:
    """Denoising diffusion implicit model (Song et al. 2021, arXiv 2010.02502, equations 12 and 16), on any path.

    It starts at the noisiest time and its last step lands exactly on the last x0 estimate. eta = 0 is deterministic,
    eta = 1 has the smaller of the two ancestral variances. On the straight path of flow matching, eta = 0 is Euler's
    method. NFE = steps.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampler 'ddim': eta is {eta}; it lies between 0 (deterministic) and 1 (ancestral)")
    x = noise
    for t, (alpha, sigma), (next_alpha, next_sigma) in _levels(objective, steps):
        x0 = denoise(x, _times(t, x))
        eps = (x - alpha * x0) / sigma
        fresh = eta * (next_sigma / sigma) * math.sqrt(sigma**2 - (alpha * next_sigma / next_alpha) ** 2)
        x = next_alpha * x0 + math.sqrt(max(next_sigma**2 - fresh**2, 0.0)) * eps
        if fresh > 0:
            x = x + fresh * _fresh_noise(x, rng, "ddim with eta > 0")
    return x


def euler(
    denoise: Denoiser,
    objective: Objective,
    noise: Float[Tensor, "batch ..."],
    steps: int,
    rng: torch.Generator | None = None,
) -> Float[Tensor, "batch ..."]:
    """Euler's method on the flow ODE dx/dt = (x - x0(x, t)) / t, from t = 1 to 0; first order. NFE = steps.

    Deterministic: `rng` is not used.
    """
    _require(objective, FlowMatching, "euler")  # on its path sigma is the time itself
    x = noise
    for t, _, (_, t_next) in _levels(objective, steps):
        x = x + (t_next - t) * _velocity(denoise, x, t)
    return x


def heun(
    denoise: Denoiser,
    objective: Objective,
    noise: Float[Tensor, "batch ..."],
    steps: int,
    rng: torch.Generator | None = None,
) -> Float[Tensor, "batch ..."]:
    """Heun's method on the flow ODE; second order (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    The last step is Euler's, because the velocity is not defined at t = 0: NFE = 2 steps - 1. Deterministic: `rng` is
    not used.
    """
    _require(objective, FlowMatching, "heun")
    x = noise
    for t, _, (_, t_next) in _levels(objective, steps):
        slope = _velocity(denoise, x, t)
        if t_next > 0:
            slope = (slope + _velocity(denoise, x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
    return x


Sampler = Callable[..., Tensor]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}


def check_sampler(name: str, objective: Objective, steps: int) -> None:
    """Find out before training, not at the first sample, that a sampler does not go with the objective.

    Raises:
        ConfigError: there is no such sampler (names the nearest), it belongs to another objective, or the objective
            does not have that many steps.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"sampler {name!r} is unknown; {nearest(name, SAMPLERS)}")
    SAMPLERS[name](lambda x, t: x, objective, torch.zeros(1, 1, device="cpu"), steps, torch.Generator("cpu"))


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) between two denoisers' x0 estimates.

    x0 = unconditional + scale (conditional - unconditional): scale 0 ignores the condition, 1 obeys it as trained,
    more than 1 exaggerates it. The estimates of x0, noise and velocity are affine in one another, so this is guidance
    in each of them. At scale 1 only `conditional` is evaluated; otherwise every evaluation costs two.
    """
    if scale == 1:
        return conditional

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(unconditional(x_t, t), conditional(x_t, t), scale)

    return denoise


def _levels(objective: Objective, steps: int) -> Iterator[tuple[float, tuple[float, float], tuple[float, float]]]:
    """(t, (alpha, sigma) at t, (alpha, sigma) at the next time) of each step; clean data, (1, 0), comes last."""
    grid = objective.grid(steps)
    following = [(alpha, sigma) for _, alpha, sigma in grid[1:]] + [(1.0, 0.0)]
    for (t, alpha, sigma), after in zip(grid, following, strict=True):
        yield t, (alpha, sigma), after


def _velocity(denoise: Denoiser, x: Tensor, t: float) -> Tensor:
    return (x - denoise(x, _times(t, x))) / t


def _times(t: float, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    # At least float32: bfloat16 cannot tell step 999 from step 1000.
    return torch.full(x.shape[:1], t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _fresh_noise(x: Tensor, rng: torch.Generator | None, sampler: str) -> Tensor:
    if rng is None:
        raise ValueError(f"{sampler} draws noise at every step: pass rng, a torch.Generator on {x.device}")
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def _require(objective: Objective, kind: type[Objective], sampler: str) -> None:
    if not isinstance(objective, kind):
        found = type(objective).__name__
        raise ConfigError(f"sampler {sampler!r} belongs to {kind.__name__}, not to {found}; 'ddim' takes both")
