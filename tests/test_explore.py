"""`airrep explore`: a live server; its answers, its refusals, and text that stays data."""

import _thread
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_models import WORDS, tiny_encoder

from airrep import explore as explore_module
from airrep import report
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError, write_examples
from airrep.explore import build_index, explore, index_explorer
from airrep.explore_server import MOST_BYTES, ExplorerServer, make_server
from airrep.index import EmbeddingIndex

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\x00 é"
POOL = [
    Example(f"pool-{row}", f"what is {word}? {HOSTILE}", word, "words" if row % 2 else None)
    for row, word in enumerate(WORDS)
]
TARGETS = [
    Example("first", f"what is the color of {HOSTILE} " + "long " * 50, "red", "colours"),
    Example("second", "what is the number?", "seven"),
]
PAGE = "<!doctype html><title>the page é</title>"


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    AirRepEncoder.from_base(tiny_encoder(folder / "base")).save_pretrained(folder / "encoder")
    return folder / "encoder"


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> AirRepEncoder:
    return AirRepEncoder.from_pretrained(encoder_folder)


@pytest.fixture(scope="module")
def index(encoder: AirRepEncoder, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingIndex:
    folder = tmp_path_factory.mktemp("index")
    return EmbeddingIndex.build(folder, encoder, POOL, fingerprint="a" * 64)


@pytest.fixture(scope="module")
def server(encoder: AirRepEncoder, index: EmbeddingIndex) -> Iterator[ExplorerServer]:
    with make_server(index_explorer(index, encoder, TARGETS, 4), PAGE, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: ExplorerServer,
    path: str,
    body: bytes | str | None = None,
    method: str | None = None,
    **headers: str,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and content of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    method = method or ("GET" if body is None else "POST")
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def error_of(answer: tuple[int, http.client.HTTPMessage, bytes], status: int) -> str:
    """The sentence of an error, after checking that it came as one."""
    found, headers, content = answer
    assert found == status, content
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    value = json.loads(content)
    assert list(value) == ["error"]
    return value["error"]


def expected_answer(encoder: AirRepEncoder, index: EmbeddingIndex, target: Example) -> Any:
    ranking = index.search(encoder.encode([target]), 4)
    return [
        [(POOL[row].id, pytest.approx(float(score))) for row, score in zip(*ends, strict=True)]
        for ends in (
            (ranking.helpful_rows[0], ranking.helpful_scores[0]),
            (ranking.harmful_rows[0], ranking.harmful_scores[0]),
        )
    ]


def found_in(method: dict[str, Any]) -> Any:
    return [[(row["id"], row["score"]) for row in method[end]] for end in ("helpful", "harmful")]


# Answers


def test_the_page_is_served_with_its_headers(server: ExplorerServer) -> None:
    for path in ("/", "/?target=3"):
        status, headers, content = ask(server, path)
        assert (status, content.decode()) == (200, PAGE)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"


def test_targets_are_listed_with_short_texts(server: ExplorerServer) -> None:
    status, headers, content = ask(server, "/api/targets")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert json.loads(content) == {
        "targets": [
            {
                "row": 0,
                "id": "first",
                "task": "colours",
                "text": TARGETS[0].prompt[:120],
                "loss": None,
            },
            {"row": 1, "id": "second", "task": None, "text": TARGETS[1].prompt, "loss": None},
        ]
    }


@pytest.mark.parametrize("row", [0, 1])
def test_a_target_gets_the_best_of_both_ends(
    server: ExplorerServer, encoder: AirRepEncoder, index: EmbeddingIndex, row: int
) -> None:
    status, _, content = ask(server, f"/api/target/{row}")
    value = json.loads(content)
    assert status == 200
    target = TARGETS[row]
    assert value["target"] == {
        "id": target.id,
        "task": target.task,
        "prompt": target.prompt,
        "response": target.response,
        "loss": None,
    }
    (method,) = value["methods"]
    assert (method["name"], method["label"]) == ("airrep", "AirRep")
    assert found_in(method) == expected_answer(encoder, index, target)


def test_a_typed_target_is_encoded_at_once(
    server: ExplorerServer, encoder: AirRepEncoder, index: EmbeddingIndex
) -> None:
    body = json.dumps({"prompt": "what is a horse?", "response": "silver"})
    status, _, content = ask(server, "/api/score", body)
    value = json.loads(content)
    assert status == 200
    assert value["target"]["prompt"] == "what is a horse?"
    typed = Example("typed", "what is a horse?", "silver")
    assert found_in(value["methods"][0]) == expected_answer(encoder, index, typed)


def test_markup_in_training_text_is_data(server: ExplorerServer) -> None:
    body = json.dumps({"prompt": HOSTILE, "response": HOSTILE})
    status, headers, content = ask(server, "/api/score", body)
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    value = json.loads(content)
    assert value["target"]["prompt"] == HOSTILE
    by_id = {example.id: example.prompt for example in POOL}
    for row in value["methods"][0]["helpful"]:
        assert row["prompt"] == by_id[row["id"]]


def test_long_texts_are_cut_by_the_tokenizer(server: ExplorerServer) -> None:
    body = json.dumps({"prompt": "red " * 8000, "response": "blue " * 5000})
    assert len(body) < MOST_BYTES
    assert ask(server, "/api/score", body)[0] == 200


def test_many_may_ask_at_once(
    server: ExplorerServer, encoder: AirRepEncoder, index: EmbeddingIndex
) -> None:
    def score(word: str) -> Any:
        body = json.dumps({"prompt": "what is", "response": word})
        return found_in(json.loads(ask(server, "/api/score", body)[2])["methods"][0])

    words = WORDS[:12]
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(score, words))
    for word, answer in zip(words, found, strict=True):
        assert answer == expected_answer(encoder, index, Example("typed", "what is", word))


# Refusals


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nothing"), ("GET", "/api/score"), ("GET", "/api/target/x"), ("GET", "/[/")],
)
def test_an_unknown_path_is_not_found(server: ExplorerServer, method: str, path: str) -> None:
    assert error_of(ask(server, path, method=method), 404) == f"There is nothing at {path}."


def test_other_unknown_things_are_not_found(server: ExplorerServer) -> None:
    assert error_of(ask(server, "/", "{}"), 404) == "Nothing is taken at /."
    for row in (2, 999999999):
        message = error_of(ask(server, f"/api/target/{row}"), 404)
        assert message == f"There is no target {row}; there are 2."
    for path in ("/api/target/-1", "/api/target/9999999999", "/api/target/0/../1"):
        assert "There is nothing at" in error_of(ask(server, path), 404)
    assert "Unsupported method" in error_of(ask(server, "/", method="DELETE"), 501)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "not JSON; send an object"),
        ("{'prompt': 1}", "not JSON; send an object"),
        (b"\xff\xfe\xff", "not JSON; send an object"),
        ("[" * 60_000, "not JSON; send an object"),
        ("[]", "exactly the keys"),
        ("{}", "exactly the keys"),
        ('{"prompt": "a"}', "exactly the keys"),
        ('{"prompt": "a", "response": "b", "more": 1}', "exactly the keys"),
        ('{"prompt": 1, "response": "b"}', "The prompt is no text; send a string"),
        ('{"prompt": "a", "response": null}', "The response is no text"),
        ('{"prompt": "a", "response": " \\n"}', "The response is empty; write"),
        ('{"prompt": "\\ud800", "response": "b"}', "The prompt has half a character"),
    ],
)
def test_wrong_input_is_named(server: ExplorerServer, body: bytes | str, message: str) -> None:
    assert message in error_of(ask(server, "/api/score", body), 400)


