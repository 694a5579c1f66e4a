"""cem.py against definitions in float64, finite differences, closed forms and torchattacks."""

import ast
import copy
import math
import os
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
import torchvision
from conftest import ARCHS, ROOT, perturb
from torch import nn
from torchvision import tv_tensors
from torchvision.models.resnet import BasicBlock

import cem

# ---------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32), (4, 20)])
def test_networks_take_any_channels_and_size(arch, channels, size):
    model = cem.ParametricCEM(arch, 7, width=8, in_channels=channels).eval()
    x = torch.rand(2, channels, size, size)
    assert model(x).shape == (2, 7)
    assert model.features(x).shape == (2, model.net.out_features)
    assert len(model.stages(x)) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32


@pytest.mark.parametrize("arch", sorted(cem.RESNETS.keys() - {"resnet14"}))
def test_resnets_carry_torchvisions_parameter_names_and_shapes(arch):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)(num_classes=10).state_dict()
        ours = cem.ParametricCEM(arch, 10).net.state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k].shape != theirs[k].shape] == [
        "conv1.weight"
    ]  # 3x3 instead of 7x7


@pytest.mark.parametrize("suffix", ["", "-imagenet"])
def test_resnet14_is_resnet18_without_its_first_stage(suffix):
    model = perturb(cem.ParametricCEM(f"resnet14{suffix}", 5, width=8)).eval()
    other = cem.ParametricCEM(f"resnet18{suffix}", 5, width=8).eval()
    other.net.layer1 = nn.Sequential()
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    torch.testing.assert_close(cem.folded(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arch, millions", [("resnet18", 11.17), ("resnet50", 23.52), ("wrn-28-10", 36.48)]
)
def test_networks_have_the_published_sizes(arch, millions):
    size = sum(p.numel() for p in cem.ParametricCEM(arch, 10).parameters()) / 1e6
    assert size == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("arch", ARCHS)
def test_folded_is_the_same_function_and_leaves_the_model_alone(arch):
    model = perturb(cem.ParametricCEM(arch, 5, width=8).double()).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    folded = cem.folded(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == (
        13 if arch == "wrn-28-10" else 0
    )
    assert not any(p.requires_grad for p in folded.parameters()) and not folded.training
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(folded(x), model.eval()(x))  # float64: rounding alone


class PreActivation(nn.Module):
    """A third-party block with torchvision's names, but BatchNorm before the convolution."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv1(F.relu(self.bn1(x)))


class Active(nn.BatchNorm2d):
    """A third-party BatchNorm with its activation."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Standardised(nn.Conv2d):
    """A third-party convolution that standardises its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def block(conv, norm):
    """torchvision's, with this shortcut."""
    return nn.Sequential(BasicBlock(3, 4, downsample=nn.Sequential(conv, norm)))


@pytest.mark.parametrize(
    "other",
    [
        PreActivation(),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), Active(3)),
        block(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        block(Standardised(3, 4, 1), nn.BatchNorm2d(4)),
        block(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
        block(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    ],
)
def test_folded_is_the_same_function_for_third_party_networks(other):
    for norm in (m for m in other.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias)
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(cem.folded(other)(x), other.eval()(x))


def test_folded_leaves_computed_weights_alone():
    model = perturb(cem.ParametricCEM("resnet18", 5, width=4))
    for name in ("conv1", "layer1.0.conv2"):
        torch.nn.utils.spectral_norm(model.net.get_submodule(name))
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model(x)  # spectral_norm computes its weights here
        folded = cem.folded(model)
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 2


def test_cem_imports_only_torch_and_torchvision():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "cem.py").read_text())):  # inside functions, too
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
    assert imported - set(sys.stdlib_module_names) == {"torch", "torchvision"}


# ------------------------------------------------------------ log-densities, potentials and losses


def definitions(logits, y):
    """Every potential from its definition, by explicit loops over images and classes."""
    out = {name: [] for name in ("ta", "langevin", "cs", "rcs", "ce", "joint", "margin")}
    for row, label in zip(logits.tolist(), y.tolist()):
        lse = math.log(sum(math.exp(v) for v in row))
        out["ta"].append(row[label] - lse)
        out["langevin"].append(lse)
        out["cs"].append(row[label])
        out["rcs"].append(row[label] + lse)
        others = math.log(sum(math.exp(v) for k, v in enumerate(row) if k != label))
        out["ce"].append(others - row[label])
        out["joint"].append(-row[label])
        out["margin"].append(max(v for k, v in enumerate(row) if k != label) - row[label])
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}


