"""How fast: this project's training steps and samplers beside a plain textbook loop, interleaved in one run.

    python bench.py                                      # ResNet-18, batch 64, PGD-10
    python bench.py --width 16 --batch-size 256 --out results/bench.json

The textbook loop: float32 (on a GPU with PyTorch's default of TF32 convolutions), contiguous memory, `loss.backward()`
through everything, torchvision's transforms in a DataLoader, in a process of its own that waits while ours is timed. Each
line is the median of --repeats pairs; the ratio comes first, with its range. FLOP are those of the forward pass, twice for a
step of attack or sampler, thrice for one of training. The attack is held against torchattacks too, where that is installed.
"""

import functools
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import Tensor, multiprocessing, nn
from torch.utils.flop_counter import FlopCounterMode

import cem
import cli
import data
import hardware
import parallel
import train_sup
import train_unsup
from cli import option

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16 FLOP/s


@dataclass(frozen=True)
class Options:
    arch: str = option("resnet18", "network", choices=list(cem.ARCHS))
    width: int = option(64, "channels of the stem")
    image_size: int = option(32, "height and width of the images")
    batch_size: int = option(64, "images a step")
    steps: int = option(10, "steps of attack and samplers")
    repeats: int = option(5, "timed pairs, after one to warm up")
    only: str = option("", "parts of the names of what to measure, comma-separated (default: all)")
    out: str = option("", "JSON file to write")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "our arithmetic; the textbook's is float32", choices=hardware.PRECISIONS)


def textbook_pgd(x: Tensor, objective: Callable[[Tensor], Tensor], steps: int, eps: float | None = None) -> Tensor:
    """PGD as tutorials have it, in a ball from a random start or, without eps, unbounded: weight gradients are thrown away."""
    x_adv = (x + 0.01 * torch.randn_like(x)).clamp(0, 1) if eps else x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        objective(x_adv).backward()
        g = x_adv.grad
        x_adv = x_adv.detach() + 0.1 * g / g.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        if eps:
            delta = x_adv - x
            x_adv = x + delta * (eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
        x_adv = x_adv.clamp(0, 1)
    return x_adv.detach()


@dataclass
class Pictures(torch.utils.data.Dataset):
    """Images and labels behind torchvision's transforms."""

    source: data.Dataset
    transform: Callable
    views: int = 1

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int):
        image = T.functional.to_pil_image(self.source.images[i])
        return *(self.transform(image) for _ in range(self.views)), self.source.labels[i]

    def batches(self, size: int):
        while True:
            yield from torch.utils.data.DataLoader(self, size, shuffle=True, num_workers=min(os.cpu_count(), 8))


def noise(opt: Options) -> data.Dataset:
    images = torch.randint(0, 256, (64 * opt.batch_size, 3, *[opt.image_size] * 2), dtype=torch.uint8)
    return data.Dataset("noise", images, torch.arange(len(images)) % 10, list("0123456789"))


def fresh(kind: type, opt: Options, where: torch.device, **sgd) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = kind(opt.arch, width=opt.width).to(where)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, **sgd)


def ours(opt: Options, where: torch.device) -> dict[str, tuple[Callable, int]]:
    """name -> our step, and the forward passes' worth of FLOP in it."""
    n, k = opt.batch_size, opt.steps
    train_set = noise(opt).to(where)
    index, x, y = torch.arange(n, device=where), train_set.pixels()[:n], train_set.labels[:n]

    def training(script, kind, draws: int):
        options = script.Options(attack_steps=k, batch_size=n, precision=opt.precision)
        model, optimizer = fresh(kind, opt, where, fused=True)
        model.to(memory_format=torch.channels_last).train()
        loss_of = script.objective(options, train_set)
        u = torch.rand(n, draws, device=where)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, index, u, parallel.Share(0, where))[0].backward()
            optimizer.step()

        return step

    def climb(model: nn.Module, name: str, positives=None, **ball):
        with hardware.autocast(where, opt.precision):
            return cem.ascend(cem.potential(name, model, positives), x, steps=k, step_size=0.1, **ball)

    kinds = cem.ParametricCEM, cem.NonParametricCEM
    robust, embedding = (cem.folded(fresh(kind, opt, where)[0]).to(memory_format=torch.channels_last) for kind in kinds)
    attack = functools.partial(climb, robust, "ce", y, eps=0.5)
    work = {
        "supervised training step": (training(train_sup, cem.ParametricCEM, 3), 2 * k + 3),
        "unsupervised training step": (training(train_unsup, cem.NonParametricCEM, 2 * data.SIMCLR_DRAWS), 2 * k + 1 + 6),
        "attack": (attack, 2 * k),
        "sampler pgd": (functools.partial(climb, embedding, "pgd", x), 2 * k + 1),
        "sampler maxent": (functools.partial(climb, embedding, "maxent"), 2 * k),
    }
    for name in cem.PARAMETRIC_SAMPLERS:
        work[f"sampler {name}"] = functools.partial(climb, robust, name, y), 2 * k
    if importlib.util.find_spec("torchattacks"):
        work["attack, against torchattacks"] = attack, 2 * k
    return work


