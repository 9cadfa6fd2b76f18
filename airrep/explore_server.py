"""The web server of `airrep explore`: one page and its JSON, to this machine only."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from airrep.examples import Example, InputError

if TYPE_CHECKING:
    from airrep.explore import Explorer

HOST = "127.0.0.1"
MOST_BYTES = 64 * 1024  # of a request's body
SECONDS = 30  # after which a silent connection is closed
_TARGET = re.compile(r"/api/target/([0-9]{1,9})")


class ExplorerServer(ThreadingHTTPServer):
    """An HTTP server on this machine that holds what its handlers need."""

    def __init__(self, port: int, explorer: Explorer, page: str) -> None:
        self.explorer = explorer
        self.page = page
        super().__init__((HOST, port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing when a browser went away, and what went wrong otherwise."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(explorer: Explorer, page: str, port: int) -> ExplorerServer:
    """The server, ready for serve_forever; port 0 takes any free one.

    Raises InputError when the port is in use or none that may be used.
    """
    if port != 0 and not 1024 <= port <= 65535:
        raise InputError(f"explore got --port {port}; give one from 1024 to 65535.")
    try:
        return ExplorerServer(port, explorer, page)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise InputError(f"Port {port} is in use; give another with --port.") from None


class _Refused(Exception):
    """A request that gets a sentence with this status in place of an answer."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """One request; every answer but the page is JSON, errors too."""

    server: ExplorerServer
    timeout = SECONDS

    def do_GET(self) -> None:
        self._reply(self._get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Sends {"error": one sentence}; the library calls this too."""
        status = HTTPStatus(code)
        self._send(status, {"error": message or status.phrase})

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the terminal quiet."""

    def _reply(self, answer: Callable[[], Any]) -> None:
        try:
            self._check_origin()
            value = answer()
        except _Refused as refused:
            self.send_error(refused.status, str(refused))
        except InputError as error:
            self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        else:
            self._send(HTTPStatus.OK, value)

    def _get(self) -> Any:
        explorer, path = self.server.explorer, self.path.partition("?")[0]
        target = _TARGET.fullmatch(path)
        if path == "/":
            return self.server.page
        if path == "/api/targets":
            return explorer.list_targets()
        if target is None:
            raise _Refused(HTTPStatus.NOT_FOUND, f"There is nothing at {path}.")
        row, count = int(target[1]), len(explorer.targets)
        if row >= count:
            raise _Refused(HTTPStatus.NOT_FOUND, f"There is no target {row}; there are {count}.")
        return explorer.answer(explorer.targets[row])

    def _post(self) -> Any:
        body = self._read_body()
        if self.path.partition("?")[0] != "/api/score":
            raise _Refused(HTTPStatus.NOT_FOUND, f"Nothing is taken at {self.path}.")
        return self.server.explorer.answer(_read_target(body))

    def _check_origin(self) -> None:
        """Refuses what a foreign page sent here, under its own name or another for this machine."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        sent_here = self.headers.get("Host") in hosts
        if not sent_here or (origin is not None and origin.removeprefix("http://") not in hosts):
            address = f"http://{HOST}:{self.server.server_port}/"
            raise _Refused(HTTPStatus.FORBIDDEN, f"This page answers only at {address}.")

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if re.fullmatch("[0-9]{1,18}", length) is None:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "The request has no Content-Length.")
        if int(length) > MOST_BYTES:
            # A browser reads the answer only after it has sent its body.
            self.rfile.read(min(int(length), 16 * MOST_BYTES))
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The text has {int(length):,} bytes; at most {MOST_BYTES:,} are taken.",
            )
        return self.rfile.read(int(length))

    def _send(self, status: HTTPStatus, value: Any) -> None:
        """Sends a page (str), or anything else as JSON."""
        page = isinstance(value, str)
        content = (value if page else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", f"{'text/html' if page else 'application/json'}; charset=utf-8"
        )
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)


def _read_target(body: bytes) -> Example:
    """The target of a request; raises InputError for anything but a prompt and a response."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError(
            "The request is not JSON; send an object of prompt and response."
        ) from None
    if not isinstance(value, dict) or set(value) != {"prompt", "response"}:
        raise InputError('The request needs exactly the keys "prompt" and "response".')
    for key, text in value.items():
        if not isinstance(text, str):
            raise InputError(f"The {key} is no text; send a string.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"The {key} has half a character; send whole Unicode.") from None
    if not value["response"].strip():
        raise InputError("The response is empty; write the answer to look for.")
    return Example("typed", value["prompt"], value["response"])
