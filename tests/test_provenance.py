"""Versions, the git revision, and files that are whole or not there."""

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from airrep import __version__, provenance


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_versions_name_this_package_and_what_decides_its_numbers() -> None:
    versions = provenance.installed_versions()
    assert versions["airrep"] == __version__
    assert set(versions) == {"airrep", "torch", "transformers", "numpy", "scipy"}


def test_the_revision_is_that_of_a_checkout_which_holds_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "airrep" / "provenance.py"
    file.parent.mkdir()
    file.write_text("one\n")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.git_revision() is None
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "without the package")
    assert provenance.git_revision() is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "with it")
    revision = provenance.git_revision()
    assert revision is not None
    assert len(revision) == 40
    file.write_text("two\n")
    assert provenance.git_revision() == revision + "-dirty"


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.git_revision() is None


def test_json_that_cannot_be_finished_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    provenance.write_json_atomic(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'

    def fail(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        provenance.write_json_atomic(path, {"é": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_only_old_temporary_files_are_litter(tmp_path: Path) -> None:
    old = time.time() - 2 * provenance.STALE_SECONDS
    names = (".x.json.17-0123abcd.tmp", ".x.json.18-0123abcd.tmp", ".notes.tmp", "x.json")
    for name in names:
        (tmp_path / name).touch()
    for name in (names[0], *names[2:]):
        os.utime(tmp_path / name, (old, old))
    provenance.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def test_the_temporary_file_of_a_killed_writer_is_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            provenance.write_bytes_atomic(tmp_path / "x.json", b"half")
    [left] = tmp_path.iterdir()
    os.utime(left, (0, 0))
    provenance.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_disk_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="x"), provenance.clear_save_errors(tmp_path):
        raise KeyError("x")
    full = RuntimeError("while serializing: I/O error: full (os error 28)")
    with (
        pytest.raises(OSError, match="No space left") as failure,
        provenance.clear_save_errors(tmp_path),
    ):
        raise full
    assert (failure.value.errno, failure.value.filename) == (errno.ENOSPC, str(tmp_path))
