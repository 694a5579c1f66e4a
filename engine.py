"""What both training scripts share: schedule, running average, and the loop with checkpoints, log and end in good order."""

import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import cli
import hardware
import parallel
import recover


def learning_rate(progress: float, peak: float, schedule: str) -> float:
    """At progress in [0, 1] of the run. onecycle: up to the peak over 30 %, then linearly to 0; cosine: warm-up over 2 %."""
    warmup = 0.3 if schedule == "onecycle" else 0.02
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    progress = (progress - warmup) / (1 - warmup)
    return peak * (1 - progress if schedule == "onecycle" else (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay average + (1 - decay) model, parameters and buffers (AveragedModel has a GPU wait for the host)."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    floats, counts = ([pair for pair in pairs if pair[0].is_floating_point() == wanted] for wanted in (True, False))
    get_ema_multi_avg_fn(decay)(*map(list, zip(*floats)), None)
    torch._foreach_copy_(*map(list, zip(*counts)))


def fit(
    opt: cli.TrainOptions,
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
    fits = parallel.size() == 1 or opt.batch_size <= images
    cli.require(fits, f"--batch-size {opt.batch_size} is more than the {images} images that torchrun's processes would share")
    out, begin, where, first = Path(opt.out), time.monotonic(), next(model.parameters()).device, parallel.rank() == 0
    hardware.autocast(where, opt.precision)  # refuses what the device has not, before anything is written
    per_epoch = max(images // opt.batch_size, 1)
    total = opt.epochs * per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=opt.weight_decay, fused=True)
    parts = {"model": model, "optimizer": optimizer}
    progress = {"step": 0, "log": [], "sums": {}, "seconds": 0.0, "restarts": 0}
    final = copy.deepcopy(model) if opt.ema else model
    wrapped = parallel.wrap(model, opt.batch_norm)

    began = 0  # the step from which this process, or its latest restart, went on

    def restore() -> None:
        nonlocal begin
        saved = recover.newest(out, where)
        training = recover.resumable(opt, saved.extra)
        for name, part in parts.items():
            part.load_state_dict(training[name])
        final.load_state_dict(saved.state_dict())
        parallel.part_statistics(training.get("statistics", []), model, final)
        if state is not None:
            state.load_state_dict({name: parallel.share(rows) for name, rows in training["state"].items()})
        progress.update({name: training[name] for name in progress})
        begin = time.monotonic()  # the seconds before are in the checkpoint

    def save(name: str = "ckpt.pt") -> None:
        training = {name: part.state_dict() for name, part in parts.items()} | progress
        training["seconds"] += time.monotonic() - begin
        if state is not None:
            training["state"] = {name: parallel.gather(rows) for name, rows in state.state_dict().items()}
        with parallel.mean_statistics(model, final) as training["statistics"]:
            if first:
                keep = name == "ckpt.pt" and progress["step"] > began
                recover.save(out / name, keep, final, options=asdict(opt), training=training, **extra)
                write_log()
            parallel.barrier()

    def write_log() -> None:
        cli.write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in progress["log"]))

    def train_epoch(board: SummaryWriter | None, stop: cli.Stop) -> None:
        """The rest of the epoch that progress["step"] lies in, or what of it there is time for."""
        epoch, done = divmod(progress["step"], per_epoch)
        order, draws = shuffle(epoch)
        batches = order[: per_epoch * opt.batch_size].split(opt.batch_size)[done:]
        epoch_begin, unread = time.monotonic(), []

        def descend(n: int, index: Tensor, generator: parallel.Share) -> dict:
            index = index[:n]
            loss, metrics = batch_loss(wrapped, index, draws[index], generator)
            loss.backward()
            return {"loss": loss.detach(), **metrics}

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
            metrics = hardware.fitting(opt.batch_size, descend, index, generator)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            if final is not model:
                follow(final, model, opt.ema if progress["step"] else 0.0)
            progress["step"] += 1
            metrics = {"loss": metrics.pop("loss"), "gradient_norm": norm, **metrics}
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
            with parallel.mean_statistics(model, final):
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

    resume = parallel.anyone(recover.wanted(opt), where)
    if resume:
        restore()
        began = progress["step"]
        print(f"going on from step {began} of {total}")
        if first:
            write_log()  # which a run that was killed may not have come to
    elif first:
        recover.begin_anew(out)
    if first:
        for left in out.glob("*.tmp"):  # by a process that was killed
            left.unlink()
        cli.write_text(out / "options.json", json.dumps(asdict(opt), indent=2) + "\n")
    if not resume:
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
