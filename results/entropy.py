"""MaxEnt raises a batch's entropy estimate, PGD lowers it: both curves over 50 steps, as results/entropy.png and .json.

    python results/entropy.py --ckpt checkpoints/unsup.pt        # needs matplotlib

The estimate is the mean over the batch of -log 1/(N-1) Σ_{j≠i} exp f(x_i, x_j), by the encoder that climbs.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem  # noqa: E402
import cli  # noqa: E402
import hardware  # noqa: E402
import sample  # noqa: E402


@dataclass
class Options:
    ckpt: str = cli.option(str(cli.SHIPPED / "unsup.pt"), "encoder checkpoint")
    n: int = cli.option(250, "images in the batch")
    steps: int = cli.option(50, "steps of the ascent")
    step_size: float = cli.option(0.25, "l2 length of a step")
    out: str = cli.option("results/entropy", "PNG and JSON file to write, without their endings")
    device: str = cli.option("auto", "auto, cpu, cuda, cuda:1, mps")


def main() -> None:
    opt = cli.parse(Options, __doc__)
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise cem.CEMError("the figure needs matplotlib: pip install matplotlib") from error
    where = hardware.device(opt.device)
    model = sample.load_model(Path(opt.ckpt), where, sample.Options(sampler="maxent"))
    entropy = cem.potential("maxent", model)
    seeds = cem.GaussianSeeds.from_state_dict(model.extra["seeds"], where)
    classes, curves = torch.arange(opt.n) % seeds.num_classes, {}
    for label, kind in (("class-wise seeds", classes), ("one Gaussian", opt.n)):
        start = seeds.sample(kind, torch.Generator(where).manual_seed(0))
        for name in ("maxent", "pgd"):
            potential, values = cem.potential(name, model, start), []

            def watched(x, potential=potential, values=values):
                with torch.no_grad():
                    values.append(entropy(x).mean().item())
                return potential(x)

            x = cem.ascend(watched, start, steps=opt.steps, step_size=opt.step_size)
            with torch.no_grad():
                values.append(entropy(x).mean().item())
            curves[f"{name}, {label}"] = [round(v, 4) for v in values]
            plt.plot(values, label=f"{name}, {label}", linestyle="-" if kind is classes else "--")
    plt.xlabel(f"step (l2 length {opt.step_size:g})")
    plt.ylabel(f"entropy estimate of {opt.n} images")
    plt.legend()
    out = Path(opt.out)
    cem.replace(out.with_suffix(".png"), lambda file: plt.savefig(file, dpi=120, bbox_inches="tight"))
    cli.write_text(out.with_suffix(".json"), json.dumps(curves) + "\n")
    print(f"wrote {out.with_suffix('.png')} and .json")


if __name__ == "__main__":
    cli.run(main)
