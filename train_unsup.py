"""Train an encoder by adversarial contrastive learning: p(x, x') = exp(g(x)ᵀ g(x') / τ) / Z.

    python train_unsup.py                    # CIFAR-10, ResNet-18, l2 PGD-5 on InfoNCE, eps 0.5
    python train_unsup.py --arch resnet50    # the paper's larger network
    python train_unsup.py --dataset digits   # a minute on a laptop

No label is used in training. Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into
--out. eval_robust.py measures the checkpoint, sample.py draws images from it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cem
from lib import augment, cli, data, distributed, init, options, robustness
from lib.attack import AttackCopy, ball
from lib.cli import option
from lib.device import autocast, compile_network, pick_device
from lib.loop import Trainer

DIGITS = dict(
    width=16, epochs=40, batch_size=128, lr=0.1, schedule="onecycle", ema=0.97, attack_steps=3,
    attack_step_size=0.25, eval_every=10, min_crop=0.6,
)  # fmt: skip


@dataclass
class Options(options.TrainOptions):
    dataset: str = option(
        "cifar10", f"{data.HELP}; digits changes defaults: {cli.as_flags(DIGITS)}", "data"
    )
    min_crop: float = option(
        0.2, "least area of a view, as a share of the image", "data", above=0, most=1
    )
    arch: str = option("resnet18", options.ARCH, "model", choices=list(cem.ARCHS), metavar="NAME")
    embed_dim: int = option(128, "dimension of the embedding", "model", least=1)
    temperature: float = option(0.3, "temperature tau of the similarities", "model", above=0)
    loss: str = option(
        "at", "st: NT-Xent of two views; at: one view is attacked", "optimisation",
        choices=["st", "at"],
    )  # fmt: skip
    epochs: int = option(200, "passes over the training images", "optimisation", least=1)
    attack_steps: int = option(5, "PGD steps", "attack", least=1)
    attack_step_size: float = option(0.2, "PGD step size", "attack", above=0)
    out: str = option("runs/unsup", "folder of the run", "run", metavar="PATH")
    eval_every: int = option(5, "epochs between measurements", "run", least=1)
    n_eval: int = option(
        1000, "test images per measurement; k-NN searches 10 times as many", "run", least=2
    )


def preset(opt: Options) -> dict:
    stored = options.stored(opt)
    return (DIGITS if stored.get("dataset", opt.dataset) == "digits" else {}) | stored


def two_views(x: Tensor, u: Tensor, dataset: data.Dataset, opt: Options) -> tuple[Tensor, Tensor]:
    """Two random views of each image of x, by the uniform draws u (N, 2 SIMCLR_DRAWS)."""
    settings = dict(scale=(opt.min_crop, 1.0), flip=dataset.flip)
    first, second = u.chunk(2, 1)
    return augment.simclr(x, first, **settings), augment.simclr(x, second, **settings)


def make_batch_loss(opt: Options, train_set: data.Dataset):
    """-> batch_loss(model, index, draws, generator), one training step up to its loss."""
    attack_copy = AttackCopy(opt.precision, opt.compile)

    def batch_loss(model, index, draws, generator):
        x, x_plus = two_views(train_set.pixels(index), draws, train_set, opt)
        with autocast(x.device, opt.precision):
            if opt.loss == "at":
                encoder = distributed.GatheredEncoder(attack_copy(model))
                attack = cem.potential("pgd", encoder, x_plus)
                x = cem.pgd(attack, x, **ball(opt), generator=generator)
            z, z_plus = model(torch.cat([x, x_plus])).chunk(2)
            z, z_plus = distributed.gather_embeddings(z), distributed.gather_embeddings(z_plus)
            loss = cem.info_nce(z, z_plus, opt.temperature)
        return loss, {}

    return batch_loss


def alignment(z1: Tensor, z2: Tensor) -> float:
    """E ‖z1 - z2‖² over pairs of views (Wang and Isola, 2020). Lower is better, 0 the least."""
    return (z1 - z2).square().sum(1).mean().item()


def uniformity(z: Tensor) -> float:
    """log E exp(-2 ‖z_i - z_j‖²) over pairs i < j (Wang and Isola, 2020). Lower is more uniform."""
    return torch.pdist(z).square().mul(-2).exp().mean().log().item()


@torch.no_grad()
def measure(model: nn.Module, train_set, test_set, opt: Options) -> dict[str, float]:
    """Alignment, uniformity and k-NN accuracy on opt.n_eval test images."""
    model = cem.folded(model)
    query = test_set.evenly_spaced(opt.n_eval)
    bank = train_set.evenly_spaced(10 * opt.n_eval)
    known = robustness.features(model, train_set, bank, opt)
    asked = robustness.features(model, test_set, query, opt)
    labels = train_set.labels[bank], test_set.labels[query]
    _, u = augment.draws(len(query), 2 * augment.SIMCLR_DRAWS, opt.seed, 0, query.device)
    views = two_views(test_set.pixels(query), u, test_set, opt)
    with autocast(query.device, opt.precision):
        z1, z2 = (torch.cat([model(x) for x in view.split(opt.batch_size)]) for view in views)
    return {
        "alignment": alignment(z1, z2),
        "uniformity": uniformity(z1),
        "knn_accuracy": robustness.knn_accuracy(known, labels[0], asked, labels[1]),
    }


def train(opt: Options) -> None:
    device = pick_device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, device, opt.image_size)
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    head = dict(embed_dim=opt.embed_dim, temperature=opt.temperature)
    model = cem.NonParametricCEM(opt.arch, **head, **shape, **train_set.normalisation())
    init.start(model, opt)
    model = model.to(device, memory_format=torch.channels_last)
    if opt.compile:
        compile_network(model, device)

    def measure_when_due(model, epoch):
        due = epoch % opt.eval_every == 0 or epoch == opt.epochs
        return measure(model, train_set, test_set, opt) if due else {}

    n, per_image = len(train_set), 2 * augment.SIMCLR_DRAWS
    Trainer(
        opt,
        model,
        n,
        shuffle=lambda epoch: augment.draws(n, per_image, opt.seed, epoch, device),
        batch_loss=make_batch_loss(opt, train_set),
        measure=measure_when_due,
        **train_set.checkpoint_info(opt.seed_rank),
    ).fit()


def main() -> None:
    opt = cli.parse(Options, __doc__, preset, options.MOVED)
    options.check(opt)
    train(opt)


if __name__ == "__main__":
    cli.run(main)
