"""DINOv2 as a feature network: FD-DINOv2 (used by eval_is_fid.py)."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as TF

import cem
from lib import files
from lib.device import autocast, resolve_precision

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SIZE, PATCH = 224, 14  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def resampled(positions: Tensor) -> Tensor:
    """The embedding (1, 1 + G², D) of a class token and G x G patches for 16 x 16 patches.

    timm would place 16 patches evenly and antialias. DINOv2 does neither: it gives bicubic
    interpolation the scale factor 16.1 / G, with which patches lie 0.6 % closer together.
    """
    grid = math.isqrt(positions.shape[1] - 1)
    wanted = SIZE // PATCH
    patches = positions[:, 1:].mT.unflatten(2, (grid, grid))
    patches = F.interpolate(patches, scale_factor=(wanted + 0.1) / grid, mode="bicubic")
    return torch.cat([positions[:, :1], patches.flatten(2).mT], 1)


class DINOv2:
    """DINOv2's ViT-L/14 as in FD-DINOv2 (Stein et al., 2023). One block, the 1,024 numbers of its
    normalised class token, which also stand in for logits.

    Images are resized to 224 x 224 as dgm-eval does by default: in uint8, by Pillow's bicubic
    filter. Raises CEMError without timm, or if `weights` is not in the format of URL's file.
    """

    names = ("", "FD-DINOv2", "KD-DINOv2")
    standardised = False

    def __init__(self, weights: str, device: torch.device, precision: str = "float32"):
        needs = f"--features dinov2 needs --weights PATH, the file of {URL}"
        cem.require(bool(weights), needs)
        cem.require(Path(weights).is_file(), f"{weights} not found: {needs}")
        try:
            from timm.models import vision_transformer as timm
        except ImportError as error:
            raise cem.CEMError("--features dinov2 needs: pip install timm") from error
        net = timm.vit_large_patch14_dinov2(img_size=SIZE).eval()
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state["pos_embed"] = resampled(state["pos_embed"])
            net.load_state_dict(timm.checkpoint_filter_fn(state, net))
        except Exception as error:  # a file that is damaged in any way, or of another network
            reason = " ".join(str(error).split())[:200]
            raise cem.CEMError(f"{weights} is not DINOv2's ViT-L/14 ({reason}): {needs}") from error
        self.net = net.to(device).requires_grad_(False)
        self.device = device
        self.precision = resolve_precision(device, precision)
        self.key = f"dinov2-{files.sha256(weights)[:8]}-{self.precision}"

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        bicubic = TF.InterpolationMode.BICUBIC
        pictures = [TF.to_pil_image(image) for image in images.expand(-1, 3, -1, -1)]
        resized = [TF.pil_to_tensor(TF.resize(x, [SIZE, SIZE], bicubic)) for x in pictures]
        x = TF.normalize(torch.stack(resized).to(self.device).float().div(255), MEAN, STD)
        with autocast(self.device, self.precision):
            features = self.net(x).float()
        return [features], features
