"""Seconds of an adversarial training step as a function of batch size, attack steps and width.

    python bench/cost.py                # -> bench/cost-cpu.json, a few minutes on two cores
    torchrun --nproc-per-node 2 bench/cost.py --out bench/cost-2.json    # the batch over processes

Each quantity is halved and doubled while the others stay. Every round times all settings once, so
that other load on the machine affects them alike; the table has the medians of the rounds. A step
with a k-step attack costs 2 k + 3 forward passes, whose arithmetic grows with the square of width.
A slope is the exponent of the time as a power of the arithmetic, from the halved to the doubled.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import tables
from contenders import Ours

import bench
from lib import cli, distributed, files
from lib.cli import option
from lib.device import PRECISIONS, pick_device
from lib.markdown import table

BASE = dict(batch_size=64, steps=10, width=32)


@dataclass
class Options:
    rounds: int = option(3, "timed rounds, after one for warm-up", least=1)
    out: str = option("bench/cost-cpu.json", "JSON file", metavar="PATH")
    device: str = option("auto", cli.DEVICE)
    precision: str = option("auto", "arithmetic", choices=PRECISIONS)


def settings() -> list[dict]:
    """BASE, and BASE with one quantity halved or doubled."""
    result = [BASE]
    for key, value in BASE.items():
        result += [BASE | {key: value // 2}, BASE | {key: 2 * value}]
    return result


def arithmetic(setting: dict) -> float:
    """FLOP of a training step, in forward passes of one image at width 1."""
    return setting["batch_size"] * (2 * setting["steps"] + 3) * setting["width"] ** 2


def training_step(setting: dict, precision: str, device: torch.device) -> Callable:
    work = Ours(bench.Options(precision=precision, **setting), device).work()
    return work["supervised training step"][0]


def slopes(rows: list[dict]) -> dict[str, float]:
    """d log seconds / d log arithmetic of each quantity, over its rows (`settings`)."""
    result = {}
    for i, key in enumerate(BASE):
        half, double = rows[1 + 2 * i : 3 + 2 * i]
        growth = [math.log(double[name] / half[name]) for name in ("seconds", "arithmetic")]
        result[key] = growth[0] / growth[1]
    return result


def markdown(rows: list[dict]) -> str:
    images, steps, width = slopes(rows).values()
    shown = f"Slopes: {images:.2f} (images), {steps:.2f} (steps), {width:.2f} (width²).\n"
    return f"{table(tables.cost({'rows': rows}))}\n{shown}"


def main() -> None:
    opt = cli.parse(Options, __doc__)
    files.check_output(Path(opt.out), files.json_with("command", "rows"))
    device = pick_device(opt.device)
    steps = [training_step(setting, opt.precision, device) for setting in settings()]
    rounds = []
    for _ in cli.progress(range(opt.rounds + 1), "rounds"):
        rounds.append([bench.seconds(step, device) for step in steps])
    medians = [statistics.median(times) for times in zip(*rounds[1:])]
    rows = []
    for setting, seconds in zip(settings(), medians):
        row = dict(setting, seconds=round(seconds, 4))
        row["arithmetic"] = round(arithmetic(setting) / arithmetic(BASE), 3)
        rows.append(row)
    record = {"command": cli.command(), "device": device.type, "threads": torch.get_num_threads()}
    record["processes"] = distributed.world_size()
    distributed.barrier()
    if distributed.rank():
        return
    out = Path(opt.out)
    files.write_json(out, record | {"rows": rows})
    print(f"{markdown(rows)}wrote {out}")


if __name__ == "__main__":
    cli.run(main)
