"""Per-example gradients and what is made of them, against plain autograd on small models."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from airrep.examples import InputError, TokenizedExample
from airrep.gradients import adam, layer_gradient
from airrep.gradients.adam import (
    AdamFeatures,
    AdamMoments,
    pool_moments,
    saved_moments,
)
from airrep.gradients.covariances import TokenCovariance, token_covariances
from airrep.gradients.curvature import FisherBlocks, KFACBlocks, inverse_norms
from airrep.gradients.exact import exact_products
from airrep.gradients.layer_gradient import LayerGradient
from airrep.gradients.layers import linear_layers, weight_shape
from airrep.gradients.per_example import GradientModel
from airrep.gradients.projections import (
    SignProjection,
    flat_features,
    pca_projections,
    projected_shapes,
    random_projections,
)
from airrep.gradients.store import GradientStore

VOCABULARY = 50
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ARCHITECTURES = ("llama", "gpt2", "neox")
CPU = torch.device("cpu")


def tiny_causal_lm(architecture: str, vocabulary: int = VOCABULARY) -> nn.Module:
    """A random model: tied head and grouped queries, Conv1D, or parallel blocks with biases."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocabulary, tie_word_embeddings=True, **sizes, **heads, **special
                )
            ).eval()
        if architecture == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
            return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **special)).eval()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocabulary,
                num_attention_heads=2,
                max_position_embeddings=512,
                **sizes,
                **special,
            )
        ).eval()


