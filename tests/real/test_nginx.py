"""nginx as the upstream: what it can do with a file, it does through the proxy too."""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.nginx import NGINX, Nginx

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

TEXT = b"one line of many\n" * 1000
SERVER = """
        root files;
        etag on;
        gzip on;
        gzip_proxied any;  # else nginx leaves alone what has a Via
        gzip_min_length 1;
        gzip_types text/plain;
        types { text/plain txt; }
        default_type application/octet-stream;
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "big.bin").write_bytes(os.urandom(3_000_000))
    (directory / "text.txt").write_bytes(TEXT)
    (directory / "empty").write_bytes(b"")
    return directory


@pytest.fixture
def nginx(tmp_path: Path, files: Path) -> Iterator[Nginx]:
    with Nginx(tmp_path, SERVER) as running:
        yield running


@pytest.fixture(params=["stream", "buffer"])
async def running(request, proxy, nginx):
    return await proxy(nginx.url, response_mode=request.param)


class TestStaticFiles:
    @pytest.mark.parametrize("name", ["big.bin", "text.txt", "empty"])
    async def test_a_file_arrives_whole_and_with_its_length(self, running, files, name):
        response = await running.get(f"/{name}")
        content = (files / name).read_bytes()
        assert (response.status, response.body) == (200, content)
        assert response.header("Content-Length") == str(len(content))
        assert response.header("Server").startswith("nginx/")

    async def test_head_has_the_length_and_no_body(self, running):
        response = await running.request("HEAD", "/big.bin")
        assert (response.status, response.body) == (200, b"")
        assert response.header("Content-Length") == "3000000"

    async def test_what_is_not_there_is_nginx_to_say(self, running):
        response = await running.get("/nothing")
        assert response.status == 404
        assert b"nginx" in response.body

    async def test_a_directory_is_redirected_to_the_proxy(self, running, files):
        (files / "dir").mkdir()
        response = await running.get("/dir")
        assert (response.status, response.header("Location")) == (301, f"{running.url}/dir/")

    async def test_many_requests_on_one_connection(self, running):
        async with await running.connect() as downstream:
            for _ in range(50):
                assert (await downstream.exchange("GET", "/text.txt")).body == TEXT


class TestRanges:
    @pytest.mark.parametrize(
        ("asked", "answered", "part"),
        [
            ("bytes=10-19", "bytes 10-19/3000000", slice(10, 20)),
            ("bytes=2999990-", "bytes 2999990-2999999/3000000", slice(2999990, None)),
            ("bytes=-5", "bytes 2999995-2999999/3000000", slice(-5, None)),
        ],
    )
    async def test_a_part(self, running, files, asked, answered, part):
        response = await running.get("/big.bin", [("Range", asked)])
        assert (response.status, response.header("Content-Range")) == (206, answered)
        assert response.body == (files / "big.bin").read_bytes()[part]

    async def test_several_parts_are_one_multipart_body(self, running):
        response = await running.get("/big.bin", [("Range", "bytes=0-1,5-6")])
        assert response.status == 206
        assert response.header("Content-Type").startswith("multipart/byteranges; boundary=")
        assert response.complete

    async def test_a_part_that_is_not_there(self, running):
        response = await running.get("/big.bin", [("Range", "bytes=9000000-")])
        assert (response.status, response.header("Content-Range")) == (416, "bytes */3000000")


class TestConditions:
    async def test_not_modified_by_its_tag(self, running):
        tag = (await running.get("/big.bin")).header("ETag")
        async with await running.connect() as downstream:
            response = await downstream.exchange("GET", "/big.bin", [("If-None-Match", tag)])
            assert (response.status, response.body, response.header("ETag")) == (304, b"", tag)
            # The connection is good for the next request: nobody took the 304 for a message with a body.
            assert (await downstream.exchange("GET", "/text.txt")).body == TEXT

    async def test_modified_since_another_tag(self, running):
        assert (await running.get("/text.txt", [("If-None-Match", '"other"')])).status == 200

    async def test_not_modified_by_its_date(self, running):
        date = (await running.get("/big.bin")).header("Last-Modified")
        assert (await running.get("/big.bin", [("If-Modified-Since", date)])).status == 304


class TestGzip:
    async def test_what_nginx_compressed_passes_as_it_is(self, running):
        response = await running.get("/text.txt", [("Accept-Encoding", "gzip")])
        assert response.header("Content-Encoding") == "gzip"
        assert len(response.body) < len(TEXT) // 10
        assert gzip.decompress(response.body) == TEXT

    async def test_nobody_asks_for_compression_in_our_name(self, running):
        response = await running.get("/text.txt")
        assert not response.has("Content-Encoding")
        assert response.body == TEXT


class TestHTTP2:
    """An upstream that speaks HTTP/2, in clear text: many exchanges on one connection."""

    @pytest.fixture
    async def running(self, proxy, tmp_path, files):
        with Nginx(tmp_path, SERVER + "location /post { return 200; }", "http2") as nginx:
            # No second attempt, which would hide one that failed.
            yield await proxy(nginx.url, retries=0, client_options={"http_version": "2-prior-knowledge"})

    async def test_exchanges_at_a_time_share_a_connection(self, running, files):
        content = (files / "big.bin").read_bytes()
        # The connection is there, and idle, and is then in use.
        for count in (1, 1, 20):
            responses = await asyncio.gather(*(running.get("/big.bin") for _ in range(count)))
            assert all(response.body == content for response in responses)

    async def test_one_that_nobody_reads_holds_up_no_other(self, running, files):
        content = (files / "big.bin").read_bytes()
        stalled = await running.ask("GET", "/big.bin")
        await stalled.read_head()
        responses = await asyncio.gather(*(running.get("/big.bin") for _ in range(5)))
        assert all(response.body == content for response in responses)
        assert await stalled.read_body() == content

    async def test_uploads_without_a_length(self, running):
        for _ in range(3):
            requests = (running.request("POST", "/post", [("Transfer-Encoding", "chunked")], b"x") for _ in range(5))
            assert {response.status for response in await asyncio.gather(*requests)} == {200}

    async def test_one_that_is_cancelled_ends_alone(self, running, files):
        content = (files / "big.bin").read_bytes()
        leaving = [await running.ask("GET", "/big.bin") for _ in range(5)]
        staying = await running.ask("GET", "/big.bin")
        for downstream in leaving:
            await downstream.read_head()
            downstream.close()
        assert (await staying.read_response()).body == content
        assert (await running.get("/big.bin")).body == content
