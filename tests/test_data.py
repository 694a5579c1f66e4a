"""lib/data.py: splits, valid and invalid image folders, augmentations as functions of draws."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_refused, files, script
from PIL import Image

import cem
from lib import augment, cli, data, pictures


def write_folder(root, size=10, per_class=3, mode="RGB"):
    shape = (size, size) if mode == "L" else (size, size, 3)
    for split in ("train", "test"):
        for k, name in enumerate(["ant", "bee"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                generator = np.random.default_rng([k, i, split == "test"])
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_digits_split_is_fixed_and_stratified():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.dtype == torch.uint8
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.max() == 255
    assert not train.flip
    assert train.classes == list("0123456789")
    assert test.labels.bincount().min() >= 34
    assert test.labels.bincount().max() <= 38
    assert torch.equal(train.images, data.load("digits", "train").images)


def test_digits_splits_contain_every_image_once():
    from sklearn.datasets import load_digits

    splits = [data.load("digits", split).images for split in ("train", "test")]
    pixels = (torch.cat(splits).flatten(1).double() / 255 * 16).round()
    original = torch.from_numpy(load_digits().data)
    assert sorted(pixels.tolist()) == sorted(original.tolist())


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_image_folder(tmp_path, mode, channels):
    root = write_folder(tmp_path / "set", mode=mode)
    train = data.load(str(root), "train")
    assert train.images.shape == (6, channels, 10, 10)
    assert train.images.is_contiguous()
    assert train.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(root / "train" / "bee" / "1.png")).reshape(10, 10, channels)
    assert torch.equal(train.images[4].permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert torch.equal(train.pixels(torch.tensor([4])), train.images[4:5].float() / 255)


def test_greyscale_images_among_colour_images_become_rgb(tmp_path):
    root = write_folder(tmp_path / "set")
    Image.new("L", (10, 10), 7).save(root / "train" / "ant" / "0.png")
    assert (data.load(str(root), "train").images[0] == 7).all()


def different_size(root):
    Image.new("RGB", (12, 10)).save(root / "train" / "bee" / "1.png")


def damaged_file(root):
    file = root / "train" / "bee" / "2.png"
    file.write_bytes(file.read_bytes()[:60])


def no_test_images(root):
    for file in (root / "test").rglob("*.png"):
        file.unlink()


def different_classes(root):
    (root / "test" / "bee").rename(root / "test" / "wasp")


def not_square(root):
    for file in root.rglob("*.png"):
        Image.new("RGB", (12, 10)).save(file)


BAD_FOLDERS = [
    (different_size, "bee/1.png is 12x10"),
    (damaged_file, "bee/2.png"),
    (no_test_images, "test is not an image folder"),
    (different_classes, "different classes"),
    (not_square, "square"),
    (lambda root: shutil.rmtree(root / "train"), "train is not an image folder"),
]


@pytest.mark.parametrize("spoil, message", BAD_FOLDERS)
def test_errors_name_what_is_wrong_with_an_image_folder(spoil, message, tmp_path):
    write_folder(tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(cem.CEMError, match=message):
        data.load(str(tmp_path / "set"), "train")


def test_splits_of_different_shapes_are_refused(tmp_path):
    root = write_folder(tmp_path / "set")
    for file in (root / "test").rglob("*.png"):
        Image.new("RGB", (12, 12)).save(file)
    with pytest.raises(cem.CEMError, match=r"\(3, 10, 10\), test images \(3, 12, 12\)"):
        data.splits(str(root), "data", "cpu")


def test_error_for_an_unknown_dataset_lists_the_known_ones():
    with pytest.raises(cem.CEMError, match="unknown dataset 'mnist'.*cifar10"):
        data.load("mnist", "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_error_for_a_failed_download_names_the_alternatives(name, tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(cem.CEMError, match="--dataset digits.*image folder"):
        data.load(name, "train", str(tmp_path))


def test_checkpoint_info_is_what_sampling_needs():
    train = data.load("digits", "train")
    info = train.checkpoint_info(rank=4)
    assert info["dataset"] == "digits"
    assert info["classes"] == train.classes
    assert info["image_shape"] == [1, 8, 8]
    seeds = cem.GaussianSeeds.from_state_dict(info["seeds"])
    assert seeds.sample(torch.arange(10)).shape == (10, 1, 8, 8)


def test_draws_depend_only_on_seed_and_epoch():
    order, u = augment.draws(50, 3, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(50))
    assert u.shape == (50, 3)
    assert u.min() >= 0 and u.max() < 1
    same_order, same_u = augment.draws(50, 3, seed=1, epoch=2)
    assert torch.equal(order, same_order) and torch.equal(u, same_u)
    for seed, epoch in [(1, 3), (2, 2)]:
        assert not torch.equal(u, augment.draws(50, 3, seed, epoch)[1])


@pytest.mark.parametrize(
    "flip, padding, share",
    [(False, "constant", 1 / 8), (True, "constant", 1 / 16), (True, "reflect", 1 / 4)],
)
def test_crop_flip_equals_torchvision(flip, padding, share):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 3, 16, 16, generator=generator)
    u = torch.rand(20, 3, generator=generator)
    ours, pad = augment.crop_flip(x, u, flip=flip, padding=padding, share=share), int(16 * share)
    functional = torchvision.transforms.functional
    for image, output, (top, left, mirror) in zip(x, ours, u.tolist()):
        padded = functional.pad(image, pad, padding_mode=padding)
        offset = int(top * (2 * pad + 1)), int(left * (2 * pad + 1))
        expected = functional.crop(padded, *offset, 16, 16)
        if flip and mirror >= 0.5:
            expected = functional.hflip(expected)
        assert torch.equal(output, expected)


def test_mirror_is_crop_flip_at_the_centre():
    x, u = torch.rand(6, 3, 16, 16), torch.rand(6, 3)
    u[:, :2] = 0.5  # the offset of the padding
    for flip in (True, False):
        assert torch.equal(augment.mirror(x, u, flip), augment.crop_flip(x, u, flip=flip))


def test_crop_flip_treats_each_image_on_its_own():
    x, u = torch.rand(8, 1, 8, 8), torch.rand(8, 3)
    assert torch.equal(augment.crop_flip(x, u)[3:5], augment.crop_flip(x[3:5], u[3:5]))


@pytest.mark.parametrize("size", [(40, 24), (17, 17), (9, 30)])
def test_image_size_resizes_the_shorter_side_antialiased_and_crops_the_centre(size, tmp_path):
    root = write_folder(tmp_path / "set", size=16)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(root / "train/ant/0.png")
    loaded = data.load(str(root), "train", image_size=16).images
    assert loaded.shape == (6, 3, 16, 16)
    scale = 16 / min(size)
    width, height = (int(side * scale) for side in size)  # PIL's bilinear filter is antialiased
    small = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    expected = torch.from_numpy(small[top : top + 16, left : left + 16].copy())
    assert torch.equal(loaded[0].permute(1, 2, 0), expected)
    others = data.load(str(write_folder(tmp_path / "other", 16)), "train").images
    assert torch.equal(loaded[1:], others[1:])


def test_image_size_of_a_named_dataset_is_refused():
    with pytest.raises(cem.CEMError, match="--image-size is for image folders"):
        data.load("digits", "train", image_size=16)


def test_splits_are_downloaded_one_after_the_other(tmp_path, monkeypatch):
    """SVHN has one file per split."""

    def svhn(root, split, download=False):
        if download:
            (Path(root) / split).write_text("")
        elif not (Path(root) / split).exists():
            raise RuntimeError("not found")
        return SimpleNamespace(data=np.zeros((20, 3, 32, 32), np.uint8), labels=[*range(10)] * 2)

    monkeypatch.setattr("lib.data.datasets.SVHN", svhn)
    with contextlib.ExitStack() as at_end:
        monkeypatch.setattr(cli, "AT_END", at_end)
        train, test = data.splits("svhn", str(tmp_path / "data"), "cpu")
    assert len(train) == len(test) == 20 and files(tmp_path) == ["data/test", "data/train"]


def test_a_grey_split_has_three_channels_if_the_other_has_colours(tmp_path):
    write_folder(tmp_path / "train-only", mode="L")
    Image.new("RGB", (10, 10), "red").save(tmp_path / "train-only/train/ant/0.png")
    train, test = (data.load(str(tmp_path / "train-only"), split) for split in ("train", "test"))
    assert train.images.shape == test.images.shape == (6, 3, 10, 10)
    assert torch.equal(test.images[:, 0], test.images[:, 2])
    grey = data.load(str(write_folder(tmp_path / "grey", mode="L")), "test").images
    assert torch.equal(test.images[:, :1], grey)


def test_photos_are_upright(tmp_path):
    root = write_folder(tmp_path / "set")
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(root / "train/ant/0.png", exif=exif)
    found = data.load(str(root), "train").images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.rot90(pixels, -1))


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    """Pillow would clip them."""
    root = write_folder(tmp_path / "deep", mode="L")
    pixels = np.arange(100, dtype=np.uint16).reshape(10, 10) * 600
    Image.fromarray(pixels).save(root / "train/ant/1.png")
    with pytest.raises(cem.CEMError, match="ant/1.png: it has more than 8 bits"):
        data.load(str(root), "train")


def test_a_second_download_into_one_folder_is_refused_and_an_existing_dataset_is_read(
    tmp_path, monkeypatch
):
    calls = []

    def cifar(root, train, download=False):
        calls.append(download)
        if not (tmp_path / "data/cifar").exists():
            if not download:
                raise RuntimeError("not found")
            (tmp_path / "data/cifar").write_text("")
        pixels = np.zeros((20, 32, 32, 3), np.uint8)
        names = [str(i) for i in range(10)]
        return SimpleNamespace(data=pixels, targets=[*range(10)] * 2, classes=names)

    monkeypatch.setattr("lib.data.datasets.CIFAR10", cifar)
    monkeypatch.setattr(cli, "AT_END", contextlib.ExitStack())
    root = tmp_path / "data"
    root.mkdir()
    descriptor = os.open(root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(cem.CEMError, match="another process is downloading"):
        data.load("cifar10", "train", str(root))
    os.close(descriptor)
    assert data.load("cifar10", "train", str(root)).images.shape == (20, 3, 32, 32)
    assert data.load("cifar10", "test", str(root)).labels.tolist() == [*range(10)] * 2
    assert calls == [False, False, True, False]


def test_cifar_images_are_upright_and_may_be_mirrored(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    raw = SimpleNamespace(data=pixels, targets=[0, 1, 2, 3], classes=list("abcd"))
    monkeypatch.setattr("lib.data.datasets.CIFAR10", lambda *_, **__: raw)
    train = data.load("cifar10", "train", str(tmp_path))
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), pixels) and train.flip


def test_normalisation_is_the_mean_and_deviation_of_each_channel():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 4
    images[:, 2] = 51  # a constant channel
    found = data.Dataset("set", images, torch.zeros(50).long(), ["a"]).normalisation()
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["mean"].double(), pixels.mean(1), **close)
    torch.testing.assert_close(found["std"].double(), pixels.std(1).clamp_min(0.01), **close)


def test_images_of_a_folder_count_once_and_are_shuffled(tmp_path):
    """sample.py --png writes them into the folder, and again into subfolders."""
    levels = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(-1, 1, 8, 8)
    pictures.write_files(tmp_path / "p", levels, torch.arange(20) // 10, ["a", "b"])
    for remove in (False, True):
        if remove:
            for path in (tmp_path / "p").glob("*.png"):
                path.unlink()
        found = data.read_samples(tmp_path / "p")[0][:, 0, 0, 0].tolist()
        assert sorted(found) == [*range(20)] != found


def test_other_names_of_the_classes_are_a_warning(model, capsys):
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    dataset = data.Dataset("new", images, torch.arange(5), list("abcde"))
    model.extra = {"classes": list("abcde")}
    dataset.check_fits(model, "m.pt")
    assert not capsys.readouterr().err
    model.extra = {"classes": list("abdce")}
    dataset.check_fits(model, "m.pt")
    assert "classes of m.pt and of new differ: d/c, c/d" in capsys.readouterr().err


def test_one_class_or_one_test_image_is_too_few(digits_run, tmp_path):
    root = write_folder(tmp_path / "set", size=8, mode="L")
    for split in ("train", "test"):
        shutil.rmtree(root / split / "bee")
    ckpt = digits_run / "runs/sup/ckpt.pt"
    done = script("eval_robust.py", "--ckpt", ckpt, "--dataset", root, "--out", "o", cwd=tmp_path)
    assert_refused(done, "set has one class: accuracy needs two")
    done = script("train_sup.py", "--dataset", root, "--width", 8, cwd=tmp_path)
    assert_refused(done, "set has one class: use train_unsup.py")
    for path in sorted((root / "test/ant").iterdir())[1:]:
        path.unlink()
    done = script("train_unsup.py", "--dataset", root, "--width", 8, cwd=tmp_path)
    assert_refused(done, "set has one test image: measurements need two")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "o").exists()


def test_images_that_are_resized_are_counted(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", size=8)
    n = len(data.load(str(folder), "train", image_size=8))
    assert "resized" not in capsys.readouterr().out  # they have that size
    data.load(str(folder), "train", image_size=12)
    assert f"resized and cropped {n} of {n} images to size 12" in capsys.readouterr().out
