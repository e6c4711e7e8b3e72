"""Which hidden units of a network may be renamed, read off its computation.

    module, inputs  --torch.export-->  graph of ATen operations
    --one rule for each operation-->  axes of weights and activations that number the same units, tied to each other
    --without units that anything fixes-->  `Symmetry`, as `Gpt.structure` takes it

An operation treats the entries of an axis alike, so that renaming them before is renaming them after it, or sums over
them together with an axis of the weights, which ties the two, or fixes their order, as a convolution does to pixels and
whoever calls the network to its inputs and outputs. What has no rule here fixes all that it touches: units may be
missed, but no renaming that is found changes the network. Such tables are otherwise written by hand, for each
architecture one (Ainsworth et al. 2022, arXiv 2209.04836).
"""

import copy
import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from Gpt.structure import Structure, Symmetry

logger = logging.getLogger(__name__)

aten = torch.ops.aten


def hidden_units(
    net: nn.Module, structure: Structure, inputs: Sequence[Any], keywords: Mapping[str, Any] | None = None
) -> Symmetry:
    """The symmetry of a network of this structure; its groups are named after the layers that they come from.

    Empty, with a warning, where the computation cannot be read off without its values, as of a forward that branches on
    them.

    Args:
        inputs, keywords: what the network can be called with.
    """
    net = copy.deepcopy(net).cpu().eval()
    try:
        program = torch.export.export(net, tuple(inputs), dict(keywords or {})).run_decompositions({})
    except Exception as error:  # whatever the tracer or the network's own code raises
        logger.warning(
            "which hidden units of %s may be renamed cannot be read off (%s: %s); the task's key `symmetry` can say it",
            type(net).__name__, type(error).__name__, str(error).partition("\n")[0],
        )  # fmt: skip
        return {}
    owners = {t.name: t.name for t in structure.tensors} | dict(structure.aliases)
    axes = _weight_axes(program, owners)
    return _named({t.name: [axis.root() for axis in axes.get(t.name, ())] for t in structure.tensors})


def _named(axes: Mapping[str, Sequence["_Axis"]]) -> Symmetry:
    # Units that come in blocks alone, such as heads of attention, have no axis whose length is their number.
    single = {axis.units for found in axes.values() for axis in found if axis.block == 1}
    names: dict[_Units, str] = {}
    symmetry = {}
    for name, found in axes.items():
        layer = name.rpartition(".")[0] or name
        groups = []
        for number, (units, _) in enumerate(found):
            free = not units.fixed and units in single and units.count > 1
            if free and units not in names:
                names[units] = f"{name}[{number}]" if layer in names.values() else layer
            groups.append(names[units] if free else None)
        if any(groups):
            symmetry[name] = tuple(groups)
    return symmetry


# ---- units and axes ----


@dataclass(eq=False)
class _Units:
    """What an axis numbers. With a parent, they are the pieces of its units, `block` of each."""

    count: int
    fixed: bool = False
    parent: "_Units | None" = None
    block: int = 1


class _Axis(NamedTuple):
    """An axis of `units.count * block` entries: a contiguous block for each unit."""

    units: _Units
    block: int = 1

    @property
    def length(self) -> int:
        return self.units.count * self.block

    def root(self) -> "_Axis":
        units, block = self
        while units.parent is not None:
            units, block = units.parent, block * units.block
        return _Axis(units, block)


Axes = tuple[_Axis, ...]


def _fresh(shape: Sequence[int], fixed: bool = True) -> Axes:
    return tuple(_Axis(_Units(length, fixed)) for length in shape)


def _fix(*found: Any) -> None:
    """No unit of these axes may be renamed."""
    for item in found:
        if isinstance(item, _Axis):
            item.root().units.fixed = True
        elif isinstance(item, tuple | list):
            _fix(*item)


def _tie(a: _Axis, b: _Axis) -> _Axis:
    """Two axes of one length number the same units."""
    a, b = a.root(), b.root()
    if a.units is b.units:
        return a
    if a.block < b.block:
        a, b = b, a
    if a.block % b.block:
        _fix(a, b)
        return a
    a.units.fixed |= b.units.fixed
    b.units.parent, b.units.block = a.units, a.block // b.block
    return a


# ---- the graph ----


