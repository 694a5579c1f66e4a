"""Train a classifier adversarially: a parametric contrastive energy model p(x, y) = exp f(x, y) / Z.

    python train_sup.py                                  # CIFAR-10, ResNet-50, l2 PGD-7, eps 0.5: the paper's recipe
    python train_sup.py --dataset digits                 # seconds on a laptop
    python train_sup.py --dataset digits --loss jeat     # joint energy adversarial training
    python train_sup.py --dataset digits --evaluate      # clean and PGD-20 accuracy of runs/sup/ckpt.pt

Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into --out.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cem
import cli
import data
import engine
import hardware
import parallel
import robust
from cli import option

DIGITS = dict(arch="resnet18", width=16, epochs=30, batch_size=128, lr=0.1, schedule="onecycle", ema=0.97)
DIGITS |= dict(attack_steps=3, attack_step_size=0.3, n_eval=100)
ENERGY_BASED = ("jem", "jeat")
ENERGY_BASED_DIGITS = dict(epochs=40, lr=0.05, sgld_steps=10, sgld_step_size=0.1, buffer=1000)


@dataclass
class Options(cli.TrainOptions):
    dataset: str = option("cifar10", f"{data.HELP}; digits has defaults of its own: {cli.spelled(DIGITS)}")
    out: str = option("runs/sup", "folder of the run: ckpt.pt, log.jsonl, options.json, TensorBoard events")
    loss: str = option(
        "at",
        "st: cross-entropy of the images; at: of the attacked images; mle: at + lambda [f(x_adv, y) - f(x, y)], both halves "
        "of the likelihood gradient; jem: st + lambda [log p(x_s) - log p(x)], x_s drawn by SGLD from a replay buffer; "
        "jeat: jem of images attacked in their joint energy",
        choices=list(cem.SUPERVISED_LOSSES),
    )
    likelihood_weight: float = option(0.1, "lambda, weight of the terms beside the cross-entropy in mle, jem and jeat")
    sgld_steps: int = option(20, "SGLD steps on log p(x) a training step, jem and jeat")
    sgld_step_size: float = option(1.0, "SGLD step size, times the plain gradient")
    sgld_noise: float = option(0.01, "standard deviation of SGLD's noise")
    buffer: int = option(10_000, "images in the replay buffer")
    reinit: float = option(0.05, "probability that a chain begins anew when it is drawn from the buffer")
    reinit_from: str = option("noise", "where chains begin: uniform noise or Gaussian seeds", choices=["noise", "gaussian"])
    max_energy_gap: float = option(100.0, "jem and jeat: largest |E(x_s) - E(x)| before a run counts as diverged")
    diagnose: bool = option(
        False, "log energies, likelihood gradients and calibration every epoch (results/energies.py plots)"
    )
    evaluate: bool = option(
        False, "do not train: accuracy under attack, calibration and OOD scores of --ckpt on the test images"
    )
    attacks: list[str] = cli.options(
        str, f"--evaluate: any of {', '.join(robust.ATTACKS)}, {robust.AUTOATTACK} (needs pyautoattack) (default: pgd-20)"
    )
    ood: list[str] = cli.options(str, "--evaluate: datasets or folders to tell from the test set, besides noise and constant")
    mean: list[float] = cli.options(float, f"--evaluate: mean {cli.NORMALISATION}")
    std: list[float] = cli.options(float, f"--evaluate: standard deviation {cli.NORMALISATION}")


def preset(opt: Options) -> dict:
    result = DIGITS if opt.dataset == "digits" else {}
    if opt.loss in ENERGY_BASED and result:
        result = result | ENERGY_BASED_DIGITS
    if opt.loss in ENERGY_BASED and parallel.size() > 1:
        result = result | dict(batch_norm="local")
    return result


def check(opt: Options) -> None:
    cli.check(opt)
    least = 1e-9 if opt.loss in ENERGY_BASED else 0
    cli.require(opt.likelihood_weight >= least, "--likelihood-weight must be positive, with mle at least 0")
    cli.require(opt.sgld_steps >= 1 and opt.sgld_step_size > 0, "--sgld-steps and --sgld-step-size must be positive")
    cli.require(
        opt.sgld_noise >= 0 and 0 <= opt.reinit <= 1, "--sgld-noise and --reinit must not be negative, --reinit at most 1"
    )
    cli.require(
        opt.loss not in ENERGY_BASED or opt.buffer >= opt.batch_size,
        f"--buffer {opt.buffer} is smaller than --batch-size {opt.batch_size}: a step takes as many chains as images",
    )
    cli.require(
        opt.loss not in ENERGY_BASED or opt.batch_norm == "local" or parallel.size() == 1,
        f"--loss {opt.loss} has its BatchNorm by each process's own images: --batch-norm local",
    )
    cli.require(opt.max_energy_gap > 0, "--max-energy-gap must be positive")
    known = [*robust.ATTACKS, robust.AUTOATTACK]
    for name in opt.attacks:
        cli.require(name in known, f"--attacks: unknown {name!r}; there are {', '.join(known)}")


def evaluate(opt: Options) -> None:
    where, path = hardware.device(opt.device), Path(opt.ckpt or Path(opt.out) / "ckpt.pt")
    opt.precision = opt.precision.replace("auto", "float32")  # figures to compare with others'
    model = cli.load(path, where, opt).to(memory_format=torch.channels_last)
    cli.require(isinstance(model, cem.ParametricCEM), f"{path} is no classifier: train_sup.py makes one")
    test, foreign = data.load(opt.dataset, "test", opt.data_dir).to(where), "foreign" in model.extra
    if foreign:
        cli.adopt(model, path, data.load(opt.dataset, "train", opt.data_dir))
    cli.require(
        (model.config["in_channels"], model.config["num_classes"]) == (test.images.shape[1], len(test.classes)),
        f"{path} was not trained on data like {opt.dataset}: channels or classes differ",
    )
    chosen = test.spread(opt.n or len(test))
    logits = robust.logits_of(model, (test.pixels(index) for index in chosen.split(opt.batch_size)), opt)
    cli.require(bool(logits.isfinite().all()), f"{path} gives logits that are not finite")
    result = {"calibration_error": robust.calibration_error(logits, test.labels[chosen])}
    result |= robust.out_of_distribution(model, logits, test, ("noise", "constant", *opt.ood), opt)
    result = robust.accuracy(model, test, opt, opt.attacks or ["pgd-20"], opt.n) | result
    robust.record("accuracy.json", path, test, opt, result, foreign)


def objective(opt: Options, train_set: data.Dataset, buffer: cem.ReplayBuffer | None = None):
    """-> batch_loss(model, index, draws, generator) as engine.fit wants it: augment, attack, and the loss of --loss."""
    where, ball = train_set.images.device, ball_of(opt)
    attacked, climbed = hardware.Frozen(opt.compile), hardware.Frozen(opt.compile)
    padding = "reflect" if opt.loss in ENERGY_BASED else "constant"  # by a black edge data could be told from samples

    def batch_loss(model, index, draws, generator):
        x, y = data.crop_flip(train_set.pixels(index), draws, flip=train_set.flip, padding=padding), train_set.labels[index]
        x_adv = x_s = None
        with hardware.autocast(where, opt.precision):
            if opt.loss in ("at", "mle", "jeat"):
                attack = cem.potential("joint" if opt.loss == "jeat" else "ce", attacked(model), y)
                x_adv = cem.pgd(attack, x, **ball, generator=generator)
            if buffer is not None:
                network = climbed(by_statistics_of(x if x_adv is None else x_adv, parallel.bare(model)))
                x_s = buffer.sample(cem.potential("langevin", network), len(x), generator.own, **sgld_of(opt))
            loss, logits = cem.supervised_loss(opt.loss, model, x, y, x_adv, opt.likelihood_weight, x_s)
        metrics = {"train_accuracy": (logits.argmax(1) == y).float().mean()}
        if buffer is not None:
            metrics["energy"] = -cem.log_marginal(logits).mean()
            metrics["energy_gap"] = (F.cross_entropy(logits, y) - loss) / opt.likelihood_weight  # E(x_s) - E(x)
        return loss, metrics

    return batch_loss


@torch.no_grad()
def by_statistics_of(x: Tensor, model: nn.Module) -> nn.Module:
    """A copy of the model whose BatchNorms keep mean and variance of the images x (N, C, H, W): what the loss sees, for SGLD.

    On the running statistics, which lag behind, samples of low energy are none to the loss: JEM diverged in all of five runs.
    """
    model = copy.deepcopy(model).requires_grad_(False).eval()

    def keep(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0].to(norm.running_var.dtype), (0, 2, 3), correction=0)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    model(x)
    for hook in hooks:
        hook.remove()
    return model


def ball_of(opt: Options) -> dict:
    return dict(eps=opt.eps, norm=opt.norm, steps=opt.attack_steps, step_size=opt.attack_step_size)


def sgld_of(opt: Options) -> dict:
    return dict(steps=opt.sgld_steps, step_size=opt.sgld_step_size, noise=opt.sgld_noise)


def train(opt: Options) -> None:
    where = hardware.device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, where)
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    model = cem.ParametricCEM(opt.arch, len(train_set.classes), **shape, **train_set.normalisation())
    model = model.to(where, memory_format=torch.channels_last)
    if opt.compile and opt.loss not in ENERGY_BASED:  # whose BatchNorms are others in every step
        model.compile()
    card = train_set.card(opt.seed_rank)
    seeds = cem.GaussianSeeds.from_state_dict(card["seeds"], where)
    buffer = None
    if opt.loss in ENERGY_BASED:
        fresh = seeds.sample if opt.reinit_from == "gaussian" else None
        buffer = cem.ReplayBuffer(opt.buffer, train_set.images.shape[1:], opt.reinit, fresh).to(where)
        buffer.images = parallel.share(buffer.images).clone()  # every process keeps chains of its own

    def measure(model, epoch):
        result = robust.accuracy(model, test_set, opt, ["pgd-10"], n=opt.n_eval)
        del result["pgd-10"]  # which is the adversarial accuracy
        if opt.diagnose:
            index, generator = test_set.spread(min(opt.n_eval, 256)), torch.Generator(where).manual_seed(opt.seed)
            x, y = test_set.pixels(index), test_set.labels[index]
            x_adv = cem.pgd(cem.potential("ce", model, y), x, **ball_of(opt), generator=generator)
            if buffer is not None:
                x_s = buffer.images[: len(x)].float()
            else:
                start = seeds.sample(len(x), generator)
                x_s = cem.ascend(cem.potential("langevin", model), start, norm="none", **sgld_of(opt), generator=generator)
            result |= robust.diagnose(model, x, y, x_adv, x_s)
        return result

    engine.fit(
        opt,
        model,
        len(train_set),
        shuffle=lambda epoch: data.draws(len(train_set), 3, opt.seed, epoch, where),
        batch_loss=objective(opt, train_set, buffer),
        evaluate=measure,
        state=buffer,
        bounds={"energy_gap": opt.max_energy_gap},
        **card,
    )


def main() -> None:
    opt = cli.parse(Options, __doc__, preset)
    check(opt)
    evaluate(opt) if opt.evaluate else train(opt)


if __name__ == "__main__":
    cli.run(main)
