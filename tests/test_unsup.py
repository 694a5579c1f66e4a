"""The non-parametric half of cem.py against double loops in float64 and finite differences, and train_unsup.py."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS_OF_ARCH, files, perturb, script
from test_scripts import assert_refused, images
from torchvision import transforms

import cem
import data
import train_unsup

TAU = 0.4


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return perturb(cem.NonParametricCEM("resnet18", embed_dim=6, temperature=TAU, width=4)).double().eval()


@pytest.fixture
def x():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unit(n, d, seed):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=1)


@pytest.mark.parametrize("arch", KINDS_OF_ARCH)
def test_encoder_gives_unit_vectors(arch):
    model = cem.NonParametricCEM(arch, embed_dim=11, width=8, in_channels=1)
    z = model(torch.rand(3, 1, 8, 8))
    assert z.shape == (3, 11) and model.features(torch.rand(3, 1, 8, 8)).shape == (3, model.net.out_features)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_info_nce_equals_a_double_loop_over_pairs():
    z1, z2 = unit(4, 3, 0), unit(4, 3, 1)
    z, losses = torch.cat([z1, z2]).tolist(), []
    for i in range(8):
        f = [sum(a * b for a, b in zip(z[i], z[j])) / TAU for j in range(8)]
        losses.append(math.log(sum(math.exp(f[j]) for j in range(8) if j != i)) - f[(i + 4) % 8])
    each = torch.tensor([(losses[i] + losses[i + 4]) / 2 for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(cem.info_nce(z1, z2, TAU, "none"), each, rtol=0, atol=1e-12)
    assert cem.info_nce(z1, z2, TAU).item() == pytest.approx(sum(losses) / 8, abs=1e-12)


def test_info_nce_keeps_its_digits_under_autocast():
    z1, z2 = unit(4, 3, 0).float(), unit(4, 3, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = cem.info_nce(z1, z2, TAU)
    assert torch.equal(inside, cem.info_nce(z1, z2, TAU))


def test_with_class_centroids_as_the_other_side_it_is_a_parametric_cross_entropy(model64):
    """InfoNCE over candidates w_k is the cross-entropy of the P-CEM whose classifier is w / τ."""
    features = torch.randn(6, model64.net.out_features, dtype=torch.float64)
    z, centroids, y = F.normalize(features, dim=1), unit(5, features.shape[1], 2), torch.tensor([0, 1, 2, 3, 4, 0])
    model64.net.fc.weight.data, model64.net.fc.bias.data = centroids / TAU, torch.zeros(5).double()
    ours = -cem.log_posterior(cem.similarity(z, centroids, TAU), y)
    torch.testing.assert_close(ours, F.cross_entropy(model64.net.fc(z), y, reduction="none"), rtol=0, atol=1e-12)


def test_maxent_equals_its_definition(encoder, x):
    z, expected = encoder(x).tolist(), []
    for i in range(5):
        terms = [math.exp(sum(a * b for a, b in zip(z[i], z[j])) / TAU) for j in range(5) if j != i]
        expected.append(-math.log(sum(terms) / 4))
    ours = cem.potential("maxent", encoder)(x)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_pgd_potential_is_info_nce_with_fixed_positives(encoder, x):
    positives = (x + 0.1).clamp(0, 1)
    ours = cem.potential("pgd", encoder, positives)(x)
    torch.testing.assert_close(ours, cem.info_nce(encoder(x), encoder(positives), TAU, "none"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["maxent", "pgd"])
def test_gradient_flows_through_both_arguments(name, encoder, x):
    """The slope of Σ_i U(x)_i along a direction in the whole batch, by central differences; and along one image alone."""
    y = (x + 0.05).clamp(0, 1) if name == "pgd" else None
    potential = cem.potential(name, encoder, y)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(potential(x).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alone = torch.zeros_like(direction)
    alone[2] = direction[2]
    h = 1e-6
    with torch.no_grad():
        for d in (direction, alone):
            numeric = (potential(x + h * d).sum() - potential(x - h * d).sum()) / (2 * h)
            assert (gradient * d).sum().item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-8)
        # image 2 moves the others' potential too: that part is in the gradient
        others = torch.arange(5) != 2
        assert (potential(x + 1e-3 * alone) - potential(x))[others].abs().max() > 1e-7


def test_importance_sampling_of_log_z_is_the_second_half_of_info_nce(encoder, x):
    """∇ log Z by self-normalised importance sampling with the data as proposal: Σ_j w_j ∇f(x_0, x_j), w ∝ exp f."""
    parameters = list(encoder.parameters())

    def gradients(value):
        return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)

    f = cem.similarity(*encoder(x)[:1].split(1), encoder(x)[1:], TAU)[0]
    weights = [math.exp(v) for v in f.tolist()]
    estimate = [0.0] * len(parameters)
    for weight, value in zip(weights, f):
        estimate = [e + weight / sum(weights) * (0 if g is None else g) for e, g in zip(estimate, gradients(value))]
    first = gradients(f[0])
    for loss in (cem.log_posterior(f[None], torch.tensor([0])), cem.contrastive(f[None], torch.tensor([0]))):
        for g, a, b in zip(gradients(loss.sum()), first, estimate):
            torch.testing.assert_close(g, a - b, rtol=1e-9, atol=1e-12)


def test_likelihood_gradient_splits_into_consistency_and_contrastive_halves():
    """f(x, x') - E f(x̂, x̂') = [f(x, x') - f(x̂, x')] + [f(x̂, x') - E f(x̂, x̂')], x̂' ~ p(x' | x̂) over the candidates."""
    z, z_hat, z_plus = unit(4, 3, 0), unit(4, 3, 1), unit(4, 3, 2)
    y = torch.arange(4)
    f, f_hat = cem.similarity(z, z_plus, TAU), cem.similarity(z_hat, z_plus, TAU)
    whole = f.diagonal() - (f_hat.softmax(1) * f_hat).sum(1)
    torch.testing.assert_close(cem.consistency(f, f_hat, y) + cem.contrastive(f_hat, y), whole, rtol=0, atol=1e-12)


def test_potentials_refuse_the_other_kind_of_model(encoder, model):
    for name, wrong in (("maxent", model), ("pgd", model), ("rcs", encoder), ("ce", encoder)):
        with pytest.raises(cem.CEMError, match="is not for a"):
            cem.potential(name, wrong, torch.zeros(1))
    with pytest.raises(cem.CEMError, match="needs the positives"):
        cem.potential("pgd", encoder)
    with pytest.raises(cem.CEMError, match="temperature"):
        cem.NonParametricCEM(temperature=0)
    with pytest.raises(cem.CEMError, match="two views"):
        cem.info_nce(unit(1, 3, 0), unit(1, 3, 0), TAU)


# -------------------------------------------------------------------------------------------- augmentations


functional = transforms.functional


def photographs(n=6, side=16):
    """Smooth random images, not too near to 0 and 1."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, side, mode="bicubic").clamp(0.02, 0.98)


