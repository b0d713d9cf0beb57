"""The head of the request that the upstream sees."""

import socket

import pytest

from tests.support.upstream import EchoUpstream
from tests.support.wire import LAST_CHUNK, chunk
from tornado_proxy import mount
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.errors import ConnectError
from tornado_proxy.options import OptionError

MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])
# Nothing is added to the head but what every request needs.
PLAIN = {"forwarded": None, "via": None}
LOCAL = ("127.0.0.0/8", "::1/128")


class TestNormalizeHeaders:
    """Behaviour 18: normalize_headers gets the pairs of request and of response, and what it returns is used."""

    @MODES
    async def test_it_changes_both_lists(self, proxy, upstream, mode):
        def normalize(pairs):
            return [(name, value.upper()) if name.startswith("X-") else (name, value) for name, value in pairs]

        running = await proxy(upstream.url, response_mode=mode, normalize_headers=normalize)
        downstream = await running.ask("GET", "/x", [("X-One", "a"), ("X-One", "b"), ("Cookie", "c")])
        conn, request = await upstream.request()
        assert request.all("X-One") == ["A", "B"]
        assert request.header("Cookie") == "c"
        await conn.respond(200, [("X-Two", "d"), ("X-Two", "e"), ("Set-Cookie", "f")], b"body")
        response = await downstream.read_response()
        assert response.all("X-Two") == ["D", "E"]
        assert response.header("Set-Cookie") == "f"
        assert response.body == b"body"

    @MODES
    async def test_it_may_drop_and_add(self, proxy, upstream, mode):
        def normalize(pairs):
            return [pair for pair in pairs if pair[0] != "X-Drop"] + [("X-Added", "1"), ("X-Added", "2")]

        running = await proxy(upstream.url, response_mode=mode, normalize_headers=normalize)
        downstream = await running.ask("GET", "/x", [("X-Drop", "a"), ("X-Keep", "b")])
        conn, request = await upstream.request()
        assert not request.has("X-Drop")
        assert request.header("X-Keep") == "b"
        assert request.all("X-Added") == ["1", "2"]
        await conn.respond(200, [("X-Drop", "a"), ("X-Keep", "b")])
        response = await downstream.read_response()
        assert not response.has("X-Drop")
        assert response.header("X-Keep") == "b"
        assert response.all("X-Added") == ["1", "2"]

    async def test_it_gets_pairs(self, proxy, echo):
        seen = []

        def normalize(pairs):
            seen.append(pairs)
            return pairs

        running = await proxy(echo.url, normalize_headers=normalize)
        await running.get("/x", [("X-One", "a"), ("X-One", "b")])
        of_request, of_response = seen
        assert [pair for pair in of_request if pair[0] == "X-One"] == [("X-One", "a"), ("X-One", "b")]
        assert ("Content-Type", "application/json") in of_response


HOP_BY_HOP = [
    ("TE", "trailers"),
    ("Trailer", "X-Checksum"),
    ("Keep-Alive", "timeout=5"),
    ("Proxy-Authenticate", "Basic"),
    ("Proxy-Authorization", "Basic c2VjcmV0"),
    ("Proxy-Connection", "keep-alive"),
    ("Upgrade", "h2c"),
]


