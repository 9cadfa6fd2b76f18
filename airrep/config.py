"""The configuration of a whole run: one YAML file, every key of it also a flag."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from airrep.examples import InputError
from airrep.train_settings import TrainSettings
from data_builders.recipes import Recipe


@dataclass(frozen=True)
class CorpusConfig:
    """The demo corpus, made from facts in pip packages (the extra `demo`).

    Args:
        pool_size: training examples.
        target_size: targets, training and test ones together.
        proponent_share: share of the targets whose fact the pool states in other words.
        flip_share: share of the pool with a wrong answer.
        tasks: the tasks to use; all when not given.
    """

    pool_size: int = 800
    target_size: int = 200
    proponent_share: float = 0.3
    flip_share: float = 0.0
    tasks: list[str] | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the pool and the targets come from: either `corpus` or `examples`.

    Args:
        corpus: make the demo corpus.
        examples: the pool: a .jsonl, .json, .csv or .parquet file, a save_to_disk folder, or a
            hub id.
        targets: targets of the training labels, in the same formats; when not given,
            `target_count` examples are drawn from the pool, and leave it.
        target_count: how many targets to draw when there is no file of them.
        test_targets: targets of the test labels; when not given, `test_share` of the targets.
        test_share: share of the targets kept for the test.
        columns: names of the columns that hold prompt, response, id and task, where they are
            not the usual ones.
        split: the split to read of data sets that have splits.
    """

    corpus: CorpusConfig | None = None
    examples: str | None = None
    targets: str | None = None
    target_count: int = 200
    test_targets: str | None = None
    test_share: float = 0.5
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"


@dataclass(frozen=True)
class SubsetConfig:
    """The random subsets of the pool that the language model is fine-tuned on.

    Args:
        train: subsets whose labels train the encoder.
        test: other subsets, for the test.
        size: examples a subset.
        fraction: share of the pool a subset has, in place of `size`.
        kind: "fixed" size, or "bernoulli": every example in with the same probability.
        repeats: test subsets that are trained again with another seed: they give the noise
            ceiling.
    """

    train: int = 100
    test: int = 40
    size: int | None = None
    fraction: float | None = None
    kind: str = "fixed"
    repeats: int = 8


@dataclass(frozen=True)
class EngineConfig:
    """How labels are computed; the losses are the same up to rounding.

    Args:
        name: "batched" trains several models in lock-step, "cached_trunk" runs frozen layers
            once, "eager" is the plain reference; "auto" chooses.
        models: models the batched engine trains at once; chosen from the free memory when not
            given.
    """

    name: Literal["auto", "eager", "cached_trunk", "batched"] = "auto"
    models: int | None = None


@dataclass(frozen=True)
class ImportConfig:
    """Labels that exist already, as .npz files with arrays `subsets` and `losses`.

    Args:
        train: training labels; their `target_rows` name the rows of the pool used as targets.
        test: test labels, of `data.test_targets`.
    """

    train: str
    test: str


@dataclass(frozen=True)
class EvaluateConfig:
    """What is compared, and how.

    Args:
        methods: attribution methods: airrep, embedding, bm25, tfidf, same_task, random.
        scores: scores of outside tools, name: .npy or .safetensors file; see docs/files.md.
        draws: bootstrap resamples of the intervals.
    """

    methods: list[str] = field(
        default_factory=lambda: ["airrep", "embedding", "bm25", "tfidf", "same_task", "random"]
    )
    scores: dict[str, str] = field(default_factory=dict)
    draws: int = 1000


@dataclass(frozen=True)
class RunConfig:
    """One run, from examples to report; everything it makes is in the folder `output`.

    Args:
        output: the run's folder.
        name: what results call this run; the folder's name when not given.
        seed: decides subsets, splits, the order of training data and the bootstrap.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        lm: the language model: hub id, folder, .gguf file, or package:NAME.
        encoder: the text encoder that training starts from: hub id, folder or package:NAME.
        data: pool and targets.
        subsets: how many subsets, and how large.
        recipe: how the language model is fine-tuned on one subset.
        engine: how that is computed.
        imported: labels made before, in place of making them.
        train: how the encoder is trained.
        evaluate: which methods are compared.
    """

    output: str
    name: str | None = None
    seed: int = 0
    device: str = "auto"
    lm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    data: DataConfig = DataConfig()
    subsets: SubsetConfig = SubsetConfig()
    recipe: Recipe = Recipe()
    engine: EngineConfig = EngineConfig()
    imported: ImportConfig | None = None
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateConfig = EvaluateConfig()


def check_config_file(path: str | Path) -> None:
    """Raises InputError for a file that is no YAML mapping, or has a key RunConfig has not."""
    file = Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no config file {file}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {file} cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        raise InputError(f"The config file {file} is not YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise InputError(f"The config file {file} holds no keys; see configs/ for examples.")
    known = list(config_keys(RunConfig))
    for key in _keys_of(values, known):
        if key not in known:
            raise InputError(f"The config file {file} has an unknown key {key!r}{nearest(key)}.")


def nearest(key: str) -> str:
    """A hint that names the known config key nearest to a wrong one."""
    known = list(config_keys(RunConfig))
    parent, _, last = key.rpartition(".")
    inside = [name for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong place
        near = [name for name in known if name.rpartition(".")[2] == last][:1]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(inside)}" if inside else ""


def config_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a config dataclass, nested ones with dots."""
    hints = get_type_hints(config)
    for item in dataclasses.fields(config):
        name = prefix + item.name
        yield name
        for kind in (hints[item.name], *get_args(hints[item.name])):
            if dataclasses.is_dataclass(kind):
                yield from config_keys(kind, name + ".")


def _keys_of(values: Mapping[Any, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        yield name
        # A mapping under a key without keys of its own is a value (data.columns).
        if isinstance(value, Mapping) and any(k.startswith(name + ".") for k in known):
            yield from _keys_of(value, known, name + ".")