@pytest.mark.parametrize("name", ["ta", "langevin", "cs", "rcs", "ce", "joint", "margin"])
def test_potential_equals_its_definition_and_its_gradient_finite_differences(name, model64, batch):
    x, y = batch[0].double(), batch[1]
    with torch.no_grad():
        expected = definitions(model64(x), y)[name]
    potential = cem.potential(name, model64, y)
    torch.testing.assert_close(potential(x), expected, rtol=0, atol=1e-10)

    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(potential(x).sum(), x)
    generator = torch.Generator().manual_seed(2)
    direction, h = torch.randn(x.shape, generator=generator, dtype=torch.float64), 1e-6
    with torch.no_grad():
        numeric = (potential(x + h * direction) - potential(x - h * direction)) / (2 * h)
    # central differences err by h² |U'''|, rounding by 1e-16 / h: both far below 1e-6 of the slope
    torch.testing.assert_close(
        (gradient * direction).flatten(1).sum(1), numeric, rtol=1e-5, atol=1e-7
    )


def test_ta_keeps_its_direction_where_the_posterior_is_nearly_1():
    """In float32 1 - p(y | x) is 0 from a logit gap of 17 on."""
    logits = torch.tensor([[20.0, 1.0, 2.0]], requires_grad=True)
    y = torch.tensor([0])
    (ours,) = torch.autograd.grad(cem.PARAMETRIC_SAMPLERS["ta"](logits, y).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact.log_softmax(1)[0, 0], exact)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["ta", "cs", "rcs", "ce", "joint", "margin"])
def test_fewer_labels_than_images_are_an_error(name, model, batch):
    with pytest.raises(ValueError, match="batch_size"):
        cem.potential(name, model, torch.tensor([0]))(batch[0])


def test_the_default_step_of_pgd_is_two_and_a_half_eps_over_steps():
    """From the centre, along a constant gradient: 0.25, then the end of the ball."""
    x, steps = torch.full((1, 1, 8, 8), 0.5), []
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0)).view(1, 1, 8, 8)

    def linear(x):
        steps.append(x.detach())
        return (x * direction).sum((1, 2, 3))

    x_adv = cem.pgd(linear, x, eps=0.4, steps=4, random_start=0)
    lengths = [(step - x).norm().item() for step in [*steps, x_adv]]
    assert lengths == pytest.approx([0, 0.25, 0.4, 0.4, 0.4])


def test_attack_climbs_the_cross_entropy_without_its_vanishing_factor(model64, batch):
    """∇CE = (1 - p(y | x)) ∇U image by image; U's gradient survives where softmax saturates."""
    x, y = batch[0].double().requires_grad_(), batch[1]
    logits = model64(x)
    wrong = 1 - logits.softmax(1).gather(1, y[:, None]).squeeze(1)
    losses = F.cross_entropy(logits, y, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    (ours,) = torch.autograd.grad(cem.log_odds_against(logits, y).sum(), x)
    torch.testing.assert_close(wrong.detach().view(-1, 1, 1, 1) * ours, expected)

    certain = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        cem.log_odds_against(certain, torch.tensor([0])).sum(), certain
    )
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_potential_refuses_what_it_does_not_know(model):
    with pytest.raises(cem.CEMError, match="unknown potential 'dream'"):
        cem.potential("dream", model, torch.tensor([0]))
    with pytest.raises(cem.CEMError, match="needs y, the labels"):
        cem.potential("rcs", model)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def test_contrastive_half_of_the_likelihood_gradient_is_adversarial_training(model64, batch):
    x_hat, y = batch[0].double(), batch[1]
    logits = model64(x_hat)
    cross_entropy = gradients(model64, F.cross_entropy(logits, y))
    # by the definition, with every ŷ enumerated: ∇f(x̂, y) - Σ_ŷ p(ŷ | x̂) ∇f(x̂, ŷ)
    p = logits.softmax(1).detach()
    total = [torch.zeros_like(g) for g in cross_entropy]
    for k in range(p.shape[1]):
        half = gradients(model64, (p[:, k] * (cem.log_joint(logits, y) - logits[:, k])).mean())
        total = [a + b for a, b in zip(total, half)]
    for ours, theirs in zip(total, cross_entropy):
        torch.testing.assert_close(-ours, theirs, rtol=1e-10, atol=1e-12)


