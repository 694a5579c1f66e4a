"""Inception Score, Fréchet distance and kernel distance of samples.

    python eval_is_fid.py --samples a.npz b.npz --ref cifar10            # IS, FID and KID
    python eval_is_fid.py --ref digits --features runs/judge/ckpt.pt     # C-IS, C-FD and C-KD
    python eval_is_fid.py --ref cifar10 --save-stats cifar10.npz         # for pytorch-fid

A classifier checkpoint as --features gives C-IS, C-FD and C-KD, which are not IS, FID and KID and
only comparable under the same checkpoint, and `wanted`, the share of labelled samples that it
assigns to their class. docs/evaluation.md has the definitions and conventions.

Writes the table as .md and .json beside the samples, and caches the statistics of a reference
dataset beside it as stats-*.npz.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cem
from lib import cli, data, distributed, files, metrics
from lib.cli import option
from lib.device import PRECISIONS, pick_device
from lib.metrics import FeatureNetwork, Reference

INPUT = "samples and reference"
PATH = dict(metavar="PATH")


@dataclass
class Options:
    samples: list[str] = cli.options(
        str, "npz files or image folders (default: the newest npz in runs/*/)", INPUT
    )
    ref: str = option("cifar10", "dataset, folder, samples npz, or npz of mu and sigma", INPUT)
    split: str = option("train", "split of the dataset", INPUT, choices=["train", "test"])
    data_dir: str = option("data", "folder of the downloaded datasets", INPUT, **PATH)
    image_size: int = option(0, f"of the reference: {data.IMAGE_SIZE}", INPUT, least=0)
    features: str = option("inception", "inception, or a classifier checkpoint", "features")
    weights: str = option("", "FID Inception's weights (default: downloaded)", "features", **PATH)
    preprocess: str = option(
        "torch", "as pytorch-fid; tf1: as torch-fidelity", "features", choices=["torch", "tf1"]
    )
    precision: str = option("float32", "arithmetic", "features", choices=PRECISIONS)
    splits: int = option(10, "parts of the samples over which IS is averaged", "features", least=1)
    save_stats: str = option("", "write the reference's mu and sigma to this npz", "run", **PATH)
    out: str = option("", "JSON file (default: metrics.json beside the samples)", "run", **PATH)
    batch_size: int = option(100, "images at a time", "run", least=1)
    device: str = option("auto", cli.DEVICE, "run")
    quiet: bool = option(False, cli.QUIET, "run")


def check(opt: Options) -> None:
    cli.require(not opt.out.endswith(".md"), "--out is the JSON file; the .md is written beside it")
    if opt.features != "inception":
        cli.require(not opt.save_stats, "--save-stats needs --features inception")
        cli.require(opt.preprocess == "torch", "--preprocess tf1 needs --features inception")


# --------------------------------------------------------------------------------------- samples


def load_samples(opt: Options) -> list[tuple[Path, Tensor, Tensor]]:
    """Path, images and labels of each set; without --samples and --save-stats, the newest one."""
    paths = [Path(path) for path in opt.samples]
    if not paths and not opt.save_stats:
        paths = sorted(Path("runs").glob("*/samples-*.npz"), key=lambda p: p.stat().st_mtime)[-1:]
        cli.require(bool(paths), "no samples in runs/: run python sample.py, or pass --samples")
    samples = [(path, *data.read_samples(path)) for path in paths]
    for path, images, _ in samples:
        enough = len(images) > opt.splits
        cli.require(enough, f"{path} has {len(images)} images: --splits {opt.splits} needs more")
    return samples


def check_samples(samples: list, reference: Tensor, opt: Options) -> None:
    cli.require(len(reference) > 1, f"--ref {opt.ref} has 1 image: a covariance needs at least 2")
    wanted = tuple(reference.shape[1:])
    for path, images, _ in samples:
        shape = tuple(images.shape[1:])
        differs = f"{path} has images of {shape}, the reference of {wanted}"
        cli.require(shape == wanted, f"{differs}: --image-size resizes the reference")


def warn_about(path: Path, images: Tensor, labels: Tensor, network, opt: Options) -> None:
    if labels.unique().numel() > 1 and bool((labels.diff() >= 0).all()):
        score = f"{network.names[0]}, averaged over {opt.splits} consecutive parts"
        cli.warn(f"{path} is sorted by class: {score}, will be too low")
    needed = 500 if network.standardised else 2048
    if len(images) < needed:
        biased = f"below {needed:,}, {network.names[1]} is biased upwards"
        cli.warn(f"{path} has {len(images)} images: {biased}; {network.names[2]} is not")


# --------------------------------------------------------------------------- reference and table


def read_statistics(path: Path, key: str) -> Reference | None:
    """mu (2048,) and sigma (2048, 2048) of an npz by --save-stats or pytorch-fid, None without.

    Raises CEMError if they are damaged or of another network than `key`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays):
                return None
            reference = Reference.from_arrays(arrays)
            made_by = str(arrays["key"]) if "key" in arrays else key
    except Exception as error:  # a damaged archive can fail in any way
        raise cem.CEMError(f"cannot read the reference {path}: {error}") from error
    mu, sigma = reference.moments[0]
    shapes = (mu.shape, sigma.shape) == ((2048,), (2048, 2048))
    finite = bool(mu.isfinite().all() and sigma.isfinite().all())
    cli.require(shapes and finite, f"{path}: mu and sigma must be finite, of 2,048 features")
    inception = key.startswith("inception")
    cli.require(inception, f"{path}: statistics of Inception need --features inception")
    differs = f"{path} was computed with {made_by}, not {key}"
    cli.require(made_by == key, f"{differs}: see --preprocess, --precision and --weights")
    return reference