def plain_gradients(
    model: nn.Module,
    layers: dict[str, nn.Module],
    examples: Sequence[TokenizedExample],
    output: str = "loss",
) -> dict[str, torch.Tensor]:
    """Gradients (n, d_out, d_in) of each example, one at a time, of the weights themselves."""
    weights = {name: layer.weight for name, layer in layers.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        first = max(example.response_start, 1)
        log_p = model(input_ids=ids[None]).logits[0, first - 1 : -1].log_softmax(-1)
        log_p = log_p.gather(1, ids[first:, None])[:, 0]
        value = {
            "loss": -log_p.sum(),
            "mean_loss": -log_p.mean(),
            "margin": (log_p - torch.log1p(-log_p.exp())).sum(),
        }[output]
        gradients = torch.autograd.grad(value, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            turned = weight_shape(layers[name]) != tuple(gradient.shape)
            square_conv = type(layers[name]).__name__ == "Conv1D"
            found[name].append(gradient.T if turned or square_conv else gradient)
    return {name: torch.stack(parts) for name, parts in found.items()}


def texts(count: int = 5, seed: int = 0) -> list[TokenizedExample]:
    """Texts of different lengths; the first is all response."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 14, size=count)
    return [
        TokenizedExample(
            rng.integers(1, VOCABULARY, size=length).astype(np.int32),
            int(rng.integers(1, length)) if number else 0,
        )
        for number, length in enumerate(lengths)
    ]


def gradients_of(model, layers, examples, **settings):
    with GradientModel(model, layers, **settings) as gradient_model:
        return gradient_model.backward(examples)


# Layers


def test_layers_without_a_pattern_are_those_of_the_blocks():
    model = tiny_causal_lm("llama")
    assert len(linear_layers(model)) == 14
    assert not [name for name in linear_layers(model) if "head" in name or "embed" in name]
    assert len(linear_layers(tiny_causal_lm("gpt2"))) == 8


def test_a_pattern_chooses_layers_the_head_and_the_embedding():
    model = tiny_causal_lm("llama")
    assert list(linear_layers(model, r"1\.mlp\.(up|down)")) == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert list(linear_layers(model, "^lm_head$")) == ["lm_head"]
    assert list(linear_layers(model, "embed")) == ["model.embed_tokens"]
    assert len(linear_layers(model, "")) == 16


def test_a_pattern_that_finds_nothing_names_some_layers():
    model = tiny_causal_lm("gpt2")
    with pytest.raises(
        InputError, match="'down_proj' matches none of the 10 linear layers of GPT2"
    ):
        linear_layers(model, "down_proj")
    with pytest.raises(InputError, match="such as transformer.h.0.attn.c_attn"):
        linear_layers(model, "down_proj")
    with pytest.raises(InputError, match=r"layers '\(' is not a regular expression"):
        linear_layers(model, "(")


# Gradients of a batch


@pytest.mark.parametrize("output", ["loss", "mean_loss", "margin"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_autograd(architecture, output):
    model, examples = tiny_causal_lm(architecture), texts()
    layers = linear_layers(model)
    expected = plain_gradients(model, layers, examples, output)
    found = gradients_of(model, layers, examples, output=output).layers
    assert list(found) == list(layers)
    for name, layer in found.items():
        torch.testing.assert_close(layer.full(), expected[name], **CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pattern_for_everything_gives_whole_gradients(architecture):
    """The tied weight's gradient has the head's part and the embedding's."""
    model, examples = tiny_causal_lm(architecture), texts()
    layers = linear_layers(model, "")
    found = gradients_of(model, layers, examples).layers
    tied = architecture != "neox"
    assert len(found) == len(layers) - tied
    expected = plain_gradients(model, {name: layers[name] for name in found}, examples)
    for name, layer in found.items():
        torch.testing.assert_close(layer.full(), expected[name], **CLOSE)


def test_the_head_alone_has_the_heads_part_of_a_tied_gradient():
    model, examples = tiny_causal_lm("llama"), texts(2)
    found = gradients_of(model, linear_layers(model, "lm_head"), examples).layers["lm_head"].full()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    expected = plain_gradients(model, linear_layers(model, "lm_head"), examples)["lm_head"]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_gradients_add_up_to_the_batchs_gradient():
    model, examples = tiny_causal_lm("llama"), texts()
    layers = linear_layers(model)
    total = {
        name: one.full().sum(0)
        for name, one in gradients_of(model, layers, examples).layers.items()
    }
    for name, one in plain_gradients(model, layers, examples).items():
        torch.testing.assert_close(total[name], one.sum(0), rtol=1e-5, atol=1e-5)


def test_neither_batch_nor_padding_nor_order_matters():
    model, examples = tiny_causal_lm("neox"), texts(6)
    layers = linear_layers(model, "")
    together = gradients_of(model, layers, examples)
    backwards = gradients_of(model, layers, examples[::-1])
    alone = [gradients_of(model, layers, [one]) for one in examples]
    for name, layer in together.layers.items():
        full = layer.full()
        torch.testing.assert_close(full, backwards.layers[name].full().flip(0), **CLOSE)
        singly = torch.cat([one.layers[name].full() for one in alone])
        torch.testing.assert_close(full, singly, **CLOSE)
    torch.testing.assert_close(together.doubt, torch.cat([one.doubt for one in alone]), **CLOSE)


def test_doubt_is_one_minus_p_averaged_over_response_tokens():
    model, (example, *_) = tiny_causal_lm("gpt2"), texts()
    ids = torch.from_numpy(example.ids.astype(np.int64))
    with torch.no_grad():
        p = model(input_ids=ids[None]).logits[0, :-1].softmax(-1).gather(1, ids[1:, None])
    doubt = gradients_of(model, linear_layers(model), [example]).doubt
    assert float(doubt) == pytest.approx(float(1 - p.mean()), rel=1e-5)


def test_a_margin_stays_finite_where_p_rounds_to_one():
    model, example = tiny_causal_lm("llama"), TokenizedExample(np.array([3, 4], np.int32), 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    tokens = model(input_ids=torch.tensor([[3]])).logits[0, -1].argmax()
    sure = TokenizedExample(np.array([3, int(tokens)], np.int32), 1)
    found = gradients_of(model, linear_layers(model, "mlp"), [sure, example], output="margin")
    assert float(found.doubt[0]) == 0
    assert all(one.full()[0].abs().max() > 0 for one in found.layers.values())
    assert all(one.full().isfinite().all() for one in found.layers.values())


def test_drawn_labels_have_the_models_distribution():
    """The expected gradient under the model's own labels is 0: many draws come close to it."""
    model, example = tiny_causal_lm("llama"), TokenizedExample(np.array([3, 4, 5], np.int32), 1)
    layers = linear_layers(model, "down_proj")
    sampler = torch.Generator().manual_seed(0)
    with GradientModel(model, layers) as gradient_model:
        name = next(iter(gradient_model.shapes))
        own = gradient_model.backward([example]).layers[name].full()
        drawn = gradient_model.backward([example] * 4000, sampler).layers[name].full()
        again = gradient_model.backward([example], torch.Generator().manual_seed(7)).layers[name]
        same = gradient_model.backward([example], torch.Generator().manual_seed(7)).layers[name]
    assert drawn.mean(0).norm() < 0.1 * own.norm()
    torch.testing.assert_close(again.full(), same.full())


def test_no_weight_has_a_gradient_and_the_model_is_left_as_it_was():
    model, examples = tiny_causal_lm("llama"), texts()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    gradient_model = GradientModel(model, linear_layers(model))
    gradient_model.backward(examples)
    assert not [weight for weight in model.parameters() if weight.grad is not None]
    gradient_model.close()
    assert model.training
    assert not model.lm_head.weight.requires_grad
    others = [weight for weight in model.parameters() if weight is not model.lm_head.weight]
    assert all(weight.requires_grad for weight in others)
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)


def test_nothing_below_the_lowest_layer_has_a_graph():
    model = tiny_causal_lm("llama")
    seen = {}

    def note(name):
        return lambda module, inputs, output: seen.update({name: output.requires_grad})

    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(note(number))
    gradients_of(model, linear_layers(model, r"1\.self_attn\.o_proj"), texts())
    assert seen == {0: False, 1: True}


def test_bf16_gradients_are_close():
    model, examples = tiny_causal_lm("llama"), texts()
    layers = linear_layers(model)
    exact = gradients_of(model, layers, examples).layers
    for name, one in gradients_of(model, layers, examples, precision="bf16").layers.items():
        found, expected = one.full(), exact[name].full()
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
        sides = torch.eye(found.shape[1]), torch.eye(found.shape[2])
        torch.testing.assert_close(one.projected(*sides), found)


def test_projected_gradients_are_projections_of_gradients():
    model, examples = tiny_causal_lm("gpt2"), texts()
    layers = linear_layers(model, "")
    with GradientModel(model, layers) as gradient_model:
        exact = gradient_model.backward(examples).layers
        projections = random_projections(gradient_model.shapes, 3, "0", CPU)
        gradient_model.projections = projections
        found = gradient_model.backward(examples).layers
    for name, (p_out, p_in) in projections.items():
        expected = p_out.T @ exact[name].full() @ p_in
        torch.testing.assert_close(found[name].full(), expected, **CLOSE)
        torch.testing.assert_close(exact[name].projected(p_out, p_in), expected, **CLOSE)


def test_wrong_settings_and_layers_are_named():
    model = tiny_causal_lm("llama")
    layers = linear_layers(model)
    with pytest.raises(InputError, match="output is 'los'; choose one of loss, mean_loss, margin"):
        GradientModel(model, layers, output="los")
    with pytest.raises(InputError, match="precision is 'fp8'; choose one of fp32, bf16"):
        GradientModel(model, layers, precision="fp8")
    unused = {"spare": nn.Linear(2, 2)}
    with pytest.raises(InputError, match="The layer spare has no part in the loss; leave it out"):
        gradients_of(model, unused, texts())


def test_a_layer_that_does_not_see_one_row_an_example_is_named():
    model = tiny_causal_lm("llama")
    attention = model.model.layers[0].self_attn.o_proj
    attention.register_forward_pre_hook(lambda module, inputs: inputs[0].flatten(0, 1))
    attention.register_forward_hook(lambda module, inputs, output: output.view(3, -1, 16))
    with pytest.raises(InputError, match="not one row of tokens for each example; leave it out"):
        gradients_of(model, linear_layers(model, "0.self_attn.o_proj"), texts(3))


# One layer's gradients

sizes = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_every_form_of_a_product_is_that_of_the_matrices(b, other, long, short, d_in, d_out, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, length: int) -> LayerGradient:
        a = torch.randn(size, length, d_in, generator=generator, dtype=torch.float64)
        g = torch.randn(size, length, d_out, generator=generator, dtype=torch.float64)
        return LayerGradient(a, g, torch.ones(size, length, dtype=torch.bool))

    one, two = draw(b, long), draw(other, short)
    expected = torch.einsum("ioj,koj->ik", one.full(), two.full())
    for found in (one.dot(two), one._ghost_dot(two), one._full_dot(two)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one.squared_norms(), one.full().square().sum((1, 2)))


def test_products_in_small_blocks_are_the_same(monkeypatch):
    model, examples = tiny_causal_lm("llama"), texts()
    layer = gradients_of(model, linear_layers(model, "up_proj"), examples).layers
    one = next(iter(layer.values()))
    expected = one.full().flatten(1) @ one.full().flatten(1).T
    monkeypatch.setattr(layer_gradient, "BLOCK", 50)
    torch.testing.assert_close(one._ghost_dot(one), expected)
    torch.testing.assert_close(one._full_dot(one), expected)
    torch.testing.assert_close(one.squared_norms(), expected.diagonal())


@pytest.mark.parametrize("cosine", [False, True])
def test_exact_products_are_those_of_whole_gradients(cosine):
    model, pool, targets = tiny_causal_lm("llama"), texts(6), texts(3, seed=1)
    layers = linear_layers(model, "")

    def flat(examples):
        first = {name: one for name, one in layers.items() if name != "lm_head"}
        whole = plain_gradients(model, first, examples)
        matrix = torch.cat([one.flatten(1) for one in whole.values()], dim=1)
        return F.normalize(matrix) if cosine else matrix

    with GradientModel(model, layers) as gradient_model:
        found = exact_products(
            gradient_model, targets, pool, lambda some: np.split(np.arange(len(some)), [2]), cosine
        )
    np.testing.assert_allclose(found, (flat(targets) @ flat(pool).T).numpy(), rtol=1e-5, atol=1e-5)


# Projections


def test_random_projections_depend_on_seed_and_layer_alone():
    shapes = {"a": (40, 30), "b": (40, 30)}
    both = random_projections(shapes, 4, "0", CPU)
    torch.testing.assert_close(random_projections({"b": (40, 30)}, 4, "0", CPU)["b"], both["b"])
    other = random_projections(shapes, 4, "1", CPU)
    sides = [*both["a"], *both["b"], *other["a"]]
    drawn = torch.stack([side[:30] for side in sides]).flatten(1)
    assert torch.corrcoef(drawn).triu(1).abs().max() < 0.5


def test_random_projections_keep_products_on_average():
    (p_out, p_in) = random_projections({"a": (200, 300)}, 100, "0", CPU)["a"]
    assert p_out.var() * 100 == pytest.approx(1, abs=0.05)
    for one in (p_out, p_in):
        gram = one @ one.T
        assert gram.diagonal().mean() == pytest.approx(1, abs=0.05)
        assert (gram - torch.diag(gram.diagonal())).mean().abs() < 0.01


def test_a_rank_as_wide_as_a_side_loses_nothing():
    p_out, p_in = random_projections({"a": (3, 20)}, 8, "0", CPU)["a"]
    torch.testing.assert_close(p_out, torch.eye(3))
    assert p_in.shape == (20, 8)
    assert projected_shapes({"a": (3, 20)}, 8) == {"a": (3, 8)}
    assert projected_shapes({"a": (3, 20)}, None) == {"a": (3, 20)}


def test_pca_finds_the_directions_that_vary_most():
    inner = torch.diag(torch.tensor([1.0, 5.0, 3.0])).double()
    outer = torch.diag(torch.tensor([2.0, 1.0])).double()
    p_out, p_in = pca_projections({"a": TokenCovariance(inner, outer, 1, 1)}, 2)["a"]
    torch.testing.assert_close(p_in, torch.tensor([[0.0, 0], [1, 0], [0, 1]]))
    torch.testing.assert_close(p_out, torch.eye(2))


def test_sign_projections_are_of_all_layers_together():
    generator = torch.Generator().manual_seed(0)

    def draw(d_out: int, d_in: int) -> LayerGradient:
        a, b = (
            torch.randn(6, 2, d_in, generator=generator),
            torch.randn(6, 2, d_out, generator=generator),
        )
        return LayerGradient(a, b, torch.ones(6, 2, dtype=torch.bool))

    layers = {"a": draw(3, 4), "b": draw(5, 2)}
    project = SignProjection({"a": (3, 4), "b": (5, 2)}, 8, "0", CPU)
    matrix = torch.cat([project.signs["a"], project.signs["b"]])
    torch.testing.assert_close(matrix.abs(), torch.full((22, 8), 8**-0.5))
    assert 0 < (matrix > 0).float().mean() < 1
    torch.testing.assert_close(project(layers), flat_features(layers) @ matrix)
    wide = SignProjection({"a": (3, 4), "b": (5, 2)}, 20000, "0", CPU)
    exact, found = flat_features(layers), wide(layers)
    torch.testing.assert_close(found @ found.T, exact @ exact.T, rtol=0.1, atol=1)


def test_wrong_ranks_and_huge_projections_are_refused():
    with pytest.raises(InputError, match="rank of a projection is 0; give at least 1"):
        random_projections({"a": (2, 2)}, 0, "0", CPU)
    with pytest.raises(InputError, match="of 4,000,000 numbers to 4,096 does not fit in memory"):
        SignProjection({"a": (2000, 2000)}, 4096, "0", CPU)


# Covariances and curvature


def test_covariances_are_over_the_real_tokens():
    model, examples = tiny_causal_lm("llama"), texts(4)
    layers = linear_layers(model, r"0\.self_attn\.q_proj")
    name = next(iter(layers))
    inputs = []
    hook = layers[name].register_forward_hook(
        lambda module, args, output: inputs.append(args[0][0])
    )
    with GradientModel(model, layers) as gradient_model:
        batches = [examples[:3], examples[3:]]
        found = token_covariances(gradient_model, batches)[name]
        inputs.clear()
        singly = [gradient_model.backward([one]).layers[name] for one in examples]
    hook.remove()
    a = torch.cat(inputs).double()
    b = torch.cat([one.output_gradients[0] for one in singly]).double()
    assert (found.tokens, found.examples) == (sum(map(len, examples)), 4)
    torch.testing.assert_close(found.inner, a.T @ a / len(a), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.outer, b.T @ b / len(b), rtol=1e-5, atol=1e-7)


def test_a_layer_too_wide_for_its_covariance_is_named(monkeypatch):
    monkeypatch.setattr("airrep.gradients.covariances.MAX_WIDTH", 20)
    model = tiny_causal_lm("llama")
    with (
        GradientModel(model, linear_layers(model, "0.mlp.up")) as gradient_model,
        pytest.raises(InputError, match="mlp.up_proj has 24 inputs or outputs, too many"),
    ):
        token_covariances(gradient_model, [texts(2)])


def stored(features: torch.Tensor) -> GradientStore:
    store = GradientStore(*features.shape, {})
    store.write(np.arange(len(features)), features, torch.zeros(len(features)))
    return store


def test_fisher_blocks_solve_with_each_layers_damped_matrix():
    features = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    fisher = FisherBlocks.fit(stored(features), [3, 4], 0.1)
    expected, dimension = [], 0.0
    for part in features.double().split([3, 4], dim=1):
        matrix = part.T @ part / 30
        damped = matrix + 0.1 * matrix.trace() / len(matrix) * torch.eye(len(matrix))
        expected.append(part @ torch.linalg.inv(damped))
        dimension += float((matrix @ torch.linalg.inv(damped)).trace())
    solved = torch.cat(expected, dim=1).float()
    torch.testing.assert_close(fisher.solve(features), solved, **CLOSE)
    assert fisher.effective_dimension() == pytest.approx(dimension, rel=1e-6)
    again = FisherBlocks.from_arrays(fisher.arrays())
    torch.testing.assert_close(again.solve(features), fisher.solve(features))
    norms = (solved * features).sum(1).sqrt()
    found = inverse_norms(stored(features), fisher)
    np.testing.assert_allclose(found, (1 / norms).numpy(), rtol=1e-5)


def test_kfac_blocks_solve_with_the_kronecker_product():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 3, generator=generator), torch.randn(50, 2, generator=generator)
    one = TokenCovariance((a.T @ a / 50).double(), (b.T @ b / 50).double(), 50, 5)
    kfac = KFACBlocks.fit([one, one], 0.1)
    matrix = 10 * torch.kron(one.outer, one.inner)
    damped = matrix + 0.1 * matrix.trace() / 6 * torch.eye(6)
    features = torch.randn(4, 12, generator=generator)
    expected = features.double() @ torch.block_diag(*2 * [torch.linalg.inv(damped)])
    torch.testing.assert_close(kfac.solve(features), expected.float(), **CLOSE)
    again = KFACBlocks.from_arrays(kfac.arrays())
    torch.testing.assert_close(again.solve(features), kfac.solve(features))


def test_curvature_that_cannot_be_inverted_asks_for_damping():
    flat = torch.ones(3, 2)
    with pytest.raises(InputError, match="cannot be inverted with damping 0; give more"):
        FisherBlocks.fit(stored(flat), [2], 0)
    one = TokenCovariance(torch.ones(2, 2).double(), torch.ones(2, 2).double(), 3, 1)
    with pytest.raises(InputError, match="cannot be inverted with damping 0; give more"):
        KFACBlocks.fit([one], 0)
    for fit in (lambda: FisherBlocks.fit(stored(flat), [2], -1), lambda: KFACBlocks.fit([one], -1)):
        with pytest.raises(InputError, match="damping is -1; give a share of the mean eigenvalue"):
            fit()


# Adam


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adams_features_are_the_steps_adamw_would_take(architecture, tmp_path):
    from safetensors.torch import save_file

    from airrep.checkpoint import optimizer_tensors

    # In double precision, as Adam makes large steps of gradients that are mere rounding.
    model, examples = tiny_causal_lm(architecture).double(), texts(4)
    layers = linear_layers(model)
    named = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    optimizer = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=0.0)
    for example in texts(3, seed=2):
        gradients_into(model, [example])
        optimizer.step()
    save_file(optimizer_tensors(optimizer, named), tmp_path / "optimizer.safetensors")
    moments = saved_moments(tmp_path, layers)
    found = AdamFeatures(moments, {})(gradients_of(model, layers, examples).layers)
    state, weights = deepcopy(optimizer.state_dict()), model.state_dict()
    weights = {name: weight.clone() for name, weight in weights.items()}
    for row, example in enumerate(examples):
        optimizer.load_state_dict(deepcopy(state))
        model.load_state_dict(weights)
        gradients_into(model, [example])
        optimizer.step()
        steps = {
            name: weights[f"{name}.weight"] - layer.weight.detach()
            for name, layer in layers.items()
        }
        turned = [one.T if architecture == "gpt2" else one for one in steps.values()]
        expected = torch.cat([one.flatten() for one in turned])
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)


