"""The parts of a long computation: scripts of the project, called one after another, each once."""

import contextlib
import importlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from lib import cli, distributed, files


def call(script: str, *words) -> None:
    """Run a script of the project in this process, as a command line does."""
    words = [str(word) for word in words]
    print(f"\n{shlex.join(['python', script, *words])}", flush=True)
    argv = [str(cli.SHIPPED.parent / script), *words]
    with (
        contextlib.ExitStack() as at_end,
        mock.patch.object(cli, "AT_END", at_end),  # the locks of the part end with it
        mock.patch.object(sys, "argv", argv),
    ):
        importlib.import_module(script.removesuffix(".py")).main()


class Parts:
    """Calls scripts; `seconds` has the finished commands and their time, and is kept in a file.

    Under torchrun, every process has to make the same calls.
    """

    def __init__(self, path: Path, common: list[str]):
        self.path, self.common = path, common
        stored = files.read_json(path)
        self.seconds = stored["seconds"] if isinstance(stored, dict) else {}

    def run(self, product: Path, script: str, *words, alone: bool = False) -> Path:
        """Run a script, unless this very command has finished -> its product.

        alone: in the first of torchrun's processes, as if there were no other.
        """
        words = [str(word) for word in words]
        command = shlex.join(["python", script, *words])
        missing = command not in self.seconds or not product.exists()
        if not distributed.any_process(missing, torch.device("cpu")):
            return product
        begin = time.monotonic()
        if not alone:
            call(script, *words, *self.common)
        elif distributed.rank() == 0:
            with mock.patch.dict(os.environ, WORLD_SIZE="1"):
                call(script, *words, *self.common)
        distributed.barrier()
        self.seconds[command] = round(time.monotonic() - begin, 1)
        if distributed.rank() == 0:
            cli.write_text(self.path, json.dumps({"seconds": self.seconds}, indent=1) + "\n")
        return product
