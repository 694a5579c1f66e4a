"""Augmentations as batched tensor operations, and the random numbers of an epoch.

An augmentation is a function of the images and of uniform random numbers, a row per image: what
happens to an image depends on seed, epoch and index, not on batch, device or number of processes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

TRIES = 10  # boxes drawn per random resized crop, as in torchvision
BOX_DRAWS = 2 * TRIES + 2  # areas, aspect ratios and a position
SIMCLR_DRAWS = BOX_DRAWS + 7
CROP_DRAWS = 3  # a row, a column and whether to mirror


def draws(n: int, per_image: int, seed: int, epoch: int, device="cpu") -> tuple[Tensor, Tensor]:
    """An epoch's order, a permutation (n,), and its uniform draws in [0, 1), (n, per_image)."""
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**32)
    order = torch.randperm(n, generator=generator)
    uniform = torch.rand(n, per_image, generator=generator)
    return order.to(device), uniform.to(device)


def crop_flip(
    x: Tensor, u: Tensor, *, flip: bool = True, padding: str = "constant", share: float = 1 / 8
) -> Tensor:
    """Pad by this share of the side, crop at random, mirror half of the images.

    x (N, C, H, W); u (N, 3) in [0, 1); padding: "constant" (zeros) or "reflect".
    """
    n, _, height, width = x.shape
    pad = int(share * height)
    offset = (u[:, :2] * (2 * pad + 1)).long()
    rows = offset[:, 0:1] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, -1)
    if flip:
        columns = torch.where(u[:, 2:3] < 0.5, columns, columns.flip(1))
    columns = offset[:, 1:2] + columns
    padded = F.pad(x, (pad, pad, pad, pad), padding)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirror(x: Tensor, u: Tensor, flip: bool) -> Tensor:
    """Mirror the half of the images that crop_flip would, but do not crop. u (N, 3) in [0, 1)."""
    return torch.where(((u[:, 2] >= 0.5) & flip).view(-1, 1, 1, 1), x.flip(3), x)


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
    return torch.where(grey, tv.rgb_to_grayscale(x), x)


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
    side = x.shape[-1]
    centres = (torch.arange(side, device=x.device) + 0.5) / side

    def positions(start: Tensor, size: Tensor) -> Tensor:
        """Where the pixels' centres (N, side) lie in the image, from -1 to 1 as grid_sample has it;
        at the box's edge, nothing beyond it is seen."""
        inside = (size[:, None] * centres).clamp(min=0.5).minimum(size[:, None] - 0.5)
        return 2 * (start[:, None] + inside) / side - 1

    rows, columns = positions(top, height), positions(left, width)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    grid = torch.broadcast_tensors(columns[:, None, :], rows[:, :, None])
    return F.grid_sample(x, torch.stack(grid, 3), align_corners=False)


def colour_jitter(x: Tensor, brightness, contrast, saturation, hue: Tensor) -> Tensor:
    """torchvision's ColorJitter, in the order of the arguments. x (N, 3, H, W) in [0, 1].

    brightness, contrast, saturation: factors (N,); hue: shifts (N,) in full circles.
    """
    x = (brightness.view(-1, 1, 1, 1) * x).clamp(0, 1)
    mean = tv.rgb_to_grayscale(x).mean((2, 3), keepdim=True)
    x = torch.lerp(mean, x, contrast.view(-1, 1, 1, 1)).clamp(0, 1)
    x = torch.lerp(tv.rgb_to_grayscale(x), x, saturation.view(-1, 1, 1, 1)).clamp(0, 1)
    return shift_hue(x, hue)


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