def test_resized_crop_equals_torchvisions():
    x = photographs()
    top, left, height, width = (
        torch.tensor(v).float() for v in ([0, 3, 5, 1, 0, 2], [0, 1, 8, 2, 4, 9], [16, 9, 8, 15, 7, 6], [16, 12, 8, 10, 9, 7])
    )
    mirror = torch.tensor([False, True] * 3)
    ours = data.resized_crop(x, top, left, height, width, mirror)
    for i in range(6):
        box = [int(v[i]) for v in (top, left, height, width)]
        expected = functional.resized_crop(x[i], *box, [16, 16], antialias=True)
        torch.testing.assert_close(ours[i], functional.hflip(expected) if mirror[i] else expected, rtol=0, atol=1e-5)


def test_colour_operations_equal_torchvisions():
    x = photographs()
    factor = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.3, 1.4])
    shift = torch.tensor([-0.1, -0.05, 0.0, 0.03, 0.08, 0.1])
    ones, zeros = torch.ones(6), torch.zeros(6)
    cases = {
        "adjust_brightness": (factor, (factor, ones, ones, zeros)),
        "adjust_contrast": (factor, (ones, factor, ones, zeros)),
        "adjust_saturation": (factor, (ones, ones, factor, zeros)),
        "adjust_hue": (shift, (ones, ones, ones, shift)),
    }
    for name, (values, arguments) in cases.items():
        ours = data.colour_jitter(x, *arguments)
        expected = torch.stack([getattr(functional, name)(image, float(v)) for image, v in zip(x, values)])
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4, msg=name)  # torchvision's luma has four digits


