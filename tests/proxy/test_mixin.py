"""``await self.proxy(...)`` in handlers of any kind: what is forwarded, and that their bases stay as they are."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref

import pytest
from tornado.web import HTTPError, RequestHandler, authenticated, stream_request_body

from tests.support.websocket import ASK, GRANT
from tornado_proxy import OptionError, ProxyHandler, ProxyMixin
from tornado_proxy.mixin import _known


def seen(response):
    """Return what the echo upstream saw."""
    assert response.status == 200, response.raw
    return json.loads(response.body)


def forwarding(upstream, base=RequestHandler, method="get", **options):
    """Return a handler that forwards in ``method``, which is its own."""

    class Forwarding(ProxyMixin, base):
        async def forward(self, *args):
            await self.proxy(upstream, **options)

    setattr(Forwarding, method, Forwarding.forward)
    return Forwarding


class TestWhatIsForwarded:
    async def test_the_whole_raw_path_and_query_by_default(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url + "/base"))])
        request = seen(await running.get("/a%2Fb//c;d?x=1&x=2"))
        assert request["target"] == "/base/a%2Fb//c;d?x=1&x=2"

    @pytest.mark.parametrize(
        ("path", "target"),
        [("/x%2Fy", "/base/x%2Fy?q"), ("x", "/base/x?q"), ("", "/base?q"), ("/", "/base/?q"), ("//x", "/base//x?q")],
    )
    async def test_path_in_place_of_it(self, proxy, echo, path, target):
        running = await proxy.app([("/.*", forwarding(echo.url + "/base", path=path))])
        assert seen(await running.get("/a/b?q"))["target"] == target

    @pytest.mark.parametrize("path", ["/a b", "/x?y", "/x#y", "/\u20ac", "/a\r\nb", 7])
    async def test_a_path_that_is_not_raw_is_refused(self, proxy, echo, expect_log, path):
        expect_log("is not raw; percent-encode it")
        running = await proxy.app([("/.*", forwarding(echo.url, path=path))])
        assert (await running.get("/a")).status == 500
        assert echo.accepted == 0

    async def test_a_path_that_leaves_the_base_is_refused(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url + "/base", path="/../x"))])
        assert (await running.get("/a")).status == 400
        assert echo.accepted == 0

    @pytest.mark.parametrize(
        ("target", "path", "prefix"),
        [("/p/x/y", "/x/y", "/p"), ("/p/x/y", "y", "/p/x"), ("/p/", "/", "/p"), ("/p", "", "/p"), ("/p/x", "/z", None)],
    )
    async def test_what_stands_before_path_is_the_prefix(self, proxy, upstream, target, path, prefix):
        running = await proxy.app([("/.*", forwarding(upstream.url + "/base", path=path))])
        downstream = await running.ask("GET", target)
        conn, request = await upstream.request()
        assert request.header("X-Forwarded-Prefix") == prefix
        await conn.respond(302, [("Location", "/base/next")])
        location = (await downstream.read_response()).header("Location")
        assert location == ("/base/next" if prefix is None else f"{prefix}/next")

    async def test_a_body_that_was_read(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url, method="post"))])
        request = seen(await running.request("POST", "/", [], b"a=1" * 1000))
        assert request["body"] == "a=1" * 1000
        assert ["Content-Length", "3000"] in request["headers"]

    async def test_a_chunked_body_that_was_read_goes_with_its_length(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url, method="post"))])
        request = seen(await running.request("POST", "/", [("Transfer-Encoding", "chunked")], b"3\r\nabc\r\n0\r\n\r\n"))
        assert request["body"] == "abc"
        assert ["Content-Length", "3"] in request["headers"]

    async def test_an_empty_body_that_was_announced(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url, method="post"))])
        request = seen(await running.request("POST", "/", [], b""))
        assert ["Content-Length", "0"] in request["headers"]

    async def test_a_body_that_the_handler_has_set(self, proxy, echo):
        class Setting(ProxyMixin, RequestHandler):
            async def post(self):
                self.request.body = b"mine"
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Setting)])
        assert seen(await running.request("POST", "/", [], b"theirs"))["body"] == "mine"

    async def test_form_arguments_can_be_looked_at_first(self, proxy, echo):
        class Looking(ProxyMixin, RequestHandler):
            async def post(self):
                await self.proxy(echo.url, path="/" + self.get_body_argument("to"))

        running = await proxy.app([("/.*", Looking)])
        form = [("Content-Type", "application/x-www-form-urlencoded")]
        request = seen(await running.request("POST", "/", form, b"to=here"))
        assert (request["target"], request["body"]) == ("/here", "to=here")

    async def test_a_method_that_is_not_forwarded_is_501(self, proxy, echo):
        base = type("Dav", (RequestHandler,), {"SUPPORTED_METHODS": ("GET", "REPORT")})
        running = await proxy.app([("/.*", forwarding(echo.url, base, "report"))])
        assert (await running.request("REPORT", "/")).status == 501

    async def test_a_method_of_the_handler_that_is_named(self, proxy, echo):
        base = type("Dav", (RequestHandler,), {"SUPPORTED_METHODS": ("GET", "REPORT")})
        running = await proxy.app([("/.*", forwarding(echo.url, base, "report", custom_http_methods=["REPORT"]))])
        assert seen(await running.request("REPORT", "/"))["method"] == "REPORT"

    async def test_other_methods_stay_tornados(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url))])
        assert (await running.request("DELETE", "/")).status == 405

    async def test_inside_a_proxy_handler_to_elsewhere(self, proxy, upstream, echo):
        class Elsewhere(ProxyHandler):
            async def prepare(self):
                await self.proxy(echo.url, path="/elsewhere")

        running = await proxy(upstream.url, Elsewhere)
        request = seen(await running.request("POST", "/x", [], b"hello"))
        assert (request["target"], request["body"]) == ("/elsewhere", "hello")


class TestStreaming:
    """With ``@stream_request_body``, called in ``prepare``."""

    @pytest.fixture(params=["mixin first", "mixin last"])
    def streaming(self, request, upstream):
        bases = (ProxyMixin, RequestHandler) if request.param == "mixin first" else (RequestHandler, ProxyMixin)

        class Streaming(*bases):
            closed = 0

            async def prepare(self):
                await self.proxy(upstream.url, on_done=type(self).record)

            def data_received(self, chunk):
                raise AssertionError("the body is the proxy's")

            def on_connection_close(self):
                type(self).closed += 1
                super().on_connection_close()

        return stream_request_body(Streaming)

    @pytest.fixture
    async def running(self, proxy, streaming):
        def rules(running):
            streaming.record = running.record()
            return [("/.*", streaming)]

        return await proxy.app(rules)

    async def test_each_chunk_passes_at_once_both_ways(self, running, upstream):
        """The downstream sends its second chunk when the answer to the first is there; buffered, it would never be."""
        downstream = await running.ask("POST", "/", [("Transfer-Encoding", "chunked")], b"1\r\na\r\n")
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"a"
        await conn.send_head(200, [("Transfer-Encoding", "chunked")])
        await conn.send_chunk(b"A")
        assert (await downstream.read_head()).status == 200
        assert await downstream.read_body(1) == b"A"
        await downstream.send(b"1\r\nb\r\n0\r\n\r\n")
        assert await conn.read_chunk() == b"b"
        assert await conn.read_chunk() == b""
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""
        assert (await running.next_outcome()).bytes_up == 2

    async def test_a_request_without_a_body(self, running, upstream):
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        await conn.respond(200, [], b"hello")
        assert (await downstream.read_response()).body == b"hello"

    async def test_the_connection_is_kept(self, running, upstream):
        downstream = await running.connect()
        for body in (b"one", b"two"):
            await downstream.request("POST", "/", [], body)
            conn = upstream.connections[0] if upstream.connections else await upstream.accept()
            assert (await conn.read_request()).body == body
            await conn.respond(200, [], body)
            assert (await downstream.read_response()).body == body

    @pytest.mark.parametrize("body", [None, b"half"])
    async def test_a_downstream_that_leaves_ends_it(self, running, streaming, upstream, body):
        """The handler's own on_connection_close is called as well."""
        headers = [] if body is None else [("Content-Length", "10")]
        downstream = await running.ask("GET" if body is None else "POST", "/", headers, body)
        conn = await upstream.accept()
        await conn.read_head()
        downstream.close()
        assert (await running.next_outcome()).status == 499
        await conn.closed()
        assert streaming.closed == 1

    async def test_what_comes_behind_an_early_answer_is_dropped(self, running, upstream):
        downstream = await running.ask("POST", "/", [("Content-Length", "10")], b"half-")
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(413, [("Connection", "close")], b"no")
        conn.close()
        assert (await downstream.read_response()).status == 413
        await downstream.send(b"and-")
        await running.next_outcome()

    async def test_called_later_the_body_is_gone(self, proxy, echo, expect_log):
        expect_log("call proxy\\(\\) in prepare\\(\\)")

        @stream_request_body
        class Late(ProxyMixin, RequestHandler):
            def data_received(self, chunk):
                pass

            async def post(self):
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Late)])
        assert (await running.request("POST", "/", [], b"hello")).status == 500
        assert echo.accepted == 0

    async def test_called_later_with_a_body_that_was_collected(self, proxy, echo):
        @stream_request_body
        class Collecting(ProxyMixin, RequestHandler):
            def initialize(self):
                self.chunks = []

            def data_received(self, chunk):
                self.chunks.append(chunk)

            async def post(self):
                self.request.body = b"".join(self.chunks)
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Collecting)])
        assert seen(await running.request("POST", "/", [], b"hello"))["body"] == "hello"


