"""The network that a training step attacks, and what a step costs the host."""

import collections
import copy
import itertools
import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import read_log
from test_data import write_folder
from torch.utils._python_dispatch import TorchDispatchMode

import cem
import train_sup
import train_unsup
from lib import cli, data, distributed, loop, options
from lib.attack import AttackCopy, hold_out, make_watch, pgd_options
from lib.device import autocast

SMALL = dict(width=8, in_channels=3)


def moved(model, seed):
    """The model with other weights and statistics, as after a step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor *= 1 + 0.3 * torch.rand(tensor.shape, generator=generator)
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "arch, kind",
    [
        ("resnet18", cem.ParametricCEM), ("resnet50", cem.NonParametricCEM),
        ("wrn-16-4", cem.ParametricCEM), ("resnet18-imagenet", cem.ParametricCEM),
    ],
)  # fmt: skip
def test_the_copy_follows_the_model_bit_by_bit(arch, kind, precision):
    """Before and after steps, in training mode, the copy computes what folding anew computes."""
    model, network = kind(arch, **SMALL).train(), None
    attack_copy, x = AttackCopy(precision, False), torch.rand(3, 3, 16, 16)
    for seed in range(3):
        before = copy.deepcopy(moved(model, seed).state_dict())
        copied = attack_copy(model)
        assert network is None or network is copied, "one network for all steps"
        network = copied
        with torch.no_grad(), autocast(x.device, precision):
            torch.testing.assert_close(copied(x), cem.folded(model)(x), rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in copied.parameters()) and model.training
    kernels = {p.dtype for p in copied.parameters() if p.dim() == 4}
    assert kernels == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


class Calls(TorchDispatchMode):
    """Counts operator calls by name, without views."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.count[str(function)] += 1
        return function(*args, **kwargs or {})


def calls_of_steps(monkeypatch, out, **changes):
    """The operator calls of each training step on digits. (Those that check images and labels are
    left out: they do so on the CPU alone.)"""
    monkeypatch.setattr(cem, "_check_images", lambda *args: None)
    monkeypatch.setattr(cem, "_check_labels", lambda *args: None)
    steps, train_step = [], loop.Trainer.train_step

    def counted(*args):
        with Calls() as calls:
            metrics = train_step(*args)
        steps.append(calls.count)
        return metrics

    monkeypatch.setattr(loop.Trainer, "train_step", counted)
    small = dict(dataset="digits", arch="resnet18", width=8, epochs=1, n_eval=10, seed_rank=4)
    small["share"] = 3.5 * changes["batch_size"] / 1437
    train_sup.train(train_sup.Options(**small | changes, out=str(out)))
    assert len(steps) == 3
    return steps[1:]  # the first makes the copy


@pytest.mark.parametrize("optimizer, more", [("sgd", 0), ("muon", 400)])
def test_a_step_makes_few_operator_calls_and_waits_for_none(optimizer, more, monkeypatch, tmp_path):
    """PGD-7 on ResNet-18 in bfloat16: at most 1,300 calls, none of them to read a value."""
    options = dict(batch_size=64, precision="bfloat16", optimizer=optimizer)
    for count in calls_of_steps(monkeypatch, tmp_path, **options):
        assert count["aten.convolution.default"] == 8 * 20
        assert sum(count.values()) <= 1300 + more
        assert count["aten._to_copy.default"] <= 120 + more / 10
        assert count["aten._local_scalar_dense.default"] == 0


