"""Datasets as uint8 tensors on the device, and augmentations as batched tensor operations.

An augmentation is a function of the images and of uniform random numbers, a row per image: what
happens to an image depends on seed, epoch and index, not on batch, device or number of processes.
"""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets

from cem import CEMError, GaussianSeeds
from lib import distributed

NAMES = ("cifar10", "cifar100", "svhn", "digits")
HELP = f"{', '.join(NAMES)}, or image folder PATH with train/<class>/* and test/<class>/*"


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

    def evenly_spaced(self, n: int) -> Tensor:
        """Indices of n evenly spaced images, or of all if fewer: folders are sorted by class."""
        n = min(n, len(self))
        return torch.arange(n, device=self.images.device) * len(self) // n

    def normalisation(self) -> dict[str, Tensor]:
        """Mean and std of each channel, (C,), for pixels in [0, 1], over up to 10,000 images."""
        pixels = self.images[self.evenly_spaced(10_000)].float().div_(255)
        std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
        return {"mean": mean, "std": std.clamp_min(0.01)}

    def checkpoint_info(self, rank: int) -> dict:
        """What a checkpoint stores about its training set; `rank` is that of its seeds."""
        seeds = GaussianSeeds.fit(self.images, self.labels, rank, len(self.classes))
        info = {"dataset": self.name, "classes": self.classes, "seeds": seeds.state_dict()}
        return info | {"image_shape": list(self.images.shape[1:])}

    def pixels(self, index=slice(None)) -> Tensor:
        """The images at `index` as floats in [0, 1], in channels_last memory format."""
        return self.images[index].float().div_(255).contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------- datasets


def load(name: str, split: str, data_dir: str = "data") -> Dataset:
    """The "train" or "test" split of a named dataset or of an image folder.

    Raises CEMError if the dataset is unknown, not available or malformed.
    """
    if name == "digits":
        return _digits(split)
    if name in NAMES:
        return _torchvision(name, split, data_dir)
    if Path(name).is_dir():
        return _folder(Path(name), split)
    raise CEMError(f"unknown dataset {name!r}: not a folder and not one of {', '.join(NAMES)}")


def splits(name: str, data_dir: str, device) -> tuple[Dataset, Dataset]:
    """Both splits, on the device. Raises CEMError if their images differ in shape."""
    train = load(name, "train", data_dir).to(device)
    test = load(name, "test", data_dir).to(device)
    shapes = [tuple(dataset.images.shape[1:]) for dataset in (train, test)]
    if shapes[0] != shapes[1]:
        differ = f"training images have shape {shapes[0]}, test images {shapes[1]}"
        raise CEMError(f"{name}: {differ}: resize them to one shape")
    return train, test


