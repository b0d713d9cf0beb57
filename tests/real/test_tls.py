"""TLS in front of the standalone proxy, with a chain of certificates: curl and Python's ssl as clients."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.certificates import Certificates
from tests.support.process import StandaloneProxy
from tests.support.upstream import ScriptedUpstream, UpstreamConnection
from tests.support.wire import parse_head, until, within

CURL = shutil.which("curl")
needs_curl = pytest.mark.skipif(CURL is None, reason="curl is not installed")
MIB = 1024 * 1024
CHUNKED = [("Transfer-Encoding", "chunked")]
# curl(1): a transfer that is shorter than it said, a chunk that ended too early, a failure to receive.
CURL_PARTIAL, CURL_RECEIVE = 18, 56


class Served:
    """The proxy, the upstream behind it, and clients that trust its authority."""

    def __init__(self, proxy: StandaloneProxy, upstream: ScriptedUpstream, certificates: Certificates) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.certificates = certificates
        self.url = f"https://127.0.0.1:{proxy.port}"

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificates.root)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection that checks the proxy's certificate and its name."""
        opening = asyncio.open_connection(
            "127.0.0.1", self.proxy.port, ssl=self.context(), server_hostname="localhost", limit=MIB
        )
        return await within(opening, "the handshake")

    def curl(self, *arguments: str | Path) -> asyncio.Task[subprocess.CompletedProcess[bytes]]:
        """Start curl, which trusts the root; return what it will have said."""
        assert CURL is not None
        command = [CURL, "-q", "--noproxy", "*", "-sS", "--max-time", "20", "--cacert", self.certificates.root]
        return asyncio.ensure_future(
            asyncio.to_thread(
                subprocess.run, [*map(str, command), *map(str, arguments)], capture_output=True, timeout=30, check=False
            )
        )


@pytest.fixture
async def served(certificates: Certificates) -> AsyncIterator[Served]:
    async with ScriptedUpstream() as upstream:
        starting = StandaloneProxy(
            "--to", upstream.url, "--tls-cert", str(certificates.chain), "--tls-key", str(certificates.key)
        )
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            yield Served(proxy, upstream, certificates)
            assert "Traceback" not in proxy.output
        finally:
            await asyncio.to_thread(proxy.signal, 9)
            await asyncio.to_thread(proxy.stop)


async def read_head(reader: asyncio.StreamReader):
    return parse_head(await within(reader.readuntil(b"\r\n\r\n"), "a head"))