def test_refolding_copies_one_type_at_a_time(monkeypatch):
    """Mixed targets overran a GPU's memory in earlier versions of torch."""
    copied, copy_ = [], torch._foreach_copy_

    def recorded(targets, sources):
        copied.append({tensor.dtype for tensor in targets})
        copy_(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", recorded)
    AttackCopy("bfloat16", False)(cem.ParametricCEM("resnet18", 5, width=8))
    assert len(copied) == 2 and all(len(kinds) == 1 for kinds in copied)
    assert set().union(*copied) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("loss, own", [("jeat", 0), ("dat", 6)])
def test_a_step_with_samples_reads_no_value_from_the_device(loss, own, monkeypatch, tmp_path):
    """dat reads some of its own, which are on the CPU: the length of its chains, for example."""
    options = dict(loss=loss, batch_size=256, precision="float32", attack_steps=1, sgld_steps=1)
    options |= dict(reinit_from="gaussian", buffer=300, dat_max_steps=2)
    for count in calls_of_steps(monkeypatch, tmp_path, **options):
        assert count["aten._local_scalar_dense.default"] <= own
        assert not {"aten.nonzero.default", "aten._unique2.default"} & count.keys()


class Bright(torch.nn.Module):
    """Bright images are of class 0, dark ones of class 1."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        rest = [torch.zeros(len(x))] * (self.classes - 2)
        return torch.stack([mean, 1 - mean, *rest], 1)


class Pixels(torch.nn.Module):
    """An encoder whose embedding is the image."""

    temperature = 1.0

    def forward(self, x):
        return torch.nn.functional.normalize(x.flatten(1), dim=1)


@pytest.mark.parametrize("classes", [10, 2, 0])
@pytest.mark.parametrize("single, several, noticed", [(4, 1, True), (4, 2, False), (2, 0, False)])
def test_overfitting_is_half_of_more_than_30_percent(
    classes, single, several, noticed, monkeypatch
):
    """And of more than chance. The attacks make all but the first images black. 0: an encoder."""
    encoder = classes == 0

    def pgd(potential, x, *, steps, **_):
        return x * (torch.arange(len(x)) < (single if steps == 1 else several)).view(-1, 1, 1, 1)

    monkeypatch.setattr(cem, "pgd", pgd)
    options = train_sup.Options(attack="fgsm", precision="float32")
    x = torch.rand(10, 3, 8, 8) if encoder else torch.ones(10, 3, 8, 8)
    watch = make_watch(options, x, x if encoder else torch.zeros(10).long())
    network = Pixels() if encoder else Bright(classes)
    if noticed and classes != 2:
        with pytest.raises(cli.Diverged):
            watch(network)
    else:
        expected = [single / 10, max(several, int(encoder)) / 10]  # of all, black finds the first
        assert list(watch(network).values()) == pytest.approx(expected)


@pytest.mark.parametrize("encoder", [False, True])
def test_the_watch_needs_no_more_memory_than_a_training_step(encoder):
    x, seen = torch.rand(17, 3, 8, 8), set()
    network = Pixels() if encoder else Bright(10)
    network.register_forward_hook(lambda module, args, output: seen.add(len(args[0])))
    options = train_sup.Options(attack="fgsm", precision="float32", batch_size=4)
    with mock.patch.object(cem, "folded", lambda model: model):
        make_watch(options, x, x if encoder else torch.arange(17) % 10)(network)
    assert seen == {3, 4}


def test_the_watch_looks_every_200_steps(tmp_path):
    opt = options.TrainOptions(out=str(tmp_path), batch_size=2, ema=0.0, epochs=1)
    steps = []
    trainer = loop.Trainer(
        opt,
        cem.ParametricCEM("resnet18", 2, width=4),
        850,
        shuffle=lambda epoch: (torch.arange(850), torch.zeros(850, 1)),
        batch_loss=lambda model, *_: (model.net.fc.bias.sum(), {}),
        measure=lambda *_: {},
        watch=lambda model: steps.append(trainer.step) or {},
    )
    trainer.fit()
    assert steps == [200, 400, 425]


def test_the_speed_of_a_batch_that_is_the_whole_dataset(tmp_path, monkeypatch):
    clock = itertools.count()  # a second per reading
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    loop.Trainer(
        options.TrainOptions(out=str(tmp_path), batch_size=1000, ema=0.0, epochs=1),
        cem.ParametricCEM("resnet18", 2, width=4),
        10,
        shuffle=lambda epoch: (torch.arange(10), torch.zeros(10, 1)),
        batch_loss=lambda model, *_: (model.net.fc.bias.sum(), {}),
        measure=lambda *_: {},
    ).fit()
    assert 0 < read_log(tmp_path)[0]["images_per_second"] <= 10


def test_the_watch_does_not_delay_a_stop_by_a_signal(tmp_path):
    def batch_loss(model, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        return model.net.fc.bias.sum(), {}

    trainer = loop.Trainer(
        options.TrainOptions(out=str(tmp_path), batch_size=2, ema=0.0, epochs=1),
        cem.ParametricCEM("resnet18", 2, width=4),
        10,
        shuffle=lambda epoch: (torch.arange(10), torch.zeros(10, 1)),
        batch_loss=batch_loss,
        measure=lambda *_: {},
        watch=mock.Mock(),
    )
    with pytest.raises(SystemExit, match="143"):
        trainer.fit()
    assert trainer.step == 1 and not trainer.watch.called


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fgsm_is_one_step_of_eps_from_noise_of_twice_the_radius(norm):
    expected = dict(eps=0.1, norm=norm, steps=1, step_size=0.1, random_start=2)
    assert pgd_options(train_sup.Options(attack="fgsm", norm=norm, eps=0.1)) == expected


class Rippled(torch.nn.Module):
    """A single step of length 2 eps jumps over the wrong answers near a mean of 0.5 ± eps / 2."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        distance = (x.mean((1, 2, 3)) - 0.5).abs() / self.eps
        return torch.stack([(distance - 0.5).abs() - 0.3, torch.zeros(len(x))], 1)


@pytest.mark.parametrize("step_size, noticed", [(0.2, True), (0.05, False)])
def test_catastrophic_overfitting_is_noticed(step_size, noticed):
    """The network withstands one long step and no PGD-10. It does not withstand one short step."""
    options = train_sup.Options(
        norm="linf", eps=0.1, attack_steps=1, attack_step_size=step_size, precision="float32"
    )
    watch = make_watch(options, torch.full((20, 3, 8, 8), 128 / 255), torch.zeros(20).long())
    if noticed:
        with pytest.raises(cli.Diverged, match="catastrophic overfitting: accuracy 1.000 under"):
            watch(Rippled(0.1))
    else:
        assert watch(Rippled(0.1)) == {"single_step_accuracy": 0, "pgd10_accuracy": 0}


def test_a_run_that_overfits_continues_from_its_last_checkpoint(monkeypatch, tmp_path, capsys):
    """Called after every epoch, on images that are not trained on."""
    seen = []

    def make_watch(opt, x, y):
        def watch(model):
            seen.append(model.training)
            if len(seen) == 2:
                raise cli.Diverged("catastrophic overfitting")
            return {"pgd10_accuracy": len(seen)}

        assert len(x) == len(y) == 143
        return watch

    monkeypatch.setattr(train_sup, "make_watch", make_watch)
    options = dict(dataset="digits", arch="resnet18", width=8, epochs=2, n_eval=10, seed_rank=4)
    options |= dict(attack="fgsm", batch_size=640, on_diverge="restart", out=str(tmp_path))
    train_sup.train(train_sup.Options(**options))
    assert "catastrophic overfitting" in capsys.readouterr().err
    log = read_log(tmp_path)
    assert [(line["step"], line["pgd10_accuracy"]) for line in log] == [(2, 1), (4, 3)]
    train_set = data.load("digits", "train")
    held_out, rest = train_set.hold_out(143)
    assert len(rest) == len(train_set) - 143
    both = torch.cat([held_out.images, rest.images]).flatten(1)
    assert both.unique(dim=0).equal(train_set.images.flatten(1).unique(dim=0))


def test_of_a_few_images_two_are_held_out(tmp_path):
    write_folder(tmp_path / "set", size=8, per_class=10)
    options = dict(dataset=str(tmp_path / "set"), arch="resnet18", width=8, epochs=1, batch_size=2)
    options |= dict(attack="fgsm", seed_rank=2, out=str(tmp_path / "run"), n_eval=2)
    opt = train_sup.Options(**options)
    train_sup.train(opt)
    (line,) = read_log(tmp_path / "run")
    assert line["pgd10_accuracy"] in (0, 0.5, 1)
    held_out, rest = hold_out(opt, data.load(opt.dataset, "train"))
    assert (len(held_out), len(rest)) == (2, 18)
    assert hold_out(opt, rest) == (None, rest)


@pytest.mark.parametrize("attack, least, most", [("pgd", 0.0, 0.5), ("fgsm", 0.8, 1.5)])
def test_n_fgsm_trains_on_images_outside_of_the_ball(attack, least, most, monkeypatch):
    """Noise of 2 eps and a step of eps, of random directions: √5 eps apart, before clipping."""
    seen, loss_of = [], cem.supervised_loss

    def recording(name, model, x, y, x_adv, *more):
        seen.append((x_adv - x).flatten(1).norm(dim=1))
        return loss_of(name, model, x, y, x_adv, *more)

    monkeypatch.setattr(cem, "supervised_loss", recording)
    images = torch.randint(100, 156, (8, 3, 16, 16), dtype=torch.uint8)
    train_set = data.Dataset("noise", images, torch.arange(8), list("01234567"))
    options = train_sup.Options(attack=attack, precision="float32")
    model, centre = cem.ParametricCEM("resnet18", 8, **SMALL), torch.full((8, 3), 0.49)
    generator = distributed.RankGenerator(0, torch.device("cpu"))
    batch_loss = train_sup.make_batch_loss(options, train_set)
    batch_loss(model, torch.arange(8), centre, generator)
    assert (seen[0] > least).all() and (seen[0] <= most + 1e-5).all()


@pytest.mark.parametrize("loss, steps, size, watched", [
    ("at", 1, 0.5, 1), ("mle", 1, 0.5, 1), ("st", 1, 0.5, 0), ("at", 1, 0.4, 0), ("at", 2, 0.5, 0),
])  # fmt: skip
def test_single_steps_of_the_radius_are_watched(loss, steps, size, watched, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(train_sup, "make_watch", lambda opt, x, y: made.append(len(x)))
    monkeypatch.setattr(train_sup, "Trainer", mock.Mock())
    options = dict(dataset="digits", arch="resnet18", width=8, seed_rank=4, out=str(tmp_path))
    options |= dict(loss=loss, attack_steps=steps, attack_step_size=size)
    train_sup.train(train_sup.Options(**options))
    assert made == [143] * watched


@pytest.mark.parametrize("given, warned", [
    (dict(norm="linf", eps=8 / 255), True), (dict(eps=0.1), False), (dict(eps=0), False),
    (dict(eps=0.05, attack_steps=1), False), (dict(eps=0.05, attack="fgsm"), False),
])  # fmt: skip
def test_a_step_beyond_the_radius_is_a_warning(given, warned, capsys):
    train_sup.check(train_sup.Options(**given))
    usual = "exceeds --eps 0.0313725: usual is 2.5 eps / steps = 0.011"
    message = f"warning: --attack-step-size 0.1 {usual}\n"
    assert capsys.readouterr().err == message * warned
    with pytest.raises(cem.CEMError, match="--eps 0.5 with --norm linf allows any image"):
        train_sup.check(train_sup.Options(norm="linf"))


def test_a_single_step_on_an_encoder_is_watched(tmp_path):
    options = dict(dataset="digits", width=8, epochs=1, n_eval=10, seed_rank=4, out=str(tmp_path))
    with mock.patch.object(train_unsup, "make_watch", wraps=make_watch) as made:
        train_unsup.train(train_unsup.Options(**options, attack="fgsm", batch_size=640))
        train_unsup.train(train_unsup.Options(**options, loss="st", batch_size=640))
    (call,) = made.call_args_list
    _, x, x_plus = call.args
    assert x.shape == x_plus.shape == (143, 1, 8, 8) and not x.equal(x_plus)
    (previous,) = read_log(tmp_path / "previous-1")
    assert 0 <= previous["pgd10_accuracy"] <= previous["single_step_accuracy"] + 0.2
