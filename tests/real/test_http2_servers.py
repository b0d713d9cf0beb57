"""HTTP/2 upstream with servers that we did not write: nginx, nghttpd and Hypercorn, over TLS and in clear text."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.support import collected, request_for
from tests.real.nginx import NGINX, Nginx
from tests.support.certificates import Certificates
from tests.support.process import StandaloneProxy
from tests.support.wire import within
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.flow import BodyPipe

NGHTTPD = shutil.which("nghttpd", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
MIB = 1024 * 1024


@dataclass
class Server:
    """One that serves the files in ``directory``; where it ``echoes``, it answers a POST with its body."""

    url: str
    directory: Path
    echoes: bool
    trailers: bool


async def nginx(directory: Path, certificates: Certificates) -> AsyncIterator[Server]:
    if NGINX is None:
        pytest.skip("nginx is not installed")
    root = directory / "files"
    root.mkdir()
    server = f"""
        ssl_certificate {certificates.chain};
        ssl_certificate_key {certificates.key};
        root {root};
    """
    with Nginx(directory, server, "ssl http2") as running:
        yield Server(f"https://localhost:{running.port}", root, echoes=False, trailers=False)


async def nghttpd(directory: Path, *arguments: str, scheme: str) -> AsyncIterator[Server]:
    if NGHTTPD is None:
        pytest.skip("nghttpd is not installed (Debian: nghttp2-server)")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [NGHTTPD, "-a", "127.0.0.1", "-d", str(directory), "--echo-upload", "--trailer=x-trailer: 1", str(port)]
    process = await asyncio.create_subprocess_exec(
        *command, *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        await within(listening(port, process), "the start of nghttpd")
        yield Server(f"{scheme}://localhost:{port}", directory, echoes=True, trailers=True)
    finally:
        process.kill()
        await process.wait()


async def listening(port: int, process: asyncio.subprocess.Process) -> None:
    """Return once something listens on ``port``."""
    while process.returncode is None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            # It says nothing that could be waited for.
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return
    raise AssertionError("nghttpd has ended")


async def hypercorn(directory: Path) -> AsyncIterator[Server]:
    pytest.importorskip("hypercorn", reason="hypercorn is not installed")
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-version", b"2")]})
        if scope["method"] == "GET":
            body = (directory / scope["path"].lstrip("/")).read_bytes()
            await send({"type": "http.response.body", "body": body})
            return
        # Each piece as it comes.
        while True:
            message = await receive()
            more = message.get("more_body", False)
            await send({"type": "http.response.body", "body": message.get("body", b""), "more_body": more})
            if not more:
                return

    config = Config()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.set_inheritable(True)
        config.bind = [f"fd://{os.dup(sock.fileno())}"]
        port = sock.getsockname()[1]
    config.accesslog = config.errorlog = None
    stop = asyncio.Event()
    serving = asyncio.ensure_future(serve(application, config, shutdown_trigger=stop.wait))
    try:
        yield Server(f"http://localhost:{port}", directory, echoes=True, trailers=False)
    finally:
        stop.set()
        await within(serving, "the end of hypercorn")


@pytest.fixture(params=["nginx-tls", "nghttpd-tls", "nghttpd", "hypercorn"])
async def server(request: Any, tmp_path: Path, certificates: Certificates) -> AsyncIterator[Server]:
    starting = {
        "nginx-tls": lambda: nginx(tmp_path, certificates),
        "nghttpd-tls": lambda: nghttpd(tmp_path, str(certificates.key), str(certificates.chain), scheme="https"),
        "nghttpd": lambda: nghttpd(tmp_path, "--no-tls", scheme="http"),
        "hypercorn": lambda: hypercorn(tmp_path),
    }[request.param]()
    try:
        yield await anext(starting)
    finally:
        await starting.aclose()


@pytest.fixture
async def client(server: Server, certificates: Certificates) -> AsyncIterator[CurlClient]:
    version = "2" if server.url.startswith("https:") else "2-prior-knowledge"
    client = CurlClient(http_version=version, ca_certs=str(certificates.root))
    yield client
    client.close()


class TestServers:
    async def test_get(self, client, server):
        (server.directory / "hello.txt").write_text("hello")
        for _ in range(3):
            response = await within(client.send(request_for("GET", server.url + "/hello.txt")), "the response")
            assert (response.status, response.version, await response.read()) == (200, "HTTP/2", b"hello")
        assert response.trailers.get("X-Trailer") == ("1" if server.trailers else None)

    async def test_a_large_file(self, client, server):
        content = os.urandom(MIB) * 32
        (server.directory / "large.bin").write_bytes(content)
        response = await within(client.send(request_for("GET", server.url + "/large.bin")), "the response")
        digest = hashlib.sha256()
        async for chunk in response:
            digest.update(chunk)
        assert digest.digest() == hashlib.sha256(content).digest()

    async def test_many_at_a_time_of_which_some_are_left(self, client, server):
        content = os.urandom(MIB)
        (server.directory / "file.bin").write_bytes(content)

        async def one(number: int) -> bytes | None:
            response = await client.send(request_for("GET", server.url + "/file.bin"))
            if number % 5:
                return await response.read()
            await response.stream.read()
            response.abort()
            return None

        bodies = await within(asyncio.gather(*map(one, range(50))), "the responses", 20)
        assert all(body in (None, content) for body in bodies)
        assert bodies.count(None) == 10

    @pytest.mark.parametrize("length", [True, False], ids=["length", "no-length"])
    async def test_post(self, client, server, length):
        if not server.echoes:
            pytest.skip("nginx does not echo")
        content = os.urandom(MIB)
        pipe = BodyPipe(64 * 1024, len(content) if length else None)

        async def upload() -> None:
            for at in range(0, len(content), 50_000):
                if (room := pipe.write(content[at : at + 50_000])) is not None:
                    await room
            pipe.close()

        uploading = asyncio.ensure_future(upload())
        response = await within(client.send(request_for("POST", server.url + "/echo", pipe)), "the response")
        body, error = await within(collected(response), "the body", 20)
        assert (body == content, error) == (True, None)
        await uploading

    async def test_an_empty_body_whose_length_nobody_knew(self, client, server):
        if not server.echoes:
            pytest.skip("nginx does not echo")
        pipe = BodyPipe(1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", server.url + "/echo", pipe)))
        await asyncio.wait([sending], timeout=0.1)
        pipe.close()
        assert await (await within(sending, "the response")).read() == b""


class TestTheEndOfAConnection:
    async def test_requests_go_on_over_the_next_one(self, tmp_path, certificates):
        """nginx says GOAWAY with the last request that it takes on a connection."""
        if NGINX is None:
            pytest.skip("nginx is not installed")
        (tmp_path / "hello.txt").write_text("hello")
        with Nginx(tmp_path, f"root {tmp_path}; keepalive_requests 5;", "http2") as running:
            client = CurlClient(http_version="2-prior-knowledge")
            for _ in range(40):
                response = await within(client.send(request_for("GET", running.url + "/hello.txt")), "the response")
                assert await response.read() == b"hello"
            client.close()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
class TestStandalone:
    @pytest.mark.parametrize(
        ("version", "spoken"), [("1.1", "HTTP/1.1"), ("2", "HTTP/2.0"), ("2-prior-knowledge", "HTTP/2.0")]
    )
    def test_what_it_is_told_to_speak(self, tmp_path: Path, certificates: Certificates, version: str, spoken: str):
        """--upstream-http-version; nginx says what it was spoken to in."""
        tls = version != "2-prior-knowledge"
        server = "location / { return 200 $server_protocol; }"
        if tls:
            server += f"ssl_certificate {certificates.chain}; ssl_certificate_key {certificates.key};"
        with Nginx(tmp_path, server, "ssl http2" if tls else "http2") as nginx:
            url = f"http{'s' if tls else ''}://localhost:{nginx.port}"
            arguments = ["--upstream-http-version", version, "--client-options", f"ca_certs={certificates.root}"]
            with (
                StandaloneProxy("--to", url, *arguments) as proxy,
                urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/x", timeout=10) as response,
            ):
                assert response.read().decode() == spoken
                assert response.headers["Via"] == ("1.1" if version == "1.1" else "2") + " tornado_proxy"
