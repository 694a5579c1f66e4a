"""Measurements of a network: accuracy under attack, calibration, out-of-distribution scores,
likelihood gradients, and the linear probe and nearest neighbours of an encoder."""

import importlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import cem
from lib import cli, data
from lib.device import autocast

# ------------------------------------------------------------------------- accuracy under attack

ATTACKS = {  # name -> potential, steps; the step size is 2.5 eps / steps
    "pgd-10": ("ce", 10),
    "pgd-20": ("ce", 20),
    "pgd-50": ("ce", 50),
    "margin": ("margin", 50),
}
AUTOATTACK = "autoattack"


def autoattack(model: nn.Module, x: Tensor, y: Tensor, opt) -> Tensor:
    """AutoAttack's standard version (Croce and Hein, 2020), by pyautoattack -> correct (N,)."""
    try:
        library = importlib.import_module("pyautoattack")
    except ImportError as error:
        raise cem.CEMError("--attacks autoattack needs: pip install pyautoattack") from error
    norm = {"l2": "L2", "linf": "Linf"}[opt.norm]
    adversary = library.AutoAttack(model, norm=norm, eps=opt.eps, seed=opt.seed, device=x.device)
    classes = model(x[:1]).shape[1]
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, classes - 1)
    if classes < 4:  # apgd-t compares with the fourth-largest logit
        adversary.attacks_to_run = [name for name in adversary.attacks_to_run if name != "apgd-t"]
    x = x.contiguous()  # the library flattens with view
    with torch.enable_grad():
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=opt.batch_size)
    return model(x_adv).argmax(1) == y


def withstands(name, model, x: Tensor, y: Tensor, opt, restarts, generator, source) -> Tensor:
    """Whether each image is still classified correctly after all random restarts -> bool (N,).

    source: the network whose gradients the attack follows.
    """
    attack, steps = ATTACKS[name]
    correct = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(restarts):
        left = correct.nonzero().squeeze(1)
        if len(left):
            potential = cem.potential(attack, source, y[left])
            ball = dict(eps=opt.eps, norm=opt.norm, steps=steps)
            x_adv = cem.pgd(potential, x[left], **ball, generator=generator)
            correct[left] = model(x_adv).argmax(1) == y[left]
    return correct


@torch.no_grad()
def accuracy(
    model: nn.Module, dataset: data.Dataset, attacks: Sequence[str], opt, n: int = 0, restarts=1,
    source: nn.Module | None = None
) -> dict[str, float]:  # fmt: skip
    """Clean accuracy, accuracy under each attack, and under the worst of them for each image.

    Keys: clean_accuracy, the attacks' names, adversarial_accuracy. On n evenly spaced images; 0:
    on all. opt has norm, eps, batch_size, precision and seed.
    source: another classifier. Each PGD attack is also made with its gradients, under the key
    transfer-<attack>. Such an image is an adversarial example too: the worst case includes it.
    Warns if it makes an attack stronger.
    """
    model = cem.folded(model)
    device = dataset.images.device
    attempts = {name: (name, model) for name in attacks}  # key -> attack, network of its gradients
    transferred = []
    if source is not None:
        source = cem.folded(source)
        transferred = [name for name in attacks if name != AUTOATTACK]
        attempts |= {f"transfer-{name}": (name, source) for name in transferred}
    # one each, so that no figure depends on which others are measured
    generators = {key: torch.Generator(device).manual_seed(opt.seed) for key in attempts}
    correct = {name: [] for name in ("clean_accuracy", *attempts)}
    batches = dataset.evenly_spaced(n).split(opt.batch_size)
    for index in cli.progress(batches, "evaluating"):
        x, y = dataset.pixels(index), dataset.labels[index]
        with autocast(device, opt.precision):
            clean = model(x).argmax(1) == y
            correct["clean_accuracy"].append(clean)
            left = clean.nonzero().squeeze(1)
            for key, (name, network) in attempts.items():
                survived = clean.clone()
                if len(left) and name == AUTOATTACK:
                    survived[left] = autoattack(model, x[left], y[left], opt)
                elif len(left):
                    survived[left] = withstands(
                        name, model, x[left], y[left], opt, restarts, generators[key], network
                    )
                correct[key].append(survived)
    flags = {name: torch.cat(parts) for name, parts in correct.items()}
    flags["adversarial_accuracy"] = torch.stack([flags[name] for name in attempts]).all(0)
    stronger = [name for name in transferred if finds_more(flags[f"transfer-{name}"], flags[name])]
    if stronger:
        cli.warn(f"gradients may be masked: transfer strengthens {', '.join(stronger)}")
    return {name: flag.float().mean().item() for name, flag in flags.items()}


