"""Cached gradients are the plain gradients, whatever is frozen, dropped or cut into chunks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_encoder, tiny_tokenizer
from training_task import planted_examples
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
)

from airrep.encoder import AirRepEncoder
from airrep.examples import InputError, token_chunks
from airrep.full_pool import FullPool
from airrep.objectives import correlation
from airrep.pooling import attention_pool, membership
from airrep.trunk import Texts, prepare_texts, trainable_parameters

pytestmark = pytest.mark.usefixtures("on_cpu")

POOL = 16
EXAMPLES = planted_examples(POOL + 6, seed=1)
ROWS = np.asarray(
    [*range(2, POOL), *range(POOL + 1, len(EXAMPLES))]
)  # not all, so that order shows
UNBOUNDED = 10**9
layers = pytest.mark.parametrize("trainable_layers", [None, 3, 1, 0])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> AirRepEncoder:
    encoder = AirRepEncoder.from_base(tiny_encoder(tmp_path_factory.mktemp("base")))
    encoder.add_response_words()
    assert encoder.words_projector is not None
    # Of its own: what ran before would decide how much rounding counts.
    drawn = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(encoder.words_projector.weight, std=0.1, generator=drawn)
    return encoder


def objective(embeddings: torch.Tensor) -> torch.Tensor:
    pool = POOL - 2
    rng = np.random.default_rng(0)
    members = membership([rng.choice(pool, 5, replace=False) for _ in range(8)], pool)
    labels = torch.from_numpy(rng.standard_normal((len(ROWS) - pool, 8)).astype(np.float32))
    return correlation(attention_pool(embeddings[pool:] @ embeddings[:pool].T, members), labels)


def gradients(
    encoder: AirRepEncoder,
    trainable_layers: int | None,
    chunk_tokens: int,
    max_graph_tokens: int,
    random_state: tuple[int, ...] | None = None,
    plain: Callable[[Texts], torch.Tensor] | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name; `plain` embeds in place of FullPool, in one ordinary graph."""
    encoder.train(random_state is not None)
    encoder.zero_grad()
    parameters = trainable_parameters(encoder, trainable_layers)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in parameters)
    texts = prepare_texts(encoder, encoder.tokenize(EXAMPLES), trainable_layers, chunk_tokens)
    if plain is not None:
        loss = objective(plain(texts))
        loss.backward()
        value = float(loss.detach())
    else:
        full_pool = FullPool(
            texts, list(parameters.values()), Accelerator(), chunk_tokens, max_graph_tokens
        )
        value = full_pool.backward(ROWS, objective, random_state)
    return value, {name: parameter.grad.clone() for name, parameter in parameters.items()}


