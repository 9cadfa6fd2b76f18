"""Gradient methods against their formulas, written out with plain autograd on small models."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_attributors import POOL, TARGETS
from test_gradients import ARCHITECTURES, plain_gradients, tiny_causal_lm
from tiny_lm import VOCABULARY, save_tiny_lm, tiny_tokenizer
from torch.nn import functional as F

from airrep.attributor import Attributor
from airrep.attributors import gradient
from airrep.attributors.datainf import DataInfAttributor
from airrep.attributors.grad_cos import GradCosAttributor
from airrep.attributors.grad_dot import GradDotAttributor
from airrep.attributors.language_model import open_lm
from airrep.attributors.less import LESSAttributor
from airrep.attributors.logra import LoGraAttributor
from airrep.attributors.repsim import RepSimAttributor
from airrep.attributors.tracin import TracInAttributor
from airrep.attributors.trak import TRAKAttributor
from airrep.examples import InputError, lm_template, tokenize_examples
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel
from airrep.gradients.projections import SignProjection, random_projections
from airrep.gradients.store import GradientStore
from airrep.lm import load_lm

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PATTERN = "mlp|lm_head|embed|wte"
METHODS = (
    GradDotAttributor,
    GradCosAttributor,
    TracInAttributor,
    LoGraAttributor,
    TRAKAttributor,
    LESSAttributor,
    RepSimAttributor,
)

pytestmark = pytest.mark.filterwarnings("ignore:trak's width", "ignore:.*less estimates Adam's")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request, tmp_path_factory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("lm") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("lm") / "llama", "llama")


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many examples every backward pass had, as they come."""
    ran, backward = [], GradientModel.backward

    def counted(self, examples, *others):
        ran.append(len(examples))
        return backward(self, examples, *others)

    monkeypatch.setattr(GradientModel, "backward", counted)
    return ran


def save_causal_lm(folder: Path, architecture: str) -> Path:
    tiny_causal_lm(architecture, VOCABULARY).save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def tokens_of(tokenizer, examples):
    return tokenize_examples(examples, tokenizer, lm_template(tokenizer), 512)


def gradients(folder: Path, examples, pattern=None, output="loss") -> dict[str, torch.Tensor]:
    """Whole gradients (n, d_out, d_in) by layer, as autograd gives them; a tied weight once."""
    model, tokenizer = load_lm(folder)
    first = {
        id(layer.weight): name for name, layer in reversed(linear_layers(model, pattern).items())
    }
    layers = {
        name: one for name, one in linear_layers(model, pattern).items() if name in first.values()
    }
    return plain_gradients(model, layers, tokens_of(tokenizer, examples), output)


