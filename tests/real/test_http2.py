"""curl, nghttp, h2load, httpx and Chromium speak HTTP/2 to the standalone proxy."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pycurl
import pytest

from tests.real.chromium import CHROMIUM, Chromium
from tests.real.nginx import NGINX, Nginx
from tests.real.test_curl import CURL, curl, curl_in_thread
from tests.support.certificates import Certificates
from tests.support.process import StandaloneProxy
from tests.support.upstream import EchoUpstream, ScriptedUpstream
from tests.support.wire import LAST_CHUNK

H2LOAD, NGHTTP = shutil.which("h2load"), shutil.which("nghttp")
SIZE = 1_000_000

needs_curl = pytest.mark.skipif(CURL is None, reason="curl is not installed")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@contextlib.asynccontextmanager
async def standalone(*arguments: str | Path) -> AsyncIterator[StandaloneProxy]:
    """Start the standalone proxy without holding up the loop, on which its upstream is."""
    starting = StandaloneProxy(*map(str, arguments), "--http2")
    proxy = await asyncio.to_thread(starting.__enter__)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.stop)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(SIZE)
    (tmp_path / "big.bin").write_bytes(data)
    (tmp_path / "small.txt").write_bytes(b"hello")
    return data


@pytest.fixture(params=["plain", "tls"])
def site(
    tmp_path: Path, content: bytes, certificates: Certificates, request: pytest.FixtureRequest
) -> Iterator[list[str]]:
    """What curl needs to reach files of nginx's through the proxy: the base URL last."""
    tls = request.param == "tls"
    with Nginx(tmp_path, f"root {tmp_path};") as nginx:
        own = ["--tls-cert", str(certificates.chain), "--tls-key", str(certificates.key)] if tls else []
        with StandaloneProxy("--to", nginx.url, "--http2", *own) as proxy:
            if tls:
                yield ["--http2", "--cacert", str(certificates.root), f"https://localhost:{proxy.port}"]
            else:
                yield ["--http2-prior-knowledge", f"http://127.0.0.1:{proxy.port}"]


@needs_curl
@needs_nginx
class TestCurl:
    def test_a_download(self, site: list[str], content: bytes) -> None:
        *how, base = site
        assert curl(*how, f"{base}/big.bin") == content

    # Not without TLS: curl 7.88 cannot use such a connection twice, with nginx neither.
    @pytest.mark.parametrize("site", ["tls"], indirect=True)
    def test_the_version_is_2_and_one_connection_serves_many(self, site: list[str]) -> None:
        *how, base = site
        urls = [word for _ in range(20) for word in ("-o", os.devnull, f"{base}/small.txt")]
        said = curl(*how, "-w", "%{http_version} %{num_connects}\n", *urls).split()
        assert said == [b"2", b"1"] + [b"2", b"0"] * 19

    @pytest.mark.parametrize("site", ["tls"], indirect=True)
    def test_many_at_a_time(self, site: list[str]) -> None:
        *how, base = site
        urls = [word for _ in range(100) for word in ("-o", os.devnull, f"{base}/small.txt")]
        said = curl(*how, "-Z", "-w", "%{http_version} %{http_code}\n", *urls).split(b"\n")
        assert said == [b"2 200"] * 100 + [b""]

    def test_heads_alone(self, site: list[str]) -> None:
        *how, base = site
        head = curl(*how, "-I", f"{base}/big.bin").decode()
        assert head.startswith("HTTP/2 200")
        assert f"content-length: {SIZE}\r\n" in head
        assert "connection:" not in head

    def test_ranges_and_validators(self, site: list[str], content: bytes) -> None:
        *how, base = site
        assert curl(*how, "-r", "1000-1999", f"{base}/big.bin") == content[1000:2000]
        etag = re.findall(r"etag: (.*)\r\n", curl(*how, "-I", f"{base}/small.txt").decode())[0]
        again = curl(*how, "-i", "-H", f"If-None-Match: {etag}", f"{base}/small.txt").decode()
        assert again.startswith("HTTP/2 304")

    def test_slowly(self, site: list[str], content: bytes) -> None:
        *how, base = site
        assert curl(*how, "--limit-rate", "2M", f"{base}/big.bin") == content

    def test_what_does_not_exist(self, site: list[str]) -> None:
        *how, base = site
        assert curl(*how, "-w", "%{http_code}", "-o", os.devnull, f"{base}/nothing") == b"404"

    def test_http_1_1_is_still_there(self, site: list[str], content: bytes) -> None:
        *how, base = site
        how = ["--http1.1" if word.startswith("--http2") else word for word in how]
        said = curl(*how, "-w", "%{http_version}", "-o", os.devnull, f"{base}/big.bin")
        assert said == b"1.1"

    @pytest.mark.parametrize("site", ["plain"], indirect=True)
    def test_an_upgrade_is_not_answered(self, site: list[str], content: bytes) -> None:
        """curl asks for h2c by Upgrade with this option, and goes on with HTTP/1.1."""
        base = site[-1]
        assert curl("--http2", "-w", "%{http_version}", "-o", os.devnull, f"{base}/big.bin") == b"1.1"


