"""Examples: reading them, and the only place where one becomes text and tokens.

A prompt too long for a model loses its middle; the response is never cut away. The language
model and the encoder see examples through the same function, `tokenize_examples`, in training
and in scoring.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from airrep.provenance import write_bytes_atomic

if TYPE_CHECKING:
    import torch

ENCODER_TEMPLATE = "Question: {prompt}\nAnswer: {response}"


class InputError(ValueError):
    """Wrong input: the message says what was found, where, and what to do."""


@dataclass(frozen=True)
class Example:
    """One prompt with its response: a row of the training pool, or a target."""

    id: str
    prompt: str
    response: str
    task: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """The text around a prompt and its response; `after` counts as part of the response."""

    before: str
    between: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "...{prompt}...{response}..."; raises InputError for any other shape."""
        before, found_prompt, rest = text.partition("{prompt}")
        between, found_response, after = rest.partition("{response}")
        if not found_prompt or not found_response:
            raise InputError(
                f"The template {text!r} needs {{prompt}} and then {{response}}; "
                'write for example "{prompt}\\n{response}".'
            )
        return cls(before, between, after)

    @property
    def text(self) -> str:
        """What `parse` reads."""
        return f"{self.before}{{prompt}}{self.between}{{response}}{self.after}"


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids (L,) of a whole example; the response's tokens are ids[response_start:].

    The last `tail` of those are special tokens that the tokenizer puts behind every text.
    """

    ids: np.ndarray
    response_start: int
    tail: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def response_end(self) -> int:
        """Where the response's own tokens end."""
        return len(self.ids) - self.tail


def encoder_text(example: Example) -> str:
    """The text of an example for methods that read words, not tokens."""
    return ENCODER_TEMPLATE.format(prompt=example.prompt, response=example.response)


def lm_template(tokenizer: Any, template: str = "auto") -> Template:
    """The template of a language model.

    "auto" is the tokenizer's chat template (one user turn, one assistant turn) where it has one,
    else prompt, newline, response and the end-of-text token. Anything else is read by
    `Template.parse`. Raises InputError when the chat template cannot be used this way.
    """
    if template != "auto":
        return Template.parse(template)
    if getattr(tokenizer, "chat_template", None):
        found = _chat_template(tokenizer)
    else:
        found = Template("", "\n", tokenizer.eos_token or "")
    # What the tokenizer puts around every text by itself must not come twice.
    head, tail = _special_tokens(tokenizer)
    before = found.before.removeprefix(tokenizer.decode(head)) if head else found.before
    after = found.after.removesuffix(tokenizer.decode(tail)) if tail else found.after
    return Template(before, found.between, after)


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Any, template: Template, max_length: int
) -> list[TokenizedExample]:
    """Token ids of every example, at most `max_length` of them, special tokens included.

    A prompt that does not fit loses its middle; a response that does not fit beside an empty
    prompt loses its end. Raises InputError when `max_length` leaves no room for a response.
    """
    if not examples:
        return []
    head, tail = _special_tokens(tokenizer)
    between = _ids(tokenizer, [template.between])[0]
    room = max_length - len(head) - len(tail)
    if room < len(between) + 8:
        raise InputError(
            f"max_length is {max_length}, which leaves no room for a response beside the "
            f"template's own tokens; give at least {max_length - room + len(between) + 8}."
        )
    prompts = _ids(
        tokenizer, [template.before + example.prompt + template.between for example in examples]
    )
    responses = _ids(tokenizer, [example.response + template.after for example in examples])
    tokenized = []
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        if not response or not example.response.strip():
            raise InputError(
                f"Example {example.id!r} has an empty response ({example.response!r}); "
                "remove it or give it a response."
            )
        response = response[: room - len(between)]
        if len(prompt) + len(response) > room:
            prompt = _cut_middle(prompt, len(between), room - len(response))
        ids = np.asarray([*head, *prompt, *response, *tail], dtype=np.int32)
        tokenized.append(TokenizedExample(ids, len(head) + len(prompt), len(tail)))
    return tokenized


