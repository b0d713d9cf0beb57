# Run: python demo/host_and_port.py http://127.0.0.1:9000, then open http://127.0.0.1:8888/proxy/127.0.0.1:9000/
"""proxy(host, port, path), as in jupyter-server-proxy: handlers for it are subclasses that choose the three."""

import asyncio
import sys
from urllib.parse import urlsplit

from tornado.web import Application, HTTPError, RequestHandler

from tornado_proxy import ProxyMixin


class HostPortProxy(ProxyMixin, RequestHandler):
    def initialize(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed

    async def proxy(self, host: str, port: str, path: str) -> None:
        if f"{host}:{port}" not in self.allowed:
            raise HTTPError(403)  # or users could reach whatever this machine can
        await super().proxy(f"http://{host}:{port}", path=path)

    async def get(self, host: str, port: str, tail: str) -> None:
        # Tornado has decoded the arguments; this is raw.
        await self.proxy(host, port, "/" + self.request.path.split("/", 3)[3])

    post = put = patch = delete = head = options = get  # a websocket is a get


def make_app(*upstreams: str) -> Application:
    allowed = frozenset(urlsplit(url).netloc for url in upstreams)
    return Application([(r"/proxy/([^/:]+):(\d+)/(.*)", HostPortProxy, {"allowed": allowed})])


async def main() -> None:
    make_app(*sys.argv[1:]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
