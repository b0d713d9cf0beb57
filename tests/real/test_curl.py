"""curl as the client of the standalone proxy."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.nginx import NGINX, Nginx
from tests.support.process import StandaloneProxy
from tests.support.upstream import EchoUpstream, ScriptedUpstream

CURL = shutil.which("curl")

pytestmark = pytest.mark.skipif(CURL is None, reason="curl is not installed")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

SIZE = 1_000_000


def curl(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    """Run curl as if nobody had configured it, and return what it wrote."""
    assert CURL is not None
    done = subprocess.run(
        [CURL, "-q", "--noproxy", "*", "-sS", "--max-time", "20", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, f"curl {arguments}: {done.stderr.decode()}"
    return done.stdout


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(SIZE)
    (tmp_path / "big.bin").write_bytes(data)
    return data


@pytest.fixture
def url(tmp_path: Path, content: bytes) -> Iterator[str]:
    """The URL of a file of nginx's, through the proxy."""
    with (
        Nginx(tmp_path, f"root {tmp_path};") as nginx,
        StandaloneProxy("--to", nginx.url) as proxy,
    ):
        yield f"http://127.0.0.1:{proxy.port}/big.bin"


@needs_nginx
class TestDownloads:
    def test_by_http_1_0(self, url: str, content: bytes) -> None:
        assert curl("--http1.0", url) == content

    def test_by_http_1_0_one_after_the_other(self, url: str, content: bytes) -> None:
        assert curl("--http1.0", url, url) == content * 2

    def test_slowly(self, url: str, content: bytes) -> None:
        assert curl("--limit-rate", "2M", url) == content

    def test_the_rest_of_a_file_of_which_a_part_is_there(self, url: str, content: bytes, tmp_path: Path) -> None:
        there = tmp_path / "partial"
        there.write_bytes(content[:400_000])
        curl("-C", "-", "-o", there, url)
        assert there.read_bytes() == content

    def test_the_head_alone(self, url: str) -> None:
        head = curl("-I", url).decode()
        assert head.startswith("HTTP/1.1 200 OK\r\n")
        assert f"content-length: {SIZE}\r\n" in head.lower()
        assert head.endswith("\r\n\r\n")

    def test_a_connection_is_used_again(self, url: str) -> None:
        said = curl("-w", "%{num_connects}\n", "-o", os.devnull, url, "-o", os.devnull, url)
        assert said.split() == [b"1", b"0"]


class TestHttp10:
    async def test_a_response_without_a_length_ends_with_the_connection(self, upstream: ScriptedUpstream) -> None:
        with StandaloneProxy("--to", upstream.url) as proxy:
            asking = asyncio.ensure_future(curl_in_thread("--http1.0", "-i", f"http://127.0.0.1:{proxy.port}/x"))
            conn, request = await upstream.request()
            assert request.start_line == "GET /x HTTP/1.1"
            await conn.send_head(200, [("Transfer-Encoding", "chunked")])
            await conn.send_chunk(b"one")
            await conn.send_chunk(b"two")
            await conn.send_chunk(b"")
            head, _, body = (await asking).partition(b"\r\n\r\n")
        assert body == b"onetwo"
        assert b"transfer-encoding" not in head.lower()
        assert b"keep-alive" not in head.lower()

    async def test_an_upload_of_a_file_and_no_more(self, echo: EchoUpstream, content: bytes, tmp_path: Path) -> None:
        with StandaloneProxy("--to", echo.url) as proxy:
            await curl_in_thread("--http1.0", "-T", tmp_path / "big.bin", f"http://127.0.0.1:{proxy.port}/up")
        request = echo.requests[-1]
        assert (request.version, request.content_length, request.body) == ("HTTP/1.1", SIZE, content)


class TestUploads:
    """curl runs in a thread here: the upstream is on our loop."""

    @pytest.mark.parametrize("size", [0, 5, SIZE])
    async def test_of_unknown_length_from_stdin(self, echo: EchoUpstream, size: int) -> None:
        data = os.urandom(size)
        with StandaloneProxy("--to", echo.url) as proxy:
            await curl_in_thread("-T", "-", f"http://127.0.0.1:{proxy.port}/up", stdin=data)
        request = echo.requests[-1]
        assert (request.method, request.target, request.body or b"") == ("PUT", "/up", data)
        assert request.chunked
        assert request.content_length is None

    async def test_of_a_file_has_its_length(self, echo: EchoUpstream, content: bytes, tmp_path: Path) -> None:
        with StandaloneProxy("--to", echo.url) as proxy:
            await curl_in_thread("-T", tmp_path / "big.bin", f"http://127.0.0.1:{proxy.port}/up")
        request = echo.requests[-1]
        assert (request.content_length, request.body) == (SIZE, content)

    async def test_slowly(self, echo: EchoUpstream, content: bytes) -> None:
        with StandaloneProxy("--to", echo.url) as proxy:
            await curl_in_thread("--limit-rate", "2M", "-T", "-", f"http://127.0.0.1:{proxy.port}/up", stdin=content)
        assert echo.requests[-1].body == content


async def curl_in_thread(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    return await asyncio.to_thread(curl, *arguments, stdin=stdin)
