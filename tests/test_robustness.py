"""JEM, JEAT and robust evaluation, against float64 definitions, closed forms, torchattacks and
AutoAttack."""

import contextlib
import copy
import functools
import hashlib
import inspect
import itertools
import json
import math
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_refused, files, read_log, script, succeeded
from PIL import Image
from test_cem import Active
from test_data import write_folder
from torch import nn

import cem
import eval_robust
import train_sup
from lib import augment, cli, data, distributed, interop, loop, metrics, options, robustness
from lib.chains import ReplayBuffer

# ---------------------------------------------------------------------------------------- losses


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def lse(logits):
    sums = [sum(math.exp(v) for v in row) for row in logits.tolist()]
    return torch.tensor([math.log(s) for s in sums], dtype=torch.float64)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("name", ["jem", "jeat"])
def test_energy_based_losses_equal_their_definitions(name, weight, model64, batch):
    x, y = batch[0].double(), batch[1]
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    x_s = torch.rand_like(x)
    with torch.no_grad():
        f = model64(x if name == "jem" else x_adv)
        f_s = model64(x_s)
    cross_entropy = (lse(f) - f.gather(1, y[:, None]).squeeze(1)).mean()
    expected = cross_entropy + weight * (lse(f_s).mean() - lse(f).mean())
    loss, logits = cem.supervised_loss(name, model64, x, y, x_adv, weight, x_s)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(logits, f, rtol=0, atol=1e-12)


