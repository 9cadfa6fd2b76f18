"""Training problems with a known answer: sharing a word with a target helps it."""

from pathlib import Path

import numpy as np

from airrep.examples import Example
from airrep.label_store import Labels

TOPICS = ("red", "green", "blue", "yellow")
FILLERS = ("apple", "river", "mountain", "planet", "music", "paper", "table", "horse")


def planted_examples(count: int, seed: int) -> list[Example]:
    """Texts of fillers around one topic word each."""
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        words = [*rng.choice(FILLERS, rng.integers(1, 4)), TOPICS[row % len(TOPICS)]]
        prompt = "what is the " + " ".join(rng.permutation(words))
        examples.append(Example(f"{seed}-{row}", prompt, str(rng.choice(FILLERS))))
    return examples


def planted_answers(count: int, seed: int) -> list[Example]:
    """Long prompts of fillers, and a topic word for an answer."""
    rng = np.random.default_rng(seed)
    return [
        Example(f"{seed}-{row}", " ".join(rng.choice(FILLERS, 24)), TOPICS[row % len(TOPICS)])
        for row in range(count)
    ]


def planted_labels(
    pool: list[Example], targets: list[Example], subsets: int, size: int, seed: int = 0
) -> Labels:
    """Losses that fall by one for each subset example with the target's topic word."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(len(pool), size, replace=False) for _ in range(subsets)]
    same = np.asarray([[_topic(x) == _topic(z) for z in pool] for x in targets])
    helped = np.stack([same[:, subset].sum(axis=1) for subset in rows], axis=1)
    losses = 3.0 - helped + 0.1 * rng.standard_normal(helped.shape)
    return Labels(rows, losses.astype(np.float32), np.arange(subsets))


def _topic(example: Example) -> int:
    words = f"{example.prompt} {example.response}".split()
    return next(index for index, topic in enumerate(TOPICS) if topic in words)


def files_in(folder: Path) -> list[str]:
    """Every file below the folder, as relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