def test_losses_equal_their_definitions(model64, batch):
    x, y = batch[0].double(), batch[1]
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    f, f_adv = model64(x), model64(x_adv)
    ce, ce_adv = (-definitions(v.detach(), y)["ta"].mean() for v in (f, f_adv))
    gap = (f_adv.gather(1, y[:, None]) - f.gather(1, y[:, None])).mean()
    assert cem.supervised_loss("st", model64, x, y)[0].item() == pytest.approx(ce.item(), abs=1e-12)
    assert cem.supervised_loss("at", model64, x, y, x_adv)[0].item() == pytest.approx(
        ce_adv.item(), abs=1e-12
    )
    mle = cem.supervised_loss("mle", model64, x, y, x_adv, weight=0.7)[0]
    assert mle.item() == pytest.approx((ce_adv + 0.7 * gap).item(), abs=1e-12)
    x_s, b = torch.rand_like(x), 0.3
    energies = [-model64(images).exp().sum(1).log() for images in (x, x_s)]
    p_data, p_sample = (1 / (1 + (energy + b).exp()) for energy in energies)  # that it is data
    cross_entropy = -(p_data.log().mean() + (1 - p_sample).log().mean())
    dat, logits = cem.supervised_loss("dat", model64, x, y, x_adv, 0.7, x_s, offset=b)
    assert dat.item() == pytest.approx((ce_adv + 0.7 * cross_entropy).item(), abs=1e-12)
    torch.testing.assert_close(logits, f_adv, rtol=1e-12, atol=1e-12)
    # mle with weight 1 is the negative of both halves of the likelihood gradient
    expected = (f_adv.softmax(1).detach() * f_adv).sum(1)
    both = cem.consistency(f, f_adv, y) + (cem.log_joint(f_adv, y) - expected)
    mle = cem.supervised_loss("mle", model64, x, y, x_adv, weight=1.0)[0]
    for ours, theirs in zip(gradients(model64, mle), gradients(model64, -both.mean())):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_mle_with_weight_0_is_at_to_the_last_bit(model, batch):
    x, y = batch
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    results = []
    for name in ("at", "mle"):
        network = copy.deepcopy(model).train()
        loss, _ = cem.supervised_loss(name, network, x, y, x_adv, weight=0.0)
        loss.backward()
        results.append([loss, *(p.grad for p in network.parameters()), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ----------------------------------------------------------------------------- attack and samplers


def test_langevin_step_without_noise_is_gradient_ascent(model64, batch):
    x = batch[0].double()
    potential = cem.potential("langevin", model64)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(potential(y).sum(), y)
    step = cem.ascend(potential, x, steps=1, step_size=0.03, norm="none", clip=None)
    assert torch.equal(step, x + 0.03 * gradient)


def test_langevin_dynamics_samples_a_gaussian():
    """U = -x²/2: n steps of size α from 0 have variance 2α (1 - q^n) / (1 - q), q = (1 - α)²."""
    alpha, steps, n = 0.1, 60, 40_000
    x = cem.ascend(
        lambda x: -0.5 * x.square().flatten(1).sum(1),
        torch.zeros(n, 1, 1, 1),
        **dict(steps=steps, step_size=alpha, norm="none", noise=math.sqrt(2 * alpha), clip=None),
        generator=torch.Generator().manual_seed(0),
    )
    q = (1 - alpha) ** 2
    variance = 2 * alpha * (1 - q**steps) / (1 - q)
    assert abs(x.mean().item()) < 4 * math.sqrt(variance / n)  # four standard errors
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / n)


def test_momentum_is_the_heavy_ball():
    """On a linear potential d is constant: v_t = 1 + m + ... + m^(t-1)."""
    x = cem.ascend(
        lambda x: 3 * x.flatten(1).sum(1),
        torch.zeros(1, 1),
        steps=3,
        step_size=0.1,
        norm="none",
        momentum=0.5,
        clip=None,
    )
    assert x.item() == pytest.approx(0.1 * 3 * (1 + 1.5 + 1.75))


class Energy(nn.Module):
    """A potential that is a network itself."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout())

    def forward(self, x):
        return self.head(self.model(x)).sum(1)


@pytest.mark.parametrize("name", ["__call__", "forward"])
def test_a_network_as_the_potential_is_in_eval_mode(name):
    energy, x = Energy(), torch.rand(5, 3, 4, 4)
    potential = energy if name == "__call__" else energy.forward  # a method of it
    before = copy.deepcopy(energy.state_dict())
    first, second = (cem.ascend(potential, x, steps=2, step_size=0.1) for _ in range(2))
    assert torch.equal(first, second) and all(m.training for m in energy.modules())
    assert all(torch.equal(before[k], v) for k, v in energy.state_dict().items())


def test_a_radius_of_zero_in_half_precision(batch):
    x = batch[0].half()
    x_adv = cem.pgd(lambda x: x.flatten(1).sum(1), x, eps=0.0)
    assert torch.equal(x_adv, x)


def test_networks_of_others_may_have_a_config(batch):
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    network.config = SimpleNamespace(num_labels=10)
    cem.pgd(cem.potential("ce", network, batch[1]), batch[0], eps=0.1)


def test_the_attack_leaves_synchronisation_to_the_training(batch, encoder_in_a_wrapper):
    """DistributedDataParallel counts the forward passes that it sees."""
    wrapped, seen = encoder_in_a_wrapper
    assert cem.potential("maxent", wrapped)(batch[0]).shape == (len(batch[0]),)
    assert cem.potential("pgd", wrapped, batch[0])(batch[0]).shape == (len(batch[0]),)
    assert not seen and wrapped(batch[0]) is not None and len(seen) == 1


@pytest.fixture
def encoder_in_a_wrapper():
    """An encoder in DistributedDataParallel, and the passes that go through the wrapper."""
    seen = []

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

        def forward(self, x):
            seen.append(x)
            return self.module(x)

    return Wrapper(cem.NonParametricCEM("resnet18", width=4)), seen


def test_directions():
    g = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert torch.equal(cem.DIRECTIONS["none"](g), g)
    assert torch.equal(cem.DIRECTIONS["linf"](g), g.sign())
    for scale in (1, 1e-30, 1e30):  # squares underflow, overflow
        found = cem.DIRECTIONS["l2"](scale * g)
        torch.testing.assert_close(found, torch.tensor([[0.6, -0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_iterate_stays_inside_ball_and_box(norm, model, batch):
    x, y = batch
    eps, seen = 0.3, []
    attack = cem.potential("ce", model, y)

    def watched(z):
        seen.append(z.detach().clone())
        return attack(z)

    seen.append(
        cem.pgd(
            watched,
            x,
            eps=eps,
            norm=norm,
            step_size=0.2,
            steps=8,
            generator=torch.Generator().manual_seed(3),
        )
    )
    assert len(seen) == 9
    for z in seen:
        delta = (z - x).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert size.max() <= eps * (1 + 1e-6) and z.min() >= 0 and z.max() <= 1
    assert (attack(seen[-1]) > attack(x)).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_start_is_uniform_in_the_ball(norm):
    n, d, eps = 20_000, 4, 0.2
    x, seen = torch.full((n, d), 0.5), []

    def flat(z):
        seen.append(z.detach())
        return 0 * z.sum(1)

    cem.pgd(flat, x, eps=eps, norm=norm, steps=1, generator=torch.Generator().manual_seed(0))
    delta = seen[0] - x
    radius = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    # the share of a uniform ball's volume inside radius r is (r / eps)^d: uniform in [0, 1]
    share = (radius / eps) ** d
    assert 0 <= share.min() and share.max() <= 1 + 1e-5
    assert abs(share.mean().item() - 0.5) < 4 / math.sqrt(12 * n)
    assert delta.mean(0).abs().max() < 4 * eps / math.sqrt(n)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_start_outside_of_the_ball_is_n_fgsm(norm):
    """One step of eps from noise of twice the radius, by hand; no projection (arXiv:2202.01181)."""
    x, eps, seen = torch.rand(50, 3, 8, 8, dtype=torch.float64), 0.1, []
    slope = torch.randn(3, 8, 8, dtype=torch.float64)

    def linear(z):
        seen.append(z.detach())
        return (z * slope).sum((1, 2, 3))

    options = dict(eps=eps, norm=norm, steps=1, step_size=eps, random_start=2)
    x_adv = cem.pgd(linear, x, **options, generator=torch.Generator().manual_seed(0))
    step = slope.sign() if norm == "linf" else slope / slope.norm()
    torch.testing.assert_close(x_adv, (seen[0] + eps * step).clamp(0, 1), rtol=0, atol=1e-12)
    x = torch.full_like(x, 0.5)  # where nothing is clipped
    cem.pgd(linear, x, **options, generator=torch.Generator().manual_seed(0))
    start = (seen[1] - x).flatten(1)
    radius = start.norm(dim=1) if norm == "l2" else start.abs().amax(1)
    assert (radius > 1.8 * eps).all() and (radius <= 2 * eps * (1 + 1e-9)).all()


def cross_entropy(name, model, y):
    """A plain callable, which does not know its model."""
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


class FailsAt(nn.Module):
    """A classifier with BatchNorm whose forward records its mode and raises at one call."""

    def __init__(self, call=None):
        super().__init__()
        self.net = cem.ParametricCEM("resnet18", 5, width=4)
        self.call = call
        self.modes = []

    def forward(self, x):
        self.modes.append({m.training for m in self.net.modules()})
        if len(self.modes) == self.call:
            raise ZeroDivisionError
        return self.net(x)


@pytest.mark.parametrize("fails_at", [None, 2])
@pytest.mark.parametrize("make, given", [(cem.potential, False), (cross_entropy, True)])
def test_attack_leaves_the_model_as_it_was(fails_at, make, given, batch):
    x, y = batch
    model = FailsAt(fails_at).train()
    model.net.net.layer2.eval()
    model.net.net.fc.weight.requires_grad_(False)
    F.cross_entropy(model.net(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    modes = {k: m.training for k, m in model.named_modules()}
    needs = {k: p.requires_grad for k, p in model.named_parameters()}
    attack, options = make("ce", model, y), {"model": model} if given else {}
    if fails_at:
        with pytest.raises(ZeroDivisionError):
            cem.pgd(attack, x, eps=0.5, steps=3, **options)
    else:
        cem.pgd(attack, x, eps=0.5, steps=3, **options)
    assert all(mode == {False} for mode in model.modes) and len(model.modes) == (fails_at or 3)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert modes == {k: m.training for k, m in model.named_modules()}
    assert needs == {k: p.requires_grad for k, p in model.named_parameters()}
    for k, p in model.named_parameters():
        assert (p.grad is None) == (grads[k] is None)
        assert p.grad is None or torch.equal(p.grad, grads[k])


def test_attack_computes_no_weight_gradients(model, batch):
    """Not even of a network that is not frozen: autograd.grad asks for the images' alone."""
    x, y = batch
    called = []
    for parameter in model.parameters():
        parameter.register_hook(called.append)
    cem.pgd(cem.potential("ce", model, y), x, eps=0.5, steps=2)
    assert called == []
    F.cross_entropy(model(x), y).backward()
    assert len(called) == len(list(model.parameters()))


def test_ascent_in_one_thread_leaves_another_threads_network_alone(model, batch):
    """The other thread trains meanwhile: always in train mode, with gradients, and to the weights
    that it reaches alone."""
    x, y = batch
    alone = cem.ParametricCEM("resnet18", 5, width=4).train()
    trained = copy.deepcopy(alone)
    modes = []

    def train(network, steps=20):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            modes.append((network.net.bn1.training, network.net.conv1.weight.requires_grad))
            loss.backward()
            optimizer.step()

    train(alone)
    thread = threading.Thread(target=train, args=(trained,))
    potential, sampled = cem.potential("rcs", model.train(), y), []
    thread.start()
    while thread.is_alive() or not sampled:
        sampled.append(cem.ascend(potential, x, steps=3, step_size=0.1))
    thread.join()
    assert modes == [(True, True)] * 40
    for ours, expected in zip(trained.state_dict().values(), alone.state_dict().values()):
        assert torch.equal(ours, expected)
    assert all(torch.equal(image, sampled[0]) for image in sampled)


def test_positives_are_embedded_once_per_ascent_by_the_network_of_that_moment(batch):
    x, _ = batch
    model = perturb(cem.NonParametricCEM("resnet18", embed_dim=6, width=4)).eval()
    positives = (x + 0.1).clamp(0, 1)
    potential = cem.potential("pgd", model, positives)
    forward, calls = model.forward, []
    model.forward = lambda images: calls.append(len(images)) or forward(images)
    climb = dict(steps=3, step_size=0.1)
    first = cem.ascend(potential, x, **climb)
    assert len(calls) == 1 + 3
    with torch.no_grad():  # an optimiser step
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = cem.ascend(potential, x, **climb)
    anew = cem.ascend(cem.potential("pgd", model, positives), x, **climb)
    assert torch.equal(second, anew) and not torch.equal(second, first)


def test_attack_works_under_no_grad(model, batch):
    x, y = batch
    potential = cem.potential("rcs", model, y)
    with torch.no_grad():
        better = cem.ascend(potential, x, steps=3, step_size=0.2)
        assert not better.requires_grad and (potential(better) > potential(x)).all()


@pytest.mark.parametrize("norm, eps, alpha", [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.1)])
def test_pgd_agrees_with_torchattacks(norm, eps, alpha, model, batch):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    x, y = batch
    # float64: in float32 the sign of a gradient near 0 is decided by the order of summation
    x, model = x.double(), model.double()
    peer = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm](
        model, eps=eps, alpha=alpha, steps=10, random_start=False
    )
    theirs = peer(x, y)
    ours = cem.pgd(
        cem.potential("ce", model, y),
        x,
        eps=eps,
        norm=norm,
        step_size=alpha,
        steps=10,
        random_start=False,
    )
    assert (ours - x).abs().max() > 0.9 * alpha / 10  # both moved
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5)


