"""Contrastive energy-based models (CEM) in plain PyTorch.

    model = cem.ParametricCEM("resnet18", num_classes=10)        # p(x, y) = exp f(x, y) / Z
    x_adv = cem.pgd(cem.potential("ce", model, y), x, eps=0.5)   # inner maximisation
    loss, logits = cem.supervised_loss("at", model, x, y, x_adv) # outer minimisation
    images = cem.ascend(cem.potential("rcs", model, y), seeds.sample(y), steps=8, step_size=0.25)

Images are float tensors (N, C, H, W) in [0, 1]; the channel normalisation is a layer of the model.
Energies are negative log-densities: E(x, y) = -f(x, y), E(x) = -LSE_k f(x, k) (log-sum-exp). This
file needs only torch, 2.6 or newer, and torchvision; copy it as it is.

Papers: [CEM] Wang et al., ICLR 2022, arXiv:2203.13455. [JEAT] Zhu et al., ICCV 2021,
arXiv:2108.09093. [JEM] Grathwohl et al., ICLR 2020, arXiv:1912.03263. [PGD] Madry et al., ICLR
2018, arXiv:1706.06083. [N-FGSM] de Jorge et al., NeurIPS 2022, arXiv:2202.01181. [CW] Carlini and
Wagner, S&P 2017, arXiv:1608.04644. [DAT] arXiv:2510.13872, ICLR 2026.
"""

import copy
import functools
import math
import os
import secrets
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck


class CEMError(ValueError):
    """An error that the caller can correct. The scripts print it as one line and exit with 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CEMError(message)


def _require_one_of(names, name: str, what: str) -> None:
    require(name in names, f"unknown {what} {name!r}: choose one of {', '.join(names)}")


# ------------------------------------------------------------------------------------- networks


class ResNet(nn.Module):
    """ResNet (He et al., 2016) with torchvision's parameter names. The stem, for small images, is
    3x3 of stride 1 without max-pooling; `imagenet` is the original, 7x7 of stride 2 with it."""

    def __init__(self, block, depths: Sequence[int], width: int, in_channels: int, imagenet=False):
        super().__init__()
        self.imagenet = imagenet
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for i, depth in enumerate(depths):
            planes = width * 2**i
            out = planes * block.expansion
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None
                if stride != 1 or channels != out:
                    projection = nn.Conv2d(channels, out, 1, stride, bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, stride, shortcut))
                channels = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.out_features = channels

    def stages(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, padding=1)
        first = self.layer1(x)
        second = self.layer2(first)
        third = self.layer3(second)
        return [first, second, third, self.layer4(third)]


class WideBlock(nn.Module):
    """Pre-activation residual block of a Wide ResNet."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko and Komodakis, 2016) with RobustBench's parameter names. Its four
    stages are the stem and the three groups of blocks."""

    def __init__(self, depth: int, factor: int, width: int, in_channels: int):
        super().__init__()
        require(width * factor >= 4, f"wrn of factor {factor}: width {width} is too small")
        channels = [16] + [width * factor // 4 * 2**i for i in range(3)]
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        for i, (n, out) in enumerate(zip(channels, channels[1:])):
            blocks = [WideBlock(n, out, 1 if i == 0 else 2)]
            blocks += [WideBlock(out, out, 1) for _ in range((depth - 4) // 6 - 1)]
            group = nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))
            self.add_module(f"block{i + 1}", group)
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.out_features = channels[-1]

    def stages(self, x: Tensor) -> list[Tensor]:
        stem = self.conv1(x)
        first = self.block1(stem)
        second = self.block2(first)
        third = F.relu(self.bn1(self.block3(second)))
        return [stem, first, second, third]


RESNETS = {
    "resnet14": (BasicBlock, (0, 2, 2, 2)),  # ours: ResNet-18 without blocks of the stem's size
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
WIDE_RESNETS = (16, 4), (16, 8), (28, 4), (28, 10), (34, 10), (34, 15), (34, 20), (40, 2), (70, 16)
# name -> (width, in_channels) -> network
ARCHS = {k: functools.partial(ResNet, *shape) for k, shape in RESNETS.items()}
ARCHS |= {f"{k}-imagenet": functools.partial(ResNet, *v, imagenet=True) for k, v in RESNETS.items()}
ARCHS |= {f"wrn-{d}-{k}": functools.partial(WideResNet, d, k) for d, k in WIDE_RESNETS}


class _CEM(nn.Module):
    """What both energy models share: pixel normalisation, network, stages and features."""

    def __init__(self, arch, config, width, in_channels, mean, std):
        super().__init__()
        _require_one_of(ARCHS, arch, "arch")
        self.config = dict(arch=arch, width=width, in_channels=in_channels, **config)
        for name, value in (config | dict(width=width, in_channels=in_channels)).items():
            require(0 < value < math.inf, f"{name} must be positive and finite, not {value}")
        self.net = ARCHS[arch](width, in_channels)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype()).flatten()
            valid = len(value) in (1, in_channels) and (value.is_meta or value.isfinite().all())
            valid = valid and (value.is_meta or name == "mean" or value.min() > 0)
            require(valid, "mean and std must be finite, scalar or one per channel, and std > 0")
            self.register_buffer(name, value.expand(in_channels).reshape(-1, 1, 1).clone())

    def stages(self, x: Tensor) -> list[Tensor]:
        """x (N, C, H, W) in [0, 1] -> the outputs of the four stages, each (N, C_s, H_s, W_s)."""
        fits = x.is_floating_point() and x.shape[1:-2] == self.mean.shape[:1]
        require(fits, f"images must be floats (N, {len(self.mean)}, H, W)")
        return self.net.stages((x - self.mean) / self.std)

    def features(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) in [0, 1] -> h(x) (N, D), the last stage's spatial mean."""
        return self.stages(x)[-1].mean((2, 3)).to(x.dtype)


