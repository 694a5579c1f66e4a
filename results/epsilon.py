"""Plot accuracy under attack over the radius of the ball: results/epsilon.png and .json.

    python results/epsilon.py --ckpt checkpoints/sup.pt --dataset PATH      # needs matplotlib

A large ball contains an adversarial example of every image. The accuracy under an attack that finds
them falls to 0; where gradients are masked, it stays above or rises (Carlini et al., 2019). Radii
grow by eps / 2 up to 8 eps and double from there, to one beyond the first at which the accuracy is
0, or until the ball contains all images. The band is Wilson's 95 % interval.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cem
import eval_robust
from lib import cli, data, files, metrics, pictures, robustness
from lib.device import pick_device


@dataclass
class Options:
    ckpt: str = cli.option("", "classifier checkpoint (default: eval_robust.py's)", metavar="PATH")
    dataset: str = cli.option("", f"{data.HELP} (default: the checkpoint's)")
    data_dir: str = cli.option("data", data.DIR_HELP, metavar="PATH")
    norm: str = cli.option("l2", "norm of the ball", choices=["l2", "linf"])
    eps: float = cli.option(0.5, "radius of the training; the curve's step is half of it", above=0)
    attack: str = cli.option("pgd-50", "attack", choices=list(robustness.ATTACKS))
    n: int = cli.option(1000, "test images, evenly spaced", least=1)
    out: str = cli.option(
        "results/epsilon", "PNG and JSON file to write, without suffix", metavar="PATH"
    )
    device: str = cli.option("auto", cli.DEVICE)


def growing(eps: float, most: float) -> Iterator[float]:
    """Radii from 0 to `most`."""
    radius = 0.0
    while radius < most:
        yield radius
        radius = radius + eps / 2 if radius < 8 * eps else 2 * radius
    yield most


def curve(model: cem.ParametricCEM, test_set: data.Dataset, opt: Options, settings) -> dict:
    """Keys: radii, accuracy under the attack and its interval [low, high], in [0, 1]."""
    pixels = math.prod(test_set.images.shape[1:])
    n = min(opt.n, len(test_set))
    rows = {"radii": [], "accuracy": [], "interval": []}
    for radius in growing(opt.eps, math.sqrt(pixels) if opt.norm == "l2" else 1.0):
        ball = replace(settings, eps=radius)
        accuracy = robustness.accuracy(model, test_set, [opt.attack], ball, n)[opt.attack]
        count = round(accuracy * n)
        interval = metrics.interval(count, n)
        print(f"{opt.norm} radius {radius:g}: {count / n:.2%}", flush=True)
        rows["radii"].append(radius)
        rows["accuracy"].append(count / n)
        rows["interval"].append([round(bound, 4) for bound in interval])
        if rows["accuracy"][-2:] == [0, 0]:
            break
    if rows["accuracy"][-1]:
        cli.warn("accuracy does not fall to 0, so gradients may be masked")
    return rows


def draw(axes, record: dict, classes: int) -> None:
    low, high = zip(*record["interval"])
    axes.fill_between(record["radii"], low, high, alpha=0.3, label="95 % interval")
    axes.plot(record["radii"], record["accuracy"], marker=".", label=record["attack"])
    axes.axhline(1 / classes, color="grey", linestyle="--", label="chance")
    axes.set_xlabel(f"{record['norm']} radius, for pixels in [0, 1]")
    axes.set_ylabel(f"accuracy on {record['n']} test images")
    axes.legend()


def main() -> None:
    opt = cli.parse(Options, __doc__)
    plt = pictures.pyplot()
    device = pick_device(opt.device)
    png, path = Path(f"{opt.out}.png"), Path(f"{opt.out}.json")
    files.check_output(path, files.json_with("command", "radii", "accuracy"), png)
    ckpt = Path(opt.ckpt or cli.default_checkpoint("sup"))
    settings = eval_robust.Options(dataset=opt.dataset, norm=opt.norm, n=opt.n)
    model = eval_robust.load(settings, ckpt, device)
    ours = isinstance(model, cem.ParametricCEM) and "third_party" not in model.extra
    cem.require(ours, f"{ckpt} is not a classifier of this project")
    test_set = data.load(settings.dataset, "test", opt.data_dir, settings.image_size).to(device)
    test_set.check_fits(model, ckpt)
    eval_robust.checked_logits(ckpt, model, test_set, settings)
    record = {"command": cli.command(), "ckpt": str(ckpt), "dataset": test_set.name}
    record |= {"norm": opt.norm, "attack": opt.attack, "n": min(opt.n, len(test_set))}
    record |= curve(model, test_set, opt, settings)
    files.write_json(path, record)
    figure, axes = plt.subplots()
    draw(axes, record, len(test_set.classes))
    pictures.write_figure(png, figure)
    print(f"wrote {png} and {path}")


if __name__ == "__main__":
    cli.run(main)
