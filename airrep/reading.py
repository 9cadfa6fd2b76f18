"""Reading examples from files and Hugging Face datasets, whatever their columns are called."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from airrep.examples import Example, InputError

# (prompt columns, response column), tried in this order; several prompt columns are joined.
KNOWN_COLUMNS = (
    (("prompt",), "response"),
    (("prompt",), "completion"),
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("instruction",), "response"),
    (("input",), "output"),
    (("question",), "answer"),
)
FIELDS = ("prompt", "response", "id", "task")
LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; csv by itself stops at 131,072
Row = tuple[str, Mapping[str, Any]]  # where it stands ("pool.jsonl line 3"), and its columns


def read_examples(
    source: str | Path, columns: Mapping[str, str] | None = None, split: str = "train"
) -> list[Example]:
    """Examples of a .jsonl, .json, .csv or .parquet file, a `save_to_disk` folder or a hub id.

    `columns` maps prompt, response, id and task to the source's names; what it leaves out is
    recognised (`KNOWN_COLUMNS`, chat `messages`). Rows without ids get "row-000000" and so on.
    `split` is read from data sets that have splits. Raises InputError for a source that is not
    there or not readable, missing columns, empty responses and duplicate ids, naming the place.
    """
    return list(iter_examples(source, columns, split))


def iter_examples(
    source: str | Path, columns: Mapping[str, str] | None = None, split: str = "train"
) -> Iterator[Example]:
    """The examples `read_examples` reads, one after the other; only their ids stay in memory."""
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise InputError(f"columns names {unknown[0]!r}; it maps only {', '.join(FIELDS)}.")
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(_rows(source, split)):
        example = _to_example(number, place, row, columns or {})
        if example.id in seen:
            raise InputError(
                f"{place}: the id {example.id!r} was used before, at {seen[example.id]}; "
                "ids must be unique."
            )
        seen[example.id] = place
        yield example
    if not seen:
        raise InputError(f"{source} holds no examples; give at least one.")


def parse_columns(text: str | None) -> dict[str, str]:
    """{"prompt": "text", "response": "answer"} of "prompt=text,response=answer"."""
    columns = {}
    for part in filter(None, (text or "").split(",")):
        field, _, name = (piece.strip() for piece in part.partition("="))
        if field not in FIELDS or not name or field in columns:
            raise InputError(
                f"--columns has {part!r}; give FIELD=NAME once for fields of {', '.join(FIELDS)}, "
                "several with commas."
            )
        columns[field] = name
    return columns


def _rows(source: str | Path, split: str) -> Iterator[Row]:
    if not str(source).strip():
        raise InputError("The name of the examples is empty; give a file, a folder or a hub id.")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise InputError(f"{source} cannot be found ({error}); give the whole path.") from None
    reader = {
        ".jsonl": read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet
    }.get(path.suffix)  # fmt: skip
    if path.is_file():
        if reader is None:
            raise InputError(
                f"{path} ends in {path.suffix!r}; examples are read from .jsonl, .json, .csv "
                "and .parquet files, save_to_disk folders and hub ids."
            )
        try:
            yield from reader(path)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error}); convert it.") from error
    elif path.is_dir():
        yield from _read_saved_dataset(path, split)
    elif reader is not None or path.is_absolute() or str(source).startswith("."):
        raise InputError(f"There is no file {path}; check the path.")
    else:
        yield from _read_hub(str(source), split)


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a .jsonl file, each with its place; InputError for a line that is none."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{place} is not JSON ({error}); mend or remove it.") from None
                yield place, _as_object(place, row)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}); for one object a line use .jsonl."
        ) from None
    if isinstance(rows, Mapping):
        lists = [value for value in rows.values() if isinstance(value, list)]
        of_objects = [value for value in lists if value and isinstance(value[0], Mapping)]
        rows = next(iter(of_objects + lists), None)
    if not isinstance(rows, list):
        raise InputError(f"{path} holds no list of examples; give a JSON list of objects.")
    for number, row in enumerate(rows, start=1):
        place = f"{path} row {number}"
        yield place, _as_object(place, row)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            names = [name for name in reader.fieldnames or () if name]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(
                    f"{path} has two columns {twice!r}; give each column a name of its own."
                )
            for row in reader:
                place = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(
                        f"{place} does not have the {len(reader.fieldnames or ())} fields of the "
                        "header; put text with commas, quotes or line ends in quotes."
                    )
                yield place, row
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num} is not CSV ({error}).") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is not a parquet file ({error}).") from None
    yield from _number(str(path), table.to_pylist())


def _read_saved_dataset(path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a data set folder ({error}); give one written by save_to_disk."
        ) from None
    yield from _number(str(path), _pick_split(str(path), data, split))


def _read_hub(source: str, split: str) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        data = datasets.load_dataset(source)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{source!r} is neither a file, a folder, nor a data set that the hub gives ({reason})."
        ) from None
    yield from _number(source, _pick_split(source, data, split))


def _pick_split(source: str, data: Any, split: str) -> Iterable[Mapping[str, Any]]:
    if not isinstance(data, Mapping):  # one data set, not several splits
        return data
    if split not in data:
        raise InputError(f"{source} has no split {split!r}; it has {', '.join(data)}.")
    return data[split]


def _number(source: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row


def _as_object(place: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(
            f"{place} is not an object with named columns; found {type(row).__name__}."
        )
    return row


def _to_example(
    number: int, place: str, row: Mapping[str, Any], columns: Mapping[str, str]
) -> Example:
    for wanted in columns.values():
        if wanted not in row:
            raise InputError(_no_column(place, repr(wanted), row))
    prompt, response = _prompt_and_response(place, row, columns)
    if not response.strip():
        raise InputError(f"{place} has an empty response; remove it or give it a response.")
    name, task = (
        as_text(place, columns.get(field, field), row.get(columns.get(field, field)))
        for field in ("id", "task")
    )
    meta = dict(row["meta"]) if isinstance(row.get("meta"), Mapping) else {}
    _check_utf8(place, "meta", json.dumps(meta, ensure_ascii=False, default=str))
    return Example(
        id=name or f"row-{number:06d}",
        prompt=prompt,
        response=response,
        task=task or None,
        meta=meta,
    )


def _prompt_and_response(
    place: str, row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[str, str]:
    if not {"prompt", "response"} & set(columns) and row.get("messages"):
        return _last_turns(place, row["messages"])
    for known_prompts, known_response in KNOWN_COLUMNS:
        prompts = (columns["prompt"],) if "prompt" in columns else known_prompts
        response = columns.get("response", known_response)
        if all(name in row for name in (*prompts, response)):
            parts = [as_text(place, name, row[name]) for name in prompts]
            text = as_text(place, response, row[response])
            return "\n".join(part for part in parts if part), text
    raise InputError(_no_column(place, "columns that can be read as prompt and response", row))


def _last_turns(place: str, messages: Any) -> tuple[str, str]:
    """All but the last turn as the prompt, the last one (the assistant's) as the response."""
    try:
        turns = [
            tuple(as_text(place, f"messages.{key}", turn[key]) for key in ("role", "content"))
            for turn in messages
        ]
    except (TypeError, KeyError):
        raise InputError(f"{place} has messages without role and content; give both.") from None
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise InputError(f"{place} has messages that do not end with an assistant's turn.")
    earlier, response = turns[:-1], turns[-1][1]
    if len(earlier) == 1:
        return earlier[0][1], response
    return "\n".join(f"{role}: {content}" for role, content in earlier), response


def as_text(place: str, column: str, value: Any) -> str:
    """A value as text, null and NaN as "".

    Raises InputError for a value of several parts and for text that UTF-8 cannot write.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str | int | float):
        raise InputError(f"{place} has a {type(value).__name__} in column {column!r}; give text.")
    return _check_utf8(place, column, str(value))


def _check_utf8(place: str, column: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} has text that UTF-8 cannot write in column {column!r} ({error}); mend it."
        ) from None
    return text


def _no_column(place: str, wanted: str, row: Mapping[str, Any]) -> str:
    return (
        f"{place} has no {wanted}; its columns are {', '.join(map(str, row))}. "
        "Name them: data.columns.prompt, .response, .id and .task for a run, --columns "
        "prompt=NAME,response=NAME for other commands."
    )
