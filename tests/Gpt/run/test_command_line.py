"""What is refused on the command line, and in which words; what is let through, and how."""

import errno

import pytest

from Gpt.errors import ConfigError, UserError
from Gpt.run.command_line import CONFIGS, check_arguments, compose, guard, help_text, launch


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.stepz=5", ["trainer.stepz", "'steps'"]),
        ("trianer.steps=5", ["trianer", "'trainer'"]),
        ("generator.widht=5", ["generator.widht", "'width'"]),
        ("trainer=gpus", ["trainer=gpus", "'gpu'"]),
        ("generator=unheard_of", ["generator=unheard_of", "known:", "gpt_large"]),
        ("--config-name=mnist_los", ["mnist_los", "'mnist_loss'"]),
        ("-cn=nonsense", ["nonsense", "known:", "digits_loss"]),
        ("+zoo.rums=3", ["zoo.rums", "'runs'"]),
        ("=3", ["no key ''"]),
        ("a=[", ["'a=['", "key=value", "quotes"]),
        ("zoo.recipe={epochs: 2", ["'zoo.recipe={epochs: 2'", "'key={a: 1}'"]),
        ("zoo.runs=${", ["'zoo.runs=${'", "key=value"]),
        ("digits_rpg", ["'digits_rpg'", "--config-name digits_rpg"]),
        ("digits_rgp", ["'digits_rgp'", "key=value"]),
        ("--config=mnist_loss", ["no option --config=mnist_loss;", "--config-name NAME"]),
        ("--device", ["no option --device;", "key=value"]),
        ("zoo.runs=1,2", ["zoo.runs=1,2", "one value", "'key=[1, 2]'"]),
        ("trainer=gpu,small", ["trainer=gpu,small", "one value"]),
        ("--multirun", ["--multirun", "run.name=seed-$s"]),
        ("-m", ["--multirun", "run.name=seed-$s"]),
        ("trainer=[gpu, small]", ["trainer=[gpu, small]", "known: gpu, small"]),
        ("trainer=", ["trainer=", "known: gpu, small"]),
    ],
)
def test_misspellings_are_answered_with_the_nearest_word(argument, words):
    with pytest.raises(ConfigError) as caught:
        check_arguments(["seed=1", argument])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.steps=many", ["trainer.steps", "many", "integer"]),
        ("trainer.steps=0", ["trainer.steps", "greater than 0"]),
        ("condition.encoder=7", ["condition.encoder=7", "string"]),
        ("trainer.schedule=lineer", ["trainer.schedule", "'linear'", "'cosine'"]),
        ("trainer.precision=float16", ["trainer.precision", "'bfloat16'"]),
        ("trainer.learning_rate=-1", ["trainer.learning_rate=-1", "greater than or equal to 0"]),
        ("trainer.learning_rate=nan", ["trainer.learning_rate=nan"]),
        ("trainer.muon_learning_rate=inf", ["trainer.muon_learning_rate=inf", "finite"]),
        ("trainer.betas=[2, 2]", ["trainer.betas.0=2", "less than 1"]),
        ("trainer.weight_decay=-0.1", ["trainer.weight_decay=-0.1", "greater than or equal to 0"]),
        ("trainer.ema_decay=1.5", ["trainer.ema_decay=1.5", "less than or equal to 1"]),
        ("trainer.warmup=-1", ["trainer.warmup=-1", "greater than or equal to 0"]),
        ("evaluation.soup=0", ["evaluation.soup=0", "greater than 0"]),
        ("evaluation.max_batch=0", ["evaluation.max_batch=0", "greater than 0"]),
        ("evaluation.steps=0", ["evaluation.steps=0", "greater than 0"]),
        ("evaluation.guidance=nan", ["evaluation.guidance=nan", "finite"]),
        ("evaluation.recursive_steps=-1", ["evaluation.recursive_steps=-1", "greater than or equal to 0"]),
        ("evaluation.noise_scales=[0.1, -1]", ["evaluation.noise_scales.1=-1", "greater than or equal to 0"]),
        ("evaluation.novelty_behaviours=1", ["evaluation.novelty_behaviours=1", "greater than or equal to 2"]),
        ("logger.mode=sometimes", ["logger.mode", "offline"]),
        ("task_modules=my_tasks.py", ["task_modules", "my_tasks.py"]),
        ("zoo.runs=", ["zoo.runs", "integer"]),
        ("zoo.runs=${zoo.rums}", ["zoo.runs", "'zoo.rums' not found", "${"]),
        ("zoo.path=${oc.env:NO_SUCH_VARIABLE}", ["zoo.path", "NO_SUCH_VARIABLE", "${"]),
        ("task=${task}", ["task", "Recursive"]),
    ],
)
def test_wrong_values_are_named(argument, words):
    with pytest.raises(ConfigError) as caught:
        compose("digits_loss", [argument])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("evaluation.steps=null", None), ("evaluation.recursive_steps=0", 0), ("evaluation.optimiser_steps=0", 0),
        ("evaluation.noise_scales=[]", ()), ("trainer.max_grad_norm=null", None),
        ("trainer.muon_learning_rate=null", None), ("trainer.warmup=0", 0), ("trainer.ema_decay=0", 0),
        ("trainer.validate_every=0", 0), ("trainer.betas=[0, 0.999]", (0, 0.999)),
    ],
)  # fmt: skip
def test_nothing_is_a_value_where_it_means_something(argument, value):
    section, key = argument.split("=")[0].split(".")
    assert getattr(getattr(compose("digits_loss", [argument]), section), key) == value


