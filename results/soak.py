"""Does memory stay flat? An hour of training and of sampling on digits, resident memory read every ten seconds.

python results/soak.py                               # half an hour each -> results/soak.json
python results/soak.py --minutes 4 --out runs/soak.json
"""

import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli  # noqa: E402

WARM = 0.1  # share of the time in which caches fill


@dataclass
class Options:
    minutes: float = cli.option(60.0, "of both together")
    every: float = cli.option(10.0, "seconds between two readings")
    run: str = cli.option("runs/soak", "folder of the training run and the samples")
    out: str = cli.option("results/soak.json", "JSON file to write")


def resident(pid: int) -> float:
    """MiB of memory that the process holds."""
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout or 0) / 1024


def watch(words: list[str], minutes: float, every: float) -> dict:
    """Let a script of the project run that long, then end it -> its memory's least and most, in MiB."""
    readings, begin, before = [], time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            for _ in tqdm(range(int(60 * minutes / every)), words[0], unit="reading", leave=False):
                time.sleep(every)
                if child.poll() is not None:
                    break
                readings.append(resident(child.pid))
            child.send_signal(signal.SIGTERM)  # nohup has SIGINT ignored
            status = child.wait(120)
        finally:
            child.kill()
        errors.seek(0)
        said = errors.read().decode().replace("\r", "\n").strip().splitlines() or [""]
        cli.require(status == 128 + signal.SIGTERM, f"{words[0]} ended with exit status {status}: {said[-1]}")
    warm = readings[int(WARM * len(readings)) :]
    return {
        "command": " ".join(["python", *words]),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "cpu_minutes": round((resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / 60, 1),
        "MiB_least_and_most": [round(min(warm), 1), round(max(warm), 1)],
        "MiB_first_and_last": [round(warm[0], 1), round(warm[-1], 1)],
        "MiB_by_tenth": [round(readings[i * len(readings) // 10], 1) for i in range(10)],
        "spread": round(max(warm) / min(warm) - 1, 4),
    }


def main() -> None:
    opt = cli.parse(Options, __doc__)
    cli.require(
        opt.every > 0 and opt.minutes * 60 / 2 / opt.every >= 12, "--minutes is too short for --every: 12 readings each"
    )
    train = f"train_sup.py --dataset digits --loss jeat --epochs 1000000 --seed 1 --out {opt.run}".split()
    draw = f"sample.py --sampler rcs --n 100000000 --ckpt {opt.run}/ckpt.pt --out {opt.run}".split()
    rows = []
    for words in (train, draw):
        rows.append(watch(words, opt.minutes / 2, opt.every))
        print(json.dumps(rows[-1]), flush=True)
    cli.write_text(Path(opt.out), json.dumps({"command": cli.command(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {opt.out}")


if __name__ == "__main__":
    cli.run(main)