def test_long_input_is_refused(server: ExplorerServer) -> None:
    message = error_of(ask(server, "/api/score", "x" * (MOST_BYTES + 1)), 413)
    assert message == "The text has 65,537 bytes; at most 65,536 are taken."
    error_of(ask(server, "/api/score", "x" * 1_000_000), 413)


def test_input_of_unknown_length_is_refused(server: ExplorerServer) -> None:
    for length in ("-1", "ten", "٣"):
        raw = f"POST /api/score HTTP/1.1\r\nHost: {own_host(server)}\r\nContent-Length: {length}"
        assert b" 411 " in send_raw(server, raw.encode())
    chunked = f"POST /api/score HTTP/1.1\r\nHost: {own_host(server)}\r\nTransfer-Encoding: chunked"
    assert b'"The request has no Content-Length."' in send_raw(server, chunked.encode())


def test_requests_that_are_none_get_json_too(server: ExplorerServer) -> None:
    for raw in (b"GET", b"GET / HTTP/9.9", b"GET /" + b"x" * 70_000 + b" HTTP/1.1"):
        head, _, content = send_raw(server, raw).partition(b"\r\n\r\n")
        assert b"application/json" in head or not head.startswith(b"HTTP")
        assert list(json.loads(content or head)) == ["error"]


def own_host(server: ExplorerServer) -> str:
    return f"127.0.0.1:{server.server_port}"


