"""Causal language models: loading one, and the loss of responses under it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn import functional as F

from airrep.device import attention_of_any_shape
from airrep.examples import InputError, TokenizedExample, length_sorted_batches
from airrep.response_batch import ResponseBatch, response_batch
from airrep.weights import check_whole, load_failure


def load_lm(
    path: Path, device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A causal LM in float32 and its tokenizer, from a folder or a GGUF file.

    `path` is what `airrep.weights.resolve_model` returned. Weights are read from safetensors or
    GGUF only. A GGUF file's weights are dequantised, and the model is a plain one afterwards:
    `save_pretrained` writes it as safetensors. Raises InputError when they cannot be loaded, some
    are missing, or the model is not a causal one.
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
        with _without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, **weights, output_loading_info=True
            )
    except Exception as error:  # damaged files make transformers raise anything
        raise InputError(
            f"{path} cannot be loaded as a causal language model: {load_failure(error)}"
        ) from error
    model, about = loaded
    if hasattr(model.config, "quantization_config"):
        # The weights are plain now; with these, save_pretrained would refuse or quantise again.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    model = model.to(device).eval()
    if _looks_ahead(model):
        raise InputError(
            f"{path} is not a causal language model ({type(model).__name__} sees the tokens behind "
            "the one it predicts); give one such as SmolLM2 or Qwen."
        )
    check_whole(path, tokenizer, about["missing_keys"])
    return model, tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading takes a second, and happens again and again."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    """Whether the logits at a token change with the token behind it."""
    ids = torch.tensor([[0, 1], [0, 2]], device=next(model.parameters()).device)
    first, second = model(input_ids=ids, use_cache=False).logits[:, 0].float()
    # Weights that are not finite are another fault, which the losses show.
    return not torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)


class ResponseModel:
    """A causal LM that computes only what the loss of responses needs.

    The head, and the last block's feed-forward part, run only where response tokens are
    predicted. Padding on the right needs no attention mask: with causal attention no real token
    sees it. Packed rows get a mask and positions of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise InputError(f"{type(model).__name__} has no output embeddings; give a causal LM.")
        self._batch: ResponseBatch | None = None
        # Selecting in front of the head keeps whatever the model does to its logits afterwards.
        self._hooks = [head.register_forward_pre_hook(self._select)]
        blocks = find_blocks(model)
        feed_forward = None if blocks is None else getattr(blocks[-1], "mlp", None)
        if feed_forward is not None:
            self._hooks.append(feed_forward.register_forward_pre_hook(self._select))
            self._hooks.append(feed_forward.register_forward_hook(self._put_back))

    def _select(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        if self._batch is None:
            return None
        hidden = inputs[0].flatten(0, 1)
        # One text a model: a mixture of experts wants three dimensions.
        return hidden[self._batch.places.clamp(max=len(hidden) - 1)], *inputs[1:]

    def _put_back(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        if self._batch is None:
            return None
        # Nothing reads the other positions: the head is the only one behind the last block. What
        # only fills up a model's row goes to one position too many, which is dropped.
        ids = self._batch.ids
        whole = output.new_zeros(ids.numel() + 1, output.shape[-1])
        whole = whole.index_copy(0, self._batch.places.flatten(), output.flatten(0, 1))
        return whole[:-1].view(*ids.shape, -1)

    def logits(self, batch: ResponseBatch, **layout: torch.Tensor) -> torch.Tensor:
        """What the model makes of the head's output (K, R, V) at the batch's response tokens."""
        self._batch = batch
        try:
            with attention_of_any_shape(batch.ids.device):
                return self.model(input_ids=batch.ids, use_cache=False, **layout).logits
        finally:
            self._batch = None

    def token_losses(self, batch: ResponseBatch) -> torch.Tensor:
        """Cross-entropy (K, R) float32 of the batch's response tokens; 0 where there is none."""
        layout = {}
        if batch.packed:
            layout = {"position_ids": batch.offsets, "attention_mask": batch.attention()}
        logits = self.logits(batch, **layout)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch.tokens.flatten(), reduction="none"
        )
        return losses.view_as(batch.tokens) * (batch.rows >= 0)

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
    """Mean (K, count) of the values (K, R) of each row; negative rows do not count.

    NaN for a row without values.
    """
    totals = torch.zeros(len(values), count + 1, dtype=torch.float64, device=values.device)
    numbers = torch.zeros_like(totals)
    places = torch.where(rows < 0, count, rows)
    totals.scatter_add_(1, places, values.double())
    numbers.scatter_add_(1, places, torch.ones_like(values, dtype=torch.float64))
    return (totals / numbers)[:, :count].float()


@torch.inference_mode()
def mean_losses(
    lengths: ArrayLike,
    batch_size: int,
    compute: Callable[[np.ndarray], tuple[ResponseBatch, torch.Tensor]],
) -> np.ndarray:
    """Mean response loss (K, n) float32 of examples of these lengths (n,), in length-sorted
    batches, under each of the models that `compute` runs.

    `compute` gives the batch of some rows and its token losses (K, R).
    """
    parts = []
    order = length_sorted_batches(lengths, batch_size)
    for rows in order:
        batch, token_losses = compute(rows)
        parts.append(mean_by_row(token_losses, batch.rows, len(rows)))
    # One copy at the end: on a GPU each would wait for the work before it.
    together = torch.cat(parts, dim=1).cpu().numpy()
    losses = np.empty_like(together)
    losses[:, np.concatenate(order)] = together
    return losses


def response_losses(
    model: nn.Module, examples: Sequence[TokenizedExample], batch_size: int = 64
) -> np.ndarray:
    """Mean response-token cross-entropy (n,) float32 of every example under the model, in nats."""
    device = next(model.parameters()).device
    respond = ResponseModel(model)

    def compute(rows: np.ndarray) -> tuple[ResponseBatch, torch.Tensor]:
        batch = response_batch([[examples[row] for row in rows]]).to(device)
        return batch, respond.token_losses(batch)

    try:
        return mean_losses([len(example) for example in examples], batch_size, compute)[0]
    finally:
        respond.close()