def _weight_axes(program: torch.export.ExportedProgram, owners: Mapping[str, str]) -> dict[str, Axes]:
    """The axes of all generated tensors, by the name of the owner of their values, tied by what is done with them."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weights: dict[str, Axes] = {}
    values: dict[torch.fx.Node, Any] = {}
    for node in program.graph.nodes:
        args, keywords = (torch.fx.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
        shape = _shape(node.meta.get("val"))
        if node.op == "placeholder":
            owner = owners.get(names.get(node.name, ""))
            if owner is not None and node.users:  # a weight that nothing reads has no units
                values[node] = weights.setdefault(owner, _fresh(shape, fixed=False))
            else:
                values[node] = _fresh(shape or ())
        elif node.op == "output":
            _fix(args)
        else:
            rule = _RULES.get(getattr(node.target, "overloadpacket", node.target))
            if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                rule = _pointwise
            values[node] = (rule or _unknown)(shape, *args, **keywords)
    return weights


def _shape(value: Any) -> Any:
    """The shape of a tensor, or the shapes of several."""
    if isinstance(value, tuple | list):
        return [_shape(item) for item in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


# ---- rules: (shape of the result, arguments with axes in the place of tensors) -> axes of the result ----

_RULES: dict[Any, Callable[..., Any]] = {operator.getitem: lambda _, several, number: several[number]}


def _rule(*operations: Any) -> Callable[[Callable], Callable]:
    def register(rule: Callable) -> Callable:
        _RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


def _tensors(args: Sequence[Any], keywords: Mapping[str, Any]) -> list[Axes]:
    """The tensors among an operation's arguments; numbers and lists of numbers are left out."""
    return [item for item in (*args, *keywords.values()) if isinstance(item, tuple)]


def _unknown(shape: Any, *args: Any, **keywords: Any) -> Any:
    _fix(args, list(keywords.values()))
    return [_fresh(item or ()) for item in shape] if isinstance(shape, list) else _fresh(shape or ())


def _pointwise(shape: tuple[int, ...], *args: Any, **keywords: Any) -> Axes:
    """Entries of one place meet, from the last axis on; one entry meets all."""
    result, tensors = list(_fresh(shape)), _tensors(args, keywords)
    for place, length in enumerate(reversed(shape), start=1):
        axes = [x[-place] for x in tensors if len(x) >= place and x[-place].length == length > 1]
        for axis in axes:
            result[-place] = axis if axis is axes[0] else _tie(result[-place], axis)
    return tuple(result)


@_rule(aten.clone, aten.contiguous, aten.alias, aten.detach, aten.dropout, aten._to_copy, aten.to, aten.lift_fresh_copy)
@_rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.hardswish)
def _same(_: Any, x: Axes, *args: Any, **keywords: Any) -> Axes:
    return x


@_rule(aten.linear)
def _linear(_: Any, x: Axes, weight: Axes, bias: Axes | None = None) -> Axes:
    _tie(x[-1], weight[1])
    return (*x[:-1], _tie(weight[0], bias[0]) if bias else weight[0])


@_rule(aten.matmul, aten.mm, aten.bmm)
def _matmul(shape: tuple[int, ...], x: Axes, y: Axes) -> Axes:
    if min(len(x), len(y)) < 2:
        return _unknown(shape, x, y)
    _tie(x[-1], y[-2])
    return (*_pointwise(shape[:-2], x[:-2], y[:-2]), x[-2], y[-1])


@_rule(aten.addmm)
def _addmm(shape: tuple[int, ...], bias: Axes, x: Axes, y: Axes) -> Axes:
    return _pointwise(shape, bias, _matmul(shape, x, y))


@_rule(aten.conv1d, aten.conv2d, aten.conv3d)
def _convolution(
    shape: tuple[int, ...], x: Axes, weight: Axes, bias: Axes | None = None, *args: Any, **keywords: Any
) -> Axes:
    channels = x[-len(weight) + 1]
    if weight[1].length == channels.length:
        _tie(channels, weight[1])
        outputs = weight[0]
    elif weight[1].length == 1 and weight[0].length == channels.length:  # one filter for each channel
        outputs = _tie(channels, weight[0])
    else:
        return _unknown(shape, x, weight, bias)
    _fix(x[-len(weight) + 2 :], weight[2:])
    pixels = _fresh(shape[-len(weight) + 2 :])
    return (*x[: -len(weight) + 1], _tie(outputs, bias[0]) if bias else outputs, *pixels)


@_rule(aten.prelu)
def _prelu(_: Any, x: Axes, slopes: Axes) -> Axes:
    if slopes[0].length > 1:
        _tie(x[min(1, len(x) - 1)], slopes[0])
    return x


@_rule(aten._native_batch_norm_legit_no_training, aten.batch_norm)
def _batch_norm(shape: Any, x: Axes, *args: Any, **keywords: Any) -> Any:
    for per_channel in _tensors(args, keywords):
        _tie(x[1], per_channel[0])
    return (x, *(_fresh(item or ()) for item in shape[1:])) if isinstance(shape, list) else x


@_rule(aten.layer_norm, aten.rms_norm)
def _layer_norm(_: Any, x: Axes, normalised: Sequence[int], *args: Any, **keywords: Any) -> Axes:
    for per_entry in _tensors(args, keywords):
        for axis, entries in zip(x[-len(normalised) :], per_entry, strict=True):
            _tie(axis, entries)
    return x


