"""Inception Score, Fréchet distance and kernel distance of samples.

    python eval_is_fid.py --samples a.npz b.npz --ref cifar10            # IS, FID and KID
    python eval_is_fid.py --features dinov2 --weights PATH               # FD- and KD-DINOv2
    python eval_is_fid.py --ref digits --features runs/judge/ckpt.pt     # C-IS, C-FD and C-KD
    python eval_is_fid.py --ref digits --neighbours                      # are they memorised?
    python eval_is_fid.py --ref cifar10 --save-stats cifar10.npz         # for pytorch-fid

A classifier checkpoint as --features gives C-IS, C-FD and C-KD, which are not IS, FID and KID and
only comparable under the same checkpoint, and `wanted`, the share of labelled samples that it
assigns to their class; an encoder gives E-FD and E-KD. All give precision, recall, density and
coverage. docs/evaluation.md has the definitions and conventions.

Writes the table as .md and .json, and any --neighbours as .png, beside the samples, and caches the
statistics of a reference dataset beside it as stats-*.npz.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cem
from lib import cli, data, dinov2, distributed, files, manifold, metrics, pictures, reference
from lib.cli import option
from lib.device import PRECISIONS, pick_device
from lib.markdown import Figure, between, table
from lib.metrics import FeatureNetwork
from lib.reference import Reference

# samples per feature needed to extrapolate a distance; of Inception's features 41,000
LIMIT_SAMPLES = 20
INPUT = "samples and reference"


@dataclass
class Options:
    samples: list[str] = cli.option_list(
        str, "npz files or image folders (default: the newest npz in runs/*/)", INPUT
    )
    ref: str = option("cifar10", "dataset, folder, samples npz, or npz of mu and sigma", INPUT)
    split: str = option("train", "split of the dataset", INPUT, choices=["train", "test"])
    data_dir: str = option("data", data.DIR_HELP, INPUT, metavar="PATH")
    image_size: int = option(0, f"of the reference: {data.IMAGE_SIZE}", INPUT, least=0)
    neighbours: bool = option(
        False, "picture the closest training images beside samples, report their distance", INPUT
    )
    features: str = option("inception", "inception, dinov2, or a checkpoint", "features")
    weights: str = option(
        "", "weights of inception (default: downloaded) or dinov2", "features", metavar="PATH"
    )
    preprocess: str = option(
        "torch", "torch: as pytorch-fid; tf1: as torch-fidelity", "features",
        choices=["torch", "tf1"],
    )  # fmt: skip
    precision: str = option("float32", "arithmetic", "features", choices=PRECISIONS)
    splits: int = option(10, "parts of the samples over which IS is averaged", "features", least=1)
    save_stats: str = option(
        "", "write the reference's mu and sigma to this npz", "run", metavar="PATH"
    )
    out: str = option(
        "", "JSON file (default: metrics.json beside the samples)", "run", metavar="PATH"
    )
    batch_size: int = option(100, "images at a time", "run", least=1)
    device: str = option("auto", cli.DEVICE, "run")
    quiet: bool = option(False, cli.QUIET, "run")


def check(opt: Options) -> None:
    json = not opt.out or opt.out.endswith(".json")
    cem.require(json, f"--out {opt.out} must be a .json file: the .md is written beside it")
    if opt.features != "inception":
        cem.require(not opt.save_stats, "--save-stats needs --features inception")
        cem.require(opt.preprocess == "torch", "--preprocess tf1 needs --features inception")
        used = opt.features == "dinov2" or not opt.weights
        cem.require(used, "--weights needs --features inception or dinov2")
    resized = not opt.image_size or not Path(opt.ref).is_file()
    cem.require(resized, f"--image-size does not apply to a file: --ref {opt.ref}")
    if opt.neighbours:
        both = data.exists(opt.ref)
        cem.require(both, f"--neighbours needs a dataset as --ref, with both splits: {opt.ref}")


# --------------------------------------------------------------------------------------- samples


def load_samples(opt: Options) -> list[tuple[Path, Tensor, Tensor]]:
    """Path, images and labels of each set; without --samples and --save-stats, the newest one."""
    paths = [Path(path) for path in opt.samples]
    if not paths and not opt.save_stats:
        paths = sorted(Path("runs").glob("*/samples-*.npz"), key=lambda p: p.stat().st_mtime)[-1:]
        cem.require(bool(paths), "no samples in runs/: run python sample.py, or pass --samples")
    return [(path, *data.read_samples(path)) for path in paths]


def check_samples(samples: list, reference: Tensor, opt: Options) -> None:
    cem.require(len(reference) > 1, f"--ref {opt.ref} has 1 image: a covariance needs at least 2")
    wanted = tuple(reference.shape[1:])
    for path, images, _ in samples:
        shape = tuple(images.shape[1:])
        differs = f"{path} has images of {shape}, the reference of {wanted}"
        folder = opt.ref not in data.NAMES and Path(opt.ref).is_dir()
        resize = ": --image-size resizes the reference" * (folder and shape[0] == wanted[0])
        cem.require(shape == wanted, f"{differs}{resize}")


def check_splits(samples: list, network: FeatureNetwork, opt: Options) -> None:
    """Refuse sets that are too small, warn of those whose Inception Score will be too low."""
    score = network.names[0]
    least = f"--splits {opt.splits} needs more" if score else "a covariance needs at least 2"
    for path, images, labels in samples:
        enough = len(images) > (opt.splits if score else 1)
        cem.require(enough, f"{path} has {len(images)} images: {least}")
        runs, classes = len(labels.unique_consecutive()), len(labels.unique())
        if score and runs == classes > 1:
            parts = f"{score}, averaged over {opt.splits} consecutive parts"
            cli.warn(f"{path} is sorted by class: {parts}, will be too low")


def has_wanted(path: Path, labels: Tensor, network: FeatureNetwork) -> bool:
    """Whether labels are the judge's classes, by their names where it and the samples have them."""
    if network.names[0] != "C-IS" or labels.min() < 0:
        return False
    judges = network.model.extra.get("classes")
    found = files.read_json(path.with_suffix(".json"))
    named = found.get("classes") if isinstance(found, dict) else None
    same = None in (judges, named) or judges == named
    same = same and labels.max().item() < network.model.config["num_classes"]
    if not same:
        cli.warn(f"{path} is of other classes than {network.key} distinguishes: no `wanted`")
    return same


