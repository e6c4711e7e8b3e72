"""The objective without diffusion: squared error of one prediction, an ablation of generators that write from noise."""

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.diffusion.objectives import Denoiser, Objective
from Gpt.errors import ConfigError


class Regression(Objective):
    """The network is shown no data at all, only what it is asked for, and returns the conditional mean.

    All times are 1, where a path has become pure noise; the noise itself is left out, so what is written differs only
    by the request (RPG's ablation "without diffusion", Wang et al. 2025, arXiv 2501.11587). Sample with "ddim" in one
    step.
    """

    predictions = ("x0",)

    def __init__(self):
        super().__init__("x0")

    def draw_times(self, batch: int, rng: torch.Generator, device: torch.device | str) -> Float[Tensor, " batch"]:
        """Ones; nothing is drawn."""
        return torch.ones(batch, device=device)

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """0 and 1."""
        return torch.zeros_like(t), torch.ones_like(t)

    def grid(self, steps: int) -> list[tuple[float, float, float]]:
        """The one time there is.

        Raises:
            ConfigError: more steps are asked for.
        """
        if steps != 1:
            raise ConfigError(f"regression has one step, not {steps}; set generator.steps=1")
        return [(1.0, 0.0, 1.0)]

    def target(self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return x0

    def estimate(
        self, prediction: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        return prediction

    def noised(
        self, x0: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], noise: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch ..."]:
        """Zeros, whatever the data."""
        return torch.zeros_like(x0)

    def denoiser(self, network: Denoiser) -> Denoiser:
        """The network on zeros, as it was trained."""
        return lambda x_t, t: network(torch.zeros_like(x_t), t).to(x_t.dtype)
