"""Checkpoints of a training run: folders that are whole or not there, without pickle.

output/checkpoints/step-000040/state.json            step, history, the run's fingerprint
output/checkpoints/step-000040/tensors.safetensors   weights, best weights, AdamW's state
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from airrep.examples import InputError
from airrep.provenance import clear_save_errors, fsync

KEPT = 2  # the newest, and one more in case a disk damages it
PARTIAL = ".partial"
_NAME = re.compile(r"step-\d{6,}")


@dataclass
class Checkpoint:
    """State of a run after `step` updates; tensors are on the CPU, named "group/parameter"."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes step-N under a temporary name, fsyncs and renames it; then prunes older ones."""
    path = folder / f"step-{checkpoint.step:06d}"
    with replaced_folder(path) as partial, clear_save_errors(path):
        save_file(checkpoint.tensors, partial / "tensors.safetensors")
        text = json.dumps({"step": checkpoint.step, **checkpoint.state})
        (partial / "state.json").write_text(text + "\n", encoding="utf-8")
    for old in _step_folders(folder)[:-KEPT]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None where there are none.

    Raises InputError when there are some and none can be read.
    """
    folders = _step_folders(folder)
    for path in reversed(folders):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(state.pop("step"), state, load_file(path / "tensors.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            damage = error
    if folders:
        raise InputError(
            f"No checkpoint in {folder} can be read ({damage}); delete that folder to start again."
        )
    return None


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, under a temporary name; it takes the place of `path` when all went well."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in [*partial.iterdir(), partial]:
            fsync(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
    fsync(path.parent)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimiser's state, "optimizer/<entry>/<parameter>"."""
    return {
        f"optimizer/{entry}/{name}": _stored(value)
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Takes back what `optimizer_tensors` gave."""
    for key, tensor in tensors.items():
        group, _, rest = key.partition("/")
        if group != "optimizer":
            continue
        entry, _, name = rest.partition("/")
        # AdamW counts its steps on the CPU whatever the parameter's device.
        place = tensor if entry == "step" else tensor.to(parameters[name].device)
        optimizer.state[parameters[name]][entry] = place


def named_tensors(group: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as "group/name", copied to the CPU."""
    return {f"{group}/{name}": _stored(tensor) for name, tensor in tensors.items()}


def group_tensors(group: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `named_tensors` put under the group."""
    prefix = group + "/"
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _step_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
