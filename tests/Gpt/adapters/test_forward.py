"""Many adapters in one pass are each adapter by itself, and PEFT agrees with every one of them."""

import copy

import pytest
import torch

from Gpt.adapters.base import load_base
from Gpt.adapters.forward import adapted_answer_logits, adapted_logits, frozen_a
from Gpt.adapters.spec import PREFIX, AdapterModule, AdapterSpec, adapter_structure
from Gpt.seeds import rng

peft = pytest.importorskip("peft")

SPECS = {
    "B": AdapterSpec(rank=4, alpha=8),
    "A and B": AdapterSpec(rank=4, alpha=2, train_a=True),
    "rsLoRA": AdapterSpec(rank=4, alpha=2, rslora=True),
    "rsDoRA": AdapterSpec(rank=2, rslora=True, dora=True),
    "DoRA, A too": AdapterSpec(rank=2, dora=True, train_a=True),
    "queries": AdapterSpec(rank=3, targets=("q_proj",)),
}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny", "cpu", torch.float64)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 900, shape, generator=rng("cpu", 0, "tokens"))


def with_peft(base, spec):
    """A PEFT model of the same form, and a function that puts one of our rows into it."""
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(copy.deepcopy(base.model), config, autocast_adapter_dtype=False).eval()

    def put(row):
        state = adapter_structure(base, spec).unflatten(row)
        if not spec.train_a:
            state |= {f"{PREFIX}{name}.lora_A.weight": a for name, a in frozen_a(base, spec).items()}
        result = peft.set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
        return model

    return put


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_adapter_of_a_batch_is_what_peft_makes_of_it_alone(base, drawn, spec):
    weights, x = drawn(spec, 3), tokens(3, 2, 9)
    logits = adapted_logits(base, spec, weights, x)
    put = with_peft(base, spec)
    with torch.no_grad():
        for row, inputs, found in zip(weights, x, logits, strict=True):
            torch.testing.assert_close(found, put(row)(inputs).logits, rtol=0, atol=1e-11)
    assert (logits - base.model(x.flatten(0, 1)).logits.unflatten(0, (3, 2))).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_companions_do_not_matter(base, drawn, spec):
    weights, x = drawn(spec, 4), tokens(4, 2, 7)
    together = adapted_logits(base, spec, weights, x)
    alone = torch.cat([adapted_logits(base, spec, weights[i : i + 1], x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)


def test_a_fresh_adapter_is_the_base_model(base):
    x = tokens(1, 3, 8)
    for spec in SPECS.values():
        fresh = adapter_structure(base, spec).flatten(AdapterModule(base, spec).state_dict())[None].double()
        tolerance = 1e-5 if spec.dora else 0  # its magnitudes are float32
        torch.testing.assert_close(
            adapted_logits(base, spec, fresh, x)[0], base.model(x[0]).logits, rtol=0, atol=tolerance
        )


def test_the_base_model_is_left_as_it_was(base, drawn):
    spec, x = SPECS["B"], tokens(2, 1, 5)
    before = base.model(x[:, 0]).logits
    adapted_logits(base, spec, drawn(spec, 2), x)
    with pytest.raises((RuntimeError, TypeError)):
        adapted_logits(base, spec, drawn(spec, 3), tokens(2, 1, 5))  # three adapters cannot share two sequences
    assert torch.equal(base.model(x[:, 0]).logits, before)


def test_answer_logits_are_those_before_the_answer(base, drawn):
    spec, x = SPECS["A and B"], tokens(5, 2, 9)
    positions = torch.tensor([[4, 5, 8], [1, 2, 3]]).expand(5, 2, 3)
    weights = drawn(spec, 5)
    before = (positions - 1)[..., None].expand(-1, -1, -1, base.model.config.vocab_size)
    expected = adapted_logits(base, spec, weights, x).gather(2, before)
    found = adapted_answer_logits(base, spec, weights, x, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_are_pefts(base, drawn, spec):
    weights, x = drawn(spec, 1).requires_grad_(), tokens(1, 2, 6)
    probe = torch.randn(2, 6, base.model.config.vocab_size, generator=rng("cpu", 1), dtype=torch.float64)
    (ours,) = torch.autograd.grad((adapted_logits(base, spec, weights, x)[0] * probe).sum(), weights)
    model = with_peft(base, spec)(weights[0].detach())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad()
    (model(x[0]).logits * probe).sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if "lora" in name}
    for tensor in adapter_structure(base, spec).tensors:
        found = gradients.get(tensor.name, gradients.get(f"{tensor.name}.weight"))
        torch.testing.assert_close(ours[0, tensor.slice].view(tensor.shape), found, rtol=1e-8, atol=1e-9)


def test_padding_after_a_sequence_changes_nothing_before_it(base, drawn):
    spec, x = SPECS["B"], tokens(2, 2, 6)
    padded = torch.cat([x, torch.zeros(2, 2, 5, dtype=torch.long)], -1)
    weights = drawn(spec, 2)
    expected = adapted_logits(base, spec, weights, x)
    torch.testing.assert_close(adapted_logits(base, spec, weights, padded)[:, :, :6], expected, rtol=0, atol=1e-11)
