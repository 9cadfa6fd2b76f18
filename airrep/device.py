"""Which device to compute on."""

import resource
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from airrep.examples import InputError

CPU_TOKENS = 2048  # more does not fit the cache, and takes half as long again
GPU_TOKENS = 16384  # enough to keep it busy with a language model's passes
GPU_ENCODER_TOKENS = 65536  # the same with those of a small encoder
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def pick_device(device: str) -> str:
    """The device to use; "auto" is a GPU where there is one. Raises InputError for a wrong one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # "meta" makes tensors, and computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here: {reason}") from None
    return device


def tokens_at_once(device: str | torch.device, on_gpu: int = GPU_TOKENS) -> int:
    """How many tokens, padding included, to run through a model in one batch."""
    return CPU_TOKENS if torch.device(device).type == "cpu" else on_gpu


def peak_memory(device: torch.device) -> int:
    """Bytes used at most since this process began, or since the peak was forgotten: of the GPU, or
    of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used  # macOS counts bytes, Linux KiB


def attention_of_any_shape(device: torch.device) -> AbstractContextManager:
    """Inside, attention on a GPU runs by kernels that take every shape as it comes.

    cuDNN's, which PyTorch would choose, builds a plan for each shape it has not seen (tens of
    milliseconds, more than the whole pass through a small model takes), and batches of texts
    nearly all have a new one.
    """
    return sdpa_kernel(ANY_SHAPE) if device.type == "cuda" else nullcontext()
