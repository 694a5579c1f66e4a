"""The scripts as a user runs them: from the command line, with good and with bad input."""

import contextlib
import copy
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Optional
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, drawn_images, files, process, read_log, script, succeeded
from PIL import Image
from test_data import write_folder
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import cem
import sample
import train_sup
import train_unsup
from lib import cli, data, device, loop, pictures, robustness, sampling, schema
from lib.attack import AttackCopy
from lib.clusters import ClusterSeeds
from lib.device import resolve_precision

SCRIPTS = "train_sup.py train_unsup.py sample.py eval_is_fid.py eval_robust.py".split()
SCRIPTS += ["reproduce.py"]
SCRIPTS += ["results/sweep.py", "results/tables.py", "results/epsilon.py"]
SCRIPTS += ["bench/bench.py", "bench/cost.py", "bench/soak.py"]
CKPT = "runs/sup/ckpt.pt"
SMALL = "--dataset digits --width 8 --n-eval 36".split()


def options_of(name: str) -> list[dataclasses.Field]:
    return dataclasses.fields(importlib.import_module(Path(name).stem).Options)


# --------------------------------------------------------------------------------------- options


def test_digits_have_defaults_that_explicit_options_override():
    paper = cli.parse(train_sup.Options, "x", train_sup.preset, argv=[])
    assert (paper.arch, paper.width, paper.epochs) == ("resnet50", 64, 150)
    assert (paper.eps, paper.attack_steps, paper.attack_step_size) == (0.5, 7, 0.1)
    argv = ["--dataset", "digits", "--width", "64"]
    digits = cli.parse(train_sup.Options, "x", train_sup.preset, argv=argv)
    assert digits.width == 64 and digits.arch == "resnet18"
    assert digits.epochs == train_sup.DIGITS["epochs"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_describes_every_option(name, tmp_path):
    done = script(name, "--help", cwd=tmp_path)
    assert done.returncode == 0 and files(tmp_path) == []
    for field in options_of(name):
        assert f"--{field.name.replace('_', '-')} " in done.stdout.replace("\n", " ")
        assert len(field.metadata["help"]) > 4
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    if name.startswith("train"):
        assert len(lines) <= 80 and "--ema 0.97" in " ".join(done.stdout.split())
        headings = [line[:-1] for line in lines if line.endswith(":") and line[0] != " "]
        assert headings[:4] == ["data", "model", "optimisation", "attack"]
        assert headings[-1] == "run"


@pytest.mark.parametrize("name", SCRIPTS)
def test_float_options_are_numbers(name):
    for field in options_of(name):
        if field.type in (float, Optional[float], list[float]) and field.name != "max_minutes":
            assert field.metadata["type"] is cli.number, field.name


@pytest.mark.parametrize("module", [train_sup, train_unsup])
def test_only_the_time_limit_may_be_infinite(module):
    opt = cli.parse(module.Options, "x", argv=["--max-minutes", "inf"])
    assert opt.max_minutes == math.inf
    for value in ("nan", "-inf", "0"):
        with pytest.raises(cem.CEMError, match="--max-minutes must be greater than 0"):
            cli.parse(module.Options, "x", argv=[f"--max-minutes={value}"])


def test_fractions_are_numbers(digits_run, tmp_path):
    assert cli.number("8/255") == 8 / 255 and cli.number("-1e-3") == -1e-3
    (tmp_path / "ckpt.pt").write_bytes((digits_run / "runs/sup/ckpt.pt").read_bytes())
    draw = "--ckpt ckpt.pt --n 2 --step-size 1/4".split()
    succeeded(script("sample.py", *draw, cwd=tmp_path))
    assert json.loads((tmp_path / "samples-rcs.json").read_text())["step_size"] == 0.25
    attack = "--ckpt ckpt.pt --n 2 --attacks pgd-10 --eps 8/255".split()
    succeeded(script("eval_robust.py", *attack, cwd=tmp_path))
    assert json.loads((tmp_path / "accuracy.json").read_text())["eps"] == 8 / 255


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_learning_rate_rises_to_the_peak_and_falls_to_zero(schedule):
    rates = [loop.learning_rate(i / 1000, 0.2, schedule) for i in range(1001)]
    top = rates.index(max(rates))
    assert top == {"onecycle": 300, "cosine": 20}[schedule]
    assert max(rates) == pytest.approx(0.2, rel=1e-3) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    at, expected = {
        "onecycle": ([150, 650], [0.1, 0.1]),
        "cosine": ([10, 265], [0.1, 0.1 * (1 + math.cos(math.pi / 4))]),
    }[schedule]
    assert [rates[i] for i in at] == pytest.approx(expected)


def test_scripts_run_as_processes(digits_run, tmp_path):
    draw = ["--ckpt", digits_run / "runs/sup/ckpt.pt", "--n", 10, "--out", tmp_path / "out"]
    done = succeeded(process("sample.py", *draw, cwd=tmp_path))
    assert f"wrote {tmp_path / 'out/samples-rcs.npz'}" in done.stdout
    assert files(tmp_path / "out") == ["samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"]


def test_scripts_fail_as_processes_with_a_single_line(tmp_path):
    done = process("sample.py", "--ckpt", "missing.pt", cwd=tmp_path)
    assert_refused(done, "missing.pt")
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


# -------------------------------------------------------------------------------------- training


def test_training_writes_checkpoint_log_and_events(digits_run):
    run = digits_run / "runs/sup"
    log = read_log(run)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in log] == [11, 22, 33, 44, 55]
    assert {"loss", "lr", "clean_accuracy", "adversarial_accuracy"} <= log[0].keys()
    assert {"images_per_second", "seconds"} <= log[0].keys() and log[-1]["loss"] < log[0]["loss"]
    assert any(name.startswith("events") for name in files(run))
    assert json.loads((run / "options.json").read_text())["width"] == 8
    model = cem.load(run / "ckpt.pt")
    assert model.config["width"] == 8 and model.extra["classes"] == list("0123456789")
    average, last = model.state_dict(), model.extra["training"]["model"]
    assert not torch.equal(average["net.conv1.weight"], last["net.conv1.weight"])


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path):
    """With Muon; tests/test_survival.py stops runs with SGD."""
    options = [*SMALL, "--epochs", 3, "--ema", 0.9, "--optimizer", "muon", "--attack-steps", 1]
    succeeded(script("train_sup.py", *options, "--out", "whole", cwd=tmp_path))
    first = script("train_sup.py", *options, "--out", "parts", "--max-minutes", 1e-4, cwd=tmp_path)
    assert first.returncode == 0 and "stopped" in first.stdout
    assert 0 < cem.load(tmp_path / "parts/ckpt.pt").extra["training"]["step"] < 33
    other = ["--dataset", "digits", "--width", 16, "--out", "parts", "--resume"]
    assert_refused(script("train_sup.py", *other, cwd=tmp_path), "--width 8, not 16")
    succeeded(script("train_sup.py", *options, "--out", "parts", "--resume", cwd=tmp_path))
    whole, parts = (cem.load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    logs = [read_log(tmp_path / name) for name in ("whole", "parts")]
    assert [line["epoch"] for line in logs[1]] == [1, 2, 3]
    for a, b in zip(*logs):
        assert all(a[k] == b[k] for k in a if k not in ("seconds", "images_per_second"))


def test_resume_starts_a_missing_run_and_torchrun_needs_it_for_restarts(tmp_path):
    restarts = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    options = [*SMALL, "--loss", "st"]
    done = script("train_sup.py", *options, cwd=tmp_path, **restarts)
    assert_refused(done, "torchrun --max-restarts needs --resume")
    options.append("--resume")
    done = script("train_sup.py", *options, "--epochs", 1, cwd=tmp_path, **restarts)
    assert done.returncode == 0 and "nothing to resume in runs/sup: starting" in done.stdout
    done = script("train_sup.py", *options, "--epochs", 2, cwd=tmp_path, **restarts)
    assert done.returncode == 0 and "resuming at step 11 of 22" in done.stdout
    assert len(read_log(tmp_path / "runs/sup")) == 2


def test_a_run_is_not_resumed_on_other_images(tmp_path):
    write_folder(tmp_path / "set", per_class=6)
    options = "--dataset set --arch resnet18 --width 8 --loss st --resume --epochs".split()
    succeeded(script("train_sup.py", *options, 1, cwd=tmp_path))
    image = next((tmp_path / "set/train").glob("*/*"))
    image.rename(tmp_path / "moved.png")
    done = script("train_sup.py", *options, 2, cwd=tmp_path)
    assert_refused(done, "--resume: the run has num_images 12, the dataset 11")
    (tmp_path / "moved.png").rename(image)
    model = cem.load(tmp_path / CKPT)  # as the version before wrote it
    del model.extra["num_images"], model.extra["training"]["restarted_at"]
    cem.save(tmp_path / CKPT, model, **model.extra)
    succeeded(script("train_sup.py", *options, 2, cwd=tmp_path))
    (tmp_path / "set").rename(tmp_path / "elsewhere")  # the same images
    done = script("train_sup.py", *options, 3, "--dataset", "elsewhere", cwd=tmp_path)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    done = script("train_sup.py", *options, 3, "--dataset", "digits", cwd=tmp_path)
    assert_refused(done, "--resume: the run in runs/sup has --dataset elsewhere, not digits")


def test_a_signal_that_is_sent_twice_stops_once(monkeypatch):
    with cli.Stop(math.inf) as stop:
        for _ in range(2):  # such as by SLURM and by torchrun
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.due() and stop.reason == "by SIGTERM"
        monkeypatch.setattr(cli.time, "monotonic", lambda: math.inf)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_training_on_an_image_folder_with_mle_and_linf(tmp_path):
    write_folder(tmp_path / "set", per_class=6)
    options = "--dataset set --arch wrn-28-10 --width 8 --epochs 1 --batch-size 6"
    options += " --loss mle --norm linf --eps 8/255"
    succeeded(script("train_sup.py", *options.split(), cwd=tmp_path))
    assert json.loads((tmp_path / "runs/sup/options.json").read_text())["eps"] == 8 / 255
    images, labels = drawn_images(tmp_path, "--n", 4)
    assert images.shape == (4, 10, 10, 3) and labels.tolist() == [0, 1, 0, 1]


def test_the_running_average_is_pytorchs(batch):
    """Bit for bit AveragedModel's with the same decay, except for the counts of batches."""
    model = cem.ParametricCEM("resnet18", width=4)
    average = copy.deepcopy(model)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        model.train()(batch[0]).square().mean().backward()
        optimizer.step()
        loop.ema_update(average, model, 0.9 if step else 0.0)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    floats = {k: v for k, v in average.state_dict().items() if v.is_floating_point()}
    assert floats and all(torch.equal(value, expected[name]) for name, value in floats.items())
    assert not torch.equal(average.net.conv1.weight, model.net.conv1.weight)


def test_eval_robust_agrees_with_the_accuracy_computed_here(digits_run):
    done = succeeded(script("eval_robust.py", cwd=digits_run))
    result = json.loads((digits_run / "runs/sup/accuracy.json").read_text())
    model, test = cem.load(digits_run / "runs/sup/ckpt.pt"), data.load("digits", "test")
    clean = (model(test.pixels()).argmax(1) == test.labels).float().mean().item()
    assert result["clean_accuracy"] == pytest.approx(clean, abs=1.5 / 360)  # one image, by rounding
    assert result["adversarial_accuracy"] < clean and result["n"] == 360
    assert f"clean accuracy: {result['clean_accuracy']:.2%}" in done.stdout


# -------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampler", [*cem.PARAMETRIC_SAMPLERS, "seeds"])
def test_sample_writes_npz_grid_and_record(sampler, digits_run):
    succeeded(script("sample.py", "--sampler", sampler, "--n", 30, "--noise", 0.01, cwd=digits_run))
    name = digits_run / f"runs/sup/samples-{sampler}"
    with np.load(f"{name}.npz", allow_pickle=False) as z:
        assert z["arr_0"].dtype == np.uint8 and z["arr_0"].shape == (30, 8, 8, 1)
        assert z["arr_1"].dtype == np.int64 and z["arr_1"].tolist() == [*range(10)] * 3
    assert Image.open(f"{name}.png").size[1] == 10 * 66 + 2  # one row per class
    record = json.loads(name.with_suffix(".json").read_text())
    assert record["sampler"] == sampler and record["images_per_second"] > 0


def test_image_i_depends_on_the_seed_and_i_alone(digits_run):
    noisy = "--sampler langevin --noise 0.02 --jitter 1 --precision float32".split()
    first, _ = drawn_images(digits_run, *noisy, "--n", 40)
    for other in (["--n", 40, "--batch-size", 7], ["--n", 25]):
        again, _ = drawn_images(digits_run, *noisy, *other)
        assert np.abs(first[: len(again)] - again).max() <= 1  # rounding
    changed, _ = drawn_images(digits_run, *noisy, "--n", 40, "--seed", 1)
    assert (np.abs(first - changed).reshape(40, -1).max(1) > 20).all()


def test_options_of_sample_do_something(digits_run):
    base = "--sampler rcs --n 20 --step-size 0.25".split()
    default, _ = drawn_images(digits_run, *base)
    changes = ["--start noise", "--steps 2", "--step-size 0.1", "--norm linf"]
    for change in [*changes, "--norm none", "--noise 0.1", "--momentum 0.9", "--jitter 2"]:
        images, _ = drawn_images(digits_run, *base, *change.split())
        assert np.abs(images - default).max() > 5, change
    _, labels = drawn_images(digits_run, "--n", 5, "--classes", "7,2")
    assert labels.tolist() == [7, 2, 7, 2, 7]


def test_jitter_covers_all_shifts_of_up_to_n_pixels():
    """The gradient of one pixel of the shifted image lands where that pixel came from."""
    pixel = sample.jittered(lambda x: x[:, 0, 3, 4], 2, seed=0)
    x = torch.zeros(2, 1, 9, 9)
    x = cem.ascend(pixel, x, steps=300, step_size=1, norm="none", clip=None)
    counts = torch.zeros(9, 9)
    counts[1:6, 2:7] = 300 / 25
    assert torch.equal(x[0], x[1]) and torch.equal(x[0, 0] > 0, counts > 0)
    assert (x[0, 0] - counts).abs().max() < 15 and x[0].sum() == 300


class Brightness(torch.nn.Module):
    """p(x) ∝ the brightest of 256 levels of x."""

    def forward(self, x):
        return (255 * x).amax((1, 2, 3)).log()[:, None]


def test_candidates_are_kept_in_proportion_to_their_density(monkeypatch):
    """In float32, unlike a process's default, so that a resumed run keeps the same ones."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    n, levels = 4000, torch.tensor([10, 20, 50], dtype=torch.uint8)
    images = levels.repeat(n)[:, None, None, None].expand(-1, 1, 2, 2)
    opt = sample.Options(n=n, candidates=3, batch_size=1000)
    log_p, cpu = sampling.density(Brightness(), "cpu"), torch.device("cpu")
    kept = sampling.choose(log_p, images, opt, cpu)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.equal(kept // 3, torch.arange(n))
    share = (kept % 3).bincount() / n
    assert (share - levels / levels.sum()).abs().max() < 0.03  # four standard errors
    opt.best = True
    assert (sampling.choose(log_p, images, opt, cpu) % 3 == 2).all()


def test_one_of_the_candidates_of_each_image_is_drawn(digits_run):
    base = "--sampler cs --precision float32 --classes 3,5 --candidates 4".split()
    drawn, labels = drawn_images(digits_run, *base, "--n", 5)
    again, _ = drawn_images(digits_run, *base, "--n", 3, "--batch-size", 5)
    best, _ = drawn_images(digits_run, *base, "--n", 5, "--best")
    assert np.abs(drawn[:3] - again).max() <= 1 and labels.tolist() == [3, 5, 3, 5, 3]
    model = cem.load(digits_run / CKPT)
    opt = sample.Options("cs", n=5, candidates=4, classes="3,5", precision="float32", batch_size=4)
    sampling.use_settings(opt, model)
    seeds = sampling.seeds_of(model, opt.cond)
    for i in range(5):
        four, y = sample.draw_batch(model, seeds, opt, torch.device("cpu"), 4 * i)
        log_p = model(four / 255).logsumexp(1)
        four = four.permute(0, 2, 3, 1).int().numpy()
        assert (y == labels[i]).all()
        assert min(np.abs(x - drawn[i]).max() for x in four) <= 1
        assert np.abs(four[log_p.argmax()] - best[i]).max() <= 1


def test_a_checkpoint_without_seeds_takes_those_of_its_dataset(digits_run, tmp_path):
    model = cem.load(digits_run / CKPT)
    kept = {key: model.extra[key] for key in ("classes", "dataset", "image_shape")}
    cem.save(tmp_path / "bare.pt", model, **kept)
    assert_refused(script("sample.py", "--ckpt", "bare.pt", cwd=tmp_path), "bare.pt has no seeds")
    write_folder(tmp_path / "photos")
    other = ["--ckpt", "bare.pt", "--dataset", "photos"]
    assert_refused(script("sample.py", *other, cwd=tmp_path), "is for images of [1, 8, 8]")
    info = data.load("digits", "train").checkpoint_info(sampling.SEED_RANK)
    cem.save(tmp_path / "whole.pt", model, **info)
    expected, _ = drawn_images(tmp_path, "--n", 20, "--ckpt", "whole.pt")
    found, _ = drawn_images(tmp_path, "--n", 20, "--ckpt", "bare.pt", "--dataset", "digits")
    assert np.array_equal(found, expected)


DENSITIES = {  # written out
    "ta": lambda f, y: f.log_softmax(1)[range(len(y)), y],
    "langevin": lambda f, y: f.exp().sum(1).log(),
    "cs": lambda f, y: f[range(len(y)), y],
    "rcs": lambda f, y: f[range(len(y)), y] + f.exp().sum(1).log(),
}


@pytest.mark.parametrize("sampler", DENSITIES)
def test_each_sampler_climbs_its_density_from_the_seeds_of_its_images(sampler, digits_run):
    """Images 4 to 8 of --seed 0, with noise."""
    model = cem.load(digits_run / CKPT)
    seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"])
    options = dict(steps=3, step_size=0.3, noise=0.02, norm="l2")
    opt = sample.Options(sampler=sampler, precision="float32", batch_size=5, **options)
    drawn, y = sample.draw_batch(model, seeds, opt, torch.device("cpu"), 4)
    assert y.tolist() == [4, 5, 6, 7, 8]
    random = [torch.Generator().manual_seed(i) for i in range(4, 9)]
    x = seeds.sample(y, random)
    density = DENSITIES[sampler]
    x = cem.ascend(lambda x: density(model(x), y), x, model=model, generator=random, **options)
    assert (drawn.float() - 255 * x).abs().max() < 1
    others = [name for name in DENSITIES if name != sampler]
    for name in others:
        opt.sampler = name
        other, _ = sample.draw_batch(model, seeds, opt, torch.device("cpu"), 4)
        assert (other.float() - drawn.float()).abs().max() > 10


@pytest.mark.parametrize("sampler", ["cs", "ta", "rcs", "langevin"])
def test_sixteen_steps_cost_sixteen_passes(sampler, digits_run):
    opt = sample.Options(sampler=sampler, steps=16, precision="float32", batch_size=4)
    model = sampling.load_model(digits_run / CKPT, torch.device("cpu"), opt)
    sampling.use_settings(opt, model)
    seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"])
    passes = []
    model.register_forward_hook(lambda *_: passes.append("forward"))
    model.net.conv1.register_full_backward_hook(lambda *_: passes.append("backward"))
    sample.draw_batch(model, seeds, opt, torch.device("cpu"), 0)
    assert passes == ["forward", "backward"] * 16


def test_only_coupled_samplers_draw_more_images_than_asked(digits_run, unsup_run):
    for ckpt, sampler, n in (
        (digits_run / CKPT, "rcs", 3),
        (unsup_run / "runs/unsup/ckpt.pt", "maxent", 5),
    ):
        opt = sample.Options(sampler=sampler, n=8, batch_size=5, steps=1, precision="float32")
        model = sampling.load_model(ckpt, torch.device("cpu"), opt)
        sampling.use_settings(opt, model)
        seeds = sampling.seeds_of(model, opt.cond)
        images, labels = sample.draw_batch(model, seeds, opt, torch.device("cpu"), 5)
        assert len(images) == len(labels) == n


def length_of_a_step(side: int, **options) -> float:
    model = SimpleNamespace(extra={"seeds": {"shape": (3, side, side)}})
    opt = sample.Options(**options)
    sampling.use_settings(opt, model)
    return opt.step_size


def test_the_default_step_walks_the_tuned_displacement_for_any_steps_and_size():
    for steps in (4, 16):
        length = length_of_a_step(32, steps=steps)
        assert steps * length == pytest.approx(sampling.DISPLACEMENT["rcs"])
        assert length_of_a_step(64, steps=steps) == pytest.approx(2 * length)
        sign = length_of_a_step(32, steps=steps, norm="linf")
        assert sign * math.sqrt(3 * 32 * 32) == pytest.approx(length)


TUNED = dict(steps=3, step_size=0.5, noise=0.0, norm="l2")


def test_settings_of_a_checkpoint_are_used_unless_told_otherwise(digits_run, tmp_path):
    model = cem.load(digits_run / CKPT)
    cem.save(tmp_path / "tuned.pt", model, **model.extra | {"settings": {"rcs": TUNED}})

    def drawn(*args):
        done = succeeded(script("sample.py", "--ckpt", "tuned.pt", "--n", 2, *args, cwd=tmp_path))
        record = json.loads(max(tmp_path.glob("*.json"), key=os.path.getmtime).read_text())
        return {key: record[key] for key in TUNED}, done.stdout

    found, stdout = drawn()
    assert found == TUNED
    assert "settings of the checkpoint: --steps 3 --step-size 0.5 --noise 0.0 --norm l2" in stdout
    assert drawn("--steps", 2)[0] == TUNED | {"steps": 2}
    found, _ = drawn("--norm", "linf")  # for which the tuned length means another distance
    assert found["steps"] == 3 and found["step_size"] < 0.1
    untuned, stdout = drawn("--sampler", "cs")
    assert untuned["steps"] == 8 and "settings" not in stdout


@pytest.mark.parametrize(
    "wrong",
    [
        *([], {"rcs": []}, {"rcs": {}}, {"rcs": TUNED | {"steps": 0}}),
        *({"rcs": TUNED | {"steps": 2.5}}, {"rcs": TUNED | {"norm": "l3"}}),
        *({"rcs": TUNED | {"noise": -1}}, {"rcs": TUNED | {"step_size": math.nan}}),
    ],
)
def test_damaged_settings_are_refused(wrong, digits_run, tmp_path):
    model = cem.load(digits_run / CKPT)
    cem.save(tmp_path / "wrong.pt", model, **model.extra | {"settings": wrong})
    done = script("sample.py", "--ckpt", "wrong.pt", "--n", 2, cwd=tmp_path)
    assert_refused(done, "its settings must be")


def test_a_gif_ends_with_the_samples_and_is_small(digits_run, tmp_path):
    draw = ["--ckpt", digits_run / CKPT, "--n", 20, "--gif", "--out", "out"]
    draw += ["--candidates", 2, "--batch-size", 20]  # two batches
    succeeded(script("sample.py", *draw, cwd=tmp_path))
    with Image.open(tmp_path / "out/samples-rcs.gif") as gif:
        assert gif.n_frames == 9  # the seeds and 8 steps
        first = np.asarray(gif.convert("L"), dtype=float)
        gif.seek(8)
        last = np.asarray(gif.convert("L"), dtype=float)
    arrays = np.load(tmp_path / "out/samples-rcs.npz")
    images, labels = (torch.from_numpy(arrays[f"arr_{i}"]) for i in (0, 1))
    expected = pictures.grid(images.permute(0, 3, 1, 2), labels, side=32)[0].numpy()
    assert np.abs(last - expected).mean() < 4 < np.abs(first - expected).mean()


def test_a_gif_of_100_images_is_at_most_2_megabytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (100, 3, 32, 32), generator=generator) for _ in range(25)]
    pictures.write_gif(tmp_path / "a.gif", [x.byte() for x in noise], torch.arange(100) % 10)
    assert os.path.getsize(tmp_path / "a.gif") < 2_000_000


def test_a_sampler_raises_the_share_of_the_wanted_class(digits_run):
    """The network assigns few noise images to their label, and nearly all after climbing."""
    climb = "--sampler ta --start noise --steps 40 --step-size 0.2 --n 50".split()
    drawn, labels = drawn_images(digits_run, *climb)
    model = cem.load(digits_run / "runs/sup/ckpt.pt")
    predicted = model(torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255).argmax(1)
    assert (predicted.numpy() == labels).mean() > 0.8


# --------------------------------------------------------------------------- shipped checkpoints


@pytest.mark.parametrize("sampler", ["rcs", "maxent", "neighbour", "marginal"])
def test_shipped_checkpoints_draw_without_dataset_or_network(sampler, tmp_path):
    draw = ["--sampler", sampler, "--n", 20, "--batch-size", 20, "--steps", 2]
    done = succeeded(script("sample.py", *draw, cwd=tmp_path))
    assert str(ROOT / "checkpoints") in done.stdout
    with np.load(tmp_path / f"runs/shipped/samples-{sampler}.npz") as z:
        assert z["arr_0"].shape == (20, 32, 32, 3)


def test_shipped_checkpoints_are_small_and_name_no_machine():
    paths = sorted((ROOT / "checkpoints").glob("*.pt"))
    assert [path.stem for path in paths] == ["judge", "sup", "unsup"]
    assert sum(path.stat().st_size for path in paths) < 40e6
    for path in paths:
        extra = cem.load(path).extra
        assert "training" not in extra and "/" not in extra["dataset"]
        assert not str(extra["options"]["out"]).startswith("/")


def test_maxent_raises_the_entropy_of_the_shipped_encoders_batch_and_pgd_lowers_it():
    model = cem.folded(cem.load(ROOT / "checkpoints/unsup.pt"))
    seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"])
    x = seeds.sample(24, torch.Generator().manual_seed(0))
    entropy, curves = cem.potential("maxent", model), {"maxent": [], "pgd": []}
    for name, curve in curves.items():
        potential, images = cem.potential(name, model, x), x
        for i in range(3):  # from ten steps on, pgd's rises again
            if i > 0:
                images = cem.ascend(potential, images, steps=5, step_size=0.25)
            with torch.no_grad():
                curve.append(entropy(images).mean().item())
    assert curves["maxent"] == sorted(curves["maxent"])
    assert curves["maxent"][-1] > curves["maxent"][0] + 0.3
    assert max(curves["pgd"][1:]) < curves["pgd"][0] - 0.3


# ---------------------------------------------------------------------------------------- device


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_compiled_networks_compute_what_eager_ones_do_and_are_compiled_once(model64, batch):
    """In float64, where only the order of additions differs: three steps with their attacks.

    Two residual blocks, one with a projection, compile in a fraction of the time of eight.
    """
    x, y, graphs = batch[0].double(), batch[1], []
    del model64.net.layer1[1], model64.net.layer2[1]
    model64.net.layer3 = model64.net.layer4 = torch.nn.Identity()
    model64.net.fc = torch.nn.Linear(8, 5, dtype=torch.float64)
    network, twin = model64.train(), copy.deepcopy(model64).train()
    network.compile()
    compiled = AttackCopy("float32", True)
    for _ in range(3):
        x_adv, losses = [], []
        for net, attack_copy in ((network, compiled), (twin, AttackCopy("float32", False))):
            potential = cem.potential("ce", attack_copy(net), y)
            generator = torch.Generator().manual_seed(0)
            x_adv.append(cem.pgd(potential, x, eps=0.5, steps=2, generator=generator))
            losses.append(cem.supervised_loss("at", net, x, y, x_adv[-1])[0])
            net.zero_grad()
            losses[-1].backward()
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        torch.testing.assert_close(*x_adv, rtol=0, atol=1e-8)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-8)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    parameters = list(network.parameters()), list(twin.parameters())
    torch.testing.assert_close(*parameters, rtol=0, atol=1e-8)
    assert graphs[0] >= 2 and graphs == graphs[:1] * 3
    assert compiled(network) is compiled(network)  # a step leaves no network behind


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_only_where_the_cpu_computes_in_it(native, monkeypatch):
    """oneDNN supports it on every CPU with AVX-512, but may emulate it, slower than float32."""
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no AVX-512")
    expected = "bfloat16" if native else "float32"
    assert resolve_precision(torch.device("cpu"), "auto") == expected


def test_only_training_lets_cudnn_choose_kernels_by_speed(digits_run, tmp_path, monkeypatch):
    """Evaluation and sampling should repeat their figures."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    draw = ["--ckpt", digits_run / "runs/sup/ckpt.pt", "--n", 2, "--steps", 1, "--out", "."]
    succeeded(script("sample.py", *draw, cwd=tmp_path))
    assert not torch.backends.cudnn.benchmark
    measure, while_measuring = robustness.accuracy, []

    def measured(*args):
        assert len(args[1]) == 360  # the test set
        while_measuring.append(torch.backends.cudnn.benchmark)
        return measure(*args)

    monkeypatch.setattr(robustness, "accuracy", measured)
    done = script("train_sup.py", *SMALL, "--epochs", 1, "--loss", "st", cwd=tmp_path)
    assert done.returncode == 0 and torch.backends.cudnn.benchmark
    assert while_measuring == [False]


def test_auto_is_not_mps(monkeypatch):
    """PyTorch's BatchNorm had wrong gradients there for tensors in channels_last."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick_device("auto").type == "cpu"


def test_under_torchrun_processes_have_their_own_gpus_and_only_the_attack_is_compiled(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("cuda:0", "mps"):
        with pytest.raises(cem.CEMError, match="own GPU: --device cuda or cpu, not"):
            device.pick_device(name)
    network = cem.ParametricCEM("resnet18", 2, width=8)
    device.compile_network(network, torch.device("cpu"))
    assert network._compiled_call_impl is None
    assert AttackCopy("float32", True)(network)._compiled_call_impl is not None


@pytest.mark.parametrize("name", [r"..\..\evil", r"C:\evil", "C:evil", "../evil", "..", "."])
def test_class_names_do_not_leave_their_folder_on_windows(name, monkeypatch):
    monkeypatch.setattr(schema, "Path", PureWindowsPath)
    with pytest.raises(cem.CEMError, match="must be a name, not a path"):
        schema._check_classes([name], 1)


def test_png_files_that_cannot_be_written_cost_no_finished_batch(digits_run, tmp_path):
    draw = ["--ckpt", digits_run / CKPT, "--n", 20, "--png", "p", "--out", "."]
    with mock.patch.object(pictures, "write_files", side_effect=OSError("disk full")):
        assert_refused(script("sample.py", *draw, cwd=tmp_path), "disk full")
    done = script("sample.py", *draw, cwd=tmp_path)
    assert done.returncode == 0 and "resuming with 1 finished batch" in done.stdout
    assert {path for path in files(tmp_path) if "/" not in path} == {
        "samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"
    }  # fmt: skip


def test_an_interrupted_set_is_written_again_under_its_name(digits_run, tmp_path):
    draw = ["--ckpt", digits_run / CKPT, "--n", 20, "--out", "."]
    with mock.patch.object(pictures, "write_grid", side_effect=OSError("disk full")):
        assert_refused(script("sample.py", *draw, cwd=tmp_path), "disk full")
    done = script("sample.py", *draw, cwd=tmp_path)
    assert done.returncode == 0 and "not drawn with these" not in done.stdout
    assert files(tmp_path) == ["samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"]


def test_auto_precision_is_the_one_that_it_stands_for(digits_run, tmp_path):
    """Batches of an interrupted draw are continued in the same one only."""
    draw = ["--ckpt", digits_run / "runs/sup/ckpt.pt", "--n", 2, "--steps", 1, "--out", "."]
    sets = []
    own = resolve_precision(torch.device("cpu"), "auto")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[own]
    for precision, name in (("auto", ""), (own, ""), (other, "-1")):
        succeeded(script("sample.py", *draw, "--precision", precision, cwd=tmp_path))
        sets.append(json.loads((tmp_path / f"samples-rcs{name}.json").read_text())["set"])
    assert sets[0] == sets[1] != sets[2]


@pytest.mark.slow
def test_compile_without_a_compiler_is_a_clear_error(tmp_path):
    with mock.patch.dict(os.environ, {"CXX": "/nonexistent"}):
        done = process("train_sup.py", *SMALL, "--loss", "st", "--compile", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    failed, reason = done.stderr.strip().splitlines()[-1].split(", leave out --compile: ")
    assert failed == "error: torch.compile failed" and "compiler" in reason.lower()


FAULTS = """
import resource, torch
from lib.device import pick_device
pick_device("cpu")
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="not glibc")
def test_freed_memory_is_reused_without_page_faults():
    """64 MiB are 16,384 pages, or 32 huge ones."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 or platform.libc_ver()[1] < "2.35"


def test_average_of_a_short_run_does_not_remember_the_first_weights(tmp_path):
    """Its decay grows: min(--ema, t / (t + 10)), by a recursion in float64."""
    options = [*SMALL, "--loss", "st", "--epochs", 2, "--ema", 0.6]
    weights, update = [], loop.ema_update

    def recorded(average, model, decay):
        weights.append(model.net.fc.weight.detach().double())
        update(average, model, decay)

    with mock.patch.object(loop, "ema_update", recorded):
        succeeded(script("train_sup.py", *options, cwd=tmp_path))
    average = weights[0]
    for t, weight in enumerate(weights[1:], 1):
        decay = min(0.6, t / (t + 10))
        average = decay * average + (1 - decay) * weight
    saved = cem.load(tmp_path / "runs/sup/ckpt.pt").net.fc.weight
    torch.testing.assert_close(saved.detach().double(), average, rtol=0, atol=1e-6)
    assert len(weights) == 22 and (average - weights[-1]).abs().max() > 1e-4


def test_resume_takes_the_options_of_the_run_and_names_a_contradiction(tmp_path):
    options = ["--dataset", "digits", "--width", 8, "--epochs", 1, "--loss", "mle", "--lr", 0.05]
    options += "--n-eval 30 --on-diverge restart --attack-steps 1 --seed-rank 4".split()
    succeeded(script("train_sup.py", *options, "--out", "r", cwd=tmp_path))
    done = script("train_sup.py", "--resume", "--out", "r", "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 0 and "resuming at step 11 of 22" in done.stdout, done.stderr
    stored = json.loads((tmp_path / "r/options.json").read_text())
    assert (stored["lr"], stored["loss"], stored["width"], stored["epochs"]) == (0.05, "mle", 8, 2)
    assert (stored["n_eval"], stored["on_diverge"]) == (30, "restart")
    for name, value, part in (("--lr", 0.1, "has --lr 0.05, not 0.1"), ("--dataset", "no", "'no'")):
        done = script("train_sup.py", "--resume", "--out", "r", name, value, cwd=tmp_path)
        assert_refused(done, part)
    (tmp_path / "r/options.json").unlink()
    done = script("train_sup.py", "--resume", "--out", "r", cwd=tmp_path)
    assert done.returncode == 0 and "resuming at step 22 of 22" in done.stdout, done
    (tmp_path / "r/options.json").write_text('{"width": "wide", "lr": [], "dataset": 3}')
    done = script("train_sup.py", "--resume", "--out", "r", "--dataset", "digits", cwd=tmp_path)
    assert_refused(done)


def test_resume_names_another_script_and_other_classes(tmp_path):
    write_folder(tmp_path / "set")
    options = (
        "--dataset set --width 8 --epochs 2 --batch-size 4 --n-eval 4 --out r --resume".split()
    )
    start = [*options, "--loss", "st", "--max-minutes", 1e-9]
    succeeded(script("train_sup.py", *start, cwd=tmp_path))
    done = script("train_unsup.py", "--out", "r", "--resume", "--dataset", "set", cwd=tmp_path)
    assert_refused(done, "another script made the run in r")
    for part in ("train", "test"):
        (tmp_path / "set" / part / "ant").rename(tmp_path / "set" / part / "wasp")
    done = script("train_sup.py", *start, cwd=tmp_path)
    assert_refused(done, "the run has classes ['ant', 'bee'], the dataset ['bee', 'wasp']")


def test_a_checkpoint_is_not_measured_on_another_dataset(tmp_path, monkeypatch):
    """Where its own is not found, such as in another working directory."""
    cem.save(tmp_path / "x.pt", cem.ParametricCEM("resnet18", 10, width=8), dataset="photos")
    done = script("eval_robust.py", "--ckpt", "x.pt", cwd=tmp_path)
    assert_refused(done, "the dataset of x.pt, photos, is not available: pass --dataset")
    cem.save(tmp_path / "checkpoints/x.pt", cem.load(tmp_path / "x.pt"), dataset="photos")
    monkeypatch.setattr(cli, "SHIPPED", tmp_path / "checkpoints")
    with mock.patch.object(data, "load", side_effect=cem.CEMError("no network")):
        done = script("eval_robust.py", "--ckpt", "checkpoints/x.pt", cwd=tmp_path)
    assert "measuring on cifar10" in done.stdout and "no network" in done.stderr


def test_held_out_images_leave_every_class_its_seeds(tmp_path):
    """Of two images per class, the watch over a single step holds some out."""
    write_folder(tmp_path / "set", per_class=20)
    options = "--dataset set --share 0.1 --attack fgsm --width 8 --n-eval 4 --max-minutes 1e-9"
    succeeded(script("train_sup.py", *options.split(), cwd=tmp_path))
    assert cem.load(tmp_path / CKPT).extra["seeds"]["mean"].shape == (3, 300)


def test_quiet_hides_progress_and_nothing_else(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = {}
    for quiet in (False, True):
        stderr = Terminal()
        with contextlib.redirect_stderr(stderr):
            monkeypatch.setattr(cli, "_quiet", quiet)
            assert list(cli.progress(range(3), "name")) == [0, 1, 2]
            cli.warn("important")
        shown[quiet] = stderr.getvalue()
    assert "name: " in shown[False] and "/3" in shown[False]
    assert shown[True] == "warning: important\n"


def test_progress_without_a_terminal_is_a_line_every_so_often():
    stderr, clock = io.StringIO(), itertools.count(0, 10)
    with contextlib.redirect_stderr(stderr):
        bar = cli.progress(range(100), "name", miniters=1)
        with mock.patch.object(bar, "_time", lambda: next(clock)):
            bar.start_t = bar.last_print_t = 0
            list(bar)
    lines = stderr.getvalue().splitlines()
    assert "\r" not in stderr.getvalue() and 5 < len(lines) < 60
    assert all(line.startswith("name: ") for line in lines)
    assert all("it/s" in line or "s/it" in line for line in lines)


def test_pictures_that_are_not_finite_are_an_error(digits_run, tmp_path):
    model = cem.load(digits_run / "runs/sup/ckpt.pt")
    model.net.bn1.weight.data.fill_(3e38)  # finite, but the features overflow
    cem.save(tmp_path / "huge.pt", model, **model.extra)
    done = script("sample.py", "--ckpt", "huge.pt", "--n", 10, "--steps", 2, cwd=tmp_path)
    assert_refused(done, "the images are not finite")
    assert files(tmp_path) == ["huge.pt"]


def test_settings_of_the_optimiser_come_from_the_options_not_from_the_file(tmp_path):
    options = [*SMALL, "--loss", "st", "--epochs", 1, "--out", "whole"]
    succeeded(script("train_sup.py", *options, cwd=tmp_path))
    path = Path(shutil.copytree(tmp_path / "whole", tmp_path / "changed"), "ckpt.pt")
    content = torch.load(path, weights_only=True)
    (group,) = content["extra"]["training"]["optimizer"]["param_groups"]
    group |= dict(momentum=0.1, weight_decay=0.5, nesterov="x")
    torch.save(content, path)
    weights = []
    for name in ("whole", "changed"):
        succeeded(script("train_sup.py", "--resume", "--epochs", 2, "--out", name, cwd=tmp_path))
        weights.append(cem.load(tmp_path / name / "ckpt.pt").net.fc.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("options, shown", [([], False), (["default"], True)])
def test_warnings_of_libraries_are_shown_on_request_only(options, shown, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", options)  # python -W
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cli.run(lambda: warnings.warn("deprecated", stacklevel=1))
    assert bool(seen) == shown


@pytest.mark.parametrize("module", [train_sup, train_unsup])
def test_order_augmentation_and_weights_depend_on_seed_and_epoch(module, tmp_path):
    options = dict(dataset="digits", arch="resnet18", width=8, seed_rank=1, out=str(tmp_path))
    orders, draws, weights = [], [], []
    for seed in (0, 1):
        with mock.patch.object(module, "Trainer") as trainer:
            module.train(module.Options(**options, seed=seed))
        weights.append(trainer.call_args.args[1].net.conv1.weight)
        for epoch in (0, 1):
            order, drawn = trainer.call_args.kwargs["shuffle"](epoch)
            orders.append(order)
            draws.append(drawn)
    for found in (orders, draws, weights):
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_sets_of_other_seeds_share_no_image(unsup_run):
    draw = ["--ckpt", "runs/unsup/ckpt.pt", "--sampler", "seeds", "--n", 20, "--seed"]
    one, other = (drawn_images(unsup_run, *draw, s)[0].reshape(20, -1) for s in (0, 1))
    assert not (one[:, None] == other[None]).all(2).any()


def test_a_run_whose_chains_are_gone_is_not_resumed(tmp_path):
    options = "--dataset digits --arch resnet18 --width 8 --loss jem --sgld-steps 1 --buffer 128"
    options = [*options.split(), "--max-minutes", 1e-9, "--seed-rank", 4, "--out", "run"]
    succeeded(script("train_sup.py", *options, cwd=tmp_path))
    model = cem.load(tmp_path / "run/ckpt.pt")
    del model.extra["training"]["chains"]
    cem.save(tmp_path / "run/ckpt.pt", model, **model.extra)
    done = script("train_sup.py", *options, "--resume", cwd=tmp_path)
    assert_refused(done, "ckpt.pt has no chains")


def test_only_an_encoder_begins_from_clusters(model):
    images = torch.rand(10, 3, 8, 8)
    of_classes = cem.GaussianSeeds.fit(images, torch.arange(10) % 5, rank=2)
    gaussians = cem.GaussianSeeds.fit(images, torch.arange(10) % 2, rank=2)
    clusters = ClusterSeeds(gaussians, torch.full((2,), 0.5))
    extra = {"seeds": of_classes.state_dict(), "clusters": clusters.state_dict()}
    encoder = cem.NonParametricCEM("resnet18", width=4)
    model.extra = encoder.extra = extra
    for network, cond, expected in (
        (encoder, False, ClusterSeeds),
        (encoder, True, cem.GaussianSeeds),
        (model, False, cem.GaussianSeeds),
    ):
        assert type(sampling.seeds_of(network, cond)) is expected
