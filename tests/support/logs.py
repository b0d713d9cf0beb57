"""The guard over the log: an undeclared warning fails the test, and so does a declared one that never came."""

from __future__ import annotations

import logging
import re
from types import TracebackType
from typing import Self

GUARDED = ("tornado", "asyncio", "tornado_proxy")


class Expectation:
    """A log line that the test expects. As a context manager: it has come when the block ends."""

    def __init__(self, pattern: str, *, required: bool) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)
        self.required = required
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.check()

    def check(self) -> None:
        assert self.lines or not self.required, f"no log line matched {self.pattern.pattern!r}"


class LogGuard(logging.Handler):
    """Sorts what is logged at WARNING or above into expected and unexpected lines.

    Called as the ``expect_log`` fixture: ``expect_log(r"refused")``. A pattern is searched in
    ``LEVEL logger: message`` and the traceback behind it. With ``required=False`` the line may come or not.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.expectations: list[Expectation] = []
        self.unexpected: list[str] = []

    def __call__(self, pattern: str, *, required: bool = True) -> Expectation:
        expectation = Expectation(pattern, required=required)
        self.expectations.append(expectation)
        return expectation

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] not in GUARDED:
            return
        line = self.format(record)
        matching = [expectation for expectation in self.expectations if expectation.pattern.search(line)]
        for expectation in matching:
            expectation.lines.append(line)
        if not matching:
            self.unexpected.append(line)

    def check(self) -> None:
        """Fail unless what was logged is exactly what was declared."""
        assert not self.unexpected, "unexpected log lines:\n" + "\n".join(self.unexpected)
        for expectation in self.expectations:
            expectation.check()