# ----------------------------------------------------------------------------------------- table


def judge(
    network: FeatureNetwork, images: Tensor, labels: Tensor, reference: Reference, opt, name: str
) -> dict:
    """All figures of one set of samples, which the table calls `name`."""
    blocks, logits = metrics.extract(network, images, opt.batch_size, name)
    score, frechet, kernel = network.names
    row = {"samples": name, "n": len(images)}
    if score:
        row[score], row[f"{score} std"] = metrics.inception_score(logits, opt.splits)

    def distance(index) -> float:
        return reference.frechet([block[index] for block in blocks])

    dimension = max(block.shape[1] for block in blocks)
    if len(images) < dimension:
        few = f"{len(images)} images, fewer than its {dimension:,} features"
        cli.warn(f"{frechet} of {name} is biased upwards: {few}; {kernel} is not biased")
    row[frechet] = distance(slice(None))
    if len(images) >= 20:
        row[f"{frechet} std"] = metrics.jackknife(distance, labels)
    if len(images) >= LIMIT_SAMPLES * dimension:
        row[f"{frechet}∞"] = metrics.extrapolate(distance, len(images))
    if reference.features is not None:
        row[kernel], row[f"{kernel} std"] = reference.kernel(blocks, network.device)
        row |= reference.manifold(blocks)
    if has_wanted(Path(name), labels, network):
        hits = logits.argmax(1) == labels
        row["wanted"] = hits.double().mean().item()
        row["wanted low"], row["wanted high"] = metrics.interval(hits.sum().item(), len(hits))
    rounded = {key: float(f"{value:.6g}") for key, value in row.items() if isinstance(value, float)}
    return {key: value for key, value in (row | rounded).items() if value is not None}


class Neighbours:
    """The closest training images of samples, for --neighbours."""

    def __init__(self, network: FeatureNetwork, reference: Reference, opt: Options):
        self.network = network
        self.reference = reference
        self.batch_size = opt.batch_size
        self.train, self.test = data.splits(opt.ref, opt.data_dir, "cpu", opt.image_size)
        self.known = self.features(self.train.images, "training images")

    def features(self, images: Tensor, name: str) -> Tensor:
        blocks, _ = metrics.extract(self.network, images, self.batch_size, name)
        return self.reference.joined(blocks)

    def of(self, images: Tensor) -> tuple[dict[str, float], Tensor]:
        """Images uint8 (N, C, H, W) -> their median distance to the closest training image, beside
        that of as many test images; a picture of 20 random ones with 4 training images each."""
        test = self.test.images[self.test.evenly_spaced(len(images))]
        distances, index = manifold.nearest(self.features(images, "samples"), self.known, 4)
        of_test, _ = manifold.nearest(self.features(test, "test images"), self.known)
        medians = {"distance": distances[:, 0].median().item()}
        medians["test distance"] = of_test.median().item()
        shown = data.shuffled(len(images))[:20].tolist()
        rows = [torch.cat([images[i : i + 1], self.train.images[index[i]]]) for i in shown]
        return medians, pictures.grid(torch.cat(rows), torch.full((1,), -1))


