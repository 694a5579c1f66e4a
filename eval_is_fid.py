"""Inception Score, Fréchet and kernel distance of samples.

    python eval_is_fid.py --samples runs/unsup/samples-maxent-cond.npz --ref cifar10             # IS, FID and KID
    python eval_is_fid.py --samples a.npz b.npz --ref digits --features runs/sup/ckpt.pt         # C-IS, C-FD and C-KD
    python eval_is_fid.py --ref cifar10 --save-stats cifar10.npz                                 # for pytorch-fid

With --features inception: IS (Salimans et al., 2016) from the softmax over the 1,008 outputs of the FID Inception without
their bias, in the order of the samples; FID (Heusel et al., 2017) and KID (Bińkowski et al., 2018) from its 2,048 pool
features, through pytorch-fid's network and image handling (bilinear to 299x299, not antialiased), or with --preprocess tf1
through torch-fidelity's, which is the original code's. With a classifier checkpoint of this project: C-IS from its softmax;
C-FD and C-KD are the means over its four stages of Fréchet and kernel distance between the spatial means and standard
deviations of the stage's output, each standardised by the reference set; `wanted` is the share of labelled samples that it
gives their class. These are no IS, FID and KID, and compare only under one and the same checkpoint.

Statistics of a reference dataset are kept beside it, in stats-*.npz. Writes the table as .md and .json beside the samples.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

import cem
import cli
import data
import hardware
import metrics
import parallel
from cli import option


@dataclass
class Options:
    samples: list[str] = cli.options(str, "npz files of sample.py, or image folders (default: the newest npz in runs/*/)")
    ref: str = option("cifar10", "reference: a dataset or folder as for training, a samples npz, or an npz of mu and sigma")
    split: str = option("train", "split of the reference dataset", choices=["train", "test"])
    features: str = option("inception", "inception, or a classifier checkpoint of this project (C-IS, C-FD and C-KD)")
    weights: str = option("", "file of the FID Inception's weights (default: downloaded once)")
    preprocess: str = option(
        "torch", "Inception's images: torch as pytorch-fid, tf1 as torch-fidelity", choices=["torch", "tf1"]
    )
    precision: str = option("float32", "arithmetic of the features", choices=hardware.PRECISIONS)
    splits: int = option(10, "parts of the samples whose scores are averaged in IS")
    batch_size: int = option(100, "images at a time")
    data_dir: str = option("data", "where torchvision's datasets lie or go")
    save_stats: str = option("", "npz file to write with the reference's mu and sigma, as pytorch-fid reads them")
    out: str = option("", "JSON file to write (default: metrics.json beside the first samples)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


# ----------------------------------------------------------------------------------------------------- images


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """-> images uint8 (N, C, H, W), labels (N,), -1 where the file has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            cli.require("arr_0" in arrays, f"{path} holds no images (arr_0)")
            images = arrays["arr_0"]
            labels = arrays["arr_1"] if "arr_1" in arrays else np.full(len(images), -1)
    except cem.CEMError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise cem.CEMError(f"cannot read the samples {path}: {error}") from error
    if images.dtype in (np.float16, np.float32, np.float64):
        cli.require(bool(((images >= 0) & (images <= 1)).all()), f"{path}: arr_0 is float, but does not lie in [0, 1]")
        images = (255 * images).round().astype(np.uint8)
    cli.require(np.issubdtype(labels.dtype, np.integer), f"{path}: arr_1 must be integer labels")
    shape_fits = images.ndim == 4 and images.shape[3] in (1, 3) and len(images) and labels.shape == images.shape[:1]
    wanted = f"{path}: arr_0 must be uint8, or float in [0, 1], (N, H, W, C), C = 1 or 3, arr_1 (N,)"
    cli.require(images.dtype == np.uint8 and shape_fits, wanted)
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """The same for a folder too: the images in it in the order of their names, or else those in its folders, shuffled."""
    if not path.is_dir():
        cli.require(path.is_file(), f"no samples at {path}: python sample.py makes some")
        return read_npz(path)
    found = path.iterdir(), path.rglob("*")
    files, deep = (sorted(str(p) for p in ps if p.suffix.lower() in IMG_EXTENSIONS) for ps in found)
    cli.require(bool(deep), f"{path} holds no images")
    if not files:
        order = torch.randperm(len(deep), generator=torch.Generator().manual_seed(0))  # else a split of IS is one class
        files = [deep[i] for i in order]
    return data.read_images(files), torch.full((len(files),), -1)