def _digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, test = train_test_split(indices, test_size=360, stratify=digits.target, random_state=0)
    rows = test if split == "test" else train
    images = torch.from_numpy((digits.images[rows] * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(digits.target[rows])
    return Dataset("digits", images[:, None], labels, list("0123456789"), flip=False)


@distributed.first_then_others()  # only one process downloads
def _torchvision(name: str, split: str, data_dir: str) -> Dataset:
    try:
        if name == "svhn":
            raw = datasets.SVHN(data_dir, split, download=True)
            images = torch.from_numpy(raw.data)
            labels = raw.labels
            classes = list("0123456789")
        else:
            cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            raw = cifar(data_dir, split == "train", download=True)
            images = torch.from_numpy(raw.data).permute(0, 3, 1, 2)
            labels = raw.targets
            classes = raw.classes
    except Exception as error:  # download, archive and unpickling fail with errors of any type
        reason = f"its download failed ({type(error).__name__}: {error})"
        advice = "use --dataset digits, which needs no network, or an image folder"
        raise CEMError(f"{name} not found in {data_dir}, and {reason}: {advice}") from error
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Dataset(name, images.contiguous(), labels, classes, flip=name != "svhn")


def _folder(root: Path, split: str) -> Dataset:
    listings = {}
    for part in ("train", "test"):
        try:
            listings[part] = datasets.ImageFolder(root / part)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise CEMError(f"{root / part} is not an image folder <class>/*: {reason}") from error
    differing = set(listings["train"].classes) ^ set(listings["test"].classes)
    if differing:
        names = ", ".join(sorted(differing)[:5])
        raise CEMError(f"{root}: train and test have different classes ({names})")
    listing = listings[split]
    images = read_images([path for path, _ in listing.samples])
    height, width = images.shape[2:]
    if height != width or height < 8:
        raise CEMError(f"{root}: images must be square and at least 8x8, not {width}x{height}")
    return Dataset(str(root), images, torch.tensor(listing.targets), listing.classes)


def read_images(paths: list[str]) -> Tensor:
    """Image files as uint8 (N, C, H, W); C is 1 if all are greyscale, else 3.

    Raises CEMError naming a file that is damaged or differs in size from most others.
    """
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_read_image, paths))
    width, height = Counter(image.size for image in images).most_common(1)[0][0]
    for path, image in zip(paths, images):
        if image.size != (width, height):
            differs = f"{path} is {image.size[0]}x{image.size[1]}, others are {width}x{height}"
            raise CEMError(f"{differs}: resize them to one size")
    if any(image.mode == "RGB" for image in images):
        images = [image.convert("RGB") for image in images]
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked[:, None] if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except Exception as error:  # decoders of damaged files fail with errors of any type
        raise CEMError(f"cannot read the image {path}: {error}") from error


# --------------------------------------------------------------------------------- augmentations

TRIES = 10  # boxes drawn per random resized crop, as in torchvision
BOX_DRAWS = 2 * TRIES + 2  # areas, aspect ratios and a position
SIMCLR_DRAWS = BOX_DRAWS + 7


def draws(n: int, per_image: int, seed: int, epoch: int, device="cpu") -> tuple[Tensor, Tensor]:
    """An epoch's order, a permutation (n,), and its uniform draws in [0, 1), (n, per_image)."""
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**32)
    order = torch.randperm(n, generator=generator)
    uniform = torch.rand(n, per_image, generator=generator)
    return order.to(device), uniform.to(device)


def crop_flip(x: Tensor, u: Tensor, *, flip: bool = True, padding: str = "constant") -> Tensor:
    """Pad by an eighth of the side, crop at random, mirror half of the images.

    x (N, C, H, W); u (N, 3) in [0, 1); padding: "constant" (zeros) or "reflect".
    """
    n, _, height, width = x.shape
    pad = height // 8
    offset = (u[:, :2] * (2 * pad + 1)).long()
    rows = offset[:, 0:1] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, -1)
    if flip:
        columns = torch.where(u[:, 2:3] < 0.5, columns, columns.flip(1))
    columns = offset[:, 1:2] + columns
    padded = F.pad(x, (pad, pad, pad, pad), padding)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def simclr(x: Tensor, u: Tensor, *, scale=(0.2, 1.0), flip: bool = True) -> Tensor:
    """SimCLR's augmentation of small images (Chen et al., 2020, appendix B.9, strength 0.5).

    A random resized crop, mirrored with probability 1/2; colour jitter (0.4, 0.4, 0.4, 0.1), in
    fixed order, with probability 0.8; greyscale with probability 0.2. Greyscale images are only
    cropped and mirrored. x (N, C, H, W) in [0, 1], square; u (N, SIMCLR_DRAWS) in [0, 1).
    """
    boxes = crop_boxes(u, x.shape[-1], scale)
    u = u[:, BOX_DRAWS:]
    x = resized_crop(x, *boxes, mirror=(u[:, 0] < 0.5) & flip)
    if x.shape[1] != 3:
        return x
    jittered = (u[:, 1:2] < 0.8).float()
    strength = jittered * (2 * u[:, 3:7] - 1)  # in [-1, 1), 0 without jitter
    brightness, contrast, saturation = (1 + 0.4 * strength[:, :3]).unbind(1)
    x = colour_jitter(x, brightness, contrast, saturation, hue=0.1 * strength[:, 3])
    grey = (u[:, 2] < 0.2).view(-1, 1, 1, 1)
    return torch.where(grey, _luma(x), x)


