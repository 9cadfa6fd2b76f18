"""Where results come from (versions, git revision), and files that are whole or not there."""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from airrep import __version__

LIBRARIES = ("torch", "transformers", "numpy", "scipy")
STALE_SECONDS = 3600  # no file takes this long to be written and renamed
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def installed_versions() -> dict[str, str]:
    """The versions of this package and the libraries that decide its numbers."""
    return {"airrep": __version__} | {name: _version(name) for name in LIBRARIES}


def git_revision() -> str | None:
    """The commit of the checkout this package runs from, "-dirty" added when files differ.

    None when it does not run from a git checkout or git is not installed.
    """
    file = Path(__file__).resolve()
    # An environment inside somebody else's checkout is not ours: this very file must be tracked.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def is_dirty(revision: str | None) -> bool:
    """Whether a `git_revision` does not say which code that is."""
    return revision is not None and revision.endswith("-dirty")


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes JSON so that a reader, or a crash, sees the old file or the new one, never a part."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes_atomic(path, text.encode("utf-8", "surrogatepass"))


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Writes a file under a temporary name in its folder, fsyncs it and renames it.

    The temporary name ends in ".tmp" and is this call's own, so several processes may write the
    same path: the last rename wins. On an OSError the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when the process dies."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed writers left in the folder over an hour ago.

    Their age decides, not their process: it may be running on another machine.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process was first
            old = time.time() - path.stat().st_mtime > STALE_SECONDS
            if old and _TEMPORARY.fullmatch(path.name):
                path.unlink()


@contextmanager
def clear_save_errors(path: str | Path) -> Iterator[None]:
    """What a library raises when the disk takes no more becomes an OSError that names `path`."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have kinds of their own
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else found and int(found[1])
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def fsync(path: Path) -> None:
    """Makes a file's content, or a rename inside a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
