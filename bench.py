"""How fast: this project's training steps and samplers beside a plain textbook loop, interleaved in one run.

    python bench.py                                      # ResNet-18, batch 64, PGD-10
    python bench.py --width 16 --batch-size 256 --out results/bench.json

The textbook loop: float32, contiguous memory, `loss.backward()` through everything, torchvision's transforms in a DataLoader.
Each line is the median of --repeats pairs; the ratio comes first, with its range over the pairs. FLOP are counted for the
forward pass and taken twice for a step of attack or sampler (forward, gradient of the images) and thrice for a step of
training. The attack is held against torchattacks too, where that is installed.
"""

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cem
import cli
import data
import parallel
import train_sup
import train_unsup
from cli import option

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16 FLOP/s


@dataclass
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
    precision: str = option("auto", "our arithmetic; the textbook's is float32", choices=cli.PRECISIONS)


def textbook_attack(model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], opt: Options) -> Tensor:
    """PGD as tutorials have it: weight gradients are computed and thrown away."""
    x_adv = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(opt.steps):
        x_adv = x_adv.detach().requires_grad_(True)
        objective(x_adv).backward()
        g = x_adv.grad
        x_adv = x_adv.detach() + 0.1 * g / g.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = x_adv - x
        delta = delta * (0.5 / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
        x_adv = (x + delta).clamp(0, 1)
    return x_adv.detach()


class Pictures(torch.utils.data.Dataset):
    """Images and labels behind torchvision's transforms."""

    def __init__(self, source: data.Dataset, transform, views: int = 1):
        self.source, self.transform, self.views = source, transform, views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int):
        image = T.functional.to_pil_image(self.source.images[i])
        return *(self.transform(image) for _ in range(self.views)), self.source.labels[i]


def endless(dataset: Pictures, batch_size: int):
    while True:
        yield from torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=min(os.cpu_count(), 8))


