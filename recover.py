"""What is kept of a training run, and how it is taken up again."""

import itertools
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
        grows = ": it may only grow" if name == "epochs" else ""
        cli.require(fits, f"--resume: the run in {opt.out} has {cli.spelled({name: then})}, not {now}{grows}")
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


def wanted(opt) -> bool:
    """Is there a run in opt.out to go on with, and is that asked for, by --resume or by torchrun's --max-restarts?"""
    asked = opt.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    found = any((Path(opt.out) / name).exists() for name in ("ckpt.pt", "ckpt-previous.pt"))
    if asked and not found:
        print(f"there is nothing to resume in {opt.out}: a new run")
    return asked and found


def save(path: Path, keep: bool, model: nn.Module, **extra) -> None:
    """cem.save; keep: the checkpoint that was there before stays as ckpt-previous.pt."""
    new = path.with_name(f"{path.stem}-new.pt")
    try:
        cem.save(new, model, **extra)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from error
    if keep and path.exists():
        temporary, previous = (path.with_name(f"{path.stem}-previous.pt{end}") for end in (".tmp", ""))
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)
    os.replace(new, path)


def step_back(out: Path) -> None:
    """Take the checkpoint before the newest for the newest, where there is one."""
    parallel.barrier()  # everyone has read the newest
    if parallel.rank() == 0 and (out / "ckpt-previous.pt").exists():
        os.replace(out / "ckpt-previous.pt", out / "ckpt.pt")
    parallel.barrier()


def begin_anew(out: Path) -> None:
    """A run that starts anew in `out` moves an earlier one's files, which it did not make, into a folder of their own."""
    if not (out / "ckpt.pt").exists():
        return
    previous = next(path for i in itertools.count(1) if not (path := out / f"previous-{i}").exists())
    previous.mkdir()
    for path in out.iterdir():
        if path.is_file():
            os.replace(path, previous / path.name)
    print(f"kept the earlier run's files in {previous}")
