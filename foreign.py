"""Classifiers of other codebases: read into a ParametricCEM (through cem.load), and written for them (cem.export).

    model = cem.load("cifar_l2_0_5.pt")                          # MadryLab's robustness
    model = cem.load("Rice2020.pt", mean=0, std=1)               # RobustBench's: images as they are, most of the time
    cem.export("net.pt", model, "torchvision")

Known are ResNet-18, -34, -50, -101, -152, with a stem for small images or ImageNet's, of any width, and the Wide ResNets of
Zagoruyko and Komodakis (2016) in cem.WIDE_RESNETS. Architecture and class count come from the tensors' shapes.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import cem

PREFIXES = re.compile(r"^(module\.|model\.|net\.|_orig_mod\.)+")
NORMALISERS = {"mean": ("new_mean", "mean", "mu"), "std": ("new_std", "std", "sigma")}  # a buffer's own name


class _Calls(type):
    pass


class _Inert(metaclass=_Calls):
    """Stands for every foreign class and function in a pickle: made, called and filled, it does nothing and stays itself."""

    def __new__(cls, *args, **kwargs):
        return cls

    @classmethod
    def __setstate__(cls, state):
        pass


def read(path: Path) -> object:
    """torch.load(weights_only=True), for files that hold more than tensors too: what is no tensor and no plain value becomes
    _Inert, and no code of the file runs. Raises CEMError for a file that even so cannot be read."""
    known = [(_Calls, "foreign._Calls")]
    while True:
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can fail in any way
            name = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            if not name or (_Inert, name[1]) in known:
                reason = f"PyTorch's safe reader cannot read it ({type(error).__name__})"
                hint = "if you trust a file that it refuses, torch.save its state dict alone"
                raise cem.CEMError(f"{path} is damaged, or no checkpoint: {reason}; {hint}") from error
            known += [(_Inert, name[1]), (_Inert, f"builtins.{name[1]}")]


def state_dicts(content: object) -> Iterator[dict[str, Tensor]]:
    """The dictionaries in a file's content that hold a network's tensors, outermost first."""
    if isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if any(key.endswith("conv1.weight") for key in tensors):
            yield tensors
        for value in content.values():
            yield from state_dicts(value)


def plain_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the network's tensors under torchvision's names (Wide ResNet: its authors'), and mean and std where there are."""
    network, normalisation = {}, {}
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        kind = next((kind for kind, names in NORMALISERS.items() if name in names), None)
        if "attacker." in key or "sub_block1." in key:  # robustness stores all twice, TRADES a block that it does not use
            continue
        if kind:
            normalisation[kind] = value.float().flatten()
        else:
            key = PREFIXES.sub("", key).replace(".shortcut.", ".downsample.")
            network[re.sub(r"^linear\.", "fc.", key)] = value
    return network, normalisation


def architecture(state: dict[str, Tensor]) -> dict:
    """The arguments of ParametricCEM, from the shapes. Raises CEMError where they fit no known architecture."""

    def blocks(name: str) -> int:
        return len({key.split(".")[name.count(".")] for key in state if key.startswith(name)})

    try:
        stem, classes = state["conv1.weight"], len(state["fc.weight"])
        config = dict(num_classes=classes, width=stem.shape[0], in_channels=stem.shape[1])
        if "layer1.0.conv1.weight" in state:
            block = cem.Bottleneck if "layer1.0.conv3.weight" in state else cem.BasicBlock
            shape = block, tuple(blocks(f"layer{i}.") for i in (1, 2, 3, 4))
            arch = next(name for name, known in cem.RESNETS.items() if known == shape)
            config["arch"] = arch + "-imagenet" * (stem.shape[2] == 7)
        else:
            depth, factor = 6 * blocks("block1.layer.") + 4, state["block1.layer.0.conv1.weight"].shape[0] // 16
            config |= dict(arch=f"wrn-{depth}-{factor}", width=64)
        with torch.device("meta"):
            expected = cem.ParametricCEM(**config).net.state_dict()
    except (KeyError, StopIteration, cem.CEMError) as error:
        raise cem.CEMError("its architecture cannot be told: it is no ResNet or Wide ResNet that is known here") from error
    for key in sorted(k for k in expected.keys() | state.keys() if not k.endswith("num_batches_tracked")):
        there, wanted = (tuple(s[key].shape) if key in s else "nothing" for s in (state, expected))
        if there != wanted:
            near = f"it is nearest to {config['arch']}, which has {wanted} as {key}, not {there}"
            raise cem.CEMError(f"its architecture cannot be told: {near}")
    return config


def load(path: Path, mean=None, std=None) -> cem.ParametricCEM:
    """See cem.load."""
    state = next(state_dicts(read(path)), None)
    if state is None:
        raise cem.CEMError(f"{path} is no checkpoint of this project, and holds no state dict of a ResNet or Wide ResNet")
    network, found = plain_names(state)
    if "fc.weight" in network:
        network.setdefault("fc.bias", torch.zeros(len(network["fc.weight"])))
    try:
        config = architecture(network)
    except cem.CEMError as error:
        raise cem.CEMError(f"{path}: {error}") from error
    if mean is not None and std is not None:
        found = {"mean": mean, "std": std}
    told = found.keys() == NORMALISERS.keys()
    try:
        model = cem.ParametricCEM(**config, **(found if told else {"mean": 0.0, "std": 1.0}))
    except RuntimeError as error:  # from expanding the normalisation
        raise cem.CEMError(f"mean and std must be one number, or one for each of {config['in_channels']} channels") from error
    model.net.load_state_dict(network)
    model.extra = {"foreign": True, "normalised": told}
    return model


def export(path: str | Path, model: cem.ParametricCEM, format: str = "torchvision") -> None:
    """Write the weights of a classifier, whole or not at all, for other codebases.

    torchvision   a bare state dict under torchvision's names, as RobustBench's are; `torchvision.models.resnet18` and its
                  like load it where the width is 64 (with a 3x3 conv1 and no maxpool, but for "-imagenet"). A bare state dict
                  has no normalisation: images go in as (x - model.mean) / model.std.
    robustness    as MadryLab's robustness writes: its names, its normaliser, the network in the attacker too. ResNets only.

    Raises CEMError for another format, for an encoder, and for a Wide ResNet as "robustness".
    """
    if format not in ("torchvision", "robustness"):
        raise cem.CEMError(f"unknown format {format!r}: choose 'torchvision' or 'robustness'")
    if not isinstance(model, cem.ParametricCEM) or any(isinstance(m, nn.Identity) for m in model.modules()):
        raise cem.CEMError("only classifiers are exported, and not folded ones")
    state, arch = {k: v.detach().cpu() for k, v in model.net.state_dict().items()}, model.config["arch"]
    if format == "robustness":
        if arch not in cem.ARCHS or arch.startswith("wrn"):
            raise cem.CEMError("robustness has no Wide ResNet: export it as 'torchvision'")
        if not arch.endswith("-imagenet"):  # its networks for small images have names of their own
            state = {re.sub(r"^fc\.", "linear.", k.replace(".downsample.", ".shortcut.")): v for k, v in state.items()}
        mean, std = (b.detach().cpu() for b in (model.mean, model.std))
        buffers = {f"{n}.new_{k}": v for n in ("normalizer", "attacker.normalize") for k, v in (("mean", mean), ("std", std))}
        networks = {f"{owner}.{k}": v for owner in ("model", "attacker.model") for k, v in state.items()}
        state = {"model": {f"module.{k}": v for k, v in (buffers | networks).items()}, "epoch": 0}
    cem.replace(path, lambda file: torch.save(state, file))