def finds_more(transferred: Tensor, own: Tensor) -> bool:
    """Whether a transferred attack finds more adversarial examples, by two standard errors, than
    the network's own gradients, which then hide some (Athalye et al., 2018).

    transferred, own: whether each image withstands the attack, (N,). Of two equally strong attacks,
    each is as often the only one that an image withstands (McNemar, 1947).
    """
    more, fewer = (own & ~transferred).sum().item(), (transferred & ~own).sum().item()
    return more - fewer > 2 * math.sqrt(more + fewer)


# ------------------------------------------------------ calibration and out-of-distribution scores


@torch.no_grad()
def outputs(network: Callable, dataset: data.Dataset, opt, n: int = 0) -> Tensor:
    """network(x) (n, ...) of n evenly spaced images; 0: of all. opt has batch_size, precision."""
    parts = []
    for rows in cli.progress(dataset.evenly_spaced(n).split(opt.batch_size), "images"):
        with autocast(rows.device, opt.precision):
            parts.append(network(dataset.pixels(rows)))
    return torch.cat(parts)


def calibration_error(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): mean over images of their bin's
    |accuracy - confidence|, in bins (0, 1/15], (1/15, 2/15], ..."""
    confidence, predicted = logits.softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = torch.zeros(bins, dtype=confidence.dtype, device=y.device)
    excess.index_add_(0, bin_of, confidence - (predicted == y).to(confidence.dtype))
    return (excess.abs().sum() / len(y)).item()


def ood_dataset(name: str, like: data.Dataset, data_dir: str, seed: int) -> data.Dataset:
    """Out-of-distribution images in the shape of `like`'s.

    "noise": uniform noise; "constant": images of one colour; else another dataset's test set, or
    the images of a folder or an npz file, resized, in grey or in three channels as `like` is.
    """
    channels, *size = like.images.shape[1:]
    if name in ("noise", "constant"):
        shape = (len(like), channels, *(size if name == "noise" else (1, 1)))
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        images = images.expand(-1, -1, *size)
    else:
        side = 0 if name in data.NAMES else size[0]
        images = data.images(name, "test", data_dir, side)
        if list(images.shape[2:]) != size:
            images = tv.resize(images, size, antialias=True)
        if images.shape[1] != channels and channels == 1:
            images = tv.rgb_to_grayscale(images)
        elif images.shape[1] != channels:
            images = images[:, :1].expand(-1, channels, -1, -1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    dataset = data.Dataset(name, images.contiguous(), labels, ["unknown"])
    return dataset.to(like.images.device)


def ood_scores(model: nn.Module, logits: Tensor, dataset: data.Dataset, opt) -> dict[str, float]:
    """AUROC between a test set, given by its logits, and an out-of-distribution dataset.

    Keys: log_p_x by log p(x) = LSE f(x), max_p_y_x by max_y p(y | x). 0.5 is chance.
    """
    other = outputs(model, dataset, opt, opt.n)
    inside = torch.cat([torch.ones(len(logits)), torch.zeros(len(other))])
    both = torch.cat([logits, other])
    certainty = -cem.log_odds_against(both, both.argmax(1))  # as max p(y | x), which rounds to 1
    scores = {"log_p_x": cem.log_marginal(both), "max_p_y_x": certainty}
    return {key: float(roc_auc_score(inside, score.cpu())) for key, score in scores.items()}


# ------------------------------------------------------------------------ likelihood's gradients


def diagnose(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, x_s: Tensor) -> dict:
    """Energies and likelihood gradients of a classifier in eval mode ([CEM] eq. 10).

    x, y: data; x_adv: attacked x; x_s: samples of the model. E_x, E_x_adv, E_x_s: mean energies;
    consistency_norm, contrastive_norm, cosine: the θ-gradients of the two halves of the likelihood
    gradient; calibration_error on x.
    """
    parameters = list(model.parameters())
    logits, logits_adv, logits_s = model(x), model(x_adv), model(x_s)
    halves = cem.consistency(logits, logits_adv, y).mean(), cem.log_posterior(logits_adv, y).mean()
    vectors = []
    for half in halves:
        gradients = torch.autograd.grad(half, parameters, retain_graph=True)
        vectors.append(torch.cat([g.flatten() for g in gradients]))
    return {
        "E_x": -cem.log_marginal(logits).mean().item(),
        "E_x_adv": -cem.log_marginal(logits_adv).mean().item(),
        "E_x_s": -cem.log_marginal(logits_s).mean().item(),
        "consistency_norm": vectors[0].norm().item(),
        "contrastive_norm": vectors[1].norm().item(),
        "cosine": F.cosine_similarity(*vectors, dim=0).item(),
        "calibration_error": calibration_error(logits.detach(), y),
    }


# ---------------------------------------------------------------------------------- representations


def knn_accuracy(bank: Tensor, bank_labels: Tensor, query: Tensor, labels: Tensor, k=200) -> float:
    """Accuracy of the k nearest neighbours in features, by votes of exp(cosine / 0.1) (Wu et al.,
    2018). bank (M, D), bank_labels (M,), query (N, D), labels (N,)."""
    bank = F.normalize(bank, dim=1)
    classes = int(bank_labels.max()) + 1
    correct = 0
    for part, y in zip(F.normalize(query, dim=1).split(1000), labels.split(1000)):
        cosine, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, bank_labels[index], (cosine / 0.1).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return correct / len(query)


class Probe(nn.Module):
    """x -> logits (N, K): an affine classifier on frozen features."""

    def __init__(self, model: nn.Module, weight: Tensor, bias: Tensor):
        super().__init__()
        self.model, self.weight, self.bias = model, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.model.features(x), self.weight, self.bias).to(x.dtype)


def fit_probe(model: nn.Module, known: Tensor, labels: Tensor) -> Probe:
    """Multinomial logistic regression on the standardised features known (N, D), by L-BFGS.

    Minimises the mean cross-entropy + |W|² / (2 C N) with C = 0.1, as scikit-learn does.
    """
    std, mean = torch.std_mean(known, 0)
    std = std.clamp_min(1e-6)
    z = F.pad((known - mean) / std, (0, 1), value=1.0)  # the last weight of a class is its bias
    shape = int(labels.max()) + 1, z.shape[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).to(z).view(shape).requires_grad_()
        penalty = w[:, :-1].square().sum() / (2 * 0.1 * len(z))
        loss = F.cross_entropy(z @ w.T, labels) + penalty
        (gradient,) = torch.autograd.grad(loss, w)
        return loss.item(), gradient.flatten().cpu().double().numpy()

    limit = 300
    with torch.enable_grad(), cli.progress(None, "linear probe", total=limit) as bar:
        solution = minimize(
            objective, np.zeros(math.prod(shape)), jac=True, method="L-BFGS-B",
            callback=lambda _: bar.update(), options=dict(maxiter=limit, gtol=1e-4),
        )  # fmt: skip
    w = torch.from_numpy(solution.x).to(z).view(shape)
    weight = w[:, :-1] / std
    return Probe(model, weight, w[:, -1] - weight @ mean)
