"""Gradients of an objective over the whole pool, in bounded memory (gradient caching).

The embeddings of all texts are computed in chunks, most without a graph; the objective gives
their gradient; each chunk is then encoded again to carry its gradient into the weights (Gao et
al., "Scaling deep contrastive learning batch size under memory limited setup", arXiv 2101.06983).
The result is the plain gradient. Several processes share the chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from airrep.examples import token_chunks
from airrep.trunk import Texts


class FullPool:
    """Embeds rows of `texts` and takes gradients of functions of those embeddings.

    `max_graph_tokens` bounds the padded tokens, each counted once a training layer, whose
    activations are kept between the two passes; what exceeds it is encoded twice.
    """

    def __init__(
        self,
        texts: Texts,
        parameters: Sequence[nn.Parameter],
        accelerator: Accelerator,
        chunk_tokens: int,
        max_graph_tokens: int,
        bf16: bool = False,
    ) -> None:
        self.texts = texts
        self.parameters = list(parameters)
        self.accelerator = accelerator
        self.chunk_tokens = chunk_tokens
        self.max_graph_tokens = max_graph_tokens
        self.bf16 = bf16

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        """Embeddings (len(rows), d) float32 of the rows, without gradient, on every process."""
        chunks = self._chunks(rows)
        with torch.no_grad():
            own = [self._embed(rows[chunk]) for chunk in self._own(chunks)]
        return self._gather(own, chunks)

    def backward(
        self,
        rows: np.ndarray,
        objective: Callable[[torch.Tensor], torch.Tensor],
        random_state: Sequence[int] | None = None,
    ) -> float:
        """Sets the parameters' gradients to those of objective(embeddings); returns its value.

        `objective` takes the embeddings (len(rows), d). `random_state` names the dropout of this
        step: a chunk draws from it and its own number, so that both passes, and any number of
        processes, draw the same. Gradients stay unset where the value is not finite.
        """
        chunks = self._chunks(rows)
        numbers = self._own(range(len(chunks)))
        parts = []
        room = self.max_graph_tokens
        for number in numbers:
            cost = self._tokens(rows[chunks[number]]) * self.texts.layers
            room -= cost
            with torch.set_grad_enabled(room >= 0), _drawing(random_state, number, self._device):
                parts.append(self._embed(rows[chunks[number]]))
        leaves = self._gather([part.detach() for part in parts], chunks).requires_grad_()
        value = objective(leaves)
        if not torch.isfinite(value):
            return float(value.detach())
        value.backward()
        assert leaves.grad is not None
        for index, number in enumerate(numbers):
            part, parts[index] = parts[index], torch.empty(0)  # frees the graph as it goes
            if not part.requires_grad:
                with _drawing(random_state, number, self._device):
                    part = self._embed(rows[chunks[number]])
            part.backward(leaves.grad[self._positions(chunks[number])])
        self._sum_gradients()
        return float(value.detach())

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device

    def _chunks(self, rows: np.ndarray) -> list[np.ndarray]:
        """Positions in `rows` of every chunk."""
        return token_chunks(self.texts.lengths[rows], self.chunk_tokens)

    def _own(self, chunks: Sequence) -> Sequence:
        """This process's share: chunks of similar length go round, so shares cost the same."""
        return chunks[self.accelerator.process_index :: self.accelerator.num_processes]

    def _tokens(self, rows: np.ndarray) -> int:
        return len(rows) * int(self.texts.lengths[rows].max())

    def _embed(self, rows: np.ndarray) -> torch.Tensor:
        cast = torch.autocast(self._device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with cast:
            return self.texts.embed(rows).float()

    def _positions(self, chunk: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(chunk).to(self._device)

    def _gather(self, own: list[torch.Tensor], chunks: list[np.ndarray]) -> torch.Tensor:
        """All embeddings in the order of the rows, on every process."""
        processes = self.accelerator.num_processes
        nothing = [np.empty(0, dtype=np.int64)]
        shares = [np.concatenate(chunks[first::processes] or nothing) for first in range(processes)]
        longest = max(len(share) for share in shares)
        # Shares are uneven, gathering is not: pad to the longest.
        padded = torch.zeros(longest, self.texts.width, device=self._device)
        if own:
            mine = torch.cat(own)
            padded[: len(mine)] = mine
        gathered = self.accelerator.gather(padded) if processes > 1 else padded
        embeddings = torch.empty(sum(map(len, shares)), self.texts.width, device=self._device)
        for process, share in enumerate(shares):
            start = process * longest
            embeddings[self._positions(share)] = gathered[start : start + len(share)]
        return embeddings

    def _sum_gradients(self) -> None:
        """Adds up the gradients of all processes, in each."""
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        summed: torch.Tensor = self.accelerator.reduce(flat, reduction="sum")
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, summed.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def _drawing(
    random_state: Sequence[int] | None, chunk: int, device: torch.device
) -> Iterator[None]:
    """Inside, dropout draws from (random_state, chunk); the global generators are put back.

    Dropout takes no generator of its own, so the global one has to be lent.
    """
    if random_state is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    seed = np.random.SeedSequence([*random_state, chunk]).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(seed >> np.uint64(1)))
        yield
