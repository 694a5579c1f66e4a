"""The second stage of an encoder: learned log p(x), its samplers, clusters and bank."""

import math
import os
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, drawn_images, perturb, read_log, script, succeeded
from sklearn.cluster import KMeans
from test_dual import train, untrained
from test_survival import assert_same_run, assert_two_processes_train_as_one_does

import cem
import sample
import train_sup
import train_unsup
from lib import augment, data, distributed, sampling, schema
from lib.chains import GrowingChains
from lib.clusters import ClusterSeeds

TAU = 0.3
CKPT = "runs/unsup/ckpt.pt"
SMALL = "--dataset digits --epochs 1 --n-eval 36 --seed-rank 4".split()
DAT = [*SMALL, "--loss", "dat", "--attack-steps", 1, "--dat-max-steps", 6, "--clusters", 5]


@pytest.fixture
def encoder():
    shape = dict(embed_dim=6, temperature=TAU, width=8)
    model = perturb(cem.NonParametricCEM("resnet18", energy=True, **shape))
    torch.nn.init.normal_(model.energy[1].weight)
    return model.double().eval()


@pytest.fixture(scope="session")
def dual_run(unsup_run, tmp_path_factory):
    """A folder with runs/unsup, the second stage of the small encoder."""
    folder = tmp_path_factory.mktemp("dual")
    options = ["--init", unsup_run / CKPT, "--precision", "float32"]
    train(*DAT, *options, cwd=folder, name="train_unsup.py")
    return folder


# ------------------------------------------------------------------------------------ potentials


def test_the_learned_density_is_linear_in_standardised_features(encoder, batch):
    x = batch[0].double()
    h = encoder.features(x)
    mean, var = encoder.energy[0].running_mean, encoder.energy[0].running_var
    weight, bias = encoder.energy[1].weight[0], encoder.energy[1].bias
    log_p = ((h - mean) / (var + 1e-5).sqrt() * weight).sum(1) + bias
    torch.testing.assert_close(cem.potential("marginal", encoder)(x), log_p, rtol=1e-9, atol=1e-9)
    z, features, found = encoder(x, details=True)
    assert torch.equal(z, encoder(x)) and torch.equal(features, h)
    torch.testing.assert_close(found, log_p, rtol=1e-9, atol=1e-9)
    both = cem.potential("maxent", encoder)(x) + log_p
    torch.testing.assert_close(cem.potential("maxent-marginal", encoder)(x), both)


def test_the_density_over_a_bank_and_towards_a_neighbour(encoder, batch):
    x, z = batch[0].double(), encoder(batch[0].double())
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(9, 6, generator=generator, dtype=torch.float64), dim=1)
    log_p = cem.potential("marginal", encoder, bank)(x)
    for i, value in enumerate(log_p.tolist()):
        terms = [math.exp((z[i] @ other / TAU).item()) for other in bank]
        assert value == pytest.approx(math.log(sum(terms) / 9), abs=1e-12)
    both = cem.potential("maxent-marginal", encoder, bank)(x)
    torch.testing.assert_close(both, cem.potential("maxent", encoder)(x) + log_p)
    towards = cem.potential("neighbour", encoder, bank[:6])(x)
    torch.testing.assert_close(towards, torch.stack([a @ b / TAU for a, b in zip(z, bank)]))


@pytest.mark.parametrize("name", ["marginal", "maxent-marginal", "neighbour"])
def test_a_first_stage_needs_embeddings_to_compare_with(name):
    first = cem.NonParametricCEM("resnet18", embed_dim=6, width=8)
    with pytest.raises(cem.CEMError, match=f"'{name}' needs y, embeddings"):
        cem.potential(name, first)


@pytest.mark.parametrize("name", cem.NON_PARAMETRIC_SAMPLERS)
def test_only_coupled_potentials_depend_on_the_other_images(name, encoder, batch):
    x, z = batch[0].double(), encoder(batch[0].double()).detach()
    y = {"pgd": x.flip(0), "neighbour": z}
    whole, part = (
        cem.potential(name, encoder, y[name][:n] if name in y else None)(x[:n]) for n in (6, 3)
    )
    assert (name in cem.COUPLED) != torch.allclose(whole[:3], part, atol=1e-12)


# -------------------------------------------------------------------------------------- the loss


