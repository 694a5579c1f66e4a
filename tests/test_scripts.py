"""The scripts as a user runs them: from the command line, in an empty folder, with good and with bad input."""

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, files, process, script
from PIL import Image
from test_data import bad_folders, write_folder
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import cem
import cli
import engine
import hardware
import sample
import train_sup


def last_line(done):
    return done.stderr.replace("\r", "\n").strip().splitlines()[-1]


def assert_refused(done, *parts):
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.replace("\r", "\n").count("error: ") == 1 and last_line(done).startswith("error: ")
    for part in parts:
        assert part in last_line(done), last_line(done)


# ----------------------------------------------------------------------------------------------------- options


def test_digits_bring_their_own_defaults_which_explicit_options_override():
    paper = cli.parse(train_sup.Options, "x", train_sup.preset, argv=[])
    assert (paper.arch, paper.width, paper.eps, paper.attack_steps, paper.attack_step_size) == ("resnet50", 64, 0.5, 7, 0.1)
    digits = cli.parse(train_sup.Options, "x", train_sup.preset, argv=["--dataset", "digits", "--width", "64"])
    assert digits.width == 64 and digits.epochs == train_sup.DIGITS["epochs"] and digits.arch == "resnet18"


@pytest.mark.parametrize("name", ["train_sup.py", "train_unsup.py", "sample.py", "eval_is_fid.py", "sweep.py", "bench.py"])
def test_help_says_what_every_option_does(name, tmp_path):
    done = script(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    options = __import__(name[:-3]).Options
    for f in __import__("dataclasses").fields(options):
        assert f"--{f.name.replace('_', '-')}" in done.stdout and len(f.metadata["help"]) > 4
    if name.startswith("train"):
        assert "--ema 0.97" in " ".join(done.stdout.split())
    assert files(tmp_path) == []


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_learning_rate_rises_to_the_peak_and_falls_to_zero(schedule):
    rates = [engine.learning_rate(i / 1000, 0.2, schedule) for i in range(1001)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.2, rel=1e-3) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top == {"onecycle": 300, "cosine": 20}[schedule]


def test_scripts_run_as_processes(digits_run, tmp_path):
    done = process("sample.py", "--ckpt", digits_run / "runs/sup/ckpt.pt", "--n", 10, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and f"wrote {tmp_path / 'out/samples-rcs.npz'}" in done.stdout, done.stderr
    assert files(tmp_path / "out") == ["samples-rcs.json", "samples-rcs.npz", "samples-rcs.png"]
    done = process("sample.py", "--ckpt", "missing.pt", cwd=tmp_path)
    assert_refused(done, "missing.pt")
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------- train, sample, evaluate


def test_training_writes_checkpoint_log_and_events(digits_run):
    run = digits_run / "runs/sup"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5] and [line["step"] for line in log] == [11, 22, 33, 44, 55]
    wanted = {"loss", "lr", "clean_accuracy", "adversarial_accuracy", "images_per_second", "seconds"}
    assert wanted <= log[0].keys() and log[-1]["loss"] < log[0]["loss"]
    assert "ckpt.pt" in files(run) and any(f.startswith("events") for f in files(run))
    assert json.loads((run / "options.json").read_text())["width"] == 8
    model = cem.load(run / "ckpt.pt")
    assert model.config["width"] == 8 and model.extra["classes"] == list("0123456789")
    average, raw = model.state_dict(), model.extra["training"]["model"]
    assert not torch.equal(average["net.conv1.weight"], raw["net.conv1.weight"])


def test_evaluate_agrees_with_the_accuracy_computed_here(digits_run):
    done = script("train_sup.py", "--dataset", "digits", "--evaluate", cwd=digits_run)
    assert done.returncode == 0, done.stderr
    result = json.loads((digits_run / "runs/sup/accuracy.json").read_text())
    import data

    model, test = cem.load(digits_run / "runs/sup/ckpt.pt"), data.load("digits", "test")
    clean = (model(test.pixels()).argmax(1) == test.labels).float().mean().item()
    assert result["clean_accuracy"] == pytest.approx(clean, abs=1.5 / 360)  # rounding may turn an image over
    assert result["adversarial_accuracy"] < clean and result["n"] == 360
    assert f"clean accuracy: {result['clean_accuracy']:.2%}" in done.stdout


def test_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path):
    options = ["--dataset", "digits", "--width", 4, "--epochs", 3, "--n-eval", 36, "--ema", 0.9]
    assert script("train_sup.py", *options, "--out", "whole", cwd=tmp_path).returncode == 0
    first = script("train_sup.py", *options, "--out", "parts", "--max-minutes", 1e-4, cwd=tmp_path)
    assert first.returncode == 0 and "stopped" in first.stdout
    assert 0 < cem.load(tmp_path / "parts/ckpt.pt").extra["training"]["step"] < 33
    other = ["--dataset", "digits", "--width", 8, "--out", "parts", "--resume"]
    assert_refused(script("train_sup.py", *other, cwd=tmp_path), "--width 4, not 8")
    second = script("train_sup.py", *options, "--out", "parts", "--resume", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    whole, parts = (cem.load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "parts")]
    assert [line["epoch"] for line in logs[1]] == [1, 2, 3]
    for a, b in zip(*logs):
        assert all(a[k] == b[k] for k in a if k not in ("seconds", "images_per_second"))


