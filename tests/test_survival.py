"""Runs that are killed, stopped, damaged or out of space, and runs of several processes."""

import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, files, read_log, script, succeeded

import cem
import sample
import train_sup
from lib import cli, data, distributed, loop, options

TINY = "--dataset digits --width 8 --n-eval 36 --epochs 3 --ema 0.9 --seed-rank 4".split()

# ------------------------------------------------------------------------------------- processes

FORKS = multiprocessing.get_context("forkserver")
SCRIPTS = ["train_sup", "train_unsup", "sample", "eval_is_fid", "eval_robust"]
FORKS.set_forkserver_preload(["conftest", *SCRIPTS, "sklearn.datasets", "test_survival"])


def run_forked(name: str, args: list[str], cwd: str, env: dict, outputs: list[str], prepare):
    """The body of a forked process, equivalent to `python name args` in the folder cwd."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [name, *args]
    if prepare is not None:
        prepare()
    cli.run(importlib.import_module(Path(name).stem).main)


class ForkedScript:
    """A script in its own single-threaded process, started without the seconds of importing torch.

    prepare() is called in the process before the script.
    """

    def __init__(self, name: str, *args, cwd: Path, prepare=None, **env):
        self.outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        paths = [file.name for file in self.outputs]
        arguments = (name, [str(a) for a in args], str(cwd), env, paths, prepare)
        self.process = FORKS.Process(target=run_forked, args=arguments, daemon=True)
        # read by the fork server, which the first call starts
        server = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent))
        with mock.patch.dict(os.environ, server):
            self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> SimpleNamespace:
        """Exit status (-n for a process that signal n killed) and outputs."""
        self.process.join(120)
        stdout, stderr = (file.read() for file in self.outputs)
        assert self.process.exitcode is not None, f"the process does not end: {stderr}"
        return SimpleNamespace(returncode=self.process.exitcode, stdout=stdout, stderr=stderr)

    def wait_for(self, condition) -> None:
        """Return once condition() is true. The process must not end before."""
        while not condition():
            assert self.process.is_alive(), self.wait()
            time.sleep(0.005)


def forked(name: str, *args, cwd: Path) -> SimpleNamespace:
    return ForkedScript(name, *args, cwd=cwd).wait()


def launch(n: int, name: str, *args, cwd: Path, prepare=None) -> SimpleNamespace:
    """Run a script in n processes, with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = dict(WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    processes = []
    for rank in range(n):
        ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank))
        processes.append(ForkedScript(name, *args, cwd=cwd, prepare=prepare, **env, **ranks))
    ends = [process.wait() for process in processes]
    return SimpleNamespace(
        returncode=max(end.returncode for end in ends),
        stdout="".join(end.stdout for end in ends),
        stderr="".join(end.stderr for end in ends),
    )


def torchrun(n: int, name: str, *args, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--", str(ROOT / name)]
    command += [str(a) for a in args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


# ---------------------------------------------------------------------------------- runs on disk


def log_of(run: Path) -> list[dict]:
    """The lines of a run's log, without its times."""
    log = read_log(run)
    for line in log:
        del line["seconds"], line["images_per_second"]
    return log


def training_of(checkpoint: Path) -> dict:
    return cem.load(checkpoint).extra["training"]


def assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_same_run(a: Path, b: Path) -> None:
    """Both weights and their running averages are equal bit for bit, and so are the logs."""
    one, other = (cem.load(run / "ckpt.pt") for run in (a, b))
    assert_equal_states(one.state_dict(), other.state_dict())
    assert_equal_states(one.extra["training"]["model"], other.extra["training"]["model"])
    assert log_of(a) == log_of(b)


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of TINY that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    succeeded(forked("train_sup.py", *TINY, cwd=folder))
    return folder / "runs/sup"


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "runs/sup"))


# ---------------------------------------------------------------------------------- interruption


