"""The standalone's access log: one line for each exchange on stdout, written where it cannot hurt the service.

A pipe that nobody reads, a full disk or a closed stdout loses lines; it never delays or fails an exchange. So a thread
of its own writes them, and what it cannot write in time is dropped and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from tornado.web import RequestHandler

from tornado_proxy.messages import Outcome

logger = logging.getLogger(__name__)

# Lines that wait for the writer; some 2 MB at most. Beyond them stdout is stuck, and lines are dropped.
MAX_WAITING = 10_000
# A write of this size is atomic on a pipe (PIPE_BUF on Linux), so the lines of several processes do not mix.
MAX_WRITE = 4096
# Longer paths, and methods, which are the client's choice too, are cut, so that a line fits into one write even if JSON
# escapes every character of it.
MAX_PATH = 512
MAX_METHOD = 32
# The writer rests so long after it has caught up. Without a rest it would wake, and take the interpreter from the loop,
# for every exchange.
REST = 0.05

Value = str | int | float | None
Format = Callable[[dict[str, Value]], str]


def text_line(fields: dict[str, Value]) -> str:
    """Return the fields for people: ``2026-01-31T12:00:00Z 127.0.0.1 GET /a 200 0/512 http://up:9000 0.012s ok``."""
    outcome = "ok" if fields["side"] is None else f"{fields['side']}/{fields['phase'] or '-'}"
    request = f"{fields['client']} {printable(fields['method'])} {printable(fields['path'])}"
    answer = f"{fields['status']} {fields['bytes_up']}/{fields['bytes_down']} {printable(fields['upstream'])}"
    return f"{fields['time']} {request} {answer} {fields['seconds']}s {outcome}"


def json_line(fields: dict[str, Value]) -> str:
    """Return the fields for programs: one JSON object."""
    return json.dumps(fields, separators=(",", ":"))


FORMATS: dict[str, Format] = {"text": text_line, "json": json_line}


def printable(value: Value) -> str:
    """Return ``value``, or ``-`` for none, with nothing that could forge a line, split a field or steer a terminal."""
    text = str(value or "-")
    if text.isascii() and text.isprintable() and " " not in text:
        return text
    return "".join(c if "!" <= c <= "~" else f"\\x{ord(c):02x}" for c in text)


def write_out(text: str) -> bool:
    """Write ``text`` to stdout now, past Python's buffer; False when that failed.

    A buffered write that fails would fail again when the interpreter flushes at exit, and spoil the exit status.
    """
    # None when the program was started without stdout. Descriptor 1 may then be anything, a connection for one.
    if sys.stdout is None:
        return False
    data = text.encode()
    try:
        descriptor = sys.stdout.fileno()
        while data:
            data = data[os.write(descriptor, data) :]
    except (OSError, ValueError):
        return False
    return True


class AccessLog:
    """Writes a line for each exchange; ``exchange_done`` is given to ``mount()`` as ``on_done``.

    It starts a thread, so it is made after forking. ``close`` writes what waits and ends the thread.
    """

    def __init__(self, kind: str) -> None:
        self.format = FORMATS[kind]
        # None ends the thread.
        self.waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # Lines lost since the last complaint. The loop counts those that did not fit, the thread those not written.
        self.lost = 0
        # A daemon: a write that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._write_lines, name="access log", daemon=True)
        self.thread.start()

    def exchange_done(self, handler: RequestHandler, outcome: Outcome) -> None:
        """Log one exchange."""
        self._put(
            handler,
            status=outcome.status,
            bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down,
            upstream=outcome.upstream,
            side=outcome.side,
            phase=outcome.phase,
        )

    def answered_here(self, handler: RequestHandler) -> None:
        """Log a request that no mount took (it was answered 404); the application's ``log_function``."""
        self._put(handler, status=handler.get_status(), side=None, phase=None)

    def close(self, timeout: float = 1.0) -> None:
        """Write what waits, as far as stdout takes it within ``timeout`` seconds."""
        self.waiting.put(None)
        self.thread.join(timeout)

    def _put(
        self,
        handler: RequestHandler,
        *,
        status: int,
        side: str | None,
        phase: str | None,
        bytes_up: int = 0,
        bytes_down: int = 0,
        upstream: str | None = None,
    ) -> None:
        request = handler.request
        fields: dict[str, Value] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": request.remote_ip,
            "method": (request.method or "")[:MAX_METHOD],
            # Without the query, which may hold secrets.
            "path": request.path[:MAX_PATH],
            "status": status,
            "bytes_up": bytes_up,
            "bytes_down": bytes_down,
            "upstream": upstream,
            "seconds": round(request.request_time(), 4),
            "side": None if side is None else str(side),
            "phase": None if phase is None else str(phase),
        }
        if self.waiting.qsize() < MAX_WAITING:
            self.waiting.put(self.format(fields) + "\n")
        else:
            self.lost += 1

    def _write_lines(self) -> None:
        batch = ""
        while True:
            try:
                line = self.waiting.get_nowait() if batch else self.waiting.get()
            except queue.Empty:
                line = ""
            # A batch is written when nothing more waits, when the next line does not fit, and at the end.
            if batch and (not line or len(batch) + len(line) > MAX_WRITE):
                self._write(batch)
                batch = ""
            if line is None:
                return
            if not line:
                time.sleep(REST)
            batch += line

    def _write(self, batch: str) -> None:
        if not write_out(batch):
            self.lost += batch.count("\n")
        elif self.lost:
            lost, self.lost = self.lost, 0
            logger.warning("access log: %d lines were lost because stdout did not take them", lost)
