"""Without diffusion a network sees nothing of data or noise, and what is written is its answer."""

import pytest
import torch

from Gpt.diffusion.regression import Regression
from Gpt.diffusion.samplers import check_sampler, ddim
from Gpt.errors import ConfigError
from Gpt.seeds import rng

OBJECTIVE = Regression()
ANSWER = torch.tensor([1.0, -2.0, 3.0])


def network(x_t, t):
    assert (x_t == 0).all() and (t == 1).all()
    return ANSWER.expand_as(x_t)


def test_the_loss_is_the_squared_error_of_the_answer():
    x0 = torch.randn(5, 3, generator=rng("cpu", 0))
    t = OBJECTIVE.draw_times(5, rng("cpu", 1), "cpu")
    losses = OBJECTIVE.loss(network, x0, t, torch.randn(5, 3, generator=rng("cpu", 2)))
    torch.testing.assert_close(losses, (ANSWER - x0).square().mean(1))


def test_one_step_writes_the_answer_whatever_the_noise():
    noise = torch.randn(4, 3, generator=rng("cpu", 0))
    torch.testing.assert_close(ddim(OBJECTIVE.denoiser(network), OBJECTIVE, noise, 1), ANSWER.expand(4, 3))


def test_other_samplers_and_more_steps_are_refused():
    with pytest.raises(ConfigError, match="generator.steps=1"):
        check_sampler("ddim", OBJECTIVE, 2)
    with pytest.raises(ConfigError, match="euler"):
        check_sampler("euler", OBJECTIVE, 1)
