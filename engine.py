"""What both training scripts share: options, schedule, and the loop with its checkpoints, log and end in good order."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import cem
import cli
import parallel
import recover
from cli import option


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
    precision: str = option("auto", "arithmetic", choices=cli.PRECISIONS)
    compile: bool = option(
        False, "torch.compile of network and attack (jem, jeat: of attack and SGLD alone): a minute more at the start"
    )


def check(opt: TrainOptions) -> None:
    for name in ("width", "epochs", "lr", "max_minutes"):
        cli.require(getattr(opt, name) > 0, f"--{name.replace('_', '-')} must be positive")
    cli.require(opt.batch_size >= 2, "--batch-size must be at least 2: batch statistics and InfoNCE need other images")
    n = parallel.size()
    cli.require(opt.batch_size % n == 0 and opt.batch_size >= 2 * n, f"--batch-size must be a multiple of {n}, the processes")
    cli.require(not opt.evaluate or n == 1, "--evaluate is for one process: call it without torchrun")
    cli.require(opt.weight_decay >= 0 and opt.eps >= 0, "--weight-decay and --eps must not be negative")
    cli.require(opt.attack_steps >= 1 and opt.attack_step_size > 0, "--attack-steps and --attack-step-size must be positive")
    cli.require(opt.seed_rank >= 1 and opt.n_eval >= 1, "--seed-rank and --n-eval must be at least 1")
    cli.require(0 <= opt.ema < 1, "--ema must lie in [0, 1)")
    cli.require(opt.restarts >= 1 and opt.n >= 0, "--restarts must be at least 1, --n at least 0")


def learning_rate(progress: float, peak: float, schedule: str) -> float:
    """At progress in [0, 1] of the run. onecycle: up to the peak over 30 %, then linearly to 0; cosine: warm-up over 2 %."""
    warmup = 0.3 if schedule == "onecycle" else 0.02
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    progress = (progress - warmup) / (1 - warmup)
    return peak * (1 - progress if schedule == "onecycle" else (1 + math.cos(math.pi * progress)) / 2)


def fit(
    opt: TrainOptions,
    model: nn.Module,
    images: int,
    shuffle: Callable,
    batch_loss: Callable,
    evaluate: Callable,
    state: nn.Module | None = None,
    bounds: dict[str, float] | None = None,
    **extra,
) -> nn.Module:
    """Train `model` on its device and keep the run in opt.out -> the trained model (the average of its weights with --ema).

    shuffle(epoch)                              -> order (N,), draws (N, ...): all the randomness of data and augmentation
    batch_loss(model, index, draws, generator)  -> mean loss, {name: mean} of this process's part of the batch, for the log
    evaluate(model, epoch)                      -> {name: value}, measurements for the log after epoch 1, 2, ...
    state                                       what else changes with the steps, such as a replay buffer: this process's rows
    bounds                                      {name: largest absolute value} of metrics, beyond which the run has diverged
    extra                                       goes into the checkpoint beside the model

    Randomness is a function of seed, epoch and step: a resumed run is the uninterrupted one, on the CPU bit for bit. Under
    torchrun every process calls this, with the same weights, and the first one measures and writes.
    Raises cli.Diverged where a metric is not finite or beyond its bound, with --on-diverge restart after eight restarts.
    """
    cli.autocast(next(model.parameters()).device, opt.precision)  # refuses what the device has not, before anything is written
    out, begin, where, first = Path(opt.out), time.monotonic(), next(model.parameters()).device, parallel.rank() == 0
    per_epoch = max(images // opt.batch_size, 1)
    total = opt.epochs * per_epoch
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(opt.ema), use_buffers=True) if opt.ema else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=opt.weight_decay, fused=True)
    parts = {"model": model, "optimizer": optimizer, "average": average}
    parts = {name: part for name, part in parts.items() if part is not None}
    progress = {"step": 0, "log": [], "sums": {}, "seconds": 0.0, "restarts": 0}
    final = model if average is None else average.module
    wrapped = parallel.wrap(model, opt.batch_norm)

    began = 0  # the step from which this process, or its latest restart, went on

    def restore() -> None:
        nonlocal begin
        training = recover.resumable(opt, recover.newest(out, where).extra)
        for name, part in parts.items():
            part.load_state_dict(training[name])
        if state is not None:
            state.load_state_dict({name: parallel.share(rows) for name, rows in training["state"].items()})
        progress.update({name: training[name] for name in progress})
        begin = time.monotonic()  # the seconds before are in the checkpoint

    def save(name: str = "ckpt.pt") -> None:
        training = {name: part.state_dict() for name, part in parts.items()} | progress
        training["seconds"] += time.monotonic() - begin
        if state is not None:
            training["state"] = {name: parallel.gather(rows) for name, rows in state.state_dict().items()}
        parallel.average_buffers(model, final)
        if first:
            if name == "ckpt.pt" and progress["step"] > began:
                recover.keep(out)
            try:
                cem.save(out / name, final, options=asdict(opt), training=training, **extra)
            except RuntimeError as error:  # what torch.save makes of a full disk
                raise OSError(f"cannot write {out / name}: {error.__context__ or error}") from error
            cli.write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in progress["log"]))
        parallel.barrier()

    def train_epoch(board: SummaryWriter | None, stop: cli.Stop) -> None:
        """The rest of the epoch that progress["step"] lies in, or what of it there is time for."""
        epoch, done = divmod(progress["step"], per_epoch)
        order, draws = shuffle(epoch)
        batches = order[: per_epoch * opt.batch_size].split(opt.batch_size)[done:]
        epoch_begin, unread = time.monotonic(), []

        def attempt(n: int) -> None:
            batch_loss(model, order[:n], draws[order[:n]], parallel.Share(0, where))[0].backward()

        shown = dict(total=per_epoch, initial=done, leave=False, disable=not first)
        bar = tqdm(batches, f"epoch {epoch + 1}/{opt.epochs}", **shown)
        model.train()
        for count, index in enumerate(bar, done + 1):
            rate = learning_rate(progress["step"] / total, opt.lr, opt.schedule) * 0.5 ** progress["restarts"]
            optimizer.param_groups[0]["lr"] = rate
            index = parallel.share(index)
            seed = opt.seed * 100_003 + progress["step"] + 7_919_000 * progress["restarts"]  # not the same trouble again
            generator = parallel.Share(seed, where)
            optimizer.zero_grad(set_to_none=True)
            with cli.memory(opt.batch_size, attempt):
                loss, metrics = batch_loss(wrapped, index, draws[index], generator)
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            progress["step"] += 1
            metrics = {"loss": loss, "gradient_norm": norm, **metrics}
            unread.append(torch.stack([value.detach().float() for value in metrics.values()]))
            pause = progress["step"] % 20 == 0 or count == per_epoch  # only here the host waits for the device
            over = stop.due() if parallel.size() == 1 else pause and parallel.anyone(stop.due(), where)
            if pause or over:
                read(list(metrics), parallel.mean(torch.stack(unread)).tolist(), board)
                unread, means = [], {name: value / count for name, value in progress["sums"].items()}
                speed = (count - done) * opt.batch_size / (time.monotonic() - epoch_begin)
                bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in means.items()) + f", {speed:.0f} images/s")
            if over:
                break
        bar.close()
        if count == per_epoch:
            line = {"epoch": epoch + 1, "step": progress["step"], "lr": rate, **means}
            parallel.average_buffers(model, final)
            line |= evaluate(final.eval(), epoch + 1) if first else {}
            seconds = progress["seconds"] + time.monotonic() - begin
            line |= {"images_per_second": round(speed, 1), "seconds": round(seconds, 1)}
            progress["log"].append({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()})
            progress["sums"] = {}
            for name, value in line.items() if first else ():
                board.add_scalar(name, value, progress["step"])
            print("  ".join(f"{k} {v}" for k, v in progress["log"][-1].items()), flush=True)

    def read(names: list[str], rows: list[list[float]], board: SummaryWriter | None) -> None:
        """Take note of the last steps' metrics; Diverged at the first that is beyond all bounds."""
        for step, row in enumerate(rows, progress["step"] - len(rows) + 1):
            for name, value in zip(names, row):
                if first:
                    board.add_scalar(f"step/{name}", value, step)
                progress["sums"][name] = progress["sums"].get(name, 0.0) + value
                if not abs(value) <= (bounds or {}).get(name, sys.float_info.max):  # NaN is beyond every bound
                    raise cli.Diverged(f"{name.replace('_', ' ')} is {value:.4g} at step {step}")

    if opt.resume:
        restore()
        began = progress["step"]
    elif first and (out / "ckpt.pt").exists():
        recover.keep_previous(out)
    if first:
        cli.write_text(out / "options.json", json.dumps(asdict(opt), indent=2) + "\n")
    if not opt.resume:
        save()  # there is something to return to from the first step on
    writer = SummaryWriter(str(out), purge_step=progress["step"] + 1) if first else contextlib.nullcontext()
    with writer as board, cli.Stop(opt.max_minutes) as stop:
        while progress["step"] < total and not parallel.anyone(stop.due(), where):
            try:
                train_epoch(board, stop)
                save()
            except cli.Diverged as error:
                save("diverged.pt")
                restarts = progress["restarts"] + 1
                restore()
                again = opt.on_diverge == "restart" and restarts > 1
                if again and progress["step"] == began:  # in vain from there: one checkpoint further back
                    recover.step_back(out)
                    restore()
                back = f"{error}; its state is in {out / 'diverged.pt'}, {out / 'ckpt.pt'} is from step {progress['step']}"
                if opt.on_diverge == "stop" or restarts > 8:
                    raise cli.Diverged(
                        f"{back}: try a smaller --lr, or --resume --on-diverge restart, which halves it"
                    ) from error
                progress["restarts"], began = restarts, progress["step"]
                save()
                cli.warn(f"{back}: from there with {0.5**restarts:g} of the learning rate")
    print(f"wrote {out / 'ckpt.pt'}, {out / 'log.jsonl'}")
    if progress["step"] < total:
        stop.end(f"stopped {stop.reason} at step {progress['step']} of {total}: --resume continues")
    return final.eval()