def plain_gradients(
    encoder: AirRepEncoder, trainable_layers: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Through the whole encoder, in one batch and one graph."""

    def whole(texts: Texts) -> torch.Tensor:
        return encoder(*encoder.pad(encoder.tokenize([EXAMPLES[row] for row in ROWS])))

    return gradients(encoder, trainable_layers, UNBOUNDED, UNBOUNDED, plain=whole)


def assert_same(
    a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        scale = b[1][name].abs().max()
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-3, atol=1e-6 + 1e-4 * float(scale))
    assert max(float(gradient.abs().max()) for gradient in a[1].values()) > 1e-4


@layers
@pytest.mark.parametrize("max_graph_tokens", [0, 150, UNBOUNDED])
def test_cached_gradient_equals_plain_gradient(
    encoder: AirRepEncoder, trainable_layers: int | None, max_graph_tokens: int
) -> None:
    cached = gradients(encoder, trainable_layers, 50, max_graph_tokens)
    assert_same(cached, plain_gradients(encoder, trainable_layers))


@layers
@pytest.mark.parametrize("chunk_tokens", [1, 37, 100, UNBOUNDED])
def test_chunk_size_invariance(
    encoder: AirRepEncoder, trainable_layers: int | None, chunk_tokens: int
) -> None:
    assert_same(
        gradients(encoder, trainable_layers, chunk_tokens, 0),
        gradients(encoder, trainable_layers, 64, UNBOUNDED),
    )


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_dropout_is_replayed(encoder: AirRepEncoder, trainable_layers: int | None) -> None:
    """The second pass drops what the first one dropped, or the two-pass gradient would differ."""
    cached = gradients(encoder, trainable_layers, 50, 0, (7, 1))
    one_pass = gradients(encoder, trainable_layers, 50, UNBOUNDED, (7, 1))
    assert_same(cached, one_pass)
    without = gradients(encoder, trainable_layers, 50, 0)
    other_step = gradients(encoder, trainable_layers, 50, 0, (7, 2))
    assert len({cached[0], without[0], other_step[0]}) == 3


def test_dropout_leaves_the_global_generator_alone(encoder: AirRepEncoder) -> None:
    before = torch.random.get_rng_state()
    gradients(encoder, None, 50, 0, (7, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_value_that_is_not_finite_sets_no_gradient(encoder: AirRepEncoder) -> None:
    texts = prepare_texts(encoder, encoder.tokenize(EXAMPLES), 0, 50)
    parameters = list(encoder.projector.parameters())
    encoder.zero_grad()
    full_pool = FullPool(texts, parameters, Accelerator(), 50, 0)
    assert np.isnan(full_pool.backward(ROWS, lambda embeddings: embeddings.sum() * np.nan))
    assert all(parameter.grad is None for parameter in parameters)


def test_embed_keeps_the_order_of_the_rows(encoder: AirRepEncoder) -> None:
    encoder.eval()
    texts = prepare_texts(encoder, encoder.tokenize(EXAMPLES), 1, 50)
    full_pool = FullPool(texts, list(encoder.parameters()), Accelerator(), 50, 0)
    rows = np.random.default_rng(0).permutation(len(EXAMPLES))
    expected = encoder.encode([EXAMPLES[row] for row in rows])
    torch.testing.assert_close(full_pool.embed(rows), expected)


class CountedTexts:
    """A linear map of numbers, and what each call of `embed` costs in padded tokens."""

    layers, width = 6, 2

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(1, 200, count)
        self.linear = torch.nn.Linear(1, self.width)
        self.inputs = torch.from_numpy(rng.standard_normal((count, 1), dtype=np.float32))
        self.rows: list[np.ndarray] = []
        self.tokens: list[int] = []
        self.with_graph: list[bool] = []

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        self.rows.append(rows)
        self.tokens.append(len(rows) * int(self.lengths[rows].max()))
        self.with_graph.append(torch.is_grad_enabled())
        return self.linear(self.inputs[torch.from_numpy(rows)])


@pytest.mark.parametrize("max_graph_tokens", [0, 500_000, UNBOUNDED])
def test_a_large_pool_keeps_few_activations(max_graph_tokens: int) -> None:
    """Of 100,000 rows no call and no kept graph is larger than asked, none is encoded thrice."""
    count, chunk_tokens = 100_000, 16_384
    texts = CountedTexts(count)
    parameters = list(texts.linear.parameters())
    first_pass = 0

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        nonlocal first_pass
        first_pass = len(texts.rows)
        return embeddings.square().mean()

    full_pool = FullPool(texts, parameters, Accelerator(), chunk_tokens, max_graph_tokens)
    full_pool.backward(np.arange(count), objective)
    kept = np.asarray(texts.with_graph[:first_pass])
    tokens = np.asarray(texts.tokens)
    assert tokens.max() <= chunk_tokens
    assert texts.layers * tokens[:first_pass][kept].sum() <= max_graph_tokens
    np.testing.assert_array_equal(np.sort(np.concatenate(texts.rows[:first_pass])), range(count))
    assert all(texts.with_graph[first_pass:])
    assert len(texts.rows) == first_pass + (~kept).sum()
    assert kept.all() == (max_graph_tokens == UNBOUNDED)
    gradients = [parameter.grad for parameter in parameters]
    plain = torch.autograd.grad(texts.linear(texts.inputs).square().mean(), parameters)
    torch.testing.assert_close(gradients, list(plain), rtol=1e-4, atol=1e-6)


def test_token_chunks() -> None:
    chunks = token_chunks(np.asarray([3, 9, 3, 5, 2]), chunk_tokens=6)
    assert [chunk.tolist() for chunk in chunks] == [[1], [3], [0, 2], [4]]


def opened(model: PreTrainedModel, folder: Path) -> AirRepEncoder:
    model.save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return AirRepEncoder.from_base(folder)


def test_other_architectures_are_cut(tmp_path: Path) -> None:
    """DistilBERT, and ModernBERT: rotary positions, local attention, a norm after the layers."""
    vocabulary = len(tiny_tokenizer())
    distil = DistilBertConfig(vocab_size=vocabulary, dim=32, n_layers=3, n_heads=2, hidden_dim=64)
    modern = ModernBertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        local_attention=8,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    )
    for model in (DistilBertModel(distil), ModernBertModel(modern)):
        encoder = opened(model, tmp_path / type(model).__name__)
        assert_same(gradients(encoder, 2, 50, 0), plain_gradients(encoder, 2))


def test_an_architecture_that_cannot_be_cut(encoder: AirRepEncoder, tmp_path: Path) -> None:
    albert = AlbertConfig(
        vocab_size=len(tiny_tokenizer()),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    shared = opened(AlbertModel(albert), tmp_path)
    with pytest.raises(InputError, match=r"AlbertModel cannot be frozen in part.*set it to 0"):
        prepare_texts(shared, shared.tokenize(EXAMPLES), 1, 50)
    assert prepare_texts(shared, shared.tokenize(EXAMPLES), 0, 50).embed(ROWS).shape == (19, 32)
    with pytest.raises(InputError, match=r"trainable_layers is 4, but the encoder has 3 layers"):
        trainable_parameters(encoder, 4)
