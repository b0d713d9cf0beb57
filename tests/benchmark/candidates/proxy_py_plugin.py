"""What proxy.py loads to know where everything goes: the URL in $UPSTREAM."""

import os
import re

from proxy.http import Url
from proxy.http.parser import HttpParser
from proxy.http.server import ReverseProxyBasePlugin

UPSTREAM = os.environ["UPSTREAM"].encode()


class Everything(ReverseProxyBasePlugin):
    def routes(self) -> list[str]:
        return [".*"]

    def handle_route(self, request: HttpParser, pattern: re.Pattern[str]) -> Url:
        return Url.from_bytes(UPSTREAM + request.path)
