"""What the machine asks for: device, precision, memory, compilation."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cem
import parallel


def device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Under torchrun each process of a machine takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and parallel.size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise cem.CEMError(f"--device {name} is not to be had here: {str(error).splitlines()[0]}") from error
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    parallel.join(chosen)
    return chosen


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees; else its pages are faulted in anew at the next: 7 to 19 % of an attack's time."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # where there is another C library
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MiB
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


PRECISIONS = ["auto", "float32", "tf32", "bfloat16"]


def settled(where: torch.device, precision: str) -> str:
    """--precision without its auto, which is bfloat16 where the device computes in it, else float32."""
    native = False
    if where.type == "cuda":
        native = torch.cuda.get_device_capability(where) >= (8, 0)
    elif where.type == "cpu":
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine() in ("x86_64", "AMD64"):  # where oneDNN is content to emulate it, at half of float32's speed
            native = native and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision if precision != "auto" else "bfloat16" if native else "float32"


def autocast(where: torch.device, precision: str):
    """The context of --precision: autocast for bfloat16; with tf32, float32's products in 19 bits, on GPUs that have them."""
    precision = settled(where, precision)
    if precision == "tf32" and where.type != "cuda":
        raise cem.CEMError("--precision tf32 is for NVIDIA's GPUs: leave it at auto here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(where.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


class Frozen:
    """What a training step attacks: the model of this moment, folded; with --compile one compiled network with its weights."""

    def __init__(self, compiled: bool):
        self.compiled, self.network = compiled, None

    def __call__(self, model: nn.Module) -> nn.Module:
        network = cem.folded(parallel.bare(model))
        if not self.compiled:
            return network
        if self.network is None:
            self.network = Compiled(network)
        else:
            self.network.model.load_state_dict(network.state_dict())
        return self.network


class Compiled(nn.Module):
    """A frozen network through torch.compile, without `cem.ascend`'s hook, for which it would be compiled anew each time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.temperature = model, getattr(model, "temperature", None)
        self.model.compile()

    def forward(self, x: Tensor) -> Tensor:
        hooks = nn.modules.module._global_forward_pre_hooks
        kept = dict(hooks)
        hooks.clear()
        try:
            return self.model(x)
        finally:
            hooks.update(kept)


def fitting(batch_size: int, work: Callable, *args):
    """work(batch_size, *args); where memory is too small for that, a CEMError that names the largest n for which it is not."""
    try:
        return work(batch_size, *args)
    except torch.OutOfMemoryError:
        pass  # outside of this block the exception no longer holds the tensors of its frames
    if parallel.size() > 1:  # the others may not have run out, and an attempt is made together
        raise cem.CEMError(f"--batch-size {batch_size} does not fit into the device's memory: try half of it")
    fits, too_large = 0, batch_size
    while too_large - fits > max(fits // 50, 1):  # to 2 %
        n = (fits + too_large) // 2
        torch.cuda.empty_cache()
        try:
            work(n, *args)
            fits = n
        except torch.OutOfMemoryError:
            too_large = n
    advice = f"the largest that does is about {fits}" if fits else "not even 1 does"
    raise cem.CEMError(f"--batch-size {batch_size} does not fit into the device's memory: {advice}")
