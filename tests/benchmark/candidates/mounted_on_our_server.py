"""Ours, mounted in a plain Application, behind our own server in place of Tornado's."""

from __future__ import annotations

import asyncio
import sys

from tornado.web import Application

from tornado_proxy import mount
from tornado_proxy.server import HTTPServer


async def main(upstream: str, port: str) -> None:
    app = Application([mount("/", upstream)], log_function=lambda handler: None)
    HTTPServer(app).listen(int(port), "127.0.0.1")
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
