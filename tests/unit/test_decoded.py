"""A body that is decoded as it is read."""

import asyncio
import gzip

import pytest

from tornado_proxy.decoded import DecodedStream
from tornado_proxy.decoding import decoder_for
from tornado_proxy.errors import InvalidResponse, UpstreamClosed
from tornado_proxy.flow import BodyPipe


@pytest.fixture
def pipe():
    return BodyPipe(1024)


@pytest.fixture
def stream(pipe):
    return DecodedStream(pipe, decoder_for("gzip"), "http://a")


class TestReading:
    async def test_waits_until_a_byte_can_be_decoded(self, pipe, stream):
        encoded = gzip.compress(b"hello")
        reading = asyncio.ensure_future(stream.read())
        for byte in encoded[:10]:
            pipe.write(bytes([byte]))
            await asyncio.sleep(0)
        assert not reading.done()
        pipe.write(encoded[10:])
        assert await reading == b"hello"
        assert not stream.exhausted
        pipe.close()
        assert await stream.read() == b""
        assert stream.exhausted
        assert await stream.read() == b""

    async def test_without_waiting_it_gives_what_it_can(self, pipe, stream):
        encoded = gzip.compress(b"hello")
        assert stream.read_nowait() == b""
        pipe.write(encoded[:5])
        assert stream.read_nowait() == b""
        pipe.write(encoded[5:])
        assert stream.read_nowait() == b"hello"
        assert stream.read_nowait() == b""
        assert stream.consumed == 5

    async def test_gives_64_kib_at_a_time(self, pipe, stream):
        pipe.write(gzip.compress(bytes(1 << 20)))
        pipe.close()
        sizes = []
        while chunk := await stream.read():
            sizes.append(len(chunk))
        assert sum(sizes) == 1 << 20
        assert max(sizes) == 64 * 1024

    async def test_the_source_fills_up_while_nobody_reads(self, pipe, stream):
        """One read takes what one read of the source gives, and no more until that is decoded."""
        pipe.write(gzip.compress(bytes(1 << 20)))
        assert pipe.write(b"x" * 1024) is not None
        await stream.read()
        await stream.read()
        assert pipe.size in (0, 1024)
        pipe.discard()

    async def test_nothing_at_all_is_an_empty_body(self, pipe, stream):
        pipe.close()
        assert await stream.read() == b""
        assert stream.ended


class TestFaults:
    async def test_garbage_is_the_upstreams_fault(self, pipe, stream):
        pipe.write(b"no gzip")
        with pytest.raises(InvalidResponse, match="upstream http://a sent: not a valid gzip body") as caught:
            await stream.read()
        assert (caught.value.phase, caught.value.upstream) == ("body", "http://a")

    async def test_so_is_an_end_that_comes_too_early(self, pipe, stream):
        pipe.write(gzip.compress(b"hello")[:-1])
        pipe.close()
        assert await stream.read() == b"hello"
        with pytest.raises(InvalidResponse, match="cut short"):
            await stream.read()
        assert not stream.exhausted

    async def test_a_source_that_broke_is_told(self, pipe, stream):
        pipe.write(gzip.compress(b"hello"))
        pipe.fail(UpstreamClosed("reset"))
        assert await stream.read() == b"hello"
        with pytest.raises(UpstreamClosed):
            await stream.read()

    async def test_dropping_it_drops_the_source(self, pipe, stream):
        pipe.write(gzip.compress(b"hello"))
        stream.discard()
        assert pipe.size == 0
        assert stream.ended
