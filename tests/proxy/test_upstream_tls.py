"""An upstream over TLS is who its name says it is, or it gets and delivers nothing."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest

OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")

CA_CONFIGURATION = """
[ca]
default_ca = it
[it]
database = {directory}/index.txt
serial = {directory}/serial
new_certs_dir = {directory}
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""


class Certificates:
    """A little authority: ``ca`` is its certificate, :meth:`issue` makes others."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "index.txt").touch()
        (directory / "serial").write_text("01\n")
        (directory / "ca.cnf").write_text(CA_CONFIGURATION.format(directory=directory))
        self.ca = self.self_signed("ca", "/CN=Authority", "basicConstraints=critical,CA:TRUE")

    def _openssl(self, *arguments: str | Path) -> None:
        subprocess.run([str(OPENSSL), *map(str, arguments)], check=True, capture_output=True, timeout=60)

    def self_signed(self, name: str, subject: str, *extensions: str) -> Path:
        """Return the file of a certificate that vouches for itself; its key is beside it."""
        certificate = self.directory / f"{name}.pem"
        added = [word for extension in extensions for word in ("-addext", extension)]
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", self.key(certificate))
        self._openssl("req", "-x509", *key, "-out", certificate, "-days", "30", "-subj", subject, *added)
        return certificate

    def issue(self, name: str, alternative: str, start: str = "20200101000000Z", end: str = "20991231235959Z") -> Path:
        """Return the file of a certificate that the authority signed."""
        certificate, request = self.directory / f"{name}.pem", self.directory / f"{name}.csr"
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", self.key(certificate))
        self._openssl("req", *key, "-out", request, "-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}")
        self._openssl(
            *("ca", "-batch", "-notext", "-config", self.directory / "ca.cnf", "-cert", self.ca),
            *("-keyfile", self.key(self.ca), "-startdate", start, "-enddate", end, "-in", request, "-out", certificate),
        )
        return certificate

    @staticmethod
    def key(certificate: Path) -> Path:
        return certificate.with_suffix(".key")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class TLSUpstream:
    """Answers every request; notes the names it was asked for, what it read, and who asked."""

    def __init__(self, certificate: Path, client_ca: Path | None = None) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, Certificates.key(certificate))
        if client_ca is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED
            self.context.load_verify_locations(client_ca)
        self.names: list[str | None] = []
        self.context.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self.read = bytearray()
        self.clients: list[Any] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.port: int = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        # Python 3.12 waits for connections too, and the proxy, which is stopped later, keeps its own.
        for writer in self._writers:
            writer.transport.abort()
        await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.clients.append(writer.get_extra_info("peercert"))
        with contextlib.suppress(ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            while True:
                self.read += await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
                await writer.drain()
        writer.close()

    def url(self, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}"


@pytest.fixture
async def good(certificates: Certificates) -> AsyncIterator[TLSUpstream]:
    async with TLSUpstream(certificates.issue("good", "DNS:localhost,IP:127.0.0.1")) as upstream:
        yield upstream


class TestAnUpstreamThatIsTrusted:
    """``ca_certs`` says whom to trust; the name that is checked, and asked for, is the upstream's."""

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
    async def test_is_used(self, proxy, certificates, good, host):
        running = await proxy(good.url(host), client_options={"ca_certs": str(certificates.ca)})
        downstream = await running.connect()
        for _ in range(3):
            assert (await downstream.exchange("GET", "/x")).body == b"secret"
        assert len(good.clients) == 1

    @pytest.mark.parametrize("preserve", [False, True])
    async def test_is_asked_for_by_its_own_name(self, proxy, certificates, good, preserve):
        running = await proxy(
            good.url(), preserve_host_header=preserve, client_options={"ca_certs": str(certificates.ca)}
        )
        response = await running.get("/x", [("Host", "elsewhere.example")])
        assert response.body == b"secret"
        assert good.names == ["localhost"]
        assert (b"\r\nHost: elsewhere.example\r\n" in good.read) == preserve

    async def test_is_asked_for_by_no_name_where_it_is_an_address(self, proxy, certificates, good):
        running = await proxy(good.url("127.0.0.1"), client_options={"ca_certs": str(certificates.ca)})
        assert (await running.get("/x")).status == 200
        # RFC 6066 section 3: an address is no server name.
        assert good.names == [None]

    async def test_https_upstream_is_what_the_forwarding_fields_do_not_say(self, proxy, certificates, good):
        """They tell of the downstream, which came without TLS."""
        running = await proxy(good.url(), client_options={"ca_certs": str(certificates.ca)})
        assert (await running.get("/x")).status == 200
        assert b"X-Forwarded-Proto: http\r\n" in good.read


