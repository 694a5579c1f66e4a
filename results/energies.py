"""Plot energies, likelihood gradients and calibration over training: results/energies-<name>.png.

    python train_sup.py --dataset digits --loss jeat --diagnose --out runs/jeat
    python results/energies.py --runs runs/at runs/jeat --name digits        # needs matplotlib

Four panels over the epochs, one colour per run: the mean energies E(x), E(x_adv) and E(x_s) of
test images, attacked test images and samples of the model; the norms of the two halves of the
likelihood gradient, consistency and contrastive; their cosine; the expected calibration error.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem
from lib import cli, pictures

PANELS = {  # title -> keys of log.jsonl and their line styles
    "energy": {"E_x": "-", "E_x_adv": "--", "E_x_s": ":"},
    "gradient norm": {"consistency_norm": "-", "contrastive_norm": "--"},
    "cosine of the two gradients": {"cosine": "-"},
    "expected calibration error": {"calibration_error": "-"},
}


@dataclass
class Options:
    runs: list[str] = cli.option_list(
        str, "folders of runs trained with --diagnose", default=["runs/sup"]
    )
    name: str = cli.option("digits", "name of the figure")


def read_log(run: Path) -> list[dict]:
    """The epochs of a run. Raises CEMError if it was trained without --diagnose."""
    path = run / "log.jsonl"
    cem.require(path.is_file(), f"{path} not found: train with --diagnose")
    log = [json.loads(line) for line in path.read_text().splitlines()]
    log = [line for line in log if "E_x" in line]
    cem.require(bool(log), f"{path} has no energies: train with --diagnose")
    return log


def draw_panel(axis, title: str, names: list[str], logs: list[list[dict]]) -> None:
    for number, (name, log) in enumerate(zip(names, logs)):
        epochs = [line["epoch"] for line in log]
        for key, style in PANELS[title].items():
            label = f"{name} {key}" if len(PANELS[title]) > 1 else name
            values = [line[key] for line in log]
            axis.plot(epochs, values, style, color=f"C{number}", label=label)
    axis.set_title(title)
    axis.set_xlabel("epoch")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def main() -> None:
    opt = cli.parse(Options, __doc__)
    plt = pictures.pyplot()
    runs = [Path(run) for run in opt.runs]
    names, logs = [run.name for run in runs], [read_log(run) for run in runs]
    figure, axes = plt.subplots(2, 2, figsize=(14, 8))
    for axis, title in zip(axes.flat, PANELS):
        draw_panel(axis, title, names, logs)
    figure.tight_layout()
    out = Path("results") / f"energies-{opt.name}.png"
    pictures.write_figure(out, figure)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
