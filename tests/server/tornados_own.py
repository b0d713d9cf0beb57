"""Runs test modules of Tornado with our server in place: ``python -m tests.server.tornados_own MODULE...``.

Prints the names of the tests that fail, one a line. What Tornado logs about a bad request is its own business, and the
options of its server that ours lacks are left out.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
import unittest
from typing import Any

import tornado.testing

from tornado_proxy.server import HTTPServer

KNOWN = ("ssl_options", "protocol", "max_header_size", "max_body_size")


class InPlace(HTTPServer):
    """Takes the options of Tornado's server."""

    def __init__(self, app: Any, **options: Any) -> None:
        known = {name: value for name, value in options.items() if name in KNOWN}
        if "idle_connection_timeout" in options:
            known["idle_timeout"] = known["header_timeout"] = options["idle_connection_timeout"]
        super().__init__(app, **known)


class ExpectLog(tornado.testing.ExpectLog):
    def __init__(self, logger: Any, regex: str, required: bool = True, level: int | None = None) -> None:
        name = logger if isinstance(logger, str) else logger.name
        super().__init__(logger, regex, required and name != "tornado.general", level)


def main(names: list[str]) -> None:
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
    tornado.testing.HTTPServer = InPlace
    tornado.testing.ExpectLog = ExpectLog
    suite = unittest.TestSuite()
    for name in names:
        module: Any = importlib.import_module(f"tornado.test.{name}")
        if hasattr(module, "HTTPServer"):
            module.HTTPServer = InPlace
        suite.addTests(unittest.defaultTestLoader.loadTestsFromModule(module))
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    # A subtest's name says which one after the test's.
    failed = {str(test).partition(" ")[0] for test, _ in [*result.failures, *result.errors]}
    print("\n".join([f"ran {result.testsRun}", *sorted(failed)]))


if __name__ == "__main__":
    main(sys.argv[1:])
