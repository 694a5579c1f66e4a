"""--init, and the second stage, dual adversarial training (--loss dat)."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_refused, read_log, script, succeeded
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_data import write_folder
from test_survival import assert_same_run, assert_two_processes_train_as_one_does, training_of

import cem
import train_sup
from lib import data, distributed, interop
from lib.chains import GrowingChains, chain_starts, dual_state, mixed

CKPT = "runs/sup/ckpt.pt"
SMALL = "--dataset digits --epochs 1 --n-eval 36 --seed-rank 4".split()
DAT = [*SMALL, "--loss", "dat", "--attack-steps", 1, "--dat-max-steps", 6]


def train(*args, cwd, name="train_sup.py"):
    return succeeded(script(name, *args, cwd=cwd))


def untrained(folder, *args, name="train_sup.py"):
    """The model that a run begins with."""
    train(*args, "--out", "begun", "--max-minutes", 1e-9, cwd=folder, name=name)
    return cem.load(folder / "begun/ckpt.pt")


# ---------------------------------------------------------------------------------------- --init


def test_init_takes_weights_normalisation_and_shape_of_our_checkpoint(digits_run):
    first = cem.load(digits_run / CKPT)
    model = untrained(digits_run, *SMALL, "--init", CKPT)
    assert model.config == first.config
    for key, value in first.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    options = model.extra["options"]
    assert (options["arch"], options["width"]) == ("resnet18", 8)
    done = script(
        "train_sup.py", *SMALL, "--init", CKPT, "--width", 16, "--out", "other", cwd=digits_run
    )
    assert_refused(done, "has width 8, not 16")


@pytest.mark.parametrize("format", ["torchvision", "robustness"])
def test_init_takes_third_party_weights_and_another_number_of_classes(format, tmp_path):
    write_folder(tmp_path / "set", size=8)
    network = cem.ParametricCEM("resnet18", 7, width=8, mean=0.3, std=0.6)
    interop.export(tmp_path / "net.pt", network, format)
    options = "--dataset set --epochs 1 --n-eval 4 --init net.pt".split()
    done = train(*options, "--max-minutes", 1e-9, "--out", "begun", cwd=tmp_path)
    assert "the last layer of net.pt does not fit: starting with a new one" in done.stdout
    assert ("no pixel normalisation" in done.stdout) == (format == "torchvision")
    model = cem.load(tmp_path / "begun/ckpt.pt")
    assert model.config["num_classes"] == 2
    images = data.load(str(tmp_path / "set"), "train")
    mean = images.normalisation()["mean"] if format == "torchvision" else torch.full((3,), 0.3)
    torch.testing.assert_close(model.mean.flatten(), mean)
    for key, value in network.net.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(model.net.state_dict()[key], value), key
    given = untrained(tmp_path, *options, "--mean", 0, "--std", 1)
    assert given.mean.abs().max() == 0 and given.std.min() == 1


def test_init_takes_torchvision_weights_of_imagenet(tmp_path):
    write_folder(tmp_path / "set", size=32)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    options = "--dataset set --epochs 1 --n-eval 4 --init resnet18.pth".split()
    model = untrained(tmp_path, *options)
    assert model.config["arch"] == "resnet18-imagenet"
    assert torch.equal(model.net.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


def test_encoder_and_classifier_begin_from_each_other(digits_run, unsup_run):
    encoder = unsup_run / "runs/unsup/ckpt.pt"
    model = untrained(digits_run, *SMALL, "--init", encoder)
    body = cem.load(encoder).net.layer3.state_dict()
    assert all(torch.equal(v, model.net.layer3.state_dict()[k]) for k, v in body.items())
    options = [*SMALL, "--init", digits_run / CKPT, "--embed-dim", 16]
    model = untrained(unsup_run, *options, name="train_unsup.py")
    body = cem.load(digits_run / CKPT).net.layer3.state_dict()
    assert all(torch.equal(v, model.net.layer3.state_dict()[k]) for k, v in body.items())
    again = untrained(unsup_run, *SMALL, "--init", encoder, name="train_unsup.py")
    head = cem.load(encoder).net.fc.state_dict()
    assert all(torch.equal(v, again.net.fc.state_dict()[k]) for k, v in head.items())


def test_a_share_has_at_least_two_images_of_each_class():
    digits = data.load("digits", "train")
    counts = digits.share(0.001).labels.bincount()
    assert counts.tolist() == [2] * 10
    hundred = digits.subset((digits.labels == 0).nonzero()[:100, 0])
    hundred.classes = hundred.classes[:1]
    assert len(hundred.share(0.07)) == 7  # in floating point 0.07 x 100 is more
    tenth = digits.share(0.1)
    whole = digits.labels.bincount()
    assert ((tenth.labels.bincount() - 0.1 * whole) < 1).all()
    assert (tenth.labels.bincount() >= 0.1 * whole).all()
    positions = [
        int((digits.images == image).flatten(1).all(1).nonzero()[0]) for image in tenth.images
    ]
    assert positions == sorted(positions) and positions[-1] > 0.8 * len(digits)


def test_a_share_of_the_labels_is_evenly_spaced(tmp_path):
    write_folder(tmp_path / "set", size=8, per_class=8)
    whole = data.load(str(tmp_path / "set"), "train")
    options = "--dataset set --arch resnet18 --width 8 --epochs 1 --batch-size 2 --n-eval 2".split()
    train(*options, "--share", 0.5, "--seed-rank", 1, cwd=tmp_path)
    model = cem.load(tmp_path / CKPT)
    half = whole.images[torch.arange(len(whole) // 2) * 2]
    assert model.extra["training"]["step"] == len(half) // 2
    expected = half.flatten(1).float().mean(0) / 255
    found = model.extra["seeds"]["mean"][-1].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_init_refuses_what_does_not_fit(digits_run, tmp_path):
    write_folder(tmp_path / "set", size=8)
    colour = ["--dataset", "set", "--epochs", 1, "--out", "new"]
    done = script("train_sup.py", *colour, "--init", digits_run / CKPT, cwd=tmp_path)
    assert_refused(done, "has in_channels 1, not 3")
    done = script("train_sup.py", *colour, "--init", "none.pt", cwd=tmp_path)
    assert_refused(done, "none.pt not found")
    done = script("train_sup.py", *colour, "--mean", 0, "--std", 1, cwd=tmp_path)
    assert_refused(done, "--mean and --std are for the third-party checkpoint of --init")
    assert not (tmp_path / "new").exists()


def test_a_resumed_run_does_not_need_the_checkpoint_that_it_began_from(digits_run, tmp_path):
    (tmp_path / "first.pt").write_bytes((digits_run / CKPT).read_bytes())
    options = [*DAT, "--init", "first.pt", "--device", "cpu"]
    train(*options, "--out", "whole", cwd=tmp_path)
    train(*options, "--out", "parts", "--max-minutes", 1e-4, cwd=tmp_path)
    (tmp_path / "first.pt").unlink()
    done = train(*options, "--out", "parts", "--resume", cwd=tmp_path)
    assert "resuming" in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    chains = [training_of(tmp_path / run / "ckpt.pt")["chains"] for run in ("whole", "parts")]
    assert all(torch.equal(value, chains[1][key]) for key, value in chains[0].items())


# ---------------------------------------------------------------------------------------- chains


def test_chains_grow_only_when_samples_are_easily_told_from_data():
    chains = GrowingChains(longest=7, step_size=0.25)
    samples = torch.arange(10.0)
    for shift, auc, length in ((20, 1.0, 6), (0, 0.5, 6), (20, 1.0, 7), (20, 1.0, 7)):
        before = chains.length.item()
        for _ in range(8):
            assert chains.length == before
            assert chains.update(samples + shift, samples)["auc"].item() == pytest.approx(auc)
        assert chains.length == length
    assert GrowingChains(longest=3, step_size=0.25).length == 3
    for wins, grown in ((6, 0), (7, 1)):  # mean AUC of 0.75 and 0.875
        chains = GrowingChains(longest=7, step_size=0.25)
        for i in range(8):
            chains.update(samples + (20 if i < wins else -20), samples)
        assert chains.length == 5 + grown


def test_the_auc_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(40, generator=generator).round(decimals=1) + 0.5  # with ties
    outside = torch.randn(30, generator=generator).round(decimals=1)
    labels = [1] * 40 + [0] * 30
    expected = roc_auc_score(labels, torch.cat([inside, outside]).numpy())
    found = GrowingChains(5, 0.25).update(inside, outside)["auc"]
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_the_offsets_are_the_midpoints_of_the_first_step():
    logits = torch.tensor([[1.0, 2.0], [0.0, 5.0], [3.0, 3.0], [2.0, -1.0]])
    y = torch.tensor([0, 1, 1, 0])
    chains = GrowingChains(5, 0.25)
    chains.begin(logits, y)
    lse = logits.exp().sum(1).log()
    expected = torch.stack([lse.mean(), (logits[range(4), y] - lse).mean()])
    torch.testing.assert_close(chains.offsets, expected)


def test_chains_take_up_to_three_lengths_of_normalised_steps():
    chains = GrowingChains(5, 0.25)
    generator = SimpleNamespace(host=torch.Generator().manual_seed(0))
    x = torch.full((2, 1, 8, 8), 0.5)
    walked = set()
    for _ in range(40):
        x_s = chains.sample(lambda z: z.flatten(1).sum(1), x, generator)
        walked.add(round((x_s - x)[0].norm().item() / 0.25))
    assert walked == {3, 4, 5}


def test_every_image_climbs_the_potential_that_it_drew(model64, batch):
    x, y = batch[0].double(), batch[1]
    names = ["cs", "rcs", "langevin", "ta"]
    which = torch.tensor([3, 1, 0, 2, 0, 3])
    found = mixed(names, model64, y, which)(x)
    for i, k in enumerate(which):
        alone = cem.potential(names[k], model64, y[i : i + 1])(x[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------ runs


def test_the_loss_of_a_step_is_its_definition(model, batch):
    """CE + λ (BCE of log p(x) + BCE of log p(y | x)) + keep KL, without attack (eps 0)."""
    images, y = (batch[0] * 255).byte(), batch[1]
    train_set = data.Dataset("set", images, y, list("01234"), flip=False)
    opt = train_sup.Options(
        init="first.pt", eps=0.0, attack_steps=1, likelihood_weight=0.7, keep=2.0,
        chain_samplers="langevin,ta", dat_max_steps=1, precision="float32",
    )  # fmt: skip
    torch.manual_seed(1)
    reference = cem.ParametricCEM("resnet18", 5, width=4).eval()
    dual = dual_state(opt, reference, cem.PARAMETRIC_SAMPLERS)
    start = torch.rand(6, 3, 8, 8)
    batch_loss = train_sup.make_dual_loss(opt, train_set, lambda y, generator: start, dual)
    generator = distributed.RankGenerator(0, torch.device("cpu"))
    loss, metrics = batch_loss(model, torch.arange(6), torch.rand(6, 3), generator)
    x = train_set.pixels()
    drawn = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))  # as the generator does
    y_s = torch.tensor(sorted(y.tolist()))[(drawn[:, 0] * 6).long()]  # with the data's frequencies
    targeted = drawn[:, 1] >= 0.5
    assert 0 < targeted.sum() < 6
    x_s = start.clone()
    for name, rows in (("langevin", ~targeted), ("ta", targeted)):
        climbed = cem.potential(name, model, y_s[rows])
        x_s[rows] = cem.ascend(climbed, start[rows], steps=1, step_size=0.25)
    f, f_s, g = model(x), model(x_s), reference(x)
    lse, lse_s = f.logsumexp(1), f_s.logsumexp(1)
    b = (lse.mean() + lse_s.mean()) / 2
    bce = (1 + (b - lse).exp()).log().mean() + (1 + (lse_s - b).exp()).log().mean()
    p, p_s = f.log_softmax(1)[range(6), y], f_s.log_softmax(1)[range(6), y_s]
    b = (p.mean() + p_s.mean()) / 2
    of_samples = ((1 + (p_s - b).exp()).log() * targeted).sum() / 3  # 3 of 6 are expected
    bce = bce + (1 + (b - p).exp()).log().mean() + of_samples
    kl = (g.softmax(1) * (g.log_softmax(1) - f.log_softmax(1))).sum(1).mean()
    ce = -f.log_softmax(1).gather(1, y[:, None]).mean()
    assert loss.item() == pytest.approx((ce + 0.7 * bce + 2.0 * kl).item(), rel=1e-4)
    assert metrics["energy_gap"].item() == pytest.approx((lse - lse_s).mean().item(), abs=1e-4)


def test_dat_logs_its_curriculum_and_freezes_batch_norm(digits_run, tmp_path):
    options = [*DAT, "--init", digits_run / CKPT, "--clip", 0.01, "--ema", 0]
    train(*options, "--lr", 0.001, "--out", "run", cwd=tmp_path)
    (line,) = read_log(tmp_path / "run")
    names = {"auc", "chain_steps", "energy", "energy_s", "energy_gap", "gradient_norm"}
    assert names <= line.keys() and 0 <= line["auc"] <= 1
    assert line["energy_s"] - line["energy"] == pytest.approx(line["energy_gap"], abs=1e-3)
    first, model = cem.load(digits_run / CKPT), cem.load(tmp_path / "run/ckpt.pt")
    moved = 0.0
    for key, value in first.state_dict().items():
        if "running" in key:
            assert torch.equal(model.state_dict()[key], value), key
        moved += (model.state_dict()[key] - value).square().sum().item()
    # 11 steps of at most 0.001, momentum 0.9 and gradients of norm 0.01
    assert 0 < math.sqrt(moved) < 11 * 0.001 * 0.01 / (1 - 0.9) * 1.1
    steps = model.extra["settings"]["cs"]["steps"]
    assert steps == model.extra["training"]["chains"]["chains.length"].item() + 4
    done = script("sample.py", "--ckpt", "run/ckpt.pt", "--n", 10, cwd=tmp_path)
    assert f"settings of the checkpoint: --steps {steps} --step-size 0.05" in done.stdout


def test_chains_start_at_images_of_a_folder(digits_run, tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "others.npz", arr_0=images)
    seeds = cem.GaussianSeeds(torch.zeros(3, 64), torch.zeros(3, 64, 1), (1, 8, 8))
    start = chain_starts(str(tmp_path / "others.npz"), "data", seeds, torch.device("cpu"))
    generator = distributed.RankGenerator(0, torch.device("cpu"))
    drawn = start(torch.zeros(50, dtype=torch.int64), generator).mul(255).round().byte()
    originals = torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1)
    found = {int((row == originals).all(1).nonzero()) for row in drawn.flatten(1)}
    assert found == set(range(7))
    options = [*DAT, "--init", digits_run / CKPT, "--out", "run"]
    train(*options, "--chain-start", "others.npz", cwd=tmp_path)
    for wrong, part in (("absent", "absent not found"), (".", "contains no images")):
        done = script("train_sup.py", *options, "--chain-start", wrong, cwd=tmp_path)
        assert_refused(done, part)
    write_folder(tmp_path / "colour", size=8)
    done = script("train_sup.py", *options, "--chain-start", "colour", cwd=tmp_path)
    assert_refused(done, "--chain-start has images of (3, 8, 8), the dataset of (1, 8, 8)")
    for split, colour in (("train", 0), ("test", 255)):  # of a dataset, the training images
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        Image.new("L", (8, 8), colour).save(tmp_path / "set" / split / "a/0.png")
    start = chain_starts(str(tmp_path / "set"), "data", seeds, torch.device("cpu"))
    assert not start(40, generator).any()


def test_dat_needs_a_first_stage_that_fits(tmp_path):
    for name in ("train_sup.py", "train_unsup.py"):
        done = script(name, *DAT, "--width", 8, cwd=tmp_path)
        assert_refused(done, "--loss dat is a second stage: pass the first one's checkpoint")
    cem.save(tmp_path / "seven.pt", cem.ParametricCEM("resnet18", 7, width=8, in_channels=1))
    done = script("train_sup.py", *DAT, "--init", "seven.pt", "--out", "new", cwd=tmp_path)
    assert_refused(done, "does not fit: first train a new one with --loss at")
    other = cem.ParametricCEM("resnet18", 10, width=8, in_channels=1)
    cem.save(tmp_path / "names.pt", other, classes=[f"c{i}" for i in range(10)])
    done = script("train_sup.py", *DAT, "--init", "names.pt", "--out", "new", cwd=tmp_path)
    assert_refused(done, "names.pt does not fit these classes: first train a new one")
    cem.save(tmp_path / "large.pt", other, image_shape=[1, 16, 16])
    done = script("train_sup.py", *DAT, "--init", "large.pt", "--out", "new", cwd=tmp_path)
    assert_refused(done, "large.pt is for images of [1, 16, 16], not [1, 8, 8]")
    done = train(*SMALL, "--init", "names.pt", "--max-minutes", 1e-9, cwd=tmp_path)
    assert "does not fit these classes: starting with a new one" in done.stdout
    wrong = ["--init", "large.pt", "--chain-samplers", "cs,x"]
    done = script("train_sup.py", *DAT, *wrong, cwd=tmp_path)
    assert_refused(done, "--chain-samplers: unknown 'x'")


def test_two_processes_train_dat_as_one_does(digits_run, tmp_path):
    options = [*DAT, "--init", digits_run / CKPT]
    assert_two_processes_train_as_one_does("train_sup.py", *options, cwd=tmp_path)


def test_a_diverged_second_stage_stops_or_restarts(digits_run, tmp_path):
    options = [*DAT, "--init", digits_run / CKPT, "--max-energy-gap", 1e-6]
    done = script("train_sup.py", *options, cwd=tmp_path)
    assert done.returncode == 3 and "energy gap is" in done.stderr
    with mock.patch("lib.loop.MAX_RESTARTS", 1):
        done = script("train_sup.py", *options, "--resume", "--on-diverge", "restart", cwd=tmp_path)
    assert done.returncode == 3 and "1 restarts did not help" in done.stderr


@pytest.mark.slow
def test_dat_draws_better_digits_at_the_same_accuracy(tmp_path):
    """C-FD of cs by another classifier."""
    digits = ["--dataset", "digits"]
    train(*digits, "--loss", "st", "--seed", 5, "--epochs", 10, "--out", "judge", cwd=tmp_path)
    train(*digits, cwd=tmp_path)
    train(*digits, "--loss", "dat", "--init", CKPT, "--out", "dat", cwd=tmp_path)
    distance, accuracy = [], []
    for run in ("runs/sup", "dat"):
        ckpt = ["--ckpt", f"{run}/ckpt.pt"]
        drawn = [*ckpt, "--sampler", "cs", "--n", 300]
        succeeded(script("sample.py", *drawn, cwd=tmp_path))
        options = ["--samples", f"{run}/samples-cs.npz", "--ref", "digits"]
        succeeded(script("eval_is_fid.py", *options, "--features", "judge/ckpt.pt", cwd=tmp_path))
        (row,) = json.loads((tmp_path / run / "metrics.json").read_text())["rows"]
        distance.append(row["C-FD"])
        succeeded(script("eval_robust.py", *ckpt, cwd=tmp_path))
        accuracy.append(json.loads((tmp_path / run / "accuracy.json").read_text()))
    assert distance[1] < 0.8 * distance[0]
    for name in ("clean_accuracy", "pgd-20"):
        assert accuracy[1][name] > accuracy[0][name] - 0.015
