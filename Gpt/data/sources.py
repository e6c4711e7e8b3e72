"""Image data sets as tensors: the 8x8 digits of scikit-learn, MNIST, Fashion-MNIST and CIFAR-10.

Files are looked for under the configured root (`data.root`), under `./data`, and where Debian's data packages put them;
what is not found is downloaded with torchvision when `data.download` is on. Every data set is split into training,
validation and test part; the validation part is cut from the published training part with a fixed seed, the test part
is the published one.
"""

import gzip
import io
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.errors import DataError


@dataclass(frozen=True)
class Splits:
    """Images (normalised float32) and labels (int64) of each split."""

    train: tuple[Float[Tensor, "train ..."], Int[Tensor, " train"]]
    validation: tuple[Float[Tensor, "validation ..."], Int[Tensor, " validation"]]
    test: tuple[Float[Tensor, "test ..."], Int[Tensor, " test"]]


@dataclass(frozen=True)
class Places:
    """Where `read` looks, in this order; whether it may download; and how many examples of each split it keeps."""

    roots: tuple[Path, ...] = (Path("data"),)
    download: bool = True
    examples: int | None = None


# The one setting of a process: the data functions of TASK_METADATA take no arguments, so they cannot be handed it.
_places = Places()


def configure(root: str | None, download: bool = True, examples: int | None = None) -> None:
    """Say where `load` finds data files, in this process; called once, by the entry points, before a task is used.

    Args:
        examples: keep only the first this many of each split, for a machine that is small beside the data set.
    """
    global _places
    _places = Places(tuple(Path(r) for r in dict.fromkeys(filter(None, (root, "data")))), download, examples)
    read.cache_clear()


def load(name: str) -> Splits:
    """A data set, from where `configure` said; see `read`."""
    return read(name, _places)


def limit() -> int | None:
    """The number of examples that `load` cuts each split to, None for whole ones."""
    return _places.examples


@cache
def read(name: str, places: Places) -> Splits:
    """Read one data set: "digits", "mnist", "fashion_mnist" or "cifar10".

    Raises:
        DataError: no files were found and none could be downloaded; names every place that was looked at.
    """
    splits = _READERS[name](places)
    if places.examples is None:
        return splits
    kept = slice(places.examples)
    return Splits(*((x[kept].clone(), y[kept].clone()) for x, y in (splits.train, splits.validation, splits.test)))


def _digits(_: Places) -> Splits:
    from sklearn.datasets import load_digits  # slow import, needed for this data set only

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(bunch.target, dtype=torch.long)
    # No published split exists; 400 of the 1,797 images are the test part, drawn once with a fixed seed.
    order = torch.tensor(np.random.default_rng(0).permutation(len(y)))
    test, rest = order[:400], order[400:]
    return _split(x[rest], y[rest], x[test], y[test], validation=300)


def _mnist(places: Places) -> Splits:
    return _idx("MNIST", ("mnist", "MNIST/raw"), places)


def _fashion_mnist(places: Places) -> Splits:
    folders = "fashion-mnist", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"
    return _idx("FashionMNIST", folders, places)


def _cifar10(places: Places) -> Splits:
    arrays = _cifar10_arrays(places)
    x, y, x_test, y_test = (torch.from_numpy(a) for a in arrays)
    return _split(_channels_first(x), y.long(), _channels_first(x_test), y_test.long(), validation=5000)


_READERS = {"digits": _digits, "mnist": _mnist, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10}


def _split(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, validation: int) -> Splits:
    """Cut the validation part and normalise every channel with the training part's mean and standard deviation."""
    order = torch.tensor(np.random.default_rng(1).permutation(len(y)))
    held_out, kept = order[:validation], order[validation:]
    channels = (0, *range(2, x.dim()))
    mean, std = x[kept].mean(channels, keepdim=True), x[kept].std(channels, keepdim=True)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    return Splits((x[kept], y[kept]), (x[held_out], y[held_out]), (x_test, y_test))


def _channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().contiguous() / 255


