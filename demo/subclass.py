# Run: python demo/subclass.py http://127.0.0.1:9000, then curl -H "Authorization: Bearer letmein" 127.0.0.1:8888/api/
"""Authenticate before anything goes upstream, and tell the upstream who it is."""

import asyncio
import sys

from tornado.web import Application, HTTPError

from tornado_proxy import ProxyHandler, UpstreamRequest, mount

USERS = {"Bearer letmein": "alice"}


class ApiProxy(ProxyHandler):
    async def prepare(self) -> None:
        self.user = USERS.get(self.request.headers.get("Authorization", ""))
        if self.user is None:
            raise HTTPError(401)
        await super().prepare()

    def rewrite_request(self, request: UpstreamRequest) -> None:
        # A name that the client chose itself must not survive; assigning replaces it.
        request.headers["X-User"] = self.user
        del request.headers["Authorization"]


def make_app(upstream: str) -> Application:
    return Application([mount("/api", upstream, ApiProxy)])


async def main() -> None:
    make_app(sys.argv[1]).listen(8888, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
