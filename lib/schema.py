"""What the extra of a checkpoint may contain: checked once, when it is read.

dataset        name of a dataset, or path of an image folder
classes        their names, in the order of the labels
image_shape    [C, H, W]
num_images     of its training set
seeds          cem.GaussianSeeds.state_dict(), one Gaussian per class and one of all images
settings       {sampler, with "-cond" for class-wise seeds of an encoder: {steps, step_size, noise,
               norm}}, of the ascent, tuned for these weights
bank           of an encoder: embeddings (M, D) of training images, and their labels (M,), for
               neighbour, marginal and maxent-marginal
clusters       of an encoder's second stage: clusters.ClusterSeeds.state_dict()
options        of the training script, by name
training       what --resume needs: the last, non-averaged weights, optimiser, step, log, chains
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import cem

SETTINGS = ("steps", "step_size", "noise", "norm")  # of an ascent
# of extra["training"]: name -> type
PROGRESS = {"step": int, "restarts": int, "seconds": float, "log": list, "sums": dict}


def load(path: str | Path, device="cpu") -> nn.Module:
    """cem.load, which checks the model; here its extra is checked, too. Raises CEMError."""
    model = cem.load(path, device)
    extra = model.extra
    try:
        _check_data(model, extra)
        _check_bank(model, extra)
        _check_clusters(extra)
        _check_settings(extra.get("settings", {}))
        cem.require(isinstance(extra.get("options", {}), dict), "options must be a dict")
        if "training" in extra:
            cem.require("options" in extra, "training needs the options of its run")
            _check_training(model, extra["training"])
    except cem.CEMError as error:
        raise cem.CEMError(f"{path} is a damaged checkpoint: {error}") from error
    return model


def _check_data(model: nn.Module, extra: dict) -> None:
    cem.require(isinstance(extra.get("dataset", ""), str), "dataset must be a name")
    cem.require(type(extra.get("num_images", 0)) is int, "num_images must be a whole number")
    channels, shape = model.config["in_channels"], extra.get("image_shape")
    if shape is not None:
        sizes = isinstance(shape, list) and len(shape) == 3
        sizes = sizes and all(type(size) is int and size > 0 for size in shape)
        cem.require(sizes and shape[0] == channels, f"image_shape must be [{channels}, H, W]")
    classes = extra.get("classes")
    if classes is not None:
        _check_classes(classes, model.config.get("num_classes"))
    if "seeds" in extra:
        seeds = cem.GaussianSeeds.from_state_dict(extra["seeds"])
        fits = seeds.shape == tuple(shape or seeds.shape) and seeds.shape[0] == channels
        cem.require(fits, f"its seeds have shape {seeds.shape}, not that of its images")
        fits = classes is None or len(classes) == seeds.num_classes
        cem.require(fits, f"it has seeds of {seeds.num_classes} classes, but other class names")


def _check_bank(model: nn.Module, extra: dict) -> None:
    if not extra.get("bank"):  # not measured yet
        return
    cem.require(isinstance(extra["bank"], dict), "its bank must be a dict")
    z, labels = (extra["bank"].get(name) for name in ("embeddings", "labels"))
    wanted = "its bank must have embeddings (M, D), finite, and labels (M,) of its classes"
    fits = _finite(z) and z.is_floating_point() and isinstance(labels, Tensor)
    fits = fits and labels.dtype == torch.int64 and labels.dim() == 1 and len(labels) > 0
    cem.require(fits and z.shape == (len(labels), model.config.get("embed_dim")), wanted)
    cem.require(0 <= labels.min() and labels.max() < len(extra.get("classes") or []), wanted)


def _check_clusters(extra: dict) -> None:
    if "clusters" not in extra:
        return
    clusters = extra["clusters"]
    found = isinstance(clusters, dict) and clusters.keys() == {"seeds", "shares"}
    cem.require(found and isinstance(clusters["seeds"], dict), "its clusters need seeds and shares")
    seeds, shares = cem.GaussianSeeds.from_state_dict(clusters["seeds"]), clusters["shares"]
    fits = _finite(shares) and shares.shape == (seeds.num_classes,) and len(shares) > 0
    fits = fits and 0 <= shares.min()
    fits = fits and shares.is_floating_point() and abs(shares.sum() - 1) < 1e-3
    cem.require(bool(fits), f"its clusters need {seeds.num_classes} shares that sum to 1")
    same = list(seeds.shape) == extra.get("image_shape")
    cem.require(same, "its clusters have other images' shape")


def _check_classes(classes: object, wanted: int | None) -> None:
    """Names of classes name folders (sample.py --png)."""
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    cem.require(names and len(classes) > 0, "classes must be a list of names")
    cem.require(len(set(classes)) == len(classes), "its class names repeat")
    fits = wanted is None or len(classes) == wanted
    cem.require(fits, f"it has {len(classes)} class names, but {wanted} logits")
    for name in classes:
        path = name in ("", ".", "..") or "/" in name or "\0" in name
        cem.require(not path, f"the class name {name!r} must be a name, not a path")


def _check_settings(settings: object) -> None:
    """The ascent's options that sample.py takes from here in place of its own defaults."""
    wanted = "its settings must be {sampler: {steps, step_size, noise, norm}} with values in range"
    cem.require(isinstance(settings, dict), wanted)
    for setting in settings.values():
        named = isinstance(setting, dict) and setting.keys() == set(SETTINGS)
        cem.require(named and setting["norm"] in cem.DIRECTIONS, wanted)
        numbers = [setting["steps"], setting["step_size"], setting["noise"]]
        fits = all(type(value) in (int, float) and 0 <= value < 2**31 for value in numbers)
        cem.require(fits and type(numbers[0]) is int and numbers[0] and numbers[1], wanted)


