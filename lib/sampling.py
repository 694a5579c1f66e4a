"""What sample.py draws from: a model with its seeds, the settings of its samplers, classes."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import cem
from lib import cli, data, files, interop, robustness
from lib.clusters import ClusterSeeds
from lib.device import autocast

BANK = 10_000  # training images; their embeddings take 2.6 MB
SEED_RANK = 48  # of the seeds fitted for a checkpoint without any
# the l2 distance that all steps together walk on 3x32x32 images; suits first stages, of an encoder
# with maxent
DISPLACEMENT = dict.fromkeys(cem.PARAMETRIC_SAMPLERS, 3.0)
DISPLACEMENT |= dict.fromkeys(cem.NON_PARAMETRIC_SAMPLERS, 24.0)
DISPLACEMENT["seeds"] = 0.0
UNTUNED = dict(steps=8, step_size=None, noise=0.01, norm="l2")


def load_model(path: Path, device: torch.device, opt) -> torch.nn.Module:
    """The checkpoint, folded, with seeds, class names and dataset in its extra."""
    model = interop.load(path, device, opt.mean or None, opt.std or None)
    encoder = isinstance(model, cem.NonParametricCEM)
    kind = "an encoder" if encoder else "a classifier"
    own = cem.NON_PARAMETRIC_SAMPLERS if encoder else cem.PARAMETRIC_SAMPLERS
    message = f"--sampler {opt.sampler} does not apply to {path}, {kind}: choose {', '.join(own)}"
    cem.require(opt.sampler in (*own, "seeds"), message)
    chosen = opt.cond or not opt.classes
    cem.require(chosen or not encoder, "--classes with an encoder needs --cond")
    noise = encoder and opt.cond and opt.start == "noise" and opt.sampler != "neighbour"
    cem.require(not noise, "with an encoder, --cond chooses seeds: leave out --start noise")
    if {"seeds", "classes", "dataset"} <= model.extra.keys():
        own = f"--dataset is for checkpoints without seeds: {path} has its own"
        cem.require(not opt.dataset, own)
    else:
        cem.require(opt.dataset, f"{path} has no seeds: pass the --dataset to fit them to")
        dataset = data.load(opt.dataset, "train", opt.data_dir, opt.image_size)
        dataset.check_fits(model, path)
        if "third_party" in model.extra:
            interop.check_third_party(model, path, dataset)
        model.extra |= dataset.checkpoint_info(SEED_RANK)
        chooses = encoder and opt.candidates > 1 and needs_bank(model, "marginal")
        if (chooses or needs_bank(model, opt.sampler)) and not model.extra.get("bank"):
            model.extra["bank"] = make_bank(model, dataset.to(device), opt)
    return cem.folded(model).to(memory_format=torch.channels_last)


def seeds_of(model: torch.nn.Module, cond: bool) -> cem.GaussianSeeds | ClusterSeeds:
    """Where chains start: Gaussians of the classes and of all images or, without labels, those of
    an encoder's clusters."""
    if isinstance(model, cem.NonParametricCEM) and "clusters" in model.extra and not cond:
        return ClusterSeeds.from_state_dict(model.extra["clusters"])
    return cem.GaussianSeeds.from_state_dict(model.extra["seeds"])


def needs_bank(model: torch.nn.Module, sampler: str) -> bool:
    learned = sampler in cem.MARGINAL and hasattr(model, "energy")
    without = learned or sampler in ("pgd", *cem.WITHOUT_Y)
    return sampler in cem.NON_PARAMETRIC_SAMPLERS and not without


def make_bank(encoder: torch.nn.Module, dataset: data.Dataset, opt) -> dict[str, Tensor]:
    """Embeddings of evenly spaced training images, and their labels."""
    labels = dataset.labels[dataset.evenly_spaced(BANK)]
    z = robustness.outputs(cem.folded(encoder), dataset, opt, BANK)
    return {"embeddings": z.half().cpu(), "labels": labels.cpu()}