def test_a_ball_needs_a_norm(batch):
    with pytest.raises(cem.CEMError, match="a ball of radius eps needs norm"):
        cem.ascend(lambda x: x.sum((1, 2, 3)), batch[0], steps=1, step_size=1, norm="none", eps=1)


@pytest.mark.parametrize(
    "spoil, part",
    [
        (lambda x: (255 * x).byte(), "divide uint8 images by 255"),
        (lambda x: 255 * x, r"must be finite and in \[0, 1\], not \["),
        (lambda x: (x - 0.5) / 0.25, "models normalise images themselves"),
        (lambda x: x.log() - torch.inf, "must be finite"),
        (lambda x: x * torch.nan, "must be finite"),
        (lambda x: 0.5, "batch of floating-point images"),
    ],
)
def test_attack_and_ascent_refuse_what_is_no_batch_of_images(spoil, part, model, batch):
    x, y = batch
    potential = cem.potential("ce", model, y)
    with pytest.raises(cem.CEMError, match=part):
        cem.pgd(potential, spoil(x), eps=0.5)
    with pytest.raises(cem.CEMError, match=part):
        cem.ascend(potential, spoil(x), steps=1, step_size=0.1)


@pytest.mark.parametrize(
    "potential, part",
    [
        (lambda x: x.sum(), r"must be \(N,\), not \[\]"),
        (lambda x: x.sum((2, 3)), r"must be \(N,\), not \[6, 3\]"),
        (lambda x: x.sum((1, 2, 3))[:5], r"must be \(N,\), not \[5\]"),
        (lambda x: x.detach().sum((1, 2, 3)), "has no gradient"),
        (torch.inference_mode()(lambda x: x.sum((1, 2, 3))), "has no gradient"),
    ],
)
def test_a_potential_has_one_number_per_image_and_a_gradient(potential, part, batch):
    with pytest.raises(cem.CEMError, match=part):
        cem.ascend(potential, batch[0], steps=1, step_size=0.1)


