"""Command lines: options, errors, signals."""

import argparse
import contextlib
import functools
import math
import operator
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from pathlib import Path

import torch
from argparse_dataclass import ArgumentParser
from tqdm import tqdm

import cem
from lib import distributed

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"

# --------------------------------------------------------------------------------------- options

MEAN = "channel means for a third-party checkpoint (default: the file's, else the dataset's)"
STD = "channel standard deviations for a third-party checkpoint"
OUT = "folder to write to (default: beside the checkpoint, or runs/shipped)"
DEVICE = "auto, cpu, cuda, cuda:1 or mps"
METAVARS = {int: "N", float: "X", str: "S"}
BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def number(text: str) -> float:
    """A finite float, or a fraction such as 8/255."""
    numerator, _, denominator = text.partition("/")
    value = float(numerator) / (float(denominator or 1) or math.nan)
    if not math.isfinite(value):
        raise ValueError
    return value


def integer(text: str) -> int:
    """An integer of 64 bits, which is what torch computes with."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def option(default, help: str, group: str = "options", **metadata):
    """A field for an option under the heading `group`. Bounds: least=, above=, most=, below=."""
    if default is not None and default is not False and default != "":
        help = f"{help} (default: {default})"
    kind = {float: number, int: integer}.get(type(default))
    if kind is not None:
        metadata.setdefault("type", kind)
    if "choices" not in metadata and default is not False:
        metadata.setdefault("metavar", METAVARS.get(type(default), "X"))
    metadata |= {"help": help.replace("%", "%%"), "group": group}
    return field(default=default, metadata=metadata)


def option_list(kind: type, help: str, group: str = "options", default=(), **metadata):
    """A field for an option that takes several values."""
    if default:
        help = f"{help} (default: {' '.join(map(str, default))})"
    metadata |= {"help": help, "nargs": "+", "metavar": METAVARS[kind], "group": group}
    metadata["type"] = {float: number, int: integer}.get(kind, kind)
    return field(default_factory=lambda: list(default), metadata=metadata)


def names(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The comma-separated names of an option. Raises CEMError for one that is unknown."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        cem.require(name in known, f"{flag}: unknown {name!r}, choose from {', '.join(known)}")
    return found


def as_flags(values: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


class _Parser(ArgumentParser):
    """Errors as CEMError; --help in 100 columns, with a heading for each group, "run" last."""

    def __init__(self, options: type, description: str):
        self.groups = {f.name: f.metadata.get("group", "options") for f in fields(options)}
        formatter = functools.partial(argparse.HelpFormatter, max_help_position=32, width=100)
        super().__init__(
            options,
            usage="%(prog)s [options]",
            description=description.strip().splitlines()[0],
            formatter_class=formatter,
            allow_abbrev=False,
        )

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for group in sorted(dict.fromkeys(self.groups.values()), key=lambda name: name == "run"):
            formatter.start_section(group)
            formatter.add_arguments([a for a in self._actions if self.groups.get(a.dest) == group])
            formatter.end_section()
        return formatter.format_help()

    def error(self, message):
        raise cem.CEMError(f"{message} (see {self.prog} --help)")


def parse(options: type, description: str, preset=None, argv=None):
    """The command line as an instance of the dataclass `options`.

    preset(options) returns other defaults, which explicit options override.
    """
    parser = _Parser(options, description)
    opt = parser.parse_args(argv)
    check_bounds(opt)
    if preset:
        parser.set_defaults(**preset(opt))
        opt = parser.parse_args(argv)
        check_bounds(opt)
    global _quiet
    _quiet = getattr(opt, "quiet", False)
    return opt


def check_bounds(opt) -> None:
    for f in fields(opt):
        value = getattr(opt, f.name)
        flag = f"--{f.name.replace('_', '-')}"
        several = "nargs" in f.metadata or not isinstance(value, list)
        cem.require(several, f"{flag} needs a value")  # argparse reads --seed=-- as a list
        for bound, (words, fits) in BOUNDS.items():
            if bound in f.metadata and value is not None:
                limit = f.metadata[bound]
                cem.require(fits(value, limit), f"{flag} must be {words} {limit}, not {value}")


def default_checkpoint(kind: str) -> Path:
    """runs/<kind>/ckpt.pt if it exists, else the shipped checkpoint; kind: sup or unsup."""
    path = Path(f"runs/{kind}/ckpt.pt")
    return path if path.exists() else SHIPPED / f"{kind}.pt"


def output_folder(ckpt: Path, third_party: bool) -> Path:
    """Beside the checkpoint; for a shipped one runs/shipped, for a third-party one its name."""
    if third_party and ckpt.suffix in (".pt", ".pth", ".ckpt"):
        return ckpt.with_suffix("")
    if third_party:  # such as MadryLab's checkpoint.pt.best
        return ckpt.with_name(f"{ckpt.name}-cem")
    return Path("runs/shipped") if ckpt.resolve().parent == SHIPPED else ckpt.parent


def command() -> str:
    """The running command line, to record beside its figures."""
    script = Path(sys.argv[0]).resolve()
    root = SHIPPED.parent
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


# -------------------------------------------------------------------------------------- progress

QUIET = "no progress bars; results and warnings remain"  # help text of --quiet
_quiet = False


class _Lines:
    """A file for tqdm where stderr is no terminal: lines instead of carriage returns."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(items, name: str, **options) -> tqdm:
    """A tqdm bar on a terminal, elsewhere a line every half minute, nothing with --quiet."""
    if not sys.stderr.isatty():
        options |= dict(file=_Lines(), delay=30, mininterval=30, maxinterval=30)
    options |= dict(leave=False, disable=_quiet or distributed.rank() > 0)
    return tqdm(items, name, **options)


