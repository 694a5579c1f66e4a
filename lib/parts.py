"""The parts of a long computation: scripts of the project, called one after another, each once."""

import contextlib
import functools
import importlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from unittest import mock

import torch

import cem
from lib import cli, data, distributed, files

read_once = functools.lru_cache(maxsize=4)(data.load)  # a folder of photographs takes a minute


def command_of(script: str, *words) -> str:
    """As a user types it."""
    return shlex.join(["python", script, *map(str, words)])


def call(script: str, *words) -> None:
    """Run a script of the project in this process."""
    print(f"\n{command_of(script, *words)}", flush=True)
    argv = [str(cli.SHIPPED.parent / script), *map(str, words)]
    with (
        contextlib.ExitStack() as at_end,
        mock.patch.object(cli, "AT_END", at_end),  # the locks of the part end with it
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(data, "load", read_once),
    ):
        cudnn = torch.backends.cudnn
        at_end.callback(setattr, cudnn, "benchmark", cudnn.benchmark)  # training sets it
        importlib.import_module(script.removesuffix(".py")).main()


def digest(words: list) -> str:
    """8 hex digits that identify these options."""
    return sha256(shlex.join(map(str, words)).encode()).hexdigest()[:8]


class Parts:
    """Calls scripts, each once. `finished` maps each file that they made to the command that made
    it and its seconds, and is stored at `path`; `used` is the part of it that this object has
    returned. common: options that do not change results.

    Under torchrun, every process has to make the same calls.
    """

    def __init__(self, path: Path, common: Sequence[str] = ()):
        self.path, self.common = path, common
        stored = files.read_json(path)
        self.finished = stored["finished"] if isinstance(stored, dict) else {}
        self.used = {}

    def run(self, product: Path, script: str, *words, alone: bool = False) -> Path:
        """Run a script, unless this very command has finished -> its product.

        alone: in the first of torchrun's processes, as if there were no other.
        """
        command = command_of(script, *words)
        made_by = self.finished.get(str(product), {}).get("command")
        missing = made_by != command or not product.exists()
        if not distributed.any_process(missing):
            self.used[str(product)] = self.finished[str(product)]
            return product
        begin = time.monotonic()
        if not alone:
            call(script, *words, *self.common)
        elif distributed.rank() == 0:
            with mock.patch.dict(os.environ, WORLD_SIZE="1"):
                call(script, *words, *self.common)
        distributed.barrier()
        left = f"delete what is left of it, {product.stem}.*, and repeat"
        cem.require(product.exists(), f"{command} did not write {product}: {left}")
        seconds = round(time.monotonic() - begin, 1)
        done = {"command": command, "seconds": seconds}
        self.finished[str(product)] = self.used[str(product)] = done
        if distributed.rank() == 0:
            files.write_json(self.path, {"finished": self.finished})
        return product


def minutes(ckpt: str | Path) -> float:
    """Training time of the run that wrote the checkpoint. Raises CEMError if it is not stored."""
    extra = cem.load(ckpt).extra
    cem.require("training" in extra, f"{ckpt} has no training time: pass the ckpt.pt of a run")
    return extra["training"]["seconds"] / 60


def evaluated(parts: Parts, ckpt: Path, *words, name="accuracy.json", alone=False) -> dict:
    """What eval_robust.py writes to `name` with these options, in a folder of its own."""
    words = ["--ckpt", ckpt, *words]
    out = ckpt.with_name(f"accuracy-{digest(words)}")
    words += ["--out", out]
    return files.read_json(parts.run(out / name, "eval_robust.py", *words, alone=alone))


def drawn(parts: Parts, ckpt: Path, sampler: str, n: int, cond: bool = False) -> Path:
    """Draw n images -> the samples, .npz, in a folder of their own."""
    folder = ckpt.with_name(f"samples-{n}")
    words = ["--ckpt", ckpt, "--sampler", sampler, *["--cond"] * cond, "--n", n, "--out", folder]
    return parts.run(folder / f"samples-{sampler}{'-cond' * cond}.npz", "sample.py", *words)


def judged(parts: Parts, ckpt: Path, samplers: Sequence[str], n: int, ref, judge) -> dict:
    """Draw n images by each sampler -> {sampler: its scores by the features of `judge`}."""
    samples = [drawn(parts, ckpt, name, n) for name in samplers]
    words = ["--samples", *samples, "--ref", ref, "--features", judge]
    out = samples[0].with_name(f"scores-{digest(words)}.json")
    parts.run(out, "eval_is_fid.py", *words, "--out", out)
    return dict(zip(samplers, files.read_json(out)["rows"]))
