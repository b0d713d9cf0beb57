"""The demo's upstream: a plain Tornado application that knows nothing of the proxy in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from http.client import responses
from pathlib import Path

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler, StaticFileHandler, stream_request_body
from tornado.websocket import WebSocketClosedError, WebSocketHandler

CHUNK = os.urandom(64 * 1024)
MAX_TRANSFER = 1 << 34
MAX_EVENTS_PER_SECOND = 100.0


class Traffic:
    """Body bytes that this upstream has sent and received since it started; the page compares them with its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.sent = 0
        self.received = 0


class DemoHandler(RequestHandler):
    """What the handlers share: the counters, and knowing when the other side has left."""

    def initialize(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.gone = asyncio.Event()

    def on_connection_close(self) -> None:
        self.gone.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, or wake at once when the other side leaves."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.gone.wait(), seconds)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return the query argument ``name``, which must lie in ``low..high``; answers 400 otherwise."""
        try:
            value = float(self.get_query_argument(name, str(default)))
        except ValueError:
            raise HTTPError(400, reason=f"{name} is not a number") from None
        if not low <= value <= high:
            raise HTTPError(400, reason=f"{name} must be from {low:g} to {high:g}")
        return value


class Events(DemoHandler):
    """Server-sent events, ``rate`` a second; each carries the moment it was sent, in seconds since the epoch."""

    async def get(self) -> None:
        interval = 1 / self.number("rate", 2, 0.1, MAX_EVENTS_PER_SECOND)
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-store")
        count = 0
        with contextlib.suppress(StreamClosedError):
            while not self.gone.is_set():
                count += 1
                self.write(f"id: {count}\ndata: {json.dumps({'number': count, 'sent': time.time()})}\n\n")
                await self.flush()
                await self.sleep(interval)


class Download(DemoHandler):
    """``bytes`` bytes, produced only as fast as they are taken."""

    async def get(self) -> None:
        left = int(self.number("bytes", 1 << 20, 0, MAX_TRANSFER))
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Length", str(left))
        with contextlib.suppress(StreamClosedError):
            while left:
                chunk = CHUNK[:left]
                self.write(chunk)
                await self.flush()
                self.traffic.sent += len(chunk)
                left -= len(chunk)


@stream_request_body
class Upload(DemoHandler):
    """Counts the bytes of a body of any size and forgets them."""

    def prepare(self) -> None:
        assert self.request.connection is not None
        self.request.connection.set_max_body_size(MAX_TRANSFER)  # type: ignore[attr-defined]  # HTTP1Connection has it
        self.bytes = 0

    def data_received(self, chunk: bytes) -> None:
        self.bytes += len(chunk)
        self.traffic.received += len(chunk)

    def post(self) -> None:
        self.write({"bytes": self.bytes, "seconds": round(self.request.request_time(), 3)})


class Memory(DemoHandler):
    """Resident memory of the proxy's process and the traffic so far; ``rss`` is null where there is no /proc."""

    def get(self) -> None:
        self.set_header("Cache-Control", "no-store")
        traffic = self.traffic
        self.write(
            {"pid": traffic.pid, "rss": resident(traffic.pid), "sent": traffic.sent, "received": traffic.received}
        )


def resident(pid: int) -> int | None:
    """Return the bytes of memory that a process holds, or ``None`` where the system does not say."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Status(DemoHandler):
    """The status in the path, with a reason, a header and a body of our own."""

    def get(self, code: str) -> None:
        status = int(code)
        self.set_status(status, responses.get(status, "Unknown"))
        self.set_header("X-Said-By", "the embedded upstream")
        if status not in (204, 304):
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.write(f"{status}, said by the upstream itself; the proxy passes it on as it came.\n")


class Echo(DemoHandler):
    """The request as this upstream saw it."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        request = self.request
        lines = [f"{request.method} {request.uri} {request.version}"]
        lines += [f"{name}: {value}" for name, value in request.headers.get_all()]
        self.write("\n".join(lines) + "\n")


class EchoSocket(WebSocketHandler):
    """Sends each message back as it came."""

    def initialize(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def check_origin(self, origin: str) -> bool:
        # The page came from where the proxy is; Host names this upstream.
        return origin.partition("://")[2] == self.request.headers.get("X-Forwarded-Host")

    async def on_message(self, message: str | bytes) -> None:
        size = len(message)
        self.traffic.received += size
        # Waiting here holds the sender back.
        with contextlib.suppress(WebSocketClosedError):
            await self.write_message(message, binary=isinstance(message, bytes))
            self.traffic.sent += size


class Hang(DemoHandler):
    """Takes the request and never answers."""

    async def get(self) -> None:
        await self.gone.wait()


class Truncated(DemoHandler):
    """Promises 1000 bytes, sends 400 and hangs up. Tornado would not let a handler do so; the bare stream does."""

    async def get(self) -> None:
        stream = self.detach()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\n"
        with contextlib.suppress(StreamClosedError):
            await stream.write(head + b"forty bytes of text, and then the end.\r\n" * 10)
            # Browsers drop what they have not handed out yet when the error comes with it.
            await self.sleep(0.2)
        stream.close()


class Page(StaticFileHandler):
    """The demo page; always asked for again, so that an edited file shows."""

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Cache-Control", "no-cache")
        self.set_header(
            "Content-Security-Policy", "default-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:"
        )


def make_app(proxy_pid: int) -> Application:
    """Return the upstream's application; ``/memory`` speaks of the process ``proxy_pid``."""
    shared = {"traffic": Traffic(proxy_pid)}
    page = {"path": str(Path(__file__).parent / "page"), "default_filename": "index.html"}
    return Application(
        [
            (r"/events", Events, shared),
            (r"/download", Download, shared),
            (r"/upload", Upload, shared),
            (r"/memory", Memory, shared),
            (r"/status/([2-5]\d\d)", Status, shared),
            (r"/echo", Echo, shared),
            (r"/websocket", EchoSocket, shared),
            (r"/hang.*", Hang, shared),
            (r"/truncated", Truncated, shared),
            (r"/(|app\.js|style\.css)", Page, page),
        ],
        # The proxy's access log already has a line for each of these.
        log_function=lambda handler: None,
    )


def serve(*, proxy_pid: int) -> tuple[HTTPServer, int]:
    """Serve the upstream on the running loop; returns the server, which the caller stops, and its port."""
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(make_app(proxy_pid))
    server.add_sockets(sockets)
    return server, sockets[0].getsockname()[1]
