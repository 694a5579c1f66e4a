"""Datasets as uint8 tensors on the device."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tv

import cem
from lib import cli, distributed, files

NAMES = ("cifar10", "cifar100", "svhn", "digits")
HELP = f"{', '.join(NAMES)}, or image folder PATH with train/<class>/* and test/<class>/*"
DIR_HELP = "folder of the downloaded datasets"
IMAGE_SIZE = "resize and crop a folder's images to this height and width; 0: as they are"


def evenly_spaced(n: int, total: int, device="cpu") -> Tensor:
    """The indices of n evenly spaced images out of `total`; of all if n is 0 or larger."""
    n = min(n or total, total)
    return torch.arange(n, device=device) * total // max(n, 1)


def shuffled(n: int) -> Tensor:
    """A fixed permutation of range(n). sample.py's images cycle through the classes, and a regular
    choice of them could be of one class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


@dataclass
class Dataset:
    """Images uint8 (N, C, H, W), labels int64 (N,); flip: whether mirroring preserves the class."""

    name: str
    images: Tensor
    labels: Tensor
    classes: list[str]
    flip: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> "Dataset":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, rows: Tensor) -> "Dataset":
        """The dataset of the images at these indices, or where this mask (N,) is set."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def evenly_spaced(self, n: int) -> Tensor:
        """Indices of n evenly spaced images, as folders are sorted by class; of all if n is 0."""
        return evenly_spaced(n, len(self), self.images.device)

    def hold_out(self, n: int) -> tuple["Dataset", "Dataset"]:
        """n evenly spaced images, and the others."""
        held_out = torch.zeros(len(self), dtype=torch.bool, device=self.images.device)
        held_out[self.evenly_spaced(n)] = True
        return self.subset(held_out), self.subset(~held_out)

    def share(self, part: float) -> "Dataset":
        """A share `part`, in (0, 1], of each class, evenly spaced; at least two images of it."""
        index = []
        for k in range(len(self.classes)):
            rows = (self.labels == k).nonzero()[:, 0]
            n = max(math.ceil(part * len(rows) - 1e-9), 2)
            index.append(rows[evenly_spaced(n, len(rows), rows.device)])
        return self.subset(torch.cat(index).sort().values)

    def normalisation(self) -> dict[str, Tensor]:
        """Mean and std of each channel, (C,), for pixels in [0, 1], over up to 10,000 images."""
        pixels = self.images[self.evenly_spaced(10_000)].float().div_(255)
        std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
        return {"mean": mean, "std": std.clamp_min(0.01)}

    def checkpoint_info(self, rank: int) -> dict:
        """What a checkpoint stores about its training set; `rank` is that of its seeds."""
        bar = partial(cli.progress, name="seeds", unit="class")
        seeds = cem.GaussianSeeds.fit(self.images, self.labels, rank, len(self.classes), bar)
        info = {"dataset": self.name, "classes": self.classes, "seeds": seeds.state_dict()}
        return info | {"image_shape": list(self.images.shape[1:]), "num_images": len(self)}

    def check_fits(self, model, path) -> None:
        """Raise CEMError unless image size and, of a classifier, number of classes are the model's.
        Warns if its classes have other names."""
        shape, classes = list(self.images.shape[1:]), len(self.classes)
        own = model.extra.get("image_shape") or [model.config["in_channels"], *shape[1:]]
        differs = f"{path} is for images of {own}, but {self.name} has {shape}"
        cem.require(own == shape, f"{differs}: pass its --dataset and --image-size")
        own = model.config.get("num_classes", classes)
        differs = f"{path} has {own} classes, but {self.name} has {classes}"
        cem.require(own == classes, f"{differs}: pass its --dataset")
        own = model.extra.get("classes") or self.classes
        if "num_classes" in model.config and own != self.classes:
            pairs = [f"{a}/{b}" for a, b in zip(own, self.classes) if a != b]
            cli.warn(f"classes of {path} and of {self.name} differ: {', '.join(pairs[:3])}")

    def pixels(self, index=slice(None)) -> Tensor:
        """The images at `index` as floats in [0, 1], in channels_last memory format."""
        return self.images[index].float().div_(255).contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------- datasets


def load(name: str, split: str, data_dir: str = "data", image_size: int = 0) -> Dataset:
    """The "train" or "test" split of a named dataset or of an image folder.

    image_size: a folder's images are resized, antialiased, so that their shorter side has this
    length, and cropped at the centre to a square; 0: they stay as they are. Raises CEMError if the
    dataset is unknown, not available or malformed.
    """
    fixed = f"--image-size is for image folders: {name} has images of one size"
    cem.require(image_size == 0 or name not in NAMES, fixed)
    if name == "digits":
        return _digits(split)
    if name in NAMES:
        return _torchvision(name, split, data_dir)
    if Path(name).is_dir():
        return _folder(Path(name), split, image_size)
    raise cem.CEMError(f"unknown dataset {name!r}: not a folder and not one of {', '.join(NAMES)}")


def exists(name: str) -> bool:
    """Whether this names a dataset, or a folder with the two splits of one."""
    return name in NAMES or Path(name, "train").is_dir()


def images(name: str, split: str, data_dir: str, image_size: int = 0) -> Tensor:
    """The images (N, C, H, W) of a dataset's split, of a folder of images or of an npz file."""
    if exists(name) or not Path(name).exists():
        return load(name, split, data_dir, image_size).images
    return read_samples(Path(name), image_size)[0]


