"""What gradient methods share: the layers they look at, and the pool's gradients as features.

Features are the gradients of all layers, projected on both sides and written one after the other.
A method says what it makes of the targets' features and what it divides the pool's by; scores are
their products, summed over checkpoints and draws of the projections.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from airrep.attributor import pack_text, unpack_text
from airrep.attributors.kernel_texts import text_key
from airrep.attributors.language_model import LanguageModelAttributor, OpenedLM
from airrep.device import pick_device
from airrep.examples import Example, InputError, TokenizedExample, fingerprint_examples, lm_template
from airrep.gradients.layer_gradient import LayerGradient
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel, Projections
from airrep.gradients.projections import flat_features, projected_shapes, random_projections
from airrep.gradients.store import GradientStore

Arrays = dict[str, np.ndarray]
Tokens = Sequence[TokenizedExample]
KNOWN_BYTES = 2**30  # of targets' features that are kept in memory, for each draw
STORED_TARGETS = 32  # asked at once, from which on their features go to disk beside the pool's
# Makes features (B, d) of a batch's gradients by layer.
MakeFeatures = Callable[[Mapping[str, LayerGradient]], torch.Tensor]


@dataclass(eq=False, repr=False)
class GradientAttributor(LanguageModelAttributor):
    """A method that looks at gradients of linear layers.

    `layers`: which (see `linear_layers`); a regular expression, or None for all of the blocks.
    """

    _: KW_ONLY
    layers: str | None = None

    output: ClassVar[str] = "loss"

    def _gradient_model(self, opened: OpenedLM) -> GradientModel:
        layers = linear_layers(opened.model, self.layers)
        return GradientModel(opened.model, layers, self.output, self.precision)

    def _sample(
        self, pool: Tokens, count: int | None, what: str = "statistics"
    ) -> Iterator[list[TokenizedExample]]:
        """Batches of `count` examples of the pool (None: of all), chosen by their hash: in whatever
        order the pool is, they are the same, and come in the same order."""
        if count is not None and count < 1:
            raise InputError(f"sample is {count}; give at least 1.")
        chosen = sorted(pool, key=lambda one: sha256(one.ids.tobytes()).digest())[:count]
        for rows in self._batches(chosen, what):
            yield [chosen[row] for row in rows]


@dataclass
class PoolFeatures:
    """The pool's features under one checkpoint and one draw of the projections.

    `arrays` are the projections and what the method learned of the pool; "group/name" is one of
    several that belong together. `known` are features (d,) of targets asked before, by the hash of
    their tokens; `keys` such hashes of the pool, where its rows can stand for targets.
    """

    checkpoint: str | Path
    seed: str
    store: GradientStore
    arrays: Arrays
    known: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def group(self, name: str) -> Arrays:
        """The arrays of a group, by their names in it."""
        return _below(self.arrays, name)

    def projections(self, device: torch.device) -> Projections:
        """The layers' projections, on a device."""
        inner = self.group("p_in")
        return {
            name: (torch.from_numpy(outer).to(device), torch.from_numpy(inner[name]).to(device))
            for name, outer in self.group("p_out").items()
        }


