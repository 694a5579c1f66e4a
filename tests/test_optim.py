"""Muon against the singular value decomposition, torch's Muon and torch's SGD."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib.optim import Muon, optimizer, orthogonalised


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (40, 40)])
def test_a_matrix_is_nearly_orthogonalised(shape):
    """U diag(s) Vᵀ -> U diag(s') Vᵀ with s' within 0.7 to 1.2."""
    generator = torch.Generator().manual_seed(0)
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=generator).double(), False)
    s = torch.linspace(1, 0.05, len(s)).double()
    found = u.T @ orthogonalised((u @ s.diag() @ vt)[None])[0] @ vt.T
    assert (found.diagonal() > 0.65).all() and (found.diagonal() < 1.25).all()
    torch.testing.assert_close(found, found.diagonal().diag(), rtol=0, atol=1e-9)


def steps(optimizer, parameter, shape, n=4):
    """The parameter after n steps along random gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        parameter.grad = torch.randn(shape, generator=generator).view_as(parameter)
        optimizer.step()
    return parameter.detach()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(12, 3, 2, 2), (32, 3, 2, 2)])  # a wide matrix and a tall one
def test_kernels_move_as_by_torchs_muon(shape):
    """Up to the bfloat16 in which it iterates, and the different units of rate and decay."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kernel, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    ours = Muon([kernel], lr=0.4, momentum=0.9, weight_decay=0.05)
    theirs = torch.optim.Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.4)
    after, expected = steps(ours, kernel, shape), steps(theirs, matrix, shape)
    torch.testing.assert_close(after.flatten(1), expected, rtol=0, atol=0.01)
    assert (expected - weight.flatten(1)).abs().max() > 0.1


def test_kernels_of_one_shape_do_not_affect_each_other():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(2, 2, 6, 4, 3, 3, generator=generator)
    gradients[1] *= 100
    together = [nn.Parameter(weight.clone()) for weight in weights]
    alone = [nn.Parameter(weight.clone(memory_format=torch.channels_last)) for weight in weights]
    muons = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for _ in range(2):
        for p, gradient in zip(together + alone, [*gradients, *gradients]):
            p.grad = gradient.clone(memory_format=torch.preserve_format)
        for muon in muons:
            muon.step()
    torch.testing.assert_close(together, alone)
    assert (together[0] - weights[0]).abs().max() > 0.01


def test_other_parameters_move_as_by_sgd():
    weight = torch.randn(7, 5)
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.05)
    after = steps(Muon([ours], **settings), ours, (7, 5))
    expected = steps(torch.optim.SGD([theirs], **settings), theirs, (7, 5))
    torch.testing.assert_close(after, expected)
    untouched = nn.Parameter(weight.clone())  # without a gradient
    Muon([untouched], **settings).step()
    assert untouched.equal(weight)


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("muon", Muon)])
def test_optimizers_have_momentum_and_the_weight_decay_of_the_options(name, kind):
    made = optimizer(SimpleNamespace(optimizer=name, weight_decay=0.03), nn.Linear(2, 2))
    (group,) = made.param_groups
    assert type(made) is kind and (group["momentum"], group["weight_decay"]) == (0.9, 0.03)
