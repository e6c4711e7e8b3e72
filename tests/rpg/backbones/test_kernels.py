"""Optional CUDA kernels: chosen by device, done without when missing, called in the layout that they document.

The kernels themselves need a GPU (test_backbones.py compares devices where there is one). Here each is replaced by its
documented contract, written as a loop, and CPU tensors pass for CUDA tensors.
"""

import logging
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from rpg.backbones import Backbone, build_backbone, kernels, scans

PATHS = {
    "mamba2": "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined",
    "mamba": "mamba_ssm.ops.selective_scan_interface.selective_scan_fn",
    "hgrn2": "fla.ops.gla.fused_recurrent_gla",
    "convolution": "causal_conv1d.causal_conv1d_fn",
}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    """Kernels that are really installed would be given CPU tensors here."""
    for path in PATHS.values():
        monkeypatch.setitem(sys.modules, path.split(".")[0], None)
    kernels.load.cache_clear()
    yield
    kernels.load.cache_clear()


def build(name: str, **options) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_backbone(name, 32, **options)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def install(monkeypatch, path: str, function) -> None:
    """Make `path` importable, as packages of its own."""
    *packages, name = path.split(".")
    for depth in range(1, len(packages) + 1):
        monkeypatch.setitem(sys.modules, ".".join(packages[:depth]), types.ModuleType(packages[depth - 1]))
    setattr(sys.modules[".".join(packages)], name, function)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
    heads = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads, dim=2) for t in (B, C))
    state, ys = initial_states, []
    for t in range(x.shape[1]):
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = (dt[:, t] * A).exp()[..., None, None] * state + update
        ys.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    assert return_final_states
    return torch.stack(ys, dim=1), state


def selective_scan_fn(u, delta, A, B, C, D, *, delta_bias, delta_softplus, return_last_state):
    assert delta_softplus and return_last_state
    delta = F.softplus(delta + delta_bias[:, None])
    state, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = (delta[:, :, t, None] * A).exp() * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
        ys.append((state * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, dim=2), state


def fused_recurrent_gla(q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False):
    assert output_final_state and initial_state.dtype == torch.float32 and gv is None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state, ys = initial_state, []
    for t in range(q.shape[1]):
        state = gk[:, t, ..., None].exp() * state + k[:, t, ..., None] * v[:, t, :, None]
        ys.append(scale * (state * q[:, t, ..., None]).sum(-2))
    return torch.stack(ys, dim=1), state


def causal_conv1d_fn(x, weight, bias, activation):
    assert activation == "silu" and x.stride(1) == 1 and x.stride(2) % 8 == 0
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight)))


CONTRACTS = {
    "mamba2": mamba_chunk_scan_combined,
    "mamba": selective_scan_fn,
    "hgrn2": fused_recurrent_gla,
    "convolution": causal_conv1d_fn,
}


def test_a_package_that_warns_while_it_is_imported_is_used(monkeypatch, tmp_path):
    (tmp_path / "grumbling.py").write_text("import warnings\nwarnings.warn('no driver')\ndef kernel(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error")
        assert kernels.load("grumbling.kernel") is not None
    assert [str(warning.message) for warning in told] == ["no driver"]


@pytest.mark.parametrize("kernel", CONTRACTS)
def test_kernel_is_called_as_it_documents(monkeypatch, kernel):
    name = "mamba2" if kernel == "convolution" else kernel
    options = {"headdim": 16, "ngroups": 2} if name == "mamba2" else {}
    backbone, x = build(name, **options), noise(2, 20, 32)
    expected = backbone(x)

    calls = []
    install(monkeypatch, PATHS[kernel], lambda *a, **k: calls.append(kernel) or CONTRACTS[kernel](*a, **k))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-5)
    assert calls == [kernel] * 2  # once a layer

    first, state = backbone.scan(x[:, :7], backbone.initial_state(2))
    second, _ = backbone.scan(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if kernel == "mamba" else 6)  # Mamba's kernel cannot start from a state


@pytest.mark.parametrize("name", ["mamba2", "mamba", "hgrn2"])
def test_cpu_tensors_never_reach_a_kernel(monkeypatch, name):
    def crash(*_, **__):
        raise AssertionError("a CUDA kernel was given CPU tensors")

    for path in PATHS.values():
        install(monkeypatch, path, crash)
    assert build(name)(noise(2, 5, 32)).isfinite().all()


def test_missing_and_broken_packages_are_done_without(monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, _):
            raise OSError("undefined symbol")

    monkeypatch.setitem(sys.modules, "missing_kernels", None)
    monkeypatch.setitem(sys.modules, "broken_kernels", Broken("broken_kernels"))
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        assert [kernels.load(f"{package}.scan") for package in ("missing_kernels", "broken_kernels") * 2] == [None] * 4
    assert len(caplog.records) == 2  # one line each, however often it is asked for


def test_double_precision_is_left_to_pytorch(monkeypatch):
    install(monkeypatch, PATHS["hgrn2"], None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert build("hgrn2").double()(noise(2, 5, 32).double()).dtype == torch.float64
    assert not kernels.supports(torch.float64) and kernels.supports(torch.bfloat16)


def test_chunk_holds_whole_blocks():
    assert scans.CHUNK % scans.BLOCK == 0
