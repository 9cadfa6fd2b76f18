"""What a training run reports while it goes: history.jsonl, a progress bar, wandb."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from airrep.provenance import write_bytes_atomic
from airrep.train_settings import TrainSettings


class TrainLog:
    """Open as a context; silent where `main` is False (all processes but one)."""

    def __init__(
        self,
        path: Path | None,
        settings: TrainSettings,
        history: Sequence[dict[str, Any]],
        main: bool = True,
    ) -> None:
        self._path = path if main else None
        self._settings = settings
        self._start = list(history)
        self._main = main
        self._wandb: Any = None

    def __enter__(self) -> Self:
        if self._path is not None:
            # Lines beyond the checkpoint that a killed run left are dropped here.
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(self._path, b"".join(_line(entry) for entry in self._start))
        if self._main and self._settings.wandb != "disabled":
            import wandb

            self._wandb = wandb.init(
                project="airrep",
                mode=self._settings.wandb,
                dir=None if self._path is None else str(self._path.parent),
                config=asdict(self._settings),
            )
        self._bar = tqdm(
            total=self._settings.max_steps,
            initial=self._start[-1]["step"] if self._start else 0,
            desc="train",
            disable=not (self._main and self._settings.show_progress),
        )
        return self

    def add(self, entry: dict[str, Any]) -> None:
        """One step: appended, shown and sent."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(entry))
        if entry["validation_lds"] is not None:
            self._bar.set_postfix(held_out_lds=f"{entry['validation_lds']:.3f}")
        self._bar.update(entry["step"] - self._bar.n)
        if self._wandb is not None:
            present = {key: value for key, value in entry.items() if value is not None}
            self._wandb.log(present, step=entry["step"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
