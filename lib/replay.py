"""The replay buffer of the energy-based losses."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import cem


class ReplayBuffer(nn.Module):
    """SGLD chains, continued from one training step to the next (Grathwohl et al., 2020).

    fresh(n, generator) -> (n, C, H, W) creates chains, initially and, with probability `reinit`,
    whenever one is drawn: uniform noise by default; GaussianSeeds.sample is another choice.
    `images` (size, C, H, W), in half precision, is a buffer of the module.
    """

    def __init__(self, size: int, shape: Sequence[int], reinit=0.05, fresh: Callable | None = None):
        super().__init__()
        fits = 1 <= size < math.inf and 0 <= reinit <= 1
        cem.require(fits, f"size must be at least 1, reinit in [0, 1], not {size} and {reinit}")
        self.reinit = reinit
        self.shape = tuple(shape)
        self.fresh = fresh or self._uniform
        self.register_buffer("images", torch.empty(0, dtype=torch.float16))
        self.images = self.fresh(size, None).half()

    def _uniform(self, n: int, generator) -> Tensor:
        like = dict(dtype=self.images.dtype, device=self.images.device)
        return torch.rand(n, *self.shape, generator=generator, **like).float()

    def sample(self, potential: Callable, n: int, generator=None, **options) -> Tensor:
        """n distinct chains climb a potential (cem.ascend's options) and are stored again.

        -> x_s (n, C, H, W), detached. Raises CEMError where the buffer has fewer than n chains.
        """
        enough = 0 <= n <= len(self.images)
        cem.require(enough, f"the replay buffer has {len(self.images)} chains, fewer than {n}")
        cem.require(not isinstance(generator, (list, tuple)), "chains need a single generator")
        device = self.images.device
        index = torch.randperm(len(self.images), generator=generator, device=device)[:n]
        drawn = torch.rand(n, 1, 1, 1, generator=generator, device=device)
        x = self.images[index].float()
        x = torch.where(drawn < self.reinit, self.fresh(n, generator), x)
        x = cem.ascend(potential, x, norm="none", generator=generator, **options)
        self.images[index] = x.half()
        return x