class TestCertificates:
    async def test_the_chain_is_trusted_for_its_name_and_address(self, served):
        assert served.proxy.output.startswith("listening on https://127.0.0.1:")
        for name in ("localhost", "127.0.0.1"):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", served.proxy.port, ssl=served.context(), server_hostname=name
            )
            writer.close()
            await writer.wait_closed()

    async def test_whoever_does_not_know_the_authority_refuses(self, served):
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection("127.0.0.1", served.proxy.port, ssl=ssl.create_default_context())
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(
                "127.0.0.1", served.proxy.port, ssl=served.context(), server_hostname="elsewhere.example"
            )
        await within(self.still_serves(served), "an answer")

    async def test_one_file_can_hold_chain_and_key(self, certificates):
        async with ScriptedUpstream() as upstream:
            with StandaloneProxy("--to", upstream.url, "--tls-cert", str(certificates.combined)) as proxy:
                await within(self.still_serves(Served(proxy, upstream, certificates)), "an answer")

    async def test_plain_http_on_its_port_is_not_answered_and_hurts_nobody(self, served):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.proxy.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in await within(reader.read(), "the end")
        writer.close()
        await within(self.still_serves(served), "an answer")

    async def still_serves(self, served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        conn, _ = await served.upstream.request()
        await conn.respond(204)
        assert (await read_head(reader)).start_line == "HTTP/1.1 204 No Content"
        writer.close()
        await writer.wait_closed()


class TestForwarding:
    async def test_the_upstream_is_told_https(self, served):
        reader, writer = await served.connect()
        writer.write(b"GET /x HTTP/1.1\r\nHost: secure.example\r\nX-Forwarded-Proto: http\r\n\r\n")
        conn, request = await served.upstream.request()
        assert request.header("X-Forwarded-Proto") == "https"
        assert request.header("X-Forwarded-Port") == "443"
        assert request.header("X-Forwarded-Host") == "secure.example"
        await conn.respond(302, [("Location", f"{served.upstream.url}/next")])
        assert (await read_head(reader)).header("Location") == "https://secure.example/next"
        writer.close()

    async def test_each_chunk_passes_at_once(self, served):
        """The upstream holds the second chunk until the client has the first; the client, the other way round."""
        reader, writer = await served.connect()
        writer.write(b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        conn = await served.upstream.accept()
        await conn.read_head()
        await conn.send_head(200, CHUNKED)
        await read_head(reader)
        for part in (b"one", b"two", b"three"):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            assert await conn.read_body(len(part)) == part
            await conn.send_chunk(part)
            assert await within(reader.readuntil(part), "the chunk") == b"%x\r\n%b" % (len(part), part)
            await reader.readuntil(b"\r\n")
        writer.write(b"0\r\n\r\n")
        assert await conn.read_body() == b""
        await conn.send_chunk(b"")
        assert await within(reader.readexactly(5), "the end") == b"0\r\n\r\n"
        writer.close()


class TestLargeBodies:
    SIZE = 128 * MIB

    async def test_a_download_arrives_whole(self, served):
        reader, writer = await served.connect()
        writer.write(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
        conn, _ = await served.upstream.request()
        conn.timeout = 60
        await conn.send_head(200, [("Content-Length", str(self.SIZE))])
        await read_head(reader)
        block = os.urandom(MIB)
        rss = served.proxy.rss()
        sending = asyncio.ensure_future(self.send(conn, block))
        digest, left = hashlib.sha256(), self.SIZE
        while left:
            data = await within(reader.read(min(left, MIB)), "more of the body")
            assert data
            digest.update(data)
            left -= len(data)
        await sending
        assert digest.digest() == hashlib.sha256(block * (self.SIZE // MIB)).digest()
        assert served.proxy.rss() - rss < 8 * MIB
        writer.close()

    async def test_an_upload_arrives_whole(self, served):
        reader, writer = await served.connect()
        writer.write(f"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: {self.SIZE}\r\n\r\n".encode())
        conn = await served.upstream.accept()
        await conn.read_head()
        block = os.urandom(MIB)
        rss = served.proxy.rss()

        async def upload() -> None:
            for _ in range(self.SIZE // MIB):
                writer.write(block)
                await writer.drain()

        sending = asyncio.ensure_future(upload())
        digest, left = hashlib.sha256(), self.SIZE
        while left:
            data = await conn.read_body(min(left, MIB))
            digest.update(data)
            left -= len(data)
        await sending
        assert digest.digest() == hashlib.sha256(block * (self.SIZE // MIB)).digest()
        assert served.proxy.rss() - rss < 8 * MIB
        await conn.respond(204)
        assert (await read_head(reader)).start_line == "HTTP/1.1 204 No Content"
        writer.close()

    async def send(self, conn: UpstreamConnection, block: bytes) -> None:
        for _ in range(self.SIZE // MIB):
            await conn.send(block)

    @needs_curl
    async def test_by_curl_both_ways_on_one_connection(self, served, tmp_path):
        body = os.urandom(8 * MIB)
        (tmp_path / "up").write_bytes(body)

        async def swap(conn, request):
            await conn.respond(200, body=request.body or body)

        served.upstream.serve(swap)
        done = await served.curl(
            *("-T", tmp_path / "up", "-o", tmp_path / "back", f"{served.url}/up"),
            *("--next", "-sS", "--cacert", served.certificates.root, "-w", "%{num_connects} %{ssl_verify_result}"),
            *("-o", tmp_path / "down", f"{served.url}/down"),
        )
        assert (done.returncode, done.stdout) == (0, b"0 0"), done.stderr
        assert (tmp_path / "back").read_bytes() == body
        assert (tmp_path / "down").read_bytes() == body


class TestEnds:
    """Over TLS too, a whole response ends well and a broken one ends in an error, however its body is framed."""

    @pytest.mark.parametrize(
        ("framing", "arguments", "codes"),
        [
            ("length", (), {CURL_PARTIAL, CURL_RECEIVE}),
            ("chunked", (), {CURL_PARTIAL, CURL_RECEIVE}),
            ("close", ("--http1.0",), {CURL_PARTIAL, CURL_RECEIVE}),
        ],
    )
    @needs_curl
    async def test_curl_reports_a_response_that_broke(self, served, framing, arguments, codes, tmp_path):
        curl = served.curl(*arguments, "-o", tmp_path / "got", f"{served.url}/x")
        conn, _ = await served.upstream.request()
        await self.begin(conn, framing)
        await until(lambda: (tmp_path / "got").exists() and (tmp_path / "got").stat().st_size, "curl had a part")
        conn.reset()
        done = await curl
        assert done.returncode in codes, (done.returncode, done.stderr)

    @needs_curl
    @pytest.mark.parametrize(("framing", "arguments"), [("length", ()), ("chunked", ()), ("close", ("--http1.0",))])
    async def test_curl_is_content_with_a_whole_response(self, served, framing, arguments):
        curl = served.curl(*arguments, f"{served.url}/x")
        conn, _ = await served.upstream.request()
        await self.begin(conn, framing)
        await conn.send_chunk(b"rest") if framing != "length" else await conn.send(b"y" * 90_000)
        if framing != "length":
            await conn.send_chunk(b"")
        done = await curl
        assert (done.returncode, done.stderr) == (0, b"")
        assert len(done.stdout) == (100_000 if framing == "length" else 10_004)

    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    async def test_python_sees_that_a_response_broke(self, served, framing):
        reader, writer = await served.connect()
        version = b"1.0" if framing == "close" else b"1.1"
        writer.write(b"GET /x HTTP/%b\r\nHost: h\r\n\r\n" % version)
        conn, _ = await served.upstream.request()
        await self.begin(conn, framing)
        await read_head(reader)
        await within(reader.readuntil(b"x" * 1000), "a part")
        conn.reset()
        if framing == "close":
            # Nothing but the end of the connection says where the body ends; so that end must be an error.
            with pytest.raises((ConnectionResetError, ssl.SSLError)):
                await within(reader.read(), "the end")
        else:
            assert b"0\r\n\r\n" not in await within(self.rest(reader), "the end")
        writer.close()

    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    async def test_the_end_of_a_whole_response_is_announced(self, served, framing):
        """RFC 8446 section 6.1: without a close_notify, a strict client takes the end for a truncation."""
        version = "1.0" if framing == "close" else "1.1"
        done = asyncio.ensure_future(asyncio.to_thread(self.read_strictly, served, version))
        conn, _ = await served.upstream.request()
        await self.begin(conn, framing)
        if framing == "length":
            await conn.send(b"x" * 90_000)
        else:
            await conn.send_chunk(b"")
        assert (await done).endswith((b"x" * 1000, b"0\r\n\r\n"))

    def read_strictly(self, served: Served, version: str) -> bytes:
        """Read all until the end, which must not be ragged."""
        with (
            socket.create_connection(("127.0.0.1", served.proxy.port), 10) as plain,
            served.context().wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as sock,
        ):
            sock.sendall(f"GET /x HTTP/{version}\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: sock.recv(65_536), b""))

    async def rest(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read()
        except OSError:
            return b""

    async def begin(self, conn: UpstreamConnection, framing: str) -> None:
        if framing == "length":
            await conn.send_head(200, [("Content-Length", "100000")])
            await conn.send(b"x" * 10_000)
        else:
            await conn.send_head(200, CHUNKED)
            await conn.send_chunk(b"x" * 10_000)


class TestLeaving:
    @pytest.mark.parametrize("how", ["politely", "abruptly"])
    async def test_the_upstream_sees_a_client_that_leaves(self, served, how):
        reader, writer = await served.connect()
        writer.write(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
        conn, _ = await served.upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await read_head(reader)
        if how == "politely":
            writer.close()
        else:
            writer.transport.abort()
        await conn.closed()

    async def test_clients_that_leave_in_the_handshake_leave_nothing(self, served):
        reader, writer = await served.connect()
        writer.write(b"GET /warm HTTP/1.1\r\nHost: h\r\n\r\n")
        conn, _ = await served.upstream.request()
        await conn.respond(204, [("Connection", "close")])
        await read_head(reader)
        await conn.closed()
        before = served.proxy.fds()
        for size in (0, 1, 5, 50) * 10:
            _, leaving = await asyncio.open_connection("127.0.0.1", served.proxy.port)
            leaving.write(hello()[:size])
            leaving.transport.abort() if size % 2 else leaving.close()
        await until(lambda: served.proxy.fds() <= before, "every descriptor came back")
        writer.close()


def hello() -> bytes:
    """Return the first message of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()
