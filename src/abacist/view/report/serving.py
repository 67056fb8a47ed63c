"""Shows the report of a running training at an address of this machine, and follows the run.

The page is written anew when something in the run has changed since it was last asked for, and the
browser asks again every half minute; the address in the browser keeps filters and the chosen reply.
It listens on this machine only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from abacist.errors import UsageError, first_line
from abacist.view.report.explorer import REPLIES_IN_PAGE
from abacist.view.report.page import page
from abacist.view.report.reading import read

HOST = "127.0.0.1"
REFRESH_SECONDS = 30


class Report:
    """The page of these runs, kept until one of them changes."""

    def __init__(self, paths: Sequence[Path], replies: int) -> None:
        self._paths, self._replies = paths, replies
        self._lock = Lock()
        self._state: object = None
        self._page = b""

    def current(self) -> bytes:
        """The page as the runs are now. Raises AbacistError where one cannot be read."""
        with self._lock:
            state = [_state(path) for path in self._paths]
            if state != self._state:
                readings = [read(path) for path in self._paths]
                text = page(readings, replies=self._replies)
                self._page, self._state = text.encode("utf-8", "backslashreplace"), state
            return self._page


def server(paths: Sequence[Path], *, port: int, replies: int) -> ThreadingHTTPServer:
    """A server that is bound and not yet serving; port 0 takes a free one.

    Raises UsageError where the port is taken or there is no such port.
    """
    report = Report(paths, replies)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page may ask this address under a name of its own (DNS rebinding).
            host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if host not in ("localhost", HOST):
                self._answer(403, b"Ask for localhost.", "text/plain; charset=utf-8")
            elif self.path.partition("?")[0] != "/":
                self._answer(404, b"There is one page here: /", "text/plain; charset=utf-8")
            else:
                try:
                    body = report.current()
                except Exception as error:  # the browser asks again, and the run goes on
                    text = f"The run cannot be read just now: {first_line(error)}".encode()
                    self._answer(503, text, "text/plain; charset=utf-8")
                    return
                self._answer(200, body, "text/html; charset=utf-8")

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            with suppress(ConnectionError):  # a tab that was closed meanwhile
                self._send(status, body, kind)

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Refresh", str(REFRESH_SECONDS))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal shows one line, the address."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"port {port} cannot be used ({first_line(error)})",
            "Take another: --port 8500.",
        ) from error


def serve(paths: Sequence[Path], *, port: int, replies: int = REPLIES_IN_PAGE) -> int:
    """Show the report until Ctrl-C; returns 0. Raises RunError for a folder that holds no run."""
    for path in paths:
        read(path)  # refused now, and not in the browser
    with server(paths, port=port, replies=replies) as web:
        address = f"http://localhost:{web.server_port}/"
        print(f"The report is at {address} and follows the run; Ctrl-C ends.", flush=True)
        try:
            web.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _state(path: Path) -> list[tuple[str, int, int]]:
    """What changes when a run goes on: names, sizes and times of the files that are read."""
    kept = ("*.json*", "rollouts/*.parquet", "evals/*/*.json", "checkpoint-*/trainer_state.json")
    parts = [part for pattern in kept for part in path.glob(pattern)]
    found = []
    for part in sorted(parts):
        try:
            told = part.stat()
        except OSError:  # replaced just now
            continue
        found.append((part.as_posix(), told.st_size, told.st_mtime_ns))
    return found