class Base(RequestHandler):
    """As they are in applications: everything that a handler may have of its own."""

    calls: list[str]

    def initialize(self, word):
        self.word = word

    def set_default_headers(self):
        self.set_header("X-Content-Type-Options", "nosniff")

    def prepare(self):
        self.calls.append(f"prepare {self.word}")
        # As a session would be.
        self._connection = self._exchange = self._aborted = self.options = self.handler = "theirs"

    def get_current_user(self):
        return self.request.headers.get("X-User")

    def get_login_url(self):
        return "/login"

    def on_connection_close(self):
        # Without super(), as many do.
        self.calls.append("closed")

    def on_finish(self):
        assert self._connection == self._exchange == self._aborted == self.options == self.handler == "theirs"
        self.calls.append("finished")

    def finish(self, chunk=None):
        self.calls.append("finish")
        return super().finish(chunk)

    def write_error(self, status_code, **kwargs):
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"status": status_code}))


class TestForeignBases:
    @pytest.fixture(params=["mixin first", "mixin last"])
    def handler(self, request, upstream):
        Base.calls = []
        bases = (ProxyMixin, Base) if request.param == "mixin first" else (Base, ProxyMixin)

        class Mine(*bases):
            @authenticated
            async def get(self, *args):
                await self.proxy(upstream.url, on_done=type(self).record)
                self.calls.append("proxied")

        return Mine

    @pytest.fixture
    async def running(self, proxy, handler):
        def rules(running):
            handler.record = running.record()
            return [("/(.*)", handler, {"word": "hello"})]

        return await proxy.app(rules)

    async def test_each_method_is_called_as_ever(self, running, upstream):
        downstream = await running.ask("GET", "/x", [("X-User", "ann")])
        conn, _ = await upstream.request()
        await conn.respond(200, [("Content-Type", "text/plain"), ("X-Up", "1")], b"hello")
        response = await downstream.read_response()
        assert (response.status, response.body) == (200, b"hello")
        assert response.header("X-Content-Type-Options") == "nosniff"
        assert response.header("Content-Type") == "text/plain"
        assert not response.has("Server")
        await running.next_outcome()
        assert Base.calls == ["prepare hello", "finish", "finished", "proxied"]

    async def test_who_is_not_authenticated_never_reaches_the_upstream(self, running, upstream):
        response = await running.get("/x")
        assert (response.status, response.header("Location")) == (302, "/login?next=%2Fx")
        assert response.header("Server").startswith("TornadoServer")
        assert upstream.accepted == 0

    async def test_its_own_error_page(self, running, upstream, expect_log):
        expect_log("refused|Could not connect")
        upstream.refuse()
        response = await running.get("/x", [("X-User", "ann")])
        assert (response.status, json.loads(response.body)) == (502, {"status": 502})

    async def test_a_downstream_that_leaves(self, running, upstream):
        downstream = await running.ask("GET", "/x", [("X-User", "ann")])
        conn, _ = await upstream.request()
        downstream.close()
        assert (await running.next_outcome()).status == 499
        await conn.closed()
        assert Base.calls[:3] == ["prepare hello", "closed", "finished"]
        assert [status for status, *_ in running.access_log] == [499]

    async def test_a_response_that_is_cut(self, running, upstream, expect_log):
        expect_log("GET /x")
        downstream = await running.ask("GET", "/x", [("X-User", "ann")])
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Length", "10")])
        await conn.send(b"half")
        assert (await downstream.read_head()).status == 200
        conn.close()
        await downstream.closed()
        await running.next_outcome()
        assert Base.calls.count("finished") == 1

    async def test_nothing_holds_the_handler_afterwards(self, running, handler, upstream):
        """Not even until the garbage collector comes. What the client keeps of its last transfer is the client's."""
        kept = []
        handler.on_finish = lambda self: kept.append(weakref.ref(self))
        downstream = await running.connect()
        gc.disable()
        try:
            for _ in range(2):
                await downstream.request("GET", "/x", [("X-User", "ann")])
                conn = upstream.connections[0] if upstream.connections else await upstream.accept()
                await conn.read_request()
                await conn.respond(200, [], b"hello")
                await downstream.read_response()
                await running.next_outcome()
            assert kept[0]() is None
        finally:
            gc.enable()

    async def test_xsrf_protection_is_the_handlers_own(self, proxy, echo, expect_log):
        expect_log("403 POST")
        handler = forwarding(echo.url, method="post")
        running = await proxy.app([("/.*", handler)], app_settings={"xsrf_cookies": True})
        assert (await running.request("POST", "/", [], b"x")).status == 403
        assert echo.accepted == 0


