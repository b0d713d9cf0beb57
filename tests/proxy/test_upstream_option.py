"""Where requests go and how an exchange is set up: ``upstream``, ``client``, and what is wrong at start-up."""

import pytest
from tornado.httputil import HTTPHeaders
from tornado.web import HTTPError

from tornado_proxy import ProxyHandler, mount
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.flow import BodyPipe
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.options import OptionError

URL = "http://127.0.0.1:9000"
MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])


class NamedClient(HTTPClient):
    """Answers by itself, with its own name."""

    def __init__(self, name: str = "class") -> None:
        self.name = name

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        body = self.name.encode()
        stream = BodyPipe(1024, len(body))
        stream.write(body)
        stream.close()
        headers = HTTPHeaders({"Content-Length": str(len(body))})
        return UpstreamResponse(status=200, reason="OK", headers=headers, stream=stream, upstream="http://named")

    def close(self) -> None:
        pass


class TestUpstreamIsRequired:
    """Behaviour 1: without an upstream nothing is built, and the error names the option."""

    def test_mount_without_upstream(self):
        with pytest.raises(OptionError, match=r'mount\("/api"\).*upstream'):
            mount("/api")

    @pytest.mark.parametrize("nothing", [None, "", 42])
    def test_mount_with_something_else(self, nothing):
        with pytest.raises(OptionError, match=r'mount\("/api"\).*upstream'):
            mount("/api", nothing)

    def test_an_option_error_is_a_value_error(self):
        assert issubclass(OptionError, ValueError)

    async def test_tornados_own_spelling_without_upstream(self, proxy, expect_log):
        with expect_log("upstream"):
            running = await proxy.app([(r"/foo(/.*)?", ProxyHandler, {"response_mode": "buffer"})])
            response = await running.get("/foo/x")
        assert response.status == 500
        assert b"upstream" not in response.body


class TestUpstreamForms:
    """Behaviour 2: a URL, or a function of nothing or of the handler, evaluated for every request."""

    async def test_a_url(self, proxy, echo):
        running = await proxy(echo.url)
        assert (await running.get("/x")).status == 200
        assert echo.requests[-1].target == "/x"

    async def test_a_function_of_nothing(self, proxy, echo):
        running = await proxy(lambda: f"{echo.url}/base")
        await running.get("/x")
        assert echo.requests[-1].target == "/base/x"

    async def test_a_function_of_the_handler(self, proxy, echo):
        running = await proxy(lambda handler: f"{echo.url}/{handler.request.headers['X-Tenant']}")
        await running.get("/x", [("X-Tenant", "blue")])
        assert echo.requests[-1].target == "/blue/x"

    async def test_an_async_function_of_nothing(self, proxy, echo):
        async def choose():
            return f"{echo.url}/later"

        running = await proxy(choose)
        await running.get("/x")
        assert echo.requests[-1].target == "/later/x"

    async def test_an_async_function_of_the_handler(self, proxy, echo):
        async def choose(handler):
            return f"{echo.url}/{handler.get_query_argument('t')}"

        running = await proxy(choose)
        await running.get("/x?t=red")
        assert echo.requests[-1].target == "/red/x?t=red"

    async def test_a_callable_object(self, proxy, echo):
        class Choose:
            def __call__(self, handler):
                return f"{echo.url}/object"

        running = await proxy(Choose())
        await running.get("/x")
        assert echo.requests[-1].target == "/object/x"

    async def test_the_hook_of_a_subclass(self, proxy, echo):
        class Choosing(ProxyHandler):
            async def choose_upstream(self):
                return f"{echo.url}/{self.request.headers['X-Tenant']}"

        running = await proxy(URL, Choosing)
        await running.get("/x", [("X-Tenant", "green")])
        assert echo.requests[-1].target == "/green/x"

    async def test_it_is_evaluated_for_every_request_of_a_connection(self, proxy, echo):
        calls = []

        def choose():
            calls.append(None)
            return f"{echo.url}/{len(calls)}"

        running = await proxy(choose)
        async with await running.connect() as downstream:
            for _ in range(3):
                await downstream.exchange("GET", "/x")
        assert [request.target for request in echo.requests] == ["/1/x", "/2/x", "/3/x"]

    async def test_it_may_refuse_by_raising(self, proxy, upstream):
        def choose(handler):
            raise HTTPError(403)

        running = await proxy(choose)
        assert (await running.get("/x")).status == 403
        assert upstream.accepted == 0

    async def test_it_may_answer_by_itself(self, proxy, upstream):
        def choose(handler):
            handler.set_status(202)
            handler.finish(b"mine")
            return upstream.url

        running = await proxy(choose)
        response = await running.get("/x")
        assert (response.status, response.body) == (202, b"mine")
        assert upstream.accepted == 0

    @pytest.mark.parametrize("url", ["", "localhost:9000", "ftp://127.0.0.1/", None])
    async def test_a_function_that_returns_no_upstream_is_our_fault(self, proxy, expect_log, url):
        with expect_log("upstream"):
            running = await proxy(lambda: url)
            assert (await running.get("/x")).status == 500

    @pytest.mark.parametrize("choose", [lambda a, b: URL, lambda *, upstream: URL])
    def test_a_function_of_more_is_an_error_at_start_up(self, choose):
        with pytest.raises(OptionError, match="upstream"):
            mount("/", choose)