def test_a_new_run_keeps_the_earlier_checkpoint(tmp_path):
    options = ["--dataset", "digits", "--width", 4, "--epochs", 1, "--n-eval", 36, "--loss", "st"]
    assert script("train_sup.py", *options, cwd=tmp_path).returncode == 0
    first = (tmp_path / "runs/sup/ckpt.pt").read_bytes()
    done = script("train_sup.py", *options, "--seed", 1, cwd=tmp_path)
    assert "kept the earlier run" in done.stdout
    second = (tmp_path / "runs/sup/ckpt.pt").read_bytes()
    assert script("train_sup.py", *options, "--seed", 2, cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs/sup/previous-1/ckpt.pt").read_bytes() == first != second
    assert (tmp_path / "runs/sup/previous-2/ckpt.pt").read_bytes() == second != (tmp_path / "runs/sup/ckpt.pt").read_bytes()


@pytest.mark.parametrize("more, env", [(["--resume"], {}), ([], {"TORCHELASTIC_RESTART_COUNT": "1"})])
def test_resume_starts_a_run_that_is_not_there_and_a_restarted_worker_resumes(more, env, tmp_path):
    options = ["--dataset", "digits", "--width", 4, "--n-eval", 36, "--loss", "st", *more]
    done = script("train_sup.py", *options, "--epochs", 1, cwd=tmp_path, **env)
    assert done.returncode == 0 and "nothing to resume in runs/sup: a new run" in done.stdout
    done = script("train_sup.py", *options, "--epochs", 2, cwd=tmp_path, **env)
    assert done.returncode == 0 and "going on from step 11 of 22" in done.stdout
    assert len((tmp_path / "runs/sup/log.jsonl").read_text().splitlines()) == 2


def test_training_on_an_image_folder_with_mle_and_linf(tmp_path):
    write_folder(tmp_path / "set", per_class=6)
    options = [
        "--arch",
        "wrn-28-10",
        "--width",
        4,
        "--epochs",
        1,
        "--batch-size",
        6,
        "--loss",
        "mle",
        "--norm",
        "linf",
        "--eps",
        0.03,
    ]
    done = script("train_sup.py", "--dataset", "set", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert script("sample.py", "--n", 4, cwd=tmp_path).returncode == 0
    with np.load(tmp_path / "runs/sup/samples-rcs.npz") as z:
        assert z["arr_0"].shape == (4, 10, 10, 3) and z["arr_1"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("sampler", [*cem.PARAMETRIC_SAMPLERS, "seeds"])
def test_sample_writes_npz_grid_and_record(sampler, digits_run):
    done = script("sample.py", "--sampler", sampler, "--n", 30, "--noise", 0.01, cwd=digits_run)
    assert done.returncode == 0, done.stderr
    name = digits_run / f"runs/sup/samples-{sampler}"
    with np.load(f"{name}.npz", allow_pickle=False) as z:
        assert z["arr_0"].dtype == np.uint8 and z["arr_0"].shape == (30, 8, 8, 1)
        assert z["arr_1"].dtype == np.int64 and z["arr_1"].tolist() == [*range(10)] * 3
    assert Image.open(f"{name}.png").size[1] == 10 * 66 + 2  # a row a class
    record = json.loads((name.parent / f"{name.name}.json").read_text())
    assert record["sampler"] == sampler and record["images_per_second"] > 0


def images(folder, *args):
    done = script("sample.py", *args, "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    name = args[1] if args[0] == "--sampler" else "rcs"
    with np.load(folder / f"out/samples-{name}.npz") as z:
        return z["arr_0"].astype(int), z["arr_1"]


def test_image_i_depends_on_the_seed_and_i_alone(digits_run):
    noisy = ["--sampler", "langevin", "--noise", 0.02, "--precision", "float32"]  # in bfloat16 a few grey levels more
    first, _ = images(digits_run, *noisy, "--n", 40)
    for other in (["--n", 40, "--batch-size", 7], ["--n", 25]):
        again, _ = images(digits_run, *noisy, *other)
        assert np.abs(first[: len(again)] - again).max() <= 1  # rounding in the network may turn a grey level over
    changed, _ = images(digits_run, *noisy, "--n", 40, "--seed", 1)
    assert (np.abs(first - changed).reshape(40, -1).max(1) > 20).all()


def test_options_of_sample_do_something(digits_run):
    base = ["--sampler", "rcs", "--n", 20, "--step-size", 0.25]
    default, _ = images(digits_run, *base)
    changes = ["--raw"], ["--init", "noise"], ["--steps", 2], ["--step-size", 0.1], ["--norm", "linf"], ["--norm", "none"]
    for option in (*changes, ["--noise", 0.1]):
        assert np.abs(images(digits_run, *base, *option)[0] - default).max() > 5, option
    assert images(digits_run, "--sampler", "rcs", "--n", 5, "--classes", "7,2")[1].tolist() == [7, 2, 7, 2, 7]


def test_default_step_walks_the_tuned_displacement_whatever_the_steps_and_the_size():
    for steps in (4, 16):
        options = sample.Options(steps=steps)
        assert steps * sample.step_size(options, (3, 32, 32)) == pytest.approx(sample.DISPLACEMENT[options.sampler])
        assert sample.step_size(options, (3, 64, 64)) == pytest.approx(2 * sample.step_size(options, (3, 32, 32)))
        signs = sample.step_size(sample.Options(steps=steps, norm="linf"), (3, 32, 32))
        assert signs * (3 * 32 * 32) ** 0.5 == pytest.approx(sample.step_size(options, (3, 32, 32)))


def test_sampler_raises_the_share_of_the_wanted_class(digits_run):
    """From uniform noise the network calls few images by their label, after climbing log p(y | x) nearly all."""
    climb = ["--init", "noise", "--steps", 40, "--step-size", 0.2]
    drawn, labels = images(digits_run, "--sampler", "ta", *climb, "--n", 50)
    model = cem.load(digits_run / "runs/sup/ckpt.pt")
    said = model(torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255).argmax(1)
    assert (said.numpy() == labels).mean() > 0.9


def test_bench_names_what_there_is_to_measure(tmp_path):
    done = script("bench.py", "--width", 4, "--image-size", 8, "--batch-size", 4, "--only", "nonsense", cwd=tmp_path)
    assert_refused(done, "nonsense", "sampler maxent")


def test_bench_measures_every_contender_and_counts_its_flop(tmp_path):
    size = ["--width", 4, "--image-size", 8, "--batch-size", 4, "--steps", 2, "--repeats", 1]
    done = script("bench.py", *size, "--precision", "float32", "--out", "bench.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    samplers = {f"sampler {name}" for name in (*cem.PARAMETRIC_SAMPLERS, *cem.NON_PARAMETRIC_SAMPLERS)}
    assert samplers | {"supervised training step", "unsupervised training step", "attack"} <= rows.keys()
    # by hand: 2 x kernel x inputs x outputs x pixels; width 4 on 8x8: the stem, four stages with their shortcuts, the head
    forward = 2 * 64 * 9 * 3 * 4 + 2 * 64 * 9 * 16 * 4
    for channels, pixels in ((8, 16), (16, 4), (32, 1)):
        forward += 2 * pixels * (9 * channels**2 * 3 + 9 * channels**2 // 2 + channels**2 // 2)
    forward += 2 * 32 * 10
    for name, passes in (("supervised training step", 7), ("unsupervised training step", 11), ("attack", 4)):
        row = rows[name]
        assert row["ratio"] == pytest.approx(row["images_per_second"] / row["textbook"], rel=2e-3)
        assert row["GFLOP_per_second"] == pytest.approx(passes * forward * row["images_per_second"] / 1e9, rel=2e-3)


# --------------------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_shipped_checkpoint_draws_without_dataset_or_network(sampler, tmp_path):
    done = script("sample.py", "--sampler", sampler, "--n", 20, "--batch-size", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "checkpoints") in done.stdout
    with np.load(tmp_path / f"runs/shipped/samples-{sampler}.npz") as z:
        assert z["arr_0"].shape == (20, 32, 32, 3)


def test_shipped_checkpoints_are_small_and_name_no_machine():
    for name in ("sup", "unsup", "judge"):
        path = ROOT / "checkpoints" / f"{name}.pt"
        assert path.stat().st_size < 10e6
        extra = cem.load(path).extra
        assert "training" not in extra and not str(extra["options"]["out"]).startswith("/") and "/" not in extra["dataset"]


def test_maxent_raises_the_entropy_of_the_shipped_encoders_batch_and_pgd_lowers_it():
    model = cem.folded(cem.load(ROOT / "checkpoints/unsup.pt"))
    x = cem.GaussianSeeds.from_state_dict(model.extra["seeds"]).sample(24, torch.Generator().manual_seed(0))
    entropy, climb = cem.potential("maxent", model), dict(steps=5, step_size=0.25)
    curves = {"maxent": [], "pgd": []}
    for name, curve in curves.items():
        potential, images = cem.potential(name, model, x), x
        for _ in range(4):
            with torch.no_grad():
                curve.append(entropy(images).mean().item())
            images = cem.ascend(potential, images, **climb)
    assert curves["maxent"] == sorted(curves["maxent"]) and curves["maxent"][-1] > curves["maxent"][0] + 0.3
    assert max(curves["pgd"][1:]) < curves["pgd"][0] - 0.3


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--dataset", "mnist"], "mnist"),
        (["--arch", "vgg"], "vgg"),
        (["--loss", "gan"], "gan"),
        (["--dataset", "digits", "--eps", -1], "--eps"),
        (["--dataset", "digits", "--attack-steps", 0], "--attack-steps"),
        (["--dataset", "digits", "--batch-size", 0], "--batch-size"),
        (["--dataset", "digits", "--lr", "nan"], "--lr"),
        (["--dataset", "digits", "--width", "wide"], "wide"),
        (["--dataset", "digits", "--device", "abacus"], "abacus"),
        (["--dataset", "digits", "--evaluate"], "ckpt.pt"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_training_options(arguments, part, tmp_path):
    assert_refused(script("train_sup.py", *arguments, cwd=tmp_path), part)
    assert files(tmp_path) == []


def test_bad_image_folders(tmp_path):
    for path, message in bad_folders(tmp_path / "sets"):
        assert_refused(script("train_sup.py", "--dataset", path, "--out", "run", cwd=tmp_path), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--sampler", "dream"], "dream"),
        (["--steps", 0], "--steps"),
        (["--n", 0], "--n"),
        (["--step-size", "nan"], "--step-size"),
        (["--step-size", 0], "--step-size"),
        (["--norm", "none"], "--step-size"),
        (["--noise", -1], "--noise"),
        (["--cond", "--classes", "unicorn"], "unicorn"),
        (["--ckpt", "missing.pt"], "missing.pt"),
        (["--ckpt", "text.pt"], "text.pt"),
        (["--ckpt", "cut.pt"], "cut.pt"),
        (["--ckpt", "bare.pt"], "bare.pt"),
    ],
)
def test_bad_sampling_options(arguments, part, digits_run, tmp_path):
    checkpoint = (digits_run / "runs/sup/ckpt.pt").read_bytes()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    cem.save(tmp_path / "bare.pt", cem.ParametricCEM("resnet18", 3, width=4))
    before = files(tmp_path)
    if "--ckpt" not in arguments:
        arguments = [*arguments, "--ckpt", digits_run / "runs/sup/ckpt.pt", "--out", "."]
    assert_refused(script("sample.py", *arguments, cwd=tmp_path), part)
    assert files(tmp_path) == before


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler for torch.compile")
def test_compiled_networks_compute_what_the_eager_ones_do_and_are_compiled_once(model64, batch):
    """In float64, where the order of additions is the only difference; three steps, each attacking a new folded copy."""
    x, y, graphs = batch[0].double(), batch[1], []
    network, twin = model64.train(), copy.deepcopy(model64).train()
    network.compile()
    compiled = hardware.Frozen(True)
    for _ in range(3):
        x_adv, losses = [], []
        for net, freeze in ((network, compiled), (twin, hardware.Frozen(False))):
            attacked = freeze(net)
            potential = cem.potential("ce", attacked, y)
            x_adv.append(cem.pgd(potential, x, eps=0.5, steps=2, generator=torch.Generator().manual_seed(0)))
            losses.append(cem.supervised_loss("at", net, x, y, x_adv[-1])[0])
            net.zero_grad()
            losses[-1].backward()
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        torch.testing.assert_close(*x_adv, rtol=0, atol=1e-8)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-8)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.testing.assert_close(list(network.parameters()), list(twin.parameters()), rtol=0, atol=1e-8)
    assert graphs[0] >= 2 and graphs == graphs[:1] * 3
    assert compiled(network) is compiled(network)  # no network is left behind by a step


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_only_where_the_cpu_has_it(native, monkeypatch):
    """oneDNN calls it supported on every CPU with AVX-512, and emulates it at half of float32's speed."""
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no AVX-512")
    assert hardware.settled(torch.device("cpu"), "auto") == ("bfloat16" if native else "float32")


def test_the_running_average_is_pytorchs(batch):
    """Bit for bit AveragedModel's with the same decay, whose counts of batches alone are other."""
    model = cem.ParametricCEM("resnet18", width=4)
    average, theirs = copy.deepcopy(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        model.train()(batch[0]).square().mean().backward()
        optimizer.step()
        engine.follow(average, model, 0.9 if step else 0.0)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    for name, value in average.state_dict().items():
        assert torch.equal(value, expected[name] if value.is_floating_point() else model.state_dict()[name])
    assert not torch.equal(average.net.conv1.weight, model.net.conv1.weight)


def test_the_running_average_begins_at_the_first_steps_weights_not_at_random_ones(tmp_path):
    options = ["--dataset", "digits", "--width", 4, "--loss", "st", "--n-eval", 36, "--seed-rank", 4, "--ema", 0.9]
    assert script("train_sup.py", *options, "--epochs", 1, "--batch-size", 1437, cwd=tmp_path).returncode == 0
    model = cem.load(tmp_path / "runs/sup/ckpt.pt")
    assert model.extra["training"]["step"] == 1
    assert all(torch.equal(v, model.extra["training"]["model"][k]) for k, v in model.state_dict().items())


def test_compile_without_a_compiler_is_a_clear_error(tmp_path):
    with mock.patch.dict(os.environ, {"CXX": "/nonexistent"}):
        done = process("train_sup.py", "--dataset", "digits", "--width", 4, "--loss", "st", "--compile", cwd=tmp_path)
    assert done.returncode == 2 and "error: torch.compile (leave" in done.stderr and "Traceback" not in done.stderr


FAULTS = """
import resource, torch, hardware
hardware.device("cpu")
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library than glibc")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 100 or platform.libc_ver()[1] < "2.35", (
        done.stderr
    )  # a page at a time it would be 16,384; by huge pages 32
