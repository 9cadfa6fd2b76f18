"""Reading examples: every format, every way of naming columns, every error by its message."""

import json
from pathlib import Path

import pytest

from airrep.examples import Example, InputError, write_examples
from airrep.reading import read_examples

ROWS = [
    {"id": "a", "prompt": "One plus one?", "response": "Two", "task": "sums"},
    {"id": "b", "prompt": 'Say "hi, you"', "response": "hi,\nyou é", "task": "echo"},
]
EXPECTED = [Example(**row) for row in ROWS]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_file(kind: str, folder: Path) -> Path:
    """`ROWS` written by other libraries than the reader's."""
    import datasets
    import pandas

    path = folder / f"rows.{kind}"
    frame = pandas.DataFrame(ROWS)
    if kind == "jsonl":
        return write_lines(path, *ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "folder":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif kind == "splits":
        data = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "splits"])
def test_every_format_gives_the_same_examples(kind: str, tmp_path: Path) -> None:
    assert read_examples(make_file(kind, tmp_path)) == EXPECTED


def test_split_is_chosen_and_a_missing_one_named(tmp_path: Path) -> None:
    path = make_file("splits", tmp_path)
    assert [example.id for example in read_examples(path, split="test")] == ["b"]
    with pytest.raises(InputError, match="no split 'dev'; it has train, test"):
        read_examples(path, split="dev")


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "p", "completion": "r"}, "p", "r"),
        ({"instruction": "do", "input": "this", "output": "r"}, "do\nthis", "r"),
        ({"instruction": "do", "input": "", "output": "r"}, "do", "r"),
        ({"instruction": "do", "output": "r"}, "do", "r"),
        ({"instruction": "do", "response": "r"}, "do", "r"),
        ({"input": "p", "output": "r"}, "p", "r"),
        ({"question": "p", "answer": 7}, "p", "7"),
    ],
)
def test_usual_columns_are_recognised(
    row: dict[str, object], prompt: str, response: str, tmp_path: Path
) -> None:
    [example] = read_examples(write_lines(tmp_path / "x.jsonl", row))
    assert example == Example("row-000000", prompt, response)


