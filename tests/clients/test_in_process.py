"""Applications in this process as upstreams: ASGI by httpx's transport, and WSGI in an ASGI wrapper."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("httpx")
pytest.importorskip("starlette")

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tornado_proxy.clients.httpx import HttpxClient


async def echo(request: Request) -> Response:
    return JSONResponse(
        {
            "method": request.method,
            "raw_path": request.scope["raw_path"].decode(),
            "path": request.url.path,
            "query": request.scope["query_string"].decode(),
            "headers": [[name.decode(), value.decode()] for name, value in request.headers.raw],
            "body": (await request.body()).decode(),
        },
        headers={"X-App": "starlette"},
    )


async def cookies(request: Request) -> Response:
    response = PlainTextResponse("hello")
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    return response


async def broken(request: Request) -> Response:
    raise RuntimeError("the application failed")


STARLETTE = Starlette(
    routes=[
        Route("/cookies", cookies),
        Route("/broken", broken),
        Route("/{rest:path}", echo, methods=["GET", "POST", "PUT", "DELETE"]),
    ]
)


def client_of(app) -> HttpxClient:
    return HttpxClient(httpx.AsyncClient(transport=httpx.ASGITransport(app)))


@pytest.mark.parametrize("mode", ["stream", "buffer"])
class TestAnASGIApplication:
    async def test_sees_the_request_and_answers(self, proxy, mode):
        running = await proxy("http://app/base", client=client_of(STARLETTE), response_mode=mode)
        response = await running.request("POST", "/a%2fb/%7e?x=%zz", [("X-A", "1")], b"hello")
        assert (response.status, response.header("X-App")) == (200, "starlette")
        seen = json.loads(response.body)
        assert (seen["method"], seen["raw_path"], seen["query"]) == ("POST", "/base/a%2fb/%7e", "x=%zz")
        assert seen["body"] == "hello"
        names = [name for name, _ in seen["headers"]]
        assert names[0] == "host"
        assert ["host", "app"] in seen["headers"]
        assert ["x-a", "1"] in seen["headers"]
        assert not {"user-agent", "accept", "accept-encoding", "connection"} & set(names)

    async def test_sends_two_cookies(self, proxy, mode):
        running = await proxy("http://app", client=client_of(STARLETTE), response_mode=mode)
        response = await running.get("/cookies")
        assert (response.body, len(response.all("Set-Cookie"))) == (b"hello", 2)

    async def test_that_raises_is_a_502(self, proxy, mode, expect_log):
        expect_log("the application failed")
        running = await proxy("http://app", client=client_of(STARLETTE), response_mode=mode)
        assert (await running.get("/broken")).status == 502


class TestAWSGIApplication:
    async def test_in_a_wrapper(self, proxy):
        flask = pytest.importorskip("flask")
        a2wsgi = pytest.importorskip("a2wsgi")
        app = flask.Flask("upstream")

        @app.route("/base/<path:rest>", methods=["GET", "POST"])
        def echo(rest: str):
            request = flask.request
            return {"method": request.method, "rest": rest, "x": request.args["x"], "body": request.data.decode()}

        running = await proxy("http://app/base", client=client_of(a2wsgi.WSGIMiddleware(app)))
        response = await running.request("POST", "/y/z?x=1", [("Content-Type", "text/plain")], b"hello")
        assert response.status == 200
        assert json.loads(response.body) == {"method": "POST", "rest": "y/z", "x": "1", "body": "hello"}
        assert (await running.get("/y")).status == 400


class TestItsCapabilities:
    def test_its_transport_collects_the_response(self):
        assert not client_of(STARLETTE).capabilities.streams_response
        assert HttpxClient(httpx.AsyncClient()).capabilities.streams_response