def cell(row: dict, key: str) -> str:
    """A figure with its error bar: its standard deviation, or its 95 % interval."""
    value = row.get(key, "")
    if f"{key} low" in row:
        return between(value, row[f"{key} low"], row[f"{key} high"], 4)
    return str(Figure(value, 4, row.get(f"{key} std"))) if isinstance(value, float) else str(value)


def markdown(record: dict) -> str:
    rows = record["rows"]
    bars = (" std", " low", " high")
    keys = dict.fromkeys(key for row in rows for key in row if not key.endswith(bars))
    figures = table([{key: cell(row, key) for key in keys} for row in rows], bold=False)
    return f"{figures}\nBy {record['network']}, against {record['reference']}.\n"


def outputs(samples: list, opt: Options) -> list[Path]:
    """The files of evaluate: the record, the table and the picture of --neighbours."""
    folder = os.path.normpath(samples[0][0] / "..")  # beside, not among, a folder's images
    out = Path(opt.out or Path(folder, "metrics.json"))
    return [out.with_suffix(end) for end in (".json", ".md", ".png")]


def check_outputs(samples: list, opt: Options) -> None:
    if opt.save_stats:
        files.check_output(Path(opt.save_stats), is_statistics)
    if samples:
        is_ours = files.json_with("command", "network", "reference", "rows")
        path, *beside = outputs(samples, opt)
        files.check_output(path, is_ours, *beside)


def is_statistics(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {"mu", "sigma", "key"} <= set(arrays)
    except Exception:  # not an npz file
        return False


def evaluate(network: FeatureNetwork, samples: list, reference: Reference, opt: Options) -> None:
    """Judge all sets of samples; the files are written after each."""
    out, out_table, out_picture = outputs(samples, opt)
    record = {"command": cli.command(), "network": network.key, "reference": opt.ref}
    record |= {"split": opt.split, "splits": opt.splits, "rows": []}
    rows, grids = record["rows"], []
    neighbours = Neighbours(network, reference, opt) if opt.neighbours else None
    for path, images, labels in samples:
        rows.append(judge(network, images, labels, reference, opt, str(path)))
        if neighbours:
            medians, grid = neighbours.of(images)
            rows[-1] |= medians
            grids.append(grid)
        if distributed.rank():
            continue
        try:
            files.keep_other(out, out_table, out_picture)
            files.write_json(out, record)
            files.write_text(out_table, markdown(record))
            if neighbours:  # those of a set below those of the set before
                pictures.write_grid(out_picture, torch.cat(grids, 1))
        except OSError:
            print(markdown(record), end="")  # show what was computed
            raise
    print(markdown(record), end="")
    print(f"wrote {', '.join(map(str, [out, out_table] + [out_picture] * opt.neighbours))}")


def main() -> None:
    opt = cli.parse(Options, __doc__)
    check(opt)
    device = pick_device(opt.device)
    samples = load_samples(opt)
    check_outputs(samples, opt)
    if opt.features == "inception":
        network = metrics.Inception(opt.weights, device, opt.preprocess, opt.precision)
    elif opt.features == "dinov2":
        network = dinov2.DINOv2(opt.weights, device, opt.precision)
    else:
        network = metrics.Checkpoint(opt.features, device, opt.precision)
    check_splits(samples, network, opt)
    against = reference.read_statistics(Path(opt.ref), network.key)
    if against is None:
        images = reference.load_images(opt)
        check_samples(samples, images, opt)
        against = reference.compute(images, network, opt)
    if opt.save_stats and distributed.rank() == 0:
        mu, sigma = (moment.numpy() for moment in against.moments[0])
        arrays = dict(mu=mu, sigma=sigma, key=np.array(network.key))
        cem.write_atomically(opt.save_stats, lambda file: np.savez(file, **arrays))
        print(f"wrote {opt.save_stats}")
    if samples:
        evaluate(network, samples, against, opt)


if __name__ == "__main__":
    cli.run(main)
