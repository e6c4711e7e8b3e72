"""Published G.pt checkpoints, with synthetic files that hold the published names."""

import os

import pytest
import torch

from Gpt.errors import CheckpointError
from Gpt.models.gpt_paper import GptPaper
from Gpt.models.upstream import load_upstream_checkpoint, resolve_checkpoint
from Gpt.seeds import rng

SIZES, WIDTH, LAYERS, CHUNK = (600, 3), 8, 2, 260
SPLITS = (260, 260, 80, 3)


def model() -> GptPaper:
    return GptPaper(SIZES, width=WIDTH, layers=LAYERS, heads=2, chunk=CHUNK)


def published_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Names and shapes as the released implementation writes them, spelt out by hand, with random values."""
    shapes = {"scalar_embedder.frequencies": (128,), "decoder.pos_emb": (1, 12, WIDTH)}
    for norm in ("ln_in", "ln_f"):
        shapes |= {f"decoder.{norm}.weight": (WIDTH,), f"decoder.{norm}.bias": (WIDTH,)}
    for i in range(LAYERS):
        block = f"decoder.blocks.{i}"
        for norm in ("ln1", "ln2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        for layer in ("key", "query", "value", "proj"):
            shapes |= {f"{block}.attn.{layer}.weight": (WIDTH, WIDTH), f"{block}.attn.{layer}.bias": (WIDTH,)}
        shapes |= {f"{block}.mlp.0.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.0.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.2.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.2.bias": (WIDTH,)}
    for i, size in enumerate((*SPLITS, *SPLITS, 257, 257, 257, 257)):
        shapes[f"decoder.input_parameter_projections.{i}.0.weight"] = (WIDTH, size)
    for i, size in enumerate(SPLITS):
        shapes[f"decoder.output_parameter_projections.{i}.0.weight"] = (size, WIDTH)
    g = rng("cpu", seed, "published")
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def save(path, **content):
    torch.save(content, path)
    return path


def test_the_moving_average_is_loaded_where_there_is_one(tmp_path):
    raw, average = published_weights(0), published_weights(1)
    path = save(tmp_path / "best.pt", G=raw, G_ema=average, optim={"state": {0: {"step": 3}}, "param_groups": []})
    loaded = load_upstream_checkpoint(path, model()).state_dict()
    assert loaded.keys() == average.keys()
    assert all(torch.equal(loaded[name], average[name]) for name in average)
    loaded = load_upstream_checkpoint(save(tmp_path / "raw.pt", G=raw), model()).state_dict()
    assert all(torch.equal(loaded[name], raw[name]) for name in raw)


def test_loaded_weights_do_not_change_with_the_file(tmp_path):
    """The file is memory-mapped while it is read, no longer."""
    path = save(tmp_path / "best.pt", G=published_weights())
    loaded = load_upstream_checkpoint(path, model())
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    path.write_bytes(os.urandom(path.stat().st_size))
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_every_difference_is_named(tmp_path):
    weights = published_weights()
    del weights["decoder.ln_f.bias"], weights["decoder.pos_emb"]
    weights["decoder.ln_in.weight"] = torch.ones(WIDTH + 1)
    weights["decoder.blocks.7.ln1.weight"] = torch.ones(WIDTH)
    untouched = model()
    before = {name: tensor.clone() for name, tensor in untouched.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_upstream_checkpoint(save(tmp_path / "best.pt", G=weights), untouched)
    message = str(caught.value)
    for name in ("missing decoder.ln_f.bias", "missing decoder.pos_emb", "unexpected decoder.blocks.7.ln1.weight"):
        assert name in message
    assert "decoder.ln_in.weight has shape (9,), the model (8,)" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in untouched.state_dict().items())


class Trap:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("trapped",))


@pytest.mark.parametrize("content", ["garbage", "empty", "trap", "stranger", "bare tensor"])
def test_other_files_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    if content in ("garbage", "empty"):
        path.write_bytes(b"not a checkpoint" * (content == "garbage"))
    else:
        torch.save({"trap": {"G": Trap()}, "stranger": {"model": {}}, "bare tensor": torch.ones(2)}[content], path)
    with pytest.raises(CheckpointError, match="best.pt"):
        load_upstream_checkpoint(path, model())
    assert not (tmp_path / "trapped").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pt"):
        load_upstream_checkpoint(tmp_path / "nowhere.pt", model())


def test_checkpoints_are_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint_models"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="download http.*/cartpole.pt and place it in checkpoint_models/"):
        resolve_checkpoint("cartpole.pt")
    (folder / "cartpole.pt").touch()
    assert resolve_checkpoint("cartpole.pt") == resolve_checkpoint("cartpole")
    assert resolve_checkpoint("cartpole").samefile(folder / "cartpole.pt")
    assert resolve_checkpoint(str(folder / "cartpole.pt")).samefile(folder / "cartpole.pt")
    with pytest.raises(CheckpointError, match="mnist_loss.pt"):
        resolve_checkpoint("my_model")
