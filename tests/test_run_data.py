"""Labels made elsewhere: which .npz files are taken, and what is said of the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from airrep.config import DataConfig, ImportConfig, RunConfig
from airrep.examples import Example, InputError, write_examples
from data_builders.run_data import read_run_data

SUBSETS = np.asarray([[0, 1], [2, 3], [1, 3]])
LOSSES = np.asarray([[0.5, 1.0], [0.25, np.nan], [2.0, 1.5]], dtype=np.float32)
TRAIN = {"subsets": SUBSETS, "losses": LOSSES, "target_rows": np.asarray([7, 5])}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Three labels of two targets, over a pool of 8 examples."""
    for name, count in (("pool", 8), ("test", 2)):
        rows = [Example(f"{name}-{i}", f"p{i}", "r") for i in range(count)]
        write_examples(tmp_path / f"{name}.jsonl", rows)
    np.savez(tmp_path / "train.npz", **TRAIN)
    np.savez(tmp_path / "test.npz", subsets=SUBSETS, losses=LOSSES)
    files = {name: str(tmp_path / f"{name}.npz") for name in ("train", "test")}
    data = DataConfig(
        examples=str(tmp_path / "pool.jsonl"), test_targets=str(tmp_path / "test.jsonl")
    )
    return RunConfig(output=str(tmp_path / "run"), data=data, imported=ImportConfig(**files))


def test_imported_labels_name_rows_of_the_pool(config: RunConfig, tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", **TRAIN | {"target_rows": np.asarray([7, 5], dtype=np.uint8)})
    data = read_run_data(config)
    assert [target.id for target in data.targets["train"]] == ["pool-7", "pool-5"]
    assert [subset.tolist() for subset in data.subsets["test"]] == SUBSETS.tolist()
    assert data.subsets["train"][0].dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_rows": np.asarray([7])}, "losses of 2 targets, but 1 targets are named"),
        ({"target_rows": np.asarray([], dtype=int)}, "but 0 targets are named"),
        ({"target_rows": np.asarray([7, 7])}, "names row 7 twice in target_rows"),
        ({"target_rows": np.asarray([7, -1])}, "names row -1 in target_rows, but .* 8 examples"),
        ({"target_rows": np.asarray([8, 5])}, "names row 8 in target_rows"),
        ({"target_rows": np.asarray([7.0, 5.0])}, r"target_rows of shape \(2,\) and type float64"),
        ({"target_rows": np.asarray(7)}, r"target_rows of shape \(\)"),
        ({"target_rows": np.asarray([[7], [5]])}, r"target_rows of shape \(2, 1\)"),
        ({"target_rows": np.asarray([7, None])}, "is not a .npz file of plain arrays"),
        ({"target_rows": np.asarray([7, 1])}, "Row 1 of .* is a target and inside a subset"),
        ({"subsets": np.zeros_like(SUBSETS)}, "names row 0 twice in a subset"),
        ({"subsets": SUBSETS - 1}, "names row -1 in a subset"),
        ({"subsets": SUBSETS * 1.0}, "subsets of shape .* type float64"),
        ({"losses": np.full_like(LOSSES, np.nan)}, "no finite loss"),
        ({"losses": LOSSES[:, :1]}, "losses of 1 targets, but 2"),
    ],
)
def test_wrong_arrays_are_named(
    config: RunConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "train.npz", **TRAIN | changes)
    with pytest.raises(InputError, match=message):
        read_run_data(config)


def test_test_targets_are_those_of_the_losses(config: RunConfig, tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", subsets=SUBSETS, losses=LOSSES[:, :1])
    with pytest.raises(InputError, match=r"test\.npz has losses of 1 targets, but 2"):
        read_run_data(config)


def _write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, SUBSETS)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not a .npz file of plain arrays"),
        (lambda path: path.write_bytes(b"junk"), "is not a .npz file"),
        (lambda path: path.write_bytes(path.read_bytes()[:400]), "is not a .npz file"),
        (_write_npy, "is not a .npz file"),
        (lambda path: np.savez(path, other=SUBSETS), "no array 'subsets'|lacks an array"),
        (Path.unlink, r"no file .*\.npz"),
    ],
)
def test_files_that_are_no_npz_are_named(
    config: RunConfig, tmp_path: Path, split: str, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(tmp_path / f"{split}.npz")
    with pytest.raises(InputError, match=message):
        read_run_data(config)
