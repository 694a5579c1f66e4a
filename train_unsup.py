"""Train an encoder by adversarial contrastive learning: p(x, x') = exp(g(x)ᵀ g(x') / τ) / Z.

    python train_unsup.py                    # CIFAR-10, ResNet-18, l2 PGD-5 on InfoNCE, eps 0.5
    python train_unsup.py --arch resnet50    # the paper's larger network
    python train_unsup.py --dataset digits   # a minute on a laptop
    python train_unsup.py --init runs/unsup/ckpt.pt --loss dat --out runs/unsup-dat # second stage

No label is used in training. Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into
--out. eval_robust.py measures the checkpoint, sample.py draws images from it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cem
from lib import augment, cli, data, distributed, init, options, robustness
from lib.attack import AttackCopy, hold_out, make_watch, pgd_options
from lib.chains import chain_starts, dual_state
from lib.cli import option
from lib.clusters import ClusterSeeds
from lib.device import autocast, compile_network, pick_device
from lib.loop import Trainer
from lib.options import DAT, ENERGY
from lib.run import RunFolder, resumes
from lib.sampling import make_bank

DIGITS = dict(
    width=16, epochs=40, batch_size=128, schedule="onecycle", ema=0.97, attack_steps=3,
    attack_step_size=0.25, eval_every=10, min_crop=0.6,
)  # fmt: skip
DAT_DIGITS = dict(epochs=10, dat_step_size=0.05, clusters=16)
TUNED = ("marginal", "marginal-cond", "maxent-marginal", "maxent-marginal-cond")  # by dat
VIEWS = 2 * augment.SIMCLR_DRAWS  # uniform draws of two views


@dataclass
class Options(options.TrainOptions):
    dataset: str = option(
        "cifar10", f"{data.HELP}; digits changes defaults: {cli.as_flags(DIGITS)}", "data"
    )
    min_crop: float = option(
        0.2, "minimum crop area, as a fraction of the image", "data", above=0, most=1
    )
    arch: str = option("resnet18", options.ARCH, "model", choices=list(cem.ARCHS), metavar="NAME")
    embed_dim: int = option(128, "dimension of the embedding", "model", least=1)
    temperature: float = option(0.3, "temperature tau of the similarities", "model", above=0)
    loss: str = option(
        "at", "st: NT-Xent of two views; at: one view is attacked; dat: also learns log p(x), "
        f"a second stage after at (changes defaults: {cli.as_flags(DAT)})",
        "optimisation", choices=["st", "at", "dat"],
    )  # fmt: skip
    epochs: int = option(200, "passes over the training images", "optimisation", least=1)
    attack_steps: int = option(5, "PGD steps", "attack", least=1)
    attack_step_size: float = option(0.2, "PGD step size", "attack", above=0)
    clusters: int = option(
        32, "k-means clusters of --init's features, where chains of dat start: Gaussians of half "
        "the --seed-rank", ENERGY, least=1,
    )  # fmt: skip
    out: str = option("runs/unsup", "folder of the run", "run", metavar="PATH")
    eval_every: int = option(5, "epochs between measurements", "run", least=1)
    n_eval: int = option(
        1000, "test images per measurement; k-NN bank: 10 times as large", "run", least=2
    )


def preset(opt: Options) -> dict:
    return options.preset(opt, DIGITS, {"dat": (DAT, DAT_DIGITS)})


def two_views(x: Tensor, u: Tensor, dataset: data.Dataset, opt: Options) -> tuple[Tensor, Tensor]:
    """Two random views of each image of x, by the uniform draws u (N, 2 SIMCLR_DRAWS)."""
    settings = dict(scale=(opt.min_crop, 1.0), flip=dataset.flip)
    return augment.simclr(torch.cat([x, x]), torch.cat(u.chunk(2, 1)), **settings).chunk(2)


def fixed_views(dataset: data.Dataset, opt: Options) -> tuple[Tensor, Tensor]:
    """Two views of each image of the dataset, the same in every call."""
    _, u = augment.draws(len(dataset), VIEWS, opt.seed, 0, dataset.images.device)
    batches = dataset.evenly_spaced(0).split(opt.batch_size)
    parts = [two_views(dataset.pixels(rows), u[rows], dataset, opt) for rows in batches]
    return tuple(map(torch.cat, zip(*parts)))


def attacked(x: Tensor, x_plus: Tensor, network: nn.Module, opt: Options, generator) -> Tensor:
    """The views x, moved away from their positives x_plus."""
    attack = cem.potential("pgd", distributed.GatheredEncoder(network), x_plus)
    return cem.pgd(attack, x, **pgd_options(opt), generator=generator)


def gathered_info_nce(z: Tensor, z_plus: Tensor, temperature: float) -> Tensor:
    z, z_plus = distributed.gather_on_device(z), distributed.gather_on_device(z_plus)
    return cem.info_nce(z, z_plus, temperature)


def make_batch_loss(opt: Options, train_set: data.Dataset):
    """-> batch_loss(model, index, draws, generator), one training step up to its loss."""
    attack_copy = AttackCopy(opt.precision, opt.compile)

    def batch_loss(model, index, draws, generator):
        x, x_plus = two_views(train_set.pixels(index), draws, train_set, opt)
        with autocast(x.device, opt.precision):
            if opt.loss == "at":
                x = attacked(x, x_plus, attack_copy(model), opt, generator)
            z, z_plus = model(torch.cat([x, x_plus])).chunk(2)
            loss = gathered_info_nce(z, z_plus, opt.temperature)
        return loss, {}

    return batch_loss


def make_dual_loss(opt: Options, train_set: data.Dataset, start, state: nn.ModuleDict):
    """-> batch_loss, as above, of dual adversarial training without labels (ours, after [DAT]).

    InfoNCE of two views, one attacked, λ times the cross-entropy of telling data from samples by
    the learned log p(x), and `keep` times one minus the cosine of the features with those of
    state["reference"], the first stage. start(n, generator) -> images (n, C, H, W) where chains
    start.
    """
    attack_copy = AttackCopy(opt.precision, opt.compile)
    chains = state["chains"]

    def batch_loss(model, index, draws, generator):
        original = train_set.pixels(index)
        network = attack_copy(model)
        x, x_plus = two_views(original, draws[:, :VIEWS], train_set, opt)
        flipped = augment.mirror(original, draws[:, VIEWS:], train_set.flip)
        x_s = start(len(index), generator)
        with autocast(x.device, opt.precision):
            x = attacked(x, x_plus, network, opt, generator)
            x_s = chains.sample(cem.potential("marginal", network), x_s, generator)
            z, h, log_p = model(torch.cat([x, x_plus, flipped, x_s]), details=True)
            log_p, log_p_s = log_p.chunk(4)[2:]
            loss = gathered_info_nce(*z.chunk(4)[:2], opt.temperature)
            loss = loss + opt.likelihood_weight * cem.separation_loss(log_p, log_p_s)
            if "reference" in state:
                before = state["reference"].features(flipped)
                kept = F.cosine_similarity(h.chunk(4)[2], before)
                loss = loss + opt.keep * (1 - kept).mean()
        return loss, chains.update(log_p, log_p_s)

    return batch_loss


def fit_clusters(opt: Options, model: nn.Module, train_set: data.Dataset) -> ClusterSeeds:
    """Fit the clusters of the model's features of all training images and, if its energy is new,
    standardise its input."""
    features = robustness.outputs(cem.folded(model).features, train_set, opt)
    cem.require(bool(features.isfinite().all()), f"the features of {opt.init} are not finite")
    features = distributed.mean(features)  # identical in all processes, hence identical clusters
    norm, linear = model.energy
    if not linear.weight.any():
        norm.running_var, norm.running_mean = torch.var_mean(features, 0)
    rank = max(opt.seed_rank // 2, 1)
    return ClusterSeeds.fit(train_set.images, features, opt.clusters, rank, opt.seed)


def of_first_stage(opt: Options, model: nn.Module, train_set: data.Dataset) -> dict:
    """What dat's checkpoint has from the first stage: clusters, and the samplers' settings."""
    if resumes(opt):  # without the first stage
        before = RunFolder(opt).load(torch.device("cpu")).extra
        clusters = before.get("clusters")
        missing = f"the run in {opt.out} has no clusters: train_unsup.py did not make it"
        cem.require(bool(clusters), f"--resume: {missing}")
    else:
        before = init.load(opt).extra
        clusters = fit_clusters(opt, model, train_set).state_dict()
    # those of maxent and pgd suit both stages
    return {"clusters": clusters, "settings": before.get("settings", {})}


def alignment(z1: Tensor, z2: Tensor) -> float:
    """E ‖z1 - z2‖² over pairs of views (Wang and Isola, 2020). Lower is better, 0 the least."""
    return (z1 - z2).square().sum(1).mean().item()


def uniformity(z: Tensor) -> float:
    """log E exp(-2 ‖z_i - z_j‖²) over pairs i < j (Wang and Isola, 2020). Lower is more uniform."""
    return torch.pdist(z.cpu()).square().mul(-2).exp().mean().log().item()


@torch.no_grad()
def measure(model: nn.Module, train_set, test_set, opt: Options) -> dict[str, float]:
    """Alignment, uniformity and k-NN accuracy on opt.n_eval test images."""
    model = cem.folded(model)
    asked = test_set.subset(test_set.evenly_spaced(opt.n_eval))
    known = train_set.subset(train_set.evenly_spaced(10 * opt.n_eval))
    query, bank = (robustness.outputs(model.features, part, opt) for part in (asked, known))
    with autocast(query.device, opt.precision):
        z1, z2 = (
            torch.cat([model(x) for x in view.split(opt.batch_size)])
            for view in fixed_views(asked, opt)
        )
    return {
        "alignment": alignment(z1, z2),
        "uniformity": uniformity(z1),
        "knn_accuracy": robustness.knn_accuracy(bank, known.labels, query, asked.labels),
    }


def train(opt: Options) -> None:
    device = pick_device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, device, opt.image_size)
    cem.require(len(test_set) > 1, f"{opt.dataset} has one test image: measurements need two")
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    dual = opt.loss == "dat"
    head = dict(embed_dim=opt.embed_dim, temperature=opt.temperature, energy=dual)
    model = cem.NonParametricCEM(opt.arch, **head, **shape, **train_set.normalisation())
    init.start(model, opt, train_set)
    model = model.to(device, memory_format=torch.channels_last)
    if opt.compile:
        compile_network(model, device)
    info = train_set.checkpoint_info(opt.seed_rank)
    held_out, train_set = hold_out(opt, train_set)
    watch = make_watch(opt, *fixed_views(held_out, opt)) if held_out is not None else None
    state = None
    if dual:
        state = dual_state(opt, model, TUNED)
        info |= of_first_stage(opt, model, train_set)
        clusters = ClusterSeeds.from_state_dict(info["clusters"], device)
        start = chain_starts(opt.chain_start, opt.data_dir, clusters, device)
        batch_loss = make_dual_loss(opt, train_set, start, state)
    else:
        batch_loss = make_batch_loss(opt, train_set)

    def measure_when_due(model, epoch):
        if epoch % opt.eval_every and epoch != opt.epochs:
            return {}
        return measure(model, train_set, test_set, opt)

    def extra(model, hurried):
        found = {"settings": info["settings"] | state["chains"].settings} if dual else {}
        return found if hurried else found | {"bank": make_bank(model, train_set, opt)}

    n = len(train_set)
    per_image = VIEWS + augment.CROP_DRAWS * dual
    Trainer(
        opt,
        model,
        n,
        shuffle=lambda epoch: augment.draws(n, per_image, opt.seed, epoch, device),
        batch_loss=batch_loss,
        measure=measure_when_due,
        watch=watch,
        state=state,
        info=info,
        extra=extra,
    ).fit()


def main() -> None:
    opt = cli.parse(Options, __doc__, preset)
    options.check(opt)
    options.claim(Path(opt.out))
    train(opt)


if __name__ == "__main__":
    cli.run(main)
