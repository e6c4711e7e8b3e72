"""Adapter folders: what PEFT loads from them computes what we compute; a library's gauge is measured."""

import copy
import json
import re

import pytest
import torch

from Gpt.adapters.base import load_base
from Gpt.adapters.forward import adapted_logits
from Gpt.adapters.peft_io import (
    CONFIG,
    WEIGHTS,
    adapter_folders,
    gauge_report,
    load_adapter,
    read_adapter,
    save_adapter,
    spec_of,
)
from Gpt.adapters.spec import AdapterSpec, draw_a
from Gpt.errors import DataError, StructureError
from Gpt.seeds import rng

peft = pytest.importorskip("peft")
from peft.utils.hotswap import hotswap_adapter  # noqa: E402

SPECS = {
    "B": AdapterSpec(rank=4, alpha=8),
    "A and B": AdapterSpec(rank=4, alpha=2, train_a=True),
    "rsLoRA": AdapterSpec(rank=4, alpha=2, rslora=True),
    "rsDoRA": AdapterSpec(rank=2, targets=("q_proj", "gate_proj"), rslora=True, dora=True),
}
TOKENS = torch.randint(1, 900, (2, 9), generator=rng("cpu", 0, "tokens"))


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.no_grad()
def test_peft_loads_merges_disables_and_swaps_what_we_write(base, drawn, tmp_path, spec):
    weights = drawn(spec, 2).float()
    ours = [adapted_logits(base, spec, row[None], TOKENS[None])[0] for row in weights]
    assert (ours[0] - ours[1]).abs().max() > 0.1
    folders = [save_adapter(tmp_path / str(i), row, spec, base) for i, row in enumerate(weights)]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), folders[0]).eval()
    torch.testing.assert_close(model(TOKENS).logits, ours[0], rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(TOKENS).logits, base.model(TOKENS).logits)
    if not spec.dora:  # PEFT does not swap magnitudes
        hotswap_adapter(model, str(folders[1]), "default")
        torch.testing.assert_close(model(TOKENS).logits, ours[1], rtol=0, atol=1e-4)
        hotswap_adapter(model, str(folders[0]), "default")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, ours[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_generation_with_a_loaded_adapter_is_ours(base, drawn, tmp_path):
    spec = SPECS["B"]
    weights = drawn(spec, 1).float()
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), save_adapter(tmp_path, weights[0], spec, base))
    options = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    written = model.eval().generate(input_ids=TOKENS, **options)
    ours = TOKENS
    for _ in range(4):
        step = adapted_logits(base, spec, weights, ours[None])[0, :, -1].argmax(-1, keepdim=True)
        ours = torch.cat([ours, step], 1)
    assert torch.equal(written, ours)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rows_come_back_bit_for_bit(base, drawn, tmp_path, spec):
    row = drawn(spec, 1)[0].float()
    folder = save_adapter(tmp_path / "a", row, spec, "tiny", base_name="some/base")
    assert torch.equal(load_adapter(folder, spec, base), row)
    tensors, config = read_adapter(folder)
    assert config["base_model_name_or_path"] == "some/base" and config["r"] == spec.rank
    assert any("lora_A" in name for name in tensors), "a folder is complete without our seeds"
    found = spec_of(folder)
    assert (found.rank, found.alpha, set(found.targets), found.rslora, found.dora) == (
        spec.rank, spec.alpha, set(spec.targets), spec.rslora, spec.dora)  # fmt: skip
    assert adapter_folders(tmp_path) == [folder]


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@torch.no_grad()
def test_what_peft_itself_makes_is_read_rightly(base, tmp_path, kind):
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", init_lora_weights=False, **kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    model.save_pretrained(str(tmp_path))
    spec = spec_of(tmp_path)
    weights = load_adapter(tmp_path, spec, base)[None]
    logits = model(TOKENS).logits
    assert (logits - base.model(TOKENS).logits).abs().max() > 0.1
    torch.testing.assert_close(adapted_logits(base, spec, weights, TOKENS[None])[0], logits, rtol=0, atol=1e-3)


