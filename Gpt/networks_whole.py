"""Architectures that are generated as a whole: the CNNs of published weight generators, ResNet-18 and ViT-Tiny.

All take CIFAR-10 images; the two large ones are torchvision's building blocks in the sizes that 32x32 pixels ask for.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Cnn(nn.Module):
    """Three convolutions without padding, the first `pools` of them followed by 2x2 max-pooling, and two linear layers.

    The small and the medium CNN of the zoos of Schürholt et al. 2022 (arXiv 2209.14764), which p-diff and RPG are
    measured on: 2,864 parameters for images of 28x28, 10,853 for 32x32.

    Args:
        channels, kernels: of the convolutions.
        pools: how many of the convolutions are followed by pooling.
        features: entries of the last feature map.
    """

    symmetry = {
        "conv1.weight": ("conv1", None, None, None),
        "conv1.bias": ("conv1",),
        "conv2.weight": ("conv2", "conv1", None, None),
        "conv2.bias": ("conv2",),
        "conv3.weight": ("conv3", "conv2", None, None),
        "conv3.bias": ("conv3",),
        "fc1.weight": ("hidden", "conv3"),
        "fc1.bias": ("hidden",),
        "fc2.weight": (None, "hidden"),
    }

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], pools: int, features: int, classes: int = 10):
        super().__init__()
        first, second, third = channels
        self.pools = pools
        self.conv1 = nn.Conv2d(3, first, kernels[0])
        self.conv2 = nn.Conv2d(first, second, kernels[1])
        self.conv3 = nn.Conv2d(second, third, kernels[2])
        self.fc1 = nn.Linear(features, 20)
        self.fc2 = nn.Linear(20, classes)

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N classes"]:
        for i, convolution in enumerate((self.conv1, self.conv2, self.conv3)):
            x = F.relu(convolution(x))
            x = F.max_pool2d(x, 2) if i < self.pools else x
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def small_cnn() -> Cnn:
    """2,864 parameters, for images of 28x28."""
    return Cnn((8, 6, 4), (5, 5, 2), pools=2, features=36)


def medium_cnn() -> Cnn:
    """10,853 parameters, for images of 32x32."""
    return Cnn((16, 32, 15), (3, 3, 3), pools=3, features=60)


def cifar_resnet18() -> nn.Module:
    """ResNet-18 with batch normalisation, 11,173,962 parameters and 9,600 running statistics.

    The usual form for 32x32 pixels (He et al. 2016, arXiv 1512.03385, section 4.2, for the stem): it begins with a 3x3
    convolution of stride 1, without pooling.
    """
    from torchvision.models import resnet18  # slow import, needed for this network only

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def cifar_vit_tiny() -> nn.Module:
    """ViT-Tiny (Touvron et al. 2021, arXiv 2012.12877, table 1) on patches of 4x4: 5,362,762 parameters.

    Twelve layers of width 192 with three heads; no dropout. torchvision starts the head at zero.
    """
    from torchvision.models import VisionTransformer  # slow import, needed for this network only

    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )
