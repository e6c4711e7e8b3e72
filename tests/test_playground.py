"""playground.py as its users meet it: the files it leaves, what it measures, the walk, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import playground
from Gpt import text
from Gpt.checkpoint import TrainingState
from Gpt.errors import CheckpointError, ConfigError
from Gpt.evaluation import reading
from Gpt.evaluation.prompting import Starts
from Gpt.generator import Batch, Prompt
from Gpt.report.walk import slerp_loop
from Gpt.run.command_line import compose
from Gpt.run.experiment import Experiment
from Gpt.run.folder import create_folder
from Gpt.seeds import rng
from Gpt.text import SentenceReader, TextHead
from Gpt.vocabulary import CLASSES, load_vocabulary
from playground import PlaygroundConfig, Wish, play, split_arguments

ROOT = Path(playground.__file__).parent
TINY = ("generator.width=32", "generator.depth=1", "generator.heads=2", "device=cpu", "run.name=tiny")
SHORT = {"count": 3, "keyframes": 2, "frames": 2}


def experiment(*arguments: str, name: str = "digits_loss") -> Experiment:
    return Experiment(compose(name, list(arguments)), name)


def store_generator(trained: Experiment) -> None:
    """What training leaves, without the training: no weight is zero."""
    noise = rng("cpu", 0, "trained")
    with torch.no_grad():
        for parameter in trained.generator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    optimizer = torch.optim.SGD(trained.generator.parameters())
    trained.checkpoints.save(TrainingState(step=1), trained.generator, trained.generator, optimizer)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with a run of the smallest generator."""
    monkeypatch.chdir(tmp_path)
    store_generator(experiment(*TINY))
    return tmp_path


def test_networks_are_complete_and_measure_what_is_written_beside_them(here, capsys):
    folder = play(experiment(*TINY), PlaygroundConfig(**SHORT, wanted=0.2))
    assert folder == Path("runs/tiny/playground")
    assert {f.name for f in folder.iterdir()} == {
        *(f"network-00{i}.safetensors" for i in range(3)),
        "networks.json",
        "walk.gif",
    }
    facts, task = json.loads((folder / "networks.json").read_text()), experiment(*TINY).task
    assert (facts["task"], facts["options"]["wanted"], facts["options"]["seed"]) == ("digits_loss", 0.2, 0)
    for entry in facts["networks"]:
        network = task.constructor()
        network.load_state_dict(load_file(folder / entry["file"]), strict=True)
        for split in ("validation", "test"):
            with torch.no_grad():
                loss, error = task.task_test_fn(*task.data(split), network)
            assert entry[f"{split}_loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert entry[f"{split}_error"] == pytest.approx(error.item(), abs=1e-3)
        assert 2 < entry["start_validation_loss"] < 3
    output = capsys.readouterr().out
    assert "asked for validation loss 0.2" in output
    assert f"{facts['networks'][2]['test_loss']:.4g}" in output
    assert str(folder) in output


def test_the_same_options_write_the_same_bytes_and_another_seed_others(here):
    def written(out: str, **options) -> dict[str, bytes]:
        folder = play(experiment(*TINY), PlaygroundConfig(**SHORT, out=out, **options))
        return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix != ".json"}

    first = written("first")
    assert written("second") == first
    assert all(content != first[name] for name, content in written("third", seed=1).items())
    assert written("fourth", wanted=0.0) == first  # the task's best prompt
    assert written("fifth", wanted=1.0) != first