@_rule(aten.scaled_dot_product_attention)
def _attention(shape: tuple[int, ...], query: Axes, key: Axes, value: Axes, *args: Any, **keywords: Any) -> Axes:
    masks = _tensors(args, keywords)
    heads = {tuple(axis.length for axis in x[:-2]) for x in (query, key, value)}
    if masks or len(heads) > 1:
        return _unknown(shape, query, key, value, masks)
    _fix(query[-2], key[-2], value[-2])
    _tie(query[-1], key[-1])
    return (*_pointwise(shape[:-2], query[:-2], key[:-2], value[:-2]), query[-2], value[-1])


@_rule(aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d)
def _pooling(shape: Any, x: Axes, *args: Any, **keywords: Any) -> Any:
    if isinstance(shape, list):
        return _unknown(shape, x)
    _fix(x[-2:])
    return (*x[:-2], *_fresh(shape[-2:]))


@_rule(aten.mean, aten.sum, aten.amax, aten.amin)
def _reduction(shape: tuple[int, ...], x: Axes, dims: Any = None, keepdim: bool = False, **_: Any) -> Axes:
    gone = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims or range(len(x)))}
    if keepdim:
        return tuple(_fresh((1,))[0] if place in gone else axis for place, axis in enumerate(x))
    return tuple(axis for place, axis in enumerate(x) if place not in gone)


@_rule(aten.permute)
def _permute(_: Any, x: Axes, order: Sequence[int]) -> Axes:
    return tuple(x[place] for place in order)


@_rule(aten.transpose)
def _transpose(_: Any, x: Axes, first: int, second: int) -> Axes:
    swapped = list(x)
    swapped[first], swapped[second] = x[second], x[first]
    return tuple(swapped)


@_rule(aten.t)
def _t(_: Any, x: Axes) -> Axes:
    return x[::-1]


@_rule(aten.select)
def _select(_: Any, x: Axes, dim: int, number: int) -> Axes:
    return _part((), x, dim)


@_rule(aten.unbind)
def _unbind(shapes: list[tuple[int, ...]], x: Axes, dim: int = 0) -> list[Axes]:
    return [_part((), x, dim) for _ in shapes]


@_rule(aten.slice)
def _slice(shape: tuple[int, ...], x: Axes, dim: int = 0, *_: Any) -> Axes:
    return x if shape[dim] == x[dim].length else _part((shape[dim],), x, dim)


@_rule(aten.split, aten.split_with_sizes, aten.chunk)
def _split(shapes: list[tuple[int, ...]], x: Axes, sizes: Any, dim: int = 0) -> list[Axes]:
    return [_part((shape[dim],), x, dim) for shape in shapes]


def _part(left: tuple[int, ...], x: Axes, dim: int) -> Axes:
    """Some entries of an axis have a place of their own: none of them may be renamed."""
    _fix(x[dim])
    dim %= len(x)
    return (*x[:dim], *_fresh(left), *x[dim + 1 :])


@_rule(aten.cat)
def _cat(shape: tuple[int, ...], parts: Sequence[Axes], dim: int = 0) -> Axes:
    dim %= len(shape)
    _fix([part[dim] for part in parts])
    rest = _pointwise((*shape[:dim], *shape[dim + 1 :]), *((*part[:dim], *part[dim + 1 :]) for part in parts))
    return (*rest[:dim], *_fresh(shape[dim : dim + 1]), *rest[dim:])


@_rule(aten.expand)
def _expand(shape: tuple[int, ...], x: Axes, *_: Any, **__: Any) -> Axes:
    return _pointwise(shape, x)


@_rule(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)
def _reshape(shape: tuple[int, ...], x: Axes, *_: Any, **__: Any) -> Axes:
    """Axes are kept, several become one, or one becomes several; the first of several numbers the units."""
    if 0 in shape:
        return _unknown(shape, x)
    old, result = [axis for axis in x if axis.length > 1], []
    new = [length for length in shape if length > 1]
    while old:
        many, lengths = [old.pop(0)], [new.pop(0)]
        while (size := math.prod(axis.length for axis in many)) != (wanted := math.prod(lengths)):
            if size < wanted:
                many.append(old.pop(0))
            else:
                lengths.append(new.pop(0))
        units, block = many[0].root()
        _fix(many[1:])
        if len(lengths) == 1:
            result.append(_Axis(units, size // units.count))
        elif len(many) == 1:
            first = _Axis(_Units(lengths[0], fixed=False))
            _tie(_Axis(first.units, size // lengths[0]), many[0])
            result += [first, *_fresh(lengths[1:])]
        else:
            _fix(many)
            result += _fresh(lengths)
    return tuple(_fresh((1,))[0] if length == 1 else result.pop(0) for length in shape)


@_rule(aten.embedding)
def _embedding(_: Any, weight: Axes, rows: Axes, *__: Any, **___: Any) -> Axes:
    _fix(weight[0])
    return (*rows, weight[1])
