"""What a step costs: seconds of an adversarial training step over images, steps of the attack, and width.

    python results/cost.py                               # -> results/cost-cpu.json and .md, a few minutes on two cores

Each quantity is doubled twice while the others stay, in rounds, so that a machine's moods fall on all alike; the median of
the rounds. A training step of k attack steps is 2 k + 3 forward passes' worth of arithmetic, proportional to width².
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
import cli  # noqa: E402
import hardware  # noqa: E402

BASE = dict(batch_size=64, steps=10, width=32)


@dataclass
class Options:
    rounds: int = cli.option(3, "timed rounds, after one to warm up")
    device: str = cli.option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = cli.option("auto", "arithmetic", choices=hardware.PRECISIONS)
    out: str = cli.option("results/cost-cpu.json", "JSON file to write, and beside it .md")


def passes(setting: dict) -> float:
    """Arithmetic of a training step, in forward passes of one image at width 1."""
    return setting["batch_size"] * (2 * setting["steps"] + 3) * setting["width"] ** 2


def main() -> None:
    opt = cli.parse(Options, __doc__)
    cli.require(opt.rounds > 0, "--rounds must be positive")
    where = hardware.device(opt.device)
    settings = [BASE] + [BASE | {key: BASE[key] * factor} for key in BASE for factor in (0.5, 2)]
    settings = [{key: int(value) for key, value in setting.items()} for setting in settings]
    steps = []
    for setting in settings:
        work = bench.ours(bench.Options(precision=opt.precision, **setting), where)
        steps.append(work["supervised training step"][0])
    rounds = [[bench.seconds(step, where) for step in steps] for _ in tqdm(range(opt.rounds + 1), "rounds", leave=False)]
    medians = [statistics.median(times) for times in zip(*rounds[1:])]
    lines = ["| images | steps | width | seconds | of the first row's | of its arithmetic |", "|---" * 6 + "|"]
    rows = []
    for setting, seconds in zip(settings, medians):
        cost, arithmetic = seconds / medians[0], passes(setting) / passes(BASE)
        rows.append(setting | {"seconds": round(seconds, 4), "cost": round(cost, 3), "arithmetic": round(arithmetic, 3)})
        numbers = " | ".join(str(setting[key]) for key in BASE)
        lines.append(f"| {numbers} | {seconds:.3f} | {cost:.2f} | {arithmetic:.2f} |")
    text, out = "\n".join(lines) + "\n", Path(opt.out)
    record = {"command": cli.command(), "device": where.type, "threads": torch.get_num_threads(), "rows": rows}
    cli.write_text(out, json.dumps(record, indent=1) + "\n")
    cli.write_text(out.with_suffix(".md"), text)
    print(f"{text}wrote {out} and .md")


if __name__ == "__main__":
    cli.run(main)
