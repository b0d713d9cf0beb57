"""The contract, kept by HttpxClient."""

import pytest

from tests.clients.wire_contract import Contract

pytest.importorskip("httpx")

from tornado_proxy.clients.httpx import HttpxClient


class TestHttpx(Contract):
    client_class = HttpxClient
