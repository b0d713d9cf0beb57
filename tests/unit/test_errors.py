"""The exception tree: status, side and retry safety are facts of the class."""

from __future__ import annotations

import inspect
import re

import pytest

from tornado_proxy import errors
from tornado_proxy.errors import Phase, ProxyError, Retry, Side

TREE = [
    ("ProxyError", 502, Side.PROXY, Retry.NEVER),
    ("NoUpstreamAvailable", 503, Side.UPSTREAM, Retry.NEVER),
    ("UpstreamError", 502, Side.UPSTREAM, Retry.NEVER),
    ("ConnectError", 502, Side.UPSTREAM, Retry.ALWAYS),
    ("ConnectTimeout", 504, Side.UPSTREAM, Retry.ALWAYS),
    ("UpstreamTimeout", 504, Side.UPSTREAM, Retry.NEVER),
    ("UpstreamClosed", 502, Side.UPSTREAM, Retry.IF_IDEMPOTENT),
    ("InvalidResponse", 502, Side.UPSTREAM, Retry.NEVER),
    ("BadRequest", 400, Side.DOWNSTREAM, Retry.NEVER),
    ("BodyTooLarge", 413, Side.DOWNSTREAM, Retry.NEVER),
    ("DownstreamTimeout", 408, Side.DOWNSTREAM, Retry.NEVER),
    ("DownstreamClosed", 499, Side.DOWNSTREAM, Retry.NEVER),
    ("HookError", 500, Side.PROXY, Retry.NEVER),
    ("LoopDetected", 508, Side.PROXY, Retry.NEVER),
    ("TunnelClosed", 503, Side.PROXY, Retry.NEVER),
]


class TestTheTree:
    @pytest.mark.parametrize(("name", "status", "side", "retry"), TREE)
    def test_each_class_knows_its_status_its_side_and_whether_to_retry(
        self, name: str, status: int, side: Side, retry: Retry
    ) -> None:
        cls = getattr(errors, name)
        assert (cls.status_code, cls.side, cls.retry) == (status, side, retry)

    def test_no_class_is_missing_from_the_table(self) -> None:
        defined = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, ProxyError)}
        assert defined == {row[0] for row in TREE}

    def test_every_class_and_its_status_are_drawn_in_the_docstring(self) -> None:
        drawn = dict(re.findall(r"^ +[x+-] (\w+) +(\d{3}) ", errors.__doc__ or "", re.MULTILINE))
        assert drawn == {name: str(status) for name, status, _, _ in TREE[1:]}

    def test_only_an_error_before_the_first_byte_is_always_retried(self) -> None:
        always = {name for name, *_ in TREE if getattr(errors, name).retry is Retry.ALWAYS}
        assert all(issubclass(getattr(errors, name), errors.ConnectError) for name in always)


class TestAnError:
    def test_has_message_phase_and_upstream(self) -> None:
        error = errors.ConnectError("refused", phase=Phase.CONNECT, upstream="http://10.0.0.2:9000")
        assert (str(error), error.phase, error.upstream) == ("refused", Phase.CONNECT, "http://10.0.0.2:9000")

    def test_needs_neither_phase_nor_upstream(self) -> None:
        error = errors.BadRequest("no")
        assert error.phase is None
        assert error.upstream is None

    def test_may_change_its_status_without_changing_the_class(self) -> None:
        error = errors.BadRequest("coding")
        error.status_code = 501
        assert errors.BadRequest.status_code == 400

    @pytest.mark.parametrize(
        ("word", "text"),
        [(errors.BadRequest.side, "downstream"), (Phase.HEAD, "head"), (Retry.IF_IDEMPOTENT, "if-idempotent")],
    )
    def test_words_compare_with_strings(self, word: str, text: str) -> None:
        assert word == text
