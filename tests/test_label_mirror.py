"""A mirror of a label store: several stores without a common disk end up with the same labels."""

from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from airrep.examples import InputError
from airrep.label_mirror import LabelMirror
from airrep.label_stages import open_mirror
from airrep.label_store import LabelStore

PLAN = [np.arange(3) + j for j in range(4)]
FINGERPRINT = {"examples": "a", "targets": "b", "lm": "c", "recipe": "d"}


def new_store(path: Path, **changes: str) -> LabelStore:
    return LabelStore.create(path, FINGERPRINT | changes, PLAN, 2, {"lm": "tiny"} | changes)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        (tmp_path / "mirror").mkdir()
        return f"file://{tmp_path}/mirror/train_labels"
    return f"memory://{uuid4().hex}/train_labels"


def test_two_stores_exchange_their_labels(tmp_path: Path, url: str) -> None:
    one, two = new_store(tmp_path / "one"), new_store(tmp_path / "two")
    first = LabelMirror(one, url)
    one.write(0, [1.0, 2.0], attempt=1, seconds=3.5)
    first.put(0, 0)
    one.write(1, [1.5, 2.5], repeat=1)
    one.write(3, [0.5, 0.25])
    two.write(2, [3.0, 4.0])
    assert LabelMirror(two, url).sync() == 1  # only label 0 has been put
    assert first.sync() == 1
    assert LabelMirror(two, url).sync() == 2
    for repeat in (0, 1):
        np.testing.assert_array_equal(one.read(repeat).losses, two.read(repeat).losses)
    assert two.missing() == [1]
    assert two.attempts() == {0: 1}
    assert two.seconds() == {0: 3.5}


def test_merged_labels_are_given_too(tmp_path: Path, url: str) -> None:
    one, two = new_store(tmp_path / "one"), new_store(tmp_path / "two")
    one.write(0, [1.0, 2.0], attempt=1)
    one.write(2, [3.0, 4.0])
    one.merge()
    assert LabelMirror(one, url).sync() == 0
    assert LabelMirror(two, url).sync() == 2
    np.testing.assert_array_equal(two.read().losses, [[1.0, 3.0], [2.0, 4.0]])
    assert two.attempts() == {0: 1}
    assert LabelMirror(one, url).sync() == 0  # what was merged is not taken back as shards


def test_labels_of_something_else_are_refused_with_both_sides(tmp_path: Path, url: str) -> None:
    LabelMirror(new_store(tmp_path / "one"), url)
    with pytest.raises(InputError, match=r"lm is tiny .* in the folder, other .* now"):
        LabelMirror(new_store(tmp_path / "two", lm="other"), url)


def test_a_shard_that_is_not_whole_is_not_taken(tmp_path: Path, url: str) -> None:
    one, two = new_store(tmp_path / "one"), new_store(tmp_path / "two")
    one.write(0, [1.0, 2.0])
    LabelMirror(one, url).sync()
    files, root = fsspec.core.url_to_fs(url)
    name = f"{root}/losses/000000-r0.safetensors"
    files.pipe_file(name, files.cat_file(name)[:-3])
    assert LabelMirror(two, url).sync() == 0
    assert two.missing() == [0, 1, 2, 3]
    assert not list((tmp_path / "two" / "losses").iterdir())


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    with pytest.raises(InputError, match="mirror 'nothing://x' cannot be used"):
        LabelMirror(store, "nothing://x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be reached .* same command goes on"):
        LabelMirror(store, f"file://{tmp_path}/file")


@pytest.mark.parametrize("scheme", ["file://", "local://", ""])
def test_a_mistyped_folder_is_not_made(tmp_path: Path, scheme: str) -> None:
    store = new_store(tmp_path / "store")
    (tmp_path / "file").write_text("in the way")
    for parent in ("mirrro", "file", "mirrro/deeper"):
        message = f"would be in {tmp_path}/{parent}, which is not a folder that exists; check"
        with pytest.raises(InputError, match=message):
            LabelMirror(store, f"{scheme}{tmp_path}/{parent}/train_labels")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "store"]


@pytest.mark.parametrize("url", ["", "  "])
def test_an_empty_url_is_no_wish_for_no_copy(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="--mirror is empty"):
        open_mirror(new_store(tmp_path / "one"), url, "train")
    assert open_mirror(new_store(tmp_path / "one"), None, "train") is None