def test_the_loss_of_a_step_is_its_definition(encoder, batch):
    """InfoNCE + λ BCE of log p(x) + keep (1 - cosine of the features), without attack (eps 0)."""
    model = encoder.float()
    train_set = data.Dataset("set", (batch[0] * 255).byte(), batch[1], list("01234"), flip=True)
    opt = train_unsup.Options(
        eps=0.0, attack_steps=1, likelihood_weight=0.7, keep=3.0, temperature=TAU,
        precision="float32",
    )  # fmt: skip
    torch.manual_seed(1)
    reference = cem.NonParametricCEM("resnet18", embed_dim=6, width=8).eval()
    chains = GrowingChains(1, 0.25)
    dual = torch.nn.ModuleDict({"chains": chains, "reference": reference})
    start = torch.rand(6, 3, 8, 8)
    batch_loss = train_unsup.make_dual_loss(opt, train_set, lambda n, generator: start[:n], dual)
    draws = torch.rand(6, train_unsup.VIEWS + 3)
    generator = distributed.RankGenerator(0, torch.device("cpu"))
    loss, metrics = batch_loss(model, torch.arange(6), draws, generator)
    x = train_set.pixels()
    views = train_unsup.two_views(x, draws[:, : train_unsup.VIEWS], train_set, opt)
    z = torch.cat([model(view) for view in views])
    f = (z @ z.T / TAU).fill_diagonal_(-torch.inf)
    nce = -f.log_softmax(1)[range(12), torch.arange(12).roll(6)].mean()
    flipped = augment.mirror(x, draws[:, train_unsup.VIEWS :], True)
    assert not torch.equal(flipped, x)
    log_p = cem.potential("marginal", model)
    x_s = cem.ascend(log_p, start, steps=1, step_size=0.25)
    p, p_s = log_p(flipped), log_p(x_s)
    bce = (1 + (-p).exp()).log().mean() + (1 + p_s.exp()).log().mean()
    h, g = model.features(flipped), reference.features(flipped)
    distance = 1 - ((h * g).sum(1) / h.norm(dim=1) / g.norm(dim=1)).mean()
    assert loss.item() == pytest.approx((nce + 0.7 * bce + 3 * distance).item(), rel=1e-4)
    assert metrics["energy_gap"].item() == pytest.approx((p - p_s).mean().item(), abs=1e-4)


# -------------------------------------------------------------------------------------- clusters


def test_cluster_seeds_are_gaussians_of_the_clusters_drawn_by_their_shares():
    digits = data.load("digits", "train")
    features = digits.images.flatten(1).float()
    seeds = ClusterSeeds.fit(digits.images, features, 6, 8, seed=3)
    directions = F.normalize(features, dim=1).numpy()
    labels = torch.from_numpy(KMeans(6, n_init=1, random_state=3).fit(directions).labels_).long()
    torch.testing.assert_close(seeds.shares, labels.bincount() / len(labels))
    means = [digits.images[labels == k].float().mean(0).flatten() / 255 for k in range(6)]
    torch.testing.assert_close(seeds.gaussians.mean[:6], torch.stack(means))
    random = [torch.Generator().manual_seed(i) for i in range(2000)]
    x = seeds.sample(2000, random)
    nearest = torch.cdist(x.flatten(1), torch.stack(means)).argmin(1)
    assert (nearest.bincount(minlength=6) / 2000 - seeds.shares).abs().max() < 0.05
    again = ClusterSeeds.from_state_dict(seeds.state_dict())
    alone = again.sample(1, [torch.Generator().manual_seed(7)])
    torch.testing.assert_close(alone[0], x[7], atol=2e-3, rtol=0)  # stored in half precision


# ------------------------------------------------------------------------------------------ runs