def test_a_potential_may_have_a_model_that_is_no_module(model, batch):
    x, y = batch
    climbed = cem.ascend(cem.Potential("rcs", lambda x: model(x), y), x, steps=1, step_size=0.1)
    expected = cem.ascend(cem.Potential("rcs", model, y), x, steps=1, step_size=0.1)
    assert torch.equal(climbed, expected)


def test_a_model_refuses_images_of_other_channels(model, batch):
    x = batch[0]
    for wrong in (x[:, :1], x[0], (255 * x).byte()):
        with pytest.raises(cem.CEMError, match=r"images must be floats \(N, 3, H, W\)"):
            model.features(wrong)


def test_labels_fit_the_head_as_it_is(model):
    y = torch.tensor([6, 0])
    with pytest.raises(cem.CEMError, match=r"labels must be in \[0, 5\)"):
        cem.potential("ce", model, y)
    model.net.fc = nn.Linear(model.net.out_features, 7)
    cem.potential("ce", model, y)


def test_legitimate_edge_cases_work(model, batch):
    """No images, no steps, expanded and non-contiguous images, float64."""
    x, y = batch
    nothing = cem.pgd(cem.potential("ce", model, y[:0]), x[:0], eps=0.5)
    assert nothing.shape == (0, 3, 8, 8)
    copied = cem.ascend(cem.potential("cs", model, y), x, steps=0, step_size=0.1)
    assert torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
    expanded, transposed = x[:1].expand(6, -1, -1, -1), x.transpose(2, 3)
    for images in (expanded, transposed):
        before = images.clone()
        cem.pgd(cem.potential("ce", model, y), images, eps=0.5, steps=2)
        assert torch.equal(images, before)
    double = cem.pgd(cem.potential("ce", model.double(), y), x.double(), eps=0.5, steps=2)
    assert double.dtype == torch.float64


