"""Trackers: what was logged can be read back, without a network or an account, and none is ever in the way."""

import importlib.machinery
import json
import logging
import struct
import sys
import types

import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from Gpt.errors import ConfigError
from Gpt.report.logger import open_loggers, read_metrics
from Gpt.report.text import print_table
from Gpt.report.trackers import LoggerConfig, SwanLabLogger, TensorBoardLogger, WandbLogger, line_charts


@pytest.fixture
def picture(tmp_path):
    """A figure of 5 x 4 pixels, all of one colour."""
    path = tmp_path / "figure.png"
    Image.new("RGB", (5, 4), "teal").save(path)
    return path


# --- wandb ------------------------------------------------------------------------------------------------------------


def read_wandb_history(folder):
    """The logged rows of an offline run: protobuf records in LevelDB's log format (32 KiB blocks, 7-byte headers)."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, position, record, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            message = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if message.HasField("history"):
                items = message.history.item
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def close(logger):
    """Finish the run and wandb's own process, which otherwise writes its last records a moment later."""
    logger.finish()
    assert not logger._failed
    wandb.teardown()


def read_wandb_table(folder, name):
    (path,) = folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    return json.loads(path.read_text())


@pytest.fixture
def offline(tmp_path):
    logger = WandbLogger(LoggerConfig(project="tests"), tmp_path / "run", {"zoo": {"runs": 8}})
    yield logger
    logger.finish()


def test_scalars_can_be_read_back_from_an_offline_wandb_run(offline, tmp_path, capfd):
    offline.log({"train/loss": 0.75}, 10)
    offline.log({"train/loss": 0.5, "validation/alignment": 0.9}, 20)
    close(offline)
    rows = read_wandb_history(tmp_path / "run")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(10, 0.75), (20, 0.5)]
    assert rows[1]["validation/alignment"] == 0.9
    assert capfd.readouterr() == ("", "")


def test_charts_tables_and_figures_can_be_read_back_from_an_offline_wandb_run(
    offline, tmp_path, picture, synthetic_results
):
    offline.figure("prompt_alignment", picture)
    offline.results(synthetic_results)
    close(offline)
    image, results = read_wandb_history(tmp_path / "run")
    assert (image["figures/prompt_alignment/width"], image["figures/prompt_alignment/height"]) == (5, 4)
    assert "results/path" in results and "optimisers_table/path" in results
    table = read_wandb_table(tmp_path / "run", "results")
    assert table["columns"][:5] == ["name", "kind", "test_loss", "test_loss low", "test_loss high"]
    assert ["retrieval", "baseline", 0.171] in [line[:3] for line in table["data"]]
    chart = read_wandb_table(tmp_path / "run", "optimisers_table")
    drawn = {(line[1], line[0]): line[2] for line in chart["data"]}
    adam = synthetic_results.optimisers[1]
    assert [drawn["Adam", x] for x in adam.x] == adam.mean
    assert drawn["G.pt, one update", 200.0] == 0.348 and drawn["retrieval", 0.0] == 0.171


def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    ids = set()
    for _ in range(2):
        logger = WandbLogger(LoggerConfig(), tmp_path, {})
        ids.add(logger._run.id)
        logger.finish()
    assert len(ids) == 1


def test_line_charts_hold_the_identity_and_every_network(synthetic_results):
    charts = line_charts(synthetic_results)
    curves = {f"prompt_curve/{c.name}" for c in synthetic_results.curves}
    assert set(charts) == curves | {"optimisers", "recursive", "side_by_side"}
    beside = charts["side_by_side"]
    assert {"ordinary training", "G.pt, one update", "RPG, written from noise (other)"} <= set(beside["keys"])
    for chart in charts.values():
        assert len(chart["xs"]) == len(chart["ys"]) == len(chart["keys"])
        assert all(len(x) == len(y) for x, y in zip(chart["xs"], chart["ys"], strict=True))
    chart = charts["prompt_curve/held-out starts"]
    assert chart["ys"][1] == chart["xs"][1] and len(chart["keys"]) == 26
    assert "SGD, 1 step" not in charts["optimisers"]["keys"]


