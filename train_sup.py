"""Train a classifier adversarially: a parametric energy model p(x, y) = exp f(x, y) / Z.

    python train_sup.py                                # CIFAR-10, ResNet-50, l2 PGD-7: the paper's
    python train_sup.py --dataset digits               # half a minute on a laptop
    python train_sup.py --dataset digits --loss jeat   # joint energy adversarial training
    python train_sup.py --init runs/sup/ckpt.pt --loss dat --out runs/dat   # second stage: samples

Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into --out. eval_robust.py measures
the checkpoint, sample.py draws images from it.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cem
from lib import augment, cli, data, distributed, init, options, robustness
from lib.attack import AttackCopy, hold_out, make_watch, pgd_options
from lib.chains import ReplayBuffer, chain_starts, dual_state, mixed, with_statistics_of
from lib.cli import option
from lib.device import autocast, compile_network, pick_device
from lib.loop import Trainer
from lib.options import DAT, ENERGY

DIGITS = dict(
    arch="resnet18", width=16, epochs=30, batch_size=128, schedule="onecycle", ema=0.97,
    attack_steps=3, attack_step_size=0.3, n_eval=100,
)  # fmt: skip
ENERGY_BASED = ("jem", "jeat")
ENERGY_BASED_DIGITS = dict(epochs=40, lr=0.05, sgld_steps=10, sgld_step_size=0.1, buffer=1000)
DAT_DIGITS = dict(epochs=10, dat_step_size=0.05)


@dataclass
class Options(options.TrainOptions):
    dataset: str = option(
        "cifar10", f"{data.HELP}; digits changes defaults: {cli.as_flags(DIGITS)}", "data"
    )
    loss: str = option(
        "at", "st: standard; at: adversarial; mle: maximum likelihood; jem, jeat: energy-based; "
        f"dat: dual adversarial, a second stage after at (changes defaults: {cli.as_flags(DAT)})",
        "optimisation", choices=list(cem.SUPERVISED_LOSSES),
    )  # fmt: skip
    share: float = option(
        1.0, "fraction of each class's training images to use", "data", above=0, most=1
    )
    out: str = option("runs/sup", "folder of the run", "run", metavar="PATH")
    sgld_steps: int = option(20, "SGLD steps on log p(x) per training step", ENERGY, least=1)
    sgld_step_size: float = option(0.25, "SGLD step size, on the raw gradient", ENERGY, above=0)
    sgld_noise: float = option(0.005, "standard deviation of SGLD's noise", ENERGY, least=0)
    buffer: int = option(10_000, "images in the replay buffer", ENERGY, least=1)
    reinit: float = option(0.05, "probability of reinitialising a chain", ENERGY, least=0, most=1)
    reinit_from: str = option(
        "noise", "where chains start: uniform noise or Gaussian seeds", ENERGY,
        choices=["noise", "gaussian"],
    )  # fmt: skip
    chain_samplers: str = option(
        "cs,rcs,langevin,ta", "potentials of dat's chains; each chain draws one", ENERGY
    )
    diagnose: bool = option(
        False, "log energies, likelihood gradients and calibration every epoch", "run"
    )


def preset(opt: Options) -> dict:
    of_loss = {"dat": (DAT, DAT_DIGITS)}
    of_loss |= dict.fromkeys(ENERGY_BASED, ({"batch_norm": "local"}, ENERGY_BASED_DIGITS))
    return options.preset(opt, DIGITS, of_loss)


def chain_samplers(opt: Options) -> list[str]:
    return cli.names("--chain-samplers", opt.chain_samplers, cem.PARAMETRIC_SAMPLERS)


def check(opt: Options) -> None:
    options.check(opt)
    samplers = chain_samplers(opt)
    once = len(set(samplers)) == len(samplers)
    cem.require(once, f"--chain-samplers {opt.chain_samplers}: names repeat")
    if opt.loss in ENERGY_BASED:
        positive = opt.likelihood_weight > 0
        cem.require(positive, f"--likelihood-weight must be greater than 0 for {opt.loss}")
        enough = opt.buffer >= opt.batch_size
        cem.require(enough, f"--buffer {opt.buffer} must be at least --batch-size {opt.batch_size}")
        local = opt.batch_norm == "local" or distributed.world_size() == 1
        cem.require(local, f"--loss {opt.loss} needs --batch-norm local")


def make_batch_loss(opt: Options, train_set: data.Dataset, buffer: ReplayBuffer | None = None):
    """-> batch_loss(model, index, draws, generator), one training step up to its loss."""
    attack_copy, sgld_copy = (AttackCopy(opt.precision, opt.compile) for _ in range(2))
    # zero padding would separate data from samples
    padding = "reflect" if opt.loss in ENERGY_BASED else "constant"

    def batch_loss(model, index, draws, generator):
        x, y = train_set.pixels(index), train_set.labels[index]
        x = augment.crop_flip(x, draws, flip=train_set.flip, padding=padding)
        x_adv = x_s = None
        with autocast(x.device, opt.precision):
            if opt.loss in ("at", "mle", "jeat"):
                energy = "joint" if opt.loss == "jeat" else "ce"
                attack = cem.potential(energy, attack_copy(model), y)
                x_adv = cem.pgd(attack, x, **pgd_options(opt), generator=generator)
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


def make_dual_loss(opt: Options, train_set: data.Dataset, start, state: nn.ModuleDict):
    """-> batch_loss, as above, of dual adversarial training.

    start(labels, generator) -> images (N, C, H, W) where chains start; state: its chains and, in
    `reference`, the network of the first stage, whose p(y | x) the loss keeps.
    """
    attack_copy = AttackCopy(opt.precision, opt.compile)
    chains = state["chains"]
    samplers = chain_samplers(opt)
    classes = train_set.labels.sort().values  # as frequent among chains as among data

    def batch_loss(model, index, draws, generator):
        y = train_set.labels[index]
        network = attack_copy(model)
        x = augment.mirror(train_set.pixels(index), draws, train_set.flip)
        drawn = generator.draw(torch.rand, (len(y), 2), draws).T
        y_s = classes[(drawn[0] * len(classes)).long()]
        which = (drawn[1] * len(samplers)).long()
        x_s = start(y_s, generator)
        with autocast(x.device, opt.precision):
            attack = cem.potential("ce", network, y)
            x_adv = cem.pgd(attack, x, **pgd_options(opt), generator=generator)
            climbed = mixed(samplers, network, y_s, which)
            x_s = chains.sample(climbed, x_s, generator)
            if not chains.updates:
                chains.begin(network(torch.cat([x, x_s])), torch.cat([y, y_s]))
            weight = opt.likelihood_weight
            b, b_posterior = chains.offsets.tolist()
            logits, logits_x, logits_s = model(torch.cat([x_adv, x, x_s])).chunk(3)
            log_p, log_p_s = cem.log_marginal(logits_x), cem.log_marginal(logits_s)
            loss = F.cross_entropy(logits, y) + weight * cem.separation_loss(log_p, log_p_s, b)
            if "ta" in samplers:  # it raises p(y | x) above that of data, which log p(x) misses
                posteriors = cem.log_posterior(logits_x, y), cem.log_posterior(logits_s, y_s)
                weights = (which == samplers.index("ta")) * len(samplers)
                loss = loss + weight * cem.separation_loss(*posteriors, b_posterior, weights)
            if "reference" in state:
                before = state["reference"](x).log_softmax(1)
                now = logits_x.log_softmax(1)
                kept = F.kl_div(now, before, reduction="batchmean", log_target=True)
                loss = loss + opt.keep * kept
        accuracy = (logits.argmax(1) == y).float().mean()
        return loss, {"train_accuracy": accuracy, **chains.update(log_p, log_p_s)}

    return batch_loss


def sgld(opt: Options) -> dict:
    return dict(steps=opt.sgld_steps, step_size=opt.sgld_step_size, noise=opt.sgld_noise)


def diagnosis(opt: Options, model, test_set: data.Dataset, seeds, buffer) -> dict[str, float]:
    """Energies and likelihood gradients on up to 256 test images, for --diagnose."""
    index = test_set.evenly_spaced(min(opt.n_eval, 256))
    x, y = test_set.pixels(index), test_set.labels[index]
    generator = torch.Generator(x.device).manual_seed(opt.seed)
    x_adv = cem.pgd(cem.potential("ce", model, y), x, **pgd_options(opt), generator=generator)
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
    cem.require(len(train_set.classes) > 1, f"{opt.dataset} has one class: use train_unsup.py")
    if opt.share < 1:
        train_set = train_set.share(opt.share)
    info = train_set.checkpoint_info(opt.seed_rank)
    held_out, train_set = hold_out(opt, train_set)
    watch = make_watch(opt, held_out.pixels(), held_out.labels) if held_out is not None else None
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    classes = len(train_set.classes)
    model = cem.ParametricCEM(opt.arch, classes, **shape, **train_set.normalisation())
    init.start(model, opt, train_set)
    model = model.to(device, memory_format=torch.channels_last)
    if opt.compile and opt.loss not in ENERGY_BASED:  # these patch BatchNorm.forward every step
        compile_network(model, device)
    seeds = cem.GaussianSeeds.from_state_dict(info["seeds"], device)
    buffer = None
    if opt.loss in ENERGY_BASED:
        fresh = seeds.sample if opt.reinit_from == "gaussian" else None
        buffer = ReplayBuffer(opt.buffer, seeds.shape, opt.reinit, fresh).to(device)
        buffer.images = distributed.local_rows(buffer.images).clone()  # chains of its own

    if opt.loss == "dat":
        start = chain_starts(opt.chain_start, opt.data_dir, seeds, device)
        state = dual_state(opt, model, cem.PARAMETRIC_SAMPLERS)
        batch_loss = make_dual_loss(opt, train_set, start, state)
    else:
        state = buffer
        batch_loss = make_batch_loss(opt, train_set, buffer)

    def extra(model, hurried):
        return {"settings": state["chains"].settings} if opt.loss == "dat" else {}

    def measure(model, epoch):
        result = robustness.accuracy(model, test_set, ["pgd-10"], opt, opt.n_eval)
        del result["pgd-10"]  # the same as adversarial_accuracy
        if opt.diagnose:
            plain = copy.deepcopy(model)  # torch.compile may refuse to retain a graph
            result |= diagnosis(opt, plain, test_set, seeds, buffer)
        return result

    n = len(train_set)
    Trainer(
        opt,
        model,
        n,
        shuffle=lambda epoch: augment.draws(n, augment.CROP_DRAWS, opt.seed, epoch, device),
        batch_loss=batch_loss,
        measure=measure,
        watch=watch,
        state=state,
        info=info,
        extra=extra,
    ).fit()


def main() -> None:
    opt = cli.parse(Options, __doc__, preset)
    check(opt)
    options.claim(Path(opt.out))
    train(opt)


if __name__ == "__main__":
    cli.run(main)
