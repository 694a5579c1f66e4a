"""Contrastive energy-based models (CEM) in plain PyTorch: networks, log-densities, losses, attack and samplers.

    model = cem.ParametricCEM("resnet18", num_classes=10)            # p(x, y) = exp f(x, y) / Z, f = the logits
    x_adv = cem.pgd(cem.potential("ce", model, y), x, eps=0.5)       # adversarial training's inner maximisation
    loss, _ = cem.supervised_loss("at", model, x, y, x_adv)          # ... and its outer minimisation
    x_new = cem.ascend(cem.potential("rcs", model, y), seeds, steps=8, step_size=0.25)        # draw images

Images are float tensors (N, C, H, W) in [0, 1]; the channel normalisation is a layer of the model. Energies are negative
log-densities: E(x, y) = -f(x, y), E(x) = -LSE_k f(x, k). This file needs torch and torchvision alone: copy it.

Papers: [CEM] Wang et al., ICLR 2022, arXiv:2203.13455; [JEAT] Zhu et al., ICCV 2021, arXiv:2108.09093;
[JEM] Grathwohl et al., ICLR 2020, arXiv:1912.03263; [PGD] Madry et al., ICLR 2018, arXiv:1706.06083;
[CW] Carlini and Wagner, S&P 2017, arXiv:1608.04644.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck


class CEMError(ValueError):
    """Something that the caller can put right; the scripts print it as one line and exit with status 2."""


# ---------------------------------------------------------------------------------------------------- networks


class ResNet(nn.Module):
    """ResNet (He et al., 2016), torchvision's names; stem 3x3 of stride 1; large: ImageNet's, 7x7 of stride 2 and max-pool."""

    def __init__(self, block: type, depths: Sequence[int], width: int, in_channels: int, large: bool = False):
        super().__init__()
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1, self.large = nn.BatchNorm2d(width), large
        channels = width
        for i, depth in enumerate(depths):
            planes, stride, blocks = width * 2**i, 1 if i == 0 else 2, []
            out = planes * block.expansion
            for _ in range(depth):
                shortcut = None
                if stride != 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, stride, shortcut))
                channels, stride = out, 1
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.out_features = channels

    def stages(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, padding=1) if self.large else x
        return [x := layer(x) for layer in (self.layer1, self.layer2, self.layer3, self.layer4)]


class WideBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko and Komodakis, 2016) with their parameter names; its stages: the stem and the three groups."""

    def __init__(self, depth: int, factor: int, width: int, in_channels: int):
        super().__init__()
        channels = [16, *(width * factor // 4 * 2**i for i in range(3))]
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        for i in range(3):
            wide = [WideBlock(channels[i], channels[i + 1], 1 if i == 0 else 2)]
            wide += [WideBlock(channels[i + 1], channels[i + 1], 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"block{i + 1}", nn.Sequential(OrderedDict(layer=nn.Sequential(*wide))))
        self.bn1, self.out_features = nn.BatchNorm2d(channels[-1]), channels[-1]

    def stages(self, x: Tensor) -> list[Tensor]:
        outputs = [x := self.conv1(x), x := self.block1(x), x := self.block2(x)]
        return outputs + [F.relu(self.bn1(self.block3(x)))]


RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3))}
RESNETS |= {"resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3))}
RESNETS |= {"resnet152": (Bottleneck, (3, 8, 36, 3))}
WIDE_RESNETS = ((16, 4), (16, 8), (28, 4), (28, 10), (34, 10), (34, 15), (34, 20), (40, 2), (70, 16))  # depth, factor
ARCHS: dict[str, Callable[[int, int], nn.Module]] = {  # name -> (width, in_channels) -> network
    **{name: functools.partial(ResNet, *shape) for name, shape in RESNETS.items()},
    **{f"{name}-imagenet": functools.partial(ResNet, *shape, large=True) for name, shape in RESNETS.items()},
    **{f"wrn-{depth}-{factor}": functools.partial(WideResNet, depth, factor) for depth, factor in WIDE_RESNETS},
}


class _CEM(nn.Module):
    """What both energy models share: pixel normalisation, the network, its stages and its pooled features."""

    def __init__(self, arch, width, in_channels, mean, std, **config):
        super().__init__()
        if arch not in ARCHS:
            raise CEMError(f"unknown arch {arch!r}: choose one of {', '.join(ARCHS)}")
        self.config = dict(arch=arch, width=width, in_channels=in_channels, **config)
        self.net = ARCHS[arch](width, in_channels)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype()).expand(in_channels)
            self.register_buffer(name, value.reshape(-1, 1, 1).clone())

    def stages(self, x: Tensor) -> list[Tensor]:
        """x (N, C, H, W) in [0, 1] -> the outputs of the network's four stages, each (N, C_s, H_s, W_s)."""
        return self.net.stages((x - self.mean) / self.std)

    def features(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) in [0, 1] -> g(x), the spatially pooled output of the last stage, (N, D)."""
        return self.stages(x)[-1].mean((2, 3)).to(x.dtype)


class ParametricCEM(_CEM):
    """p(x, y) = exp f(x, y) / Z with f(x, y) = g(x)ᵀ w_y + b_y: a classifier read as an energy model ([JEM], [CEM] eq. 3).

    `model(x)` maps x (N, C, H, W) in [0, 1], H, W at least 8, to logits f(x, ·) (N, num_classes) of x's dtype, also under
    autocast. `width`: the stem's channels (the standard: 64); `mean`, `std`: the channel normalisation, in [0, 1] units.
    """

    def __init__(self, arch="resnet18", num_classes=10, width=64, in_channels=3, mean=0.5, std=0.25):
        super().__init__(arch, width, in_channels, mean, std, num_classes=num_classes)
        self.net.fc = nn.Linear(self.net.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.fc(self.features(x)).to(x.dtype)


class NonParametricCEM(_CEM):
    """p(x, x') = exp f(x, x') / Z with f(x, x') = g(x)ᵀ g(x') / τ: a contrastive encoder as an energy model ([CEM] eq. 4).

    `model(x)` maps x (N, C, H, W) in [0, 1], H and W at least 8, to g(x) (N, embed_dim) of unit length, through a two-layer
    projection head; `features(x)` is what lies before it. Other arguments as ParametricCEM's; the temperature is positive.
    """

    def __init__(self, arch="resnet18", embed_dim=128, temperature=0.3, width=64, in_channels=3, mean=0.5, std=0.25):
        if not temperature > 0:
            raise CEMError("the temperature must be positive")
        super().__init__(arch, width, in_channels, mean, std, embed_dim=embed_dim, temperature=temperature)
        self.temperature, dim = temperature, self.net.out_features
        self.net.fc = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net.fc(self.features(x)).to(x.dtype), dim=1)


def folded(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` in eval mode, each BatchNorm that follows a convolution folded into its weights.

    The same function of x up to rounding; attack and sampling run up to twice as fast on it.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        pairs = []  # the names of a convolution and of the norm that is applied to its output
        if isinstance(module, (ResNet, BasicBlock, Bottleneck)):
            pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
        elif isinstance(module, WideBlock):
            pairs = [("conv1", "bn2")]
        elif isinstance(module, nn.Sequential) and isinstance(module[-1], nn.modules.batchnorm._BatchNorm):  # a shortcut
            pairs = [("0", "1")]
        for conv, bn in pairs:
            if isinstance(getattr(module, bn), nn.Identity):  # folded before
                continue
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
            setattr(module, bn, nn.Identity())
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------- log-densities and losses


def log_joint(logits: Tensor, y: Tensor) -> Tensor:
    """log p(x, y) + log Z = f(x, y), which is also log p(x | y) up to a constant. (N, K), (N,) -> (N,)."""
    return logits.gather(1, y[:, None]).squeeze(1)


def log_marginal(logits: Tensor) -> Tensor:
    """log p(x) + log Z = LSE_k f(x, k). (N, K) -> (N,)."""
    return logits.logsumexp(1)


def log_posterior(logits: Tensor, y: Tensor) -> Tensor:
    """log p(y | x) = f(x, y) - LSE_k f(x, k). (N, K), (N,) -> (N,)."""
    return log_joint(logits, y) - log_marginal(logits)


def consistency(logits: Tensor, logits_hat: Tensor, y: Tensor) -> Tensor:
    """f(x, y) - f(x̂, y): its θ-gradient is the first half of the likelihood gradient ([CEM] eq. 10). -> (N,)."""
    return log_joint(logits, y) - log_joint(logits_hat, y)


def contrastive(logits_hat: Tensor, y: Tensor) -> Tensor:
    """f(x̂, y) - E_ŷ f(x̂, ŷ), ŷ ~ p(y | x̂) held fixed: the other half; its θ-gradient is that of log p(y | x̂). -> (N,)."""
    return log_joint(logits_hat, y) - (logits_hat.softmax(1).detach() * logits_hat).sum(1)


def similarity(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """f(x_i, x'_j) = z1_i · z2_j / τ, (N, D), (M, D) -> (N, M): an NP-CEM's logits, the candidates x' in the place of classes.

    log_joint, log_posterior, consistency, contrastive apply to it: data are the partition function's proposals ([CEM] 3.2).
    """
    with torch.autocast(z1.device.type, enabled=False):  # three digits of bfloat16 are too few for a cosine over τ
        return z1 @ z2.T / temperature


def _others(z: Tensor, temperature: float) -> Tensor:
    """f(x_i, x_j) of a batch with itself, (N, D) -> (N, N), -inf on the diagonal: no image is its own candidate."""
    if len(z) < 2:
        raise CEMError("a batch of one image has no others to be compared with: two or more, please")
    return similarity(z, z, temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)


def info_nce(z1: Tensor, z2: Tensor, temperature: float, reduction: str = "mean") -> Tensor:
    """NT-Xent (Chen et al., 2020): -log p(positive | view) among the 2N - 1 other views of the batch.

    z1, z2 (N, D), of unit length, row i of one the positive of row i of the other; the negatives are all other rows of both.
    reduction "mean" -> (), over the 2N views; "none" -> (N,), each pair's mean over its two views.
    """
    if reduction not in ("mean", "none"):
        raise CEMError(f"unknown reduction {reduction!r}: choose 'mean' or 'none'")
    n = len(z1)
    if len(z2) != n or n < 2:
        raise CEMError("InfoNCE needs two views of the same two or more images")
    positives = torch.arange(2 * n, device=z1.device).roll(n)
    losses = -log_posterior(_others(torch.cat([z1, z2]), temperature), positives).view(2, n).mean(0)
    return losses.mean() if reduction == "mean" else losses


@contextmanager
def _statistics_of_the_first(n: int, model: nn.Module):
    """BatchNorms in training normalise all of a batch (N, C, H, W) by mean and variance of its first n images."""

    def forward(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        first, rest = x.tensor_split([n])
        var, mean = torch.var_mean(first.float() if x.dtype == torch.bfloat16 else first, (0, 2, 3), correction=0)
        scale = norm.weight * (var + norm.eps).rsqrt()
        rest = (rest - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        return torch.cat([type(norm).forward(norm, first), rest.to(x.dtype)])

    with ExitStack() as afterwards:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.training:
                norm.forward = functools.partial(forward, norm)
                afterwards.callback(delattr, norm, "forward")
        yield


SUPERVISED_LOSSES = ("st", "at", "mle", "jem", "jeat")


def supervised_loss(name, model, x, y, x_adv=None, weight=0.1, x_s=None) -> tuple[Tensor, Tensor]:
    """The outer minimisation of adversarial and of energy-based training -> (mean loss, logits that the cross-entropy saw).

    st    CE(x, y)
    at    CE(x̂, y), x̂ = x_adv
    mle   CE(x̂, y) + λ [f(x̂, y) - f(x, y)], λ = weight: both halves of the likelihood gradient ([CEM] section 3)
    jem   CE(x, y) + λ [LSE f(x_s) - LSE f(x)], x_s from a ReplayBuffer or, without its term, None; λ = 1 in [JEM]
    jeat  CE(x̂, y) + λ [LSE f(x_s) - LSE f(x̂)], likewise; λ = 1 in [JEAT]

    In the last two, BatchNorm in training normalises x_s too by the data's statistics: by others it could tell it from them.
    """
    if name not in SUPERVISED_LOSSES:
        raise CEMError(f"unknown loss {name!r}: choose one of {', '.join(SUPERVISED_LOSSES)}")
    seen = x if name in ("st", "jem") else x_adv
    if name in ("jem", "jeat"):
        with _statistics_of_the_first(len(x), model):
            logits, logits_s = model(seen if x_s is None else torch.cat([seen, x_s])).tensor_split([len(x)])
        gap = log_marginal(logits).mean() - (0 if x_s is None else log_marginal(logits_s).mean())
        return F.cross_entropy(logits, y) - weight * gap, logits
    logits = model(seen)
    loss = F.cross_entropy(logits, y)
    if name == "mle" and weight:  # with weight 0 the clean images are not even seen by BatchNorm: exactly `at`
        loss = loss - weight * consistency(model(x), logits, y).mean()
    return loss, logits


# ------------------------------------------------------------------------------------------ attack and samplers

PARAMETRIC_SAMPLERS = {  # (logits f(x, ·), y) -> U(x)
    "ta": log_posterior,  # f(x, y) - LSE_k f(x, k) = log p(y | x), the targeted attack
    "langevin": lambda logits, y: log_marginal(logits),  # LSE_k f(x, k): log p(x)
    "cs": log_joint,  # f(x, y): log p(x | y), conditional sampling
    "rcs": lambda logits, y: log_joint(logits, y) + log_marginal(logits),  # log p(x | y) + log p(x), reinforced
}
PARAMETRIC_ATTACKS = {
    "ce": lambda logits, y: -log_posterior(logits, y),  # untargeted PGD: the cross-entropy
    "joint": lambda logits, y: -log_joint(logits, y),  # the joint energy E(x, y) ([JEAT])
    "margin": lambda logits, y: logits.scatter(1, y[:, None], -torch.inf).amax(1) - log_joint(logits, y),  # of [CW]
}

NON_PARAMETRIC_SAMPLERS = {  # (z = g(x), z⁺ = g(y) if y was given, τ) -> U(x)
    "pgd": lambda z, z_plus, temperature: info_nce(z, z_plus, temperature, "none"),  # InfoNCE(x_i, y_i; batch)
    # -log 1/(N-1) Σ_{j≠i} exp f(x_i, x_j): the batch's entropy
    "maxent": lambda z, _, temperature: math.log(len(z) - 1) - log_marginal(_others(z, temperature)),
}


def potential(name: str, model: nn.Module, y: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The scalar potential U of a sampler or an attack, x (N, C, H, W) -> (N,), to be climbed by `ascend` ([CEM] section 4).

    P-CEM, f(x, ·) = model(x): "ta", "langevin", "cs", "rcs", and the attacks "ce", "joint", "margin", the formulas of the
    tables above; y: labels (N,), which "langevin" needs not. NP-CEM, f(x, x') = model(x) · model(x') / τ: "pgd"; y: the
    positives, images (N, C, H, W), held fixed; and "maxent", without y. These two couple the images of a batch.
    Raises CEMError for an unknown name, a missing y, or a model of the other kind.
    """
    formulas = PARAMETRIC_SAMPLERS | PARAMETRIC_ATTACKS | NON_PARAMETRIC_SAMPLERS
    if name not in formulas:
        raise CEMError(f"unknown potential {name!r}: choose one of {', '.join(formulas)}")
    other = ParametricCEM if name in NON_PARAMETRIC_SAMPLERS else NonParametricCEM
    if isinstance(model, other):
        raise CEMError(f"potential {name!r} is not for a {other.__name__}")
    if y is None and name not in ("langevin", "maxent"):
        raise CEMError(f"potential {name!r} needs {'the positives' if name == 'pgd' else 'the labels'} y")
    if other is NonParametricCEM:
        return lambda x: formulas[name](model(x), y)

    @functools.cache
    @torch.no_grad()
    def positives() -> Tensor | None:  # embedded at the first call, when `ascend` has put the model into eval mode
        return None if y is None else model(y)

    return lambda x: formulas[name](model(x), positives(), model.temperature)


def _draw(random: Callable, shape: Sequence[int], generator, like: Tensor) -> Tensor:
    """random(shape) on like's device, from one generator or, row i from generator i, from one an image, or by its `draw`."""
    if hasattr(generator, "draw"):
        return generator.draw(random, shape, like)
    if generator is None or isinstance(generator, torch.Generator):
        where = like.device if generator is None else generator.device
        return random(shape, generator=generator, dtype=like.dtype, device=where).to(like.device)
    return torch.stack([random(shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generator]).to(like.device)


def _l2(x: Tensor) -> Tensor:
    """The l2 norm of each image, shaped to multiply with x."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def project(delta: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest point to delta (N, ...) in the l2 or linf ball of radius eps around 0, image by image."""
    return delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / _l2(delta).clamp_min(1e-12)).clamp(max=1)


# d(∇U): the gradient itself, scaled to unit length, or its sign
DIRECTIONS = {"none": lambda g: g, "l2": lambda g: g / _l2(g).clamp_min(1e-12), "linf": torch.sign}


@contextmanager
def _undisturbed():
    """Modules called inside are in eval mode and frozen (no weight gradients); on exit, by exception too, as they were.
    A forward hook finds them, so that any callable can be a potential."""
    modes, frozen = [], []

    def settle(module, _inputs):
        if module.training:
            modes.append(module)
            module.training = False
        frozen.extend(p.requires_grad_(False) for p in module.parameters(recurse=False) if p.requires_grad)

    hook = register_module_forward_pre_hook(settle)
    try:
        yield
    finally:
        hook.remove()
        for module in modes:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(True)


def ascend(
    potential, x, *, steps, step_size, norm="l2", noise=0.0, eps=None, momentum=0.0, clip=(0, 1), generator=None, start=None
) -> Tensor:
    """Gradient ascent on a potential: the one loop behind attack, Langevin dynamics and all samplers.

        v ← momentum v + d(∇ Σ_i U(x)_i);   x ← clip(project(x + step_size v + noise ξ)),   ξ ~ N(0, 1)

    potential   callable x (N, ...) -> U (N,); images may be coupled. Networks in it run frozen and in eval mode meanwhile.
    norm        d: "none" the gradient itself, "l2" scaled to unit length, "linf" its sign.
    noise       standard deviation; √(2 step_size) with norm "none" is Langevin dynamics proper.
    eps         radius of the ball around x, in `norm` ("l2" or "linf"), in which the iterates stay. None: no ball.
    clip        range of the pixels, None for no clipping.
    generator   of the noise: one, or a sequence of one an image (then an image does not depend on its batch).
    start       where to begin, if not at x.

    Returns the last iterate, detached; parameters, their .grad, BatchNorm statistics and train/eval mode are left as
    they were, also when the potential raises. Raises CEMError for options out of range.
    """
    if norm not in DIRECTIONS:
        raise CEMError(f"unknown norm {norm!r}: choose one of {', '.join(DIRECTIONS)}")
    if steps < 0 or step_size < 0 or noise < 0 or (eps is not None and eps < 0):
        raise CEMError("steps, step_size, noise and eps must not be negative")
    if eps is not None and norm == "none":
        raise CEMError("a ball (eps) needs norm 'l2' or 'linf'")
    center, velocity = x.detach(), 0
    x = center.clone() if start is None else start.detach()
    with _undisturbed(), torch.enable_grad():
        for _ in range(steps):
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(potential(x).sum(), x)
            velocity = momentum * velocity + DIRECTIONS[norm](gradient)
            x = x.detach() + step_size * velocity
            if noise:
                x = x + noise * _draw(torch.randn, x.shape, generator, x)
            if eps is not None:
                x = center + project(x - center, eps, norm)
            if clip is not None:
                x = x.clamp(*clip)
    return x.detach()


def pgd(potential, x, *, eps, norm="l2", step_size=None, steps=7, random_start=True, generator=None) -> Tensor:
    """Projected gradient ascent inside the l2 or linf ball of radius eps (pixel units) around x, and inside [0, 1] ([PGD]).

    x (N, C, H, W) in [0, 1]. step_size defaults to 2.5 eps / steps. The random start is uniform in the ball, then clipped.
    """
    if norm not in ("l2", "linf") or steps < 1:
        raise CEMError(f"pgd needs norm 'l2' or 'linf' and a step at least, not {norm!r} and {steps}")
    start = x.detach()
    if random_start and eps > 0:
        if norm == "linf":
            delta = 2 * _draw(torch.rand, x.shape, generator, x) - 1
        else:
            delta = DIRECTIONS["l2"](_draw(torch.randn, x.shape, generator, x))
            delta = delta * _draw(torch.rand, (len(x), *[1] * (x.dim() - 1)), generator, x) ** (1 / x[0].numel())
        start = (start + eps * delta).clamp(0, 1)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    return ascend(potential, x, steps=steps, step_size=step_size, norm=norm, eps=eps, start=start)


class GaussianSeeds:
    """The samplers' starting points: x₀ ~ N(μ_y, Σ_y + 1e-4 I) fitted to class y, or N(μ, Σ + 1e-4 I) to all images.

    x₀ = clip(μ + A ξ + 0.01 ζ) with A Aᵀ = Σ, exact or, with `rank`, by Σ's leading eigenvectors. mean (K + 1, D),
    factor (K + 1, D, R); row K is the Gaussian of all the images.
    """

    def __init__(self, mean: Tensor, factor: Tensor, shape: Sequence[int]):
        self.mean, self.factor, self.shape = mean, factor, tuple(shape)
        self.num_classes = len(mean) - 1

    @classmethod
    def fit(cls, images: Tensor, labels: Tensor, rank: int | None = None, num_classes: int | None = None):
        """images (N, C, H, W), uint8 or in [0, 1]; labels (N,) in 0..K-1, every class with at least two images."""
        flat, scale = images.flatten(1), 255 if images.dtype == torch.uint8 else 1
        num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        rank, means, factors = min(rank or flat.shape[1], flat.shape[1], len(flat) - 1), [], []
        for k in range(num_classes + 1):
            rows = (flat if k == num_classes else flat[labels == k]).to(torch.get_default_dtype()) / scale
            if len(rows) < 2:
                raise CEMError(f"class {k} has {len(rows)} images: its Gaussian seeds need at least two")
            means.append(rows.mean(0))
            centered = (rows - means[k]) / (len(rows) - 1) ** 0.5
            if 4 * rank < min(centered.shape):  # randomised: seconds instead of minutes for 3 x 32 x 32
                with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
                    torch.manual_seed(k)
                    _, s, v = torch.svd_lowrank(centered, q=min(rank + 16, *centered.shape), niter=4)
            else:
                _, s, vt = torch.linalg.svd(centered, full_matrices=False)
                v = vt.T
            factors.append(F.pad(v * s, (0, max(rank - len(s), 0)))[:, :rank])
        return cls(torch.stack(means), torch.stack(factors), images.shape[1:])

    def sample(self, labels: int | Tensor, generator=None) -> Tensor:
        """labels (N,): x₀ of those classes; an int n: n unconditional ones. -> (N, C, H, W) in [0, 1]."""
        if isinstance(labels, int):
            labels = torch.full((labels,), self.num_classes)
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise CEMError(f"labels must lie in 0..{self.num_classes - 1}")
        labels = labels.to(self.mean.device)
        dim, rank = self.factor.shape[1:]
        draws = _draw(torch.randn, (len(labels), rank + dim), generator, self.mean)
        x = self.mean[labels] + 0.01 * draws[:, rank:]
        for k in labels.unique():  # class by class: gathering a factor an image would take gigabytes
            x[labels == k] += draws[labels == k, :rank] @ self.factor[k].T
        return x.clamp(0, 1).view(-1, *self.shape)

    def state_dict(self, dtype: torch.dtype = torch.float16) -> dict:
        return {"mean": self.mean.to(dtype), "factor": self.factor.to(dtype), "shape": list(self.shape)}

    @classmethod
    def from_state_dict(cls, state: dict, device="cpu"):
        return cls(state["mean"].to(device).float(), state["factor"].to(device).float(), state["shape"])


class ReplayBuffer(nn.Module):
    """Persistent chains of SGLD: images that a training step takes up where an earlier one left them ([JEM] section 4).

    fresh(n, generator) -> (n, C, H, W): where chains begin, and begin anew with probability `reinit` when drawn; by default
    uniform noise; GaussianSeeds.sample is another. `images` (size, C, H, W), in half precision, is a buffer of the module.
    """

    def __init__(self, size: int, shape: Sequence[int], reinit: float = 0.05, fresh: Callable | None = None):
        super().__init__()
        self.reinit = reinit
        self.fresh = fresh or (lambda n, generator: _draw(torch.rand, (n, *shape), generator, self.images).float())
        self.register_buffer("images", torch.empty(0, dtype=torch.float16))
        self.images = self.fresh(size, None).half()

    def sample(self, potential: Callable, n: int, generator: torch.Generator | None = None, **climb) -> Tensor:
        """n chains, distinct ones, climb a potential (`ascend`'s options) and are kept -> x_s (n, C, H, W), detached."""
        index = torch.randperm(len(self.images), generator=generator, device=self.images.device)[:n]
        anew = _draw(torch.rand, (len(index), 1, 1, 1), generator, self.images[:0].float()) < self.reinit
        x = torch.where(anew, self.fresh(len(index), generator), self.images[index].float())
        x = ascend(potential, x, norm="none", generator=generator, **climb)
        self.images[index] = x.half()
        return x


# --------------------------------------------------------------------------------------------------- checkpoints

KINDS = {"ParametricCEM": ParametricCEM, "NonParametricCEM": NonParametricCEM}


def replace(path: str | os.PathLike, write: Callable) -> None:
    """Write a file whole or not at all: `write` fills a temporary one beside it, which then takes its name."""
    (temporary := Path(f"{path}.{os.getpid()}.tmp")).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike, model: nn.Module, *, half: bool = False, **extra) -> None:
    """Write model and `extra` (tensors, plain values, lists, dicts), whole or not at all; half: weights in half precision."""
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in model.state_dict().items()}
    content = {"format": "cem", "kind": type(model).__name__, "config": model.config, "state": state, "extra": extra}
    replace(path, lambda file: torch.save(content, file))