class ParametricCEM(_CEM):
    """P-CEM: p(x, y) = exp f(x, y) / Z, where f(x, ·) are a classifier's logits ([CEM] eq. 3).

    `model(x)` maps x (N, C, H, W) in [0, 1], H and W at least 8, to f(x, ·) (N, num_classes) in
    x's dtype, also under autocast. width: channels of a ResNet's stem; it scales all others, but a
    Wide ResNet's stem has 16. mean and std of pixels: one number or one per channel.
    """

    def __init__(
        self, arch="resnet18", num_classes=10, width=64, in_channels=3, mean=0.5, std=0.25
    ):
        super().__init__(arch, dict(num_classes=num_classes), width, in_channels, mean, std)
        self.net.fc = nn.Linear(self.net.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.fc(self.features(x)).to(x.dtype)


class NonParametricCEM(_CEM):
    """NP-CEM: p(x, x') = exp f(x, x') / Z with f(x, x') = g(x)ᵀ g(x') / τ ([CEM] eq. 4).

    `model(x)` maps x (N, C, H, W) in [0, 1] to g(x) (N, embed_dim) of unit length, the output of a
    two-layer projection head, whose input is `features(x)`. τ is `temperature`. energy=True adds a
    head for log p(x) + log Z, linear in the standardised features and learned in a second stage:
    `model(x, details=True)` -> g(x), features, log p(x). The rest is as in ParametricCEM.
    """

    def __init__(
        self, arch="resnet18", embed_dim=128, temperature=0.3, width=64, in_channels=3, mean=0.5,
        std=0.25, energy=False
    ):  # fmt: skip
        config = dict(embed_dim=embed_dim, temperature=temperature)
        config |= {"energy": True} if energy else {}  # absent in earlier checkpoints
        super().__init__(arch, config, width, in_channels, mean, std)
        self.temperature = temperature
        dim = self.net.out_features
        self.net.fc = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, embed_dim))
        if energy:
            self.energy = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, 1))
            nn.init.zeros_(self.energy[1].weight)

    def forward(self, x: Tensor, details: bool = False):
        h = self.features(x)
        z = F.normalize(self.net.fc(h).to(x.dtype), dim=1)
        return (z, h, self.energy(h).squeeze(1).to(x.dtype)) if details else z


def conv_bn_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of each convolution and of the BatchNorm that follows it, unless it is folded."""
    names = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("downsample.0", "downsample.1")]
    pairs = {ResNet: names, BasicBlock: names, Bottleneck: names, WideBlock: [("conv1", "bn2")]}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for pair in pairs.get(type(module), ()):
            conv, bn = (f"{name}.{part}" if name else part for part in pair)
            plain = type(modules.get(conv)) is nn.Conv2d and "weight" in modules[conv]._parameters
            if plain and getattr(modules.get(bn), "running_mean", None) is not None:
                yield conv, bn  # not where spectral_norm computes the weight


def folded(model: nn.Module) -> nn.Module:
    """A frozen copy in eval mode, the same function up to rounding.

    In networks of this file and blocks of torchvision's ResNets, BatchNorm is folded into
    convolutions, which makes attacks and samplers up to twice as fast."""
    model = copy.deepcopy(model).eval()
    for conv, bn in list(conv_bn_pairs(model)):
        fused = fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(bn))
        model.set_submodule(conv, fused)
        model.set_submodule(bn, nn.Identity())
    return model.requires_grad_(False)


# -------------------------------------------------------------------------------- log-densities


def log_joint(logits: Tensor, y: Tensor) -> Tensor:
    """log p(x, y) + log Z = f(x, y), up to a constant also log p(x | y). (N, K), (N,) -> (N,)."""
    return -F.nll_loss(logits, y, reduction="none")  # refuses fewer labels than rows, unlike gather


def log_marginal(logits: Tensor) -> Tensor:
    """log p(x) + log Z = LSE_k f(x, k). (N, K) -> (N,)."""
    return logits.logsumexp(1)


def log_posterior(logits: Tensor, y: Tensor) -> Tensor:
    """log p(y | x) = f(x, y) - LSE_k f(x, k). (N, K), (N,) -> (N,).

    ∇_θ at x̂ is ∇f(x̂, y) - E ∇f(x̂, ŷ) over ŷ ~ p(y | x̂): adversarial training follows this half
    of the likelihood's gradient ([CEM] eq. 10), `consistency` gives the other.
    """
    return log_joint(logits, y) - log_marginal(logits)


def log_odds_against(logits: Tensor, y: Tensor) -> Tensor:
    """log [(1 - p(y | x)) / p(y | x)] = LSE_{k≠y} f(x, k) - f(x, y). (N, K), (N,) -> (N,)."""
    return logits.scatter(1, y[:, None], -torch.inf).logsumexp(1) - log_joint(logits, y)


def consistency(logits: Tensor, logits_hat: Tensor, y: Tensor) -> Tensor:
    """f(x, y) - f(x̂, y), from f(x, ·) and f(x̂, ·). (N, K), (N, K), (N,) -> (N,)."""
    return log_joint(logits, y) - log_joint(logits_hat, y)


def similarity(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The logits f(x_i, x'_j) = z1_i · z2_j / τ of an NP-CEM. (N, D), (M, D) -> (N, M). The x'_j
    take the place of the classes in all functions above ([CEM] section 3.2)."""
    with torch.autocast(z1.device.type, enabled=False):  # bfloat16 is too coarse for cosine / τ
        return z1 @ z2.to(z1.dtype).T / temperature  # a stored bank is in half precision