def test_adams_features_do_not_depend_on_how_many_outputs_are_taken_at_once(monkeypatch):
    model, examples = tiny_causal_lm("llama"), texts(4)
    layers = linear_layers(model)
    with GradientModel(model, layers) as gradient_model:
        projections = random_projections(gradient_model.shapes, 3, "0", CPU)
        moments = pool_moments(gradient_model, [examples])
    gradients = gradients_of(model, layers, examples).layers
    expected = AdamFeatures(moments, projections)(gradients)
    whole = AdamFeatures(moments, {})(gradients)
    monkeypatch.setattr(adam, "CACHED", 1)
    torch.testing.assert_close(AdamFeatures(moments, {})(gradients), whole, **CLOSE)
    torch.testing.assert_close(AdamFeatures(moments, projections)(gradients), expected, **CLOSE)


def gradients_into(model: nn.Module, examples: Sequence[TokenizedExample]) -> None:
    """Puts the gradient of the summed loss into the weights' .grad."""
    model.zero_grad()
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        first = max(example.response_start, 1)
        logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
        F.cross_entropy(logits, ids[first:], reduction="sum").backward()


def test_estimated_moments_are_mean_squares():
    model, examples = tiny_causal_lm("llama"), texts(5)
    layers = linear_layers(model, "up_proj")
    with GradientModel(model, layers) as gradient_model:
        moments = pool_moments(gradient_model, [examples[:2], examples[2:]])
    for name, one in plain_gradients(model, layers, examples).items():
        torch.testing.assert_close(moments[name].square, one.square().mean(0), **CLOSE)
        assert not moments[name].mean.any()


def test_a_step_of_adam_by_hand():
    moments = AdamMoments(torch.tensor([[2.0]]), torch.tensor([[4.0]]))
    found = moments.step_along(torch.tensor([[[3.0]]]))
    assert float(found) == pytest.approx((0.9 * 2 + 0.1 * 3) / (0.999 * 4 + 0.001 * 9) ** 0.5)
    first = AdamMoments(torch.zeros(1, 1), torch.zeros(1, 1), steps=0)
    assert float(first.step_along(torch.tensor([[[-0.2]]]))) == pytest.approx(-1, rel=1e-5)


def test_damaged_and_partial_moments_are_named(tmp_path):
    from safetensors.torch import save_file

    layers = linear_layers(tiny_causal_lm("llama"), "0.mlp.up")
    assert saved_moments(tmp_path, layers) is None
    (tmp_path / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="optimizer.safetensors cannot be read"):
        saved_moments(tmp_path, layers)
    save_file({"optimizer/step/x": torch.tensor(1.0)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(InputError, match="no entry 'optimizer/exp_avg/model.layers.0.mlp.up_proj"):
        saved_moments(tmp_path, layers)
