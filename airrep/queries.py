"""Questions to a trained encoder, or a method that was fitted: what helps, which set is best."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from airrep.config import check_methods, check_seed
from airrep.device import pick_device
from airrep.examples import Example, InputError
from airrep.fitted import check_source, fitted
from airrep.provenance import write_bytes_atomic
from airrep.reading import as_text, parse_columns, read_examples, read_jsonl
from airrep.verdict import describe
from airrep.weights import resolve_model

SHOWN = 100  # characters of a text in a printed line


def encode(
    encoder: str,
    examples: str,
    output: str,
    batch_size: int | None = None,
    device: str = "auto",
    columns: str | None = None,
) -> None:
    """Writes a safetensors file: `embeddings` (examples, d) float32 in the examples' order, and
    `ids` as the bytes of a JSON list. Prints where.
    """
    from safetensors.numpy import save

    from airrep.attributor import pack_text
    from airrep.encoder import AirRepEncoder

    path = _writable(output, ".safetensors")
    rows = read_examples(examples, parse_columns(columns))
    model = AirRepEncoder.from_pretrained(resolve_model(encoder))
    model.to(pick_device(device))  # type: ignore[arg-type]
    embeddings = model.encode(rows, batch_size=batch_size, show_progress=True).numpy()
    ids = pack_text([example.id for example in rows])
    _write(path, save({"embeddings": embeddings, "ids": ids}))
    print(f"{path}: {len(rows)} embeddings of {embeddings.shape[1]} numbers")


def rank(
    examples: str,
    targets: str,
    encoder: str | None = None,
    method: str | None = None,
    top_k: int = 10,
    output: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    columns: str | None = None,
) -> None:
    """Prints or writes (.jsonl, a line a target) the `top_k` examples at either end.

    A higher score means more helpful: training on the example is expected to lower the target's
    loss. Scores are an `encoder`'s, or those of a `method` that `fit` saved.
    """
    check_source(encoder, method)
    path = None if output is None else _writable(output, ".jsonl")
    pool, wanted = (read_examples(file, parse_columns(columns)) for file in (examples, targets))
    attributor = fitted(encoder, method, pool, batch_size, device)
    ranking = attributor.rank(wanted, top_k)
    texts = {example.id: _line(example) for example in pool}
    lines = []
    for row, target in enumerate(wanted):
        ends = {
            "helpful": _found(pool, ranking.helpful_rows[row], ranking.helpful_scores[row]),
            "harmful": _found(pool, ranking.harmful_rows[row], ranking.harmful_scores[row]),
        }
        lines.append({"target": target.id} | ends)
        if path is None:
            _print_ranking(target, texts, ends)
    if path is not None:
        _write_lines(path, lines)


def score(
    examples: str,
    targets: str,
    subsets: str,
    encoder: str | None = None,
    method: str | None = None,
    output: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    columns: str | None = None,
) -> None:
    """Ranks candidate training sets by how much training on each is expected to help targets.

    Prints the ranking, or writes a line a candidate with its score for every target, best first.
    Scores are an `encoder`'s, or those of a `method` that `fit` saved.
    """
    check_source(encoder, method)
    path = None if output is None else _writable(output, ".jsonl")
    names_of = parse_columns(columns)
    pool, wanted = (read_examples(file, names_of) for file in (examples, targets))
    candidates = _read_candidates(subsets, pool, names_of)
    attributor = fitted(encoder, method, pool, batch_size, device)
    scores = attributor.score_subsets(wanted, list(candidates.values()))
    # Targets differ in scale: a mean of z-scores lets each of them count the same.
    spread = scores.std(axis=1, keepdims=True)
    overall = (
        (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    ).mean(0)
    names = list(candidates)
    order = np.argsort(-overall, kind="stable")
    if path is not None:
        by_target = [
            {target.id: float(value) for target, value in zip(wanted, column, strict=True)}
            for column in scores.T
        ]
        _write_lines(
            path,
            [
                {"name": names[row], "score": float(overall[row]), "targets": by_target[row]}
                for row in order
            ],
        )
        return
    print("mean z-score over targets, higher = more helpful")
    for place, row in enumerate(order, start=1):
        print(f"{place:4d}  {overall[row]:+.3f}  {names[row]}")


def judge(
    benchmark: str,
    scores: str | None = None,
    encoder: str | None = None,
    untrained: str | None = None,
    methods: str = "bm25,tfidf,response_tfidf,same_task,random",
    params: str | None = None,
    output: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Compares methods and files of scores on a benchmark; prints the LDS, best first.

    `params` are parameters of methods in YAML: {logra: {lm: DIR, layers: mlp}}.
    results.json and the scores are written into `output`, by default `judged` in the benchmark's
    folder: what a run found of its own stays.
    """
    from airrep.attributors import make_attributor
    from airrep.benchmark import evaluate_benchmark

    check_seed(seed)
    options: dict[str, dict[str, Any]] = {"random": {"seed": seed}}
    encoders = {"airrep": encoder, "embedding": untrained, "response_embedding": untrained}
    for name, source in encoders.items():
        if source is not None:
            options[name] = {"encoder": resolve_model(source), "device": pick_device(device)}
    given = _read_params(params or "{}")
    for name, own in given.items():
        options[name] = options.get(name, {}) | own
    wanted: list[str] = [name for name in encoders if name in options]
    wanted += [name for name in methods.split(",") if name and name not in wanted]
    check_methods([*wanted, *(name for name in given if name not in wanted)])
    results = evaluate_benchmark(
        benchmark,
        {name: make_attributor(name, **options.get(name, {})) for name in wanted},
        scores=_named_files(scores or ""),
        output=Path(benchmark) / "judged" if output is None else output,
        seed=seed,
        show_progress=True,
    )
    print(*describe(results), sep="\n")


