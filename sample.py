"""Draw images from a trained energy model: gradient ascent on a potential from Gaussian seeds.

    python sample.py                                     # rcs, from runs/sup/ckpt.pt or the checkpoint that ships
    python sample.py --sampler cs --classes cat,dog --n 200
    python sample.py --sampler ta --init noise           # from uniform noise: nothing but the network draws
    python sample.py --sampler maxent --cond             # from runs/unsup/ckpt.pt or the encoder that ships

    torchrun --nproc_per_node=8 -- sample.py --n 50000   # shared out; after an interruption the same command goes on

Writes samples-<sampler>[-cond].npz (arr_0: uint8 (N, H, W, C), arr_1: int64 labels), .png (a row a class) and .json beside
the checkpoint. Image i depends on --seed and i, not on --n or --batch-size, but for a few grey levels of rounding; the
images of pgd and maxent climb together, a batch at a time: theirs depend on --batch-size too, the N of the entropy estimate.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor
from tqdm import tqdm

import cem
import cli
import data
import hardware
import metrics
import parallel
import pictures
from cli import option

SEED_RANK = 64  # of the seeds of a checkpoint from elsewhere
# how far all steps together walk on 3x32x32 images, in l2: results/sweep-*.json
DISPLACEMENT = dict.fromkeys(cem.PARAMETRIC_SAMPLERS, 3.0) | dict.fromkeys(cem.NON_PARAMETRIC_SAMPLERS, 24.0) | {"seeds": 0.0}
SAMPLERS = [*cem.PARAMETRIC_SAMPLERS, *cem.NON_PARAMETRIC_SAMPLERS, "seeds"]


@dataclass
class Options:
    sampler: str = option(
        "rcs",
        "the potential to climb. Of a classifier: ta log p(y|x); langevin log p(x); cs log p(x|y); rcs log p(x|y) + log p(x). "
        "Of an encoder: pgd InfoNCE; maxent the batch's entropy. seeds: none, the Gaussian seeds untouched",
        choices=SAMPLERS,
    )
    cond: bool = option(
        False, "class-wise seeds instead of one Gaussian for all images; the supervised samplers always use them"
    )
    classes: str = option("", "classes to draw, names or numbers, comma-separated (default: all)")
    n: int = option(100, "images to draw; image i is of class i modulo the number of classes")
    batch_size: int = option(250, "images at a time; for pgd and maxent part of the method: the batch that climbs together")
    steps: int = option(8, "steps of the ascent")
    step_size: Optional[float] = option(
        None,
        "length of a step (default: all steps together walk 3, or 24 for pgd and maxent, on 3x32x32 images, else by size)",
    )
    noise: float = option(0.01, "standard deviation of the noise added at every step")
    norm: str = option("l2", "gradient: l2 scaled to unit length, linf its sign, none as it is", choices=[*cem.DIRECTIONS])
    init: str = option("gaussian", "start from the Gaussian seeds or from uniform noise", choices=["gaussian", "noise"])
    seed: int = option(0, "random seed")
    ckpt: str = option("", "checkpoint (default: runs/{sup,unsup}/ckpt.pt if there is one, else the one in checkpoints/)")
    raw: bool = option(False, "the weights as the optimiser left them instead of their running average")
    dataset: str = option("", "dataset of a checkpoint from elsewhere, whose images give seeds and class names: " + data.HELP)
    data_dir: str = option("data", "where torchvision's datasets lie or go")
    mean: list[float] = cli.options(float, f"mean {cli.NORMALISATION}")
    std: list[float] = cli.options(float, f"standard deviation {cli.NORMALISATION}")
    png: str = option(
        "",
        "folder for an image file a sample, that must not be there yet: class folders, and the same files "
        "(hard links) beside them, since pytorch_fid and fidelity read no folders in folders",
    )
    out: str = option("", "folder to write to (default: beside the checkpoint; runs/shipped for one in checkpoints/)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "arithmetic; auto: bfloat16 where the device has it", choices=hardware.PRECISIONS)


def check(opt: Options) -> None:
    for name in ("n", "batch_size", "steps"):
        cli.require(getattr(opt, name) > 0, f"--{name.replace('_', '-')} must be positive")
    cli.require(opt.step_size is None or 0 < opt.step_size < math.inf, "--step-size must be positive")
    cli.require(opt.norm != "none" or opt.step_size is not None, "--norm none needs a --step-size: gradients have any length")
    cli.require(not opt.png or not Path(opt.png).exists(), f"--png {opt.png} is there already: name another folder")
    cli.require(0 <= opt.noise < math.inf, "--noise must not be negative")
    cli.require(
        opt.batch_size > 1 or opt.sampler not in cem.NON_PARAMETRIC_SAMPLERS,
        f"--sampler {opt.sampler} needs a --batch-size of at least 2: the images of a batch repel each other",
    )


def find_checkpoint(opt: Options) -> tuple[Path, Path]:
    """-> the checkpoint to use and the folder to write to."""
    kind = "unsup" if opt.sampler in cem.NON_PARAMETRIC_SAMPLERS else "sup"
    path = Path(opt.ckpt or f"runs/{kind}/ckpt.pt")
    if not opt.ckpt and not path.exists():
        path = cli.SHIPPED / f"{kind}.pt"
    return path, Path(opt.out) if opt.out else cli.folder_beside(path)


def load_model(path: Path, where: torch.device, opt: Options) -> torch.nn.Module:
    """The checkpoint, ready to sample, with seeds, class names and dataset as its extra."""
    model, sampler = cli.load(path, where, opt), opt.sampler
    kind = "an encoder (train_unsup.py)" if isinstance(model, cem.NonParametricCEM) else "a classifier (train_sup.py)"
    fits = isinstance(model, cem.NonParametricCEM) == (sampler in cem.NON_PARAMETRIC_SAMPLERS)
    cli.require(fits or sampler == "seeds", f"--sampler {sampler} is not for {path}: that is {kind}")
    if opt.raw:
        cli.require("training" in model.extra, f"{path} carries one set of weights only: leave --raw out")
        model.load_state_dict(model.extra["training"]["model"])
    if "foreign" in model.extra:
        cli.require(opt.dataset, f"{path} comes from elsewhere and carries no seeds: name its --dataset to fit them")
        dataset = data.load(opt.dataset, "train", opt.data_dir)
        cli.adopt(model, path, dataset)
        model.extra |= dataset.card(SEED_RANK)
    whole = {"seeds", "classes", "dataset"} <= model.extra.keys()
    cli.require(whole, f"{path} carries no Gaussian seeds or class names: it was not made by a training script")
    return cem.folded(model).to(memory_format=torch.channels_last)


def wanted_classes(names: str, classes: list[str]) -> list[int]:
    wanted = [name.strip() for name in names.split(",") if name.strip()] or classes
    for name in wanted:
        known = name in classes or (name.isdecimal() and int(name) < len(classes))
        cli.require(known, f"--classes: there is no class {name!r}; there are {', '.join(classes)}")
    return [classes.index(name) if name in classes else int(name) for name in wanted]


def generators(seed: int, indices: range) -> list[torch.Generator]:
    """One generator an image, on the CPU: the same stream whatever the batch, the device or the number of processes."""
    return [torch.Generator().manual_seed((seed * 0x9E3779B1 + i) % 2**32) for i in indices]


def step_size(opt: Options, shape: tuple[int, ...]) -> float:
    """--step-size; by default the tuned displacement over all steps, an l2 norm in proportion to the square root of C H W."""
    if opt.step_size is not None:
        return opt.step_size
    rms = DISPLACEMENT[opt.sampler] / math.sqrt(3 * 32 * 32) / opt.steps
    return rms if opt.norm == "linf" else rms * math.sqrt(math.prod(shape))


def draw_batch(model, seeds, opt: Options, where: torch.device, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The images uint8 (size, C, H, W) from number `first` on; labels (size,), -1 where one Gaussian for all was the seed."""
    classes = torch.tensor(wanted_classes(opt.classes, model.extra["classes"]))
    conditional = opt.cond or isinstance(model, cem.ParametricCEM)
    index = torch.arange(first, first + size)
    y, random = classes[index % len(classes)], generators(opt.seed, index.tolist())
    if opt.init == "noise":
        x = torch.stack([torch.rand(seeds.shape, generator=g) for g in random])
    else:
        x = seeds.sample(y if conditional else size, random)
    x = x.to(where, memory_format=torch.channels_last)
    if opt.sampler != "seeds":
        with hardware.autocast(where, opt.precision):
            climb = dict(steps=opt.steps, step_size=step_size(opt, seeds.shape), norm=opt.norm, noise=opt.noise)
            coupled = opt.sampler in cem.NON_PARAMETRIC_SAMPLERS
            potential = cem.potential(opt.sampler, model, x.clone() if coupled else y.to(where))
            x = cem.ascend(potential, x, **climb, generator=random)
    return x.mul(255).round().byte().cpu(), y if conditional else torch.full_like(y, -1)


