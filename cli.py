"""What all scripts share: options and errors, checkpoints from elsewhere; the options of both training scripts."""

import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from argparse_dataclass import ArgumentParser
from torch import nn

import cem
import hardware
import parallel

SHIPPED = Path(__file__).resolve().parent / "checkpoints"

# ------------------------------------------------------------------------------------------ options and errors

NORMALISATION = "of each channel, for a checkpoint from elsewhere (default: what the file says, else the dataset's)"


def option(default, help: str, **metadata):
    """A dataclass field that becomes a command line option, its default stated in its help."""
    shown = "" if default in ("", None, False) else f" (default: {default})"
    return field(default=default, metadata={"help": (help + shown).replace("%", "%%"), **metadata})


def options(kind: type, help: str):
    """The same for an option of several values, separated by blanks; none by default."""
    return field(default_factory=list, metadata={"help": help, "type": kind, "nargs": "+"})


def spelled(values: dict) -> str:
    """Options as on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


class _Parser(ArgumentParser):
    def error(self, message):
        raise cem.CEMError(f"{message} (see {self.prog} --help)")


def parse(options: type, description: str, preset: Callable[..., dict] | None = None, argv=None):
    """Command line -> options. preset(options) gives other defaults, which yield to what the user states."""
    parser = _Parser(options, description=description.strip().splitlines()[0], allow_abbrev=False)
    if preset:
        parser.set_defaults(**preset(parser.parse_args(argv)))
    return parser.parse_args(argv)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise cem.CEMError(message)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def folder_beside(ckpt: Path, foreign: bool = False) -> Path:
    """Where a checkpoint's outputs go: beside it; of one that ships runs/shipped; of a foreign one a folder of its name."""
    if foreign:
        return ckpt.with_suffix("")
    return Path("runs/shipped") if ckpt.resolve().parent == SHIPPED else ckpt.parent


def command() -> str:
    """The command line that is running, for the record beside its figures."""
    script, root = Path(sys.argv[0]).resolve(), SHIPPED.parent
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


