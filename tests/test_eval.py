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
import eval_is_fid
import metrics


def gaussian(d, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, rank or d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), a @ a.T


def test_frechet_distance_equals_the_matrix_square_root():
    (mu1, s1), (mu2, s2) = gaussian(12, 0), gaussian(12, 1)
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root).real
    assert metrics.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    """(√a - √b)² summed over the axes, here with rank-deficient covariances, on which a matrix square root may fail."""
    a, b = torch.tensor([4.0, 1.0, 0.0, 0.0]).double(), torch.tensor([9.0, 0.0, 16.0, 0.0]).double()
    zero = torch.zeros(4).double()
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    # the root of an eigenvalue's rounding error, 1e-16, is 1e-8
    assert metrics.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, abs=1e-6)
    mu, sigma = gaussian(30, 3, rank=5)
    assert metrics.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-5)


def test_inception_score_equals_its_definition_split_by_split():
    p = torch.rand(57, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[3, 2] = 0  # 0 log 0 = 0
    p = p / p.sum(1, keepdim=True)
    scores = []
    for i in range(5):
        part = p[i * 57 // 5 : (i + 1) * 57 // 5].numpy()
        marginal = part.mean(0)
        kls = [sum(v * math.log(v / m) for v, m in zip(row, marginal) if v > 0) for row in part]
        scores.append(math.exp(sum(kls) / len(kls)))
    mean, std = metrics.inception_score(p.log() + torch.arange(57)[:, None], splits=5)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12) and std == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_lies_between_1_and_the_number_of_classes():
    assert metrics.inception_score(torch.zeros(100, 4))[0] == pytest.approx(1)
    assert metrics.inception_score(1000 * torch.eye(4).repeat(25, 1), splits=1)[0] == pytest.approx(4)


def test_kernel_distance_equals_a_double_loop():
    """With the one subset that there is, all the rows."""
    x, y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (5, 5))
    y = y + 1

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 25
    mean, std = metrics.kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(within - 2 * across, rel=1e-12) and std == pytest.approx(0, abs=1e-12)


def test_scores_equal_torch_fidelitys_on_the_same_features():
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    from torch_fidelity import metric_fid, metric_isc, metric_kid

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, 40, generator=generator, dtype=torch.float64) ** p for n, p in ((230, 1), (310, 2)))
    logits = 3 * torch.randn(233, 12, generator=generator)  # no multiple of the splits
    theirs = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert metrics.inception_score(logits) == pytest.approx(tuple(theirs.values()), rel=1e-6)
    theirs = [metric_fid.fid_features_to_statistics(z) for z in (x, y)]
    theirs = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert metrics.Reference.of([y]).frechet([x], False) == pytest.approx(theirs, rel=1e-6)
    options = dict(kid_subsets=20, kid_subset_size=100, verbose=False)
    theirs = metric_kid.kid_features_to_metric(x, y, **options)
    assert metrics.kernel_distance(x, y, subsets=20, size=100) == pytest.approx(tuple(theirs.values()), rel=1e-6)


