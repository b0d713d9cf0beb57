"""Each file of demo/ does what its docstring says, and the embedded upstream does what the demo page needs.

Real sockets on both sides: Tornado's own client, the demo's application, and a small upstream that reports what it saw.
"""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.simple_httpclient import HTTPStreamClosedError, SimpleAsyncHTTPClient
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler, websocket_connect

from tests.support.logs import LogGuard
from tornado_proxy import demo as embedded
from tornado_proxy import mount
from tornado_proxy.clients import close_clients
from tornado_proxy.draining import drained

DEMOS = Path(__file__).resolve().parent.parent / "demo"
FILES = sorted(DEMOS.glob("*.py"))

Serve = Callable[[Application], str]
Fetch = Callable[..., Awaitable[HTTPResponse]]


class Mirror(RequestHandler):
    """Answers with the request as it arrived; ``/status/NNN`` somewhere in the path chooses the status."""

    def initialize(self, name: str) -> None:
        self.name = name

    def get(self) -> None:
        self.answer()

    def post(self) -> None:
        self.answer()

    def answer(self) -> None:
        _, found, status = self.request.path.partition("/status/")
        if found:
            self.set_status(int(status))
        self.write({"name": self.name, "uri": self.request.uri, "headers": dict(self.request.headers.get_all())})


def mirror(name: str = "mirror") -> Application:
    return Application([(r".*", Mirror, {"name": name})], log_function=lambda handler: None)


def load(name: str) -> ModuleType:
    """Import a demo file by its path: demo/ is no package, and one of its names is that of a builtin."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMOS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(response: HTTPResponse) -> Any:
    return json.loads(response.body)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A function that serves an application on a free port until the end of the test, and returns its URL."""
    async with AsyncExitStack() as stack:
        stack.callback(close_clients)

        def start(app: Application) -> str:
            app.settings["log_function"] = lambda handler: None
            sockets = bind_sockets(0, "127.0.0.1")
            server = HTTPServer(app)
            server.add_sockets(sockets)
            stack.push_async_callback(server.close_all_connections)
            stack.callback(server.stop)
            return f"http://127.0.0.1:{sockets[0].getsockname()[1]}"

        yield start


@pytest.fixture
async def fetch() -> AsyncIterator[Fetch]:
    client = SimpleAsyncHTTPClient(force_instance=True)

    async def get(url: str, **kwargs: Any) -> HTTPResponse:
        return await client.fetch(url, raise_error=False, follow_redirects=False, **kwargs)

    yield get
    client.close()


class TestEveryFile:
    @pytest.fixture(params=FILES, ids=lambda path: path.stem)
    def path(self, request: pytest.FixtureRequest) -> Path:
        return request.param

    def test_says_in_its_first_line_how_to_run_it(self, path: Path) -> None:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(f"# Run: python demo/{path.name} http://")

    def test_has_no_more_than_40_lines(self, path: Path) -> None:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40

    def test_offers_make_app_and_main(self, path: Path) -> None:
        module = load(path.stem)
        assert callable(module.make_app)
        assert callable(module.main)

    def test_is_driven_by_a_test_below(self, path: Path) -> None:
        assert f"load({path.stem!r})".replace("'", '"') in Path(__file__).read_text(encoding="utf-8")


class TestOneLine:
    async def test_joins_the_base_path_and_the_raw_tail(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("one_line").make_app(serve(mirror()) + "/bar"))
        assert seen(await fetch(f"{url}/foo/a%2Fb?x=1"))["uri"] == "/bar/a%2Fb?x=1"

    async def test_does_not_match_a_longer_name(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("one_line").make_app(serve(mirror()) + "/bar"))
        assert (await fetch(f"{url}/foobar")).code == 404


class TestTuple:
    async def test_forwards_what_the_group_matched(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("tuple").make_app(serve(mirror()) + "/bar"))
        assert seen(await fetch(f"{url}/foo/a%2Fb?x=1"))["uri"] == "/bar/a%2Fb?x=1"

    async def test_leaves_the_other_handlers_alone(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("tuple").make_app(serve(mirror())))
        assert (await fetch(f"{url}/health")).body == b"ok"


class TestSubclass:
    async def test_refuses_without_asking_the_upstream(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("subclass").make_app("http://127.0.0.1:1"))
        assert (await fetch(f"{url}/api/x")).code == 401

    async def test_names_the_user_to_the_upstream(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("subclass").make_app(serve(mirror())))
        response = await fetch(f"{url}/api/x", headers={"Authorization": "Bearer letmein", "X-User": "mallory"})
        headers = seen(response)["headers"]
        assert headers["X-User"] == "alice"
        assert "Authorization" not in headers


