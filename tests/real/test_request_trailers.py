"""Trailers of requests from nghttp and libcurl, through the standalone proxy, to Node.js, which keeps them apart."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pycurl
import pytest

from tests.support.process import StandaloneProxy

NODE, NGHTTP = shutil.which("node"), shutil.which("nghttp")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

BODY = "hello" * 50_000

# Answers with what it saw.
SERVER = """
require("http").createServer((request, response) => {
    let body = "";
    request.on("data", piece => body += piece);
    request.on("end", () => {
        response.end(JSON.stringify({headers: request.headers, body, trailers: request.trailers}));
    });
}).listen(0, "127.0.0.1", function () { console.log(this.address().port); });
"""


@pytest.fixture
def node() -> Iterator[str]:
    """The URL of the server above."""
    assert NODE is not None
    with subprocess.Popen([NODE, "-e", SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


@pytest.mark.skipif(NGHTTP is None, reason="nghttp is not installed")
class TestOverHTTP2:
    @pytest.mark.parametrize("client", ["curl", "simple"])
    @pytest.mark.parametrize("length", [True, False], ids=["length", "none"])
    def test_behind_content_without_a_length(self, node: str, tmp_path: Path, client: str, length: bool) -> None:
        (tmp_path / "body").write_bytes(b"hello")
        assert NGHTTP is not None
        command = [NGHTTP, "-d", str(tmp_path / "body"), "--trailer=x-checksum: 7", "--trailer=x-real-ip: 9.9.9.9"]
        with StandaloneProxy("--to", node, "--http2", "--client", client) as proxy:
            command += [*([] if length else ["--no-content-length"]), f"http://127.0.0.1:{proxy.port}/x"]
            done = subprocess.run(command, capture_output=True, timeout=30, check=True)
        seen = json.loads(done.stdout)
        assert (seen["body"], seen["trailers"]) == ("hello", {} if length else {"x-checksum": "7"})
        assert not {"x-checksum", "x-real-ip"} & set(seen["headers"])


class TestOverHTTP1:
    def test_behind_chunks(self, node: str) -> None:
        with StandaloneProxy("--to", node) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/x"
            first, second = uploaded(url, trailers=True), uploaded(url, trailers=False)
        assert first["headers"]["trailer"] == "X-Checksum"
        assert first["headers"]["host"] == node.removeprefix("http://")
        assert (first["body"], first["trailers"]) == (BODY, {"x-checksum": "7"})
        assert (second["body"], second["trailers"]) == (BODY, {})


def uploaded(url: str, *, trailers: bool) -> Any:
    """Return what the server at `url` saw of an upload in chunks, with trailers or without."""
    handle, answer = pycurl.Curl(), io.BytesIO()
    fields = ["Transfer-Encoding: chunked", "Trailer: X-Checksum, Host", "Expect:"]
    for option, value in {
        pycurl.URL: url,
        pycurl.PROXY: "",
        pycurl.UPLOAD: 1,
        pycurl.READDATA: io.BytesIO(BODY.encode()),
        pycurl.HTTPHEADER: fields,
        pycurl.WRITEDATA: answer,
        pycurl.TIMEOUT: 20,
    }.items():
        handle.setopt(option, value)
    if trailers:
        handle.setopt(pycurl.TRAILERFUNCTION, lambda: [b"X-Checksum: 7", b"Host: evil.example"])
    try:
        handle.perform()
    finally:
        handle.close()
    return json.loads(answer.getvalue())