class TestAnUpstreamThatIsNot:
    """FA-20: it gets no byte of the request, delivers none, and the downstream a 502."""

    async def check(self, proxy, expect_log, upstream: TLSUpstream, options: dict[str, Any], host="localhost") -> None:
        expect_log("upstream")
        running = await proxy(upstream.url(host), client_options=options)
        downstream = await running.connect()
        for method, body in (("GET", None), ("POST", b"password")):
            response = await downstream.exchange(method, "/x", body=body)
            assert (response.status, response.complete) == (502, True)
            assert b"secret" not in response.raw
            outcome = await running.next_outcome()
            assert (outcome.side, outcome.phase) == ("upstream", "tls")
        assert not upstream.read

    async def test_expired(self, proxy, certificates, expect_log):
        old = certificates.issue("old", "DNS:localhost", end="20210101000000Z")
        async with TLSUpstream(old) as upstream:
            await self.check(proxy, expect_log, upstream, {"ca_certs": str(certificates.ca)})

    async def test_not_valid_yet(self, proxy, certificates, expect_log):
        coming = certificates.issue("coming", "DNS:localhost", start="20980101000000Z")
        async with TLSUpstream(coming) as upstream:
            await self.check(proxy, expect_log, upstream, {"ca_certs": str(certificates.ca)})

    @pytest.mark.parametrize("name", ["elsewhere.example", "localhost.example", "*.localhost"])
    async def test_of_another_name(self, proxy, certificates, expect_log, name):
        other = certificates.issue("other", f"DNS:{name}")
        async with TLSUpstream(other) as upstream:
            await self.check(proxy, expect_log, upstream, {"ca_certs": str(certificates.ca)})

    async def test_of_another_address(self, proxy, certificates, expect_log):
        other = certificates.issue("other", "DNS:localhost,IP:127.0.0.2")
        async with TLSUpstream(other) as upstream:
            await self.check(proxy, expect_log, upstream, {"ca_certs": str(certificates.ca)}, host="127.0.0.1")

    async def test_self_signed(self, proxy, certificates, expect_log):
        own = certificates.self_signed("own", "/CN=localhost", "subjectAltName=DNS:localhost")
        async with TLSUpstream(own) as upstream:
            await self.check(proxy, expect_log, upstream, {"ca_certs": str(certificates.ca)})

    async def test_of_an_authority_that_nobody_named(self, proxy, good, expect_log):
        """Verification is on by default."""
        await self.check(proxy, expect_log, good, {})

    async def test_that_wants_a_certificate_which_we_have_not(self, proxy, certificates, expect_log):
        expect_log("upstream")
        one = certificates.issue("strict", "DNS:localhost")
        async with TLSUpstream(one, client_ca=certificates.ca) as upstream:
            running = await proxy(upstream.url(), client_options={"ca_certs": str(certificates.ca)})
            response = await running.request("POST", "/x", body=b"password")
            assert (response.status, response.complete) == (502, True)
            # With TLS 1.3 the client's side is up before it is refused; the request may have left, but nobody read it.
            assert not upstream.read

    async def test_that_speaks_without_tls(self, proxy, upstream, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url.replace("http://127.0.0.1", "https://localhost"))
        downstream = await running.ask("GET", "/x", [("X-Secret", "password")])
        for _ in range(2):  # once more on a fresh connection
            conn = await upstream.accept()
            hello = await conn.read_some()
            assert b"password" not in hello
            assert hello[0] == 0x16
            await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
            conn.close()
            if downstream.is_closed_by_other() or downstream._buffer:
                break
        response = await downstream.read_response()
        assert (response.status, response.complete) == (502, True)
        assert b"secret" not in response.raw

    async def test_that_speaks_tls_unasked(self, proxy, good, expect_log):
        expect_log("upstream")
        running = await proxy(good.url().replace("https", "http"))
        assert (await running.get("/x")).status == 502
        assert not good.read

    async def test_that_never_shakes_hands(self, proxy, upstream, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url.replace("http:", "https:"), connect_timeout=0.3, retries=0)
        downstream = await running.ask("GET", "/x")
        conn = await upstream.accept()
        assert (await downstream.read_response()).status == 504
        await conn.closed()

    async def test_unless_that_is_switched_off(self, proxy, good):
        running = await proxy(good.url(), client_options={"validate_cert": False})
        assert (await running.get("/x")).body == b"secret"


