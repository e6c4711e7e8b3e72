"""The configurations that are sized for a GPU, from the zoo to the report: small, and on images of noise."""

import struct

import numpy as np
import pytest

import main
from Gpt.data import sources
from Gpt.run.command_line import compose
from Gpt.run.experiment import Experiment

SMALL = (
    "beside=[]", "data.download=false", "data.examples=40", "device=cpu", "logger=disabled", "trainer.compile=false",
    "trainer.precision=float32", "trainer.steps=2", "trainer.batch_size=4", "trainer.warmup=1", "trainer.log_every=1",
    "trainer.validation_batches=1", "evaluation.max_batch=16",
)  # fmt: skip
DENOISER = ("generator.width=32", "generator.depth=1", "generator.heads=2", "generator.channels=4")
POPULATION = ("zoo.shard_runs=16", "zoo.store=false", "+zoo.recipe.epochs=1", "+zoo.recipe.batch_size=20")
PROMPTED = (
    "zoo.runs=12", "zoo.test_runs=4", "zoo.validation_runs=4", "zoo.snapshots=3", "evaluation.networks=2",
    "evaluation.prompts=2", "evaluation.recursive_steps=1", "evaluation.optimiser_steps=2",
    "evaluation.learning_rates=2", "evaluation.tuning_networks=1", "evaluation.soup=2", "evaluation.novelty_networks=2",
)  # fmt: skip
MASKED = ("zoo.runs=102", "zoo.snapshots=2", "evaluation.samples_per_prompt=1")
WHOLE = (
    "zoo.store=false", "evaluation.networks=2", "evaluation.quick_networks=2", "evaluation.novelty_networks=2",
    "evaluation.soup=2", "evaluation.noise_scales=[0.1]",
)  # fmt: skip
TRAJECTORY = ("zoo.snapshots=7", "zoo.test_runs=2", "zoo.validation_runs=2", "+zoo.recipe.tail_iterations=7")
FINALS = ("zoo.runs=8", "zoo.test_runs=2", "zoo.validation_runs=2")

CONFIGURATIONS = {
    "mnist_loss": (*DENOISER, *POPULATION, *PROMPTED),
    "cifar10_loss": (*DENOISER, *POPULATION, *PROMPTED),
    "mnist_mask_rpg": (*DENOISER, *POPULATION, *MASKED),
    "cifar10_mask_rpg": (*DENOISER, *POPULATION, *MASKED),
    "cifar_rpg": (*DENOISER, *POPULATION, *WHOLE, *TRAJECTORY),
    "cifar_rpg_cnn_medium": (*DENOISER, *POPULATION, *WHOLE, *FINALS),
    "cifar_rpg_identity": (*DENOISER, *POPULATION, *WHOLE, *FINALS, "generator.identities=4"),
    "cifar_rpg_no_diffusion": (*DENOISER, *POPULATION, *WHOLE, *TRAJECTORY, "generator.identities=3"),
    "cifar_pdiff": (
        *POPULATION, *WHOLE, *TRAJECTORY, "generator.width=16", "generator.depth=1", "generator.latent=8",
        "generator.channels=[4, 4]", "generator.steps=2",
    ),
    "cifar_rpg_paper": (*POPULATION, *WHOLE, *TRAJECTORY, "generator.steps=2", "generator.identities=3"),
}  # fmt: skip


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with both data sets, of which each split's first forty images are used."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)

    def noise(count: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        return draws.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10

    (x, y), (x_test, y_test) = noise(5040, 32, 32, 3), noise(40, 32, 32, 3)
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", 5040), ("t10k", 40)):
        for kind, array in zip(("images-idx3", "labels-idx1"), noise(count, 28, 28), strict=True):
            header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / "mnist" / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    yield tmp_path
    sources.configure(None)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_from_the_zoo_to_the_report(images, name):
    settings = [*SMALL, *CONFIGURATIONS[name], f"data.root={images}"]
    results = main.run(Experiment(compose(name, settings), name))
    assert results is not None and results.table[0].kind == "generator"
    assert {"baseline", "reference"} <= {row.kind for row in results.table}
    assert (images / "runs" / name / "report.html").is_file()