def step_of_killed_life(options: list, run: Path, delay: float, after_checkpoint: bool) -> int:
    """Start or resume a run; kill it `delay` seconds after it begins to train, or after its first
    checkpoint -> the step of the checkpoint that it leaves."""
    before = modified(run / "options.json")
    life = ForkedScript("train_sup.py", *options, "--resume", "--out", run, cwd=run.parent)
    life.wait_for(lambda: modified(run / "options.json") != before)  # written before training
    if after_checkpoint:
        saved = modified(run / "ckpt.pt")
        life.wait_for(lambda: modified(run / "ckpt.pt") != saved)
    time.sleep(delay)
    life.send(signal.SIGKILL)
    assert life.wait().returncode == -signal.SIGKILL
    return training_of(run / "ckpt.pt")["step"] if (run / "ckpt.pt").exists() else 0


@pytest.mark.slow
def test_run_that_is_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    options = [*TINY, "--epochs", 20, "--batch-size", 359, "--attack-steps", 1]
    whole, run = tmp_path / "whole", tmp_path / "parts"
    succeeded(forked("train_sup.py", *options, "--out", whole, cwd=tmp_path))
    epoch = read_log(whole)[-1]["seconds"] / 20
    chance = random.Random(0)
    steps = []
    for life in range(20):
        delay = chance.uniform(0, epoch)
        steps.append(step_of_killed_life(options, run, delay, after_checkpoint=life % 2 == 1))
    assert steps == sorted(steps) and steps[-1] < 80
    succeeded(forked("train_sup.py", *options, "--resume", "--out", run, cwd=tmp_path))
    assert_same_run(run, whole)
    assert [line["epoch"] for line in log_of(run)] == [*range(1, 21)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_a_run_after_a_checkpoint_and_loses_no_step(number, whole, tmp_path):
    run = tmp_path / "runs/sup"
    life = ForkedScript("train_sup.py", *TINY, cwd=tmp_path)
    life.wait_for((run / "ckpt-previous.pt").exists)  # the first of three epochs has ended
    life.send(number)
    done = life.wait()
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    step = training_of(run / "ckpt.pt")["step"]
    assert f"stopped by {number.name} at step {step} of 33: --resume continues" in done.stdout
    assert 11 <= step < 33
    done = forked("train_sup.py", *TINY, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and f"resuming at step {step} of 33" in done.stdout
    assert_same_run(run, whole)


def test_resuming_writes_a_log_line_that_is_missing(copy_of_whole, tmp_path):
    log = copy_of_whole / "log.jsonl"
    text = log.read_text()
    log.write_text(text[: text.rindex("{")])  # killed between the last checkpoint and its log
    (copy_of_whole / ".ckpt.pt.0123.cem-tmp").write_text("left by a process that was killed")
    done = script("train_sup.py", *TINY, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and log.read_text() == text
    assert not list(copy_of_whole.glob("*.cem-tmp"))


def test_epochs_may_grow_and_other_options_may_not(copy_of_whole, tmp_path):
    options = [*TINY, "--resume", "--epochs"]
    done = script("train_sup.py", *options, 4, cwd=tmp_path)
    assert done.returncode == 0
    assert [line["epoch"] for line in log_of(copy_of_whole)] == [1, 2, 3, 4]
    assert_refused(script("train_sup.py", *options, 3, cwd=tmp_path), "--epochs 4, not 3")
    done = script("train_sup.py", *options, 5, "--lr", 0.3, cwd=tmp_path)
    assert_refused(done, "--lr 0.1, not 0.3")


# ------------------------------------------------------------------------------------ damage


def test_damaged_checkpoint_is_replaced_by_the_previous_one(copy_of_whole, whole, tmp_path):
    checkpoints = [copy_of_whole / name for name in ("ckpt-previous.pt", "ckpt.pt")]
    assert [training_of(path)["step"] for path in checkpoints] == [22, 33]
    content = checkpoints[1].read_bytes()
    checkpoints[1].write_bytes(content[: len(content) // 2])
    done = succeeded(forked("train_sup.py", *TINY, "--resume", cwd=tmp_path))
    assert "warning: cannot read runs/sup/ckpt.pt" in done.stderr
    assert "continuing from runs/sup/ckpt-previous.pt, step 22" in done.stderr
    assert_same_run(copy_of_whole, whole)
    for path in checkpoints:
        path.write_bytes(b"")
    assert_refused(script("train_sup.py", *TINY, "--resume", cwd=tmp_path), "ckpt-previous.pt")


def test_full_disk_is_a_clear_error_and_keeps_the_checkpoint(copy_of_whole, tmp_path):
    before = (copy_of_whole / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # of each file
    try:
        resumed = script("train_sup.py", *TINY, "--resume", "--epochs", 4, cwd=tmp_path)
        new = script("train_sup.py", *TINY, "--out", "new", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_refused(resumed, "runs/sup/ckpt")
    assert_refused(new, "new/ckpt.pt")
    assert (copy_of_whole / "ckpt.pt").read_bytes() == before
    assert not [name for name in files(tmp_path) if name.endswith(".cem-tmp")]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_results_of_an_earlier_run_move_with_it(whole, tmp_path):
    """accuracy.json and samples would otherwise seem to be of the new checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    options = ["--ckpt", "run/ckpt.pt", "--n", 20]
    succeeded(script("eval_robust.py", *options, cwd=tmp_path))
    succeeded(script("sample.py", *options, "--steps", 1, cwd=tmp_path))
    results = ["accuracy.json", *(f"samples-rcs.{end}" for end in ("json", "npz", "png"))]
    before = contents(tmp_path / "run")
    assert before.keys() >= set(results)
    options = [*TINY, "--epochs", 1, "--loss", "st", "--out", "run"]
    succeeded(script("train_sup.py", *options, cwd=tmp_path))
    assert contents(tmp_path / "run/previous-1") == before
    assert not set(results) & {path.name for path in (tmp_path / "run").iterdir()}


def test_a_new_run_says_what_it_trains(tmp_path):
    done = script("train_sup.py", *TINY, "--epochs", 1, "--loss", "st", cwd=tmp_path)
    millions = sum(
        p.numel() for p in cem.ParametricCEM("resnet18", width=8, in_channels=1).parameters()
    )
    first = f"resnet18 of width 8, {millions / 1e6:.2f} million parameters; 1 epochs of 11 steps"
    assert done.stdout.startswith(f"{first}, 1437 images; ") and " on cpu\n" in done.stdout


def test_a_full_disk_at_the_first_checkpoint_brings_the_earlier_run_back(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    with mock.patch.object(cem, "save", side_effect=OSError("disk full")):
        done = script("train_sup.py", *TINY, "--out", "run", cwd=tmp_path)
    assert_refused(done, "disk full")
    assert contents(tmp_path / "run") == before


def test_a_compiled_run_resumes_without_compiling(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "options.json").write_text(json.dumps({"compile": True, "width": 32}))
    found = options.stored(train_sup.Options(out=str(tmp_path), resume=True))
    assert found == {"width": 32}


def test_new_run_moves_only_the_files_of_the_earlier_run(tmp_path):
    options = [*TINY, "--epochs", 1, "--loss", "st", "--out", "."]
    succeeded(script("train_sup.py", *options, cwd=tmp_path))
    (tmp_path / "diverged.pt").write_text("of a run that diverged")
    earlier = contents(tmp_path)
    (events,) = (name for name in earlier if name.endswith(".cem"))
    names = {"ckpt.pt", "ckpt-previous.pt", "diverged.pt", "log.jsonl", "options.json", events}
    assert earlier.keys() == names
    others = ["notes.txt", "model.pt", "x.tmp", "x.cem-tmp", "samples-rcs.npz", "accuracy.json"]
    others += ["ckpt.pt.1234.tmp", ".ckpt.pt.swp", "events.out.tfevents.1.host.1.0"]
    others += ["src/main.py", "src/ckpt.pt", "src/log.jsonl"]
    (tmp_path / "src").mkdir()
    for name in others:
        (tmp_path / name).write_text(f"the user's {name}")
    before = contents(tmp_path)
    done = script("train_sup.py", *options, "--seed", 1, cwd=tmp_path)
    assert done.returncode == 0 and "moved the earlier run to previous-1" in done.stdout
    assert contents(tmp_path / "previous-1") == earlier
    after = contents(tmp_path)
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    assert after["ckpt.pt"] != earlier["ckpt.pt"]
    assert len(after) == len(others) + 2 * len(earlier) - 1  # the new run has no diverged.pt
    done = script("train_sup.py", *options, "--seed", 2, cwd=tmp_path)
    assert done.returncode == 0 and "moved the earlier run to previous-2" in done.stdout
    assert contents(tmp_path / "previous-1") == earlier
    assert contents(tmp_path / "previous-2")["ckpt.pt"] == after["ckpt.pt"]


# ----------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("rank, local, turn", [(0, 0, 0), (1, 1, 2), (8, 0, 1), (9, 1, 2)])
def test_downloads_run_in_the_first_process_of_each_machine_first(rank, local, turn, monkeypatch):
    """Each process passes the same two barriers, `turn` of them before the block."""
    passed = []
    monkeypatch.setattr(distributed, "barrier", lambda: passed.append("barrier"))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with distributed.first_then_others():
        passed.append("block")
    assert len(passed) == 3 and passed.index("block") == turn


def compute_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def assert_two_processes_train_as_one_does(name, *options, cwd):
    """With the same batch and seed, the weights after three steps differ by rounding alone.

    In float64: in float32, an attack turns rounding into 1e-4 of a gradient, and so does PyTorch's
    BatchNorm on the CPU.
    """
    options += ("--ema", 0, "--batch-size", 478, "--precision", "float32", "--device", "cpu")
    for n in (1, 2):
        out = ["--out", f"out{n}"]
        done = succeeded(launch(n, name, *options, *out, cwd=cwd, prepare=compute_in_float64))
        assert done.stdout.count(f"wrote out{n}/ckpt.pt") == 1
    one, two = (training_of(cwd / f"out{n}/ckpt.pt") for n in (1, 2))
    assert one["step"] == two["step"] == 3
    assert one["model"]["net.conv1.weight"].dtype == torch.float64
    for part in one.keys() & {"model", "chains"}:
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-9, atol=1e-9)
    logs = [log_of(cwd / f"out{n}")[0] for n in (1, 2)]
    for key in ("loss", "gradient_norm"):
        assert logs[0][key] == pytest.approx(logs[1][key], abs=1e-5)  # the log's last digit


@pytest.mark.parametrize(
    "name, more",
    [
        ("train_sup.py", ["--loss", "mle", "--attack-steps", 2]),
        ("train_unsup.py", ["--attack-steps", 2, "--eval-every", 1]),
    ],
)
def test_two_processes_train_as_one_does(name, more, tmp_path):
    options = [*TINY, "--epochs", 1, "--lr", 0.01, *more]
    assert_two_processes_train_as_one_does(name, *options, cwd=tmp_path)


def stop_after_twenty_steps() -> None:
    """Processes ask whether to stop before the first step, then every twenty."""
    asked = itertools.count()
    cli.Stop.due = lambda self: next(asked) >= 1


@pytest.mark.slow
def test_processes_with_local_statistics_resume_within_an_epoch_to_the_same_bits(tmp_path):
    options = [*TINY, "--epochs", 1, "--batch-size", 32, "--attack-steps", 1]
    options += ["--batch-norm", "local"]
    whole, parts, resumed = ["--out", "whole"], ["--out", "parts"], ["--out", "parts", "--resume"]
    for out, prepare in ((whole, None), (parts, stop_after_twenty_steps), (resumed, None)):
        done = succeeded(launch(2, "train_sup.py", *options, *out, cwd=tmp_path, prepare=prepare))
        assert ("stopped" in done.stdout) == (prepare is not None)
    assert "resuming at step 20 of 44" in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_local_statistics_are_saved_as_their_mean_over_the_processes(tmp_path):
    """Without learning, the first BatchNorm's running mean is linear in the images, and so is its
    average over the steps: two processes' mean is that of one process with the whole batch.

    Each process's own differs by some 1e-3.
    """
    options = [*TINY, "--epochs", 1, "--loss", "st", "--lr", 1e-30, "--precision", "float32"]
    statistics = []
    for n in (1, 2):
        out = ["--batch-norm", "local", "--out", f"out{n}"]
        succeeded(launch(n, "train_sup.py", *options, *out, cwd=tmp_path))
        model = cem.load(tmp_path / f"out{n}/ckpt.pt")
        states = (model.extra["training"]["model"], model.state_dict())
        statistics.append([state["net.bn1.running_mean"] for state in states])
    torch.testing.assert_close(*statistics, rtol=0, atol=1e-6)


def test_processes_cannot_share_a_batch_larger_than_the_dataset(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    opt, model = train_sup.Options(batch_size=8), cem.ParametricCEM("resnet18", width=4)
    unused = dict.fromkeys(["shuffle", "batch_loss", "measure"])
    with pytest.raises(cem.CEMError, match="--batch-size 8 exceeds the 6 training images"):
        loop.Trainer(opt, model, 6, **unused)


@pytest.mark.slow
def test_two_processes_train_an_energy_model_with_separate_chains_and_resume(tmp_path):
    options = [*TINY, "--loss", "jeat", "--attack-steps", 1, "--sgld-steps", 1]
    options += ["--buffer", 300, "--diagnose"]
    done = torchrun(2, "train_sup.py", *options, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
    done = launch(2, "train_sup.py", *options, "--epochs", 2, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
    run = tmp_path / "runs/sup"
    model = cem.load(run / "ckpt.pt")
    training = model.extra["training"]
    chains = training["chains"]["images"]
    assert training["step"] == 22 and len(chains) == 300
    assert len(chains.flatten(1).unique(dim=0)) == 300  # no chain is in both processes
    assert all(value.isfinite().all() for value in model.state_dict().values())
    # the log's energies are those of the saved BatchNorm statistics, the mean of both processes'
    test = data.load("digits", "test")
    x = test.pixels(test.evenly_spaced(36))
    energy = -cem.log_marginal(model(x)).mean().item()
    assert energy == pytest.approx(log_of(run)[-1]["E_x"], abs=1e-4)


def test_what_several_processes_cannot_do_is_refused(tmp_path):
    options = [*TINY, "--loss", "jeat", "--batch-norm", "sync"]
    done = launch(2, "train_sup.py", *options, cwd=tmp_path)
    assert done.returncode == 2 and "--loss jeat needs --batch-norm local" in done.stderr
    done = launch(2, "eval_robust.py", cwd=tmp_path)
    assert done.returncode == 2 and "runs in one process" in done.stderr
    assert files(tmp_path) == []


def test_processes_share_sampling_and_scores_and_get_the_same_results(whole, tmp_path):
    """The samples are equal; scores agree up to rounding, as batches have other sizes."""
    shutil.copy(whole / "ckpt.pt", tmp_path / "ckpt.pt")
    options = "--ckpt ckpt.pt --n 90 --batch-size 20 --steps 3".split()
    judge = "--samples out1/samples-rcs.npz --ref digits --features ckpt.pt --batch-size 40".split()
    samples, rows = [], []
    for n in (1, 2):
        out = tmp_path / f"out{n}"
        done = launch(n, "sample.py", *options, "--out", out, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
        assert files(out) == ["samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"]
        with np.load(out / "samples-rcs.npz") as arrays:
            samples.append((arrays["arr_0"], arrays["arr_1"]))
        more = ["--data-dir", f"data{n}", "--out", out / "metrics.json"]
        done = launch(n, "eval_is_fid.py", *judge, *more, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
        rows.append(json.loads((out / "metrics.json").read_text())["rows"][0])
    np.testing.assert_equal(*samples)
    assert rows[0].pop("samples") == rows[1].pop("samples")
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)


# -------------------------------------------------------------------------------------- sampling


class Interrupted:
    """sample.draw_batch that records the batches that it draws and is interrupted after `limit`."""

    def __init__(self, limit: int):
        self.limit = limit
        self.draw_batch = sample.draw_batch
        self.drawn = []  # the number of each batch's first image

    def __call__(self, model, seeds, opt, device, first):
        if len(self.drawn) == self.limit:
            raise KeyboardInterrupt
        self.drawn.append(first)
        return self.draw_batch(model, seeds, opt, device, first)


def test_sampling_resumes_with_the_batches_that_were_finished(whole, tmp_path):
    options = ["--ckpt", whole / "ckpt.pt", "--n", 50, "--batch-size", 10, "--steps", 2]
    succeeded(script("sample.py", *options, "--out", "one", cwd=tmp_path))
    options += ["--out", "two"]
    with mock.patch.object(sample, "draw_batch", Interrupted(2)):
        done = script("sample.py", *options, cwd=tmp_path)
    assert done.returncode == 130 and "the same command resumes" in done.stderr
    (parts,) = (tmp_path / "two").iterdir()
    assert files(parts) == ["000000000.npz", "000000010.npz"]
    with mock.patch.object(sample, "draw_batch", Interrupted(99)) as batches:
        done = script("sample.py", *options, "--seed", 1, cwd=tmp_path)
    assert done.returncode == 0 and "resuming" not in done.stdout
    assert batches.drawn == [0, 10, 20, 30, 40]  # the batches of another seed are not reused
    (parts / "000000010.npz").write_bytes(b"")
    with mock.patch.object(sample, "draw_batch", Interrupted(99)) as batches:
        done = script("sample.py", *options, cwd=tmp_path)
    assert done.returncode == 0 and "resuming with 2 finished batches" in done.stdout, done.stderr
    assert "000000010.npz is damaged" in done.stderr
    assert batches.drawn == [10, 20, 30, 40]
    names = [
        f"samples-rcs{number}.{end}" for number in ("-1", "") for end in ("json", "npz", "png")
    ]
    assert files(tmp_path / "two") == names  # the set of the other seed was there first
    paths = [tmp_path / "one/samples-rcs.npz", tmp_path / "two/samples-rcs-1.npz"]
    with np.load(paths[0]) as one, np.load(paths[1]) as two:
        for name in ("arr_0", "arr_1"):
            assert np.array_equal(one[name], two[name])


def test_sigterm_ends_sampling_and_says_how_to_resume(whole, tmp_path):
    options = ["--ckpt", whole / "ckpt.pt", "--n", 100_000, "--batch-size", 10, "--out", tmp_path]
    life = ForkedScript("sample.py", *options, cwd=tmp_path)
    life.wait_for(lambda: list(tmp_path.glob("*.parts/*.npz")))
    life.send(signal.SIGTERM)
    done = life.wait()
    assert done.returncode == 128 + signal.SIGTERM
    assert "the same command resumes" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------- memory


def test_out_of_memory_asks_for_a_smaller_batch_and_leaves_nothing(whole, tmp_path, monkeypatch):
    forward = cem.ParametricCEM.forward

    def small(self, x):
        if len(x) > 37:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(cem.ParametricCEM, "forward", small)
    shutil.copytree(whole, tmp_path / "whole")
    before = contents(tmp_path / "whole")
    for run in ("run", "whole"):
        done = script("train_sup.py", *TINY, "--out", run, cwd=tmp_path)
        assert_refused(done, "out of device memory: try a smaller --batch-size")
    assert not (tmp_path / "run").exists() and not (tmp_path / "whole/previous-1").exists()
    assert contents(tmp_path / "whole") == before
    options = ["--ckpt", whole / "ckpt.pt", "--n", 100, "--out", "out"]
    done = script("sample.py", *options, cwd=tmp_path)
    assert_refused(done, "out of device memory: try a smaller --batch-size")
    assert not (tmp_path / "out").exists()
