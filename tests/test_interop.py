"""Third-party checkpoints: read from files of the real libraries, and written so that these load
ours."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_refused, files, perturb, script, succeeded
from PIL import Image
from test_cem import Hostile
from torch import nn

import cem
from lib import data, interop

MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.20, 0.21, 0.22])
# the same float32 operations in the same order, by kernels for different memory formats
CLOSE = dict(rtol=1e-5, atol=1e-5)
EXACT = dict(rtol=0, atol=0)


def normalised(x):
    return (x - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)


def small_stem(net):
    """torchvision's network with the usual stem for 32 x 32 images."""
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def imagenet_stem(net):
    return net


def robustbench(name):
    """A module of robustbench's networks, without the package, which would import its attacks."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("robustbench is not installed")
    path = Path(spec.submodule_search_locations[0]) / "model_zoo" / "architectures" / f"{name}.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    module.__spec__.loader.exec_module(module)
    return module


def robustness_networks():
    reason = "robustness is not installed"
    return pytest.importorskip("robustness.cifar_models.resnet", reason=reason)


def attacker_model(net):
    """The model that MadryLab's robustness trains and saves."""
    attacker = pytest.importorskip("robustness.attacker", reason="robustness is not installed")
    return attacker.AttackerModel(net, SimpleNamespace(mean=MEAN, std=STD)).eval()


def plain_state():
    return dict(perturb(cem.ParametricCEM("resnet18", 3, width=8)).net.state_dict())


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("name, arch", [("ResNet18", "resnet18"), ("ResNet50", "resnet50")])
def test_robustness_checkpoint_gives_the_same_logits(name, arch, x, tmp_path):
    net = perturb(getattr(robustness_networks(), name)(num_classes=7)).eval()
    theirs = attacker_model(net)
    state = {f"module.{k}": v for k, v in theirs.state_dict().items()}  # DataParallel's prefix
    content = {"model": state, "epoch": 3, "optimizer": {}, "args": SimpleNamespace(eps=0.5)}
    torch.save(content, tmp_path / "r.pt")
    model = interop.load(tmp_path / "r.pt")
    assert model.config == dict(arch=arch, width=64, in_channels=3, num_classes=7)
    assert model.extra == {"third_party": True, "normalised": True}
    assert not model.training
    torch.testing.assert_close(model(x), theirs.model(theirs.normalizer(x)), **CLOSE)


@pytest.mark.parametrize("depth, factor", [(28, 4), (34, 10)])
def test_robustbench_wide_resnet_gives_the_same_logits(depth, factor, x, tmp_path):
    net = robustbench("wide_resnet").WideResNet(depth, widen_factor=factor, sub_block1=True)
    perturb(net).eval()
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    model = interop.load(tmp_path / "w.pt", mean=0.0, std=1.0)
    assert model.config["arch"] == f"wrn-{depth}-{factor}"
    torch.testing.assert_close(model(x[:1]), net(x[:1]), **CLOSE)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"last": state},
        lambda state: {"net": {f"model.{k}": v for k, v in state.items()}},
    ],
)
def test_robustbench_resnet_gives_the_same_logits(wrap, x, tmp_path):
    net = perturb(robustbench("resnet").ResNet18()).eval()
    normaliser = {"mu": MEAN.view(1, 3, 1, 1), "sigma": STD.view(1, 3, 1, 1)}
    torch.save(wrap(net.state_dict() | normaliser), tmp_path / "r.pt")
    model = interop.load(tmp_path / "r.pt")
    torch.testing.assert_close(model(x), net(normalised(x)), **CLOSE)


@pytest.mark.parametrize("stem, suffix", [(small_stem, ""), (imagenet_stem, "-imagenet")])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_round_trip(name, stem, suffix, x, tmp_path):
    build = getattr(torchvision.models, name)
    theirs = perturb(stem(build(num_classes=5))).eval()
    torch.save(theirs.state_dict(), tmp_path / "t.pt")
    model = interop.load(tmp_path / "t.pt", mean=MEAN, std=STD)
    assert model.config["arch"] == name + suffix
    torch.testing.assert_close(model(x), theirs(normalised(x)), **CLOSE)
    assert not interop.load(tmp_path / "t.pt").extra["normalised"]
    interop.export(tmp_path / "e.pt", model, "torchvision")
    again = stem(build(num_classes=5)).eval()
    again.load_state_dict(torch.load(tmp_path / "e.pt", weights_only=True))
    torch.testing.assert_close(again(normalised(x)), theirs(normalised(x)), **EXACT)