def _check_training(model: nn.Module, training: object) -> None:
    cem.require(isinstance(training, dict), "its training state must be a dict")
    for name, kind in PROGRESS.items():
        cem.require(isinstance(training.get(name), kind), f"its training state has no {name}")
    cem.require(type(training.get("restarted_at", 0)) is int, "restarted_at must be a step")
    numbers = [training[name] for name in ("step", "restarts", "seconds")]
    numbers += training["sums"].values()
    valid = all(isinstance(v, (int, float)) and -(2**63) < v < 2**63 for v in numbers)  # no NaN
    cem.require(valid and min(numbers[:3]) >= 0, "step, restarts and sums must be finite numbers")
    lines = all(isinstance(line, dict) for line in training["log"])
    cem.require(lines, "its log must be a list of dicts")
    state, expected = training.get("model"), model.state_dict()
    fits = _like(state, expected)
    cem.require(fits, "its last weights differ from the network, or are not finite")
    optimizer = training.get("optimizer")
    found = isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict)
    cem.require(found, "its training state has no optimiser")
    parameters = list(model.parameters())
    for i, entry in optimizer["state"].items():
        known = isinstance(i, int) and 0 <= i < len(parameters) and isinstance(entry, dict)
        tensors = {k: v for k, v in entry.items() if v is not None} if known else {}
        fits = known and _like(tensors, dict.fromkeys(tensors, parameters[i]))
        cem.require(fits, "its optimiser state differs from the network, or is not finite")
    chains = training.get("chains", {})
    finite = isinstance(chains, dict) and all(_finite(rows) for rows in chains.values())
    cem.require(finite, "its chains must be finite tensors")


def _finite(value: object) -> bool:
    return isinstance(value, Tensor) and bool(value.isfinite().all())


def _like(state: object, expected: dict) -> bool:
    """Whether a state dict has the names and shapes of another one, and finite values."""
    if not isinstance(state, dict) or state.keys() != expected.keys():
        return False
    return all(_finite(v) and v.shape == expected[k].shape for k, v in state.items())
