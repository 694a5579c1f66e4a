"""Find the settings of the samplers of a checkpoint: steps, step size, noise and norm.

    python results/sweep.py --ref PATH --judge runs/judge/ckpt.pt --second runs/encoder/ckpt.pt

One factor at a time, from the checkpoint's own settings or sample.py's. Two rulers of different
kind judge each point: C-FD by a classifier, which should be independent of the model that draws and
of the judge that reports, and E-FD by an encoder trained without labels or, without --second, the
harmonic mean of precision and recall. A point's score is its ratio to the best value, by the ruler
for which that is worse. Compare near-ties by eye. Writes all points to --out and, with --save, a
copy of the checkpoint that contains the settings.
"""

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem
import eval_is_fid
import sample
from lib import cli, data, distributed, files, metrics, reference, sampling
from lib.cli import option
from lib.device import pick_device
from lib.schema import SETTINGS

STEPS = (4, 8, 12, 16, 20, 24)
LENGTHS = (0.5, 0.7, 1.4, 2.0)  # times the step size
NOISES = (0.0, 0.01, 0.03)


@dataclass
class Options:
    samplers: str = option(
        ",".join(cem.PARAMETRIC_SAMPLERS), "samplers to tune, comma-separated", "sampling"
    )
    cond: bool = option(False, "class-wise seeds for the unsupervised samplers", "sampling")
    ckpt: str = option(
        "", "checkpoint that draws (default: sample.py's)", "sampling", metavar="PATH"
    )
    n: int = option(300, "images per point", "sampling", least=11)  # for the ten parts of C-IS
    batch_size: int = option(250, "images at a time", "sampling", least=1)
    judge: str = option(
        "",
        "classifier checkpoint that judges (default: the shipped judge.pt)",
        "judging",
        metavar="PATH",
    )
    ref: str = option("cifar10", "reference dataset, as for eval_is_fid.py", "judging")
    split: str = option("train", "split of the dataset", "judging", choices=["train", "test"])
    data_dir: str = option("data", data.DIR_HELP, "judging", metavar="PATH")
    image_size: int = option(0, f"of the reference: {data.IMAGE_SIZE}", "judging", least=0)
    second: str = option(
        "", "encoder that judges too (default: precision and recall)", "judging", metavar="PATH"
    )
    save: str = option("", "write the checkpoint with the settings here", "run", metavar="PATH")
    out: str = option("results/sweep.json", "JSON file to write", "run", metavar="PATH")
    device: str = option("auto", cli.DEVICE, "run")


def inverse_f(precision: float, recall: float) -> float:
    """One over their harmonic mean."""
    product = precision * recall
    return (precision + recall) / (2 * product) if product else 1e9


class Sweep:
    """Points measured by two rulers against one reference; the file is rewritten after each."""

    def __init__(self, opt: Options, ckpt: Path, device: torch.device):
        self.opt = opt
        self.ckpt = ckpt
        self.device = device
        paths = [opt.judge or str(cli.SHIPPED / "judge.pt"), *([opt.second] if opt.second else [])]
        self.rulers = []
        for path in paths:
            network = metrics.Checkpoint(path, device)
            against = reference.compute(reference.load_images(opt), network, opt)
            self.rulers.append((network, against))
        names = [network.names[1] for network, _ in self.rulers]
        fits = names == ["C-FD", "E-FD"][: len(names)]
        cem.require(fits, "--judge must be a classifier, --second an encoder")
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
        with tempfile.TemporaryDirectory() as parts:
            images, labels = sample.draw(model, options, self.device, Path(parts))
        row = {key: getattr(options, key) for key in ("sampler", "cond", *SETTINGS)}
        judging = eval_is_fid.Options(batch_size=opt.batch_size)
        for network, against in self.rulers:
            of = (network, images, labels, against, judging, options.sampler)
            row = {**eval_is_fid.judge(*of), **row}
        del row["samples"]
        row["1 / F"] = inverse_f(row["precision"], row["recall"])
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        record = {"command": cli.command(), "rows": self.rows}
        files.write_json(Path(opt.out), record)
        return row

    def tune(self, sampler: str) -> dict:
        """The best point of a sampler."""
        chosen = self.point(sampler=sampler)
        for factor in SETTINGS:
            settings = {key: chosen[key] for key in SETTINGS}
            tried = [self.point(sampler=sampler, **v) for v in self.variants(factor, settings)]
            chosen = self.best([chosen, *tried])
        return chosen

    def variants(self, factor: str, settings: dict) -> list[dict]:
        """The settings with other values of one factor; a linf step walks as far in l2."""
        step = settings["step_size"]
        if factor == "norm":
            pixels = math.prod(cem.load(self.ckpt).extra["image_shape"])
            if settings["norm"] == "linf":
                return [settings | {"norm": "l2", "step_size": step * math.sqrt(pixels)}]
            return [settings | {"norm": "linf", "step_size": step / math.sqrt(pixels)}]
        values = {"steps": STEPS, "step_size": [step * f for f in LENGTHS], "noise": NOISES}
        return [settings | {factor: v} for v in values[factor] if v != settings[factor]]

    def best(self, points: list[dict]) -> dict:
        """The point whose worst ruler, in relation to its own best, is best."""
        rulers = ("C-FD", "E-FD" if self.opt.second else "1 / F")
        least = {ruler: min(point[ruler] for point in points) for ruler in rulers}
        return min(points, key=lambda point: max(point[r] / least[r] for r in rulers))


def main() -> None:
    opt = cli.parse(Options, __doc__)
    cem.require(distributed.world_size() == 1, "sweep.py runs in one process: leave out torchrun")
    device = pick_device(opt.device)
    unsupervised = opt.samplers.split(",")[0].strip() in cem.NON_PARAMETRIC_SAMPLERS
    known = cem.NON_PARAMETRIC_SAMPLERS if unsupervised else cem.PARAMETRIC_SAMPLERS
    samplers = cli.names("--samplers", opt.samplers, known)
    ckpt = Path(opt.ckpt or cli.default_checkpoint("unsup" if unsupervised else "sup"))
    files.check_output(Path(opt.out), files.json_with("command", "rows"))
    if opt.save:
        cem.require(not Path(opt.save).exists(), f"--save {opt.save} exists: use a new file")
        files.make_folder(Path(opt.save).parent)
    sweep = Sweep(opt, ckpt, device)
    sweep.point(sampler="seeds")
    found = {}
    for name in samplers:
        best = sweep.tune(name)
        print("best:", best, flush=True)
        key = sampling.settings_key(name, opt.cond)
        found[key] = {setting: best[setting] for setting in SETTINGS}
    print(f"wrote {opt.out}")
    if opt.save:
        model = cem.load(ckpt)
        model.extra["settings"] = model.extra.get("settings", {}) | found
        weights = [v for v in model.state_dict().values() if v.is_floating_point()]
        half = all(v.equal(v.half().to(v.dtype)) for v in weights)  # as it was stored
        cem.save(opt.save, model.half() if half else model, **model.extra)
        print(f"wrote {opt.save}")


if __name__ == "__main__":
    cli.run(main)