def test_classifier_blocks_are_pooled_means_and_deviations(model, tmp_path):
    cem.save(tmp_path / "m.pt", model)
    network = metrics.Classifier(str(tmp_path / "m.pt"), torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    blocks, logits = metrics.extract(network, images, 2, "test")
    stages = model.double().stages(images.double() / 255)
    assert [b.shape for b in blocks] == [(5, 2 * s.shape[1]) for s in stages]
    for block, stage in zip(blocks, stages):
        channels = stage.flatten(2)
        expected = torch.cat([channels.mean(2), (channels - channels.mean(2, keepdim=True)).square().mean(2).sqrt()], 1)
        torch.testing.assert_close(block.double(), expected, rtol=1e-3, atol=1e-5)  # float32 against float64
    torch.testing.assert_close(logits.double(), model(images.double() / 255), rtol=1e-3, atol=1e-5)


def test_distances_are_standardised_by_the_reference():
    """Scaling every feature of both sets leaves the standardised distances as they are; means over blocks."""
    generator, scale = torch.Generator().manual_seed(0), torch.logspace(-2, 2, 6).double()
    x, y = (torch.randn(50, 6, generator=generator, dtype=torch.float64) + shift for shift in (0, 0.5))
    reference, scaled = metrics.Reference.of([y]), metrics.Reference.of([y * scale])
    assert scaled.frechet([x * scale], True) == pytest.approx(reference.frechet([x], True), rel=1e-8)
    assert scaled.frechet([x * scale], False) != pytest.approx(reference.frechet([x], False), rel=0.1)
    cpu = torch.device("cpu")
    assert scaled.kernel([x * scale], True, cpu) == pytest.approx(reference.kernel([x], True, cpu), rel=1e-8)
    two = metrics.Reference.of([y, y * scale])
    assert two.frechet([x, x * scale], True) == pytest.approx(reference.frechet([x], True), rel=1e-8)


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
            *("--samples", "i.npz", "--ref", "i.npz"),
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
        ({"arr_0": np.full((30, 8, 8, 1), 1.01, np.float32)}, "does not lie in [0, 1]"),
        ({"arr_0": np.full((30, 8, 8, 1), np.nan, np.float32)}, "does not lie in [0, 1]"),
        ({"arr_0": np.zeros((30, 8, 8, 1), np.int32)}, "must be uint8"),
        ({"arr_0": np.zeros((30, 8, 8), np.uint8)}, "must be uint8"),
        ({"arr_0": np.zeros((30, 9, 9, 1), np.uint8)}, "nothing is resized"),
        ({"arr_0": np.zeros((5, 8, 8, 1), np.uint8)}, "more than --splits"),
        ({"arr_0": np.zeros((30, 8, 8, 1), np.uint8), "arr_1": np.zeros(4, int)}, "arr_1 (N,)"),
        ({"arr_0": np.zeros((30, 8, 8, 1), np.uint8), "arr_1": np.full(30, "cat")}, "integer labels"),
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
        ("good.npz", "statistics.npz", "statistics.npz: mu and sigma are not of 2,048"),
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


# ------------------------------------------------------------------------------- Inception, on random weights


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A folder with random weights in the published file's format, and 512 images in two halves: npz files and folders."""
    from pytorch_fid import inception

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with mock.patch.object(inception, "load_state_dict_from_url"), mock.patch.object(torch.nn.Module, "load_state_dict"):
        full = inception.fid_inception_v3()
    random = np.random.default_rng(0)
    for name, contrast in (("a", 40), ("b", 90)):
        smooth = torch.from_numpy(random.normal(128, contrast, (256, 3, 8, 8)))
        images = torch.nn.functional.interpolate(smooth, (32, 32), mode="bilinear").clamp(0, 255).byte()
        images = images.permute(0, 2, 3, 1).numpy()
        np.savez(folder / f"{name}.npz", arr_0=images)
        (folder / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i:03d}.png")
    for module in full.modules():  # random layers let signals die out: BatchNorm's statistics from images keep them alive
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        full.train()(
            torch.nn.functional.interpolate(torch.from_numpy(images[:16]).permute(0, 3, 1, 2) / 127.5 - 1, (299, 299))
        )
    torch.save(full.state_dict(), folder / "weights.pth")
    return folder


def scores(done, folder):
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "metrics.json").read_text())["rows"][0]


