"""Ours, as most users run it: mounted in a plain Application. A third argument is where a profile is written."""

from __future__ import annotations

import asyncio
import cProfile
import signal
import sys

from tornado.web import Application

from tornado_proxy import mount


async def main(upstream: str, port: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app = Application([mount("/", upstream)], log_function=lambda handler: None)
    app.listen(int(port), "127.0.0.1")
    print("listening", flush=True)
    await stop.wait()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        with cProfile.Profile() as profile:
            asyncio.run(main(*sys.argv[1:3]))
        profile.dump_stats(sys.argv[3])
    else:
        asyncio.run(main(*sys.argv[1:3]))
