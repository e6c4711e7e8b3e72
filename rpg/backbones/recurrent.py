"""LSTM (Hochreiter & Schmidhuber 1997) and GRU (Cho et al. 2014) of torch.nn, as mixers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rpg.backbones.base import Mixer, State


class LSTM(Mixer):
    """One torch.nn.LSTM layer; the state is (h, c), each `[1, B, width]`."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width)
        self.rnn = nn.LSTM(in_width, width, batch_first=True)

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return tuple(torch.zeros(1, batch, self.width, device=device, dtype=dtype) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        return self.rnn(x, state)


class GRU(Mixer):
    """One torch.nn.GRU layer; the state is h, `[1, B, width]`."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width)
        self.rnn = nn.GRU(in_width, width, batch_first=True)

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return (torch.zeros(1, batch, self.width, device=device, dtype=dtype),)

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        y, hidden = self.rnn(x, None if state is None else state[0])
        return y, (hidden,)
