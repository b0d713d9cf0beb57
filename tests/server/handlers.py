"""Handlers of Tornado's kind that are served over HTTP/1.1 and over HTTP/2 alike."""

from __future__ import annotations

import asyncio

from tornado import web


class Flushing(web.RequestHandler):
    """Sends its answer, whose length it does not say, in two pieces."""

    async def get(self):
        for word in ("one", "two"):
            self.write(word)
            await self.flush()
            await asyncio.sleep(0)

    async def post(self):
        self.write(self.request.body)


@web.stream_request_body
class Upload(web.RequestHandler):
    """Counts its body as it comes; under /refuse it wants none."""

    async def prepare(self):
        self.size = 0
        await asyncio.sleep(0)
        if self.request.path == "/refuse":
            self.set_status(413)
            self.finish("no")

    async def data_received(self, chunk):
        self.size += len(chunk)
        await asyncio.sleep(0)

    def post(self):
        self.write(str(self.size))