def test_jeat_without_attack_is_jem_to_the_last_bit(model, batch):
    x, y = batch
    x_s = torch.rand_like(x)
    results = []
    for name in ("jem", "jeat"):
        network = copy.deepcopy(model).train()
        x_adv = None
        if name == "jeat":  # a ball of radius 0 is a point
            x_adv = cem.pgd(cem.potential("joint", network, y), x, eps=0.0, steps=2)
        loss, _ = cem.supervised_loss(name, network, x, y, x_adv, 1.0, x_s)
        results.append([loss, *gradients(network, loss), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


class NormOfFirst(torch.nn.Module):
    """BatchNorm written out: normalises by the mean and variance of a batch's first n images."""

    def __init__(self, norm, n):
        super().__init__()
        self.norm = norm
        self.n = n

    def forward(self, x):
        mean = x[: self.n].mean((0, 2, 3), keepdim=True)
        variance = (x[: self.n] - mean).square().mean((0, 2, 3), keepdim=True)
        weight, bias = self.norm.weight[:, None, None], self.norm.bias[:, None, None]
        return weight * (x - mean) / (variance + self.norm.eps).sqrt() + bias


def test_samples_are_normalised_by_the_statistics_of_the_data(model64, batch):
    """Loss and gradients equal BatchNorm written out; running statistics and logits are those of
    the data alone."""
    x, y = batch[0].double(), batch[1]
    x_s = torch.rand_like(x)
    network = model64.train()
    alone, written_out = copy.deepcopy(network), copy.deepcopy(network)
    for module in list(written_out.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, NormOfFirst(child, len(x)))
    loss, logits = cem.supervised_loss("jem", network, x, y, None, 0.5, x_s)
    f, f_s = written_out(torch.cat([x, x_s])).chunk(2)
    expected = F.cross_entropy(f, y) + 0.5 * (f_s.logsumexp(1).mean() - f.logsumexp(1).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for ours, theirs in zip(gradients(network, loss), gradients(written_out, expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(logits, alone(x), rtol=0, atol=1e-12)
    for ours, theirs in zip(network.buffers(), alone.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize(
    "norm", [torch.nn.BatchNorm2d(3, affine=False), torch.nn.SyncBatchNorm(3), Active(3)]
)
def test_jem_refuses_norms_whose_samples_it_cannot_normalise(norm, batch):
    x, y = batch
    network = torch.nn.Sequential(norm, torch.nn.Flatten(), torch.nn.LazyLinear(5))
    network(x)
    with pytest.raises(cem.CEMError, match="jem and jeat need plain BatchNorm2d with weights"):
        cem.supervised_loss("jem", network.train(), x, y, x_s=x)
    cem.supervised_loss("jem", network.eval(), x, y, x_s=x)


def test_jem_normalises_by_the_frames_of_the_data(batch):
    """Where a network folds frames into the batch. A forward of the user's is not overwritten."""

    class Video(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5),
            )  # fmt: skip

        def forward(self, x):
            return self.net(x.flatten(0, 1)).view(len(x), -1, 5).mean(1)

    x, y = batch[0][:, None].expand(-1, 3, -1, -1, -1) ** torch.rand(6, 3, 1, 1, 1), batch[1]
    model = Video().train()
    _, logits = cem.supervised_loss("jem", model, x, y, x_s=x[:4] ** 4)
    torch.testing.assert_close(logits, model(x))
    norm = model.net[1]
    norm.forward = functools.partial(type(norm).forward, norm)
    with pytest.raises(cem.CEMError, match="plain BatchNorm2d"):
        cem.supervised_loss("jem", model, x, y, x_s=x)
    assert "forward" in vars(norm)


def test_sgld_climbs_the_function_that_the_loss_sees(model64, batch):
    """In eval mode, the copy's logits are those of the training model on a batch that begins with
    the data."""
    x = batch[0].double()
    x_s = torch.rand_like(x)
    network = model64.train()
    before = copy.deepcopy(network.state_dict())
    climbed = train_sup.with_statistics_of(x, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    with torch.no_grad(), cem._batch_statistics_of_first(len(x), 2 * len(x), network):
        seen = network(torch.cat([x, x_s]))
    for images, logits in zip((x, x_s), seen.chunk(2)):
        torch.testing.assert_close(climbed(images), logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(cem.folded(climbed)(images), logits, rtol=0, atol=1e-10)


def spy(owner, name):
    """Record the calls of a function while it does its work."""
    return mock.patch.object(owner, name, wraps=getattr(owner, name))


@pytest.mark.parametrize(
    "name, padding", [("at", "constant"), ("jem", "reflect"), ("jeat", "reflect")]
)
def test_a_training_step_pads_and_samples_as_its_loss_needs(name, padding):
    train_set = data.load("digits", "train")
    generator = distributed.RankGenerator(0, torch.device("cpu"))
    model = cem.ParametricCEM("resnet18", 10, width=8, in_channels=1).train()
    buffer = None if name == "at" else ReplayBuffer(16, (1, 8, 8))
    opt = train_sup.Options(loss=name, attack_steps=1, sgld_steps=1, precision="float32")
    batch_loss = train_sup.make_batch_loss(opt, train_set, buffer)
    with (
        spy(augment, "crop_flip") as crop,
        spy(train_sup, "with_statistics_of") as statistics,
        spy(cem, "supervised_loss") as loss,
        spy(cem, "potential") as potential,
    ):
        _, metrics = batch_loss(model, torch.arange(8), torch.rand(8, 3), generator)
    climbed = {"at": ["ce"], "jem": ["langevin"], "jeat": ["joint", "langevin"]}[name]
    assert [call.args[0] for call in potential.call_args_list] == climbed
    assert crop.call_args.kwargs["padding"] == padding
    assert crop.call_args.kwargs["flip"] is False  # of digits
    _, _, x, _, x_adv, weight, x_s = loss.call_args.args
    assert weight == 0.1
    if buffer is None:
        assert statistics.call_count == 0
        assert x_s is None
    else:
        assert statistics.call_count == 1
        assert x_s is not None
        seen = x if name == "jem" else x_adv
        assert torch.equal(statistics.call_args.args[0], seen)
        with torch.no_grad(), cem._batch_statistics_of_first(len(x), 2 * len(x), model):
            lse, lse_s = model(torch.cat([seen, x_s])).logsumexp(1).chunk(2)
        gap = (lse - lse_s).mean().item()  # E(x_s) - E(x)
        assert metrics["energy_gap"].item() == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize("name", ["jem", "jeat"])
def test_every_parameter_learns_under_autocast(name, model, batch):
    x, y = batch
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = cem.supervised_loss(name, model.train(), x, y, x, 1.0, torch.rand_like(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ------------------------------------------------------------------------ SGLD and replay buffer


def test_sgld_defaults_are_those_of_jem(model64, batch):
    """JEM's step size 1 and noise 0.01 are for pixels v = 2 x - 1 in [-1, 1]: one step from the
    same point, without noise and with the same ξ, gives the same image."""
    x = batch[0].double()
    log_p = cem.potential("langevin", model64)
    opt = train_sup.Options()

    def step(potential, x, **options):
        generator = torch.Generator().manual_seed(0)
        once = dict(steps=1, norm="none", model=model64, generator=generator)
        return cem.ascend(potential, x, **once, **options)

    for jem_noise, noise in ((0.0, 0.0), (0.01, opt.sgld_noise)):
        jem = dict(step_size=1.0, noise=jem_noise, clip=(-1, 1))
        v_s = step(lambda v: log_p((v + 1) / 2), 2 * x - 1, **jem)
        x_s = step(log_p, x, step_size=opt.sgld_step_size, noise=noise)
        torch.testing.assert_close(x_s, (v_s + 1) / 2, rtol=0, atol=1e-12)
        assert (x_s - x).abs().max() > 1e-3


def bowl(x):
    """A Gaussian log-density around 0.5 of precision 9."""
    return -0.5 * 9 * (x - 0.5).square().flatten(1).sum(1)


def test_chains_persist_and_reach_the_stationary_distribution():
    """SGLD x ← x - α k (x - μ) + σ ξ in a bowl of stiffness k is an AR(1) process: its variance is
    σ² / (1 - (1 - α k)²)."""
    alpha, sigma = 0.02, 0.05
    q = 1 - 9 * alpha
    variance = sigma**2 / (1 - q**2)
    buffer = ReplayBuffer(4000, (1, 2, 2), reinit=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):  # 80 steps in all, which leave q^160 of the initial variance
        buffer.sample(bowl, 4000, generator, steps=10, step_size=alpha, noise=sigma)
    x = buffer.images.float()
    n = x.numel()
    # 4 standard errors, and the rounding of half precision
    assert abs(x.mean().item() - 0.5) < 4 * math.sqrt(variance / n) + 2**-11
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / n) + 0.01


def test_buffer_draws_distinct_chains_and_stores_them_again():
    buffer = ReplayBuffer(50, (1, 2, 2), reinit=0.0)
    generator = torch.Generator().manual_seed(0)
    before = buffer.images.clone()
    x = buffer.sample(bowl, 20, generator, steps=1, step_size=0.1)
    assert x.shape == (20, 1, 2, 2)
    assert not x.requires_grad
    changed = (buffer.images != before).flatten(1).any(1)
    assert changed.sum() == 20
    pairs = buffer.images[changed][:, None] == x.half()[None]
    found = pairs.flatten(2).all(2)
    assert found.any(1).all()
    assert found.any(0).all()
    assert len(buffer.sample(bowl, 50, generator, steps=1, step_size=0.1)) == 50


@pytest.mark.parametrize("reinit", [0.0, 0.3, 1.0])
def test_chains_start_anew_with_the_given_probability(reinit):
    buffer = ReplayBuffer(4000, (1, 1, 1), reinit, lambda n, _: torch.full((n, 1, 1, 1), 0.25))
    buffer.images.fill_(0.75)
    generator = torch.Generator().manual_seed(0)
    x = buffer.sample(lambda x: 0 * x.sum((1, 2, 3)), 4000, generator, steps=1, step_size=0.1)
    fresh = (x == 0.25).float().mean().item()
    assert abs(fresh - reinit) <= 4 * math.sqrt(reinit * (1 - reinit) / 4000)


def test_buffer_starts_from_noise_or_gaussian_seeds():
    x = ReplayBuffer(3000, (1, 2, 2)).images.float()
    assert x.min() >= 0
    assert x.max() <= 1
    assert abs(x.mean() - 0.5) < 4 / math.sqrt(12 * x.numel())
    images = (0.3 + 0.05 * torch.randn(200, 1, 2, 2)).clamp(0, 1)
    seeds = cem.GaussianSeeds.fit(images, torch.zeros(200, dtype=torch.int64))
    x = ReplayBuffer(3000, (1, 2, 2), fresh=seeds.sample).images.float()
    assert abs(x.mean() - images.mean()) < 0.01
    assert abs(x.std() - images.std()) < 0.01


# --------------------------------------------------------------------------------- training runs


def test_a_resumed_run_continues_its_chains(tmp_path):
    options = "--dataset digits --width 8 --epochs 2 --batch-size 250 --n-eval 36 --attack-steps 1"
    options += " --loss jeat --sgld-steps 2 --buffer 300 --diagnose"
    options = [*options.split(), "--device", "cpu"]  # on which equality is bit for bit
    succeeded(script("train_sup.py", *options, "--out", "whole", cwd=tmp_path))
    options += ["--out", "parts"]
    done = succeeded(script("train_sup.py", *options, "--max-minutes", 1e-4, cwd=tmp_path))
    assert "--resume continues" in done.stdout
    succeeded(script("train_sup.py", *options, "--resume", cwd=tmp_path))
    whole, parts = (cem.load(tmp_path / run / "ckpt.pt") for run in ("whole", "parts"))
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    chains = whole.extra["training"]["chains"]["images"]
    assert chains.shape == (300, 1, 8, 8)
    assert torch.equal(chains, parts.extra["training"]["chains"]["images"])
    log = read_log(tmp_path / "parts")
    assert [line["epoch"] for line in log] == [1, 2]
    energies = "energy energy_gap E_x E_x_adv E_x_s consistency_norm contrastive_norm cosine"
    assert set(energies.split()) <= log[0].keys()


def test_a_diverged_run_stops_with_its_last_good_checkpoint(tmp_path):
    write_folder(tmp_path / "set", size=8)
    options = "--dataset set --arch resnet18 --width 8 --epochs 1 --loss jem --sgld-steps 2".split()
    options += "--batch-size 3 --buffer 6 --max-energy-gap 1e-6".split()
    done = script("train_sup.py", *options, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("error: ") == 1
    for part in ("energy gap is", "at step 1;", "--lr"):
        assert part in done.stderr
    steps = {}
    for name in ("ckpt", "diverged"):
        steps[name] = cem.load(tmp_path / f"runs/sup/{name}.pt").extra["training"]["step"]
    assert steps == {"ckpt": 0, "diverged": 2}
    assert loop.MAX_RESTARTS == 8
    with mock.patch.object(loop, "MAX_RESTARTS", 2):
        done = script("train_sup.py", *options, "--resume", "--on-diverge", "restart", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("of the learning rate") == 2  # no rate keeps a gap below 1e-6


def fit(folder, model, batch_loss, shuffle=None, **changes):
    """Train with batches of 2 of 40 images for the given loss."""
    opt = options.TrainOptions(out=str(folder), batch_size=2, ema=0.0, weight_decay=0.0, **changes)
    trainer = loop.Trainer(
        opt,
        model,
        40,
        shuffle=shuffle or (lambda epoch: (torch.arange(40), torch.zeros(40, 1))),
        batch_loss=batch_loss,
        measure=lambda model, epoch: {},
    )
    return trainer.fit()


def descend(folder, **changes):
    """Minimise ‖b‖² / 2 in the last layer's bias b, from b = 1. Rates above 2 diverge."""
    model = cem.ParametricCEM("resnet18", 2, width=4)
    model.net.fc.bias.data.fill_(1.0)

    def batch_loss(model, index, draws, generator):
        loss = 0.5 * model.net.fc.bias.square().sum()
        return loss, {"energy_gap": loss}

    options = dict(epochs=4, schedule="onecycle", lr=16.0, **changes)
    return fit(folder, model, batch_loss, **options)


def test_restart_halves_the_rate_until_the_run_converges(tmp_path, capsys):
    with pytest.raises(cli.Diverged, match=r"energy gap is .* at step \d+; its state is in"):
        descend(tmp_path / "stop")
    model = descend(tmp_path / "restart", on_diverge="restart")
    assert model.net.fc.bias.abs().max() < 0.5
    training = cem.load(tmp_path / "restart/ckpt.pt").extra["training"]
    assert training["step"] == 80
    assert 2 <= training["restarts"] <= 5
    assert "continuing from there at 0.5 of the learning rate" in capsys.readouterr().err
    assert [line["epoch"] for line in read_log(tmp_path / "restart")] == [1, 2, 3, 4]


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path):
    """No later loss shows them."""
    options = "--dataset digits --width 8 --loss st --epochs 1 --batch-size 1437 --lr 1e41".split()
    done = script("train_sup.py", *options, cwd=tmp_path)
    assert done.returncode == 3 and "the weights overflow at step 1" in done.stderr
    assert cem.load(tmp_path / "runs/sup/ckpt.pt").extra["training"]["step"] == 0


def test_epochs_have_their_own_order_and_are_logged_as_means(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    epochs, count = [], itertools.count()

    def batch_loss(model, *_):
        return 0 * model.net.fc.bias.sum(), {"count": torch.tensor(float(next(count)))}

    def shuffle(epoch):
        epochs.append(epoch)
        return torch.arange(40), torch.zeros(40, 1)

    model = cem.ParametricCEM("resnet18", 2, width=4)
    fit(tmp_path, model, batch_loss, shuffle=shuffle, epochs=2)
    assert epochs == [0, 1]
    assert [line["count"] for line in read_log(tmp_path)] == [9.5, 29.5]
    board = events.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("step/count")] == list(
        zip(range(1, 41), range(40))
    )
    assert [(e.step, e.value) for e in board.Scalars("count")] == [(20, 9.5), (40, 29.5)]


@pytest.mark.parametrize("start", ["gaussian", "noise"])
def test_the_replay_buffer_has_the_options(start, tmp_path):
    options = "--dataset digits --width 8 --loss jem --seed-rank 4 --max-minutes 1e-9".split()
    options += ["--buffer", 300, "--reinit", 0.3, "--reinit-from", start]
    with spy(train_sup, "ReplayBuffer") as made:
        succeeded(script("train_sup.py", *options, cwd=tmp_path))
    size, _, reinit, _ = made.call_args.args
    assert (size, reinit) == (300, 0.3)
    chains = cem.load(tmp_path / "runs/sup/ckpt.pt").extra["training"]["chains"]["images"]
    black = chains[..., 0].float().mean() < 0.1  # as is the first column of digits
    assert black == (start == "gaussian")


def test_a_gradient_that_is_not_finite_is_reported_with_its_step(tmp_path):
    calls = []

    def batch_loss(model, index, draws, generator):
        calls.append(index)
        bias = model.net.fc.bias
        if len(calls) < 3:
            return bias.square().sum(), {}
        return (bias - bias.detach()).abs().sqrt().sum(), {}  # 0, with an infinite slope

    model = cem.ParametricCEM("resnet18", 2, width=4)
    with pytest.raises(cli.Diverged, match="gradient norm is (nan|inf) at step 3"):
        fit(tmp_path, model, batch_loss, epochs=1)


# ------------------------------------------------------------------------- accuracy under attack


def settings(**changes):
    """The options that lib.robustness reads."""
    defaults = dict(norm="l2", eps=0.5, batch_size=128, precision="float32", seed=0)
    return SimpleNamespace(**defaults | changes)


def accuracy_under(name, model, n=0, **changes):
    test_set = data.load("digits", "test")
    return robustness.accuracy(model, test_set, [name], settings(**changes), n)[name]


@pytest.fixture(scope="module")
def robust_model(tmp_path_factory):
    """A classifier trained until PGD-20 leaves half of its predictions correct."""
    folder = tmp_path_factory.mktemp("robust")
    options = "--dataset digits --width 8 --epochs 8 --ema 0.5 --n-eval 1".split()
    succeeded(script("train_sup.py", *options, cwd=folder))
    return cem.folded(cem.load(folder / "runs/sup/ckpt.pt"))


@pytest.mark.parametrize("norm, eps", [("l2", 0.5), ("linf", 0.05)])
def test_pgd_20_accuracy_is_that_of_torchattacks(norm, eps, robust_model):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    peer = {"l2": torchattacks.PGDL2, "linf": torchattacks.PGD}[norm]
    test_set = data.load("digits", "test")
    x, y = test_set.pixels(), test_set.labels
    attack = peer(robust_model, eps=eps, alpha=2.5 * eps / 20, steps=20, random_start=False)
    theirs = (robust_model(attack(x, y)).argmax(1) == y).float().mean().item()
    with mock.patch.object(cem, "pgd", functools.partial(cem.pgd, random_start=False)):
        ours = accuracy_under("pgd-20", robust_model, norm=norm, eps=eps)
    assert 0.1 < theirs < 0.9
    assert abs(ours - theirs) <= 0.005  # one image of 360 is 0.0028


def test_pgd_does_not_stall_on_very_confident_networks(robust_model):
    """At 100 times the logits, 1 - p(y | x) and the gradient of the cross-entropy underflow."""
    confident = copy.deepcopy(robust_model)
    for parameter in confident.net.fc.parameters():
        parameter.mul_(100)
    accuracy = accuracy_under("pgd-20", robust_model, 120)
    assert accuracy_under("pgd-20", confident, 120) <= accuracy + 0.01
    cross_entropy = {"ce": lambda logits, y: -cem.log_posterior(logits, y)}
    with mock.patch.dict(cem.PARAMETRIC_ATTACKS, cross_entropy):
        assert accuracy_under("pgd-20", confident, 120) > accuracy + 0.1


@pytest.mark.slow
def test_worst_of_own_attacks_is_close_to_autoattack(robust_model):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    test_set = data.load("digits", "test")
    attacks = ["pgd-50", "margin"]
    own = robustness.accuracy(robust_model, test_set, attacks, settings(), n=20, restarts=8)
    with spy(robustness, "autoattack") as attack:
        standard = robustness.accuracy(robust_model, test_set, ["autoattack"], settings(), n=20)
    assert standard["autoattack"] == standard["adversarial_accuracy"]
    assert 0.1 < standard["autoattack"] < standard["clean_accuracy"]
    excess = own["adversarial_accuracy"] - standard["autoattack"]
    assert 0 <= excess <= 0.05 + 1e-6
    assert attack.call_count == 1
    correct = len(attack.call_args.args[1])  # the others are not attacked
    assert correct == round(20 * standard["clean_accuracy"])


def test_training_runs_sgld_with_its_options():
    opt = train_sup.Options(sgld_steps=3, sgld_step_size=0.2, sgld_noise=0.01)
    assert train_sup.sgld(opt) == dict(steps=3, step_size=0.2, noise=0.01)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_a_run_follows_its_schedule(schedule, tmp_path):
    def batch_loss(model, *_):
        return model.net.fc.bias.sum(), {}

    fit(
        tmp_path,
        cem.ParametricCEM("resnet18", 2, width=4),
        batch_loss,
        epochs=2,
        schedule=schedule,
        lr=0.1,
    )
    rates = [line["lr"] for line in read_log(tmp_path)]
    expected = [loop.learning_rate(step / 40, 0.1, schedule) for step in (19, 39)]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_a_restart_draws_anew_and_a_second_one_steps_back(tmp_path, capsys, monkeypatch):
    drawn, rates = [], []
    step = torch.optim.SGD.step

    def recorded(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)

    def batch_loss(model, index, draws, generator):
        drawn.append(torch.rand((), generator=generator.common).item())
        broken = 40 < len(drawn) <= 80  # the third epoch, twice
        return model.net.fc.bias.sum() * (torch.nan if broken else 1), {}

    fit(
        tmp_path,
        cem.ParametricCEM("resnet18", 2, width=4),
        batch_loss,
        epochs=4,
        on_diverge="restart",
        lr=1e-3,
    )
    shown = capsys.readouterr().err
    found = re.findall(r"ckpt.pt is from step (\d+): continuing from there at (\S+)", shown)
    assert found == [("40", "0.5"), ("20", "0.25")]
    assert drawn[40] != drawn[60]  # both are step 41
    assert len(set(drawn[:40])) == 40  # every step has its own
    options = dict(on_diverge="restart", lr=1e-3, resume=True)
    fit(tmp_path, cem.ParametricCEM("resnet18", 2, width=4), batch_loss, epochs=5, **options)
    assert cem.load(tmp_path / "ckpt.pt").extra["training"]["restarts"] == 2
    assert rates[-20] == pytest.approx(loop.learning_rate(0.8, 1e-3, "cosine") / 4)


def test_a_second_restart_steps_back_even_if_the_run_was_killed_between(tmp_path, capsys):
    steps, killed_at = [], 65

    def batch_loss(model, *_):
        steps.append(1)
        if len(steps) == killed_at:
            raise KeyboardInterrupt
        broken = 40 < len(steps) <= 85  # the third epoch, until it was twice measured
        return model.net.fc.bias.sum() * (torch.nan if broken else 1), {}

    options = dict(epochs=3, on_diverge="restart", lr=1e-3)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, cem.ParametricCEM("resnet18", 2, width=4), batch_loss, **options)
    fit(tmp_path, cem.ParametricCEM("resnet18", 2, width=4), batch_loss, resume=True, **options)
    found = re.findall(r"ckpt.pt is from step (\d+): continuing", capsys.readouterr().err)
    assert found == ["40", "20"]


def test_n_and_restarts_reach_the_attack_and_shares_have_their_intervals(digits_run, unsup_run):
    sizes = []

    def pgd(potential, x, **_):
        sizes.append(len(x))
        return x

    for folder, kind, name in ((digits_run, "sup", "accuracy"), (unsup_run, "unsup", "probe")):
        options = f"--ckpt runs/{kind}/ckpt.pt --n 40 --restarts 3 --attacks pgd-10 --out o".split()
        with mock.patch.object(cem, "pgd", pgd):
            succeeded(script("eval_robust.py", *options, cwd=folder))
        result = json.loads((folder / f"o/{name}.json").read_text())
        kept = round(40 * result["clean_accuracy"])
        assert sizes[-3:] == [kept] * 3 and result["pgd-10"] == result["clean_accuracy"]
        for key, n in {"pgd-10": 40, "knn_accuracy": 360}.items():
            if key in result:
                expected = metrics.interval(round(n * result[key]), n)
                assert result["intervals"][key] == pytest.approx(expected)


@pytest.mark.parametrize("norm, name", [("l2", "L2"), ("linf", "Linf")])
@pytest.mark.parametrize("classes, targets", [(3, 2), (10, 9), (100, 9)])
def test_autoattack_gets_the_options(norm, name, classes, targets, monkeypatch):
    made = []

    class AutoAttack:
        def __init__(self, model, **options):
            made.append((self, options))
            self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()
            self.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]

        def run_standard_evaluation(self, x, y, batch_size):
            return x.flip(0), y

    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=AutoAttack))
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    x = torch.rand(4, 3, 2, 2)
    y = network(x).argmax(1)
    found = robustness.autoattack(network, x, y, settings(norm=norm, eps=0.1, seed=3))
    assert torch.equal(found, network(x.flip(0)).argmax(1) == y)
    ((adversary, options),) = made
    assert options == dict(norm=name, eps=0.1, seed=3, device=x.device)
    assert adversary.apgd_targeted.n_target_classes == adversary.fab.n_target_classes == targets
    assert ("apgd-t" in adversary.attacks_to_run) == (classes > 3)


def test_attacks_and_constants_are_those_of_the_documentation():
    attacks = {"pgd-10": ("ce", 10), "pgd-20": ("ce", 20), "pgd-50": ("ce", 50)}
    assert robustness.ATTACKS == attacks | {"margin": ("margin", 50)}
    assert inspect.signature(robustness.knn_accuracy).parameters["k"].default == 200
    kid = inspect.signature(metrics.kernel_distances).parameters
    assert (kid["subsets"].default, kid["size"].default) == (100, 1000)


def test_autoattack_of_three_classes():
    """Without apgd-t, whose loss needs four. A linear network: the distances are known."""
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).requires_grad_(False)
    x = 0.3 + 0.4 * torch.rand(20, 3, 8, 8)
    logits, weight = network(x), network[1].weight
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    distance = (gaps / (weight[y][:, None] - weight).norm(dim=2)).nan_to_num(math.inf).amin(1)
    eps = distance.median().item()
    found = robustness.autoattack(network, x, y, settings(norm="l2", eps=eps))
    clear = (distance / eps - 1).abs() > 0.01
    assert torch.equal(found[clear], (distance > eps)[clear]) and 0 < found.sum() < 20


def test_the_ball_is_that_of_training_unless_given(digits_run, tmp_path):
    model = cem.load(digits_run / "runs/sup/ckpt.pt")
    trained = model.extra["options"] | {"norm": "linf", "eps": 0.1}
    cem.save(tmp_path / "ours.pt", model, **model.extra | {"options": trained})
    cem.save(tmp_path / "odd.pt", model, **model.extra | {"options": {"norm": "l7", "eps": 3.0}})
    torch.save(model.state_dict(), tmp_path / "other.pt")
    found = []
    for name, *given in (["ours.pt"], ["ours.pt", "--eps", 0.2], ["odd.pt"], ["other.pt"]):
        given += ["--n", 20, "--attacks", "pgd-10", "--dataset", "digits", "--out", name[:-3]]
        done = succeeded(script("eval_robust.py", "--ckpt", name, *given, cwd=tmp_path))
        found.append(done.stdout.split("of digits, ")[1].split(":")[0])
    assert found == ["linf eps 0.1", "linf eps 0.2", "l2 eps 0.5", "l2 eps 0.5"]
    for given, message in (
        (["--eps", 8], "--eps 8 with --norm linf allows any image: pass one such as 8/255"),
        (["--norm", "l2"], "--norm l2 needs --eps: its default is of the other norm"),
    ):
        done = script("eval_robust.py", "--ckpt", "ours.pt", *given, cwd=tmp_path)
        assert_refused(done, message)


def test_the_result_of_another_command_is_kept(digits_run, tmp_path):
    options = ["--ckpt", digits_run / "runs/sup/ckpt.pt", "--attacks", "pgd-10", "--out", "out"]

    def evaluate(n: int) -> str:
        return script("eval_robust.py", *options, "--n", n, cwd=tmp_path).stdout

    for n in (20, 20, 30, 40):
        assert ("kept" in evaluate(n)) == (n > 20)
    numbers = {
        path.name: json.loads(path.read_text())["n"] for path in (tmp_path / "out").iterdir()
    }
    assert numbers == {"accuracy-1.json": 20, "accuracy-2.json": 30, "accuracy.json": 40}


def test_results_are_written_before_they_are_printed(tmp_path):
    """A closed pipe must not cost them."""
    opt, test_set = eval_robust.Options(norm="l2", eps=0.5), data.load("digits", "test")
    with (
        mock.patch("builtins.print", side_effect=BrokenPipeError),
        contextlib.suppress(BrokenPipeError),
    ):
        eval_robust.report("a.json", "x.pt", tmp_path, test_set, opt, {"clean_accuracy": 0.5})
    assert json.loads((tmp_path / "a.json").read_text())["clean_accuracy"] == 0.5


def test_autoattack_without_its_library_says_what_to_install(digits_run):
    with mock.patch.dict("sys.modules", {"pyautoattack": None}):
        done = script("eval_robust.py", "--attacks", "autoattack", cwd=digits_run)
    assert_refused(done, "pip install pyautoattack")


def test_each_restart_attacks_what_is_left_from_a_new_start(monkeypatch):
    starts = []

    def pgd(potential, x, *, generator, **ball):
        """Finds an adversarial example of the first image."""
        starts.append((len(x), torch.rand((), generator=generator).item()))
        x = x.clone()
        x[0] = 1
        return x

    def model(x):
        bright = x.mean((1, 2, 3))
        return torch.stack([1 - bright, bright], 1)

    monkeypatch.setattr(cem, "pgd", pgd)
    x, y, generator = torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), torch.Generator()
    left = robustness.withstands("pgd-10", model, x, y, settings(), 3, generator, model)
    assert left.tolist() == [False, False, False, True]
    assert [n for n, _ in starts] == [4, 3, 2] and len({start for _, start in starts}) == 3


def test_the_worst_case_is_taken_image_by_image(model, batch):
    images = (255 * batch[0]).byte()
    six = data.Dataset("six", images, torch.zeros(6, dtype=torch.int64), list("01234"))
    six.labels = model(six.pixels()).argmax(1)
    survivors = {"pgd-10": torch.arange(6) < 4, "margin": torch.arange(6) % 2 == 0}

    def withstands(name, model, x, *_):
        return survivors[name][: len(x)]

    with mock.patch.object(robustness, "withstands", withstands):
        result = robustness.accuracy(model, six, ["pgd-10", "margin"], settings())
    counts = {name: round(6 * value) for name, value in result.items()}
    assert counts == {"clean_accuracy": 6, "pgd-10": 4, "margin": 3, "adversarial_accuracy": 2}


@pytest.mark.parametrize("attack, restarts", [("pgd-10", 1), ("margin", 2)])
def test_transfer_from_the_network_itself_is_the_white_box_attack(attack, restarts, robust_model):
    test_set = data.load("digits", "test")
    alone, both = (
        robustness.accuracy(robust_model, test_set, [attack], settings(), 30, restarts, source)
        for source in (None, robust_model)
    )
    assert both == alone | {f"transfer-{attack}": alone[attack]}


def test_attacks_of_an_untrained_network_transfer_badly(robust_model, capsys):
    source = cem.ParametricCEM("resnet18", 10, width=8, in_channels=1)
    test_set, attacks = data.load("digits", "test"), ["pgd-10", "pgd-20"]
    result = robustness.accuracy(robust_model, test_set, attacks, settings(), 100, source=source)
    for name in attacks:
        assert result[f"transfer-{name}"] > result[name] + 0.2
    least = min(result[name] for name in attacks)
    assert result["adversarial_accuracy"] <= least
    assert "warning" not in capsys.readouterr().err


def test_random_starts_do_not_depend_on_the_other_attacks(robust_model, monkeypatch):
    drawn = []

    def withstands(name, model, x, y, opt, restarts, generator, network):
        drawn.append((name, torch.rand((), generator=generator).item()))
        return torch.ones(len(x), dtype=torch.bool)

    monkeypatch.setattr(robustness, "withstands", withstands)
    test_set = data.load("digits", "test")
    for attacks in (["pgd-10"], ["margin", "pgd-10"]):
        robustness.accuracy(robust_model, test_set, attacks, settings(), 20)
    (first,), (_, again) = drawn[:1], drawn[1:]
    assert first == again


@pytest.mark.parametrize(
    "more, fewer, found",
    [(4, 0, False), (5, 0, True), (12, 4, False), (13, 4, True), (0, 9, False)],
)
def test_stronger_means_two_standard_errors(more, fewer, found):
    """Of images on which the attacks differ; those on which they agree do not count."""
    own = torch.tensor([True] * more + [False] * fewer + [True, False] * 50)
    transferred = torch.tensor([False] * more + [True] * fewer + [True, False] * 50)
    assert robustness.finds_more(transferred, own) == found


class Quantised(cem.ParametricCEM):
    """The same function of the digits, whose pixels have 17 values, but its gradient is 0."""

    def forward(self, x):
        return super().forward((16 * x).round() / 16)


def load_masked(path, *args):
    """interop.load, with a gradient of 0 for masked.pt."""
    network = cem.load(path)
    if Path(path).name == "masked.pt":
        network.__class__ = Quantised
    return network


def test_masked_gradients_are_reported(digits_run, tmp_path):
    for name in ("masked.pt", "plain.pt"):
        shutil.copy(digits_run / "runs/sup/ckpt.pt", tmp_path / name)

    def evaluate(ckpt, source):
        options = ["--attacks", "pgd-10", "margin", "--n", 100, "--transfer", source]
        with mock.patch.object(interop, "load", load_masked):
            done = succeeded(script("eval_robust.py", "--ckpt", ckpt, *options, cwd=tmp_path))
        return done, json.loads((tmp_path / "accuracy.json").read_text())

    assert evaluate("plain.pt", "masked.pt")[0].stderr == ""
    done, result = evaluate("masked.pt", "plain.pt")
    warning = "gradients may be masked: transfer strengthens pgd-10, margin"
    assert done.stderr == f"warning: {warning}\n"
    assert result["transfer"] == "plain.pt"
    worst = min(result["transfer-pgd-10"], result["transfer-margin"])
    assert result["adversarial_accuracy"] <= worst < result["pgd-10"] - 0.2
    assert f"transfer-pgd-10: {result['transfer-pgd-10']:.2%}" in done.stdout


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ("--transfer nowhere.pt", ["nowhere.pt not found"]),
        ("--transfer other.pt", ["other.pt is for images of [3, 8, 8]", "digits has [1, 8, 8]"]),
        ("--transfer few.pt", ["few.pt has 4 classes, but digits has 10"]),
        ("--transfer unsup.pt", ["--transfer", "encoder"]),
        ("--ckpt unsup.pt --transfer sup.pt", ["--transfer", "encoder"]),
        ("--transfer sup.pt --attacks autoattack", ["--transfer", "PGD"]),
    ],
)
def test_sources_that_do_not_fit_are_refused(arguments, parts, digits_run, unsup_run, tmp_path):
    shutil.copy(digits_run / "runs/sup/ckpt.pt", tmp_path / "sup.pt")
    shutil.copy(unsup_run / "runs/unsup/ckpt.pt", tmp_path / "unsup.pt")
    cem.save(tmp_path / "other.pt", cem.ParametricCEM("resnet18", 10, width=4))
    few = cem.ParametricCEM("resnet18", 4, width=4, in_channels=1)
    interop.export(tmp_path / "few.pt", few)  # a third-party checkpoint
    before = files(tmp_path)
    options = ["--dataset", "digits", "--ckpt", "sup.pt", *arguments.split()]
    assert_refused(script("eval_robust.py", *options, cwd=tmp_path), *parts)
    assert files(tmp_path) == before


def test_a_third_party_source_is_normalised_as_its_dataset(digits_run, tmp_path):
    shutil.copy(digits_run / "runs/sup/ckpt.pt", tmp_path / "sup.pt")
    interop.export(tmp_path / "plain.pt", cem.load(tmp_path / "sup.pt"))
    options = "--ckpt sup.pt --transfer plain.pt --attacks pgd-10 --n 60".split()
    done = succeeded(script("eval_robust.py", *options, cwd=tmp_path))
    assert "plain.pt has no pixel normalisation" in done.stdout
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert result["transfer-pgd-10"] == pytest.approx(result["pgd-10"], abs=2 / 60)


def test_mean_and_std_are_for_the_third_party_one(digits_run, tmp_path):
    """The same weights and normalisation as attacked network and as source, either way round."""
    model = cem.load(digits_run / "runs/sup/ckpt.pt")
    cem.save(tmp_path / "ours.pt", model)
    interop.export(tmp_path / "theirs.pt", model)
    given = ["--mean", model.mean.item(), "--std", model.std.item()]
    common = [*given, *"--dataset digits --attacks pgd-10 --n 60 --out out".split()]
    for ckpt, source in (("ours", "theirs"), ("theirs", "ours"), ("theirs", "theirs")):
        options = ["--ckpt", f"{ckpt}.pt", "--transfer", f"{source}.pt", *common]
        done = script("eval_robust.py", *options, cwd=tmp_path)
        assert done.returncode == 0 and "no pixel normalisation" not in done.stdout, done.stderr
        result = json.loads((tmp_path / "out/accuracy.json").read_text())
        assert result["transfer-pgd-10"] == pytest.approx(result["pgd-10"], abs=2 / 60)
    interop.export(tmp_path / "whole.pt", model, "robustness")  # with its own
    seen = []
    with mock.patch.object(robustness, "accuracy", side_effect=lambda *a: seen.append(a[-1])):
        options = "--ckpt theirs.pt --transfer whole.pt --mean 0 --std 1 --dataset digits --n 20"
        with contextlib.suppress(AttributeError, TypeError):  # no result
            script("eval_robust.py", *options.split(), cwd=tmp_path)
    assert torch.equal(seen[0].mean, model.mean) and torch.equal(seen[0].std, model.std)
    options = ["--ckpt", "ours.pt", "--transfer", "ours.pt", *common]
    assert_refused(script("eval_robust.py", *options, cwd=tmp_path), "mean and std are for")


# ----------------------------------------------------------------------------- results/epsilon.py


@pytest.mark.parametrize("masked", [False, True])
def test_accuracy_falls_to_zero_with_the_radius_unless_gradients_are_masked(
    masked, digits_run, tmp_path
):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shutil.copy(digits_run / "runs/sup/ckpt.pt", tmp_path / ("masked.pt" if masked else "ckpt.pt"))
    options = "--attack pgd-10 --n 60 --out curve --ckpt".split()
    with mock.patch.object(interop, "load", load_masked):
        done = succeeded(script("results/epsilon.py", *options, *files(tmp_path), cwd=tmp_path))
    result = json.loads((tmp_path / "curve.json").read_text())
    accuracy = result["accuracy"]
    assert accuracy[0] > 0.5 and all(value > 0 for value in accuracy[:-2])
    assert accuracy[-2:] == [0, 0] or masked
    assert ("may be masked" in done.stderr) == masked == (accuracy[-1] > 0)
    if masked:  # 8 is the diagonal of the cube of 64 pixels
        assert result["radii"] == [*(0.25 * i for i in range(17)), 8]
    else:
        assert all(b <= a + 0.05 for a, b in zip(accuracy, accuracy[1:]))
    for value, (low, high) in zip(accuracy, result["interval"], strict=True):
        assert 0 <= low <= value <= high <= low + 0.27
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 400


def test_an_encoder_or_a_figure_of_someone_else_is_refused(digits_run, unsup_run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shutil.copy(digits_run / "runs/sup/ckpt.pt", tmp_path / "sup.pt")
    shutil.copy(unsup_run / "runs/unsup/ckpt.pt", tmp_path / "unsup.pt")
    (tmp_path / "mine.png").write_text("mine")
    before = files(tmp_path)
    done = script("results/epsilon.py", "--ckpt", "sup.pt", "--out", "mine", cwd=tmp_path)
    assert_refused(done, "mine.png exists")
    done = script("results/epsilon.py", "--ckpt", "unsup.pt", "--out", "curve", cwd=tmp_path)
    assert_refused(done, "unsup.pt is not a classifier")
    assert files(tmp_path) == before


# ------------------------------------------- calibration, out-of-distribution scores, likelihood


def test_calibration_error_equals_its_definition():
    logits, y = 3 * torch.randn(500, 4, dtype=torch.float64), torch.randint(4, (500,))
    confidence, predicted = (values.tolist() for values in logits.softmax(1).max(1))
    expected = 0.0
    for b in range(15):
        rows = [i for i in range(500) if b / 15 < confidence[i] <= (b + 1) / 15]
        if rows:
            accuracy = sum(predicted[i] == y[i].item() for i in rows) / len(rows)
            mean_confidence = sum(confidence[i] for i in rows) / len(rows)
            expected += len(rows) / 500 * abs(accuracy - mean_confidence)
    assert robustness.calibration_error(logits, y) == pytest.approx(expected, abs=1e-12)
    certain = F.one_hot(y, 4).double() * 1000
    assert robustness.calibration_error(certain, y) == 0
    assert robustness.calibration_error(certain, (y + 1) % 4) == 1


def auroc(inside, outside):
    """The share of pairs in the right order."""
    a, b = inside[:, None], outside[None]
    return ((a > b).float() + 0.5 * (a == b).float()).mean().item()


@pytest.mark.parametrize("name", ["noise", "constant"])
def test_auroc_is_the_share_of_pairs_in_the_right_order(name, digits_run):
    model, test_set = cem.load(digits_run / "runs/sup/ckpt.pt"), data.load("digits", "test")
    other = robustness.ood_dataset(name, test_set, "data", seed=0)
    index, opt = test_set.evenly_spaced(60), settings(n=60, batch_size=25)
    logits = robustness.outputs(model, test_set, opt, 60)
    result = robustness.ood_scores(model, logits, other, opt)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(test_set.pixels(index)), rtol=0, atol=1e-4)
        outside = model(other.pixels(other.evenly_spaced(60)))
    log_p = auroc(logits.logsumexp(1), outside.logsumexp(1))
    confidence = auroc(logits.softmax(1).amax(1), outside.softmax(1).amax(1))
    assert result["log_p_x"] == pytest.approx(log_p, abs=1e-6)
    assert result["max_p_y_x"] == pytest.approx(confidence, abs=1e-6)


def test_ood_datasets_take_the_shape_of_the_test_set(tmp_path):
    folder = str(write_folder(tmp_path / "set", per_class=4))
    digits, colour = data.load("digits", "test"), data.load(folder, "test")
    other = robustness.ood_dataset(folder, digits, "data", seed=0)
    assert other.images.shape == (8, 1, 8, 8)
    assert other.images.dtype == torch.uint8
    np.savez(tmp_path / "x.npz", arr_0=colour.images.permute(0, 2, 3, 1))
    for plain in (f"{folder}/test", str(tmp_path / "x.npz")):
        images = robustness.ood_dataset(plain, digits, "data", seed=0).images
        assert images.shape == other.images.shape
        difference = (images.double().sort(0)[0] - other.images.double().sort(0)[0]).abs()
        assert difference.max() <= 1  # the file's are resized after they were read
    assert robustness.ood_dataset("digits", colour, "data", seed=0).images.shape == (360, 3, 10, 10)
    wide = write_folder(tmp_path / "wide", size=20)
    Image.new("RGB", (30, 24)).save(wide / "test/ant/0.png")
    assert robustness.ood_dataset(str(wide), colour, "data", seed=0).images.shape == (6, 3, 10, 10)
    constant = robustness.ood_dataset("constant", digits, "data", seed=0).images.flatten(1)
    assert (constant == constant[:, :1]).all()
    assert len(constant.unique()) > 100
    assert len(robustness.ood_dataset("noise", digits, "data", seed=0).images.unique()) == 256


def test_diagnosis_equals_its_definition(model64, batch):
    x, y = batch[0].double(), batch[1]
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    x_s = torch.rand_like(x)
    result = robustness.diagnose(model64, x, y, x_adv, x_s)
    for name, images in (("E_x", x), ("E_x_adv", x_adv), ("E_x_s", x_s)):
        energy = -lse(model64(images).detach()).mean().item()
        assert result[name] == pytest.approx(energy, abs=1e-9)
    f_y, f_adv_y = (model64(images).gather(1, y[:, None]) for images in (x, x_adv))
    consistency = f_y.mean() - f_adv_y.mean()
    log_posterior = -F.cross_entropy(model64(x_adv), y)  # its gradient is the contrastive half's
    a, b = (
        torch.cat([g.flatten() for g in gradients(model64, half)])
        for half in (consistency, log_posterior)
    )
    assert result["consistency_norm"] == pytest.approx(a.norm().item(), rel=1e-9)
    assert result["contrastive_norm"] == pytest.approx(b.norm().item(), rel=1e-9)
    assert result["cosine"] == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-9)
    ece = robustness.calibration_error(model64(x).detach(), y)
    assert result["calibration_error"] == pytest.approx(ece, rel=1e-9)


