"""Train a classifier adversarially: a parametric energy model p(x, y) = exp f(x, y) / Z.

    python train_sup.py                                # CIFAR-10, ResNet-50, l2 PGD-7: the paper's
    python train_sup.py --dataset digits               # half a minute on a laptop
    python train_sup.py --dataset digits --loss jeat   # joint energy adversarial training

Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into --out. eval_robust.py measures
the checkpoint, sample.py draws images from it.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import cem
from lib import augment, cli, data, distributed, options, robustness
from lib.cli import option
from lib.device import AttackCopy, autocast, pick_device
from lib.loop import Trainer
from lib.replay import ReplayBuffer

DIGITS = dict(
    arch="resnet18", width=16, epochs=30, batch_size=128, lr=0.1, schedule="onecycle", ema=0.97,
    attack_steps=3, attack_step_size=0.3, n_eval=100,
)  # fmt: skip
ENERGY_BASED = ("jem", "jeat")
ENERGY_BASED_DIGITS = dict(epochs=40, lr=0.05, sgld_steps=10, sgld_step_size=0.1, buffer=1000)
ENERGY = "energy terms (jem and jeat; the weight also in mle)"


@dataclass
class Options(options.TrainOptions):
    dataset: str = option(
        "cifar10", f"{data.HELP}; digits changes defaults: {cli.as_flags(DIGITS)}", "data"
    )
    loss: str = option(
        "at", "st: standard; at: adversarial; mle: maximum likelihood; jem, jeat: energy-based",
        "optimisation", choices=list(cem.SUPERVISED_LOSSES),
    )  # fmt: skip
    out: str = option("runs/sup", "folder of the run", "run", metavar="PATH")
    likelihood_weight: float = option(0.1, "lambda, weight of the energy terms", ENERGY, least=0)
    sgld_steps: int = option(20, "SGLD steps on log p(x) per training step", ENERGY, least=1)
    sgld_step_size: float = option(
        0.25, "SGLD step size, times the plain gradient", ENERGY, above=0
    )
    sgld_noise: float = option(0.005, "standard deviation of SGLD's noise", ENERGY, least=0)
    buffer: int = option(10_000, "images in the replay buffer", ENERGY, least=1)
    reinit: float = option(
        0.05, "probability that a drawn chain starts anew", ENERGY, least=0, most=1
    )
    reinit_from: str = option(
        "noise", "where chains start: uniform noise or Gaussian seeds", ENERGY,
        choices=["noise", "gaussian"],
    )  # fmt: skip
    max_energy_gap: float = option(
        100.0, "|E(x_s) - E(x)| above which a run has diverged", ENERGY, above=0
    )
    diagnose: bool = option(
        False, "log energies, likelihood gradients and calibration every epoch", "run"
    )


def preset(opt: Options) -> dict:
    stored = options.stored(opt)
    opt.dataset, opt.loss = stored.get("dataset", opt.dataset), stored.get("loss", opt.loss)
    defaults = dict(DIGITS) if opt.dataset == "digits" else {}
    if opt.loss in ENERGY_BASED:
        if opt.dataset == "digits":
            defaults |= ENERGY_BASED_DIGITS
        if distributed.world_size() > 1:
            defaults["batch_norm"] = "local"
    return defaults | stored


def check(opt: Options) -> None:
    options.check(opt)
    if opt.loss in ENERGY_BASED:
        positive = opt.likelihood_weight > 0
        cli.require(positive, f"--likelihood-weight must be greater than 0 for {opt.loss}")
        enough = opt.buffer >= opt.batch_size
        cli.require(enough, f"--buffer {opt.buffer} must be at least --batch-size {opt.batch_size}")
        local = opt.batch_norm == "local" or distributed.world_size() == 1
        cli.require(local, f"--loss {opt.loss} needs --batch-norm local")


def make_batch_loss(opt: Options, train_set: data.Dataset, buffer: ReplayBuffer | None = None):
    """-> batch_loss(model, index, draws, generator), one training step up to its loss."""
    attack_copy, sgld_copy = AttackCopy(opt.compile), AttackCopy(opt.compile)
    # a black border would tell data from samples, which have none
    padding = "reflect" if opt.loss in ENERGY_BASED else "constant"

    def batch_loss(model, index, draws, generator):
        x, y = train_set.pixels(index), train_set.labels[index]
        x = augment.crop_flip(x, draws, flip=train_set.flip, padding=padding)
        x_adv = x_s = None
        with autocast(x.device, opt.precision):
            if opt.loss in ("at", "mle", "jeat"):
                energy = "joint" if opt.loss == "jeat" else "ce"
                attack = cem.potential(energy, attack_copy(model), y)
                x_adv = cem.pgd(attack, x, **ball(opt), generator=generator)
            if buffer is not None:
                seen = x if x_adv is None else x_adv
                network = sgld_copy(with_statistics_of(seen, distributed.unwrap(model)))
                log_p = cem.potential("langevin", network)
                x_s = buffer.sample(log_p, len(x), generator.own, **sgld(opt))
            weight = opt.likelihood_weight
            loss, logits = cem.supervised_loss(opt.loss, model, x, y, x_adv, weight, x_s)
        metrics = {"train_accuracy": (logits.argmax(1) == y).float().mean()}
        if buffer is not None:
            metrics["energy"] = -cem.log_marginal(logits).mean()
            metrics["energy_gap"] = (F.cross_entropy(logits, y) - loss) / weight  # E(x_s) - E(x)
        return loss, metrics

    return batch_loss


def ball(opt: Options) -> dict:
    return dict(eps=opt.eps, norm=opt.norm, steps=opt.attack_steps, step_size=opt.attack_step_size)


def sgld(opt: Options) -> dict:
    return dict(steps=opt.sgld_steps, step_size=opt.sgld_step_size, noise=opt.sgld_noise)


@torch.no_grad()
def with_statistics_of(x: torch.Tensor, model: nn.Module) -> nn.Module:
    """A copy of the model whose BatchNorms hold the statistics of the images x (N, C, H, W).

    SGLD climbs this copy, the function that the loss sees. Running statistics lag: samples with low
    energy under them have high energy in the loss, and JEM diverges.
    """
    model = copy.deepcopy(model).requires_grad_(False).eval()

    def store(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        wide = inputs[0].to(norm.running_var.dtype)
        norm.running_var, norm.running_mean = torch.var_mean(wide, (0, 2, 3), correction=0)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(store) for norm in norms]
    model(x)
    for hook in hooks:
        hook.remove()
    return model


def diagnosis(opt: Options, model, test_set: data.Dataset, seeds, buffer) -> dict[str, float]:
    """Energies and likelihood gradients on up to 256 test images, for --diagnose."""
    index = test_set.evenly_spaced(min(opt.n_eval, 256))
    x, y = test_set.pixels(index), test_set.labels[index]
    generator = torch.Generator(x.device).manual_seed(opt.seed)
    x_adv = cem.pgd(cem.potential("ce", model, y), x, **ball(opt), generator=generator)
    if buffer is not None:
        x_s = buffer.images[: len(x)].float()
    else:
        log_p = cem.potential("langevin", model)
        start = seeds.sample(len(x), generator)
        x_s = cem.ascend(log_p, start, norm="none", generator=generator, **sgld(opt))
    return robustness.diagnose(model, x, y, x_adv, x_s)


def train(opt: Options) -> None:
    device = pick_device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, device, opt.image_size)
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    classes = len(train_set.classes)
    model = cem.ParametricCEM(opt.arch, classes, **shape, **train_set.normalisation())
    model = model.to(device, memory_format=torch.channels_last)
    if opt.compile and opt.loss not in ENERGY_BASED:  # these patch BatchNorm.forward every step
        model.compile()
    info = train_set.checkpoint_info(opt.seed_rank)
    seeds = cem.GaussianSeeds.from_state_dict(info["seeds"], device)
    buffer = None
    if opt.loss in ENERGY_BASED:
        fresh = seeds.sample if opt.reinit_from == "gaussian" else None
        buffer = ReplayBuffer(opt.buffer, seeds.shape, opt.reinit, fresh).to(device)
        buffer.images = distributed.local_rows(buffer.images).clone()  # chains of its own

    def measure(model, epoch):
        result = robustness.accuracy(model, test_set, ["pgd-10"], opt, opt.n_eval)
        del result["pgd-10"]  # the same as adversarial_accuracy
        if opt.diagnose:
            result |= diagnosis(opt, model, test_set, seeds, buffer)
        return result

    Trainer(
        opt,
        model,
        len(train_set),
        shuffle=lambda epoch: augment.draws(len(train_set), 3, opt.seed, epoch, device),
        batch_loss=make_batch_loss(opt, train_set, buffer),
        measure=measure,
        chains=buffer,
        bounds={"energy_gap": opt.max_energy_gap},
        **info,
    ).fit()


def main() -> None:
    opt = cli.parse(Options, __doc__, preset, options.MOVED)
    check(opt)
    train(opt)


if __name__ == "__main__":
    cli.run(main)
