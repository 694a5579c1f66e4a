"""Tests import the project's modules and call its scripts as the command line does."""

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, with a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "results")]

import cem
from lib import cli

ARCHS = ["resnet18", "resnet50", "resnet34-imagenet", "wrn-28-10"]


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on what others drew before it."""
    torch.manual_seed(0)


def process(name: str, *args, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script in its own process."""
    command = [sys.executable, str(ROOT / name), *(str(a) for a in args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def script(name: str, *args, cwd: Path, **env) -> SimpleNamespace:
    """Run a script in this process, without the seconds of importing torch.

    An exception that the script does not handle propagates.
    """
    main = importlib.import_module(Path(name).stem).main
    before, argv = os.getcwd(), [name, *(str(a) for a in args)]
    stdout, stderr, returncode = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, env),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            os.chdir(cwd)
            cli.run(main)
        except SystemExit as end:
            returncode = end.code
        finally:
            os.chdir(before)
    return SimpleNamespace(
        returncode=returncode, stdout=stdout.getvalue(), stderr=stderr.getvalue()
    )


def succeeded(done):
    """The ended script itself, whose exit status must be 0."""
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done


def last_line(done) -> str:
    return done.stderr.replace("\r", "\n").strip().splitlines()[-1]


def assert_refused(done, *parts: str) -> None:
    """Exit status 2 and one line `error: ...` that contains all parts."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.replace("\r", "\n").count("error: ") == 1
    assert last_line(done).startswith("error: ")
    for part in parts:
        assert part in last_line(done), last_line(done)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def drawn_images(folder: Path, *args) -> tuple[np.ndarray, np.ndarray]:
    """The images, as signed integers, and labels that sample.py draws with these options."""
    succeeded(script("sample.py", *args, "--out", "out", cwd=folder))
    (path,) = (folder / "out").glob("samples-*.npz")
    with np.load(path, allow_pickle=False) as z:
        images, labels = z["arr_0"].astype(int), z["arr_1"]
    shutil.rmtree(folder / "out")
    return images, labels


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give BatchNorm statistics and scales other than 0 and 1, as in a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            statistics = (module.running_mean, module.running_var)
            for tensor in (*statistics, module.weight.data, module.bias.data):
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture
def model():
    return perturb(cem.ParametricCEM("resnet18", 5, width=4)).eval()


@pytest.fixture
def model64(model):
    return model.double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A folder with runs/sup, a small classifier trained on digits for five epochs."""
    folder = tmp_path_factory.mktemp("digits")
    options = ["--dataset", "digits", "--width", 8, "--epochs", 5, "--ema", 0.5]
    succeeded(script("train_sup.py", *options, cwd=folder))
    return folder


@pytest.fixture(scope="session")
def unsup_run(tmp_path_factory):
    """A folder with runs/unsup, a small encoder trained on digits for two epochs."""
    folder = tmp_path_factory.mktemp("unsup")
    options = ["--dataset", "digits", "--width", 8, "--epochs", 2, "--eval-every", 1]
    options += ["--n-eval", 100, "--ema", 0.5, "--precision", "float32"]
    succeeded(script("train_unsup.py", *options, cwd=folder))
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file in the published format of the FID Inception's weights, random."""
    from pytorch_fid import inception

    torch.manual_seed(0)
    no_download = mock.patch.object(inception, "load_state_dict_from_url")
    with no_download, mock.patch.object(torch.nn.Module, "load_state_dict"):
        network = inception.fid_inception_v3()
    # in random layers signals vanish, unless BatchNorm has statistics of images
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    small = torch.empty(16, 3, 8, 8).normal_(0, 0.7)
    with torch.no_grad():
        network.train()(F.interpolate(small.clamp(-1, 1), (299, 299), mode="bilinear"))
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path
