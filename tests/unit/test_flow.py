"""BodyPipe: what a producer and a consumer may rely on."""

import asyncio
from types import SimpleNamespace

import pytest

from tornado_proxy.errors import ProxyError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.upload import Upload


class TestWriting:
    async def test_below_the_limit_the_producer_goes_on(self):
        assert BodyPipe(10).write(b"123456789") is None

    async def test_at_the_limit_it_waits_until_the_consumer_is_done_with_what_it_has_read(self):
        pipe = BodyPipe(10)
        room = pipe.write(b"0123456789")
        assert not room.done()
        assert await pipe.read() == b"0123456789"
        assert (pipe.held, room.done()) == (10, False)
        reader = asyncio.ensure_future(pipe.read())
        await room
        assert pipe.held == 0
        assert pipe.write(b"a") is None
        assert await reader == b"a"

    async def test_what_is_taken_is_out_of_the_pipe_at_once(self):
        pipe = BodyPipe(10)
        room = pipe.write(b"0123456789")
        assert pipe.take(1) == b"0"
        assert (pipe.held, room.done()) == (9, True)

    async def test_who_takes_after_a_read_is_done_with_what_it_has_read(self):
        pipe = BodyPipe(10)
        room = pipe.write(b"0123456789")
        assert await pipe.read() == b"0123456789"
        assert pipe.take(1) is None
        assert (pipe.held, room.done()) == (0, True)

    async def test_after_the_end_bytes_are_dropped(self):
        pipe = BodyPipe(10)
        pipe.close()
        assert pipe.write(b"late") is None
        assert await pipe.read() == b""

    async def test_a_producer_that_waits_is_released_when_nobody_will_read(self):
        pipe = BodyPipe(1)
        room = pipe.write(b"x")
        pipe.discard()
        assert room.done()
        assert pipe.write(b"y") is None


class TestReading:
    async def test_all_that_is_held_comes_at_once(self):
        pipe = BodyPipe(100)
        pipe.write(b"a")
        pipe.write(b"b")
        assert await pipe.read() == b"ab"

    async def test_a_reader_waits_for_the_first_byte(self):
        pipe = BodyPipe(100)
        reader = asyncio.ensure_future(pipe.read())
        await asyncio.sleep(0)
        assert not reader.done()
        pipe.write(b"a")
        assert await reader == b"a"

    async def test_what_came_before_a_failure_is_still_read(self):
        pipe = BodyPipe(100)
        pipe.write(b"a")
        pipe.fail(OSError("cut"))
        assert await pipe.read() == b"a"
        with pytest.raises(OSError, match="cut"):
            await pipe.read()

    async def test_the_first_end_counts(self):
        pipe = BodyPipe(100)
        pipe.close()
        pipe.fail(OSError("late"))
        assert await pipe.read() == b""


class TestCallbacks:
    async def test_take_asks_to_be_called_when_it_finds_nothing(self):
        pipe, calls = BodyPipe(100), []
        pipe.on_data = lambda: calls.append("data")
        pipe.write(b"abc")
        assert (pipe.take(2), pipe.take(2), pipe.take(2)) == (b"ab", b"c", None)
        assert calls == []
        pipe.write(b"d")
        pipe.write(b"e")
        assert calls == ["data"]

    async def test_the_end_is_news_too(self):
        pipe, calls = BodyPipe(100), []
        pipe.on_data = lambda: calls.append("data")
        assert pipe.take(1) is None
        pipe.close()
        assert calls == ["data"]
        assert pipe.take(1) == b""

    async def test_an_offer_that_fills_it_is_taken_and_the_next_is_called_for_when_there_is_room(self):
        pipe, calls = BodyPipe(3), []
        pipe.on_drain = lambda: calls.append("drain")
        assert pipe.offer(b"ab")
        assert not pipe.offer(b"cd")
        assert await pipe.read() == b"abcd"
        assert (calls, pipe.stuffed()) == ([], True)
        reader = asyncio.ensure_future(pipe.read())
        await asyncio.sleep(0)
        assert calls == ["drain"]
        assert pipe.offer(b"e")
        assert await reader == b"e"

    async def test_who_asks_beforehand_is_called_too(self):
        pipe, calls = BodyPipe(2), []
        pipe.on_drain = lambda: calls.append("drain")
        pipe.on_data = lambda: calls.append("data")
        assert pipe.starving()
        assert pipe.offer(b"a")
        assert not pipe.offer(b"b")
        assert (calls, pipe.starving()) == (["data"], False)
        assert pipe.stuffed()
        assert pipe.take(1) == b"a"
        assert (calls, pipe.stuffed()) == (["data", "drain"], False)

    async def test_nobody_waits_at_the_end(self):
        pipe = BodyPipe(1)
        pipe.offer(b"a")
        pipe.close()
        assert not pipe.stuffed()
        assert pipe.take(1) == b"a"
        assert not pipe.starving()

    async def test_an_empty_offer_is_not_the_end(self):
        pipe = BodyPipe(2)
        assert pipe.offer(b"")
        reader = asyncio.ensure_future(pipe.read())
        await asyncio.sleep(0)
        assert pipe.offer(b"a")
        assert await reader == b"a"

    async def test_an_offer_after_the_end_is_dropped(self):
        pipe = BodyPipe(2)
        pipe.close()
        assert pipe.offer(b"late")
        assert (pipe.total, await pipe.read()) == (0, b"")


class TestCounts:
    async def test_consumed_is_what_the_consumer_had(self):
        pipe = BodyPipe(100)
        pipe.write(b"abcdef")
        pipe.take(2)
        assert (pipe.total, pipe.size, pipe.consumed) == (6, 4, 2)
        pipe.discard()
        assert pipe.consumed == 2


class TestUploads:
    """The pipe of an inbound body, when its exchange is over."""

    def upload(self):
        downstream = SimpleNamespace(hooked=lambda name: False)
        options, watchdog = SimpleNamespace(buffer_size=10, max_body_size=None), SimpleNamespace(upload_ended=list)
        return Upload(SimpleNamespace(committed=False), downstream, options, watchdog, None, False)

    @pytest.mark.parametrize("complete", [False, True], ids=["still coming", "complete and held"])
    async def test_one_that_was_not_sent_does_not_seem_to_be(self, complete):
        """Its client may take more before it learns that it is cancelled."""
        upload = self.upload()
        assert upload.receive(b"abc") is None
        assert upload.pipe.take(1) == b"a"
        if complete:
            upload.received_all(None)
        upload.end()
        with pytest.raises(ProxyError, match="the exchange is over"):
            upload.pipe.take(10)
        with pytest.raises(ProxyError):
            await upload.pipe.read()

    async def test_one_that_was_sent_stays_well(self):
        upload = self.upload()
        assert upload.receive(b"abc") is None
        upload.received_all(None)
        assert await upload.pipe.read() == b"abc"
        upload.end()
        assert await upload.pipe.read() == b""