class TestOwnHeaders:
    """What was set on the handler before joins the upstream's, as ``stream_headers_mode`` says."""

    class Setting(ProxyMixin, RequestHandler):
        async def get(self):
            self.set_header("X-Both", "mine")
            self.set_header("X-Mine", "1")
            self.set_cookie("c", "mine")
            self.set_status(201)
            await self.proxy(**self.application.settings["given"])

    @pytest.mark.parametrize(
        ("options", "both"),
        [
            ({}, ["theirs"]),
            ({"stream_headers_mode": "prepend"}, ["theirs", "mine"]),
            ({"response_mode": "buffer"}, ["theirs", "mine"]),
        ],
    )
    async def test_joined(self, proxy, upstream, options, both):
        given = {"upstream": upstream.url, **options}
        running = await proxy.app([("/.*", self.Setting)], app_settings={"given": given})
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        await conn.respond(200, [("X-Both", "theirs"), ("Set-Cookie", "c=theirs")], b"hello")
        response = await downstream.read_response()
        assert response.status == 200
        assert response.all("X-Both") == both
        assert response.all("X-Mine") == ["1"]
        assert response.all("Set-Cookie") == ["c=theirs", "c=mine; Path=/"]
        assert not response.has("Server")


class TestHooks:
    async def test_methods_and_keywords_are_called_in_order(self, proxy, upstream):
        called = []

        class Hooked(ProxyMixin, RequestHandler):
            async def rewrite_request(self, request):
                called.append("rewrite_request")
                request.headers["X-User"] = "ann"

            def handle_status(self, response):
                called.append(f"handle_status {response.status}")

            async def post(self):
                await self.proxy(
                    self.choose,
                    filter_request_body=None,
                    rewrite_response=lambda handler, response: called.append("rewrite_response"),
                    filter_response_body=lambda handler, chunk: chunk.upper(),
                    on_done=lambda handler, outcome: called.append(f"on_done {outcome.status}"),
                )

            async def choose(self):
                called.append("upstream")
                return upstream.url

        running = await proxy.app([("/.*", Hooked)])
        downstream = await running.ask("POST", "/", [], b"x")
        conn, request = await upstream.request()
        assert request.header("X-User") == "ann"
        await conn.respond(200, [], b"hello")
        assert (await downstream.read_response()).body == b"HELLO"
        assert called == ["upstream", "rewrite_request", "handle_status 200", "rewrite_response", "on_done 200"]

    async def test_a_hook_that_answers_ends_it(self, proxy, echo):
        class Answering(ProxyMixin, RequestHandler):
            def rewrite_request(self, request):
                self.set_status(202)
                self.finish("mine")

            async def get(self):
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Answering)])
        response = await running.get("/")
        assert (response.status, response.body) == (202, b"mine")
        assert echo.accepted == 0

    async def test_what_a_hook_raises_is_answered_as_in_any_handler(self, proxy, echo):
        def refuse(handler, request):
            raise HTTPError(403)

        running = await proxy.app([("/.*", forwarding(echo.url, rewrite_request=refuse))])
        assert (await running.get("/")).status == 403

    async def test_what_a_hook_raises_can_be_caught_and_answered(self, proxy, echo):
        class Catching(ProxyMixin, RequestHandler):
            def rewrite_request(self, request):
                raise KeyError("mine")

            async def get(self):
                try:
                    await self.proxy(echo.url)
                except KeyError:
                    self.write("caught")

        running = await proxy.app([("/.*", Catching)])
        assert (await running.get("/")).body == b"caught"

    async def test_an_error_can_be_answered(self, proxy, upstream, expect_log):
        expect_log("refused|Could not connect")
        upstream.refuse()

        class Sorry(ProxyMixin, RequestHandler):
            def handle_error(self, error):
                self.set_status(error.status_code)
                self.finish("sorry")

            async def get(self):
                await self.proxy(upstream.url)

        running = await proxy.app([("/.*", Sorry)])
        response = await running.get("/")
        assert (response.status, response.body) == (502, b"sorry")

    async def test_answering_a_downstream_that_has_gone_does_no_harm(self, proxy, upstream):
        class Sorry(ProxyMixin, RequestHandler):
            def handle_error(self, error):
                self.finish("sorry")

            async def get(self):
                await self.proxy(upstream.url, on_done=type(self).record)
                self.finish("and more")

        def rules(running):
            Sorry.record = running.record()
            return [("/.*", Sorry)]

        running = await proxy.app(rules)
        downstream = await running.ask("GET")
        await upstream.request()
        downstream.close()
        assert (await running.next_outcome()).status == 499


