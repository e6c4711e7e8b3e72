"""Walks through latent space: arcs, loops, pictures of filters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from Gpt.report.walk import first_layer_filters, slerp_loop, walk_gif
from Gpt.structure import Structure


def unit_noises(count, *shape, seed=0):
    noises = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noises / noises.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in shape))


def test_the_loop_passes_through_every_noise_and_keeps_the_norm():
    noises = unit_noises(5, 3, 7)
    walk = slerp_loop(noises, frames=12)
    assert walk.shape == (60, 3, 7)
    torch.testing.assert_close(walk[::12], noises)
    torch.testing.assert_close(walk.flatten(1).norm(dim=1), torch.ones(60, dtype=torch.float64))


def test_steps_are_equal_along_each_arc_and_the_last_one_closes_the_loop():
    noises = unit_noises(4, 20)
    walk = slerp_loop(noises, frames=10)
    onwards = walk.roll(-1, 0)
    steps = torch.arccos((walk * onwards).sum(1)).reshape(4, 10)
    arcs = torch.arccos((noises * noises.roll(-1, 0)).sum(1))
    torch.testing.assert_close(steps, (arcs / 10)[:, None].expand(4, 10))


def test_a_quarter_circle_in_closed_form():
    noises = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    walk = slerp_loop(noises, frames=3)
    angle = torch.tensor(math.pi / 6)
    torch.testing.assert_close(walk[1], (2 + 2 / 3) * torch.stack([angle.cos(), angle.sin()]))


def test_float32_noises_of_different_lengths_stay_between_them_and_one_noise_stays_put():
    noises = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    norms = slerp_loop(noises, frames=8).norm(dim=1)
    ends = noises.norm(dim=1)
    assert norms.min() >= ends.min() - 1e-4 and norms.max() <= ends.max() + 1e-4
    torch.testing.assert_close(slerp_loop(noises[:1], frames=4), noises[:1].expand(4, 100))
    torch.testing.assert_close(slerp_loop(noises[[0, 0]], frames=4), noises[:1].expand(8, 100))


def test_noises_without_an_arc_between_them_are_refused():
    noise = unit_noises(1, 9)
    with pytest.raises(ValueError, match="opposite"):
        slerp_loop(torch.cat([noise, -noise]), frames=4)
    with pytest.raises(ValueError, match="not zero"):
        slerp_loop(torch.zeros(2, 9), frames=4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 5), (2, 4, 5, 5, 3)),
        (nn.Conv2d(1, 4, 3), (2, 4, 3, 3)),
        (nn.Conv2d(2, 4, 3), (2, 8, 3, 3)),
        (nn.Linear(64, 10), (2, 10, 8, 8)),
        (nn.Linear(5, 3), (2, 3, 1, 5)),
        (nn.BatchNorm1d(6), (2, 6, 1, 1)),
    ],
)
def test_filters_of_the_first_layer(layer, shape):
    network = nn.Sequential(layer)
    structure = Structure.of(network)
    weights = torch.randn(2, structure.size, generator=torch.Generator().manual_seed(0))
    filters = first_layer_filters(structure, weights)
    assert filters.shape == shape
    tensor = structure.unflatten(weights)["0.weight"]
    if len(shape) == 5:
        np.testing.assert_array_equal(filters[1, 2, 3, 4], tensor[1, 2, :, 3, 4].numpy())
    else:
        np.testing.assert_array_equal(filters.ravel(), tensor.numpy().ravel())


@pytest.mark.parametrize("shape", [(6, 10, 8, 8), (6, 16, 3, 3, 3), (6, 3, 1, 5), (6, 40, 28, 28)])
def test_the_gif_has_one_frame_per_network(tmp_path, shape):
    filters = np.random.default_rng(0).standard_normal(shape)
    metric = [0.5, 0.4, math.nan, math.inf, 0.3, 0.2]
    path = walk_gif(filters, metric, tmp_path / "walks" / "walk.gif", fps=20, name="test loss")
    with Image.open(path) as image:
        assert image.n_frames == 6
        assert image.info["duration"] == 50 and image.info["loop"] == 0
        assert image.width == 720


def test_the_cursor_follows_the_curve(tmp_path):
    path = walk_gif(np.ones((3, 1, 2, 2)), [0.0, 1.0, 0.5], tmp_path / "walk.gif", fps=10)
    heights, places = [], []
    with Image.open(path) as image:
        for frame in range(3):
            image.seek(frame)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            dark = (pixels.sum(axis=2) < 130).sum(axis=0)
            places.append(int(dark.argmax()))
            blue = np.abs(pixels[:, places[-1] - 4] - [0x0B, 0x62, 0xC4]).sum(axis=1) < 60
            heights.append(float(np.flatnonzero(blue).mean()))
    assert places[0] < places[1] < places[2]
    assert heights[0] > heights[2] > heights[1]  # pixels count downwards


def test_walks_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 frames of filters, but 3 values"):
        walk_gif(np.zeros((4, 1, 2, 2)), [1.0, 2.0, 3.0], tmp_path / "walk.gif")
    with pytest.raises(ValueError, match="1 to 50"):
        walk_gif(np.zeros((1, 1, 2, 2)), [1.0], tmp_path / "walk.gif", fps=60)