def test_the_walk_is_a_loop_from_one_start(here, monkeypatch):
    seen = []
    monkeypatch.setattr(
        playground, "walk_gif", lambda filters, metric, path, name: seen.append((filters, metric, name))
    )
    config = PlaygroundConfig(count=2, keyframes=3, frames=4)
    folder = play(experiment(*TINY), config)
    filters, metric, name = seen[0]
    assert filters.shape == (12, 10, 8, 8)
    assert name == "validation loss"
    assert json.loads((folder / "networks.json").read_text())["walk"]["validation_loss"] == pytest.approx(metric)
    # The same networks, from the generator itself.
    trained = experiment(*TINY)
    generator, task = trained.trained(), trained.task
    start = playground.fresh_starts(task, 2, 0, None, torch.device("cpu"))
    keyframes = torch.randn(3, task.structure.size, generator=rng("cpu", 0, "playground", "walk"))
    prompt = {"target_metric": torch.tensor([[start.metric[0], task.best_prompt]]).expand(12, 2)}
    networks = generator.sample(prompt, start.weights[:1].expand(12, -1), noise=slerp_loop(keyframes, 4))
    torch.testing.assert_close(torch.tensor(filters).flatten(1), networks[:, :640])


def test_the_animation_has_every_frame(here):
    folder = play(experiment(*TINY), PlaygroundConfig(**SHORT))
    with Image.open(folder / "walk.gif") as image:
        assert image.n_frames == 4
    assert not (play(experiment(*TINY), PlaygroundConfig(count=1, keyframes=0, out="still")) / "walk.gif").exists()


@pytest.mark.parametrize("needs_start", [True, False])
def test_what_networks_are_asked_for(needs_start):
    starts = Starts("fresh", torch.randn(3, 1), torch.arange(3.0)) if needs_start else None
    wish = Wish(0.7, told={"class_mask": torch.ones(10)})
    request = wish.request(5, starts, torch.device("cpu"))
    assert request.count == 5 and torch.equal(request.prompt["class_mask"], torch.ones(5, 10))
    before, wanted = request.prompt["target_metric"].unbind(1)
    assert torch.equal(wanted, torch.full((5,), 0.7))
    if starts:
        assert torch.equal(before, torch.tensor([0.0, 1, 2, 0, 1]))
        assert torch.equal(request.start, starts.weights[[0, 1, 2, 0, 1]])
    else:
        assert request.start is None
        assert before.isnan().all()  # as in training: there is no start whose metric could be known


def test_a_generator_without_prompt_is_asked_for_nothing():
    assert Wish().request(2, None, torch.device("cpu")).prompt == {}
    unprompted = experiment("condition=none")
    assert playground.asked_metric(unprompted, PlaygroundConfig()) is None
    with pytest.raises(ConfigError, match=r"wanted=0\.2.*not prompted"):
        playground.asked_metric(unprompted, PlaygroundConfig(wanted=0.2))


