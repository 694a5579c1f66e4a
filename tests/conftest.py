"""The tests run beside the project's modules and call its scripts as the command line does."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit is a promise for the CPU

import cem  # noqa: E402
import cli  # noqa: E402

KINDS_OF_ARCH = ["resnet18", "resnet50", "resnet34-imagenet", "wrn-28-10"]


def process(name: str, *args, cwd: Path) -> subprocess.CompletedProcess:
    """A script in a process of its own."""
    command = [sys.executable, str(ROOT / name), *(str(a) for a in args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def script(name: str, *args, cwd: Path, **env) -> SimpleNamespace:
    """The same within this process, which spares the seconds that importing torch takes; an unforeseen exception gets out."""
    main, before = importlib.import_module(name.removesuffix(".py")).main, os.getcwd()
    stdout, stderr, returncode = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", [name, *(str(a) for a in args)])
    redirected = contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr)
    with argv, mock.patch.dict(os.environ, env), redirected[0], redirected[1]:
        try:
            os.chdir(cwd)
            cli.run(main)
        except SystemExit as end:
            returncode = end.code
        finally:
            os.chdir(before)
    return SimpleNamespace(returncode=returncode, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """BatchNorm with statistics and scales that differ from 0 and 1, as in a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
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
    """A folder in which a small classifier was trained on digits for five epochs."""
    folder = tmp_path_factory.mktemp("digits")
    done = script("train_sup.py", "--dataset", "digits", "--width", 8, "--epochs", 5, "--ema", 0.5, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder
