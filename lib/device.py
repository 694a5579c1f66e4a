"""The device: choice, precision and memory."""

import contextlib
import ctypes
import os
import platform

import torch

import cem
from lib import distributed

PRECISIONS = ["auto", "float32", "tf32", "bfloat16"]


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else the CPU. Under torchrun each process has its own GPU, and joins the others
    here. Also makes the process keep freed memory."""
    if name == "auto":  # not MPS: BatchNorm's gradients were wrong there (PyTorch's issue 175189)
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1:
        own = f"under torchrun, each process has its own GPU: --device cuda or cpu, not {name}"
        # gloo has no MPS; torchrun numbers the GPUs
        cem.require(not name.startswith(("cuda:", "mps")), own)
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" cannot
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise cem.CEMError(f"--device {name} is not available: {reason}") from error
    keep_freed_memory()
    distributed.init(device)
    return device


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU, {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """Make glibc reuse what a step frees; page faults would cost 7 to 19 % of an attack's time."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD is -3; glibc before 2.35 accepts at most 32 MiB
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def resolve_precision(device: torch.device, precision: str) -> str:
    """`precision` with auto resolved: bfloat16 where the hardware computes in it, else float32."""
    if precision != "auto":
        return precision
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = torch.backends.mkldnn.is_available()
        native = native and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine() in ("x86_64", "AMD64"):  # oneDNN also emulates it, at half the speed
            avx512, amx = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported
            native = native and (avx512() or amx())
    return "bfloat16" if native else "float32"


def autocast(device: torch.device, precision: str):
    """The context manager of --precision; sets TF32 for the whole process. Raises CEMError for tf32
    without an NVIDIA GPU."""
    precision = resolve_precision(device, precision)
    if precision == "tf32" and device.type != "cuda":
        raise cem.CEMError("--precision tf32 needs an NVIDIA GPU")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def compile_network(network: torch.nn.Module, device: torch.device) -> None:
    """torch.compile in place; on a GPU with CUDA graphs, which launch a pass's kernels at once.

    Under torchrun only of the attacked network: in training, SyncBatchNorm breaks its graph.
    """
    if network.training and distributed.world_size() > 1:
        return
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    network.compile(mode=mode, dynamic=False)  # torch 2.11 fails where batches change in size