@pytest.mark.parametrize("broken", ["init", "import"])
def test_a_wandb_that_fails_costs_one_warning(tmp_path, monkeypatch, caplog, synthetic_results, broken):
    if broken == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:

        def refuse(**settings):
            raise wandb.errors.CommError("no network")

        monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        loggers = open_loggers(LoggerConfig(mode="online"), tmp_path, {})
        loggers.log({"train/loss": 1.0}, 0)
        loggers.figure("x", tmp_path / "x.png")
        loggers.results(synthetic_results)
        loggers.finish()
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def read_tensorboard(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_scalars_figures_and_the_table_can_be_read_back_from_tensorboard(tmp_path, picture, synthetic_results):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(LoggerConfig(backend="tensorboard"), tmp_path, {})
    logger.log({"train/loss": 0.75}, 10)
    logger.log({"train/loss": 0.5, "validation/alignment": 0.875}, 20)
    logger.figure("prompt_alignment", picture)
    logger.results(synthetic_results)
    logger.finish()
    logger.finish()
    assert not logger._failed
    found = read_tensorboard(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(10, 0.75), (20, 0.5)]
    assert [(event.step, event.value) for event in found.Scalars("validation/alignment")] == [(20, 0.875)]
    (image,) = found.Images("figures/prompt_alignment")
    assert (image.step, image.width, image.height) == (20, 5, 4)
    (row,) = [row for row in synthetic_results.table if row.name == "retrieval"]
    tag = next(tag for tag in found.Tags()["scalars"] if tag.startswith("test_loss/retrieval"))
    assert found.Scalars(tag)[0].value == pytest.approx(row.metrics["test_loss"].mean)
    (table,) = found.Tensors("results/text_summary")
    (text,) = table.tensor_proto.string_val
    assert [line[4:] for line in text.decode().split("\n")] == print_table(synthetic_results).splitlines()


def test_a_resumed_run_holds_every_step_once_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    for value, resume_step, steps in [(1.0, -1, range(1, 8)), (2.0, 5, range(6, 9))]:
        logger = TensorBoardLogger(LoggerConfig(backend="tensorboard"), tmp_path, {}, resume_step)
        for step in steps:
            logger.log({"train/loss": value}, step)
        logger.finish()
    events = read_tensorboard(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [*((s, 1.0) for s in range(1, 6)), *((s, 2.0) for s in range(6, 9))]


# --- SwanLab ----------------------------------------------------------------------------------------------------------


def read_swanlab(folder):
    """Records of all offline runs in a folder: scalars as (key, step, number), media as (key, step, files)."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    scalars, media = [], []
    for path in sorted(folder.glob("swanlab/run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        while content := reader.scan():
            record = Record.FromString(content)
            if record.HasField("scalar"):
                scalars.append((record.scalar.key, record.scalar.step, record.scalar.value.number))
            if record.HasField("media"):
                media.append((record.media.key, record.media.step, [i.filename for i in record.media.value.items]))
        reader.close()
    return scalars, media


def test_scalars_figures_and_the_table_can_be_read_back_from_an_offline_swanlab_run(
    tmp_path, picture, synthetic_results
):
    pytest.importorskip("swanlab.sdk.internal.core_python.store")  # reads what was recorded; not public
    logger = SwanLabLogger(LoggerConfig(backend="swanlab"), tmp_path, {"zoo": {"runs": 8}})
    logger.log({"train/loss": 0.75}, 10)
    logger.log({"train/loss": 0.5, "validation/alignment": 0.875}, 20)
    logger.figure("prompt_alignment", picture)
    logger.results(synthetic_results)
    logger.finish()
    logger.finish()
    assert not logger._failed
    scalars, media = read_swanlab(tmp_path)
    assert scalars[:3] == [("train/loss", 10, 0.75), ("train/loss", 20, 0.5), ("validation/alignment", 20, 0.875)]
    assert ("test_loss/retrieval", 20, 0.171) in scalars
    assert {(key, step) for key, step, _ in media} == {("figures/prompt_alignment", 20), ("results", 20)}
    (config,) = tmp_path.glob("swanlab/run-*/files/config.yaml")
    assert "runs" in config.read_text()


class StandInSwanLab(types.ModuleType):
    """Records what it is told, as a SwanLab of any version would be."""

    def __init__(self):
        super().__init__("swanlab")
        self.__spec__ = importlib.machinery.ModuleSpec("swanlab", None)
        self.calls, self.Image, self.Text = [], str, str
        self.Settings = type("Settings", (types.SimpleNamespace,), {"Terminal": types.SimpleNamespace})

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, metrics, step):
        self.calls.append(("log", metrics, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def stand_in(monkeypatch):
    module = StandInSwanLab()
    monkeypatch.setitem(sys.modules, "swanlab", module)
    return module


def test_swanlab_is_told_mode_names_and_settings(tmp_path, stand_in):
    config = LoggerConfig(backend="swanlab", mode="online", project="mine", entity="us", name="first")
    for resume_step in (-1, 4):
        loggers = open_loggers(config, tmp_path, {"seed": 3}, resume_step)
        loggers.figure("prompts", tmp_path / "prompts.png")
        loggers.finish()
    (_, first), *_, (_, second), log, _ = stand_in.calls
    expected = {"mode": "online", "project": "mine", "workspace": "us", "name": "first", "config": {"seed": 3}}
    assert first.items() >= expected.items()
    assert first["log_dir"] == str(tmp_path / "swanlab")
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert log == ("log", {"figures/prompts": str(tmp_path / "prompts.png")}, 4)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["swanlab", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, backend):
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(ConfigError, match=rf"logger={backend} needs .* pip install 'gpt-weights\[{backend}\]'"):
        open_loggers(LoggerConfig(backend=backend), tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_the_dashboard_that_local_mode_needs_is_named(tmp_path, stand_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanboard", None)
    with pytest.raises(ConfigError, match=r"logger\.mode=local .* pip install 'swanlab\[dashboard\]'"):
        open_loggers(LoggerConfig(backend="swanlab", mode="local"), tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "ofline"}, r"logger\.mode is 'ofline'; choose one of offline, online \("),
        ({"backend": "tensorboard", "mode": "online"}, r"logger\.mode is 'online'; choose one of offline \("),
        ({"backend": "tensorbord"}, "'tensorbord'; choose one of wandb, swanlab, tensorboard, none"),
    ],
)
def test_unknown_backends_and_modes_are_configuration_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoggerConfig(**settings)


def test_a_folder_that_cannot_be_written_costs_a_tracker_one_warning(tmp_path, caplog, synthetic_results):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        loggers = open_loggers(LoggerConfig(backend="tensorboard"), tmp_path, {})
        loggers.log({"train/loss": 1.0}, 0)
        loggers.results(synthetic_results)
        loggers.finish()
    assert len(caplog.records) == 1 and "tensorboard failed and is left out" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0
