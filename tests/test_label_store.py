"""The label store: what is written is read, kills and damage lose nothing silently."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from airrep.examples import Example, InputError, fingerprint_examples, write_examples
from airrep.label_files import Shard, shard_bytes
from airrep.label_store import LabelStore, fingerprint_labels, fingerprint_plan, import_npz
from airrep.run_folder import RunFolder

PLAN = [np.asarray(rows) for rows in ([0, 1, 2], [1, 3], [2, 4, 5], [0, 5], [3, 4])]
TARGETS = 4
FINGERPRINT = {"examples": "a" * 64, "targets": "b" * 64, "lm": "c" * 64, "recipe": "d" * 64}
ABOUT = {"lm": "tiny", "recipe": {"learning_rate": 0.1, "epochs": 2}}
FORK = multiprocessing.get_context("fork")


def make_store(path: Path, **changes: Any) -> LabelStore:
    arguments = {
        "fingerprint": FINGERPRINT, "subsets": PLAN, "target_count": TARGETS, "about": ABOUT
    }  # fmt: skip
    return LabelStore.create(path, **{**arguments, **changes})


def losses_of(number: int) -> np.ndarray:
    return np.arange(TARGETS, dtype=np.float32) + 10 * number


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return make_store(tmp_path / "labels")


def assert_holds(store: LabelStore, numbers: list[int], repeat: int = 0) -> None:
    labels = store.read(repeat)
    assert labels.numbers.tolist() == numbers
    assert labels.losses.shape == (TARGETS, len(numbers))
    assert labels.losses.dtype == np.float32
    for column, number in enumerate(numbers):
        np.testing.assert_array_equal(labels.losses[:, column], losses_of(number))
        np.testing.assert_array_equal(labels.subsets[column], PLAN[number])
    assert store.done(repeat) == set(numbers)
    assert store.missing(repeat) == [n for n in range(len(PLAN)) if n not in numbers]


# Writing and reading


def test_an_empty_store_misses_every_label(store: LabelStore) -> None:
    assert_holds(store, [])


def test_labels_come_back_in_plan_order(store: LabelStore) -> None:
    for number in (3, 0, 2):
        store.write(number, losses_of(number))
    assert_holds(store, [0, 2, 3])
    assert_holds(LabelStore.open(store.path), [0, 2, 3])


def test_repeats_are_kept_apart(store: LabelStore) -> None:
    store.write(1, losses_of(1))
    store.write(2, losses_of(2), repeat=1)
    assert_holds(store, [1])
    assert_holds(store, [2], repeat=1)
    store.merge()
    assert_holds(store, [1])
    assert_holds(store, [2], repeat=1)


def test_a_label_written_again_is_replaced_before_and_after_a_merge(store: LabelStore) -> None:
    store.write(1, losses_of(0))
    store.merge()
    store.write(1, losses_of(1))
    assert_holds(store, [1])
    store.merge()
    assert_holds(store, [1])


def test_merge_leaves_one_file_and_can_be_repeated(store: LabelStore) -> None:
    store.merge()
    for number in (4, 1):
        store.write(number, losses_of(number))
    store.merge()
    store.merge()
    assert [path.name for path in (store.path / "losses").iterdir()] == ["merged-r0.safetensors"]
    store.write(2, losses_of(2))
    assert_holds(store, [1, 2, 4])


def test_the_manifest_says_what_the_labels_belong_to(store: LabelStore) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["fingerprint"] == {**FINGERPRINT, "plan": fingerprint_plan(PLAN)}
    assert manifest["about"] == ABOUT
    assert (manifest["subset_count"], manifest["target_count"]) == (len(PLAN), TARGETS)
    assert manifest["versions"]["airrep"]
    assert (store.fingerprint, store.target_count) == (manifest["fingerprint"], TARGETS)


def test_fingerprint_plan_sees_rows_order_and_borders() -> None:
    known = fingerprint_plan([np.asarray([1, 2]), np.asarray([3])])
    assert known == fingerprint_plan([np.asarray([1, 2], dtype=np.int32), np.asarray([3])])
    for other in ([[1], [2, 3]], [[3], [1, 2]], [[1, 2], [4]], [[1, 2, 3]]):
        assert fingerprint_plan([np.asarray(rows) for rows in other]) != known


# Whose labels


def test_the_same_things_open_the_store_again(store: LabelStore) -> None:
    store.write(0, losses_of(0))
    moved = {"lm": Path("elsewhere/tiny"), "recipe": ABOUT["recipe"]}
    assert_holds(make_store(store.path, about=moved), [0])


def test_another_recipe_is_refused_with_both_sides(store: LabelStore) -> None:
    with pytest.raises(InputError) as caught:
        make_store(
            store.path,
            fingerprint={**FINGERPRINT, "recipe": "e" * 64},
            about={"lm": "tiny", "recipe": {"learning_rate": 0.3, "epochs": 2}},
        )
    message = str(caught.value)
    assert f"recipe is learning_rate=0.1 (sha256 {'d' * 12}) in the folder" in message
    assert f"learning_rate=0.3 (sha256 {'e' * 12}) now" in message
    assert "epochs" not in message
    assert "lm is" not in message


def test_every_difference_is_named(store: LabelStore) -> None:
    other = {"examples": "0" * 64, "lm": "1" * 64, "recipe": "d" * 64}
    with pytest.raises(InputError) as caught:
        make_store(store.path, fingerprint=other, subsets=PLAN[:2], target_count=9)
    message = str(caught.value)
    for part in (
        f"examples is sha256 {'a' * 12} in the folder, sha256 {'0' * 12} now",
        f"lm is tiny (sha256 {'c' * 12}) in the folder, tiny (sha256 {'1' * 12}) now",
        f"targets is sha256 {'b' * 12} in the folder, nothing now",
        "plan is sha256",
        "target_count is 4 in the folder, 9 now",
        "Give another folder",
    ):
        assert part in message


def test_a_fingerprint_of_another_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of another plan"):
        make_store(tmp_path / "x", fingerprint={**FINGERPRINT, "plan": "0" * 64})


@pytest.mark.parametrize("changes", [{"subsets": []}, {"target_count": 0}])
def test_nothing_to_label_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give at least one of each"):
        make_store(tmp_path / "x", **changes)


def test_a_file_is_no_folder_for_labels(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is not a folder"):
            make_store(path)
        with pytest.raises(InputError, match="is not a label store"):
            LabelStore.open(path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, r"is not a label store \(it has no manifest.json\)"),
        ("{", r"manifest.json is not JSON"),
        ("[]", r"manifest.json has format None, but this version reads 1"),
        ('{"format": 7}', r"manifest.json has format 7, but this version reads 1"),
        ('{"format": 1}', r"manifest.json has no usable 'fingerprint'"),
    ],
)
def test_a_folder_that_is_no_store_is_named(
    store: LabelStore, manifest: str | None, message: str
) -> None:
    file = store.path / "manifest.json"
    if manifest is None:
        file.unlink()
    else:
        file.write_text(manifest)
    with pytest.raises(InputError, match=message):
        LabelStore.open(store.path)


def test_another_plan_file_is_refused(store: LabelStore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", subsets=PLAN[::-1])
    (other.path / "subsets.safetensors").replace(store.path / "subsets.safetensors")
    with pytest.raises(InputError, match=r"subsets\.safetensors is not the plan"):
        LabelStore.open(store.path)
    (store.path / "subsets.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"subsets\.safetensors cannot be read"):
        LabelStore.open(store.path)


# Wrong losses


@pytest.mark.parametrize(
    ("number", "losses", "repeat", "message"),
    [
        (5, [0, 0, 0, 0], 0, "There is no subset 5 in .*; numbers go from 0 to 4"),
        (-1, [0, 0, 0, 0], 0, "There is no subset -1"),
        (0, [0, 0, 0, 0], -1, "Repeat -1 of subset 0 is negative"),
        (2, [0, 0, 0], 0, r"Subset 2 got losses of shape \(3,\); .* has 4 targets"),
        (2, [[0, 0, 0, 0]], 0, r"Subset 2 got losses of shape \(1, 4\)"),
        (3, [0, np.nan, 0, np.inf], 0, r"Subset 3 .* 2 of 4 targets \(rows 1, 3\)"),
    ],
)
def test_wrong_losses_are_refused_and_not_stored(
    store: LabelStore, number: int, losses: list[float], repeat: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        store.write(number, losses, repeat)
    assert list((store.path / "losses").iterdir()) == []


# Damage


def test_a_shard_cut_short_is_missing_until_it_is_written_again(store: LabelStore) -> None:
    store.write(0, losses_of(0))
    store.write(1, losses_of(1))
    shard = store.path / "losses" / "000001-r0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    assert store.done() == {0}
    for use in (store.read, store.merge):
        with pytest.raises(InputError, match=r"000001-r0\.safetensors is damaged .* delete it and"):
            use()
    store.write(1, losses_of(1))
    assert_holds(store, [0, 1])


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_a_changed_byte_is_seen(store: LabelStore) -> None:
    store.write(1, losses_of(1))
    flip_last_byte(store.path / "losses" / "000001-r0.safetensors")
    with pytest.raises(InputError, match="checksum does not match"):
        store.read()


def test_a_damaged_merged_file_is_named(store: LabelStore) -> None:
    store.write(1, losses_of(1))
    store.merge()
    flip_last_byte(store.path / "losses" / "merged-r0.safetensors")
    for use in (store.read, store.done, store.missing):
        with pytest.raises(InputError, match=r"merged-r0\.safetensors is damaged"):
            use()


def test_a_renamed_shard_is_seen(store: LabelStore) -> None:
    store.write(1, losses_of(1))
    folder = store.path / "losses"
    (folder / "000001-r0.safetensors").rename(folder / "000002-r0.safetensors")
    with pytest.raises(InputError, match=r"000002-r0\.safetensors holds another subset's losses"):
        store.read()


def test_leftovers_of_a_killed_writer_are_passed_by(store: LabelStore) -> None:
    store.write(1, losses_of(1))
    (store.path / "losses" / ".000002-r0.safetensors.17-abc.tmp").write_bytes(b"half")
    (store.path / "losses" / "notes.txt").write_text("mine")
    assert_holds(store, [1])
    store.merge()
    assert_holds(store, [1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_keeps_what_was_finished(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store.write(0, losses_of(0))

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for use in (lambda: store.write(1, losses_of(1)), store.merge):
            with pytest.raises(InputError, match="disk is full: .*labels.* finished are kept"):
                use()
    assert_holds(store, [0])
    assert [path.name for path in (store.path / "losses").iterdir()] == ["000000-r0.safetensors"]


def test_losses_without_a_manifest_are_not_adopted(store: LabelStore) -> None:
    store.write(1, losses_of(1))
    for merge in (lambda: None, store.merge):
        merge()
        manifest = (store.path / "manifest.json").read_bytes()
        (store.path / "manifest.json").unlink()
        with pytest.raises(InputError, match=r"holds losses \(.*-r0\.\w+\) but no manifest\.json"):
            make_store(store.path, fingerprint=FINGERPRINT | {"recipe": "e" * 64})
        assert not (store.path / "manifest.json").exists()
        (store.path / "manifest.json").write_bytes(manifest)
        assert_holds(make_store(store.path), [1])


def test_a_manifest_that_names_no_plan_is_refused(store: LabelStore) -> None:
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["fingerprint"]["plan"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"is not the plan that manifest\.json names"):
        LabelStore.open(store.path)


def test_shards_have_the_same_bytes_in_every_process() -> None:
    """Maps of the Rust library have an order of their own, even inside one process."""
    notes = {12: 1, 3: 2}, {12: 0.5, 3: 2.0}
    shard = Shard(np.asarray([12, 3]), np.zeros((2, 4), dtype=np.float32), *notes)
    assert len({shard_bytes(shard) for _ in range(20)}) == 1


def test_seconds_stay_with_their_label(store: LabelStore) -> None:
    before = fingerprint_labels(store, [store.read()])
    store.write(0, losses_of(0), seconds=1.5)
    store.write(1, losses_of(1), seconds=2.25)
    store.write(1, losses_of(1), repeat=1, seconds=4.0)
    store.write(2, losses_of(2))
    assert store.seconds() == {0: 1.5, 1: 2.25}
    store.merge()
    assert (store.seconds(), store.seconds(repeat=1)) == ({0: 1.5, 1: 2.25}, {1: 4.0})
    untimed = fingerprint_labels(store, [store.read()])
    store.write(0, losses_of(0), seconds=9.0)
    assert store.seconds() == {0: 9.0, 1: 2.25}
    assert fingerprint_labels(store, [store.read()]) == untimed != before
    store.write(1, losses_of(1))
    assert store.seconds() == {0: 9.0}


@pytest.mark.parametrize("attempts", [{"attempts": '{"1": 2}'}, {}])
def test_earlier_shards_are_read(store: LabelStore, attempts: dict[str, str]) -> None:
    arrays = {"numbers": np.asarray([1]), "losses": losses_of(1)[None]}
    about = {"sha256": Shard(**arrays).checksum(), **attempts}
    path = store.path / "losses" / "000001-r0.safetensors"
    path.write_bytes(save(arrays, metadata=about))
    assert_holds(store, [1])
    assert store.attempts() == ({1: 2} if attempts else {})
    assert store.seconds() == {}
    store.merge()
    assert_holds(store, [1])
    assert store.attempts() == ({1: 2} if attempts else {})


@pytest.mark.parametrize(
    "about",
    [
        {"about": "{"},
        {"about": "3"},
        {"about": '{"attempts": {}}'},
        {"about": '{"sha256": "x", "attempts": {}, "seconds": [1]}'},
        {"about": '{"sha256": "x", "attempts": [1]}'},
        {"sha256": "x", "attempts": "{"},
        {"sha256": "x", "attempts": '{"a": 1}'},
        {"other": "x"},
    ],
)
def test_a_shard_with_damaged_metadata_is_named(store: LabelStore, about: dict[str, str]) -> None:
    arrays = {"numbers": np.asarray([1]), "losses": losses_of(1)[None]}
    (store.path / "losses" / "000001-r0.safetensors").write_bytes(save(arrays, metadata=about))
    for use in (store.read, store.attempts):
        with pytest.raises(InputError, match=r"000001-r0\.safetensors is damaged"):
            use()


def test_old_leftovers_go_when_a_store_is_opened_for_writing(store: LabelStore) -> None:
    old = store.path / "losses" / ".000002-r0.safetensors.17-0123abcd.tmp"
    new = store.path / "losses" / ".000003-r0.safetensors.17-0123abcd.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    make_store(store.path)
    assert (old.exists(), new.exists()) == (False, True)


# Several processes, and kills


def run_all(*jobs: Callable[[], None]) -> None:
    processes = [FORK.Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_many_processes_create_write_and_merge_at_once(tmp_path: Path) -> None:
    path = tmp_path / "labels"

    def work(start: int) -> None:
        store = make_store(path)
        for turn in range(len(PLAN)):
            number = (start + turn) % len(PLAN)
            store.write(number, losses_of(number))
            store.merge()
            assert number in store.done()
            assert number in store.read().numbers

    run_all(*(lambda start=start: work(start) for start in range(4)))
    assert_holds(LabelStore.open(path), list(range(len(PLAN))))


def test_only_one_of_two_different_stores_is_created(tmp_path: Path) -> None:
    def create(name: str) -> None:
        try:
            make_store(tmp_path / "labels", fingerprint={"lm": name}, subsets=PLAN[:2])
        except InputError:
            return
        (tmp_path / f"made-{name}").touch()

    run_all(*(lambda name=name: create(name) for name in "abcd"))
    [made] = tmp_path.glob("made-*")
    assert LabelStore.open(tmp_path / "labels").fingerprint["lm"] == made.name[-1]


def die_at(step: int) -> None:
    """Makes this process kill itself before the step-th thing it does to the disk."""
    left = [step]

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    Path.open, Path.unlink = deadly(Path.open), deadly(Path.unlink)  # type: ignore[method-assign]


def killed_at(step: int, work: Callable[[], None]) -> bool:
    def run() -> None:
        die_at(step)
        work()

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_merge_killed_anywhere_loses_nothing(tmp_path: Path) -> None:
    step, killed = 0, True
    while killed:
        store = make_store(tmp_path / str(step))
        store.write(3, losses_of(3))
        store.merge()
        for number in (0, 4):
            store.write(number, losses_of(number))
        killed = killed_at(step, store.merge)
        assert_holds(store, [0, 3, 4])
        store.merge()
        assert_holds(store, [0, 3, 4])
        step += 1
    assert step > 6


def test_a_store_whose_making_was_killed_anywhere_is_made_again(tmp_path: Path) -> None:
    step, killed = 0, True
    while killed:
        path = tmp_path / str(step)

        def work(path: Path = path) -> None:
            make_store(path).write(1, losses_of(1))

        killed = killed_at(step, work)
        store = make_store(path)
        assert store.done() <= {1}
        store.write(1, losses_of(1))
        assert_holds(store, [1])
        step += 1
    assert step > 8


# Import


def test_an_npz_is_imported_and_what_is_not_finite_is_missing(tmp_path: Path) -> None:
    losses = np.asarray([[1, 2, np.nan], [4, np.inf, 6]], dtype=np.float64)
    np.savez(tmp_path / "x.npz", subsets=[[0, 1], [2, 3]], losses=losses)
    for _ in range(2):  # a second time changes nothing
        store = import_npz(tmp_path / "x.npz", tmp_path / "labels", FINGERPRINT, ABOUT)
        labels = store.read()
        assert [rows.tolist() for rows in labels.subsets] == [[0, 1], [2, 3]]
        np.testing.assert_array_equal(labels.losses, [[1, 4], [2, np.nan], [np.nan, 6]])
        assert store.missing() == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"losses": np.zeros((2, 3))}, r"has no array 'subsets'; it has losses\."),
        ({"subsets": np.zeros((2, 2), int)}, r"has no array 'losses'"),
        (
            {"subsets": np.zeros((2, 2)), "losses": np.zeros((2, 3))},
            r"subsets of shape \(2, 2\) and type float64; integer pool rows",
        ),
        (
            {"subsets": np.zeros((2, 2), int), "losses": np.zeros((3, 2))},
            r"losses of shape \(3, 2\) .*; float losses \(2 subsets, targets\)",
        ),
        (
            {"subsets": np.asarray([[1], [2, 3]], dtype=object), "losses": np.zeros((2, 3))},
            r"is not a \.npz file of plain arrays",
        ),
    ],
)
def test_a_wrong_npz_is_named(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        import_npz(tmp_path / "x.npz", tmp_path / "labels", FINGERPRINT, ABOUT)


def test_what_is_no_npz_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        import_npz(tmp_path / "x.npz", tmp_path / "labels", FINGERPRINT, ABOUT)
    (tmp_path / "x.npz").write_text("text")
    with pytest.raises(InputError, match=r"is not a \.npz file"):
        import_npz(tmp_path / "x.npz", tmp_path / "labels", FINGERPRINT, ABOUT)
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"is not a \.npz file"):
        import_npz(tmp_path / "x.npy", tmp_path / "labels", FINGERPRINT, ABOUT)


@pytest.mark.minimix
def test_minimix_is_imported(minimix: Path, tmp_path: Path) -> None:
    store = import_npz(minimix / "test_labels.npz", tmp_path / "labels", FINGERPRINT, ABOUT)
    labels = store.read()
    assert labels.losses.shape == (520, 100)
    assert {len(rows) for rows in labels.subsets} == {500}


# The examples of a run


def test_labels_are_read_only_with_the_examples_they_are_of(tmp_path: Path) -> None:
    examples = [Example(str(row), f"prompt {row}", f"response {row}") for row in range(10)]
    pool, targets = examples[:6], examples[6:]
    folder = RunFolder(tmp_path)
    store = make_store(
        folder.labels("test"),
        fingerprint={
            "examples": fingerprint_examples(pool),
            "targets": fingerprint_examples(targets),
        },
    )
    write_examples(folder.pool_file, pool)
    write_examples(folder.targets_file("test"), targets)
    assert folder.read_labelled("test", store) == (pool, targets)
    changed = replace(pool[2], response="other")
    for path, right, wrong in (
        (folder.pool_file, pool, [*pool[:2], changed, *pool[3:]]),
        (folder.pool_file, pool, pool[::-1]),
        (folder.targets_file("test"), targets, targets[1:]),
    ):
        write_examples(path, wrong)
        with pytest.raises(InputError, match=f"{path.name} does not hold the examples .* subsets`"):
            folder.read_labelled("test", store)
        write_examples(path, right)
