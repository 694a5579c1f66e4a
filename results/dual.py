"""Ablations of dual adversarial training: results/dual-<name>.json.

    python results/dual.py --dataset PATH --init runs/at16/ckpt.pt --name cifar10 \\
        --judges checkpoints/judge.pt runs/judge/ckpt.pt --options "--epochs 1"

Trains the second stage once for every variant, one change at a time, and the recipe as it is with
the other --seeds; measures accuracy under PGD-20 and, by every judge, C-FD (E-FD by an encoder) of
the four samplers. Calls the scripts as a user would. Finished parts are not repeated: several
processes can each do some of the --variants.
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

VARIANTS = {  # name -> what differs from the recipe
    "recipe": "",
    "chains of cs alone": "--chain-samplers cs",
    "T to 8": "--dat-max-steps 8",
    "T to 20": "--dat-max-steps 20",
    "without the first stage's posterior": "--keep 0",
    "lambda 0.3": "--likelihood-weight 0.3",
    "lambda 3": "--likelihood-weight 3",
    "seeds of rank 4": "--seed-rank 4",
}
OTHER_START = "chains from other images"


@dataclass
class Options:
    dataset: str = option("digits", "dataset, as for train_sup.py", "training")
    init: str = option("", "classifier of the first stage", "training", metavar="PATH")
    variants: list[str] = cli.option_list(str, "variants to train (default: all)", "training")
    seeds: list[int] = cli.option_list(int, "seeds of the recipe", "training", default=[0, 1, 2])
    options: str = option("", "further options of train_sup.py, in one string", "training")
    other_start: str = option(
        "", "images for the variant of --chain-start", "training", metavar="PATH"
    )
    judges: list[str] = cli.option_list(str, "checkpoints that judge the samples", "evaluation")
    evaluation: str = option("--n 1000", "further options of eval_robust.py", "evaluation")
    n_samples: int = option(500, "samples of each sampler", "evaluation", least=20)
    name: str = option("digits", "name of the table", "run")
    out: str = option("runs/dual", "folder of the runs", "run", metavar="PATH")


def row_of(variant: str, change: str, seed: int, opt: Options) -> dict:
    """Train and measure one run -> its figures and the command of the training.

    C-FD, or E-FD by an encoder, of each sampler by the first judge has the key "<sampler> 1".
    """
    words = ["--dataset", opt.dataset, "--loss", "dat", "--init", opt.init, "--seed", seed]
    words += [*shlex.split(opt.options), *shlex.split(change)]
    name = f"{opt.name}-{variant.replace(' ', '-')}-{seed}-{digest(words)}"
    parts = Parts(Path(opt.out) / name / "done.json")
    run = parts.path.parent
    ckpt = parts.run(run / "ckpt.pt", "train_sup.py", *words, "--out", run, "--resume")
    row = {"variant": variant, "seed": seed, "minutes": minutes(ckpt)}
    found = evaluated(parts, ckpt, "--dataset", opt.dataset, *shlex.split(opt.evaluation))
    row |= {"clean": 100 * found["clean_accuracy"], "PGD-20": 100 * found["pgd-20"]}
    row["n"] = found["n"]
    samplers = cem.PARAMETRIC_SAMPLERS
    for i, judge in enumerate(opt.judges, 1):
        scores = judged(parts, ckpt, samplers, opt.n_samples, opt.dataset, judge)
        for x in samplers:
            name = "C-FD" if "C-FD" in scores[x] else "E-FD"
            row |= {f"{x} {i}": scores[x][name], f"{x} {i} std": scores[x].get(f"{name} std")}
    return row | {"command": parts.used[str(ckpt)]["command"]}


def main() -> None:
    opt = cli.parse(Options, __doc__)
    out = Path("results") / f"dual-{opt.name}.json"
    files.check_output(out, files.json_with("command", "rows"))
    cem.require(bool(opt.judges), "--judges needs a checkpoint")
    variants = dict(VARIANTS)
    if opt.other_start:
        variants[OTHER_START] = f"--chain-start {shlex.quote(opt.other_start)}"
    for name in opt.variants:
        cem.require(name in variants, f"--variants: unknown {name!r}: one of {list(variants)}")
    rows = []
    for variant in opt.variants or variants:
        for seed in opt.seeds if variant == "recipe" else [0]:
            rows.append(row_of(variant, variants[variant], seed, opt))
    record = {"command": cli.command(), "judges": opt.judges, "rows": rows}
    files.write_json(out, record)
    print(f"{markdown.table(tables.dual(record))}wrote {out}")


if __name__ == "__main__":
    cli.run(main)
