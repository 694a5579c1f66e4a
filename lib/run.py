"""The folder of a training run: its own files, its checkpoints, and how it is resumed."""

import itertools
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import cem
from lib import cli, data, distributed, files, schema

# The files of a run. Nothing else in its folder is replaced or deleted.
CHECKPOINTS = ("ckpt.pt", "ckpt-previous.pt")  # a run resumes from either
FILES = (*CHECKPOINTS, "diverged.pt", "log.jsonl", "options.json")
EVENTS = ".cem"  # suffix of TensorBoard's event files

# Options that --resume does not take from the run, and those that may differ from the run's.
OF_THIS_CALL = ("resume", "max_minutes", "out", "device", "compile", "quiet", "diagnose")
MAY_CHANGE = (*OF_THIS_CALL, "data_dir", "n_eval", "eval_every", "on_diverge", "max_energy_gap")
FOLDERS = ("dataset", "chain_start")  # may have moved


def resumes(opt) -> bool:
    """Whether --resume was given and opt.out has a run."""
    return opt.resume and any((Path(opt.out) / name).exists() for name in CHECKPOINTS)


class RunFolder:
    """The files of one run in opt.out. Under torchrun, only the first process writes."""

    def __init__(self, opt):
        self.opt = opt
        self.path = Path(opt.out)
        self.checkpoint = self.path / "ckpt.pt"
        self.previous = self.path / "ckpt-previous.pt"
        self.earlier = None  # where prepare has moved an earlier run

    def files(self) -> list[Path]:
        """The run's files that exist."""
        events = self.path.glob(f"events.out.tfevents.*{EVENTS}")
        return [p for p in (*(self.path / name for name in FILES), *events) if p.is_file()]

    def results(self) -> list[Path]:
        """What other scripts made of the run: JSON files with a command, others of their names."""
        found = [p for p in self.path.glob("*.json") if files.json_with("command")(p)]
        ends = (".json", ".md", ".npz", ".png", ".gif")
        return [f for p in found for f in map(p.with_suffix, ends) if f.is_file()]

    def prepare(self, resume: bool) -> None:
        """Move an earlier run and its results to previous-N unless it is resumed; write options."""
        for name in FILES:  # left behind by a process that was killed
            for temporary in self.path.glob(f".{name}.*.cem-tmp"):
                temporary.unlink()
        if self.files() and not resume:
            folders = (self.path / f"previous-{i}" for i in itertools.count(1))
            self.earlier = next(path for path in folders if not path.exists())
            self.earlier.mkdir()
            for path in [*self.files(), *self.results()]:
                os.replace(path, self.earlier / path.name)
            print(f"moved the earlier run to {self.earlier}")
        options = {k: v for k, v in asdict(self.opt).items() if v != math.inf}  # not in JSON
        files.write_json(self.path / "options.json", options)

    def undo(self) -> None:
        """Remove the files of a new run, and move the earlier run back."""
        for path in self.files():
            path.unlink()
        if self.earlier:
            for path in self.earlier.iterdir():
                os.replace(path, self.path / path.name)
            self.earlier.rmdir()
            print(f"moved the earlier run back from {self.earlier}")

    def board(self, step: int) -> SummaryWriter:
        """TensorBoard's writer; events after `step` are discarded."""
        return SummaryWriter(str(self.path), purge_step=step + 1, filename_suffix=EVENTS)

    def write_log(self, lines: list[dict]) -> None:
        files.write_text(self.path / "log.jsonl", "".join(json.dumps(x) + "\n" for x in lines))

    def load(self, device: torch.device) -> nn.Module:
        """The run's checkpoint or, with a warning, the previous one if it is damaged."""
        try:
            model = schema.load(self.checkpoint, device)
        except cem.CEMError as error:
            if not self.previous.exists():
                raise
            model = schema.load(self.previous, device)
            step = model.extra["training"]["step"]
            cli.warn(f"{error}: continuing from {self.previous}, step {step}")
            self.step_back()
        self._check_resumable(model.extra)
        return model

    def _check_resumable(self, extra: dict) -> None:
        message = f"{self.checkpoint} has no training state: it cannot be resumed"
        cem.require("training" in extra, message)
        for name, now in asdict(self.opt).items():
            then = extra["options"].get(name, now)
            comparable = type(now) is type(then)  # else a damaged file's
            grows = comparable and name == "epochs" and now > then
            moved = comparable and name in FOLDERS and not {now, then} & {*data.NAMES, "gaussian"}
            agrees = name in MAY_CHANGE or (comparable and now == then) or grows or moved
            rule = " (it may only grow)" if name == "epochs" else ""
            then = cli.as_flags({name: then})
            cem.require(agrees, f"--resume: the run in {self.path} has {then}, not {now}{rule}")

    def save(self, name: str, model: nn.Module, keep: bool, **extra) -> None:
        """Write the checkpoint `name`; keep: the last ckpt.pt becomes ckpt-previous.pt."""
        if keep and self.checkpoint.exists():
            content = self.checkpoint.read_bytes()
            cem.write_atomically(self.previous, lambda file: file.write(content))
        cem.save(self.path / name, model, options=asdict(self.opt), **extra)

    def step_back(self) -> None:
        """Make the previous checkpoint the newest, if there is one."""
        distributed.barrier()  # all processes have read the newest
        if distributed.rank() == 0 and self.previous.exists():
            os.replace(self.previous, self.checkpoint)
        distributed.barrier()
