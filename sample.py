"""Draw images from a trained energy model: gradient ascent on a potential from Gaussian seeds.

    python sample.py                                     # rcs, from runs/sup/ckpt.pt or the checkpoint that ships
    python sample.py --sampler cs --classes cat,dog --n 200
    python sample.py --sampler ta --init noise           # from uniform noise: nothing but the network draws
    python sample.py --sampler maxent --cond             # from runs/unsup/ckpt.pt or the encoder that ships

Writes samples-<sampler>[-cond].npz (arr_0: uint8 (N, H, W, C), arr_1: int64 labels), .png (a row a class) and .json beside
the checkpoint. Image i depends on --seed and i, not on --n or --batch-size; the images of pgd and maxent climb together, a
batch at a time: theirs depend on --batch-size too, which is the N of the entropy estimate.
"""

import json
import math
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

import cem
import cli
import data
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
    precision: str = option("float32", "arithmetic", choices=["float32", "bfloat16", "auto"])


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


def draw(model, opt: Options, where: torch.device) -> tuple[Tensor, Tensor]:
    """-> images uint8 (N, C, H, W), labels (N,), -1 where one Gaussian for all images was the seed."""
    seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"])
    classes = torch.tensor(wanted_classes(opt.classes, model.extra["classes"]))
    conditional = opt.cond or isinstance(model, cem.ParametricCEM)
    coupled = opt.sampler in cem.NON_PARAMETRIC_SAMPLERS
    images, labels = [], []
    for first in tqdm(range(0, opt.n, opt.batch_size), opt.sampler, unit="batch", leave=False):
        # images that climb together do so in whole batches: the surplus of the last one is dropped below
        index = torch.arange(first, first + opt.batch_size if coupled else min(first + opt.batch_size, opt.n))
        y, random = classes[index % len(classes)], generators(opt.seed, index.tolist())
        if opt.init == "noise":
            x = torch.stack([torch.rand(seeds.shape, generator=g) for g in random])
        else:
            x = seeds.sample(y if conditional else len(index), random)
        x = x.to(where, memory_format=torch.channels_last)
        if opt.sampler != "seeds":
            with cli.autocast(where, opt.precision):
                climb = dict(steps=opt.steps, step_size=step_size(opt, seeds.shape), norm=opt.norm, noise=opt.noise)
                potential = cem.potential(opt.sampler, model, x.clone() if coupled else y.to(where))
                x = cem.ascend(potential, x, **climb, generator=random)
        images.append(x.mul(255).round().byte().cpu())
        labels.append(y if conditional else torch.full_like(y, -1))
    return torch.cat(images)[: opt.n], torch.cat(labels)[: opt.n]


def grid(images: Tensor, labels: Tensor, columns: int = 10) -> Tensor:
    """A picture with a row a class, enlarged to at least 64 pixels an image; without labels, the first images."""
    if labels.max() >= 0:
        rows = [images[labels == k][:columns] for k in labels.unique()]
        columns = max(len(row) for row in rows)
        blank = torch.zeros_like(images[:1])
        images = torch.cat([torch.cat([row, blank.expand(columns - len(row), -1, -1, -1)]) for row in rows])
    else:
        images = images[: columns**2]
    scale = -(-64 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return torchvision.utils.make_grid(images, nrow=columns, padding=2)


def write(folder: Path, name: str, images: Tensor, labels: Tensor, record: dict) -> None:
    npz, png = folder / f"{name}.npz", folder / f"{name}.png"
    arrays = dict(arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    cem.replace(npz, lambda file: np.savez_compressed(file, **arrays))
    picture = torchvision.transforms.functional.to_pil_image(grid(images, labels))
    cem.replace(png, lambda file: picture.save(file, "PNG"))
    cli.write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    print(f"wrote {npz}, .png and .json")


def write_files(folder: Path, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """A PNG an image: folder/<class>/<index>.png, and the same file as folder/<index>.png; the folder whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for i, (image, k) in enumerate(zip(images, labels.tolist())):
            path = temporary / f"{i:0{len(str(len(images)))}d}.png"
            torchvision.transforms.functional.to_pil_image(image).save(path)
            if k >= 0:  # names from a file: no paths
                (inner := temporary / (re.sub(r"[^\w -]", "_", classes[k]) or str(k))).mkdir(exist_ok=True)
                try:
                    os.link(path, inner / path.name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, inner / path.name)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {len(images)} PNG files into {folder}")


def main() -> None:
    opt = cli.parse(Options, __doc__)
    check(opt)
    where = cli.device(opt.device)
    path, folder = find_checkpoint(opt)
    model = load_model(path, where, opt)
    folder = folder if opt.out else cli.folder_beside(path, "foreign" in model.extra)
    print(f"{opt.sampler}: {opt.n} images from {path}")
    begin = time.monotonic()
    images, labels = draw(model, opt, where)
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
    }
    record |= {"seconds": round(seconds, 2), "images_per_second": round(opt.n / seconds, 2)}
    write(folder, f"samples-{opt.sampler}{'-cond' * opt.cond}", images, labels, record)
    if opt.png:
        write_files(Path(opt.png), images, labels, model.extra["classes"])


if __name__ == "__main__":
    cli.run(main)
