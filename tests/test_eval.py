"""eval_is_fid.py: scores against closed forms and reference libraries, and the script on files."""

import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import sweep
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from conftest import assert_refused, files, script, succeeded
from PIL import Image

import cem
import eval_is_fid
from lib import data, dinov2, manifold, metrics, reference
from lib.reference import Reference
from lib.run import RunFolder

CKPT = "runs/sup/ckpt.pt"


def evaluate(folder, *args):
    return script("eval_is_fid.py", *args, cwd=folder)


def read_rows(done, path):
    succeeded(done)
    return json.loads(path.read_text())["rows"]


def noise_images(n=30, channels=1):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (n, 8, 8, channels), dtype=np.uint8)


# ---------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("rows", [13, 1000])
def test_precision_recall_density_and_coverage_are_those_of_prdc(rows, monkeypatch):
    prdc = pytest.importorskip("prdc", reason="prdc is not installed")
    monkeypatch.setattr(manifold, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    fake = 0.8 * torch.randn(70, 6, generator=generator, dtype=torch.float64) + 0.4
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), manifold.K)
    assert manifold.scores(real, fake) == pytest.approx(expected)
    assert 0 < expected["recall"] < expected["precision"] < 1


def test_the_manifold_scores_tell_the_same_from_far_images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 4, generator=generator, dtype=torch.float64)
    same = manifold.scores(x, x)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert set(manifold.scores(x, x + 100).values()) == {0.0}


def gaussian(d, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, rank or d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), a @ a.T


