"""Train a robust classifier as fast as possible: seconds, clean accuracy, PGD-20.

    python bench/speedrun.py --dataset PATH --runs 3                # sprint
    python bench/speedrun.py --dataset PATH --runs 3 --track hour

Two tracks and a former recipe, on CIFAR-10, in the l2 ball of 0.5, measured on all test images:
    sprint  the least time to 60 % under PGD-20 and 78 % clean
    hour    the best accuracy under PGD-20, with at least 82 % clean, in an hour on two CPU cores
    former  an earlier recipe, for comparison
From random weights. The clock runs from images in memory to the final weights: compilation counts,
evaluation does not. No choice may depend on test images.
"""

import copy
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem
import eval_robust
from lib import augment, cli, data, files, interop, markdown, optim, robustness
from lib.attack import AttackCopy
from lib.cli import option
from lib.device import (
    PRECISIONS,
    autocast,
    compile_network,
    machine_name,
    pick_device,
    resolve_precision,
)
from lib.loop import ema_update, learning_rate
from lib.markdown import Figure

EPS = 0.5


@dataclass
class Recipe:
    width: int
    epochs: int
    arch: str = "resnet18"
    optimizer: str = "muon"
    lr: float = 0.3
    batch_size: int = 256
    crop: float = 1 / 8  # largest shift, as a share of the side
    ema: float = 0.995
    weight_decay: float = 2e-3
    eps: float = 0.55  # radius of the training's attack
    attack_steps: int = 1
    step_size: float = 1.0  # in units of this eps


TRACKS = {
    "sprint": Recipe(width=32, epochs=5, arch="resnet14", eps=0.75, crop=1 / 32),
    "hour": Recipe(width=48, epochs=8, arch="resnet14", eps=0.7, crop=1 / 16),
    "former": Recipe(
        32, 15, optimizer="sgd", lr=0.2, weight_decay=5e-4, eps=EPS, attack_steps=3, step_size=0.5
    ),
}


@dataclass
class Options:
    track: str = option("sprint", "recipe", choices=list(TRACKS))
    runs: int = option(1, "seeds: 0, 1, ...", least=1)
    epochs: int = option(0, "instead of the recipe's, to try it out", least=0)
    width: int = option(0, "instead of the recipe's", least=0)
    dataset: str = option("cifar10", data.HELP)
    data_dir: str = option("data", data.DIR_HELP, metavar="PATH")
    n_eval: int = option(0, "test images; 0: all", least=0)
    out: str = option(
        "runs/speedrun", "folder for <track>-<seed>.pt and <track>.json", metavar="PATH"
    )
    device: str = option("auto", cli.DEVICE)
    precision: str = option("auto", "arithmetic of the training", choices=PRECISIONS)
    compile: bool = option(False, "torch.compile network and attack")


def train(recipe: Recipe, train_set: data.Dataset, seed: int, precision: str, compiled=False):
    """-> the averaged model and the seconds that it took."""
    began, device = time.perf_counter(), train_set.images.device
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    shape = dict(width=recipe.width, in_channels=train_set.images.shape[1])
    classes = len(train_set.classes)
    model = cem.ParametricCEM(recipe.arch, classes, **shape, **train_set.normalisation())
    model = model.to(device, memory_format=torch.channels_last).train()
    average, attack_copy = copy.deepcopy(model), AttackCopy(precision, compiled)
    if compiled:
        compile_network(model, device)
    optimizer = optim.optimizer(recipe, model)
    steps_per_epoch = max(len(train_set) // recipe.batch_size, 1)
    total = recipe.epochs * steps_per_epoch
    for step in cli.progress(range(total), f"seed {seed}"):
        epoch, batch = divmod(step, steps_per_epoch)
        if batch == 0:
            order, draws = augment.draws(len(train_set), augment.CROP_DRAWS, seed, epoch, device)
        index = order[batch * recipe.batch_size :][: recipe.batch_size]
        x, y = train_set.pixels(index), train_set.labels[index]
        x = augment.crop_flip(x, draws[index], flip=train_set.flip, share=recipe.crop)
        with autocast(device, precision):
            attack = cem.potential("ce", attack_copy(model), y)
            ball = dict(eps=recipe.eps, step_size=recipe.step_size * recipe.eps)
            x = cem.pgd(attack, x, **ball, steps=recipe.attack_steps, generator=generator)
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step / total, recipe.lr, "onecycle")
        with autocast(device, precision):
            optimizer.step()
        ema_update(average, model, min(recipe.ema, step / (step + 10)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    torch.backends.cudnn.benchmark = False
    return average.eval(), time.perf_counter() - began


def table(rows: list[dict]) -> str:
    digits = {"seconds": 0, "clean": 2, "PGD-20": 2}
    rows = [row | {key: 100 * row[key] for key in ("clean", "PGD-20")} for row in rows]
    lines = [
        {"run": row["run"]} | {k: Figure(row[k], n) for k, n in digits.items()} for row in rows
    ]
    if len(rows) > 1:
        mean = {"run": "mean"}
        for key, n in digits.items():
            values = [row[key] for row in rows]
            mean[key] = Figure(statistics.mean(values), n, statistics.stdev(values))
        lines.append(mean)
    return markdown.table(lines, bold=False)


def main() -> None:
    opt = cli.parse(Options, __doc__)
    device = pick_device(opt.device)
    train_set, test_set = data.splits(opt.dataset, opt.data_dir, device)
    given = {k: v for k, v in (("epochs", opt.epochs), ("width", opt.width)) if v}
    recipe = replace(TRACKS[opt.track], **given)
    out, rows = Path(opt.out), []
    precision = resolve_precision(device, opt.precision)
    machine = {"machine": machine_name(device), "precision": precision}
    weights = [out / f"{opt.track}-{seed}.pt" for seed in range(opt.runs)]
    files.check_output(out / f"{opt.track}.json", files.json_with("command", "recipe"))
    for path in weights:
        files.check_output(path, interop.is_ours)
    for seed in range(opt.runs):
        model, seconds = train(recipe, train_set, seed, opt.precision, opt.compile)
        cem.save(weights[seed], model)
        test = eval_robust.Options(norm="l2", eps=EPS, precision="float32")
        found = robustness.accuracy(model, test_set, ["pgd-20"], test, opt.n_eval)
        accuracies = {"clean": found["clean_accuracy"], "PGD-20": found["pgd-20"]}
        rows.append({"run": seed, "seconds": seconds, **accuracies})
        record = {"command": cli.command(), "recipe": asdict(recipe), **machine, "rows": rows}
        files.write_json(out / f"{opt.track}.json", record)
    print(f"{table(rows)}wrote {out / opt.track}.json and {out / opt.track}-*.pt")


if __name__ == "__main__":
    cli.run(main)
