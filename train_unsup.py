"""Train an encoder by adversarial contrastive learning: a non-parametric energy model p(x, x') = exp(g(x)ᵀg(x') / τ) / Z.

    python train_unsup.py                                # CIFAR-10, ResNet-18, l2 PGD-5 on InfoNCE, eps 0.5
    python train_unsup.py --arch resnet50                # the paper's run
    python train_unsup.py --dataset digits               # about a minute on a laptop
    python train_unsup.py --dataset digits --evaluate    # linear probe of runs/unsup/ckpt.pt

No label is used in training. Writes ckpt.pt, log.jsonl, options.json and TensorBoard events into --out.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

import cem
import cli
import data
import engine
import hardware
import parallel
import robust
from cli import option

DIGITS = dict(width=16, epochs=40, batch_size=128, lr=0.1, schedule="onecycle", ema=0.97, attack_steps=3)
DIGITS |= dict(attack_step_size=0.25, eval_every=10, min_crop=0.6)


@dataclass
class Options(cli.TrainOptions):
    dataset: str = option("cifar10", f"{data.HELP}; digits has defaults of its own: {cli.spelled(DIGITS)}")
    arch: str = option("resnet18", "network", choices=list(cem.ARCHS))
    epochs: int = option(200, "passes over the training images")
    out: str = option("runs/unsup", "folder of the run: ckpt.pt, log.jsonl, options.json, TensorBoard events")
    loss: str = option("at", "st: NT-Xent of two views; at: with one view attacked by PGD on InfoNCE", choices=["st", "at"])
    temperature: float = option(0.3, "temperature tau of the similarities")
    embed_dim: int = option(128, "dimensions of the embedding")
    min_crop: float = option(0.2, "smallest share of the image that a view shows")
    attack_steps: int = option(5, "PGD steps in training")
    attack_step_size: float = option(0.2, "PGD step size in training")
    eval_every: int = option(5, "epochs between measurements of alignment, uniformity and k-NN accuracy")
    n_eval: int = option(1000, "test images for these, k-NN among 10 times as many training images; --evaluate takes all")
    evaluate: bool = option(False, "do not train: linear probe (logistic regression), k-NN, PGD-20 through encoder and probe")


def check(opt: Options) -> None:
    cli.check(opt)
    cli.require(opt.temperature > 0, "--temperature must be positive")
    cli.require(0 < opt.min_crop <= 1, "--min-crop must lie in (0, 1]")
    cli.require(opt.embed_dim >= 1 and opt.eval_every >= 1, "--embed-dim and --eval-every must be at least 1")


@torch.no_grad()
def features(model: nn.Module, dataset: data.Dataset, index: Tensor, opt: Options) -> Tensor:
    """g(x) before the projection head, (N, D), of the dataset's images at index."""
    parts = []
    for batch in tqdm(index.split(500), "features", leave=False):
        with hardware.autocast(index.device, opt.precision):
            parts.append(model.features(dataset.pixels(batch)))
    return torch.cat(parts)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, query: Tensor, labels: Tensor, k: int = 200, tau: float = 0.1) -> float:
    """Weighted k nearest neighbours by cosine (Wu et al., 2018): a vote of exp(cosine / tau) each."""
    bank, correct = nn.functional.normalize(bank, dim=1), 0
    for part, y in zip(nn.functional.normalize(query, dim=1).split(1000), labels.split(1000)):
        cosine, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = part.new_zeros(len(part), int(bank_labels.max()) + 1)
        votes.scatter_add_(1, bank_labels[index], (cosine / tau).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return correct / len(query)


def alignment(z1: Tensor, z2: Tensor) -> float:
    """E ‖z1 - z2‖² over pairs of views (Wang and Isola, 2020): 0 where views of an image coincide. Lower is better."""
    return (z1 - z2).square().sum(1).mean().item()


def uniformity(z: Tensor) -> float:
    """log E exp(-2 ‖z_i - z_j‖²) over pairs i < j (Wang and Isola, 2020). Lower is more uniform."""
    return torch.pdist(z).square().mul(-2).exp().mean().log().item()


def measure(model: nn.Module, train_set: data.Dataset, test_set: data.Dataset, opt: Options) -> dict[str, float]:
    model, where = cem.folded(model), train_set.images.device
    query, bank = test_set.spread(opt.n_eval), train_set.spread(10 * opt.n_eval)
    known, asked = features(model, train_set, bank, opt), features(model, test_set, query, opt)
    knn = knn_accuracy(known, train_set.labels[bank], asked, test_set.labels[query])
    _, u = data.draws(len(query), 2 * data.SIMCLR_DRAWS, opt.seed, 0, where)
    x = test_set.pixels(query)
    with torch.no_grad(), hardware.autocast(where, opt.precision):
        z1, z2 = (model(view) for view in views(x, u, test_set, opt))
    return {"alignment": alignment(z1, z2), "uniformity": uniformity(z1), "knn_accuracy": knn}


def views(x: Tensor, u: Tensor, dataset: data.Dataset, opt: Options) -> list[Tensor]:
    """Two random views of each image."""
    return [data.simclr(x, part, scale=(opt.min_crop, 1.0), flip=dataset.flip) for part in u.chunk(2, 1)]


class Probe(nn.Module):
    """x -> logits: an affine classifier on the frozen features."""

    def __init__(self, model: nn.Module, weight: Tensor, bias: Tensor):
        super().__init__()
        self.model, self.fc = model, nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        self.fc.weight.data.copy_(weight)
        self.fc.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model.features(x)).to(x.dtype)