def test_export_to_robustness_and_back(x, tmp_path):
    networks = robustness_networks()
    model = perturb(cem.ParametricCEM("resnet18", mean=MEAN, std=STD)).eval()
    interop.export(tmp_path / "r.pt", model, "robustness")
    theirs = attacker_model(networks.ResNet18())
    state = torch.load(tmp_path / "r.pt", weights_only=True)["model"]
    theirs.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    torch.testing.assert_close(theirs.model(theirs.normalizer(x)), model(x), **CLOSE)
    torch.testing.assert_close(interop.load(tmp_path / "r.pt")(x), model(x), **EXACT)


@pytest.mark.parametrize("arch", ["wrn-16-4", "resnet14", "resnet14-imagenet"])
def test_networks_that_torchvision_lacks_round_trip(arch, x, tmp_path):
    model = perturb(cem.ParametricCEM(arch, 6)).eval()
    interop.export(tmp_path / "w.pt", model)
    again = interop.load(tmp_path / "w.pt", mean=0.5, std=0.25)
    assert again.config["arch"] == arch
    torch.testing.assert_close(again(x), model(x), **EXACT)


def test_invalid_exports_are_refused(tmp_path):
    model = cem.ParametricCEM("wrn-16-4", 3)
    invalid = [
        (model, "onnx", "unknown format"),
        (model, "robustness", "no Wide ResNet"),
        (cem.folded(model), "torchvision", "unfolded"),
        (cem.NonParametricCEM("resnet18", width=4), "torchvision", "classifiers"),
    ]
    for network, format, message in invalid:
        with pytest.raises(cem.CEMError, match=message):
            interop.export(tmp_path / "e.pt", network, format)
    assert files(tmp_path) == []


# ----------------------------------------------------------------------- our own files, and none


def test_our_own_checkpoint_is_loaded_as_cem_load_does(tmp_path):
    model = cem.ParametricCEM("resnet18", 10, 4, 1)
    cem.save(tmp_path / "own.pt", model, dataset="digits")
    loaded = interop.load(tmp_path / "own.pt", "cpu")
    assert loaded.extra == {"dataset": "digits"}
    assert not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    with pytest.raises(cem.CEMError, match="third-party"):
        interop.load(tmp_path / "own.pt", mean=0.0, std=1.0)


def test_our_own_damaged_checkpoint_is_reported_as_damaged(tmp_path):
    path = tmp_path / "own.pt"
    cem.save(path, cem.ParametricCEM("resnet18", 10, 4, 1))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor
    path.write_bytes(content)
    with pytest.raises(cem.CEMError, match="own.pt is damaged: checksum mismatch"):
        interop.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(cem.CEMError, match="own.pt is damaged"):
        interop.load(path)


# ------------------------------------------------------------- files with more than tensors


class Schedule:
    """An object of another codebase, as its checkpoints contain them."""

    def __init__(self):
        self.step = print


INERT = set(vars(interop.Inert))


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_a_file_become_inert(zipped, tmp_path):
    content = {
        "model": plain_state(),
        "schedule": Schedule(),
        "print": print,
        "args": SimpleNamespace(a=Schedule()),
        "best": np.float64(0.5),
    }
    torch.save(content, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    assert interop.load(tmp_path / "f.pt").config["num_classes"] == 3
    assert interop.read(tmp_path / "f.pt")["schedule"] is interop.Inert
    assert set(vars(interop.Inert)) == INERT  # the file has not changed it


def test_functions_that_dill_pickled_become_inert(tmp_path):
    """robustness pickles its own files with dill, functions included."""
    dill = pytest.importorskip("dill", reason="dill is not installed")
    content = {"model": plain_state(), "schedule": lambda epoch: 0.1 * epoch, "type": Schedule}
    torch.save(content, tmp_path / "d.pt", pickle_module=dill)
    assert interop.load(tmp_path / "d.pt").config["num_classes"] == 3


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped, tmp_path):
    content = {"model": plain_state(), "x": Hostile(tmp_path / "made")}
    torch.save(content, tmp_path / "h.pt", _use_new_zipfile_serialization=zipped)
    try:
        interop.load(tmp_path / "h.pt")
    except cem.CEMError:
        pass
    assert files(tmp_path) == ["h.pt"]