def test_generators_one_an_image_make_images_independent_of_the_batch(model, batch):
    x, y = batch
    x = x.double()
    model = model.double()

    def run(rows):
        generators = [torch.Generator().manual_seed(i) for i in range(6)[rows]]
        climb = dict(steps=3, step_size=0.1, noise=0.05)
        return cem.ascend(
            cem.potential("cs", model, y[rows]), x[rows], **climb, generator=generators
        )

    whole = run(slice(0, 6))
    torch.testing.assert_close(
        torch.cat([run(slice(0, 2)), run(slice(2, 6))]), whole, rtol=0, atol=1e-9
    )


# ------------------------------------------------------------------------------------------- seeds


def gaussian_images(n=4000):
    """Two classes of 1x2x3 images with different, full covariances, well inside [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = torch.empty(n, 1, 2, 3)
    for k in range(2):
        a = 0.02 * torch.randn(6, 6, generator=generator)
        images[labels == k] = (
            0.4 + 0.2 * k + torch.randn(n // 2, 6, generator=generator) @ a.T
        ).view(-1, 1, 2, 3)
    return images.clamp(0, 1), labels


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_seeds_have_the_fitted_mean_and_covariance(k, per_image):
    images, labels = gaussian_images()
    seeds = cem.GaussianSeeds.fit(images, labels)
    n = 20_000
    generator = (
        [torch.Generator().manual_seed(i) for i in range(n)]
        if per_image
        else torch.Generator().manual_seed(1)
    )
    x = seeds.sample(n if k == 2 else torch.full((n,), k), generator).flatten(1).double()
    data = (images if k == 2 else images[labels == k]).flatten(1).double()
    mu, sigma = data.mean(0), data.T.cov()
    scale = sigma.diagonal().sqrt()
    # sampling errors: σ / √n of a mean, √((σ_ij² + σ_ii σ_jj) / n) of a covariance;
    # 5 of them, for 27 comparisons
    assert ((x.mean(0) - mu).abs() < 5 * scale / math.sqrt(n)).all()
    error = ((sigma.square() + torch.outer(scale, scale).square()) / n).sqrt()
    assert ((x.T.cov() - sigma).abs() < 5 * error).all()


def test_low_rank_seeds_keep_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    images = (
        0.5
        + 0.02 * torch.randn(200, 3, generator=generator) @ torch.randn(3, 192, generator=generator)
    ).view(200, 3, 8, 8)
    labels = torch.zeros(200, dtype=torch.int64)
    exact, low = (cem.GaussianSeeds.fit(images, labels, rank) for rank in (None, 3))
    assert low.factor.shape == (2, 192, 3)
    for k in range(2):  # the data have rank 3, so nothing is lost
        torch.testing.assert_close(
            low.factor[k] @ low.factor[k].T, exact.factor[k] @ exact.factor[k].T, rtol=0, atol=1e-5
        )


def test_the_cosine_transform_is_scipys_of_rotated_channels():
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    x = torch.rand(4, 3, 8, 6, dtype=torch.float64)
    rotated = torch.einsum("dc,nchw->ndhw", rotation, x)
    expected = torch.from_numpy(scipy.fft.dctn(rotated.numpy(), axes=(2, 3), norm="ortho"))
    ours = cem._cosine(x, rotation)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(cem._cosine(ours, rotation, inverse=True), x)


def smooth_images(n, channels):
    """Two classes of images with correlated channels and a falling spectrum, inside [0, 1]."""
    generator = torch.Generator().manual_seed(channels)
    noise = torch.randn(n, channels, 16, 16, generator=generator)
    i = torch.arange(16.0)
    noise = noise / (1 + i[:, None].square() + i.square())
    mix = torch.randn(channels, channels, generator=generator)
    x = torch.from_numpy(scipy.fft.idctn(noise.numpy(), axes=(2, 3), norm="ortho"))
    x = torch.einsum("dc,nchw->ndhw", mix, x) * (1 + torch.arange(n) % 2).view(-1, 1, 1, 1)
    return (0.5 + 0.1 * x / x.std()).clamp(0, 1), torch.arange(n) % 2


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_low_rank_seeds_have_the_variance_and_the_spectrum_of_the_images(channels, k):
    images, labels = smooth_images(4000, channels)
    seeds = cem.GaussianSeeds.fit(images, labels, rank=8)
    n = 10_000
    x = seeds.sample(n if k == 2 else torch.full((n,), k), torch.Generator().manual_seed(0))
    data = images if k == 2 else images[labels == k]
    mean = data.mean(0)
    ratio = x.var(0).mean((1, 2)) / data.var(0).mean((1, 2))
    assert ((ratio - 1).abs() < 0.05).all(), ratio
    spectra = [cem._cosine(z - mean, seeds.channels).square().mean(0) for z in (x, data)]
    ratio = spectra[0] / spectra[1]
    assert (ratio - 1).abs().mean() < 0.05 and (ratio - 1).abs().max() < 0.2, ratio


def test_fitting_seeds_leaves_the_random_state_alone(monkeypatch):
    """That of CUDA too, which torch.manual_seed would set."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds CUDA"))
    images, before = torch.rand(40, 3, 8, 8), torch.get_rng_state()
    cem.GaussianSeeds.fit(images, torch.arange(40) % 2, rank=2)  # randomised
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_need_two_images_a_class_and_known_labels():
    images, labels = gaussian_images(100)
    with pytest.raises(cem.CEMError, match="class 2 has 0 images"):
        cem.GaussianSeeds.fit(images, labels, num_classes=3)
    with pytest.raises(cem.CEMError, match="labels must be in"):
        cem.GaussianSeeds.fit(images, labels).sample(torch.tensor([2]))