def test_options_may_follow_settings():
    assert check_arguments(["seed=1", "--config-name", "digits_rpg"]) == [
        "--config-name",
        "digits_rpg",
        "++seed=1",
    ]


@pytest.mark.parametrize(
    "argument", ["evaluation.guidance=2.0", "evaluation.soup=7", "logger.project=mine", "+zoo.runs=3"]
)
def test_keys_can_be_set_whether_or_not_a_file_mentions_them(argument):
    config = compose("digits_loss", [argument])
    section, key = argument.lstrip("+").split("=")[0].split(".")
    assert str(getattr(getattr(config, section), key)) == argument.split("=")[1]


def test_help_names_every_configuration_and_option():
    text = help_text("")
    for file in (f for f in CONFIGS.rglob("*.yaml") if f.stem != "base"):
        assert file.stem in text
        assert file.read_text().startswith("# "), f"{file} lacks the comment that --help shows"


def test_an_interrupted_run_is_only_said_to_continue_where_it_does(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    def told(*settings: str) -> str:
        monkeypatch.setattr("sys.argv", ["main.py"])
        with pytest.raises(SystemExit, match="130"):
            launch(interrupt, ["hydra.run.dir=.", "hydra.output_subdir=null", *settings])
        return capsys.readouterr().err

    assert "same command continues" in told() and "same command continues" in told("resume=never", "test_only=true")
    assert "begins another run beside this one; to continue this one, set run.name" in told("resume=never")
    assert "same command continues" in told("resume=never", "collect_only=true")
    assert "same command starts over" in told("dry_run=true")
    for settings in ((), ("resume=never",)):
        assert "trains the zoo again" in (said := told("zoo.store=false", *settings)) and "shards" not in said


def test_users_see_messages_and_programmers_tracebacks(capsys):
    def fails(error: BaseException):
        raise error

    with pytest.raises(SystemExit) as caught:
        guard(lambda: fails(UserError("the thing, the place, the remedy")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the thing, the place, the remedy\n"
    with pytest.raises(SystemExit) as caught:
        guard(lambda: fails(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert "same command continues" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        guard(lambda: fails(OSError(errno.EROFS, "Read-only file system", "runs/mine")))
    assert caught.value.code == 2
    assert "error: runs/mine: Read-only file system; " in capsys.readouterr().err
    for bug in (OSError(errno.ENOENT, "No such file or directory", "runs/mine"), ZeroDivisionError()):
        with pytest.raises(type(bug)):
            guard(lambda bug=bug: fails(bug))
