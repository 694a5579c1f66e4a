"""eval_is_fid.py: scores against closed forms and SciPy, and the script on image files."""

import json
import math
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import files, script
from PIL import Image

import cem
import data
import eval_is_fid


def gaussian(d, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, rank or d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), a @ a.T


def test_frechet_distance_equals_the_matrix_square_root():
    (mu1, s1), (mu2, s2) = gaussian(12, 0), gaussian(12, 1)
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root).real
    assert eval_is_fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    """(√a - √b)² summed over the axes, here with rank-deficient covariances, on which a matrix square root may fail."""
    a, b = torch.tensor([4.0, 1.0, 0.0, 0.0]).double(), torch.tensor([9.0, 0.0, 16.0, 0.0]).double()
    zero = torch.zeros(4).double()
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    # the root of an eigenvalue's rounding error, 1e-16, is 1e-8
    assert eval_is_fid.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, abs=1e-6)
    mu, sigma = gaussian(30, 3, rank=5)
    assert eval_is_fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-5)


def test_inception_score_equals_its_definition_split_by_split():
    p = torch.rand(57, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[3, 2] = 0  # 0 log 0 = 0
    p = p / p.sum(1, keepdim=True)
    scores = []
    for part in np.array_split(p.numpy(), 5):
        marginal = part.mean(0)
        kls = [sum(v * math.log(v / m) for v, m in zip(row, marginal) if v > 0) for row in part]
        scores.append(math.exp(sum(kls) / len(kls)))
    mean, std = eval_is_fid.inception_score(p, splits=5)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12) and std == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_lies_between_1_and_the_number_of_classes():
    assert eval_is_fid.inception_score(torch.full((100, 4), 0.25))[0] == pytest.approx(1)
    assert eval_is_fid.inception_score(torch.eye(4).repeat(25, 1), splits=1)[0] == pytest.approx(4)


