"""The denoiser of our generators: a transformer over the units of a network and over the weights that join them.

    noised, given [B, D]  --NeuronGraph-->  tokens [B, T, entries], joints [B, O, I, entries] each
    --embed-->  units [B, T, width], joints [B, O, I, channels]      (with what was estimated before, if that is read)
    --blocks-->  exchange along all joints, then attention and MLP of the units, time and request in every part
    --heads-->  tokens, joints  --NeuronGraph-->  estimate [B, D]

A weight between two hidden layers belongs to a row and a column, and renaming units reorders both. It is therefore no
part of a token but has a state of its own, which learns from its two units and tells them what it is: message passing
on the graph of the neurons, with edge states (Kofinas et al. 2024, arXiv 2403.12143; Zhou et al. 2023, arXiv
2302.14040, for the symmetry). Then all units attend to each other (adaLN-zero, Peebles & Xie 2023, arXiv 2212.09748).
"""

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.conditions import fourier_features
from Gpt.errors import ConfigError
from Gpt.models.transformer import Block, matrices, norm
from Gpt.neurons import Graph, Joints

STATES = 2**24
"""Numbers that the states of the weights between one network's hidden layers may take; a block holds ten times it."""


class GraphTransformer(nn.Module):
    """(noised weights, what is known of them, request, noise level) -> estimate of the weights `[B, D]`.

    It works on unit-variance data and is wrapped in the preconditioning of Karras et al. 2022 (arXiv 2206.00364, table
    1). The heads start at zero: untrained, it is the best estimate that looks at each number alone. Without codes,
    renaming hidden units in what it reads renames them in the estimate and does nothing else.

    Args:
        graph: of the networks; a module, so that its indices follow the device.
        width, depth, heads: of the transformer.
        channels: of each weight between two hidden layers; without effect where there are none.
        recalls: whether it reads an earlier estimate of its own (`previous`).

    Raises:
        ConfigError: the networks are too large to give all these weights states.
    """

    def __init__(self, graph: Graph, width: int, depth: int, heads: int, channels: int, recalls: bool = False):
        super().__init__()
        pairs = sum(math.prod(joint.units) for joint in graph.joints)
        if pairs * channels > STATES:
            raise ConfigError(
                f"neuron tokens would hold {channels} numbers (generator.channels) for each of the {pairs:,} pairs of "
                f"units that a weight joins, {pairs * channels / STATES:.1f} times what fits memory; such networks are "
                "for generators that cut them into pieces (generator=rpg generator.policy=within_layer)"
            )
        self.graph = graph
        entries = [entries for _, entries in graph.shapes]
        joined = [joint.entries for joint in graph.joints]
        self.embed = nn.ModuleList(_linear(n, width) for n in entries)
        self.embed_given = nn.ModuleList(_linear(n, width, bias=False) for n in entries)
        self.embed_previous = nn.ModuleList(_linear(n, width, bias=False) for n in entries if recalls)
        self.embed_joints = nn.ModuleList(nn.Linear(n, channels) for n in joined)
        self.embed_given_joints = nn.ModuleList(nn.Linear(n, channels, bias=False) for n in joined)
        self.embed_previous_joints = nn.ModuleList(nn.Linear(n, channels, bias=False) for n in joined if recalls)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(GraphBlock(graph, width, heads, channels) for _ in range(depth))
        self.final = nn.Linear(width, 2 * width)
        self.heads = nn.ModuleList(_linear(width, n) for n in entries)
        self.joint_heads = nn.ModuleList(nn.Linear(channels, n) for n in joined)
        for layer in (self.final, *self.heads, *self.joint_heads):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon may train."""
        return [matrix for block in self.blocks for matrix in matrices(block)]

    def compile_blocks(self) -> None:
        """Compile the blocks in place. They share one compilation, which takes seconds at any depth."""
        for block in self.blocks:
            block.compile()

    def forward(
        self,
        noised: Float[Tensor, "B D"],
        given: Float[Tensor, "#B D"],
        request: Float[Tensor, "B width"],
        alpha: Float[Tensor, " B"],
        sigma: Float[Tensor, " B"],
        codes: Float[Tensor, "#B T width"] | None = None,
        previous: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """
        Args:
            noised: alpha * weights + sigma * noise.
            given: a network that says which weight is which, such as the one to start from.
            request: what is asked for.
            codes: what tells interchangeable tokens apart, if anything should.
            previous: what it took these weights for before, 0 where it has not; needed if it `recalls`.
        """
        alpha, sigma = alpha[:, None], sigma[:, None]
        unit = (alpha.square() + sigma.square()).rsqrt()
        tokens, joints = self._embedded(noised * unit, self.embed, self.embed_joints)
        read = [(given, self.embed_given, self.embed_given_joints)]
        if previous is not None:
            read.append((previous, self.embed_previous, self.embed_previous_joints))
        for known, layers, joint_layers in read:
            more, more_joints = self._embedded(known, layers, joint_layers)
            tokens = [a + b for a, b in zip(tokens, more, strict=True)]
            joints = [a + b for a, b in zip(joints, more_joints, strict=True)]
        x = torch.cat(tokens, dim=1)
        if codes is not None:
            x = x + codes
        level = (sigma / (alpha + sigma)).squeeze(1)
        condition = request + self.time(fourier_features(level, _TIME_OCTAVES))
        for block in self.blocks:
            x, joints = block(x, joints, condition)
        shift, scale = self.final(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = norm(x) * (1 + scale) + shift
        parts = x.split([units for units, _ in self.graph.shapes], dim=1)
        tokens = [head(part) for head, part in zip(self.heads, parts, strict=True)]
        joints = [head(norm(joint)) for head, joint in zip(self.joint_heads, joints, strict=True)]
        return alpha * unit.square() * noised + sigma * unit * self.graph.decode(tokens, joints)

    def _embedded(
        self, weights: Float[Tensor, "B D"], layers: nn.ModuleList, joint_layers: nn.ModuleList
    ) -> tuple[list[Float[Tensor, "B _ width"]], Joints]:
        """The first states of all units, type by type, and of all weights between them, joint by joint."""
        tokens, joints = self.graph.encode(weights)
        units = [layer(entries) for layer, entries in zip(layers, tokens, strict=True)]
        return units, [layer(entries) for layer, entries in zip(joint_layers, joints, strict=True)]


class GraphBlock(Block):
    """Exchanges along all joints of a network, then the block of the tokens; without joints, that block alone."""

    def __init__(self, graph: Graph, width: int, heads: int, channels: int):
        super().__init__(width, heads)
        self._units = [units for units, _ in graph.shapes]
        self._ends = [joint.types for joint in graph.joints]
        self.exchanges = nn.ModuleList(Exchange(width, channels) for _ in graph.joints)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B T width"], joints: Joints, condition: Float[Tensor, "B width"]
    ) -> tuple[Float[Tensor, "B T width"], Joints]:
        if joints:
            x, joints = self._exchanged(x, joints, condition)
        return super().forward(x, condition), joints

    def _exchanged(self, x: Tensor, joints: Joints, condition: Tensor) -> tuple[Tensor, Joints]:
        units, changed = x.split(self._units, dim=1), []
        heard = list(units)
        for exchange, joint, (outputs, inputs) in zip(self.exchanges, joints, self._ends, strict=True):
            joint, to_outputs, to_inputs = exchange(joint, units[outputs], units[inputs], condition)
            heard[outputs] = heard[outputs] + to_outputs
            heard[inputs] = heard[inputs] + to_inputs
            changed.append(joint)
        return torch.cat(heard, dim=1), changed


class Exchange(nn.Module):
    """The weights of one joint listen to their units, and tell them what they are; gates start at zero.

    Args:
        width: of the units' states.
        channels: of the weights' states.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.modulation = nn.Linear(width, 3 * channels + 2 * width)
        # One of each for either end, outputs first.
        self.hear = nn.ModuleList(nn.Linear(width, channels, bias=False) for _ in range(2))
        self.weigh = nn.ModuleList(nn.Linear(width, channels) for _ in range(2))
        self.tell = nn.ModuleList(nn.Linear(channels, width, bias=False) for _ in range(2))
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        joint: Float[Tensor, "B O I channels"],
        outputs: Float[Tensor, "B O width"],
        inputs: Float[Tensor, "B I width"],
        condition: Float[Tensor, "B width"],
    ) -> tuple[Float[Tensor, "B O I channels"], Float[Tensor, "B O width"], Float[Tensor, "B I width"]]:
        """What the weights are now, and what is to be added to the units at both ends."""
        channels, width = joint.shape[-1], outputs.shape[-1]
        modulation = self.modulation(F.silu(condition))[:, None]
        shift, scale, gate, *gates = modulation.split([channels] * 3 + [width] * 2, dim=-1)
        rows, columns = norm(outputs), norm(inputs)
        heard = self.hear[0](rows)[:, :, None] + self.hear[1](columns)[:, None]
        x = norm(joint) * (1 + scale[:, None]) + shift[:, None] + heard
        joint = joint + gate[:, None] * self.down(F.gelu(self.up(x)))
        said = norm(joint)
        # What a weight says counts by what is at its other end.
        to_rows = (said * self.weigh[1](columns)[:, None]).sum(2) / joint.shape[2] ** 0.5
        to_columns = (said * self.weigh[0](rows)[:, :, None]).sum(1) / joint.shape[1] ** 0.5
        return joint, gates[0] * self.tell[0](to_rows), gates[1] * self.tell[1](to_columns)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """`nn.Linear`, which may have nothing to read or to write: a hidden layer that only joints touch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element")
        return nn.Linear(inputs, outputs, bias)


_TIME_OCTAVES = 8
_TIME_FEATURES = 1 + 2 * _TIME_OCTAVES
