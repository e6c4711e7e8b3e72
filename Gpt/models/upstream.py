"""Published G.pt checkpoints: find the file, load its weights into `GptPaper`."""

import pickle
from pathlib import Path

import torch

from Gpt.errors import CheckpointError
from Gpt.models.gpt_paper import PUBLISHED_MODELS, GptPaper

DOWNLOAD_URL = "http://learn2learn.eecs.berkeley.edu/pretrained_models"


def resolve_checkpoint(name: str, folder: Path | str = "checkpoint_models") -> Path:
    """Find `name` (`cartpole.pt`, or `cartpole`) in `folder`, or as a path of its own.

    Raises:
        CheckpointError: there is no such file; for a published model the message tells where to get it.
    """
    file = Path(name).with_suffix(".pt")
    for candidate in (Path(folder) / file, file):
        if candidate.is_file():
            return candidate
    if file.stem in PUBLISHED_MODELS:
        url = f"{DOWNLOAD_URL}/{file.name}"
        raise CheckpointError(f"{folder}/{file.name} is missing; download {url} and place it in {folder}/")
    published = ", ".join(f"{name}.pt" for name in PUBLISHED_MODELS)
    raise CheckpointError(f"no G.pt checkpoint {str(file)!r}, neither here nor in {folder}/; published are {published}")


def load_upstream_checkpoint(path: Path | str, model: GptPaper) -> GptPaper:
    """Copy the weights of a published checkpoint into `model`, the moving average ("G_ema") where the file has one.

    Only tensors and plain containers are unpickled. The file is memory-mapped: the optimiser's state beside the
    weights is not read. Returns `model`.

    Raises:
        CheckpointError: the file cannot be read, is no G.pt checkpoint, or belongs to another configuration; in the
            last case every missing, unexpected and misshapen tensor is named.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({error}); download it again") from error
    key = next((key for key in ("G_ema", "G") if isinstance(content, dict) and key in content), None)
    if key is None:
        raise CheckpointError(f"{path} is not a G.pt checkpoint: it holds neither 'G_ema' nor 'G'")
    _check(path, content[key], model.state_dict())
    model.load_state_dict(content[key])
    return model


def _check(path: Path | str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(f"{path} belongs to another model or configuration: {'; '.join(problems)}")
