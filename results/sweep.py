"""Tune the samplers' defaults: C-FD as a function of displacement, number of steps and noise.

    python results/sweep.py --ref cifar10 --ckpt runs/sup/ckpt.pt --judge runs/judge/ckpt.pt

The judge is a standard classifier (train_sup.py --loss st) trained independently of the model that
draws. One factor at a time: the displacement, steps x step size, in 8 steps; at the best one, the
number of steps; at the best so far, noise, other gradient directions, and the weights without
averaging. Writes all points to --out and prints the best of each sampler.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cem  # noqa: E402
import eval_is_fid  # noqa: E402
import sample  # noqa: E402
from lib import cli, data, files, metrics, reference, sampling  # noqa: E402
from lib.cli import option  # noqa: E402
from lib.device import pick_device  # noqa: E402

DISPLACEMENTS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 16.0, 24.0, 32.0)
FIRST_STEPS = 8  # in which the displacements are compared
OTHER_STEPS = (2, 4, 16)
NOISES = (0.01, 0.03)
OTHER_DIRECTIONS = (  # norm, step size
    ("none", 0.03),
    ("none", 0.1),
    ("none", 0.3),
    ("linf", 0.005),
    ("linf", 0.01),
)
VARIED = ("sampler", "steps", "step_size", "noise", "norm", "raw")


@dataclass
class Options:
    samplers: str = option(
        ",".join(cem.PARAMETRIC_SAMPLERS), "samplers to tune, comma-separated", "sampling"
    )
    cond: bool = option(False, "class-wise seeds for the unsupervised samplers", "sampling")
    ckpt: str = option("", "checkpoint that draws (default: sample.py's)", "sampling", **cli.PATH)
    n: int = option(300, "images per point", "sampling", least=2)
    batch_size: int = option(250, "images at a time", "sampling", least=1)
    judge: str = option(
        "",
        "classifier checkpoint that judges (default: the shipped judge.pt)",
        "judging",
        **cli.PATH,
    )
    ref: str = option("cifar10", "reference dataset, as for eval_is_fid.py", "judging")
    split: str = option("train", "split of the dataset", "judging", choices=["train", "test"])
    data_dir: str = option("data", "folder of the downloaded datasets", "judging", **cli.PATH)
    image_size: int = option(0, f"of the reference: {data.IMAGE_SIZE}", "judging", least=0)
    out: str = option("results/sweep.json", "JSON file to write", "run", **cli.PATH)
    device: str = option("auto", cli.DEVICE, "run")


class Sweep:
    """Points measured by one judge against one reference; the file is rewritten after each."""

    def __init__(self, opt: Options, ckpt: Path, device: torch.device):
        self.opt = opt
        self.ckpt = ckpt
        self.device = device
        self.network = metrics.Checkpoint(opt.judge or str(cli.SHIPPED / "judge.pt"), device)
        images = reference.load_images(opt, self.network.key)
        self.reference = reference.compute(images, self.network, opt)
        self.rows = []

    def point(self, **changes) -> dict:
        """Draw with these options of sample.py, and judge."""
        opt = self.opt
        options = sample.Options(
            ckpt=str(self.ckpt), n=opt.n, batch_size=opt.batch_size, cond=opt.cond, **changes
        )
        sample.check(options)
        model = sampling.load_model(self.ckpt, self.device, options)
        sampling.use_settings(options, model)
        images, labels = sample.draw(model, options, self.device)
        judging = eval_is_fid.Options(batch_size=opt.batch_size)
        figures = eval_is_fid.judge(
            self.network, images, labels, self.reference, judging, options.sampler
        )
        del figures["samples"]
        row = {key: getattr(options, key) for key in ("sampler", "cond", *VARIED[1:])} | figures
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        record = {"command": cli.command(), "rows": self.rows}
        cli.write_text(Path(opt.out), json.dumps(record, indent=1) + "\n")
        return row

    def tune(self, sampler: str) -> dict:
        """All points of a sampler -> the options of the best."""
        points = []
        for displacement in DISPLACEMENTS:
            length = displacement / FIRST_STEPS
            points.append(
                self.point(sampler=sampler, steps=FIRST_STEPS, step_size=length, noise=0.0)
            )
        displacement = FIRST_STEPS * best(points)["step_size"]
        for steps in OTHER_STEPS:
            length = displacement / steps
            points.append(self.point(sampler=sampler, steps=steps, step_size=length, noise=0.0))
        chosen = best(points)
        for noise in NOISES:
            points.append(self.point(**chosen | {"noise": noise}))
        for norm, length in OTHER_DIRECTIONS:
            points.append(self.point(**chosen | {"norm": norm, "step_size": length}))
        if "training" in cem.load(self.ckpt).extra:
            points.append(self.point(**chosen | {"raw": True}))
        return best(points)


def best(points: list[dict]) -> dict:
    """The options of the point with the lowest C-FD."""
    row = min(points, key=lambda row: row["C-FD"])
    return {key: row[key] for key in VARIED}


def main() -> None:
    opt = cli.parse(Options, __doc__)
    device = pick_device(opt.device)
    samplers = [name.strip() for name in opt.samplers.split(",")]
    for name in samplers:
        known = ", ".join(sample.SAMPLERS)
        cli.require(name in sample.SAMPLERS, f"--samplers: unknown {name!r}, choose from {known}")
    unsupervised = samplers[0] in cem.NON_PARAMETRIC_SAMPLERS
    ckpt = Path(opt.ckpt or cli.default_checkpoint("unsup" if unsupervised else "sup"))
    files.check_output(Path(opt.out), files.json_with("command", "rows"))
    sweep = Sweep(opt, ckpt, device)
    sweep.point(sampler="seeds")
    for name in samplers:
        print("best:", sweep.tune(name), flush=True)
    print(f"wrote {opt.out}")


if __name__ == "__main__":
    cli.run(main)
