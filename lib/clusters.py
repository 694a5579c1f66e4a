"""Gaussian seeds without labels: one per k-means cluster of an encoder's features."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

import cem
from lib import cli


class ClusterSeeds:
    """A mixture of `gaussians`, one per cluster; `shares` (K,): the clusters' shares of images."""

    def __init__(self, gaussians: cem.GaussianSeeds, shares: Tensor):
        self.gaussians = gaussians
        self.shares = shares
        self.shape = gaussians.shape

    @classmethod
    def fit(cls, images: Tensor, features: Tensor, clusters: int, rank: int, seed: int):
        """images (N, C, H, W), uint8; features (N, D), clustered by their direction."""
        directions = F.normalize(features, dim=1).cpu().numpy()
        enough = 2 * clusters <= len(images)
        cem.require(enough, f"--clusters {clusters} needs at least {2 * clusters} training images")
        found = KMeans(clusters, n_init=1, random_state=seed % 2**32).fit(directions).labels_
        labels = torch.from_numpy(found).long().to(images.device)
        smallest = labels.bincount(minlength=clusters).min()
        cem.require(smallest > 1, f"a cluster has {smallest} images: choose fewer --clusters")
        bar = partial(cli.progress, name="seeds", unit="cluster")
        gaussians = cem.GaussianSeeds.fit(images, labels, rank, clusters, bar)
        return cls(gaussians, labels.bincount(minlength=clusters) / len(labels))

    def sample(self, n: int, generator) -> Tensor:
        """n seeds (n, C, H, W), each of a cluster drawn by its share of the images."""
        drawn = cem.draw(torch.rand, (n,), generator, self.shares)
        labels = torch.searchsorted(self.shares.cumsum(0)[:-1], drawn)
        return self.gaussians.sample(labels, generator)

    def state_dict(self) -> dict:
        return {"seeds": self.gaussians.state_dict(), "shares": self.shares}

    @classmethod
    def from_state_dict(cls, state: dict, device="cpu") -> ClusterSeeds:
        gaussians = cem.GaussianSeeds.from_state_dict(state["seeds"], device)
        return cls(gaussians, state["shares"].to(device))
