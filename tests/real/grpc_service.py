"""A gRPC service on grpcio, with bytes for messages: nothing is generated, and no message has a schema."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

PREFIX = "/test.Echo/"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class EchoService:
    """Answers on ``port``, in clear text, as gRPC's insecure ports do: HTTP/2 with prior knowledge.

    ``seen`` has the metadata of each call; ``cancelled`` is set when a call ended before its answer; ``sent`` counts
    the messages of a flood.
    """

    # Messages, of 64 KiB: more than windows, pipes and the kernel hold.
    FLOOD = 1500

    def __init__(self) -> None:
        self.sent = 0
        self.seen: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        # So that as many calls as that run at a time.
        self._pool = ThreadPoolExecutor(128)
        self._server = grpc.server(self._pool, options=UNLIMITED)
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "ServerStream": grpc.unary_stream_rpc_method_handler(self.server_stream),
            "ClientStream": grpc.stream_unary_rpc_method_handler(self.client_stream),
            "Bidi": grpc.stream_stream_rpc_method_handler(self.bidi),
            "Flood": grpc.unary_stream_rpc_method_handler(self.flood),
            "Hang": grpc.unary_stream_rpc_method_handler(self.hang),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(5)
        self._pool.shutdown()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Return the request twice; ``fail`` is an error with a message that is not ASCII."""
        self.seen.append(dict(context.invocation_metadata()))
        context.send_initial_metadata((("x-initial", "1"),))
        context.set_trailing_metadata((("x-trailing", "2"), ("x-trailing-bin", b"\0\1\2")))
        if request == b"fail":
            context.abort(grpc.StatusCode.NOT_FOUND, "nothing like that: \u00e9")
        return request * 2

    def server_stream(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield as many messages as the request says."""
        for number in range(int(request)):
            yield b"message %d" % number

    def client_stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Return how many messages and bytes came."""
        sizes = [len(request) for request in requests]
        return b"%d %d" % (len(sizes), sum(sizes))

    def bidi(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Return each message as it comes; ``stop`` ends the call from here."""
        for request in requests:
            if request == b"stop":
                return
            yield request

    def flood(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield a lot, as fast as it is taken."""
        for _ in range(self.FLOOD):
            yield b"x" * 65536
            self.sent += 1

    def hang(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield one message, or none for ``silent``, and then nothing until the call ends."""
        ended = threading.Event()

        def end() -> None:
            self.cancelled.set()
            ended.set()

        context.add_callback(end)
        if request != b"silent":
            yield b"first"
        ended.wait(20)


def message(data: bytes) -> bytes:
    """Return ``data`` as gRPC frames it in a body: uncompressed, with its length."""
    return struct.pack(">BI", 0, len(data)) + data


def messages(body: bytes) -> list[bytes]:
    """Return the messages in a body."""
    found = []
    while body:
        _, size = struct.unpack(">BI", body[:5])
        assert len(body) >= 5 + size, "the last message is not complete"
        found.append(body[5 : 5 + size])
        body = body[5 + size :]
    return found


class EchoClient:
    """Calls the service through grpcio's own client."""

    def __init__(self, target: str, **secure: Any) -> None:
        credentials = secure.get("credentials")
        options = UNLIMITED + list(secure.get("options", []))
        if credentials is None:
            self.channel = grpc.insecure_channel(target, options=options)
        else:
            self.channel = grpc.secure_channel(target, credentials, options=options)
        self.unary: Callable[..., bytes] = self.channel.unary_unary(PREFIX + "Unary")
        self.unknown: Callable[..., bytes] = self.channel.unary_unary(PREFIX + "Unknown")
        self.server_stream = self.channel.unary_stream(PREFIX + "ServerStream")
        self.client_stream = self.channel.stream_unary(PREFIX + "ClientStream")
        self.bidi = self.channel.stream_stream(PREFIX + "Bidi")
        self.flood = self.channel.unary_stream(PREFIX + "Flood")
        self.hang = self.channel.unary_stream(PREFIX + "Hang")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


class Sender:
    """The requests of a stream, sent one by one when the test says so."""

    def __init__(self) -> None:
        self._waiting: list[bytes | None] = []
        self._changed = threading.Condition()

    def send(self, data: bytes) -> None:
        self._put(data)

    def end(self) -> None:
        self._put(None)

    def _put(self, data: bytes | None) -> None:
        with self._changed:
            self._waiting.append(data)
            self._changed.notify()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            data = self._waiting.pop(0)
        if data is None:
            raise StopIteration
        return data
