"""Every generator by its name in `configs/generator`, and how a run's configuration becomes one."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from Gpt.conditions import PROMPT_FEATURES, Conditions, prompt_features
from Gpt.config import ObjectiveConfig, RunConfig, checked
from Gpt.diffusion.objectives import DDPM, FlowMatching, Objective
from Gpt.diffusion.regression import Regression
from Gpt.errors import ConfigError, nearest
from Gpt.generator import Generator
from Gpt.models.gpt import Gpt, GptConfig
from Gpt.models.paper_generator import PaperConfig, PaperGpt
from Gpt.seeds import derive_seed, own_random_state
from Gpt.structure import Structure
from rpg import adapters
from rpg.generator import Rpg, RpgConfig
from rpg.paper import RpgPaper, RpgPaperConfig
from rpg.pdiff import Pdiff, PdiffConfig

GENERATORS: dict[str, tuple[type, Callable[..., Generator]]] = {
    "gpt": (GptConfig, Gpt),
    "gpt_paper": (PaperConfig, PaperGpt),
    "rpg": (RpgConfig, Rpg),
    "rpg_paper": (RpgPaperConfig, RpgPaper),
    "pdiff": (PdiffConfig, Pdiff),
    **adapters.GENERATORS,
}


def build_generator(config: RunConfig, structure: Structure, text: int = PROMPT_FEATURES["text"]) -> Generator:
    """The untrained generator of a run, on the CPU; its parameters are a function of the run's seed.

    Args:
        text: length of the sentence embeddings that it is prompted with, if it is.

    Raises:
        ConfigError: there is no such generator, objective or condition, or they do not fit together.
    """
    settings = dict(config.generator)
    name = settings.pop("name", None)
    if name not in GENERATORS:
        raise ConfigError(f"generator.name={name} is unknown; {nearest(str(name), GENERATORS)}")
    config_class, build = GENERATORS[name]
    _check_settings(name, settings)
    own: Any = checked(config_class, settings, "generator.")
    features = prompt_features(config.condition.names, text)
    with own_random_state(derive_seed(config.seed, "generator")):
        conditions = Conditions(features, getattr(own, "width", 1), config.condition.dropout)
        return build(structure, conditions, build_objective(config.objective), own)


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse those of another generator, which a configuration that sets them passes on to any generator=OPTION."""
    own = {field.name for field in fields(GENERATORS[name][0])}
    for key in (key for key in settings if key not in own):
        if owners := [owner for owner, (config, _) in GENERATORS.items() if key in {f.name for f in fields(config)}]:
            raise ConfigError(
                f"generator.{key} is a setting of {', '.join(owners)}, not of {name}; leave it out, with "
                f"'~generator.{key}' where the configuration sets it"
            )


def build_objective(settings: ObjectiveConfig) -> Objective:
    """The objective of a run.

    Raises:
        ConfigError: there is none of that name, or it has no such setting.
    """
    if settings.name == "flow":
        return FlowMatching(settings.prediction, settings.loss_space, settings.times, settings.shift)
    if settings.name == "ddpm":
        return DDPM(settings.prediction)
    if settings.name == "regression":
        return Regression()
    hint = nearest(settings.name, ("flow", "ddpm", "regression"))
    raise ConfigError(f"objective.name={settings.name} is unknown; {hint}")
