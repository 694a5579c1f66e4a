"""The non-parametric CEM, against double loops in float64 and finite differences; SimCLR's
augmentation, against torchvision; train_unsup.py and the samplers of an encoder."""

import json
import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHS, assert_refused, files, perturb, script, succeeded
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_data import write_folder
from torchvision import transforms
from torchvision.transforms import functional

import cem
import sample
import train_unsup
from lib import augment, data, distributed, robustness

TAU = 0.4
EXACT = dict(rtol=0, atol=1e-12)
CKPT = "runs/unsup/ckpt.pt"


@pytest.fixture
def encoder():
    model = cem.NonParametricCEM("resnet18", embed_dim=6, temperature=TAU, width=4)
    return perturb(model).double().eval()


@pytest.fixture
def x():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unit(n, d, seed):
    """n random vectors of unit length."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=1)


def f(z1, z2):
    """f(x, x') of two embeddings, as lists."""
    return sum(a * b for a, b in zip(z1, z2)) / TAU


# -------------------------------------------------------------------------- model and potentials


@pytest.mark.parametrize("arch", ARCHS)
def test_encoder_gives_unit_vectors(arch):
    model = cem.NonParametricCEM(arch, embed_dim=11, width=8, in_channels=1)
    x = torch.rand(3, 1, 8, 8)
    z = model(x)
    assert z.shape == (3, 11)
    assert model.features(x).shape == (3, model.net.out_features)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_info_nce_equals_a_double_loop_over_pairs():
    z1, z2 = unit(4, 3, 0), unit(4, 3, 1)
    z = torch.cat([z1, z2]).tolist()
    losses = []
    for i in range(8):
        others = sum(math.exp(f(z[i], z[j])) for j in range(8) if j != i)
        losses.append(math.log(others) - f(z[i], z[(i + 4) % 8]))
    per_pair = [(losses[i] + losses[i + 4]) / 2 for i in range(4)]
    expected = torch.tensor(per_pair, dtype=torch.float64)
    torch.testing.assert_close(cem.info_nce(z1, z2, TAU, "none"), expected, **EXACT)
    assert cem.info_nce(z1, z2, TAU).item() == pytest.approx(sum(losses) / 8, abs=1e-12)


def test_info_nce_keeps_its_precision_under_autocast():
    z1, z2 = unit(4, 3, 0).float(), unit(4, 3, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = cem.info_nce(z1, z2, TAU)
    assert torch.equal(inside, cem.info_nce(z1, z2, TAU))


def test_info_nce_with_class_centroids_is_a_parametric_cross_entropy(model64):
    """InfoNCE over candidates w_k is the cross-entropy of the P-CEM whose classifier is w / τ."""
    features = torch.randn(6, model64.net.out_features, dtype=torch.float64)
    z, centroids = F.normalize(features, dim=1), unit(5, features.shape[1], 2)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    model64.net.fc.weight.data.copy_(centroids / TAU)
    model64.net.fc.bias.data.zero_()
    ours = -cem.log_posterior(cem.similarity(z, centroids, TAU), y)
    expected = F.cross_entropy(model64.net.fc(z), y, reduction="none")
    torch.testing.assert_close(ours, expected, **EXACT)


def test_maxent_equals_its_definition(encoder, x):
    z = encoder(x).tolist()
    expected = []
    for i in range(5):
        others = sum(math.exp(f(z[i], z[j])) for j in range(5) if j != i)
        expected.append(-math.log(others / 4))
    ours = cem.potential("maxent", encoder)(x)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_pgd_potential_is_info_nce_with_fixed_positives(encoder, x):
    positives = (x + 0.1).clamp(0, 1)
    ours = cem.potential("pgd", encoder, positives)(x)
    expected = cem.info_nce(encoder(x), encoder(positives), TAU, "none")
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("name", ["maxent", "pgd"])
def test_gradient_flows_through_both_arguments(name, encoder, x):
    """The slope of Σ_i U(x)_i in a direction of the whole batch and of one image, by central
    differences."""
    y = (x + 0.05).clamp(0, 1) if name == "pgd" else None
    potential = cem.potential(name, encoder, y)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(potential(x).sum(), x)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    alone = torch.zeros_like(direction)
    alone[2] = direction[2]
    h = 1e-6
    with torch.no_grad():
        for d in (direction, alone):
            slope = (potential(x + h * d).sum() - potential(x - h * d).sum()) / (2 * h)
            assert (gradient * d).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)
        # image 2 also changes the others' potentials, and the gradient includes that
        change = potential(x + 1e-3 * alone) - potential(x)
        assert change[torch.arange(5) != 2].abs().max() > 1e-7


def test_importance_sampling_of_log_z_is_the_second_half_of_info_nce(encoder, x):
    """∇ log Z by self-normalised importance sampling with the data as proposal is
    Σ_j w_j ∇f(x_0, x_j), w ∝ exp f."""

    def gradient(value):
        parts = torch.autograd.grad(value.sum(), list(encoder.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    z = encoder(x)
    values = cem.similarity(z[:1], z[1:], TAU)
    weights = [math.exp(value) for value in values[0].tolist()]
    estimate = 0
    for weight, value in zip(weights, values[0]):
        estimate = estimate + weight / sum(weights) * gradient(value)
    expected = gradient(values[0, 0]) - estimate
    first = torch.tensor([0])
    loss = cem.log_posterior(values, first)
    torch.testing.assert_close(gradient(loss), expected, rtol=1e-9, atol=1e-12)


def test_fixed_views_do_not_depend_on_the_batch_size():
    digits = data.load("digits", "test")
    whole, parts = (
        train_unsup.fixed_views(digits, train_unsup.Options(batch_size=n)) for n in (400, 100)
    )
    assert all(map(torch.equal, whole, parts)) and len(whole[0]) == len(digits)


def test_potentials_of_any_encoder_with_a_temperature(encoder, x):
    class Own(torch.nn.Module):
        temperature = encoder.temperature

        def forward(self, x):
            return encoder(x)

    for name, y in (("maxent", None), ("pgd", x.flip(3)), ("marginal", encoder(x).detach())):
        own, ours = (cem.potential(name, network, y)(x) for network in (Own(), encoder))
        assert torch.equal(own, ours)


def test_potentials_refuse_the_other_kind_of_model(encoder, model):
    wrapped = torch.nn.DataParallel(encoder)  # without its temperature
    pairs = (("maxent", model), ("pgd", model), ("maxent", wrapped), ("rcs", encoder))
    for name, wrong in (*pairs, ("ce", encoder)):
        with pytest.raises(cem.CEMError, match=f"is for an? .*, not a {type(wrong).__name__}"):
            cem.potential(name, wrong, torch.zeros(1))


def test_a_bank_of_lower_precision(encoder, x):
    """As a checkpoint stores it, or as autocast leaves it."""
    bank = encoder(x).detach().half()
    for name in ("marginal", "maxent-marginal"):
        halves, floats = (cem.potential(name, encoder, z)(x) for z in (bank, bank.float()))
        assert torch.equal(halves, floats) and halves.dtype == x.dtype


def test_frames_lead_to_the_same_images_in_bfloat16(encoder):
    """The positives of pgd are embedded in the type of the ascent, also for --gif."""
    opt = sample.Options(
        sampler="pgd",
        steps=2,
        step_size=0.5,
        noise=0.0,
        norm="l2",
        precision="bfloat16",
        batch_size=8,
    )
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 2
    seeds = cem.GaussianSeeds.fit(images, labels)
    encoder.float().extra = {"classes": ["a", "b"]}
    frames = []
    drawn = [
        sample.draw_batch(encoder, seeds, opt, torch.device("cpu"), 0, kept)[0]
        for kept in (None, frames)
    ]
    assert torch.equal(*drawn) and len(frames) == 2


# --------------------------------------------------------------------------------- augmentations


def photographs(n=6, side=16):
    """Smooth random images with values away from 0 and 1."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, side, mode="bicubic").clamp(0.02, 0.98)


def test_resized_crop_equals_that_of_torchvision():
    x = photographs()
    boxes = [  # top, left, height, width
        [0, 0, 16, 16],
        [3, 1, 9, 12],
        [5, 8, 8, 8],
        [1, 2, 15, 10],
        [0, 4, 7, 9],
        [2, 9, 6, 7],
    ]
    mirror = torch.tensor([False, True] * 3)
    ours = augment.resized_crop(x, *torch.tensor(boxes).float().unbind(1), mirror)
    for i, box in enumerate(boxes):
        expected = functional.resized_crop(x[i], *box, [16, 16], antialias=True)
        if mirror[i]:
            expected = functional.hflip(expected)
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-5)


def test_colour_operations_equal_those_of_torchvision():
    x = photographs()
    factor = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.3, 1.4])
    shift = torch.tensor([-0.1, -0.05, 0.0, 0.03, 0.08, 0.1])
    one, zero = torch.ones(6), torch.zeros(6)
    cases = {
        "adjust_brightness": (factor, [factor, one, one, zero]),
        "adjust_contrast": (factor, [one, factor, one, zero]),
        "adjust_saturation": (factor, [one, one, factor, zero]),
        "adjust_hue": (shift, [one, one, one, shift]),
    }
    for name, (values, arguments) in cases.items():
        adjust = getattr(functional, name)
        expected = torch.stack([adjust(image, float(v)) for image, v in zip(x, values)])
        ours = augment.colour_jitter(x, *arguments)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6, msg=name)


def compare_moments(ours, theirs):
    """Pixel means and variances over n draws each agree within 5 standard errors."""
    n = len(ours)
    # the added constants allow for rounding where the spread is nearly 0
    spread = theirs.std(0) + ours.std(0) + 1e-3
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread / math.sqrt(n)).all()
    ours, theirs = ((v - v.mean(0)).square() for v in (ours, theirs))
    spread = theirs.std(0) + ours.std(0) + 1e-4
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread / math.sqrt(n)).all()


JITTERS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
MIRROR, JITTER, GREY, STRENGTH = range(augment.BOX_DRAWS, augment.BOX_DRAWS + 4)  # columns


def unchanged(n: int) -> torch.Tensor:
    """SimCLR's draws that leave n images as they are."""
    u = torch.zeros(n, augment.SIMCLR_DRAWS)
    u[:, : augment.TRIES] = 1  # the whole area
    u[:, augment.TRIES : 2 * augment.TRIES] = 0.5  # aspect ratio 1
    u[:, [MIRROR, JITTER, GREY]] = 0.9  # above each probability
    u[:, STRENGTH:] = 0.5  # factors of 1, a shift of 0
    return u


def test_distribution_of_crops_is_that_of_torchvision():
    n = 1500
    image = photographs(1, 8)[0]
    u = unchanged(n)
    u[:, : MIRROR + 1] = torch.rand(n, MIRROR + 1, generator=torch.Generator().manual_seed(0))
    ours = augment.simclr(image.expand(n, -1, -1, -1), u)
    crop = transforms.RandomResizedCrop(8, (0.2, 1.0), antialias=True)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    compare_moments(ours, torch.stack([transform(image) for _ in range(n)]))


@pytest.mark.parametrize("column, probability", [(MIRROR, 0.5), (JITTER, 0.8), (GREY, 0.2)])
def test_operations_have_simclrs_probabilities(column, probability):
    x, u = photographs(1).expand(2, -1, -1, -1), unchanged(2)
    u[:, STRENGTH] = 0.0
    u[:, column] = torch.tensor([probability - 1e-3, probability + 1e-3])
    below, above = augment.simclr(x, u)
    assert (below - x[0]).abs().max() > 0.05 and (above - x[0]).abs().max() < 1e-5


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("name", JITTERS)
def test_jitter_ends_at_simclrs_strengths(name, end):
    x, u = photographs(1), unchanged(1)
    u[:, JITTER], u[:, STRENGTH + list(JITTERS).index(name)] = 0.0, end
    value = (2 * end - 1) * JITTERS[name] + (name != "hue")
    expected = getattr(functional, f"adjust_{name}")(x, value)
    torch.testing.assert_close(augment.simclr(x, u), expected, rtol=0, atol=1e-5)


def test_greyscale_images_are_only_cropped():
    x, u = torch.rand(6, 1, 8, 8), torch.rand(6, augment.SIMCLR_DRAWS)
    boxes = augment.crop_boxes(u, 8, (0.6, 1.0))
    expected = augment.resized_crop(x, *boxes, mirror=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(augment.simclr(x, u, scale=(0.6, 1.0), flip=False), expected)


def test_a_view_does_not_depend_on_the_batch():
    x, u = torch.rand(6, 3, 8, 8), torch.rand(6, augment.SIMCLR_DRAWS)
    torch.testing.assert_close(augment.simclr(x, u)[2:4], augment.simclr(x[2:4], u[2:4]))


# ----------------------------------------------------------------------- training and evaluation


def test_the_loss_of_a_first_stage_step_is_its_definition():
    """NT-Xent of a view, attacked within the ball, and of the other view of the same image."""
    model = cem.NonParametricCEM("resnet18", embed_dim=6, temperature=TAU, width=8).eval()
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    train_set = data.Dataset("set", images, torch.arange(6), list("012345"))
    opt = train_unsup.Options(attack_steps=2, temperature=TAU, precision="float32")
    draws, seen, run = torch.rand(6, train_unsup.VIEWS), [], model.forward
    batch_loss = train_unsup.make_batch_loss(opt, train_set)
    model.forward = lambda x: seen.append(x.detach()) or run(x)
    generator = distributed.RankGenerator(0, torch.device("cpu"))
    loss, _ = batch_loss(model, torch.arange(6), draws, generator)
    x_adv, x_plus = seen[-1].chunk(2)
    x, positive = (augment.simclr(train_set.pixels(), u) for u in draws.chunk(2, 1))
    torch.testing.assert_close(x_plus, positive)
    moved = (x_adv - x).flatten(1).norm(dim=1)
    assert (moved > 0.1).all() and (moved <= 0.5 + 1e-5).all()
    z = F.normalize(torch.cat([run(x_adv), run(x_plus)]))
    f = (z @ z.T / TAU).fill_diagonal_(-torch.inf)
    expected = -f.log_softmax(1)[range(12), torch.arange(12).roll(6)].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss > cem.info_nce(run(x), run(x_plus), TAU) + 0.01


def test_knn_accuracy_equals_its_definition():
    bank, query = unit(9, 4, 0), unit(5, 4, 1)
    bank_labels, labels = torch.arange(9) % 3, torch.tensor([0, 1, 2, 0, 1])
    correct = 0
    for z, y in zip(query, labels):
        cosine = bank @ z
        votes = [0.0, 0.0, 0.0]
        for j in cosine.argsort(descending=True)[:4]:
            votes[bank_labels[j]] += math.exp(cosine[j] / 0.1)
        correct += votes.index(max(votes)) == y
    ours = robustness.knn_accuracy(3 * bank, bank_labels, 2 * query, labels, k=4)
    assert ours == pytest.approx(correct / 5)


def test_alignment_and_uniformity_equal_their_definitions():
    z1, z2 = unit(9, 4, 0), unit(9, 4, 1)
    squares = [(a - b).square().sum().item() for a, b in zip(z1, z2)]
    assert train_unsup.alignment(z1, z2) == pytest.approx(sum(squares) / 9)
    pairs = [math.exp(-2 * (z1[i] - z1[j]).square().sum()) for i in range(9) for j in range(i)]
    assert train_unsup.uniformity(z1) == pytest.approx(math.log(sum(pairs) / len(pairs)))


def test_probe_is_the_classifier_of_scikit_learn(encoder):
    """On standardised features, written as one affine layer on the features themselves."""
    x = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    encoder = encoder.float()
    known = encoder.features(x).detach()
    scaled = StandardScaler().fit_transform(known.double().numpy())
    scaled *= math.sqrt(59 / 60)  # torch's standard deviation divides by n - 1
    regression = LogisticRegression(C=0.1, max_iter=300).fit(scaled, labels.numpy())
    probe = robustness.fit_probe(encoder, known, labels)
    ours = probe(x).softmax(1).detach().numpy()
    # L-BFGS stops at a gradient of 1e-4
    np.testing.assert_allclose(ours, regression.predict_proba(scaled), atol=2e-3)


def test_training_logs_what_it_learns_without_labels(unsup_run):
    lines = (unsup_run / "runs/unsup/log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [line["epoch"] for line in log] == [1, 2]
    assert log[1]["loss"] < log[0]["loss"]
    assert {"alignment", "uniformity", "knn_accuracy"} <= log[0].keys()
    assert isinstance(cem.load(unsup_run / CKPT), cem.NonParametricCEM)


def test_evaluation_of_an_encoder_reports_probe_and_knn(unsup_run):
    done = succeeded(script("eval_robust.py", "--ckpt", CKPT, cwd=unsup_run))
    result = json.loads((unsup_run / "runs/unsup/probe.json").read_text())
    assert result["dataset"] == "digits"
    assert 0.5 < result["clean_accuracy"] <= 1
    assert result["adversarial_accuracy"] == result["pgd-20"] < result["clean_accuracy"]
    assert result["knn_accuracy"] > 0.5
    assert "knn accuracy: " in done.stdout
    assert not (unsup_run / "runs/unsup/accuracy.json").exists()


def test_ood_scores_of_an_encoder_are_refused(unsup_run):
    before = files(unsup_run)
    done = script("eval_robust.py", "--ckpt", CKPT, "--ood", "digits", cwd=unsup_run)
    assert_refused(done, "--ood", "encoder")
    assert files(unsup_run) == before


# -------------------------------------------------------------------------------------- sampling


def draw(folder, sampler, *options):
    """The images, as integers, and labels that sample.py draws from the run in `folder`."""
    done = succeeded(script("sample.py", "--sampler", sampler, *options, cwd=folder))
    assert ("in whole batches of" in done.stdout) == (sampler in cem.COUPLED)
    (path,) = re.findall(r"^wrote (\S+\.npz)", done.stdout, re.M)
    with np.load(folder / path) as z:
        return z["arr_0"].astype(int), z["arr_1"].tolist()


@pytest.mark.parametrize("cond", [False, True])
@pytest.mark.parametrize("sampler", ["maxent", "pgd"])
def test_samples_are_reproducible_from_seed_and_batch_size(sampler, cond, unsup_run):
    base = [sampler, "--n", 30, "--batch-size", 20, *["--cond"] * cond]
    first, labels = draw(unsup_run, *base)
    assert labels == ([*range(10)] * 3 if cond else [-1] * 30)
    assert np.array_equal(draw(unsup_run, *base)[0], first)
    # the last batch is drawn whole, even if fewer of its images are kept
    fewer, _ = draw(unsup_run, *base, "--n", 25)
    assert np.abs(fewer - first[:25]).max() <= 1
    smaller_batches, _ = draw(unsup_run, *base, "--batch-size", 10)
    assert np.abs(smaller_batches - first).max() > 3


def test_maxent_raises_the_batch_entropy_more_than_pgd(unsup_run):
    """Entropy as estimated by the network that drew the batch."""
    model = cem.load(unsup_run / CKPT)
    entropy = {}
    for sampler in ("seeds", "maxent", "pgd"):
        options = ["--ckpt", CKPT, "--n", 100, "--batch-size", 100]
        images, _ = draw(unsup_run, sampler, *options)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        entropy[sampler] = cem.potential("maxent", model)(x).mean().item()
    assert entropy["maxent"] > entropy["seeds"] + 0.1
    assert entropy["maxent"] > entropy["pgd"] + 0.1


def test_samplers_refuse_the_other_kind_of_checkpoint(unsup_run, digits_run):
    for folder, ckpt, sampler, kind in (
        (unsup_run, CKPT, "rcs", "an encoder: choose pgd, maxent, neighbour, marginal, maxent-"),
        (digits_run, "runs/sup/ckpt.pt", "maxent", "a classifier: choose ta, langevin, cs, rcs"),
    ):
        before = files(folder)
        done = script("sample.py", "--sampler", sampler, "--ckpt", ckpt, cwd=folder)
        assert_refused(done, kind)
        assert files(folder) == before


@pytest.mark.parametrize(
    "options, part",
    [
        ("--classes 3", "--classes with an encoder needs --cond"),
        ("--cond --start noise", "leave out --start noise"),
    ],
)
def test_options_without_effect_on_an_encoder_are_refused(options, part, unsup_run):
    before = files(unsup_run)
    draw = ["--sampler", "maxent", "--ckpt", CKPT, *options.split()]
    assert_refused(script("sample.py", *draw, cwd=unsup_run), part)
    assert files(unsup_run) == before


def test_the_two_commands_of_the_paper(tmp_path, monkeypatch):
    """python train_unsup.py --arch resnet50; python sample.py --sampler maxent --cond: as they
    stand, but for a small dataset and network."""
    write_folder(tmp_path / "set", size=8, per_class=6)
    small = dict(dataset="set", width=8, epochs=1, n_eval=2, seed_rank=4, embed_dim=8)
    monkeypatch.setattr(train_unsup, "preset", lambda opt: small)
    succeeded(script("train_unsup.py", "--arch", "resnet50", cwd=tmp_path))
    options = json.loads((tmp_path / "runs/unsup/options.json").read_text())
    recipe = dict(arch="resnet50", loss="at", norm="l2", eps=0.5, attack_steps=5, init="")
    recipe |= dict(attack_step_size=0.2, batch_size=256, schedule="cosine", temperature=0.3)
    assert recipe.items() <= options.items()
    succeeded(script("sample.py", "--sampler", "maxent", "--cond", cwd=tmp_path))
    record = json.loads((tmp_path / "runs/unsup/samples-maxent-cond.json").read_text())
    drawn = dict(sampler="maxent", cond=True, steps=8, noise=0.01, norm="l2", n=100)
    assert drawn.items() <= record.items()
    assert record["step_size"] == pytest.approx(24 / 8 * 8 / 32)  # 24 on 32 x 32 images
    # settings are those of the same seeds
    model = cem.load(tmp_path / "runs/unsup/ckpt.pt")
    tuned = dict(steps=2, step_size=0.5, noise=0.0, norm="l2")
    model.extra["settings"] = {"maxent": tuned, "maxent-cond": tuned | {"steps": 3}}
    cem.save(tmp_path / "tuned.pt", model, **model.extra)
    for more, steps in (([], 2), (["--cond"], 3)):
        options = ["--ckpt", "tuned.pt", "--sampler", "maxent", *more]
        done = script("sample.py", *options, "--out", f"out{steps}", cwd=tmp_path)
        assert f"settings of the checkpoint: --steps {steps} --step-size 0.5" in done.stdout


def test_views_have_the_crop_of_the_options_and_the_flip_of_the_dataset():
    x, u = torch.rand(6, 1, 8, 8), torch.rand(6, train_unsup.VIEWS)
    upright = data.Dataset("set", x, torch.zeros(6).long(), ["a"], flip=False)
    views = train_unsup.two_views(x, u, upright, train_unsup.Options(min_crop=0.6))
    for view, draws in zip(views, u.chunk(2, 1)):
        assert torch.equal(view, augment.simclr(x, draws, scale=(0.6, 1.0), flip=False))


def test_the_checkpoint_has_the_temperature_of_the_options(tmp_path):
    options = "--dataset digits --width 8 --seed-rank 4 --max-minutes 1e-9 --temperature 0.2"
    succeeded(script("train_unsup.py", *options.split(), cwd=tmp_path))
    assert cem.load(tmp_path / CKPT).temperature == 0.2


def test_the_log_classifies_test_images_by_training_images():
    train_set, test_set = (data.load("digits", split) for split in ("train", "test"))
    model = cem.NonParametricCEM("resnet18", embed_dim=6, width=8, in_channels=1)
    opt = train_unsup.Options(n_eval=4, precision="float32")
    with mock.patch.object(robustness, "knn_accuracy", return_value=0.5) as knn:
        train_unsup.measure(model, train_set, test_set, opt)
    _, labels, _, y = knn.call_args.args
    assert torch.equal(labels, train_set.labels[train_set.evenly_spaced(40)])
    assert torch.equal(y, test_set.labels[test_set.evenly_spaced(4)])


def test_features_that_are_not_finite_have_no_clusters(unsup_run, tmp_path):
    model = cem.load(unsup_run / CKPT)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data *= 1e12
    cem.save(tmp_path / "huge.pt", model, **model.extra)
    options = ["--dataset", "digits", "--loss", "dat", "--init", "huge.pt", "--clusters", 4]
    done = script("train_unsup.py", *options, cwd=tmp_path)
    assert_refused(done, "the features of huge.pt are not finite")
