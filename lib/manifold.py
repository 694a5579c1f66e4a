"""Neighbourhoods in feature space: precision, recall, density, coverage, nearest neighbours."""

import torch
from torch import Tensor

K = 5  # neighbours that define a radius, as in Naeem et al.; Kynkäänniemi et al. take 3
ROWS = 1000  # of a distance matrix at a time


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices of the k nearest rows of y (M, D) to each row of x (N, D): (N, k)."""
    parts = [torch.cdist(rows, y).topk(min(k, len(y)), largest=False) for rows in x.split(ROWS)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def radii(x: Tensor) -> Tensor:
    """The distance of each row of x (N, D) to its K-th nearest other row -> (N,)."""
    return nearest(x, x, K + 1)[0][:, -1]


def scores(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Of features (M, D) of real and (N, D) of generated images, float64 for exactness.

    precision and recall (Kynkäänniemi et al., 2019): the share of generated images within the
    radius of a real one, and vice versa. density and coverage (Naeem et al., 2020): the mean number
    of real radii that contain a generated image, over K, and the share of real images whose radius
    contains one.
    """
    real_radii, fake_radii = radii(real), radii(fake)
    inside = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled = covered = 0
    for rows, radius in zip(real.split(ROWS), real_radii.split(ROWS)):
        distances = torch.cdist(rows, fake)
        inside += (distances < radius[:, None]).sum(0)
        recalled += (distances < fake_radii).any(1).sum().item()
        covered += (distances.amin(1) < radius).sum().item()
    return {
        "precision": (inside > 0).double().mean().item(),
        "recall": recalled / len(real),
        "density": inside.double().mean().item() / K,
        "coverage": covered / len(real),
    }
