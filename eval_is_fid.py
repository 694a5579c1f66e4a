"""Inception Score and Fréchet distance of samples.

    python eval_is_fid.py --samples runs/unsup/samples-maxent-cond.npz --ref cifar10             # IS and FID
    python eval_is_fid.py --samples a.npz b.npz --ref digits --features runs/sup/ckpt.pt         # C-IS and C-FD

With --features inception: IS (Salimans et al., 2016) from the softmax over the 1,008 outputs of the FID Inception without
their bias, FID (Heusel et al., 2017) from its 2,048 pool features, through pytorch-fid's network and image handling
(bilinear to 299x299, not antialiased). With a classifier checkpoint of this project: C-IS from its softmax; C-FD is the mean
over its four stages of the Fréchet distance between the spatial means and standard deviations of the stage's output, each
standardised by the reference set's; `wanted` is the share of labelled samples that it gives their class. The three are no IS
and no FID, and compare only under one and the same checkpoint.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cem
import data
import engine
from engine import option

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases (pt_inception-2015-12-05-6726825d.pth)"


@dataclass
class Options:
    samples: list[str] = field(
        default_factory=list,
        metadata={"help": "npz files of sample.py, or image folders (default: the newest npz in runs/*/)", "nargs": "+"},
    )
    ref: str = option("cifar10", "reference: a dataset or folder as for training, a samples npz, or an npz of mu and sigma")
    split: str = option("train", "split of the reference dataset", choices=["train", "test"])
    features: str = option("inception", "inception, or a classifier checkpoint of this project (C-IS and C-FD)")
    weights: str = option("", "file of the FID Inception's weights (default: downloaded by pytorch-fid)")
    splits: int = option(10, "parts of the samples whose scores are averaged in IS")
    batch_size: int = option(100, "images at a time")
    data_dir: str = option("data", "where torchvision's datasets lie or go")
    out: str = option("", "JSON file to write (default: metrics.json beside the first samples)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


# ----------------------------------------------------------------------------------------------------- images


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """-> images uint8 (N, C, H, W), labels (N,), -1 where the file has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            engine.require("arr_0" in arrays, f"{path} holds no images (arr_0)")
            images = arrays["arr_0"]
            labels = arrays["arr_1"] if "arr_1" in arrays else np.full(len(images), -1)
    except cem.CEMError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise cem.CEMError(f"cannot read the samples {path}: {error}") from error
    shape_fits = images.ndim == 4 and images.shape[3] in (1, 3) and len(images) and labels.shape == images.shape[:1]
    engine.require(
        images.dtype == np.uint8 and shape_fits, f"{path}: arr_0 must be uint8 (N, H, W, C), C = 1 or 3, arr_1 (N,)"
    )
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