class TestHopByHop:
    """Behaviour 19: hop-by-hop fields do not pass, whatever their case, nor do those that Connection names."""

    @staticmethod
    def spelled(style, headers):
        return [(getattr(name, style)(), value) for name, value in headers]

    @pytest.mark.parametrize("style", ["title", "lower", "upper"])
    async def test_in_requests(self, proxy, echo, style):
        running = await proxy(echo.url)
        headers = [*HOP_BY_HOP, ("Connection", "keep-alive"), ("X-Kept", "1")]
        assert (await running.get("/x", self.spelled(style, headers))).status == 200
        gone = {name.lower() for name, _ in HOP_BY_HOP} | {"connection"}
        assert not gone & set(echo.requests[-1].names)
        assert echo.requests[-1].header("X-Kept") == "1"

    @MODES
    @pytest.mark.parametrize("style", ["title", "lower", "upper"])
    async def test_in_responses(self, proxy, upstream, style, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        headers = [*HOP_BY_HOP, ("Connection", "keep-alive"), ("X-Kept", "1")]
        await conn.respond(200, self.spelled(style, headers), b"body")
        response = await downstream.read_response()
        assert response.status == 200
        assert not {name.lower() for name, _ in HOP_BY_HOP} & set(response.names)
        assert response.header("X-Kept") == "1"

    async def test_fields_that_connection_names_in_requests(self, proxy, echo):
        running = await proxy(echo.url)
        await running.get(
            "/x",
            [
                ("Connection", "X-One, x-two"),
                ("Connection", "X-THREE"),
                ("X-Kept", "1"),
                ("X-One", "1"),
                ("X-Two", "2"),
                ("X-Three", "3"),
            ],
        )
        assert not {"x-one", "x-two", "x-three", "connection"} & set(echo.requests[-1].names)
        assert echo.requests[-1].header("X-Kept") == "1"

    @MODES
    async def test_fields_that_connection_names_in_responses(self, proxy, upstream, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(200, [("Connection", "x-one"), ("X-One", "1"), ("X-Kept", "1")])
        response = await downstream.read_response()
        assert not response.has("X-One")
        assert response.header("X-Kept") == "1"

    async def test_credentials_are_not_sent_to_be_repeated(self, proxy, echo):
        """RFC 9110 section 9.3.8."""
        running = await proxy(echo.url)
        sent = [("Cookie", "s=1"), ("Authorization", "Basic eA=="), ("X-A", "1")]
        assert (await running.request("TRACE", "/x", sent)).status == 200
        assert not echo.requests[-1].has("Cookie")
        assert not echo.requests[-1].has("Authorization")
        assert echo.requests[-1].has("X-A")

    async def test_end_to_end_fields_cannot_be_removed_by_naming_them(self, proxy, echo):
        running = await proxy(echo.url)
        headers = [
            ("Connection", "Authorization, Host, Content-Length, X-Forwarded-For"),
            ("Authorization", "Basic abc"),
        ]
        assert (await running.request("POST", "/x", headers, b"hello")).status == 200
        request = echo.requests[-1]
        assert request.header("Authorization") == "Basic abc"
        assert request.header("Host") == f"127.0.0.1:{echo.port}"
        assert request.header("X-Forwarded-For") == "127.0.0.1"
        assert request.body == b"hello"

    async def test_transfer_encoding_is_our_own(self, proxy, echo):
        running = await proxy(echo.url)
        body = chunk(b"one") + LAST_CHUNK
        await running.request("POST", "/x", [("transfer-encoding", "Chunked")], body)
        assert echo.requests[-1].all("Transfer-Encoding") == ["chunked"]
        assert echo.requests[-1].body == b"one"


class TestEndToEnd:
    """Behaviour 20: everything else passes as it came, and nothing is invented."""

    async def test_ordinary_fields_pass(self, proxy, echo):
        headers = [
            ("Cookie", "a=1; b=2"),
            ("Cache-Control", "no-cache"),
            ("Date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("Authorization", "Bearer x.y.z"),
            ("Accept-Encoding", "gzip, br"),
            ("Range", "bytes=0-4"),
            ("If-None-Match", '"etag"'),
            ("User-Agent", "test/1"),
            ("Accept", "text/html;q=0.9"),
            ("Content-Type", "text/plain; charset=x"),
            ("Origin", "http://elsewhere.example"),
            ("Priority", "u=1"),
        ]
        running = await proxy(echo.url)
        await running.get("/x", headers)
        for name, value in headers:
            assert echo.requests[-1].header(name) == value

    async def test_the_head_byte_for_byte(self, proxy, echo):
        running = await proxy(echo.url, **PLAIN)
        async with await running.connect() as downstream:
            await downstream.send(
                b"GET /a%2Fb?q=%20 HTTP/1.1\r\n"
                b"Host: front.example\r\n"
                b"X-First: 1\r\n"
                b'Cookie: a=1;  b="2"\r\n'
                b"X-Empty:\r\n"
                b"X-Twice: one\r\n"
                b"X-Twice: two, three\r\n"
                b"X-Latin: caf\xe9\r\n"
                b"\r\n"
            )
            assert (await downstream.read_response()).status == 200
        assert echo.requests[-1].raw == (
            b"GET /a%2Fb?q=%20 HTTP/1.1\r\n"
            b"Host: 127.0.0.1:" + str(echo.port).encode() + b"\r\n"
            b"X-First: 1\r\n"
            b'Cookie: a=1;  b="2"\r\n'
            b"X-Empty:\r\n"
            b"X-Twice: one\r\n"
            b"X-Twice: two, three\r\n"
            b"X-Latin: caf\xe9\r\n"
            b"\r\n"
        )

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    async def test_nothing_is_invented(self, proxy, echo, method):
        running = await proxy(echo.url, **PLAIN)
        await running.request(method, "/x", body=b"hello" if method in ("POST", "PUT", "PATCH") else None)
        assert set(echo.requests[-1].names) <= {"host", "content-length"}

    async def test_a_large_upload_does_not_wait_for_100_continue(self, proxy, echo):
        running = await proxy(echo.url, **PLAIN)
        await running.request("PUT", "/x", body=b"x" * 2_000_000)
        assert not echo.requests[-1].has("Expect")

    async def test_the_inbound_request_is_not_modified(self, proxy, echo):
        seen = []

        def on_done(handler, outcome):
            seen.extend(handler.request.headers.get_all())

        running = await proxy(echo.url, on_done=on_done)
        await running.get("/x", [("Host", "front.example"), ("Connection", "X-One"), ("X-One", "1")])
        await running.next_outcome()
        assert seen == [("Host", "front.example"), ("Connection", "X-One"), ("X-One", "1")]


class TestRewriteRequest:
    """The hook has the last word over the head (follows behaviours 18 to 20)."""

    async def test_nothing_is_stripped_after_it(self, proxy, echo):
        def rewrite_request(handler, request):
            request.headers["X-User"] = "alice"
            request.headers["X-Forwarded-For"] = "192.0.2.1"
            request.headers["Proxy-Authorization"] = "Basic abc"
            del request.headers["X-Secret"]

        running = await proxy(echo.url, rewrite_request=rewrite_request)
        await running.get("/x", [("X-Secret", "1")])
        request = echo.requests[-1]
        assert request.header("X-User") == "alice"
        assert request.header("X-Forwarded-For") == "192.0.2.1"
        assert request.header("Proxy-Authorization") == "Basic abc"
        assert not request.has("X-Secret")

    async def test_it_may_change_method_and_url(self, proxy, echo):
        async def rewrite_request(handler, request):
            request.method = "PUT"
            request.url = f"{echo.url}/elsewhere?a=%2F"

        running = await proxy("http://127.0.0.1:1", rewrite_request=rewrite_request)
        await running.request("POST", "/x", body=b"hello")
        assert echo.requests[-1].start_line == "PUT /elsewhere?a=%2F HTTP/1.1"
        assert echo.requests[-1].body == b"hello"
        assert echo.requests[-1].header("Host") == f"127.0.0.1:{echo.port}"

    @pytest.mark.parametrize(
        "attack",
        ["/a\r\nX-Injected: 1", "/a HTTP/1.1\r\nX: ", "/a b", "/a\x00b", "/a\nb"],
    )
    async def test_what_cannot_be_sent_is_refused(self, proxy, echo, expect_log, attack):
        def rewrite_request(handler, request):
            request.url = echo.url + attack

        expect_log("", required=False)
        running = await proxy(echo.url, rewrite_request=rewrite_request)
        assert (await running.get("/x")).status == 500
        assert not echo.requests

    @pytest.mark.parametrize("method", ["GET /evil HTTP/1.1\r\nX: ", "", "GE T"])
    async def test_a_method_that_is_no_token_is_refused(self, proxy, echo, expect_log, method):
        def rewrite_request(handler, request):
            request.method = method

        expect_log("", required=False)
        running = await proxy(echo.url, rewrite_request=rewrite_request)
        assert (await running.get("/x")).status == 500
        assert not echo.requests

    @pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "a\nb", "a\rb", "a\x00b"])
    async def test_a_value_that_is_no_field_value_is_refused(self, proxy, echo, expect_log, value):
        def rewrite_request(handler, request):
            request.headers["X-Value"] = value

        expect_log("", required=False)
        running = await proxy(echo.url, rewrite_request=rewrite_request)
        assert (await running.get("/x")).status == 500
        assert not echo.requests


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


class TestForwardedFor:
    """Behaviour 21: X-Forwarded-For gets the remote address; the chain of a trusted proxy is continued."""

    async def test_absent(self, proxy, echo):
        running = await proxy(echo.url)
        await running.get("/x")
        assert echo.requests[-1].header("X-Forwarded-For") == "127.0.0.1"

    async def test_from_a_trusted_proxy_it_is_appended(self, proxy, echo):
        running = await proxy(echo.url, trusted_proxies=LOCAL)
        await running.get("/x", [("X-Forwarded-For", "192.0.2.7, 10.0.0.1")])
        assert echo.requests[-1].header("X-Forwarded-For") == "192.0.2.7, 10.0.0.1, 127.0.0.1"

    async def test_two_lines_of_a_trusted_proxy_are_one_chain(self, proxy, echo):
        running = await proxy(echo.url, trusted_proxies="*")
        await running.get("/x", [("x-forwarded-for", "192.0.2.7"), ("X-Other", "1"), ("X-FORWARDED-FOR", "10.0.0.1")])
        chain = ", ".join(echo.requests[-1].all("X-Forwarded-For"))
        assert chain == "192.0.2.7, 10.0.0.1, 127.0.0.1"

    @pytest.mark.parametrize("trusted", [(), ("10.0.0.0/8",)])
    async def test_from_anyone_else_it_is_replaced(self, proxy, echo, trusted):
        running = await proxy(echo.url, trusted_proxies=trusted)
        await running.get("/x", [("X-Forwarded-For", "192.0.2.7"), ("Forwarded", "for=192.0.2.7"), ("X-Real-IP", "1")])
        assert echo.requests[-1].header("X-Forwarded-For") == "127.0.0.1"
        assert not echo.requests[-1].has("Forwarded")
        assert not echo.requests[-1].has("X-Real-IP")

    @pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
    async def test_an_ipv6_address(self, proxy, echo):
        running = await proxy(echo.url, host="::1", trusted_proxies=LOCAL)
        await running.get("/x")
        assert echo.requests[-1].header("X-Forwarded-For") == "::1"
        await running.get("/x", [("X-Forwarded-For", "2001:db8::1")])
        assert echo.requests[-1].header("X-Forwarded-For") == "2001:db8::1, ::1"

    async def test_its_companions(self, proxy, echo):
        running = await proxy(echo.url, prefix="/foo")
        await running.get("/foo/x", [("Host", "front.example:8080")])
        request = echo.requests[-1]
        assert request.header("X-Forwarded-Proto") == "http"
        assert request.header("X-Forwarded-Host") == "front.example:8080"
        assert request.header("X-Forwarded-Port") == "8080"
        assert request.header("X-Forwarded-Prefix") == "/foo"

    async def test_no_prefix_at_the_root(self, proxy, echo):
        running = await proxy(echo.url)
        await running.get("/x")
        assert not echo.requests[-1].has("X-Forwarded-Prefix")

    async def test_rfc7239(self, proxy, echo):
        running = await proxy(echo.url, forwarded="rfc7239")
        await running.get("/x", [("Host", "front.example:8080")])
        assert echo.requests[-1].header("Forwarded") == 'for=127.0.0.1;proto=http;host="front.example:8080"'
        assert not echo.requests[-1].has("X-Forwarded-For")

    async def test_both(self, proxy, echo):
        running = await proxy(echo.url, forwarded="both")
        await running.get("/x")
        assert echo.requests[-1].has("Forwarded")
        assert echo.requests[-1].has("X-Forwarded-For")

    async def test_none_adds_nothing_and_still_believes_nobody(self, proxy, echo):
        running = await proxy(echo.url, forwarded=None)
        await running.get("/x", [("X-Forwarded-For", "192.0.2.7")])
        assert not [name for name in echo.requests[-1].names if "forwarded" in name]

    async def test_via(self, proxy, echo):
        running = await proxy(echo.url)
        await running.get("/x", [("Via", "1.0 fred")])
        assert ", ".join(echo.requests[-1].all("Via")) == "1.0 fred, 1.1 tornado_proxy"


class TestHost:
    """Behaviour 22: Host is the upstream's, without the default port of its scheme."""

    @pytest.mark.parametrize(
        ("url", "host"),
        [
            ("http://example.com", "example.com"),
            ("http://example.com:80/base", "example.com"),
            ("http://example.com:8080", "example.com:8080"),
            ("http://example.com:443", "example.com:443"),
            ("http://[::1]:8080", "[::1]:8080"),
        ],
    )
    async def test_http(self, proxy, tmp_path, url, host):
        async with EchoUpstream(unix_socket=tmp_path / "upstream") as echo:
            running = await proxy(url, client_options={"unix_socket": str(tmp_path / "upstream")})
            assert (await running.get("/x", [("Host", "front.example")])).status == 200
            assert echo.requests[-1].all("Host") == [host]

    @pytest.mark.parametrize(
        ("url", "origin"),
        [
            ("https://example.com", "https://example.com"),
            ("https://example.com:443", "https://example.com"),
            ("https://example.com:80", "https://example.com:80"),
        ],
    )
    async def test_https(self, proxy, url, origin):
        requests = []

        def rewrite_request(handler, request):
            requests.append(request)
            handler.finish()

        running = await proxy(url, rewrite_request=rewrite_request)
        await running.get("/x", [("Host", "front.example")])
        assert requests[0].url == f"{origin}/x"
        assert requests[0].headers.get("Host", origin[8:]) == origin[8:]


class TestPreserveHost:
    """Behaviour 23: preserve_host_header passes the downstream's Host verbatim, whatever a normaliser says."""

    @pytest.mark.parametrize("host", ["front.example", "front.example:8080", "FRONT.example:80", "127.0.0.1"])
    async def test_verbatim(self, proxy, echo, host):
        running = await proxy(echo.url, preserve_host_header=True)
        await running.get("/x", [("Host", host)])
        assert echo.requests[-1].all("Host") == [host]

    @pytest.mark.parametrize("preserve", [True, False])
    async def test_it_is_set_after_normalisation(self, proxy, echo, preserve):
        def normalize(pairs):
            return [pair for pair in pairs if pair[0].lower() != "host"] + [("Host", "evil.example")]

        running = await proxy(echo.url, preserve_host_header=preserve, normalize_headers=normalize)
        await running.get("/x", [("Host", "front.example")])
        assert echo.requests[-1].all("Host") == ["front.example" if preserve else f"127.0.0.1:{echo.port}"]


class OptionsClient(HTTPClient):
    """Remembers what it was constructed with, and connects to nothing."""

    given = ()

    def __init__(self, **options):
        type(self).given = options

    async def send(self, request):
        raise ConnectError("not even tried")

    def close(self):
        pass


class TestClientOptions:
    """Behaviour 24: client_options reach the client unchanged; what it does not know is an error at start-up."""

    async def test_they_reach_the_curl_client(self, proxy, tmp_path):
        async with EchoUpstream(unix_socket=tmp_path / "upstream") as echo:
            running = await proxy("http://example.com", client_options={"unix_socket": str(tmp_path / "upstream")})
            assert (await running.get("/x")).status == 200
            assert len(echo.requests) == 1

    async def test_two_mounts_do_not_share_them(self, proxy, echo, tmp_path):
        async with EchoUpstream(unix_socket=tmp_path / "upstream") as other:
            running = await proxy.app(
                [
                    mount("/a", echo.url, client_options={"unix_socket": str(tmp_path / "upstream")}),
                    mount("/b", echo.url),
                ]
            )
            await running.get("/a")
            await running.get("/b")
            assert (len(other.requests), len(echo.requests)) == (1, 1)

    async def test_they_reach_a_class(self, proxy, echo, expect_log):
        expect_log("not even tried")
        options = {"anything": ["at", "all"]}
        running = await proxy(echo.url, client=OptionsClient, client_options=options)
        assert (await running.get("/x")).status == 502
        assert OptionsClient.given == {"anything": ["at", "all"]}

    @pytest.mark.parametrize(
        "options", [{"no_such_option": 1}, {"http_version": "0.9"}, {"ca_certs": "/no/such/file"}, {"max_clients": 0}]
    )
    def test_a_wrong_one_is_named(self, options):
        with pytest.raises(OptionError, match=rf"client_options.*{next(iter(options))}"):
            mount("/", "http://127.0.0.1", client_options=options)
