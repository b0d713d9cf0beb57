"""The contract, kept by AiohttpClient."""

import pytest

from tests.clients.wire_contract import Contract

pytest.importorskip("aiohttp")

from tornado_proxy.clients.aiohttp import AiohttpClient


class TestAiohttp(Contract):
    client_class = AiohttpClient
