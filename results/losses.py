"""Train every supervised loss with several seeds and compare: results/losses-<name>.json.

    python results/losses.py                             # digits: half an hour on two cores
    python results/losses.py --losses st at jeat --seeds 0 --autoattack 200
    python results/losses.py --dataset PATH --losses at jeat --epochs 12 4 --seeds 0 \\
        --name cifar10 --options "--width 16" --evaluation "--n 1000"

Calls the scripts as a user would. --options are those of train_sup.py; --evaluation are those of
eval_robust.py, whose --norm and --eps are otherwise the training run's. Runs already in --out are
not repeated, so that several processes can each do some of the --losses or --seeds, once the judge
is trained. For a comparison at equal minutes, choose --epochs, and --first-stage for dat, whose
minutes include those of its first stage.
"""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import tables  # noqa: E402

import cem  # noqa: E402
from lib import cli, markdown  # noqa: E402
from lib.cli import option  # noqa: E402
from lib.parts import call  # noqa: E402

ATTACKS = ["--attacks", "pgd-20", "pgd-50", "margin", "--restarts", 5]
ACCURACIES = ("clean_accuracy", "pgd-20", "pgd-50", "margin", "adversarial_accuracy")
SAMPLERS = ("cs", "rcs", "langevin")


@dataclass
class Options:
    dataset: str = option("digits", "dataset, as for train_sup.py", "training")
    losses: list[str] = cli.option_list(str, "losses to compare (default: all)", "training")
    epochs: list[int] = cli.option_list(int, "epochs of each of the losses", "training")
    first_stage: str = option(
        "", "classifier that dat begins from (default: the run of at)", "training", metavar="PATH"
    )
    seeds: list[int] = cli.option_list(int, "seeds of the runs (default: 0 1 2 3 4)", "training")
    options: str = option("", "further options of train_sup.py, in one string", "training")
    evaluation: str = option("", "further options of eval_robust.py, in one string", "evaluation")
    autoattack: int = option(0, "test images under AutoAttack", "evaluation", least=0)
    n_samples: int = option(1000, "samples of each sampler, for C-FD", "evaluation")
    judge: str = option(
        "", "classifier checkpoint for C-FD (default: trained with --loss st --seed 100)",
        "evaluation", metavar="PATH",
    )  # fmt: skip
    name: str = option("digits", "name of the table", "run")
    out: str = option("runs/losses", "folder of the runs", "run", metavar="PATH")


def first_stage(run: Path, opt: Options) -> Path:
    """What dat begins from: by default, the run of at with the same seed."""
    return Path(opt.first_stage or run.with_name(run.name.replace("-dat-", "-at-")) / "ckpt.pt")


def minutes(ckpt: Path) -> float:
    return cem.load(ckpt).extra["training"]["seconds"] / 60


def train(run: Path, loss: str, seed: int, opt: Options, *more) -> str:
    """Start the run, or continue it; a run that has ended ends at once."""
    resume = ["--resume"] if (run / "ckpt.pt").exists() else []
    settings = ["--dataset", opt.dataset, "--loss", loss, "--seed", seed, "--out", run]
    epochs = dict(zip(opt.losses, opt.epochs))
    if loss in epochs:
        settings += ["--epochs", epochs[loss]]
    if loss == "dat":
        settings += ["--init", first_stage(run, opt)]
    return call("train_sup.py", *settings, *more, *shlex.split(opt.options), *resume)


def attack(run: Path, opt: Options, *attacks) -> tuple[dict, str]:
    """Measure the run's checkpoint under these attacks -> accuracy.json and the command."""
    trained = json.loads((run / "options.json").read_text())
    ball = ["--norm", trained["norm"], "--eps", trained["eps"]]
    settings = ["--ckpt", run / "ckpt.pt", "--dataset", opt.dataset, *ball, *attacks]
    command = call("eval_robust.py", *settings)
    return json.loads((run / "accuracy.json").read_text()), command


def draw_and_judge(run: Path, judge: Path, opt: Options) -> tuple[dict, list[str]]:
    """C-FD of the run's samples, and the commands."""
    commands, folder = [], run / "samples"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call with other options
    for sampler in SAMPLERS:
        settings = ["--sampler", sampler, "--n", opt.n_samples, "--ckpt", run / "ckpt.pt"]
        commands.append(call("sample.py", *settings, "--out", folder))
    samples = [folder / f"samples-{sampler}.npz" for sampler in SAMPLERS]
    settings = ["--samples", *samples, "--ref", opt.dataset, "--features", judge]
    out = run / "c-fd.json"
    commands.append(call("eval_is_fid.py", *settings, "--out", out))
    rows = json.loads(out.read_text())["rows"]
    return {f"c-fd_{name}": row["C-FD"] for name, row in zip(SAMPLERS, rows)}, commands


def measure(run: Path, loss: str, judge: Path, opt: Options) -> tuple[dict, list[str]]:
    """The figures of a trained run, and the commands."""
    figures, commands = {"minutes": minutes(run / "ckpt.pt")}, []
    if loss == "dat":
        figures["minutes"] += minutes(first_stage(run, opt))
    if opt.autoattack:
        only = ["--attacks", "autoattack", "--n", opt.autoattack]
        accuracy, command = attack(run, opt, *shlex.split(opt.evaluation), *only)
        figures |= {"autoattack": accuracy["autoattack"], "autoattack n": accuracy["n"]}
        commands.append(command)
    accuracy, command = attack(run, opt, *ATTACKS, *shlex.split(opt.evaluation))
    commands.append(command)
    for key in ("n", *ACCURACIES, "calibration_error"):
        figures[key] = accuracy[key]
    for key in [key for key in accuracy if key.startswith("auroc_")]:
        other = f"auroc_{Path(key.removeprefix('auroc_')).name}"
        figures[other] = accuracy[key]["log_p_x"]
        figures[f"{other}_max_p"] = accuracy[key]["max_p_y_x"]
    distances, more = draw_and_judge(run, judge, opt)
    return figures | distances, commands + more


def row_of(loss: str, seed: int, judge: Path, opt: Options) -> dict:
    """Train and measure one run, or read its row if it exists."""
    run = Path(opt.out) / f"{opt.name}-{loss}-{seed}"
    path = run / "row.json"
    if path.exists():
        row = json.loads(path.read_text())
        if "diverged" in row or "autoattack" in row or not opt.autoattack:
            return row
    try:
        command = train(run, loss, seed, opt, "--diagnose")
    except cli.Diverged as error:
        row = {"diverged": str(error)}
    else:
        figures, commands = measure(run, loss, judge, opt)
        row = figures | {"commands": [command, *commands]}
    cli.write_text(path, json.dumps(row, indent=1) + "\n")
    return row


def main() -> None:
    opt = cli.parse(Options, __doc__)
    opt.losses = opt.losses or list(cem.SUPERVISED_LOSSES)
    same = len(opt.epochs) in (0, len(opt.losses))
    cli.require(same, f"--epochs needs {len(opt.losses)} numbers, for {' '.join(opt.losses)}")
    seeds = opt.seeds or range(5)
    judge = Path(opt.judge or f"{opt.out}/{opt.name}-judge/ckpt.pt")
    if not opt.judge:
        train(judge.parent, "st", 100, opt)
    rows = {loss: [row_of(loss, seed, judge, opt) for seed in seeds] for loss in opt.losses}
    out = Path("results") / f"losses-{opt.name}.json"
    record = {"command": cli.command(), "rows": rows}
    cli.write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"{markdown.table(tables.losses(record))}wrote {out}")


if __name__ == "__main__":
    cli.run(main)
