"""A handler of Tornado that answers by itself: what any proxy mounted in Tornado cannot be faster than."""

from __future__ import annotations

import argparse
from contextlib import AbstractAsyncContextManager

from tornado.web import RequestHandler

from tests.benchmark.candidates.serving import arguments, run, serving_rules

PAGE = b"x" * 1024


class Constant(RequestHandler):
    def get(self) -> None:
        self.write(PAGE)


def serving(args: argparse.Namespace) -> AbstractAsyncContextManager[None]:
    return serving_rules([(r".*", Constant)], args.port)


if __name__ == "__main__":
    run(serving, arguments().parse_args())
