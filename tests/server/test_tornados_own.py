"""Tornado's own tests, run on our server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

DIFFERENT = {
    "web_test": {
        # They set chunk_size, and count the pieces.
        "test_flow_control_chunked_body",
        "test_flow_control_compressed_body",
        "test_flow_control_fixed_body",
    },
    "websocket_test": set(),
    "httpserver_test": {
        # Options that ours lacks: chunk_size, decompress_request, xheaders, body_timeout.
        "test_chunked_body",
        "test_chunked_compressed",
        "test_compressed_body",
        "test_regular_body",
        "test_gzip",
        "test_gzip_bomb",
        "test_gzip_case_insensitive",
        "test_gzip_concatenated",
        "test_gzip_invalid",
        "test_size_limit",
        "test_ip_headers",
        "test_scheme_headers",
        "test_trusted_downstream",
        "test_request_without_xprotocol",
        "test_timeout",
        # 413 and not 400.
        "test_body_size_override_reset",
        "test_large_body_buffered",
        "test_large_body_buffered_chunked",
        "test_large_body_streaming",
        "test_large_body_streaming_chunked",
        # An error of the application is answered with 500 and not only with the end of the connection.
        "test_invalid_output_content_length",
        # Our 400 has fields.
        "test_unix_socket_bad_request",
        # Transfer-Encoding in HTTP/1.0 (RFC 9112 section 6.1), and lines that end with LF alone (section 2.2).
        "test_keepalive_chunked",
        "test_newlines",
        # It writes its own head, which Tornado calls deprecated.
        "test_legacy_interface",
    },
}


class TestTornadosOwnTests:
    @pytest.mark.slow
    @pytest.mark.parametrize("module", DIFFERENT)
    def test_they_pass_but_for_what_we_mean_to_do_otherwise(self, module):
        pytest.importorskip(f"tornado.test.{module}")
        command = [sys.executable, "-m", "tests.server.tornados_own", module]
        run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=True)
        ran, *failed = run.stdout.split("\n")[:-1]
        assert int(ran.removeprefix("ran ")) > 50
        assert set(failed) == DIFFERENT[module]
