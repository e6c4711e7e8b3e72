"""What every sequence model shares: the layer (`Mixer`), its two directions, and the stack of layers (`Backbone`)."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.errors import ConfigError
from rpg.backbones.layers import GatedMLP, RMSNorm

State = tuple[Tensor, ...]


class Mixer(nn.Module, ABC):
    """One sequence layer, `[B, L, in_width] -> [B, L, width]`, that can stop anywhere and go on from its state."""

    # Ratio of the gated MLP that follows the layer in a residual stack; 0 means none.
    mlp_ratio: ClassVar[float] = 0.0
    # Whether the layer reads its tokens one after the other, so that reading them backwards as well makes a difference.
    sequential: ClassVar[bool] = True

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.in_width = in_width
        self.width = width
        self.causal = True

    @classmethod
    def defaults(cls, layer: int, depth: int) -> dict[str, Any]:
        """Options that depend on the place of the layer in a stack of `depth`."""
        return {}

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        """Read `x` on from `state`; without one, from the start, and then the last state need not be differentiable."""

    @abstractmethod
    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token."""


class Bidirectional(Mixer):
    """The sum of a mixer that reads forwards and of another that reads backwards; it has no state to go on from."""

    def __init__(self, forwards: Mixer, backwards: Mixer) -> None:
        super().__init__(forwards.in_width, forwards.width)
        self.forwards = forwards
        self.backwards = backwards
        self.causal = False

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        y, _ = self.forwards(x)
        reversed_y, _ = self.backwards(x.flip(1))
        return y + reversed_y.flip(1), ()

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return ()


class Residual(Mixer):
    """Pre-norm residual block: `x + mixer(norm(x))`, then `x + mlp(norm'(x))` unless `mlp_ratio` is 0."""

    def __init__(self, mixer: Mixer, width: int, mlp_ratio: float) -> None:
        super().__init__(width, width)
        self.norm = RMSNorm(width)
        self.mixer = mixer
        self.causal = mixer.causal
        self.mlp = nn.Sequential(RMSNorm(width), GatedMLP(width, width, mlp_ratio)) if mlp_ratio else None

    def forward(
        self, x: Float[Tensor, "batch length width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        mixed, state = self.mixer(self.norm(x), state)
        x = x + mixed
        return (x if self.mlp is None else x + self.mlp(x)), state

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return self.mixer.initial_state(batch, device, dtype)


class Backbone(nn.Module):
    """A stack of `depth` mixers of one kind, `[B, L, width] -> [B, L, out_width]`.

    bare: the mixers alone, as in RPG; otherwise each is a pre-norm residual block and a norm closes the stack.
    out_width: width of the last layer where it differs (RPG's largest: 12288, then 16384); only a bare stack can widen.
    bidirectional: each layer is the sum of a forward and a backward mixer with weights of their own.
    mlp_ratio: hidden width, in multiples of `width`, of the gated MLP after each mixer; None takes the mixer's default.

    Raises ConfigError where these contradict each other or the mixer.
    """

    def __init__(
        self,
        mixer: type[Mixer],
        width: int,
        *,
        depth: int = 2,
        out_width: int | None = None,
        bare: bool = False,
        bidirectional: bool = False,
        mlp_ratio: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.width = width
        self.out_width = width if out_width is None else out_width
        if depth < 1:
            raise ConfigError(f"a backbone needs at least one layer, not depth={depth}")
        if self.out_width != width and not bare:
            raise ConfigError(f"a residual backbone keeps its width ({width}); out_width={out_width} needs bare=true")
        if bidirectional and not mixer.sequential:
            remedy = "causal=false" if "causal" in inspect.signature(mixer).parameters else "bidirectional=false"
            raise ConfigError(f"{mixer.__name__} has no direction to be read in, so no bidirectional=true; {remedy}")
        if bare and mlp_ratio:
            raise ConfigError(f"mlp_ratio={mlp_ratio} needs bare=false: a bare stack holds the mixers alone")
        if mlp_ratio is None:
            mlp_ratio = mixer.mlp_ratio

        layers: list[Mixer] = []
        for i in range(depth):
            sizes = (width, self.out_width if i == depth - 1 else width)
            settings = mixer.defaults(i, depth) | options
            layer = mixer(*sizes, **settings)
            if bidirectional:
                layer = Bidirectional(layer, mixer(*sizes, **settings))
            layers.append(layer if bare else Residual(layer, width, mlp_ratio))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Identity() if bare else RMSNorm(width)
        self.causal = all(layer.causal for layer in layers)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length out_width"]:
        """The whole sequence at once."""
        for layer in self.layers:
            x, _ = layer(x)
        return self.norm(x)

    def scan(
        self, x: Float[Tensor, "batch length width"], state: tuple[State, ...]
    ) -> tuple[Float[Tensor, "batch length out_width"], tuple[State, ...]]:
        """A stretch of the sequence, on from `state`; gives its output and the state after it, both differentiable."""
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer(x, before)
            after.append(last)
        return self.norm(x), tuple(after)

    def step(
        self, x: Float[Tensor, "batch width"], state: tuple[State, ...]
    ) -> tuple[Float[Tensor, "batch out_width"], tuple[State, ...]]:
        """One token."""
        y, state = self.scan(x[:, None], state)
        return y[:, 0], state

    def initial_state(
        self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[State, ...]:
        """The state before the first token, one entry a layer. Raises ConfigError unless the backbone is causal."""
        if not self.causal:
            raise ConfigError("a backbone that sees both sides has no state; give it whole sequences or make it causal")
        return tuple(layer.initial_state(batch, device, dtype) for layer in self.layers)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should leave undecayed: vectors, and the rates of state spaces."""
        return {name for name, p in self.named_parameters() if p.ndim < 2 or name.endswith("A_log")}
