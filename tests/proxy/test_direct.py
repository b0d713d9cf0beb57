"""A mount that nobody hooks into is served without a handler, and nobody can tell."""

from __future__ import annotations

import asyncio
import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from tornado.web import Application, GZipContentEncoding, HTTPError, RequestHandler

from tests.support import proxy as support
from tests.support.process import free_port
from tests.support.wrapped import Wrapped
from tornado_proxy import ProxyHandler, mount
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.mixin import ProxyMixin


@pytest.fixture(autouse=True, params=["own", "tornado"])
def server(monkeypatch, request):
    monkeypatch.setattr(support, "SERVER", request.param)


@pytest.fixture
def made(monkeypatch):
    """The handlers that were made, and whether their requests were answered by then."""
    handlers = []
    initialize = ProxyHandler.initialize

    def noted(self, **kwargs):
        connection = self.request.connection
        tornados = isinstance(connection, HTTP1Connection)
        handlers.append((self, (connection._response_start_line is not None) if tornados else connection.head_sent))
        initialize(self, **kwargs)

    monkeypatch.setattr(ProxyHandler, "initialize", noted)
    return handlers


class NotOfExchanges:
    """A ``log_function`` that wants to know nothing of exchanges."""

    of_exchanges = False

    def __call__(self, handler):
        pass


SILENT = {"log_function": NotOfExchanges()}


CHECKOUT = Path(__file__).resolve().parents[2]
# Says whether nobody asks, where a method was replaced before we were imported.
BEFORE = """
from tornado.web import Application, RequestHandler
from tests.support.wrapped import Wrapped

method = RequestHandler._execute
RequestHandler._execute = {wrapper}

from tornado_proxy import ProxyHandler, ProxyOptions
from tornado_proxy.downstream.direct import nobody_asks

print(nobody_asks(ProxyHandler, Application(), ProxyOptions.parse("a mount", {{"upstream": "http://localhost"}})))
"""


class Sub(ProxyHandler):
    """Overrides nothing, but might."""


def hook(handler, subject):
    return subject if isinstance(subject, bytes) else None


