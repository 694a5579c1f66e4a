"""The options that both training scripts share."""

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import cem
from lib import cli, data, distributed, files, init, schema
from lib.attack import check_ball
from lib.cli import option
from lib.device import PRECISIONS
from lib.run import FILES, OF_THIS_CALL, resumes

ARCH = "network: resnet14 to -152, wrn-16-4 to -70-16; <resnet>-imagenet has ImageNet's stem"
ENERGY = "energy terms"
DAT = dict(
    epochs=3, batch_size=128, lr=0.01, schedule="cosine", ema=0.99, attack_steps=4,
    attack_step_size=0.2, clip=5.0, likelihood_weight=1.0,
)  # fmt: skip


@dataclass
class TrainOptions:
    """Options of both training scripts; their order is the order of the headings of --help."""

    dataset: str = option("cifar10", "", "data")  # each script's help comes from data.HELP
    data_dir: str = option("data", data.DIR_HELP, "data", metavar="PATH")
    image_size: int = option(0, data.IMAGE_SIZE, "data", least=0)
    arch: str = option("resnet50", ARCH, "model", choices=list(cem.ARCHS), metavar="NAME")
    # the least: oneDNN's gradient of narrower layers is wrong on AVX2 CPUs (its issue 6035)
    width: int = option(64, "scales all channels; 64 is standard", "model", least=8)
    init: str = option(
        "", "begin from this checkpoint, ours or third-party; gives arch, width",
        "model", metavar="PATH",
    )  # fmt: skip
    mean: list[float] = cli.option_list(float, cli.MEAN, "model")
    std: list[float] = cli.option_list(float, cli.STD, "model")
    loss: str = option("at", "", "optimisation")  # each script has its own
    epochs: int = option(150, "passes over the training images", "optimisation", least=1)
    batch_size: int = option(256, "images per step, over all processes", "optimisation", least=2)
    optimizer: str = option(
        "sgd", "SGD with momentum 0.9, or Muon", "optimisation", choices=["sgd", "muon"],
    )  # fmt: skip
    lr: float = option(0.1, "peak learning rate", "optimisation", above=0)
    schedule: str = option(
        "cosine", "learning rate after a warm-up", "optimisation", choices=["cosine", "onecycle"]
    )
    weight_decay: float = option(5e-4, "weight decay", "optimisation", least=0)
    ema: float = option(
        0.999, "EMA decay; the average is the model; 0: no EMA", "optimisation",
        least=0, below=1,
    )  # fmt: skip
    clip: float = option(0.0, "largest gradient norm; 0: no clipping", "optimisation", least=0)
    attack: str = option(
        "pgd", "PGD, or N-FGSM: one step of eps, from noise", "attack",
        choices=["pgd", "fgsm"],
    )  # fmt: skip
    norm: str = option("l2", "norm of the attack's ball", "attack", choices=["l2", "linf"])
    eps: float = option(0.5, "radius, for pixels in [0, 1]; 8/255 works", "attack", least=0)
    attack_steps: int = option(7, "PGD steps", "attack", least=1)
    attack_step_size: float = option(0.1, "PGD step size", "attack", above=0)
    likelihood_weight: float = option(0.1, "lambda, weight of the energy terms", ENERGY, least=0)
    chain_start: str = option(
        "gaussian", "where chains of dat start: Gaussian seeds, or a dataset's images", ENERGY,
        metavar="PATH",
    )  # fmt: skip
    dat_max_steps: int = option(14, "steps to which dat's chains grow, from 5", ENERGY, least=1)
    dat_step_size: float = option(0.25, "l2 length of a step of dat's chains", ENERGY, above=0)
    keep: float = option(2.0, "dat: weight of the distance to --init's outputs", ENERGY, least=0)
    max_energy_gap: float = option(
        100.0, "|E(x_s) - E(x)| above which a run has diverged", ENERGY, above=0
    )
    out: str = option("", "folder of the run", "run", metavar="PATH")
    resume: bool = option(False, "continue the run in --out, or start it", "run")
    max_minutes: float = option(
        math.inf, "save and stop after this time; --resume continues", "run", type=float, above=0
    )
    seed: int = option(0, "seed of weights, order, augmentation and attack", "run")
    device: str = option("auto", cli.DEVICE, "run")
    precision: str = option("auto", "auto: bfloat16 if native", "run", choices=PRECISIONS)
    compile: bool = option(False, "torch.compile network and attack", "run")
    n_eval: int = option(1000, "test images for the measurements in the log", "run", least=1)
    seed_rank: int = option(48, "rank of the Gaussian seeds in the checkpoint", "run", least=1)
    batch_norm: str = option(
        "sync", "BatchNorm over all torchrun processes or per process", "run",
        choices=["sync", "local"],
    )  # fmt: skip
    quiet: bool = option(False, cli.QUIET, "run")
    on_diverge: str = option(
        "stop", "stop, or restart from ckpt.pt at half the rate", "run",
        choices=["stop", "restart"],
    )  # fmt: skip


