"""The report of a folder over HTTP on this machine alone, made anew as its runs go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import unquote, urlsplit

from fedbench.errors import FedbenchError
from fedbench.records.store import load_all
from fedbench.report.libraries import Libraries, libraries
from fedbench.report.live import live_runs
from fedbench.report.page import page

HOST = "127.0.0.1"


class Report:
    """The page of a results folder, kept until something in the folder changes."""

    def __init__(self, results: Path, sources: Libraries | None = None) -> None:
        """Raises FedbenchError where the packages of the page's JavaScript are not installed."""
        self.results = results
        self._sources = sources or libraries()
        self._lock = Lock()
        self._made: tuple[str, str] | None = None

    def state(self) -> str:
        """A hash of which records and checkpoints there are, of their sizes and times."""
        digest = hashlib.sha256()
        for path in sorted(self._files()):
            try:
                about = path.stat()
            except FileNotFoundError:
                continue  # a checkpoint whose run has just ended
            digest.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def page(self) -> str:
        """The page as of now. Raises FedbenchError for a record that cannot be read."""
        with self._lock:
            state = self.state()
            if self._made is None or self._made[0] != state:
                records = load_all(self.results / "records")
                live = live_runs(self.results)
                self._made = state, page(records, self.results, live, served=True, sources=self._sources)
            return self._made[1]

    def record(self, name: str) -> bytes | None:
        """A record's file by its path below the results folder; None for any other file."""
        path = self.results / name
        return path.read_bytes() if path in set((self.results / "records").glob("*/*/s*.json")) else None

    def _files(self) -> Iterator[Path]:
        yield from (self.results / "records").rglob("*.json")
        yield from (self.results / "checkpoints").glob("*/checkpoint.json")


def server(report: Report, port: int) -> ThreadingHTTPServer:
    """A server of `report` on the loopback interface; port 0 takes any that is free.

    Raises FedbenchError where the port is taken. Answers requests for this machine's own names only, so that no page
    of another site can read the results through the browser.
    """

    class Handler(BaseHTTPRequestHandler):
        server: ThreadingHTTPServer
        server_version, sys_version = "fedbench", ""

        def do_GET(self) -> None:
            own = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
            if self.headers.get("Host") not in own:
                return self.answer(HTTPStatus.FORBIDDEN, "text/plain", b"ask for 127.0.0.1")
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if path == "":
                try:
                    return self.answer(HTTPStatus.OK, "text/html", report.page().encode())
                except FedbenchError as error:
                    return self.answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/html", _sorry(str(error)))
            if path == "state":
                return self.answer(HTTPStatus.OK, "text/plain", report.state().encode())
            if (record := report.record(path)) is not None:
                return self.answer(HTTPStatus.OK, "application/json", record)
            return self.answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page")

        def answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise FedbenchError(f"--port {port}: cannot be listened on: {error.strerror}; name another") from None


def _sorry(message: str) -> bytes:
    """What is shown in place of a page that cannot be made; asks again by itself."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
        f"<title>fedbench</title><h1>The report cannot be made</h1><p>{escape(message)}</p></html>"
    ).encode()