# -------------------------------------------------------------------------------- eval_robust.py


def test_evaluation_writes_every_attack_and_score(digits_run):
    """Without --ckpt and --dataset: runs/sup/ckpt.pt on the dataset of its training."""
    options = "--attacks pgd-10 margin --n 40 --ood digits --norm linf --eps 0.03 --restarts 2"
    done = succeeded(script("eval_robust.py", *options.split(), cwd=digits_run))
    result = json.loads((digits_run / "runs/sup/accuracy.json").read_text())
    expected = dict(ckpt="runs/sup/ckpt.pt", dataset="digits", n=40)
    expected |= dict(norm="linf", eps=0.03, restarts=2)
    assert expected.items() <= result.items()
    worst_attack = min(result["pgd-10"], result["margin"])
    assert result["adversarial_accuracy"] <= worst_attack <= result["clean_accuracy"]
    assert result["auroc_digits"]["log_p_x"] == pytest.approx(0.5, abs=0.01)  # the same images
    assert {"auroc_noise", "auroc_constant", "calibration_error"} <= result.keys()
    for part in ("margin: ", "auroc noise: "):
        assert part in done.stdout


# ------------------------------------------------------------- torchvision's datasets, synthetic


def synthetic_cifar100(folder):
    """The files of CIFAR-100 with 200 + 100 random images."""
    root = folder / "cifar-100-python"
    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for name, n in (("train", 200), ("test", 100)):
        pixels = generator.integers(0, 256, (n, 3 * 32 * 32), dtype=np.uint8)
        content[name] = {"data": pixels, "fine_labels": [i % 100 for i in range(n)]}
    md5 = {}
    for name, value in content.items():
        written = pickle.dumps(value)
        (root / name).write_bytes(written)
        md5[name] = hashlib.md5(written).hexdigest()
    kind = torchvision.datasets.CIFAR100
    lists = {f"{name}_list": [[name, md5[name]]] for name in ("train", "test")}
    return mock.patch.multiple(kind, **lists, meta={**kind.meta, "md5": md5["meta"]})