class TestErrors:
    async def test_two_calls_for_one_request(self, proxy, echo, expect_log):
        expect_log("Twice.proxy\\(\\) was called twice for one request")

        class Twice(ProxyMixin, RequestHandler):
            async def get(self):
                await self.proxy(echo.url)
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Twice)])
        assert seen(await running.get("/"))["target"] == "/"
        assert len(echo.requests) == 1

    async def test_two_calls_at_a_time(self, proxy, echo, expect_log):
        expect_log("was called twice for one request")

        class Twice(ProxyMixin, RequestHandler):
            async def get(self):
                await asyncio.gather(self.proxy(echo.url), self.proxy(echo.url))

        running = await proxy.app([("/.*", Twice)])
        await running.get("/")
        assert len(echo.requests) <= 1

    async def test_after_an_answer(self, proxy, echo, expect_log):
        expect_log("was called for a request that is answered already")

        class Late(ProxyMixin, RequestHandler):
            async def get(self):
                self.finish("mine")
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Late)])
        assert (await running.get("/")).body == b"mine"
        assert echo.accepted == 0

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"upstream": "127.0.0.1:9000"}, r"Forwarding.proxy\(\): upstream '127.0.0.1:9000' has"),
            (
                {"upstream": "http://a", "retires": 1},
                r"'retires' is not an option; the options are upstream",
            ),
            ({"upstream": "http://a", "retries": True}, r"retries True is not a count; write 0 or more"),
            ({"upstream": None}, "upstream is missing; write"),
        ],
    )
    async def test_an_option_that_cannot_work_is_named_with_its_cure(self, proxy, expect_log, options, sentence):
        expect_log(sentence)
        running = await proxy.app([("/.*", forwarding(**options))])
        assert (await running.get("/")).status == 500

    async def test_an_option_error_can_be_mended(self, proxy, echo):
        class Mending(ProxyMixin, RequestHandler):
            async def get(self):
                try:
                    await self.proxy("nonsense")
                except OptionError:
                    await self.proxy(echo.url)

        running = await proxy.app([("/.*", Mending)])
        assert seen(await running.get("/"))["target"] == "/"

    async def test_503_says_when_to_come_again(self, proxy, upstream, expect_log):
        expect_log("clients are busy")
        running = await proxy.app(
            [("/.*", forwarding(upstream.url, connect_timeout=0.2, client_options={"max_clients": 1}))]
        )
        first = await running.ask("GET")
        conn, _ = await upstream.request()
        response = await running.get("/")
        assert (response.status, response.header("Retry-After")) == (503, "1")
        await conn.respond(200)
        await first.read_response()

    async def test_a_target_that_cannot_be_forwarded(self, proxy, echo):
        running = await proxy.app([("/.*", forwarding(echo.url))])
        downstream = await running.connect()
        await downstream.send(b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await downstream.read_response()).status == 400
        assert echo.accepted == 0