def read_statistics(path: Path) -> tuple[Tensor, Tensor] | None:
    """The mu (D,) and sigma (D, D) of a pytorch-fid statistics npz, None where the file holds other things."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays):
                return None
            return tuple(torch.from_numpy(arrays[k]).double() for k in ("mu", "sigma"))
    except Exception as error:  # a damaged archive can fail in any way
        raise cem.CEMError(f"cannot read the reference {path}: {error}") from error


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
        engine.require(bool(files), f"{path} holds no images")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))  # else a split of IS is one class
        images = data.read_images([files[i] for i in order])
        return images, torch.full((len(images),), -1)
    engine.require(path.is_file(), f"no samples at {path}: python sample.py makes some")
    return read_npz(path)


# --------------------------------------------------------------------------------------------------- features


class Inception:
    """The FID Inception: images uint8 -> [pool features (N, 2048)], class probabilities (N, 1008)."""

    names, standardised = ("IS", "FID"), False

    def __init__(self, weights: str, where: torch.device):
        from pytorch_fid import inception

        ways = f"fetch {INCEPTION_URL} and name it with --weights, or use --features CHECKPOINT of a classifier"
        try:
            if weights:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            else:
                state = inception.load_state_dict_from_url(inception.FID_WEIGHTS_URL, progress=True)
            with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):  # else it downloads
                net = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
        except Exception as error:  # the network, a damaged file or a file of another network, each in its own way
            raise cem.CEMError(f"no Inception weights ({' '.join(str(error).split())[:200]}): {ways}") from error
        self.net, self.where = net.to(where).eval(), where
        self.fc = state["fc.weight"].to(where).float()

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        x = images.to(self.where).float().div(255)
        pool = self.net(x.expand(-1, 3, -1, -1))[0].flatten(1)
        return [pool], (pool @ self.fc.T).softmax(1)


class Classifier:
    """A checkpoint: images uint8 -> [means and standard deviations of a stage's output (N, 2 C)] x 4, probabilities."""

    names, standardised = ("C-IS", "C-FD"), True

    def __init__(self, path: str, where: torch.device):
        engine.require(Path(path).is_file(), f"--features {path}: neither 'inception' nor a checkpoint that is there")
        model = cem.load(path, where)
        engine.require(isinstance(model, cem.ParametricCEM), f"{path} is no classifier: --features needs train_sup.py's")
        self.model, self.where = cem.folded(model).to(memory_format=torch.channels_last), where

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        channels = self.model.config["in_channels"]
        engine.require(images.shape[1] == channels, f"--features is for images of {channels} channels")
        x = images.to(self.where, memory_format=torch.channels_last).float().div(255)
        stages = self.model.stages(x)
        pooled = [torch.cat([s.mean((2, 3)), s.flatten(2).std(2, unbiased=False)], 1) for s in stages]
        return pooled, self.model.net.fc(stages[-1].mean((2, 3))).softmax(1)


@torch.no_grad()
def extract(network, images: Tensor, batch_size: int, what: str) -> tuple[list[Tensor], Tensor]:
    """Images uint8 (N, C, H, W) -> a list of feature blocks (N, D) and the probabilities (N, K), float64, on the CPU."""
    parts = []
    for batch in tqdm(images.split(batch_size), what, unit="batch", leave=False):
        blocks, probabilities = network(batch)
        parts.append([t.cpu().double() for t in (*blocks, probabilities)])
    *blocks, probabilities = (torch.cat(part) for part in zip(*parts))
    engine.require(all(block.isfinite().all() for block in blocks), f"{what}: the features are not finite")
    return blocks, probabilities


# ----------------------------------------------------------------------------------------------------- scores


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ p(y)), mean and standard deviation over the splits, taken in the order given. (N, K) ->."""
    scores = []
    for p in probabilities.double().tensor_split(splits):
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
        scores.append(kl.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(unbiased=False).item()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) -> mean (D,) and covariance (D, D) in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """‖μ1 - μ2‖² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), the last trace from the eigenvalues of the symmetric Σ1^½ Σ2 Σ1^½.

    So rank-deficient covariances give a number too, where a matrix square root of Σ1 Σ2 may not.
    """
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp_min(0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def distance(samples: list[tuple], reference: list[tuple], standardised: bool) -> float:
    """The mean Fréchet distance over feature blocks, each (mean, covariance)."""
    total = 0.0
    for (mu, sigma), (mu_ref, sigma_ref) in zip(samples, reference):
        if standardised:
            scale = sigma_ref.diagonal().sqrt().clamp_min(1e-6)
            mu, mu_ref = mu / scale, mu_ref / scale
            sigma, sigma_ref = (s / scale / scale[:, None] for s in (sigma, sigma_ref))
        total += frechet_distance(mu, sigma, mu_ref, sigma_ref)
    return total / len(reference)


# ------------------------------------------------------------------------------------------------------- main


def reference_statistics(network, opt: Options) -> tuple[list[tuple], tuple | None]:
    """-> (mean, covariance) of each feature block, and the images' shape where the reference has images."""
    path = Path(opt.ref)
    if path.suffix == ".npz" and path.is_file():
        if stored := read_statistics(path):
            fits = not network.standardised and stored[0].shape == (2048,) and stored[1].shape == (2048, 2048)
            engine.require(fits, f"{path}: statistics of 2,048 Inception features go with --features inception only")
            return [stored], None
        images, _ = read_npz(path)
    elif path.is_dir() and not (path / "train").is_dir():
        images, _ = read_samples(path)
    else:
        images = data.load(opt.ref, opt.split, opt.data_dir).images
    engine.require(len(images) > 1, f"--ref {opt.ref} has one image: no covariance can be had from that")
    blocks, _ = extract(network, images, opt.batch_size, opt.ref)
    return [statistics(block) for block in blocks], tuple(images.shape[1:])


def judge(network, images: Tensor, labels: Tensor, reference: list[tuple], opt: Options, what: str) -> dict:
    """All the figures of one set of samples."""
    blocks, probabilities = extract(network, images, opt.batch_size, what)
    score, fd = network.names
    mean, std = inception_score(probabilities, opt.splits)
    row = {"samples": what, "n": len(images), score: round(mean, 4), f"{score} std": round(std, 4)}
    row[fd] = round(distance([statistics(b) for b in blocks], reference, network.standardised), 4)
    if network.standardised and labels.min() >= 0 and labels.max() < probabilities.shape[1]:
        row["wanted"] = round((probabilities.argmax(1) == labels).double().mean().item(), 4)
    return row


def markdown(rows: list[dict]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [header, ["---"] * len(header), *([str(row.get(key, "")) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    opt = engine.parse(Options, __doc__)
    engine.require(opt.splits >= 1 and opt.batch_size >= 1, "--splits and --batch-size must be at least 1")
    where = engine.device(opt.device)
    newest = sorted(Path("runs").glob("*/samples-*.npz"), key=lambda p: p.stat().st_mtime)[-1:]
    paths = [Path(p) for p in opt.samples] or newest
    engine.require(bool(paths), "no samples in runs/: python sample.py makes some, or name them with --samples")
    sets = [read_samples(path) for path in paths]
    for path, (images, _) in zip(paths, sets):
        engine.require(len(images) > opt.splits, f"{path} has {len(images)} images: more than --splits {opt.splits}, please")
    network = Inception(opt.weights, where) if opt.features == "inception" else Classifier(opt.features, where)
    reference, shape = reference_statistics(network, opt)
    for path, (images, _) in zip(paths, sets):
        fits = shape in (None, tuple(images.shape[1:]))
        engine.require(fits, f"{path} has images of {tuple(images.shape[1:])}, the reference {shape}: nothing is resized")
    rows = [judge(network, *images, reference, opt, str(path)) for path, images in zip(paths, sets)]
    print(markdown(rows))
    out = Path(opt.out) if opt.out else (paths[0] if paths[0].is_dir() else paths[0].parent) / "metrics.json"
    options = {"features": opt.features, "reference": opt.ref, "split": opt.split, "splits": opt.splits}
    record = {"command": engine.command(), **options, "rows": rows}
    engine.write_text(out, json.dumps(record, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    engine.run(main)
