"""Every backbone behind the one interface: stretches and steps, causality, parameter names, precision, errors."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from Gpt.errors import ConfigError
from rpg.backbones import BACKBONES, build_backbone, kernels

WIDTH = 32
SMALL = {
    "mamba2": {"d_state": 16, "headdim": 16, "ngroups": 2},
    "hgrn2": {"expand_ratio": 16},
    "transformer": {"heads": 4},
}
RECURRENT = [name for name, mixer in BACKBONES.items() if mixer.sequential]


def build(name: str, width: int = WIDTH, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_backbone(name, width, **SMALL.get(name, {}) | options)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_whole_sequence_equals_stretches_equals_steps(name, bare):
    backbone = build(name, bare=bare).double()
    x = noise(2, 70, WIDTH)
    whole = backbone(x)
    assert whole.shape == x.shape

    state = backbone.initial_state(2, dtype=x.dtype)
    outputs = []
    for stretch in (x[:, :1], x[:, 1:65], x[:, 65:67]):
        y, state = backbone.scan(stretch, state)
        outputs.append(y)
    for token in x[:, 67:].unbind(1):
        y, state = backbone.step(token, state)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_passes_through_the_state(name):
    backbone = build(name).double()
    x, weights = noise(2, 40, WIDTH), noise(2, 40, WIDTH, seed=1)
    parameters = list(backbone.parameters())
    expected = torch.autograd.grad((backbone(x) * weights).sum(), parameters)

    first, state = backbone.scan(x[:, :13], backbone.initial_state(2, dtype=x.dtype))
    second, _ = backbone.scan(x[:, 13:], state)
    actual = torch.autograd.grad((torch.cat([first, second], dim=1) * weights).sum(), parameters)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ("transformer", "none")])
def test_state_does_not_grow(name):
    backbone = build(name)
    start = backbone.initial_state(3)
    _, end = backbone.scan(noise(3, 50, WIDTH, dtype=torch.float32), start)
    assert [[t.shape for t in layer] for layer in start] == [[t.shape for t in layer] for layer in end]


@pytest.mark.parametrize("name", BACKBONES)
def test_future_input_does_not_change_the_past(name):
    backbone = build(name).double()
    x = noise(2, 70, WIDTH)
    changed = x.clone()
    changed[:, 40:] += 10
    before, after = backbone(x), backbone(changed)
    torch.testing.assert_close(after[:, :40], before[:, :40], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 40:], before[:, 40:])


def influence(backbone: torch.nn.Module, length: int, position: int) -> torch.Tensor:
    """How strongly each input token moves the output token at `position`."""
    x = noise(1, length, WIDTH).requires_grad_()
    (gradient,) = torch.autograd.grad(backbone(x)[:, position].square().sum(), x)
    return gradient[0].abs().sum(-1)


@pytest.mark.parametrize(
    ("name", "options"), [(name, {"bidirectional": True}) for name in RECURRENT] + [("transformer", {"causal": False})]
)
def test_both_sides_are_seen(name, options):
    backbone = build(name, **options).double()
    assert (influence(backbone, 9, 4) > 0).all()
    assert backbone(noise(2, 9, WIDTH)).shape == (2, 9, WIDTH)
    with pytest.raises(ConfigError, match="both sides"):
        backbone.initial_state(2)


@pytest.mark.parametrize("name", ["mamba2", "mamba", "hgrn2", "lstm", "gru", "transformer"])
def test_last_token_hears_the_first(name):
    assert influence(build(name).double(), 12, 11)[0] > 0


def test_without_recurrence_tokens_never_meet():
    assert influence(build("none").double(), 9, 4).nonzero().flatten().tolist() == [4]


def test_bidirectional_swaps_its_halves_under_reversal():
    backbone = build("hgrn2", depth=1, bare=True, bidirectional=True).double()
    mirrored = build("hgrn2", depth=1, bare=True, bidirectional=True).double()
    mirrored.layers[0].forwards.load_state_dict(backbone.layers[0].backwards.state_dict())
    mirrored.layers[0].backwards.load_state_dict(backbone.layers[0].forwards.state_dict())
    x = noise(2, 20, WIDTH)
    torch.testing.assert_close(mirrored(x.flip(1)), backbone(x).flip(1))


def test_attention_without_mask_is_permutation_equivariant():
    backbone = build("transformer", causal=False).double()
    x, order = noise(2, 10, WIDTH), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone(x[:, order]), backbone(x)[:, order])


# As in mamba_ssm 2.3 (Mamba, Mamba2) and flash-linear-attention 0.6 (HGRN2Attention).
UPSTREAM_PARAMETERS = {
    ("mamba2", 32): {
        "dt_bias": (1,),
        "A_log": (1,),
        "D": (1,),
        "in_proj.weight": (2 * 64 + 2 * 128 + 1, 32),
        "conv1d.weight": (64 + 2 * 128, 1, 4),
        "conv1d.bias": (64 + 2 * 128,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    },
    ("mamba", 32): {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 2 * 16, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    },
    ("hgrn2", 32): {
        "q_proj.weight": (32, 32),
        "f_proj.weight": (32, 32),
        "i_proj.weight": (32, 32),
        "g_norm.weight": (32,),
        "o_proj.weight": (32, 32),
    },
}


@pytest.mark.parametrize(("name", "width"), UPSTREAM_PARAMETERS)
def test_parameters_are_named_and_shaped_as_upstream(name, width):
    layer = BACKBONES[name](width, width)
    assert {key: tuple(t.shape) for key, t in layer.state_dict().items()} == UPSTREAM_PARAMETERS[name, width]


def test_bare_stack_adds_no_parameters_and_can_widen():
    # RPG's base model (2 layers of width 8192) and its largest (12288, then 16384), built without memory.
    with torch.device("meta"):
        base = build_backbone("mamba2", 8192, bare=True)
        large = build_backbone("mamba2", 12288, out_width=16384, bare=True)
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(814e6, rel=1e-3)
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(2266e6, rel=1e-3)
    assert large.layers[1].in_proj.weight.shape == (66304, 12288)
    assert all(name.startswith("layers.") for name in base.state_dict())


@pytest.mark.parametrize("name", BACKBONES)
def test_wider_output(name):
    backbone = build(name, bare=True, out_width=2 * WIDTH)
    assert backbone(noise(2, 5, WIDTH, dtype=torch.float32)).shape == (2, 5, 2 * WIDTH)


# ---- the layers, written out one step at a time ----


def causal_convolution(x, weight, bias):
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = [padded[:, j : j + x.shape[1]] * weight[:, 0, j] for j in range(width)]
    return F.silu(sum(taps) + bias)


def mamba2_by_steps(p, x, headdim, ngroups, d_state):
    inner, heads = p["norm.weight"].numel(), p["A_log"].numel()
    z, xbc, dt = (x @ p["in_proj.weight"].T).split([inner, inner + 2 * ngroups * d_state, heads], -1)
    xbc = causal_convolution(xbc, p["conv1d.weight"], p["conv1d.bias"])
    u, b, c = xbc.split([inner, ngroups * d_state, ngroups * d_state], -1)
    group = torch.arange(heads) // (heads // ngroups)
    u = u.unflatten(-1, (heads, headdim))
    b, c = (t.unflatten(-1, (ngroups, d_state))[:, :, group] for t in (b, c))
    dt = F.softplus(dt + p["dt_bias"])
    state, ys = 0, []
    for t in range(x.shape[1]):
        decay = (-dt[:, t] * p["A_log"].exp()).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None]
        ys.append((state * c[:, t, :, None]).sum(-1) + p["D"][:, None] * u[:, t])
    gated = (torch.stack(ys, 1).flatten(2) * F.silu(z)).unflatten(-1, (ngroups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (normed.flatten(2) * p["norm.weight"]) @ p["out_proj.weight"].T


def mamba_by_steps(p, x):
    u, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    u = causal_convolution(u, p["conv1d.weight"], p["conv1d.bias"])
    d_state, rank = p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
    dt, b, c = (u @ p["x_proj.weight"].T).split([rank, d_state, d_state], -1)
    dt = F.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    state, ys = 0, []
    for t in range(x.shape[1]):
        decay = (-dt[:, t, :, None] * p["A_log"].exp()).exp()
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        ys.append((state * c[:, t, None]).sum(-1) + p["D"] * u[:, t])
    return (torch.stack(ys, 1) * F.silu(z)) @ p["out_proj.weight"].T


def hgrn2_by_steps(p, x, expand_ratio, lower_bound):
    q, f, i = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, expand_ratio)) for n in "qfi")
    f = lower_bound + (1 - lower_bound) * torch.sigmoid(f)
    state, ys = 0, []
    for t in range(x.shape[1]):
        state = f[:, t, ..., None] * state + (1 - f[:, t])[..., None] * i[:, t, :, None]
        ys.append((state * F.silu(q[:, t])[..., None]).sum(-2))
    y = torch.stack(ys, 1).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["g_norm.weight"]
    return y @ p["o_proj.weight"].T


REFERENCES = {
    "mamba2": (mamba2_by_steps, {"headdim": 16, "ngroups": 2, "d_state": 16}),
    "mamba": (mamba_by_steps, {}),
    "hgrn2": (hgrn2_by_steps, {"expand_ratio": 8, "lower_bound": 0.25}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_layer_equals_its_equations(name):
    reference, options = REFERENCES[name]
    layer = build(name, depth=1, bare=True, **options).layers[0].double()
    for parameter in layer.parameters():  # away from the special values of the initialisation
        parameter.data += 0.1 * noise(*parameter.shape, seed=parameter.numel())
    x = noise(2, 67, WIDTH).requires_grad_()
    y, expected = layer(x)[0], reference(dict(layer.named_parameters()), x, **options)
    torch.testing.assert_close(y, expected)
    weights = noise(*y.shape, seed=5)
    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((t * weights).sum(), inputs) for t in (y, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
def test_hgrn2_stays_finite_when_its_gates_saturate(logit):
    layer = build("hgrn2", depth=1, bare=True).layers[0]
    layer.f_proj.weight.data.zero_()[:, 0] = 1.0
    x = noise(2, 130, WIDTH, dtype=torch.float32)
    x[..., 0] = logit
    y, _ = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    assert all(t.isfinite().all() for t in (y, *gradients))


def test_lower_bounds_grow_with_the_layer_and_can_be_set():
    assert [layer.mixer.lower_bound for layer in build("hgrn2", depth=4).layers] == [0, 0.25, 0.5, 0.75]
    assert [layer.mixer.lower_bound for layer in build("hgrn2", depth=2, lower_bound=0.0).layers] == [0, 0]


def test_state_expansion_costs_no_parameters():
    counts = {sum(p.numel() for p in build("hgrn2", expand_ratio=e).parameters()) for e in (1, 8, 32)}
    assert len(counts) == 1
    states = [build("hgrn2", expand_ratio=e, depth=1).initial_state(1)[0][0].numel() for e in (1, 8, 32)]
    assert states == [WIDTH, 8 * WIDTH, 32 * WIDTH]


@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_time_steps_start_between_a_thousandth_and_a_tenth(name):
    layer = build(name, width=256, depth=1, bare=True).layers[0]
    dt = F.softplus(layer.dt_bias if name == "mamba2" else layer.dt_proj.bias)
    assert 1e-3 * (1 - 1e-4) <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1 * (1 + 1e-4)


# ---- precision ----


@pytest.mark.parametrize("name", BACKBONES)
def test_bfloat16_autocast_is_near_float32(name):
    backbone = build(name)
    x = noise(2, 70, WIDTH, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = backbone(x)
        stretch, state = backbone.scan(x[:, :50], backbone.initial_state(2))
        rest, _ = backbone.scan(x[:, 50:], state)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())
    for half_precision in (y, torch.cat([stretch, rest], dim=1)):
        error = (half_precision.float() - backbone(x)).norm() / backbone(x).norm()
        assert error < 0.03


@pytest.mark.parametrize("name", BACKBONES)
def test_bfloat16_weights(name):
    backbone = build(name).bfloat16()
    y = backbone(noise(2, 9, WIDTH, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_vectors_and_decay_rates_are_not_decayed():
    assert build("mamba", depth=1, bare=True).no_weight_decay() == {
        f"layers.0.{name}" for name in ("A_log", "D", "conv1d.bias", "dt_proj.bias")
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BACKBONES)
def test_cuda_equals_cpu(name):
    backbone = build(name)
    x = noise(2, 130, WIDTH, dtype=torch.float32)
    outputs = []
    for device in ("cpu", "cuda"):
        backbone.to(device).zero_grad()
        y = backbone(x.to(device))
        y.square().mean().backward()
        stretch, state = backbone.scan(x[:, :50].to(device), backbone.initial_state(2, device))
        rest, _ = backbone.scan(x[:, 50:].to(device), state)
        # Copies: moving a module moves its gradients too.
        outputs.append([t.detach().clone().cpu() for t in (y, stretch, rest, *(p.grad for p in backbone.parameters()))])
    for cpu, cuda in zip(*outputs, strict=True):
        assert (cpu - cuda).norm() <= 1e-2 * cpu.norm() + 1e-6  # kernels multiply in TF32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "package"),
    [("mamba2", "mamba_ssm"), ("mamba", "mamba_ssm"), ("hgrn2", "fla"), ("mamba2", "causal_conv1d")],
)
def test_the_kernels_of_an_installed_package_are_used_on_cuda(name, package, monkeypatch, caplog):
    """Where none loads, the comparison of devices above is of PyTorch with PyTorch."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    caplog.set_level("INFO")
    kernels.load.cache_clear()
    found, load = {}, kernels.load
    monkeypatch.setattr(kernels, "load", lambda path: found.setdefault(path.partition(".")[0], load(path)))
    build(name).cuda()(noise(2, 130, WIDTH, dtype=torch.float32).cuda())
    assert found[package] is not None, caplog.text


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba3", {}, "mamba"),
        ("LSTMs", {}, "known: gru"),
        ("mamba2", {"d_stat": 16}, "'d_state'"),
        ("lstm", {"d_state": 16}, "no option 'd_state'"),
        ("gru", {"depth": 0}, "depth=0"),
        ("mamba2", {"headdim": 48}, "headdim = 48"),
        ("mamba2", {"ngroups": 3}, "ngroups = 3"),
        ("hgrn2", {"expand_ratio": 5}, "expand_ratio 5"),
        ("hgrn2", {"lower_bound": 1.0}, "lower_bound"),
        ("transformer", {"heads": 5}, "heads = 5"),
        ("transformer", {"bidirectional": True}, "causal=false"),
        ("none", {"bidirectional": True}, "bidirectional=false"),
        ("gru", {"out_width": 64}, "bare=true"),
        ("gru", {"bare": True, "mlp_ratio": 2.0}, "bare=false"),
    ],
)
def test_errors_name_the_remedy(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, WIDTH, **options)


def test_softmax_scale_and_mask():
    # One head, identity projections: the second token's output is the softmax-weighted mean of both tokens.
    layer = build("transformer", width=4, heads=1, depth=1, bare=True).layers[0].double()
    layer.qkv_proj.weight.data = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    layer.out_proj.weight.data = torch.eye(4, dtype=torch.float64)
    x = noise(1, 2, 4)
    scores = torch.softmax(x[0, 1] @ x[0].T / math.sqrt(4), dim=-1)
    torch.testing.assert_close(layer(x)[0][0], torch.stack([x[0, 0], scores @ x[0]]))
