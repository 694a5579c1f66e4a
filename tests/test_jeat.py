"""JEM, JEAT and the robust evaluation, against definitions in float64, closed forms, torchattacks and AutoAttack."""

import copy
import functools
import hashlib
import json
import math
import pickle
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from conftest import files, perturb, script
from test_scripts import assert_refused

import cem
import cli
import data
import engine
import parallel
import robust
import train_sup

TINY = ["--dataset", "digits", "--width", 4, "--n-eval", 36, "--sgld-steps", 2, "--buffer", 300, "--attack-steps", 1]


# ------------------------------------------------------------------------------------------------------- losses


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def lse(logits):
    return torch.tensor([math.log(sum(math.exp(v) for v in row)) for row in logits.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("name", ["jem", "jeat"])
def test_energy_based_losses_equal_their_definitions(name, weight, model64, batch):
    x, y = batch[0].double(), batch[1]
    x_adv, x_s = (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.rand_like(x)
    seen = x if name == "jem" else x_adv
    with torch.no_grad():
        f, f_s = model64(seen), model64(x_s)
    cross_entropy = (lse(f) - f.gather(1, y[:, None]).squeeze(1)).mean()
    loss, logits = cem.supervised_loss(name, model64, x, y, x_adv, weight, x_s)
    expected = cross_entropy + weight * (lse(f_s).mean() - lse(f).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(logits, f, rtol=0, atol=1e-12)
    without, _ = cem.supervised_loss(name, model64, x, y, x_adv, weight)
    assert without.item() == pytest.approx((cross_entropy - weight * lse(f).mean()).item(), abs=1e-12)


def test_jeat_without_attack_is_jem_to_the_last_bit(model, batch):
    x, y = batch
    x_s, results = torch.rand_like(x), []
    for name in ("jem", "jeat"):
        network = copy.deepcopy(model).train()
        x_adv = None
        if name == "jeat":  # eps 0: the ball is a point
            x_adv = cem.pgd(cem.potential("joint", network, y), x, eps=0.0, steps=2)
        loss, _ = cem.supervised_loss(name, network, x, y, x_adv, 1.0, x_s)
        results.append([loss, *gradients(network, loss), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


class ByTheFirst(torch.nn.Module):
    """BatchNorm written out: a batch normalised by mean and variance of its first n images."""

    def __init__(self, norm, n):
        super().__init__()
        self.norm, self.n = norm, n

    def forward(self, x):
        mean = x[: self.n].mean((0, 2, 3), keepdim=True)
        variance = (x[: self.n] - mean).square().mean((0, 2, 3), keepdim=True)
        weight, bias = (v[:, None, None] for v in (self.norm.weight, self.norm.bias))
        return weight * (x - mean) / (variance + self.norm.eps).sqrt() + bias


def test_samples_are_normalised_by_the_statistics_of_the_data(model64, batch):
    """Loss and gradients against BatchNorm written out; running statistics and logits are those of the data alone."""
    x, y = batch[0].double(), batch[1]
    x_s, network, alone = torch.rand_like(x), model64.train(), copy.deepcopy(model64).train()
    written_out = copy.deepcopy(network)
    for module in list(written_out.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, ByTheFirst(child, len(x)))
    loss, logits = cem.supervised_loss("jem", network, x, y, None, 0.5, x_s)
    f, f_s = written_out(torch.cat([x, x_s])).chunk(2)
    expected = F.cross_entropy(f, y) + 0.5 * (f_s.logsumexp(1).mean() - f.logsumexp(1).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for ours, theirs in zip(gradients(network, loss), gradients(written_out, expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(logits, alone(x), rtol=0, atol=1e-12)
    for ours, theirs in zip(network.buffers(), alone.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not any("forward" in vars(module) for module in network.modules())  # and nothing is left of it


def test_sgld_climbs_what_the_loss_sees(model64, batch):
    """The copy's logits in eval mode are those of the model in training whose batch begins with these images."""
    x, x_s, network = batch[0].double(), torch.rand_like(batch[0].double()), model64.train()
    before = copy.deepcopy(network.state_dict())
    climbed = train_sup.by_statistics_of(x, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()) and network.training
    with torch.no_grad(), cem._statistics_of_the_first(len(x), network):
        seen = network(torch.cat([x, x_s]))
    for images, logits in zip((x, x_s), seen.chunk(2)):
        torch.testing.assert_close(climbed(images), logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(cem.folded(climbed)(images), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, border", [("at", "constant"), ("jem", "reflect"), ("jeat", "reflect")])
def test_a_training_step_crops_and_samples_as_its_loss_needs(name, border):
    train_set, generator = data.load("digits", "train"), parallel.Share(0, torch.device("cpu"))
    model = cem.ParametricCEM("resnet18", 10, width=4, in_channels=1).train()
    buffer = cem.ReplayBuffer(16, (1, 8, 8)) if name != "at" else None
    opt = train_sup.Options(loss=name, attack_steps=1, sgld_steps=1, precision="float32")
    crops = mock.patch.object(data, "crop_flip", wraps=data.crop_flip)
    statistics = mock.patch.object(train_sup, "by_statistics_of", wraps=train_sup.by_statistics_of)
    losses = mock.patch.object(cem, "supervised_loss", wraps=cem.supervised_loss)
    with crops as crop, statistics as keep, losses as loss:
        train_sup.objective(opt, train_set, buffer)(model, torch.arange(8), torch.rand(8, 3), generator)
    assert crop.call_args.kwargs["padding"] == border
    _, _, x, _, x_adv, _, x_s = loss.call_args.args
    assert keep.call_count == (buffer is not None) == (x_s is not None)
    if buffer is not None:
        assert torch.equal(keep.call_args.args[0], x if name == "jem" else x_adv)


@pytest.mark.parametrize("name", ["jem", "jeat"])
def test_every_parameter_learns_under_autocast(name, model, batch):
    x, y = batch
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = cem.supervised_loss(name, model.train(), x, y, x, 1.0, torch.rand_like(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# --------------------------------------------------------------------------------------------------- the buffer


def bowl(x):
    return -0.5 * 9 * (x - 0.5).square().flatten(1).sum(1)


def test_buffer_keeps_its_chains_and_they_reach_the_stationary_distribution():
    """SGLD x ← x - α k (x - μ) + σ ξ in a bowl of stiffness k is an AR(1) process: variance σ² / (1 - (1 - α k)²)."""
    torch.manual_seed(0)
    alpha, sigma, q = 0.02, 0.05, 1 - 0.02 * 9
    buffer, generator = cem.ReplayBuffer(4000, (1, 2, 2), reinit=0.0), torch.Generator().manual_seed(1)
    for _ in range(8):  # all the chains at once, 10 steps each time: 0.82^160 of the start's variance is left
        buffer.sample(bowl, 4000, generator, steps=10, step_size=alpha, noise=sigma)
    x, variance = buffer.images.float(), sigma**2 / (1 - q**2)
    n = x.numel()
    assert abs(x.mean().item() - 0.5) < 4 * math.sqrt(variance / n) + 2**-11  # standard errors; half precision
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / n) + 0.01


def test_buffer_draws_distinct_chains_and_puts_them_back():
    buffer, generator = cem.ReplayBuffer(50, (1, 2, 2), reinit=0.0), torch.Generator().manual_seed(0)
    before = buffer.images.clone()
    x = buffer.sample(bowl, 20, generator, steps=1, step_size=0.1)
    changed = (buffer.images != before).flatten(1).any(1)
    assert x.shape == (20, 1, 2, 2) and changed.sum() == 20 and not x.requires_grad
    found = (buffer.images[changed].float()[:, None] == x.half().float()[None]).flatten(2).all(2)
    assert found.any(1).all() and found.any(0).all()
    assert len(buffer.sample(bowl, 80, generator, steps=1, step_size=0.1)) == 50


@pytest.mark.parametrize("reinit", [0.0, 0.3, 1.0])
def test_chains_begin_anew_with_the_given_probability(reinit):
    fresh = lambda n, generator: torch.full((n, 1, 1, 1), 0.25)  # noqa: E731
    buffer = cem.ReplayBuffer(4000, (1, 1, 1), reinit, fresh)
    buffer.images.fill_(0.75)
    x = buffer.sample(lambda x: 0 * x.flatten(1).sum(1), 4000, torch.Generator().manual_seed(0), steps=1, step_size=0.1)
    share = (x == 0.25).float().mean().item()
    assert abs(share - reinit) <= 4 * math.sqrt(reinit * (1 - reinit) / 4000)


def test_buffer_begins_with_noise_or_with_the_gaussian_seeds():
    torch.manual_seed(0)
    x = cem.ReplayBuffer(3000, (1, 2, 2)).images.float()
    assert x.min() >= 0 and x.max() <= 1 and abs(x.mean() - 0.5) < 4 / math.sqrt(12 * x.numel())
    images = (0.3 + 0.05 * torch.randn(200, 1, 2, 2)).clamp(0, 1)
    seeds = cem.GaussianSeeds.fit(images, torch.zeros(200, dtype=torch.int64))
    x = cem.ReplayBuffer(3000, (1, 2, 2), fresh=seeds.sample).images.float()
    assert abs(x.mean() - images.mean()) < 0.01 and abs(x.std() - images.std()) < 0.01


# ------------------------------------------------------------------------------------------------ training runs


@pytest.mark.parametrize("name, start", [("jem", "noise"), ("jeat", "gaussian")])
def test_stopped_and_resumed_run_takes_its_buffer_along(name, start, tmp_path):
    options = [*TINY, "--epochs", 2, "--loss", name, "--reinit-from", start, "--diagnose"]
    assert script("train_sup.py", *options, "--out", "whole", cwd=tmp_path).returncode == 0
    first = script("train_sup.py", *options, "--out", "parts", "--max-minutes", 1e-4, cwd=tmp_path)
    assert first.returncode == 0 and "--resume continues" in first.stdout
    second = script("train_sup.py", *options, "--out", "parts", "--resume", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    whole, parts = (cem.load(tmp_path / run / "ckpt.pt") for run in ("whole", "parts"))
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    chains = whole.extra["training"]["state"]["images"]
    assert torch.equal(chains, parts.extra["training"]["state"]["images"]) and chains.shape == (300, 1, 8, 8)
    log = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    energies = {"energy", "energy_gap", "E_x", "E_x_adv", "E_x_s", "consistency_norm", "contrastive_norm", "cosine"}
    assert energies <= log[0].keys() and [line["epoch"] for line in log] == [1, 2]


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(tmp_path):
    options = [*TINY, "--epochs", 1, "--loss", "jem", "--max-energy-gap", 1e-6]
    done = script("train_sup.py", *options, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.count("error: ") == 1, done.stderr
    assert "energy gap is" in done.stderr and "at step 1;" in done.stderr and "--lr" in done.stderr
    training = {n: cem.load(tmp_path / f"runs/sup/{n}.pt").extra["training"] for n in ("ckpt", "diverged")}
    assert training["ckpt"]["step"] == 0 and training["diverged"]["step"] > 0
    done = script("train_sup.py", *options, "--resume", "--on-diverge", "restart", cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.count("of the learning rate") == 8  # in vain: the bound knows no rate


def descend(folder, **changes):
    """A classifier whose loss is a parabola in one of its biases: descent diverges where the rate exceeds 2."""
    opt = cli.TrainOptions(out=str(folder), epochs=4, batch_size=2, schedule="onecycle", ema=0.0, weight_decay=0.0, **changes)
    torch.manual_seed(0)
    model = cem.ParametricCEM("resnet18", 2, width=4)
    model.net.fc.bias.data.fill_(1.0)
    return engine.fit(
        opt,
        model,
        40,
        shuffle=lambda epoch: (torch.arange(40), torch.zeros(40, 1)),
        batch_loss=lambda model, index, draws, generator: (0.5 * model.net.fc.bias.square().sum(), {}),
        evaluate=lambda model, epoch: {},
        bounds={"loss": 100.0},
    )


def test_restart_halves_the_rate_until_the_run_holds(tmp_path, capsys):
    with pytest.raises(cli.Diverged, match=r"loss is .* at step \d+; its state is in"):
        descend(tmp_path / "stop", lr=16.0)
    model = descend(tmp_path / "restart", lr=16.0, on_diverge="restart")
    assert model.net.fc.bias.abs().max() < 0.5  # from 1, and by way of losses beyond 100
    training = cem.load(tmp_path / "restart/ckpt.pt").extra["training"]
    assert training["step"] == 80 and 2 <= training["restarts"] <= 5
    assert "from there with 0.5 of the learning rate" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "restart/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_names_its_step(tmp_path):
    calls = []

    def batch_loss(model, index, draws, generator):
        calls.append(0)
        bias = model.net.fc.bias
        if len(calls) < 3:
            return bias.square().sum(), {}
        return (bias - bias.detach()).abs().sqrt().sum(), {}  # 0, of infinite slope

    opt = cli.TrainOptions(out=str(tmp_path), epochs=1, batch_size=2, ema=0.0)
    with pytest.raises(cli.Diverged, match="gradient norm is (nan|inf) at step 3"):
        engine.fit(
            opt,
            cem.ParametricCEM("resnet18", 2, width=4),
            20,
            shuffle=lambda epoch: (torch.arange(20), torch.zeros(20, 1)),
            batch_loss=batch_loss,
            evaluate=lambda model, epoch: {},
        )


# ------------------------------------------------------------------------------------------- robust evaluation


def settings(**changes):
    return SimpleNamespace(**dict(norm="l2", eps=0.5, restarts=1, batch_size=128, precision="float32", seed=0) | changes)


@pytest.fixture(scope="module")
def robust_model(tmp_path_factory):
    """A classifier trained until its accuracy under attack is no matter of chance: PGD-20 leaves two digits in three."""
    folder = tmp_path_factory.mktemp("robust")
    done = script("train_sup.py", "--dataset", "digits", "--width", 8, "--epochs", 15, "--ema", 0.9, cwd=folder)
    assert done.returncode == 0, done.stderr
    return cem.folded(cem.load(folder / "runs/sup/ckpt.pt"))


@pytest.mark.parametrize("norm, eps", [("l2", 0.5), ("linf", 0.05)])
def test_pgd_20_accuracy_is_torchattacks(norm, eps, robust_model):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    test = data.load("digits", "test")
    x, y = test.pixels(), test.labels
    with mock.patch.object(cem, "pgd", functools.partial(cem.pgd, random_start=False)):  # the libraries' draws differ
        ours = robust.accuracy(robust_model, test, settings(norm=norm, eps=eps), ["pgd-20"])["pgd-20"]
    peer = {"l2": torchattacks.PGDL2, "linf": torchattacks.PGD}[norm]
    x_adv = peer(robust_model, eps=eps, alpha=2.5 * eps / 20, steps=20, random_start=False)(x, y)
    theirs = (robust_model(x_adv).argmax(1) == y).float().mean().item()
    assert 0.1 < theirs < 0.9 and abs(ours - theirs) <= 0.005  # half a point, which is one image
    random = robust.accuracy(robust_model, test, settings(norm=norm, eps=eps), ["pgd-20"])["pgd-20"]
    assert abs(random - theirs) <= 0.02  # a random start turns a few images over


def test_own_worst_case_is_close_to_autoattacks(robust_model):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    test = data.load("digits", "test")
    result = robust.accuracy(robust_model, test, settings(restarts=5), ["pgd-50", "margin"], n=100)
    standard = robust.accuracy(robust_model, test, settings(), ["autoattack"], n=100)
    assert 0.1 < standard["autoattack"] == standard["adversarial_accuracy"] < standard["clean_accuracy"]
    assert standard["autoattack"] <= result["adversarial_accuracy"] <= standard["autoattack"] + 0.04 + 1e-6  # of 100 images


def test_autoattack_without_its_library_says_what_to_install(digits_run):
    with mock.patch.dict("sys.modules", {"pyautoattack": None}):
        done = script("train_sup.py", "--dataset", "digits", "--evaluate", "--attacks", "autoattack", cwd=digits_run)
    assert_refused(done, "pip install pyautoattack")


def test_restarts_only_lower_the_accuracy_and_the_worst_case_is_per_image(digits_run):
    model, test = cem.load(digits_run / "runs/sup/ckpt.pt"), data.load("digits", "test")
    once, often = (robust.accuracy(model, test, settings(restarts=n), ["pgd-10"], n=120) for n in (1, 5))
    assert often["pgd-10"] <= once["pgd-10"] < once["clean_accuracy"]
    answers = {"pgd-10": torch.arange(6) < 4, "margin": torch.arange(6) % 2 == 0}  # which of six images withstand
    with mock.patch.object(robust, "withstands", lambda name, model, x, *_: answers[name][: len(x)]):
        six = data.Dataset("six", test.images[:6], model(test.pixels()[:6]).argmax(1), test.classes)
        result = robust.accuracy(model, six, settings(), ["pgd-10", "margin"])
    accuracies = {name: round(6 * value) for name, value in result.items()}
    assert accuracies == {"clean_accuracy": 6, "pgd-10": 4, "margin": 3, "adversarial_accuracy": 2}


def test_calibration_error_equals_its_definition():
    torch.manual_seed(0)
    logits, y = 3 * torch.randn(500, 4, dtype=torch.float64), torch.randint(4, (500,))
    confidence, said = (v.tolist() for v in logits.softmax(1).max(1))
    total = 0.0
    for b in range(15):
        rows = [i for i in range(500) if b / 15 < confidence[i] <= (b + 1) / 15]
        if rows:
            right = sum(said[i] == y[i].item() for i in rows) / len(rows)
            total += len(rows) / 500 * abs(right - sum(confidence[i] for i in rows) / len(rows))
    assert robust.calibration_error(logits, y) == pytest.approx(total, abs=1e-12)
    certain = F.one_hot(y, 4).double() * 1000
    assert robust.calibration_error(certain, y) == 0 and robust.calibration_error(certain, (y + 1) % 4) == 1


def test_auroc_is_the_share_of_pairs_in_the_right_order(digits_run):
    model, test = cem.load(digits_run / "runs/sup/ckpt.pt"), data.load("digits", "test")
    opt = settings(n=60, data_dir="data")
    index = test.spread(60)
    with torch.no_grad():
        inside = model(test.pixels(index))
        result = robust.out_of_distribution(model, inside, test, ["noise", "constant"], opt)
        for name in ("noise", "constant"):
            other = robust.strangers(name, test, opt)
            outside = model(other.pixels(other.spread(60)))
            for key, score in (("log_p_x", lambda f: f.logsumexp(1)), ("max_p_y_x", lambda f: f.softmax(1).amax(1))):
                a, b = score(inside)[:, None], score(outside)[None]
                pairs = ((a > b).float() + 0.5 * (a == b).float()).mean().item()
                assert result[f"auroc_{name}"][key] == pytest.approx(pairs, abs=1e-6)


def test_strangers_take_the_shape_of_the_test_set(tmp_path):
    from test_data import write_folder

    write_folder(tmp_path / "set", per_class=4)
    test, opt = data.load("digits", "test"), settings(data_dir="data")
    other = robust.strangers(str(tmp_path / "set"), test, opt)
    assert other.images.shape[1:] == test.images.shape[1:] and other.images.dtype == torch.uint8
    colour = data.load(str(tmp_path / "set"), "test")
    assert robust.strangers("digits", colour, opt).images.shape == (360, *colour.images.shape[1:])
    constant = robust.strangers("constant", test, opt).images.flatten(1)
    assert (constant == constant[:, :1]).all() and len(constant.unique()) > 100
    assert len(robust.strangers("noise", test, opt).images.unique()) == 256


def test_diagnosis_equals_its_definition(batch):
    torch.manual_seed(0)
    model = perturb(cem.ParametricCEM("resnet18", 5, width=4)).eval().double()
    x, y = batch[0].double(), batch[1]
    x_adv, x_s = (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.rand_like(x)
    result = robust.diagnose(model, x, y, x_adv, x_s)
    for name, images in (("E_x", x), ("E_x_adv", x_adv), ("E_x_s", x_s)):
        assert result[name] == pytest.approx(-lse(model(images).detach()).mean().item(), abs=1e-9)
    gap = model(x).gather(1, y[:, None]).mean() - model(x_adv).gather(1, y[:, None]).mean()
    halves = gap, -F.cross_entropy(model(x_adv), y)  # the contrastive gradient is that of log p(y | x_adv)
    a, b = (torch.cat([g.flatten() for g in gradients(model, half)]) for half in halves)
    assert result["consistency_norm"] == pytest.approx(a.norm().item(), rel=1e-9)
    assert result["contrastive_norm"] == pytest.approx(b.norm().item(), rel=1e-9)
    assert result["cosine"] == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-9)


def test_evaluate_writes_every_attack_and_score(digits_run):
    options = ["--attacks", "pgd-10", "margin", "--n", 40, "--ood", "digits", "--norm", "linf", "--eps", 0.03]
    done = script("train_sup.py", "--dataset", "digits", "--evaluate", *options, "--restarts", 2, cwd=digits_run)
    assert done.returncode == 0, done.stderr
    result = json.loads((digits_run / "runs/sup/accuracy.json").read_text())
    assert (result["n"], result["norm"], result["eps"], result["restarts"]) == (40, "linf", 0.03, 2)
    assert result["adversarial_accuracy"] <= min(result["pgd-10"], result["margin"]) <= result["clean_accuracy"]
    assert result["auroc_digits"]["log_p_x"] == pytest.approx(0.5, abs=0.01)  # the same images
    assert {"auroc_noise", "auroc_constant", "calibration_error"} <= result.keys()
    assert "margin: " in done.stdout and "auroc noise: " in done.stdout


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--evaluate", "--attacks", "magic"], "magic"),
        (["--evaluate", "--restarts", 0], "--restarts"),
        (["--loss", "jem", "--buffer", 10], "--buffer"),
        (["--loss", "jem", "--reinit", 2], "--reinit"),
        (["--loss", "jem", "--sgld-steps", 0], "--sgld-steps"),
        (["--loss", "jeat", "--likelihood-weight", 0], "--likelihood-weight"),
        (["--loss", "jem", "--max-energy-gap", 0], "--max-energy-gap"),
        (["--evaluate", "--ood", "nowhere"], "nowhere"),
    ],
)
def test_bad_options(arguments, part, digits_run, tmp_path):
    ckpt = ["--ckpt", digits_run / "runs/sup/ckpt.pt"] if "--evaluate" in arguments else []
    assert_refused(script("train_sup.py", "--dataset", "digits", *arguments, *ckpt, cwd=tmp_path), part)
    assert files(tmp_path) == []


# ----------------------------------------------------------------------------- the datasets of torchvision, made up


def cifar100(folder):
    """A made-up CIFAR-100 of 40 + 20 images in the files that the real one consists of."""
    (root := folder / "cifar-100-python").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, n in (("train", 200), ("test", 100)):
        pixels = generator.integers(0, 256, (n, 3 * 32 * 32), dtype=np.uint8)
        (root / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [i % 100 for i in range(n)]}))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    md5 = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    kind = torchvision.datasets.CIFAR100
    return mock.patch.multiple(
        kind,
        train_list=[["train", md5["train"]]],
        test_list=[["test", md5["test"]]],
        meta={**kind.meta, "md5": md5["meta"]},
    )


def svhn(folder):
    """A made-up SVHN: MATLAB files of pixels (32, 32, 3, N) and labels 1 to 10, where 10 is the digit 0."""
    folder.mkdir(parents=True)
    generator, split_list = np.random.default_rng(0), {}
    for split, n in (("train", 40), ("test", 20)):
        pixels = generator.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        path = folder / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": (np.arange(n) % 10 + 1)[:, None].astype(np.uint8)})
        split_list[split] = ["http://nowhere", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    return mock.patch.multiple(torchvision.datasets.SVHN, split_list=split_list)


@pytest.mark.parametrize("name, make, classes", [("cifar100", cifar100, 100), ("svhn", svhn, 10)])
def test_torchvisions_datasets_train_evaluate_and_sample(name, make, classes, tmp_path):
    with make(tmp_path / "sets"):
        options = ["--dataset", name, "--data-dir", "sets", "--arch", "resnet18", "--width", 4, "--batch-size", 20]
        attack = ["--attack-steps", 1, "--n-eval", 10, "--seed-rank", 2]
        done = script("train_sup.py", *options, *attack, "--epochs", 1, "--loss", "jeat", "--sgld-steps", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = script("train_sup.py", *options, "--evaluate", "--attacks", "pgd-10", "--n", 10, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    model = cem.load(tmp_path / "runs/sup/ckpt.pt")
    assert model.config["num_classes"] == classes and len(model.extra["classes"]) == classes
    assert model.extra["classes"][3] == ("class 3" if name == "cifar100" else "3")
    assert script("sample.py", "--n", 5, "--classes", "3", "--steps", 1, cwd=tmp_path).returncode == 0
    with np.load(tmp_path / "runs/sup/samples-rcs.npz") as z:
        assert z["arr_0"].shape == (5, 32, 32, 3) and z["arr_1"].tolist() == [3] * 5


def test_svhns_ten_is_the_digit_zero(tmp_path):
    with svhn(tmp_path / "sets"):
        test = data.load("svhn", "test", str(tmp_path / "sets"))
    assert test.labels.tolist() == [*range(1, 10), 0] * 2 and not test.flip
