"""Other people's attribution packages as oracles; each test is skipped where its package is absent.

Tried with kronfluence 1.0.1, dattri 0.3.0 and bergson 2.5.1. Two of them ask for torchvision, which
they do without: `pip install --no-deps` them and what they import beside this project's packages
(einops, einconv, opt-einsum, pretty_midi, mido, jaxtyping, wadler-lindig, natsort, petname,
simple-parsing, docstring-parser, torchopt, ml-dtypes).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lm import save_tiny_lm
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from airrep.attributors.datainf import DataInfAttributor
from airrep.attributors.ekfac import EKFACAttributor
from airrep.attributors.grad_dot import GradDotAttributor
from airrep.attributors.logra import LoGraAttributor
from airrep.attributors.trak import TRAKAttributor
from airrep.examples import Example, TokenizedExample, lm_template, tokenize_examples
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel
from airrep.lm import load_lm
from airrep.metrics import lds_per_target

ONE_LAYER = r"\.1\..*k_proj"
# Not the last block's feed-forward part: it runs where the response is predicted, and elsewhere
# has no inputs to be counted among the Kronecker factor's.
LAYERS = r"\.0\.mlp\.down_proj|\.1\.self_attn\.[qo]_proj"
OfLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
POOL = [
    Example(f"p{n}", f"What is {n} plus {n}?" + " Say it." * (n % 3), f"It is {2 * n}, of course.")
    for n in range(10)
]
TARGETS = [Example(f"t{n}", f"Is {n} the answer?", "Yes. " * (n + 1)) for n in range(4)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model", layers=2, hidden=16)


def tokenized(lm: Path, examples: list[Example]) -> tuple[nn.Module, list[TokenizedExample]]:
    model, tokenizer = load_lm(lm)
    return model, tokenize_examples(examples, tokenizer, lm_template(tokenizer), 512)


def rows_of(examples: list[TokenizedExample], width: int) -> list[dict[str, torch.Tensor]]:
    """Ids padded to a width, labels (-100 where there is no response), and the real tokens."""
    rows = []
    for one in examples:
        ids = F.pad(torch.from_numpy(one.ids).long(), (0, width - len(one)))
        places = torch.arange(width)
        response = (places >= one.response_start) & (places < len(one))
        labels = torch.where(response, ids, -100)
        rows.append({"ids": ids, "labels": labels, "real": (places < len(one)).long()})
    return rows


def summed_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# kronfluence


def kronfluence_scores(lm: Path, folder: Path, strategy: str) -> np.ndarray:
    """Its scores (targets, pool) with the empirical Fisher matrix and its own damping, 0.1."""
    absent = "kronfluence is not installed"
    kronfluence = pytest.importorskip("kronfluence", reason=absent, exc_type=ImportError)
    from kronfluence.arguments import FactorArguments, ScoreArguments

    model, both = tokenized(lm, POOL + TARGETS)
    names = list(linear_layers(model, LAYERS))
    rows = rows_of(both, max(map(len, both)))

    class SummedLoss(kronfluence.Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = model(input_ids=batch["ids"], use_cache=False).logits
            return summed_losses(logits[:, :-1], batch["labels"][:, 1:])

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch["real"]

    task = SummedLoss()
    analyzer = kronfluence.Analyzer(
        "oracle",
        kronfluence.prepare_model(model, task),
        task,
        cpu=True,
        output_dir=str(folder),
        disable_tqdm=True,
    )
    pool, targets = rows[: len(POOL)], rows[len(POOL) :]
    analyzer.fit_all_factors(
        "factors",
        pool,
        per_device_batch_size=4,
        factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        targets,
        pool,
        per_device_query_batch_size=2,
        per_device_train_batch_size=4,
        score_args=ScoreArguments(damping_factor=None),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


def test_grad_dot_is_kronfluences_identity(lm: Path, tmp_path: Path) -> None:
    expected = kronfluence_scores(lm, tmp_path, "identity")
    close(GradDotAttributor(lm, layers=LAYERS).fit(POOL).score(TARGETS), expected)


def test_ekfac_is_kronfluences(lm: Path, tmp_path: Path) -> None:
    expected = kronfluence_scores(lm, tmp_path, "ekfac")
    ekfac = EKFACAttributor(lm, layers=LAYERS, fisher="empirical", damping=0.1)
    close(ekfac.fit(POOL).score(TARGETS), expected)


# dattri


def dattri_data(lm: Path) -> tuple[DataLoader, DataLoader]:
    """Ids and labels of the pool and of the targets, each in one batch."""
    _, both = tokenized(lm, POOL + TARGETS)
    rows = [(row["ids"], row["labels"]) for row in rows_of(both, max(map(len, both)))]
    pool, targets = rows[: len(POOL)], rows[len(POOL) :]
    return DataLoader(pool, batch_size=len(pool)), DataLoader(targets, batch_size=len(targets))


def trainable_in(lm: Path, pattern: str) -> nn.Module:
    """The tiny model, whose chosen weights alone can be trained."""
    model, _ = load_lm(lm)
    model.set_attn_implementation("eager")  # which vmap is fast with
    model.requires_grad_(False)
    for layer in linear_layers(model, pattern).values():
        layer.weight.requires_grad_(True)
    return model


def under_vmap(model: nn.Module, of_logits: OfLogits) -> Callable[..., torch.Tensor]:
    """What an example's logits and labels give, as a function of weights and data."""

    def output(weights: dict[str, torch.Tensor], data: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ids, labels = (one.view(1, -1) for one in data)
        # transformers cannot make a mask under vmap.
        hidden = torch.full(2 * ids.shape[1:], torch.finfo(torch.float32).min).triu(1)
        inputs = {"input_ids": ids, "attention_mask": hidden[None, None], "use_cache": False}
        logits = torch.func.functional_call(model, weights, args=(), kwargs=inputs).logits
        return of_logits(logits[0, :-1], labels[0, 1:])

    return output


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, p.log() - (1 - p).log(), 0).sum()