def fit_probe(model: nn.Module, known: Tensor, labels: Tensor) -> Probe:
    """Multinomial logistic regression (scikit-learn, L-BFGS) on the standardised features."""
    std, mean = torch.std_mean(known, 0)
    std = std.clamp_min(1e-6)
    regression = LogisticRegression(C=0.1, max_iter=300).fit(((known - mean) / std).cpu().numpy(), labels.cpu().numpy())
    weight, bias = (
        torch.as_tensor(a, dtype=known.dtype, device=known.device) for a in (regression.coef_, regression.intercept_)
    )
    if len(weight) == 1:  # two classes share one row of weights
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    weight = weight / std
    return Probe(model, weight, bias - weight @ mean)


def evaluate(opt: Options) -> None:
    where, path = hardware.device(opt.device), Path(opt.ckpt or Path(opt.out) / "ckpt.pt")
    opt.precision = opt.precision.replace("auto", "float32")  # figures to compare with others'
    model = cem.load(path, where)
    cli.require(isinstance(model, cem.NonParametricCEM), f"{path} is no encoder: train_unsup.py makes one")
    model = cem.folded(model).to(memory_format=torch.channels_last)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, where)
    channels = model.config["in_channels"]
    cli.require(train_set.images.shape[1] == channels, f"{path} was trained on images of {channels} channels")
    known, asked = (features(model, s, torch.arange(len(s), device=where), opt) for s in (train_set, test_set))
    probe = fit_probe(model, known, train_set.labels)
    result = {"knn_accuracy": knn_accuracy(known, train_set.labels, asked, test_set.labels)}
    result |= robust.accuracy(probe, test_set, opt, ["pgd-20"], opt.n)
    robust.record("probe.json", path, test_set, opt, result)


def objective(opt: Options, train_set: data.Dataset):
    """-> batch_loss(model, index, draws, generator) as engine.fit wants it: two views, attack, InfoNCE."""
    where, attacked = train_set.images.device, hardware.Frozen(opt.compile)

    def batch_loss(model, index, draws, generator):
        x, x_plus = views(train_set.pixels(index), draws, train_set, opt)
        with hardware.autocast(where, opt.precision):
            if opt.loss == "at":
                attack = cem.potential("pgd", parallel.Gathered(attacked(model)), x_plus)
                ball = dict(eps=opt.eps, norm=opt.norm, steps=opt.attack_steps, step_size=opt.attack_step_size)
                x = cem.pgd(attack, x, **ball, generator=generator)
            z, z_plus = (parallel.gather_embeddings(part) for part in model(torch.cat([x, x_plus])).chunk(2))
            loss = cem.info_nce(z, z_plus, opt.temperature)
        return loss, {}

    return batch_loss


def train(opt: Options) -> None:
    where = hardware.device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, where)
    torch.manual_seed(opt.seed)
    shape = dict(width=opt.width, in_channels=train_set.images.shape[1])
    model = cem.NonParametricCEM(opt.arch, opt.embed_dim, opt.temperature, **shape, **train_set.normalisation())
    model = model.to(where, memory_format=torch.channels_last)
    if opt.compile:
        model.compile()

    def due(epoch: int) -> bool:
        return epoch % opt.eval_every == 0 or epoch == opt.epochs

    engine.fit(
        opt,
        model,
        len(train_set),
        shuffle=lambda epoch: data.draws(len(train_set), 2 * data.SIMCLR_DRAWS, opt.seed, epoch, where),
        batch_loss=objective(opt, train_set),
        evaluate=lambda model, epoch: measure(model, train_set, test_set, opt) if due(epoch) else {},
        **train_set.card(opt.seed_rank),
    )


def main() -> None:
    opt = cli.parse(Options, __doc__, lambda opt: DIGITS if opt.dataset == "digits" else {})
    check(opt)
    evaluate(opt) if opt.evaluate else train(opt)


if __name__ == "__main__":
    cli.run(main)