def test_a_few_networks_are_the_first_of_many(here):
    """What a network looks like does not depend on how many are written, or written at once."""
    exact = (*TINY, "trainer.precision=float32")  # bfloat16 products round by the size of their batch
    many = play(experiment(*exact), PlaygroundConfig(count=3, keyframes=0, out="many"))
    few = play(experiment(*exact, "evaluation.max_batch=1"), PlaygroundConfig(count=2, keyframes=0, out="few"))
    for name in ("network-000.safetensors", "network-001.safetensors"):
        for tensor, expected in zip(load_file(few / name).values(), load_file(many / name).values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_networks_of_a_larger_count_before_are_removed_and_nothing_else(here):
    folder = play(experiment(*TINY), PlaygroundConfig(count=3, keyframes=0))
    for name in ("network-009.safetensors", "mine.safetensors"):
        (folder / name).touch()
    play(experiment(*TINY), PlaygroundConfig(count=1, keyframes=0))
    left = {"network-000.safetensors", "network-009.safetensors", "mine.safetensors", "networks.json"}
    assert {file.name for file in folder.iterdir()} == left
    for unknown in ("[]", "{"):
        (folder / "networks.json").write_text(unknown)
        play(experiment(*TINY), PlaygroundConfig(count=1, keyframes=0))


def test_a_broken_network_is_recorded_as_valid_json(here, monkeypatch):
    columns = {"validation_loss": torch.tensor([float("inf"), float("nan"), 0.5])}
    monkeypatch.setattr(playground, "test_population", lambda task, weights, split: columns)
    folder = play(experiment(*TINY), PlaygroundConfig(count=3, keyframes=0))
    networks = json.loads((folder / "networks.json").read_text(), parse_constant=pytest.fail)["networks"]
    assert [network["validation_loss"] for network in networks] == [None, None, 0.5]


def test_published_weights_are_played_with(here):
    arguments = (
        "generator=gpt_paper_mnist", "generator.width=16", "generator.layers=1", "generator.heads=2",
        "generator.steps=3", "objective=ddpm", "condition.dropout=0", "distillation.weight=0", "device=cpu",
    )  # fmt: skip
    Path("checkpoint_models").mkdir()
    torch.save({"G_ema": experiment(*arguments).generator.network.state_dict()}, "checkpoint_models/mnist_loss.pt")
    folder = play(experiment(*arguments, "resume_path=mnist_loss.pt"), PlaygroundConfig(**SHORT))
    assert folder == Path("runs/digits_loss-mnist_loss/playground")
    # The decoders of a new model are zero: what it writes is what it was given.
    for network in json.loads((folder / "networks.json").read_text())["networks"]:
        assert network["validation_loss"] == pytest.approx(network["start_validation_loss"], rel=1e-4)
    with pytest.raises(CheckpointError, match="download http.*cartpole.pt"):
        play(experiment(*arguments, "resume_path=cartpole.pt"), PlaygroundConfig())
    with pytest.raises(ConfigError, match=r"resume_path=mnist_loss\.pt.*_paper"):
        play(experiment(*TINY, "resume_path=mnist_loss.pt"), PlaygroundConfig())


def test_a_run_without_a_generator_is_told_how_to_train_one(here):
    command = r"python main\.py --config-name digits_loss run\.name=other"
    with pytest.raises(CheckpointError, match=rf"no trained generator in runs/other; .*{command}"):
        play(experiment(*TINY, "run.name=other"), PlaygroundConfig())
    assert not Path("runs/other").exists()


def test_arguments_are_told_apart():
    own = ["count=3", "wanted=1e-1", "guidance=2", "steps=null", "out=a b/c"]
    run = ["--config-name", "digits_error", "run.name=mine", "trainer=gpu", "+zoo.seed=1", "generator.steps=3"]
    config, others = split_arguments([run[0], run[1], *own, *run[2:]])
    assert others == run
    assert config == PlaygroundConfig(count=3, wanted=0.1, guidance=2.0, steps=None, out="a b/c")
    assert split_arguments([]) == (PlaygroundConfig(), [])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("conut=3", ["conut", "'count'"]),
        ("wnated=0.2", ["wnated", "'wanted'"]),
        ("trianer=gpu", ["trianer", "'trainer'"]),
        ("count=0", ["count=0", "greater than 0"]),
        ("count=few", ["count", "few", "integer"]),
        ("keyframes=-1", ["keyframes=-1"]),
        ("wanted=[1", ["'wanted=[1'", "key=value"]),
        ("count=${x", ["'count=${x'", "key=value"]),
        ("wanted=low", ["wanted", "low", "number"]),
        ("wanted=nan", ["wanted", "finite"]),
    ],
)
def test_wrong_options_are_named(argument, words):
    with pytest.raises(ConfigError) as caught:
        split_arguments([argument])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_command_itself(here):
    create_folder(experiment(*TINY).config, Path("runs/tiny"))
    call = [sys.executable, str(ROOT / "playground.py"), "run.name=tiny", "count=2", "keyframes=0", "out=written"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert (here / "written" / "network-001.safetensors").is_file()


def test_a_run_is_played_with_the_settings_it_was_trained_with(here):
    create_folder(experiment(*TINY, "seed=7").config, Path("runs/tiny"))
    plain = experiment("run.name=tiny", "data.root=elsewhere")
    found = playground.run_of(plain.config, "digits_loss", []).config
    assert (found.seed, found.generator["width"], found.data.root) == (7, 32, "elsewhere")
    assert playground.run_of(plain.config, "digits_loss", ["trainer=gpu"]).config is plain.config
    assert playground.run_of(experiment().config, "digits_loss", []).config == experiment().config  # no such run


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["playground.py", "run.name=tiny", "cuont=2"])
    with pytest.raises(SystemExit, match="2"):
        playground.main()
    assert capsys.readouterr().err == "error: configuration: there is no key 'cuont'; did you mean 'count'?\n"
    monkeypatch.setattr(sys, "argv", ["playground.py", "--help"])
    playground.main()
    assert "wanted: metric to ask for" in capsys.readouterr().out