def mean_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return (p * (labels >= 0)).sum() / (labels >= 0).sum()


def test_datainf_is_dattris(lm: Path) -> None:
    absent = "dattri is not installed"
    task = pytest.importorskip("dattri.task", reason=absent, exc_type=ImportError)
    from dattri.algorithm.influence_function import IFAttributorDataInf

    datainf = DataInfAttributor(lm, layers=ONE_LAYER, projection_rank=None).fit(POOL)
    # Its regularisation is a number: the lambda that ours came to.
    (inverse,) = datainf.features_[0].arrays["inverses"]
    model = trainable_in(lm, ONE_LAYER)
    loss = under_vmap(model, summed_losses)
    oracle = IFAttributorDataInf(
        task.AttributionTask(loss, model, model.state_dict()), regularization=1 / float(inverse)
    )
    pool, targets = dattri_data(lm)
    oracle.cache(pool)
    close(datainf.score(TARGETS), oracle.attribute(pool, targets).T.detach().numpy())


def test_trak_comes_near_to_dattris_without_projections(lm: Path) -> None:
    absent = "dattri is not installed"
    task = pytest.importorskip("dattri.task", reason=absent, exc_type=ImportError)
    from dattri.algorithm.trak import TRAKAttributor as Oracle

    # So wide that Phi's rows are about as long as the gradients, and lambda is a fifth of the
    # mean of the kernel's eigenvalues that are not 0.
    width, count = 1024, len(POOL)
    damping = 0.2 * width / count
    trak = TRAKAttributor(
        lm, layers=ONE_LAYER, projection_rank=None, width=width, projections=4, damping=damping
    ).fit(POOL)
    ridge = np.mean([one.arrays["kernel/ridges"][0] for one in trak.features_]) * count
    model = trainable_in(lm, ONE_LAYER)
    output = under_vmap(model, margin)
    size = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    oracle = Oracle(
        task.AttributionTask(output, model, model.state_dict()),
        under_vmap(model, mean_probability),
        projector_kwargs={"proj_type": "identity"},
        # It divides gradients by the root of their size.
        regularization=ridge / size,
    )
    pool, targets = dattri_data(lm)
    oracle.cache(pool)
    expected = oracle.attribute(targets).T.detach().numpy()
    scores = trak.score(TARGETS)
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.99
    assert np.linalg.norm(scores - expected) < 0.1 * np.linalg.norm(expected)


