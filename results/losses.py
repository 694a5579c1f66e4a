"""Train every supervised loss with several seeds and compare: results/losses-<name>.json.

    python results/losses.py                             # digits: half an hour on two cores
    python results/losses.py --losses st at jeat --seeds 0 --autoattack 200
    python results/losses.py --dataset PATH --losses at jeat --epochs 12 4 --seeds 0 \\
        --name cifar10 --options "--width 16" --evaluation "--n 1000"

Calls the scripts as a user would. --options are those of train_sup.py; --evaluation are those of
eval_robust.py, whose --norm and --eps are otherwise the training run's. Finished parts are not
repeated, so that several processes can each do some of the --losses or --seeds, once the judge is
trained. For a comparison at equal minutes, choose --epochs, and --first-stage for dat, whose
minutes include those of its first stage.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tables

import cem
from lib import cli, files, markdown
from lib.cli import option
from lib.parts import Parts, digest, evaluated, judged, minutes

ATTACKS = ["--attacks", "pgd-20", "pgd-50", "margin", "--restarts", 5]
ACCURACIES = ("clean_accuracy", "pgd-20", "pgd-50", "margin", "adversarial_accuracy")
SAMPLERS = ("cs", "rcs", "langevin")


@dataclass
class Options:
    dataset: str = option("digits", "dataset, as for train_sup.py", "training")
    losses: list[str] = cli.option_list(
        str, "losses to compare", "training", cem.SUPERVISED_LOSSES, choices=cem.SUPERVISED_LOSSES
    )
    epochs: list[int] = cli.option_list(int, "epochs of each of the losses", "training")
    first_stage: str = option(
        "", "classifier that dat begins from (default: the run of at)", "training", metavar="PATH"
    )
    seeds: list[int] = cli.option_list(int, "seeds of the runs", "training", default=range(5))
    options: str = option("", "further options of train_sup.py, in one string", "training")
    evaluation: str = option("", "further options of eval_robust.py, in one string", "evaluation")
    autoattack: int = option(0, "test images under AutoAttack", "evaluation", least=0)
    n_samples: int = option(1000, "samples of each sampler, for C-FD", "evaluation", least=20)
    judge: str = option(
        "", "classifier checkpoint for C-FD (default: trained with --loss st --seed 100)",
        "evaluation", metavar="PATH",
    )  # fmt: skip
    name: str = option("digits", "name of the table", "run")
    out: str = option("runs/losses", "folder of the runs", "run", metavar="PATH")


def training(loss: str, seed: int, opt: Options) -> list:
    """The options of a run."""
    words = ["--dataset", opt.dataset, "--loss", loss, "--seed", seed]
    epochs = dict(zip(opt.losses, opt.epochs))
    words += ["--epochs", epochs[loss]] if loss in epochs else []
    words += ["--init", first_stage(seed, opt)] if loss == "dat" else []
    return [*words, *shlex.split(opt.options)]


def folder(loss: str, seed: int, opt: Options) -> Path:
    name = f"{opt.name}-{loss}-{seed}-{digest(training(loss, seed, opt))}"
    return Path(opt.out) / name


def first_stage(seed: int, opt: Options) -> Path:
    """What dat begins from: by default, the run of at with the same seed."""
    return Path(opt.first_stage or folder("at", seed, opt) / "ckpt.pt")


def train(loss: str, seed: int, parts: Parts, opt: Options, *more) -> Path:
    """The run's checkpoint."""
    run = folder(loss, seed, opt)
    words = [*training(loss, seed, opt), *more, "--out", run, "--resume"]
    return parts.run(run / "ckpt.pt", "train_sup.py", *words)


def attack(ckpt: Path, parts: Parts, opt: Options, *more) -> dict:
    """Measure a checkpoint -> the content of accuracy.json."""
    trained = files.read_json(ckpt.with_name("options.json"))
    ball = ["--norm", trained["norm"], "--eps", trained["eps"]]
    return evaluated(parts, ckpt, "--dataset", opt.dataset, *ball, *more)


def row_of(loss: str, seed: int, judge: Path, opt: Options) -> dict:
    """Train and measure one run -> its figures and commands."""
    parts = Parts(folder(loss, seed, opt) / "done.json")
    try:
        ckpt = train(loss, seed, parts, opt, "--diagnose")
    except cli.Diverged as error:
        return {"diverged": str(error)}
    row = {"minutes": minutes(ckpt)}
    if loss == "dat":
        row["minutes"] += minutes(first_stage(seed, opt))
    evaluation = shlex.split(opt.evaluation)
    if opt.autoattack:
        only = ["--attacks", "autoattack", "--n", opt.autoattack]
        found = attack(ckpt, parts, opt, *evaluation, *only)
        row |= {"autoattack": found["autoattack"], "autoattack n": found["n"]}
    found = attack(ckpt, parts, opt, *ATTACKS, *evaluation)
    row |= {key: found[key] for key in ("n", *ACCURACIES, "calibration_error")}
    for key, auroc in found.items():
        if key.startswith("auroc_"):
            other = f"auroc_{Path(key.removeprefix('auroc_')).name}"
            row[other] = auroc["log_p_x"]
            row[f"{other}_max_p"] = auroc["max_p_y_x"]
    scores = judged(parts, ckpt, SAMPLERS, opt.n_samples, opt.dataset, judge)
    for name in SAMPLERS:
        row[f"c-fd_{name}"] = scores[name]["C-FD"]
        row[f"c-fd_{name} std"] = scores[name].get("C-FD std")
    return row | {"commands": [part["command"] for part in parts.used.values()]}


def main() -> None:
    opt = cli.parse(Options, __doc__)
    out = Path("results") / f"losses-{opt.name}.json"
    files.check_output(out, files.json_with("command", "rows"))
    same = len(opt.epochs) in (0, len(opt.losses))
    cem.require(same, f"--epochs needs {len(opt.losses)} numbers, for {' '.join(opt.losses)}")
    if opt.first_stage:
        minutes(opt.first_stage)
    judge = Path(opt.judge or folder("st", 100, opt) / "ckpt.pt")
    if not opt.judge:
        train("st", 100, Parts(judge.with_name("done.json")), opt)
    rows = {loss: [row_of(loss, seed, judge, opt) for seed in opt.seeds] for loss in opt.losses}
    record = {"command": cli.command(), "rows": rows}
    files.write_json(out, record)
    print(f"{markdown.table(tables.losses(record))}wrote {out}")


if __name__ == "__main__":
    cli.run(main)