def test_inception_figures_are_pytorch_fids(inception):
    """Pool features and FID, the files of statistics in both directions, and the warnings."""
    from pytorch_fid import fid_score

    weights = ["--weights", "weights.pth", "--batch-size", 60]
    done = script("eval_is_fid.py", "--samples", "a", "--ref", "b", *weights, "--save-stats", "b-stats.npz", cwd=inception)
    ours = scores(done, inception / "a")
    (kept,) = (inception / "b").glob("stats-b-train-inception-*.npz")
    assert f"kept the reference's statistics in b/{kept.name}" in done.stdout
    assert "256 images: FID is biased" in done.stderr and "the published weights 6726825d" in done.stderr
    state = torch.load(inception / "weights.pth", weights_only=True)
    theirs = metrics.pytorch_fid(state).to(memory_format=torch.channels_last)
    a, b = (
        fid_score.get_activations(sorted(map(str, (inception / name).glob("*.png"))), theirs, 64, 2048, "cpu", num_workers=0)
        for name in "ab"
    )
    with np.load(kept) as arrays:  # float32, folded, in other batches; a few elements are the small end of large sums
        gap = arrays["features"] - b
    assert np.linalg.norm(gap) < 1e-4 * np.linalg.norm(b) and np.abs(gap).max() < 2e-3 * b.std()

    def fid(a, b):
        """pytorch-fid's formula, its own code calls SciPy with an argument that SciPy 1.18 removed. With Σ = A Aᵀ and B Bᵀ
        the trace of (Σ1 Σ2)^½ is the sum of the singular values of Aᵀ B."""
        centered = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b)]
        root = np.linalg.svd(centered[0] @ centered[1].T, compute_uv=False).sum()
        return np.square(a.mean(0) - b.mean(0)).sum() + sum(np.square(c).sum() for c in centered) - 2 * root

    assert ours["FID"] == pytest.approx(fid(a, b), rel=1e-4)
    logits = torch.from_numpy(a) @ state["fc.weight"].double().T
    assert ours["IS"] == pytest.approx(metrics.inception_score(logits)[0], rel=1e-4)
    assert ours["KID"] == pytest.approx(metrics.kernel_distance(*map(torch.from_numpy, (a, b)))[0], rel=1e-3)
    # statistics files: pytorch-fid reads ours, and ours reads pytorch-fid's
    mu, sigma = fid_score.compute_statistics_of_path(str(inception / "b-stats.npz"), theirs, 64, 2048, "cpu")
    np.testing.assert_allclose(mu, b.mean(0), rtol=1e-4, atol=1e-4 * b.std())
    np.testing.assert_allclose(sigma, np.cov(b, rowvar=False), rtol=1e-3, atol=1e-4 * b.var())
    np.savez(inception / "theirs.npz", mu=b.mean(0), sigma=np.cov(b, rowvar=False))
    with np.load(inception / "a.npz") as arrays:
        np.savez(inception / "few.npz", arr_0=arrays["arr_0"][:40])
    row = scores(script("eval_is_fid.py", "--samples", "few.npz", "--ref", "theirs.npz", *weights, cwd=inception), inception)
    assert row["FID"] == pytest.approx(fid(a[:40], b), rel=1e-4) and "KID" not in row


def test_tf1_figures_are_torch_fidelitys(inception):
    torch_fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    for name in "ab":  # torch-fidelity is slow: every fourth image
        with np.load(inception / f"{name}.npz") as arrays:
            np.savez(inception / f"{name}4.npz", arr_0=arrays["arr_0"][::4])
        (inception / f"{name}4").mkdir()
        for path in sorted((inception / name).glob("*.png"))[::4]:
            path.rename(inception / f"{name}4" / path.name)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(inception / "a4"), input2=str(inception / "b4"), isc=True, fid=True, kid=True, kid_subset_size=64,
        samples_shuffle=False, feature_extractor_weights_path=str(inception / "weights.pth"), cuda=False, cache=False,
        save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    arguments = ["--ref", "b4.npz", "--weights", "weights.pth", "--preprocess", "tf1", "--samples", "a4.npz"]
    ours = scores(script("eval_is_fid.py", *arguments, cwd=inception), inception)
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_weights_of_another_network_are_refused(inception):
    torch.save({"conv1.weight": torch.ones(3)}, inception / "other.pth")
    done = script("eval_is_fid.py", "--samples", "a.npz", "--ref", "b.npz", "--weights", "other.pth", cwd=inception)
    assert done.returncode == 2 and "no FID Inception" in done.stderr


# ---------------------------------------------------------------------------------------------- the kept statistics


