"""Resident memory over half an hour of training and half an hour of sampling, both on digits.

    python bench/soak.py                                   # an hour -> bench/soak.json
    python bench/soak.py --minutes 4 --out runs/soak.json

Memory is read every ten seconds. The first tenth of each part, in which caches fill, counts as
warm-up.
"""

import json
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cem
from lib import cli, files
from lib.cli import option

WARM_UP = 0.1  # share of the readings


@dataclass
class Options:
    minutes: float = option(60.0, "duration of both parts together")
    every: float = option(10.0, "seconds between two readings", above=0)
    run: str = option("runs/soak", "folder of the training run and the samples", metavar="PATH")
    out: str = option("bench/soak.json", "JSON file to write", metavar="PATH")


def resident(pid: int) -> float:
    """The process's resident memory in MiB; 0 if it has ended."""
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout or 0) / 1024


def cpu_seconds() -> float:
    """User time of all child processes that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def readings_of(words: list[str], minutes: float, every: float) -> list[float]:
    """Run a script of the project for `minutes`, then terminate it -> its memory in MiB.

    Raises CEMError if it ended by itself or does not exit cleanly on SIGTERM.
    """
    readings = []
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            for _ in cli.progress(range(int(60 * minutes / every)), words[0], unit="reading"):
                time.sleep(every)
                if child.poll() is not None:
                    break
                readings.append(resident(child.pid))
            child.send_signal(signal.SIGTERM)  # under nohup, SIGINT would be ignored
            status = child.wait(120)
        finally:
            child.kill()
        errors.seek(0)
        lines = errors.read().decode().replace("\r", "\n").strip().splitlines() or [""]
    stopped = status == 128 + signal.SIGTERM
    cem.require(stopped, f"{words[0]} ended with exit status {status}: {lines[-1]}")
    return readings


def watch(words: list[str], minutes: float, every: float) -> dict:
    """A row of the record: the script's time, and its memory after the warm-up."""
    begin, cpu = time.monotonic(), cpu_seconds()
    readings = readings_of(words, minutes, every)
    warm = readings[int(WARM_UP * len(readings)) :]
    least, most = min(warm), max(warm)
    tenths = [readings[i * len(readings) // 10] for i in range(10)]
    return {
        "command": shlex.join(["python", *words]),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "cpu_minutes": round((cpu_seconds() - cpu) / 60, 1),
        "MiB_least_and_most": [round(least, 1), round(most, 1)],
        "MiB_first_and_last": [round(warm[0], 1), round(warm[-1], 1)],
        "MiB_by_tenth": [round(value, 1) for value in tenths],
        "spread": round(most / least - 1, 4),
    }


def main() -> None:
    opt = cli.parse(Options, __doc__)
    files.check_output(Path(opt.out), files.json_with("command", "rows"))
    minutes = opt.minutes / 2
    enough = 60 * minutes / opt.every >= 12
    cem.require(enough, "--minutes is too short for --every: each part needs 12 readings")
    train = "train_sup.py --dataset digits --loss jeat --epochs 1000000 --seed 1 --out".split()
    draw = "sample.py --sampler rcs --n 100000000 --ckpt".split()
    rows = []
    for words in ([*train, opt.run], [*draw, f"{opt.run}/ckpt.pt", "--out", opt.run]):
        rows.append(watch(words, minutes, opt.every))
        print(json.dumps(rows[-1]), flush=True)
    record = {"command": cli.command(), "rows": rows}
    files.write_json(Path(opt.out), record)
    print(f"wrote {opt.out}")


if __name__ == "__main__":
    cli.run(main)
