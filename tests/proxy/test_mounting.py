"""The proxy inside an application of any shape: routers, hosts, and settings that are meant for other handlers."""

from __future__ import annotations

import gc
import gzip
import zlib

import pytest
from tornado.routing import AnyMatches, HostMatches, PathMatches, ReversibleRuleRouter, Rule, RuleRouter
from tornado.web import Application, RequestHandler

from tornado_proxy import ProxyHandler, mount

# A GzipFile that Tornado did not finish, as its response broke, complains when it is collected: under -X dev, and since
# Python 3.13. `finished` sees to it that this is not in the middle of another test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TEXT = b"a line that compresses well\n" * 200
SETTINGS = {"xsrf_cookies": True, "cookie_secret": "s", "compress_response": True, "default_host": "main.example"}


class Other(RequestHandler):
    """A neighbour in the same application."""

    def get(self, *args: str) -> None:
        self.finish("other")

    def post(self) -> None:
        self.finish("other")


def by_mount(upstream, prefix="/foo", **options):
    return mount(prefix, upstream, **options)


def by_tuple(upstream, prefix="/foo", **options):
    return (rf"{prefix}(/.*)?", ProxyHandler, {"upstream": upstream, **options})


SPELLINGS = pytest.mark.parametrize("spelled", [by_mount, by_tuple], ids=["mount", "tuple"])


def applications(spelled, upstream):
    """Return how an application may hold the proxy at ``/foo``: by name, a function that makes its rules."""
    rule = spelled(upstream)
    neighbour = (r"/foo/.*", Other)
    return {
        "alone": lambda: [rule],
        "behind others": lambda: [(r"/other", Other), (r"/fo", Other), rule, neighbour],
        "under a host": lambda: [(HostMatches(r"api\.example"), [rule, neighbour]), neighbour],
        "under the second of two hosts": lambda: [
            (HostMatches(r"www\.example"), [neighbour]),
            (HostMatches(r".*\.example"), [rule]),
        ],
        "behind a host that has other paths": lambda: [(HostMatches(r"api\.example"), [(r"/other", Other)]), rule],
        "under any": lambda: [(AnyMatches(), [rule])],
        "under a path": lambda: [(PathMatches(r"/foo.*"), [rule])],
        "under a path with a group": lambda: [(PathMatches(r"/(f)oo.*"), [(r"/other", Other), rule])],
        "three deep": lambda: [
            (HostMatches(r"nobody"), [neighbour]),
            (HostMatches(r"api\.example"), [(PathMatches(r"/foo.*"), [(AnyMatches(), [rule])])]),
        ],
        "an application in a router": lambda: [
            Rule(AnyMatches(), RuleRouter([Rule(HostMatches(r"api\.example"), Application([rule]))]))
        ],
        "an application in a reversible router": lambda: [
            Rule(
                PathMatches(r"/foo.*"),
                ReversibleRuleRouter(
                    [
                        Rule(PathMatches(r"/other"), Application([neighbour])),
                        Rule(AnyMatches(), Application([(HostMatches(r"api\.example"), [rule])]), name="api"),
                    ]
                ),
            )
        ],
    }


SHAPES = pytest.mark.parametrize("shape", list(applications(by_mount, "http://u")))
HOST = [("Host", "api.example")]


