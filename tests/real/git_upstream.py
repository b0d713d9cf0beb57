"""git's own server, ``git http-backend``, behind the standard library's HTTP server.

Run as ``python -m tests.real.git_upstream DIRECTORY``: serves the bare repositories in that directory, for reading and
writing, and says where it listens and then a line for each request: method, framing of its body, its length as it came,
its coding, its length once decoded, target.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class GitHandler(BaseHTTPRequestHandler):
    """Hands each request to a CGI program and relays what that says."""

    protocol_version = "HTTP/1.1"
    directory: str

    def do_GET(self) -> None:
        self.relay("none", b"")

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            self.relay("chunked", self.read_chunks())
        else:
            self.relay("length", self.rfile.read(int(self.headers["Content-Length"])))

    def read_chunks(self) -> bytes:
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def relay(self, framing: str, body: bytes) -> None:
        came = len(body)
        encoding = self.headers.get("Content-Encoding", "identity")
        if encoding in ("gzip", "x-gzip"):
            # CGI wants CONTENT_LENGTH of what it reads, and http-backend could inflate; here it is done once, for both.
            body = gzip.decompress(body)
        print(self.command, framing, came, encoding, len(body), self.path, flush=True)
        path, _, query = self.path.partition("?")
        done = subprocess.run(
            ["git", "http-backend"],
            input=body,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "GIT_PROJECT_ROOT": self.directory,
                "GIT_HTTP_EXPORT_ALL": "1",
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "REQUEST_METHOD": self.command,
                "PATH_INFO": unquote(path),
                "QUERY_STRING": query,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": str(len(body)),
                "REMOTE_USER": "tester",
                "REMOTE_ADDR": self.client_address[0],
            },
            check=False,
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = [line.partition(": ")[::2] for line in head.decode("latin-1").split("\r\n")]
        status = next((value for name, value in fields if name.lower() == "status"), "200 OK")
        self.send_response_only(int(status.split()[0]), status.partition(" ")[2])
        for name, value in fields:
            if name and name.lower() not in ("status", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main(directory: str) -> None:
    GitHandler.directory = directory
    server = ThreadingHTTPServer(("127.0.0.1", 0), GitHandler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