def load(path: str | os.PathLike, device: str | torch.device = "cpu", mean=None, std=None) -> nn.Module:
    """The model in `path`, in eval mode on `device`, with what `save` was given beside it as `model.extra`.

    Other codebases' classifiers are read too, by foreign.py: MadryLab's robustness, RobustBench, torchvision. `mean` and
    `std` then replace the file's channel normalisation, in [0, 1] units; where neither says one it is 0 and 1, and
    `model.extra["normalised"]` is False. Tensors and plain values are read, code in the file does not run. Raises CEMError
    for a file that is missing, damaged or no checkpoint, and for an architecture that cannot be told.
    """
    if not Path(path).is_file():
        raise CEMError(f"no checkpoint at {path}: train one, or name another with --ckpt")
    content = None
    with suppress(Exception):  # damaged, hostile, or of a codebase that pickles more than tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    foreigner = not isinstance(content, dict) or content.get("format") != "cem"
    if (mean is None) != (std is None) or not (foreigner or mean is None):
        raise CEMError("mean and std go together, and are for other codebases' checkpoints")
    if foreigner:
        try:
            import foreign  # here, so that this file works alone for its own checkpoints
        except ImportError as error:
            raise CEMError(f"{path} is no checkpoint of this project (foreign.py reads others, and is not here)") from error
        return foreign.load(path, mean, std).to(device).eval()
    if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():  # torch.load looks at no checksum
        raise CEMError(f"{path} is damaged: its contents do not fit their checksums")
    try:
        model = KINDS[content["kind"]](**content["config"])
        model.load_state_dict(content["state"])
        model.extra = dict(content["extra"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CEMError(f"{path} is a damaged checkpoint: {error}".splitlines()[0]) from error
    return model.to(device).eval()


def export(path: str | os.PathLike, model: ParametricCEM, format: str = "torchvision") -> None:
    """Write a classifier so that other codebases load it: "torchvision" or "robustness" (see foreign.export)."""
    import foreign  # see load

    foreign.export(path, model, format)
