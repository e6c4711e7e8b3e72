"""Stored images: what is gathered are the images, whole or cropped, whatever their order in memory."""

import pytest
import torch
import torch.nn.functional as F

from data_gen.images import WINDOWS, StoredImages, flip_crop, zero_padded
from data_gen.randomness import below, random_words, run_keys
from Gpt.seeds import rng


def test_flip_crop_is_a_shifted_or_mirrored_copy_and_all_offsets_occur():
    picture = torch.arange(1.0, 17).view(1, 1, 4, 4)
    padded = zero_padded(picture)
    words = random_words(run_keys(0, "augmentation", list(range(4))), 0, torch.arange(1000))
    crops = flip_crop(padded, torch.zeros_like(words), below(words, WINDOWS))[:, :, 0].flatten(0, 1)
    plane = F.pad(picture, [4] * 4)[0, 0]
    windows = plane.unfold(0, 4, 1).unfold(1, 4, 1).flatten(0, 1)
    known = torch.cat([windows, windows.flip(-1)])
    matches = (crops[:, None] == known).all(-1).all(-1)
    assert matches.any(1).all()
    # Empty corner windows equal their mirror image; every other window must turn up by itself.
    assert matches.any(0).all()


def test_pixels_that_are_moved_as_one_number_are_the_same_pixels():
    images = torch.randn(5, 3, 6, 7, generator=rng("cpu", 0)).bfloat16()
    index, windows = torch.tensor([[4, 0], [2, 2]]), torch.tensor([[0, 161], [80, 35]])
    crops = flip_crop(zero_padded(images), index, windows)
    expected = flip_crop(zero_padded(images.float()), index, windows)
    assert crops.dtype == torch.bfloat16 and torch.equal(crops.float(), expected)
    assert torch.equal(crops[1, 0], images[2])  # window 80 is the image itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_whole_images_are_the_ones_stored_and_lie_channels_last(dtype, channels):
    images = torch.randn(5, channels, 6, 7, generator=rng("cpu", 0)).to(dtype)
    index = torch.tensor([[4, 0, 1], [2, 2, 3]])
    found = StoredImages(images)[(index,)]
    assert found.dtype == dtype and torch.equal(found, images[index]) and found.stride(2) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiler_gathers_the_same_pixels(compiler, dtype):
    images = torch.randn(9, 3, 8, 8, generator=rng("cpu", 0)).to(dtype)
    index = torch.randint(9, (4, 7), generator=rng("cpu", 1))
    windows = torch.randint(WINDOWS, (4, 7), generator=rng("cpu", 2))
    stored, padded = StoredImages(images), zero_padded(images)

    def gathered(index, windows):
        return stored[(index,)].float(), flip_crop(padded, index, windows).float()

    compiled = torch.compile(gathered, dynamic=False)(index, windows)
    for found, expected in zip(compiled, gathered(index, windows), strict=True):
        assert torch.equal(found, expected)
