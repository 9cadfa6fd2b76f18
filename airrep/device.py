"""Which device to compute on."""

import torch

from airrep.examples import InputError


def pick_device(device: str) -> str:
    """The device to use; "auto" is a GPU where there is one. Raises InputError for a wrong one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here: {reason}") from None
    return device