class TestUpstreamURLs:
    """Behaviour 3: scheme and host are required; ``//host`` takes the inbound scheme and that scheme's default port."""

    @staticmethod
    async def url_requested(proxy, upstream, **server_options):
        """Return the URL that would be requested; nothing is sent."""
        urls = []

        def rewrite_request(handler, request):
            urls.append(request.url)
            handler.finish()

        running = await proxy(upstream, rewrite_request=rewrite_request, server_options=server_options)
        assert (await running.get("/x")).status == 200
        return urls.pop()

    async def test_all_of_it(self, proxy):
        url = await self.url_requested(proxy, "https://example.com:8443/base?key=1")
        assert url == "https://example.com:8443/base/x?key=1"

    async def test_without_scheme_it_takes_the_inbound_one_and_its_default_port(self, proxy):
        assert await self.url_requested(proxy, "//example.com/base") == "http://example.com/base/x"
        assert await self.url_requested(proxy, "//example.com/base", protocol="https") == "https://example.com/base/x"

    async def test_without_scheme_its_port_is_kept(self, proxy, echo):
        running = await proxy(f"//127.0.0.1:{echo.port}/base")
        await running.get("/x")
        assert echo.requests[-1].target == "/base/x"

    @pytest.mark.parametrize(
        "wrong",
        [
            "example.com",
            "localhost:9000",
            "/path",
            "http://",
            "http:///path",
            "//",
            "ftp://example.com",
            "http://user:secret@example.com",
            "http://example.com/#fragment",
            "http://example.com:port",
            "http://example.com:99999",
            "http://exa mple.com",
            "http://example.com/\r\nX-Injected: 1",
        ],
    )
    def test_what_names_no_upstream_is_an_error_at_start_up(self, wrong):
        with pytest.raises(OptionError, match=r'mount\("/api"\).*upstream') as caught:
            mount("/api", wrong)
        assert "secret" not in str(caught.value)

    def test_the_error_says_the_cure(self):
        with pytest.raises(OptionError, match="http://localhost:9000"):
            mount("/api", "localhost:9000")

    async def test_a_proxy_that_is_its_own_upstream_stops(self, proxy, expect_log):
        expect_log("", required=False)
        running = await proxy(lambda: running.url)
        assert (await running.get("/x")).status == 508