@dataclass(eq=False, repr=False)
class FeatureAttributor(GradientAttributor):
    """A method whose scores are products of features.

    `projection_rank`: to how many numbers each side of a layer's gradient is projected (None: not
    at all, for small models). `seed`: of the projections. `store`: a folder for pools' features,
    each in a folder of its own by what it depends on, so that methods with the same features share
    it, and for those of many targets asked at once. They then are not in what `save` writes; a
    stopped `fit` or `score` goes on from them. `store_dtype`, of the pool's: float32, float16,
    bfloat16 or int8.
    """

    _: KW_ONLY
    projection_rank: int | None = 16
    seed: int = 0
    store: str | Path | None = None
    store_dtype: str = "float32"

    # What a method says

    def _check(self) -> None:
        """Raises InputError for settings that features cannot be made by."""

    def _draws(self) -> list[tuple[str | Path, str]]:
        """The checkpoints, and seeds of projections, that scores are summed over."""
        return [(self.lm, f"{self.seed}/0")]

    def _weights(self) -> list[float]:
        """How much each of them counts."""
        return [1.0] * len(self._draws())

    def _about(self, opened: OpenedLM) -> dict[str, Any]:
        """What the features depend on beside model, data, layers, rank and seed."""
        return {}

    def _projections(self, model: GradientModel, seed: str, pool: Tokens) -> Projections:
        """The projections of one draw."""
        if self.projection_rank is None:
            return {}
        return random_projections(model.shapes, self.projection_rank, seed, model.device)

    def _width(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """How many numbers `_maker` makes, of the gradients' shapes after projection."""
        return sum(d_out * d_in for d_out, d_in in shapes.values())

    def _maker(self, model: GradientModel, seed: str) -> MakeFeatures:
        """What makes features of projected gradients."""
        return flat_features

    def _pool_maker(
        self, opened: OpenedLM, model: GradientModel, seed: str, pool: Tokens
    ) -> MakeFeatures:
        """The same for the pool, where that is another."""
        return self._maker(model, seed)

    def _learn(self, store: GradientStore, model: GradientModel, pool: Tokens) -> Arrays:
        """What to know of the pool's features; "scale" (pool,) multiplies scores."""
        return {}

    def _queries(self, features: torch.Tensor, pool: PoolFeatures) -> torch.Tensor:
        """What is multiplied with the pool's features, of the targets' (T, d)."""
        return features

    # What all do

    def store_features(self, pool: Sequence[Example], rows: Sequence[int]) -> None:
        """Writes the features of some rows of the pool into the folder `store`.

        Several processes can share a pool so, each with rows of its own; `fit` makes what is
        missing afterwards. Raises InputError without a folder.
        """
        if self.store is None:
            raise InputError("store_features needs a folder; give one as `store`.")
        self._check()
        for number in range(len(self._draws())):
            self._make_features(number, pool, rows)

    def _fit(self, pool: Sequence[Example]) -> None:
        self._check()
        rows = range(len(pool))
        self.features_ = [
            self._make_features(number, pool, rows) for number in range(len(self._weights()))
        ]

    def _make_features(
        self, number: int, pool: Sequence[Example], rows: Sequence[int]
    ) -> PoolFeatures:
        """Writes the rows that are missing; when none are any more, learns of all."""
        checkpoint, seed = self._draws()[number]
        opened = self._open(checkpoint)
        tokens = self._tokenize(pool, opened.tokenizer)
        with self._gradient_model(opened) as model:
            width = self._width(projected_shapes(model.shapes, self.projection_rank))
            about = self._about_features(opened, pool, seed)
            store = self._open_store(len(pool), width, about, self.store_dtype)
            arrays = store.keep(
                "projections", lambda: _sides(self._projections(model, seed, tokens))
            )
            features = PoolFeatures(checkpoint, seed, store, arrays, self._known(number, store))
            is_same = type(self)._pool_maker is FeatureAttributor._pool_maker
            if is_same and self.store_dtype == "float32":
                features.keys = np.asarray([_key(one) for one in tokens])
            model.projections = features.projections(model.device)
            missing = np.intersect1d(store.missing(), rows)
            if len(missing):
                make = self._pool_maker(opened, model, seed, tokens)
                self._write(store, missing, tokens, model, make)
            if not len(store.missing()):
                arrays.update(self._learn(store, model, tokens))
        return features

    def _known(self, number: int, store: GradientStore) -> dict[int, torch.Tensor]:
        """Targets' features that the last fit left, where they are the same now."""
        earlier = getattr(self, "features_", [])[number : number + 1]
        return earlier[0].known if earlier and earlier[0].store.about == store.about else {}

    def _about_features(
        self, opened: OpenedLM, pool: Sequence[Example], seed: str
    ) -> dict[str, Any]:
        return {
            "lm": opened.fingerprint,
            "examples": fingerprint_examples(pool),
            "template": lm_template(opened.tokenizer, self.template).text,
            "max_length": self.max_length,
            "layers": self.layers,
            "output": self.output,
            "precision": self.precision,
            "projection_rank": self.projection_rank,
            "seed": seed,
            **self._about(opened),
        }

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        total = np.zeros((len(targets), self.features_[0].store.rows), dtype=np.float32)
        for pool, weight in zip(self.features_, self._weights(), strict=True):
            products = pool.store.products(self._queries(self.target_features(targets, pool), pool))
            total += np.float32(weight) * products * pool.arrays.get("scale", np.float32(1))
        return total

    def target_features(self, targets: Sequence[Example], pool: PoolFeatures) -> torch.Tensor:
        """Features (T, d) float32 of targets under one of `features_`, on the model's device.

        Of targets that are in the pool they are its own, of those asked before (as long as they
        take few bytes) what was found then. Raises InputError when the model has other weights than
        the pool was fitted with.
        """
        opened = self._open(pool.checkpoint)
        self._check_same(opened, pool.store.about["lm"])
        tokens = self._tokenize(targets, opened.tokenizer)
        keys = [_key(one) for one in tokens]
        found = {key: pool.known[key] for key in keys if key in pool.known}
        wanted = set(keys) - set(found)
        here = {key: row for row, key in enumerate(pool.keys.tolist()) if key in wanted}
        found |= {key: pool.store.row(row) for key, row in here.items()}
        asked = {key: one for key, one in zip(keys, tokens, strict=True) if key not in found}
        if asked:
            new = list(asked)
            store = self._target_store(new, pool)
            missing = store.missing()
            if len(missing):
                with self._gradient_model(opened) as model:
                    model.projections = pool.projections(model.device)
                    make = self._maker(model, pool.seed)
                    self._write(store, missing, list(asked.values()), model, make)
            # Each row for itself, so that one that is not kept takes no memory.
            found |= {key: store.row(row) for row, key in enumerate(new)}
            room = KNOWN_BYTES // (4 * pool.store.width) - len(pool.known)
            pool.known |= {key: found[key] for key in new[: max(0, room)]}
        return torch.stack([found[key] for key in keys]).to(pick_device(self.device))

    def _target_store(self, keys: Sequence[int], pool: PoolFeatures) -> GradientStore:
        """Where the features of targets, told by the hashes of their tokens, are or will be."""
        digest = sha256(np.asarray(keys).tobytes()).hexdigest()
        about = {**pool.store.about, "targets": digest}
        if len(keys) < STORED_TARGETS:
            return GradientStore(len(keys), pool.store.width, about)
        return self._open_store(len(keys), pool.store.width, about, "float32")

    def _write(
        self,
        store: GradientStore,
        rows: np.ndarray,
        tokens: Tokens,
        model: GradientModel,
        make: MakeFeatures,
    ) -> None:
        """Writes what `make` says of these rows of the tokens, in batches."""
        some = [tokens[row] for row in rows]
        for part in self._batches(some):
            gradients = model.backward([some[row] for row in part])
            store.write(rows[part], make(gradients.layers), gradients.doubt)

    def _folder(self, rows: int, width: int, about: Mapping[str, Any], dtype: str) -> Path | None:
        """Where features are, named by all that decides them."""
        if self.store is None:
            return None
        inputs = json.dumps([rows, width, dtype, about], sort_keys=True, default=str)
        return Path(self.store) / f"features-{sha256(inputs.encode()).hexdigest()[:16]}"

    def _open_store(
        self,
        rows: int,
        width: int,
        about: Mapping[str, Any],
        dtype: str,
        records: np.ndarray | None = None,
    ) -> GradientStore:
        folder = self._folder(rows, width, about, dtype)
        return GradientStore(rows, width, about, folder, dtype, records)

    # Saving

    def _state(self) -> Arrays:
        state: Arrays = {}
        for number, features in enumerate(self.features_):
            store = features.store
            own = {
                "shape": np.asarray([store.rows, store.width]),
                "about": pack_text([json.dumps(store.about)]),
                "keys": features.keys,
                **features.arrays,
            }
            if self.store is None:
                own["records"] = store.records
            state |= {f"{number}/{key}": array for key, array in own.items()}
        return state

    def _restore(self, state: Arrays) -> None:
        self.features_ = []
        for number, (checkpoint, seed) in enumerate(self._draws()):
            own = _below(state, str(number))
            rows, width = own.pop("shape").tolist()
            keys = own.pop("keys", np.empty(0, dtype=np.int64))  # earlier versions saved none
            about = json.loads(unpack_text(own.pop("about"))[0])
            folder = self._folder(rows, width, about, self.store_dtype)
            if folder is not None and not folder.is_dir():
                raise InputError(
                    f"The features of the pool are not in {folder} any more; fit the method again."
                )
            records = own.pop("records", None)
            store = self._open_store(rows, width, about, self.store_dtype, records)
            self.features_.append(PoolFeatures(checkpoint, seed, store, own, keys=keys))

    def _saved_params(self) -> dict[str, Any]:
        kept = {} if self.store is None else {"store": str(Path(self.store).absolute())}
        return super()._saved_params() | kept

    @property
    def bytes_per_example(self) -> int:
        """Bytes of fitted state per pool example, those in `store` included."""
        in_state = super().bytes_per_example
        if self.store is None:
            return in_state
        return in_state + sum(one.store.row_bytes for one in self.features_)


def _key(one: TokenizedExample) -> int:
    """A hash of an example's tokens and of where its response starts."""
    return text_key(one.ids.tobytes() + one.response_start.to_bytes(4, "little"))


def _sides(projections: Projections) -> Arrays:
    """Projections as arrays of the groups "p_out" and "p_in"."""
    sides = {}
    for name, (p_out, p_in) in projections.items():
        sides[f"p_out/{name}"], sides[f"p_in/{name}"] = p_out.cpu().numpy(), p_in.cpu().numpy()
    return sides


def _below(arrays: Arrays, name: str) -> Arrays:
    prefix = name + "/"
    return {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