# --------------------------------------------------------------------------------------------------- reference


def stored_moments(path: Path, key: str) -> metrics.Reference | None:
    """The mu (2048,) and sigma (2048, 2048) of an npz as pytorch-fid and --save-stats write it, None where there are none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays):
                return None
            mu, sigma = (torch.from_numpy(arrays[k]).double() for k in ("mu", "sigma"))
            features = [torch.from_numpy(arrays["features"])] if "features" in arrays else None
            made_by = str(arrays["key"]) if "key" in arrays else ""
    except Exception as error:  # a damaged archive can fail in any way
        raise cem.CEMError(f"cannot read the reference {path}: {error}") from error
    fits = mu.shape == (2048,) and sigma.shape == (2048, 2048) and bool(mu.isfinite().all() and sigma.isfinite().all())
    cli.require(fits, f"{path}: mu and sigma are not of 2,048 features, or not finite")
    cli.require(key.startswith("inception"), f"{path}: statistics of Inception go with --features inception only")
    cli.require(
        made_by in ("", key), f"{path} was made by {made_by}, which is not {key}: see --preprocess, --precision, --weights"
    )
    return metrics.Reference([(mu, sigma)], features)


FORMAT = 1  # of kept statistics: another number where features or blocks are defined anew


def kept(path: Path, images: Tensor, compute: Callable[[], metrics.Reference]) -> metrics.Reference:
    """The statistics in `path` if they are of these very images, else computed, and kept there."""
    sha = hashlib.sha256(f"{FORMAT} {tuple(images.shape)}".encode())
    for part in images.split(1000):
        sha.update(part.contiguous().numpy())
    fingerprint, found = sha.hexdigest(), None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == fingerprint:
                found = metrics.Reference.from_arrays(arrays)
        if found is None:
            print(f"{path} is of other images: the dataset has changed, its statistics are computed anew")
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive can fail in any way
        print(f"{path} is damaged ({type(error).__name__}): computed anew")
    if not parallel.anyone(found is None, torch.device("cpu")):
        return found
    reference = compute()  # in all processes together, though one on another machine may have it
    if parallel.rank():
        return reference
    try:
        cem.replace(path, lambda file: np.savez(file, fingerprint=np.array(fingerprint), **reference.arrays()))
        print(f"kept the reference's statistics in {path}")
    except OSError as error:  # a folder of somebody else's
        cli.warn(f"the reference's statistics are not kept: {error}")
    return reference


def reference_images(opt, key: str) -> Tensor | metrics.Reference:
    """What --ref names: images, or the statistics in an npz of mu and sigma, which must be of the feature network `key`."""
    path = Path(opt.ref)
    if path.suffix == ".npz" and path.is_file():
        return stored_moments(path, key) or read_npz(path)[0]
    if opt.ref not in data.NAMES and path.is_dir() and not (path / "train").is_dir():
        return read_samples(path)[0]
    return data.load(opt.ref, opt.split, opt.data_dir).images


def reference_of(images: Tensor, network, opt) -> metrics.Reference:
    """The reference's statistics under the network, kept beside the dataset."""
    path = Path(opt.ref)

    def compute() -> metrics.Reference:
        return metrics.Reference.of(metrics.extract(network, images, opt.batch_size, opt.ref)[0])

    beside = path if path.is_dir() and opt.ref not in data.NAMES else Path(opt.data_dir)
    return compute() if path.is_file() else kept(beside / f"stats-{path.name}-{opt.split}-{network.key}.npz", images, compute)


# ------------------------------------------------------------------------------------------------------- main