# ---------------------------------------------------------------------------- errors and signals


class Diverged(cem.CEMError):
    """A training run that cannot continue: exit status 3."""


AT_END = contextlib.ExitStack()  # what remains to be done when the script ends, however it ends


def warn(message: str) -> None:
    if distributed.rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Call a script's main. Errors that the user can correct end it with one line, `error: ...`,
    and exit status 2; divergence with 3."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with AT_END, warnings.catch_warnings():
            if not sys.warnoptions:  # libraries' warnings are for developers: python -W default
                warnings.simplefilter("ignore")
            main()
    except (cem.CEMError, OSError) as error:
        process = f" (process {distributed.rank()})" if distributed.rank() else ""
        message = " ".join(str(error).split())
        fail(f"error{process}: {message}", 3 if isinstance(error, Diverged) else 2)
    except torch.OutOfMemoryError:
        fail("error: out of device memory: try a smaller --batch-size")
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split())[:300]
            fail(f"error: torch.compile failed, leave out --compile: {reason}")
        asked = re.search(r"tried to allocate (\d+) bytes|overflowed with (sizes.*)", str(error))
        if asked is None:
            raise
        size = f"{int(asked[1]):,} bytes" if asked[1] else f"a tensor of {asked[2]}"
        fail(f"error: out of memory: tried to allocate {size}, use smaller sizes")
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])


def fail(line: str, status: int = 2) -> None:
    print(line, file=sys.stderr)
    sys.exit(status)


def _terminate(number: int, _frame) -> None:
    """SIGTERM ends a script as Ctrl-C does, except for the exit status."""
    raise KeyboardInterrupt(number)


class Stop:
    """When a run has to stop: after max_minutes, on SIGTERM or Ctrl-C. A second signal ends it at
    once, unless it comes within a second: a launcher may deliver one twice."""

    def __init__(self, max_minutes: float):
        self.deadline = time.monotonic() + 60 * max_minutes
        self.reason = f"after {max_minutes:g} minutes"
        self.signal = 0

    def __enter__(self):
        signals = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.signal and time.monotonic() > self.noted + 1:
            raise KeyboardInterrupt(number)
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()
            self.reason = f"by {signal.Signals(number).name}"

    def due(self) -> bool:
        return bool(self.signal) or time.monotonic() > self.deadline

    def report(self, message: str) -> None:
        """Print the message; after a signal, exit with the status 128 + signal."""
        print(message, flush=True)
        if self.signal:
            sys.exit(128 + self.signal)
