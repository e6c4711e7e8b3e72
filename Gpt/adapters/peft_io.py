"""Adapters in the files of PEFT, and a check that a library of them shares a gauge."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from Gpt.adapters.base import INSTALL, BaseModel
from Gpt.adapters.spec import PREFIX, AdapterSpec, adapter_structure, draw_a, target_shapes
from Gpt.errors import ConfigError, DataError, StructureError
from Gpt.files import save_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What a configuration may say without it changing what these tensors do to these layers, or what is read off it.
UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "lora_dropout", "init_lora_weights", "eva_config",
}  # fmt: skip
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others (pissa, olora, loftq, …) change the base model
# Below this cosine between two adapters' As, their Bs cannot be compared. One initialisation trained on different tasks
# stays above 0.98 (SmolLM2-135M, 80 steps); independent ones are at 0.
SHARED_COSINE = 0.8

Tensors = dict[str, Tensor]


def save_adapter(
    folder: str | Path, weights: Float[Tensor, " D"], spec: AdapterSpec, base: BaseModel | str, *, base_name: str = ""
) -> Path:
    """Write an adapter folder that `peft.PeftModel.from_pretrained(model, folder)` loads; the frozen A goes with it.

    Args:
        base_name: what the folder says that its base model is called; by default the name of `base`.

    Raises:
        ConfigError: the package peft is missing.
    """
    config = _lora_config(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name or (base if isinstance(base, str) else base.name),
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=sorted(spec.targets),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu() for name, value in adapter_structure(base, spec).state_dict(weights).items()}
    if not spec.train_a:
        tensors |= _frozen(base, spec)
    save_tensors({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


def load_adapter(folder: str | Path, spec: AdapterSpec, base: BaseModel | str) -> Float[Tensor, " D"]:
    """The flat row of an adapter folder.

    Raises:
        ConfigError: the package peft is missing.
        DataError: the folder is no adapter, or one of a form that is not supported, or a file is damaged.
        StructureError: rank, scale, kind or tensors are not those of the spec, or the spec freezes an A that is not the
            folder's.
    """
    tensors, config = read_adapter(folder)
    _check_supported(Path(folder), config)
    _check_form(Path(folder), config, spec)
    if not spec.train_a:
        for name, expected in _frozen(base, spec).items():
            found = tensors.pop(name, None)
            if found is None or found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-6):
                raise StructureError(
                    f"{folder}: {name} is not the shared A of seed {spec.a_seed}, so that B alone does not say what "
                    "the adapter does; import it with train_a=True"
                )
    try:
        return adapter_structure(base, spec).flatten(tensors)
    except StructureError as error:
        raise StructureError(f"{folder}: {error}") from error


def read_adapter(folder: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and configuration of an adapter folder, whatever its form.

    Raises:
        DataError: the folder is no adapter, or a file is damaged.
    """
    folder = Path(folder)
    try:
        return load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(
            f"{folder} is not a readable adapter folder ({error}); it should hold {WEIGHTS} and {CONFIG}"
        ) from error


def spec_of(folder: str | Path) -> AdapterSpec:
    """The form of an adapter folder, with its A as part of the adapter.

    Raises:
        ConfigError: the package peft is missing.
        DataError: the folder is no adapter, or one of a form that is not supported.
    """
    _, config = read_adapter(folder)
    _check_supported(Path(folder), config)
    named = tuple(sorted({target.rpartition(".")[2] for target in config["target_modules"]}))
    kind = {"rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora"))}
    return AdapterSpec(config["r"], config["lora_alpha"], named, **kind, train_a=True)


def adapter_folders(folder: str | Path) -> list[Path]:
    """All adapter folders below a folder, in the order of their names.

    Raises:
        DataError: there are none.
    """
    found = sorted(file.parent for file in Path(folder).rglob(WEIGHTS))
    if not found:
        raise DataError(f"{folder} holds no adapter folder, that is none with {WEIGHTS}")
    return found


