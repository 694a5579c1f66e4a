"""Fine-tune an encoder adversarially, against training from scratch: results/finetune-<name>.json.

    python results/finetune.py --encoder runs/unsup-at/ckpt.pt --dataset PATH --name cifar10 \\
        --shares 0.01 0.1 1 --epochs 60 6 1

For each share of the labels, trains twice for the same number of epochs: from scratch and from the
encoder. Calls the scripts as a user would; an interrupted call resumes, and finished parts are not
repeated.
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
from lib.parts import Parts, digest, evaluated, minutes


@dataclass
class Options:
    encoder: str = option("", "encoder checkpoint (default: runs/unsup/ckpt.pt)", metavar="PATH")
    dataset: str = option("digits", "dataset, as for train_sup.py")
    shares: list[float] = cli.option_list(float, "shares of the labels", default=[0.1, 1.0])
    epochs: list[int] = cli.option_list(int, "epochs with each share", default=[300, 30])
    options: str = option("", "further options of train_sup.py, in one string")
    evaluation: str = option("", "further options of eval_robust.py, in one string")
    name: str = option("digits", "name of the table")
    out: str = option("runs/finetune", "folder of the runs", metavar="PATH")


def row_of(start: str, share: float, epochs: int, parts: Parts, opt: Options) -> dict:
    """Train from the encoder or from scratch, and measure."""
    words = ["--dataset", opt.dataset, "--share", share, "--epochs", epochs]
    words += shlex.split(opt.options)
    words += ["--init", opt.encoder or "runs/unsup/ckpt.pt"] if start == "encoder" else []
    run = Path(opt.out) / f"{start}-{digest(words)}"
    ckpt = parts.run(run / "ckpt.pt", "train_sup.py", *words, "--out", run, "--resume")
    found = evaluated(parts, ckpt, "--dataset", opt.dataset, *shlex.split(opt.evaluation))
    row = {"start": start, "share": share, "minutes": minutes(ckpt)}
    measured = ("n", "clean_accuracy", "pgd-20", "autoattack")
    return row | {key: found[key] for key in measured if key in found}


def main() -> None:
    opt = cli.parse(Options, __doc__)
    out = Path("results") / f"finetune-{opt.name}.json"
    files.check_output(out, files.json_with("command", "rows"))
    same = len(opt.shares) == len(opt.epochs)
    cem.require(same, "--shares and --epochs need as many numbers")
    parts = Parts(Path(opt.out) / "done.json")
    rows = [
        row_of(start, share, n, parts, opt)
        for share, n in zip(opt.shares, opt.epochs)
        for start in ("nothing", "encoder")
    ]
    commands = [part["command"] for part in parts.used.values()]
    record = {"command": cli.command(), "rows": rows, "commands": commands}
    files.write_json(out, record)
    print(f"{markdown.table(tables.finetune(record))}wrote {out}")


if __name__ == "__main__":
    cli.run(main)