def compare_moments(ours, theirs):
    """Pixel means and variances over n draws each, within 5 standard errors and a floor for the small-valued ones."""
    n = len(ours)
    spread = theirs.std(0) + ours.std(0) + 1e-3
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread / math.sqrt(n)).all()
    moments = [(v - v.mean(0)).square() for v in (ours, theirs)]
    spread = moments[0].std(0) + moments[1].std(0) + 1e-4
    assert ((moments[0].mean(0) - moments[1].mean(0)).abs() < 5 * spread / math.sqrt(n)).all()


@pytest.mark.parametrize("operation", ["crop and flip", "brightness", "contrast", "saturation", "hue", "grey"])
def test_distribution_of_each_operation_is_torchvisions(operation):
    n, image = 1500, photographs(1, 8)[0]
    u = torch.rand(n, data.SIMCLR_DRAWS, generator=torch.Generator().manual_seed(0))
    rest = u[:, 2 * data.TRIES + 2 :]
    rest[:, 1:3] = 0.9  # neither jitter nor grey ...
    whole = torch.cat([torch.ones(n, data.TRIES), torch.full((n, data.TRIES), 0.5), torch.zeros(n, 2)], 1)
    if operation != "crop and flip":
        u[:, : 2 * data.TRIES + 2] = whole  # ... and no crop, no mirror, but where that is the question
        rest[:, 0] = 0.9
    jitters = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    if operation in jitters:
        theirs = transforms.RandomApply([transforms.ColorJitter(**{operation: jitters[operation]})], 0.8)
        rest[:, 1] = torch.rand(n, generator=torch.Generator().manual_seed(1))
        for i, name in enumerate(jitters):
            if name != operation:
                rest[:, 3 + i] = 0.5  # a factor of 1, a shift of 0
    elif operation == "grey":
        theirs = transforms.RandomGrayscale(0.2)
        rest[:, 2] = torch.rand(n, generator=torch.Generator().manual_seed(1))
    else:
        crop = transforms.RandomResizedCrop(8, (0.2, 1.0), antialias=True)
        theirs = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    torch.manual_seed(0)
    expected = torch.stack([theirs(image) for _ in range(n)])
    compare_moments(data.simclr(image.expand(n, -1, -1, -1), u), expected)


def test_grey_images_are_only_cropped_and_an_image_does_not_depend_on_the_batch():
    x, u = torch.rand(6, 1, 8, 8), torch.rand(6, data.SIMCLR_DRAWS)
    out = data.simclr(x, u, scale=(0.6, 1.0), flip=False)
    boxes = data.crop_boxes(u, 8, (0.6, 1.0))
    assert torch.equal(out, data.resized_crop(x, *boxes, mirror=torch.zeros(6, dtype=torch.bool)))
    x = torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(data.simclr(x, u)[2:4], data.simclr(x[2:4], u[2:4]))


# ------------------------------------------------------------------------------------------------ train_unsup.py


def test_knn_alignment_and_uniformity_equal_their_definitions():
    bank, query = unit(9, 4, 0), unit(5, 4, 1)
    y, truth = torch.arange(9) % 3, torch.tensor([0, 1, 2, 0, 1])
    right = 0
    for q, t in zip(query, truth):
        cosine = bank @ q
        votes = [0.0, 0.0, 0.0]
        for j in cosine.argsort(descending=True)[:4]:
            votes[y[j]] += math.exp(cosine[j] / 0.1)
        right += votes.index(max(votes)) == t
    assert train_unsup.knn_accuracy(3 * bank, y, 2 * query, truth, k=4) == pytest.approx(right / 5)
    pairs = [math.exp(-2 * (bank[i] - bank[j]).square().sum()) for i in range(9) for j in range(i)]
    assert train_unsup.uniformity(bank) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert train_unsup.alignment(bank[:5], query) == pytest.approx(
        sum(float((a - b).square().sum()) for a, b in zip(bank[:5], query)) / 5
    )


