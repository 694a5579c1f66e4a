"""Training, attack, samplers, resume and metrics on a CUDA device, where there is one."""

import json

import numpy as np
import pytest
import torch
from conftest import read_log, script, succeeded

import cem
import sample
import train_sup
from lib import data, distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TRAIN = "--dataset digits --width 8 --epochs 2 --n-eval 36 --device cuda".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a classifier and an encoder, trained on the GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in ("train_sup.py", "train_unsup.py"):
        succeeded(script(name, *TRAIN, cwd=folder))
    return folder


def test_a_training_step_changes_every_weight():
    device = torch.device("cuda")
    train_set = data.load("digits", "train").to(device)
    model = cem.ParametricCEM("resnet18", 10, width=8, in_channels=1).to(device).train()
    before = [p.detach().clone() for p in model.parameters()]
    batch_loss = train_sup.make_batch_loss(train_sup.Options(batch_size=32), train_set)
    index, draws = torch.arange(32, device=device), torch.rand(32, 3, device=device)
    generator = distributed.RankGenerator(0, device)
    loss, _ = batch_loss(model, index, draws, generator)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss.isfinite()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("name", ["train_sup.py", "train_unsup.py"])
def test_training_with_cuda_graphs_is_the_same_training(name, tmp_path):
    losses = []
    for flags in ([], ["--compile"]):
        options = [*TRAIN, "--precision", "float32", "--epochs", 1, *flags]
        succeeded(script(name, *options, "--out", tmp_path / f"run{len(flags)}", cwd=tmp_path))
        losses.append([line["loss"] for line in read_log(tmp_path / f"run{len(flags)}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_attack_stays_in_its_ball(norm):
    model = cem.ParametricCEM("resnet18", 5, width=8).cuda().eval()
    x, y = torch.rand(16, 3, 16, 16, device="cuda"), torch.arange(16, device="cuda") % 5
    attack = cem.potential("ce", model, y)
    x_adv = cem.pgd(attack, x, eps=0.1, norm=norm, steps=5)
    delta = (x_adv - x).flatten(1)
    size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert size.max() <= 0.1 * (1 + 1e-5) and x_adv.min() >= 0 and x_adv.max() <= 1
    with torch.no_grad():
        assert (attack(x_adv) > attack(x)).all()


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_every_sampler_draws(sampler, runs):
    draw = ["--sampler", sampler, "--n", 20, "--batch-size", 20, "--device", "cuda"]
    succeeded(script("sample.py", *draw, cwd=runs))
    kind = "unsup" if sampler in cem.NON_PARAMETRIC_SAMPLERS else "sup"
    with np.load(runs / f"runs/{kind}/samples-{sampler}.npz") as z:
        assert z["arr_0"].shape == (20, 8, 8, 1) and z["arr_0"].std() > 0


def test_a_stopped_run_resumes(tmp_path):
    first = script("train_sup.py", *TRAIN, "--max-minutes", 1e-4, cwd=tmp_path)
    assert first.returncode == 0 and "--resume continues" in first.stdout
    succeeded(script("train_sup.py", *TRAIN, "--resume", cwd=tmp_path))
    assert [line["epoch"] for line in read_log(tmp_path / "runs/sup")] == [1, 2]


def test_metrics_agree_with_the_cpus(runs):
    succeeded(script("sample.py", "--sampler", "seeds", "--n", 100, cwd=runs))
    judge = ["--samples", "runs/sup/samples-seeds.npz", "--ref", "digits"]
    rows = []
    for device in ("cuda", "cpu"):
        more = ["--features", "runs/sup/ckpt.pt", "--device", device, "--data-dir", device]
        succeeded(script("eval_is_fid.py", *judge, *more, cwd=runs))
        rows.append(json.loads((runs / "runs/sup/metrics.json").read_text())["rows"][0])
    assert rows[0]["C-FD"] == pytest.approx(rows[1]["C-FD"], rel=1e-3)
