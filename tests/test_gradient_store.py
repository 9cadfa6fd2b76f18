"""Features on disk: what is written comes back, whatever stops the writer, and for nobody else."""

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airrep.examples import InputError
from airrep.gradients import store as store_module
from airrep.gradients.store import DTYPES, GradientStore

ABOUT = {"lm": "abc", "projection_rank": 4}


def features_of(rows: np.ndarray, width: int = 6) -> torch.Tensor:
    """Numbers (n, width) that only depend on the row."""
    grid = torch.from_numpy(np.asarray(rows))[:, None] * 10.0 + torch.arange(width)
    return torch.sin(grid)


def fill(store: GradientStore, rows: np.ndarray) -> None:
    store.write(rows, features_of(rows, store.width), torch.from_numpy(rows / 100))


def whole(store: GradientStore) -> torch.Tensor:
    return torch.cat([values for _, values in store.blocks()])


@pytest.fixture(params=[False, True], ids=["memory", "folder"])
def folder(request, tmp_path) -> Path | None:
    return tmp_path / "deep" / "features" if request.param else None


def test_rows_written_in_any_order_come_back(folder):
    store = GradientStore(7, 6, ABOUT, folder)
    fill(store, np.array([5, 0, 3]))
    np.testing.assert_array_equal(store.missing(), [1, 2, 4, 6])
    fill(store, np.array([6, 4, 2, 1]))
    assert not len(store.missing())
    torch.testing.assert_close(whole(store), features_of(np.arange(7)), rtol=0, atol=0)
    np.testing.assert_allclose(store.doubts(), np.arange(7) / 100, rtol=1e-6)


def test_products_are_those_of_all_rows_in_blocks(folder, monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 100)
    store = GradientStore(11, 6, ABOUT, folder)
    fill(store, np.arange(11))
    assert [rows for rows, _ in store.blocks()] == [slice(0, 4), slice(4, 8), slice(8, 11)]
    queries = features_of(np.array([20, 21]))
    expected = queries @ features_of(np.arange(11)).T
    np.testing.assert_allclose(store.products(queries), expected.numpy(), rtol=1e-6, atol=1e-6)


def test_of_several_that_start_at_once_one_makes_what_is_kept(tmp_path):
    store, together, made = GradientStore(2, 6, ABOUT, tmp_path / "store"), Barrier(2), []

    def make() -> dict[str, np.ndarray]:
        made.append(len(made))
        time.sleep(0.2)
        return {"projections": np.full(3, made[-1])}

    def keep(_: int) -> np.ndarray:
        together.wait()
        return store.keep("projections", make)["projections"]

    with ThreadPoolExecutor(2) as workers:
        first, second = workers.map(keep, range(2))
    np.testing.assert_array_equal(first, second)
    assert made == [0]


def test_reading_an_unfinished_store_is_an_error(folder):
    store = GradientStore(7, 6, ABOUT, folder)
    fill(store, np.array([5]))
    with pytest.raises(InputError, match="not finished: 6 of 7 rows are missing; fit the same"):
        whole(store)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1),
    st.sampled_from(list(DTYPES)),
)
def test_a_number_is_off_by_at_most_its_types_rounding(rows, dtype):
    values = torch.tensor(rows)
    store = GradientStore(len(rows), 3, ABOUT, dtype=dtype)
    store.write(np.arange(len(rows)), values, torch.zeros(len(rows)))
    largest = values.abs().amax(1, keepdim=True)
    bound = {
        "float32": 0 * values,
        "float16": values.abs() * 2**-11 + 2**-25,
        "bfloat16": values.abs() * 2**-8 + 1e-40,
        "int8": largest / 254 * (1 + 1e-5) + 1e-37,
    }[dtype]
    assert ((whole(store) - values).abs() <= bound).all()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_records_are_as_small_as_their_type(dtype, size, tmp_path):
    store = GradientStore(5, 100, ABOUT, tmp_path / "features", dtype)
    fill(store, np.arange(5))
    assert (tmp_path / "features" / "features.bin").stat().st_size == 5 * (8 + 100 * size)
    torch.testing.assert_close(whole(store), features_of(np.arange(5), 100), rtol=0, atol=5e-3)


def test_a_later_writer_goes_on_where_the_first_stopped(tmp_path):
    fill(GradientStore(7, 6, ABOUT, tmp_path / "features"), np.array([2, 3]))
    store = GradientStore(7, 6, ABOUT, tmp_path / "features")
    fill(store, store.missing())
    torch.testing.assert_close(whole(store), features_of(np.arange(7)))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_reader_sees_what_another_writes(tmp_path):
    reader = GradientStore(7, 6, ABOUT, tmp_path / "features")
    fill(GradientStore(7, 6, ABOUT, tmp_path / "features"), np.arange(7))
    torch.testing.assert_close(whole(reader), features_of(np.arange(7)))


