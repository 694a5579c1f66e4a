"""Classifiers of other codebases: read into a ParametricCEM (through cem.load), and written for them (cem.export).

    model = cem.load("cifar_l2_0_5.pt")                          # MadryLab's robustness
    model = cem.load("Carmon2019.pt", mean=0, std=1)             # RobustBench's: images as they are, most of the time
    cem.export("net.pt", model, "torchvision")

Known are ResNet-18, -34, -50, -101, -152 of any width, with a 3x3 stem of stride 1 and no max-pool or with ImageNet's stem,
and the Wide ResNets of Zagoruyko and Komodakis (2016) in cem.WIDE_RESNETS. Architecture and class count come from the tensors'
shapes; what shapes do not tell (another activation, a max-pool behind a 3x3 stem) is not seen: check the accuracy.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import cem

NORMALISERS = {"mean": ("new_mean", "mean", "mu"), "std": ("new_std", "std", "sigma")}  # a buffer's own name
PREFERRED = ("state_dict", "model", "model_state_dict", "net", "last")  # where a file holds several state dicts


def read(path: Path) -> object:
    """torch.load(weights_only=True), for files that hold more than tensors too: what is neither tensor nor plain value becomes
    an inert class, and no code of the file runs. Raises CEMError for a file that even so cannot be read."""

    class Meta(type):
        pass

    class Inert(metaclass=Meta):
        """Stands for every foreign class and function: made, called and filled, it does nothing and stays itself."""

        def __new__(cls, *args, **kwargs):
            return cls

        @classmethod
        def __setstate__(cls, state):
            pass

    known = [(Meta, "\n")]  # by a name that no file can spell
    for _ in range(1000):
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can fail in any way
            name = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            if not name or (Inert, name[1]) in known:
                reason = f"PyTorch's safe reader cannot read it ({type(error).__name__})"
                hint = "if you trust a file that it refuses, torch.save its state dict alone"
                raise cem.CEMError(f"{path} is damaged, or no checkpoint: {reason}; {hint}") from error
            known += [(Inert, name[1]), (Inert, f"builtins.{name[1]}")]
    raise cem.CEMError(f"{path} holds too many things that are no tensors")


def state_dicts(content: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, dictionary) of those in a file's content that hold a network's tensors, to a depth of four."""
    if isinstance(content, dict) and depth < 4:
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if any(key.endswith("conv1.weight") for key in tensors):
            yield name, tensors
        for key, value in content.items():
            yield from state_dicts(value, str(key), depth + 1)


def state_dict(content: object) -> dict[str, Tensor]:
    """The one network in a file's content. Raises CEMError where there is none, or several and no telling which."""
    found = list(state_dicts(content))
    if len(found) > 1:
        found = [row for name in PREFERRED for row in found if row[0] == name][:1] or found
    if len(found) != 1:
        names = ", ".join(repr(name) for name, _ in found)
        several = f"holds several networks ({names}): torch.save the one"
        raise cem.CEMError(several if found else "holds no state dict of a ResNet or Wide ResNet that is known here")
    return found[0][1]


def plain_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the network's tensors under torchvision's names (Wide ResNet: its authors'), and mean and std where there are.

    The network is what lies beside the outermost conv1: robustness stores a second one in its attacker.
    """
    stem = min((key for key in state if key.endswith("conv1.weight")), key=len, default="")
    prefix, network, normalisation = stem.removesuffix("conv1.weight"), {}, {}
    for key, value in state.items():
        kind = next((kind for kind, names in NORMALISERS.items() if key.rpartition(".")[2] in names), None)
        if kind:
            normalisation[kind] = value.float().flatten()
        elif key.startswith(prefix) and not key.startswith(f"{prefix}sub_block1."):  # TRADES has a block that it does not use
            name = key.removeprefix(prefix).replace(".shortcut.", ".downsample.")
            network[re.sub(r"^linear\.", "fc.", name)] = value
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
    except (KeyError, IndexError, TypeError, RuntimeError, StopIteration, cem.CEMError) as error:
        raise cem.CEMError("its architecture cannot be told: it is no ResNet or Wide ResNet that is known here") from error
    for key in sorted(k for k in expected.keys() | state.keys() if not k.endswith("num_batches_tracked")):
        there, wanted = (tuple(s[key].shape) if key in s else "nothing" for s in (state, expected))
        if there != wanted:
            near = f"it is nearest to {config['arch']}, which has {wanted} as {key}, not {there}"
            raise cem.CEMError(f"its architecture cannot be told: {near}")
    return config


def load(path: Path, mean=None, std=None) -> cem.ParametricCEM:
    """See cem.load."""
    try:
        network, found = plain_names(state_dict(read(path)))
        config = architecture(network)
    except cem.CEMError as error:
        raise cem.CEMError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if mean is not None:
        found = {kind: torch.as_tensor(value).float().flatten() for kind, value in (("mean", mean), ("std", std))}
    told = found.keys() == NORMALISERS.keys()
    found = found if told else {"mean": torch.zeros(1), "std": torch.ones(1)}
    fits = all(len(value) in (1, config["in_channels"]) for value in found.values())
    if not fits or not (
        0 <= found["mean"].min() and found["mean"].max() <= 1 and 0 < found["std"].min() <= found["std"].max() <= 1
    ):
        raise cem.CEMError(f"{path}: mean and std must be one number, or one a channel, in [0, 1]; std not 0")
    model = cem.ParametricCEM(**config, **found)
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