def draw(model, opt: Options, where: torch.device, parts: Path | None = None) -> tuple[Tensor, Tensor]:
    """-> images uint8 (N, C, H, W), labels (N,). Finished batches are kept in the folder `parts`, and found there again.

    torchrun's processes share out the batches, and need that folder: the first one collects them from it.
    """
    seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"])
    drawn, whole = {}, opt.sampler in cem.NON_PARAMETRIC_SAMPLERS  # what climbs together does so in whole batches
    begins = range(0, opt.n, opt.batch_size)

    def some(n: int, first: int) -> tuple[Tensor, Tensor]:
        return draw_batch(model, seeds, opt, where, first, n if whole else min(n, opt.n - first))

    bar = tqdm(parallel.share(begins), opt.sampler, unit="batch", leave=False, disable=parallel.rank() > 0)
    for first in bar:
        if parts is None or pictures.read_part(parts, first) is None:
            drawn[first] = hardware.fitting(opt.batch_size, some, first)
            if parts is not None:
                pictures.write_part(parts, first, *drawn.pop(first))
    parallel.barrier()
    if parts is not None and parallel.rank() == 0:
        drawn = {first: pictures.read_part(parts, first) for first in begins}
    if parallel.rank():
        return torch.empty(0), torch.empty(0)
    images, labels = (torch.cat([drawn[first][i] for first in begins])[: opt.n] for i in (0, 1))
    return images, labels