def _read_params(text: str) -> dict[str, dict[str, Any]]:
    """Parameters by method; raises InputError for what is no mapping of mappings."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"params is not YAML: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise InputError(
            f"params is {text!r}; give parameters by method, such as '{{logra: {{lm: DIR}}}}'."
        )
    return found


def import_benchmark(
    published: str, output: str, lm: str = "not stated", licence: str = ""
) -> None:
    """Makes a benchmark from a published AirRep test set. Prints where."""
    from airrep.published import import_published

    about = import_published(published, output, lm=lm, licence=licence)
    print(f"{output}: {about['labels']} labels of {about['targets']} targets")


def _named_files(text: str) -> dict[str, str]:
    """{"a": "x.npy", "b": "y.npy"} of "a=x.npy,b=y.npy"."""
    files = {}
    for part in filter(None, text.split(",")):
        name, _, file = (piece.strip() for piece in part.partition("="))
        if not name or not file:
            raise InputError(f"--scores has {part!r}; give name=FILE, several with commas.")
        if name in files:
            raise InputError(f"--scores names {name!r} twice; give each file a name of its own.")
        files[name] = file
    return files


def _found(pool: Sequence[Example], rows: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"id": pool[row].id, "score": float(score)} for row, score in zip(rows, scores, strict=True)
    ]


def _print_ranking(
    target: Example, texts: Mapping[str, str], ends: Mapping[str, list[dict[str, Any]]]
) -> None:
    print(f"\n{target.id}: {_line(target)}")
    for end, found in ends.items():
        print(f"  most {end}")
        for row in found:
            print(f"    {row['score']:+.3f}  {row['id']}: {texts[row['id']]}")


def _line(example: Example) -> str:
    text = " ".join(f"{example.prompt} -> {example.response}".split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _read_candidates(
    source: str, pool: Sequence[Example], columns: Mapping[str, str]
) -> dict[str, np.ndarray]:
    rows = {example.id: row for row, example in enumerate(pool)}
    files = [part.strip() for part in source.split(",")]
    if not all(files):
        raise InputError(f"subsets is {source!r}, with an empty name; give files: a.jsonl,b.jsonl.")
    found: dict[str, np.ndarray] = {}
    for place, name, ids in _named_ids(files, {one.id: one for one in pool}, columns):
        if name in found:
            raise InputError(f"{place} is a second candidate {name!r}; give each its own name.")
        found[name] = _rows(place, ids, rows)
    return found


def _named_ids(
    files: Sequence[str], pool: Mapping[str, Example], columns: Mapping[str, str]
) -> Iterator[tuple[str, str, Any]]:
    """Where each candidate stands, its name and its ids."""
    if len(files) == 1 and files[0].endswith(".jsonl"):
        if not Path(files[0]).is_file():
            raise InputError(f"There is no file {files[0]}; check the path.")
        lines = list(read_jsonl(Path(files[0])))
        if lines and all("ids" in line for _, line in lines):
            for number, (place, line) in enumerate(lines):
                name = as_text(place, "name", line.get("name")) or f"subset-{number}"
                yield place, name, line["ids"]
            return
    for file in files:
        chosen = read_examples(file, columns)
        for example in chosen:
            same = pool.get(example.id, example)
            if (same.prompt, same.response) != (example.prompt, example.response):
                raise InputError(
                    f"{file} has another text for {example.id!r} than the pool: candidates are "
                    "told by their examples' ids, which are line numbers where none are given; "
                    "give all files the same ids."
                )
        yield file, file, [example.id for example in chosen]


def _rows(place: str, ids: Any, rows: Mapping[str, int]) -> np.ndarray:
    if not isinstance(ids, list) or not ids:
        raise InputError(f"{place} has no list of ids; give at least one id of the pool.")
    names = [str(name) for name in ids]
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise InputError(
            f"{place} names {len(unknown)} ids that are not in the pool (first: {unknown[0]!r})."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{place} names the id {twice!r} twice; name it once.")
    return np.asarray([rows[name] for name in names], dtype=np.int64)


def _writable(output: str, suffix: str) -> Path:
    """The path to write, checked before the slow work: its suffix and its folder."""
    path = Path(output)
    if path.suffix != suffix:
        raise InputError(f"The output {path} must end in {suffix}.")
    if path.is_dir():
        raise InputError(f"The output {path} is a folder; give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(path, error) from None
    return path


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes_atomic(path, content)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"The output {path} cannot be written ({error.strerror}); a file that was there before is "
        "kept: free some space or give another path."
    )


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    _write(path, text.encode())
    print(f"{path}: {text.count(chr(10))} lines")