SMALL = plain_state()
CYCLE = {}
CYCLE["again"] = CYCLE
UNKNOWN_WIDE_RESNET = {
    "conv1.weight": torch.ones(64, 3, 3, 3),
    "fc.weight": torch.ones(5, 9),
    "block1.layer.0.conv1.weight": torch.ones(7, 1),
}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"a.weight": torch.ones(2)}}, "no state dict"),
        ([1, 2], "no state dict"),
        (CYCLE, "no state dict"),
        ({"teacher": SMALL, "student": SMALL}, "several networks ('teacher', 'student')"),
        (
            {f"{p}.{k}": v for p in ("model", "ema") for k, v in SMALL.items()},
            "networks: model., ema.",
        ),
        (SMALL | {"mu": torch.tensor(125.3), "sigma": torch.tensor(63.0)}, "in [0, 1]"),
        # without a bias, as where the weights of the last layer are normalised
        ({k: v for k, v in SMALL.items() if k != "fc.bias"}, "fc.bias is (3,), not absent"),
        ({"conv1.weight": torch.ones(()), "fc.weight": torch.ones(())}, "unknown architecture"),
        (torchvision.models.resnext50_32x4d().state_dict(), "nearest is resnet50-imagenet"),
        ({"features.conv1.weight": torch.ones(4, 3, 3, 3)}, "unknown architecture"),
        (UNKNOWN_WIDE_RESNET, "unknown architecture"),
    ],
)
def test_unsupported_files_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "f.pt")
    done = script("sample.py", "--ckpt", "f.pt", "--dataset", "digits", cwd=tmp_path)
    assert_refused(done, message, "f.pt")
    assert files(tmp_path) == ["f.pt"]


# --------------------------------------------------------------------------------------- scripts


@pytest.fixture
def third_party(tmp_path):
    """A folder with a third-party checkpoint for digits, f.pt, without a normalisation."""
    state = perturb(cem.ParametricCEM("resnet18", 10, 8, 1)).net.state_dict()
    torch.save({"state_dict": state}, tmp_path / "f.pt")
    return tmp_path


def test_sampling_from_a_third_party_checkpoint_needs_its_dataset(third_party):
    done = script("sample.py", "--ckpt", "f.pt", "--n", 20, cwd=third_party)
    assert_refused(done, "--dataset")
    assert files(third_party) == ["f.pt"]


