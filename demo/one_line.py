# Run: python demo/one_line.py http://127.0.0.1:9000/bar, then open http://127.0.0.1:8888/foo/
"""A literal prefix: /foo/a%2Fb?x=1 goes to the upstream's base path + /a%2Fb?x=1; /foobar is not ours."""

import asyncio
import sys

from tornado.web import Application

from tornado_proxy import mount


def make_app(upstream: str) -> Application:
    return Application([mount("/foo", upstream)])


async def main() -> None:
    make_app(sys.argv[1]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