def contenders(opt: Options, where: torch.device) -> dict[str, tuple[Callable, Callable, float]]:
    """name -> our step, the textbook's, and the forward passes' worth of FLOP in it."""
    n, k = opt.batch_size, opt.steps
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64 * n, 3, *[opt.image_size] * 2), dtype=torch.uint8, generator=generator)
    cpu_set = data.Dataset("noise", images, torch.arange(64 * n) % 10, list("0123456789"))
    train_set = cpu_set.to(where)
    index, x, y = torch.arange(n, device=where), train_set.pixels()[:n], train_set.labels[:n]
    plain_x = x.contiguous()

    def fresh(kind):
        torch.manual_seed(0)
        model = kind(opt.arch, width=opt.width).to(where)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def ours(script, kind, draws: int):
        options = script.Options(attack_steps=k, batch_size=n, precision=opt.precision)
        model = fresh(kind)[0].to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        loss_of = script.objective(options, train_set)
        u = torch.rand(n, draws, generator=generator).to(where)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, index, u[index], parallel.Share(0, where))[0].backward()
            optimizer.step()

        return step

    def frozen(kind):
        return cem.folded(fresh(kind)[0]).to(memory_format=torch.channels_last)

    def climb(model: nn.Module, name: str, positives=None, **ball):
        with cli.autocast(where, opt.precision):
            return cem.ascend(cem.potential(name, model, positives), x, steps=k, step_size=0.1, **ball)

    crop = T.Compose([T.RandomCrop(opt.image_size, padding=opt.image_size // 8), T.RandomHorizontalFlip(), T.ToTensor()])
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    simclr = [T.RandomResizedCrop(opt.image_size), T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), T.ToTensor()]
    batches = endless(Pictures(cpu_set, crop), n)
    pairs = endless(Pictures(cpu_set, T.Compose(simclr), views=2), n)
    classifier, sgd = fresh(cem.ParametricCEM)
    encoder, encoder_sgd = fresh(cem.NonParametricCEM)

    def textbook_supervised():
        images, labels = (t.to(where) for t in next(batches))
        classifier.train()
        x_adv = textbook_attack(classifier, images, lambda v: F.cross_entropy(classifier(v), labels), opt)
        sgd.zero_grad()
        F.cross_entropy(classifier(x_adv), labels).backward()
        sgd.step()

    def textbook_unsupervised():
        first, second, _ = (t.to(where) for t in next(pairs))
        encoder.train()
        with torch.no_grad():
            held = encoder(second)
        x_adv = textbook_attack(encoder, first, lambda v: cem.info_nce(encoder(v), held, 0.3), opt)
        encoder_sgd.zero_grad()
        cem.info_nce(encoder(x_adv), encoder(second), 0.3).backward()
        encoder_sgd.step()

    def textbook_climb(objective):
        def step():
            v = plain_x
            for _ in range(k):
                v = v.detach().requires_grad_(True)
                objective(v).backward()
                v = (v + 0.1 * v.grad / v.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)

        return step

    def score(name):
        return lambda v: cem.PARAMETRIC_SAMPLERS[name](classifier.eval()(v), y).sum()

    def entropy(v):
        z = encoder.eval()(v)
        f = (z @ z.T / 0.3).masked_fill(torch.eye(len(z), dtype=torch.bool, device=where), -torch.inf)
        return -f.logsumexp(1).sum()

    with torch.no_grad():
        embedded = encoder.eval()(plain_x)

    def surrogate(v):
        return cem.info_nce(encoder.eval()(v), embedded, 0.3)

    robust, embedding = frozen(cem.ParametricCEM), frozen(cem.NonParametricCEM)
    work = {
        "supervised training step": (ours(train_sup, cem.ParametricCEM, 3), textbook_supervised, 2 * k + 3),
        "unsupervised training step": (
            ours(train_unsup, cem.NonParametricCEM, 2 * data.SIMCLR_DRAWS),
            textbook_unsupervised,
            2 * k + 1 + 6,
        ),
        "attack": (
            lambda: climb(robust, "ce", y, eps=0.5),
            lambda: textbook_attack(classifier.eval(), plain_x, lambda v: F.cross_entropy(classifier(v), y), opt),
            2 * k,
        ),
    }
    for name in cem.PARAMETRIC_SAMPLERS:
        work[f"sampler {name}"] = functools.partial(climb, robust, name, y), textbook_climb(score(name)), 2 * k
    work["sampler pgd"] = functools.partial(climb, embedding, "pgd", x), textbook_climb(surrogate), 2 * k
    work["sampler maxent"] = functools.partial(climb, embedding, "maxent"), textbook_climb(entropy), 2 * k
    try:
        import torchattacks

        peer = torchattacks.PGDL2(classifier.eval(), eps=0.5, alpha=0.1, steps=k)
        work["attack, against torchattacks"] = lambda: climb(robust, "ce", y, eps=0.5), lambda: peer(plain_x, y), 2 * k
    except ImportError:
        pass
    return work


def seconds(step: Callable, where: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - begin


def main() -> None:
    opt = cli.parse(Options, __doc__)
    for name in ("width", "batch_size", "steps", "repeats"):
        cli.require(getattr(opt, name) > 0, f"--{name.replace('_', '-')} must be positive")
    where = cli.device(opt.device)
    machine = (
        torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    machine += "" if where.type == "cuda" else f", {torch.get_num_threads()} threads"
    with FlopCounterMode(display=False) as counter:
        cem.ParametricCEM(opt.arch, width=opt.width).eval()(torch.rand(1, 3, opt.image_size, opt.image_size))
    forward, rows = counter.get_total_flops(), []
    peak = next((value for name, value in PEAKS.items() if name in machine), None)
    print(f"{machine}, {cli.settled(where, opt.precision)}; {opt.arch} width {opt.width}, {forward / 1e9:.3f} GFLOP an image")
    for name, (ours, textbook, passes) in contenders(opt, where).items():
        if opt.only and not any(part.strip() in name for part in opt.only.split(",")):
            continue
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        seconds(ours, where)
        memory = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None
        seconds(textbook, where)
        pairs = [(seconds(ours, where), seconds(textbook, where)) for _ in range(opt.repeats)]
        ratios, (mine, theirs) = sorted(b / a for a, b in pairs), (statistics.median(column) for column in zip(*pairs))
        flops = passes * forward * opt.batch_size / mine
        row = {"what": name, "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
        row |= {"images_per_second": opt.batch_size / mine, "textbook": opt.batch_size / theirs}
        row |= {"GFLOP_per_second": flops / 1e9}
        row |= {"share_of_peak": flops / peak} if peak else {}
        row |= {"peak_bytes_per_image": memory // opt.batch_size} if memory else {}
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
        speeds = f"{opt.batch_size / mine:9.1f} images/s, textbook {opt.batch_size / theirs:9.1f}, {flops / 1e9:9.1f} GFLOP/s"
        share = f", {flops / peak:.1%} of peak" if peak else ""
        print(f"{name:32s} {row['ratio']:5.2f} x  ({ratios[0]:.2f} to {ratios[-1]:.2f})  {speeds}{share}", flush=True)
    if opt.out:
        record = {"command": cli.command(), "machine": machine, "torch": torch.__version__, "rows": rows}
        cli.write_text(Path(opt.out), json.dumps(record, indent=1) + "\n")
        print(f"wrote {opt.out}")


if __name__ == "__main__":
    cli.run(main)