def _similarity_to_others(z: Tensor, temperature: float) -> Tensor:
    """f(x_i, x_j) within a batch, (N, D) -> (N, N), with -inf on the diagonal."""
    require(len(z) > 1, "this potential compares images: it needs a batch of at least 2")
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return similarity(z, z, temperature).masked_fill(diagonal, -torch.inf)


# --------------------------------------------------------------------------------------- losses


def info_nce(z1: Tensor, z2: Tensor, temperature: float, reduction: str = "mean") -> Tensor:
    """NT-Xent (Chen et al., 2020): -log p(positive | view) among the 2N - 1 other views.

    z1 and z2 (N, D) have unit length; row i of one is the positive of row i of the other, and all
    other rows of both are negatives. reduction "mean" -> (), over the 2N views; "none" -> (N,),
    the mean over each pair's two views.
    """
    _require_one_of(("mean", "none"), reduction, "reduction")
    n = len(z1)
    require(n == len(z2) > 1, f"InfoNCE needs two views of at least 2 images, not {n}, {len(z2)}")
    positives = torch.arange(2 * n, device=z1.device).roll(n)
    logits = _similarity_to_others(torch.cat([z1, z2]), temperature)
    losses = -log_posterior(logits, positives).view(2, n).mean(0)
    return losses.mean() if reduction == "mean" else losses


def separation_loss(log_p: Tensor, log_p_s: Tensor, offset=0.0, weight_s=1.0) -> Tensor:
    """Binary cross-entropy of data against samples, logit log p(x) - offset ([DAT]: offset 0): the
    sum of the two means. (N,), (M,), weight_s a number or (M,) -> ()."""
    return F.softplus(offset - log_p).mean() + (weight_s * F.softplus(log_p_s - offset)).mean()


SUPERVISED_LOSSES = ("st", "at", "mle", "jem", "jeat", "dat")


def supervised_loss(
    name, model, x, y, x_adv=None, weight=0.1, x_s=None, offset=0.0
) -> tuple[Tensor, Tensor]:
    """The outer minimisation -> (mean loss, the logits that the cross-entropy saw).

    x, x_adv (N, C, H, W) and x_s (M, C, H, W) in [0, 1], y (N,).

    st    CE(x, y)
    at    CE(x̂, y)                                       x̂ = x_adv, the attacked images
    mle   CE(x̂, y) + λ [f(x̂, y) - f(x, y)]               λ = weight; both halves of the likelihood
    jem   CE(x, y) + λ [LSE f(x_s) - LSE f(x)]           x_s: samples of the model; λ = 1 in [JEM]
    jeat  CE(x̂, y) + λ [LSE f(x_s) - LSE f(x̂)]           λ = 1 in [JEAT]
    dat   CE(x̂, y) + λ [softplus(b - LSE f(x)) + softplus(LSE f(x_s) - b)]   use λ = 1

    In training mode, BatchNorm2d normalises x_s of jem and jeat by the data's statistics. So should
    their chains, or statistics tell samples from data. dat (train_sup.py adds terms) is for a model
    in eval mode, which sees [x̂, x, x_s], and b midway between the first LSE f(x) and LSE f(x_s).
    """
    _require_one_of(SUPERVISED_LOSSES, name, "loss")
    seen = x if name in ("st", "jem") else x_adv
    require(seen is not None and len(seen) == len(x), f"loss {name!r} needs x_adv, one per x")
    energies = name in ("jem", "jeat", "dat")
    require(not energies or x_s is not None, f"loss {name!r} needs x_s, samples of the model")
    if name == "dat":
        outputs = model(torch.cat([x_adv, x, x_s]))
        logits, on_data, on_samples = outputs.tensor_split([len(x), 2 * len(x)])
        separation = separation_loss(log_marginal(on_data), log_marginal(on_samples), offset)
        return F.cross_entropy(logits, y) + weight * separation, logits
    if energies:
        with _batch_statistics_of_first(len(x), len(x) + len(x_s), model):
            logits, logits_s = model(torch.cat([seen, x_s])).tensor_split([len(x)])
        gap = log_marginal(logits).mean() - log_marginal(logits_s).mean()
        return F.cross_entropy(logits, y) - weight * gap, logits
    logits = model(seen)
    loss = F.cross_entropy(logits, y)
    if name == "mle" and weight:  # weight 0 is exactly `at`: BatchNorm does not see x either
        loss = loss - weight * consistency(model(x), logits, y).mean()
    return loss, logits


