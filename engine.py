"""What the scripts share: options and errors, device and precision, and the training loop with its checkpoints and log."""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from argparse_dataclass import ArgumentParser
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import cem

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


def parse(options: type, description: str, presets: dict[str, dict] | None = None, key: str = "dataset", argv=None):
    """Command line -> options. presets[value of --key] replaces defaults, but not what the user states."""
    parser = _Parser(options, description=description.strip().splitlines()[0], allow_abbrev=False)
    if presets:
        parser.set_defaults(**presets.get(getattr(parser.parse_args(argv), key), {}))
    return parser.parse_args(argv)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise cem.CEMError(message)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def folder_beside(ckpt: Path, foreign: bool = False) -> Path:
    """Where the outputs of a checkpoint go: beside it; to runs/shipped for one that ships; to a folder of its name for
    one from elsewhere, which may share its folder with others."""
    if foreign:
        return ckpt.with_suffix("")
    return Path("runs/shipped") if ckpt.resolve().parent == SHIPPED else ckpt.parent


def command() -> str:
    """The command line that is running, for the record beside its figures."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what the user can put right ends in one line `error: …` and exit status 2."""
    try:
        main()
    except (cem.CEMError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError:
        print("error: the device's memory is too small for this: try a smaller --batch-size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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
    """auto: CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise cem.CEMError(f"--device {name} is not to be had here: {str(error).splitlines()[0]}") from error
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; bfloat16 is the fast one
    torch.backends.cudnn.benchmark = True
    return chosen


def settled(where: torch.device, precision: str) -> str:
    """--precision without its auto, which is bfloat16 where the device computes in it, else float32."""
    native = False
    if where.type == "cuda":
        native = torch.cuda.get_device_capability(where) >= (8, 0)
    elif where.type == "cpu":
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return precision if precision != "auto" else "bfloat16" if native else "float32"


def autocast(where: torch.device, precision: str):
    """The autocast context of --precision."""
    half = settled(where, precision) == "bfloat16"
    return torch.autocast(where.type, torch.bfloat16) if half else contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------- training


@dataclass
class TrainOptions:
    """The options that both training scripts have."""

    dataset: str = option("cifar10", "")  # each script's help for it comes from data.HELP
    data_dir: str = option("data", "where torchvision's datasets lie or go")
    arch: str = option("resnet50", "network", choices=list(cem.ARCHS))
    width: int = option(64, "channels of the stem; the others scale with it")
    epochs: int = option(150, "passes over the training images")
    batch_size: int = option(256, "images a step")
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
    ckpt: str = option("", "checkpoint for --evaluate (default: OUT/ckpt.pt)")
    out: str = option("", "folder of the run: ckpt.pt, log.jsonl, options.json, TensorBoard events")
    resume: bool = option(False, "continue the run in --out")
    max_minutes: float = option(math.inf, "save and stop after so many minutes; --resume continues")
    seed: int = option(0, "seed of weights, order, augmentation and attack")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "arithmetic", choices=["auto", "float32", "bfloat16"])


def check(opt: TrainOptions) -> None:
    for name in ("width", "epochs", "lr", "max_minutes"):
        require(getattr(opt, name) > 0, f"--{name.replace('_', '-')} must be positive")
    require(opt.batch_size >= 2, "--batch-size must be at least 2: batch statistics and InfoNCE need other images")
    require(opt.weight_decay >= 0 and opt.eps >= 0, "--weight-decay and --eps must not be negative")
    require(opt.attack_steps >= 1 and opt.attack_step_size > 0, "--attack-steps and --attack-step-size must be positive")
    require(opt.seed_rank >= 1 and opt.n_eval >= 1, "--seed-rank and --n-eval must be at least 1")
    require(0 <= opt.ema < 1, "--ema must lie in [0, 1)")


def learning_rate(progress: float, peak: float, schedule: str) -> float:
    """At progress in [0, 1] of the run. onecycle: up to the peak over 30 %, then linearly to 0; cosine: warm-up over 2 %."""
    warmup = 0.3 if schedule == "onecycle" else 0.02
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    progress = (progress - warmup) / (1 - warmup)
    return peak * (1 - progress if schedule == "onecycle" else (1 + math.cos(math.pi * progress)) / 2)


def fit(
    opt: TrainOptions, model: nn.Module, images: int, shuffle: Callable, batch_loss: Callable, evaluate: Callable, **extra
) -> nn.Module:
    """Train `model` on its device and keep the run in opt.out -> the trained model (the average of its weights with --ema).

    shuffle(epoch)                              -> order (N,), draws (N, ...): all the randomness of data and augmentation
    batch_loss(model, index, draws, generator)  -> mean loss, {name: mean over the batch} for the log
    evaluate(model, epoch)                      -> {name: value}, measurements for the log after epoch 1, 2, ...
    extra                                       goes into the checkpoint beside the model

    Randomness is a function of seed, epoch and step: a resumed run is the uninterrupted one, on the CPU bit for bit.
    """
    out, begin = Path(opt.out), time.monotonic()
    where = next(model.parameters()).device
    steps_per_epoch = max(images // opt.batch_size, 1)
    total = opt.epochs * steps_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=opt.weight_decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(opt.ema), use_buffers=True) if opt.ema else None
    step, log, sums, seconds = 0, [], {}, 0.0
    if opt.resume:
        training = resumable(opt, cem.load(out / "ckpt.pt", where).extra)
        model.load_state_dict(training["model"])
        optimizer.load_state_dict(training["optimizer"])
        if average is not None:
            average.load_state_dict(training["average"])
        step, log, sums, seconds = (training[k] for k in ("step", "log", "sums", "seconds"))
    elif (out / "ckpt.pt").exists():
        keep_previous(out)
    write_text(out / "options.json", json.dumps(asdict(opt), indent=2) + "\n")
    final = average.module if average is not None else model

    def save():
        training = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict() if average is not None else {},
            **{"step": step, "log": log, "sums": sums, "seconds": seconds + time.monotonic() - begin},
        }
        cem.save(out / "ckpt.pt", final, options=asdict(opt), training=training, **extra)
        write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))

    board = SummaryWriter(str(out), purge_step=step + 1)
    late = False
    while step < total and not late:
        epoch, done = divmod(step, steps_per_epoch)
        order, draws = shuffle(epoch)
        batches = order[: steps_per_epoch * opt.batch_size].split(opt.batch_size)[done:]
        epoch_begin = time.monotonic()
        bar = tqdm(batches, f"epoch {epoch + 1}/{opt.epochs}", total=steps_per_epoch, initial=done, leave=False)
        model.train()
        for count, index in enumerate(bar, done + 1):
            rate = learning_rate(step / total, opt.lr, opt.schedule)
            optimizer.param_groups[0]["lr"] = rate
            generator = torch.Generator(where).manual_seed((opt.seed * 100_003 + step) % 2**32)
            loss, metrics = batch_loss(model, index, draws[index], generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            step += 1
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0) + value.detach()
            late = time.monotonic() - begin > 60 * opt.max_minutes
            if step % 20 == 0 or late or count == steps_per_epoch:  # the only places where the host waits for the device
                means = {name: float(value) / count for name, value in sums.items()}
                speed = (count - done) * opt.batch_size / (time.monotonic() - epoch_begin)
                bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in means.items()) + f", {speed:.0f} images/s")
                require(math.isfinite(means["loss"]), f"the loss is not finite at step {step}: try a smaller --lr")
            if late:
                break
        bar.close()
        if count == steps_per_epoch:
            line = {"epoch": epoch + 1, "step": step, "lr": rate, **means, **evaluate(final.eval(), epoch + 1)}
            line |= {"images_per_second": round(speed, 1), "seconds": round(seconds + time.monotonic() - begin, 1)}
            log.append({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()})
            for name, value in line.items():
                board.add_scalar(name, value, step)
            print("  ".join(f"{k} {v}" for k, v in log[-1].items()), flush=True)
            sums = {}
        save()
    board.close()
    if step < total:
        print(f"stopped after {opt.max_minutes:g} minutes at step {step} of {total}: --resume continues")
    print(f"wrote {out / 'ckpt.pt'}, {out / 'log.jsonl'}")
    return final.eval()


def accuracy(model: nn.Module, dataset, opt, steps: int, n: int | None = None) -> dict[str, float]:
    """Clean accuracy of a classifier, and that under PGD with random start and steps of 2.5 eps / steps.

    Over all images of the dataset, or over n evenly spread ones; opt has norm, eps, batch_size, precision and seed.
    """
    model, where = cem.folded(model), dataset.images.device
    generator = torch.Generator(where).manual_seed(opt.seed)
    chosen, correct = dataset.spread(n or len(dataset)), torch.zeros(2, device=where)
    for index in tqdm(chosen.split(opt.batch_size), "evaluating", leave=False):
        x, y = dataset.pixels(index), dataset.labels[index]
        with autocast(where, opt.precision):
            attack = cem.potential("ce", model, y)
            x_adv = cem.pgd(attack, x, eps=opt.eps, norm=opt.norm, steps=steps, generator=generator)
            with torch.no_grad():
                correct += torch.stack([(model(v).argmax(1) == y).sum() for v in (x, x_adv)])
    clean, adversarial = (correct / len(chosen)).tolist()
    return {"clean_accuracy": clean, "adversarial_accuracy": adversarial}


def record_accuracy(
    name: str, ckpt: Path, dataset, opt: TrainOptions, result: dict[str, float], foreign: bool = False
) -> None:
    """Print what --evaluate measured, and write it as a JSON file of that name beside the checkpoint."""
    out, ball = folder_beside(ckpt, foreign) / name, {"norm": opt.norm, "eps": opt.eps}
    print(f"{ckpt} on {len(dataset)} test images of {dataset.name}, PGD-20, {opt.norm} eps {opt.eps:g}, {opt.precision}:")
    print("  ".join(f"{key.replace('_', ' ')} {value:.2%}" for key, value in result.items()))
    record = {"command": command(), "ckpt": str(ckpt), "dataset": dataset.name, "n": len(dataset), "attack": "PGD-20"}
    write_text(out, json.dumps(record | ball | {"precision": opt.precision, **result}, indent=2) + "\n")
    print(f"wrote {out}")


def resumable(opt: TrainOptions, extra: dict) -> dict:
    """The training state in a checkpoint's extra; CEMError where it has none or where options contradict those of the run."""
    require("training" in extra, f"{opt.out}/ckpt.pt carries no training state: it cannot be resumed")
    free = {"resume", "max_minutes", "out", "data_dir", "device", "n_eval", "eval_every", "evaluate", "ckpt"}
    for name, now in asdict(opt).items():
        then = extra["options"].get(name)
        fits = name in free or now == then or (name == "epochs" and now > then)
        require(fits, f"--resume: the run in {opt.out} has --{name.replace('_', '-')} {then}, not {now}")
    return extra["training"]


def keep_previous(out: Path) -> None:
    """A run that starts anew in `out` moves the earlier one's files, which it did not make, aside."""
    (previous := out / "previous").mkdir(exist_ok=True)
    for path in out.iterdir():
        if path.is_file():
            os.replace(path, previous / path.name)
    print(f"kept the earlier run's files in {previous}")
