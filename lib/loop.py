"""The training loop of both training scripts.

A run that is killed at any moment and resumed ends with the weights of the uninterrupted run, bit
for bit on a CPU with as many threads: all randomness is a function of seed, epoch and step.
SIGTERM, Ctrl-C and --max-minutes stop a run at the next step (torchrun: within 20), after saving.
"""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cem
from lib import cli, distributed, optim
from lib.device import autocast, resolve_precision
from lib.run import RunFolder, resumes

WATCH_EVERY = 200  # steps between calls of `watch`; a multiple of READ_EVERY
READ_EVERY = 20  # steps between readings of the metrics, for which the host waits for the device
MAX_RESTARTS = 8


def learning_rate(progress: float, peak: float, schedule: str) -> float:
    """The rate at `progress` in [0, 1]. onecycle: linear, peak at 30 %; cosine: 2 % warm-up."""
    warmup = 0.3 if schedule == "onecycle" else 0.02
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    progress = (progress - warmup) / (1 - warmup)
    fall = 1 - progress if schedule == "onecycle" else (1 + math.cos(math.pi * progress)) / 2
    return peak * fall


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay average + (1 - decay) model; AveragedModel would synchronise the GPU."""
    state, now = average.state_dict(), model.state_dict()
    names = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([state[k] for k in names], [now[k] for k in names], 1 - decay)
    for name in state.keys() - set(names):  # BatchNorm's counts of batches
        state[name].copy_(now[name])


class Trainer:
    """One training run of `model`, on its device, kept in the folder opt.out.

    shuffle(epoch) -> order (N,) and draws (N, ...), for the augmentation, of epoch 0, 1, ...
    batch_loss(model, index, draws, generator) -> mean loss and {name: metric} over this
        process's part of a batch; draws are its images' rows
    measure(model, epoch) -> {name: value}, measurements for the log after epoch 1, 2, ...
    watch(model) -> {name: value}, after 200 steps, an epoch, --max-minutes; may raise Diverged
    state: a module, "chains" in checkpoints: chains and the first stage's network (lib/chains.py)
    info: what the checkpoint stores about the dataset, which stays the same
    extra(model, hurried) -> what else it stores; hurried: before the first step, or after a signal

    Under torchrun every process runs this with the same weights; the first measures and writes.
    """

    def __init__(
        self, opt, model: nn.Module, num_images: int, *, shuffle, batch_loss, measure,
        watch=None, state: nn.Module | None = None, info: dict | None = None,
        extra: Callable[[nn.Module, bool], dict] = lambda model, hurried: {}
    ):  # fmt: skip
        fits = distributed.world_size() == 1 or opt.batch_size <= num_images
        cem.require(fits, f"--batch-size {opt.batch_size} exceeds the {num_images} training images")
        self.device = next(model.parameters()).device
        autocast(self.device, opt.precision)  # raises for an unavailable one, before any writing
        torch.backends.cudnn.benchmark = True
        self.opt = opt
        self.model = model
        self.state = state
        self.info = info or {}
        self.extra = extra
        self.shuffle = shuffle
        self.batch_loss = batch_loss
        self.measure = measure
        self.watch = watch or (lambda model: {})
        self.steps_per_epoch = max(num_images // opt.batch_size, 1)
        self.total = opt.epochs * self.steps_per_epoch
        self.optimizer = optim.optimizer(opt, model)
        self.average = copy.deepcopy(model) if opt.ema else model
        self.wrapped = distributed.wrap(model, opt.batch_norm)
        self.first = distributed.rank() == 0
        self.folder = RunFolder(opt)
        # what a checkpoint stores beside weights and optimiser; restarted_at: a step
        self.progress = dict(step=0, restarts=0, restarted_at=-1, seconds=0.0, log=[], sums={})
        self.speed = 0.0  # images per second
        self.began = 0  # the step at which this process began, or the last restart
        self.clock = time.monotonic()
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        precision = resolve_precision(self.device, opt.precision)
        self.summary = f"{opt.arch} of width {opt.width}, {millions:.2f} million parameters; "
        self.summary += f"{opt.epochs} epochs of {self.steps_per_epoch} steps, "
        self.summary += f"{num_images} images; {precision} on {self.device}"

    @property
    def step(self) -> int:
        return self.progress["step"]

    def fit(self) -> nn.Module:
        """Train to the end, or until it is time to stop -> the model, averaged with --ema."""
        resume = distributed.any_process(resumes(self.opt))
        if self.opt.resume and not resume:
            print(f"nothing to resume in {self.folder.path}: starting a new run")
        if resume:
            self.restore()
            self.began = self.step
            print(f"resuming at step {self.step} of {self.total}")
        if self.first:
            print(self.summary, flush=True)
            self.folder.prepare(resume)
            self.folder.write_log(self.progress["log"])
        try:
            if not resume:
                self.save()  # divergence can return to it
            board = self.folder.board(self.step) if self.first else contextlib.nullcontext()
            with board as self.board, cli.Stop(self.opt.max_minutes) as self.stop:
                while self.step < self.total and not self.must_stop():
                    try:
                        self.train_epoch()
                        self.save()
                    except cli.Diverged as error:
                        self.restart(error)
        except Exception as error:  # such as a full disk, or a batch that does not fit
            begun = resume or self.step > 0 or isinstance(error, cli.Diverged)
            if self.first and not begun:
                self.folder.undo()
            raise
        print(f"wrote {self.folder.checkpoint}, {self.folder.path / 'log.jsonl'}")
        if self.step < self.total:
            at = f"stopped {self.stop.reason} at step {self.step} of {self.total}"
            self.stop.report(f"{at}: --resume continues")
        if self.stop.signal:  # during the last step
            self.stop.report(f"finished before it stopped {self.stop.reason}")
        return self.average.eval()

    def must_stop(self) -> bool:
        return distributed.any_process(self.stop.due())

    def train_epoch(self) -> None:
        """The rest of the epoch in which the current step lies, or as much as time allows."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order, draws = self.shuffle(epoch)
        batches = order.split(self.opt.batch_size)[done : self.steps_per_epoch]
        begin = time.monotonic()
        pending = []  # metrics, still on the device
        name = f"epoch {epoch + 1}/{self.opt.epochs}"
        bar = cli.progress(batches, name, total=self.steps_per_epoch, initial=done)
        self.model.train(self.opt.loss != "dat")  # which keeps BatchNorm's statistics
        for count, index in enumerate(bar, 1):
            pending.append(self.train_step(distributed.local_rows(index), draws))
            epoch_ends = done + count == self.steps_per_epoch
            read = epoch_ends or self.step % READ_EVERY == 0
            # several processes agree on stopping only where they read
            stop = (read or distributed.world_size() == 1) and self.must_stop()
            if read or stop:
                self.log_metrics(pending)
                pending = []
                self.speed = count * len(index) / (time.monotonic() - begin)
                means = {k: v / (done + count) for k, v in self.progress["sums"].items()}
                shown = [*(f"{k} {v:.3f}" for k, v in means.items()), f"{self.speed:.0f} images/s"]
                bar.set_postfix_str(", ".join(shown), refresh=False)
            hurried = stop and distributed.any_process(bool(self.stop.signal))
            if epoch_ends or self.step % WATCH_EVERY == 0 or (stop and not hurried):
                found = self.watch(self.model)
                self.plot(found, self.step, "step/")
                means |= found
            if stop:
                break
        bar.close()
        if epoch_ends:
            self.end_epoch(epoch + 1, means)

    def train_step(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """One optimiser step on the images at `index` -> its metrics, still on the device."""
        opt, restarts = self.opt, self.progress["restarts"]
        rate = learning_rate(self.step / self.total, opt.lr, opt.schedule)
        self.optimizer.param_groups[0]["lr"] = rate * 0.5**restarts
        seed = opt.seed * 100_003 + self.step + 7_919_000 * restarts  # a restart draws anew
        generator = distributed.RankGenerator(seed, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = self.batch_loss(self.wrapped, index, draws[index], generator)
        loss.backward()
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained])
        if opt.clip:
            nn.utils.clip_grads_with_norm_(trained, opt.clip, norm)
        with autocast(self.device, opt.precision):  # Muon's matrix products
            self.optimizer.step()
        if opt.batch_norm == "local":
            distributed.average_statistics(self.model)
        if self.average is not self.model:
            # growing, so that the average of a short run does not remember the first weights
            ema_update(self.average, self.model, min(opt.ema, self.step / (self.step + 10)))
        self.progress["step"] += 1
        metrics = {"loss": loss, "gradient_norm": norm, **metrics}
        return {name: value.detach().float() for name, value in metrics.items()}

    def log_metrics(self, steps: list[dict[str, Tensor]]) -> None:
        """Log the steps' metrics. Raises Diverged for one out of range or weights that overflow."""
        rows = torch.stack([torch.stack(list(metrics.values())) for metrics in steps])
        sums = self.progress["sums"]
        for step, row in enumerate(distributed.mean(rows).tolist(), self.step - len(steps) + 1):
            values = dict(zip(steps[0], row))
            self.plot(values, step, "step/")
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
                most = self.opt.max_energy_gap if name == "energy_gap" else sys.float_info.max
                if not abs(value) <= most:  # or NaN
                    raise cli.Diverged(f"{name.replace('_', ' ')} is {value:.4g} at step {step}")
        if not nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise cli.Diverged(f"the weights overflow at step {self.step}")

    def plot(self, values: dict[str, float], step: int, prefix: str = "") -> None:
        """TensorBoard, in the first process."""
        if self.first:
            for name, value in values.items():
                self.board.add_scalar(prefix + name, value, step)

    def end_epoch(self, epoch: int, means: dict[str, float]) -> None:
        """Measure the model; log the epoch."""
        line = {"epoch": epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        line |= means
        if self.first:
            torch.backends.cudnn.benchmark = False  # batches of any size: it would time each
            line |= self.measure(self.average.eval(), epoch)
            torch.backends.cudnn.benchmark = True
        line |= {"images_per_second": round(self.speed, 1), "seconds": round(self.seconds(), 1)}
        line = {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}
        self.progress["log"].append(line)
        self.progress["sums"] = {}
        self.plot(line, self.step)
        print("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)

    def seconds(self) -> float:
        return self.progress["seconds"] + time.monotonic() - self.clock

    def save(self, name: str = "ckpt.pt") -> None:
        training = self.progress | {"seconds": self.seconds(), "images_per_second": self.speed}
        training |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.state is not None:
            state = self.state.state_dict()
            if "images" in state:  # each process has some
                state["images"] = distributed.gather(state["images"])
            training["chains"] = dict(state)
        keep = name == "ckpt.pt" and self.step > self.began
        if self.first:
            hurried = self.step == 0 or (self.step < self.total and bool(self.stop.signal))
            stored = self.info | self.extra(self.average, hurried)
            self.folder.save(name, self.average, keep, training=training, **stored)
            self.folder.write_log(self.progress["log"])
        distributed.barrier()

    def restore(self) -> None:
        saved = self.folder.load(self.device)
        training = saved.extra["training"]
        same = type(saved) is type(self.model)
        cem.require(same, f"--resume: another script made the run in {self.folder.path}")
        for name in ("classes", "image_shape", "num_images"):
            now = self.info.get(name)
            then = saved.extra.get(name, now)  # earlier versions store fewer
            cem.require(then == now, f"--resume: the run has {name} {then}, the dataset {now}")
        found = self.state is None or "chains" in training
        cem.require(found, f"{self.folder.checkpoint} has no chains")
        self.model.load_state_dict(training["model"])
        settings = {"param_groups": self.optimizer.state_dict()["param_groups"]}  # from the options
        self.optimizer.load_state_dict(training["optimizer"] | settings)
        self.average.load_state_dict(saved.state_dict())
        if self.state is not None:
            state = dict(training["chains"])
            if "images" in state:
                state["images"] = distributed.local_rows(state["images"])
            self.state.load_state_dict(state)
        self.progress |= {k: training.get(k, v) for k, v in self.progress.items()}
        self.clock = time.monotonic()  # the seconds before are in progress

    def restart(self, error: cli.Diverged) -> None:
        """After divergence: continue from the last checkpoint at half the rate, or raise."""
        self.save("diverged.pt")
        restarts, restarted_at = self.progress["restarts"] + 1, self.progress["restarted_at"]
        self.restore()
        if self.opt.on_diverge == "restart" and self.step == restarted_at:
            self.folder.step_back()  # restarting from this checkpoint has failed before
            self.restore()
        diverged, last = self.folder.path / "diverged.pt", self.folder.checkpoint
        message = f"{error}; its state is in {diverged}; {last} is from step {self.step}"
        if restarts > MAX_RESTARTS:
            raise cli.Diverged(f"{message}: {MAX_RESTARTS} restarts did not help") from error
        if self.opt.on_diverge == "stop":
            advice = "try a smaller --lr, or --resume --on-diverge restart, which halves it"
            raise cli.Diverged(f"{message}: {advice}") from error
        self.began = self.step
        self.progress |= {"restarts": restarts, "restarted_at": self.step}
        self.save()
        cli.warn(f"{message}: continuing from there at {0.5**restarts:g} of the learning rate")