class TestOurOwnCertificate:
    """``client_cert`` and ``client_key`` are shown to an upstream that asks."""

    async def test_is_shown(self, proxy, certificates):
        ours = certificates.issue("ours", "DNS:proxy")
        one = certificates.issue("strict", "DNS:localhost")
        options = {
            "ca_certs": str(certificates.ca),
            "client_cert": str(ours),
            "client_key": str(certificates.key(ours)),
        }
        async with TLSUpstream(one, client_ca=certificates.ca) as upstream:
            running = await proxy(upstream.url(), client_options=options)
            assert (await running.get("/x")).body == b"secret"
            ((subject,),) = [client["subject"] for client in upstream.clients]
            assert subject == (("commonName", "ours"),)

    async def test_is_not_shared_with_a_mount_that_has_none(self, proxy, certificates, expect_log):
        """A connection that was made with our certificate must not carry requests of a mount without it."""
        expect_log("upstream")
        ours = certificates.issue("ours", "DNS:proxy")
        one = certificates.issue("strict", "DNS:localhost")
        with_ours = {
            "ca_certs": str(certificates.ca),
            "client_cert": str(ours),
            "client_key": str(certificates.key(ours)),
        }
        async with TLSUpstream(one, client_ca=certificates.ca) as upstream:
            trusted = await proxy(upstream.url(), client_options=with_ours)
            other = await proxy(upstream.url(), client_options={"ca_certs": str(certificates.ca)})
            assert (await trusted.get("/x")).status == 200
            assert (await other.get("/x")).status == 502
            assert (await trusted.get("/x")).status == 200


class TestATLSConnectionThatIsCut:
    """A cut is a cut under TLS too: without the end of TLS, a body until close is not complete."""

    @pytest.mark.parametrize(
        ("fields", "body"),
        [
            (b"Content-Length: 100", b"hello"),
            (b"Transfer-Encoding: chunked", b"5\r\nhello\r\n"),
            (b"X-A: 1", b"hello"),
        ],
        ids=["length", "chunked", "until close"],
    )
    async def test_is_visible(self, proxy, certificates, expect_log, fields, body):
        expect_log("upstream")

        class Cutting(TLSUpstream):
            async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"once")
                writer.write(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n" + body)
                await writer.drain()
                # FIN, but no close_notify.
                writer.transport.abort()

        async with Cutting(certificates.issue("cut", "DNS:localhost")) as upstream:
            running = await proxy(upstream.url(), client_options={"ca_certs": str(certificates.ca)})
            response = await running.request("POST", "/x", body=b"once")
            assert (response.status, response.complete) == (200, False)


class TestANewConnection:
    """What TLS itself sends right after the handshake, its session tickets, is no unasked answer."""

    async def test_is_used_at_once(self, proxy, certificates):
        certificate = certificates.issue("quick", "DNS:localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, Certificates.key(certificate))
        accepted = 0

        def serve(listener: socket.socket) -> None:
            # In a thread of its own, so that the tickets can be there before the request is sent.
            nonlocal accepted
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                accepted += 1
                with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as secured:
                    secured.settimeout(5)
                    if secured.recv(65536):
                        secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=serve, args=(listener,), daemon=True)
            thread.start()
            try:
                url = f"https://localhost:{listener.getsockname()[1]}"
                running = await proxy(url, client_options={"ca_certs": str(certificates.ca)}, retries=3)
                for _ in range(200):
                    assert (await running.get("/x")).body == b"secret"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                await asyncio.to_thread(thread.join, 5)
        print(f"{accepted} connections for 200 requests")
        assert accepted == 200