@needs_curl
class TestCurlUploads:
    @pytest.mark.parametrize("size", [0, 5, SIZE])
    async def test_of_unknown_length(self, echo: EchoUpstream, size: int) -> None:
        data = os.urandom(size)
        async with standalone("--to", echo.url) as proxy:
            await curl_in_thread("--http2-prior-knowledge", "-T", "-", f"http://127.0.0.1:{proxy.port}/up", stdin=data)
        request = echo.requests[-1]
        assert (request.version, request.chunked, request.body or b"") == ("HTTP/1.1", True, data)

    async def test_of_a_file_has_its_length(self, echo: EchoUpstream, content: bytes, tmp_path: Path) -> None:
        async with standalone("--to", echo.url) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/up"
            await curl_in_thread("--http2-prior-knowledge", "-T", tmp_path / "big.bin", url)
        request = echo.requests[-1]
        assert (request.content_length, request.body) == (SIZE, content)


@needs_curl
class TestCurlSeesTheEnd:
    async def test_a_response_that_is_cut_is_an_error(self, upstream: ScriptedUpstream) -> None:
        async with standalone("--to", upstream.url) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/x"
            command = [str(CURL), "-q", "-sS", "--noproxy", "*", "--max-time", "20", "--http2-prior-knowledge", url]
            asking = asyncio.ensure_future(
                asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=30, check=False)
            )
            conn, _ = await upstream.request()
            await conn.send_head(200, [("Transfer-Encoding", "chunked")])
            await conn.send_chunk(b"begun")
            conn.close()
            done = await asking
        assert done.returncode == 92, done.stderr  # CURLE_HTTP2_STREAM
        # Where both frames come in one packet it forgets what it had.
        assert b"begun".startswith(done.stdout)

    async def test_trailers(self, upstream: ScriptedUpstream) -> None:
        async with standalone("--to", upstream.url) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/x"
            asking = asyncio.ensure_future(curl_in_thread("--http2-prior-knowledge", "-i", url))
            conn, _ = await upstream.request()
            await conn.send_head(200, [("Transfer-Encoding", "chunked")])
            await conn.send_chunk(b"body")
            await conn.send(LAST_CHUNK[:-2] + b"Grpc-Status: 0\r\n\r\n")
            answer = await asking
        assert answer.endswith(b"\r\n\r\nbodygrpc-status: 0\r\n")


class TestLibcurl:
    async def test_a_refused_upload_ends_with_the_refusal(self, upstream: ScriptedUpstream, content: bytes) -> None:
        """RST_STREAM with NO_ERROR behind a complete response is no failure; to the program of curl 7.88 it is."""
        async with standalone("--to", upstream.url) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/up"
            asking = asyncio.ensure_future(asyncio.to_thread(upload, url, content * 20))
            conn = await upstream.accept()
            await conn.read_head()
            await conn.respond(403, [("Connection", "close")], body=b"no")
            assert await asking == (403, b"no")


def upload(url: str, data: bytes) -> tuple[int, bytes]:
    handle, answer = pycurl.Curl(), io.BytesIO()
    for option, value in {
        pycurl.URL: url,
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE,
        pycurl.PROXY: "",
        pycurl.UPLOAD: 1,
        pycurl.READDATA: io.BytesIO(data),
        pycurl.WRITEDATA: answer,
        pycurl.TIMEOUT: 20,
    }.items():
        handle.setopt(option, value)
    try:
        handle.perform()
        return handle.getinfo(pycurl.RESPONSE_CODE), answer.getvalue()
    finally:
        handle.close()


@needs_nginx
@pytest.mark.skipif(NGHTTP is None, reason="nghttp is not installed")
class TestNghttp:
    def test_a_page_and_what_belongs_to_it(self, tmp_path: Path, content: bytes) -> None:
        """nghttp sends PRIORITY frames for groups that it makes up, and pads what it sends."""
        names = [f"{number}.bin" for number in range(30)]
        for name in names:
            (tmp_path / name).write_bytes(content[:100_000])
        with Nginx(tmp_path, f"root {tmp_path};") as nginx, StandaloneProxy("--to", nginx.url, "--http2") as proxy:
            urls = [f"http://127.0.0.1:{proxy.port}/{name}" for name in names]
            assert NGHTTP is not None
            command = [NGHTTP, "-n", "-s", "-b", "100", "-w", "17", "-W", "17", *urls]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert len(re.findall(r" 200 +\d+K? /\d+\.bin", done.stdout)) == 30, done.stdout