def rows_of(mu, sigma, n):
    """Features (n, D) of exactly this mean and covariance."""
    x = torch.randn(n, len(mu), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5
    return mu + white @ metrics.square_root(sigma)


@pytest.mark.parametrize("n", [14, 200])
def test_frechet_distance_matches_matrix_square_root(n):
    mu1, sigma1 = gaussian(12, 0)
    mu2, sigma2 = gaussian(12, 1)
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    expected = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()
    expected = expected.item() - 2 * np.trace(root).real
    distance = metrics.frechet_distance(rows_of(mu1, sigma1, n), mu2, sigma2)
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features():
    """Where the smaller product is that of the samples."""
    mu, sigma = gaussian(12, 1)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    root = scipy.linalg.sqrtm((x.T.cov() @ sigma).numpy())
    expected = (x.mean(0) - mu).square().sum() + x.T.cov().trace() + sigma.trace()
    expected = expected.item() - 2 * np.trace(root).real
    assert metrics.frechet_distance(x, mu, sigma) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_rank_deficient_covariances():
    """For commuting covariances it is Σ (√a - √b)²; a matrix square root may fail on these."""
    a = torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    b = torch.tensor([9.0, 0.0, 16.0, 0.0], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    distance = metrics.frechet_distance(rows_of(zero, a.diag(), 20), zero, b.diag())
    assert distance == pytest.approx(expected, abs=1e-6)  # an eigenvalue's error 1e-16 gives 1e-8
    mu, sigma = gaussian(30, 3, rank=5)
    assert metrics.frechet_distance(rows_of(mu, sigma, 50), mu, sigma) == pytest.approx(0, abs=1e-5)


def test_jackknife_of_a_mean_is_its_standard_error():
    """With one sample a fold, it is exactly σ / √n; with ten folds, so on average."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = (x.std() / 200**0.5).item()
    one = torch.zeros(203)
    mean = metrics.jackknife(lambda index: x[index].mean().item(), one[:200], most=200)
    assert mean == pytest.approx(exact, rel=1e-9)
    generator, squares = torch.Generator().manual_seed(1), []
    for _ in range(200):
        x = torch.randn(203, generator=generator, dtype=torch.float64)
        squares.append(metrics.jackknife(lambda index, x=x: x[index].mean().item(), one) ** 2)
    assert np.mean(squares) == pytest.approx(1 / 203, rel=0.1)


@pytest.mark.parametrize("n, classes", [(500, 5), (50, 10), (105, 10), (150, 10), (13, 1)])
def test_jackknife_keeps_the_shares_of_classes(n, classes):
    """Samples of each class in equal numbers: the error of the mean is that within classes."""
    generator, y = torch.Generator().manual_seed(0), torch.arange(n) % classes
    squares = []
    for _ in range(200):
        x = 100 * y + torch.randn(n, generator=generator, dtype=torch.float64)
        squares.append(metrics.jackknife(lambda index, x=x: x[index].mean().item(), y) ** 2)
    assert np.mean(squares) == pytest.approx(1 / n, rel=0.15)


@pytest.mark.parametrize("n, classes", [(100, 100), (40, 10), (4, 1)])
def test_too_few_images_of_a_class_have_no_jackknife(n, classes):
    assert metrics.jackknife(lambda index: 1.0, torch.arange(n) % classes) is None


def test_the_limit_is_extrapolated_in_one_over_n():
    assert metrics.extrapolate(lambda index: 3 + 7 / len(index), 400) == pytest.approx(3)


def test_error_bar_and_limit_of_a_frechet_distance():
    """Of 40 independent sets: the bar is their spread (or somewhat more), and the limit is the
    distance of the Gaussians, which the distance itself exceeds by far."""
    generator = torch.Generator().manual_seed(0)
    sigma, other = gaussian(16, 0, rank=64)[1], gaussian(16, 1, rank=64)[1]
    zero = torch.zeros(16, dtype=torch.float64)
    true = metrics.frechet_distance(rows_of(zero, sigma, 50), zero, other)
    values, bars, limits = [], [], []
    for _ in range(40):
        x = torch.randn(400, 16, generator=generator, dtype=torch.float64)
        x = x @ metrics.square_root(sigma)

        def distance(index, x=x):
            return metrics.frechet_distance(x[index], zero, other)

        values.append(distance(slice(None)))
        bars.append(metrics.jackknife(distance, torch.zeros(400)))
        limits.append(metrics.extrapolate(distance, 400))
    assert 0.75 < np.mean(bars) / np.std(values) < 1.5
    bias, left = np.mean(values) - true, np.mean(limits) - true
    assert bias > 0 and abs(left) < 0.5 * bias + 2 * np.std(limits) / 40**0.5


def test_inception_score_matches_definition():
    p = torch.rand(57, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[3, 2] = 0  # 0 log 0 = 0
    p = p / p.sum(1, keepdim=True)
    scores = []
    for i in range(5):
        part = p[i * 57 // 5 : (i + 1) * 57 // 5].numpy()
        marginal = part.mean(0)
        kls = [sum(v * math.log(v / m) for v, m in zip(row, marginal) if v > 0) for row in part]
        scores.append(math.exp(sum(kls) / len(kls)))
    logits = p.log() + torch.arange(57)[:, None]
    mean, std = metrics.inception_score(logits, splits=5)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert std == pytest.approx(np.std(scores), rel=1e-9)


def test_kernel_distance_matches_double_loop():
    """With 5 rows, every subset is the whole set."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = x + 1

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 25
    values = metrics.kernel_distances(x, y, subsets=3)
    assert values == pytest.approx([within - 2 * across] * 3, rel=1e-12)


def test_scores_match_torch_fidelity():
    """Its functions on the same features and logits."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    from torch_fidelity import metric_fid, metric_isc, metric_kid

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(230, 40, generator=generator, dtype=torch.float64)
    y = torch.rand(310, 40, generator=generator, dtype=torch.float64) ** 2
    logits = 3 * torch.randn(233, 12, generator=generator)  # not a multiple of the splits
    expected = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert metrics.inception_score(logits) == pytest.approx(tuple(expected.values()), rel=1e-6)
    moments = [metric_fid.fid_features_to_statistics(z) for z in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*moments, verbose=False)
    distance = Reference.from_blocks([y]).frechet([x])
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    options = dict(kid_subsets=20, kid_subset_size=100, verbose=False)
    expected = metric_kid.kid_features_to_metric(x, y, **options)
    values = metrics.kernel_distances(x, y, subsets=20, size=100)
    found = values.mean(), values.std()
    assert found == pytest.approx(tuple(expected.values()), rel=1e-6)


def test_classifier_blocks_are_spatial_means_and_deviations(model, tmp_path):
    cem.save(tmp_path / "m.pt", model)
    network = metrics.Checkpoint(str(tmp_path / "m.pt"), torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    with mock.patch.object(metrics.distributed, "world_size", lambda: 8):
        with pytest.raises(cem.CEMError, match="test: fewer images than the 8 processes"):
            metrics.extract(network, images, 2, "test")
    blocks, logits = metrics.extract(network, images, 2, "test")
    x = images.double() / 255
    stages = model.double().stages(x)
    assert [b.shape for b in blocks] == [(5, 2 * s.shape[1]) for s in stages]
    tolerance = dict(rtol=1e-3, atol=1e-5)  # float32 against float64
    for block, stage in zip(blocks, stages):
        pixels = stage.flatten(2)
        mean = pixels.mean(2)
        std = (pixels - mean[..., None]).square().mean(2).sqrt()
        torch.testing.assert_close(block.double(), torch.cat([mean, std], 1), **tolerance)
    torch.testing.assert_close(logits.double(), model(x), **tolerance)


CPU = torch.device("cpu")


def test_precision_and_recall_of_a_part_see_every_class(monkeypatch, tmp_path):
    """Ten clusters, in the order of sample.py: every fifth image shows two of them."""
    monkeypatch.setattr(reference, "KERNEL_IMAGES", 400)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 10

    def features():
        noise = torch.randn(2000, 10, generator=generator, dtype=torch.float64)
        return 20 * torch.eye(10, dtype=torch.float64)[labels] + noise

    real = features()[data.shuffled(2000)]
    found = Reference.from_blocks([real]).manifold([features()])
    assert found["recall"] > 0.8 and found["coverage"] > 0.8
    images = labels.byte().view(-1, 1, 1, 1).expand(-1, 8, 8, 1)
    np.savez(tmp_path / "ref.npz", arr_0=images.numpy())
    opt = SimpleNamespace(ref=str(tmp_path / "ref.npz"), split="train", data_dir="", image_size=0)
    read = reference.load_images(opt)
    kept = read[data.evenly_spaced(400, 2000), 0, 0, 0]
    assert kept.unique().tolist() == [*range(10)]
    assert read[:, 0, 0, 0].bincount().tolist() == [200] * 10


def test_c_fd_is_of_features_standardised_by_the_reference(model, tmp_path):
    cem.save(tmp_path / "m.pt", model)
    network = metrics.Checkpoint(str(tmp_path / "m.pt"), torch.device("cpu"))
    (tmp_path / "ref.npz").touch()  # statistics of a file are not cached
    opt = SimpleNamespace(ref=str(tmp_path / "ref.npz"), split="", data_dir="", batch_size=50)
    images = torch.randint(0, 256, (2, 50, 3, 8, 8), dtype=torch.uint8)
    images[1] //= 2
    against = reference.compute(images[0], network, opt)
    real, fake = (metrics.extract(network, part, 50, "")[0] for part in images)
    distances = []
    for y, x in zip(real, fake):
        mu, std = y.double().mean(0), y.double().std(0).clamp_min(1e-6)
        y, x = (y - mu) / std, (x - mu) / std
        distances.append(metrics.frechet_distance(x, *metrics.statistics(y)))
    assert against.frechet(fake) == pytest.approx(np.mean(distances), rel=1e-6)


def test_features_that_are_constant_in_the_reference_keep_their_scale():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(500, 3, generator=generator)
    y[:, 2] = 0
    x = y.clone()
    x[0, 2] = 0.05  # one sample in 500: its distance is not millions
    judge = Reference.from_blocks([y], standardised=True)
    assert judge.frechet([x]) == pytest.approx(0.05**2 / 500, rel=0.01)


def test_the_error_of_a_kernel_distance_is_that_of_the_mean_over_blocks():
    x, y = torch.randn(50, 2, 4), torch.randn(80, 2, 4)
    judge = Reference.from_blocks(list(y.unbind(1)))
    blocks = list(x.unbind(1))
    each = [metrics.kernel_distances(*pair) for pair in zip(blocks, y.unbind(1))]
    both = (each[0] + each[1]) / 2
    assert judge.kernel(blocks, torch.device("cpu")) == pytest.approx((both.mean(), both.std()))


def test_standardised_distances_do_not_depend_on_scale_and_are_means_over_blocks():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, 6, dtype=torch.float64)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(50, 6, generator=generator, dtype=torch.float64) + 0.5
    plain = Reference.from_blocks([y], standardised=True)
    scaled = Reference.from_blocks([y * scale], standardised=True)
    both = Reference.from_blocks([y, y * scale], standardised=True)
    expected = pytest.approx(plain.frechet([x]), rel=1e-8)
    assert scaled.frechet([x * scale]) == expected
    assert both.frechet([x, x * scale]) == expected
    part, other = x[:, :4].square(), y[:, :4].exp()
    two = Reference.from_blocks([y, other], standardised=True)
    alone = Reference.from_blocks([other], standardised=True)
    mean = (plain.frechet([x]) + alone.frechet([part])) / 2
    assert two.frechet([x, part]) == pytest.approx(mean, rel=1e-8)
    kernels = [r.kernel([v], CPU)[0] for r, v in ((plain, x), (alone, part))]
    assert two.kernel([x, part], CPU)[0] == pytest.approx(sum(kernels) / 2, rel=1e-8)
    mu, std = y.mean(0), y.std(0)
    by_hand = Reference.from_blocks([(y - mu) / std])
    assert by_hand.frechet([(x - mu) / std]) == expected
    assert Reference.from_blocks([y]).frechet([x]) != expected
    expected = pytest.approx(plain.kernel([x], CPU)[0], rel=1e-8)
    assert scaled.kernel([x * scale], CPU)[0] == expected
    assert by_hand.kernel([(x - mu) / std], CPU)[0] == expected
    assert plain.kernel([x], CPU)[1] is None  # 50 of 50 on either side: there is but one subset


def test_interval_satisfies_wilsons_equation():
    """The ends of Wilson's interval p satisfy |hits / n - p| = 1.96 √(p (1 - p) / n)."""
    low, high = metrics.interval(83, 100)
    for p in (low, high):
        assert abs(0.83 - p) == pytest.approx(1.959964 * (p * (1 - p) / 100) ** 0.5, rel=1e-5)
    assert low < 0.83 < high
    assert metrics.interval(0, 50)[0] == 0 and metrics.interval(50, 50)[1] == 1


# ----------------------------------------------------------------------------------- the command


def test_the_limit_of_the_distance_needs_many_samples_a_feature(digits_run, monkeypatch):
    """20 for each of the 2 x 64 of the last stage."""
    network = metrics.Checkpoint(str(digits_run / CKPT), torch.device("cpu"))
    images = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8)
    blocks, _ = metrics.extract(network, images, 100, "reference")
    against = Reference.from_blocks(blocks)
    options = eval_is_fid.Options(batch_size=100)
    labels = torch.full((300,), -1)

    def row(n):
        return eval_is_fid.judge(network, images[:n], labels[:n], against, options, "noise")

    assert "C-FD∞" not in row(300)
    monkeypatch.setattr(eval_is_fid, "LIMIT_SAMPLES", 1)
    assert "C-FD∞" not in row(127)
    assert row(300)["C-FD∞"] < row(300)["C-FD"]  # here the reference itself


def test_digits_are_closer_to_digits_than_noise(digits_run):
    from sklearn.datasets import load_digits

    digits = load_digits()
    real = (digits.images[:300, :, :, None] / 16 * 255).astype(np.uint8)
    target = digits.target[:300]
    noise = noise_images(300)
    np.savez(digits_run / "real.npz", arr_0=real, arr_1=target)
    np.savez(digits_run / "noise.npz", arr_0=noise)
    folder = digits_run / "images" / "some"
    folder.mkdir(parents=True)
    for i, image in enumerate(real[:40]):
        Image.fromarray(image[:, :, 0]).save(folder / f"{i:03d}.png")
    options = ["--ref", "digits", "--features", CKPT, "--out", "m.json"]
    done = evaluate(digits_run, "--samples", "real.npz", "noise.npz", "images", *options)
    rows = read_rows(done, digits_run / "m.json")
    assert [row["n"] for row in rows] == [300, 300, 40]
    assert rows[0]["C-FD"] < rows[2]["C-FD"] < rows[1]["C-FD"]
    model = cem.load(digits_run / CKPT)
    predicted = model(torch.from_numpy(real).permute(0, 3, 1, 2) / 255).argmax(1)
    share = (predicted.numpy() == target).mean()
    assert share > 0.3
    assert rows[0]["wanted"] == pytest.approx(share, abs=1.5 / 300)
    assert rows[0]["wanted low"] < rows[0]["wanted"] < rows[0]["wanted high"]
    assert 0 < rows[0]["C-FD std"] < rows[0]["C-FD"]
    assert f"{rows[0]['C-FD']:.4f} ± {rows[0]['C-FD std']:.4f}" in done.stdout
    assert "wanted" not in rows[1]
    assert not {"IS", "FID"} & rows[0].keys()
    assert "| samples | n | C-IS |" in done.stdout


def test_missing_inception_weights(digits_run, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(digits_run))
    np.savez(digits_run / "i.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    before = files(digits_run)
    for weights in ([], ["--weights", "missing.pth"]):
        done = evaluate(digits_run, "--samples", "i.npz", "--ref", "i.npz", *weights)
        assert_refused(done, "--weights", "--features CHECKPOINT")
    assert [name for name in files(digits_run) if "hub" not in name] == before


UINT8 = np.zeros((30, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_1": np.zeros(3)}, "contains no images"),
        ({"arr_0": np.full((30, 8, 8, 1), 1.01, np.float32)}, "not in [0, 1]"),
        ({"arr_0": np.full((30, 8, 8, 1), np.nan, np.float32)}, "not in [0, 1]"),
        ({"arr_0": np.zeros((30, 8, 8, 1), np.int32)}, "must be uint8"),
        ({"arr_0": np.zeros((30, 8, 8), np.uint8)}, "must be uint8"),
        ({"arr_0": np.uint8(3)}, "must be uint8"),
        ({"arr_0": np.zeros((30, 9, 9, 1), np.uint8)}, "the reference of (1, 8, 8)"),
        ({"arr_0": np.zeros((5, 8, 8, 1), np.uint8)}, "--splits 10 needs more"),
        ({"arr_0": UINT8, "arr_1": np.zeros(4, int)}, "arr_1 (N,)"),
        ({"arr_0": UINT8, "arr_1": np.full(30, "cat")}, "integer labels"),
    ],
)
def test_invalid_samples(arrays, message, digits_run, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    options = ["--ref", "digits", "--features", digits_run / CKPT]
    assert_refused(evaluate(tmp_path, "--samples", "bad.npz", *options), message)
    assert files(tmp_path) == ["bad.npz"]


def test_damaged_files(digits_run, tmp_path):
    np.savez(tmp_path / "good.npz", arr_0=noise_images())
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.npz").write_text("hello")
    before = files(tmp_path)
    for samples, ref, message in [
        ("cut.npz", "digits", "cut.npz"),
        ("text.npz", "digits", "text.npz"),
        ("good.npz", "cut.npz", "cut.npz"),
        ("good.npz", "text.npz", "text.npz"),
        ("good.npz", "statistics.npz", "statistics.npz: mu and sigma must be finite, of 2,048"),
    ]:
        options = ["--ref", ref, "--features", digits_run / CKPT]
        assert_refused(evaluate(tmp_path, "--samples", samples, *options), message)
        assert files(tmp_path) == before
    done = evaluate(tmp_path, "--samples", "good.npz", "--features", "incepton")
    assert_refused(done, "--features must be inception, dinov2 or a checkpoint")


# ------------------------------------------------------------------ Inception, on random weights


@pytest.fixture(scope="module")
def inception(tmp_path_factory, inception_weights):
    """A folder with weights.pth and two sets of 64 images, a and b, each as an npz file and as an
    image folder."""
    folder = tmp_path_factory.mktemp("inception")
    shutil.copy(inception_weights, folder / "weights.pth")
    random = np.random.default_rng(0)
    for name, contrast in (("a", 40), ("b", 90)):
        small = torch.from_numpy(random.normal(128, contrast, (64, 3, 8, 8)))
        images = F.interpolate(small, (32, 32), mode="bilinear").clamp(0, 255).byte()
        pixels = images.permute(0, 2, 3, 1).numpy()
        np.savez(folder / f"{name}.npz", arr_0=pixels)
        (folder / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / name / f"{i:03d}.png")
    return folder


def fid(a, b):
    """pytorch-fid's formula; its own code passes SciPy an argument that SciPy 1.18 removed.

    With Σ1 = A Aᵀ and Σ2 = B Bᵀ, tr (Σ1 Σ2)^½ is the sum of the singular values of Aᵀ B.
    """
    root_a, root_b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return shift + np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross


@pytest.fixture(scope="module")
def pytorch_fid_features(inception):
    """pytorch-fid's network, and its pool features of a and b."""
    from pytorch_fid import fid_score

    state = torch.load(inception / "weights.pth", weights_only=True)
    network = metrics.pytorch_fid(state).eval().to(memory_format=torch.channels_last)
    features = []
    for name in "ab":
        paths = sorted(str(path) for path in (inception / name).glob("*.png"))
        options = dict(batch_size=32, dims=2048, device="cpu", num_workers=0)
        features.append(fid_score.get_activations(paths, network, **options))
    return network, *features


@pytest.mark.slow
def test_inception_matches_pytorch_fid(inception, pytorch_fid_features):
    """Features, scores and warnings."""
    a, b = (features[data.shuffled(len(features))] for features in pytorch_fid_features[1:])
    options = ["--weights", "weights.pth", "--batch-size", 30]
    done = evaluate(inception, "--samples", "a", "--ref", "b", *options)
    (row,) = read_rows(done, inception / "metrics.json")
    (cache,) = (inception / "b").glob("stats-b-train-inception-*.npz")
    assert f"cached the reference's statistics in b/{cache.name}" in done.stdout
    few = "64 images, fewer than its 2,048 features"
    assert f"FID of a is biased upwards: {few}; KID is not biased" in done.stderr
    assert "the published weights 6726825d" in done.stderr
    with np.load(cache) as arrays:
        gap = arrays["features"] - b
    # float32, folded, in other batches: a few elements are small differences of large sums
    assert np.linalg.norm(gap) < 1e-4 * np.linalg.norm(b)
    assert np.abs(gap).max() < 2e-3 * b.std()
    state = torch.load(inception / "weights.pth", weights_only=True)
    logits = torch.from_numpy(a) @ state["fc.weight"].double().T
    kid = metrics.kernel_distances(torch.from_numpy(a), torch.from_numpy(b)).mean()
    assert row["FID"] == pytest.approx(fid(a, b), rel=1e-4)
    assert row["IS"] == pytest.approx(metrics.inception_score(logits)[0], rel=1e-4)
    assert row["KID"] == pytest.approx(kid, rel=1e-3)


@pytest.mark.slow
def test_pytorch_fid_reads_saved_statistics(inception, pytorch_fid_features):
    from pytorch_fid import fid_score

    network, _, b = pytorch_fid_features
    options = ["--weights", "weights.pth", "--save-stats", "saved.npz"]
    succeeded(evaluate(inception, "--ref", "b", *options))
    path = str(inception / "saved.npz")
    mu, sigma = fid_score.compute_statistics_of_path(path, network, 64, 2048, "cpu")
    np.testing.assert_allclose(mu, b.mean(0), rtol=1e-4, atol=1e-4 * b.std())
    np.testing.assert_allclose(sigma, np.cov(b, rowvar=False), rtol=1e-3, atol=1e-4 * b.var())


@pytest.mark.slow
def test_statistics_of_pytorch_fid_as_reference(inception, pytorch_fid_features):
    _, a, b = pytorch_fid_features
    np.savez(inception / "theirs.npz", mu=b.mean(0), sigma=np.cov(b, rowvar=False))
    with np.load(inception / "a.npz") as arrays:
        np.savez(inception / "few.npz", arr_0=arrays["arr_0"][:40])
    options = ["--ref", "theirs.npz", "--weights", "weights.pth"]
    done = evaluate(inception, "--samples", "few.npz", *options)
    (row,) = read_rows(done, inception / "metrics.json")
    assert row["FID"] == pytest.approx(fid(a[:40], b), rel=1e-4)
    assert "KID" not in row  # it needs the features


@pytest.mark.slow
def test_tf1_matches_torch_fidelity(inception):
    torch_fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    for name in "ab":  # torch-fidelity is slow: every second image
        with np.load(inception / f"{name}.npz") as arrays:
            np.savez(inception / f"{name}4.npz", arr_0=arrays["arr_0"][::2])
        (inception / f"{name}4").mkdir()
        for path in sorted((inception / name).glob("*.png"))[::2]:
            shutil.copy(path, inception / f"{name}4")
    expected = torch_fidelity.calculate_metrics(
        input1=str(inception / "a4"), input2=str(inception / "b4"),
        isc=True, fid=True, kid=True, kid_subset_size=32, samples_shuffle=False,
        feature_extractor_weights_path=str(inception / "weights.pth"),
        cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    options = ["--ref", "b4.npz", "--weights", "weights.pth", "--preprocess", "tf1"]
    done = evaluate(inception, "--samples", "a4.npz", *options)
    (row,) = read_rows(done, inception / "metrics.json")
    assert row["FID"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert row["IS"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert row["KID"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.slow
def test_weights_of_another_network(inception):
    torch.save({"conv1.weight": torch.ones(3)}, inception / "other.pth")
    options = ["--ref", "b.npz", "--weights", "other.pth"]
    done = evaluate(inception, "--samples", "a.npz", *options)
    assert_refused(done, "other.pth is not an FID Inception")


# --------------------------------------------------------------------- DINOv2, on random weights


@pytest.fixture
def dinov2_folder(tmp_path, monkeypatch):
    """A folder with images and weights.pth, in the published format but of two narrow layers. timm
    then builds these in place of its ViT-L/14."""
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import vision_transformer

    narrow = dict(embed_dim=32, depth=2, num_heads=2, init_values=1.0)
    build = partial(vision_transformer.vit_large_patch14_dinov2, **narrow)
    monkeypatch.setattr(vision_transformer, "vit_large_patch14_dinov2", build)
    state = build(img_size=518).state_dict() | {"mask_token": torch.zeros(1, 32)}
    torch.nn.init.normal_(state["pos_embed"])
    torch.save(state, tmp_path / "weights.pth")
    np.savez(tmp_path / "a.npz", arr_0=noise_images(channels=3))
    np.savez(tmp_path / "b.npz", arr_0=noise_images(40, channels=3) // 2)
    return tmp_path


def test_dinov2_command(dinov2_folder):
    """The scores are those of the class tokens of images that torchvision resizes."""
    from timm.models.vision_transformer import vit_large_patch14_dinov2

    state = torch.load(dinov2_folder / "weights.pth", weights_only=True)
    del state["mask_token"]
    network = vit_large_patch14_dinov2(img_size=224).eval()
    network.load_state_dict(state | {"pos_embed": dinov2.resampled(state["pos_embed"])})
    bicubic = T.Resize((224, 224), T.InterpolationMode.BICUBIC)
    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = T.Compose([Image.fromarray, bicubic, T.ToTensor(), normalise])
    features = []
    for pixels in (noise_images(channels=3), noise_images(40, channels=3) // 2):
        with torch.no_grad():
            tokens = network.forward_features(torch.stack([transform(x) for x in pixels]))
        features.append(tokens[:, 0].double())
    options = ["--features", "dinov2", "--weights", "weights.pth", "--batch-size", 16]
    done = evaluate(dinov2_folder, "--samples", "a.npz", "--ref", "b.npz", *options)
    (row,) = read_rows(done, dinov2_folder / "metrics.json")
    assert row["FD-DINOv2"] == pytest.approx(fid(*map(np.asarray, features)), rel=1e-3)
    kernel = metrics.kernel_distances(*features).mean()
    assert row["KD-DINOv2"] == pytest.approx(kernel, rel=1e-3)
    assert list(row)[2:5] == ["FD-DINOv2", "FD-DINOv2 std", "KD-DINOv2"]


def test_dinov2_positions_lie_at_multiples_of_37_by_16_1():
    positions = torch.randn(1, 1 + 37**2, 5, generator=torch.Generator().manual_seed(0))
    centres = 2 * (torch.arange(16) + 0.5) / 16.1 - 1  # of 16.1 patches on [-1, 1]
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), 2)[None]
    patches = positions[:, 1:].mT.reshape(1, 5, 37, 37)
    options = dict(mode="bicubic", padding_mode="border", align_corners=False)
    expected = F.grid_sample(patches, points, **options).reshape(1, 5, 256).mT
    resampled = dinov2.resampled(positions)
    torch.testing.assert_close(resampled[:, 1:], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(resampled[:, :1], positions[:, :1])


def test_dinov2_without_weights_or_timm(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise_images())
    options = ["--samples", "a.npz", "--ref", "a.npz", "--features", "dinov2"]
    for weights, message in [
        ([], "--features dinov2 needs --weights PATH, the file of https://"),
        (["--weights", "missing.pth"], "missing.pth not found: "),
    ]:
        assert_refused(evaluate(tmp_path, *options, *weights), message)
    with mock.patch.dict("sys.modules", {"timm": None, "timm.models": None}):
        done = evaluate(tmp_path, *options, "--weights", "a.npz")
    assert_refused(done, "--features dinov2 needs: pip install timm")
    assert files(tmp_path) == ["a.npz"]


def test_dinov2_weights_of_another_network(dinov2_folder):
    torch.save({"pos_embed": torch.zeros(1, 1370, 8)}, dinov2_folder / "other.pth")
    (dinov2_folder / "text.pth").write_text("hello")
    options = ["--samples", "a.npz", "--ref", "b.npz", "--features", "dinov2"]
    for weights in ("text.pth", "other.pth"):
        done = evaluate(dinov2_folder, *options, "--weights", weights)
        assert_refused(done, f"{weights} is not DINOv2's ViT-L/14 (")


# --------------------------------------------------------------------------- reference statistics


def test_statistics_cache(digits_run, tmp_path):
    """Used again; recomputed for a damaged file, a changed dataset, another split or precision."""
    random = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", arr_0=noise_images())
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / folder / f"{i}.png")
    arguments = ["--samples", "s.npz", "--ref", "set", "--features", digits_run / CKPT]

    def run(*options):
        done = evaluate(tmp_path, *arguments, *options)
        (row,) = read_rows(done, tmp_path / "metrics.json")
        return row, done.stdout

    first, stdout = run()
    (cache,) = (tmp_path / "set").glob("stats-set-train-ckpt-*.npz")
    assert f"statistics in set/{cache.name}" in stdout
    with mock.patch(
        "lib.reference.Reference.from_blocks", side_effect=AssertionError("recomputed")
    ):
        assert run()[0] == first
    content = cache.read_bytes()
    cache.write_bytes(content[: len(content) // 2])
    again, stdout = run()
    assert again == first
    assert "is damaged" in stdout
    assert cache.stat().st_size == len(content)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set/train/a/0.png")
    changed, stdout = run()
    assert changed["C-FD"] != first["C-FD"]
    assert "the dataset has changed" in stdout
    assert run("--split", "test")[0]["C-FD"] != changed["C-FD"]
    assert len(list((tmp_path / "set").glob("stats-*.npz"))) == 2
    rounded = run("--precision", "bfloat16")[0]["C-FD"]
    assert rounded != changed["C-FD"]
    # the covariances of 40 noise images are nearly singular: of bfloat16's 3 digits, 1 is left
    assert rounded == pytest.approx(changed["C-FD"], rel=0.2)


def test_unwritable_cache_is_a_warning(digits_run, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=noise_images())
    (tmp_path / "data").write_text("a file in the place of the folder")
    options = ["--ref", "digits", "--features", digits_run / CKPT]
    done = evaluate(tmp_path, "--samples", "s.npz", *options)
    assert done.returncode == 0
    assert "cannot cache" in done.stderr
    table = (tmp_path / "metrics.md").read_text()
    assert table.startswith("| samples | n | C-IS |")
    blank, judge = table.splitlines()[3:]
    assert blank == "" and judge.startswith("By ckpt-") and judge.endswith(", against digits.")
    assert table in done.stdout


def test_the_scores_of_another_command_are_kept(digits_run, tmp_path):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", arr_0=noise_images())
    options = ["--ref", "digits", "--features", digits_run / CKPT, "--samples"]
    for samples, kept in (["a.npz"], 0), (["b.npz", "a.npz"], 1), (["b.npz", "a.npz"], 0):
        done = evaluate(tmp_path, *options, *samples)
        assert done.stdout.count("kept the result of another command as metrics-1.json") == kept
    for name, first in (("metrics-1", "a"), ("metrics", "b")):
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"][0]["samples"][0] == first
        assert (tmp_path / f"{name}.md").read_text().splitlines()[2].startswith(f"| {first}.npz ")


def test_statistics_of_another_network(digits_run, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=noise_images())
    torch_key = "inception-6726825d-torch-float32"
    tf1_key = "inception-6726825d-tf1-float32"
    sigma = np.eye(2048)
    np.savez(tmp_path / "tf1.npz", mu=np.zeros(2048), sigma=sigma, key=np.array(tf1_key))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=sigma)
    assert reference.read_statistics(tmp_path / "tf1.npz", tf1_key).features is None
    with pytest.raises(cem.CEMError, match=f"computed with {tf1_key}, not {torch_key}"):
        reference.read_statistics(tmp_path / "tf1.npz", torch_key)
    with pytest.raises(cem.CEMError, match="must be finite"):
        reference.read_statistics(tmp_path / "nan.npz", torch_key)
    options = ["--ref", "tf1.npz", "--features", digits_run / CKPT]
    done = evaluate(tmp_path, "--samples", "s.npz", *options)
    assert_refused(done, "need --features inception")


def test_samples_sorted_by_class_are_a_warning(digits_run, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=noise_images(), arr_1=np.arange(30) // 3)
    options = ["--ref", "digits", "--features", digits_run / CKPT]
    done = evaluate(tmp_path, "--samples", "s.npz", *options)
    assert done.returncode == 0
    assert "sorted by class" in done.stderr


def test_dataset_name_takes_precedence_over_folder(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(reference.load_images(eval_is_fid.Options(ref="digits"))) > 1000


def test_float_images_in_0_to_1(digits_run, tmp_path):
    np.savez(tmp_path / "bytes.npz", arr_0=noise_images())
    np.savez(tmp_path / "floats.npz", arr_0=(noise_images() / 255).astype(np.float32))
    options = ["--ref", "digits", "--features", digits_run / CKPT]
    done = evaluate(tmp_path, "--samples", "bytes.npz", "floats.npz", *options)
    first, second = read_rows(done, tmp_path / "metrics.json")
    assert first | {"samples": ""} == second | {"samples": ""}


def test_nonfinite_features_are_an_error(digits_run, tmp_path):
    model = cem.load(digits_run / CKPT)
    model.net.bn1.weight.data.fill_(3e38)
    cem.save(tmp_path / "nan.pt", model)
    np.savez(tmp_path / "s.npz", arr_0=UINT8)
    options = ["--ref", "s.npz", "--features", "nan.pt"]
    done = evaluate(tmp_path, "--samples", "s.npz", *options)
    assert_refused(done, "not finite")
    assert files(tmp_path) == ["nan.pt", "s.npz"]


@pytest.mark.parametrize("n, warned", [(127, True), (128, False)])
def test_fewer_samples_than_features_are_warned_of(n, warned, digits_run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=pixels)
    options = ["--ref", "s.npz", "--features", digits_run / CKPT]
    done = succeeded(evaluate(tmp_path, "--samples", "s.npz", *options))
    few = "127 images, fewer than its 128 features"
    assert (f"C-FD of s.npz is biased upwards: {few}; C-KD is not biased" in done.stderr) == warned


# ------------------------------------------------------------------------------- results/sweep.py


@pytest.mark.parametrize("second", [True, False])
def test_sweep_writes_every_point_and_the_settings(second, digits_run, unsup_run, monkeypatch):
    monkeypatch.setattr("sweep.STEPS", (2, 8))
    monkeypatch.setattr("sweep.LENGTHS", (0.5,))
    options = ["--ref", "digits", "--ckpt", CKPT, "--judge", CKPT, "--n", 20, "--out", "sweep.json"]
    options += ["--save", "tuned.pt", "--samplers", "cs,ta"]
    if second:
        options += ["--second", unsup_run / "runs/unsup/ckpt.pt"]
    done = script("results/sweep.py", *options, cwd=digits_run)
    rows = read_rows(done, digits_run / "sweep.json")
    # the default, another number of steps, another length, two of noise, and the sign
    assert [row["sampler"] for row in rows] == ["seeds"] + ["cs"] * 6 + ["ta"] * 6
    assert {row["noise"] for row in rows if row["sampler"] == "cs"} == {0.0, 0.01, 0.03}
    assert {row["norm"] for row in rows} == {"l2", "linf"}
    assert ("E-FD" in rows[0]) == second
    tuned, drawn_from = cem.load(digits_run / "tuned.pt").extra, cem.load(digits_run / CKPT).extra
    assert tuned.keys() == drawn_from.keys() | {"settings"}
    settings = tuned["settings"]
    assert settings.keys() == {"cs", "ta"}
    chosen = [
        row for row in rows if row["sampler"] == "cs" and settings["cs"].items() <= row.items()
    ]
    assert len(chosen) == 1
    assert_refused(script("results/sweep.py", *options, cwd=digits_run), "tuned.pt exists")
    (digits_run / "tuned.pt").unlink()


def test_samples_without_precision_are_the_worst():
    assert sweep.inverse_f(0.5, 0.25) == pytest.approx(3)
    assert sweep.inverse_f(0.0, 0.0) == sweep.inverse_f(1.0, 0.0) > sweep.inverse_f(0.1, 0.001)


def test_sweep_refuses_torchrun_and_rulers_of_the_wrong_kind(digits_run, tmp_path):
    ckpt = digits_run / CKPT
    done = script("results/sweep.py", cwd=tmp_path, WORLD_SIZE="2")
    assert_refused(done, "leave out torchrun")
    options = ["--ref", "digits", "--ckpt", ckpt, "--judge", ckpt, "--second", ckpt]
    done = script("results/sweep.py", *options, "--out", "sweep.json", cwd=tmp_path)
    assert_refused(done, "--second an encoder")
    (tmp_path / "notes.txt").write_text("mine")
    save = [*options[:-2], "--out", "sweep.json", "--save", "notes.txt"]
    assert_refused(
        script("results/sweep.py", *save, cwd=tmp_path), "--save notes.txt exists: use a new file"
    )
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "sweep.json").exists()


def test_the_other_norm_walks_as_far(digits_run):
    tuned = SimpleNamespace(ckpt=digits_run / CKPT)
    settings = dict(steps=8, step_size=0.5, noise=0.0, norm="l2")
    (signed,) = sweep.Sweep.variants(tuned, "norm", settings)
    assert (signed["norm"], signed["step_size"]) == ("linf", 0.5 / 8)  # of 64 pixels
    assert sweep.Sweep.variants(tuned, "norm", signed) == [settings]


def test_the_best_point_is_good_by_both_rulers():
    points = [dict(zip(("C-FD", "E-FD"), pair)) for pair in ((10, 30), (11, 21), (30, 20))]
    tuned = SimpleNamespace(opt=SimpleNamespace(second="encoder.pt"))
    assert sweep.Sweep.best(tuned, points) is points[1]


def test_neighbours_tell_copies_from_new_images(digits_run, tmp_path):
    """Training images are at distance 0; the picture shows each beside itself, then the next set.
    It moves together with its record."""
    train, test = (data.load("digits", split).images for split in ("train", "test"))
    np.savez(tmp_path / "copies.npz", arr_0=train[:30].permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "new.npz", arr_0=test[::12].permute(0, 2, 3, 1).numpy())
    options = ["--ref", "digits", "--neighbours", "--features", digits_run / CKPT]
    done = evaluate(tmp_path, "--samples", "copies.npz", "new.npz", *options)
    copies, new = read_rows(done, tmp_path / "metrics.json")
    assert copies["distance"] == pytest.approx(0, abs=1e-3)
    assert new["distance"] > 1 and copies["test distance"] > 1
    assert new["distance"] == pytest.approx(new["test distance"], rel=1e-5)
    with Image.open(tmp_path / "metrics.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (2 * (2 + 10 * 66), 2 + 10 * 66)
    cells = pixels[2:66, 2:].reshape(64, 10, 66)[:, :, :64]  # the first row of the grid
    for sample, closest in ((0, 1), (5, 6)):
        assert np.array_equal(cells[:, sample], cells[:, closest])
    assert evaluate(tmp_path, "--samples", "new.npz", *options).returncode == 0
    with (
        Image.open(tmp_path / "metrics-1.png") as earlier,
        Image.open(tmp_path / "metrics.png") as now,
    ):
        assert np.array_equal(np.asarray(earlier.convert("L")), pixels)
        assert np.array_equal(np.asarray(now.convert("L")), pixels[662:])
    results = RunFolder(SimpleNamespace(out=tmp_path)).results()
    names = {f"metrics{number}{end}" for number in ("", "-1") for end in (".json", ".md", ".png")}
    assert {path.name for path in results} == names
    done = evaluate(tmp_path, "--samples", "new.npz", "--ref", "copies.npz", "--neighbours")
    assert_refused(done, "--neighbours needs a dataset as --ref")


def test_an_encoder_gives_distances_but_no_inception_score(unsup_run, tmp_path):
    """Nor a need for --splits of the samples."""
    np.savez(tmp_path / "a.npz", arr_0=noise_images()[:5])
    options = ["--samples", "a.npz", "--ref", "digits"]
    done = evaluate(tmp_path, *options, "--features", unsup_run / "runs/unsup/ckpt.pt")
    (row,) = read_rows(done, tmp_path / "metrics.json")
    assert {"E-FD", "E-KD", "precision"} <= row.keys()
    assert not {"C-IS", "C-FD", "wanted", ""} & row.keys()


# ---------------------------------------------------------------------------------------- options


def test_without_samples_the_newest_set_is_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cem.CEMError, match="no samples in runs/"):
        eval_is_fid.load_samples(eval_is_fid.Options())
    for age, run in enumerate(("new", "old")):  # by name, "old" is the last
        path = tmp_path / f"runs/{run}/samples-rcs.npz"
        path.parent.mkdir(parents=True)
        np.savez(path, arr_0=noise_images())
        os.utime(path, (1e9 - age, 1e9 - age))
    ((path, _, _),) = eval_is_fid.load_samples(eval_is_fid.Options())
    assert path == Path("runs/new/samples-rcs.npz")


def test_splits_reach_the_inception_score(digits_run):
    network = metrics.Checkpoint(str(digits_run / CKPT), torch.device("cpu"))
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    blocks, logits = metrics.extract(network, images, 30, "noise")
    opt, against = eval_is_fid.Options(splits=3), Reference.from_blocks(blocks)
    row = eval_is_fid.judge(network, images, torch.full((30,), -1), against, opt, "noise")
    expected = metrics.inception_score(logits, 3)
    assert (row["C-IS"], row["C-IS std"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "labels, warned", [([1, 1, 0, 0], 1), ([0, 1, 0, 1], 0), ([2, 2, 2, 2], 0)]
)
def test_classes_one_after_another_are_warned_of(labels, warned, capsys):
    network = SimpleNamespace(names=("IS", "FID", "KID"))
    samples = [("a.npz", torch.zeros(11), torch.tensor(labels))]
    eval_is_fid.check_splits(samples, network, eval_is_fid.Options())
    assert capsys.readouterr().err.count("warning: a.npz is sorted by class") == warned


@pytest.mark.parametrize(
    "options, message",
    [
        (["--samplers", "cs,maxent"], "maxent"),
        (["--samplers", "seeds"], "seeds"),
        (["--samplers", "maxent,cs"], "cs"),
    ],
)
def test_sweep_tunes_samplers_of_one_kind(options, message, tmp_path):
    assert_refused(script("results/sweep.py", *options, cwd=tmp_path), message)


def test_labels_of_other_classes_than_the_judge_has_are_not_judged(digits_run, tmp_path, capsys):
    judge = metrics.Checkpoint(digits_run / CKPT, torch.device("cpu"))
    path, labels = tmp_path / "s.npz", torch.arange(10)
    assert eval_is_fid.has_wanted(path, labels, judge)
    assert not eval_is_fid.has_wanted(path, labels + 1, judge)
    assert "is of other classes" in capsys.readouterr().err
    for classes, same in ((list("0123456789"), True), (list("1023456789"), False)):
        path.with_suffix(".json").write_text(json.dumps({"classes": classes}))
        assert eval_is_fid.has_wanted(path, labels, judge) == same
        assert same == ("is of other classes" not in capsys.readouterr().err)
    assert not eval_is_fid.has_wanted(path, labels - 1, judge)
    assert not capsys.readouterr().err


def test_options_that_would_do_nothing_are_refused(digits_run, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=noise_images())
    options = ["--samples", "s.npz", "--features", digits_run / CKPT]
    done = evaluate(tmp_path, *options, "--ref", "digits", "--weights", "w.pth")
    assert_refused(done, "--weights needs --features inception or dinov2")
    done = evaluate(tmp_path, *options, "--ref", "s.npz", "--image-size", 9)
    assert_refused(done, "--image-size does not apply to a file: --ref s.npz")


def test_resizing_is_advised_only_where_it_helps(tmp_path):
    samples = [(Path("s.npz"), torch.zeros(3, 1, 8, 8), None)]
    advice = ": --image-size resizes the reference"
    folder, dataset = eval_is_fid.Options(ref=str(tmp_path)), eval_is_fid.Options(ref="digits")
    for opt, shape, end in (
        (folder, (3, 8, 8), ""), (folder, (1, 9, 9), advice), (dataset, (1, 9, 9), ""),
    ):  # fmt: skip
        with pytest.raises(cem.CEMError, match=re.escape(f"the reference of {shape}{end}") + "$"):
            eval_is_fid.check_samples(samples, torch.zeros(2, *shape), opt)