@functools.cache
def textbook(opt: Options, where: torch.device) -> dict[str, Callable]:
    """The same names -> the textbook's step."""
    n, k, cpu_set = opt.batch_size, opt.steps, noise(opt)
    x, y = (t.to(where) for t in (cpu_set.pixels(torch.arange(n)).contiguous(), cpu_set.labels[:n]))
    crop = T.Compose([T.RandomCrop(opt.image_size, padding=opt.image_size // 8), T.RandomHorizontalFlip(), T.ToTensor()])
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    simclr = [T.RandomResizedCrop(opt.image_size), T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), T.ToTensor()]
    batches, pairs = Pictures(cpu_set, crop).batches(n), Pictures(cpu_set, T.Compose(simclr), views=2).batches(n)
    classifier, sgd = fresh(cem.ParametricCEM, opt, where)
    encoder, encoder_sgd = fresh(cem.NonParametricCEM, opt, where)

    def supervised():
        images, labels = (t.to(where) for t in next(batches))
        classifier.train()
        x_adv = textbook_pgd(images, lambda v: F.cross_entropy(classifier(v), labels), k, eps=0.5)
        sgd.zero_grad()
        F.cross_entropy(classifier(x_adv), labels).backward()
        sgd.step()

    def unsupervised():
        first, second, _ = (t.to(where) for t in next(pairs))
        encoder.train()
        with torch.no_grad():
            held = encoder(second)
        x_adv = textbook_pgd(first, lambda v: cem.info_nce(encoder(v), held, 0.3), k, eps=0.5)
        encoder_sgd.zero_grad()
        cem.info_nce(encoder(x_adv), encoder(second), 0.3).backward()
        encoder_sgd.step()

    def entropy(v):
        z = encoder.eval()(v)
        f = (z @ z.T / 0.3).masked_fill(torch.eye(len(z), dtype=torch.bool, device=where), -torch.inf)
        return -f.logsumexp(1).sum()

    embedded = encoder.eval()(x).detach()
    work = {
        "supervised training step": supervised,
        "unsupervised training step": unsupervised,
        "attack": lambda: textbook_pgd(x, lambda v: F.cross_entropy(classifier.eval()(v), y), k, eps=0.5),
        "sampler pgd": lambda: textbook_pgd(x, lambda v: cem.info_nce(encoder.eval()(v), embedded, 0.3), k),
        "sampler maxent": lambda: textbook_pgd(x, entropy, k),
    }
    for name, log_p in cem.PARAMETRIC_SAMPLERS.items():
        objective = lambda v, log_p=log_p: log_p(classifier.eval()(v), y).sum()  # noqa: E731
        work[f"sampler {name}"] = functools.partial(textbook_pgd, x, objective, k)
    if importlib.util.find_spec("torchattacks"):
        peer = importlib.import_module("torchattacks").PGDL2(classifier.eval(), eps=0.5, alpha=0.1, steps=k)
        work["attack, against torchattacks"] = lambda: (classifier.eval(), peer(x, y))
    return work


def seconds(step: Callable, where: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - begin


def textbook_seconds(name: str, opt: Options, where: torch.device) -> float:
    return seconds(textbook(opt, where)[name], where)


def main() -> None:
    opt = cli.parse(Options, __doc__)
    for name in ("width", "batch_size", "steps", "repeats"):
        cli.require(getattr(opt, name) > 0, f"--{name.replace('_', '-')} must be positive")
    where = hardware.device(opt.device)
    cpu = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu
    with FlopCounterMode(display=False) as counter:
        cem.ParametricCEM(opt.arch, width=opt.width).eval()(torch.rand(1, 3, opt.image_size, opt.image_size))
    forward, rows = counter.get_total_flops(), []
    arithmetic = hardware.settled(where, opt.precision)
    peak = next((value for name, value in PEAKS.items() if name in machine and arithmetic == "bfloat16"), None)
    print(f"{machine}, {arithmetic}; {opt.arch} width {opt.width}, {forward / 1e9:.3f} GFLOP an image")
    work = ours(opt, where)
    wanted = {k: v for k, v in work.items() if any(part.strip() in k for part in opt.only.split(","))}
    cli.require(bool(wanted), f"--only {opt.only} is in none of these names: {', '.join(work)}")
    other = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    for name, (step, passes) in wanted.items():
        seconds(step, where)  # kernels are chosen
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        seconds(step, where)
        memory = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None
        other.submit(textbook_seconds, name, opt, where).result()
        pairs = [(seconds(step, where), other.submit(textbook_seconds, name, opt, where).result()) for _ in range(opt.repeats)]
        ratios = sorted(b / a for a, b in pairs)
        mine, theirs = (opt.batch_size / statistics.median(column) for column in zip(*pairs))  # images/s
        flops = passes * forward * mine
        row = {"what": name, "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
        row |= {"images_per_second": mine, "textbook": theirs, "GFLOP_per_second": flops / 1e9}
        row |= {"share_of_peak": flops / peak} if peak else {}
        row |= {"peak_bytes_per_image": memory // opt.batch_size} if memory else {}
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
        speeds = f"{mine:9.1f} images/s, textbook {theirs:9.1f}, {flops / 1e9:9.1f} GFLOP/s"
        share = f", {flops / peak:.1%} of peak" if peak else ""
        print(f"{name:32s} {row['ratio']:5.2f} x  ({ratios[0]:.2f} to {ratios[-1]:.2f})  {speeds}{share}", flush=True)
    if opt.out:
        record = {"command": cli.command(), "machine": machine, "torch": torch.__version__, "rows": rows}
        cli.write_text(Path(opt.out), json.dumps(record, indent=1) + "\n")
        print(f"wrote {opt.out}")


if __name__ == "__main__":
    cli.run(main)
