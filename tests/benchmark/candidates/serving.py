"""What the programs share: their arguments, the event loop, and the end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from tornado.log import access_log
from tornado.web import Application

from tornado_proxy.server import HTTPServer

Serving = Callable[[argparse.Namespace], AbstractAsyncContextManager[None]]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("port", type=int)
    parser.add_argument("loop", choices=["asyncio", "uvloop"])
    return parser


def run(serving: Serving, args: argparse.Namespace) -> None:
    """Serve until SIGTERM, on the event loop that was asked for."""
    factory: Any = None
    if args.loop == "uvloop":
        import uvloop  # Optional.

        factory = uvloop.new_event_loop

    async def main() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with serving(args):
            await stop.wait()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@asynccontextmanager
async def serving_rules(
    rules: list[Any], port: int, our_server: bool = False, http2: bool = False
) -> AsyncIterator[None]:
    """Serve an application with these rules and without an access log."""
    # By its level: for a log_function each request would have a handler.
    access_log.setLevel(logging.CRITICAL)
    app = Application(rules)
    if our_server:
        HTTPServer(app, http2=http2).listen(port, "127.0.0.1")
    else:
        app.listen(port, "127.0.0.1")
    yield