# ------------------------------------------------------------------------------------- checkpoints


def test_save_and_load_give_the_same_model(tmp_path, model, batch):
    x, _ = batch
    seeds = cem.GaussianSeeds.fit(*gaussian_images(100))
    cem.save(
        tmp_path / "a" / "m.pt", model, seeds=seeds.state_dict(torch.float32), classes=["a", "b"]
    )
    loaded = cem.load(tmp_path / "a" / "m.pt")
    assert torch.equal(loaded(x), model(x)) and not loaded.training
    assert loaded.extra["classes"] == ["a", "b"]
    again = cem.GaussianSeeds.from_state_dict(loaded.extra["seeds"])
    assert torch.equal(again.factor, seeds.factor) and again.shape == (1, 2, 3)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["m.pt"]


def test_half_precision_saves_half_the_bytes_and_three_digits(tmp_path, model, batch):
    cem.save(tmp_path / "full.pt", model)
    cem.save(tmp_path / "half.pt", copy.deepcopy(model).half())
    assert (tmp_path / "half.pt").stat().st_size < 0.8 * (tmp_path / "full.pt").stat().st_size
    loaded = cem.load(tmp_path / "half.pt")
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(
        loaded(batch[0]), model(batch[0]), rtol=2e-2, atol=2e-3
    )  # 2^-11 a weight, over 20 layers


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, model):
    path = tmp_path / "m.pt"
    cem.save(path, model)
    before = path.read_bytes()
    with mock.patch("torch.save", side_effect=OSError("disk full")):
        with pytest.raises(OSError, match="cannot write .*m.pt: disk full"):
            cem.save(path, model)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    "value, part",
    [
        (np.zeros(3), r"\['extra'\]\['x'\] is a ndarray"),
        ([1, {"a": print}], r"\['extra'\]\['x'\]\[1\]\['a'\] is a builtin"),
        (np.mean([1, 2]), r"\['extra'\]\['x'\] is a float64"),  # a subclass of float
        ({np.int64(3): 1}, r"a key of the checkpoint\['extra'\]\['x'\] is a int64"),
    ],
)
def test_save_refuses_extras_that_load_would_not_read(value, part, tmp_path, model):
    with pytest.raises(cem.CEMError, match=part):
        cem.save(tmp_path / "m.pt", model, x=value)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_configuration_that_load_would_not_read(tmp_path):
    with pytest.raises(cem.CEMError, match=r"\['config'\]\['num_classes'\] is a int64"):
        cem.save(tmp_path / "m.pt", cem.ParametricCEM(num_classes=np.int64(3), width=4))


