"""The contract, kept by CurlClient."""

import asyncio
import gc

from tornado.httputil import HTTPHeaders

from tests.clients.support import collected, request_for
from tests.clients.wire_contract import Contract
from tests.support.wire import within
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.clients.curl.transfer import Transfer
from tornado_proxy.flow import BodyPipe


class TestCurl(Contract):
    client_class = CurlClient

    async def test_an_idle_handle_holds_nothing_of_its_last_request(self, client, upstream):
        """Nor its trailers: what libcurl may call is called by the handle, for as long as nobody needs it."""
        pipe = BodyPipe(1024)
        pipe.write(b"hello")
        pipe.trailers = HTTPHeaders({"X-A": "1"})
        pipe.close()
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn, _ = await upstream.request()
        await conn.respond(200)
        assert await within(collected(await within(sending, "the response")), "the body") == (b"", None)
        del pipe, sending
        await asyncio.sleep(0)
        gc.collect()
        assert [each for each in gc.get_objects() if isinstance(each, Transfer)] == []
