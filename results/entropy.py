"""Plot a batch's entropy along the maxent and pgd samplers: results/entropy.png and .json.

    python results/entropy.py --ckpt checkpoints/unsup.pt        # needs matplotlib

The estimate is the mean over the batch of -log 1/(N-1) Σ_{j≠i} exp f(x_i, x_j), by the encoder
that draws: the potential of maxent. maxent raises it, pgd lowers it at first.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem
import sample
from lib import cli, files, pictures, sampling
from lib.device import pick_device


@dataclass
class Options:
    ckpt: str = cli.option("", "encoder checkpoint (default: the shipped unsup.pt)", metavar="PATH")
    n: int = cli.option(250, "images in the batch", least=2)
    steps: int = cli.option(50, "steps of the ascent", least=1)
    step_size: float = cli.option(0.25, "l2 length of a step", above=0)
    out: str = cli.option(
        "results/entropy", "PNG and JSON file to write, without suffix", metavar="PATH"
    )
    device: str = cli.option("auto", cli.DEVICE)


@torch.no_grad()
def entropy(model: nn.Module, x: Tensor) -> float:
    return cem.potential("maxent", model)(x).mean().item()


def curve(sampler: str, model: nn.Module, seeds: Tensor, opt: Options) -> list[float]:
    """The entropy estimate at the seeds and after each step of the sampler."""
    potential = cem.potential(sampler, model, seeds if sampler == "pgd" else None)
    x = seeds
    values = [entropy(model, x)]
    for _ in range(opt.steps):
        x = cem.ascend(potential, x, steps=1, step_size=opt.step_size)
        values.append(entropy(model, x))
    return [round(value, 4) for value in values]


def main() -> None:
    opt = cli.parse(Options, __doc__)
    plt = pictures.pyplot()
    device = pick_device(opt.device)
    png, path = Path(f"{opt.out}.png"), Path(f"{opt.out}.json")
    files.check_output(path, files.json_with("maxent, one Gaussian", "pgd, one Gaussian"), png)
    ckpt = Path(opt.ckpt or cli.SHIPPED / "unsup.pt")
    model = sampling.load_model(ckpt, device, sample.Options(sampler="maxent"))
    gaussians = cem.GaussianSeeds.from_state_dict(model.extra["seeds"], device)
    classes = torch.arange(opt.n) % gaussians.num_classes
    curves = {}
    for kind, labels, style in (
        ("class-wise seeds", classes, "-"),
        ("one Gaussian", opt.n, "--"),
    ):
        seeds = gaussians.sample(labels, torch.Generator(device).manual_seed(0))
        for sampler in ("maxent", "pgd"):
            name = f"{sampler}, {kind}"
            curves[name] = curve(sampler, model, seeds, opt)
            plt.plot(curves[name], label=name, linestyle=style)
    plt.xlabel(f"step (l2 length {opt.step_size:g})")
    plt.ylabel(f"entropy estimate of {opt.n} images")
    plt.legend()
    pictures.write_figure(png, plt.gcf())
    files.write_json(path, curves)
    print(f"wrote {png} and {path}")


if __name__ == "__main__":
    cli.run(main)
