"""torch.distributed helpers. Without torchrun, the collectives return their input unchanged."""

import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def init(device: torch.device) -> None:
    """Join torchrun's processes. Only the first one prints."""
    if world_size() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # others wait for evaluations
    if rank():
        sys.stdout = open(os.devnull, "w")


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_then_others():
    """The block runs in the first process, then in the first of each other machine, then in all."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    turn = 0 if rank() == 0 else 1 if local_rank == 0 else 2  # machines may share files or not
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:
        for _ in range(turn, 2):
            barrier()


def local_rows(items: Sequence) -> Sequence:
    """This process's slice of a list or of a tensor's rows; all slices in order are the whole."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def gather(rows: Tensor) -> Tensor:
    """The rows (n_i, ...) of all processes, in their order, in every process."""
    if world_size() == 1:
        return rows
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(mean(torch.tensor(float(flag))) > 0)


class RankGenerator:
    """Randomness of a training step: each process takes its rows of one common draw.

    Many processes thus compute what one does with the whole batch. `own` differs between them.
    `host` draws on the CPU, where reading a number does not wait for the device.
    """

    def __init__(self, seed: int, device: torch.device):
        own = seed * world_size() + rank() + 1_000_003
        self.common = torch.Generator(device).manual_seed(seed % 2**32)
        self.own = torch.Generator(device).manual_seed(own % 2**32)
        self.host = torch.Generator().manual_seed(seed % 2**32)

    def draw(self, random, shape: Sequence[int], like: Tensor) -> Tensor:
        shape = (shape[0] * world_size(), *shape[1:])
        whole = random(shape, generator=self.common, dtype=like.dtype, device=like.device)
        return local_rows(whole)


class _Sum(torch.autograd.Function):
    """all_reduce with a gradient (torch.distributed.nn.functional, which has it, is deprecated)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def gather_on_device(z: Tensor) -> Tensor:
    """As `gather`, of n rows in every process; with gradient, and the host does not wait."""
    if world_size() == 1:
        return z
    rows = [z if i == rank() else torch.zeros_like(z) for i in range(world_size())]
    return _Sum.apply(torch.cat(rows))


class GatheredEncoder(nn.Module):
    """An encoder that returns all processes' embeddings, for potentials that couple a batch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.temperature = model.temperature

    def forward(self, x: Tensor) -> Tensor:
        return gather_on_device(self.model(x))


class SyncBatchNormCPU(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes on the CPU, where nn.SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = world_size() * x.numel() / x.shape[1]
        wide = x.float() if x.dtype == torch.bfloat16 else x
        mean = _Sum.apply(wide.mean((0, 2, 3))) / world_size()
        centered = wide - mean[:, None, None]
        var = _Sum.apply(centered.square().mean((0, 2, 3))) / world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def wrap(model: nn.Module, batch_norm: str) -> nn.Module:
    """The model in DistributedDataParallel, its BatchNorm "sync" or "local"."""
    if world_size() == 1:
        return model
    if batch_norm == "sync" and next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif batch_norm == "sync":
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNormCPU
    # buffers are equal in all processes, or local on purpose
    return DistributedDataParallel(model, broadcast_buffers=False)


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace local BatchNorms' running statistics by their means over the processes."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
    means = mean(torch.cat(statistics)).split([len(s) for s in statistics])
    torch._foreach_copy_(statistics, means)