@needs_nginx
@pytest.mark.slow
@pytest.mark.skipif(H2LOAD is None, reason="h2load is not installed")
class TestH2load:
    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    def test_five_thousand_requests_a_hundred_at_a_time(
        self, tmp_path: Path, content: bytes, certificates: Certificates, tls: bool
    ) -> None:
        own = ["--tls-cert", str(certificates.chain), "--tls-key", str(certificates.key)] if tls else []
        with (
            Nginx(tmp_path, f"root {tmp_path};") as nginx,
            StandaloneProxy("--to", nginx.url, "--http2", *own) as proxy,
        ):
            url = f"http{'s' if tls else ''}://127.0.0.1:{proxy.port}/small.txt"
            said = h2load("-n", "5000", "-c", "2", "-m", "50", url)
        assert "5000 succeeded, 0 failed, 0 errored, 0 timeout" in said
        assert "status codes: 5000 2xx, 0 3xx, 0 4xx, 0 5xx" in said
        assert "Application protocol: h2" in said

    def test_uploads(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "up.bin").write_bytes(content[:50_000])
        nginx_config = f"root {tmp_path}; client_max_body_size 1m; location /up {{ return 204; }}"
        with Nginx(tmp_path, nginx_config) as nginx, StandaloneProxy("--to", nginx.url, "--http2") as proxy:
            url = f"http://127.0.0.1:{proxy.port}/up"
            said = h2load("-n", "500", "-c", "2", "-m", "20", "-d", str(tmp_path / "up.bin"), url)
        assert "500 succeeded, 0 failed, 0 errored, 0 timeout" in said


def h2load(*arguments: str) -> str:
    assert H2LOAD is not None
    done = subprocess.run([H2LOAD, *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


class TestHttpx:
    async def test_many_at_a_time_under_tls(self, echo: EchoUpstream, certificates: Certificates) -> None:
        own = ["--tls-cert", certificates.chain, "--tls-key", certificates.key]
        context = ssl.create_default_context(cafile=str(certificates.root))
        async with (
            standalone("--to", echo.url, *own) as proxy,
            httpx.AsyncClient(http1=False, http2=True, verify=context, trust_env=False) as client,
        ):
            base = f"https://localhost:{proxy.port}"
            responses = await asyncio.gather(
                *(client.post(f"{base}/{number}", content=b"x" * 1000 * number) for number in range(50))
            )
            assert {(response.http_version, response.status_code) for response in responses} == {("HTTP/2", 200)}
            assert sorted(len(request.body or b"") for request in echo.requests) == [
                1000 * number for number in range(50)
            ]

    async def test_bodies_in_pieces(self, echo: EchoUpstream) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"x" * 5000

        async with (
            standalone("--to", echo.url) as proxy,
            httpx.AsyncClient(http1=False, http2=True, trust_env=False) as client,
        ):
            response = await client.post(f"http://127.0.0.1:{proxy.port}/", content=pieces())
            assert (response.http_version, response.status_code) == ("HTTP/2", 200)
        assert echo.requests[-1].chunked
        assert len(echo.requests[-1].body or b"") == 500_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
class TestChromium:
    async def test_the_demo_page(self, tmp_path: Path, certificates: Certificates) -> None:
        """Events, transfers and pages over one connection; the websocket over another, with HTTP/1.1."""
        own = ["--tls-cert", certificates.chain, "--tls-key", certificates.key]
        async with standalone("--demo", *own) as proxy, Chromium(tmp_path, "--ignore-certificate-errors") as page:
            await page.open(f"https://localhost:{proxy.port}/")
            protocol = "performance.getEntriesByType('navigation')[0].nextHopProtocol"
            assert await page.value(protocol) == "h2"
            await page.until("document.querySelectorAll('#events-rows tr').length >= 3")
            for kind in ("download", "upload"):
                await page.choose(f"#{kind}-size", str(16 * 1024 * 1024))
                await page.click(f"#{kind}-start")
                await page.until(f"document.querySelector('#{kind}-state').textContent.includes('complete')")
            await page.click('#playground button[data-path="status/404"]')
            await page.until("document.querySelector('#answer h3 small')?.textContent.startsWith('GET /status/404 ')")
            assert (await page.text("#answer")).startswith("404")
            used = await page.value(
                "[...new Set(performance.getEntriesByType('resource').map((entry) => entry.nextHopProtocol))]"
            )
            assert used == ["h2"]
            complaints = [line for line in page.complaints if "404" not in line]
            assert complaints == []