def splits(name: str, data_dir: str, device, image_size: int = 0) -> tuple[Dataset, Dataset]:
    """Both splits, on the device. Raises CEMError if their images differ in shape."""
    train, test = (load(name, part, data_dir, image_size).to(device) for part in ("train", "test"))
    shapes = [tuple(dataset.images.shape[1:]) for dataset in (train, test)]
    differ = f"training images have shape {shapes[0]}, test images {shapes[1]}"
    cem.require(shapes[0] == shapes[1], f"{name}: {differ}: --image-size makes them equal")
    return train, test


def _digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, test = train_test_split(indices, test_size=360, stratify=digits.target, random_state=0)
    rows = test if split == "test" else train
    images = torch.from_numpy((digits.images[rows] * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(digits.target[rows]).long()
    return Dataset("digits", images[:, None], labels, list("0123456789"), flip=False)


@distributed.first_then_others()  # only one process downloads
def _torchvision(name: str, split: str, data_dir: str) -> Dataset:
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN}
    part = split if name == "svhn" else split == "train"
    try:
        try:
            raw = dataset[name](data_dir, part)
        except RuntimeError:  # not found
            files.make_folder(Path(data_dir))
            busy = f"another process is downloading to {data_dir}: try later"
            bar = partial(cli.progress, None, name)  # torchvision's own has no option
            with ExitStack() as done, mock.patch.object(datasets.utils, "tqdm", bar):
                files.lock(Path(data_dir), busy, done)
                raw = dataset[name](data_dir, part, download=True)
        images = torch.from_numpy(raw.data)
        if name == "svhn":
            labels, classes = raw.labels, list("0123456789")
        else:
            images = images.permute(0, 3, 1, 2)
            labels, classes = raw.targets, raw.classes
    except cem.CEMError:
        raise
    except Exception as error:  # download, archive and unpickling fail with errors of any type
        reason = f"its download failed ({type(error).__name__}: {error})"
        advice = "use --dataset digits, which needs no network, or an image folder"
        raise cem.CEMError(f"{name} not found in {data_dir}, and {reason}: {advice}") from error
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Dataset(name, images.contiguous(), labels, classes, flip=name != "svhn")


def _folder(root: Path, split: str, image_size: int) -> Dataset:
    listings = {}
    for part in ("train", "test"):
        try:
            listings[part] = datasets.ImageFolder(root / part)
        except OSError as error:
            failed = f"{root / part} is not an image folder <class>/*"
            raise cem.CEMError(f"{failed}: {str(error).splitlines()[0]}") from error
    differing = set(listings["train"].classes) ^ set(listings["test"].classes)
    names = ", ".join(sorted(differing)[:5])
    cem.require(not differing, f"{root}: train and test have different classes ({names})")
    listing = listings.pop(split)
    images = read_images([path for path, _ in listing.samples], image_size)
    others = (path for other in listings.values() for path, _ in other.samples)
    if images.shape[1] == 1 and any(_read_image(path, 0)[0].mode == "RGB" for path in others):
        images = images.repeat(1, 3, 1, 1)  # both splits have as many channels
    height, width = images.shape[2:]
    sizes = f"must be square and at least 8x8, not {width}x{height}"
    cem.require(height == width >= 8, f"{root}: images {sizes}: --image-size resizes and crops")
    return Dataset(str(root), images, torch.tensor(listing.targets), listing.classes)


def read_images(paths: list[str], image_size: int = 0) -> Tensor:
    """Image files as uint8 (N, C, H, W); C is 1 if all are greyscale, else 3.

    image_size: as in `load`. Raises CEMError naming a file that is damaged or differs in size from
    most others.
    """
    with ThreadPoolExecutor() as pool:
        read = pool.map(partial(_read_image, image_size=image_size), paths)
        images, resized = zip(*cli.progress(read, "images", total=len(paths), unit="image"))
    if any(resized):
        print(f"resized and cropped {sum(resized)} of {len(paths)} images to size {image_size}")
    width, height = Counter(image.size for image in images).most_common(1)[0][0]
    for path, image in zip(paths, images):
        if image.size != (width, height):
            differs = f"{path} is {image.size[0]}x{image.size[1]}, others are {width}x{height}"
            raise cem.CEMError(f"{differs}: --image-size resizes and crops a dataset's images")
    mode = "RGB" if any(image.mode == "RGB" for image in images) else "L"
    stacked = torch.empty(len(images), len(mode), height, width, dtype=torch.uint8)
    for pixels, image in zip(stacked, images):
        pixels.copy_(tv.pil_to_tensor(image.convert(mode)))
    return stacked


def _read_image(path: str, image_size: int) -> tuple[Image.Image, bool]:
    """The image, and whether it had another size."""
    cem.require(Path(path).is_file(), f"cannot read the image {path}: it is not a regular file")
    try:
        with Image.open(path) as image:
            cem.require(image.mode[0] not in "IF", "it has more than 8 bits")  # clipped by convert
            image = ImageOps.exif_transpose(image)  # upright, as it is shown elsewhere
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        resized = image_size > 0 and image.size != (image_size, image_size)
        if resized:
            image = tv.center_crop(tv.resize(image, [image_size], antialias=True), [image_size])
        return image, resized
    except Exception as error:  # decoders of damaged files fail with errors of any type
        reason = str(error) or type(error).__name__
        raise cem.CEMError(f"cannot read the image {path}: {reason}") from error


# --------------------------------------------------------------------------------------- samples


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """-> images uint8 (N, C, H, W) and labels (N,), -1 if the file has none."""
    cem.require(path.is_file(), f"samples {path} not found: run sample.py first")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1") if name in file}
    except Exception as error:  # a damaged archive can fail in any way
        raise cem.CEMError(f"cannot read the samples {path}: {error}") from error
    cem.require("arr_0" in arrays, f"{path} contains no images (arr_0)")
    images = arrays["arr_0"]
    labels = arrays.get("arr_1", np.full(images.shape[:1], -1))
    if images.dtype.kind == "f":
        inside = bool(((images >= 0) & (images <= 1)).all())
        cem.require(inside, f"{path}: arr_0 is float, but not in [0, 1]")
        images = (255 * images).round().astype(np.uint8)
    cem.require(labels.dtype.kind in "iu", f"{path}: arr_1 must contain integer labels")
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    fits = fits and len(images) > 0 and labels.shape == images.shape[:1]
    wanted = "uint8, or float in [0, 1], (N, H, W, C) with C = 1 or 3, and arr_1 (N,)"
    cem.require(fits, f"{path}: arr_0 must be {wanted}")
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


def read_samples(path: Path, image_size: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels, as of `read_npz`, of an npz file or an image folder, resized as in `load`.

    A folder's images, or those in subfolders if it has none, are shuffled: where file names sort
    them by class, each split of IS would contain one class.
    """
    if not path.is_dir():
        return read_npz(path)
    found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    cem.require(bool(found), f"{path} contains no images")
    paths = [name for name in found if Path(name).parent == path] or found
    paths = [paths[i] for i in shuffled(len(paths))]
    return read_images(paths, image_size), torch.full((len(paths),), -1)
