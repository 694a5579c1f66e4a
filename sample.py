"""Draw images from a trained energy model: gradient ascent on a potential from Gaussian seeds.

    python sample.py                                    # rcs, from a classifier
    python sample.py --sampler cs --classes cat,dog --n 200
    python sample.py --sampler maxent --cond            # from an encoder
    python sample.py --ckpt cifar_l2_0_5.pt --dataset cifar10           # a third-party classifier
    torchrun --nproc_per_node=8 -- sample.py --n 50000  # shared between processes, resumable

Writes samples-<sampler>[-cond].npz (arr_0: uint8 (N, H, W, C), arr_1: int64 labels), .png (one row
per class) and .json beside the checkpoint. Image i depends on --seed, --candidates and i alone, up
to rounding; pgd, maxent and maxent-marginal couple the images of a batch: also on --batch-size.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import cem
from lib import cli, data, distributed, files, pictures, sampling
from lib.cli import option
from lib.device import PRECISIONS, autocast, pick_device, resolve_precision
from lib.sampling import DISPLACEMENT, UNTUNED

SAMPLERS = [*cem.PARAMETRIC_SAMPLERS, *cem.NON_PARAMETRIC_SAMPLERS, "seeds"]
SETTINGS_HELP = "default: the checkpoint's, else"
SAMPLER_HELP = (
    "potential to climb. Classifier: ta log p(y|x), langevin log p(x), cs log p(x|y), "
    "rcs log p(x|y) + log p(x). Encoder: pgd InfoNCE, maxent the batch's entropy, marginal "
    "log p(x), maxent-marginal both, neighbour log p(x|x') of a training image x'. seeds: no ascent"
)


@dataclass
class Options:
    sampler: str = option("rcs", SAMPLER_HELP, "what to draw", choices=SAMPLERS, metavar="NAME")
    cond: bool = option(
        False, "draw seeds and neighbours by class; always on for classifiers", "what to draw"
    )
    classes: str = option(
        "", "classes to draw, names or numbers, comma-separated (default: all)", "what to draw"
    )
    n: int = option(
        100, "images; image i has class i mod the number of classes", "what to draw", least=1
    )
    seed: int = option(0, "random seed", "what to draw")
    steps: Optional[int] = option(
        None, f"steps of the ascent ({SETTINGS_HELP} {UNTUNED['steps']})", "ascent",
        type=cli.integer, least=1, metavar="N",
    )  # fmt: skip
    step_size: Optional[float] = option(
        None, f"length of a step ({SETTINGS_HELP} all steps together walk "
        f"{DISPLACEMENT['ta']:g}, or {DISPLACEMENT['maxent']:g} for an encoder, on 3x32x32 images, "
        "scaled to other sizes)", "ascent", type=cli.number, above=0,
    )  # fmt: skip
    noise: Optional[float] = option(
        None, f"standard deviation of each step's noise ({SETTINGS_HELP} {UNTUNED['noise']})",
        "ascent", type=cli.number, least=0,
    )  # fmt: skip
    norm: Optional[str] = option(
        None, "gradient: l2 scaled to unit length, linf its sign, none as it is "
        f"({SETTINGS_HELP} {UNTUNED['norm']})", "ascent", type=str, choices=list(cem.DIRECTIONS),
    )  # fmt: skip
    momentum: float = option(0.0, "heavy-ball momentum", "ascent", least=0, below=1)
    jitter: int = option(
        0, "shift the images by up to N pixels, at random in each step: 2 improves "
        "cs and rcs", "ascent", least=0, most=7,
    )  # fmt: skip
    start: str = option(
        "gaussian", "the Gaussian seeds or uniform noise", "ascent", choices=["gaussian", "noise"]
    )
    candidates: int = option(
        1, "draw N for each image and keep one, with probability proportional to p(x): improves "
        "marginal after a second stage", "selection", least=1,
    )  # fmt: skip
    best: bool = option(False, "keep the candidate of highest p(x) instead", "selection")
    ckpt: str = option(
        "", "ours or third-party (default: runs/{sup,unsup}/ckpt.pt if it exists, else shipped)",
        "checkpoint", metavar="PATH",
    )  # fmt: skip
    dataset: str = option(
        "", f"for a checkpoint without seeds, to fit them (and a bank) to: {data.HELP}",
        "checkpoint",
    )  # fmt: skip
    data_dir: str = option("data", data.DIR_HELP, "checkpoint", metavar="PATH")
    image_size: int = option(0, data.IMAGE_SIZE, "checkpoint", least=0)
    mean: list[float] = cli.option_list(float, cli.MEAN, "checkpoint")
    std: list[float] = cli.option_list(float, cli.STD, "checkpoint")
    out: str = option("", cli.OUT, "run", metavar="PATH")
    png: str = option(
        "", "new folder for PNG files: all in it, and again in one subfolder per class", "run",
        metavar="PATH",
    )  # fmt: skip
    gif: bool = option(
        False, "show the ascent of the first --batch-size images in the grid as a GIF", "run"
    )
    batch_size: int = option(
        250, f"images at a time; {', '.join(cem.COUPLED)} draw whole batches", "run", least=1
    )
    device: str = option("auto", cli.DEVICE, "run")
    precision: str = option("auto", "auto: bfloat16 if native", "run", choices=PRECISIONS)
    quiet: bool = option(False, cli.QUIET, "run")


def check(opt: Options) -> None:
    new = not opt.png or not os.path.lexists(opt.png)
    cem.require(new, f"--png {opt.png} already exists: use a new folder")
    couples = opt.sampler in cem.COUPLED
    enough = opt.batch_size > 1 or not couples
    cem.require(enough, f"--sampler {opt.sampler} compares images: --batch-size must be at least 2")
    several = opt.candidates > 1 or not opt.best
    cem.require(several, "--best chooses between --candidates: ask for at least 2")
    sized = opt.dataset or not opt.image_size
    cem.require(sized, "--image-size needs the --dataset that it applies to")


def jittered(potential: Callable, pixels: int, seed: int) -> Callable:
    """The potential of shifted images, by up to `pixels` rows and columns, with a reflected border:
    all by the same, another one in each step (DeepDream, Mordvintsev et al., 2015)."""
    generator = torch.Generator().manual_seed(seed)

    def shifted(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, [pixels] * 4, mode="reflect")
        i, j = torch.randint(2 * pixels + 1, (2,), generator=generator).tolist()
        return potential(x[:, :, i : i + height, j : j + width])

    return shifted


def traced(potential: Callable, frames: list[Tensor]) -> Callable:
    """The potential, which keeps in `frames` the images at which it is evaluated, for --gif."""

    def keep(x: Tensor) -> Tensor:
        frames.append(to_bytes(x))
        return potential(x)

    return keep


def to_bytes(x: Tensor) -> Tensor:
    return x.detach().mul(255).round().byte().cpu()


def draw_batch(
    model, seeds, opt: Options, device, first: int, frames: list | None = None
) -> tuple[Tensor, Tensor]:
    """A batch that begins at candidate number `first`: uint8 (n, C, H, W), labels (n,), -1 if
    unconditional. frames: receives the images before each step."""
    n = opt.batch_size
    if opt.sampler not in cem.COUPLED:  # these depend on a whole batch
        n = min(n, opt.n * opt.candidates - first)
    classes = torch.tensor(sampling.wanted_classes(opt.classes, model.extra["classes"]))
    index = torch.arange(first, first + n)
    y = classes[index // opt.candidates % len(classes)]
    conditional = opt.cond or isinstance(model, cem.ParametricCEM)
    # one CPU generator per image: the same stream for any batch, device or process count
    generators = [
        torch.Generator().manual_seed((opt.seed * 0x9E3779B1 + int(i)) % 2**32) for i in index
    ]
    if opt.start == "noise":
        x = torch.stack([torch.rand(seeds.shape, generator=g) for g in generators])
    else:
        x = seeds.sample(y if conditional else n, generators)
    x = x.to(device, memory_format=torch.channels_last)
    if opt.sampler != "seeds":
        wanted = y if conditional else None
        given = sampling.potential_y(model, opt.sampler, x, wanted, generators)
        ascent = dict(steps=opt.steps, step_size=opt.step_size, norm=opt.norm, noise=opt.noise)
        with autocast(device, opt.precision):
            potential = cem.potential(opt.sampler, model, given).bind()
            if opt.jitter:
                potential = jittered(potential, opt.jitter, opt.seed)
            if frames is not None:
                potential = traced(potential, frames)
            x = cem.ascend(potential, x, momentum=opt.momentum, generator=generators, **ascent)
        cem.require(bool(x.isfinite().all()), "the images are not finite: the network overflows")
    return to_bytes(x), y if conditional else torch.full_like(y, -1)


def draw(model, opt: Options, device, parts: Path) -> tuple[Tensor, Tensor]:
    """All candidates uint8 (N, C, H, W) and labels (N,). The folder `parts` keeps finished batches.

    torchrun's processes share the batches; the first one collects them from that folder.
    """
    seeds = sampling.seeds_of(model, opt.cond)
    n = opt.n * opt.candidates
    torch.empty(n, *seeds.shape, dtype=torch.uint8)  # fails now if they do not fit in memory
    starts = range(0, n, opt.batch_size)
    for first in cli.progress(distributed.local_rows(starts), opt.sampler, unit="batch"):
        if pictures.read_part(parts, first) is None:
            batch = draw_batch(model, seeds, opt, device, first)
            pictures.write_part(parts, first, *batch)
    distributed.barrier()
    if distributed.rank():
        return torch.empty(0), torch.empty(0)
    drawn = [pictures.read_part(parts, first) for first in starts]
    images, labels = (torch.cat(rows)[:n] for rows in zip(*drawn))
    return images, labels


def draw_frames(model, opt: Options, device, kept: Tensor) -> tuple[list[Tensor], Tensor]:
    """The first opt.batch_size images of kept again -> uint8 (N, C, H, W) before each step and at
    the end; labels."""
    seeds = sampling.seeds_of(model, opt.cond)
    kept, batches = kept[: opt.batch_size], []
    for first in range(0, int(kept[-1]) + 1, opt.batch_size):
        frames = []
        images, labels = draw_batch(model, seeds, opt, device, first, frames)
        rows = kept[kept // opt.batch_size == first // opt.batch_size] - first
        batches.append((torch.stack([*frames, images])[:, rows], labels[rows]))
    frames, labels = zip(*batches)
    return [*torch.cat(frames, 1)], torch.cat(labels)


def record(opt: Options, path: Path, model, seconds: float) -> dict:
    """The content of the .json beside the samples: command, options, model, time."""
    return {
        "command": cli.command(),
        **asdict(opt),
        "ckpt": str(path),
        "dataset": model.extra["dataset"],
        "classes": model.extra["classes"],
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    opt = cli.parse(Options, __doc__)
    check(opt)
    device = pick_device(opt.device)
    opt.precision = resolve_precision(device, opt.precision)
    unsupervised = opt.sampler in cem.NON_PARAMETRIC_SAMPLERS
    path = Path(opt.ckpt or cli.default_checkpoint("unsup" if unsupervised else "sup"))
    model = sampling.load_model(path, device, opt)
    sampling.use_settings(opt, model)
    log_p = sampling.density(model, device) if opt.candidates > 1 else None
    folder = Path(opt.out or cli.output_folder(path, "third_party" in model.extra))
    name = f"samples-{opt.sampler}{'-cond' * opt.cond}"
    identity = sampling.identity(opt, path)
    parts = folder / f"{name}-{identity}.parts"  # of its finished batches
    files.make_folder(parts)
    files.lock(parts, f"another process is drawing these images: its batches are in {parts}")
    if opt.png:
        files.make_folder(Path(opt.png).absolute().parent)
    whole = f", in whole batches of {opt.batch_size}" * (opt.sampler in cem.COUPLED)
    several = f", each of {opt.candidates} candidates" * (opt.candidates > 1)
    print(f"{opt.sampler}: {opt.n} images from {path}{several}{whole}")
    begin = time.monotonic()
    found = len(list(parts.glob("*.npz")))
    if found:
        print(f"resuming with {found} finished batch{'es' * (found > 1)} in {parts}")
    distributed.barrier()  # before another process finishes a batch
    try:
        images, labels = draw(model, opt, device, parts)
    except KeyboardInterrupt:
        print(f"stopped: the same command resumes from {parts}", file=sys.stderr)
        raise
    if distributed.rank():
        return
    kept = torch.arange(opt.n)
    if log_p is not None:
        kept = sampling.choose(log_p, images, opt, device)
    images, labels = images[kept], labels[kept]
    seconds = time.monotonic() - begin
    content = {"set": identity} | record(opt, path, model, seconds)
    if not found:  # else some batches were drawn before
        content["images_per_second"] = round(opt.n / seconds, 2)
    written = pictures.write(folder, name, images, labels, content)
    if opt.gif:
        pictures.write_gif(written.with_suffix(".gif"), *draw_frames(model, opt, device, kept))
    if opt.png:
        pictures.write_files(Path(opt.png), images, labels, model.extra["classes"])
    shutil.rmtree(parts)


if __name__ == "__main__":
    cli.run(main)