class TestRouters:
    """Whatever router leads to the proxy, tail and prefix are those of its own rule."""

    @SHAPES
    @SPELLINGS
    @pytest.mark.parametrize(
        ("inbound", "outbound"),
        [
            ("/foo", "/bar"),
            ("/foo/", "/bar/"),
            ("/foo/a%2Fb//c/?x=%20&y", "/bar/a%2Fb//c/?x=%20&y"),
            ("/foo/foo", "/bar/foo"),
        ],
    )
    async def test_the_tail_is_the_raw_path_below_the_prefix(self, proxy, echo, shape, spelled, inbound, outbound):
        running = await proxy.app(applications(spelled, f"{echo.url}/bar")[shape]())
        response = await running.get(inbound, HOST)
        assert response.status == 200, response
        assert echo.requests[-1].start_line == f"GET {outbound} HTTP/1.1"
        assert echo.requests[-1].header("X-Forwarded-Prefix") == "/foo"

    @SHAPES
    @SPELLINGS
    async def test_references_come_back_under_the_prefix(self, proxy, upstream, shape, spelled):
        async def redirect(conn, request):
            fields = [("Location", "/bar/next"), ("Set-Cookie", "a=b; Path=/bar/in"), ("Content-Length", "0")]
            await conn.respond(302, fields)

        upstream.serve(redirect)
        running = await proxy.app(applications(spelled, f"{upstream.url}/bar")[shape]())
        response = await running.get("/foo/x", HOST)
        assert response.header("Location") == "/foo/next"
        assert response.header("Set-Cookie") == "a=b; Path=/foo/in"

    @SPELLINGS
    async def test_the_first_rule_that_matches_wins_also_among_proxies(self, proxy, upstream, echo, spelled):
        running = await proxy.app(
            [
                (HostMatches(r"api\.example"), [spelled(upstream.url, "/only-there")]),
                spelled(f"{echo.url}/long", "/foo/long"),
                spelled(f"{echo.url}/short", "/foo"),
            ]
        )
        await running.get("/foo/long/x", HOST)
        await running.get("/foo/longer/x", HOST)
        assert [request.target for request in echo.requests] == ["/long/x", "/short/longer/x"]
        assert upstream.accepted == 0

    async def test_any_forwards_the_whole_path(self, proxy, echo):
        running = await proxy.app([Rule(AnyMatches(), ProxyHandler, {"upstream": f"{echo.url}/bar"})])
        assert (await running.get("/a%2Fb//c?x")).status == 200
        assert echo.requests[-1].target == "/bar/a%2Fb//c?x"
        assert not echo.requests[-1].has("X-Forwarded-Prefix")

    @pytest.mark.parametrize(
        ("pattern", "inbound", "outbound", "prefix"),
        [
            (r"/foo/.*", "/foo/a%2Fb?x", "/bar/foo/a%2Fb?x", None),
            (r"/foo(?P<rest>/.*)", "/foo/a%2Fb?x", "/bar/a%2Fb?x", "/foo"),
            (r"/foo/(.*)", "/foo/a%2Fb?x", "/bar/a%2Fb?x", "/foo"),
            (r"/(?:foo|fuu)(/.*)?", "/fuu", "/bar", "/fuu"),
            (r"/foo(/\d+)?(?:/)?", "/foo/7/", "/bar/7", None),
            (r"(/.*)", "/foo/x", "/bar/foo/x", None),
        ],
    )
    async def test_the_first_group_is_the_tail(self, proxy, echo, pattern, inbound, outbound, prefix):
        running = await proxy.app([Rule(PathMatches(pattern), ProxyHandler, {"upstream": f"{echo.url}/bar"})])
        assert (await running.get(inbound)).status == 200
        assert echo.requests[-1].target == outbound
        assert echo.requests[-1].header("X-Forwarded-Prefix") == prefix

    async def test_a_group_in_the_middle_that_equals_the_end_is_not_taken_for_it(self, proxy, echo):
        running = await proxy.app([(r"/users/(\d+)/files/\d+", ProxyHandler, {"upstream": f"{echo.url}/bar"})])
        assert (await running.get("/users/7/files/7")).status == 200
        assert echo.requests[-1].target == "/bar/7"
        assert not echo.requests[-1].has("X-Forwarded-Prefix")

    @pytest.mark.parametrize("rule", ["any", "no group"])
    async def test_references_come_back_where_the_whole_path_is_forwarded(self, proxy, upstream, rule):
        async def redirect(conn, request):
            await conn.respond(302, [("Location", "/bar/foo/next")])

        upstream.serve(redirect)
        matcher = AnyMatches() if rule == "any" else PathMatches(r"/foo/.*")
        running = await proxy.app([Rule(matcher, ProxyHandler, {"upstream": f"{upstream.url}/bar"})])
        assert (await running.get("/foo/x")).header("Location") == "/foo/next"

    @pytest.mark.parametrize("rule", ["mount", "any", "group"])
    async def test_a_whole_url_as_the_request_target_is_its_path(self, proxy, echo, rule):
        upstream = f"{echo.url}/bar"
        rules = {
            "mount": mount("/", upstream),
            "any": Rule(AnyMatches(), ProxyHandler, {"upstream": upstream}),
            "group": (r"(.*)", ProxyHandler, {"upstream": upstream}),
        }
        running = await proxy.app([rules[rule]])
        assert (await running.get("http://api.example/a%2Fb?x")).status == 200
        assert echo.requests[-1].target == "/bar/a%2Fb?x"


class TestNames:
    async def test_a_mount_can_be_reversed_through_its_routers(self, proxy, echo):
        running = await proxy.app([(HostMatches(r"api\.example"), [mount("/foo", echo.url, name="api")])])
        assert running.app.reverse_url("api") == "/foo"
        assert running.app.reverse_url("api", "/x") == "/foo/x"


