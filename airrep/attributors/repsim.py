"""RepSim: cosines of the language model's last hidden states."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from airrep.attributor import pack_text, unpack_text
from airrep.attributors.language_model import LanguageModelAttributor
from airrep.choices import check_choice
from airrep.device import attention_of_any_shape
from airrep.examples import Example, pad
from airrep.gradients.per_example import autocast

POSITIONS = ("last", "mean")


@dataclass(eq=False, repr=False)
class RepSimAttributor(LanguageModelAttributor):
    """score(x, z) = cosine of two texts' hidden states behind the last block and its norm.

    `position`: "last", the state at the response's last token, or "mean", over all of the
    response's tokens. Nothing of it is a gradient: similar texts, not texts that help.
    """

    name = "repsim"

    _: KW_ONLY
    position: str = "last"

    def _fit(self, pool: Sequence[Example]) -> None:
        check_choice("position", self.position, POSITIONS)
        self.fingerprint_ = self._open().fingerprint
        self.states_ = self._hidden_states(pool)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        self._check_same(self._open(), self.fingerprint_)
        return self._hidden_states(targets) @ self.states_.T

    @torch.no_grad()
    def _hidden_states(self, examples: Sequence[Example]) -> np.ndarray:
        """States (n, d) float32 of norm 1."""
        opened = self._open()
        model: Any = opened.model
        device = next(model.parameters()).device
        tokens = self._tokenize(examples, opened.tokenizer)
        states = np.empty((len(tokens), model.config.hidden_size), dtype=np.float32)
        for rows in self._batches(tokens, "hidden states"):
            batch = [tokens[row] for row in rows]
            ids, chosen = pad(batch, pad_id=0)
            for line, one in enumerate(batch):
                first = len(one) - 1 if self.position == "last" else one.response_start
                chosen[line, :first] = False
            # Padding on the right needs no attention mask: no real token sees it.
            with autocast(device, self.precision), attention_of_any_shape(device):
                hidden = model.base_model(
                    input_ids=ids.to(device), use_cache=False
                ).last_hidden_state
            weights = (chosen / chosen.sum(1, keepdim=True)).to(device)
            mean = torch.einsum("bld,bl->bd", hidden.float(), weights)
            states[rows] = torch.nn.functional.normalize(mean).cpu().numpy()
        return states

    def _state(self) -> dict[str, np.ndarray]:
        return {"states": self.states_, "lm": pack_text([self.fingerprint_])}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.states_ = state["states"]
        self.fingerprint_ = unpack_text(state["lm"])[0]