def write_slowly(folder: Path, rows: np.ndarray, kill_after: int | None) -> None:
    """Opens the store and writes one row at a time; dies after some of them."""
    store = GradientStore(40, 6, ABOUT, folder)
    for count, row in enumerate(rows):
        if count == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        fill(store, np.array([row]))


def test_writers_share_a_store_and_one_may_be_killed(tmp_path):
    folder, shares = tmp_path / "features", np.array_split(np.arange(40), 3)
    fork = multiprocessing.get_context("fork")
    writers = [
        fork.Process(target=write_slowly, args=(folder, rows, 4 if number == 1 else None))
        for number, rows in enumerate(shares)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, -signal.SIGKILL, 0]
    store = GradientStore(40, 6, ABOUT, folder)
    np.testing.assert_array_equal(store.missing(), shares[1][4:])
    fill(store, store.missing())
    torch.testing.assert_close(whole(store), features_of(np.arange(40)))


def test_a_row_half_written_counts_as_missing(tmp_path, monkeypatch):
    store = GradientStore(4, 6, ABOUT, tmp_path / "features")
    fill(store, np.array([0, 1]))

    def stop(path, rows, records):
        if path.name == "written.bin":
            raise KeyboardInterrupt
        write_rows(path, rows, records)

    write_rows = store_module._write_rows
    monkeypatch.setattr(store_module, "_write_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        fill(store, np.array([2]))
    np.testing.assert_array_equal(store.missing(), [2, 3])


def test_what_features_depend_on_is_made_once(tmp_path):
    store, calls = GradientStore(4, 6, ABOUT, tmp_path / "features"), []

    def make():
        calls.append(1)
        return {"p_in/a": np.full((2, 2), len(calls), dtype=np.float32)}

    for _ in range(2):
        assert store.keep("projections", make)["p_in/a"][0, 0] == 1
    (tmp_path / "features" / "projections.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="projections.safetensors is damaged"):
        store.keep("projections", make)
    assert GradientStore(4, 6, ABOUT).keep("projections", make)["p_in/a"][0, 0] == 2


# Errors


def test_another_models_folder_is_refused_with_both_sides(tmp_path):
    GradientStore(4, 6, ABOUT, tmp_path / "features")
    with pytest.raises(InputError, match="lm is abc in the folder, xyz now; projection_rank is 4"):
        GradientStore(4, 6, {"lm": "xyz", "projection_rank": 8}, tmp_path / "features")
    with pytest.raises(InputError, match="dtype is float32 in the folder, int8 now; rows is 4"):
        GradientStore(5, 6, ABOUT, tmp_path / "features", "int8")
    with pytest.raises(InputError, match="extra is None in the folder, 1 now. Give another folder"):
        GradientStore(4, 6, {**ABOUT, "extra": 1}, tmp_path / "features")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("features.bin", b"short"),
        ("written.bin", b""),
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder = tmp_path / "features"
    GradientStore(4, 6, ABOUT, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(
        InputError, match=rf"{name} is damaged \(.*delete the folder .*features and"
    ):
        GradientStore(4, 6, ABOUT, folder)


def test_a_file_that_is_gone_is_named(tmp_path):
    folder = tmp_path / "features"
    GradientStore(4, 6, ABOUT, folder)
    (folder / "features.bin").unlink()
    with pytest.raises(InputError, match=r"features.bin is damaged \(No such file or directory\)"):
        GradientStore(4, 6, ABOUT, folder)


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="cannot be made a folder of features"):
        GradientStore(4, 6, ABOUT, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_may_be_used(tmp_path):
    GradientStore(4, 6, ABOUT, tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["rows"] == 4


def test_unknown_types_and_numbers_that_do_not_fit_are_errors():
    with pytest.raises(InputError, match="store_dtype is 'int4'; choose one of float32, float16"):
        GradientStore(4, 6, ABOUT, dtype="int4")
    for dtype, value in (("float32", np.inf), ("int8", np.nan), ("float16", 1e6)):
        store = GradientStore(1, 2, ABOUT, dtype=dtype)
        with pytest.raises(InputError, match=f"not finite as {dtype}; check the model's weights"):
            store.write(np.array([0]), torch.tensor([[1.0, value]]), torch.zeros(1))
