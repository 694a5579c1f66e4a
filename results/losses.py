"""Train every supervised loss over several seeds and measure them alike: results/losses-<name>.json and .md.

    python results/losses.py                                           # digits, five seeds: half an hour on two cores
    python results/losses.py --losses st at jeat --seeds 0 --autoattack
    python results/losses.py --dataset PATH --losses at jeat --seeds 0 --name cifar10 --options "--width 16 --epochs 8"

Calls the scripts as a user would. What is in --out already is not done again, so that several of these can share the work,
each with --losses or --seeds of its own and the judge's training done before.
"""

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cem  # noqa: E402
import cli  # noqa: E402

OWN_ATTACKS = "--attacks pgd-20 pgd-50 margin --restarts 5"


@dataclass
class Options:
    dataset: str = cli.option("digits", "dataset, as for train_sup.py")
    losses: list[str] = cli.options(str, f"losses to compare (default: {' '.join(cem.SUPERVISED_LOSSES)})")
    seeds: list[int] = cli.options(int, "seeds of the training runs (default: 0 1 2 3 4)")
    options: str = cli.option("", "more options of train_sup.py for all the runs, in one string")
    judge: str = cli.option("", "classifier checkpoint for C-FD (default: one is trained with --loss st --seed 100)")
    n_samples: int = cli.option(1000, "samples of cs and rcs for C-FD")
    evaluation: str = cli.option("", "more options of --evaluate, in one string, such as --n 1000 --precision bfloat16")
    autoattack: bool = cli.option(False, "measure under AutoAttack too")
    name: str = cli.option("digits", "name of the table")
    out: str = cli.option("runs/losses", "folder of the runs")


def call(*words) -> str:
    """A script of the project in a process of its own -> the command, as a user would type it."""
    command = [str(word) for part in words for word in (shlex.split(part) if isinstance(part, str) else [part])]
    print("python", shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stderr=subprocess.PIPE, text=True)
    said = (done.stderr.replace("\r", "\n").strip().splitlines() or [""])[-1]
    if done.returncode == 3:
        raise cli.Diverged(said)
    cli.require(done.returncode == 0, f"{shlex.join(command)}: {said}")
    return "python " + shlex.join(command)


def measure(loss: str, seed: int, judge: Path, opt: Options) -> dict[str, float]:
    """Train, attack and sample one run, or take its row from where it was kept."""
    run = Path(opt.out) / f"{opt.name}-{loss}-{seed}"
    if (row := run / "row.json").exists():
        kept = json.loads(row.read_text())
        if "diverged" in kept or "autoattack" in kept or not opt.autoattack:
            return kept
    data = f"--dataset {shlex.quote(opt.dataset)}"
    try:
        resume = "--resume" if (run / "ckpt.pt").exists() else ""
        commands = [call("train_sup.py", data, f"--loss {loss} --seed {seed} --diagnose --out", run, opt.options, resume)]
    except cli.Diverged as error:
        cli.write_text(row, json.dumps({"diverged": str(error)}, indent=1) + "\n")
        return {"diverged": str(error)}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    checkpoint, result = run / "ckpt.pt", {"minutes": log[-1]["seconds"] / 60}
    ball = opt.options + " " + opt.evaluation
    if opt.autoattack:
        commands.append(call("train_sup.py --evaluate", data, ball, "--attacks autoattack --ckpt", checkpoint))
        result["autoattack"] = json.loads((run / "accuracy.json").read_text())["autoattack"]
    commands.append(call("train_sup.py --evaluate", data, ball, OWN_ATTACKS, "--ckpt", checkpoint))
    accuracy = json.loads((run / "accuracy.json").read_text())
    for key in ("clean_accuracy", "pgd-20", "pgd-50", "margin", "adversarial_accuracy", "calibration_error"):
        result[key] = accuracy[key]
    for other in ("noise", "constant"):
        result[f"auroc_{other}"] = accuracy[f"auroc_{other}"]["log_p_x"]
        result[f"auroc_{other}_max_p"] = accuracy[f"auroc_{other}"]["max_p_y_x"]
    for sampler in ("cs", "rcs"):
        commands.append(call(f"sample.py --sampler {sampler} --n {opt.n_samples} --ckpt", checkpoint))
    samples = [run / f"samples-{sampler}.npz" for sampler in ("cs", "rcs")]
    commands.append(
        call("eval_is_fid.py --samples", *samples, "--ref", Path(opt.dataset), "--features", judge, "--out", run / "c-fd.json")
    )
    for sampler, shown in zip(("cs", "rcs"), json.loads((run / "c-fd.json").read_text())["rows"]):
        result[f"c-fd_{sampler}"] = shown["C-FD"]
    cli.write_text(row, json.dumps(result | {"commands": commands}, indent=1) + "\n")
    return json.loads(row.read_text())


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown: a row a loss, mean ± standard deviation over the seeds whose runs did not diverge."""
    ended = {loss: [run for run in runs if "diverged" not in run] for loss, runs in rows.items()}
    columns = list(dict.fromkeys(key for runs in ended.values() for run in runs for key in run if key != "commands"))
    lines = ["| | runs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for loss, runs in ended.items():
        cells = [f"{len(runs)} of {len(rows[loss])}"]
        for key in columns:
            values = [run[key] for run in runs if key in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "–")
        lines.append(f"| `{loss}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    opt = cli.parse(Options, __doc__)
    losses, seeds = opt.losses or cem.SUPERVISED_LOSSES, opt.seeds or range(5)
    judge = Path(opt.judge or Path(opt.out) / f"{opt.name}-judge" / "ckpt.pt")
    if not opt.judge:
        resume = "--resume" if judge.exists() else ""  # at once, if its training has ended
        call("train_sup.py --loss st --seed 100 --dataset", Path(opt.dataset), "--out", judge.parent, opt.options, resume)
    rows = {loss: [measure(loss, seed, judge, opt) for seed in seeds] for loss in losses}
    out = Path("results") / f"losses-{opt.name}"
    cli.write_text(out.with_suffix(".json"), json.dumps({"command": cli.command(), "rows": rows}, indent=1) + "\n")
    cli.write_text(out.with_suffix(".md"), table(rows))
    print(table(rows) + f"wrote {out}.json and .md")


if __name__ == "__main__":
    cli.run(main)
