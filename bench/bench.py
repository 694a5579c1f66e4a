"""Speed of our training steps, attack and samplers beside a plain textbook loop.

    python bench/bench.py                                 # ResNet-18, batch 64, PGD-10
    python bench/bench.py --width 16 --batch-size 256 --out bench/bench.json

The textbook loop computes in float32 (on a GPU with TF32 convolutions, PyTorch's default) and in
contiguous memory, calls loss.backward() through everything and loads its images through
torchvision's transforms in a DataLoader. It runs in a process of its own, which waits while ours
is timed. Figures are medians over --repeats pairs. FLOP are counted in forward passes: two per
step of the attack or of a sampler, three per training step. If torchattacks is installed, our
attack is also compared with its PGD.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import multiprocessing
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders import Ours, Textbook

import cem
from lib import cli, files, options
from lib.cli import option
from lib.device import PRECISIONS, machine_name, pick_device, resolve_precision

PEAKS = {  # dense bfloat16 FLOP/s of GPUs
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


@dataclass(frozen=True)
class Options:
    arch: str = option("resnet18", options.ARCH, "work", choices=list(cem.ARCHS), metavar="NAME")
    width: int = option(64, "channels of the stem", "work", least=8)
    image_size: int = option(32, "height and width of the images", "work", least=8)
    batch_size: int = option(64, "images per step", "work", least=2)
    steps: int = option(10, "steps of the attack and the samplers", "work", least=1)
    only: str = option(
        "",
        "measure what has one of these words in its name, comma-separated (default: all)",
        "work",
    )
    repeats: int = option(5, "timed pairs, after one for warm-up", "run", least=1)
    out: str = option("", "JSON file to write (default: none)", "run", metavar="PATH")
    device: str = option("auto", cli.DEVICE, "run")
    precision: str = option("auto", "arithmetic of our side", "run", choices=PRECISIONS)
    compile: bool = option(False, "torch.compile our networks; on a GPU with CUDA graphs", "run")


def forward_flop(opt: Options) -> int:
    """FLOP of one image's forward pass."""
    model = cem.ParametricCEM(opt.arch, width=opt.width).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, opt.image_size, opt.image_size))
    return counter.get_total_flops()


def selected(opt: Options, work: dict) -> dict:
    """The items of `work` whose names contain a part named by --only."""
    parts = [part.strip() for part in opt.only.split(",")]
    chosen = {name: item for name, item in work.items() if any(part in name for part in parts)}
    cem.require(bool(chosen), f"--only {opt.only} matches none of: {', '.join(work)}")
    return chosen


def seconds(step: Callable, device: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@functools.cache
def textbook_work(opt: Options, device: torch.device) -> dict[str, Callable]:
    return Textbook(opt, device).work()


def textbook_seconds(name: str, opt: Options, device: torch.device) -> float:
    """Called in the textbook's process, which keeps its models from one call to the next."""
    return seconds(textbook_work(opt, device)[name], device)


def peak_memory(step: Callable, device: torch.device) -> int | None:
    """Bytes that a step allocates at most; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    seconds(step, device)
    return torch.cuda.max_memory_allocated(device)


def timed_pairs(step, name, opt: Options, device, other) -> list[tuple[float, float]]:
    """Seconds of our step and of the textbook's, by turns; `other` is the textbook's process."""
    pairs = []
    for _ in range(opt.repeats + 1):
        mine = seconds(step, device)
        theirs = other.submit(textbook_seconds, name, opt, device).result()
        pairs.append((mine, theirs))
    return pairs[1:]


def summary(name: str, pairs: list[tuple[float, float]], batch_size: int, flop: float) -> dict:
    """A row of the table; `flop` is that of our step on one image."""
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    ours = batch_size / statistics.median(mine for mine, _ in pairs)
    textbook = batch_size / statistics.median(theirs for _, theirs in pairs)
    return {
        "what": name,
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "images_per_second": ours,
        "textbook": textbook,
        "GFLOP_per_second": flop * ours / 1e9,
    }


def show(row: dict) -> None:
    ratio = f"{row['ratio']:5.2f} x  ({row['lowest']:.2f} to {row['highest']:.2f})"
    speeds = f"{row['images_per_second']:9.1f} images/s, textbook {row['textbook']:9.1f}"
    line = f"{row['what']:32s} {ratio}  {speeds}, {row['GFLOP_per_second']:9.1f} GFLOP/s"
    if "share_of_peak" in row:
        line += f", {row['share_of_peak']:.1%} of peak"
    print(line, flush=True)


def main() -> None:
    opt = cli.parse(Options, __doc__)
    if opt.out:
        files.check_output(Path(opt.out), files.json_with("command", "rows"))
    device = pick_device(opt.device)
    machine, precision = machine_name(device), resolve_precision(device, opt.precision)
    flop = forward_flop(opt)
    print(f"{machine}, {precision}; {opt.arch} width {opt.width}, {flop / 1e9:.3f} GFLOP an image")
    peaks = [value for name, value in PEAKS.items() if name in machine and precision == "bfloat16"]
    rows = []
    work = selected(opt, Ours(opt, device).work())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        for name, (step, passes) in work.items():
            seconds(step, device)  # the first call chooses convolution algorithms
            memory = peak_memory(step, device)
            pairs = timed_pairs(step, name, opt, device, other)
            row = summary(name, pairs, opt.batch_size, passes * flop)
            if peaks:
                row["share_of_peak"] = 1e9 * row["GFLOP_per_second"] / peaks[0]
            if memory is not None:
                row["peak_bytes_per_image"] = memory // opt.batch_size
            show(row)
            rows.append(
                {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            )
    if opt.out:
        record = {"command": cli.command(), "machine": machine, "torch": torch.__version__}
        files.write_json(Path(opt.out), record | {"rows": rows})
        print(f"wrote {opt.out}")


if __name__ == "__main__":
    cli.run(main)
