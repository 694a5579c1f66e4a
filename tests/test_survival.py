"""Runs that are killed, interrupted, damaged or short of space; runs of several processes. On digits, as a user would."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, files, script
from test_scripts import assert_refused

import cem
import data
import engine
import hardware
import parallel
import sample
import train_sup

TINY = ["--dataset", "digits", "--width", "4", "--n-eval", "36", "--epochs", "3", "--ema", "0.9", "--seed-rank", "4"]


def start(*args, cwd: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_sup.py"), *args]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def log_of(run: Path) -> list[dict]:
    """The lines of a log without what a clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same_run(a: Path, b: Path):
    one, other = (cem.load(run / "ckpt.pt") for run in (a, b))
    raw = [model.extra["training"]["model"] for model in (one, other)]
    for states in ((one.state_dict(), other.state_dict()), raw):
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert log_of(a) == log_of(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with start(*TINY, cwd=folder) as process:
        assert process.wait() == 0, process.stderr.read()
    return folder / "runs/sup"


# ----------------------------------------------------------------------------------------------------- survival


def test_killed_at_twenty_random_times_a_run_resumes_to_the_same_bits(tmp_path):
    options, chance, killed_at = [*TINY, "--epochs", "40"], random.Random(0), []
    run, whole = tmp_path / "parts", tmp_path / "whole"
    with start(*options, "--out", "whole", cwd=tmp_path) as process:
        assert process.wait() == 0, process.stderr.read()
    epoch = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])["seconds"] / 40
    for life in range(20):
        began = (run / "options.json").stat().st_mtime_ns if life else 0
        process = start(*options, "--out", "parts", *(["--resume"] if life else []), cwd=tmp_path)
        while not (run / "options.json").exists() or (run / "options.json").stat().st_mtime_ns == began:
            time.sleep(0.01)
            assert process.poll() in (None, 0), process.stderr.read()
        time.sleep(chance.uniform(0, 3 * epoch + 0.5))  # beginning takes about half a second
        process.kill()
        process.communicate()
        killed_at.append(cem.load(run / "ckpt.pt").extra["training"]["step"])
    assert killed_at == sorted(killed_at)
    with start(*options, "--out", "parts", "--resume", cwd=tmp_path) as process:
        assert process.wait() == 0, process.stderr.read()
    assert_same_run(run, whole)
    assert [line["epoch"] for line in log_of(run)] == [*range(1, 41)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_resume_and_loses_no_step(number, whole, tmp_path):
    process = start(*TINY, cwd=tmp_path)
    run = tmp_path / "runs/sup"
    while not (run / "ckpt.pt").exists():  # it is saved when training begins
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    time.sleep(0.5)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name} at step" in output and "--resume" in output and "Traceback" not in errors
    step = cem.load(run / "ckpt.pt").extra["training"]["step"]
    assert f"at step {step} of 33" in output and step > 0
    with start(*TINY, "--resume", cwd=tmp_path) as process:
        assert process.wait() == 0, process.stderr.read()
    assert_same_run(run, whole)


