"""The runs of methods that an evaluation leaves in a run's folder, so that none is made twice.

scores/NAME.run.safetensors   subset scores (targets, subsets) by pooling; in its metadata all that
                              decided the run, its costs, and the sha256 of the scores in NAME.npy
scores/unfinished/            the same two files of every method that is done, until all are
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from airrep.attributor import Attributor
from airrep.evaluation_rows import GIVEN, MethodRun
from airrep.provenance import write_bytes_atomic
from airrep.run_folder import RunFolder

COSTS = ("fit_seconds", "query_seconds", "examples_per_second", "bytes_per_example")


@dataclass(frozen=True)
class KnownRuns:
    """Runs by the name of a method, of these `inputs`: all that decides each of them, as JSON."""

    folder: RunFolder
    inputs: Mapping[str, Mapping[str, Any]]

    def read(self, name: str, attributor: Attributor, losses: np.ndarray) -> MethodRun | None:
        """The run of a method, as it was made, judged by `losses`; None where there is none of its
        inputs, or where its files are damaged or of another evaluation."""
        for place in (self._unfinished, self.folder.scores):
            # Whatever is wrong with the files: the method can be run again.
            with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError, EOFError):
                with safe_open(place / f"{name}.run.safetensors", framework="numpy") as file:
                    about = json.loads(file.metadata()["run"])
                    pooled = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                if about["inputs"] != self.inputs[name]:
                    continue
                scores = np.load(place / f"{name}.npy", allow_pickle=False)
                if _digest(scores) == about["scores"]:
                    costs = {key: about[key] for key in COSTS}
                    return MethodRun(name, attributor, scores, pooled, losses, **costs)
        return None

    def write(self, run: MethodRun) -> None:
        """Keeps a run; not one of given scores, which cost nothing to read again."""
        if run.attributor.name == GIVEN:
            return
        self._unfinished.mkdir(parents=True, exist_ok=True)
        np.save(self._unfinished / f"{run.name}.npy", run.scores)
        about = {key: getattr(run, key) for key in COSTS}
        about |= {"inputs": self.inputs[run.name], "scores": _digest(run.scores)}
        pooled = {key: np.ascontiguousarray(one) for key, one in run.subset_scores.items()}
        content = save(pooled, metadata={"run": json.dumps(about)})
        write_bytes_atomic(self._unfinished / f"{run.name}.run.safetensors", content)

    def settle(self) -> None:
        """Says that the scores of all methods lie in the folder of scores."""
        for name in self.inputs:
            file = self._unfinished / f"{name}.run.safetensors"
            if file.is_file():
                file.rename(self.folder.scores / file.name)
                (self._unfinished / f"{name}.npy").unlink()
        if self._unfinished.is_dir() and not any(self._unfinished.glob("*.safetensors")):
            shutil.rmtree(self._unfinished)

    @property
    def _unfinished(self) -> Path:
        return self.folder.scores / "unfinished"


def _digest(scores: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(scores).data).hexdigest()
