"""bench/bench.py: what it measures and how it counts."""

import json

import pytest
from conftest import script

import cem

TINY = ["--width", 4, "--image-size", 8, "--batch-size", 4]


def test_bench_names_what_there_is_to_measure(tmp_path):
    done = script("bench/bench.py", *TINY, "--only", "nonsense", cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ")
    assert "nonsense" in last and "sampler maxent" in last


def forward_flop() -> int:
    """A forward pass of the ResNet-18 of TINY, by hand: 2 x kernel x inputs x outputs x pixels."""
    flop = 2 * 64 * 9 * 3 * 4  # stem: 3 to 4 channels, 8x8 pixels
    flop += 2 * 64 * 9 * 4 * 4 * 4  # first stage: four convolutions
    for channels, pixels in ((8, 16), (16, 4), (32, 1)):
        halving = 9 * channels // 2 * channels  # its input has half of the channels
        shortcut = channels // 2 * channels
        flop += 2 * pixels * (halving + 3 * 9 * channels**2 + shortcut)
    return flop + 2 * 32 * 10  # head


@pytest.mark.slow
def test_bench_measures_every_contender_and_counts_its_flop(tmp_path):
    options = ["--steps", 2, "--repeats", 1, "--precision", "float32", "--out", "bench.json"]
    done = script("bench/bench.py", *TINY, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["what"]: row for row in record["rows"]}
    samplers = [*cem.PARAMETRIC_SAMPLERS, *cem.NON_PARAMETRIC_SAMPLERS]
    assert {f"sampler {name}" for name in samplers} <= rows.keys()
    passes = {"supervised training step": 7, "unsupervised training step": 11, "attack": 4}
    for name, count in passes.items():
        row = rows[name]
        speed = row["images_per_second"]
        assert row["ratio"] == pytest.approx(speed / row["textbook"], rel=2e-3)
        gflop = count * forward_flop() * speed / 1e9
        assert row["GFLOP_per_second"] == pytest.approx(gflop, rel=2e-3)
