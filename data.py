"""Datasets as uint8 tensors on the device, and augmentations as batch tensor operations.

An augmentation is a function of the images and of uniform draws, a row an image, so that what happens to an image depends
on the seed, the epoch and its index alone: not on the batch, the device or the number of processes.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

import parallel
from cem import CEMError, GaussianSeeds

NAMES = ("cifar10", "cifar100", "svhn", "digits")
HELP = (
    "cifar10, cifar100 or svhn (downloaded to --data-dir at first use); digits (8x8, ships with scikit-learn, needs no "
    "network); or an image folder PATH with PATH/train/<class>/* and PATH/test/<class>/*"
)


@dataclass
class Dataset:
    """images uint8 (N, C, H, W), labels int64 (N,), classes: the K class names; flip: does a mirror image keep its class?"""

    name: str
    images: Tensor
    labels: Tensor
    classes: list[str]
    flip: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> "Dataset":
        return Dataset(self.name, self.images.to(device), self.labels.to(device), self.classes, self.flip)

    def spread(self, n: int) -> Tensor:
        """The indices of n images evenly spread over the set, all where it has fewer: folders are sorted by class."""
        n = min(n, len(self))
        return torch.arange(n, device=self.images.device) * len(self) // n

    def normalisation(self) -> dict[str, Tensor]:
        """mean and std of each channel, in [0, 1] units, over up to 10,000 images."""
        std, mean = torch.std_mean(self.images[self.spread(10_000)].float().div_(255), dim=(0, 2, 3))
        return {"mean": mean, "std": std.clamp_min(0.01)}

    def card(self, rank: int) -> dict:
        """What a checkpoint says of its training set, Gaussian seeds of that rank included: all that sampling needs."""
        seeds = GaussianSeeds.fit(self.images, self.labels, rank, len(self.classes)).state_dict()
        return {"dataset": self.name, "classes": self.classes, "image_shape": list(self.images.shape[1:]), "seeds": seeds}

    def pixels(self, index=slice(None)) -> Tensor:
        """The images as floats in [0, 1], in channels_last memory."""
        return self.images[index].float().div_(255).contiguous(memory_format=torch.channels_last)


def load(name: str, split: str, data_dir: str = "data") -> Dataset:
    """The "train" or "test" split of a named dataset or of an image folder. Raises CEMError where that cannot be had."""
    if name == "digits":
        return _digits(split)
    if name in NAMES:
        return _torchvision(name, split, data_dir)
    if Path(name).is_dir():
        return _folder(Path(name), split)
    raise CEMError(f"unknown dataset {name!r}: no such folder, and not one of {', '.join(NAMES)}")


def splits(name: str, data_dir: str, device) -> tuple[Dataset, Dataset]:
    """Both splits, on the device. Raises CEMError where their images differ in shape."""
    train, test = (load(name, split, data_dir).to(device) for split in ("train", "test"))
    if (a := train.images.shape[1:]) != (b := test.images.shape[1:]):
        a, b = (" x ".join(map(str, shape)) for shape in (a, b))
        raise CEMError(f"{name}: the training images are {a}, the test images {b}: one shape, please")
    return train, test


def _digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)[split == "test"]
    images = torch.from_numpy((digits.images[rows] * (255 / 16)).round().astype(np.uint8))
    return Dataset("digits", images[:, None], torch.from_numpy(digits.target[rows]), list("0123456789"), flip=False)


@parallel.first_then_others()  # one process downloads
def _torchvision(name: str, split: str, data_dir: str) -> Dataset:
    try:
        if name == "svhn":
            raw = torchvision.datasets.SVHN(data_dir, split, download=True)
            images, labels, classes = torch.from_numpy(raw.data), raw.labels, list("0123456789")
        else:
            kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
            raw = kind(data_dir, split == "train", download=True)
            images, labels, classes = torch.from_numpy(raw.data).permute(0, 3, 1, 2), raw.targets, raw.classes
    except Exception as error:  # torchvision raises whatever its download, archive and unpickling steps raise
        raise CEMError(
            f"{name} is not in {data_dir} and cannot be downloaded ({type(error).__name__}: {error}): "
            "use --dataset digits, which needs no network, or --dataset PATH of an image folder"
        ) from error
    return Dataset(name, images.contiguous(), torch.as_tensor(labels, dtype=torch.int64), classes, name != "svhn")


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except Exception as error:  # a damaged file can fail anywhere in its decoder
        raise CEMError(f"cannot read the image {path}: {error}") from error


def read_images(paths: list[str]) -> Tensor:
    """Image files -> uint8 (N, C, H, W); C = 1 where all are grey. Raises CEMError naming a damaged or odd-sized file."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_read_image, paths))
    size = Counter(image.size for image in images).most_common(1)[0][0]
    for path, image in zip(paths, images):
        if image.size != size:
            raise CEMError(f"{path} is {image.size[0]}x{image.size[1]}, the others {size[0]}x{size[1]}: one size, please")
    if any(image.mode == "RGB" for image in images):
        images = [image.convert("RGB") for image in images]
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked[:, None] if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def _folder(root: Path, split: str) -> Dataset:
    listing = []
    for part in ("train", "test"):
        try:
            listing.append(torchvision.datasets.ImageFolder(root / part))
        except (FileNotFoundError, OSError) as error:
            raise CEMError(f"{root / part} holds no image folder <class>/*: {str(error).splitlines()[0]}") from error
    if listing[0].classes != listing[1].classes:
        odd = ", ".join(sorted(set(listing[0].classes) ^ set(listing[1].classes))[:5])
        raise CEMError(f"{root}: train and test have different classes ({odd})")
    chosen = listing[split == "test"]
    images = read_images([path for path, _ in chosen.samples])
    if images.shape[2] != images.shape[3] or images.shape[2] < 8:
        raise CEMError(f"{root} has images of {images.shape[3]}x{images.shape[2]}: square ones from 8x8 up, please")
    return Dataset(str(root), images, torch.tensor(chosen.targets), chosen.classes)


