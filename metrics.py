"""Feature networks, and the scores IS, FID and KID on their outputs; eval_is_fid.py is the command line.

Every feature network maps a batch of images uint8 (N, C, H, W) to a list of feature blocks (N, D) and logits (N, K). It has
`names`, of its scores; `standardised`, whether features are divided by the reference's standard deviations; and `key`, a name
of network, weights and arithmetic for files of statistics.
"""

import hashlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import cem
import cli
import hardware
import parallel

# ----------------------------------------------------------------------------------------------------- networks


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def inception_weights(path: str) -> tuple[dict[str, Tensor], str]:
    """The FID Inception's state dict, from `path` or downloaded once, and its file's SHA-256; a warning if it is another."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    published = FID_WEIGHTS_URL.rpartition("/")[2]  # ...-<the first digits of its SHA-256>.pth
    prefix = published.removesuffix(".pth").rpartition("-")[2]
    try:
        if not path:
            cached = Path(torch.hub.get_dir()) / "checkpoints" / published
            if not cached.exists():
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(cached), hash_prefix=prefix)
            path = str(cached)
        state, sha = torch.load(path, map_location="cpu", weights_only=True), digest(path)
    except Exception as error:  # no network, a damaged file, a file of other things: each in its own way
        ways = f"fetch {FID_WEIGHTS_URL} and name it with --weights, or use --features CHECKPOINT of a classifier"
        raise cem.CEMError(f"no Inception weights ({' '.join(str(error).split())[:200]}): {ways}") from error
    if not sha.startswith(prefix):
        cli.warn(f"{path} has SHA-256 {sha[:8]}…, the published weights {prefix}…: the figures compare with nobody else's")
    return state, sha


def pytorch_fid(state: dict[str, Tensor]) -> nn.Module:
    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):  # else it downloads
        return inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()


def torch_fidelity(state: dict[str, Tensor]) -> nn.Module:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError as error:
        raise cem.CEMError("--preprocess tf1 needs torch-fidelity: pip install torch-fidelity") from error
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return inception.FeatureExtractorInceptionV3("inception", ["2048"])


class Inception:
    """The FID Inception: one block, its 2,048 pool features, and the 1,008 logits without their bias, as IS has them.

    preprocess "torch": pytorch-fid's, bilinear to 299 x 299, not antialiased, by PyTorch's rule for pixel centres; "tf1":
    torch-fidelity's, which is the original code's, by the rule of TensorFlow 1, and (x - 128) / 128.
    """

    names, standardised = {"IS": "IS", "FD": "FID", "KD": "KID"}, False

    def __init__(self, weights: str, where: torch.device, preprocess: str = "torch", precision: str = "float32"):
        state, sha = inception_weights(weights)
        self.where, self.preprocess, self.precision = where, preprocess, (precision := hardware.settled(where, precision))
        self.key = f"inception-{sha[:8]}-{preprocess}-{precision}"
        try:
            self.net = (torch_fidelity if preprocess == "tf1" else pytorch_fid)(state)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:  # a state dict of another network
            raise cem.CEMError(f"{weights} holds no FID Inception: {error}".splitlines()[0]) from error
        for module in self.net.modules():
            if hasattr(module, "conv") and hasattr(module, "bn"):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        self.net = self.net.to(where, memory_format=torch.channels_last).requires_grad_(False).eval()
        self.fc = state["fc.weight"].to(where).float()

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        images = images.to(self.where, memory_format=torch.channels_last).expand(-1, 3, -1, -1)
        with hardware.autocast(self.where, self.precision):
            pool = self.net(images if self.preprocess == "tf1" else images.float().div(255))[0].flatten(1).float()
        return [pool], pool @ self.fc.T


class Classifier:
    """A classifier: of each of its four stages the spatial means and standard deviations of the output (N, 2 C); logits."""

    names, standardised = {"IS": "C-IS", "FD": "C-FD", "KD": "C-KD"}, True

    def __init__(self, path: str, where: torch.device, precision: str = "float32"):
        cli.require(Path(path).is_file(), f"--features {path}: neither 'inception' nor a checkpoint that is there")
        model = cem.load(path, where)
        cli.require(isinstance(model, cem.ParametricCEM), f"{path} is no classifier: --features needs train_sup.py's")
        cli.require(model.extra.get("normalised", True), f"{path} does not say how pixels are normalised: no --features")
        self.model, self.where = cem.folded(model).to(memory_format=torch.channels_last), where
        self.precision = precision = hardware.settled(where, precision)
        self.key = f"{Path(path).stem}-{digest(path)[:8]}-{precision}"

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        channels = self.model.config["in_channels"]
        cli.require(images.shape[1] == channels, f"--features is for images of {channels} channels")
        x = images.to(self.where, memory_format=torch.channels_last).float().div(255)
        with hardware.autocast(self.where, self.precision):
            stages = [stage.float() for stage in self.model.stages(x)]
        pooled = [torch.cat([s.mean((2, 3)), s.flatten(2).std(2, unbiased=False)], 1) for s in stages]
        return pooled, self.model.net.fc(stages[-1].mean((2, 3)))


@torch.no_grad()
def extract(network, images: Tensor, batch_size: int, what: str) -> tuple[list[Tensor], Tensor]:
    """Images uint8 (N, C, H, W) -> a list of feature blocks (N, D) and the logits (N, K), float32, on the CPU.

    torchrun's processes share out the batches, and all of them get the whole.
    """
    parts = []
    batches = images.split(min(batch_size, max(len(images) // parallel.size(), 1)))
    for batch in tqdm(parallel.share(batches), what, unit="batch", leave=False, disable=parallel.rank() > 0):
        blocks, logits = network(batch)
        parts.append([t.cpu() for t in (*blocks, logits)])
    *blocks, logits = (parallel.gather(torch.cat(part)) for part in zip(*parts))
    cli.require(all(t.isfinite().all() for t in (*blocks, logits)), f"{what}: the features are not finite")
    return blocks, logits


# ------------------------------------------------------------------------------------------------------- scores


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ p(y)) (Salimans et al., 2016): mean and standard deviation over splits, in order. (N, K)."""
    scores, n = [], len(logits)
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_mean)).nansum(1).mean().exp())  # 0 log 0 = 0
    return torch.stack(scores).mean().item(), torch.stack(scores).std(unbiased=False).item()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) -> mean (D,) and covariance (D, D) in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """‖μ1 - μ2‖² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½) (Heusel et al., 2017), the last trace from the eigenvalues of the symmetric
    Σ1^½ Σ2 Σ1^½: so rank-deficient covariances give a number too, where a matrix square root of Σ1 Σ2 may not."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp_min(0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """KID (Bińkowski et al., 2018): the unbiased MMD² under the kernel (x·y / D + 1)³ of features (N, D) and (M, D).

    Mean and standard deviation over random subsets of `size` (fewer where N or M is smaller), drawn as torch-fidelity does.
    """
    random, size = np.random.RandomState(2020), min(size, len(x), len(y))
    x, y, values = x.double(), y.double(), []

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(subsets):
        a, b = (z[torch.from_numpy(random.choice(len(z), size, replace=False)).to(z.device)] for z in (x, y))
        within = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b))) / (size * (size - 1))
        values.append(within - 2 * kernel(a, b).mean())
    return torch.stack(values).mean().item(), torch.stack(values).std(unbiased=False).item()


# ---------------------------------------------------------------------------------------------------- reference

KEPT = 10_000  # reference images, evenly spread, whose features are kept for KID


class Reference:
    """What samples are compared with: mean and covariance of each feature block, and features of up to KEPT images for KID."""

    def __init__(self, moments: list[tuple[Tensor, Tensor]], features: list[Tensor] | None):
        self.moments, self.features = moments, features

    @classmethod
    def of(cls, blocks: list[Tensor]) -> "Reference":
        n = len(blocks[0])
        spread = torch.arange(min(n, KEPT)) * n // min(n, KEPT)
        return cls([statistics(block) for block in blocks], [block[spread] for block in blocks])

    def standardise(self, blocks: list[Tensor], standardised: bool) -> list[Tensor]:
        """Each block with the reference's mean subtracted and divided by its standard deviations, or as it is."""
        if not standardised:
            return blocks
        return [(x - mu) / sigma.diagonal().sqrt().clamp_min(1e-6) for x, (mu, sigma) in zip(blocks, self.moments)]

    def frechet(self, blocks: list[Tensor], standardised: bool) -> float:
        """The mean Fréchet distance over the blocks."""
        total = 0.0
        for block, (mu, sigma) in zip(self.standardise(blocks, standardised), self.moments):
            if standardised:
                scale = sigma.diagonal().sqrt().clamp_min(1e-6)
                mu, sigma = torch.zeros_like(mu), sigma / scale / scale[:, None]
            total += frechet_distance(*statistics(block), mu, sigma)
        return total / len(self.moments)

    def kernel(self, blocks: list[Tensor], standardised: bool, where: torch.device) -> tuple[float, float]:
        """The mean kernel distance over the blocks, and the mean of its standard deviations over subsets."""
        where = where if where.type == "cuda" else torch.device("cpu")  # float64
        pairs = zip(*(self.standardise(side, standardised) for side in (blocks, self.features)))
        values = [kernel_distance(x.to(where), y.to(where)) for x, y in pairs]
        return tuple(sum(column) / len(values) for column in zip(*values))

    def arrays(self) -> dict[str, np.ndarray]:
        """For an npz file; that of Inception's one block has pytorch-fid's names, mu and sigma."""
        names = [""] if len(self.moments) == 1 else list(range(len(self.moments)))
        rows = zip(names, self.moments, self.features)
        return {f"{k}{i}": v.numpy() for i, (mu, sigma), f in rows for k, v in dict(mu=mu, sigma=sigma, features=f).items()}

    @classmethod
    def from_arrays(cls, arrays) -> "Reference":
        names = [name.removeprefix("mu") for name in arrays if name.startswith("mu")]
        moments = [tuple(torch.from_numpy(arrays[f"{k}{i}"]).double() for k in ("mu", "sigma")) for i in sorted(names)]
        return cls(moments, [torch.from_numpy(arrays[f"features{i}"]) for i in sorted(names)])
