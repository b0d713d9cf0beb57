"""The contract, kept by SimpleClient."""

from tests.clients.wire_contract import Contract
from tornado_proxy.clients.simple import SimpleClient


class TestSimple(Contract):
    client_class = SimpleClient