class TestAddHandlers:
    """``Application.add_handlers``, before or after the server has started."""

    @SPELLINGS
    async def test_belongs_to_its_host(self, proxy, echo, spelled):
        running = await proxy.app([(r"/.*", Other)])
        running.app.add_handlers(r"api\.example", [spelled(f"{echo.url}/bar")])
        assert (await running.get("/foo/a%2Fb?x", HOST)).status == 200
        assert (echo.requests[-1].target, echo.requests[-1].header("X-Forwarded-Prefix")) == ("/bar/a%2Fb?x", "/foo")
        assert (await running.get("/foo/a", [("Host", "www.example")])).body == b"other"
        assert len(echo.requests) == 1

    @SPELLINGS
    async def test_of_the_default_host_takes_what_names_another(self, proxy, echo, spelled):
        running = await proxy.app([], app_settings={"default_host": "main.example"})
        running.app.add_handlers(r"main\.example", [spelled(f"{echo.url}/bar")])
        for host in ("main.example", "unheard-of.example"):
            assert (await running.get("/foo/a%2Fb", [("Host", host)])).status == 200
            request = echo.requests[-1]
            assert (request.target, request.header("X-Forwarded-Prefix")) == ("/bar/a%2Fb", "/foo")
            assert request.header("X-Forwarded-Host") == host
        # Tornado does not do so behind a load balancer.
        assert (await running.get("/foo/a", [("Host", "unheard-of.example"), ("X-Real-Ip", "10.0.0.1")])).status == 404


@pytest.fixture(autouse=True)
def finished():
    yield
    for found in gc.get_objects():
        # Since Python 3.12 it holds itself, and outlives Tornado's transform.
        if type(found) is gzip.GzipFile:
            found.close()


@pytest.fixture(params=["stream", "buffer"])
def mode(request):
    return request.param


@pytest.fixture
async def settled(proxy, upstream, mode, request, expect_log):
    """A proxy in an application that has every setting which other handlers heed, beside such a handler."""
    expect_log("'_xsrf' argument missing from POST")
    spelled = request.param
    running = await proxy.app(
        lambda running: [
            (r"/other", Other),
            spelled(f"{upstream.url}/bar", response_mode=mode, on_done=running.record()),
        ],
        app_settings=SETTINGS,
    )
    # The settings are in force.
    assert (await running.request("POST", "/other", body=b"")).status == 403
    return running


BOTH = pytest.mark.parametrize("settled", [by_mount, by_tuple], ids=["mount", "tuple"], indirect=True)
ACCEPTED = [("Accept-Encoding", "gzip")]


@BOTH
class TestXsrfCookies:
    async def test_is_the_upstreams_business(self, settled, upstream):
        downstream = await settled.ask("POST", "/foo/form?x", [("Cookie", "_xsrf=theirs")], b"a=b")
        conn, request = await upstream.request()
        assert request.start_line == "POST /bar/form?x HTTP/1.1"
        assert (request.body, request.header("Cookie")) == (b"a=b", "_xsrf=theirs")
        await conn.respond(201, [("Set-Cookie", "_xsrf=other")], b"made")
        response = await downstream.read_response()
        assert (response.status, response.body, response.header("Set-Cookie")) == (201, b"made", "_xsrf=other")

    @pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
    async def test_of_every_method(self, settled, upstream, method):
        downstream = await settled.ask(method, "/foo/x", body=b"abc")
        conn, request = await upstream.request()
        assert (request.start_line, request.body) == (f"{method} /bar/x HTTP/1.1", b"abc")
        await conn.respond(204)
        assert not (await downstream.read_response()).has("Set-Cookie")


