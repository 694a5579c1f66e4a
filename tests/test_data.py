"""data.py: the splits, image folders in good and in bad order, and augmentations as functions of their draws."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cem
import data


def write_folder(root, size=10, per_class=3, mode="RGB"):
    for split in ("train", "test"):
        for k, name in enumerate(["ant", "bee"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                shape = (size, size) if mode == "L" else (size, size, 3)
                pixels = np.random.default_rng([k, i, split == "test"]).integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_digits_are_split_fixed_and_stratified():
    train, test = (data.load("digits", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (1, 8, 8) and train.images.max() == 255
    assert not train.flip and train.classes == list("0123456789")
    assert test.labels.bincount().min() >= 34 and test.labels.bincount().max() <= 38
    # every digit of the original set is in one split, once
    both = torch.cat([train.images, test.images]).flatten(1).double() / 255 * 16
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().data)
    assert torch.equal(both.round().sum(0), original.sum(0))
    assert torch.equal(train.images, data.load("digits", "train").images)


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_image_folder(tmp_path, mode, channels):
    root = write_folder(tmp_path / "set", mode=mode)
    train = data.load(str(root), "train")
    assert train.images.shape == (6, channels, 10, 10) and train.images.is_contiguous()
    assert train.classes == ["ant", "bee"] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(root / "train" / "bee" / "1.png")).reshape(10, 10, channels)
    assert torch.equal(train.images[4].permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert torch.equal(train.pixels(torch.tensor([4])), train.images[4:5].float() / 255)


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    root = write_folder(tmp_path / "set")
    Image.new("L", (10, 10), 7).save(root / "train" / "ant" / "0.png")
    assert (data.load(str(root), "train").images[0] == 7).all()


def bad_folders(root):
    def odd(path):
        Image.new("RGB", (12, 10)).save(path / "train" / "bee" / "1.png")
        return "bee/1.png is 12x10"

    def corrupt(path):
        file = path / "train" / "bee" / "2.png"
        file.write_bytes(file.read_bytes()[:60])
        return "bee/2.png"

    def no_test(path):
        for file in (path / "test").rglob("*.png"):
            file.unlink()
        return "test holds no image folder"

    def other_classes(path):
        (path / "test" / "bee").rename(path / "test" / "wasp")
        return "different classes"

    def not_square(path):
        for file in path.rglob("*.png"):
            Image.new("RGB", (12, 10)).save(file)
        return "square"

    for spoil in (odd, corrupt, no_test, other_classes, not_square):
        path = write_folder(root / spoil.__name__)
        yield path, spoil(path)
    (root / "empty").mkdir()
    yield root / "empty", "holds no image folder"


def test_bad_image_folders_are_named(tmp_path):
    for path, message in bad_folders(tmp_path):
        with pytest.raises(cem.CEMError, match=message):
            data.load(str(path), "train")


def test_splits_of_different_shape_are_refused(tmp_path):
    root = write_folder(tmp_path / "set")
    for file in (root / "test").rglob("*.png"):
        Image.new("RGB", (12, 12)).save(file)
    with pytest.raises(cem.CEMError, match="3 x 10 x 10, the test images 3 x 12 x 12"):
        data.splits(str(root), "data", "cpu")


def test_unknown_dataset_names_the_known():
    with pytest.raises(cem.CEMError, match="unknown dataset 'mnist'.*cifar10"):
        data.load("mnist", "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_dataset_that_cannot_be_downloaded_names_the_ways_out(name, tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(cem.CEMError, match="--dataset digits.*image folder"):
        data.load(name, "train", str(tmp_path))


def test_draws_depend_on_seed_and_epoch_alone():
    order, u = data.draws(50, 3, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(50)) and u.shape == (50, 3) and 0 <= u.min() and u.max() < 1
    assert all(torch.equal(a, b) for a, b in zip((order, u), data.draws(50, 3, 1, 2)))
    for seed, epoch in [(1, 3), (2, 2)]:
        assert not torch.equal(u, data.draws(50, 3, seed, epoch)[1])


@pytest.mark.parametrize("flip, padding", [(False, "constant"), (True, "constant"), (True, "reflect")])
def test_crop_flip_equals_torchvisions_functions(flip, padding):
    generator = torch.Generator().manual_seed(0)
    x, u = torch.rand(20, 3, 16, 16, generator=generator), torch.rand(20, 3, generator=generator)
    ours = data.crop_flip(x, u, flip=flip, padding=padding)
    f = torchvision.transforms.functional
    for image, out, (a, b, c) in zip(x, ours, u.tolist()):
        expected = f.crop(f.pad(image, 2, padding_mode=padding), int(a * 5), int(b * 5), 16, 16)
        assert torch.equal(out, f.hflip(expected) if flip and c >= 0.5 else expected)


def test_crop_flip_of_one_image_does_not_depend_on_the_others():
    x, u = torch.rand(8, 1, 8, 8), torch.rand(8, 3)
    assert torch.equal(data.crop_flip(x, u)[3:5], data.crop_flip(x[3:5], u[3:5]))
