"""What samples are compared with: statistics of reference images, read, computed and cached."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cem
from lib import cli, data, distributed, manifold, metrics
from lib.metrics import (
    SUBSET,
    FeatureNetwork,
    frechet_distance,
    kernel_distances,
    square_root,
    statistics,
)

KERNEL_IMAGES = 10_000  # evenly spaced reference images whose features are kept


class Reference:
    """The mean (D,) and covariance (D, D) of each feature block of the reference, float64, and the
    features (M, D) of up to KERNEL_IMAGES images, None if they are unknown.

    standardised: whether distances divide features by the reference's standard deviations.
    """

    def __init__(
        self,
        moments: list[tuple[Tensor, Tensor]],
        features: list[Tensor] | None,
        standardised=False,
    ):
        self.moments, self.features = moments, features
        self.scales = []
        for mu, sigma in moments:
            std = sigma.diagonal().sqrt()
            std = torch.where(std > 1e-6, std, 1)  # constant features keep their scale
            plain = torch.zeros_like(mu), torch.ones_like(mu)
            self.scales.append((mu, std) if standardised else plain)

    @classmethod
    def from_blocks(cls, blocks: list[Tensor], standardised=False) -> "Reference":
        index = data.evenly_spaced(KERNEL_IMAGES, len(blocks[0]))
        kept = [block[index] for block in blocks]
        return cls([statistics(block) for block in blocks], kept, standardised)

    def scaled(self, blocks: list[Tensor]) -> list[Tensor]:
        return [(x - shift) / scale for x, (shift, scale) in zip(blocks, self.scales)]

    @cached_property
    def gaussians(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """μ, Σ and Σ^½ of each scaled block."""
        found = []
        for (mu, sigma), (shift, scale) in zip(self.moments, self.scales):
            sigma = sigma / scale / scale[:, None]
            found.append(((mu - shift) / scale, sigma, square_root(sigma)))
        return found

    def frechet(self, blocks: list[Tensor]) -> float:
        """The mean Fréchet distance over the blocks, each (N, D)."""
        pairs = zip(self.scaled(blocks), self.gaussians)
        return sum(frechet_distance(x, *gaussian) for x, gaussian in pairs) / len(blocks)

    def joined(self, blocks: list[Tensor]) -> Tensor:
        """The scaled blocks side by side, (N, ΣD), float64."""
        return torch.cat(self.scaled(blocks), 1).double()

    def manifold(self, blocks: list[Tensor]) -> dict[str, float]:
        """manifold.scores of up to KERNEL_IMAGES images of each kind."""
        index = data.shuffled(len(blocks[0]))[:KERNEL_IMAGES]
        samples = self.joined([block[index] for block in blocks])
        return manifold.scores(self.joined(self.features), samples)

    def kernel(self, blocks: list[Tensor], device: torch.device) -> tuple[float, float | None]:
        """The mean kernel distance over the blocks: mean and standard deviation over subsets, None
        if all subsets are the whole sets."""
        device = device if device.type == "cuda" else "cpu"  # MPS has no float64
        pairs = zip(self.scaled(blocks), self.scaled(self.features))
        values = np.mean([kernel_distances(x.to(device), y.to(device)) for x, y in pairs], axis=0)
        whole = len(blocks[0]) == len(self.features[0]) <= SUBSET
        return values.mean().item(), None if whole else values.std().item()

    def arrays(self) -> dict[str, np.ndarray]:
        """For an npz file. A single block has pytorch-fid's names, mu and sigma."""
        result = {}
        for i, ((mu, sigma), features) in enumerate(zip(self.moments, self.features)):
            suffix = i if len(self.moments) > 1 else ""
            for name, tensor in (("mu", mu), ("sigma", sigma), ("features", features)):
                result[f"{name}{suffix}"] = tensor.numpy()
        return result

    @classmethod
    def from_arrays(cls, arrays, standardised=False) -> "Reference":
        """The inverse of `arrays`; raises what NumPy raises for a damaged file."""
        moments, features = [], []
        for suffix in sorted(name[2:] for name in arrays if name.startswith("mu")):
            mu, sigma = (torch.from_numpy(arrays[f"{k}{suffix}"]) for k in ("mu", "sigma"))
            moments.append((mu.double(), sigma.double()))
            if f"features{suffix}" in arrays:
                features.append(torch.from_numpy(arrays[f"features{suffix}"]))
        return cls(moments, features or None, standardised)


def read_statistics(path: Path, key: str) -> Reference | None:
    """mu (2048,) and sigma (2048, 2048) of an npz by --save-stats or pytorch-fid; None if `path` is
    no such file.

    Raises CEMError if they are damaged or of another network than `key`.
    """
    if path.suffix != ".npz" or not path.is_file():
        return None
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
    cem.require(shapes and finite, f"{path}: mu and sigma must be finite, of 2,048 features")
    inception = key.startswith("inception")
    cem.require(inception, f"{path}: statistics of Inception need --features inception")
    differs = f"{path} was computed with {made_by}, not {key}"
    cem.require(made_by == key, f"{differs}: see --preprocess, --precision and --weights")
    return reference


def load_images(opt) -> Tensor:
    """The images of --ref, uint8 (N, C, H, W). Those of a file are shuffled: sample.py's cycle
    through the classes, so that evenly spaced ones could be of one class."""
    images = data.images(opt.ref, opt.split, opt.data_dir, opt.image_size)
    return images[data.shuffled(len(images))] if Path(opt.ref).is_file() else images


FORMAT = 1  # of cached statistics: to be raised when features or blocks change


def fingerprint(images: Tensor) -> str:
    sha = hashlib.sha256(f"{FORMAT} {tuple(images.shape)}".encode())
    for part in images.split(1000):
        sha.update(part.contiguous().numpy())
    return sha.hexdigest()


def read_cache(path: Path, images_sha: str, standardised: bool) -> Reference | None:
    """The statistics in `path`, None if it is missing, damaged or of other images."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == images_sha:
                return Reference.from_arrays(arrays, standardised)
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


def compute(images: Tensor, network: FeatureNetwork, opt) -> Reference:
    """The statistics of reference images; those of a dataset or folder are cached beside it."""
    path = Path(opt.ref)
    folder = path if path.is_dir() and opt.ref not in data.NAMES else Path(opt.data_dir)
    cache = folder / f"stats-{path.name}-{opt.split}-{network.key}.npz"
    images_sha = fingerprint(images)
    found = None if path.is_file() else read_cache(cache, images_sha, network.standardised)
    # all processes compute together, even if a file is missing on one machine only
    if not distributed.any_process(found is None):
        return found
    blocks, _ = metrics.extract(network, images, opt.batch_size, opt.ref)
    reference = Reference.from_blocks(blocks, network.standardised)
    if not path.is_file() and distributed.rank() == 0:
        write_cache(cache, images_sha, reference)
    return reference