def reference_images(opt: Options, key: str) -> Tensor | Reference:
    """The images of --ref, uint8 (N, C, H, W), or the statistics in an npz of mu and sigma, which
    must be of the feature network `key`."""
    path = Path(opt.ref)
    if path.suffix == ".npz" and path.is_file():
        return read_statistics(path, key) or data.read_npz(path)[0]
    if opt.ref not in data.NAMES and path.is_dir() and not (path / "train").is_dir():
        return data.read_samples(path, opt.image_size)[0]
    return data.load(opt.ref, opt.split, opt.data_dir, opt.image_size).images


FORMAT = 1  # of cached statistics: to be raised when features or blocks change


def fingerprint(images: Tensor) -> str:
    sha = hashlib.sha256(f"{FORMAT} {tuple(images.shape)}".encode())
    for part in images.split(1000):
        sha.update(part.contiguous().numpy())
    return sha.hexdigest()


def read_cache(path: Path, images_sha: str) -> Reference | None:
    """The statistics in `path`, None if it is missing, damaged or of other images."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == images_sha:
                return Reference.from_arrays(arrays)
        print(f"{path}: the dataset has changed, recomputing its statistics")
    except Exception as error:  # a damaged archive can fail in any way
        print(f"{path} is damaged ({type(error).__name__}), recomputing the statistics")
    return None


def write_cache(path: Path, images_sha: str, reference: Reference) -> None:
    arrays = {"fingerprint": np.array(images_sha)} | reference.arrays()
    try:
        cem.write_atomically(path, lambda file: np.savez(file, **arrays))
        print(f"cached the reference's statistics in {path}")
    except OSError as error:  # the folder may be read-only
        cli.warn(f"cannot cache the reference's statistics: {error}")


def reference_of(images: Tensor, network: FeatureNetwork, opt: Options) -> Reference:
    """The statistics of reference images; those of a dataset or folder are cached beside it."""
    path = Path(opt.ref)
    folder = path if path.is_dir() and opt.ref not in data.NAMES else Path(opt.data_dir)
    cache = folder / f"stats-{path.name}-{opt.split}-{network.key}.npz"
    images_sha = fingerprint(images)
    found = None if path.is_file() else read_cache(cache, images_sha)
    # all processes compute together, even if a file is missing on one machine only
    if not distributed.any_process(found is None, torch.device("cpu")):
        return found
    blocks, _ = metrics.extract(network, images, opt.batch_size, opt.ref)
    reference = Reference.from_blocks(blocks)
    if not path.is_file() and distributed.rank() == 0:
        write_cache(cache, images_sha, reference)
    return reference


def judge(
    network: FeatureNetwork, images: Tensor, labels: Tensor, reference: Reference, opt, name: str
) -> dict:
    """All figures of one set of samples, which the table calls `name`."""
    blocks, logits = metrics.extract(network, images, opt.batch_size, name)
    score, frechet, kernel = network.names
    row = {"samples": name, "n": len(images)}
    row[score], row[f"{score} std"] = metrics.inception_score(logits, opt.splits)
    row[frechet] = reference.frechet(blocks, network.standardised)
    if reference.features is not None:
        distance = reference.kernel(blocks, network.standardised, network.device)
        row[kernel], row[f"{kernel} std"] = distance
    if network.standardised and 0 <= labels.min() and labels.max() < logits.shape[1]:
        row["wanted"] = (logits.argmax(1) == labels).double().mean().item()
    rounded = {key: float(f"{value:.6g}") for key, value in row.items() if isinstance(value, float)}
    return row | rounded


def markdown(rows: list[dict]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [header, ["---"] * len(header)]
    for row in rows:
        values = [row.get(key, "") for key in header]
        lines.append([f"{v:.4f}" if isinstance(v, float) else str(v) for v in values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def output(samples: list, opt: Options) -> Path:
    """The JSON file to write, of which evaluate also writes the table as .md."""
    first = samples[0][0]
    return Path(opt.out or (first if first.is_dir() else first.parent) / "metrics.json")


def check_outputs(samples: list, opt: Options) -> None:
    if opt.save_stats:
        files.check_output(Path(opt.save_stats), is_statistics)
    if samples:
        path = output(samples, opt)
        is_ours = files.json_with("command", "network", "reference", "rows")
        files.check_output(path, is_ours)
        files.check_output(path.with_suffix(".md"), lambda _: is_ours(path))


def is_statistics(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {"mu", "sigma", "key"} <= set(arrays)
    except Exception:  # not an npz file
        return False


def evaluate(network: FeatureNetwork, samples: list, reference: Reference, opt: Options) -> None:
    """Judge all sets of samples; the files are written after each."""
    out = output(samples, opt)
    record = {"command": cli.command(), "network": network.key, "reference": opt.ref}
    record |= {"split": opt.split, "splits": opt.splits, "rows": []}
    rows = record["rows"]
    for path, images, labels in samples:
        rows.append(judge(network, images, labels, reference, opt, str(path)))
        if distributed.rank():
            continue
        try:
            cli.write_text(out, json.dumps(record, indent=2) + "\n")
            cli.write_text(out.with_suffix(".md"), markdown(rows))
        except OSError:
            print(markdown(rows), end="")  # show what was computed
            raise
    print(markdown(rows), end="")
    print(f"wrote {out} and {out.with_suffix('.md')}")


def main() -> None:
    opt = cli.parse(Options, __doc__)
    check(opt)
    device = pick_device(opt.device)
    samples = load_samples(opt)
    check_outputs(samples, opt)
    if opt.features == "inception":
        network = metrics.Inception(opt.weights, device, opt.preprocess, opt.precision)
    else:
        network = metrics.Classifier(opt.features, device, opt.precision)
    reference = reference_images(opt, network.key)
    if isinstance(reference, Tensor):
        check_samples(samples, reference, opt)
        reference = reference_of(reference, network, opt)
    if opt.save_stats and distributed.rank() == 0:
        mu, sigma = (moment.numpy() for moment in reference.moments[0])
        arrays = dict(mu=mu, sigma=sigma, key=np.array(network.key))
        cem.write_atomically(opt.save_stats, lambda file: np.savez(file, **arrays))
        print(f"wrote {opt.save_stats}")
    for path, images, labels in samples:
        warn_about(path, images, labels, network, opt)
    if samples:
        evaluate(network, samples, reference, opt)


if __name__ == "__main__":
    cli.run(main)