def test_a_second_stage_logs_its_curriculum_and_stores_what_samplers_need(unsup_run, dual_run):
    (line,) = read_log(dual_run / "runs/unsup")
    names = {"auc", "chain_steps", "energy", "energy_s", "energy_gap", "knn_accuracy"}
    assert names <= line.keys() and 0 <= line["auc"] <= 1
    first, model = cem.load(unsup_run / CKPT), schema.load(dual_run / CKPT)
    for key, value in first.state_dict().items():
        if "running" in key:
            assert torch.equal(model.state_dict()[key], value), key
    train_set = data.load("digits", "train")
    h = first.features(train_set.pixels())
    torch.testing.assert_close(model.energy[0].running_mean, h.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.energy[0].running_var, h.var(0), rtol=1e-2, atol=1e-3)
    assert model.energy[1].weight.any()
    bank = model.extra["bank"]
    assert torch.equal(bank["labels"], train_set.labels)
    z = model(train_set.pixels())
    torch.testing.assert_close(bank["embeddings"].float(), z, rtol=0, atol=2e-3)
    assert len(model.extra["clusters"]["shares"]) == 5
    steps = model.extra["training"]["chains"]["chains.length"].item() + 4
    names = [f"{name}{cond}" for name in ("marginal", "maxent-marginal") for cond in ("", "-cond")]
    setting = dict(steps=steps, step_size=0.05, noise=0.0, norm="l2")
    assert model.extra["settings"] == dict.fromkeys(names, setting)


@pytest.mark.parametrize("cond", [False, True])
@pytest.mark.parametrize("sampler", cem.NON_PARAMETRIC_SAMPLERS)
def test_every_sampler_raises_its_potential(sampler, cond, dual_run):
    options = ["--n", 40, "--noise", 0, *["--cond"] * cond]
    (x, labels), (seeds, _) = (
        drawn_images(dual_run, "--ckpt", CKPT, "--sampler", name, *options)
        for name in (sampler, "seeds")
    )
    assert set(labels.tolist()) == (set(range(10)) if cond else {-1})
    x, seeds = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 for v in (x, seeds))
    assert not torch.equal(x, seeds)
    model = cem.load(dual_run / CKPT)
    if sampler != "neighbour":
        potential = cem.potential(sampler, model, seeds if sampler == "pgd" else None)
        assert potential(x).mean() > potential(seeds).mean()


@pytest.mark.parametrize("cond", [False, True])
def test_a_neighbour_is_one_embedding_of_the_bank_per_image(cond, dual_run):
    model = cem.load(dual_run / CKPT)
    bank, labels = model.extra["bank"]["embeddings"].float(), model.extra["bank"]["labels"]
    y, x = torch.arange(60) % 10, torch.rand(60, 1, 8, 8)
    random = [torch.Generator().manual_seed(i) for i in range(60)]
    z = sampling.potential_y(model, "neighbour", x, y if cond else None, random)
    entries = (z[:, None] == bank).all(2)
    assert entries.any(1).all() and len(entries.float().argmax(1).unique()) > 40
    own = (entries & (labels == y[:, None])).any(1)
    assert own.all() if cond else not own.all()
    again = [torch.Generator().manual_seed(5)]
    alone = sampling.potential_y(model, "neighbour", x[:1], y[5:6] if cond else None, again)
    assert torch.equal(alone[0], z[5])
    potential = cem.potential("neighbour", model, z)
    assert (potential(cem.ascend(potential, x, steps=5, step_size=0.1)) > potential(x)).all()


def relabelled(load):
    def loaded(*args, **options):
        dataset = load(*args, **options)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(9))
        dataset.labels = dataset.labels[order]
        return dataset

    return loaded


def test_no_label_reaches_training_bank_or_unconditional_samples(dual_run, tmp_path, monkeypatch):
    """Both stages, trained again with permuted labels: the same bits."""
    results = []
    for folder, load in (("true", data.load), ("permuted", relabelled(data.load))):
        monkeypatch.setattr(data, "load", load)
        first = [*SMALL, "--width", 8, "--attack-steps", 1, "--out", f"{folder}/first"]
        train(*first, cwd=tmp_path, name="train_unsup.py")
        second = [*DAT, "--init", f"{folder}/first/ckpt.pt", "--out", f"{folder}/dual"]
        train(*second, cwd=tmp_path, name="train_unsup.py")
        found = {}
        for stage in ("first", "dual"):
            model = cem.load(tmp_path / folder / stage / "ckpt.pt")
            extra = model.extra
            found |= {(stage, key): value for key, value in model.state_dict().items()}
            found |= {(stage, "last", k): v for k, v in extra["training"]["model"].items()}
            found[stage, "bank"] = extra["bank"]["embeddings"]
            found[stage, "seeds"] = extra["seeds"]["factor"][-1]
            for name in cem.NON_PARAMETRIC_SAMPLERS:
                draw = ["--ckpt", f"{folder}/{stage}/ckpt.pt", "--n", 5, "--batch-size", 5]
                images, _ = drawn_images(tmp_path, *draw, "--sampler", name)
                found[stage, name] = torch.from_numpy(images)
        results.append((found, extra["bank"]["labels"]))
    (true, labels), (permuted, others) = results
    assert not torch.equal(labels, others)
    assert true.keys() == permuted.keys()
    assert all(torch.equal(value, permuted[key]) for key, value in true.items())


