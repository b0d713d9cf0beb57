# Run: python demo/tuple.py http://127.0.0.1:9000/bar, then open http://127.0.0.1:8888/foo/
"""Tornado's own spelling, beside handlers of one's own. The raw bytes that the group matched follow the base path."""

import asyncio
import sys

from tornado.web import Application, RequestHandler

from tornado_proxy import ProxyHandler


class Health(RequestHandler):
    def get(self) -> None:
        self.write("ok")


def make_app(upstream: str) -> Application:
    return Application(
        [
            (r"/health", Health),
            (r"/foo(/.*)?", ProxyHandler, {"upstream": upstream, "response_mode": "buffer"}),
        ]
    )


async def main() -> None:
    make_app(sys.argv[1]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