def test_other_forms_and_damage_are_named(drawn, tmp_path):
    spec = SPECS["B"]
    folder = save_adapter(tmp_path / "a", drawn(spec, 1)[0].float(), spec, "tiny")
    with pytest.raises(StructureError, match="r is 4, the adapters of the task have 2"):
        load_adapter(folder, AdapterSpec(rank=2, alpha=8), "tiny")
    with pytest.raises(StructureError, match="not the shared A of seed 1.*train_a=True"):
        load_adapter(folder, AdapterSpec(rank=4, alpha=8, a_seed=1), "tiny")
    with pytest.raises(StructureError, match=r"a: .*missing \[\], unexpected \['.*down_proj.*and 21 more"):
        load_adapter(folder, AdapterSpec(rank=4, alpha=8, targets=("k_proj",), train_a=True), "tiny")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(StructureError, match="use_rslora is True, the adapters of the task have False"):
        load_adapter(folder, spec, "tiny")
    (folder / WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match="not a readable adapter folder"):
        read_adapter(folder)
    with pytest.raises(DataError, match="holds no adapter folder"):
        adapter_folders(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern={'q_proj': 4}"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"bias": "all"}, "bias='all'"),
        ({"a_form_to_come": True}, "a_form_to_come=True"),
        ({"target_modules": r".*\.q_proj"}, "a list of target_modules"),
        ({"peft_type": "IA3"}, "only LoRA, rsLoRA and DoRA"),
    ],
    ids=str,
)
def test_settings_that_would_make_it_another_adapter_are_refused_by_name(drawn, tmp_path, said, words):
    spec = SPECS["B"]
    folder = save_adapter(tmp_path / "a", drawn(spec, 1)[0].float(), spec, "tiny")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"init_lora_weights": "gaussian", "lora_dropout": 0.1}))
    assert load_adapter(folder, spec, "tiny").shape and spec_of(folder).rank == 4
    (folder / CONFIG).write_text(json.dumps(config | said))
    for read in (spec_of, lambda folder: load_adapter(folder, spec, "tiny")):
        with pytest.raises(DataError, match=re.escape(words)):
            read(folder)


# --- gauge ------------------------------------------------------------------------------------------------------------


def library(own_a: bool, count: int = 4, inputs: int = 32, outputs: int = 24) -> list[dict[str, torch.Tensor]]:
    """Adapters whose Bs are alike, with one A or one each."""
    common = torch.randn(outputs, 4, generator=rng("cpu", 0))
    found = []
    for i in range(count):
        a = draw_a("layer", inputs, AdapterSpec(rank=4, a_seed=i if own_a else 0))
        b = common + 0.1 * torch.randn(outputs, 4, generator=rng("cpu", i + 1))
        found.append({"layer.lora_A.weight": a, "layer.lora_B.weight": b})
    return found


def test_the_gauge_warning_fires_for_own_and_not_for_shared_a():
    shared, own = gauge_report(library(False)), gauge_report(library(True))
    assert shared.warning is None and shared.cosine_a == pytest.approx(1) and shared.cosine_change > 0.9
    assert "do not share a gauge" in own.warning and abs(own.cosine_a) < 0.3 and own.cosine_b > 0.9


def test_one_stranger_in_a_library_is_enough_for_the_warning():
    adapters = library(False, 12)[:11] + library(True, 12)[11:]
    report = gauge_report(adapters)
    assert report.cosine_a > 0.8 > report.least_cosine_a and report.warning


def test_the_cosine_of_changes_is_that_of_the_products_and_the_same_in_every_gauge():
    adapters = library(True, 3)
    products = torch.stack([x["layer.lora_B.weight"] @ x["layer.lora_A.weight"] for x in adapters]).flatten(1)
    normal = torch.nn.functional.normalize(products, dim=1)
    expected = (normal @ normal.T)[torch.ones(3, 3).triu(1).bool()].mean()
    assert gauge_report(adapters).cosine_change == pytest.approx(float(expected), abs=1e-5)
    turned = []
    for i, adapter in enumerate(adapters):
        m = torch.linalg.qr(torch.randn(4, 4, generator=rng("cpu", 9, i)))[0]
        a, b = adapter["layer.lora_A.weight"], adapter["layer.lora_B.weight"]
        turned.append({"layer.lora_A.weight": m.T @ a, "layer.lora_B.weight": b @ m})
    assert gauge_report(turned).cosine_change == pytest.approx(float(expected), abs=1e-5)
    assert gauge_report(turned).cosine_b != pytest.approx(gauge_report(adapters).cosine_b, abs=0.1)


def test_a_gauge_needs_two_adapters_of_the_same_layers():
    with pytest.raises(DataError, match="two or more adapters"):
        gauge_report(library(False, 1))