# --- gauge ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaugeReport:
    """Mean cosine, over all pairs of adapters, of A, of B and of their products; and the least cosine of A.

    B is comparable between adapters only where A is the same: (B M, M^-1 A) is one adapter for every invertible M.
    """

    adapters: int
    cosine_a: float
    cosine_b: float
    cosine_change: float
    least_cosine_a: float

    @property
    def warning(self) -> str | None:
        """What is wrong with regressing these adapters' weights, or None."""
        if self.least_cosine_a >= SHARED_COSINE:
            return None
        return (
            f"these {self.adapters} adapters do not share a gauge: two of their A matrices have cosine "
            f"{self.least_cosine_a:.2f} (above {SHARED_COSINE} would be safe), so that weights of different adapters "
            "cannot be averaged or regressed; train them from one frozen A, or compare their products B A instead"
        )


def gauge_report(adapters: Sequence[Mapping[str, Tensor]]) -> GaugeReport:
    """Compare the factors of adapters, each given by its tensors under PEFT's names with A among them.

    Raises:
        DataError: there are fewer than two adapters, or they have different layers.
    """
    if len(adapters) < 2 or any(set(other) != set(adapters[0]) for other in adapters):
        raise DataError("a gauge is shared by two or more adapters of the same layers")
    grams = torch.zeros(3, len(adapters), len(adapters))  # of all As, of all Bs, of all their products
    for name in adapters[0]:
        if not name.endswith("lora_A.weight"):
            continue
        a = torch.stack([adapter[name].float() for adapter in adapters])
        b = torch.stack([adapter[name.replace("lora_A", "lora_B")].float() for adapter in adapters])
        inner_a = torch.einsum("pri,qsi->pqrs", a, a)
        inner_b = torch.einsum("por,qos->pqrs", b, b)
        grams[0] += inner_a.diagonal(dim1=-2, dim2=-1).sum(-1)
        grams[1] += inner_b.diagonal(dim1=-2, dim2=-1).sum(-1)
        grams[2] += (inner_a * inner_b).sum((-2, -1))  # <B A, B' A'> without either product
    pairs = torch.ones(len(adapters), len(adapters)).triu(1).bool()
    a, b, change = (cosines(gram)[pairs] for gram in grams)
    return GaugeReport(len(adapters), float(a.mean()), float(b.mean()), float(change.mean()), float(a.min()))


def cosines(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Cosines of vectors with these inner products; 0 with a vector that is 0."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return gram / (norms[:, None] * norms).clamp(min=torch.finfo(gram.dtype).tiny)


def _frozen(base: BaseModel | str, spec: AdapterSpec) -> Tensors:
    shapes = target_shapes(base, spec.targets)
    return {f"{PREFIX}{name}.lora_A.weight": draw_a(name, inputs, spec) for name, (_, inputs) in shapes.items()}


def _lora_config(**settings: Any) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"adapters are read and written with the package peft, which does not import ({error}); {INSTALL}"
        ) from error
    return LoraConfig(**settings)


def _check_supported(folder: Path, config: dict[str, Any]) -> None:
    """Whether the adapter is a plain low-rank change: of all else that PEFT's LoRA can be, nothing is switched on."""
    if config.get("peft_type") != "LORA" or not isinstance(config.get("target_modules"), list):
        raise DataError(f"{folder}: only LoRA, rsLoRA and DoRA adapters with a list of target_modules are read")
    usual = _lora_config().to_dict()
    others = [key for key in config.keys() - UNDERSTOOD if config[key] and config[key] != usual.get(key)]
    others += [] if config.get("init_lora_weights", True) in PLAIN_INITS else ["init_lora_weights"]
    if others:
        raise DataError(
            f"{folder}: only LoRA, rsLoRA and DoRA adapters of one rank and one alpha are read, without "
            + ", ".join(f"{key}={config[key]!r}" for key in sorted(others))
        )


def _check_form(folder: Path, config: dict[str, Any], spec: AdapterSpec) -> None:
    form = {"r": spec.rank, "lora_alpha": spec.alpha, "use_rslora": spec.rslora, "use_dora": spec.dora}
    for key, wanted in form.items():
        if config.get(key, False) != wanted:
            raise StructureError(f"{folder}: {key} is {config.get(key)}, the adapters of the task have {wanted}")