class TestUpstreamFunction:
    async def test_sends_each_tenant_to_its_shard(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("upstream_function").make_app(serve(mirror("one")), serve(mirror("two"))))
        names = {}
        for tenant in ("ann", "bob", "cid", "dan", "ann", "bob"):
            name = seen(await fetch(f"{url}/t/x", headers={"Cookie": f"tenant={tenant}"}))["name"]
            assert names.setdefault(tenant, name) == name
        assert set(names.values()) == {"one", "two"}


class TestStatusCallbacks:
    async def test_answers_404_with_a_page_of_its_own(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("status_callbacks").make_app(serve(mirror())))
        response = await fetch(f"{url}/status/404")
        assert (response.code, response.body) == (404, b"Our own page: there is no such thing here.\n")

    async def test_lets_other_statuses_pass(
        self, serve: Serve, fetch: Fetch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url = serve(load("status_callbacks").make_app(serve(mirror())))
        response = await fetch(f"{url}/status/503")
        assert (response.code, seen(response)["uri"]) == (503, "/status/503")
        assert capsys.readouterr().out == "the upstream said 503\n"

    async def test_answers_for_an_upstream_that_is_down(self, serve: Serve, fetch: Fetch, expect_log: LogGuard) -> None:
        expect_log("Could not connect|refused")
        # Nobody listens on port 1 of the loopback.
        url = serve(load("status_callbacks").make_app("http://127.0.0.1:1"))
        response = await fetch(f"{url}/")
        assert (response.code, response.body) == (502, b"We are sorry, the upstream cannot be reached.\n")


class Pages(RequestHandler):
    """A page, compressed unless the client minds, in pieces; and something that is no page."""

    def get(self, name: str) -> None:
        page = b"<html><BODY class='x'>" + b"hello " * 1000 + b"</body></html>"
        self.set_header("Content-Type", "text/plain" if name == "plain" else "text/html; charset=utf-8")
        self.set_header("ETag", '"v1"')
        if name == "gzip":
            self.set_header("Content-Encoding", "gzip")
            page = gzip.compress(page)
        for start in range(0, len(page), 3 if name == "pieces" else len(page)):
            self.write(page[start : start + 3] if name == "pieces" else page)
            if name == "pieces":
                self.flush()


class TestBanner:
    @pytest.fixture
    def url(self, serve: Serve) -> str:
        return serve(load("banner").make_app(serve(Application([(r"/(\w+)", Pages)]))))

    @pytest.mark.parametrize("name", ["page", "gzip", "pieces"])
    async def test_stands_on_top_of_each_page(self, url: str, fetch: Fetch, name: str) -> None:
        response = await fetch(f"{url}/{name}", decompress_response=False)
        assert response.body.startswith(b"<html><BODY class='x'><p>You see this page through a proxy.</p>hello ")
        assert response.body.endswith(b"</body></html>")
        assert response.body.count(b"proxy") == 1
        assert "Content-Encoding" not in response.headers
        assert response.headers["ETag"] == 'W/"v1"'

    async def test_leaves_alone_what_is_no_page(self, url: str, fetch: Fetch) -> None:
        response = await fetch(f"{url}/plain")
        assert b"proxy" not in response.body
        assert (response.headers["ETag"], response.headers["Content-Length"]) == ('"v1"', str(len(response.body)))


class TestEvents:
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CR LF", "CR"])
    async def test_edits_each_event_and_holds_none_back(self, serve: Serve, end: str) -> None:
        """The upstream sends the next event when the client has the last one."""
        had = asyncio.Queue[bytes]()

        class Events(RequestHandler):
            async def get(self) -> None:
                self.set_header("Content-Type", "text/event-stream")
                for number in range(3):
                    event = f"id: {number}{end}data: a secret{end}{end}"
                    # In pieces, of which none is an event.
                    for start in range(0, len(event), 5):
                        self.write(event[start : start + 5])
                        await self.flush()
                        await asyncio.sleep(0)
                    expected = event.replace("secret", "******").encode()
                    received = b""
                    while len(received) < len(expected):
                        received += await had.get()
                    assert received == expected

        url = serve(load("events").make_app(serve(Application([(r"/", Events)]))))
        client = SimpleAsyncHTTPClient(force_instance=True)
        response = await client.fetch(f"{url}/", streaming_callback=had.put_nowait, request_timeout=10)
        client.close()
        assert response.code == 200

    async def test_leaves_alone_what_is_no_stream(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("events").make_app(serve(mirror())))
        assert seen(await fetch(f"{url}/secret"))["uri"] == "/secret"


class TestHostAndPort:
    async def test_the_path_says_where_to(self, serve: Serve, fetch: Fetch) -> None:
        one, two = serve(mirror("one")), serve(mirror("two"))
        url = serve(load("host_and_port").make_app(one, two))
        for upstream, name in ((one, "one"), (two, "two")):
            place = upstream.removeprefix("http://")
            got = seen(await fetch(f"{url}/proxy/{place}/a%2Fb//c?x=1", method="POST", body=b"hello"))
            assert (got["name"], got["uri"]) == (name, "/a%2Fb//c?x=1")
            assert got["headers"]["X-Forwarded-Prefix"] == f"/proxy/{place}"

    async def test_nowhere_else(self, serve: Serve, fetch: Fetch) -> None:
        url = serve(load("host_and_port").make_app("http://127.0.0.1:9000"))
        assert (await fetch(f"{url}/proxy/127.0.0.1:1/")).code == 403

    async def test_a_websocket_too(self, serve: Serve) -> None:
        class Echo(WebSocketHandler):
            async def on_message(self, message: str | bytes) -> None:
                await self.write_message(message)

        upstream = serve(Application([(r"/ws", Echo)]))
        url = serve(load("host_and_port").make_app(upstream))
        place = upstream.removeprefix("http://")
        # Tornado compares Origin, which the client leaves out, with Host.
        connection = await websocket_connect(f"{url.replace('http', 'ws')}/proxy/{place}/ws")
        await connection.write_message("hello")
        assert await connection.read_message() == "hello"
        connection.close(1000)
        assert await connection.read_message() is None
        await asyncio.wait_for(drained(), 10)


class TestEmbeddedUpstream:
    """What ``--demo`` serves, through the mounts that it asks for."""

    @pytest.fixture
    async def url(self, serve: Serve) -> AsyncIterator[str]:
        demo = await embedded.start()
        yield serve(Application([mount(prefix, upstream, **options) for prefix, upstream, options in demo.mounts()]))
        await demo.stop()

    @pytest.mark.parametrize(
        ("path", "content_type"),
        [("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")],
    )
    async def test_serves_the_page(self, url: str, fetch: Fetch, path: str, content_type: str) -> None:
        response = await fetch(url + path)
        assert response.code == 200
        assert response.headers["Content-Type"].startswith(content_type)

    async def test_the_page_needs_nothing_from_elsewhere(self, url: str, fetch: Fetch) -> None:
        for path in ("/", "/app.js", "/style.css"):
            text = (await fetch(url + path)).body.decode()
            # The names of XML namespaces are no addresses.
            assert "://" not in text.replace("http://www.w3.org/2000/svg", "")

    async def test_every_button_of_the_playground_has_an_answer(
        self, url: str, fetch: Fetch, expect_log: LogGuard
    ) -> None:
        expect_log("GET /refused")
        expect_log("GET /slow-head")
        page = (await fetch(f"{url}/")).body.decode()
        paths = [part.partition('"')[0] for part in page.split('data-path="')[1:]]
        codes = {path: (await fetch(f"{url}/{path}")).code for path in paths if path != "truncated"}
        assert codes == {
            "status/200": 200,
            "status/404": 404,
            "status/500": 500,
            "echo": 200,
            "refused": 502,
            "slow-head": 504,
        }

    async def test_a_truncated_response_arrives_broken(self, url: str, fetch: Fetch, expect_log: LogGuard) -> None:
        expect_log("GET /truncated")
        with pytest.raises(HTTPStreamClosedError):
            await fetch(f"{url}/truncated")

    async def test_events_come_as_they_are_sent(self, url: str) -> None:
        # The stream has no end, so a proxy that waited for one would never give an event.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /events?rate=100 HTTP/1.1\r\nHost: demo\r\n\r\n")
        async with asyncio.timeout(10):
            for number in (1, 2, 3):
                await reader.readuntil(b'data: {"number": %d, "sent": ' % number)
        writer.close()
        await writer.wait_closed()

    async def test_counts_downloads_and_uploads(self, url: str, fetch: Fetch) -> None:
        body = b"x" * 300_000
        assert len((await fetch(f"{url}/download?bytes=200000")).body) == 200_000
        assert seen(await fetch(f"{url}/upload", method="POST", body=body))["bytes"] == 300_000
        memory = seen(await fetch(f"{url}/memory"))
        assert (memory["sent"], memory["received"]) == (200_000, 300_000)

    async def test_echoes_websocket_messages_to_its_own_page_only(self, url: str) -> None:
        request = HTTPRequest(f"{url.replace('http', 'ws')}/websocket", headers={"Origin": url})
        connection = await websocket_connect(request)
        for message in ("hello", b"\x00" * 100_000):
            await connection.write_message(message, binary=isinstance(message, bytes))
            assert await connection.read_message() == message
        connection.close(1000)
        assert await connection.read_message() is None
        assert connection.close_code == 1000
        request.headers["Origin"] = "http://evil.example"
        with pytest.raises(HTTPClientError, match="403"):
            await websocket_connect(request)

    async def test_says_what_is_wrong_with_an_argument(self, url: str, fetch: Fetch) -> None:
        response = await fetch(f"{url}/download?bytes=many")
        assert (response.code, response.reason) == (400, "bytes is not a number")
