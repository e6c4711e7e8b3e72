"""A walk through a generator's latent space, shown as an animation of the first layer's filters."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from Gpt.files import replacing
from Gpt.report.style import COLOURS, INK, new_figure, styled
from Gpt.structure import Structure

WIDTH, GAP, CURVE_HEIGHT = 720, 4, 220  # pixels


def slerp_loop(noises: Float[Tensor, " K *shape"], frames: int) -> Float[Tensor, " F *shape"]:
    """Closed loop through K noises on great circles, `frames` points from each to the next; F = K x frames.

    Straight lines between Gaussian noises pass through vectors far shorter than any the generator has seen; arcs keep
    the length, and with it the noise typical (Shoemake 1985; White 2016). Where two noises differ in length, it is
    interpolated linearly along the arc. Frame `k * frames` is noise k itself.

    Raises:
        ValueError: a noise is zero, or two successive ones are opposite, so that no arc is the shortest.
    """
    rows = noises.flatten(1).double()
    norms = rows.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise ValueError("slerp needs noises that are not zero")
    units = rows / norms
    to_units, to_norms = units.roll(-1, 0), norms.roll(-1, 0)
    cosine = (units * to_units).sum(dim=1)
    if (cosine < -1 + 1e-12).any():
        raise ValueError("two successive noises are opposite: no shortest arc joins them")
    angle = torch.atan2((to_units - cosine[:, None] * units).norm(dim=1), cosine)[:, None]
    tangent = torch.nn.functional.normalize(to_units - cosine[:, None] * units, dim=1)
    arcs = []
    for t in torch.arange(frames, dtype=torch.float64) / frames:
        direction = torch.cos(t * angle) * units + torch.sin(t * angle) * tangent
        arcs.append(direction * torch.lerp(norms, to_norms, t.to(norms.device)))
    return torch.stack(arcs, dim=1).reshape(-1, *noises.shape[1:]).to(noises.dtype)


def first_layer_filters(structure: Structure, weights: Float[Tensor, "F D"]) -> np.ndarray:
    """The first weight tensor of F networks as images: `[F, n, h, w]`, or `[F, n, h, w, 3]` for colour filters.

    A convolution shows one image per output channel (colour when it reads three channels, else one image per pair of
    output and input channel); a linear layer one image per unit, square when the number of inputs is a square.
    """
    spec = next((t for t in structure.tensors if t.kind == "weight"), structure.tensors[0])
    frames = weights.shape[0]
    values = weights[:, spec.slice].reshape(frames, *spec.shape).float().cpu().numpy()
    if len(spec.shape) == 4:
        if spec.shape[1] == 3:
            return np.moveaxis(values, 2, -1)
        return values.reshape(frames, -1, *spec.shape[2:])
    rows = values.reshape(frames, spec.shape[0], -1)
    side = math.isqrt(rows.shape[2])
    return rows.reshape(frames, spec.shape[0], *((side, side) if side**2 == rows.shape[2] else (1, rows.shape[2])))


def walk_gif(filters: np.ndarray, metric: Sequence[float], path: Path, fps: int = 30, name: str = "metric") -> Path:
    """Write an animated GIF: the filters in a grid, below them the metric along the walk with a moving cursor.

    Args:
        filters: `[F, n, h, w]` or `[F, n, h, w, 3]`, one frame per network; all frames share one colour scale.
        metric: F values; gaps where a network diverged.
        fps: frames per second, at most 50 (a GIF counts in hundredths of a second).
    Raises:
        ValueError: the numbers of frames differ, or `fps` is out of range.
    """
    if len(filters) != len(metric):
        raise ValueError(f"{len(filters)} frames of filters, but {len(metric)} values of the metric")
    if not 1 <= fps <= 50:
        raise ValueError(f"a GIF shows 1 to 50 frames per second, not {fps}")
    curve, cursor = _curve_image(np.asarray(metric, dtype=float), name)
    sizes = np.abs(filters[np.isfinite(filters)])
    scale = float(np.percentile(sizes, 99.5)) if sizes.any() else 1.0  # a few outliers must not pale all others
    frames = []
    for i, images in enumerate(filters):
        grid = _grid_image(_to_rgb(images / scale))
        frame = Image.new("RGB", (WIDTH, grid.height + CURVE_HEIGHT), "white")
        frame.paste(grid, ((WIDTH - grid.width) // 2, 0))
        frame.paste(curve, (0, grid.height))
        x, y = cursor[i]
        draw = ImageDraw.Draw(frame)
        draw.line([(x, grid.height + 8), (x, grid.height + CURVE_HEIGHT - 40)], fill=INK, width=1)
        if math.isfinite(y):
            draw.ellipse([x - 5, grid.height + y - 5, x + 5, grid.height + y + 5], fill=COLOURS["generator"])
        frames.append(frame.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=round(100 / fps) * 10, loop=0)
    return path


def _to_rgb(images: np.ndarray) -> np.ndarray:
    """Weights in [-1, 1] as bytes `[n, h, w, 3]`: grey is zero for colour filters, white for the others."""
    centred = np.nan_to_num((images + 1) / 2, nan=0.5).clip(0, 1)
    colours = centred if images.ndim == 4 else colormaps["RdBu_r"](centred)[..., :3]
    return (255 * colours).round().astype(np.uint8)


def _grid_image(images: np.ndarray) -> Image.Image:
    """Tile `[n, h, w, 3]` into a grid about as wide as the frame, every weight a whole number of pixels."""
    count, height, width, _ = images.shape
    columns = min(count, max(1, math.ceil(math.sqrt(2 * count * height / width))))
    rows = math.ceil(count / columns)
    zoom = max(1, (WIDTH - GAP * (columns + 1)) // (columns * width))
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    grid = np.full((rows * cell_h + GAP, columns * cell_w + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * cell_h, GAP + i % columns * cell_w
        grid[top : top + cell_h - GAP, left : left + cell_w - GAP] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return Image.fromarray(grid).crop((0, 0, min(grid.shape[1], WIDTH), grid.shape[0]))


def _curve_image(metric: np.ndarray, name: str) -> tuple[Image.Image, np.ndarray]:
    """The curve without its cursor, drawn once, and the pixel `[F, 2]` of every frame's value."""
    figure = _curve_figure(metric, name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    finite = np.where(np.isfinite(metric), metric, np.nan)
    pixels = figure.axes[0].transData.transform(np.column_stack([np.arange(len(metric)), finite]))
    return image, np.column_stack([pixels[:, 0], image.height - pixels[:, 1]])


@styled
def _curve_figure(metric: np.ndarray, name: str) -> Figure:
    figure = new_figure(WIDTH / 120, CURVE_HEIGHT / 120)
    axis = figure.subplots()
    axis.plot(np.where(np.isfinite(metric), metric, np.nan), color=COLOURS["generator"], lw=1.5)
    axis.set_xlabel("frame", fontsize=9)
    axis.set_ylabel(name, fontsize=9)
    axis.tick_params(labelsize=8)
    return figure
