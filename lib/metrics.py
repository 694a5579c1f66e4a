"""Feature networks, the scores IS, FID and KID of their outputs, and error bars."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol
from unittest import mock

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import cem
from lib import cli, distributed, files
from lib.device import autocast, resolve_precision

# ------------------------------------------------------------------------------ feature networks


class FeatureNetwork(Protocol):
    """The interface of Inception, Checkpoint and dinov2.DINOv2.

    names: of its Inception Score, Fréchet distance and kernel distance; "" for none.
    standardised: whether distances divide features by the reference's standard deviations.
    key: network, weights, preprocessing and precision, for the names of statistics files.
    """

    names: tuple[str, str, str]
    standardised: bool
    key: str
    device: torch.device

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images uint8 (N, C, H, W) -> feature blocks, each (N, D), and logits (N, K)."""


def inception_weights(path: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of the FID Inception and the SHA-256 of its file; "" downloads it once.

    Warns if the weights are not the published ones. Raises CEMError if they are not available.
    """
    from pytorch_fid.inception import FID_WEIGHTS_URL

    name = FID_WEIGHTS_URL.rpartition("/")[2]
    prefix = name.removesuffix(".pth").rpartition("-")[2]  # of the published file's SHA-256
    try:
        if not path:
            path = Path(torch.hub.get_dir()) / "checkpoints" / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with mock.patch.object(torch.hub, "tqdm", partial(cli.progress, None, "Inception")):
                    torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), hash_prefix=prefix)
        cem.require(Path(path).is_file(), f"{path} not found")
        state = torch.load(path, map_location="cpu", weights_only=True)
        sha = files.sha256(path)
    except Exception as error:  # no network, or a file that is damaged in any way
        reason = " ".join(str(error).split())[:200]
        advice = f"download {FID_WEIGHTS_URL} for --weights, or use --features CHECKPOINT"
        raise cem.CEMError(f"Inception weights not available ({reason}): {advice}") from error
    if not sha.startswith(prefix):
        differs = f"{path} has SHA-256 {sha[:8]}…, the published weights {prefix}…"
        cli.warn(f"{differs}: the figures are not comparable with published ones")
    return state, sha


def pytorch_fid(state: dict[str, Tensor]) -> nn.Module:
    from pytorch_fid import inception

    block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
    # the constructor would download the weights
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return inception.InceptionV3([block])


def torch_fidelity(state: dict[str, Tensor]) -> nn.Module:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError as error:
        raise cem.CEMError("--preprocess tf1 needs: pip install torch-fidelity") from error
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return inception.FeatureExtractorInceptionV3("inception", ["2048"])


class Inception:
    """The FID Inception. One block, its 2,048 pool features; 1,008 logits without their bias.

    preprocess "torch": pytorch-fid's, bilinear to 299 x 299 with PyTorch's pixel centres, not
    antialiased. "tf1": torch-fidelity's, with TensorFlow 1's pixel centres and (x - 128) / 128.
    Raises CEMError for weights that are not available or are another network's.
    """

    names = ("IS", "FID", "KID")
    standardised = False

    def __init__(self, weights: str, device: torch.device, preprocess="torch", precision="float32"):
        state, sha = inception_weights(weights)
        self.device = device
        self.preprocess = preprocess
        self.precision = resolve_precision(device, precision)
        self.key = f"inception-{sha[:8]}-{preprocess}-{self.precision}"
        build = torch_fidelity if preprocess == "tf1" else pytorch_fid
        try:
            net = build(state).eval()
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise cem.CEMError(f"{weights} is not an FID Inception: {reason}") from error
        for module in net.modules():
            if hasattr(module, "conv") and hasattr(module, "bn"):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        self.net = net.to(device, memory_format=torch.channels_last).requires_grad_(False)
        self.fc = state["fc.weight"].to(device).float()

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        x = images.to(self.device, memory_format=torch.channels_last).expand(-1, 3, -1, -1)
        if self.preprocess == "torch":  # torch-fidelity's network takes uint8
            x = x.float().div(255)
        with autocast(self.device, self.precision):
            pool = self.net(x)[0].flatten(1).float()
        return [pool], pool @ self.fc.T


class Checkpoint:
    """A checkpoint of this project, a classifier or an encoder. One block per stage: the spatial
    means and standard deviations (N, 2 C) of its output (N, C, H, W). An encoder has embeddings in
    place of logits, and no IS."""

    standardised = True

    def __init__(self, path: str, device: torch.device, precision: str = "float32"):
        wanted = "--features must be inception, dinov2 or a checkpoint"
        cem.require(Path(path).is_file(), f"{wanted}: {path} not found")
        model = cem.load(path, device)
        encoder = isinstance(model, cem.NonParametricCEM)
        self.names = ("", "E-FD", "E-KD") if encoder else ("C-IS", "C-FD", "C-KD")
        self.model = cem.folded(model).to(memory_format=torch.channels_last)
        self.device = device
        self.precision = resolve_precision(device, precision)
        self.key = f"{Path(path).stem}-{files.sha256(path)[:8]}-{self.precision}"

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        channels = self.model.config["in_channels"]
        cem.require(images.shape[1] == channels, f"{self.key} needs images of {channels} channels")
        x = images.to(self.device, memory_format=torch.channels_last).float().div(255)
        with autocast(self.device, self.precision):
            stages = [stage.float() for stage in self.model.stages(x)]
        blocks = []
        for stage in stages:
            std = stage.flatten(2).std(2, unbiased=False)
            blocks.append(torch.cat([stage.mean((2, 3)), std], 1))
        return blocks, self.model.net.fc(stages[-1].mean((2, 3)))


@torch.no_grad()
def extract(
    network: FeatureNetwork, images: Tensor, batch_size: int, name: str
) -> tuple[list[Tensor], Tensor]:
    """The network's feature blocks and logits of images uint8 (N, C, H, W), on the CPU.

    torchrun's processes divide the batches among them, and each returns all rows. Raises
    CEMError, which calls the images `name`, if a feature is not finite.
    """
    world = distributed.world_size()
    cem.require(len(images) >= world, f"{name}: fewer images than the {world} processes")
    size = min(batch_size, len(images) // world)
    batches = distributed.local_rows(images.split(size))
    parts = []
    for batch in cli.progress(batches, name, unit="batch"):
        blocks, logits = network(batch)
        parts.append([tensor.cpu() for tensor in (*blocks, logits)])
    *blocks, logits = [distributed.gather(torch.cat(part)) for part in zip(*parts)]
    finite = all(tensor.isfinite().all() for tensor in (*blocks, logits))
    cem.require(finite, f"{name}: the features are not finite")
    return blocks, logits


# ---------------------------------------------------------------------------------------- scores


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ p(y)) (Salimans et al., 2016) of logits (N, K), in consecutive splits.

    -> their mean and standard deviation.
    """
    n = len(logits)
    scores = []
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(log_p))
        kl = (log_p.exp() * (log_p - log_mean)).nansum(1)  # 0 log 0 = 0
        scores.append(kl.mean().exp().item())
    return np.mean(scores).item(), np.std(scores).item()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) -> mean (D,) and covariance (D, D), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def square_root(sigma: Tensor) -> Tensor:
    """Σ^½ of a covariance (D, D), which may be rank-deficient."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_distance(
    features: Tensor, mu: Tensor, sigma: Tensor, root: Tensor | None = None
) -> float:
    """‖μ - m‖² + tr(Σ + S - 2 (Σ S)^½) (Heusel et al., 2017) between features (N, D), with mean m
    and covariance S, and a Gaussian with μ (D,), Σ (D, D), float64; root is Σ^½, if known.

    The last trace is the sum of the singular values of X Σ^½ / √(N-1), with X the centred features.
    It is defined for rank-deficient covariances, where a square root of Σ S can fail.
    """
    root = square_root(sigma) if root is None else root
    mean = features.double().mean(0)
    centred = (features.double() - mean) / (len(features) - 1) ** 0.5
    if len(features) < len(sigma):
        x = centred @ root
        product = x @ x.T
    else:
        product = root @ (centred.T @ centred) @ root
    cross = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    traces = centred.square().sum() + sigma.trace()
    return ((mean - mu).square().sum() + traces - 2 * cross).item()


def jackknife(statistic: Callable[[Tensor], float], labels: Tensor, most=10) -> float | None:
    """The standard error of a statistic of samples, which it takes by their indices.

    Each of k folds is left out in turn: √((k-1)/k Σ (θ_i - mean θ)²). Every fold has as many images
    of each class, by the labels (N,): their sizes count as fixed, as sample.py's are. k is at most
    `most`, and at least half of it; at most a tenth of the images is in no fold. None if that is
    impossible, as for few images per class. A bootstrap's duplicates would make Fréchet distances
    of few samples far too uncertain. This overestimates by up to a half, and by a factor of two or
    three for images that were drawn coupled (maxent).
    """
    sizes = labels.unique(return_counts=True)[1]
    possible = range(most, most // 2 - 1, -1)
    fits = [k for k in possible if 10 * (sizes % k).sum() <= len(labels)]
    if not fits:
        return None
    k = fits[0]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    of_class = order[labels[order].argsort(stable=True)].split(sizes.tolist())
    order = torch.cat([rows[: len(rows) // k * k] for rows in of_class])
    fold = torch.arange(len(order)) % k
    without = [statistic(order[fold != i]) for i in range(k)]
    return ((k - 1) * len(order) / len(labels)) ** 0.5 * np.std(without).item()


def extrapolate(statistic: Callable[[Tensor], float], n: int) -> float:
    """A Fréchet distance's limit for infinitely many samples (Chong and Forsyth, 2020): the
    intercept of a line through its values over 1/m, for 15 subsets of m = n/10 to n samples."""
    generator = torch.Generator().manual_seed(0)
    sizes = np.linspace(n / 10, n, 15).astype(int)
    values = [statistic(torch.randperm(n, generator=generator)[:m]) for m in sizes]
    return np.polynomial.Polynomial.fit(1 / sizes, values, 1)(0).item()


def interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of n independent trials (Wilson, 1927)."""
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


SUBSET = 1000  # images of KID's subsets


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³ of the rows of x (N, D) and y (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distances(x: Tensor, y: Tensor, subsets=100, size=SUBSET) -> np.ndarray:
    """KID (Bińkowski et al., 2018): the unbiased MMD² under `kernel` of features (N, D), (M, D).

    -> (subsets,), of random subsets of min(size, N, M) rows each, drawn as torch-fidelity does.
    """
    random = np.random.RandomState(2020)
    n = min(size, len(x), len(y))
    values = []
    for _ in range(subsets):
        rows = [torch.from_numpy(random.choice(len(z), n, replace=False)) for z in (x, y)]
        a, b = x[rows[0].to(x.device)].double(), y[rows[1].to(y.device)].double()
        k_aa, k_bb = kernel(a, a), kernel(b, b)
        within = (k_aa.sum() - k_aa.trace() + k_bb.sum() - k_bb.trace()) / (n * (n - 1))
        values.append((within - 2 * kernel(a, b).mean()).item())
    return np.array(values)
