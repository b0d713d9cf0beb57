# Run: python demo/banner.py http://127.0.0.1:9000, then open http://127.0.0.1:8888/
"""A banner on top of every HTML page, also one that comes compressed (for br: pip install brotli). It still streams."""

import asyncio
import re
import sys

from tornado.web import Application

from tornado_proxy import ProxyHandler, UpstreamResponse, mount


class BannerProxy(ProxyHandler):
    before, done = b"", False  # the end of what has passed, in which the tag may have begun

    def rewrite_response(self, response: UpstreamResponse) -> None:
        response.filtered = response.headers.get("Content-Type", "").startswith("text/html")
        if response.filtered:
            response.decode()

    def filter_response_body(self, chunk: bytes) -> bytes:
        match = None if self.done else re.search(rb"(?i)<body\b[^>]*>", self.before + chunk)
        if match is None:
            self.before = (self.before + chunk)[-1000:]
            return chunk
        end, self.done = match.end() - len(self.before), True
        return chunk[:end] + b"<p>You see this page through a proxy.</p>" + chunk[end:]


def make_app(upstream: str) -> Application:
    return Application([mount("/", upstream, BannerProxy)])


async def main() -> None:
    make_app(sys.argv[1]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
