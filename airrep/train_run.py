"""The folder of a training run, and the fingerprint that ties its files to their causes.

output/encoder/        the encoder at its best step
output/train.json      settings, fingerprint, versions, best step: written last
output/history.jsonl   a line a step
output/checkpoints/    while the run is not finished
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from airrep.checkpoint import Checkpoint, newest_checkpoint, replaced_folder
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError, fingerprint_examples
from airrep.label_store import Labels, fingerprint_plan
from airrep.provenance import (
    git_revision,
    installed_versions,
    remove_leftovers,
    write_json_atomic,
)
from airrep.train_settings import TrainSettings

HISTORY = "history.jsonl"
OUTCOME = ("best_step", "validation_lds", "dropped_targets")  # read back of a finished run


def fingerprint_run(
    encoder: AirRepEncoder,
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    target_weights: np.ndarray | None,
    settings: TrainSettings,
    others: Sequence[Labels] = (),
) -> dict[str, Any]:
    """All that decides the trained encoder, by name: settings as they are, the rest hashed."""
    return {
        "pool": fingerprint_examples(pool),
        "targets": fingerprint_examples(targets),
        "subsets": fingerprint_plan(labels.subsets),
        "losses": _digest({"losses": labels.losses}),
        "target_weights": _digest({} if target_weights is None else {"weights": target_weights}),
        "encoder": _digest(
            {name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()}
        ),
        **({"more_labels": _digest_labels(others)} if others else {}),
        **settings.deciding(),
    }


class TrainRun:
    """A run's folder; without one (None) nothing is read or written."""

    def __init__(self, output: Path | None, fingerprint: dict[str, Any]) -> None:
        self.output = output
        # As JSON gives it back, so that it compares equal to what was stored.
        self.fingerprint = json.loads(json.dumps(fingerprint))

    @property
    def checkpoints(self) -> Path | None:
        return None if self.output is None else self.output / "checkpoints"

    def finished(self) -> dict[str, Any] | None:
        """`OUTCOME` of this very run when it is done; InputError when train.json is of another."""
        if self.output is None:
            return None
        path = self.output / "train.json"
        if not path.exists():
            if (self.output / "encoder").exists() and not (self.output / HISTORY).exists():
                raise InputError(
                    f"{self.output / 'encoder'} exists, but no train.json beside it says where it "
                    "is from; give another output folder, or move the encoder away."
                )
            return None
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            known, outcome = about["fingerprint"], {key: about[key] for key in OUTCOME}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); delete it to train again."
            ) from error
        self._check_same(known, path)
        return outcome if (self.output / "encoder" / "config.json").exists() else None

    def resume_point(self) -> Checkpoint | None:
        """The newest checkpoint; InputError when it is of another run."""
        if self.checkpoints is None:
            return None
        checkpoint = newest_checkpoint(self.checkpoints)
        if checkpoint is not None:
            self._check_same(checkpoint.state.get("fingerprint"), self.checkpoints)
        return checkpoint

    def finish(
        self, encoder: AirRepEncoder, settings: TrainSettings, outcome: dict[str, Any]
    ) -> None:
        """Saves the encoder, then train.json, then drops the checkpoints."""
        if self.output is None or self.checkpoints is None:
            return
        with replaced_folder(self.output / "encoder") as partial:
            encoder.save_pretrained(partial)
        about = {
            **outcome,
            "settings": asdict(settings),
            "fingerprint": self.fingerprint,
            "versions": installed_versions(),
            "git_revision": git_revision(),
        }
        write_json_atomic(self.output / "train.json", about)
        remove_leftovers(self.output)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def read_history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl; InputError for one that is damaged."""
        if self.output is None or not (self.output / HISTORY).exists():
            return []
        path = self.output / HISTORY
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise InputError(
                f"{path} cannot be read ({error}); delete it to go on without the curves."
            ) from error

    def _check_same(self, known: Any, path: Path) -> None:
        """Raises InputError with both sides of everything that differs."""
        if not isinstance(known, Mapping):
            raise InputError(
                f"{path} does not say which training run it belongs to; delete it to train again."
            )
        keys = [*self.fingerprint, *(key for key in known if key not in self.fingerprint)]
        differ = [
            f"{key}: {_shown(known.get(key))} there, {_shown(self.fingerprint.get(key))} now"
            for key in keys
            if known.get(key) != self.fingerprint.get(key)
        ]
        if differ:
            raise InputError(
                f"{path} belongs to another training run ({'; '.join(differ)}); give another "
                "output folder, or delete this one to train again."
            )


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def _digest_labels(labels: Sequence[Labels]) -> str:
    parts = [fingerprint_plan(one.subsets) + _digest({"losses": one.losses}) for one in labels]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _digest(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(_as_bytes(arrays[name]))
        digest.update(f"{name} {arrays[name].dtype} {tuple(arrays[name].shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _as_bytes(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    # numpy has no bfloat16, so a tensor's bytes are read as they lie.
    return array.contiguous().reshape(-1).view(torch.uint8).numpy()
