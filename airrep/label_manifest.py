"""manifest.json of a label store: what its labels belong to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airrep.examples import InputError
from airrep.provenance import git_revision, installed_versions, write_json_atomic

FORMAT = 1
_KEYS = {"fingerprint": dict, "about": dict, "subset_count": int, "target_count": int}
_ABSENT = "nothing"


def write_manifest(
    path: Path,
    fingerprint: Mapping[str, str],
    subset_count: int,
    target_count: int,
    about: Mapping[str, Any],
) -> None:
    """Writes manifest.json; with it, the store is complete."""
    manifest = {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "about": _plain(about),
        "subset_count": subset_count,
        "target_count": target_count,
        "versions": installed_versions(),
        "git_revision": git_revision(),
    }
    write_json_atomic(path / "manifest.json", manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store in the folder `path`; raises InputError when it is not one."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path} is not a label store (it has no manifest.json); give the folder that "
            "`airrep labels` wrote."
        ) from None
    except ValueError as error:
        raise InputError(
            f"{file} is not JSON ({error}); make the labels again in an empty folder."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise InputError(f"{file} has format {found!r}, but this version reads {FORMAT}.")
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(
                f"{file} has no usable {key!r}; make the labels again in an empty folder."
            )
    return manifest


def check_same(
    path: Path | str,
    manifest: Mapping[str, Any],
    fingerprint: Mapping[str, str],
    target_count: int,
    about: Mapping[str, Any],
) -> None:
    """Raises InputError with both sides of every fingerprint that differs."""
    stored, now = manifest["about"], _plain(about)
    differences = [
        _difference(key, manifest["fingerprint"].get(key), fingerprint.get(key), stored, now)
        for key in sorted({*manifest["fingerprint"], *fingerprint})
        if manifest["fingerprint"].get(key) != fingerprint.get(key)
    ]
    if manifest["target_count"] != target_count:
        differences.append(
            f"target_count is {manifest['target_count']} in the folder, {target_count} now"
        )
    if differences:
        raise InputError(
            f"The label folder {path} was made for something else: {'; '.join(differences)}. "
            "Give another folder, or the same data, model and recipe as before."
        )


def refuse_losses(path: Path) -> None:
    """Raises InputError when a folder without a manifest has losses: of what, nothing says."""
    found = sorted(path.glob("losses/*.safetensors"))
    if found:
        raise InputError(
            f"{path} holds losses ({found[0].name}) but no manifest.json that says what they "
            "belong to; put that file back, or give an empty folder."
        )


def _difference(
    key: str,
    old_hash: str | None,
    new_hash: str | None,
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
) -> str:
    old, new = stored.get(key), now.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        old = {name: old.get(name) for name in changed}
        new = {name: new.get(name) for name in changed}
    return f"{key} is {_side(old, old_hash)} in the folder, {_side(new, new_hash)} now"


def _side(value: Any, digest: str | None) -> str:
    if digest is None:
        return _ABSENT
    if value in (None, {}):
        return f"sha256 {digest[:12]}"
    if isinstance(value, dict):
        value = ", ".join(f"{name}={item}" for name, item in value.items())
    return f"{value} (sha256 {digest[:12]})"


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: paths become text, tuples lists."""
    return json.loads(json.dumps(dict(about), default=str))