MASKED = (
    "generator.width=32", "generator.depth=1", "generator.heads=2", "generator.rank=4", "device=cpu", "run.name=masked",
)  # fmt: skip
EVEN = "1010101010"


def masked_experiment(*arguments: str) -> Experiment:
    return experiment(*MASKED, *arguments, name="digits_mask_rpg")


def store_rpg(trained: Experiment, prompt: Prompt) -> None:
    """The same of a generator that writes from noise, which learned from networks that were described by `prompt`."""
    networks = torch.randn(8, trained.task.structure.size, generator=rng("cpu", 0, "zoo"))
    trained.generator.fit(Batch(networks, prompt=prompt))
    store_generator(trained)


@pytest.fixture
def masked(tmp_path, monkeypatch) -> Path:
    """The current folder, with a run of the smallest generator of networks for class masks."""
    monkeypatch.chdir(tmp_path)
    store_rpg(masked_experiment(), {})
    return tmp_path


def test_a_mask_is_written_for_and_measured_on_its_classes(masked, capsys):
    folder = play(masked_experiment(), PlaygroundConfig(**SHORT, mask=EVEN))
    facts, task = json.loads((folder / "networks.json").read_text()), masked_experiment().task
    assert facts["options"]["mask"] == EVEN
    mask = torch.arange(10) % 2 == 0
    for entry in facts["networks"]:
        network = task.constructor()
        network.load_state_dict(load_file(folder / entry["file"]), strict=True)
        for split in ("validation", "test"):
            with torch.no_grad():
                error, loss = task.task_test_fn(*task.data(split)[:2], mask, network)
            assert entry[f"{split}_loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert entry[f"{split}_error"] == pytest.approx(error.item(), abs=1e-3)
    assert "zero, two, four, six, eight (mask 1010101010, " in capsys.readouterr().out
    assert (folder / "walk.gif").is_file()
    other = play(masked_experiment(), PlaygroundConfig(**SHORT, mask="0101010101", out="other"))
    name = "network-000.safetensors"
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_the_role_of_a_mask():
    family = masked_experiment().task.family
    roles = {playground.mask_role(family, mask) for mask in family.test_masks}
    assert roles == {"held out for testing"}
    assert playground.mask_role(family, family.validation_masks[0]) == "held out for validation"
    assert playground.mask_role(family, family.train_masks[0]) == "seen in training"
    assert playground.mask_role(family, ~family.test_masks[0]) == "not seen in training"


class Keywords(text.SentenceEncoder):
    """Stands in for the sentence encoder: one number for each class that a text names, and 374 zeros."""

    identity, label, features = "keywords", "keywords-0123", 384

    def __init__(self, model="", device="cpu"):
        pass

    def keep(self, file):
        self.cache_file = file

    def __call__(self, sentences):
        named = torch.tensor([[float(name in text) for name in CLASSES["digits"]] for text in sentences])
        return torch.nn.functional.pad(named, (0, 374))


def keyword_reader(embed, vocabulary):
    """Reads the classes off the embedding itself: a network of identities."""
    head = TextHead(CLASSES[vocabulary], features=384, hidden=10, members=1).eval()
    with torch.no_grad():
        for layer in (head.members[0][0], head.members[0][3]):
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            layer.bias.zero_()
        head.members[0][6].weight.copy_(10 * torch.cat([torch.eye(10), torch.ones(1, 10)]))
        head.members[0][6].bias.fill_(-5)
    return SentenceReader(embed, head, load_vocabulary(vocabulary))


def test_a_sentence_is_read_once_trained_and_written_for(masked, monkeypatch, capsys):
    monkeypatch.setattr("Gpt.run.experiment.SentenceEncoder", Keywords)
    monkeypatch.setattr(reading, "train_reader", keyword_reader)
    config = PlaygroundConfig(**SHORT, prompt="find one, two and nine")
    folder = play(masked_experiment(), config)
    output = capsys.readouterr().out
    assert "learning to read sentences about digits" in output
    assert "“find one, two and nine” was read as: zero 0.0" in output
    assert "networks that pick out one, two, nine (mask 0110000001" in output
    written = (folder / "network-000.safetensors").read_bytes()
    monkeypatch.setattr(reading, "train_reader", lambda *_: pytest.fail("the reader was kept"))
    assert (play(masked_experiment(), config) / "network-000.safetensors").read_bytes() == written
    by_mask = play(masked_experiment(), PlaygroundConfig(**SHORT, mask="0110000001", out="by_mask"))
    assert (by_mask / "network-000.safetensors").read_bytes() == written
    with pytest.raises(ConfigError, match="'wooden furniture' fits none of the classes zero, one"):
        play(masked_experiment(), PlaygroundConfig(prompt="wooden furniture"))


@pytest.mark.parametrize("names", ["text", "class_mask,text"])
def test_a_generator_that_knows_sentences_is_handed_the_sentence(masked, monkeypatch, names):
    monkeypatch.setattr("Gpt.run.experiment.SentenceEncoder", Keywords)
    monkeypatch.setattr(reading, "train_reader", keyword_reader)
    monkeypatch.setattr("Gpt.run.experiment.find_model", lambda model: None)
    settings = (f"condition.names=[{names}]", "run.name=spoken")
    store_rpg(masked_experiment(*settings), {})
    request = playground.asked(masked_experiment(*settings), PlaygroundConfig(prompt="zero and three"))
    assert set(request.told) == set(names.split(","))
    assert torch.equal(request.told["text"], Keywords()(["zero and three"])[0])
    assert playground.bits(request.mask) == "1001000000"
    one = play(masked_experiment(*settings), PlaygroundConfig(**SHORT, prompt="zero and three", out="one"))
    same = play(masked_experiment(*settings), PlaygroundConfig(**SHORT, prompt="three, zero", out="same"))
    other = play(masked_experiment(*settings), PlaygroundConfig(**SHORT, prompt="zero and two", out="other"))
    for name in ("network-000.safetensors", "walk.gif"):
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()
    by_mask = PlaygroundConfig(**SHORT, mask="1001000000", out="by_mask")
    if names == "text":
        with pytest.raises(ConfigError, match='by prompt="all even digits"$'):
            play(masked_experiment(*settings), by_mask)
    else:
        assert (play(masked_experiment(*settings), by_mask) / "networks.json").is_file()


def untrained_reader(embed, vocabulary):
    """Reads by chance."""
    head = TextHead(CLASSES[vocabulary], features=embed.features, hidden=4).eval()
    return SentenceReader(embed, head, load_vocabulary(vocabulary))


@pytest.mark.filterwarnings("default")  # warnings of transformers are not this project's
def test_a_sentence_is_embedded_by_the_encoder_that_the_run_was_trained_with(
    tmp_path, monkeypatch, capsys, encoder_folder
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "train_reader", untrained_reader)
    encoder_folder("small", 24)
    encoder_folder("other", 24)
    spoken = experiment(*MASKED, "condition.encoder=small", name="digits_text_rpg")
    create_folder(spoken.config, spoken.folder)
    store_rpg(spoken, {"class_mask": torch.ones(8, 10), "text": torch.randn(8, 24)})
    plain = experiment("run.name=masked", name="digits_text_rpg")
    found = playground.run_of(plain.config, "digits_text_rpg", [])
    asked_for = playground.asked(found, PlaygroundConfig(prompt="not 7")).told["text"]
    assert torch.equal(asked_for, text.SentenceEncoder("small")(["not 7"])[0])
    play(found, PlaygroundConfig(count=1, keyframes=0, mask=EVEN))
    other = experiment(*MASKED, "condition.encoder=other", name="digits_text_rpg")
    with pytest.raises(CheckpointError, match="has condition.encoder 'small-.*', this run has 'other-"):
        play(other, PlaygroundConfig(mask=EVEN))


@pytest.mark.filterwarnings("default")
def test_encoders_that_take_turns_in_one_run_keep_what_they_have_each(masked, monkeypatch, encoder_folder):
    trained = []

    def train(embed, vocabulary):
        trained.append(embed.label)
        return untrained_reader(embed, vocabulary)

    monkeypatch.setattr(reading, "train_reader", train)
    encoders = [encoder_folder(*shape) for shape in (("small", 24), ("wide", 32), ("small", 24))]
    for folder in encoders * 2:
        found = masked_experiment(f"condition.encoder={folder}")
        asked_for = reading.kept_reader("digits", found.encoder)
        assert asked_for.embed(["sevens"]).shape == (1, asked_for.head.features)
    assert [label.partition("-")[0] for label in trained] == ["small", "wide"]
    kept = {str(file.relative_to("runs/masked/text")) for file in Path("runs/masked/text").rglob("*.safetensors")}
    assert kept == {f"{label}/{name}.safetensors" for label in trained for name in ("digits", "embeddings")}


def test_starts_of_a_family_are_measured_on_the_mask(masked):
    settings = ("generator=gpt", "condition=class_mask_and_metric", "run.name=updating")
    described = {"class_mask": torch.ones(8, 10), "target_metric": torch.rand(8, 2)}
    trained = experiment(*TINY[:4], *settings, name="digits_mask_rpg")
    trained.generator.fit(Batch(torch.randn(8, trained.task.structure.size), prompt=described))
    store_generator(trained)
    folder = play(trained, PlaygroundConfig(count=3, keyframes=0, mask=EVEN, wanted=5.0))
    task, mask = trained.task, torch.arange(10) % 2 == 0
    for i, entry in enumerate(json.loads((folder / "networks.json").read_text())["networks"]):
        start = playground.fresh_starts(task, 3, 0, mask, torch.device("cpu")).weights[i]
        network = task.constructor()
        network.load_state_dict(task.structure.state_dict(start))
        with torch.no_grad():
            error, _ = task.task_test_fn(*task.data("validation")[:2], mask, network)
        assert entry["start_validation_error"] == pytest.approx(error.item(), abs=1e-3)


def test_whole_networks_are_written_without_any_prompt_and_one_run_is_walked_through(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = experiment(*MASKED, "generator.identities=3", name="digits_rpg")
    store_rpg(whole, {"identity": torch.zeros(8, dtype=torch.long)})
    asked_for = []
    sample = type(whole.generator).sample

    def recorded(self, prompt, *arguments, **options):
        asked_for.append(prompt)
        return sample(self, prompt, *arguments, **options)

    monkeypatch.setattr(type(whole.generator), "sample", recorded)
    folder = play(whole, PlaygroundConfig(**SHORT))
    assert "unprompted" in capsys.readouterr().out
    networks = json.loads((folder / "networks.json").read_text())["networks"]
    assert set(networks[0]) == {"file", "validation_loss", "validation_error", "test_loss", "test_error"}
    written, *walked = asked_for
    assert written.keys() == {"identity"}  # each network draws one
    assert all(torch.equal(prompt["identity"], torch.zeros(2, dtype=torch.long)) for prompt in walked)


def test_a_generator_from_noise_that_is_told_a_metric_starts_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompted = experiment(*MASKED, name="digits_loss_rpg")
    store_rpg(prompted, {"target_metric": torch.stack([torch.full((8,), torch.nan), torch.linspace(0.1, 2, 8)], 1)})
    low = play(prompted, PlaygroundConfig(**SHORT, wanted=0.2, out="low"))
    high = play(prompted, PlaygroundConfig(**SHORT, wanted=1.5, out="high"))
    assert "start_validation_loss" not in json.loads((low / "networks.json").read_text())["networks"][0]
    name = "network-000.safetensors"
    assert (low / name).read_bytes() != (high / name).read_bytes()


LORA = (
    "generator.width=16", "generator.depth=1", "generator.heads=2", "generator.latents=2", "device=cpu",
    "zoo.recipe={iterations: 7}",
)  # fmt: skip


@pytest.fixture
def adapters(tmp_path, monkeypatch) -> Path:
    """The current folder, with a run whose generator writes adapters."""
    monkeypatch.chdir(tmp_path)
    trained = experiment(*LORA, name="lora_tiny")
    store_generator(trained)
    create_folder(trained.config, trained.folder)
    return tmp_path


def test_an_adapter_is_written_for_a_prompt_a_file_and_a_batch(adapters, capsys):
    pytest.importorskip("peft")
    prompts = ["Give the first word.", "No brackets."]
    (adapters / "prompts.txt").write_text("\n\n".join(prompts))
    lines = [{"task": "a b", "prompts": prompts}, {"task": "c", "prompts": ["Last."]}]
    (adapters / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trained = playground.run_of(experiment("device=cpu", name="lora_tiny").config, "lora_tiny", [])
    assert trained.task.recipe.iterations == 7  # as it was trained

    def files(**options) -> dict[str, bytes]:
        folder = play(trained, PlaygroundConfig(**options))
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}

    name = "adapter_model.safetensors"
    one, file = files(prompt=prompts[0]), files(prompts="prompts.txt", out="file")
    batch = files(prompts="tasks.jsonl", out="batch")
    assert one.keys() == file.keys() == {name} and batch.keys() == {f"a b/{name}", f"c/{name}"}
    assert file[name] == batch[f"a b/{name}"] and len({one[name], *batch.values()}) == 3
    assert "batch/c: an adapter, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["prompt=", "prompts=FILE"]),
        ({"prompt": "a", "prompts": "b"}, ["prompt=", "prompts=FILE"]),
        ({"prompt": "a", "count": 3}, ["count", "one for each task"]),
        ({"prompt": "a", "wanted": 3.0}, ["wanted", "prompts alone"]),
        ({"prompt": "a", "guidance": 2.0}, ["guidance=2.0"]),
    ],
)
def test_wishes_that_no_adapter_fulfils_are_refused(adapters, options, words):
    with pytest.raises(ConfigError) as caught:
        play(experiment(*LORA, name="lora_tiny"), PlaygroundConfig(**options, out="out"))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not Path("out").exists()


