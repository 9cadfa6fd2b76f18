"""Training-data attribution of language models by learned representations (arXiv 2505.18513)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and their modules, imported at first use.
_NAMES = {
    "AirRepEncoder": "airrep.encoder",
    "Attributor": "airrep.attributor",
    "Example": "airrep.examples",
    "InputError": "airrep.examples",
    "LabelStore": "airrep.label_store",
    "available": "airrep.attributors",
    "make_attributor": "airrep.attributors",
    "read_examples": "airrep.reading",
    "write_examples": "airrep.examples",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'airrep' has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
