"""Measure a checkpoint: accuracy under attack, calibration, out-of-distribution scores.

    python eval_robust.py                                  # runs/sup/ckpt.pt, or the shipped one
    python eval_robust.py --attacks pgd-50 margin autoattack --restarts 5 --n 1000 --ood svhn
    python eval_robust.py --ckpt runs/unsup/ckpt.pt        # an encoder, through a linear probe
    python eval_robust.py --ckpt Carmon2019.pt --mean 0 --std 1 --norm linf --eps 8/255
    python eval_robust.py --transfer runs/other/ckpt.pt    # also attacked through another network

Writes accuracy.json, or probe.json for an encoder. Figures are computed in float32 on all test
images by default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import nn

import cem
from lib import cli, data, distributed, files, interop, metrics, robustness
from lib.attack import check_ball
from lib.cli import option
from lib.device import PRECISIONS, pick_device, resolve_precision

KNOWN = [*robustness.ATTACKS, robustness.AUTOATTACK]


@dataclass
class Options:
    ckpt: str = option(
        "", "ours or third-party (default: runs/sup/ckpt.pt if it exists, else the shipped sup.pt)",
        "checkpoint and data", metavar="PATH",
    )  # fmt: skip
    dataset: str = option(
        "", f"{data.HELP} (default: the checkpoint's, else cifar10)", "checkpoint and data"
    )
    data_dir: str = option("data", data.DIR_HELP, "checkpoint and data", metavar="PATH")
    image_size: int = option(
        0, f"{data.IMAGE_SIZE}, or as the checkpoint has them", "checkpoint and data", least=0
    )
    mean: list[float] = cli.option_list(float, cli.MEAN, "checkpoint and data")
    std: list[float] = cli.option_list(float, cli.STD, "checkpoint and data")
    n: int = option(0, "test images, evenly spaced; 0: all", "checkpoint and data", least=0)
    attacks: list[str] = cli.option_list(
        str, f"any of {', '.join(KNOWN)}", "attack", default=["pgd-20"], choices=KNOWN
    )
    restarts: int = option(1, "random starts of each PGD attack", "attack", least=1)
    norm: Optional[str] = option(
        None, "norm of the ball (default: the checkpoint's, else l2)", "attack", type=str,
        choices=["l2", "linf"],
    )  # fmt: skip
    eps: Optional[float] = option(
        None, "radius, for pixels in [0, 1]; 8/255 works (default: the checkpoint's, else 0.5)",
        "attack", type=cli.number, least=0,
    )  # fmt: skip
    transfer: str = option(
        "", "also transfer attacks from this classifier, to test for masked gradients",
        "attack", metavar="PATH",
    )  # fmt: skip
    ood: list[str] = cli.option_list(
        str, "out-of-distribution datasets, folders or npz files, besides noise and constant", "run"
    )
    out: str = option("", cli.OUT, "run", metavar="PATH")
    batch_size: int = option(256, "images at a time", "run", least=1)
    seed: int = option(0, "seed of the attacks' random starts", "run")
    quiet: bool = option(False, cli.QUIET, "run")
    device: str = option("auto", cli.DEVICE, "run")
    precision: str = option("float32", "arithmetic", "run", choices=PRECISIONS)


def preset(opt: Options) -> dict:
    """The ball in which one of our checkpoints was trained, unless another norm is asked for."""
    path = Path(opt.ckpt or cli.default_checkpoint("sup"))
    ball = {"norm": "l2", "eps": 0.5}
    try:
        found = cem.load(path).extra["options"]
        if found["norm"] in ("l2", "linf") and isinstance(found["eps"], float):
            ball = {key: found[key] for key in ball}
    except (cem.CEMError, KeyError, TypeError):  # another's, or of another kind, or damaged
        pass
    return ball if opt.norm in (None, ball["norm"]) else {}


def check(opt: Options) -> None:
    cem.require(
        opt.eps is not None, f"--norm {opt.norm} needs --eps: its default is of the other norm"
    )
    check_ball(opt)
    pgd = set(opt.attacks) - {robustness.AUTOATTACK}
    cem.require(pgd or not opt.transfer, "--transfer needs a PGD attack, such as pgd-20")


def load(opt: Options, path: Path, device: torch.device) -> nn.Module:
    """The checkpoint. It fills in opt.dataset and opt.image_size where they are not given."""
    of_transfer = opt.transfer and interop.is_ours(path)
    given = (None, None) if of_transfer else (opt.mean or None, opt.std or None)
    model = interop.load(path, device, *given)
    own = model.extra.get("dataset", "")
    available = own in data.NAMES or (own != "" and Path(own).is_dir())
    if not opt.dataset and not available:
        of_cifar10 = own == "" or path.resolve().parent == cli.SHIPPED
        cem.require(of_cifar10, f"the dataset of {path}, {own}, is not available: pass --dataset")
        print(f"measuring on cifar10: its own dataset ({own or 'unknown'}) is not available")
    opt.dataset = opt.dataset or (own if available else "cifar10")
    shape = model.extra.get("image_shape")
    if shape and opt.dataset not in data.NAMES and not opt.image_size:
        opt.image_size = shape[1]
    return model.to(memory_format=torch.channels_last)


def load_source(opt: Options, model: nn.Module, device: torch.device) -> nn.Module | None:
    """The classifier of --transfer; None without it. --mean and --std are for it if it has none, or
    if the attacked classifier is ours."""
    if not opt.transfer:
        return None
    source = interop.load(opt.transfer, device)
    given = opt.mean or None, opt.std or None
    plain = not source.extra.get("normalised", True)
    if any(given) and (plain or "third_party" not in model.extra):
        source = interop.load(opt.transfer, device, *given)
    encoder = any(isinstance(network, cem.NonParametricCEM) for network in (model, source))
    cem.require(not encoder, "--transfer needs two classifiers, and one of these is an encoder")
    return source.to(memory_format=torch.channels_last)


def checked_logits(path, model, test_set: data.Dataset, opt: Options) -> torch.Tensor:
    """f(x, ·) (N, K) on the chosen images. Raises CEMError if they are not finite."""
    logits = robustness.outputs(model, test_set, opt, opt.n)
    cem.require(bool(logits.isfinite().all()), f"the logits of {path} are not finite")
    return logits


def evaluate_classifier(path, model, source, test_set: data.Dataset, opt: Options) -> dict:
    """What accuracy.json contains. source: the classifier of --transfer, or None."""
    if source is not None:
        checked_logits(opt.transfer, source, test_set, opt)
    logits = checked_logits(path, model, test_set, opt)
    others = {}  # loaded first: a misspelt name should not cost an attack
    for name in ("noise", "constant", *opt.ood):
        others[name] = robustness.ood_dataset(name, test_set, opt.data_dir, opt.seed)
    result = robustness.accuracy(model, test_set, opt.attacks, opt, opt.n, opt.restarts, source)
    labels = test_set.labels[test_set.evenly_spaced(len(logits))]
    result["calibration_error"] = robustness.calibration_error(logits, labels)
    for name, other in others.items():
        result[f"auroc_{name}"] = robustness.ood_scores(model, logits, other, opt)
    return result


def evaluate_encoder(model, train_set: data.Dataset, test_set: data.Dataset, opt: Options) -> dict:
    """k-NN and a linear probe on all training images, attacked through encoder and probe."""
    cem.require(not opt.ood, "--ood needs a classifier, not an encoder")
    model = cem.folded(model)
    bank, query = (robustness.outputs(model.features, s, opt) for s in (train_set, test_set))
    finite = bool(bank.isfinite().all() and query.isfinite().all())
    cem.require(finite, "the checkpoint's features are not finite")
    knn = robustness.knn_accuracy(bank, train_set.labels, query, test_set.labels)
    probe = robustness.fit_probe(model, bank, train_set.labels)
    result = robustness.accuracy(probe, test_set, opt.attacks, opt, opt.n, opt.restarts)
    return {"knn_accuracy": knn} | result


def report(name: str, path: Path, folder: Path, test_set, opt: Options, result: dict) -> None:
    """Write the result, with its settings, to the file `name` in `folder`, and print it."""
    n = len(test_set.evenly_spaced(opt.n))
    lines = [f"{path} on {n} test images of {test_set.name}, {opt.norm} eps {opt.eps:g}:"]
    intervals = {}
    for key, value in result.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v:.3f}" for k, v in value.items())
        elif key == "calibration_error":
            shown = f"{value:.2%}"
        else:  # a share of the test images
            trials = len(test_set) if key == "knn_accuracy" else n
            low, high = intervals[key] = metrics.interval(round(value * trials), trials)
            shown = f"{value:.2%} ({low:.2%} to {high:.2%})"
        lines.append(f"  {key.replace('_', ' ')}: {shown}")
    record = {"command": cli.command(), "ckpt": str(path), "dataset": test_set.name, "n": n}
    for key in ("norm", "eps", "restarts", "precision", "seed"):
        record[key] = getattr(opt, key)
    if opt.transfer:
        record["transfer"] = opt.transfer
    record |= result | {"intervals": intervals}
    try:
        files.keep_other(folder / name)
        files.write_json(folder / name, record)
    finally:
        print("\n".join(lines))
    print(f"wrote {folder / name}")


def main() -> None:
    opt = cli.parse(Options, __doc__, preset)
    check(opt)
    one = distributed.world_size() == 1
    cem.require(one, "eval_robust.py runs in one process: leave out torchrun")
    device = pick_device(opt.device)
    opt.precision = resolve_precision(device, opt.precision)
    path = Path(opt.ckpt or cli.default_checkpoint("sup"))
    model = load(opt, path, device)
    source = load_source(opt, model, device)
    folder = Path(opt.out or cli.output_folder(path, "third_party" in model.extra))
    encoder = isinstance(model, cem.NonParametricCEM)
    name = "probe.json" if encoder else "accuracy.json"
    files.check_output(folder / name, files.json_with("command", "ckpt", "eps"))
    if encoder:
        train_set, test_set = data.splits(opt.dataset, opt.data_dir, device, opt.image_size)
    else:
        test_set = data.load(opt.dataset, "test", opt.data_dir, opt.image_size).to(device)
    cem.require(len(test_set.classes) > 1, f"{opt.dataset} has one class: accuracy needs two")
    networks = {path: model} if source is None else {path: model, opt.transfer: source}
    for file, network in networks.items():
        test_set.check_fits(network, file)
        if "third_party" in network.extra:
            train_set = data.load(opt.dataset, "train", opt.data_dir, opt.image_size)
            interop.check_third_party(network, file, train_set)
    if encoder:
        result = evaluate_encoder(model, train_set, test_set, opt)
    else:
        result = evaluate_classifier(path, model, source, test_set, opt)
    report(name, path, folder, test_set, opt, result)


if __name__ == "__main__":
    cli.run(main)
