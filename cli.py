"""What all scripts share: options and errors, device and precision, checkpoints from elsewhere."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

import torch
from argparse_dataclass import ArgumentParser
from torch import Tensor, nn

import cem
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
    except KeyboardInterrupt:
        sys.exit(130)


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


@contextlib.contextmanager
def memory(batch_size: int, attempt: Callable[[int], object]):
    """Where the block runs out of memory: a CEMError that names the largest batch n for which attempt(n) does not."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pass  # outside of this block the exception no longer holds the tensors of its frames
    if parallel.size() > 1:  # the others may not have run out, and an attempt is made together
        raise cem.CEMError(f"--batch-size {batch_size} does not fit into the device's memory: try half of it")
    fits, too_large = 0, batch_size
    while too_large - fits > max(fits // 50, 1):  # to 2 %
        n = (fits + too_large) // 2
        torch.cuda.empty_cache()
        try:
            attempt(n)
            fits = n
        except torch.OutOfMemoryError:
            too_large = n
    advice = f"the largest that does is about {fits}" if fits else "not even 1 does"
    raise cem.CEMError(f"--batch-size {batch_size} does not fit into the device's memory: {advice}")


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


# -------------------------------------------------------------------------------------- device and precision


def device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Under torchrun each process of a machine takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and parallel.size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise cem.CEMError(f"--device {name} is not to be had here: {str(error).splitlines()[0]}") from error
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    parallel.join(chosen)
    return chosen


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees; else its pages are faulted in anew at the next: 7 to 19 % of an attack's time."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # where there is another C library
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MiB
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


PRECISIONS = ["auto", "float32", "tf32", "bfloat16"]


def settled(where: torch.device, precision: str) -> str:
    """--precision without its auto, which is bfloat16 where the device computes in it, else float32."""
    native = False
    if where.type == "cuda":
        native = torch.cuda.get_device_capability(where) >= (8, 0)
    elif where.type == "cpu":
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return precision if precision != "auto" else "bfloat16" if native else "float32"


def autocast(where: torch.device, precision: str):
    """The context of --precision: autocast for bfloat16; with tf32, float32's products in 19 bits, on GPUs that have them."""
    precision = settled(where, precision)
    require(precision != "tf32" or where.type == "cuda", "--precision tf32 is for NVIDIA's GPUs: leave it at auto here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(where.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def frozen(model: nn.Module, compiled: bool) -> nn.Module:
    """What a training step attacks: the model of this moment, folded, with --compile compiled."""
    network = cem.folded(parallel.bare(model))
    return Compiled(network) if compiled else network


class Compiled(nn.Module):
    """A frozen network through torch.compile, without `cem.ascend`'s hook, for which it would be compiled anew each time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.temperature = model, getattr(model, "temperature", None)
        self.model.compile()

    def forward(self, x: Tensor) -> Tensor:
        hooks = nn.modules.module._global_forward_pre_hooks
        kept = dict(hooks)
        hooks.clear()
        try:
            return self.model(x)
        finally:
            hooks.update(kept)
