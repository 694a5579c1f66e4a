"""bench/bench.py: what it measures and how it counts; bench/speedrun.py."""

import dataclasses
import json
from unittest import mock

import pytest
import speedrun
import torch
from conftest import assert_refused, files, script, succeeded

import cem
from lib import augment, data

TINY = ["--width", 8, "--image-size", 8, "--batch-size", 4]


def test_bench_names_what_there_is_to_measure(tmp_path):
    done = script("bench/bench.py", *TINY, "--only", "nonsense", cwd=tmp_path)
    assert_refused(done, "nonsense", "sampler maxent")


def forward_flop() -> int:
    """A forward pass of the ResNet-18 of TINY, by hand: 2 x kernel x inputs x outputs x pixels."""
    flop = 2 * 64 * 9 * 3 * 8  # stem: 3 to 8 channels, 8x8 pixels
    flop += 2 * 64 * 9 * 8 * 8 * 4  # first stage: four convolutions
    for channels, pixels in ((16, 16), (32, 4), (64, 1)):
        halving = 9 * channels // 2 * channels  # its input has half of the channels
        shortcut = channels // 2 * channels
        flop += 2 * pixels * (halving + 3 * 9 * channels**2 + shortcut)
    return flop + 2 * 64 * 10  # head


@pytest.mark.slow
def test_bench_measures_every_contender_and_counts_its_flop(tmp_path):
    options = ["--steps", 2, "--repeats", 1, "--precision", "float32", "--out", "bench.json"]
    succeeded(script("bench/bench.py", *TINY, *options, cwd=tmp_path))
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["what"]: row for row in record["rows"]}
    samplers = [*cem.PARAMETRIC_SAMPLERS, "pgd", "maxent"]
    assert {f"sampler {name}" for name in samplers} <= rows.keys()
    passes = {"supervised training step": 7, "unsupervised training step": 11, "attack": 4}
    for name, count in passes.items():
        row = rows[name]
        speed = row["images_per_second"]
        assert row["ratio"] == pytest.approx(speed / row["textbook"], rel=2e-3)
        gflop = count * forward_flop() * speed / 1e9
        assert row["GFLOP_per_second"] == pytest.approx(gflop, rel=2e-3)


def test_speedrun_trains_and_reports_every_seed(tmp_path):
    options = ["--dataset", "digits", "--epochs", 1, "--width", 8, "--runs", 2, "--n-eval", 36]
    done = succeeded(script("bench/speedrun.py", *options, cwd=tmp_path))
    record = json.loads((tmp_path / "runs/speedrun/sprint.json").read_text())
    assert record["recipe"]["epochs"] == 1 and record["recipe"]["width"] == 8
    assert record["precision"] in ("bfloat16", "float32") and "CPU" in record["machine"]
    first, second = record["rows"]
    assert first["run"] == 0 and second["run"] == 1 and first["seconds"] > 0
    assert f"| 1 | {second['seconds']:.0f} | {100 * second['clean']:.2f} |" in done.stdout
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "sprint-1.pt").write_text("mine")
    assert_refused(script("bench/speedrun.py", *options, "--out", "mine", cwd=tmp_path), "sprint-1")
    assert files(mine) == ["sprint-1.pt"]
    models = [cem.load(tmp_path / f"runs/speedrun/sprint-{seed}.pt") for seed in (0, 1)]
    assert not models[0].net.conv1.weight.equal(models[1].net.conv1.weight)


def test_a_speedrun_learns():
    recipe = dataclasses.replace(speedrun.TRACKS["sprint"], width=8, epochs=8, batch_size=64)
    model, _ = speedrun.train(recipe, data.load("digits", "train"), 0, "float32")
    test = data.load("digits", "test")
    with torch.no_grad():
        assert (model(test.pixels()).argmax(1) == test.labels).float().mean() > 0.9


def test_a_speedrun_of_fewer_images_than_a_batch_learns_too():
    few = data.load("digits", "train").subset(torch.arange(30))
    recipe = dataclasses.replace(speedrun.TRACKS["sprint"], width=8)
    one, two = (
        speedrun.train(dataclasses.replace(recipe, epochs=n), few, 0, "float32")[0] for n in (1, 2)
    )
    assert not one.net.fc.bias.equal(two.net.fc.bias)


def test_a_speedrun_trains_as_its_recipe_says(monkeypatch):
    moved, pgd = [], cem.pgd

    def recorded(potential, x, **options):
        x_adv = pgd(potential, x, **options)
        moved.append((x_adv - x).flatten(1).norm(dim=1).max().item())
        return x_adv

    monkeypatch.setattr(cem, "pgd", recorded)
    few = data.load("digits", "train").subset(torch.arange(20))
    change = dict(arch="resnet18", width=8, epochs=1, eps=0.2, crop=0.25)
    recipe = dataclasses.replace(speedrun.TRACKS["sprint"], **change)
    with mock.patch.object(augment, "crop_flip", wraps=augment.crop_flip) as crop:
        model, _ = speedrun.train(recipe, few, 0, "float32")
    assert crop.call_args.kwargs["share"] == 0.25 and model.config["arch"] == "resnet18"
    assert moved and 0.1 < max(moved) <= 0.2 * (1 + 1e-5)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_speedrun_compiles_network_and_attack(wanted, monkeypatch):
    compiled = []

    class Copy(speedrun.AttackCopy):
        def __init__(self, precision, wanted):
            compiled.append(wanted)
            super().__init__(precision, False)

    monkeypatch.setattr(speedrun, "AttackCopy", Copy)
    monkeypatch.setattr(
        speedrun, "compile_network", lambda network, device: compiled.append(network)
    )
    few = data.load("digits", "train").subset(torch.arange(20))
    recipe = dataclasses.replace(speedrun.TRACKS["sprint"], width=8, epochs=1)
    speedrun.train(recipe, few, 0, "float32", wanted)
    assert compiled[0] == wanted and len(compiled) == 1 + wanted


def test_the_table_of_a_speedrun_ends_with_mean_and_deviation():
    rows = [{"run": 0, "seconds": 10.0, "clean": 0.8, "PGD-20": 0.6}]
    rows.append({"run": 1, "seconds": 14.0, "clean": 0.9, "PGD-20": 0.5})
    last = speedrun.table(rows).strip().splitlines()[-1]
    assert last == "| mean | 12 ± 3 | 85.00 ± 7.07 | 55.00 ± 7.07 |"