def parts_of(folder: Path, name: str, opt: Options, path: Path) -> Path:
    """A folder for the finished batches of these very options and weights."""
    what = {k: v for k, v in asdict(opt).items() if k not in ("out", "png", "device", "data_dir", "ckpt")}
    key = hashlib.sha256(json.dumps([what, metrics.digest(path)]).encode()).hexdigest()[:12]
    return folder / f"{name}-{key}.parts"


def main() -> None:
    opt = cli.parse(Options, __doc__)
    check(opt)
    where = hardware.device(opt.device)
    path, folder = find_checkpoint(opt)
    model = load_model(path, where, opt)
    folder = folder if opt.out else cli.folder_beside(path, "foreign" in model.extra)
    print(f"{opt.sampler}: {opt.n} images from {path}")
    begin = time.monotonic()
    name = f"samples-{opt.sampler}{'-cond' * opt.cond}"
    parts = parts_of(folder, name, opt, path)
    if found := len(list(parts.glob("*.npz"))):
        print(f"going on with {found} finished batch{'es' * (found > 1)} in {parts}")
    parallel.barrier()  # before another process finishes one
    try:
        images, labels = draw(model, opt, where, parts)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with the finished batches in {parts}", file=sys.stderr)
        raise
    if parallel.rank():
        return
    seconds = time.monotonic() - begin
    record = {
        "command": cli.command(),
        **asdict(opt),
        "ckpt": str(path),
        "dataset": model.extra["dataset"],
        "classes": model.extra["classes"],
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "step_size": step_size(opt, model.extra["seeds"]["shape"]),
        "precision": hardware.settled(where, opt.precision),
    }
    record |= {"seconds": round(seconds, 2), "images_per_second": round(opt.n / seconds, 2)}
    pictures.write(folder, name, images, labels, record)
    shutil.rmtree(parts)
    if opt.png:
        pictures.write_files(Path(opt.png), images, labels, model.extra["classes"])


if __name__ == "__main__":
    cli.run(main)
