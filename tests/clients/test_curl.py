"""The contract, kept by CurlClient."""

from tests.clients.wire_contract import Contract
from tornado_proxy.clients.curl import CurlClient


class TestCurl(Contract):
    client_class = CurlClient