def crop_boxes(u: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, ...]:
    """The boxes of torchvision's RandomResizedCrop on square images: top, left, height, width (N,).

    Relative area uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3]. The first of TRIES
    boxes that fits, or the whole image if none does. u (N, BOX_DRAWS) in [0, 1).
    """
    area = side**2 * (scale[0] + (scale[1] - scale[0]) * u[:, :TRIES])
    aspect = ((2 * u[:, TRIES : 2 * TRIES] - 1) * math.log(4 / 3)).exp()
    width = (area * aspect).sqrt().round()
    height = (area / aspect).sqrt().round()
    fits = (0 < width) & (width <= side) & (0 < height) & (height <= side)
    first = fits.int().argmax(1, keepdim=True)
    width = torch.where(fits.any(1), width.gather(1, first).squeeze(1), side)
    height = torch.where(fits.any(1), height.gather(1, first).squeeze(1), side)
    top = (u[:, 2 * TRIES] * (side - height + 1)).floor()
    left = (u[:, 2 * TRIES + 1] * (side - width + 1)).floor()
    return top, left, height, width


def resized_crop(x: Tensor, top, left, height, width, mirror: Tensor) -> Tensor:
    """Crop a box from each image of x (N, C, H, W), resize it bilinearly to H x W, mirror it.

    The boxes, each a tensor (N,), are in whole pixels. mirror, bool (N,), selects images.
    """
    x = _crop_rows(x, top, height)
    x = _crop_rows(x.transpose(2, 3), left, width).transpose(2, 3)
    return torch.where(mirror.view(-1, 1, 1, 1), x.flip(3), x)


def _crop_rows(x: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Resize the rows [start, start + size) of each image, (N,), linearly to x's height."""
    side = x.shape[2]
    centres = torch.arange(side, device=x.device) + 0.5
    inside = centres * size[:, None] / side - 0.5
    position = start[:, None] + inside.clamp(min=0).minimum(size[:, None] - 1)
    lower = position.floor().long().clamp(0, side - 1)
    upper = (lower + 1).clamp(max=side - 1)
    image = torch.arange(len(x), device=x.device)[:, None]
    rows = x.transpose(1, 2)
    below = rows[image, lower]
    above = rows[image, upper]
    weight = (position - lower)[:, :, None, None]
    return (below + weight * (above - below)).transpose(1, 2)


def colour_jitter(x: Tensor, brightness, contrast, saturation, hue: Tensor) -> Tensor:
    """torchvision's ColorJitter, in the order of the arguments. x (N, 3, H, W) in [0, 1].

    brightness, contrast, saturation: factors (N,); hue: shifts (N,) in full circles.
    """
    x = (brightness.view(-1, 1, 1, 1) * x).clamp(0, 1)
    mean = _luma(x).mean((2, 3), keepdim=True)
    x = torch.lerp(mean, x, contrast.view(-1, 1, 1, 1)).clamp(0, 1)
    x = torch.lerp(_luma(x), x, saturation.view(-1, 1, 1, 1)).clamp(0, 1)
    return shift_hue(x, hue)


def _luma(x: Tensor) -> Tensor:
    """ITU-R 601 luma, (N, 3, H, W) -> (N, 1, H, W)."""
    # a tensor of the three weights would be copied to the GPU, which synchronises
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the HSV hue of x (N, 3, H, W) by `shift` (N,) full circles."""
    value = x.amax(1)
    chroma = value - x.amin(1)
    r, g, b = ((value[:, None] - x) / chroma.clamp_min(1e-12)[:, None]).unbind(1)
    hue = torch.where(x[:, 1] == value, 2 + r - b, 4 + g - r)  # in sixths of a circle
    hue = torch.where(x[:, 0] == value, b - g, hue)
    hue = hue + 6 * shift[:, None, None]
    ramps = torch.stack([(hue + n) % 6 for n in (5, 3, 1)], 1)
    return value[:, None] - chroma[:, None] * ramps.minimum(4 - ramps).clamp(0, 1)
