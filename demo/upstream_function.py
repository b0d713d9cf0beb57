# Run: python demo/upstream_function.py http://127.0.0.1:9001 http://127.0.0.1:9002, then open http://127.0.0.1:8888/t/
"""The upstream is decided for each request: every tenant has a shard of its own, named by a cookie."""

import asyncio
import sys
import zlib

from tornado.web import Application, RequestHandler

from tornado_proxy import mount


def make_app(*shards: str) -> Application:
    def shard_for(handler: RequestHandler) -> str:
        tenant = handler.get_cookie("tenant") or ""
        return shards[zlib.crc32(tenant.encode()) % len(shards)]

    return Application([mount("/t", shard_for)])


async def main() -> None:
    make_app(*sys.argv[1:]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
