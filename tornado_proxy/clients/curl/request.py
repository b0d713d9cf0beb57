"""A request as libcurl is given it."""

from __future__ import annotations

from collections.abc import Callable

from tornado.httpclient import HTTPRequest

from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.errors import Phase, refusal
from tornado_proxy.flow import BodyPipe
from tornado_proxy.headers import lines_of
from tornado_proxy.messages import UpstreamRequest

# Seconds; libcurl takes 0 for "five minutes".
FOREVER = 1_000_000

# Lines of a request's head. libcurl's lists are appended to from their beginning, so that 5,000 lines take 20 ms, in
# which nobody else is served; these take 3.
_MAX_LINES = 2000


class CurlRequest(HTTPRequest):
    """Tornado's request, with what it cannot say: a raw target, a streamed upload, a transfer in progress.

    ``header_callback`` and ``streaming_callback`` are handed to libcurl as they are and called from inside it (rule 2):
    both get ``bytes``, one header line or one piece of body; the latter may return ``WRITEFUNC_PAUSE``.
    """

    def __init__(self, transfer: CurlTransfer, request: UpstreamRequest, origin: str, target: str) -> None:
        # Not super().__init__(), which would set each of its forty attributes, and make headers to throw away. What is
        # not set here is the class's; see below.
        self.url = origin + "/"
        self.method = request.method
        self.headers = request.headers
        wanted = request.connect_timeout
        self.connect_timeout = wanted if wanted and wanted < FOREVER else FOREVER
        self.header_callback = transfer.on_header  # type: ignore[assignment]
        self.streaming_callback = transfer.on_chunk  # type: ignore[assignment]
        self.target = target
        self.header_lines = _header_lines(request)
        self.upload = request.body
        self.fresh = request.fresh_connection
        self.transfer = transfer


for _name, _value in vars(
    HTTPRequest(
        "http://localhost/",
        request_timeout=0,
        follow_redirects=False,
        decompress_response=False,
        allow_nonstandard_methods=True,
    )
).items():
    setattr(CurlRequest, _name, _value)


def _header_lines(request: UpstreamRequest) -> list[bytes]:
    """Return HTTPHEADER: the request's fields as they are, and those that libcurl would invent, suppressed."""
    fields = lines_of(request.headers)
    # "Name;" sends an empty field, "Name:" none at all (CURLOPT_HTTPHEADER).
    lines = [f"{name}: {value}" if value else f"{name};" for name, values in fields.items() for value in values]
    if request.body is not None:
        # A callback-driven upload makes libcurl wait for "100 Continue" unless Expect is suppressed.
        lines.append("Expect: 100-continue" if request.expect_continue else "Expect:")
    if "Accept" not in fields:
        lines.append("Accept:")
    if isinstance(request.body, BodyPipe) and request.body.length is None:
        lines.append("Transfer-Encoding: chunked")
    if len(lines) > _MAX_LINES:
        raise refusal(431, f"request has more than {_MAX_LINES} header lines", phase=Phase.SEND)
    return "\n".join(lines).encode("latin-1").split(b"\n")


def bytes_reader(body: bytes) -> Callable[[int], bytes]:
    """Return a READFUNCTION that gives ``body``."""
    view = memoryview(body)
    position = 0

    def read(limit: int) -> bytes:
        nonlocal position
        chunk = bytes(view[position : position + limit])
        position += len(chunk)
        return chunk

    return read