def judge(network, images: Tensor, labels: Tensor, reference: metrics.Reference, opt: Options, what: str) -> dict:
    """All the figures of one set of samples."""
    blocks, logits = metrics.extract(network, images, opt.batch_size, what)
    names, row = network.names, {"samples": what, "n": len(images)}
    row[names["IS"]], row[f"{names['IS']} std"] = metrics.inception_score(logits, opt.splits)
    row[names["FD"]] = reference.frechet(blocks, network.standardised)
    if reference.features is not None:
        row[names["KD"]], row[f"{names['KD']} std"] = reference.kernel(blocks, network.standardised, network.where)
    if network.standardised and labels.min() >= 0 and labels.max() < logits.shape[1]:
        row["wanted"] = (logits.argmax(1) == labels).double().mean().item()
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def markdown(rows: list[dict]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{v:.4f}" if isinstance(v := row.get(key, ""), float) else str(v) for key in header] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *cells])


def main() -> None:
    opt = cli.parse(Options, __doc__)
    cli.require(not opt.out.endswith(".md"), "--out names the JSON file; the table goes beside it as .md")
    cli.require(opt.splits >= 1 and opt.batch_size >= 1, "--splits and --batch-size must be at least 1")
    where = hardware.device(opt.device)
    newest = sorted(Path("runs").glob("*/samples-*.npz"), key=lambda p: p.stat().st_mtime)[-1:]
    paths = [Path(p) for p in opt.samples] or (newest if not opt.save_stats else [])
    cli.require(paths or opt.save_stats, "no samples in runs/: python sample.py makes some, or name them with --samples")
    sets = [read_samples(path) for path in paths]
    for path, (images, _) in zip(paths, sets):
        cli.require(len(images) > opt.splits, f"{path} has {len(images)} images: more than --splits {opt.splits}, please")
    if opt.features == "inception":
        network = metrics.Inception(opt.weights, where, opt.preprocess, opt.precision)
    else:
        network = metrics.Classifier(opt.features, where, opt.precision)
        fits = not opt.save_stats and opt.preprocess == "torch"
        cli.require(fits, "--save-stats and --preprocess go with --features inception only")
    found = reference_images(opt, network.key)
    if isinstance(found, Tensor):
        cli.require(len(found) > 1, f"--ref {opt.ref} has one image: no covariance can be had from that")
        for path, (images, _) in zip(paths, sets):
            shape, wanted = (" x ".join(map(str, t.shape[1:])) for t in (images, found))
            cli.require(shape == wanted, f"{path} has images of {shape}, the reference {wanted}: nothing is resized")
    reference = reference_of(found, network, opt) if isinstance(found, Tensor) else found
    if opt.save_stats and parallel.rank() == 0:
        mu, sigma = (moment.numpy() for moment in reference.moments[0])
        cem.replace(opt.save_stats, lambda file: np.savez(file, mu=mu, sigma=sigma, key=np.array(network.key)))
        print(f"wrote {opt.save_stats}")
    for path, (images, labels) in zip(paths, sets):
        if labels.unique().numel() > 1 and bool((labels.diff() >= 0).all()):
            cli.warn(f"{path} is sorted by class: IS, a mean over {opt.splits} parts in order, comes out too low")
        if not network.standardised and len(images) < 2048:
            cli.warn(f"{path} has {len(images)} images: FID is biased upwards below 2,048 and more; KID is not")
    if not paths:
        return
    out, rows = Path(opt.out) if opt.out else (paths[0] if paths[0].is_dir() else paths[0].parent) / "metrics.json", []
    record = {"command": cli.command(), "network": network.key, "reference": opt.ref, "split": opt.split}
    for path, (images, labels) in zip(paths, sets):
        rows.append(judge(network, images, labels, reference, opt, str(path)))
        if parallel.rank():
            continue
        try:
            cli.write_text(out, json.dumps(record | {"splits": opt.splits, "rows": rows}, indent=2) + "\n")
            cli.write_text(out.with_suffix(".md"), markdown(rows))
        except OSError:
            print(markdown(rows), end="")  # not computed for nothing
            raise
    print(markdown(rows), end="")
    print(f"wrote {out} and {out.with_suffix('.md')}")


if __name__ == "__main__":
    cli.run(main)
