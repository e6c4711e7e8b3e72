"""The small networks that the built-in tasks are about (not the generators), and their hidden-unit symmetries."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_TWO_HIDDEN_LAYERS = {
    "fc1.weight": ("hidden1", None),
    "fc1.bias": ("hidden1",),
    "fc2.weight": ("hidden2", "hidden1"),
    "fc2.bias": ("hidden2",),
    "fc3.weight": (None, "hidden2"),
}


class MLP(nn.Module):
    """Fully connected ReLU classifier `inputs-hidden-classes` (G.pt: 784-10-10, 7,960 parameters)."""

    symmetry = {"fc1.weight": ("hidden", None), "fc1.bias": ("hidden",), "fc2.weight": (None, "hidden")}

    def __init__(self, inputs: int = 784, hidden: int = 10, classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N classes"]:
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class DeepMLP(nn.Module):
    """Fully connected ReLU classifier 64-16-16-10 with two hidden layers, 1,482 parameters."""

    symmetry = _TWO_HIDDEN_LAYERS

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 16)
        self.fc2 = nn.Linear(16, 16)
        self.fc3 = nn.Linear(16, 10)

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N classes"]:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class ConvNet(nn.Module):
    """G.pt's CIFAR-10 network of 5,370 parameters.

    Two 3x3 convolutions without bias (3-16 with stride 2, 16-32), mean pooling, linear.
    """

    symmetry = {
        "conv1.weight": ("conv1", None, None, None),
        "conv2.weight": ("conv2", "conv1", None, None),
        "fc.weight": (None, "conv2"),
    }

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N classes"]:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean(dim=(-2, -1)))


class CartPoleActor(nn.Module):
    """G.pt's cart-pole actor 4-32-32-1 with SELU: a Gaussian policy whose mean is the output; its log-std comes first.

    1,250 parameters; orthogonal initialisation (gain sqrt 2, last layer 0.01), `log_std` 0.
    """

    symmetry = _TWO_HIDDEN_LAYERS

    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(1))
        self.fc1 = nn.Linear(4, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(32, 1)
        for layer, gain in ((self.fc1, 2**0.5), (self.fc2, 2**0.5), (self.fc3, 0.01)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, observation: Float[Tensor, "N 4"]) -> Float[Tensor, "N 1"]:
        return self.fc3(F.selu(self.fc2(F.selu(self.fc1(observation)))))
