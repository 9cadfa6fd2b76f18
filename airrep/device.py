"""Which device to compute on."""

import torch

from airrep.examples import InputError

CPU_TOKENS = 2048  # more does not fit the cache, and takes half as long again
GPU_TOKENS = 16384  # enough to keep it busy


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


def tokens_at_once(device: str | torch.device) -> int:
    """How many tokens, padding included, to run through a model in one batch."""
    return CPU_TOKENS if torch.device(device).type == "cpu" else GPU_TOKENS