def test_a_resumed_second_stage_does_not_need_the_first(unsup_run, tmp_path):
    (tmp_path / "first.pt").write_bytes((unsup_run / CKPT).read_bytes())
    options = [*DAT, "--init", "first.pt", "--device", "cpu"]
    train(*options, "--out", "whole", cwd=tmp_path, name="train_unsup.py")
    stop = ["--out", "parts", "--max-minutes", 1e-4]
    train(*options, *stop, cwd=tmp_path, name="train_unsup.py")
    (tmp_path / "first.pt").unlink()
    done = train(*options, "--out", "parts", "--resume", cwd=tmp_path, name="train_unsup.py")
    assert "resuming" in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_train_the_second_stage_as_one_does(unsup_run, tmp_path):
    options = [*DAT, "--init", unsup_run / CKPT]
    assert_two_processes_train_as_one_does("train_unsup.py", *options, cwd=tmp_path)


def test_a_signal_during_the_last_measurement_is_heeded_and_costs_no_bank(tmp_path):
    def measure(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with mock.patch.object(train_unsup, "measure", measure):
        done = script("train_unsup.py", *SMALL, "--width", 8, cwd=tmp_path)
    assert done.returncode == 143 and "finished before it stopped by SIGTERM" in done.stdout
    assert len(schema.load(tmp_path / CKPT).extra["bank"]["labels"]) == 1437


def test_a_restart_from_the_first_step_has_no_bank(tmp_path):
    """That of the diverged network would be wrong."""
    options = [*SMALL, "--width", 8, "--lr", 1e30, "--on-diverge", "restart"]
    options += ["--device", "cpu", "--precision", "float32"]
    with mock.patch("lib.loop.MAX_RESTARTS", 1):
        done = script("train_unsup.py", *options, cwd=tmp_path)
    assert done.returncode == 3 and "1 restarts did not help" in done.stderr
    extra = schema.load(tmp_path / CKPT).extra
    assert extra["training"]["step"] == 0 and not extra.get("bank")


def test_a_diverged_second_stage_stops(unsup_run, tmp_path):
    options = [*DAT, "--init", unsup_run / CKPT, "--max-energy-gap", 1e-6]
    done = script("train_unsup.py", *options, cwd=tmp_path)
    assert done.returncode == 3 and "energy gap is" in done.stderr


def test_stages_begin_from_each_other(unsup_run, dual_run, tmp_path):
    model = untrained(tmp_path, *SMALL, "--init", dual_run / CKPT, name="train_unsup.py")
    assert "energy" not in model.config
    model = untrained(tmp_path, *DAT, "--init", dual_run / CKPT, name="train_unsup.py")
    for key, value in cem.load(dual_run / CKPT).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    done = script(
        "train_unsup.py", *DAT, "--init", unsup_run / CKPT, "--embed-dim", 7, cwd=tmp_path
    )
    assert_refused(done, "does not fit: first train a new one with --loss at")


def test_a_checkpoint_without_a_bank_is_named(unsup_run, tmp_path):
    model = cem.load(unsup_run / CKPT)
    del model.extra["bank"]
    cem.save(tmp_path / "bare.pt", model, **model.extra)
    draw = ["sample.py", "--ckpt", "bare.pt", "--sampler"]
    assert_refused(script(*draw, "neighbour", cwd=tmp_path), "neighbour needs a bank")
    done = script(*draw, "maxent", "--candidates", 2, cwd=tmp_path)
    assert_refused(done, "marginal needs a bank")


def test_a_run_without_clusters_cannot_be_resumed(dual_run, tmp_path):
    shutil.copytree(dual_run / "runs", tmp_path / "runs")
    model = cem.load(tmp_path / CKPT)
    del model.extra["clusters"]
    cem.save(tmp_path / CKPT, model, **model.extra)
    done = script("train_unsup.py", "--resume", "--epochs", 2, cwd=tmp_path)
    assert_refused(done, "has no clusters: train_unsup.py did not make it")


@pytest.mark.parametrize(
    "name, change",
    [
        ("bank", {"embeddings": torch.zeros(3, 5)}),
        ("bank", {"embeddings": torch.full((1437, 128), torch.nan)}),
        ("bank", {"labels": torch.full((1437,), 10)}),
        ("bank", {"labels": torch.zeros(1437)}),
        ("bank", {"labels": None}),
        ("bank", {"labels": torch.tensor(3)}),
        ("clusters", {"shares": torch.ones(5)}),
        ("clusters", {"shares": torch.full((4,), 0.25)}),
        ("clusters", {"shares": torch.tensor([-1.0, 2, 0, 0, 0])}),
        ("clusters", {"shares": None}),
        ("clusters", {"shares": torch.zeros(0)}),
        ("clusters", {"seeds": {}}),
        ("clusters", {"seeds": None}),
        ("clusters", {"more": 1}),
    ],
)
def test_a_damaged_bank_and_damaged_clusters_are_refused(name, change, dual_run, tmp_path):
    model = cem.load(dual_run / CKPT)
    model.extra[name] |= change
    cem.save(tmp_path / "bad.pt", model, **model.extra)
    with pytest.raises(cem.CEMError, match="is a damaged checkpoint: .*(bank|clusters|seeds) "):
        schema.load(tmp_path / "bad.pt")


@pytest.mark.parametrize("kind", ["sup", "unsup"])
def test_a_step_of_dat_attacks_its_first_images(kind, batch):
    images = (batch[0] * 255).byte()
    train_set = data.Dataset("set", images, batch[1], list("01234"), flip=False)
    starts, seen = [], []

    def start(labels, generator):
        starts.append(labels)
        return torch.rand(6, 3, 8, 8)

    if kind == "sup":
        model, module, n = cem.ParametricCEM("resnet18", 5, width=8), train_sup, 3
    else:
        model = cem.NonParametricCEM("resnet18", 6, width=8, energy=True)
        module, n = train_unsup, train_unsup.VIEWS + 3
    model = perturb(model).eval()
    opt = module.Options(attack_steps=2, dat_max_steps=1, precision="float32")
    state = torch.nn.ModuleDict({"chains": GrowingChains(1, 0.25)})
    batch_loss = module.make_dual_loss(opt, train_set, start, state)
    run = model.forward
    model.forward = lambda x, **more: seen.append(x.detach()) or run(x, **more)
    draws, generator = torch.rand(6, n), distributed.RankGenerator(0, torch.device("cpu"))
    batch_loss(model, torch.arange(6), draws, generator)
    x = train_set.pixels()
    if kind == "unsup":
        x, _ = train_unsup.two_views(x, draws[:, : train_unsup.VIEWS], train_set, opt)
    moved = (seen[-1][:6] - x).flatten(1).norm(dim=1)
    assert (moved > 0.1).all() and (moved <= 0.5 + 1e-5).all()
    if kind == "sup":  # chains of a class start at seeds of that class
        drawn = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(starts[0], train_set.labels.sort().values[(drawn[:, 0] * 6).long()])


def test_unconditional_images_of_a_second_stage_start_from_its_clusters(dual_run):
    x, _ = drawn_images(dual_run, "--ckpt", CKPT, "--sampler", "seeds", "--n", 6)
    clusters = ClusterSeeds.from_state_dict(cem.load(dual_run / CKPT).extra["clusters"])
    expected = clusters.sample(6, [torch.Generator().manual_seed(i) for i in range(6)])
    assert np.abs(x.transpose(0, 3, 1, 2) - 255 * expected.numpy()).max() < 0.51


def test_chains_of_an_encoder_start_from_its_clusters(unsup_run, tmp_path):
    with mock.patch.object(train_unsup, "chain_starts", wraps=train_unsup.chain_starts) as starts:
        options = [*DAT, "--init", unsup_run / CKPT, "--max-minutes", 1e-9]
        succeeded(script("train_unsup.py", *options, cwd=tmp_path))
    assert isinstance(starts.call_args.args[2], ClusterSeeds)


def test_the_bank_is_of_the_checkpoints_weights(tmp_path):
    """Also where no measurement is due."""
    options = [*SMALL, "--width", 8, "--epochs", 3, "--eval-every", 2, "--out", "run"]
    options += ["--device", "cpu", "--precision", "float32"]
    train_set = data.load("digits", "train")
    saved = []

    @torch.no_grad()
    def save(path, model, **extra):
        z = model(train_set.pixels())
        saved.append(extra.get("bank") and (extra["bank"]["embeddings"] - z).abs().max().item())

    with mock.patch.object(cem, "save", save):
        train(*options, cwd=tmp_path, name="train_unsup.py")
    assert saved[0] is None and len(saved) == 4
    assert all(difference < 1e-3 for difference in saved[1:])
    log = read_log(tmp_path / "run")
    assert ["knn_accuracy" in line for line in log] == [False, True, True]


def test_a_dataset_replaces_a_missing_bank(unsup_run, tmp_path):
    cem.save(tmp_path / "bare.pt", cem.load(unsup_run / CKPT))
    draw = ["--sampler", "marginal", "--n", 20, "--start", "noise", "--precision", "float32"]
    found, _ = drawn_images(tmp_path, "--ckpt", "bare.pt", "--dataset", "digits", *draw)
    expected, _ = drawn_images(unsup_run, "--ckpt", CKPT, *draw)
    assert np.abs(found.astype(int) - expected).max() <= 1
    draw = "--sampler pgd --n 20 --candidates 2 --best --precision float32".split()
    found, _ = drawn_images(tmp_path, "--ckpt", "bare.pt", "--dataset", "digits", *draw)
    assert len(found) == 20


def test_a_sampler_of_ones_own_gets_the_bank(dual_run, monkeypatch):
    monkeypatch.setitem(cem.NON_PARAMETRIC_SAMPLERS, "own", None)
    model = cem.load(dual_run / CKPT)
    y = sampling.potential_y(model, "own", torch.rand(2, 1, 8, 8), None, [])
    assert torch.equal(y, model.extra["bank"]["embeddings"].float())


def test_the_bank_is_evenly_spaced(monkeypatch):
    monkeypatch.setattr(sampling, "BANK", 40)
    train_set = data.load("digits", "train")
    encoder = perturb(cem.NonParametricCEM("resnet18", embed_dim=6, width=8, in_channels=1)).eval()
    bank = sampling.make_bank(encoder, train_set, sample.Options(precision="float32"))
    index = torch.arange(40) * 1437 // 40
    assert torch.equal(bank["labels"], train_set.labels[index])
    z = encoder(train_set.pixels(index))
    torch.testing.assert_close(bank["embeddings"].float(), z, rtol=0, atol=2e-3)


def test_the_second_stage_keeps_the_settings_of_the_firsts_samplers(unsup_run, tmp_path):
    model = cem.load(unsup_run / CKPT)
    tuned = {"maxent": dict(steps=12, step_size=0.3, noise=0.0, norm="l2")}
    tuned["marginal"] = tuned["maxent"]
    cem.save(tmp_path / "first.pt", model, **model.extra | {"settings": tuned})
    options = [*DAT, "--init", "first.pt", "--max-minutes", 1e-9]
    for resume in ([], ["--resume"]):
        train(*options, *resume, cwd=tmp_path, name="train_unsup.py")
        (tmp_path / "first.pt").unlink(missing_ok=True)  # a resumed run does not need it
        found = cem.load(tmp_path / CKPT).extra["settings"]
        assert found["maxent"] == tuned["maxent"] and found["marginal"] != tuned["marginal"]


def test_neighbour_of_a_class_starts_at_noise(dual_run, tmp_path):
    draw = ["--ckpt", dual_run / CKPT, "--n", 2, "--sampler", "neighbour", "--out", "."]
    succeeded(script("sample.py", *draw, "--cond", "--start", "noise", cwd=tmp_path))


def test_too_many_clusters_are_named(unsup_run, tmp_path):
    options = [*DAT, "--init", unsup_run / CKPT, "--clusters"]
    done = script("train_unsup.py", *options, 1000, cwd=tmp_path)
    assert_refused(done, "--clusters 1000 needs at least 2000 training images")
    done = script("train_unsup.py", *options, 700, cwd=tmp_path)
    assert_refused(done, "choose fewer --clusters")
