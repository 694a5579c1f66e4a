"""--init: training that begins from the weights of a checkpoint, ours or third-party."""

from torch import nn

import cem
from lib import interop
from lib.run import resumes


def load(opt) -> nn.Module:
    """The checkpoint opt.init; opt.mean and opt.std normalise a third-party one."""
    return interop.load(opt.init, mean=opt.mean or None, std=opt.std or None)


def defaults(opt) -> dict:
    """The options that the checkpoint determines: arch, width and those of an encoder's head."""
    return {name: value for name, value in load(opt).config.items() if hasattr(opt, name)}


def head_shapes(state: dict) -> dict:
    """The shapes of the last layer's tensors."""
    return {k: v.shape for k, v in state.items() if k.startswith("net.fc.")}


def start(model: nn.Module, opt, train_set) -> None:
    """Copy weights and normalisation of opt.init into the model, unless the run is resumed.

    A last layer of another size or kind, or for other classes, stays new, which is printed. Raises
    CEMError for another network, and in the second stage, which keeps the first one's posterior,
    for a new last layer and for images of another size.
    """
    if not opt.init or resumes(opt):
        return
    source = load(opt)
    for name in ("arch", "width", "in_channels"):
        there, here = source.config[name], model.config[name]
        cem.require(there == here, f"--init {opt.init} has {name} {there}, not {here}")
    interop.normalise(source, opt.init, train_set)
    own, stored = model.state_dict(), source.state_dict()
    shape = list(train_set.images.shape[1:])
    size = source.extra.get("image_shape") or shape
    same = opt.loss != "dat" or size == shape
    other = f"{opt.init} is for images of {size}, not {shape}"
    cem.require(same, f"{other}: first fine-tune it with --loss at")
    classes = source.extra.get("classes") or train_set.classes
    others = isinstance(model, cem.ParametricCEM) and classes != train_set.classes
    if head_shapes(stored) != head_shapes(own) or others:
        differs = f"the last layer of {opt.init} does not fit{' these classes' * others}"
        cem.require(opt.loss != "dat", f"{differs}: first train a new one with --loss at")
        print(f"{differs}: starting with a new one")
        stored = {k: v for k, v in stored.items() if not k.startswith("net.fc.")}
    model.load_state_dict(own | {k: v for k, v in stored.items() if k in own})
