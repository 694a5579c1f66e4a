"""Third-party checkpoints: reading classifiers of other codebases, and writing for them.

    model = interop.load("cifar_l2_0_5.pt")              # MadryLab's robustness
    model = interop.load("Carmon2019.pt", mean=0, std=1) # RobustBench; most take raw pixels
    interop.export("net.pt", model, "torchvision")

Supported are ResNet-14 (of cem.RESNETS), -18, -34, -50, -101 and -152 of any width, with a 3x3 stem
of stride 1 and no max-pooling or with ImageNet's stem, and the Wide ResNets of cem.WIDE_RESNETS
(Zagoruyko and Komodakis, 2016). Architecture and number of classes are inferred from the tensors'
shapes. Shapes do not show everything, such as another activation or max-pooling after a 3x3 stem:
check the accuracy.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import cem
from lib import schema
from lib.cli import warn

State = dict[str, Tensor]

NORMALISERS = {  # name of a buffer in other codebases -> name in ours
    "new_mean": "mean", "mean": "mean", "mu": "mean",
    "new_std": "std", "std": "std", "sigma": "std",
}  # fmt: skip
# which state dict to take from a file with several
PREFERRED = ("state_dict", "model", "model_state_dict", "net", "last")


# --------------------------------------------------------------------------------------- reading


def load(path: str | Path, device="cpu", mean=None, std=None) -> nn.Module:
    """The model of any checkpoint, ours (schema.load) or third-party, in eval mode on `device`.

    For a third-party classifier, model.extra["third_party"] is True, and `mean` and `std` (one
    number or one per channel, in [0, 1]) replace the file's channel normalisation. Without either,
    pixels are not normalised and model.extra["normalised"] is False. Only tensors and plain values
    are read; no code in the file runs. Raises CEMError for a file that is missing, damaged or of
    unknown architecture.
    """
    cem.require(Path(path).is_file(), f"checkpoint {path} not found")
    ours = is_ours(path)
    cem.require((mean is None) == (std is None), "mean and std must be given together")
    fits = mean is None or not ours
    cem.require(fits, f"mean and std are for third-party checkpoints, which {path} is not")
    if ours:
        return schema.load(path, device)
    given = {} if mean is None else {"mean": mean, "std": std}
    content = read(path)
    try:
        model = third_party_model(state_dict(content), given)
    except cem.CEMError as error:
        raise cem.CEMError(f"{path}: {error}") from error
    return model.to(device).eval()


def is_ours(path: str | Path) -> bool:
    """Whether cem.save wrote the file; cem.load then checks it for damage."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged, hostile, or with objects other than tensors
        return False
    return isinstance(content, dict) and content.get("format") == "cem"


class Meta(type):
    """The type of Inert: PyTorch's reader restores the state of allowed types only."""


class Inert(metaclass=Meta):
    """Replaces every class and function that a file names. Calls and state have no effect."""

    def __new__(cls, *args, **kwargs):
        return cls

    @classmethod
    def __setstate__(cls, state):
        pass


def read(path: str | Path) -> object:
    """torch.load(weights_only=True), also for files that contain more than tensors.

    Objects other than tensors and plain values become Inert; no code in the file runs. Raises
    CEMError for a file that cannot be read in this way.
    """
    allowed = [(Meta, "\n")]  # a name that no file can refer to
    for _ in range(1000):
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can fail in any way
            refused = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            if not refused or (Inert, refused[1]) in allowed:
                reason = f"PyTorch's safe reader cannot read it ({type(error).__name__})"
                advice = "if you trust the file, torch.save its state dict alone"
                raise cem.CEMError(
                    f"{path} is damaged or not a checkpoint: {reason}; {advice}"
                ) from error
            name = refused[1]  # without the prefix "builtins.", which the file may have
            allowed += [(Inert, name), (Inert, f"builtins.{name}")]
    raise cem.CEMError(f"{path} contains too many objects other than tensors")