@contextmanager
def _batch_statistics_of_first(n: int, total: int, model: nn.Module):
    """In training, BatchNorm normalises by the mean and variance of the first n of total images."""

    def forward(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        first, rest = x.tensor_split([len(x) * n // total])  # a network may fold frames into N
        wide = first.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        scale = norm.weight * (var + norm.eps).rsqrt()
        rest = (rest - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        return torch.cat([type(norm).forward(norm, first), rest.to(x.dtype)])

    with ExitStack() as restore:
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
                plain = type(norm) is nn.BatchNorm2d and norm.affine and "forward" not in vars(norm)
                require(plain, f"jem and jeat need plain BatchNorm2d with weights, not {norm}")
                norm.forward = functools.partial(forward, norm)
                restore.callback(delattr, norm, "forward")
        yield


# ------------------------------------------------ ascent: attack and samplers, their potentials


def _l2(x: Tensor) -> Tensor:
    """The l2 norm of each image, broadcastable to x."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def _unit(g: Tensor) -> Tensor:
    """g / ‖g‖ of each image; 0 if g is 0. Scaled first: squares of small gradients underflow."""
    tiny = torch.finfo(g.dtype).tiny
    g = g / g.abs().amax(tuple(range(1, g.dim())), keepdim=True).clamp_min(tiny)
    return g / _l2(g).clamp_min(tiny)


DIRECTIONS = {"none": lambda g: g, "l2": _unit, "linf": torch.sign}  # d(∇U)


def project(delta: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest point to delta (N, ...) in the l2 or linf ball of radius eps, image by image."""
    _require_one_of(("l2", "linf"), norm, "norm")
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / _l2(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1)


def draw(random: Callable, shape: Sequence[int], generator, like: Tensor) -> Tensor:
    """random(shape) in the dtype and on the device of `like`.

    generator: None, one torch.Generator, a sequence of one per image, or an object whose method
    `draw(random, shape, like)` does it.
    """
    if hasattr(generator, "draw"):
        return generator.draw(random, shape, like)
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return random(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
    n = len(generator)
    require(n == shape[0], f"{shape[0]} images need as many generators, not {n}")
    rows = [random(shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generator]
    return torch.stack(rows).to(like.device) if n else like.new_empty(shape)


def _check_images(x: Tensor, clip: tuple[float, float] | None) -> None:
    """Raise CEMError unless x is a floating-point batch, finite and in the range `clip`: checked on
    the CPU only, as the host would wait for a GPU."""
    batch = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
    require(batch, "x must be a batch of floating-point images: divide uint8 images by 255")
    if x.device.type == "cpu" and x.numel():
        low, high = (value.item() for value in x.detach().aminmax())
        least, most = clip or (-1e38, 1e38)
        ranges = f"[{least:g}, {most:g}], not [{low:.3g}, {high:.3g}]"
        message = f"x must be finite and in {ranges}: cem's models normalise images themselves"
        require(least - 1e-4 <= low and high <= most + 1e-4, message)  # not if NaN


@contextmanager
def _eval_mode(model: nn.Module | None):
    """Eval mode inside the block; restores each module's mode on exit, including exceptions."""
    training = [] if model is None else [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def ascend(
    potential, x, *, steps, step_size, norm="l2", noise=0.0, eps=None, momentum=0.0, clip=(0, 1),
    generator=None, start=None, model=None
) -> Tensor:  # fmt: skip
    """Gradient ascent on a potential: the loop behind the attack, Langevin dynamics and samplers.

        v ← momentum v + d(∇ Σ_i U(x)_i)
        x ← clip(project(x + step_size v + noise ξ)),   ξ ~ N(0, 1)

    potential   x (N, ...) -> U (N,); U_i may depend on other images.
    norm        d: "none" the gradient itself, "l2" scaled to unit length, "linf" its sign.
    noise       standard deviation; √(2 step_size) with norm "none" is Langevin dynamics.
    eps, clip   radius of the ball around x, in `norm`; range of the pixels. None disables.
    generator   of the noise (see `draw`); with one per image, noise does not depend on the batch.
    start       where to begin, if not at x.
    model       put in eval mode during the ascent; by default the module that the potential is, is
                a method of or has as `model`. Else pass it: its BatchNorm statistics would change.

    -> the last iterate, detached. Parameters, their .grad and that model's buffers are unchanged.
    Raises CEMError for options and, on the CPU only, pixels out of range.
    """
    _require_one_of(DIRECTIONS, norm, "norm")
    numbers = (steps, step_size, noise, momentum, 0 if eps is None else eps)
    finite = all(0 <= value < math.inf for value in numbers)
    require(finite, "steps, step_size, noise, momentum and eps must be finite, none negative")
    require(eps is None or norm != "none", "a ball of radius eps needs norm 'l2' or 'linf'")
    _check_images(x, clip)
    center = x.detach()
    x = (x if start is None else start).detach().clone()
    require((x.shape, x.dtype) == (center.shape, center.dtype), "start needs x's shape and dtype")
    velocity = 0
    owner = getattr(potential, "model", getattr(potential, "__self__", None))
    own = [m for m in (potential, owner) if isinstance(m, nn.Module)]
    with _eval_mode(own[0] if own and model is None else model):
        if isinstance(potential, Potential):
            potential = potential.bind()
        for _ in range(steps):
            with torch.enable_grad():
                x.requires_grad_(True)
                u = potential(x)  # more than N if it gathers from processes
                require(u.dim() == 1 and len(u) >= len(x), f"U(x) must be (N,), not {[*u.shape]}")
                require(u.requires_grad, "U(x) has no gradient: is it detached, or inference_mode?")
                (gradient,) = torch.autograd.grad(u.sum(), x)
            velocity = momentum * velocity + DIRECTIONS[norm](gradient)
            x = x.detach() + step_size * velocity
            if noise:
                x = x + noise * draw(torch.randn, x.shape, generator, x)
            if eps is not None:
                x = center + project(x - center, eps, norm)
            if clip is not None:
                x = x.clamp(*clip)
    return x.detach()


def pgd(
    potential, x, *, eps, norm="l2", step_size=None, steps=7, random_start=1.0, generator=None,
    model=None
) -> Tensor:  # fmt: skip
    """Projected gradient ascent in the l2 or linf ball of radius eps around x ([PGD]).

    x (N, C, H, W) in [0, 1], to which iterates are clipped; eps and step_size in the same units.
    step_size defaults to 2.5 eps / steps; the random start is uniform in the ball of random_start
    times eps. Above 1, for a single step, it disables projection: [N-FGSM] is steps=1,
    step_size=eps, random_start=2. generator: for the random start; model: as in `ascend`. -> x_adv.
    """
    _require_one_of(("l2", "linf"), norm, "norm")
    at_least = "steps must be at least 1, eps and random_start finite and at least 0"
    require(steps >= 1 and all(0 <= v < math.inf for v in (eps, random_start)), at_least)
    require(random_start <= 1 or steps == 1, "random_start above 1 is for a single step (N-FGSM)")
    _check_images(x, (0, 1))
    start = x.detach()
    if random_start and eps > 0:
        if norm == "linf":
            delta = 2 * draw(torch.rand, x.shape, generator, x) - 1
        else:  # a uniform direction, and a radius whose d-th power is uniform
            delta = _unit(draw(torch.randn, x.shape, generator, x))
            radius = draw(torch.rand, (len(x), *[1] * (x.dim() - 1)), generator, x)
            delta = delta * radius ** (1 / math.prod(x.shape[1:]))
        start = (start + random_start * eps * delta).clamp(0, 1)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    walk = dict(steps=steps, step_size=step_size, norm=norm, start=start, model=model)
    return ascend(potential, x, eps=eps if random_start <= 1 else None, **walk)


PARAMETRIC_SAMPLERS = {  # (logits f(x, ·), y) -> U(x)
    # log p(y | x) = f(x, y) - LSE_k f(x, k), precise near 0 too: targeted attack
    "ta": lambda logits, y: -F.softplus(log_odds_against(logits, y)),
    "langevin": lambda logits, y: log_marginal(logits),  # log p(x) = LSE_k f(x, k)
    "cs": log_joint,  # log p(x | y) = f(x, y): conditional sampling
    "rcs": lambda logits, y: log_joint(logits, y) + log_marginal(logits),  # reinforced: both
}
PARAMETRIC_ATTACKS = {
    # the gradient of the cross-entropy without its factor 1 - p(y | x), which may underflow
    "ce": log_odds_against,
    "joint": lambda logits, y: -log_joint(logits, y),  # the joint energy E(x, y) ([JEAT])
    "margin": lambda logits, y: (  # max_{k≠y} f(x, k) - f(x, y) ([CW])
        logits.scatter(1, y[:, None], -torch.inf).amax(1) - log_joint(logits, y)
    ),
}


def batch_entropy(z: Tensor, temperature: float) -> Tensor:
    """-log 1/(N-1) Σ_{j≠i} exp f(x_i, x_j) ([CEM] section 4.2). (N, D) -> (N,)."""
    return -log_marginal(_similarity_to_others(z, temperature)) + math.log(len(z) - 1)


def log_density(z: Tensor, temperature: float, bank: Tensor | None, log_p: Tensor | None) -> Tensor:
    """log p(x) + log Z (N,): over a bank (M, D), log 1/M Σ_j exp f(x, x_j); else log_p."""
    if bank is None:
        return log_p
    return log_marginal(similarity(z, bank, temperature)) - math.log(len(bank))


WITHOUT_Y = ("langevin", "maxent")
MARGINAL = ("marginal", "maxent-marginal")  # without y where log p(x) is learned
COUPLED = ("pgd", "maxent", "maxent-marginal")  # U(x_i) depends on the other images of the batch
NON_PARAMETRIC_SAMPLERS = {  # (z = g(x), t = τ, others = g(x'), learned log p(x)) -> U(x)
    "pgd": lambda z, t, others, log_p: info_nce(z, others, t, "none"),
    "maxent": lambda z, t, others, log_p: batch_entropy(z, t),
    "neighbour": lambda z, t, others, log_p: (z * others).sum(1) / t,  # log p(x | x')
    "marginal": log_density,
    "maxent-marginal": lambda z, t, others, p: batch_entropy(z, t) + log_density(z, t, others, p),
}


class Potential:
    """The potential of a sampler or an attack, by its name in the tables above ([CEM] section 4):
    a callable x (N, C, H, W) -> U(x) (N,) with its network as `model`. y is for

    ta, cs, rcs, ce, joint, margin   the labels (N,)
    pgd                              the positives, images (N, C, H, W), embedded once
    neighbour                        embeddings (N, D), one x' per image
    marginal, maxent-marginal        embeddings (M, D) of real images; None: learned log p(x)
    langevin, maxent                 nothing

    COUPLED ones compare the images of a batch. Raises CEMError if name, model and y do not match.
    """

    def __init__(self, name: str, model: nn.Module, y: Tensor | None = None):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.name, self.model, self.y = name, model, y
        formulas = PARAMETRIC_SAMPLERS | PARAMETRIC_ATTACKS | NON_PARAMETRIC_SAMPLERS
        _require_one_of(formulas, name, "potential")
        self.formula = formulas[name]
        labels = self.labelled = name not in NON_PARAMETRIC_SAMPLERS
        kind = "a classifier" if labels else "an encoder with a temperature"
        fits = not isinstance(model, NonParametricCEM) if labels else hasattr(model, "temperature")
        require(fits, f"potential {name!r} is for {kind}, not a {type(model).__name__}")
        what = "the labels" if self.labelled else "the positives" if name == "pgd" else "embeddings"
        without = name in WITHOUT_Y or name in MARGINAL and hasattr(model, "energy")
        require(y is not None or without, f"potential {name!r} needs y, {what}")
        if y is not None and self.labelled:
            head = model.net.fc if isinstance(model, ParametricCEM) else None
            _check_labels(y, getattr(head, "out_features", math.inf))

    def bind(self) -> Callable[[Tensor], Tensor]:
        """U with the positives of "pgd" embedded now, once, by the network as it is."""
        model, y, formula = self.model, self.y, self.formula
        if self.labelled:
            return lambda x: formula(model(x), y)
        learned = self.name in MARGINAL and y is None
        with torch.enable_grad():  # else autocast, before torch 2.11, caches casts without a graph
            others = model(y).detach().clone() if self.name == "pgd" else y  # CUDA graphs overwrite

        def potential(x: Tensor) -> Tensor:
            z, _, log_p = model(x, details=True) if learned else (model(x), None, None)
            return formula(z, model.temperature, others, log_p)

        return potential

    def __call__(self, x: Tensor) -> Tensor:
        return self.bind()(x)


potential = Potential  # the public constructor


def _check_labels(y: Tensor, num_classes: float) -> None:
    """Raise CEMError unless y is int64 (N,) and in range; the range is checked on the CPU only."""
    integers = isinstance(y, Tensor) and y.dtype == torch.int64 and y.dim() == 1
    require(integers, "labels must be an int64 tensor (N,)")
    if y.device.type == "cpu" and len(y):
        require(0 <= y.min() and y.max() < num_classes, f"labels must be in [0, {num_classes})")


# ---------------------------------------------------------------------------------------- seeds


class GaussianSeeds:
    """Starting points of the samplers: x₀ ~ N(μ_y, Σ_y), clipped to [0, 1].

    Fitted to the images of each class y, and to all images for unconditional sampling, as
    Σ ≈ A Aᵀ + Tᵀ diag(s²) T: the leading eigenvectors, and the remaining variance in each
    coefficient of the cosine transform T of the decorrelated channels. At full rank Σ is
    exact. mean (K + 1, D), factor A (K + 1, D, R), residual s (K + 1, D), by default 0; the last
    row is the Gaussian of all images. channels (C, C) rotates the channels.
    """

    def __init__(self, mean: Tensor, factor: Tensor, shape, residual=None, channels=None):
        self.mean, self.factor, self.shape = mean, factor, tuple(shape)
        self.residual = torch.zeros_like(mean) if residual is None else residual
        self.channels = torch.eye(self.shape[0]).to(mean) if channels is None else channels
        self.num_classes = len(mean) - 1
        fits = len(self.shape) == 3 and all(isinstance(n, int) and n > 0 for n in self.shape)
        fits = fits and mean.shape == self.residual.shape == (len(mean), math.prod(self.shape))
        fits &= factor.shape[:-1] == mean.shape and self.channels.shape == 2 * self.shape[:1]
        require(fits, "mean must be (K + 1, C H W), factor (K + 1, C H W, R), shape (C, H, W)")
        tensors = (mean, factor, self.residual, self.channels)
        require(all(v.isfinite().all() for v in tensors), "the seeds must be finite")

    @classmethod
    def fit(
        cls, images: Tensor, labels: Tensor, rank=None, num_classes=None, progress=iter
    ) -> "GaussianSeeds":
        """images (N, C, H, W), uint8 or in [0, 1], at least 2 per class; labels int64 (N,), all 0
        without classes; num_classes None: max + 1; rank None: full, costly; progress: e.g. tqdm."""
        scale = 255 if images.dtype == torch.uint8 else 1
        if scale == 1:
            _check_images(images, (0, 1))
        fits = images.dim() == 4 and len(images) == len(labels) > 1
        require(fits, "the fit needs images (N, C, H, W) and labels (N,), N at least 2")
        _check_labels(labels, math.inf if num_classes is None else num_classes)
        num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        shape, dim = images.shape[1:], images[0].numel()
        rank = min(dim if rank is None else rank, dim, len(images) - 1)
        require(rank >= 1, f"rank must be at least 1, not {rank}")
        fitted = []
        for k in progress([num_classes, *range(num_classes)]):  # all images, then each class
            rows = images if k == num_classes else images[labels == k]
            require(len(rows) > 1, f"class {k} has {len(rows)} images: its seeds need at least 2")
            rows = rows.flatten(1).to(torch.get_default_dtype(), copy=True).div_(scale)
            mean = rows.mean(0)
            centered = rows.sub_(mean).div_((len(rows) - 1) ** 0.5)
            if k == num_classes:
                planes = centered.unflatten(1, (shape[0], -1))
                channels = torch.linalg.eigh((planes @ planes.mT).sum(0).cpu())[1].T.to(mean)
            factor = _principal_factor(centered, rank, seed=k)
            fitted.append((mean, factor, _residual(centered, factor, channels, shape)))
        mean, factor, residual = map(torch.stack, zip(*fitted[1:], fitted[0]))
        return cls(mean, factor, shape, residual, channels)

    def sample(self, labels: int | Tensor, generator=None) -> Tensor:
        """labels (N,): seeds of these classes; an int n: n unconditional ones. -> (N, C, H, W)."""
        if isinstance(labels, int):
            require(labels >= 0, f"the number of seeds must not be negative: {labels}")
            labels = torch.full((labels,), self.num_classes)
        else:
            _check_labels(labels, self.num_classes)
        labels = labels.to(self.mean.device)
        dim, rank = self.factor.shape[1:]
        draws = draw(torch.randn, (len(labels), rank + dim), generator, self.mean)
        x = (draws[:, rank:] * self.residual[labels]).view(-1, *self.shape)
        x = _cosine(x, self.channels, inverse=True).flatten(1) + self.mean[labels]
        of_class = torch.eye(len(self.mean), dtype=x.dtype, device=x.device)[labels]
        x += torch.einsum("nk,nr,kdr->nd", of_class, draws[:, :rank], self.factor)  # no (N, D, R)
        return x.clamp(0, 1).view(-1, *self.shape)

    def state_dict(self, dtype: torch.dtype = torch.float16) -> dict:
        """For a checkpoint: tensors and plain values."""
        names = ("mean", "factor", "residual", "channels")
        return {"shape": list(self.shape)} | {k: getattr(self, k).to(dtype) for k in names}

    @classmethod
    def from_state_dict(cls, state: dict, device="cpu") -> "GaussianSeeds":
        """The inverse of state_dict, in float32 on `device`."""
        try:
            tensors = {k: v.to(device) for k, v in state.items() if k != "shape"}
            floats = len(tensors) == 4 and all(v.is_floating_point() for v in tensors.values())
            require(floats, "seeds need four tensors of floats and a shape")
            return cls(shape=state["shape"], **{k: v.float() for k, v in tensors.items()})
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CEMError("seeds need mean, factor, residual, channels and shape") from error


def _cosine(x: Tensor, channels: Tensor, inverse: bool = False) -> Tensor:
    """T x, or Tᵀ x: rotated channels, orthonormal cosine transform (DCT-II) of rows and columns."""
    transforms = [channels]
    for n in x.shape[2:]:
        i = torch.arange(n, dtype=x.dtype, device=x.device)
        dct = torch.cos(math.pi / n * i[:, None] * (i + 0.5)) * (2 / n) ** 0.5
        dct[0] /= 2**0.5
        transforms.append(dct)
    channels, rows, columns = (t.T for t in transforms) if inverse else transforms
    return torch.einsum("dc,nchw->ndhw", channels, rows @ x @ columns.T)


def _residual(centered: Tensor, factor: Tensor, channels: Tensor, shape) -> Tensor:
    """The standard deviation (D,) of T x of the rows x (N, D), less their part in the span of A."""
    basis = F.normalize(factor, dim=0)
    variance = torch.zeros_like(centered[0])
    for rows in centered.split(1000):
        left = rows - rows @ basis @ basis.T
        variance += _cosine(left.view(-1, *shape), channels).flatten(1).square().sum(0)
    return variance.sqrt()


def _principal_factor(centered: Tensor, rank: int, seed: int) -> Tensor:
    """A (D, rank) with A Aᵀ the best approximation of centeredᵀ centered, padded with zeros."""
    if 4 * rank < min(centered.shape):  # randomised: seconds instead of minutes for 3 x 32 x 32
        with torch.random.fork_rng(devices=[centered.device] if centered.is_cuda else []):
            own = centered.is_cuda and torch.cuda.default_generators[centered.device.index]
            (own or torch.default_generator).manual_seed(seed)
            _, s, v = torch.svd_lowrank(centered, min(rank + 16, *centered.shape), niter=4)
    else:
        _, s, vt = torch.linalg.svd(centered, full_matrices=False)
        v = vt.T
    return F.pad(v * s, (0, max(rank - len(s), 0)))[:, :rank]


# ---------------------------------------------------------------------------------- checkpoints

KINDS = {"ParametricCEM": ParametricCEM, "NonParametricCEM": NonParametricCEM}
NOT_OURS = "not a checkpoint of this project (sample.py and eval_robust.py read third-party ones)"


def write_atomically(path: str | os.PathLike, write: Callable) -> None:
    """write(file) fills a temporary file beside `path`, which is renamed only once it is whole."""
    path = Path(path)
    if path.is_symlink() or path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it exists and is not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.cem-tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk's error, or Ctrl-C
        cause = isinstance(error, RuntimeError) and error.__context__ or error
        failure = OSError(f"cannot write {path}: {cause}")
        raise (failure if isinstance(cause, Exception) else cause) from None
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike, model: nn.Module, **extra) -> None:
    """Write the model and `extra` (tensors, plain values, lists, dicts) atomically.

    copy.deepcopy(model).half() takes half the space; **model.extra keeps what `load` read. Raises
    CEMError for what `load` cannot rebuild: subclasses, folded copies, other shapes (not: strides).
    """
    kind = type(model).__name__
    state, config, rebuilt = model.state_dict(), {}, {}
    if type(model) is KINDS.get(kind):
        config = {k: vars(model).get(k, v) for k, v in model.config.items()}  # a new temperature
        with torch.device("meta"):
            rebuilt = KINDS[kind](**config).state_dict()
    same = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in rebuilt.items()}
    require(same, f"load could not rebuild this {kind} from its config: torch.save its state_dict")
    content = dict(format="cem", kind=kind, config=config, state=state, extra=extra)
    _check_plain(content, "the checkpoint")
    write_atomically(path, lambda file: torch.save(content, file))


def _check_plain(value, name: str) -> None:
    """Raise CEMError unless `load` would read it: tensors, plain values, lists, no subclasses."""
    if type(value) in (list, tuple):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        _check_plain(key, f"a key of {name}")
        _check_plain(item, f"{name}[{key!r}]")
    plain = (dict, OrderedDict, bool, int, float, str, type(None), Tensor, nn.Parameter)
    require(type(value) in plain, f"{name} is a {type(value).__name__}, which load does not read")


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save` wrote, in eval mode on `device`; model.extra, its extra, on the CPU.

    Only tensors and plain values are read; no code in the file runs. Raises CEMError for a file
    that is missing, damaged or not one of this project's.
    """
    require(Path(path).is_file(), f"checkpoint {path} not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        whole = zipfile.is_zipfile(path) and not zipfile.ZipFile(path).testzip()  # checksums
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise CEMError(f"cannot read {path}: it is damaged or {NOT_OURS}") from error
    require(isinstance(content, dict) and content.get("format") == "cem", f"{path} is {NOT_OURS}")
    require(whole, f"{path} is damaged: checksum mismatch")
    try:
        with torch.device("meta"):  # sizes that only the configuration claims cost no memory
            model = KINDS[content["kind"]](**content["config"])
        require(model.config == content["config"], "its configuration is not complete")
        expected, stored = model.state_dict(), content["state"]
        require(not any(v.is_complex() for v in stored.values()), "its weights are complex")
        state = {k: v.to(expected[k].dtype).contiguous() for k, v in stored.items()}
        model.load_state_dict(state, assign=True)
        model.extra = dict(content["extra"])
        finite = all(v.isfinite().all() for v in state.values()) and state["std"].min() > 0
        require(finite, "its weights must be finite, and std positive")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CEMError(f"{path} is a damaged checkpoint: {error}".splitlines()[0]) from error
    return model.to(device).eval()
