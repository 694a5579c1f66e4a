"""Several processes, as torchrun starts them: who is who, sharing out and gathering, synchronised BatchNorm.

    torchrun --nproc_per_node=8 -- train_sup.py          # and likewise train_unsup.py, sample.py, eval_is_fid.py

Without torchrun every function here is the one process's identity.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join(where: torch.device) -> None:
    """Become one of torchrun's processes; the first speaks for all of them."""
    if size() > 1 and not dist.is_initialized():
        if where.type == "cuda":
            torch.cuda.set_device(where)
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # the first evaluates while the others wait
        if rank():
            sys.stdout = open(os.devnull, "w")


def barrier() -> None:
    if size() > 1:
        dist.barrier()


@contextmanager
def first_then_others():
    """The block runs in the first process, then in the first of each other machine (files may be the same), then in all."""
    turn = 0 if rank() == 0 else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:
        for _ in range(turn, 2):
            barrier()


def share(items: Sequence) -> Sequence:
    """This process's part of a list or of a tensor's rows: a slice, all of them together the whole, in order."""
    return items[len(items) * rank() // size() : len(items) * (rank() + 1) // size()]


def gather(rows: Tensor) -> Tensor:
    """The rows (n_i, ...) of all processes, in their order, on every one of them."""
    if size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(size())]
    dist.all_gather(counts, count)
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts)])


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if size() == 1:
        return values
    dist.all_reduce(values := values.clone())
    return values / size()


def anyone(flag: bool, where: torch.device) -> bool:
    """Is it so in any process?"""
    return bool(mean(torch.tensor(float(flag), device=where)) > 0)


class Share:
    """A generator of random numbers that all processes have alike: each takes its rows of what is drawn for all (`cem._draw`).

    So a step of many processes is, number for number, that of one with the whole batch. `own` differs in each process.
    """

    def __init__(self, seed: int, where: torch.device):
        self.common = torch.Generator(where).manual_seed(seed % 2**32)
        self.own = torch.Generator(where).manual_seed((seed * size() + rank() + 1_000_003) % 2**32)

    def draw(self, random, shape: Sequence[int], like: Tensor) -> Tensor:
        whole = (shape[0] * size(), *shape[1:])
        return share(random(whole, generator=self.common, dtype=like.dtype, device=like.device))


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient := gradient.clone(memory_format=torch.contiguous_format))
        return gradient


class _Gather(torch.autograd.Function):
    """`gather` of equally many rows, with gradient: a row's is the sum of those it has in all the processes."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient := gradient.clone(memory_format=torch.contiguous_format))
        return share(gradient)


def gather_embeddings(z: Tensor) -> Tensor:
    """The embeddings (n, D) of all the processes, in their order, through which gradients flow: InfoNCE's negatives."""
    return z if size() == 1 else _Gather.apply(z)


class Gathered(nn.Module):
    """An encoder that embeds its images and hands back those of all processes, for potentials that couple a batch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.temperature = model, model.temperature

    def forward(self, x: Tensor) -> Tensor:
        return gather_embeddings(self.model(x))


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, on any device (PyTorch's own SyncBatchNorm is for GPUs alone)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count, wide = size() * x.numel() / x.shape[1], x.float() if x.dtype == torch.bfloat16 else x
        mean = _Sum.apply(wide.mean((0, 2, 3))) / size()
        centered = wide - mean[:, None, None]
        var = _Sum.apply(centered.square().mean((0, 2, 3))) / size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def wrap(model: nn.Module, batch_norm: str) -> nn.Module:
    """The model for training: one process's as it is, else in DistributedDataParallel, its BatchNorm "sync" or "local"."""
    if size() == 1:
        return model
    device = next(model.parameters()).device
    if batch_norm == "sync" and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif batch_norm == "sync":
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncedBatchNorm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers' new name is unknown before torch 2.15
        return DistributedDataParallel(model, broadcast_buffers=False)  # they are alike, or local on purpose


def bare(model: nn.Module) -> nn.Module:
    """The model without its DistributedDataParallel: what is attacked and saved."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _statistics(models: Sequence[nn.Module]) -> list[Tensor]:
    norms = [module for model in models for module in model.modules() if isinstance(module, _BatchNorm)]
    return [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]


@contextmanager
def mean_statistics(*models: nn.Module):
    """Inside, BatchNorms have the mean of all processes' running statistics, which differ where these are local.

    Yields the processes' own, each (processes, channels), for `part_statistics` to give back; none where there is one process.
    """
    statistics = _statistics(models) if size() > 1 else []
    rows = [gather(statistic[None]) for statistic in statistics]
    for statistic, row in zip(statistics, rows):
        statistic.copy_(row.mean(0))
    try:
        yield rows
    finally:
        part_statistics(rows, *models)


def part_statistics(rows: Sequence[Tensor], *models: nn.Module) -> None:
    """Give this process its own running statistics out of `rows`, if those are of as many processes."""
    for statistic, row in zip(_statistics(models), rows):
        if len(row) == size():
            statistic.copy_(row[rank()])