def bias_gradients(folder: Path, examples, pattern: str) -> dict[str, torch.Tensor]:
    """Gradients (n, d_out) of zeros that are added to each layer's outputs, by plain autograd."""
    model, tokenizer = load_lm(folder)
    layers = linear_layers(model, pattern)
    rows = {name: [] for name in layers}
    for text in tokens_of(tokenizer, examples):
        ids = torch.from_numpy(text.ids.astype(np.int64))
        added, hooks = {}, []
        for name, layer in layers.items():
            zeros = torch.zeros(layer.weight.shape[-1 if hasattr(layer, "nf") else 0])
            added[name] = zeros.requires_grad_()
            hooks.append(
                layer.register_forward_hook(lambda _, __, out, zeros=added[name]: out + zeros)
            )
        logits = model(ids[None]).logits[0, text.response_start - 1 : -1]
        F.cross_entropy(logits, ids[text.response_start :], reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for name in layers:
            rows[name].append(added[name].grad)
    return {name: torch.stack(some) for name, some in rows.items()}


def flat(by_layer: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([one.flatten(1) for one in by_layer.values()], dim=1).double().numpy()


def projected(by_layer, rank: int, seed: str = "0/0") -> dict[str, torch.Tensor]:
    shapes = {name: tuple(one.shape[1:]) for name, one in by_layer.items()}
    projections = random_projections(shapes, rank, seed, torch.device("cpu"))
    return {name: p_out.T @ by_layer[name] @ p_in for name, (p_out, p_in) in projections.items()}


def normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def whitened_products(x: np.ndarray, z: np.ndarray, damping: float) -> list[np.ndarray]:
    """x^T (F + ridge)^-1 z, and the same of x with x, and of z with z."""
    fisher = z.T @ z / len(z)
    inverse = np.linalg.inv(fisher + damping * np.trace(fisher) / len(fisher) * np.eye(len(fisher)))
    return [x @ inverse @ z.T, (x @ inverse * x).sum(1), (z @ inverse * z).sum(1)]


def check(scores: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# Formulas


@pytest.mark.parametrize("pattern", [None, PATTERN])
def test_grad_dot_is_the_product_of_gradients(lm, pattern):
    x, z = (flat(gradients(lm, some, pattern)) for some in (TARGETS, POOL))
    check(GradDotAttributor(lm, layers=pattern).fit(POOL).score(TARGETS), x @ z.T)


def test_grad_cos_is_their_cosine(llama):
    x, z = (normalised(flat(gradients(llama, some, PATTERN))) for some in (TARGETS, POOL))
    check(GradCosAttributor(llama, layers=PATTERN).fit(POOL).score(TARGETS), x @ z.T)


def test_with_a_rank_they_are_of_projections(llama):
    x, z = (flat(projected(gradients(llama, some), 3)) for some in (TARGETS, POOL))
    check(GradDotAttributor(llama, projection_rank=3).fit(POOL).score(TARGETS), x @ z.T)
    cosines = GradCosAttributor(llama, projection_rank=3).fit(POOL).score(TARGETS)
    check(cosines, normalised(x) @ normalised(z).T)


def test_a_full_rank_is_exact(llama):
    """Sides no wider than the rank stay as they are."""
    exact = GradDotAttributor(llama).fit(POOL).score(TARGETS)
    check(GradDotAttributor(llama, projection_rank=64).fit(POOL).score(TARGETS), exact)


def test_a_step_along_a_helpful_examples_gradient_lowers_the_targets_loss(llama):
    """The sign, and the size: the score is minus the loss's slope along the step."""
    scores = GradDotAttributor(llama).fit(POOL).score(TARGETS[:1])[0]
    model, tokenizer = load_lm(llama)
    model.double()
    layers = linear_layers(model)
    step = plain_gradients(model, layers, tokens_of(tokenizer, POOL[:1]))
    (target,) = tokens_of(tokenizer, TARGETS[:1])

    def loss(size: float) -> float:
        with torch.no_grad():
            for name, layer in layers.items():
                turned = step[name][0].T if type(layer).__name__ == "Conv1D" else step[name][0]
                layer.weight -= size * turned
            ids = torch.from_numpy(target.ids.astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0, target.response_start - 1 : -1]
            return float(F.cross_entropy(logits, ids[target.response_start :], reduction="sum"))

    slope = (loss(1e-4) - loss(-2e-4)) / 2e-4
    assert scores[0] == pytest.approx(-slope, rel=1e-2)


def test_tracin_sums_checkpoints_by_learning_rate(tmp_path):
    folders = [save_tiny_lm(tmp_path / str(seed), layers=1, seed=seed) for seed in range(2)]
    expected = sum(
        rate * GradDotAttributor(folder).fit(POOL).score(TARGETS)
        for rate, folder in zip((0.5, 2.0), folders, strict=True)
    )
    settings = {"checkpoints": folders, "learning_rates": (0.5, 2.0)}
    check(TracInAttributor(folders[0], **settings).fit(POOL).score(TARGETS), expected)
    projected_scores = TracInAttributor(folders[0], projection_rank=64, **settings).fit(POOL)
    check(projected_scores.score(TARGETS), expected)


@pytest.mark.parametrize("normalise", ["dot", "cosine"])
def test_logra_is_preconditioned_layer_by_layer(lm, normalise):
    x, z = (projected(gradients(lm, some), 3) for some in (TARGETS, POOL))
    parts = [whitened_products(flat({name: x[name]}), flat({name: z[name]}), 0.1) for name in x]
    products, own, pool = (sum(part) for part in zip(*parts, strict=True))
    expected = products / np.sqrt(np.outer(own, pool)) if normalise == "cosine" else products
    found = LoGraAttributor(lm, projection_rank=3, normalise=normalise).fit(POOL).score(TARGETS)
    check(found, expected)


@pytest.mark.parametrize("rank", [None, 3])
def test_logra_of_biases_is_of_what_could_be_added_to_outputs(lm, rank):
    pattern = r"mlp|fc|dense_4h|c_proj"
    x, z = (bias_gradients(lm, some, pattern) for some in (TARGETS, POOL))
    if rank is not None:
        shapes = {name: (one.shape[1], 1) for name, one in z.items()}
        sides = random_projections(shapes, rank, "0/0", torch.device("cpu"))
        x, z = ({name: one @ sides[name][0] for name, one in some.items()} for some in (x, z))
    parts = [whitened_products(flat({name: x[name]}), flat({name: z[name]}), 0.1) for name in x]
    products, own, pool = (sum(part) for part in zip(*parts, strict=True))
    settings = {"layers": pattern, "projection_rank": rank, "parameters": "biases"}
    found = LoGraAttributor(lm, **settings).fit(POOL)
    check(found.score(TARGETS), products / np.sqrt(np.outer(own, pool)))
    assert found.features_[0].store.width == sum(one.shape[1] for one in z.values())


def test_targets_asked_before_are_not_run_again(llama, monkeypatch):
    found = LoGraAttributor(llama, projection_rank=3).fit(POOL)
    ran = []
    write = LoGraAttributor._write

    def counted(self, store, rows, *how):
        ran.append(len(rows))
        write(self, store, rows, *how)

    monkeypatch.setattr(LoGraAttributor, "_write", counted)
    first = found.score(TARGETS[:2])
    both = found.score([*TARGETS[1:], TARGETS[0], TARGETS[1]])
    assert ran == [2, len(TARGETS) - 2]
    np.testing.assert_allclose(both[-2:], first, rtol=1e-4, atol=1e-6)
    found.damping = 10.0  # of the same features
    assert not np.allclose(found.fit(POOL).score(TARGETS[:2]), first)
    assert ran == [2, len(TARGETS) - 2, len(POOL)]
    found.seed = 1
    monkeypatch.setattr("airrep.attributors.gradient.KNOWN_BYTES", 0)
    again = found.fit(POOL).score(TARGETS[:2])
    np.testing.assert_array_equal(found.score(TARGETS[:2]), again)
    assert ran[3:] == [len(POOL), 2, 2]


@pytest.mark.parametrize("method", [LoGraAttributor, TRAKAttributor, LESSAttributor])
def test_targets_of_the_pool_have_its_features(method, llama, tmp_path, passes):
    found = small(method, llama).fit(POOL)
    found.save(tmp_path)
    blind, loaded = Attributor.load(tmp_path), Attributor.load(tmp_path)
    blind.features_[0].keys = np.empty(0, dtype=np.int64)
    expected = blind.score([*POOL[:3], TARGETS[0]])  # runs all of them
    for one in (found, loaded):
        passes.clear()
        check(one.score([*POOL[:3], TARGETS[0]]), expected)
        # LESS makes other features of the pool.
        assert sum(passes) == (4 if method is LESSAttributor else 1)


def test_logra_with_much_damping_is_grad_cos(llama):
    """With equal blocks: the ridge is a share of each layer's own curvature."""
    pattern = r"h\.1\.attn\.c_attn|layers\.1\..*(o_proj|\.dense$)"
    found = LoGraAttributor(llama, layers=pattern, projection_rank=4, damping=1e6).fit(POOL)
    cosines = GradCosAttributor(llama, layers=pattern, projection_rank=4).fit(POOL)
    np.testing.assert_allclose(found.score(TARGETS), cosines.score(TARGETS), atol=1e-4)


@pytest.mark.parametrize("curvature", ["fisher", "kfac"])
def test_logra_with_whole_pca_directions_is_unprojected_logra(lm, curvature):
    """Orthonormal directions of full rank only turn the space, which no score sees."""
    settings = {"layers": r"\.1\..*(c_attn|o_proj|dense$)", "curvature": curvature}
    turned = LoGraAttributor(lm, projection="pca", projection_rank=99, **settings).fit(POOL)
    plain = LoGraAttributor(lm, projection_rank=None, **settings).fit(POOL)
    found, expected = turned.score(TARGETS), plain.score(TARGETS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_trak_is_its_formula(lm):
    x, z = (projected(gradients(lm, some, output="margin"), 3) for some in (TARGETS, POOL))
    shapes = {name: tuple(one.shape[1:]) for name, one in x.items()}
    signs = SignProjection(shapes, 20, "0/0", torch.device("cpu")).signs
    matrix = torch.cat(list(signs.values())).double().numpy()
    phi_x, phi_z = flat(x) @ matrix, flat(z) @ matrix
    gram = phi_z.T @ phi_z
    ridge = 0.1 * np.trace(gram) / 20
    model, tokenizer = load_lm(lm)
    doubts = []
    for one in tokens_of(tokenizer, POOL):
        ids = torch.from_numpy(one.ids.astype(np.int64))
        with torch.no_grad():
            p = model(input_ids=ids[None]).logits[0, one.response_start - 1 : -1].softmax(-1)
        p = p.gather(1, ids[one.response_start :, None])
        doubts.append(float(1 - p.mean()))
    expected = phi_x @ np.linalg.inv(gram + ridge * np.eye(20)) @ phi_z.T * np.asarray(doubts)
    trak = TRAKAttributor(lm, projection_rank=3, width=20).fit(POOL)
    check(trak.score(TARGETS), expected)
    dimension = np.trace(gram @ np.linalg.inv(gram + ridge * np.eye(20)))
    assert trak.effective_dimensions() == [pytest.approx(dimension, rel=1e-4)]


def test_trak_averages_checkpoints_and_projections(tmp_path):
    folders = [save_tiny_lm(tmp_path / str(seed), layers=1, seed=seed) for seed in range(2)]
    settings = {"projection_rank": 3, "width": 16}
    both = TRAKAttributor(folders[0], checkpoints=folders, projections=2, **settings).fit(POOL)
    singly = [TRAKAttributor(one, projections=2, **settings).fit(POOL) for one in folders]
    found = both.score(TARGETS)
    check(found, np.mean([one.score(TARGETS) for one in singly], axis=0))
    one = TRAKAttributor(folders[0], **settings).fit(POOL).score(TARGETS)
    assert not np.allclose(one, singly[0].score(TARGETS), rtol=0.1)


def test_trak_warns_of_a_width_near_the_effective_dimension(llama):
    with pytest.warns(UserWarning, match="trak's width 16 is less than 10 times the effective dim"):
        TRAKAttributor(llama, projection_rank=2, width=16).fit(POOL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRAKAttributor(llama, projection_rank=2, width=16, damping=100.0).fit(POOL)


def test_less_without_moments_estimates_them_and_says_so(lm):
    x, z = (gradients(lm, some, output="mean_loss") for some in (TARGETS, POOL))
    steps = {}
    for name, one in z.items():
        square = one.square().mean(0)
        steps[name] = 0.1 * one / ((0.999 * square + 0.001 * one.square()).sqrt() + 1e-8)
    expected = normalised(flat(projected(x, 3))) @ normalised(flat(projected(steps, 3))).T
    with pytest.warns(UserWarning, match="has no optimizer.safetensors; less estimates Adam's sec"):
        less = LESSAttributor(lm, projection_rank=3).fit(POOL)
    np.testing.assert_allclose(less.score(TARGETS), expected, rtol=1e-4, atol=1e-4)


def test_less_reads_adams_moments_from_the_checkpoint(tmp_path):
    lm = save_tiny_lm(tmp_path / "lm", layers=1)
    x, z = (gradients(lm, some, output="mean_loss") for some in (TARGETS, POOL))
    generator, steps, tensors = torch.Generator().manual_seed(0), {}, {}
    for name, one in z.items():
        mean = torch.randn(one.shape[1:], generator=generator) * 0.1
        square = torch.rand(one.shape[1:], generator=generator)
        entries = {"exp_avg": mean, "exp_avg_sq": square, "step": torch.tensor(5.0)}
        tensors |= {f"optimizer/{key}/{name}.weight": value for key, value in entries.items()}
        new_mean = (0.9 * mean + 0.1 * one) / (1 - 0.9**6)
        new_square = (0.999 * square + 0.001 * one.square()) / (1 - 0.999**6)
        steps[name] = new_mean / (new_square.sqrt() + 1e-8)
    save_file(tensors, lm / "optimizer.safetensors")
    expected = normalised(flat(projected(x, 3))) @ normalised(flat(projected(steps, 3))).T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        less = LESSAttributor(lm, projection_rank=3, learning_rates=[0.5]).fit(POOL)
    check(less.score(TARGETS), 0.5 * expected)


@pytest.mark.parametrize("position", ["last", "mean"])
def test_repsim_is_the_cosine_of_last_hidden_states(lm, position):
    model, tokenizer = load_lm(lm)

    def states(examples):
        found = []
        for one in tokens_of(tokenizer, examples):
            ids = torch.from_numpy(one.ids.astype(np.int64))
            with torch.no_grad():
                hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
            first = -1 if position == "last" else one.response_start
            found.append(hidden[first:].mean(0).double().numpy())
        return normalised(np.stack(found))

    expected = states(TARGETS) @ states(POOL).T
    check(RepSimAttributor(lm, position=position).fit(POOL).score(TARGETS), expected)


# Invariances


def small(method: type, lm: Path, **settings):
    known = {"projection_rank": 4, "width": 16, "sample": 8, "layers": "mlp"}
    takes = method.__dataclass_fields__
    return method(lm, **{key: value for key, value in known.items() if key in takes} | settings)


@pytest.mark.parametrize("method", METHODS)
def test_neither_batches_nor_the_order_of_the_pool_matter(llama, method):
    scores = small(method, llama).fit(POOL).score(TARGETS)
    tight = small(method, llama, batch_tokens=1).fit(POOL[::-1])
    limit = np.abs(scores).max()
    np.testing.assert_allclose(tight.score(TARGETS)[:, ::-1], scores, rtol=1e-4, atol=1e-4 * limit)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_method_scores_the_same(llama, tmp_path, method):
    fitted = small(method, llama).fit(POOL)
    fitted.save(tmp_path)
    state = fitted._state()
    again = method(**fitted._saved_params())
    again._restore(state)
    again.pool_size_, again.pool_fingerprint_ = fitted.pool_size_, fitted.pool_fingerprint_
    np.testing.assert_array_equal(again.score(TARGETS), fitted.score(TARGETS))
    assert isinstance(again, Attributor)


@pytest.mark.parametrize("method", [GradDotAttributor, LoGraAttributor, RepSimAttributor])
def test_other_weights_than_the_pools_are_refused(tmp_path, method):
    lm = save_tiny_lm(tmp_path / "lm", layers=1)
    fitted = small(method, lm).fit(POOL)
    save_tiny_lm(lm, layers=1, seed=1)
    again = small(method, lm)
    again._restore(fitted._state())
    again.pool_size_ = fitted.pool_size_
    with pytest.raises(InputError, match="lm has other weights .* than the pool was fitted with"):
        again.score(TARGETS)


# The store


def test_features_in_a_folder_score_as_those_in_memory(llama, tmp_path):
    memory = small(LoGraAttributor, llama).fit(POOL)
    folder = small(LoGraAttributor, llama, store=tmp_path / "store").fit(POOL)
    np.testing.assert_array_equal(folder.score(TARGETS), memory.score(TARGETS))
    assert "0/records" not in folder._state()
    assert folder.bytes_per_example == pytest.approx(memory.bytes_per_example, abs=1)
    again = LoGraAttributor(**folder._saved_params())
    again._restore(folder._state())
    again.pool_size_ = len(POOL)
    np.testing.assert_array_equal(again.score(TARGETS), memory.score(TARGETS))


@pytest.mark.parametrize("method", [LoGraAttributor, TRAKAttributor, LESSAttributor])
def test_a_stopped_fit_goes_on(llama, tmp_path, method, monkeypatch):
    expected = small(method, llama).fit(POOL).score(TARGETS)
    settings = {"store": tmp_path / "store", "batch_tokens": 60}
    written, write = [], GradientStore.write

    def stop_after_two(self, rows, *content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(rows)
        write(self, rows, *content)

    monkeypatch.setattr(GradientStore, "write", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        small(method, llama, **settings).fit(POOL)
    first = np.concatenate(written)
    monkeypatch.setattr(
        GradientStore,
        "write",
        lambda self, rows, *content: (written.append(rows), write(self, rows, *content)),
    )
    fitted = small(method, llama, **settings).fit(POOL)
    monkeypatch.undo()
    np.testing.assert_allclose(fitted.score(TARGETS), expected, **CLOSE)
    assert len(first)
    np.testing.assert_array_equal(np.sort(np.concatenate(written)), np.arange(len(POOL)))


def test_workers_share_the_pool(llama, tmp_path, monkeypatch):
    settings = {"store": tmp_path / "store", "projection": "pca"}
    for rows in (range(5), range(5, 12)):
        small(LoGraAttributor, llama, **settings).store_features(POOL, rows)
    monkeypatch.setattr(GradientStore, "write", None)
    fitted = small(LoGraAttributor, llama, **settings).fit(POOL)
    monkeypatch.undo()
    expected = small(LoGraAttributor, llama, projection="pca").fit(POOL).score(TARGETS)
    np.testing.assert_allclose(fitted.score(TARGETS), expected, **CLOSE)
    with pytest.raises(InputError, match="store_features needs a folder; give one as `store`"):
        small(LoGraAttributor, llama).store_features(POOL, range(5))


def test_whole_gradients_go_into_a_folder_too(llama, tmp_path):
    settings = {"layers": "o_proj", "projection_rank": None}
    folder = LoGraAttributor(llama, store=tmp_path, **settings).fit(POOL)
    memory = LoGraAttributor(llama, **settings).fit(POOL)
    np.testing.assert_array_equal(folder.score(TARGETS), memory.score(TARGETS))


def test_methods_share_one_loaded_model(llama, tmp_path):
    other = save_tiny_lm(tmp_path / "lm", layers=1)
    first = open_lm(llama, "cpu")
    GradCosAttributor(llama).fit(POOL)
    assert open_lm(str(llama), "cpu").model is first.model
    assert open_lm(other, "cpu").model is not first.model
    assert open_lm(llama, "cpu").model is not first.model


def test_methods_share_features_that_are_the_same_and_no_others(llama, tmp_path):
    def made(method, pool=POOL, **settings):
        method(llama, **{"projection_rank": 4, "store": tmp_path} | settings).fit(pool)
        return len(list(tmp_path.iterdir()))

    for method in (GradDotAttributor, GradCosAttributor, TracInAttributor, LoGraAttributor):
        assert made(method) == 1
    assert made(LoGraAttributor, projection="pca") == 2
    assert made(LoGraAttributor, parameters="biases") == 3
    assert made(GradDotAttributor, projection_rank=5) == 4
    assert made(GradDotAttributor, POOL[::-1]) == 5
    assert made(GradDotAttributor, store_dtype="float16") == 6
    assert made(TRAKAttributor) == 7
    assert made(GradDotAttributor) == 7


def test_methods_share_the_features_of_targets_too(llama, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(gradient, "STORED_TARGETS", len(TARGETS))
    settings = {"projection_rank": 4, "store": tmp_path}
    for method in (LoGraAttributor, GradCosAttributor, DataInfAttributor):
        small(method, llama, **settings).fit(POOL).score(TARGETS)
    assert sum(passes) == len(POOL) + len(TARGETS)
    # A method with another pass over the pool has targets' features of its own.
    small(LESSAttributor, llama, **settings).fit(POOL).score(TARGETS)
    small(TRAKAttributor, llama, **settings).fit(POOL).score(TARGETS)
    monkeypatch.undo()
    for method in (LoGraAttributor, DataInfAttributor, LESSAttributor, TRAKAttributor):
        stored = small(method, llama, **settings).fit(POOL).score(TARGETS)
        memory = small(method, llama, projection_rank=4).fit(POOL).score(TARGETS)
        np.testing.assert_allclose(stored, memory, **CLOSE)


def test_a_stopped_pass_over_targets_goes_on(llama, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(gradient, "STORED_TARGETS", len(TARGETS))
    fitted = small(LoGraAttributor, llama, store=tmp_path, batch_tokens=1).fit(POOL)
    passes.clear()
    counted = GradientModel.backward

    def stop_after_one(self, examples):
        if passes:
            raise KeyboardInterrupt
        return counted(self, examples)

    monkeypatch.setattr(GradientModel, "backward", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        fitted.score(TARGETS)
    assert passes == [1]
    passes.clear()
    monkeypatch.setattr(GradientModel, "backward", counted)
    found = fitted.score(TARGETS)
    assert sum(passes) == len(TARGETS) - 1
    expected = small(LoGraAttributor, llama).fit(POOL).score(TARGETS)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_a_saved_method_finds_its_model_and_its_features_from_anywhere(
    llama, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("lm").symlink_to(llama)
    found = TracInAttributor("lm", checkpoints=["lm"], projection_rank=4, store="features")
    found.fit(POOL).save("saved")
    expected = found.score(TARGETS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Attributor.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.score(TARGETS), expected)
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(InputError, match="not in .*features.* any more; fit the method again"):
        Attributor.load(tmp_path / "saved")


def test_settings_are_checked_before_features_are_written(llama, tmp_path):
    with pytest.raises(InputError, match="parameters is 'both'"):
        LoGraAttributor(llama, parameters="both", store=tmp_path).store_features(POOL, [0])


@pytest.mark.parametrize(
    ("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 2e-2)]
)
def test_smaller_types_cost_little(llama, dtype, error):
    exact = small(LoGraAttributor, llama).fit(POOL)
    found = small(LoGraAttributor, llama, store_dtype=dtype).fit(POOL)
    np.testing.assert_allclose(found.score(TARGETS), exact.score(TARGETS), atol=error)
    assert found.bytes_per_example < exact.bytes_per_example


# Errors


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (LoGraAttributor, {"projection": "svd"}, "projection is 'svd'; choose one of random, pca"),
        (LoGraAttributor, {"curvature": "hessian"}, "curvature is 'hessian'; choose one of fisher"),
        (LoGraAttributor, {"parameters": "both"}, "parameters is 'both'; choose one of weights"),
        (
            LoGraAttributor,
            {"parameters": "biases", "curvature": "kfac"},
            "'kfac' is of weights; take 'fisher' for biases",
        ),
        (
            LoGraAttributor,
            {"parameters": "biases", "layers": "embed"},
            "input embedding has no biases",
        ),
        (LoGraAttributor, {"normalise": "l2"}, "normalise is 'l2'; choose one of dot, cosine"),
        (
            LoGraAttributor,
            {"projection": "pca", "projection_rank": None},
            "'pca' needs a projection",
        ),
        (LoGraAttributor, {"projection_rank": 0}, "rank of a projection is 0"),
        (LoGraAttributor, {"damping": -1.0}, "damping is -1.0; give a share"),
        (LoGraAttributor, {"layers": "nothing"}, "layers 'nothing' matches none of the 16 linear"),
        (LoGraAttributor, {"batch_tokens": 0}, "batch_tokens is 0; give at least 1"),
        (TRAKAttributor, {"projections": 0}, "projections is 0; give at least 1"),
        (TRAKAttributor, {"checkpoints": []}, "checkpoints is an empty list; give at least one"),
        (
            TracInAttributor,
            {"learning_rates": [1, 2]},
            "There are 2 learning_rates for 1 checkpoints",
        ),
        (LESSAttributor, {"learning_rates": []}, "There are 0 learning_rates for 1 checkpoints"),
        (LESSAttributor, {"sample": 0}, "sample is 0; give at least 1"),
        (RepSimAttributor, {"position": "first"}, "position is 'first'; choose one of last, mean"),
        (RepSimAttributor, {"precision": "fp8"}, "precision is 'fp8'; choose one of fp32, bf16"),
    ],
)
def test_wrong_settings_are_named(llama, method, settings, message):
    with pytest.raises(InputError, match=message):
        small(method, llama, **settings).fit(POOL)
