"""Tune the samplers' defaults: C-FD over how far, in how many steps and with how much noise the chain walks.

    python sweep.py --ref cifar10 --ckpt runs/sup/ckpt.pt --judge runs/judge/ckpt.pt

The judge is a standard classifier (train_sup.py --loss st) trained apart from the model that draws. One factor at a time:
the displacement (steps x step size) in 8 steps; then, at the best so far, the same in other numbers of steps; noise; other
gradient directions; the weights without averaging. Writes every point to --out and prints the best of each sampler.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import cem
import cli
import eval_is_fid
import hardware
import metrics
import sample
from cli import option

DISPLACEMENTS, STEPS, NOISES = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 16.0, 24.0, 32.0), (2, 4, 16), (0.01, 0.03)
OTHER_DIRECTIONS = [("none", 0.03), ("none", 0.1), ("none", 0.3), ("linf", 0.005), ("linf", 0.01)]  # norm, step size


@dataclass
class Options:
    samplers: str = option(",".join(cem.PARAMETRIC_SAMPLERS), "samplers to tune, comma-separated")
    ckpt: str = option("", "checkpoint that draws (default: as sample.py)")
    judge: str = option(str(cli.SHIPPED / "judge.pt"), "classifier checkpoint that judges")
    ref: str = option("cifar10", "reference dataset, as for eval_is_fid.py")
    split: str = option("train", "split of the reference dataset", choices=["train", "test"])
    data_dir: str = option("data", "where torchvision's datasets lie or go")
    n: int = option(300, "images a point")
    batch_size: int = option(250, "images at a time")
    cond: bool = option(False, "class-wise seeds for the unsupervised samplers")
    out: str = option("results/sweep.json", "JSON file to write")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


def main() -> None:
    opt = cli.parse(Options, __doc__)
    where = hardware.device(opt.device)
    network = metrics.Classifier(opt.judge, where)
    images = eval_is_fid.reference_images(opt, network.key)
    reference = eval_is_fid.reference_of(images, network, opt)
    rows, out = [], Path(opt.out)
    names = opt.samplers.split(",")
    for name in names:
        cli.require(name in sample.SAMPLERS, f"--samplers: unknown {name!r}; there are {', '.join(sample.SAMPLERS)}")
    opt.ckpt = str(sample.find_checkpoint(sample.Options(ckpt=opt.ckpt, sampler=names[0]))[0])

    def point(**changes) -> dict:
        options = sample.Options(ckpt=opt.ckpt, n=opt.n, batch_size=opt.batch_size, cond=opt.cond, **changes)
        sample.check(options)
        model = sample.load_model(Path(opt.ckpt), where, options)
        judging = eval_is_fid.Options(batch_size=opt.batch_size)
        images, labels = sample.draw(model, options, where)
        shown = {k: getattr(options, k) for k in ("sampler", "cond", "steps", "step_size", "noise", "norm", "raw")}
        row = eval_is_fid.judge(network, images, labels, reference, judging, options.sampler)
        rows.append(shown | {k: v for k, v in row.items() if k != "samples"})
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        cli.write_text(out, json.dumps({"command": cli.command(), "rows": rows}, indent=1) + "\n")
        return rows[-1]

    def best(points: list[dict]) -> dict:
        row = min(points, key=lambda row: row["C-FD"])
        return {k: row[k] for k in ("sampler", "steps", "step_size", "noise", "norm", "raw")}

    point(sampler="seeds")
    for name in names:
        points = [point(sampler=name, steps=8, step_size=d / 8, noise=0.0) for d in DISPLACEMENTS]
        displacement = 8 * best(points)["step_size"]
        points += [point(sampler=name, steps=s, step_size=displacement / s, noise=0.0) for s in STEPS]
        chosen = best(points)
        points += [point(**chosen | {"noise": noise}) for noise in NOISES]
        points += [point(**chosen | {"norm": norm, "step_size": size}) for norm, size in OTHER_DIRECTIONS]
        if "training" in cem.load(opt.ckpt).extra:
            points += [point(**chosen | {"raw": True})]
        print("best:", best(points), flush=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
