# Run: python demo/status_callbacks.py http://127.0.0.1:9000, then open http://127.0.0.1:8888/ and stop the upstream
"""Answer some statuses ourselves, and failures too. A callback that does not answer lets the response pass."""

import asyncio
import sys

from tornado.web import Application, RequestHandler

from tornado_proxy import ProxyError, UpstreamResponse, mount


def not_found(handler: RequestHandler, response: UpstreamResponse) -> None:
    handler.set_status(404)
    handler.finish("Our own page: there is no such thing here.\n")


def count(handler: RequestHandler, response: UpstreamResponse) -> None:
    print("the upstream said", response.status)


def sorry(error: ProxyError, handler: RequestHandler) -> None:
    handler.set_status(error.status_code)
    handler.finish("We are sorry, the upstream cannot be reached.\n")


def make_app(upstream: str) -> Application:
    return Application([mount("/", upstream, status_callbacks={404: not_found, "5xx": count}, error_callback=sorry)])


async def main() -> None:
    make_app(sys.argv[1]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
