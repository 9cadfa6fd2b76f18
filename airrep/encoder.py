"""The AirRep encoder: any text encoder, mean pooling over tokens, one linear layer on top.

Ours also reads the response's words by themselves, which the mean over all tokens drowns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn.functional import layer_norm, rms_norm
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from airrep.device import GPU_ENCODER_TOKENS, attention_of_any_shape, tokens_at_once
from airrep.encoder_config import (
    MAX_LENGTH,
    AirRepConfig,
    base_loader,
    clear_load_errors,
    hub_arguments,
    most_tokens,
    new_base,
    quiet_transformers,
    read_base_config,
    read_config,
)
from airrep.examples import (
    ENCODER_TEMPLATE,
    Example,
    InputError,
    Template,
    TokenizedExample,
    common_start,
    length_sorted_batches,
    lengths_of,
    pad,
    response_mask,
    response_spans,
    token_chunks,
    tokenize_examples,
)
from airrep.marks import WIDTH as MARKS_WIDTH
from airrep.marks import marks
from airrep.pooling import mean_pool
from airrep.provenance import clear_save_errors
from airrep.weights import PACKAGE, check_whole, plain_weights, resolve_model

HEADS = ("projector.", "words_projector.")  # what lies on top of the base, by parameters' names


class AirRepEncoder(PreTrainedModel):
    """e(x) = W mean_tokens(base(x)) + b (arXiv 2505.18513); the similarity is the dot product.

    With `add_response_words` it is W norm(t) + V [norm(r), m] + b, where t is that mean over
    tokens, r the mean of the response's normalised word embeddings, and norm makes the root mean
    square 1: two answers to the same kind of question differ in a token or two of dozens, and it
    is the answer that a loss is taken of. m are `airrep.marks`: codes of the response, of its first
    token, and of the prompt's first tokens.

    `from_base` starts from any text encoder, with W the identity and b zero; `from_pretrained`
    reads what `save_pretrained` wrote, and the published AirRep checkpoints.
    """

    config_class = AirRepConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    tokenizer: Any = None
    # Means over tokens, by token ids: to share among encoders of one frozen base. None keeps none.
    means: dict[bytes, torch.Tensor] | None = None

    def __init__(self, config: AirRepConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base = new_base(config) if base is None else base
        width = self.base.config.hidden_size
        self.projector = nn.Linear(width, width, dtype=self.base.dtype)
        self.words_projector = None
        if config.response_words:
            self.words_projector = self._new_words_projector(config.marks)
        if base is None:
            self.post_init()
        else:
            self._init_weights(self.projector)

    @property
    def max_length(self) -> int:
        """The most tokens of a text that are read."""
        return int(self.config.max_tokens)

    @classmethod
    def from_base(cls, source: str | Path, max_length: int = MAX_LENGTH, **kwargs: Any) -> Self:
        """An untrained encoder on a Hugging Face text encoder: a folder, a hub id, a GGUF file, or
        "package:NAME" (`airrep.weights.resolve_model`).

        Its embeddings are the base's mean-pooled ones. A causal language model is a base too,
        without its head; a GGUF file's is converted once (`airrep.weights.plain_weights`).
        `max_length` is lowered to what the base can read. `kwargs` go to transformers; remote code
        runs only with trust_remote_code=True. Raises InputError when the source is not a model,
        or its weights (in safetensors) or its tokenizer are missing.
        """
        if str(source).startswith(PACKAGE) or Path(source).suffix == ".gguf":
            source = resolve_model(source)
        if Path(source).suffix == ".gguf":
            source = plain_weights(Path(source))
        with clear_load_errors(source):
            config = read_base_config(source, hub_arguments(kwargs))
            tokenizer = AutoTokenizer.from_pretrained(str(source), **hub_arguments(kwargs))
            arguments = {"dtype": torch.float32, **kwargs, "use_safetensors": True}
            loader, extra = base_loader(config)
            base, about = loader.from_pretrained(
                str(source), config=config, output_loading_info=True, **extra, **arguments
            )
        check_whole(source, tokenizer, about["missing_keys"])
        length = min(max_length, most_tokens(base, tokenizer))
        values = {key: value for key, value in base.config.to_dict().items() if key[0] != "_"}
        encoder = cls(AirRepConfig(values, length), base)
        encoder.tokenizer = tokenizer
        return encoder.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """A trained encoder and its tokenizer from a folder or hub id; float32 unless `dtype`.

        Raises InputError when it is not an AirRep encoder, or a file is missing or damaged.
        """
        with clear_load_errors(source):
            config = kwargs.pop("config", None) or read_config(source, hub_arguments(kwargs))
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), config=config.base_config(), **hub_arguments(kwargs)
            )
            arguments = {"dtype": torch.float32, **kwargs, "use_safetensors": True}
            arguments.setdefault("key_mapping", {r"^bert\.": "base."})  # published names
            loaded: Any = super().from_pretrained(
                str(source), *args, config=config, output_loading_info=True, **arguments
            )
        encoder, about = loaded
        check_whole(source, tokenizer, about["missing_keys"])
        encoder.tokenizer = tokenizer
        return encoder.eval()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config, weights (safetensors) and tokenizer into the folder.

        Raises OSError when the disk does not take them.
        """
        with quiet_transformers(), clear_save_errors(save_directory):
            super().save_pretrained(str(save_directory), *args, **kwargs)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(save_directory))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings (B, d) of padded token ids (B, L) with their mask (B, L).

        `response_mask` (B, L) says which tokens are the response's; an encoder with response
        words needs it, and raises InputError without.
        """
        pooled = self.pool(input_ids, attention_mask)
        return self.project(pooled, self.pool_words(input_ids, response_mask))

    def project(self, pooled: torch.Tensor, words: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, d) from what `pool` (B, d) and `pool_words` gave."""
        if self.words_projector is None or words is None:
            return self.projector(pooled)
        return self.projector(rms_norm(pooled, pooled.shape[-1:])) + self.words_projector(words)

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The base's mean-pooled token states (B, d), before the projector."""
        mask = attention_mask.long()
        with attention_of_any_shape(input_ids.device):
            hidden = self.base(input_ids, attention_mask=mask).last_hidden_state
        return mean_pool(hidden, mask)

    def pool_texts(
        self, texts: Sequence[TokenizedExample]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `project` takes of the texts: what `pool` (B, d) and `pool_words` make of them.

        Texts whose means are in `means` do not go through the base again.
        """
        ids, mask, response = self.pad(texts)
        words = self.pool_words(ids, response)
        if self.means is None:
            return self.pool(ids, mask), words
        keys = [text.ids.tobytes() for text in texts]
        new = [row for row, key in enumerate(keys) if key not in self.means]
        if new:
            means = self.pool(ids[new], mask[new]).detach()
            self.means.update(zip([keys[row] for row in new], means, strict=True))
        # Another encoder, elsewhere or of another precision, may have left them.
        known = [self.means[key].to(self.projector.weight) for key in keys]
        return torch.stack(known), words

    def pool_words(
        self, input_ids: torch.Tensor, response_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Means (B, e) of the response tokens' word embeddings, normalised before and after, with
        the marks behind them where there are any; None without response words. An empty response
        has words of 0."""
        if self.words_projector is None:
            return None
        if response_mask is None:
            raise InputError("This encoder reads the response's words; give response_mask too.")
        words = self.base.get_input_embeddings()(input_ids)
        means = mean_pool(layer_norm(words, words.shape[-1:]), response_mask)
        means = rms_norm(means, words.shape[-1:])
        if not self.config.marks:
            return means
        own = marks(input_ids, response_mask, self.config.prompt_start)
        own *= (words.shape[-1] / MARKS_WIDTH) ** 0.5  # as large as the words
        return torch.cat([means, own.to(means)], dim=1)

    def add_response_words(self, with_marks: bool = True) -> None:
        """Makes room for the response's words and for marks, with weights of zero, and normalises
        the text's mean.

        Training gives both their start. Raises InputError where the base has no word embeddings,
        and for marks without a tokenizer.
        """
        words = self._new_words_projector(with_marks)
        nn.init.zeros_(words.weight)
        if with_marks:
            some = self.tokenize([Example("a", "a", "a"), Example("b", "b", "b")])
            self.config.prompt_start = common_start([text.ids for text in some])
        self.words_projector = words.to(self.device)
        self.config.response_words, self.config.marks = True, with_marks

    def _new_words_projector(self, with_marks: bool) -> nn.Linear:
        try:
            table: Any = self.base.get_input_embeddings()
            size = table.embedding_dim
        except (NotImplementedError, AttributeError) as error:
            raise InputError(
                f"{type(self.base).__name__} has no word embeddings to read; train with "
                "response_words false."
            ) from error
        size += MARKS_WIDTH if with_marks else 0
        return nn.Linear(size, self.projector.out_features, bias=False, dtype=self.base.dtype)

    def tokenize(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """Token ids of every example: the only way text comes in."""
        if self.tokenizer is None:
            raise InputError("This encoder has no tokenizer; make it with from_pretrained.")
        template = Template.parse(ENCODER_TEMPLATE)
        return tokenize_examples(examples, self.tokenizer, template, self.max_length)

    @property
    def pad_id(self) -> int:
        """The token id that fills up a batch."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def pad(self, batch: Sequence[TokenizedExample]) -> tuple[torch.Tensor, ...]:
        """What `forward` takes, on the encoder's device: padded token ids, their mask and the
        response's, each (B, L)."""
        ids, mask = pad(batch, self.pad_id)
        response = response_mask(response_spans(batch), ids.shape[1])
        return ids.to(self.device), mask.to(self.device), response.to(self.device)

    def encode(
        self,
        examples: Sequence[Example],
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> torch.Tensor:
        """Embeddings (n, d) float32 on the CPU, in the given order, without dropout.

        `batch_size` is how many examples to take at once; None takes as many as suit the device.
        """
        if batch_size is not None and batch_size < 1:
            raise InputError(f"encode got batch_size {batch_size}; give at least 1.")
        embeddings = torch.empty(len(examples), self.projector.out_features)
        tokenized = self.tokenize(examples)
        lengths = lengths_of(tokenized)
        batches = (
            token_chunks(lengths, tokens_at_once(self.device, GPU_ENCODER_TOKENS))
            if batch_size is None
            else length_sorted_batches(lengths, batch_size)
        )
        with evaluating(self), torch.inference_mode():
            for rows in tqdm(batches, desc="encode", disable=not show_progress):
                pooled, words = self.pool_texts([tokenized[row] for row in rows])
                embeddings[torch.from_numpy(rows)] = self.project(pooled, words).float().cpu()
        return embeddings

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Scores (n, m): dot products of embeddings (n, d) and (m, d)."""
        return a @ b.T

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "projector", None):
            nn.init.eye_(self.projector.weight)
            nn.init.zeros_(self.projector.bias)
        else:
            super()._init_weights(module)


def sharing_means(source: str | Path) -> Callable[[], AirRepEncoder]:
    """Gives untrained encoders on one base (`AirRepEncoder.from_base`), one a call.

    They share `means`: as long as training leaves the base as it is, a text goes through it once.
    """
    means: dict[bytes, torch.Tensor] = {}

    def make() -> AirRepEncoder:
        encoder = AirRepEncoder.from_base(source)
        encoder.means = means
        return encoder

    return make


def add_lora(encoder: AirRepEncoder, rank: int, seed: int) -> None:
    """Puts adapters of a rank (arXiv 2106.09685) on every linear layer of the base, in place.

    They change nothing until they are trained; the parameters that train have "lora_" in their
    names. `merge_lora` ends it. Raises InputError where the base has no layer for them.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    # peft draws from the global generator, which is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: Any = get_peft_model(encoder.base, config)
        except ValueError as error:
            raise InputError(
                f"LoRA cannot be put on {type(encoder.base).__name__} ({error}); leave lora_rank "
                "out."
            ) from error
    encoder.base = adapted


def merge_lora(encoder: AirRepEncoder) -> None:
    """Adds what the adapters have learned to the weights and takes them off: a plain encoder."""
    adapted: Any = encoder.base
    encoder.base = adapted.merge_and_unload()
    for parameter in encoder.base.parameters():
        parameter.requires_grad_(True)


@contextmanager
def training_mode(
    encoder: AirRepEncoder, trained: Mapping[str, nn.Parameter], dropout: bool
) -> Iterator[None]:
    """Inside, only `trained` (by name) takes gradients, and dropout is on or off."""
    wanted = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in trained)
    encoder.train(dropout)
    try:
        yield
    finally:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(wanted[name])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's train or eval mode comes back afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
