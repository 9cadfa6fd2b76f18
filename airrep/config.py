"""The configuration of a whole run: one YAML file, every key of it also a flag."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import yaml

from airrep.device import pick_device
from airrep.examples import InputError
from airrep.train_settings import (
    DistilSettings,
    TrainSettings,
    check_distil,
    check_settings,
)
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
        compile: whether the batched engine compiles the blocks that train; takes a minute or so
            before the first label, and pays where there are many. Off where that fails.
    """

    name: Literal["auto", "eager", "cached_trunk", "batched"] = "auto"
    models: int | None = None
    compile: bool = False


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
        methods: attribution methods: airrep, embedding, response_embedding, bm25, tfidf,
            response_tfidf, same_task, random, grad_dot, grad_cos, tracin, logra, trak, ekfac,
            datainf, less, repsim, influence, rescaled_influence, newton_step, kernels, ensemble.
        params: parameters of methods by name, such as {logra: {projection_rank: 8, layers: mlp}};
            they take precedence over those that `airrep tune` chose, and are not tuned.
        scores: scores of outside tools, name: .npy or .safetensors file; see docs/files.md.
        draws: bootstrap resamples of the intervals.
    """

    methods: list[str] = field(
        default_factory=lambda: [
            "airrep",
            "embedding",
            "response_embedding",
            "bm25",
            "tfidf",
            "response_tfidf",
            "same_task",
            "random",
        ]
    )
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
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
        encoder: what training starts from, a text encoder or a causal language model: hub id,
            folder, .gguf file or package:NAME.
        data: pool and targets.
        subsets: how many subsets, and how large.
        recipe: how the language model is fine-tuned on one subset.
        engine: how that is computed.
        imported: labels made before, in place of making them.
        distil: scores of another method that the encoder learns first.
        more_labels: folders of other runs with the same pool and training targets, whose training
            labels the encoder learns from too: of other language models, recipes or seeds. What
            is held out is of this run.
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
    distil: DistilSettings | None = None
    more_labels: list[str] = field(default_factory=list)
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateConfig = EvaluateConfig()


def check_config_file(path: str | Path) -> None:
    """Raises InputError for a file that is no YAML mapping, has a key twice or one RunConfig has
    not, or null where a value is needed.
    """
    file = Path(path)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_ConfigLoader)
    except FileNotFoundError:
        raise InputError(f"There is no config file {file}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {file} cannot be read ({error}).") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"The config file {file} is not YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise InputError(f"The config file {file} holds no keys; see configs/ for examples.")
    known = _key_types(RunConfig)
    for key, value in _keys_of(values, known):
        if key not in known:
            raise InputError(f"The config file {file} has an unknown key {key!r}{nearest(key)}.")
        kinds = get_args(known[key]) or (known[key],)
        if value is None and type(None) not in kinds:
            raise InputError(f"The config file {file} has no value at {key!r}; give one.")
        if value is not None and _section(known[key]) and not isinstance(value, Mapping):
            raise InputError(f"The config file {file} has {value!r} at {key!r}; give its keys.")


def check_run(config: RunConfig, computes: bool = True) -> None:
    """Raises InputError for a setting that some stage would refuse; reads and loads nothing.

    `computes` says whether the device must be there, which reports and plans do without.
    """
    from data_builders.engines import pick_engine

    data = config.data
    for name, text in {
        "output": config.output,
        "lm": config.lm,
        "encoder": config.encoder,
        "data.examples": data.examples,
        "data.targets": data.targets,
        "data.test_targets": data.test_targets,
    }.items():
        if text is not None and (not text.strip() or "\0" in text):
            raise InputError(f"{name} is {text!r}, which names nothing; give a name.")
    check_seed(config.seed)
    for name, value, least in (
        ("subsets.repeats", config.subsets.repeats, 0),
        ("engine.models", config.engine.models, 1),
        ("evaluate.draws", config.evaluate.draws, 1),
    ):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; give at least {least}.")
    runs = [Path(path).resolve() for path in (config.output, *config.more_labels)]
    if len(set(runs)) < len(runs):
        raise InputError(
            f"more_labels is {config.more_labels} and output {config.output!r}: a run is named "
            "twice; name each other run once."
        )
    check_methods(config.evaluate.methods)
    check_methods(list(config.evaluate.params))
    if config.distil is not None:
        try:
            check_distil(config.distil)
        except InputError as error:
            raise InputError(f"distil.{error}") from None
        if config.distil.teacher in ("airrep", "ensemble"):
            raise InputError(
                f"distil.teacher is {config.distil.teacher!r}, which needs the encoder that is to "
                "be trained; name another method."
            )
    config.recipe.check()
    try:
        check_settings(config.train)
    except InputError as error:
        raise InputError(f"train: {error}") from None
    if computes:
        pick_engine(config.engine.name, config.recipe, torch.device(pick_device(config.device)))


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that the generators of numpy and torch do not take."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; give a whole number from 0 to 2**63 - 1.")


def check_methods(names: Sequence[str]) -> None:
    """Raises InputError for a method that does not exist or is named twice."""
    from airrep.attributors import available, make_attributor

    for name in names:
        if name not in available():
            make_attributor(name)  # says which names are near
        if names.count(name) > 1:
            raise InputError(f"The method {name!r} is named twice; name it once.")


def run_keys() -> list[str]:
    """Every key of a run's configuration, nested ones with dots."""
    return list(_key_types(RunConfig))


def nearest(key: str, known: Sequence[str] | None = None) -> str:
    """A hint that names the nearest of the known keys, by default of a run's configuration."""
    known = run_keys() if known is None else known
    parent, _, last = key.rpartition(".")
    inside = [name for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong place
        near = [name for name in known if name.rpartition(".")[2] == last][:1]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(inside)}" if inside else ""


class _ConfigLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _key_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a config dataclass, nested ones with dots, and its type."""
    hints, found = get_type_hints(config), {}
    for item in dataclasses.fields(config):
        name, kind = prefix + item.name, hints[item.name]
        found[name] = kind
        if section := _section(kind):
            found |= _key_types(section, name + ".")
    return found


def _section(kind: Any) -> Any:
    """The dataclass whose keys a key of this type has, None for one that is a value."""
    return next((k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)), None)


def _keys_of(
    values: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name, (section, dot, _) = f"{prefix}{key}", str(key).partition(".")
        if dot and section in values:
            raise InputError(f"The config has {name!r} beside {section!r}; write it inside.")
        yield name, value
        if isinstance(value, Mapping) and _section(known.get(name)):
            yield from _keys_of(value, known, name + ".")