def test_classifier_blocks_are_pooled_means_and_deviations(model, tmp_path):
    cem.save(tmp_path / "m.pt", model)
    network = eval_is_fid.Classifier(str(tmp_path / "m.pt"), torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    blocks, probabilities = eval_is_fid.extract(network, images, 2, "test")
    stages = model.double().stages(images.double() / 255)
    assert [b.shape for b in blocks] == [(5, 2 * s.shape[1]) for s in stages]
    for block, stage in zip(blocks, stages):
        channels = stage.flatten(2)
        expected = torch.cat([channels.mean(2), (channels - channels.mean(2, keepdim=True)).square().mean(2).sqrt()], 1)
        torch.testing.assert_close(block, expected, rtol=1e-3, atol=1e-5)  # float32 against float64
    torch.testing.assert_close(probabilities, model(images.double() / 255).softmax(1), rtol=1e-3, atol=1e-5)


def test_distance_is_standardised_by_the_reference():
    """Scaling every feature of both sets leaves the standardised distance as it is."""
    sets = [gaussian(6, seed) for seed in (0, 1)]
    scale = torch.logspace(-2, 2, 6).double()
    scaled = [(mu * scale, sigma * scale * scale[:, None]) for mu, sigma in sets]
    expected = eval_is_fid.distance([sets[0]], [sets[1]], True)
    assert eval_is_fid.distance([scaled[0]], [scaled[1]], True) == pytest.approx(expected, rel=1e-8)
    assert eval_is_fid.distance([scaled[0]], [scaled[1]], False) != pytest.approx(expected, rel=0.1)


def test_real_digits_are_nearer_to_digits_than_noise(digits_run):
    from sklearn.datasets import load_digits

    real = (load_digits().images[:300, :, :, None] / 16 * 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    np.savez(digits_run / "real.npz", arr_0=real, arr_1=load_digits().target[:300])
    np.savez(digits_run / "noise.npz", arr_0=noise)
    folder = digits_run / "images" / "some"
    folder.mkdir(parents=True)
    for i, image in enumerate(real[:40]):
        Image.fromarray(image[:, :, 0]).save(folder / f"{i:03d}.png")
    paths = [digits_run / "real.npz", digits_run / "noise.npz", digits_run / "images"]
    arguments = ["--ref", "digits", "--features", "runs/sup/ckpt.pt", "--out", "m.json"]
    done = script("eval_is_fid.py", "--samples", *paths, *arguments, cwd=digits_run)
    assert done.returncode == 0, done.stderr
    rows = json.loads((digits_run / "m.json").read_text())["rows"]
    assert [row["n"] for row in rows] == [300, 300, 40]
    assert rows[0]["C-FD"] < rows[2]["C-FD"] < rows[1]["C-FD"]
    said = cem.load(digits_run / "runs/sup/ckpt.pt")(torch.from_numpy(real).permute(0, 3, 1, 2) / 255).argmax(1)
    share = (said.numpy() == load_digits().target[:300]).mean()
    assert rows[0]["wanted"] == pytest.approx(share, abs=1.5 / 300) and share > 0.3 and "wanted" not in rows[1]
    assert "| samples | n | C-IS |" in done.stdout and not {"IS", "FID"} & rows[0].keys()


def test_inception_weights_that_cannot_be_had_name_both_ways_out(digits_run, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    np.savez(digits_run / "i.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    before = files(digits_run)
    for weights in ([], ["--weights", "missing.pth"]):
        done = script(
            "eval_is_fid.py",
            "--samples",
            "i.npz",
            *weights,
            cwd=digits_run,
            TORCH_HOME=str(digits_run),
        )
        assert done.returncode == 2 and done.stderr.count("error: ") == 1
        assert "--weights" in done.stderr and "--features CHECKPOINT" in done.stderr
    assert [f for f in files(digits_run) if "hub" not in f] == before


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_1": np.zeros(3)}, "holds no images"),
        ({"arr_0": np.zeros((30, 8, 8, 1), np.float32)}, "must be uint8"),
        ({"arr_0": np.zeros((30, 8, 8), np.uint8)}, "must be uint8"),
        ({"arr_0": np.zeros((30, 9, 9, 1), np.uint8)}, "nothing is resized"),
        ({"arr_0": np.zeros((5, 8, 8, 1), np.uint8)}, "more than --splits"),
        ({"arr_0": np.zeros((30, 8, 8, 1), np.uint8), "arr_1": np.zeros(4)}, "arr_1 (N,)"),
    ],
)
def test_bad_samples(arrays, message, digits_run, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    arguments = ["--ref", "digits", "--features", digits_run / "runs/sup/ckpt.pt"]
    done = script("eval_is_fid.py", "--samples", "bad.npz", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and files(tmp_path) == ["bad.npz"]


def test_damaged_files_are_refused(digits_run, tmp_path):
    np.savez(tmp_path / "good.npz", arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    good = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.npz").write_text("hello")
    before, features = files(tmp_path), ["--features", digits_run / "runs/sup/ckpt.pt"]
    for samples, ref, part in [
        ("cut.npz", "digits", "cut.npz"),
        ("text.npz", "digits", "text.npz"),
        ("good.npz", "cut.npz", "cut.npz"),
        ("good.npz", "text.npz", "text.npz"),
        ("good.npz", "statistics.npz", "--features inception"),
    ]:
        done = script("eval_is_fid.py", "--samples", samples, "--ref", ref, *features, cwd=tmp_path)
        assert done.returncode == 2 and part in done.stderr and files(tmp_path) == before
    done = script("eval_is_fid.py", "--samples", "good.npz", "--features", "incepton", cwd=tmp_path)
    assert done.returncode == 2 and "neither 'inception'" in done.stderr


def test_sweep_writes_every_point(digits_run, monkeypatch):
    monkeypatch.setattr("sweep.DISPLACEMENTS", (0.5, 1.0))
    judge = ["--ref", "digits", "--ckpt", "runs/sup/ckpt.pt", "--judge", "runs/sup/ckpt.pt", "--n", 20, "--out", "sweep.json"]
    done = script("sweep.py", "--samplers", "cs", *judge, cwd=digits_run)
    assert done.returncode == 0 and "best:" in done.stdout, done.stderr
    rows = json.loads((digits_run / "sweep.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["seeds"] + ["cs"] * (2 + 3 + 2 + 5 + 1)
    assert rows[-1]["raw"] and {row["norm"] for row in rows} == {"l2", "linf", "none"}


def test_inception_features_are_pytorch_fids(tmp_path):
    """On random weights in the published file's format, read from --weights."""
    from pytorch_fid import fid_score, inception

    torch.manual_seed(0)
    with mock.patch.object(inception, "load_state_dict_from_url"), mock.patch.object(torch.nn.Module, "load_state_dict"):
        full = inception.fid_inception_v3()
    torch.save(full.state_dict(), tmp_path / "weights.pth")
    paths = []
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    network = eval_is_fid.Inception(str(tmp_path / "weights.pth"), torch.device("cpu"))
    (pool,), probabilities = eval_is_fid.extract(network, data.read_images(paths), 2, "test")
    theirs = fid_score.get_activations(paths, network.net, 4, 2048, "cpu", num_workers=0)
    np.testing.assert_allclose(pool.numpy(), theirs, rtol=1e-4, atol=1e-6)  # float32 convolutions in another batch size
    logits = torch.nn.functional.linear(torch.from_numpy(theirs), full.fc.weight.double().detach())  # no bias
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-3, atol=1e-7)
    assert probabilities.shape == (4, 1008)
