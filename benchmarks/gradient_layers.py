"""What the gradients of each kind of layer, and of each sixth of the blocks, say by themselves.

    airrep fit --config configs/minimix.yaml --methods logra        # once: a pass over the pool
    python benchmarks/gradient_layers.py --run out/minimix --also 'layers.(1[5-9]|2.).*v_proj'

Takes the features of a saved LoGra apart, layer by layer, and whitens every layer by itself. LDS on
held-out training labels, mean over seeds, of the layers of a group together: products pooled
additively, cosines pooled additively and by attention. `--damping 1e6` only brings layers to one
size. No gradient is computed but those of training targets that are not in the pool; test labels
are not read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser

from airrep.attributor import Attributor
from airrep.attributors.language_model import open_lm
from airrep.attributors.logra import LoGraAttributor
from airrep.device import pick_device
from airrep.gradients.curvature import FisherBlocks
from airrep.gradients.layers import linear_layers, weight_shape
from airrep.gradients.projections import projected_shapes
from airrep.gradients.store import GradientStore
from airrep.holdout import held_out_labels
from airrep.metrics import lds_per_target
from airrep.pooling import Membership, membership, pool_scores
from airrep.run_folder import RunFolder
from airrep.train_settings import TrainSettings

PARTS = 6  # of the blocks
# What a seed holds out: rows of the targets asked, its subsets, its losses.
Judge = tuple[np.ndarray, Membership, np.ndarray]


def main() -> None:
    """Prints the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder with its labels")
    parser.add_argument("--method", type=Path, help="the saved LoGra; by default the run's")
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--also", default=None, help="a group more: layers by regular expression")
    args = parser.parse_args()
    folder = RunFolder(args.run)
    saved = Attributor.load(args.method or folder.path / "methods" / "logra")
    if not isinstance(saved, LoGraAttributor):
        parser.error(f"--method holds the method {saved.name!r}, not 'logra'")
    label_store = folder.open_labels("train")
    _, targets = folder.read_labelled("train", label_store)
    labels = label_store.read()
    held = [held_out_labels(labels, TrainSettings(seed=seed)) for seed in range(args.seeds)]
    asked = np.unique(np.concatenate([rows for rows, _ in held]))
    judges = [
        (np.searchsorted(asked, rows), membership(own.subsets, saved.pool_size_), own.losses)
        for rows, own in held
    ]
    layers = linear_layers(open_lm(saved.lm, pick_device(saved.device)).model, saved.layers)
    shapes = projected_shapes(
        {name: weight_shape(layer) for name, layer in layers.items()}, saved.projection_rank
    )
    groups = make_groups(list(shapes), args.also)
    sizes = [d_out * d_in for d_out, d_in in shapes.values()]
    features = saved.target_features([targets[row] for row in asked], saved.features_[0])
    products, cosines = group_scores(
        saved.features_[0].store, features, sizes, args.damping, groups
    )
    print("| layers | how many | numbers | products, additive | cosine, additive | attention |")
    print("|---|---|---|---|---|---|")
    for name, members in groups.items():
        found = [
            mean_lds(products[name], judges, "sum"),
            mean_lds(cosines[name], judges, "sum"),
            mean_lds(cosines[name], judges, "attention"),
        ]
        numbers = sum(sizes[row] for row in members)
        shown = " | ".join(f"{one:.3f}" for one in found)
        print(f"| {name} | {len(members)} | {numbers:,} | {shown} |", flush=True)


def make_groups(names: Sequence[str], also: str | None) -> dict[str, list[int]]:
    """Rows of layers: of one name, in a part of the block, in some blocks, all, and those that a
    regular expression finds."""
    groups: dict[str, list[int]] = {}
    for place in (-1, -2):  # the layer, and what it is part of
        for row, name in enumerate(names):
            groups.setdefault(name.split(".")[place], []).append(row)
    blocks = [int(found[0]) if (found := re.findall(r"\.(\d+)\.", name)) else 0 for name in names]
    for part in np.array_split(np.unique(blocks), min(PARTS, len(set(blocks)))):
        title = f"blocks {part[0] + 1} to {part[-1] + 1}"
        groups[title] = [row for row, block in enumerate(blocks) if block in part]
    groups["all"] = list(range(len(names)))
    if also is not None:
        groups[f"`{also}`"] = [row for row, name in enumerate(names) if re.search(also, name)]
    return groups


def group_scores(
    store: GradientStore,
    features: torch.Tensor,
    sizes: Sequence[int],
    damping: float,
    groups: Mapping[str, Sequence[int]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Products and cosines (T, pool) of targets' features (T, d), by group of layers."""
    curvature = FisherBlocks.fit(store, sizes, damping)
    features = features.cpu()
    queries = curvature.solve(features)
    lengths = layer_sums(queries * features, sizes)  # (T, layers)
    pool_lengths = np.empty((store.rows, len(sizes)), dtype=np.float32)
    products = {name: np.zeros((len(features), store.rows), dtype=np.float32) for name in groups}
    groups_of = [
        [name for name, rows in groups.items() if row in rows] for row in range(len(sizes))
    ]
    for rows, values in store.blocks():
        pool_lengths[rows] = layer_sums(curvature.solve(values) * values, sizes)
        parts = zip(queries.split(list(sizes), 1), values.split(list(sizes), 1), strict=True)
        for names, (left, right) in zip(groups_of, parts, strict=True):
            found = (left @ right.T).numpy()
            for name in names:
                products[name][:, rows] += found
    cosines = {}
    for name, members in groups.items():
        squares = np.outer(lengths[:, members].sum(1), pool_lengths[:, members].sum(1))
        cosines[name] = products[name] / np.sqrt(squares.clip(min=np.finfo(np.float32).tiny))
    return products, cosines


def layer_sums(values: torch.Tensor, sizes: Sequence[int]) -> np.ndarray:
    """Sums (n, layers) of each layer's numbers, of rows (n, d)."""
    return torch.stack([part.sum(1) for part in values.split(list(sizes), 1)], dim=1).numpy()


def mean_lds(scores: np.ndarray, judges: Sequence[Judge], pooling: str) -> float:
    """Mean over seeds of the LDS on what each held out."""
    found = []
    for rows, members, losses in judges:
        pooled = pool_scores(torch.from_numpy(scores[rows]), members, pooling).numpy()
        found.append(float(lds_per_target(pooled, losses)[0].mean()))
    return float(np.mean(found))


if __name__ == "__main__":
    main()