def test_without_the_optional_packages_only_sentences_are_refused(masked, monkeypatch):
    monkeypatch.setattr(text, "BUNDLED", "no_such_package")
    with pytest.raises(ConfigError, match=r"not installed; .*gpt-weights\[text\]"):
        play(masked_experiment(), PlaygroundConfig(prompt="all even digits"))
    assert play(masked_experiment(), PlaygroundConfig(mask=EVEN, count=1, keyframes=0)).is_dir()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["prompt=", "mask="]),
        ({"mask": EVEN, "prompt": "all even digits"}, ["by prompt=", "or by mask="]),
        ({"mask": "101"}, ["mask=101", "10 bits", "1010101010"]),
        ({"mask": "1010101012"}, ["mask=1010101012", "10 bits"]),
        ({"mask": "1111111111"}, ["all classes"]),
        ({"mask": EVEN, "wanted": 3.0}, ["wanted=3", "not prompted with a metric"]),
        ({"prompts": "file.txt"}, ["prompts", "prompt=…"]),
    ],
)
def test_wishes_that_make_no_task_are_refused(masked, options, words):
    with pytest.raises(ConfigError) as caught:
        play(masked_experiment(), PlaygroundConfig(**options))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_single_task_takes_no_mask(here):
    with pytest.raises(ConfigError, match="'digits_loss' is a single task.*digits_mask_rpg"):
        play(experiment(*TINY), PlaygroundConfig(mask=EVEN))


def test_bits_and_sentences_are_taken_as_they_are():
    config, others = split_arguments(["mask=0101010101", "prompt=things that fly: yes, all = 1"])
    assert (config.mask, config.prompt, others) == ("0101010101", "things that fly: yes, all = 1", [])
