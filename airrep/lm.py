"""Causal language models: loading one, and the loss of responses under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn import functional as F

from airrep.examples import InputError, TokenizedExample, length_sorted_batches, pad


def load_lm(
    path: Path, device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A causal LM in float32 and its tokenizer, from a folder or a GGUF file.

    `path` is what `airrep.weights.resolve_model` returned. Weights are read from safetensors or
    GGUF only. A GGUF file's weights are dequantised, and the model is a plain one afterwards:
    `save_pretrained` writes it as safetensors. Raises InputError when they cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    weights: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        del weights["use_safetensors"]
    source["trust_remote_code"] = trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, **weights)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} cannot be loaded as a causal language model: {reason}") from error
    if hasattr(model.config, "quantization_config"):
        # The weights are plain now; with these, save_pretrained would refuse or quantise again.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


@dataclass(frozen=True)
class ResponseBatch:
    """Some examples as tensors: ids (B, L); where the model predicts response tokens (B, L)
    bool; those tokens (R,); the batch row of each (R,)."""

    ids: torch.Tensor
    predicts: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device) -> "ResponseBatch":
        return ResponseBatch(
            self.ids.to(device),
            self.predicts.to(device),
            self.tokens.to(device),
            self.rows.to(device),
        )


def response_batch(examples: Sequence[TokenizedExample]) -> ResponseBatch:
    """The batch of examples, padded on the right.

    The token at position i is predicted from position i - 1. A response that starts the text
    has no position to be predicted from for its first token, so that token does not count.
    """
    ids, real = pad(examples, pad_id=0)
    position = torch.arange(ids.shape[1])
    starts = torch.tensor([max(example.response_start, 1) for example in examples])
    is_response = real & (position >= starts[:, None])
    predicts = torch.zeros_like(real)
    predicts[:, :-1] = is_response[:, 1:]
    rows = is_response.nonzero()[:, 0]
    return ResponseBatch(ids, predicts, ids[is_response], rows)


class ResponseModel:
    """A causal LM that computes only what the loss of responses needs.

    The head, and the last block's feed-forward part, run only where response tokens are
    predicted. Padding on the right needs no attention mask: with causal attention no real token
    sees it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise InputError(f"{type(model).__name__} has no output embeddings; give a causal LM.")
        self._predicts: torch.Tensor | None = None
        # Selecting in front of the head keeps whatever the model does to its logits afterwards.
        self._hooks = [head.register_forward_pre_hook(self._select)]
        blocks = find_blocks(model)
        feed_forward = None if blocks is None else getattr(blocks[-1], "mlp", None)
        if feed_forward is not None:
            self._hooks.append(feed_forward.register_forward_pre_hook(self._select))
            self._hooks.append(feed_forward.register_forward_hook(self._put_back))

    def _select(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        # As one text of all selected positions: a mixture of experts wants three dimensions.
        return None if self._predicts is None else (inputs[0][self._predicts][None], *inputs[1:])

    def _put_back(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        if self._predicts is None:
            return None
        # Nothing reads the other positions: the head is the only one behind the last block.
        whole = output.new_zeros(*self._predicts.shape, output.shape[-1])
        whole[self._predicts] = output[0]
        return whole

    def token_losses(self, batch: ResponseBatch) -> torch.Tensor:
        """Cross-entropy (R,) float32 of every response token of the batch."""
        self._predicts = batch.predicts
        try:
            logits = self.model(input_ids=batch.ids, use_cache=False).logits[0]
        finally:
            self._predicts = None
        return F.cross_entropy(logits.float(), batch.tokens, reduction="none")

    def close(self) -> None:
        """Gives the model back as it was."""
        for hook in self._hooks:
            hook.remove()


def find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The model's transformer blocks: its list of as many modules as its configuration has layers.

    None when it has no such list.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((blocks for blocks in lists if len(blocks) == count), None)


def mean_by_row(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Mean (count,) of the values (R,) of each row; NaN for a row without any."""
    totals = torch.zeros(count, dtype=torch.float64, device=values.device)
    totals.index_add_(0, rows, values.double())
    return (totals / torch.bincount(rows, minlength=count)).float()


@torch.inference_mode()
def mean_losses(
    lengths: ArrayLike,
    batch_size: int,
    compute: Callable[[np.ndarray], tuple[ResponseBatch, torch.Tensor]],
) -> np.ndarray:
    """Mean response loss (n,) float32 of examples of these lengths (n,), in length-sorted batches.

    `compute` gives the batch of some rows and its token losses (R,).
    """
    losses = np.empty(np.shape(lengths)[0], dtype=np.float32)
    for rows in length_sorted_batches(lengths, batch_size):
        batch, token_losses = compute(rows)
        losses[rows] = mean_by_row(token_losses, batch.rows, len(rows)).cpu().numpy()
    return losses


def response_losses(
    model: nn.Module, examples: Sequence[TokenizedExample], batch_size: int = 64
) -> np.ndarray:
    """Mean response-token cross-entropy (n,) float32 of every example under the model, in nats."""
    device = next(model.parameters()).device
    respond = ResponseModel(model)

    def compute(rows: np.ndarray) -> tuple[ResponseBatch, torch.Tensor]:
        batch = response_batch([examples[row] for row in rows]).to(device)
        return batch, respond.token_losses(batch)

    try:
        return mean_losses([len(example) for example in examples], batch_size, compute)
    finally:
        respond.close()
