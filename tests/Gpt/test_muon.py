"""Muon against torch.optim.Muon and against the singular value decomposition."""

import pytest
import torch

from Gpt.muon import MuonAdamW, orthogonalize
from Gpt.seeds import rng

SHAPES = [(16, 16), (48, 16), (16, 64), (16, 64)]


def matrices(name: str, shapes=SHAPES) -> list[torch.Tensor]:
    noise = rng("cpu", 0, name)
    return [torch.randn(shape, generator=noise) for shape in shapes]


@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (8, 30)])
def test_orthogonalize_keeps_singular_vectors(shape):
    x = torch.stack(matrices("svd", [shape] * 3))
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    mapped = u.mT @ orthogonalize(x).double() @ vt.mT
    values = mapped.diagonal(dim1=1, dim2=2)
    assert (mapped - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.5 and values.max() < 1.3


def test_matches_torch_to_bfloat16_rounding():
    ours = [torch.nn.Parameter(m.clone()) for m in matrices("parameters")]
    theirs = [torch.nn.Parameter(m.clone()) for m in matrices("parameters")]
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = MuonAdamW([{"params": ours, "muon": True, **settings}]), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, gradient in zip(params, matrices(f"gradients {step}"), strict=True):
                p.grad = gradient
            optimizer.step()
    for a, b, start in zip(ours, theirs, matrices("parameters"), strict=True):
        assert (a - b).norm() < 0.02 * (a - start).norm()


def test_batching_by_shape_changes_nothing():
    together = [torch.nn.Parameter(m.clone()) for m in matrices("parameters")]
    alone = [torch.nn.Parameter(m.clone()) for m in matrices("parameters")]
    for params, gradient in ((together, matrices("g")), (alone, matrices("g"))):
        for p, g in zip(params, gradient, strict=True):
            p.grad = g
    MuonAdamW([{"params": together, "muon": True, "lr": 0.1}]).step()
    for p in alone:
        MuonAdamW([{"params": [p], "muon": True, "lr": 0.1}]).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


def test_other_groups_get_plain_adamw():
    mixed, plain = (([torch.nn.Parameter(m.clone()) for m in matrices("parameters")]) for _ in range(2))
    for params in (mixed, plain):
        for p, g in zip(params, matrices("g"), strict=True):
            p.grad = g
    MuonAdamW([{"params": mixed[:2], "muon": True}, {"params": mixed[2:]}], lr=0.1).step()
    torch.optim.AdamW(plain, lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(mixed[2:], plain[2:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(mixed[:2], plain[:2], strict=True))
