"""What methods that run the language model share: opening it, and examples as its tokens."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from airrep.attributor import Attributor
from airrep.device import pick_device, tokens_at_once
from airrep.examples import (
    Example,
    InputError,
    TokenizedExample,
    lengths_of,
    lm_template,
    token_chunks,
    tokenize_examples,
)


@dataclass(frozen=True)
class OpenedLM:
    """A language model, its tokenizer, where they came from, and the fingerprint of their files."""

    source: str
    path: Path
    model: nn.Module
    tokenizer: Any
    fingerprint: str


_LOADED: dict[tuple[Path, str, tuple[Any, ...]], OpenedLM] = {}  # at most one


@dataclass(eq=False, repr=False)
class LanguageModelAttributor(Attributor):
    """A method that asks the language model itself.

    `lm` is a hub id, a folder, a GGUF file or "package:NAME"; `template` and `max_length` as for
    labels (`lm_template`, `tokenize_examples`). A batch has at most `batch_tokens` tokens, padding
    included, which bounds the memory for activations; None is 2048 on a CPU, 16384 elsewhere.
    `precision`: "fp32", or "bf16" for the passes through the model. `device`: "auto" is a GPU
    where there is one.

    A saved attributor holds what it learned of the pool, and the name of the model: when that
    has other weights later, scoring raises InputError.
    """

    lm: str | Path
    _: KW_ONLY
    template: str = "auto"
    max_length: int = 512
    batch_tokens: int | None = None
    precision: str = "fp32"
    device: str = "auto"
    pooling: str = "sum"
    show_progress: bool = False

    def _open(self, source: str | Path | None = None) -> OpenedLM:
        """The language model, or one of its checkpoints, on the device."""
        return open_lm(source or self.lm, pick_device(self.device))

    def _check_same(self, opened: OpenedLM, fingerprint: str) -> None:
        """Raises InputError when the model has other weights than the pool was learned with."""
        if opened.fingerprint != fingerprint:
            raise InputError(
                f"{opened.source} has other weights (sha256 {opened.fingerprint[:12]}) than the "
                f"pool was fitted with ({fingerprint[:12]}); fit again."
            )

    def _tokenize(self, examples: Sequence[Example], tokenizer: Any) -> list[TokenizedExample]:
        template = lm_template(tokenizer, self.template)
        return tokenize_examples(examples, tokenizer, template, self.max_length)

    def _batches(
        self, tokenized: Sequence[TokenizedExample], what: str = "gradients"
    ) -> Iterator[np.ndarray]:
        """Rows in batches of similar length, longest first, with a progress bar."""
        from tqdm.auto import tqdm

        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"batch_tokens is {self.batch_tokens}; give at least 1.")
        size = self.batch_tokens or tokens_at_once(pick_device(self.device))
        with tqdm(total=len(tokenized), desc=what, disable=not self.show_progress) as bar:
            for rows in token_chunks(lengths_of(tokenized), size):
                yield rows
                bar.update(len(rows))

    def _saved_params(self) -> dict[str, Any]:
        # Paths become text; the device belongs to the machine that loads it.
        params = json.loads(json.dumps(self.params(), default=str))
        del params["device"]
        params["lm"] = _found_anywhere(params["lm"])
        if params.get("checkpoints") is not None:
            params["checkpoints"] = list(map(_found_anywhere, params["checkpoints"]))
        return params


def _found_anywhere(source: str) -> str:
    """A model's folder or file by its whole path; a name as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def open_lm(source: str | Path, device: str) -> OpenedLM:
    """A language model on a device; the one opened last in this process stays loaded.

    All methods share it, so they must leave it as it was. Changed files are read again.
    """
    from airrep.lm import load_lm
    from airrep.weights import fingerprint_weights, plain_weights, resolve_model

    path = plain_weights(resolve_model(source))
    files = sorted(path.iterdir())
    stamps = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = (path, device, stamps)
    if key not in _LOADED:
        _LOADED.clear()  # two at once may not fit
        model, tokenizer = load_lm(path, device)
        _LOADED[key] = OpenedLM(str(source), path, model, tokenizer, fingerprint_weights(path))
    return _LOADED[key]


def checked_checkpoints(
    lm: str | Path, checkpoints: Sequence[str | Path] | None
) -> list[str | Path]:
    """The checkpoints of a training run, or the one model; InputError for an empty list."""
    if checkpoints is None:
        return [lm]
    if not checkpoints:
        raise InputError("checkpoints is an empty list; give at least one, or leave it out.")
    return list(checkpoints)


def checked_rates(count: int, learning_rates: Sequence[float] | None) -> list[float]:
    """The learning rate of each of `count` checkpoints, 1 where none are given.

    Raises InputError for another number of them.
    """
    if learning_rates is None:
        return [1.0] * count
    if len(learning_rates) != count:
        raise InputError(
            f"There are {len(learning_rates)} learning_rates for {count} checkpoints; give one "
            "for each."
        )
    return list(learning_rates)


def tokens_state(tokens: Sequence[TokenizedExample]) -> dict[str, np.ndarray]:
    """Tokenized examples as the arrays of a saved state."""
    return {
        "ids": np.concatenate([one.ids for one in tokens]),
        "lengths": np.asarray([len(one) for one in tokens]),
        "response_starts": np.asarray([one.response_start for one in tokens]),
    }


def restore_tokens(state: dict[str, np.ndarray]) -> list[TokenizedExample]:
    """The examples `tokens_state` took apart."""
    texts = np.split(state["ids"], np.cumsum(state["lengths"])[:-1])
    starts = state["response_starts"].tolist()
    return [TokenizedExample(ids, start) for ids, start in zip(texts, starts, strict=True)]