def test_the_channels_of_seeds_are_decorrelated():
    mix = torch.tensor([[1.0, 0.8, 0.1], [0.0, 0.5, 0.3], [0.0, 0.0, 0.2]])
    images = torch.einsum("cd,ndhw->nchw", mix, torch.rand(200, 3, 8, 8)) / 2
    channels = cem.GaussianSeeds.fit(images, torch.zeros(200, dtype=torch.int64), 4).channels
    centred = (images - images.mean(0)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels @ channels.T, torch.eye(3), rtol=0, atol=1e-5)
    rotated = channels @ centred.cov() @ channels.T
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-5 * rotated.max()


def test_seeds_of_large_images_need_little_memory():
    """One contraction over all axes would need 9 x 192⁴ numbers."""
    images = torch.rand(4, 3, 192, 192)
    seeds = cem.GaussianSeeds.fit(images, torch.zeros(4, dtype=torch.int64), rank=1)
    assert seeds.sample(1).shape == (1, 3, 192, 192)


def test_a_changed_temperature_is_saved(tmp_path):
    model = cem.NonParametricCEM("resnet18", embed_dim=8, width=4)
    model.temperature = 0.07
    cem.save(tmp_path / "m.pt", model)
    assert cem.load(tmp_path / "m.pt").temperature == 0.07 and model.config["temperature"] == 0.3


def test_a_signal_in_a_save_is_not_reported_as_a_full_disk(tmp_path, model, monkeypatch):
    """torch.save turns what its file raises into a RuntimeError."""

    def interrupted(content, file):
        try:
            raise KeyboardInterrupt(15)
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos")  # noqa: B904

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cem.save(tmp_path / "m.pt", model)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_reason_also_while_another_error_is_handled(tmp_path, model):
    with mock.patch("torch.save", side_effect=OSError("disk full")):
        try:
            raise ValueError("loss is nan")
        except ValueError:
            with pytest.raises(OSError, match="cannot write .*m.pt: disk full"):
                cem.save(tmp_path / "m.pt", model)


class Subclass(cem.ParametricCEM):
    pass


def test_save_refuses_what_load_could_not_rebuild(tmp_path, model):
    """A subclass, a folded copy, a replaced layer: refused with advice, and nothing is written."""
    replaced = copy.deepcopy(model)
    replaced.net.fc = nn.Linear(replaced.net.out_features, 7)
    for network in (Subclass("resnet18", 3, width=4), cem.folded(model), replaced, nn.Linear(2, 3)):
        with pytest.raises(cem.CEMError, match="torch.save its state_dict"):
            cem.save(tmp_path / "m.pt", network)
    assert list(tmp_path.iterdir()) == []


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_load_refuses_what_is_no_checkpoint(tmp_path, model):
    good = tmp_path / "good.pt"
    cem.save(good, model)
    bad = {
        "cut.pt": good.read_bytes()[: good.stat().st_size // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"format": "cem", "kind": "ParametricCEM"}, tmp_path / "fields.pt")
    config = {**model.config, "num_classes": 9}
    torch.save(
        {
            "format": "cem",
            "kind": "ParametricCEM",
            "config": config,
            "state": model.state_dict(),
            "extra": {},
        },
        tmp_path / "shape.pt",
    )
    torch.save({"x": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    for name in [*bad, "list.pt", "fields.pt", "shape.pt", "hostile.pt", "missing.pt"]:
        with pytest.raises(cem.CEMError) as error:
            cem.load(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_links_folders_and_pipes_are_never_replaced_by_a_file(tmp_path, model):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for name in ("link", "dangling", "folder", "pipe"):
        with pytest.raises(OSError, match="not a regular file"):
            cem.save(tmp_path / name, model)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_noise_does_not_lead_out_of_the_ball(norm):
    x = torch.full((200, 4), 0.5)
    options = dict(steps=3, step_size=0.1, norm=norm, noise=1.0, eps=0.1)
    delta = cem.ascend(lambda z: z.sum(1), x, **options) - x
    size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert size.max() <= 0.1 * (1 + 1e-5)


def test_a_tensor_subclass_is_not_saved(tmp_path):
    """torch.load would refuse it, and with it the whole file."""
    image = tv_tensors.Image(torch.rand(3, 8, 8))
    with pytest.raises(cem.CEMError, match="is a Image, which load does not read"):
        cem.save(tmp_path / "a.pt", cem.ParametricCEM(width=4), image=image)
    assert not list(tmp_path.iterdir())