def _idx(torchvision_name: str, folders: tuple[str, ...], places: Places) -> Splits:
    """MNIST's IDX files, plain or gzipped."""
    stems = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    own = [root for root in places.roots if root.name in folders]  # the files' names do not tell digits from clothes
    looked = list(dict.fromkeys([*own, *(root / folder for root in places.roots for folder in folders)]))
    for folder in looked:
        files = [next((folder / f for f in (stem, stem + ".gz") if (folder / f).is_file()), None) for stem in stems]
        if all(files):
            x, y, x_test, y_test = (_read_idx(f) for f in files if f)
            break
    else:
        dataset = _download(torchvision_name, places, looked)
        train, test = dataset(train=True), dataset(train=False)
        x, y, x_test, y_test = train.data, train.targets, test.data, test.targets
    images, test_images = (part.unsqueeze(1).float() / 255 for part in (x, x_test))
    return _split(images, y.long(), test_images, y_test.long(), validation=5000)


def _read_idx(path: Path) -> Tensor:
    """The IDX format: two zero bytes, type 0x08 (uint8), number of dimensions, big-endian sizes, data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is truncated or no gzip file ({error}); fetch it again") from error
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path} is not an IDX file of bytes; fetch it again")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != shape.prod():
        raise DataError(f"{path} is truncated: {values.size:,} of {shape.prod():,} bytes; fetch it again")
    return torch.from_numpy(values.reshape(shape).copy())


def _cifar10_arrays(places: Places) -> tuple[np.ndarray, ...]:
    """Images [N, 32, 32, 3] uint8 and labels of both parts, from an .npz, a JPEG pack, or torchvision's files."""
    looked = [root / name for root in places.roots for name in ("cifar10.npz", "cifar10_train_jpeg.npz")]
    for file in looked:
        if file.is_file() and file.name == "cifar10.npz":
            x, y, x_test, y_test = _read_pack(file, "x_train", "y_train", "x_test", "y_test")
            return *_checked_images(file, x, y), *_checked_images(file, x_test, y_test)
        if file.is_file():
            return *_decode_jpegs(file), *_decode_jpegs(file.with_name("cifar10_test_jpeg.npz"))
    dataset = _download("CIFAR10", places, [*looked, *(root / "cifar-10-batches-py" for root in places.roots)])
    train, test = dataset(train=True), dataset(train=False)
    return train.data, np.asarray(train.targets), test.data, np.asarray(test.targets)


def _decode_jpegs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    packed, lengths, labels = _read_pack(path, "bytes", "lengths", "labels")
    data, ends = packed.tobytes(), np.cumsum(lengths)
    try:
        images = [np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in zip(ends - lengths, ends, strict=True)]
        return _checked_images(path, np.stack(images), labels)
    except (OSError, SyntaxError, ValueError) as error:  # what PIL and np.stack raise
        raise DataError(f"{path} holds damaged images ({error}); fetch it again") from error


def _read_pack(path: Path, *names: str) -> tuple[np.ndarray, ...]:
    """Arrays of an .npz file, by name."""
    if not path.is_file():
        raise DataError(f"{path} is missing, though the rest of the data set is there; fetch it too")
    try:
        with np.load(path) as pack:
            return tuple(pack[name] for name in names)
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        held = ", ".join(names)
        raise DataError(f"{path} is truncated or no .npz file of {held} ({error}); fetch it again") from error


def _checked_images(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != (len(labels), 32, 32, 3):
        raise DataError(f"{path} has images {list(images.shape)} for {len(labels)} labels; fetch it again")
    return images, labels


def _download(torchvision_name: str, places: Places, looked: list[Path]):
    """A constructor of torchvision's data set, downloading it to the first root unless that is switched off."""
    import torchvision

    root = places.roots[0]

    def dataset(train: bool):
        return getattr(torchvision.datasets, torchvision_name)(root, train=train, download=places.download)

    try:
        dataset(train=False)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{torchvision_name} was not found. Looked in: {', '.join(map(str, looked))}, and under {root} as "
            f"torchvision keeps it{'; downloading failed' if places.download else '; data.download is off'} ({error}). "
            f"Set data.root=FOLDER to where the files are, or data.download=true where there is a network."
        ) from error
    return dataset
