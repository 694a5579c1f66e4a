"""The likelihood's view of training: what --diagnose logged every epoch, as results/energies-<name>.png.

    python train_sup.py --dataset digits --loss jeat --diagnose --out runs/jeat
    python results/energies.py --runs runs/at runs/jeat --name digits        # needs matplotlib

Four panels over the epochs, a colour a run: the mean energies E(x), E(x_adv) and E(x_s) of held-out images, attacked ones and
the model's own samples; the norms of the consistency and the contrastive gradient; their cosine; the calibration error.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem  # noqa: E402
import cli  # noqa: E402

PANELS = {
    "energy": {"E_x": "-", "E_x_adv": "--", "E_x_s": ":"},
    "norm of the gradient": {"consistency_norm": "-", "contrastive_norm": "--"},
    "cosine of the two gradients": {"cosine": "-"},
    "expected calibration error": {"calibration_error": "-"},
}


@dataclass
class Options:
    runs: list[str] = cli.options(str, "folders of runs that were trained with --diagnose (default: runs/sup)")
    name: str = cli.option("digits", "name of the figure")


def main() -> None:
    opt = cli.parse(Options, __doc__)
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise cem.CEMError("the figure needs matplotlib: pip install matplotlib") from error
    figure, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4))
    for colour, run in enumerate(opt.runs or ["runs/sup"]):
        path = Path(run) / "log.jsonl"
        cli.require(path.is_file(), f"there is no {path}: train with --diagnose")
        log = [json.loads(line) for line in path.read_text().splitlines()]
        log = [line for line in log if "E_x" in line]
        cli.require(bool(log), f"{path} has no energies: train with --diagnose")
        for axis, (title, lines) in zip(axes, PANELS.items()):
            for key, style in lines.items():
                label = f"{Path(run).name} {key}" if len(lines) > 1 else Path(run).name
                axis.plot([line["epoch"] for line in log], [line[key] for line in log], style, color=f"C{colour}", label=label)
            axis.set_title(title)
            axis.set_xlabel("epoch")
    for axis in axes:
        axis.legend(fontsize=8)
    out = Path("results") / f"energies-{opt.name}.png"
    cem.replace(out, lambda file: figure.savefig(file, format="png", dpi=100, bbox_inches="tight"))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