def test_statistics_are_kept_and_computed_anew_where_they_must(digits_run, tmp_path):
    from PIL import Image as pil

    random = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", arr_0=random.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    for part in ("train", "test"):
        for k in "ab":
            (tmp_path / "set" / part / k).mkdir(parents=True)
            for i in range(20):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                pil.fromarray(pixels).save(tmp_path / "set" / part / k / f"{i}.png")
    arguments = ["--samples", "s.npz", "--ref", "set", "--features", digits_run / "runs/sup/ckpt.pt"]

    def run():
        done = script("eval_is_fid.py", *arguments, cwd=tmp_path)
        return scores(done, tmp_path), done.stdout

    first, said = run()
    (file,) = (tmp_path / "set").glob("stats-set-train-ckpt-*.npz")
    assert f"statistics in set/{file.name}" in said
    with mock.patch("metrics.Reference.of", side_effect=AssertionError("computed again")):
        assert run()[0] == first
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again, said = run()
    assert again == first and "is damaged" in said and file.stat().st_size == len(whole)
    pil.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set/train/a/0.png")
    changed, said = run()
    assert changed["C-FD"] != first["C-FD"] and "has changed" in said
    arguments += ["--split", "test"]
    assert run()[0]["C-FD"] != changed["C-FD"] and len(list((tmp_path / "set").glob("stats-*.npz"))) == 2
    arguments[-2:] = ["--precision", "bfloat16"]
    half = run()[0]["C-FD"]
    # the covariances of 40 images of noise are nearly singular: bfloat16's three digits become one
    assert half != changed["C-FD"] and half == pytest.approx(changed["C-FD"], rel=0.2)


def test_statistics_that_cannot_be_kept_are_only_a_warning(digits_run, tmp_path, monkeypatch):
    np.savez(tmp_path / "s.npz", arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    (tmp_path / "data").write_text("a file where the folder should be")
    arguments = ["--samples", "s.npz", "--ref", "digits", "--features", digits_run / "runs/sup/ckpt.pt"]
    done = script("eval_is_fid.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "are not kept" in done.stderr
    table = (tmp_path / "metrics.md").read_text()
    assert table.startswith("| samples | n | C-IS |") and table in done.stdout and len(table.splitlines()) == 3


def test_statistics_of_another_network_and_sorted_samples(digits_run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=np.arange(30) // 3)
    moments = dict(mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "tf1.npz", **moments, key=np.array("inception-6726825d-tf1-float32"))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=moments["sigma"])
    with pytest.raises(cem.CEMError, match="tf1-float32, which is not inception-6726825d-torch-float32"):
        eval_is_fid.stored_moments(tmp_path / "tf1.npz", "inception-6726825d-torch-float32")
    assert eval_is_fid.stored_moments(tmp_path / "tf1.npz", "inception-6726825d-tf1-float32").features is None
    with pytest.raises(cem.CEMError, match="not finite"):
        eval_is_fid.stored_moments(tmp_path / "nan.npz", "inception-6726825d-torch-float32")
    features = ["--features", digits_run / "runs/sup/ckpt.pt"]
    done = script("eval_is_fid.py", "--samples", "s.npz", "--ref", "digits", *features, cwd=tmp_path)
    assert done.returncode == 0 and "sorted by class" in done.stderr
    done = script("eval_is_fid.py", "--samples", "s.npz", "--ref", "tf1.npz", *features, cwd=tmp_path)
    assert done.returncode == 2 and "--features inception only" in done.stderr
    (tmp_path / "digits").mkdir()  # a folder does not stand in for the dataset of its name
    assert len(eval_is_fid.reference_images(eval_is_fid.Options(ref="digits"), "x")) > 1000


def test_float_images_are_those_in_0_to_1(digits_run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", arr_0=images)
    np.savez(tmp_path / "floats.npz", arr_0=(images / 255).astype(np.float32))
    paths, features = ["--samples", "bytes.npz", "floats.npz"], ["--features", digits_run / "runs/sup/ckpt.pt"]
    done = script("eval_is_fid.py", *paths, "--ref", "digits", *features, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert first | {"samples": ""} == second | {"samples": ""}


def test_features_that_are_not_finite_are_refused(digits_run, tmp_path):
    model = cem.load(digits_run / "runs/sup/ckpt.pt")
    model.net.bn1.weight.data[0] = torch.nan
    cem.save(tmp_path / "nan.pt", model)
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((30, 8, 8, 1), np.uint8))
    done = script("eval_is_fid.py", "--samples", "s.npz", "--ref", "s.npz", "--features", "nan.pt", cwd=tmp_path)
    assert done.returncode == 2 and "not finite" in done.stderr and files(tmp_path) == ["nan.pt", "s.npz"]
