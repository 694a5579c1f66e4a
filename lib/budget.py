"""What reproduce.py trains and draws in a given time: a plan from a measured minute of each."""

import math
import re
import time
from pathlib import Path

import torch

import cem
from lib import data, distributed, files, metrics
from lib.device import pick_device
from lib.parts import call, digest, read_once

JUDGE = "--arch resnet18 --width 16 --lr 0.2 --schedule onecycle --ema 0.99"
FAST = (
    "--arch resnet18 --width {} --optimizer muon --lr 0.2 --schedule onecycle --ema 0.995 "
    "--attack-steps 1 --attack-step-size 0.5"
)
FAST_SUP = f"{FAST} --weight-decay 0.002"
FAST_UNSUP = f"{FAST} --batch-size 128 --temperature 0.2"
# of classifier and encoder, from small to large; the last are the paper's
NETWORKS = [(FAST_SUP.format(width), FAST_UNSUP.format(width)) for width in (16, 32, 64)]
NETWORKS.append(("", ""))
LEAST_EPOCHS = 10  # a larger network is taken only if its classifier gets as many epochs
# each training's share of the time, and its epochs at most; the rest is for samples and scores
SHARES = {"judge": 0.1, "sup": 0.34, "dat": 0.16, "unsup": 0.26}
EPOCHS = {"judge": 8, "sup": 150, "dat": 3, "unsup": 200}
GROWTH = {"dat": 1.5}  # its chains lengthen after the measured minute
MARGIN = 0.9  # of its share, what a training is planned to take


def seconds(budget: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", budget)
    cem.require(found and float(found[1]) > 0, f"--budget {budget!r} is invalid: try 90m, 6h or 2d")
    return float(found[1]) * {"m": 60, "h": 3600, "d": 86400}[found[2]]


def agreed(value: float) -> float:
    """The mean over torchrun's processes, which have to decide alike."""
    return distributed.mean(torch.tensor(value, dtype=torch.float64)).item()


def measured(job, model: str, options: str, minutes: float, first_stage: Path | None = None):
    """Train for `minutes` -> the checkpoint and the training images per second.

    job: a reproduce.Reproduction; model, options, first_stage as in its `training`.
    """
    words = job.training(model, options, first_stage)
    run = job.measured / f"{model}-{digest(words)}"
    more = ["--out", run, "--resume", "--on-diverge", "restart", *job.parts.common]
    for part in (0.25, 0.75):  # a GPU's first seconds go into preparation
        call(*words, *more, "--max-minutes", part * minutes)
    rate = agreed(cem.load(run / "ckpt.pt").extra["training"]["images_per_second"])
    cem.require(rate > 0, f"--budget {job.opt.budget} is too short: {model} has not trained a step")
    return run / "ckpt.pt", rate / GROWTH.get(model, 1)


def sampling_rate(job, ckpt: Path) -> float:
    """Images per second of the longest ascent; writes samples-rcs.npz beside the checkpoint."""
    words = ["--ckpt", ckpt, "--sampler", "rcs", "--steps", 20, "--out", ckpt.parent]
    words += ["--n", 250 * distributed.world_size()]  # a batch for each process
    call("sample.py", *words, *job.parts.common)
    distributed.barrier()  # the first process has written them
    return files.read_json(ckpt.with_name("samples-rcs.json"))["images_per_second"]


def inception_cost(job, samples: Path) -> tuple[float, float]:
    """Images per second of Inception, and the seconds of a row's Fréchet distances: that of all its
    samples and those of ten folds."""
    images, _ = data.read_npz(samples)
    network = metrics.Inception(job.opt.weights, pick_device(job.opt.device))
    for part in (images[:100], images):  # the first warms up
        begin = time.monotonic()
        (features,), _ = metrics.extract(network, part, 100, "Inception")
    rate = len(images) / (time.monotonic() - begin)
    mu, sigma = metrics.statistics(features)
    root = metrics.square_root(sigma)
    begin = time.monotonic()
    metrics.frechet_distance(torch.rand(4 * len(mu), len(mu)), mu, sigma, root)
    return rate, 11 * (time.monotonic() - begin)


def trained_briefly(job, total: float, images: int) -> tuple[dict, dict, Path]:
    """Measure a minute of each training, and choose the networks that suit the budget -> options
    and images per second of each training, and a checkpoint of the second stage."""
    minutes = min(total / 3600, 1)  # a sixtieth of the budget, at most one
    options, rates = {"judge": JUDGE, "dat": ""}, {}
    for sup, unsup in NETWORKS:
        trial, rate = measured(job, "sup", sup, minutes)
        enough = SHARES["sup"] * total * rate / images >= LEAST_EPOCHS
        if enough or not rates:
            first_stage = trial
            rates["sup"] = rate
            options |= {"sup": sup, "unsup": unsup}
        if not enough:
            break
    second_stage, rates["dat"] = measured(job, "dat", "", minutes, first_stage)
    for model in ("judge", "unsup"):
        _, rates[model] = measured(job, model, options[model], minutes)
    return options, rates, second_stage


def shortened(job, rows: int) -> dict:
    """Plan what fits into --budget -> options of each training, minutes of all parts, n samples per
    row, and n_eval test images under attack."""
    begin = time.monotonic()
    total = seconds(job.opt.budget)
    images = len(read_once(job.opt.dataset, "train", job.opt.data_dir, job.opt.image_size))
    options, rates, second_stage = trained_briefly(job, total, images)

    def epochs(model: str, left: float) -> float:
        epoch = images / rates[model] / MARGIN / SHARES[model]
        short = f"--budget {job.opt.budget} is too short for an epoch of the encoder"
        least = math.ceil(1.2 * (epoch + total - left) / 60)  # longer trials take longer
        cem.require(model != "unsup" or left >= epoch, f"{short}: try {least}m")
        return min(left / epoch, EPOCHS[model])

    # refuse a short budget now, before the images are drawn
    epochs("unsup", total - agreed(time.monotonic() - begin))
    draw_rate = agreed(sampling_rate(job, second_stage))
    score_rate, row = math.inf, 0.0
    if job.inception:
        samples = second_stage.with_name("samples-rcs.npz")
        score_rate, row = map(agreed, inception_cost(job, samples))
    reference = images / score_rate
    too_long = f"Inception takes {reference / 60:.0f} minutes for the training images alone"
    cem.require(reference < total / 4, f"--budget {job.opt.budget} is too short: {too_long}")
    spent = agreed(time.monotonic() - begin)
    left = total - spent - reference
    plan = {"options": {}, "minutes": {"plan": round(spent / 60, 1)}}
    for model, rate in rates.items():
        planned = epochs(model, left)
        whole = max(int(planned), 1)
        share = f" --share {planned:.3f}" if planned < 1 else ""
        plan["options"][model] = f"{options[model]} --epochs {whole}{share}".strip()
        plan["minutes"][model] = round(min(planned, whole) * images / rate / 60, 1)
    rest = (1 - sum(SHARES.values())) / 2 * left  # for drawing and Inception; as much for the rest
    n = (rest / rows - row) / (1 / draw_rate + 1 / score_rate)
    n = min(max(int(n) // 100 * 100, 100), 50_000)
    plan["minutes"]["samples"] = round(rows * n / draw_rate / 60, 1)
    plan["minutes"]["scores"] = round((rest + reference + rows * (n / score_rate + row)) / 60, 1)
    return plan | {"n": n, "n_eval": 0 if n >= 10_000 else 1000}
