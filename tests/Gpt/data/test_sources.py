"""Data sets from files of every kind they come in; nothing is downloaded here."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from Gpt.data import sources
from Gpt.errors import DataError

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAIN, TEST = 5200, 40


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Only this folder is looked at, and the network never."""
    monkeypatch.chdir(tmp_path)
    sources.configure(str(tmp_path / "files"), download=False)
    yield tmp_path / "files"
    sources.configure(None)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, suffix: str = "") -> tuple[np.ndarray, ...]:
    """A data set in which every label is the image's first pixel."""
    draws = np.random.default_rng(0)
    arrays = []
    for count in (TRAIN, TEST):
        images = draws.integers(0, 256, (count, 28, 28))
        images[:, 0, 0] = draws.integers(0, 10, count)
        arrays += [images, images[:, 0, 0]]
    folder.mkdir(parents=True)
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        raw = idx(array)
        (folder / (name + suffix)).write_bytes(gzip.compress(raw, 1) if suffix else raw)
    return tuple(arrays)


def check(splits: sources.Splits, shape: tuple[int, ...], train: int, validation: int, test: int) -> None:
    for (x, y), count in ((splits.train, train), (splits.validation, validation), (splits.test, test)):
        assert x.shape == (count, *shape)
        assert y.shape == (count,)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert 0 <= y.min()
        assert y.max() <= 9
    channels = (0, *range(2, splits.train[0].dim()))
    torch.testing.assert_close(splits.train[0].mean(channels), torch.zeros(shape[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(splits.train[0].std(channels), torch.ones(shape[0]), rtol=0, atol=1e-3)


def test_digits_need_no_files():
    splits = sources.load("digits")
    check(splits, (1, 8, 8), 1097, 300, 400)
    everything = torch.cat([x for x, _ in (splits.train, splits.validation, splits.test)]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # all images, none in two splits
    again = (sources.read.cache_clear(), sources.load("digits"))[1]
    assert torch.equal(again.test[0], splits.test[0])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_plain_and_packed(files, name, place, suffix):
    images, labels, test_images, test_labels = write_mnist(files / place, suffix)
    splits = sources.load(name)
    check(splits, (1, 28, 28), TRAIN - 5000, 5000, TEST)
    x, y = splits.test
    assert y.tolist() == test_labels.tolist()
    assert np.corrcoef(x.flatten().numpy(), test_images.flatten())[0, 1] == pytest.approx(1)
    for x, y in (splits.train, splits.validation):  # images and labels were shuffled together
        pixels = x[:, 0, 0, 0]
        order = torch.stack([pixels[y == digit].mean() for digit in range(10)])
        assert (order.diff() > 0).all()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("damage", ["half", "header", "empty", "other", "longer"])
def test_a_damaged_file_is_named(files, suffix, damage):
    write_mnist(files / "mnist", suffix)
    file = files / "mnist" / (IDX_NAMES[2] + suffix)
    raw = file.read_bytes()
    plain = gzip.decompress(raw) if suffix else raw
    other = {"header": plain[:9], "other": b"P5 28 28 255\n", "longer": plain + b"\0"}
    if damage in other:
        file.write_bytes(gzip.compress(other[damage]) if suffix else other[damage])
    else:
        file.write_bytes(raw[: len(raw) // 2] if damage == "half" else b"")
    with pytest.raises(DataError) as caught:
        sources.load("mnist")
    assert str(file) in str(caught.value)
    assert "fetch it again" in str(caught.value)


def cifar10(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    images = np.kron(draws.integers(0, 256, (count, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    return images, draws.integers(0, 10, count)


def test_cifar10_from_arrays(files):
    files.mkdir()
    (x, y), (x_test, y_test) = cifar10(5100, 0), cifar10(30, 1)
    np.savez(files / "cifar10.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    splits = sources.load("cifar10")
    check(splits, (3, 32, 32), 100, 5000, 30)
    assert splits.test[1].tolist() == y_test.tolist()
    assert np.corrcoef(splits.test[0][:, 1].flatten().numpy(), x_test[..., 1].flatten())[0, 1] == pytest.approx(1)


def write_jpegs(files: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both packs; the images and labels of the test part."""
    files.mkdir()
    for part, count in (("train", 5010), ("test", 20)):
        images, labels = cifar10(count, 2)
        packed = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=95)
            packed.append(buffer.getvalue())
        np.savez(
            files / f"cifar10_{part}_jpeg.npz",
            bytes=np.frombuffer(b"".join(packed), np.uint8),
            lengths=[len(p) for p in packed],
            labels=labels,
        )
    return images, labels


def test_cifar10_from_jpegs(files):
    images, labels = write_jpegs(files)
    splits = sources.load("cifar10")
    check(splits, (3, 32, 32), 10, 5000, 20)
    assert splits.test[1].tolist() == labels.tolist()
    assert np.corrcoef(splits.test[0][:, 0].flatten().numpy(), images[..., 0].flatten())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("mnist", ["files/mnist", "files/MNIST/raw", "data/mnist"]),
        ("fashion_mnist", ["files/fashion-mnist", "files/FashionMNIST/raw", "data/fashion-mnist"]),
        ("cifar10", ["files/cifar10.npz", "files/cifar10_train_jpeg.npz", "data/cifar10.npz", "cifar-10-batches-py"]),
    ],
)
def test_what_is_missing_is_told_with_every_place(files, monkeypatch, name, places):
    monkeypatch.setattr(Path, "is_file", lambda self: False)  # whatever this machine has installed
    with pytest.raises(DataError) as caught:
        sources.load(name)
    for words in (*places, "data.download is off", "data.root=FOLDER", "data.download=true"):
        assert words in str(caught.value)
    looked = str(caught.value).partition("Looked in: ")[2].partition(", and under")[0].split(", ")
    assert len(set(looked)) == len(looked)


@pytest.mark.parametrize("name", ["cifar10.npz", "cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz"])
@pytest.mark.parametrize("damage", ["half", "empty", "other", "array", "lacking", "images"])
def test_a_damaged_pack_is_named(files, name, damage):
    write_jpegs(files)
    file, array, lacking, images = files / name, io.BytesIO(), io.BytesIO(), io.BytesIO()
    whole = (files / "cifar10_test_jpeg.npz").read_bytes()
    np.save(array, np.zeros(3))
    np.savez(lacking, labels=np.zeros(3))
    flat = {"x_train": np.zeros((3, 32)), "y_train": np.zeros(3), "x_test": np.zeros((3, 32)), "y_test": np.zeros(3)}
    np.savez(images, bytes=np.arange(20, dtype=np.uint8), lengths=[10, 10], labels=[0, 1], **flat)
    made = {"array": array.getvalue(), "lacking": lacking.getvalue(), "images": images.getvalue()}
    made |= {"half": whole[: len(whole) // 2], "empty": b"", "other": b"P5 28 28 255\n"}
    file.write_bytes(made[damage])
    with pytest.raises(DataError) as caught:
        sources.load("cifar10")
    assert str(file) in str(caught.value) and "fetch it again" in str(caught.value)


def test_a_pack_without_its_other_part_is_incomplete(files):
    write_jpegs(files)
    (files / "cifar10_test_jpeg.npz").unlink()
    with pytest.raises(DataError, match="cifar10_test_jpeg.npz is missing.*fetch it too"):
        sources.load("cifar10")


def test_the_configured_folder_comes_before_the_usual_one(files, tmp_path):
    write_mnist(tmp_path / "data" / "mnist")
    test_labels = sources.load("mnist").test[1]
    folder = files / "mnist"
    write_mnist(folder)
    (folder / IDX_NAMES[3]).write_bytes(idx(np.full(TEST, 7)))
    sources.configure(str(files), download=False)  # forgets what was loaded
    assert sources.load("mnist").test[1].tolist() == [7] * TEST
    assert test_labels.tolist() != [7] * TEST


@pytest.mark.parametrize(("name", "folder"), [("mnist", "mnist"), ("fashion_mnist", "fashion-mnist")])
def test_the_data_sets_own_folder_will_do(files, name, folder):
    write_mnist(files / folder)
    sources.configure(str(files / folder), download=False)
    check(sources.load(name), (1, 28, 28), TRAIN - 5000, 5000, TEST)


def test_a_small_machine_takes_the_first_examples_of_each_split():
    whole = sources.load("digits")
    try:
        sources.configure(None, examples=50)
        small = sources.load("digits")
        assert sources.limit() == 50
        for part in ("train", "validation", "test"):
            for kept, all_of_them in zip(getattr(small, part), getattr(whole, part), strict=True):
                assert torch.equal(kept, all_of_them[:50])
    finally:
        sources.configure(None)
    assert sources.limit() is None and len(sources.load("digits").test[1]) == 400