def test_sampling_from_a_third_party_checkpoint(third_party):
    """Seeds, class names and the normalisation come from the dataset."""
    arguments = "--ckpt f.pt --dataset digits --n 20 --sampler rcs --png pictures".split()
    done = succeeded(script("sample.py", *arguments, cwd=third_party))
    assert "no pixel normalisation: using that of digits" in done.stdout
    assert "accuracy on 500 training images of digits" in done.stdout
    assert "warning" in done.stderr
    record = json.loads((third_party / "f/samples-rcs.json").read_text())
    assert record["dataset"] == "digits" and len(record["classes"]) == 10
    for name, value in data.load("digits", "train").normalisation().items():
        assert record[name] == pytest.approx(value.tolist())
    with np.load(third_party / "f/samples-rcs.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    for i, (image, label) in enumerate(zip(images, labels)):
        for name in (f"{i:02d}.png", f"{label}/{i:02d}.png"):
            pixels = np.asarray(Image.open(third_party / "pictures" / name))
            np.testing.assert_array_equal(pixels, image[:, :, 0])
    assert_refused(script("sample.py", *arguments, cwd=third_party), "--png pictures")


def test_files_of_one_stem_have_folders_of_their_own(third_party):
    names = "checkpoint.pt.best", "checkpoint.pt.latest", "bare"
    for name in names:
        (third_party / name).write_bytes((third_party / "f.pt").read_bytes())
        options = f"--ckpt {name} --dataset digits --n 20 --mean 0.3 --std 0.4".split()
        succeeded(script("eval_robust.py", *options, cwd=third_party))
    written = {f"{name}-cem/accuracy.json" for name in names}
    assert set(files(third_party)) == {*names, "f.pt"} | written


def test_evaluating_a_third_party_checkpoint(third_party):
    arguments = "--ckpt f.pt --dataset digits --n 20 --mean 0.3 --std 0.4".split()
    done = succeeded(script("eval_robust.py", *arguments, cwd=third_party))
    assert "no pixel normalisation" not in done.stdout
    assert files(third_party) == ["f.pt", "f/accuracy.json"]


@pytest.mark.parametrize("name", ["sample.py", "eval_robust.py"])
def test_invalid_mean_and_std_are_refused(name, third_party):
    invalid = ("--mean 0.3", "--mean 0.3 --std 0", "--mean 1 2 --std 1 2", "--mean 99 --std 60")
    for options in invalid:
        arguments = ["--ckpt", "f.pt", "--dataset", "digits", *options.split()]
        assert_refused(script(name, *arguments, cwd=third_party), "mean and std")


def test_a_dataset_with_other_classes_is_refused(third_party):
    state = cem.ParametricCEM("resnet18", 3, 8, 1).net.state_dict()
    torch.save(state, third_party / "f.pt")
    for name in ("sample.py", "eval_robust.py"):
        done = script(name, "--ckpt", "f.pt", "--dataset", "digits", cwd=third_party)
        assert_refused(done, "f.pt has 3 classes, but digits has 10: pass its --dataset")


# ---------------------------------------------------------------------------------- cem.py alone

BEFORE = """
import sys
sys.path.insert(0, sys.argv[1])
"""
AFTER = """
assert cem.__file__.startswith(sys.argv[1])
print("samples", tuple(x.shape), bool(x.isfinite().all()))
try:
    cem.load("f.pt")
except cem.CEMError as error:
    print("error", error)
"""


@pytest.mark.slow
def test_code_of_the_readme_needs_only_cem_and_a_checkpoint(tmp_path):
    root = Path(cem.__file__).parent
    first, second = re.findall("```python\n(.*?)```", (root / "README.md").read_text(), re.S)
    (tmp_path / "checkpoints").mkdir()
    for name in ("cem.py", "checkpoints/sup.pt", "checkpoints/unsup.pt"):
        shutil.copy(root / name, tmp_path / name)
    torch.save(plain_state(), tmp_path / "f.pt")
    own = "net = cem.ParametricCEM(width=8)"
    code = "\n".join([BEFORE, first, own, second, AFTER])
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "samples (10, 3, 32, 32) True" in done.stdout
    assert Image.open(tmp_path / "images.png").size == (342, 36)
    refusal = next(line for line in done.stdout.splitlines() if line.startswith("error"))
    assert "sample.py and eval_robust.py" in refusal


def test_third_party_weights_that_are_not_finite_are_refused(third_party):
    content = torch.load(third_party / "f.pt", weights_only=True)
    content["state_dict"]["layer4.1.conv2.weight"][0, 0] = torch.nan
    torch.save(content, third_party / "f.pt")
    with pytest.raises(cem.CEMError, match="f.pt: its weights are not finite"):
        interop.load(third_party / "f.pt")


def test_of_several_networks_the_named_one_is_read(tmp_path):
    state = plain_state()
    average = {key: value + 1 for key, value in state.items()}
    torch.save({"ema": average, "model": state}, tmp_path / "f.pt")
    model = interop.load(tmp_path / "f.pt")
    assert torch.equal(model.net.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("key, change, message", [
    ("fc.weight", lambda w: w.to_sparse(), ""),
    ("conv1.weight", lambda w: w.to(torch.float8_e4m3fn), ""),
    ("conv1.weight", lambda w: w.to(torch.complex64), "its weights are complex"),
    ("bn1.num_batches_tracked", lambda w: torch.zeros(3).long(), "(?s)cannot use .*size mismatch"),
])  # fmt: skip
def test_unusual_tensors_are_converted_or_refused(key, change, message, tmp_path):
    state = plain_state()
    torch.save(state | {key: change(state[key])}, tmp_path / "f.pt")
    if message:
        with pytest.raises(cem.CEMError, match=message):
            interop.load(tmp_path / "f.pt")
        return
    found = interop.load(tmp_path / "f.pt").net.state_dict()[key]
    assert torch.allclose(found, state[key], atol=0.1) and found.dtype == torch.float32


def test_the_check_of_a_checkpoint_forwards_100_images_at_once(model, capsys):
    images = torch.rand(250, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images.mul(255).byte()
    labels = model(images / 255).argmax(1)
    dataset = data.Dataset("some", images, labels, list("abcde"))
    model.extra, seen = {"normalised": True}, []
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    interop.check_third_party(model, "f.pt", dataset)
    assert seen == [100, 100, 50]
    assert "accuracy on 250 training images of some: 100%" in capsys.readouterr().out
