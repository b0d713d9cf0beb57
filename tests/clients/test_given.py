"""Libraries' clients that the user configured: the contract holds with them too, and what is theirs takes part."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

pytest.importorskip("httpx")
pytest.importorskip("aiohttp")

import aiohttp
import httpx

from tests.clients.contract import Aborting, Bodies, Heads
from tests.clients.support import request_for
from tests.clients.wire_contract import Errors, Wire
from tests.support.wire import within
from tornado_proxy.clients.aiohttp import AiohttpClient
from tornado_proxy.clients.httpx import HttpxClient


class TestHttpx(Heads, Bodies, Aborting, Errors, Wire):
    """A client with defaults of its own, none of which may be seen, apart from its auth."""

    given: ClassVar[list[httpx.AsyncClient]] = []

    @classmethod
    def make(cls, **options):
        if options:
            return HttpxClient(**options)
        cls.given.append(httpx.AsyncClient(headers={"X-Default": "1"}, cookies={"a": "b"}, trust_env=False))
        return HttpxClient(cls.given[-1])

    async def dispose(self):
        while self.given:
            await self.given.pop().aclose()


class TestAiohttp(Heads, Bodies, Aborting, Errors, Wire):
    """A session with defaults of its own."""

    @classmethod
    def make(cls, **options):
        if options:
            return AiohttpClient(**options)
        return AiohttpClient(lambda: aiohttp.ClientSession(headers={"X-Default": "1"}, cookies={"a": "b"}))


class TestWhatIsTheirs:
    async def authorization(self, client, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, request = await upstream.request()
        await conn.respond(200)
        await (await within(sending, "the response")).read()
        client.close()
        await client.wait_closed()
        return request.header("Authorization")

    async def test_auth_of_httpx(self, upstream):
        async with httpx.AsyncClient(auth=("me", "secret")) as given:
            assert await self.authorization(HttpxClient(given), upstream) == "Basic bWU6c2VjcmV0"
            # It is its maker's to close.
            assert not given.is_closed

    async def test_auth_of_aiohttp(self, upstream):
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer x"}) as given:
            assert await self.authorization(AiohttpClient(given), upstream) == "Bearer x"
            assert not given.closed

    @pytest.mark.parametrize("client", [HttpxClient, AiohttpClient])
    async def test_options_are_for_what_we_make(self, client):
        given = httpx.AsyncClient() if client is HttpxClient else aiohttp.ClientSession
        with pytest.raises(ValueError, match="configure the one that is given yourself"):
            client(given, max_clients=1)
