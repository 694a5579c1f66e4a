"""What is kept of a training run, and how it is taken up again."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import cem
import cli
import parallel


def resumable(opt, extra: dict) -> dict:
    """The training state in a checkpoint's extra; CEMError where it has none or where options contradict those of the run."""
    cli.require("training" in extra, f"{opt.out}/ckpt.pt carries no training state: it cannot be resumed")
    free = {
        "resume",
        "max_minutes",
        "out",
        "data_dir",
        "device",
        "n_eval",
        "eval_every",
        "on_diverge",
        "max_energy_gap",
    }
    free |= {"diagnose", "evaluate", "ckpt", "attacks", "restarts", "n", "ood", "mean", "std"}  # --evaluate's
    for name, now in asdict(opt).items():
        then = extra["options"].get(name)
        fits = name in free or name not in extra["options"] or now == then or (name == "epochs" and now > then)
        cli.require(fits, f"--resume: the run in {opt.out} has --{name.replace('_', '-')} {then}, not {now}")
    return extra["training"]


def newest(out: Path, where: torch.device) -> nn.Module:
    """The run's checkpoint or, where that is damaged, aloud the one before, which then takes its place."""
    try:
        return cem.load(out / "ckpt.pt", where)
    except cem.CEMError as error:
        if not (before := out / "ckpt-previous.pt").exists():
            raise
        model = cem.load(before, where)
        cli.warn(f"{error}: going on from {before}, step {model.extra['training']['step']}")
        step_back(out)
        return model


def keep(out: Path) -> None:
    """The checkpoint that is about to be replaced stays as ckpt-previous.pt."""
    if (out / "ckpt.pt").exists():
        temporary = out / f"ckpt-previous.pt.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(out / "ckpt.pt", temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(out / "ckpt.pt", temporary)
        os.replace(temporary, out / "ckpt-previous.pt")


def step_back(out: Path) -> None:
    """Take the checkpoint before the newest for the newest, where there is one."""
    parallel.barrier()  # everyone has read the newest
    if parallel.rank() == 0 and (out / "ckpt-previous.pt").exists():
        os.replace(out / "ckpt-previous.pt", out / "ckpt.pt")
    parallel.barrier()


def keep_previous(out: Path) -> None:
    """A run that starts anew in `out` moves the earlier one's files, which it did not make, aside."""
    (previous := out / "previous").mkdir(exist_ok=True)
    for path in out.iterdir():
        if path.is_file():
            os.replace(path, previous / path.name)
    print(f"kept the earlier run's files in {previous}")
