"""Training images on a device, in the order that gathering them is fast with, and augmented while they are gathered."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CROP_PADDING = 4
WINDOWS = 2 * (2 * CROP_PADDING + 1) ** 2  # offsets of a crop, times mirrored or not


class StoredImages:
    """Images to gather examples, or parts of them, from: channels last, which convolutions are fast with.

    Three channels of two bytes get a fourth in memory: a pixel is one number of eight bytes, and moves as one.

    Attributes:
        pixels: `[N, H, W, C]`, or `[N, H, W]` where a pixel is one number.
    """

    def __init__(self, images: Float[Tensor, "N C H W"]):
        pixels = images.permute(0, 2, 3, 1)
        self.dtype = images.dtype
        self.packed = pixels.shape[-1] == 3 and images.element_size() == 2
        if self.packed:
            self.pixels = F.pad(pixels, [0, 1]).contiguous().view(torch.int64).squeeze(-1)
        else:
            self.pixels = pixels.contiguous()

    def __getitem__(self, place: tuple[Int[Tensor, "..."], ...]) -> Float[Tensor, "R B C h w"]:
        """What advanced indexing of N, or of N, H and W, finds."""
        chosen = self.pixels[place]
        if self.packed:
            chosen = chosen.view(self.dtype).unflatten(-1, (-1, 4))[..., :3]
        return chosen.movedim(-1, 2)


def zero_padded(images: Float[Tensor, "N C H W"]) -> StoredImages:
    """Images for `flip_crop`: a crop of one of them is one gather."""
    return StoredImages(F.pad(images, [CROP_PADDING] * 4))


def flip_crop(
    padded: StoredImages, index: Int[Tensor, "R B"], windows: Int[Tensor, "R B"]
) -> Float[Tensor, "R B C h w"]:
    """Images `index`, cropped at one of the 9 x 9 offsets and mirrored or not.

    Args:
        padded: from `zero_padded`.
        windows: 0 ... `WINDOWS` - 1; the odd ones are mirrored.
    """
    height, width = (length - 2 * CROP_PADDING for length in padded.pixels.shape[1:3])
    offsets, choice = 2 * CROP_PADDING + 1, windows[..., None]
    flip, down, right = choice % 2 == 1, choice // 2 % offsets, choice // (2 * offsets)
    x = torch.arange(width, device=windows.device)
    rows = torch.arange(height, device=windows.device) + down
    columns = torch.where(flip, width - 1 - x, x) + right
    return padded[index[..., None, None], rows[..., :, None], columns[..., None, :]]
