"""--init: training that begins from the weights of a checkpoint, ours or third-party."""

from torch import nn

from lib import cli, interop
from lib.run import resumes


def load(opt) -> nn.Module:
    """The checkpoint opt.init; opt.mean and opt.std normalise a third-party one."""
    return interop.load(opt.init, mean=opt.mean or None, std=opt.std or None)


def defaults(opt) -> dict:
    """The options that the checkpoint determines: arch, width and those of an encoder's head."""
    return {name: value for name, value in load(opt).config.items() if hasattr(opt, name)}


def start(model: nn.Module, opt) -> None:
    """Copy weights and normalisation of opt.init into the model, unless the run is resumed.

    A last layer of another size or kind stays new, which is printed. Raises CEMError for another
    network, and for a new last layer in the second stage, which keeps the first one's posterior.
    """
    if not opt.init or resumes(opt):
        return
    source = load(opt)
    for name in ("arch", "width", "in_channels"):
        there, here = source.config[name], model.config[name]
        cli.require(there == here, f"--init {opt.init} has {name} {there}, not {here}")
    own, stored = model.state_dict(), source.state_dict()
    if not source.extra.get("normalised", True):
        print(f"{opt.init} has no pixel normalisation: using that of the training images")
        print("(many RobustBench models need --mean 0 --std 1)")
        stored |= {name: own[name] for name in ("mean", "std")}
    last = [{k: v.shape for k, v in s.items() if k.startswith("net.fc.")} for s in (stored, own)]
    if last[0] != last[1]:
        first = f"the last layer of {opt.init} does not fit: train a new one with --loss at first"
        cli.require(opt.loss != "dat", first)
        print(f"the last layer of {opt.init} does not fit: starting with a new one")
        stored = {k: v for k, v in stored.items() if not k.startswith("net.fc.")}
    model.load_state_dict(own | {k: v for k, v in stored.items() if k in own})
