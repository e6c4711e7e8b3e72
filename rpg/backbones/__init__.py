"""Sequence models behind one interface: `build_backbone(name, width)` maps `[B, L, width]` to `[B, L, width]`.

| name        | layer                                | state of a layer         | source                            |
|-------------|--------------------------------------|--------------------------|-----------------------------------|
| mamba2      | state-space duality (RPG's choice)   | expand * width * d_state | Dao & Gu 2024, arXiv 2405.21060   |
| mamba       | selective state space                | expand * width * d_state | Gu & Dao 2023, arXiv 2312.00752   |
| hgrn2       | gated recurrence, outer-product state | width * expand_ratio    | Qin et al. 2024, arXiv 2404.07904 |
| lstm, gru   | torch.nn                             | 2 * width, width         | Hochreiter 1997, Cho et al. 2014  |
| transformer | softmax attention and a gated MLP    | grows with the sequence  | Vaswani et al. 2017               |
| none        | gated MLP, tokens never meet         | nothing                  | ablation of RPG, arXiv 2501.11587 |

Backbones add no positional code: tokens carry their own.
"""

import inspect
from typing import Any

from Gpt.errors import ConfigError, nearest
from rpg.backbones.base import Backbone, Mixer, State
from rpg.backbones.hgrn2 import HGRN2
from rpg.backbones.mamba import Mamba
from rpg.backbones.mamba2 import Mamba2
from rpg.backbones.recurrent import GRU, LSTM
from rpg.backbones.tokenwise import Tokenwise
from rpg.backbones.transformer import Attention

__all__ = ["BACKBONES", "Backbone", "Mixer", "State", "build_backbone"]

BACKBONES: dict[str, type[Mixer]] = {
    "mamba2": Mamba2,
    "mamba": Mamba,
    "hgrn2": HGRN2,
    "lstm": LSTM,
    "gru": GRU,
    "transformer": Attention,
    "none": Tokenwise,
}


def build_backbone(name: str, width: int, **options: Any) -> Backbone:
    """The backbone `name`, from `[B, L, width]` to `[B, L, width]`.

    Options are those of `Backbone` (depth, bare, bidirectional, ...) and of the layer itself (d_state, heads, ...).
    Parameters are drawn from the global generator, as in torch.nn: seed it, or fork it, around the call.
    Raises ConfigError for an unknown name, an unknown option, or sizes that do not fit together.
    """
    if name not in BACKBONES:
        raise ConfigError(f"there is no backbone {name!r}; {nearest(name, BACKBONES)}")
    mixer = BACKBONES[name]
    known = (_keywords(Backbone) | _keywords(mixer)) - {"mixer", "width", "in_width"}
    for option in options:
        if option not in known:
            raise ConfigError(f"backbone {name!r} has no option {option!r}; {nearest(option, known)}")
    return Backbone(mixer, width, **options)


def _keywords(module: type) -> set[str]:
    parameters = inspect.signature(module).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