def stored(opt: TrainOptions) -> dict:
    """The defaults that --init gives or, with --resume, the options of the run in --out."""
    if not resumes(opt):
        return init.defaults(opt) if opt.init else {}
    found = files.read_json(Path(opt.out) / "options.json")
    if not isinstance(found, dict):  # lost or damaged: the checkpoint has them, too
        found = schema.load(Path(opt.out) / "ckpt.pt").extra.get("options", {})
    same = [name for name, value in asdict(opt).items() if type(value) is type(found.get(name))]
    return {name: found[name] for name in same if name not in OF_THIS_CALL}


def preset(opt: TrainOptions, digits: dict, of_loss: dict[str, tuple[dict, dict]]) -> dict:
    """The defaults that change: with the dataset `digits`, with a loss (on all datasets, and on
    digits), and those that are `stored`."""
    kept = stored(opt)
    everywhere, on_digits = of_loss.get(kept.get("loss", opt.loss), ({}, {}))
    if kept.get("dataset", opt.dataset) == "digits":
        everywhere = digits | everywhere | on_digits
    return everywhere | kept


def claim(folder: Path) -> None:
    """Make and lock the folder of a run, before any work.

    Raises CEMError if it cannot be written, is in use, or one of its files is not a regular file.
    """
    files.make_folder(folder)
    files.lock(folder, f"another process is training in {folder}: use another --out")
    for path in (folder / name for name in FILES):
        regular = path.is_file() and not path.is_symlink()
        wrong = f"{path} is not a regular file: use another --out"
        cem.require(regular or not os.path.lexists(path), wrong)


def check(opt: TrainOptions) -> None:
    n = distributed.world_size()
    cem.require(opt.batch_size >= 2 * n, f"--batch-size must be at least {2 * n}, 2 per process")
    cem.require(opt.batch_size % n == 0, f"--batch-size must be a multiple of {n}, the processes")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    cem.require(opt.resume or not restarts, "torchrun --max-restarts needs --resume")
    given = opt.init or not (opt.mean or opt.std)
    cem.require(given, "--mean and --std are for the third-party checkpoint of --init")
    named = opt.chain_start == "gaussian" or opt.chain_start in data.NAMES
    found = named or Path(opt.chain_start).exists()
    cem.require(found, f"--chain-start {opt.chain_start} not found: use gaussian or a dataset")
    first = "--loss dat is a second stage: pass the first one's checkpoint as --init"
    cem.require(opt.loss != "dat" or opt.init, first)
    own = opt.init and Path(opt.init).resolve().parent == Path(opt.out).resolve()
    cem.require(
        resumes(opt) or not own, f"--init {opt.init} is of the run in --out: use another --out"
    )
    check_ball(opt)
    if opt.attack == "pgd" and opt.attack_steps > 1 and opt.attack_step_size > opt.eps > 0:
        usual = f"usual is 2.5 eps / steps = {2.5 * opt.eps / opt.attack_steps:.2g}"
        cli.warn(f"--attack-step-size {opt.attack_step_size:g} exceeds --eps {opt.eps:g}: {usual}")
