"""Which client a mount uses, and what is said where it cannot be had."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient

from tests.support.wire import within
from tornado_proxy import OptionError, mount
from tornado_proxy.clients import NAMES, client_class, close_clients, shared_client
from tornado_proxy.clients.base import Capabilities, HTTPClient
from tornado_proxy.clients.fake import FakeClient, answer
from tornado_proxy.clients.simple import SimpleClient

URL = "http://127.0.0.1:9000"

# Imports nothing of the named libraries, whatever is installed.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

PROXYING = """
import asyncio, logging
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler
import tornado_proxy
from tornado_proxy import mount
from tornado_proxy.clients import close_clients

class Hello(RequestHandler):
    def post(self):
        self.write(b"hello " + self.request.body)

def listen(rules):
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(Application(rules, log_function=lambda handler: None))
    server.add_sockets(sockets)
    return sockets[0].getsockname()[1]

async def main():
    upstream = listen([("/x", Hello)])
    port = listen([mount("/", f"http://127.0.0.1:{upstream}")])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /x HTTP/1.1\\r\\nHost: h\\r\\nContent-Length: 5\\r\\nConnection: close\\r\\n\\r\\nworld")
    answer = await reader.read()
    writer.close()
    await close_clients()
    print(answer.split(b"\\r\\n")[0].decode(), answer.split(b"\\r\\n\\r\\n")[1].decode())

asyncio.run(main())
"""


def run_without(*blocked: str, code: str) -> subprocess.CompletedProcess[str]:
    source = BLOCKER.format(blocked=set(blocked)) + code
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=False)


class TestWithoutLibraries:
    def test_the_package_proxies_without_pycurl(self):
        done = run_without("pycurl", "httpx", "aiohttp", code=PROXYING)
        assert done.stdout == "HTTP/1.1 200 OK hello world\n", done.stderr
        assert "pycurl is not installed; the simple client" in done.stderr

    @pytest.mark.parametrize(
        ("client", "library", "cure"),
        [
            ("curl", "pycurl", "needs pycurl; pip install pycurl, or write client='simple'"),
            ("httpx", "httpx", "needs httpx; pip install 'tornado_proxy[httpx]'"),
            ("aiohttp", "aiohttp", "needs aiohttp 3.12 or later; pip install 'tornado_proxy[aiohttp]'"),
        ],
    )
    def test_what_is_missing_is_said_by_mount(self, client, library, cure):
        code = f"from tornado_proxy import mount\nmount('/api', '{URL}', client='{client}')\n"
        done = run_without(library, code=code)
        assert f'OptionError: mount("/api"): client {client!r} {cure}' in done.stderr

    def test_a_library_is_imported_on_use_only(self):
        code = f"""
from tornado_proxy import mount
mount("/", "{URL}", client="simple")
mount("/", "{URL}")
print(sorted({{"httpx", "aiohttp", "yarl"}} & set(sys.modules)))
"""
        assert run_without(code=code).stdout == "[]\n"

    @pytest.mark.parametrize("client", ["simple", "httpx", "aiohttp"])
    def test_the_program_takes_its_name(self, client):
        arguments = ["-m", "tornado_proxy", "--to", URL, "--client", client, "--processes", "x"]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=30, check=False)
        # It was the last argument that was refused.
        assert "processes" in done.stderr
        assert "client" not in done.stderr


class Counting(SimpleClient):
    made: list[Counting] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made.append(self)


class Limited(HTTPClient):
    """A client that somebody else wrote, before there was anything to declare or check."""

    capabilities = Capabilities(unix_socket=False)

    async def send(self, request):
        raise NotImplementedError

    def close(self):
        pass


class TestTheChoice:
    @pytest.mark.parametrize("name", NAMES)
    async def test_by_name(self, proxy, echo, name):
        running = await proxy(echo.url, client=name)
        assert (await running.request("POST", "/x", [], b"hello")).status == 200
        assert type(shared_client(name, {})) is client_class(name)
        assert echo.requests[-1].body == b"hello"

    @pytest.mark.parametrize("name", NAMES)
    async def test_by_class(self, proxy, echo, name):
        running = await proxy(echo.url, client=client_class(name), client_options={"max_clients": 5})
        assert (await running.get("/x")).status == 200

    async def test_for_the_whole_application(self, proxy):
        fake = FakeClient(answer(299))
        running = await proxy("http://upstream.example", app_settings={"proxy_client": fake})
        assert (await running.get("/x")).status == 299

    async def test_the_mount_wins(self, proxy):
        mine, theirs = FakeClient(answer(298)), FakeClient(answer(299))
        running = await proxy("http://upstream.example", client=mine, app_settings={"proxy_client": theirs})
        assert (await running.get("/x")).status == 298
        assert theirs.requests == []

    async def test_instances_are_shared_and_closed(self, proxy, echo):
        Counting.made.clear()
        for _ in range(2):
            running = await proxy(echo.url, client=Counting)
            assert (await running.get("/x")).status == 200
        assert len(Counting.made) == 1
        await within(close_clients(), "closing")
        with pytest.raises(Exception, match="closed"):
            await Counting.made[0].send(None)

    def test_each_loop_has_its_own(self):
        async def of_this_loop() -> HTTPClient:
            client = shared_client("simple", {})
            assert shared_client("simple", {}) is client
            await close_clients()
            return client

        assert asyncio.run(of_this_loop()) is not asyncio.run(of_this_loop())

    async def test_options_for_an_instance_are_refused_not_ignored(self, proxy, expect_log):
        expect_log("client_options cannot be applied")
        running = await proxy(
            "http://upstream.example",
            client_options={"validate_cert": True},
            app_settings={"proxy_client": FakeClient()},
        )
        assert (await running.get("/x")).status == 500

    @pytest.mark.parametrize("name", NAMES)
    async def test_tornados_own_client_is_never_configured(self, proxy, echo, name):
        before = AsyncHTTPClient.configured_class()
        running = await proxy(echo.url, client=name)
        await running.get("/x")
        assert AsyncHTTPClient.configured_class() is before


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"client": "requests"}, "client 'requests' is unknown; write one of 'curl', 'simple', 'httpx', 'aiohttp'"),
            (
                {"client": "simple", "client_options": {"http_version": "2"}},
                "http_version '2' is more than SimpleClient",
            ),
            ({"client": "httpx", "client_options": {"http_version": "3"}}, "http_version '3' is more than HttpxClient"),
            ({"client": Limited, "client_options": {"unix_socket": "/x"}}, "unix_socket is more than Limited can"),
        ],
    )
    def test_by_mount(self, options, message):
        with pytest.raises(OptionError, match=message):
            mount("/", URL, **options)