@BOTH
class TestCompressResponse:
    """The application may compress what is not compressed; it never does so twice, or breaks a message's framing."""

    async def test_what_is_compressed_passes_byte_for_byte(self, settled, upstream):
        body = gzip.compress(TEXT)
        downstream = await settled.ask("GET", "/foo/x", ACCEPTED)
        conn, request = await upstream.request()
        assert request.header("Accept-Encoding") == "gzip"
        await conn.respond(200, [("Content-Type", "text/plain"), ("Content-Encoding", "gzip")], body)
        response = await downstream.read_response()
        assert (response.body, response.header("Content-Encoding")) == (body, "gzip")
        assert response.header("Content-Length") == str(len(body))

    async def test_what_is_no_text_passes_byte_for_byte(self, settled, upstream):
        downstream = await settled.ask("GET", "/foo/x", ACCEPTED)
        conn, _ = await upstream.request()
        await conn.respond(200, [("Content-Type", "image/png")], TEXT)
        response = await downstream.read_response()
        assert (response.body, response.content_length) == (TEXT, len(TEXT))
        assert not response.has("Content-Encoding")

    async def test_nothing_is_compressed_for_who_does_not_ask(self, settled, upstream):
        downstream = await settled.ask("GET", "/foo/x")
        conn, _ = await upstream.request()
        await conn.respond(200, [("Content-Type", "text/plain")], TEXT)
        response = await downstream.read_response()
        assert (response.body, response.content_length) == (TEXT, len(TEXT))

    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    async def test_text_is_compressed_and_framed_anew(self, settled, upstream, framing):
        downstream = await settled.ask("GET", "/foo/x", ACCEPTED)
        conn, _ = await upstream.request()
        fields = [("Content-Type", "text/plain; charset=utf-8")]
        if framing == "length":
            await conn.respond(200, fields, TEXT)
        elif framing == "chunked":
            await conn.send_head(200, [*fields, ("Transfer-Encoding", "chunked")])
            for start in range(0, len(TEXT), 1000):
                await conn.send_chunk(TEXT[start : start + 1000])
            await conn.send_chunk(b"")
        else:
            await conn.send_head(200, [*fields, ("Connection", "close")])
            await conn.send(TEXT)
            conn.close()
        response = await downstream.read_response()
        assert response.complete
        assert not response.until_close
        assert response.header("Content-Encoding") == "gzip"
        assert "Accept-Encoding" in response.header("Vary")
        assert gzip.decompress(response.body) == TEXT
        # The connection is in step.
        await downstream.request("GET", "/foo/y")
        conn, _ = (conn, await conn.read_request()) if framing != "close" else await upstream.request()
        await conn.respond(200, body=b"next")
        assert (await downstream.read_response()).body == b"next"

    @pytest.mark.parametrize("status", [204, 304])
    @pytest.mark.parametrize("method", ["HEAD", "GET"])
    async def test_a_response_without_a_body_gets_none(self, settled, upstream, status, method):
        downstream = await settled.ask(method, "/foo/x", ACCEPTED)
        conn, _ = await upstream.request()
        await conn.respond(status, [("Content-Type", "text/plain"), ("ETag", '"1"')])
        response = await downstream.read_response()
        assert (response.status, response.body) == (status, b"")
        assert not response.has("Transfer-Encoding")
        await downstream.request("GET", "/foo/y")
        await conn.read_request()
        await conn.respond(200, body=b"next")
        response = await downstream.read_response()
        assert (response.start_line, response.body) == ("HTTP/1.1 200 OK", b"next")

    async def test_of_the_answer_to_head_nothing_but_the_head_is_sent(self, settled, upstream):
        downstream = await settled.ask("HEAD", "/foo/x", ACCEPTED)
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Type", "text/plain"), ("Content-Length", "5600")])
        assert (await downstream.read_response()).body == b""
        await downstream.request("GET", "/foo/y")
        await conn.read_request()
        await conn.respond(200, body=b"next")
        assert (await downstream.read_response()).body == b"next"

    async def test_a_range_is_left_alone(self, settled, upstream):
        downstream = await settled.ask("GET", "/foo/x", [*ACCEPTED, ("Range", "bytes=0-4")])
        conn, _ = await upstream.request()
        await conn.respond(206, [("Content-Type", "text/plain"), ("Content-Range", "bytes 0-4/9")], b"01234")
        response = await downstream.read_response()
        assert (response.status, response.body, response.content_length) == (206, b"01234", 5)
        assert not response.has("Content-Encoding")


class TestCompressedStreams:
    @SPELLINGS
    async def test_each_chunk_passes_at_once_compressed(self, proxy, upstream, spelled):
        """The upstream holds the second event until the test has unpacked the first."""
        running = await proxy.app([spelled(upstream.url)], app_settings=SETTINGS)
        downstream = await running.ask("GET", "/foo/events", ACCEPTED)
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
        head = await downstream.read_head()
        assert head.header("Content-Encoding") == "gzip"
        unpack = zlib.decompressobj(wbits=31)
        for event in (b"data: one\n\n", b"data: two\n\n"):
            await conn.send_chunk(event)
            seen = b""
            while len(seen) < len(event):
                seen += unpack.decompress(await downstream.read_chunk())
            assert seen == event
        await conn.send_chunk(b"")
        assert unpack.decompress(await downstream.read_body()) == b""
        assert unpack.eof

    @SPELLINGS
    async def test_a_response_that_breaks_ends_broken(self, proxy, upstream, spelled, expect_log):
        expect_log("/foo/x")
        running = await proxy.app([spelled(upstream.url)], app_settings=SETTINGS)
        downstream = await running.ask("GET", "/foo/x", ACCEPTED)
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Type", "text/plain"), ("Content-Length", "10000")])
        await conn.send(TEXT)
        await downstream.read_head()
        conn.close()
        response_ended = await downstream.closed()
        assert response_ended in ("end", "reset")
        assert b"0\r\n\r\n" not in await downstream.read_until_closed()