def draws(n: int, per_image: int, seed: int, epoch: int, device="cpu") -> tuple[Tensor, Tensor]:
    """An epoch's order, a permutation (n,), and its uniform draws (n, per_image), a row an image."""
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**32)
    order = torch.randperm(n, generator=generator)
    return order.to(device), torch.rand(n, per_image, generator=generator).to(device)


def crop_flip(x: Tensor, u: Tensor, *, flip: bool = True, padding: str = "constant") -> Tensor:
    """Pad by an eighth of the side, with zeros or "reflect", crop at random, mirror half of the images. u (N, 3) in [0, 1)."""
    n, _, height, width = x.shape
    pad = height // 8
    top, left = (u[:, :2] * (2 * pad + 1)).long().T
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, -1)
    if flip:
        columns = torch.where(u[:, 2:] < 0.5, columns, columns.flip(1))
    columns = left[:, None] + columns
    image, padded = torch.arange(n, device=x.device)[:, None, None], F.pad(x, (pad,) * 4, padding)
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


TRIES = 10  # at a crop that fits, as torchvision does
SIMCLR_DRAWS = 2 * TRIES + 2 + 7


def _bilinear_rows(x: Tensor, position: Tensor) -> Tensor:
    """x (N, C, H, W) at the fractional rows position (N, M) -> (N, C, M, W)."""
    low = position.floor().long().clamp(0, x.shape[2] - 1)
    high = (low + 1).clamp(max=x.shape[2] - 1)
    weight = (position - low)[:, None, :, None]
    image = torch.arange(len(x), device=x.device)[:, None]
    below, above = (x.permute(0, 2, 1, 3)[image, index].permute(0, 2, 1, 3) for index in (low, high))
    return below + weight * (above - below)


def resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, mirror: Tensor) -> Tensor:
    """Crop (N,) boxes, in whole pixels, resize them bilinearly to x's size, mirror where asked. x (N, C, H, W)."""
    positions = []
    for start, size, side in ((top, height, x.shape[2]), (left, width, x.shape[3])):
        grid = (torch.arange(side, device=x.device) + 0.5) * size[:, None] / side - 0.5
        positions.append(start[:, None] + grid.clamp(min=0).minimum(size[:, None] - 1))
    rows, columns = positions
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    return _bilinear_rows(_bilinear_rows(x, rows).transpose(2, 3), columns).transpose(2, 3)


def crop_boxes(u: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchvision's RandomResizedCrop on a square image: area in scale, log-uniform aspect in [3/4, 4/3]; u (N, 2 TRIES + 2).

    -> top, left, height, width, each (N,). The first of TRIES boxes that fits; the whole image where none does.
    """
    area = side**2 * (scale[0] + (scale[1] - scale[0]) * u[:, :TRIES])
    aspect = ((2 * u[:, TRIES : 2 * TRIES] - 1) * np.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (0 < width) & (width <= side) & (0 < height) & (height <= side)
    first = fits.int().argmax(1, keepdim=True)
    height, width = (torch.where(fits.any(1), v.gather(1, first).squeeze(1), side) for v in (height, width))
    top, left = ((u[:, 2 * TRIES + i] * (side - v + 1)).floor() for i, v in enumerate((height, width)))
    return top, left, height, width


def _grey(x: Tensor) -> Tensor:
    """ITU-R 601 luma, (N, 3, H, W) -> (N, 1, H, W)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]  # numbers, for a tensor of them would have a GPU wait


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (N, 3, H, W) by shift (N,) full circles in HSV."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    r, g, b = ((high[:, None] - x) / chroma.clamp_min(1e-12)[:, None]).unbind(1)
    red, green = x[:, 0] == high, (x[:, 1] == high) & (x[:, 0] != high)
    hue = torch.where(red, b - g, torch.where(green, 2 + r - b, 4 + g - r)) + 6 * shift[:, None, None]
    ramps = torch.stack([(hue + n) % 6 for n in (5, 3, 1)], 1)
    return high[:, None] - chroma[:, None] * ramps.minimum(4 - ramps).clamp(0, 1)


def colour_jitter(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """torchvision's ColorJitter, in that order, with factors and a hue shift an image, each (N,). x (N, 3, H, W) in [0, 1]."""
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in (brightness, contrast, saturation))
    x = (brightness * x).clamp(0, 1)
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)
    x = torch.lerp(_grey(x), x, saturation).clamp(0, 1)
    return shift_hue(x, hue)


def simclr(x: Tensor, u: Tensor, *, scale: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> Tensor:
    """SimCLR's augmentation for small images (Chen et al., 2020, appendix B.9, strength 0.5), each image by its own draws.

    Random resized crop; mirror with probability 1/2; with probability 0.8 colour jitter (0.4, 0.4, 0.4, 0.1) in fixed order;
    grey with 0.2. Grey images skip the colours. x (N, C, H, W) in [0, 1], square; u (N, SIMCLR_DRAWS) in [0, 1).
    """
    boxes, rest = crop_boxes(u, x.shape[-1], scale), u[:, 2 * TRIES + 2 :]
    x = resized_crop(x, *boxes, mirror=(rest[:, 0] < 0.5) & flip)
    if x.shape[1] != 3:
        return x
    jitter, grey = (rest[:, 1] < 0.8).float(), (rest[:, 2] < 0.2).view(-1, 1, 1, 1)
    factors = 1 + 0.4 * jitter[:, None] * (2 * rest[:, 3:6] - 1)
    return torch.where(grey, _grey(x := colour_jitter(x, *factors.T, hue=0.1 * jitter * (2 * rest[:, 6] - 1))), x)