class TestDefaults:
    """Behaviour 4: what holds when nothing is said, and that nothing unknown is accepted."""

    async def test_defaults(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x", [("Host", "front.example"), ("X-Name", "as It came")])
        conn, request = await upstream.request()
        # preserve_host_header is off, normalize_headers does nothing.
        assert request.header("Host") == f"127.0.0.1:{upstream.port}"
        assert request.header("X-Name") == "as It came"
        # response_mode is "stream": the head passes while the body is still to come.
        await conn.send_head(404, [("Content-Length", "4")])
        assert (await downstream.read_head()).status == 404
        # status_callbacks and error_callback do nothing.
        await conn.send(b"body")
        assert await downstream.read_body() == b"body"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("no_such_option", 1),
            ("response_mode", "sometimes"),
            ("stream_headers_mode", "append"),
            ("buffer_headers_mode", None),
            ("normalize_headers", "lower"),
            ("preserve_host_header", "yes"),
            ("custom_http_methods", "PURGE"),
            ("custom_http_methods", ["NOT A TOKEN"]),
            ("status_callbacks", [404]),
            ("status_callbacks", {"40x": print}),
            ("status_callbacks", {99: print}),
            ("status_callbacks", {404: "not found"}),
            ("client", 42),
            ("client_options", ["a"]),
            ("on_done", "log"),
            ("retries", -1),
            ("connect_timeout", 0),
            ("idle_timeout", "60"),
            ("buffer_size", 0),
            ("forwarded", "x-real-ip"),
            ("trusted_proxies", ["not a network"]),
            ("via", "two words"),
        ],
    )
    def test_an_error_at_start_up_names_mount_and_option(self, name, value):
        with pytest.raises(OptionError, match=rf'mount\("/api"\).*{name}'):
            mount("/api", URL, **{name: value})


class TestStatusCallbacksInBothModes:
    """Behaviour 5: the seed refused status_callbacks with the buffer mode; ours calls them in both."""

    @MODES
    async def test_it_is_called(self, proxy, upstream, mode):
        def not_found(handler, response):
            handler.set_status(410)
            handler.finish(b"gone")

        running = await proxy(upstream.url, response_mode=mode, status_callbacks={404: not_found})
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(404, body=b"missing")
        response = await downstream.read_response()
        assert (response.status, response.body) == (410, b"gone")


class TestUnusableClient:
    """Behaviour 6: a client that cannot be loaded or used is an error at start-up."""

    @pytest.mark.parametrize("client", ["netscape", 42, object(), ProxyHandler])
    def test_no_client(self, client):
        with pytest.raises(OptionError, match="client"):
            mount("/", URL, client=client)


class TestClientPrecedence:
    """Behaviour 7: the mount's client beats the application's, which beats the default."""

    async def test_the_default(self, proxy, echo):
        running = await proxy(echo.url)
        await running.get("/x")
        assert len(echo.requests) == 1

    async def test_the_applications_beats_the_default(self, proxy, echo):
        running = await proxy(echo.url, app_settings={"proxy_client": NamedClient("application")})
        assert (await running.get("/x")).body == b"application"
        assert echo.accepted == 0

    async def test_the_mounts_beats_the_applications(self, proxy, echo):
        settings = {"proxy_client": NamedClient("application")}
        running = await proxy(echo.url, client=NamedClient("mount"), app_settings=settings)
        assert (await running.get("/x")).body == b"mount"

    async def test_a_class(self, proxy, echo):
        running = await proxy(echo.url, client=NamedClient)
        assert (await running.get("/x")).body == b"class"

    async def test_by_name_over_the_applications(self, proxy, echo):
        running = await proxy(echo.url, client="curl", app_settings={"proxy_client": NamedClient("application")})
        await running.get("/x")
        assert len(echo.requests) == 1


def observe(error):
    """An error callback that is a constant, so that it can stand in a tuple."""


class TestErrorCallbackForms:
    """Behaviour 8: an error_callback that cannot be called is an error at start-up."""

    @pytest.mark.parametrize(
        "wrong",
        [
            42,
            "report",
            (),
            (observe,),
            (observe, "args"),
            ("observe", []),
            (observe, [], "more"),
            lambda: None,
            lambda a, b, c: None,
            (lambda: None, []),
            (observe, ["one", "two"]),
            lambda error, *, needed: None,
        ],
    )
    def test_a_wrong_one(self, wrong):
        with pytest.raises(OptionError, match=r'mount\("/api"\).*error_callback'):
            mount("/api", URL, error_callback=wrong)

    @pytest.mark.parametrize(
        "right",
        [
            None,
            observe,
            lambda error, handler: None,
            lambda *args: None,
            lambda error, handler=None: None,
            (observe, []),
            (observe, ()),
            (lambda tag, error: None, ["tag"]),
            (lambda tag, error, handler: None, ["tag"]),
        ],
    )
    def test_a_right_one(self, right):
        mount("/api", URL, error_callback=right)
