"""What a classifier is measured by: accuracy under attack, calibration, out-of-distribution scores, likelihood gradients."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

import cem
import cli
import data
import hardware

# name -> potential, steps of 2.5 eps / steps
ATTACKS = {"pgd-10": ("ce", 10), "pgd-20": ("ce", 20), "pgd-50": ("ce", 50), "margin": ("margin", 50)}
AUTOATTACK = "autoattack"


def autoattack(model: nn.Module, x: Tensor, y: Tensor, opt) -> Tensor:
    """AutoAttack's standard set (Croce and Hein, 2020), by the library that RobustBench uses -> correct, bool (N,)."""
    try:
        library = importlib.import_module("pyautoattack")
    except ImportError as error:
        raise cem.CEMError("--attacks autoattack needs a library: pip install pyautoattack") from error
    norm = {"l2": "L2", "linf": "Linf"}[opt.norm]
    adversary = library.AutoAttack(model, norm=norm, eps=opt.eps, seed=opt.seed, device=x.device)
    targets = min(9, model.config["num_classes"] - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    x = x.contiguous()  # the library flattens with view
    with torch.enable_grad():
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=opt.batch_size)
    return model(x_adv).argmax(1) == y


def withstands(name: str, model: nn.Module, x: Tensor, y: Tensor, opt, generator: torch.Generator) -> Tensor:
    """Which images (N,) the network still gets right after --restarts attacks of that name from random starts."""
    attack, steps = ATTACKS[name]
    right = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(opt.restarts):
        left = right.nonzero().squeeze(1)
        if len(left):
            potential, ball = cem.potential(attack, model, y[left]), dict(eps=opt.eps, norm=opt.norm, steps=steps)
            right[left] = model(cem.pgd(potential, x[left], **ball, generator=generator)).argmax(1) == y[left]
    return right


@torch.no_grad()
def accuracy(model: nn.Module, dataset: data.Dataset, opt, attacks: Iterable[str], n: int = 0) -> dict[str, float]:
    """clean_accuracy, the accuracy under each attack, and adversarial_accuracy, that under the worst of them for each image.

    Over n images evenly spread over the set, all with n = 0. opt has norm, eps, restarts, batch_size, precision and seed.
    """
    model, where = cem.folded(model), dataset.images.device
    generator = torch.Generator(where).manual_seed(opt.seed)
    correct = {name: [] for name in ("clean_accuracy", *attacks)}
    for index in tqdm(dataset.spread(n or len(dataset)).split(opt.batch_size), "evaluating", leave=False):
        x, y = dataset.pixels(index), dataset.labels[index]
        with hardware.autocast(where, opt.precision):
            clean = model(x).argmax(1) == y
            correct["clean_accuracy"].append(clean)
            for name in attacks:
                right, left = clean.clone(), clean.nonzero().squeeze(1)
                if len(left) and name == AUTOATTACK:
                    right[left] = autoattack(model, x[left], y[left], opt)
                elif len(left):
                    right[left] = withstands(name, model, x[left], y[left], opt, generator)
                correct[name].append(right)
    flags = {name: torch.cat(parts) for name, parts in correct.items()}
    flags["adversarial_accuracy"] = torch.stack([flags[name] for name in attacks]).all(0)
    return {name: flag.float().mean().item() for name, flag in flags.items()}


@torch.no_grad()
def logits_of(model: nn.Module, images: Iterable[Tensor], opt) -> Tensor:
    """f(x, ·) of batches of images in [0, 1], (N, K)."""
    parts = []
    for x in images:
        with hardware.autocast(x.device, opt.precision):
            parts.append(model(x))
    return torch.cat(parts)


