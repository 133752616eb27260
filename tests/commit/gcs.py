"""A small server with the calls of Google's JSON API that TensorStore makes: list, read by ranges, write, remove.

Source: https://cloud.google.com/storage/docs/json_api/v1/objects (names, preconditions on generations, status codes).
"""

import json
import os
import signal
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket-1"
NO_BUCKET = b'{"error": {"message": "The specified bucket does not exist."}}'


class Server(ThreadingHTTPServer):
    """It holds one bucket: object -> bytes and generation."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Calls)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generation = 0
        self.written = 0
        self.kill: tuple[int, int] | None = None
        """A process that ends as soon as so many objects more were written: its number, and how many."""


class _Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    """Bytes: an answer is one write, and nobody waits 40 ms for the rest of it."""
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # the process that asked was killed
            super().handle()

    def do_GET(self) -> None:
        key, query = self._asked()
        held = self.server.objects
        if key == "":
            first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            names = sorted(name for name in held if first <= name < last and name.startswith(query.get("prefix", "")))
            self._json({"items": [self._about(name) for name in names]})
        elif key is not None and key not in held:
            self._say(404, b"")
        elif key is not None:
            data, generation = held[key]
            about = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(data))}
            if query.get("ifGenerationNotMatch") == str(generation):
                self._say(304, b"", about)
            elif "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                begin = int(first) if first else max(0, len(data) - int(last))
                end = min(int(last) + 1 if first and last else len(data), len(data))
                about["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
                self._say(206 if begin < len(data) else 416, data[begin:end], about)
            else:
                self._say(200, data, about)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key, query = self._asked()
        if key is None:
            return
        name = query["name"]
        there = self.server.objects.get(name, (b"", 0))[1]
        if query.get("ifGenerationMatch", str(there)) != str(there):
            self._say(412, b"")
            return
        self.server.generation += 1
        self.server.objects[name] = data, self.server.generation
        self.server.written += 1
        if self.server.kill and self.server.written == self.server.kill[1]:
            os.kill(self.server.kill[0], signal.SIGKILL)
        self._json(self._about(name))

    def do_DELETE(self) -> None:
        key, _ = self._asked()
        if key is not None:
            self._say(204 if self.server.objects.pop(key, None) else 404, b"")

    def _asked(self) -> tuple[str | None, dict[str, str]]:
        """Which object of the bucket it is about, and the query; None where another bucket was meant, which was answered."""
        url = urlsplit(self.path)
        bucket, _, key = url.path.partition("/b/")[2].partition("/o")
        if bucket != BUCKET:
            self._say(404, NO_BUCKET)
            return None, {}
        return unquote(key.removeprefix("/")), dict(parse_qsl(url.query, keep_blank_values=True))

    def _about(self, name: str) -> dict[str, str]:
        data, generation = self.server.objects[name]
        return {"name": name, "bucket": BUCKET, "size": str(len(data)), "generation": str(generation)}

    def _json(self, found: object) -> None:
        self._say(200, json.dumps(found).encode())

    def _say(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