def send_raw(server: ExplorerServer, head: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(head + b"\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_only_the_own_host_is_answered(server: ExplorerServer) -> None:
    port = server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(server, "/api/targets", Host=host)[0] == 200
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", "", "localhost"):
        for path, body in (("/", None), ("/api/targets", None), ("/api/score", "{}")):
            message = error_of(ask(server, path, body, Host=host), 403)
            assert message == f"This page answers only at http://127.0.0.1:{port}/."
    assert b" 403 " in send_raw(server, b"GET / HTTP/1.1")


def test_only_the_own_page_may_send_text(server: ExplorerServer) -> None:
    body = json.dumps({"prompt": "a", "response": "red"})
    for host in (own_host(server), f"localhost:{server.server_port}"):
        assert ask(server, "/api/score", body, Origin=f"http://{host}")[0] == 200
    for origin in ("http://evil.example", "null", f"https://{own_host(server)}"):
        error_of(ask(server, "/api/score", body, Origin=origin), 403)


def test_a_browser_that_goes_away_does_no_harm(
    server: ExplorerServer, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close with a reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.sendall(b"POST /api/score HTTP/1.1\r\nHost: ")
    assert ask(server, "/")[0] == 200
    assert capfd.readouterr().err == ""


def test_it_listens_on_this_machine_only(server: ExplorerServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_that_cannot_be_had_is_named(server: ExplorerServer) -> None:
    with pytest.raises(InputError, match=f"Port {server.server_port} is in use; .* --port"):
        make_server(server.explorer, PAGE, server.server_port)
    for port in (-1, 80, 65536):
        with pytest.raises(InputError, match=f"--port {port}; give one from 1024 to 65535"):
            make_server(server.explorer, PAGE, port)


# The commands


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    write_examples(tmp_path / "pool.jsonl", POOL)
    return tmp_path / "pool.jsonl"


def test_build_index_writes_what_explore_opens(
    encoder_folder: Path, pool_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "index"
    build_index(str(encoder_folder), str(pool_file), str(folder), dtype="float16")
    assert f"{folder}: {len(POOL)} embeddings of 32 numbers" in capsys.readouterr().out
    index = EmbeddingIndex.open(folder)
    assert index.examples(range(len(POOL))) == POOL
    assert index.about["examples"]["name"] == str(pool_file)
    assert index.about["encoder"]["name"] == str(encoder_folder)


@pytest.mark.parametrize("kept", [True, False])
def test_explore_serves_until_ctrl_c(
    encoder_folder: Path,
    pool_file: Path,
    tmp_path: Path,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    servers: queue.Queue[ExplorerServer] = queue.Queue()

    def make_and_tell(*arguments: Any) -> ExplorerServer:
        servers.put(make_server(*arguments))
        return servers.queue[0]

    def use_it() -> tuple[bytes, bytes]:
        try:
            while servers.empty():
                time.sleep(0.01)
            return ask(servers.queue[0], "/")[2], ask(servers.queue[0], "/api/target/1")[2]
        finally:
            _thread.interrupt_main()

    monkeypatch.setattr(report, "explorer_page", lambda title: f"page of {title}", raising=False)
    monkeypatch.setattr(explore_module, "make_server", make_and_tell)
    folder = tmp_path / "index"
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(use_it)
        explore(
            str(encoder_folder),
            str(folder) if kept else None,
            examples=str(pool_file),
            targets=str(pool_file),
            top_k=3,
            port=0,
        )
    page, target = answers.result()
    assert page.decode() == f"page of {len(POOL)} training examples"
    assert len(json.loads(target)["methods"][0]["helpful"]) == 3
    assert f"http://127.0.0.1:{servers.queue[0].server_port}/" in capsys.readouterr().out
    assert servers.queue[0].socket.fileno() == -1
    assert (folder / "index.json").exists() == kept


def test_explore_names_what_is_missing_or_wrong(
    encoder_folder: Path, pool_file: Path, index: EmbeddingIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = str(encoder_folder)
    with pytest.raises(InputError, match="top_k = 0; ask for at least one example"):
        explore(encoder, str(index.folder), top_k=0)
    with pytest.raises(InputError, match=r"needs --index \(a folder\) or --examples"):
        explore(encoder)
    with pytest.raises(InputError, match="neither --encoder nor --method"):
        explore(index=str(index.folder))
    with pytest.raises(InputError, match="A method answers without --index"):
        explore(index=str(index.folder), examples=str(pool_file), method="saved")
    with pytest.raises(InputError, match="There is no file .*gone.jsonl"):
        explore(encoder, str(index.folder), targets="./gone.jsonl")
    with pytest.raises(InputError, match="is not an index"):
        explore(encoder, str(pool_file.parent))
    # The index of the fixture says that another encoder made it.
    with pytest.raises(InputError, match=f"encoder is .* {'a' * 12}\\) in the folder, {encoder}"):
        explore(encoder, str(index.folder))
    with pytest.raises(InputError, match="made for something else: .*encoder is"):
        explore(encoder, str(index.folder), str(pool_file))
