"""``python -m tornado_proxy.demo``: the embedded upstream alone, to compare with and without the proxy."""

import asyncio
import contextlib
import os

from tornado_proxy.demo.upstream import serve


async def main() -> None:
    """Serve until interrupted."""
    _, port = serve(proxy_pid=os.getpid())
    print(f"open http://127.0.0.1:{port}/ in a browser", flush=True)  # noqa: T201  # this is its output
    await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