def state_dicts(content: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """The (name, state dict) of each network in a file's content, up to four levels deep."""
    if not isinstance(content, dict) or depth == 4:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if any(key.endswith("conv1.weight") for key in tensors):
        yield name, tensors
    for key, value in content.items():
        yield from state_dicts(value, str(key), depth + 1)


def state_dict(content: object) -> State:
    """The network in a file's content. Raises CEMError if there is none or it is ambiguous."""
    found = list(state_dicts(content))
    for preferred in PREFERRED:
        for name, state in found:
            if name == preferred:
                return state
    cem.require(
        bool(found), "no state dict of a supported network found: torch.save model.state_dict()"
    )
    if len(found) > 1:
        names = ", ".join(repr(name) for name, _ in found)
        raise cem.CEMError(f"contains several networks ({names}): torch.save one of them alone")
    return found[0][1]


def third_party_model(state: State, given: dict) -> cem.ParametricCEM:
    """The classifier with these weights. given: a mean and std that replace those in `state`."""
    network, normalisation = rename(state)
    config = architecture(network)
    if given:
        normalisation = {k: torch.as_tensor(v).float().flatten() for k, v in given.items()}
    normalised = normalisation.keys() == {"mean", "std"}
    if not normalised:
        normalisation = {"mean": torch.zeros(1), "std": torch.ones(1)}
    inside = all(((v >= 0) & (v <= 1)).all() for v in normalisation.values())
    cem.require(inside, "mean and std must be in [0, 1], the range of pixels")
    model = cem.ParametricCEM(**config, **normalisation)
    cem.require(not any(v.is_complex() for v in network.values()), "its weights are complex")
    try:
        network = {name: value.to_dense().float() for name, value in network.items()}
        model.net.load_state_dict(network)
    except RuntimeError as error:  # of an unusual layout, type or shape
        raise cem.CEMError(f"cannot use its weights: {error}") from error
    cem.require(all(v.isfinite().all() for v in network.values()), "its weights are not finite")
    model.extra = {"third_party": True, "normalised": normalised}
    return model


def rename(state: State) -> tuple[State, State]:
    """The network's tensors under the names that cem uses, and its mean and std if present.

    The network is the one with the outermost conv1: robustness stores a second copy in its
    attacker. Raises CEMError if there are several.
    """
    stems = [key.removesuffix("conv1.weight") for key in state if key.endswith("conv1.weight")]
    least = min(stem.count(".") for stem in stems)
    prefix, *others = (stem for stem in stems if stem.count(".") == least)
    cem.require(not others, f"contains several networks: {', '.join([prefix, *others])}")
    network, normalisation = {}, {}
    for key, value in state.items():
        buffer = key.rpartition(".")[2]
        if buffer in NORMALISERS:
            normalisation[NORMALISERS[buffer]] = value.float().flatten()
        elif key.startswith(f"{prefix}sub_block1."):
            continue  # a block of TRADES' Wide ResNet that its forward pass does not use
        elif key.startswith(prefix):
            name = key.removeprefix(prefix).replace(".shortcut.", ".downsample.")
            network[re.sub(r"^linear\.", "fc.", name)] = value
    return network, normalisation


def architecture(state: State) -> dict:
    """ParametricCEM's arguments for these tensors. Raises CEMError if no architecture fits."""
    try:
        config = guess_config(state)
        with torch.device("meta"):
            expected = cem.ParametricCEM(**config).net.state_dict()
    except (KeyError, IndexError, TypeError, RuntimeError, cem.CEMError) as error:
        message = "unknown architecture: not a supported ResNet or Wide ResNet"
        raise cem.CEMError(message) from error
    for key in sorted(expected.keys() | state.keys()):
        if key.endswith("num_batches_tracked"):
            continue
        wanted = tuple(expected[key].shape) if key in expected else "absent"
        found = tuple(state[key].shape) if key in state else "absent"
        if found != wanted:
            nearest = f"the nearest is {config['arch']}, where {key} is {wanted}, not {found}"
            raise cem.CEMError(f"unknown architecture: {nearest}")
    return config


def guess_config(state: State) -> dict:
    """ParametricCEM's arguments, from the shapes of a few tensors that are assumed to exist."""
    stem = state["conv1.weight"]
    classes = len(state["fc.weight"])
    config = dict(num_classes=classes, width=stem.shape[0], in_channels=stem.shape[1])
    if "layer4.0.conv1.weight" in state:
        block = cem.Bottleneck if "layer4.0.conv3.weight" in state else cem.BasicBlock
        depths = tuple(count_blocks(state, f"layer{i}.") for i in (1, 2, 3, 4))
        names = {shape: name for name, shape in cem.RESNETS.items()}
        suffix = "-imagenet" if stem.shape[2] == 7 else ""
        return config | {"arch": names[block, depths] + suffix}
    depth = 6 * count_blocks(state, "block1.layer.") + 4
    factor = state["block1.layer.0.conv1.weight"].shape[0] // 16
    return config | {"arch": f"wrn-{depth}-{factor}", "width": 64}


def count_blocks(state: State, prefix: str) -> int:
    """The number of different i among the keys "<prefix><i>.…"."""
    position = prefix.count(".")
    return len({key.split(".")[position] for key in state if key.startswith(prefix)})


def normalise(model: nn.Module, path: str | Path, train_set) -> None:
    """Give a third-party model without a normalisation that of the training images; print it."""
    if model.extra.get("normalised", True):
        return
    for name, value in train_set.normalisation().items():
        getattr(model, name).copy_(value.view(-1, 1, 1))
    mean = " ".join(f"{v:.4f}" for v in model.mean.flatten().tolist())
    std = " ".join(f"{v:.4f}" for v in model.std.flatten().tolist())
    print(f"{path} has no pixel normalisation: using that of {train_set.name},")
    print(f"--mean {mean} --std {std}; many RobustBench models need --mean 0 --std 1")


@torch.no_grad()
def check_third_party(model: nn.Module, path: Path, train_set) -> None:
    """Check a third-party model, once it is normalised, on 500 of its training images: prints its
    accuracy, with a warning if it is low."""
    normalise(model, path, train_set)
    index = train_set.evenly_spaced(500)
    logits = [model(train_set.pixels(part).to(model.mean.device)) for part in index.split(100)]
    predicted = torch.cat(logits).argmax(1).cpu()
    accuracy = (predicted == train_set.labels[index].cpu()).float().mean()
    print(f"accuracy on {len(index)} training images of {train_set.name}: {accuracy:.0%}")
    if accuracy < 0.5:
        warn(
            "this accuracy is low: compare --mean, --std, the order of the classes and the "
            "forward pass with the checkpoint's codebase"
        )


# --------------------------------------------------------------------------------------- writing


def export(path: str | Path, model: cem.ParametricCEM, format: str = "torchvision") -> None:
    """Write the weights of a classifier for other codebases, atomically.

    torchvision: a bare state dict with torchvision's names, as RobustBench has it. Networks such
    as `torchvision.models.resnet18` load it if the width is 64; unless the arch is "-imagenet",
    they need a 3x3 conv1 and no maxpool. It has no normalisation: the input is
    (x - model.mean) / model.std.
    robustness: MadryLab's format, with its names, its normaliser and a second copy of the network
    in its attacker. ResNets only.

    Raises CEMError for any other format, an encoder, a folded model, and a Wide ResNet as
    "robustness".
    """
    if format not in ("torchvision", "robustness"):
        raise cem.CEMError(f"unknown format {format!r}: choose 'torchvision' or 'robustness'")
    folded = any(isinstance(module, nn.Identity) for module in model.modules())
    if not isinstance(model, cem.ParametricCEM) or folded:
        raise cem.CEMError("only classifiers can be exported, and only unfolded ones")
    content = {key: value.detach().cpu() for key, value in model.net.state_dict().items()}
    if format == "robustness":
        content = robustness_content(model, content)
    cem.write_atomically(path, lambda file: torch.save(content, file))


def robustness_content(model: cem.ParametricCEM, state: State) -> dict:
    """What robustness saves of its AttackerModel in DataParallel."""
    arch = model.config["arch"]
    if arch.startswith("wrn"):
        raise cem.CEMError("robustness has no Wide ResNet: export it as 'torchvision'")
    mean, std = model.mean.detach().cpu(), model.std.detach().cpu()
    content = {}
    for normaliser in ("normalizer", "attacker.normalize"):
        content[f"module.{normaliser}.new_mean"] = mean
        content[f"module.{normaliser}.new_std"] = std
    for owner in ("model", "attacker.model"):
        for key, value in state.items():
            if not arch.endswith("-imagenet"):  # its networks for small images use other names
                key = re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))
            content[f"module.{owner}.{key}"] = value
    return {"model": content, "epoch": 0}