def common_start(ids: Sequence[np.ndarray]) -> int:
    """How many tokens all texts open with."""
    least = min(map(len, ids))
    heads = np.stack([one[:least] for one in ids])
    differ = (heads != heads[0]).any(axis=0)
    return int(np.argmax(differ)) if differ.any() else least


def pad(batch: Sequence[TokenizedExample], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) int64, padded on the right, and the mask (B, L) of real tokens, bool."""
    import torch

    length = max(len(example) for example in batch)
    ids = np.full((len(batch), length), pad_id, dtype=np.int64)
    for row, example in enumerate(batch):
        ids[row, : len(example)] = example.ids
    lengths = np.asarray([len(example) for example in batch])
    return torch.from_numpy(ids), torch.from_numpy(np.arange(length) < lengths[:, None])


def response_spans(batch: Sequence[TokenizedExample]) -> np.ndarray:
    """Where each response's own tokens start and end (B, 2)."""
    return np.asarray([(text.response_start, text.response_end) for text in batch])


def response_mask(spans: np.ndarray, length: int) -> torch.Tensor:
    """Which of `length` padded tokens are the response's own (B, length), bool."""
    import torch

    places = np.arange(length)
    return torch.from_numpy((places >= spans[:, :1]) & (places < spans[:, 1:]))


def token_chunks(lengths: np.ndarray, chunk_tokens: int) -> list[np.ndarray]:
    """Rows in chunks of similar length, longest first, each of at most `chunk_tokens` padded
    tokens (a single longer text is a chunk of its own)."""
    order = np.argsort(-lengths, kind="stable")
    chunks, start = [], 0
    while start < len(order):
        size = max(1, chunk_tokens // max(1, int(lengths[order[start]])))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def lengths_of(tokenized: Sequence[TokenizedExample]) -> np.ndarray:
    """Tokens (n,) of each text."""
    return np.asarray([len(text) for text in tokenized], dtype=np.int64)


def length_sorted_batches(lengths: ArrayLike, batch_size: int) -> list[np.ndarray]:
    """Rows in batches of similar length, longest first, so that little is padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def fingerprint_examples(examples: Iterable[Example]) -> str:
    """sha256 of the examples' ids, prompts and responses, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        row = json.dumps([example.id, example.prompt, example.response])
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """Writes jsonl that `read_examples` reads back; the folder is made if need be."""
    lines = []
    for example in examples:
        row: dict[str, Any] = {"id": example.id}
        if example.task is not None:
            row["task"] = example.task
        row |= {"prompt": example.prompt, "response": example.response}
        if example.meta:
            row["meta"] = dict(example.meta)
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, "".join(lines).encode())


def _chat_template(tokenizer: Any) -> Template:
    from jinja2 import TemplateError

    advice = 'give an explicit template such as "{prompt}\\n{response}".'
    prompt, response = "<the prompt>", "<the response>"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise InputError(
            f"The tokenizer's chat template refuses a user's and an assistant's turn ({error}); "
            + advice
        ) from None
    before, found_prompt, rest = text.partition(prompt)
    between, found_response, after = rest.partition(response)
    if not found_prompt or not found_response:
        raise InputError(
            f"The tokenizer's chat template does not keep the two turns as they are; {advice}"
        )
    # White space after the end-of-turn token belongs to the next turn.
    return Template(before, between, after.rstrip())


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text ([CLS] and [SEP], a BOS, nothing)."""
    plain = _ids(tokenizer, ["a"])[0]
    whole = tokenizer(["a"])["input_ids"][0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _cut_middle(prompt: list[int], kept_end: int, room: int) -> list[int]:
    """`room` tokens of a prompt: its head and its tail, the last `kept_end` among them."""
    tail = max(kept_end, room // 2)
    return prompt[: room - tail] + prompt[len(prompt) - tail :]
