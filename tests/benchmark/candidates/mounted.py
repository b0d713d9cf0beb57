"""Ours, as most users run it: mounted in a plain Application, behind Tornado's server or ours (--our-server)."""

from __future__ import annotations

import argparse
from contextlib import AbstractAsyncContextManager

from tests.benchmark.candidates.serving import arguments, run, serving_rules
from tornado_proxy import mount


def serving(args: argparse.Namespace) -> AbstractAsyncContextManager[None]:
    return serving_rules([mount("/", args.upstream)], args.port, args.our_server, args.http2)


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--our-server", action="store_true")
    parser.add_argument("--http2", action="store_true", help="with --our-server")
    run(serving, parser.parse_args())