def test_logra_is_dattris_without_projections(lm: Path, tmp_path: Path) -> None:
    absent = "dattri is not installed"
    task = pytest.importorskip("dattri.task", reason=absent, exc_type=ImportError)
    from dattri.algorithm.block_projected_if.block_projected_if import BlockProjectedIFAttributor

    model, _ = load_lm(lm)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return summed_losses(logits[:, :-1], batch["labels"][:, 1:])

    def in_one_batch(loader: DataLoader) -> DataLoader:
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in loader.dataset]
        return DataLoader(rows, batch_size=len(rows))

    whole = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
    oracle = BlockProjectedIFAttributor(
        task.AttributionTask(loss, model, model.state_dict()),
        list(linear_layers(model, LAYERS)),
        damping=0.1,
        sparsifier_kwargs=whole,
        projector_kwargs=whole,
        cache_dir=str(tmp_path),
    )
    pool, targets = map(in_one_batch, dattri_data(lm))
    oracle.cache(pool)
    logra = LoGraAttributor(lm, layers=LAYERS, projection_rank=None, normalise="dot", damping=0.1)
    scores, expected = logra.fit(POOL).score(TARGETS), oracle.attribute(pool, targets).T.numpy()
    # Its scores have a constant factor of its own.
    close(scores / np.linalg.norm(scores), expected / np.linalg.norm(expected))


def test_lds_is_dattris() -> None:
    absent = "dattri is not installed"
    metric = pytest.importorskip("dattri.metric", reason=absent, exc_type=ImportError)
    rng = np.random.default_rng(0)
    scores, losses = rng.normal(size=(6, 20)), rng.normal(size=(6, 12)).round(1)
    subsets = [rng.choice(20, size=8, replace=False) for _ in range(12)]
    ours, _ = lds_per_target(subset_sums(scores, subsets), losses)
    # It takes (pool, targets) and (subsets, targets), and what is to be raised, not lowered.
    truth = torch.from_numpy(-losses.T), torch.from_numpy(np.stack(subsets))
    theirs, _ = metric.lds(torch.from_numpy(scores.T), truth)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def subset_sums(scores: np.ndarray, subsets: list[np.ndarray]) -> np.ndarray:
    return np.stack([scores[:, rows].sum(axis=1) for rows in subsets], axis=1)


# bergson


def test_gradients_are_bergsons(lm: Path) -> None:
    absent = "bergson is not installed"
    collector = pytest.importorskip(
        "bergson.collector.in_memory_collector", reason=absent, exc_type=ImportError
    )
    from bergson.config import IndexConfig
    from datasets import Dataset

    model, tokens = tokenized(lm, POOL)
    rows = rows_of(tokens, max(map(len, tokens)))
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    layers = linear_layers(model, LAYERS)
    with GradientModel(model, layers) as gradients:
        ours = gradients.backward(tokens).layers
    theirs = collector.InMemoryCollector(
        model=model,
        target_modules=set(layers),
        data=Dataset.from_dict({"input_ids": [one.ids.tolist() for one in tokens]}),
        cfg=IndexConfig(run_path="unused"),
    )
    with theirs:
        logits = model(input_ids=batch["ids"], use_cache=False).logits
        summed_losses(logits[:, :-1], batch["labels"][:, 1:]).backward()
    for name in layers:
        close(ours[name].full().flatten(1).numpy(), theirs.mod_grads[name].numpy())