def test_chat_messages(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}
    system = {"role": "system", "content": "be brief"}
    path = write_lines(
        tmp_path / "x.jsonl", {"messages": [user, answer]}, {"messages": [system, user, answer]}
    )
    one, two = read_examples(path)
    assert (one.prompt, one.response) == ("p", "r")
    assert (two.prompt, two.response) == ("system: be brief\nuser: p", "r")


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"q": "p", "a": "r", "key": 5, "kind": "t"})
    columns = {"prompt": "q", "response": "a", "id": "key", "task": "kind"}
    assert read_examples(path, columns) == [Example("5", "p", "r", "t")]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    examples = [
        Example("ä", "line\nend", " spaces ", "t", {"families": ["x"], "n": 1}),
        Example("b", "", "\u2028 separator"),
    ]
    write_examples(tmp_path / "new" / "x.jsonl", examples)
    assert read_examples(tmp_path / "new" / "x.jsonl") == examples


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert read_examples(path) == EXPECTED[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"prompt": "p", "response": "r"}\n{"prompt"\n',
            r"x\.jsonl line 2 is not JSON",
        ),
        ("x.jsonl", "[1]\n", r"x\.jsonl line 1 is not an object .* found list"),
        ("x.jsonl", "\n\n", r"x\.jsonl holds no examples"),
        ("x.json", "{", r"x\.json is not JSON .* use \.jsonl"),
        ("x.json", '{"a": 1}', r"x\.json holds no list of examples"),
        ("x.csv", "prompt,response\np,r,s\n", r"x\.csv line 2 does not have the 2 fields"),
        ("x.csv", "prompt,response\np\n", r"x\.csv line 2 does not have the 2 fields"),
        ("x.parquet", "no", r"x\.parquet is not a parquet file"),
        ("x.txt", "p", r"x\.txt ends in '\.txt'; examples are read from \.jsonl"),
        ("x.jsonl", '{"text": "t", "n": 1}\n', r"line 1 has no columns that .* are text, n\."),
        ("x.jsonl", '{"prompt": "p", "response": " "}\n', r"line 1 has an empty response"),
        ("x.jsonl", '{"prompt": "p", "response": null}\n', r"line 1 has an empty response"),
        ("x.jsonl", '{"prompt": ["p"], "response": "r"}\n', r"a list in column 'prompt'"),
        ("x.jsonl", '{"prompt": "\\ud800", "response": "r"}\n', r"UTF-8 cannot write in column"),
        ("x.jsonl", '{"prompt": "p", "response": NaN}\n', r"line 1 has an empty response"),
        ("x.jsonl", '{"id": [1], "prompt": "p", "response": "r"}\n', r"a list in column 'id'"),
        *(
            ("x.jsonl", row + "\n", rf"line 1 has text that UTF-8 cannot write in column '{name}'")
            for name, row in {
                "id": '{"id": "\\ud800", "prompt": "p", "response": "r"}',
                "task": '{"task": "\\ud800", "prompt": "p", "response": "r"}',
                "meta": '{"meta": {"k": ["\\ud800"]}, "prompt": "p", "response": "r"}',
                "messages.content": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            }.items()
        ),
        ("x.jsonl", "[" * 200_000, r"x\.jsonl line 1 is not JSON"),
        ("x.json", "[" * 200_000, r"x\.json is not JSON"),
        ("x.json", '{"tags": [], "data": []}', r"x\.json holds no examples"),
        ("x.csv", "prompt,prompt,response\nno,p,r\n", r"x\.csv has two columns 'prompt'"),
        ("x.jsonl", '{"messages": [{"role": "user"}]}\n', r"messages without role and content"),
        *(
            (
                "x.jsonl",
                '{"messages": [{"role": "user", "content": "p"}, '
                f'{{"role": "assistant", "content": {content}}}]}}\n',
                message,
            )
            for content, message in {
                "null": r"line 1 has an empty response",
                '[{"text": "r"}]': r"line 1 has a list in column 'messages\.content'",
                '{"text": "r"}': r"line 1 has a dict in column 'messages\.content'",
            }.items()
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "p"}]}\n',
            r"messages that do not end with an assistant's turn",
        ),
        (
            "x.jsonl",
            '{"id": 1, "prompt": "p", "response": "r"}\n' * 2,
            r"line 2: the id '1' was used before, at .*x\.jsonl line 1",
        ),
    ],
)
def test_wrong_content_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_examples(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for source in (tmp_path / "no.jsonl", tmp_path / "folder", "./no", "~/no-such-file.csv"):
        with pytest.raises(InputError, match="There is no file .*; check the path"):
            read_examples(source)


@pytest.mark.parametrize("source", ["", " ", Path("~nobody-of-this-name/x.jsonl")])
def test_a_name_that_leads_nowhere_is_refused(source: str | Path) -> None:
    with pytest.raises(InputError, match=r"is empty; give a file|cannot be found .* whole path"):
        read_examples(source)


def test_nan_is_no_text(tmp_path: Path) -> None:
    import pandas

    rows = {"prompt": ["p", "p"], "response": [1.5, float("nan")], "task": [float("nan"), 1.0]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="row 2 has an empty response"):
        read_examples(tmp_path / "x.parquet")
    path = write_lines(tmp_path / "x.jsonl", {k: v[0] for k, v in rows.items()} | {"id": None})
    assert read_examples(path) == [Example("row-000000", "p", "1.5")]


def test_a_null_turn_before_the_last_is_empty(tmp_path: Path) -> None:
    turns = [("user", "p"), ("assistant", None), ("assistant", "r")]
    messages = [{"role": role, "content": content} for role, content in turns]
    [example] = read_examples(write_lines(tmp_path / "x.jsonl", {"messages": messages}))
    assert example.prompt == "user: p\nassistant: "


def test_a_json_object_is_searched_for_a_list_of_examples(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": "1", "tags": [], "sizes": [1], "data": ROWS}))
    assert read_examples(path) == EXPECTED


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,response,,\np,{'r' * 200_000},,\n")
    assert len(read_examples(path)[0].response) == 200_000


def test_a_folder_without_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a data set folder .* save_to_disk"):
        read_examples(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(source: str) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"'some/name' is neither a file.*\(no network\)"):
        read_examples("some/name")


def test_a_hub_id_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda source: data)
    assert read_examples("some/name") == EXPECTED


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("prompt,response\né,r\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_examples(path)


def test_a_mapped_column_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ROWS[0])
    with pytest.raises(InputError, match=r"no 'q'; its columns are id, prompt, response, task\."):
        read_examples(path, {"prompt": "q"})


def test_an_unknown_key_of_columns_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ROWS[0])
    with pytest.raises(InputError, match="columns names 'text'; it maps only prompt, response"):
        read_examples(path, {"text": "q"})
