"""Attribution methods by name; a method's module is imported when it is first made."""

import difflib
import inspect
import numbers
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from airrep.attributor import Attributor
from airrep.examples import InputError

_METHODS = {
    "airrep": ("airrep.attributors.airrep", "AirRepAttributor"),
    "embedding": ("airrep.attributors.embedding", "EmbeddingAttributor"),
    "response_embedding": (
        "airrep.attributors.response_embedding",
        "ResponseEmbeddingAttributor",
    ),
    "bm25": ("airrep.attributors.bm25", "BM25Attributor"),
    "tfidf": ("airrep.attributors.tfidf", "TfidfAttributor"),
    "response_tfidf": ("airrep.attributors.response_tfidf", "ResponseTfidfAttributor"),
    "same_task": ("airrep.attributors.same_task", "SameTaskAttributor"),
    "grad_dot": ("airrep.attributors.grad_dot", "GradDotAttributor"),
    "grad_cos": ("airrep.attributors.grad_cos", "GradCosAttributor"),
    "tracin": ("airrep.attributors.tracin", "TracInAttributor"),
    "trak": ("airrep.attributors.trak", "TRAKAttributor"),
    "logra": ("airrep.attributors.logra", "LoGraAttributor"),
    "ekfac": ("airrep.attributors.ekfac", "EKFACAttributor"),
    "datainf": ("airrep.attributors.datainf", "DataInfAttributor"),
    "less": ("airrep.attributors.less", "LESSAttributor"),
    "repsim": ("airrep.attributors.repsim", "RepSimAttributor"),
    "influence": ("airrep.attributors.influence", "InfluenceAttributor"),
    "rescaled_influence": (
        "airrep.attributors.rescaled_influence",
        "RescaledInfluenceAttributor",
    ),
    "newton_step": ("airrep.attributors.newton_step", "NewtonStepAttributor"),
    "kernels": ("airrep.attributors.kernels", "KernelsAttributor"),
    "ensemble": ("airrep.attributors.ensemble", "EnsembleAttributor"),
    "given": ("airrep.attributors.given", "GivenAttributor"),
    "random": ("airrep.attributors.random", "RandomAttributor"),
}
PLAIN = {bool, int, float, str, Path, type(None)}


def available() -> list[str]:
    """The names `make_attributor` knows."""
    return list(_METHODS)


def make_attributor(name: str, **params: Any) -> Attributor:
    """An unfitted attributor by its name.

    Raises InputError for an unknown name (with the nearest known one) and for parameters the
    method does not take or still needs.
    """
    check_params(name, params, partial=False)
    return method_class(name)(**params)


def check_params(name: str, params: Mapping[str, Any], partial: bool = True) -> None:
    """Raises InputError for parameters that a method does not take, and for what is no number,
    text or null where it takes only such; unless `partial`, also for those that it still needs."""
    method = method_class(name)
    signature = inspect.signature(method)
    try:
        signature.bind_partial(**params) if partial else signature.bind(**params)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no parameters"
        raise InputError(f"The method {name!r}: {error}; it takes {takes}.") from error
    for key, value in params.items():
        hint = _type_hint(method.__init__, key)
        kinds = set(get_args(hint) or (hint,))
        if not kinds <= PLAIN:
            continue
        allowed = [kind for kind in kinds if kind not in (int, float)]
        allowed += [numbers.Real] if float in kinds else []
        allowed += [numbers.Integral] if int in kinds else []
        if not isinstance(value, tuple(allowed)) or (type(value) is bool and bool not in kinds):
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            null = ", or null" if type(None) in kinds else ""
            raise InputError(f"The method {name!r} got {key} {value!r}; it takes {wanted}{null}.")


def _type_hint(function: Callable[..., Any], key: str) -> Any:
    """A parameter's type; object where there is none, or it is of a module that is not loaded."""
    one = SimpleNamespace(__annotations__={key: function.__annotations__.get(key, object)})
    try:
        return get_type_hints(one, function.__globals__)[key]
    except NameError:
        return object


def method_class(name: str) -> type[Attributor]:
    """The class of a method; InputError for an unknown name."""
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There is no method {name!r}; {hint}known: {', '.join(_METHODS)}.")
    module, class_name = _METHODS[name]
    return getattr(import_module(module), class_name)