def test_contents_that_do_not_fit_their_checksums_are_noticed(whole, tmp_path):
    """A block of zeros in the middle, as a failing disk leaves it: torch.load reads it as numbers."""
    content = bytearray((whole / "ckpt.pt").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    (tmp_path / "ckpt.pt").write_bytes(content)
    torch.load(tmp_path / "ckpt.pt", weights_only=True)
    with pytest.raises(cem.CEMError, match="checksums"):
        cem.load(tmp_path / "ckpt.pt")


def test_a_log_that_was_not_written_is_caught_up_with(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "runs/sup"))
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log[: log.rindex("{")])  # killed between the last checkpoint and its log
    (run / "ckpt.pt.1234.tmp").write_text("of a process that was killed")
    done = script("train_sup.py", *TINY, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and (run / "log.jsonl").read_text() == log and not list(run.glob("*.tmp"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before_aloud(whole, tmp_path):
    shutil.copytree(whole, run := tmp_path / "runs/sup")
    steps = [cem.load(run / f"{name}.pt").extra["training"]["step"] for name in ("ckpt-previous", "ckpt")]
    assert steps == [22, 33]
    content = (run / "ckpt.pt").read_bytes()
    (run / "ckpt.pt").write_bytes(content[: len(content) // 2])
    process = start(*TINY, "--resume", cwd=tmp_path)  # with as many threads as the whole run had: sums in the same order
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "ckpt.pt is damaged" in errors and "going on from" in errors and "step 22" in errors
    assert_same_run(run, whole)
    for name in ("ckpt-previous.pt", "ckpt.pt"):
        (run / name).write_bytes(b"")
    assert_refused(script("train_sup.py", *TINY, "--resume", cwd=tmp_path), "ckpt-previous.pt")


def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoint_whole(whole, tmp_path):
    shutil.copytree(whole, run := tmp_path / "runs/sup")
    before = (run / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may grow beyond that
    try:
        done = script("train_sup.py", *TINY, "--resume", "--epochs", 4, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_refused(done, "ckpt.pt")
    assert (run / "ckpt.pt").read_bytes() == before and not [n for n in files(run) if n.endswith(".tmp")]


def test_a_folder_without_permission_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(script("train_sup.py", *TINY, "--out", "file/run", cwd=tmp_path), "file")


def test_epochs_may_grow_and_other_options_may_not(whole, tmp_path):
    shutil.copytree(whole, run := tmp_path / "runs/sup")
    done = script("train_sup.py", *TINY, "--resume", "--epochs", 4, cwd=tmp_path)
    assert done.returncode == 0 and [line["epoch"] for line in log_of(run)] == [1, 2, 3, 4]
    assert_refused(script("train_sup.py", *TINY, "--resume", cwd=tmp_path), "--epochs 4, not 3")
    assert_refused(script("train_sup.py", *TINY, "--resume", "--epochs", 5, "--lr", 0.3, cwd=tmp_path), "--lr 0.1, not 0.3")


# ------------------------------------------------------------------------------------------------- many processes


def torchrun(n: int, *args, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--", *(str(a) for a in args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("rank, local, turn", [(0, 0, 0), (1, 1, 2), (8, 0, 1), (9, 1, 2)])
def test_one_process_downloads_then_one_of_each_other_machine_then_the_rest(rank, local, turn, monkeypatch):
    """Everyone meets at the same two barriers, `turn` of them before the block."""
    met = []
    monkeypatch.setattr(parallel, "barrier", lambda: met.append("barrier"))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with parallel.first_then_others():
        met.append("block")
    assert len(met) == 3 and met.index("block") == turn


DOUBLE = """
import runpy, sys, torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
"""
TRAINING = {
    "train_sup.py": ["--loss", "mle", "--attack-steps", 2],
    "train_unsup.py": ["--attack-steps", 2, "--eval-every", 1],
}


@pytest.mark.parametrize("name", TRAINING)
def test_two_processes_train_as_one_does(name, tmp_path):
    """The same global batch and seed: after three steps the weights differ by rounding alone.

    In float64: in float32 an attack turns rounding into 1e-4 of a gradient, and so does PyTorch's BatchNorm on the CPU.
    """
    options = ["--dataset", "digits", "--width", 4, "--epochs", 1, "--n-eval", 36, "--seed-rank", 4, "--ema", 0, "--lr", 0.01]
    options += ["--precision", "float32", "--batch-size", 478, *TRAINING[name]]
    (tmp_path / "double.py").write_text(DOUBLE.format(root=str(ROOT)))
    one = torchrun(1, "double.py", name, *options, "--out", "one", cwd=tmp_path)
    two = torchrun(2, "double.py", name, *options, "--out", "two", cwd=tmp_path)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("wrote two/ckpt.pt") == 1
    assert cem.load(tmp_path / "two/ckpt.pt").extra["training"]["step"] == 3
    states = [cem.load(tmp_path / run / "ckpt.pt").extra["training"]["model"] for run in ("one", "two")]
    assert states[0]["net.conv1.weight"].dtype == torch.float64
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-9, atol=1e-9)
    logs = [log_of(tmp_path / run)[0] for run in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5)  # the log's last digit
    assert logs[0]["gradient_norm"] == pytest.approx(logs[1]["gradient_norm"], abs=1e-5)


HALFWAY = """
import itertools, sys
sys.path.insert(0, {root!r})
import cli, train_sup
asked = itertools.count()
cli.Stop.due = lambda self: next(asked) >= 1  # before the first step, then every twenty
cli.run(train_sup.main)
"""


def test_processes_with_statistics_of_their_own_resume_in_mid_epoch_to_the_same_bits(tmp_path):
    options = [*TINY, "--epochs", 1, "--batch-size", 32, "--attack-steps", 1, "--batch-norm", "local"]
    (tmp_path / "halfway.py").write_text(HALFWAY.format(root=str(ROOT)))
    train = str(ROOT / "train_sup.py")
    for name, more in ((train, "whole"), ("halfway.py", "parts"), (train, "parts --resume")):
        done = torchrun(2, name, *options, "--out", *more.split(), cwd=tmp_path)
        assert done.returncode == 0 and ("at step 20 of 44" in done.stdout) == (name == "halfway.py"), done
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_more_images_a_step_than_there_are_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(cem.CEMError, match="--batch-size 8 is more than the 6 images"):
        engine.fit(train_sup.Options(batch_size=8), cem.ParametricCEM("resnet18", width=4), 6, None, None, None)


def test_two_processes_train_an_energy_model_with_chains_of_their_own_and_resume(tmp_path):
    options = [*TINY, "--loss", "jeat", "--attack-steps", 1, "--sgld-steps", 1, "--buffer", 300, "--diagnose"]
    for more in (["--epochs", 1], ["--epochs", 2, "--resume"]):
        done = torchrun(2, ROOT / "train_sup.py", *options, *more, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
    model = cem.load(tmp_path / "runs/sup/ckpt.pt")
    training = model.extra["training"]
    chains = training["state"]["images"]
    assert training["step"] == 22 and len(chains) == 300 == len(chains.flatten(1).unique(dim=0))
    assert all(v.isfinite().all() for v in model.state_dict().values())
    test = data.load("digits", "test")  # what the log says is of the statistics that were saved: those of both processes
    energy = -cem.log_marginal(model(test.pixels(test.spread(36)))).mean().item()
    assert energy == pytest.approx(log_of(tmp_path / "runs/sup")[-1]["E_x"], abs=1e-4)
    done = torchrun(2, ROOT / "train_sup.py", *options, "--batch-norm", "sync", cwd=tmp_path)
    assert done.returncode and "--batch-norm local" in done.stderr
    done = torchrun(2, ROOT / "train_sup.py", "--evaluate", cwd=tmp_path)
    assert done.returncode and "--evaluate is for one process" in done.stderr


def test_local_statistics_are_saved_as_their_mean_over_the_processes(tmp_path):
    """Without learning the first BatchNorm's running mean is linear in the images, its average over the steps too: the mean
    of two processes' is that of one process with the whole batch. Each process's own is off by some 1e-3."""
    options = [*TINY, "--epochs", 1, "--loss", "st", "--lr", 1e-30, "--precision", "float32", "--batch-norm", "local"]
    states = []
    for n in (1, 2):
        done = torchrun(n, ROOT / "train_sup.py", *options, "--out", f"out{n}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        model = cem.load(tmp_path / f"out{n}/ckpt.pt")
        states.append([state["net.bn1.running_mean"] for state in (model.extra["training"]["model"], model.state_dict())])
    for one, two in zip(*states):  # of the weights themselves, and of their running average
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


def test_processes_share_out_sampling_and_metrics_and_get_the_same(whole, tmp_path):
    """The union of the samples is the one process's set; the figures agree (features are of batches of other sizes)."""
    shutil.copy(whole / "ckpt.pt", tmp_path / "ckpt.pt")
    options = ["--ckpt", "ckpt.pt", "--n", 90, "--batch-size", 20, "--steps", 3]
    judge = ["--ref", "digits", "--features", "ckpt.pt", "--batch-size", 40]
    for n in (1, 2):
        done = torchrun(n, ROOT / "sample.py", *options, "--out", f"out{n}", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
        assert files(tmp_path / f"out{n}") == ["samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"]
        samples = ["--samples", "out1/samples-rcs.npz", "--out", f"out{n}/metrics.json"]
        done = torchrun(n, ROOT / "eval_is_fid.py", *samples, *judge, "--data-dir", f"data{n}", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
    drawn, rows = [], []
    for n in (1, 2):
        with np.load(tmp_path / f"out{n}/samples-rcs.npz") as z:
            drawn.append((z["arr_0"].astype(int), z["arr_1"]))
        rows.append(json.loads((tmp_path / f"out{n}/metrics.json").read_text())["rows"][0])
    assert np.array_equal(drawn[0][1], drawn[1][1]) and np.array_equal(drawn[0][0], drawn[1][0])
    for key, value in rows[0].items():
        assert rows[1][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), key


# ------------------------------------------------------------------------------------------------------ sampling


def test_sampling_goes_on_with_the_batches_that_were_finished(whole, tmp_path, monkeypatch):
    options = ["--ckpt", whole / "ckpt.pt", "--n", 50, "--batch-size", 10, "--steps", 2]
    assert script("sample.py", *options, "--out", "one", cwd=tmp_path).returncode == 0
    draw_batch, drawn = sample.draw_batch, []

    def killed_at_the_third(*args):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(args[-2])
        return draw_batch(*args)

    monkeypatch.setattr(sample, "draw_batch", killed_at_the_third)
    done = script("sample.py", *options, "--out", "two", cwd=tmp_path)
    assert done.returncode == 130 and "the same command goes on" in done.stderr
    assert [Path(name).suffix for name in files(tmp_path / "two")] == [".npz"] * 2  # two parts and nothing half-written
    monkeypatch.setattr(sample, "draw_batch", lambda *args: drawn.append(args[-2]) or draw_batch(*args))
    other = script("sample.py", *options, "--seed", 1, "--out", "two", cwd=tmp_path)  # its batches are not taken for ours
    assert other.returncode == 0 and "going on" not in other.stdout and len(drawn) == 7
    (parts,) = (tmp_path / "two").glob("*.parts")
    (parts / "000000010.npz").write_bytes(b"")
    done = script("sample.py", *options, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0 and "going on with 2 finished batches" in done.stdout, done.stderr
    assert "000000010.npz is damaged (EOFError): drawn anew" in done.stderr and drawn[7:] == [10, 20, 30, 40]
    assert files(tmp_path / "two") == ["samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"]
    with np.load(tmp_path / "one/samples-rcs.npz") as one, np.load(tmp_path / "two/samples-rcs.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])


def test_sigterm_ends_sampling_and_says_how_to_go_on(whole, tmp_path):
    options = ["--ckpt", str(whole / "ckpt.pt"), "--n", "100000", "--batch-size", "10", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "sample.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("*.parts/*.npz")):
            time.sleep(0.05)
        process.terminate()
        errors = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in errors and "Traceback" not in errors


# -------------------------------------------------------------------------------------------------------- memory


def test_the_search_for_a_batch_that_fits_begins_with_free_memory():
    """What ran out of memory is let go before smaller batches are tried: here there is space for 100 numbers at a time."""
    held = weakref.WeakSet()

    def work(n: int, scale: float) -> float:
        tensor = torch.full((n,), scale)
        held.add(tensor)
        if sum(map(len, held)) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.sum().item()

    assert hardware.fitting(100, work, 2.0) == 200
    with pytest.raises(cem.CEMError, match="the largest that does is about (99|100)"):
        hardware.fitting(300, work, 2.0)


def test_out_of_memory_names_the_largest_batch_that_fits(whole, tmp_path, monkeypatch):
    forward = cem.ParametricCEM.forward

    def small(self, x):
        if len(x) > 37:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(cem.ParametricCEM, "forward", small)
    done = script("train_sup.py", *TINY, "--out", "run", cwd=tmp_path)
    assert_refused(done, "--batch-size 128 does not fit", "the largest that does is about 37")
    done = script("sample.py", "--ckpt", whole / "ckpt.pt", "--n", 100, "--out", "out", cwd=tmp_path)
    assert_refused(done, "--batch-size 250 does not fit", "about 37")
    assert not (tmp_path / "out").exists()