class TestOptions:
    def keeps(self, **options):
        """Return whether checked options are kept."""
        _known.clear()
        return bool(self.checked(**options) and _known)

    @staticmethod
    def checked(upstream="http://a", **options):
        from tornado_proxy.mixin import _checked

        return _checked("test", upstream, options)

    def test_are_checked_once(self):
        given = {"retries": 2, "client_options": {"max_clients": 3}, "trusted_proxies": ["10.0.0.0/8"]}
        assert self.checked(**given) is self.checked(**{**given, "client_options": {"max_clients": 3}})

    def test_that_differ_only_in_type_are_not_the_same(self):
        self.checked(retries=1)
        with pytest.raises(OptionError, match="retries True"):
            self.checked(retries=True)

    def test_that_are_changed_afterwards_change_nothing(self):
        options = {"max_clients": 3}
        first = self.checked(client_options=options)
        options["max_clients"] = 4
        assert first.client_options == {"max_clients": 3}
        assert self.checked(client_options=options).client_options == {"max_clients": 4}

    def test_functions_that_last_are_kept_and_others_are_not(self):
        """A bound method or a closure would hold the handler."""
        assert self.keeps(rewrite_request=seen)
        assert self.keeps(on_done=lambda handler, outcome: None)
        assert not self.keeps(on_done=self.keeps)
        assert not self.keeps(on_done=lambda handler, outcome: self)
        assert not self.keeps(status_callbacks={404: lambda handler, response: self})
        assert not self.keeps(upstream=lambda: self.keeps)

    def test_there_is_an_end_to_what_is_kept(self):
        for number in range(2500):
            self.checked(f"http://a/{number}")
        assert len(_known) <= 1000