def calibration_error(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): the mean over images of |accuracy - confidence| of their bin."""
    confidence, said = logits.softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins (0, 1/15], (1/15, 2/15], ...
    excess = torch.zeros(bins, dtype=confidence.dtype, device=y.device)
    excess.index_add_(0, bin_of, confidence - (said == y).to(confidence.dtype))
    return (excess.abs().sum() / len(y)).item()


def strangers(name: str, like: data.Dataset, opt) -> data.Dataset:
    """Out-of-distribution images in the shape of `like`'s: "noise", "constant", or another dataset's test set, resized."""
    channels, *size = like.images.shape[1:]
    if name in ("noise", "constant"):
        shape = (len(like), channels, *(size if name == "noise" else (1, 1)))
        generator = torch.Generator().manual_seed(opt.seed)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).expand(-1, -1, *size)
    else:
        images = data.load(name, "test", opt.data_dir).images
        if list(images.shape[2:]) != size:
            images = tv.resize(images, size, antialias=True)
        if images.shape[1] != channels:
            images = tv.rgb_to_grayscale(images) if channels == 1 else images[:, :1].expand(-1, channels, -1, -1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return data.Dataset(name, images.contiguous(), labels, ["unknown"]).to(like.images.device)


def out_of_distribution(model: nn.Module, logits: Tensor, test: data.Dataset, others: Iterable[str], opt) -> dict[str, dict]:
    """AUROC of log p(x) = LSE f(x) and of max_y p(y | x): does the test set, of those logits, score higher than others?"""
    result = {}
    for name in others:
        other = strangers(name, test, opt)
        batches = (other.pixels(index) for index in other.spread(opt.n or len(other)).split(opt.batch_size))
        foreign = logits_of(model, batches, opt)
        inside = torch.cat([torch.ones(len(logits)), torch.zeros(len(foreign))])
        scores = {"log_p_x": cem.log_marginal, "max_p_y_x": lambda logits: logits.softmax(1).amax(1)}
        both = torch.cat([logits, foreign])
        result[f"auroc_{name}"] = {key: float(roc_auc_score(inside, score(both).cpu())) for key, score in scores.items()}
    return result


def diagnose(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, x_s: Tensor) -> dict[str, float]:
    """The likelihood's view of a classifier in eval mode on attacked images x_adv of (x, y), and on its own samples x_s.

    Mean energies E(x), E(x_adv), E(x_s); the θ-gradients of the two halves of the likelihood gradient, consistency and
    contrastive ([CEM] eq. 10): their norms and cosine; the expected calibration error on x.
    """
    parameters = list(model.parameters())
    logits, logits_adv, logits_s = model(x), model(x_adv), model(x_s)
    halves = cem.consistency(logits, logits_adv, y).mean(), cem.contrastive(logits_adv, y).mean()
    vectors = []
    for half in halves:
        gradients = torch.autograd.grad(half, parameters, retain_graph=True)
        vectors.append(torch.cat([g.flatten() for g in gradients]))
    energies = {"E_x": logits, "E_x_adv": logits_adv, "E_x_s": logits_s}
    result = {name: -cem.log_marginal(value).mean().item() for name, value in energies.items()}
    result |= {"consistency_norm": vectors[0].norm().item(), "contrastive_norm": vectors[1].norm().item()}
    result["cosine"] = F.cosine_similarity(*vectors, dim=0).item()
    return result | {"calibration_error": calibration_error(logits.detach(), y)}


def record(name: str, ckpt: Path, dataset: data.Dataset, opt, result: dict, foreign: bool = False) -> None:
    """Print what --evaluate measured, and write it as a JSON file of that name beside the checkpoint."""
    out, n = cli.folder_beside(ckpt, foreign) / name, min(opt.n or len(dataset), len(dataset))
    setting = {"norm": opt.norm, "eps": opt.eps, "restarts": opt.restarts, "precision": opt.precision, "seed": opt.seed}
    print(f"{ckpt} on {n} test images of {dataset.name}, {opt.norm} eps {opt.eps:g}, {opt.precision}:")
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.3f}" for k, v in value.items())
        print(f"  {key.replace('_', ' ')}: {value if isinstance(value, str) else f'{value:.2%}'}")
    content = {"command": cli.command(), "ckpt": str(ckpt), "dataset": dataset.name, "n": n} | setting | result
    cli.write_text(out, json.dumps(content, indent=2) + "\n")
    print(f"wrote {out}")