class Diverged(cem.CEMError):
    """A training run that cannot go on: exit status 3."""


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what the user can put right ends in one line `error: …` and exit status 2, divergence in 3."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except (cem.CEMError, OSError) as error:
        who = f" (process {parallel.rank()})" if parallel.rank() else ""
        print(f"error{who}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(3 if isinstance(error, Diverged) else 2)
    except torch.OutOfMemoryError:
        print("error: the device's memory is too small for this: try a smaller --batch-size", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        print(f"error: torch.compile (leave --compile out): {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])


def _terminate(number: int, _frame) -> None:
    """SIGTERM ends a script as Ctrl-C does, but for its exit status."""
    raise KeyboardInterrupt(number)


class Stop:
    """When a run has to end in good order: after max_minutes, on SIGTERM and on Ctrl-C; a second signal ends it at once."""

    def __init__(self, max_minutes: float):
        self.deadline, self.reason, self.signal = time.monotonic() + 60 * max_minutes, f"after {max_minutes:g} minutes", 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        self.signal, self.reason = number, f"by {signal.Signals(number).name}"
        signal.signal(number, self.before[number])

    def due(self) -> bool:
        return bool(self.signal) or time.monotonic() > self.deadline

    def end(self, message: str) -> None:
        """Say so; exit with the status that a shell gives a process which that signal ended, 0 after max_minutes."""
        print(message, flush=True)
        if self.signal:
            sys.exit(128 + self.signal)


def write_text(path: Path, text: str) -> None:
    cem.replace(path, lambda file: file.write(text.encode()))


def load(path: Path, where: torch.device, opt) -> nn.Module:
    """cem.load with the normalisation of --mean and --std."""
    return cem.load(path, where, opt.mean or None, opt.std or None)


@torch.no_grad()
def adopt(model: nn.Module, path: Path, train_set) -> None:
    """Make sure of a checkpoint from elsewhere: it has the dataset's classes and channels; where it does not say how pixels
    are normalised it gets the training images' normalisation, aloud; its accuracy on some of them tells whether it fits."""
    if "foreign" not in model.extra:
        return
    classes, channels = model.config["num_classes"], model.config["in_channels"]
    fits = (classes, channels) == (len(train_set.classes), train_set.images.shape[1])
    require(fits, f"{path} is for {classes} classes and {channels} channels: {train_set.name} is not its dataset")
    if not model.extra["normalised"]:
        for name, value in train_set.normalisation().items():
            getattr(model, name).copy_(value.view(-1, 1, 1))
        mean, std = (" ".join(f"{v:.4f}" for v in b.flatten().tolist()) for b in (model.mean, model.std))
        print(f"{path} does not say how pixels are normalised: as {train_set.name}, --mean {mean} --std {std}")
        print("(many of RobustBench's networks take them as they are: --mean 0 --std 1)")
    index = train_set.spread(500)
    right = (model(train_set.pixels(index).to(model.mean.device)).argmax(1).cpu() == train_set.labels[index].cpu()).float()
    print(f"{right.mean():.0%} of {len(index)} images of {train_set.name} are classified as labelled")
    if right.mean() < 0.5:
        warn("so few: are --mean and --std, the order of the classes and the forward pass those of its codebase?")


# ------------------------------------------------------------------------------- options of both training scripts


@dataclass
class TrainOptions:
    """The options that both training scripts have."""

    dataset: str = option("cifar10", "")  # each script's help for it comes from data.HELP
    data_dir: str = option("data", "where torchvision's datasets lie or go")
    arch: str = option("resnet50", "network", choices=list(cem.ARCHS))
    width: int = option(64, "channels of the stem; the others scale with it")
    epochs: int = option(150, "passes over the training images")
    batch_size: int = option(256, "images a step, all processes together")
    lr: float = option(0.1, "peak learning rate of SGD with momentum 0.9")
    schedule: str = option("cosine", "learning rate after a linear warm-up", choices=["cosine", "onecycle"])
    weight_decay: float = option(5e-4, "weight decay")
    ema: float = option(0.999, "decay of the running average of the weights, which is the model; 0: no average")
    norm: str = option("l2", "norm of the attack's ball", choices=["l2", "linf"])
    eps: float = option(0.5, "radius of the ball, pixels in [0, 1]; linf: 0.03137 is 8/255")
    attack_steps: int = option(7, "PGD steps in training")
    attack_step_size: float = option(0.1, "PGD step size in training")
    seed_rank: int = option(64, "rank of the Gaussian seeds' covariances in the checkpoint")
    n_eval: int = option(1000, "test images for the measurements in the log; --evaluate takes all of them")
    n: int = option(0, "--evaluate: test images to attack, evenly spread; 0: all")
    evaluate: bool = False  # each script says what it measures
    restarts: int = option(1, "--evaluate: random starts of each PGD attack")
    ckpt: str = option("", "checkpoint for --evaluate (default: OUT/ckpt.pt)")
    out: str = option("", "folder of the run: ckpt.pt, log.jsonl, options.json, TensorBoard events")
    resume: bool = option(False, "continue the run in --out")
    on_diverge: str = option(
        "stop",
        "when loss, gradient or energies leave all bounds: stop, or restart from ckpt.pt at half the rate",
        choices=["stop", "restart"],
    )
    batch_norm: str = option("sync", "BatchNorm over all of torchrun's processes, or local to each", choices=["sync", "local"])
    max_minutes: float = option(math.inf, "save and stop after so many minutes; --resume continues")
    seed: int = option(0, "seed of weights, order, augmentation and attack")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "arithmetic", choices=hardware.PRECISIONS)
    compile: bool = option(
        False, "torch.compile of network and attack (jem, jeat: of attack and SGLD alone): a minute more at the start"
    )


def check(opt: TrainOptions) -> None:
    for name in ("width", "epochs", "lr", "max_minutes"):
        require(getattr(opt, name) > 0, f"--{name.replace('_', '-')} must be positive")
    require(opt.batch_size >= 2, "--batch-size must be at least 2: batch statistics and InfoNCE need other images")
    n = parallel.size()
    require(opt.batch_size % n == 0 and opt.batch_size >= 2 * n, f"--batch-size must be a multiple of {n}, the processes")
    require(not opt.evaluate or n == 1, "--evaluate is for one process: call it without torchrun")
    require(opt.weight_decay >= 0 and opt.eps >= 0, "--weight-decay and --eps must not be negative")
    require(opt.attack_steps >= 1 and opt.attack_step_size > 0, "--attack-steps and --attack-step-size must be positive")
    require(opt.seed_rank >= 1 and opt.n_eval >= 1, "--seed-rank and --n-eval must be at least 1")
    require(0 <= opt.ema < 1, "--ema must lie in [0, 1)")
    require(opt.restarts >= 1 and opt.n >= 0, "--restarts must be at least 1, --n at least 0")
