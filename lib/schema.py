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
    # most are of values of other types than expected
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise cem.CEMError(f"{path} is a damaged checkpoint: {error}".splitlines()[0]) from error
    return model


def _check_data(model: nn.Module, extra: dict) -> None:
    cem.require(isinstance(extra.get("dataset", ""), str), "dataset must be a name")
    cem.require(type(extra.get("num_images", 0)) is int, "num_images must be a whole number")
    channels, shape = model.config["in_channels"], extra.get("image_shape")
    if shape is not None:
        sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
        fits = sizes and len(shape) == 3 and shape[0] == channels
        cem.require(fits, f"image_shape must be [{channels}, H, W]")
    classes = extra.get("classes")
    if classes is not None:
        _check_classes(classes, model.config.get("num_classes", len(classes)))
    if "seeds" in extra:
        seeds = cem.GaussianSeeds.from_state_dict(extra["seeds"])
        fits = seeds.shape == tuple(shape or seeds.shape) and seeds.shape[0] == channels
        cem.require(fits, f"its seeds have shape {seeds.shape}, not that of its images")
        fits = classes is None or len(classes) == seeds.num_classes
        cem.require(fits, f"it has seeds of {seeds.num_classes} classes, but other class names")


def _check_classes(classes: list[str], wanted: int) -> None:
    """Names of classes name folders (sample.py --png)."""
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    cem.require(names and len(classes) > 0, "classes must be a list of names")
    cem.require(len(set(classes)) == len(classes), "its class names repeat")
    cem.require(len(classes) == wanted, f"it has {len(classes)} class names, but {wanted} logits")
    for name in classes:
        path = name in ("", "..") or "\0" in name or Path(name).name != name
        cem.require(not path, f"the class name {name!r} must be a name, not a path")


def _check_bank(model: nn.Module, extra: dict) -> None:
    if not extra.get("bank"):  # not measured yet
        return
    z, labels = extra["bank"]["embeddings"], extra["bank"]["labels"]
    fits = _finite(z) and z.is_floating_point() and _finite(labels)
    fits = fits and labels.dtype == torch.int64 and labels.dim() == 1
    fits = fits and z.shape == (len(labels), model.config["embed_dim"])
    fits = fits and 0 <= labels.min() and labels.max() < len(extra["classes"])
    wanted = "embeddings (M, D), finite, and labels (M,) of its classes"
    cem.require(fits, f"its bank must have {wanted}")


def _check_clusters(extra: dict) -> None:
    if "clusters" not in extra:
        return
    clusters = extra["clusters"]
    cem.require(clusters.keys() == {"seeds", "shares"}, "its clusters need seeds and shares")
    seeds, shares = cem.GaussianSeeds.from_state_dict(clusters["seeds"]), clusters["shares"]
    fits = _finite(shares) and shares.is_floating_point() and shares.shape == (seeds.num_classes,)
    fits = fits and 0 <= shares.min() and abs(shares.sum() - 1) < 1e-3
    cem.require(fits, f"its clusters need {seeds.num_classes} shares that sum to 1")
    same = list(seeds.shape) == extra.get("image_shape")
    cem.require(same, "its clusters have other images' shape")


def _check_settings(settings: dict) -> None:
    """The ascent's options that sample.py takes from here in place of its own defaults."""
    wanted = "its settings must be {sampler: {steps, step_size, noise, norm}} with values in range"
    cem.require(isinstance(settings, dict), wanted)
    for setting in settings.values():
        named = isinstance(setting, dict) and setting.keys() == set(SETTINGS)
        cem.require(named and setting["norm"] in cem.DIRECTIONS, wanted)
        numbers = [setting["steps"], setting["step_size"], setting["noise"]]
        fits = all(type(value) in (int, float) and 0 <= value < 2**31 for value in numbers)
        cem.require(fits and type(numbers[0]) is int and numbers[0] and numbers[1], wanted)


def _check_training(model: nn.Module, training: dict) -> None:
    for name, kind in PROGRESS.items():
        cem.require(isinstance(training.get(name), kind), f"its training state has no {name}")
    cem.require(type(training.get("restarted_at", 0)) is int, "restarted_at must be a step")
    numbers = [training[name] for name in ("step", "restarts", "seconds")]
    numbers += training["sums"].values()
    valid = all(isinstance(v, (int, float)) and -(2**63) < v < 2**63 for v in numbers)  # no NaN
    cem.require(valid and min(numbers[:3]) >= 0, "step, restarts and sums must be finite numbers")
    lines = all(isinstance(line, dict) for line in training["log"])
    cem.require(lines, "its log must be a list of dicts")
    state, expected = training["model"], model.state_dict()
    fits = state.keys() == expected.keys() and all(_like(state[k], expected[k]) for k in expected)
    cem.require(fits, "its last weights differ from the network, or are not finite")
    parameters = dict(enumerate(model.parameters()))
    for i, entry in training["optimizer"]["state"].items():
        own = parameters[i]
        fits = all(_like(value, own) for value in entry.values() if value is not None)
        cem.require(fits, "its optimiser state differs from the network, or is not finite")
    finite = all(map(_finite, training.get("chains", {}).values()))
    cem.require(finite, "its chains must be finite tensors")


def _finite(value: object) -> bool:
    return isinstance(value, Tensor) and bool(value.isfinite().all())


def _like(value: object, expected: Tensor) -> bool:
    return _finite(value) and value.shape == expected.shape
