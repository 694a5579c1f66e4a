"""Checkpoints of other codebases: read from files that the real libraries made, and written so that they load ours."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import files, perturb, process, script
from PIL import Image
from torch import nn

import cem
import foreign
import pictures

MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.20, 0.21, 0.22])
RTOL, ATOL = 1e-5, 1e-5  # the same float32 operations in the same order, but for the kernels of a memory layout


def scaled(x):
    return (x - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)


def small_stem(net):
    """torchvision's network as everybody adapts it to 32 x 32."""
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def robustbench(name):
    """A module of robustbench's network definitions; the package itself would import all its attacks."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("robustbench is not installed")
    path = Path(spec.submodule_search_locations[0]) / "model_zoo" / "architectures" / f"{name}.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    module.__spec__.loader.exec_module(module)
    return module


def attacker_model(net):
    """The model that MadryLab's robustness trains and saves."""
    attacker = pytest.importorskip("robustness.attacker", reason="robustness is not installed")
    return attacker.AttackerModel(net, SimpleNamespace(mean=MEAN, std=STD)).eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, depth", [("ResNet18", "resnet18"), ("ResNet50", "resnet50")])
def test_robustness_checkpoints_give_the_logits_that_robustness_gives(name, depth, x, tmp_path):
    nets = pytest.importorskip("robustness.cifar_models.resnet", reason="robustness is not installed")
    net = perturb(getattr(nets, name)(num_classes=7)).eval()
    theirs = attacker_model(net)
    state = {f"module.{k}": v for k, v in theirs.state_dict().items()}  # DataParallel's prefix
    torch.save({"model": state, "epoch": 3, "optimizer": {}, "args": SimpleNamespace(eps=0.5)}, tmp_path / "r.pt")
    model = cem.load(tmp_path / "r.pt")
    assert model.config == dict(arch=depth, width=64, in_channels=3, num_classes=7) and model.extra["normalised"]
    torch.testing.assert_close(model(x), theirs.model(theirs.normalizer(x)), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("depth, factor", [(28, 4), (34, 10)])
def test_robustbench_wide_resnets(depth, factor, x, tmp_path):
    net = robustbench("wide_resnet").WideResNet(depth, widen_factor=factor, sub_block1=True)
    perturb(net).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pt")
    model = cem.load(tmp_path / "w.pt", mean=0.0, std=1.0)
    assert model.config["arch"] == f"wrn-{depth}-{factor}"
    torch.testing.assert_close(model(x[:1]), net(x[:1]), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"last": s}, lambda s: {"net": {"model." + k: v for k, v in s.items()}}]
)
def test_robustbench_resnets(wrap, x, tmp_path):
    net = perturb(robustbench("resnet").ResNet18()).eval()
    torch.save(wrap(net.state_dict() | {"mu": MEAN.view(1, 3, 1, 1), "sigma": STD.view(1, 3, 1, 1)}), tmp_path / "r.pt")
    torch.testing.assert_close(cem.load(tmp_path / "r.pt")(x), net(scaled(x)), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("stem, suffix", [(small_stem, ""), (lambda net: net, "-imagenet")])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_torchvision_networks_both_ways(name, stem, suffix, x, tmp_path):
    theirs, again = (stem(getattr(torchvision.models, name)(num_classes=5)).eval() for _ in range(2))
    torch.save(perturb(theirs).state_dict(), tmp_path / "t.pt")
    model = cem.load(tmp_path / "t.pt", mean=MEAN, std=STD)
    assert model.config["arch"] == name + suffix
    torch.testing.assert_close(model(x), theirs(scaled(x)), rtol=RTOL, atol=ATOL)
    assert not cem.load(tmp_path / "t.pt").extra["normalised"]
    cem.export(tmp_path / "e.pt", model, "torchvision")
    again.load_state_dict(torch.load(tmp_path / "e.pt", weights_only=True))
    torch.testing.assert_close(again(scaled(x)), theirs(scaled(x)), rtol=0, atol=0)


def test_export_to_robustness_and_back(x, tmp_path):
    nets = pytest.importorskip("robustness.cifar_models.resnet", reason="robustness is not installed")
    model = perturb(cem.ParametricCEM("resnet18", mean=MEAN, std=STD)).eval()
    cem.export(tmp_path / "r.pt", model, "robustness")
    theirs = attacker_model(nets.ResNet18())
    state = torch.load(tmp_path / "r.pt", weights_only=True)["model"]
    theirs.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    torch.testing.assert_close(theirs.model(theirs.normalizer(x)), model(x), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(cem.load(tmp_path / "r.pt")(x), model(x), rtol=0, atol=0)


def test_a_wide_resnet_goes_out_and_comes_back(x, tmp_path):
    model = perturb(cem.ParametricCEM("wrn-16-4", 6)).eval()
    cem.export(tmp_path / "w.pt", model)
    torch.testing.assert_close(cem.load(tmp_path / "w.pt", mean=0.5, std=0.25)(x), model(x), rtol=0, atol=0)


def test_an_exported_network_is_attacked_by_torchattacks(x, tmp_path):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model = perturb(cem.ParametricCEM("resnet18", 5, mean=MEAN, std=STD)).eval()
    cem.export(tmp_path / "e.pt", model)
    net = small_stem(torchvision.models.resnet18(num_classes=5)).eval()
    net.load_state_dict(torch.load(tmp_path / "e.pt", weights_only=True))
    attack = torchattacks.PGDL2(net, eps=0.5, alpha=0.2, steps=3, random_start=False)
    attack.set_normalization_used(mean=MEAN.tolist(), std=STD.tolist())
    y = torch.tensor([0, 1])
    theirs = attack(scaled(x), y) * STD.view(-1, 1, 1) + MEAN.view(-1, 1, 1)
    ours = cem.pgd(cem.potential("ce", model, y), x, eps=0.5, step_size=0.2, steps=3, random_start=False)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)  # three steps amplify rounding errors


class Schedule:
    """What pickles of other codebases carry: their own classes."""

    def __init__(self):
        self.step = print


def state_dict():
    return {k: v for k, v in perturb(cem.ParametricCEM("resnet18", 3)).net.state_dict().items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_objects_in_a_file_become_nothing(zipped, tmp_path):
    content = {"model": state_dict(), "schedule": Schedule(), "print": print, "args": SimpleNamespace(a=Schedule())}
    content["best"] = np.float64(0.5)
    torch.save(content, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    assert cem.load(tmp_path / "f.pt").config["num_classes"] == 3
    assert foreign.read(tmp_path / "f.pt")["schedule"].__name__ == "Inert"


def test_functions_that_dill_wrote_become_nothing(tmp_path):
    """robustness's own files are pickled with dill, functions included."""
    dill = pytest.importorskip("dill", reason="dill is not installed")
    content = {"model": state_dict(), "schedule": lambda epoch: 0.1 * epoch, "type": Schedule}
    torch.save(content, tmp_path / "d.pt", pickle_module=dill)
    assert cem.load(tmp_path / "d.pt").config["num_classes"] == 3


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped, tmp_path):
    content = {"model": state_dict(), "x": Hostile(tmp_path / "made")}
    torch.save(content, tmp_path / "h.pt", _use_new_zipfile_serialization=zipped)
    try:
        cem.load(tmp_path / "h.pt")
    except cem.CEMError:
        pass
    assert files(tmp_path) == ["h.pt"]


WIDE = "block1.layer.0.conv1.weight"
SMALL, LOOP = state_dict(), {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"a.weight": torch.ones(2)}}, "no state dict"),
        ([1, 2], "no state dict"),
        ({"teacher": SMALL, "student": SMALL}, "several networks ('teacher', 'student')"),
        (SMALL | {"mu": torch.tensor(125.3), "sigma": torch.tensor(63.0)}, "in [0, 1]"),
        ({k: v for k, v in SMALL.items() if k != "fc.bias"}, "nothing"),  # as where the last layer is normalised
        ({"conv1.weight": torch.ones(()), "fc.weight": torch.ones(())}, "cannot be told"),
        (LOOP, "no state dict"),
        (torchvision.models.resnext50_32x4d().state_dict(), "nearest to resnet50-imagenet"),
        ({"features.conv1.weight": torch.ones(4, 3, 3, 3)}, "cannot be told"),
        ({"conv1.weight": torch.ones(64, 3, 3, 3), "fc.weight": torch.ones(5, 9), WIDE: torch.ones(7, 1)}, "cannot be told"),
    ],
)
def test_files_that_cannot_be_told(content, message, tmp_path):
    torch.save(content, tmp_path / "f.pt")
    done = script("sample.py", "--ckpt", "f.pt", "--dataset", "digits", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "f.pt" in done.stderr and files(tmp_path) == ["f.pt"]


def test_a_foreign_checkpoint_is_sampled_evaluated_and_its_png_files_are_read(tmp_path):
    """The whole way in scripts: no normalisation in the file, seeds and class names from the dataset."""
    torch.manual_seed(0)
    torch.save({"state_dict": perturb(cem.ParametricCEM("resnet18", 10, 8, 1)).net.state_dict()}, tmp_path / "f.pt")
    done = script("sample.py", "--ckpt", "f.pt", "--n", 20, cwd=tmp_path)
    assert done.returncode == 2 and "name its --dataset" in done.stderr and files(tmp_path) == ["f.pt"]
    arguments = ["--ckpt", "f.pt", "--dataset", "digits", "--n", 20, "--sampler", "rcs", "--png", "pictures"]
    done = script("sample.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "does not say how pixels are normalised: as digits" in done.stdout, done.stderr
    record = json.loads((tmp_path / "f/samples-rcs.json").read_text())
    assert record["dataset"] == "digits" and len(record["classes"]) == 10
    assert "of 500 images of digits are classified as labelled" in done.stdout and "warning" in done.stderr
    with np.load(tmp_path / "f/samples-rcs.npz") as arrays:
        assert record["mean"] and record["std"]
        for i, (image, label) in enumerate(zip(arrays["arr_0"], arrays["arr_1"])):
            for path in (tmp_path / f"pictures/{i:02d}.png", tmp_path / f"pictures/{label}/{i:02d}.png"):
                np.testing.assert_array_equal(np.asarray(Image.open(path)), image[:, :, 0])
    again = script("sample.py", *arguments, cwd=tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr
    told = ["--mean", 0.3, "--std", 0.4]
    done = script("train_sup.py", "--evaluate", "--dataset", "digits", "--ckpt", "f.pt", *told, cwd=tmp_path)
    assert done.returncode == 0 and "normalised" not in done.stdout, done.stderr
    for bad in (["--mean", 0.3], ["--mean", 0.3, "--std", 0], ["--mean", 1, 2, "--std", 1, 2], ["--mean", 99, "--std", 60]):
        done = script("sample.py", "--ckpt", "f.pt", "--dataset", "digits", *bad, cwd=tmp_path)
        assert done.returncode == 2 and "mean and std" in done.stderr
    cem.save(tmp_path / "own.pt", cem.ParametricCEM("resnet18", 10, 4, 1))
    with pytest.raises(cem.CEMError, match="other codebases"):
        cem.load(tmp_path / "own.pt", mean=0.0, std=1.0)


def test_class_names_of_a_file_lead_nowhere(tmp_path):
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3)
    pictures.write_files(tmp_path / "out", images, labels, ["../up", "/tmp/absolute", ".."])
    assert len(files(tmp_path)) == 6 and all(name.startswith("out/") for name in files(tmp_path))


def test_exports_that_cannot_be(tmp_path):
    model = cem.ParametricCEM("wrn-16-4", 3)
    for network, format in [(model, "onnx"), (model, "robustness"), (cem.folded(model), "torchvision")]:
        with pytest.raises(cem.CEMError):
            cem.export(tmp_path / "e.pt", network, format)
    with pytest.raises(cem.CEMError, match="classifiers"):
        cem.export(tmp_path / "e.pt", cem.NonParametricCEM("resnet18", width=4))
    assert files(tmp_path) == []


def test_cem_alone_says_what_it_lacks(tmp_path):
    """cem.py copied into a project of one's own, and given a checkpoint that it cannot read without foreign.py."""
    (tmp_path / "cem.py").write_text((Path(cem.__file__)).read_text())
    torch.save(state_dict(), tmp_path / "f.pt")
    (tmp_path / "use.py").write_text("import cem\ntry: cem.load('f.pt')\nexcept cem.CEMError as e: print(e)\n")
    done = process(tmp_path / "use.py", cwd=tmp_path)
    assert "foreign.py" in done.stdout, done.stderr
