# Run: python demo/events.py http://127.0.0.1:9000, then curl -N http://127.0.0.1:8888/events
"""Edit single events of a text/event-stream. Each goes on the moment it is complete; the stream may have no end."""

import asyncio
import re
import sys

from tornado.web import Application

from tornado_proxy import ProxyHandler, UpstreamResponse, mount

EVENT = re.compile(rb"(?s:.*?)(?>\r\n|\n|\r){2}")  # with the blank line behind it


class EventsProxy(ProxyHandler):
    rest = b""  # of an event that is not complete yet; a browser drops it too where the stream ends there

    def rewrite_response(self, response: UpstreamResponse) -> None:
        response.filtered = response.headers.get("Content-Type", "").startswith("text/event-stream")
        if response.filtered:
            response.decode()

    def filter_response_body(self, chunk: bytes) -> bytes:
        data = self.rest + chunk
        events = EVENT.findall(data)
        self.rest = data[sum(map(len, events)) :]
        return b"".join(event.replace(b"secret", b"******") for event in events)


def make_app(upstream: str) -> Application:
    return Application([mount("/", upstream, EventsProxy)])


async def main() -> None:
    make_app(sys.argv[1]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