def synthetic_svhn(folder):
    """The files of SVHN with 40 + 20 random images: MATLAB arrays of pixels (32, 32, 3, N) and
    labels 1 to 10, where 10 is the digit 0."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    split_list = {}
    for split, n in (("train", 40), ("test", 20)):
        pixels = generator.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        labels = (np.arange(n) % 10 + 1)[:, None].astype(np.uint8)
        path = folder / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels})
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        split_list[split] = ["http://nowhere", path.name, md5]
    return mock.patch.multiple(torchvision.datasets.SVHN, split_list=split_list)


@pytest.mark.parametrize(
    "name, make, classes", [("cifar100", synthetic_cifar100, 100), ("svhn", synthetic_svhn, 10)]
)
def test_torchvision_datasets_train_evaluate_and_sample(name, make, classes, tmp_path):
    options = "--data-dir sets --arch resnet18 --width 8 --batch-size 20 --epochs 1 --loss st"
    options += " --n-eval 10 --seed-rank 2"
    with make(tmp_path / "sets"):
        succeeded(script("train_sup.py", "--dataset", name, *options.split(), cwd=tmp_path))
        options = "--data-dir sets --attacks pgd-10 --n 10".split()
        succeeded(script("eval_robust.py", *options, cwd=tmp_path))
    assert json.loads((tmp_path / "runs/sup/accuracy.json").read_text())["dataset"] == name
    model = cem.load(tmp_path / "runs/sup/ckpt.pt")
    assert model.config["num_classes"] == classes
    assert len(model.extra["classes"]) == classes
    assert model.extra["classes"][3] == ("class 3" if name == "cifar100" else "3")
    succeeded(script("sample.py", "--n", 5, "--classes", "3", "--steps", 1, cwd=tmp_path))
    with np.load(tmp_path / "runs/sup/samples-rcs.npz") as z:
        assert z["arr_0"].shape == (5, 32, 32, 3)
        assert z["arr_1"].tolist() == [3] * 5


def test_label_10_of_svhn_is_the_digit_0(tmp_path):
    with synthetic_svhn(tmp_path / "sets"):
        test_set = data.load("svhn", "test", str(tmp_path / "sets"))
    assert test_set.labels.tolist() == [*range(1, 10), 0] * 2
    assert not test_set.flip


def test_evaluation_names_a_size_that_contradicts_the_checkpoint(digits_run, tmp_path):
    shutil.copy(digits_run / "runs/sup/ckpt.pt", tmp_path / "ckpt.pt")
    for part in ("train", "test"):
        for k in range(10):
            (tmp_path / f"large/{part}/{k}").mkdir(parents=True)
            for i in range(2):
                Image.new("L", (12, 12), 20 * k + i).save(tmp_path / f"large/{part}/{k}/{i}.png")
    options = ["--ckpt", "ckpt.pt", "--dataset", "large"]
    done = script("eval_robust.py", *options, "--image-size", 12, cwd=tmp_path)
    assert_refused(done, "images of [1, 8, 8], but large has [1, 12, 12]")
    done = succeeded(script("eval_robust.py", *options, cwd=tmp_path))  # the checkpoint's size
    assert "resized and cropped 20 of 20 images to size 8" in done.stdout


class AlwaysFirst(nn.Module):
    def forward(self, x):
        total = x.sum((1, 2, 3))
        return torch.stack([total + 1, 0 * total], 1)


def test_n_images_are_evenly_spaced():
    """Folders are sorted by class."""
    images, labels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) // 4
    by_class = data.Dataset("sorted", images, labels, ["a", "b"])
    found = robustness.accuracy(AlwaysFirst(), by_class, ["pgd-10"], settings(eps=0.0), 4)
    assert found["clean_accuracy"] == 0.5


def test_the_calibration_error_is_of_the_measured_images(digits_run):
    model, test_set = cem.load(digits_run / "runs/sup/ckpt.pt"), data.load("digits", "test")
    opt = eval_robust.Options(n=36, attacks=["pgd-10"], norm="l2", eps=0.0)
    found = eval_robust.evaluate_classifier("x.pt", model, None, test_set, opt)
    index = 10 * torch.arange(36)
    logits = model(test_set.pixels(index)).detach()
    expected = robustness.calibration_error(logits, test_set.labels[index])
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-4)


def test_certainty_beyond_float32_still_separates(digits_run):
    """max p(y | x) of both sets rounds to 1."""
    test_set = data.load("digits", "test")

    def network(x):
        return torch.stack([30 + x.mean((1, 2, 3)), 0 * x.mean((1, 2, 3))], 1)

    logits = network(test_set.pixels())
    darker = data.Dataset("dark", test_set.images // 4, test_set.labels, test_set.classes)
    found = robustness.ood_scores(network, logits, darker, settings(n=0))
    assert found["max_p_y_x"] == found["log_p_x"] > 0.9