class TestWhoNeedsAHandler:
    async def test_a_mount_as_it_is_does_not(self, proxy, echo, made):
        running = await proxy.app([mount("/a", echo.url)], app_settings=SILENT)
        for method, body in (("GET", None), ("HEAD", None), ("POST", b"x" * 100_000)):
            assert (await running.request(method, "/a/b", body=body)).status == 200
        assert [request.body for request in echo.requests] == [b"", b"", b"x" * 100_000]
        assert made == []

    async def test_nor_does_it_where_templates_are_compiled_anew(self, proxy, echo, made):
        """Debug mode; the server leaves the making of handlers to Tornado."""
        running = await proxy.app([mount("/a", echo.url)], app_settings={**SILENT, "compiled_template_cache": False})
        async with await running.connect() as downstream:
            for method, body in (("GET", None), ("POST", b"x" * 100_000), ("GET", None)):
                assert (await downstream.exchange(method, "/a/b", body=body)).status == 200
        assert [request.body for request in echo.requests] == [b"", b"x" * 100_000, b""]
        assert made == []

    @pytest.mark.parametrize(
        "options",
        [
            {"rewrite_request": hook},
            {"rewrite_response": hook},
            {"filter_request_body": hook},
            {"filter_response_body": hook},
            {"should_retry": hook},
            {"status_callbacks": {404: hook}},
            {"error_callback": hook},
        ],
        ids=lambda options: next(iter(options)),
    )
    async def test_one_with_a_hook_does(self, proxy, echo, made, options):
        running = await proxy.app([mount("/", echo.url, **options)], app_settings=SILENT)
        assert (await running.get("/")).status == 200
        assert [answered for _, answered in made] == [False]

    async def test_one_with_a_function_for_its_upstream_does(self, proxy, echo, made):
        running = await proxy.app([mount("/", lambda: echo.url)], app_settings=SILENT)
        assert (await running.get("/")).status == 200
        assert [answered for _, answered in made] == [False]

    async def test_a_class_of_ones_own_is_used(self, proxy, echo, made):
        running = await proxy.app([mount("/", echo.url, Sub)], app_settings=SILENT)
        assert (await running.get("/")).status == 200
        assert [(type(handler), answered) for handler, answered in made] == [(Sub, False)]

    async def test_so_is_one_for_tornados_spelling(self, proxy, echo, made):
        running = await proxy.app([("/(.*)", ProxyHandler, {"upstream": echo.url})], app_settings=SILENT)
        assert (await running.get("/")).status == 200
        assert [answered for _, answered in made] == [False]

    async def test_so_it_is_where_responses_are_transformed(self, proxy, echo, made):
        running = await proxy.app([mount("/", echo.url)], app_settings={**SILENT, "compress_response": True})
        assert running.app.transforms == [GZipContentEncoding]
        assert (await running.get("/")).status == 200
        assert [answered for _, answered in made] == [False]

    async def test_so_it_is_where_the_application_chooses_handlers(self, proxy, echo, made, monkeypatch):
        """It may want to let nobody through who does not say who he is."""
        running = await proxy.app([mount("/", echo.url)], app_settings=SILENT)

        class Refuses(RequestHandler):
            def prepare(self):
                raise HTTPError(401)

        def chosen(request, target_class, target_kwargs=None, path_args=None, path_kwargs=None):
            return Application.get_handler_delegate(running.app, request, Refuses)

        monkeypatch.setattr(running.app, "get_handler_delegate", chosen)
        assert (await running.get("/")).status == 401
        assert (made, echo.requests) == ([], [])

    @pytest.mark.parametrize("wrapper", ["function", "wrapt"])
    @pytest.mark.parametrize("method", ["__init__", "_execute", "on_finish"])
    async def test_so_it_is_where_handlers_are_traced(self, proxy, echo, made, monkeypatch, method, wrapper):
        """As OpenTelemetry, Datadog and Sentry do that, whenever they begin with it."""
        running = await proxy.app([mount("/", echo.url)], app_settings=SILENT)
        assert (await running.get("/")).status == 200
        traced = []
        tornados = getattr(RequestHandler, method)

        def traces(self, *args, **kwargs):
            traced.append(self)
            return tornados(self, *args, **kwargs)

        monkeypatch.setattr(RequestHandler, method, traces if wrapper == "function" else Wrapped(tornados, traced))
        assert (await running.get("/")).status == 200
        assert len(traced) == 1
        assert [(handler, False) for handler in traced] == made

    async def test_so_it_is_where_all_handlers_have_fields_of_their_own(self, proxy, echo, made, monkeypatch):
        running = await proxy.app([mount("/", echo.url)], app_settings=SILENT)
        monkeypatch.setattr(RequestHandler, "set_default_headers", lambda self: self.set_header("X-Ours", "1"))
        assert ("X-Ours", "1") in (await running.get("/")).headers
        assert [answered for _, answered in made] == [False]

    @pytest.mark.parametrize("owner", [ProxyHandler, ProxyMixin])
    async def test_so_it_is_where_a_hook_was_replaced(self, proxy, echo, made, monkeypatch, owner):
        """As tests do, to lead requests to an upstream of theirs."""
        running = await proxy.app([mount("/", "http://127.0.0.1:9")], app_settings=SILENT)
        monkeypatch.setattr(owner, "choose_upstream", lambda self: echo.url)
        assert (await running.get("/")).status == 200
        assert [answered for _, answered in made] == [False]

    async def test_so_it_is_where_prepare_was_replaced(self, proxy, echo, made, monkeypatch):
        running = await proxy.app([mount("/", echo.url)], app_settings=SILENT)

        def refuses(self):
            raise HTTPError(401)

        monkeypatch.setattr(ProxyHandler, "prepare", refuses)
        assert (await running.get("/")).status == 401
        assert ([answered for _, answered in made], echo.requests) == ([False], [])

    @pytest.mark.parametrize(
        ("wrapper", "nobody"), [("method", True), ("lambda self: method(self)", False), ("Wrapped(method, [])", False)]
    )
    def test_so_it_is_where_they_were_traced_before_we_came(self, wrapper, nobody):
        source = BEFORE.format(wrapper=wrapper)
        found = subprocess.run(
            [sys.executable, "-c", source], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        assert (found.stdout, found.stderr) == (f"{nobody}\n", "")


class TestWhoLooksAfterwards:
    async def test_on_done_has_one(self, proxy, echo, made):
        seen = []

        def on_done(handler, outcome):
            seen.append((handler, handler.get_status(), handler._finished, handler.request.path, outcome.status))

        running = await proxy.app([mount("/", echo.url, on_done=on_done)], app_settings=SILENT)
        assert (await running.get("/x")).status == 200
        ((handler, *rest),) = seen
        assert rest == [200, True, "/x", 200]
        assert made == [(handler, True)]

    async def test_an_on_done_that_raises_is_logged_and_hurts_nobody(self, proxy, echo, expect_log):
        def on_done(handler, outcome):
            raise RuntimeError

        expect_log("on_done raised")
        running = await proxy.app([mount("/", echo.url, on_done=on_done)])
        async with await running.connect() as downstream:
            for _ in range(2):
                assert (await downstream.exchange("GET", "/")).status == 200

    async def test_a_log_function_has_one(self, proxy, upstream, made):
        logged = []

        def log_function(handler):
            logged.append((handler.get_status(), handler.request.method, handler._headers["X-A"], handler._reason))

        running = await proxy.app([mount("/", upstream.url)], app_settings={"log_function": log_function})
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(299, [("X-A", "1")], b"body", reason="Odd")
        assert (await downstream.read_response()).status == 299
        assert logged == [(299, "GET", "1", "Odd")]
        assert [answered for _, answered in made] == [True]

    @pytest.mark.parametrize(("level", "status", "lines"), [
        (logging.INFO, 200, 1), (logging.WARNING, 200, 0), (logging.WARNING, 404, 1), (logging.ERROR, 404, 0),
        (logging.ERROR, 503, 1),
    ])  # fmt: skip
    async def test_tornados_own_log_is_as_ever(self, proxy, upstream, made, caplog, expect_log, level, status, lines):
        if lines and level > logging.INFO:
            expect_log(rf"{status} GET /x \(127.0.0.1\)")
        caplog.set_level(level, "tornado.access")
        running = await proxy.app([mount("/", upstream.url)])
        del running.app.settings["log_function"]
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(status, (), b"body")
        assert (await downstream.read_response()).status == status
        written = [record.getMessage() for record in caplog.records if record.name == "tornado.access"]
        assert [line.split(" ")[:3] for line in written] == [[str(status), "GET", "/x"]] * lines
        assert len(made) == lines

    async def test_an_application_may_log_in_its_own_way(self, proxy, echo, monkeypatch):
        class Own(Application):
            def log_request(self, handler):
                logged.append(handler.get_status())

        logged = []
        running = await proxy.app([mount("/", echo.url)])
        running.app.__class__ = Own
        del running.app.settings["log_function"]
        assert (await running.get("/")).status == 200
        assert logged == [200]

    async def test_it_may_do_so_by_an_attribute_and_whatever_the_log_function_wants(self, proxy, echo):
        logged = []
        running = await proxy.app([mount("/", echo.url)], app_settings=SILENT)
        running.app.log_request = lambda handler: logged.append(handler.get_status())
        assert (await running.get("/")).status == 200
        assert logged == [200]

    async def test_all_applications_may_do_so(self, proxy, echo, monkeypatch):
        logged = []
        running = await proxy.app([mount("/", echo.url)], app_settings=SILENT)
        monkeypatch.setattr(Application, "log_request", lambda self, handler: logged.append(handler.get_status()))
        assert (await running.get("/")).status == 200
        assert logged == [200]

    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_what_they_see_of_one_that_has_left(self, proxy, upstream, handler_class):
        seen = []

        def on_done(handler, outcome):
            seen.append((outcome.status, handler.get_status(), handler._finished, handler._headers_written))

        running = await proxy(upstream.url, handler_class, on_done=on_done)
        downstream = await running.ask("GET", "/x")
        await upstream.request()
        downstream.close()
        await running.next_outcome()
        assert running.access_log == [(499, "GET", "/x")]
        assert seen == [(499, 499, True, False)]

    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_the_handler_has_what_it_has_after_a_match(self, proxy, echo, handler_class):
        seen = []

        def on_done(handler, outcome):
            seen.append((handler.path_args, handler.path_kwargs, handler.current_user))

        running = await proxy(echo.url, handler_class, on_done=on_done)
        assert (await running.get("/x")).status == 200
        assert seen == [([], {}, None)]

    @pytest.mark.parametrize(
        ("pattern", "args", "kwargs"),
        [("/x/(.*)/(.*)", ["a b", "\udcff"], {}), ("/x/(?P<a>.*)/%FF(?P<b>.*)", [], {"a": "a b", "b": ""})],
    )
    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_so_it_has_after_one_of_a_pattern(self, proxy, echo, handler_class, pattern, args, kwargs):
        """A mount's target, under a rule of one's own."""
        seen = []

        def on_done(handler, outcome):
            seen.append((handler.path_args, handler.path_kwargs))

        rule = mount("/", echo.url, handler_class, on_done=on_done)
        running = await proxy.app([(pattern, rule.target, rule.target_kwargs)])
        async with await running.connect() as downstream:
            for method, body in (("GET", None), ("POST", b"x" * 100_000)):
                assert (await downstream.exchange(method, "/x/a%20b/%FF", body=body)).status == 200
        assert [(request.target, request.body) for request in echo.requests] == [
            ("/x/a%20b/%FF", b""),
            ("/x/a%20b/%FF", b"x" * 100_000),
        ]
        assert seen == [(args, kwargs)] * 2


class TestAnswersOfOurOwn:
    """What we say ourselves is what a handler says."""

    @staticmethod
    def without_date(response):
        return response.status, [(name, value) for name, value in response.headers if name != "Date"], response.body

    @pytest.mark.parametrize(
        ("method", "target", "headers"),
        [
            ("GET", "/", ()),
            ("HEAD", "/", ()),
            ("NONE", "/", ()),
            ("GET", "//a/../..%2f", ()),
            ("OPTIONS", "/", [("Max-Forwards", "0")]),
            ("TRACE", "/", [("Max-Forwards", "0")]),
            ("POST", "/", [("Content-Length", "1000")]),
            ("NONE", "/", [("Content-Length", "1000"), ("Expect", "100-continue")]),
            ("GET", "/", [("Via", ", ".join(["1.1 tornado_proxy"] * 9))]),
        ],
    )
    async def test_they_are_alike(self, proxy, made, expect_log, method, target, headers):
        expect_log(".", required=False)
        answers, logs = [], []
        for handler_class in (ProxyHandler, Sub):
            rules = [mount("/", f"http://127.0.0.1:{free_port()}/base", handler_class, max_body_size=10, retries=0)]
            running = await proxy.app(rules)
            answers.append(self.without_date(await running.request(method, target, headers)))
            logs.append(running.access_log)
        assert answers[0] == answers[1]
        assert logs[0] == logs[1]
        assert len(logs[0]) == 1
        assert len(made) == 2

    async def test_what_is_our_own_fault_is_a_500(self, proxy, echo, expect_log):
        expect_log("Uncaught exception GET /")
        expect_log("500 GET /")
        running = await proxy.app([mount("/", echo.url)], app_settings={"proxy_client": "no such client"})
        del running.app.settings["log_function"]
        assert (await running.get("/")).status == 500

    @pytest.mark.parametrize(
        ("rest", "status"),
        [
            (b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n", 501),
            (b"Content-Length: 1000000000\r\n\r\n", 501),
            (b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n", 501),
            (b"Content-Length: 5\r\n\r\nhello", 501),
            (b"Content-Length: x\r\n\r\n", 400),
        ],
        ids=["asked for", "large", "malformed", "there", "no number"],
    )
    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_a_refusal_is_the_only_answer(self, proxy, echo, expect_log, handler_class, rest, status):
        """No 100 before it, and nothing of the server's behind it about a body that nobody wants."""
        expect_log("Malformed HTTP message", required=False)
        running = await proxy(echo.url, handler_class)
        downstream = await running.connect()
        await downstream.send(b"NONE / HTTP/1.1\r\nHost: h\r\n" + rest)
        received = await downstream.read_until_closed()
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert received.count(b"HTTP/1.1 ") == 1
        assert len(running.access_log) == (status == 501 or support.SERVER == "tornado")
        assert echo.requests == []


class Odd(HTTPClient):
    """Fails as no client should."""

    def __init__(self, error):
        self.error = error

    async def send(self, request):
        if self.error is None:
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        raise self.error()

    def close(self):
        pass


@pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
class TestWhatNobodyExpects:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (ValueError, 500),
            (asyncio.CancelledError, 500),
            (None, 500),
            (lambda: HTTPError(418), 418),
            (StreamClosedError, 499),
        ],
        ids=["error", "cancelled inside", "cancelled", "an answer", "closed"],
    )
    async def test_of_a_client(self, proxy, expect_log, handler_class, error, status):
        expect_log("Uncaught exception", required=status == 500 and error is not None)
        expect_log("418", required=False)
        running = await proxy("http://127.0.0.1:9", handler_class, client=Odd(error))
        downstream = await running.ask("GET", "/")
        if status == 499:
            assert await downstream.read_until_closed() == b""
        else:
            assert (await downstream.read_response()).status == status
            assert (await downstream.exchange("GET", "/")).status == status
        assert running.access_log[0] == (status, "GET", "/")

    async def test_of_the_end_of_all_tasks(self, proxy, handler_class, expect_log):
        """As ``asyncio.run()`` ends them, among them those of the server that wait for a handler to be prepared."""
        told = asyncio.Event()

        async def on_done(handler, outcome):
            told.set()
            await asyncio.Event().wait()

        expect_log("Uncaught exception", required=False)
        before = asyncio.all_tasks()
        running = await proxy("http://127.0.0.1:9", handler_class, on_done=on_done)
        await running.ask("NONE", "/")
        await told.wait()
        tasks = asyncio.all_tasks() - before
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)] == []

    async def test_of_a_log_function(self, proxy, handler_class, expect_log):
        def log_function(handler):
            raise RuntimeError

        expect_log("Uncaught exception")
        rule = mount("/", f"http://127.0.0.1:{free_port()}", handler_class, retries=0)
        expect_log("Could not connect|refused|write_error|Failed to flush|Cannot send error|in exception handler")
        running = await proxy.app([rule], app_settings={"log_function": log_function})
        async with await running.connect() as downstream:
            for _ in range(2):
                assert (await downstream.exchange("GET", "/")).status == 502


class Staged(ProxyHandler):
    """Is made in a way of its own, as in a test of its hooks."""

    def __init__(self, stage, version=1, *rest, app=None, inbound=None):
        if app is not None:
            super().__init__(app, inbound, upstream="http://localhost")


class TestHowHandlersAreMade:
    """By hand, with what their own ``__init__`` takes, or with nothing at all."""

    @pytest.mark.parametrize("arguments", [("canary",), ("canary", 2), ("canary", 2, 3, 4)], ids=len)
    def test_a_subclass_takes_what_it_likes(self, arguments):
        assert type(Staged(*arguments)) is Staged

    async def test_by_names_of_its_own_too(self, proxy, echo):
        class Keeps(ProxyHandler):
            def prepare(self):
                found.append(Staged(stage="canary", app=self.application, inbound=self.request))
                return super().prepare()

        found = []
        running = await proxy.app([mount("/", echo.url, Keeps)])
        assert (await running.get("/x")).status == 200
        (handler,) = found
        assert type(copy.copy(handler)) is Staged
        assert handler.request.path == "/x"

    def test_without_arguments(self):
        assert type(ProxyHandler.__new__(ProxyHandler)) is ProxyHandler
