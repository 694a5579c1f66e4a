"""Train a classifier adversarially: a parametric contrastive energy model p(x, y) = exp f(x, y) / Z.

    python train_sup.py                                  # CIFAR-10, ResNet-50, l2 PGD-7, eps 0.5: the paper's recipe
    python train_sup.py --dataset digits                 # seconds on a laptop
    python train_sup.py --dataset digits --evaluate      # clean and PGD-20 accuracy of runs/sup/ckpt.pt

Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into --out.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import cem
import data
import engine
from engine import option

DIGITS = dict(arch="resnet18", width=16, epochs=30, batch_size=128, lr=0.1, schedule="onecycle", ema=0.97)
DIGITS |= dict(attack_steps=3, attack_step_size=0.3, n_eval=100)


@dataclass
class Options(engine.TrainOptions):
    dataset: str = option("cifar10", data.HELP)
    out: str = option("runs/sup", "folder of the run: ckpt.pt, log.jsonl, options.json, TensorBoard events")
    loss: str = option(
        "at",
        "st: cross-entropy of the images; at: of the attacked images; mle: at + --mle-weight x [f(x_adv, y) - f(x, y)], "
        "both halves of the likelihood gradient",
        choices=list(cem.SUPERVISED_LOSSES),
    )
    mle_weight: float = option(0.1, "lambda of --loss mle")
    mean: list[float] = engine.options(float, f"--evaluate: mean {engine.NORMALISATION}")
    std: list[float] = engine.options(float, f"--evaluate: standard deviation {engine.NORMALISATION}")
    evaluate: bool = option(False, "do not train: clean and PGD-20 accuracy of --ckpt on the test images")


def evaluate(opt: Options) -> None:
    where, path = engine.device(opt.device), Path(opt.ckpt or Path(opt.out) / "ckpt.pt")
    opt.precision = opt.precision.replace("auto", "float32")  # figures to compare with others'
    model = engine.load(path, where, opt).to(memory_format=torch.channels_last)
    engine.require(isinstance(model, cem.ParametricCEM), f"{path} is no classifier: train_sup.py makes one")
    test, foreign = data.load(opt.dataset, "test", opt.data_dir).to(where), "foreign" in model.extra
    if foreign:
        engine.adopt(model, path, data.load(opt.dataset, "train", opt.data_dir))
    engine.require(
        (model.config["in_channels"], model.config["num_classes"]) == (test.images.shape[1], len(test.classes)),
        f"{path} was not trained on data like {opt.dataset}: channels or classes differ",
    )
    result = engine.accuracy(model, test, opt, steps=20)
    engine.record_accuracy("accuracy.json", path, test, opt, result, foreign)


def train(opt: Options) -> None:
    where = engine.device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, where)
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    model = cem.ParametricCEM(opt.arch, len(train_set.classes), **shape, **train_set.normalisation())
    model = model.to(where, memory_format=torch.channels_last)

    def batch_loss(model, index, draws, generator):
        x, y = data.crop_flip(train_set.pixels(index), draws, flip=train_set.flip), train_set.labels[index]
        with engine.autocast(where, opt.precision):
            x_adv = None
            if opt.loss != "st":
                attack = cem.potential("ce", cem.folded(model), y)
                ball = dict(eps=opt.eps, norm=opt.norm, steps=opt.attack_steps, step_size=opt.attack_step_size)
                x_adv = cem.pgd(attack, x, **ball, generator=generator)
            loss, logits = cem.supervised_loss(opt.loss, model, x, y, x_adv, opt.mle_weight)
        return loss, {"train_accuracy": (logits.argmax(1) == y).float().mean()}

    engine.fit(
        opt,
        model,
        len(train_set),
        shuffle=lambda epoch: data.draws(len(train_set), 3, opt.seed, epoch, where),
        batch_loss=batch_loss,
        evaluate=lambda model, epoch: engine.accuracy(model, test_set, opt, steps=10, n=opt.n_eval),
        **train_set.card(opt.seed_rank),
    )


def main() -> None:
    opt = engine.parse(Options, __doc__, {"digits": DIGITS})
    engine.check(opt)
    evaluate(opt) if opt.evaluate else train(opt)


if __name__ == "__main__":
    engine.run(main)