def test_probe_is_scikit_learns_classifier(encoder, x):
    """On standardised features, folded back into one affine layer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    encoder, labels = encoder.float(), torch.arange(60) % 3
    known = encoder.features(x).detach()
    scaled = StandardScaler().fit_transform(known.double().numpy())
    scaled *= math.sqrt(59 / 60)  # torch's standard deviation divides by n - 1
    expected = LogisticRegression(C=0.1, max_iter=300).fit(scaled, labels.numpy()).predict_proba(scaled)
    probe = train_unsup.fit_probe(encoder, known, labels)
    np.testing.assert_allclose(probe(x).softmax(1).detach().numpy(), expected, atol=2e-3)  # L-BFGS stops at 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unsup")
    options = ["--dataset", "digits", "--width", 8, "--epochs", 2, "--eval-every", 1, "--n-eval", 100, "--ema", 0.5]
    done = script("train_unsup.py", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_training_logs_what_it_learns_without_labels(run):
    log = [json.loads(line) for line in (run / "runs/unsup/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2] and log[1]["loss"] < log[0]["loss"]
    assert {"alignment", "uniformity", "knn_accuracy"} <= log[0].keys()
    assert isinstance(cem.load(run / "runs/unsup/ckpt.pt"), cem.NonParametricCEM)


def test_evaluate_reports_probe_and_knn(run):
    done = script("train_unsup.py", "--dataset", "digits", "--evaluate", cwd=run)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "runs/unsup/probe.json").read_text())
    assert 0.5 < result["clean_accuracy"] <= 1 and result["adversarial_accuracy"] < result["clean_accuracy"]
    assert result["knn_accuracy"] > 0.5


@pytest.mark.parametrize("arguments", [["maxent"], ["maxent", "--cond"], ["pgd"], ["pgd", "--cond"]])
def test_samples_are_reproducible_from_seed_and_batch_size(arguments, run):
    sampler, *cond = arguments
    name = f"runs/unsup/samples-{sampler}{'-cond' * bool(cond)}"

    def drawn(*options):
        done = script("sample.py", "--sampler", sampler, *cond, "--n", 30, "--batch-size", 20, *options, cwd=run)
        assert done.returncode == 0, done.stderr
        with np.load(run / f"{name}.npz") as z:
            return z["arr_0"].astype(int), z["arr_1"].tolist()

    first, labels = drawn()
    assert labels == ([*range(10)] * 3 if cond else [-1] * 30)
    assert np.array_equal(drawn()[0], first)
    assert np.abs(drawn("--n", 25)[0] - first[:25]).max() <= 1  # whole batches climb, also the last
    assert np.abs(drawn("--batch-size", 10)[0] - first).max() > 3


def test_maxent_raises_the_batch_entropy_further_than_pgd(run):
    """The entropy estimate of the drawn batch against that of the seeds, by the network that drew."""
    model = cem.load(run / "runs/unsup/ckpt.pt")
    entropy = {}
    for sampler in ("seeds", "maxent", "pgd"):
        drawn, _ = images(run, "--sampler", sampler, "--ckpt", "runs/unsup/ckpt.pt", "--n", 100, "--batch-size", 100)
        x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
        entropy[sampler] = cem.potential("maxent", model)(x).mean().item()
    assert entropy["maxent"] > entropy["seeds"] + 0.1 and entropy["maxent"] > entropy["pgd"] + 0.1


@pytest.mark.parametrize(
    "name, arguments, part",
    [
        ("train_unsup.py", ["--temperature", 0], "--temperature"),
        ("train_unsup.py", ["--batch-size", 1], "--batch-size"),
        ("train_unsup.py", ["--min-crop", 0], "--min-crop"),
        ("train_unsup.py", ["--loss", "mle"], "mle"),
        ("train_unsup.py", ["--evaluate"], "ckpt.pt"),
        ("sample.py", ["--sampler", "maxent", "--batch-size", 1], "--batch-size"),
    ],
)
def test_bad_options(name, arguments, part, tmp_path):
    dataset = ["--dataset", "digits"] if name != "sample.py" else []
    assert_refused(script(name, *dataset, *arguments, cwd=tmp_path), part)
    assert files(tmp_path) == []


def test_samplers_refuse_the_other_kind_of_checkpoint(run, digits_run):
    before = files(run)
    assert_refused(script("sample.py", "--sampler", "rcs", "--ckpt", "runs/unsup/ckpt.pt", cwd=run), "encoder")
    assert_refused(
        script("train_sup.py", "--dataset", "digits", "--evaluate", "--ckpt", "runs/unsup/ckpt.pt", cwd=run), "no classifier"
    )
    assert files(run) == before
    before = files(digits_run)
    assert_refused(script("sample.py", "--sampler", "maxent", "--ckpt", "runs/sup/ckpt.pt", cwd=digits_run), "classifier")
    done = script("train_unsup.py", "--dataset", "digits", "--evaluate", "--ckpt", "runs/sup/ckpt.pt", cwd=digits_run)
    assert_refused(done, "no encoder")
    assert files(digits_run) == before