def potential_y(model: torch.nn.Module, sampler: str, x: Tensor, y: Tensor | None, generators):
    """The y of a sampler's potential. x: the seeds; y (N,): their classes, for an encoder only with
    --cond, else None.

    Classifier: y; pgd: the seeds; neighbour: per image one embedding from the checkpoint's bank;
    marginal and maxent-marginal: the whole bank, unless log p(x) is learned.
    """
    if sampler in cem.PARAMETRIC_SAMPLERS:
        return y.to(x.device)
    if sampler == "pgd":
        return x.clone()
    if not needs_bank(model, sampler):
        return None
    bank = model.extra.get("bank")
    stores = "train_unsup.py stores one with each epoch: --resume an interrupted run"
    cem.require(bool(bank), f"{sampler} needs a bank: {stores}")
    z, labels = bank["embeddings"].float(), bank["labels"]
    if sampler == "neighbour":
        wanted = torch.ones(len(x), len(z)) if y is None else (labels == y[:, None]).float()
        cem.require(bool(wanted.any(1).all()), "the checkpoint's bank has no images of some class")
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(wanted, generators)]
        z = z[torch.cat(drawn)]
    return z.to(x.device)


def density(model: torch.nn.Module, device: torch.device) -> cem.Potential:
    """log p(x), by which candidates are chosen."""
    if not isinstance(model, cem.NonParametricCEM):
        return cem.potential("langevin", model)
    bank = potential_y(model, "marginal", torch.empty(0, device=device), None, [])
    return cem.potential("marginal", model, bank)


@torch.no_grad()
def choose(log_p: cem.Potential, images: Tensor, opt, device: torch.device) -> Tensor:
    """The numbers (opt.n,) of the images to keep, one of each opt.candidates in a row: drawn with
    probability proportional to p(x) or, with opt.best, the most probable.

    images uint8 (N, C, H, W). After a second stage log p(x) is the log-odds of data against
    samples, hence their log density ratio: sampling-importance resampling (Rubin, 1987).
    """
    with autocast(device, "float32"):  # also after an interruption, when no batch has been drawn
        score = torch.cat([log_p(x.to(device) / 255).cpu() for x in images.split(opt.batch_size)])
    if not opt.best:  # log p(x) plus Gumbel noise is highest for such a draw
        noise = torch.rand(len(score), generator=torch.Generator().manual_seed(opt.seed))
        score = score - noise.log().neg().log()
    return score.view(opt.n, -1).argmax(1) + opt.candidates * torch.arange(opt.n)


def settings_key(sampler: str, cond: bool) -> str:
    """The name of a sampler's settings in a checkpoint: of an encoder, others with --cond."""
    return f"{sampler}{'-cond' * (cond and sampler in cem.NON_PARAMETRIC_SAMPLERS)}"


def use_settings(opt, model: torch.nn.Module) -> None:
    """Fill in the options of the ascent that are None: the checkpoint's settings, else UNTUNED."""
    name = settings_key(opt.sampler, opt.cond)
    tuned = dict(model.extra.get("settings", {}).get(name, {}))
    if opt.norm not in (None, tuned.get("norm")):
        tuned.pop("step_size", None)  # a length in the other norm
    used = {key: value for key, value in tuned.items() if getattr(opt, key) is None}
    if used:
        print(f"settings of the checkpoint: {cli.as_flags(used)}")
    for key, value in (UNTUNED | used).items():
        if getattr(opt, key) is None:
            setattr(opt, key, value)
    if opt.step_size is None:
        known = opt.norm != "none"
        cem.require(known, "--norm none needs --step-size: the gradient's length is unknown")
        per_pixel = DISPLACEMENT[opt.sampler] / math.sqrt(3 * 32 * 32) / opt.steps
        l2 = per_pixel * math.sqrt(math.prod(model.extra["seeds"]["shape"]))
        opt.step_size = per_pixel if opt.norm == "linf" else l2


def wanted_classes(names: str, classes: list[str]) -> list[int]:
    """The class numbers of a comma-separated list of names or numbers; all if it is empty."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or classes
    for name in wanted:
        known = name in classes or (name.isdecimal() and int(name) < len(classes))
        cem.require(known, f"--classes: unknown class {name!r}, choose from {', '.join(classes)}")
    return [classes.index(name) if name in classes else int(name) for name in wanted]


def identity(opt, path: Path) -> str:
    """A digest of all options and weights on which the images depend."""
    unrelated = ("out", "png", "gif", "device", "data_dir", "ckpt", "quiet")
    options = {key: value for key, value in asdict(opt).items() if key not in unrelated}
    content = json.dumps([options, files.sha256(path)]).encode()
    return hashlib.sha256(content).hexdigest()[:12]