class TestWebsocket:
    async def test_an_upgrade_becomes_a_tunnel(self, proxy, upstream):
        Base.calls = []

        class Tunnelling(ProxyMixin, Base):
            async def get(self):
                self.set_cookie("c", "mine")
                await self.proxy(upstream.url, path="/ws", on_done=type(self).record)
                self.calls.append("proxied")

        def rules(running):
            Tunnelling.record = running.record()
            return [("/.*", Tunnelling, {"word": "hello"})]

        running = await proxy.app(rules)
        downstream = await running.ask("GET", "/app/ws?q", ASK)
        conn, request = await upstream.request()
        assert request.target == "/ws?q"
        await conn.send_head(101, GRANT)
        head = await downstream.read_head()
        assert head.status == 101
        assert head.header("Set-Cookie") == "c=mine; Path=/"
        await downstream.send(b"up")
        assert await conn.read_exactly(2) == b"up"
        await conn.send(b"down")
        assert await downstream.read_exactly(4) == b"down"
        downstream.close()
        conn.close()
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.bytes_up, outcome.bytes_down) == (101, 2, 4)
        assert Base.calls == ["prepare hello", "finished", "proxied"]

    async def test_a_refusal_is_a_response(self, proxy, upstream):
        running = await proxy.app([("/.*", forwarding(upstream.url))])
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.respond(403, [], b"no")
        response = await downstream.read_response()
        assert (response.status, response.body) == (403, b"no")
