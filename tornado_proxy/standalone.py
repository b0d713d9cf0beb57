"""``python -m tornado_proxy``: arguments -> Application -> listen -> drain on SIGTERM.

Builds the same ``mount()``s that a user would; there is no private path. What must be known before the first connection
is checked first, and what is wrong there ends the program with one line: status 2 for arguments that cannot be followed
(options, the certificate), 1 for an address that it cannot listen on.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import importlib.util
import itertools
import logging
import math
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tornado import process
from tornado.routing import Rule
from tornado.web import Application, RequestHandler

from tornado_proxy import draining
from tornado_proxy._version import __version__
from tornado_proxy.accesslog import AccessLog, write_out
from tornado_proxy.clients import close_clients
from tornado_proxy.handlers import ProxyHandler
from tornado_proxy.options import OptionError, ProxyOptions
from tornado_proxy.routing import mount
from tornado_proxy.server import HTTPServer
from tornado_proxy.serving import Listener, Workers, fork_workers, stop_requested

logger = logging.getLogger(__name__)

DEFAULT_LISTEN = "127.0.0.1:8888"


class UsageError(Exception):
    """The arguments cannot be followed; the message is one line for the user."""


# Arguments


class Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line, without the synopsis: with so many options it would hide the line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help explains)\n")


def listener(text: str) -> Listener:
    """Read ``PORT`` (of 127.0.0.1), ``HOST:PORT``, ``[::1]:PORT``, ``*:PORT`` (every address) or ``unix:PATH``."""
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise argparse.ArgumentTypeError("unix: needs a path, as unix:/run/proxy.sock")
        return Listener(path=text.removeprefix("unix:"))
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (port.isascii() and port.isdigit() and int(port) < 65536) or (":" in host and not bracketed):
        raise argparse.ArgumentTypeError(f"'{text}' is not [HOST:]PORT, [IPV6]:PORT or unix:PATH")
    if bracketed:
        host = host[1:-1]
    return Listener(None if host == "*" else host or "127.0.0.1", int(port))


def prefix_and_upstream(text: str) -> tuple[str, str]:
    """Read ``PREFIX=URL``."""
    prefix, equals, upstream = text.partition("=")
    if not equals or not upstream or not prefix.startswith("/"):
        raise argparse.ArgumentTypeError(f"'{text}' is not PREFIX=URL, as /api=http://127.0.0.1:9000")
    return prefix, upstream


def seconds(text: str) -> float:
    """Read a time."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return value


def processes(text: str) -> int:
    """Read a number of processes; 0 becomes one for each core."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of processes")
    return int(text) or process.cpu_count()


def make_parser() -> Parser:
    """Return the parser of everything that ``--help`` lists."""
    parser = Parser(
        prog="python -m tornado_proxy",
        description="A transparent, streaming reverse proxy.",
        epilog="Example: python -m tornado_proxy --to http://127.0.0.1:9000 --listen 127.0.0.1:8888",
        # An abbreviation would change its meaning when an option is added.
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--to",
        action="append",
        default=[],
        metavar="URL",
        help="upstream of everything below /; also unix:PATH. Repeated: requests go to each in turn",
    )
    add(
        "--mount",
        action="append",
        default=[],
        metavar="PREFIX=URL",
        type=prefix_and_upstream,
        help="upstream of what is below a prefix; the longest prefix wins (repeatable)",
    )
    add("--demo", action="store_true", help="start an embedded upstream with a page to look at, and proxy it")
    add(
        "--listen",
        action="append",
        metavar="[HOST:]PORT",
        type=listener,
        help=f"or unix:PATH; '*:PORT' is every address, PORT alone 127.0.0.1 (repeatable; {DEFAULT_LISTEN})",
    )
    add("--tls-cert", metavar="FILE", help="serve https with this certificate chain (PEM)")
    add("--tls-key", metavar="FILE", help="private key of --tls-cert, if that file does not hold it")
    add("--http2", action="store_true", help="serve HTTP/2 too: by ALPN with --tls-cert, else to who begins with it")
    add("--processes", type=processes, default=1, metavar="N", help="serve with N processes; 0: one a core (1)")
    add(
        "--drain-timeout",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="on SIGTERM and SIGINT, how long running exchanges may take to finish (30)",
    )
    add("--access-log", choices=["text", "json", "off"], default="text", help="a line an exchange on stdout (text)")
    add("--loop", choices=["auto", "asyncio", "uvloop"], default="auto", help="auto: uvloop where installed")
    add("--upstream-http-version", choices=["1.1", "2", "2-prior-knowledge", "3"], help="what to speak upstream")
    add("--version", action="version", version=f"tornado_proxy {__version__}")
    add_proxy_options(parser.add_argument_group("options of the proxy, for every mount; their defaults are mount()'s"))
    return parser


def add_proxy_options(group: argparse._ArgumentGroup) -> None:
    """Add ``--name`` for each field of ``ProxyOptions`` that a string can say, ``--no-name`` too where it is a switch.

    What is not given is not passed on: each default stands once, in the option itself.
    """
    for field in dataclasses.fields(ProxyOptions):
        read = field.metadata.get("cli")
        if read is None:
            continue
        flag = "--" + field.name.replace("_", "-")
        dest, about = f"option.{field.name}", field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            switch = argparse.BooleanOptionalAction
            group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=about, action=switch)
        else:
            read, metavar = argument_type(read, field.metadata["help"]), field.name.upper()
            group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=about, type=read, metavar=metavar)


def argument_type(read: Callable[[str], Any], meaning: str) -> Callable[[str], Any]:
    """Return ``read`` with a sentence for users in place of its ``ValueError``, which speaks to programmers."""

    def argument(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"'{text}' cannot be read as {meaning}") from error

    return argument


# Application


def make_rules(
    args: argparse.Namespace, demo: Sequence[tuple[str, str, dict[str, Any]]], log: AccessLog | None
) -> list[Rule]:
    """Return the rules that the arguments ask for, the longest prefix first; ``demo`` are the mounts of the demo."""
    given = {name.removeprefix("option."): value for name, value in vars(args).items() if name.startswith("option.")}
    if args.upstream_http_version:
        given["client_options"] = {**given.get("client_options", {}), "http_version": args.upstream_http_version}
    if log:
        given["on_done"] = log.exchange_done

    rules: list[Rule] = []
    # sorted() is stable: of equal prefixes, the first given wins.
    for prefix, upstream in sorted(args.mount, key=lambda pair: -len(pair[0])):
        rules.append(mount_one(prefix, upstream, given))
    rules += [mount_one(prefix, upstream, {**given, **options}) for prefix, upstream, options in demo]
    each = [mount_one("/", upstream, given) for upstream in args.to]
    if len(each) > 1:
        # They were mounted one by one only to have them checked; the turn is taken for each request.
        if any(upstream.startswith("unix:") for upstream in args.to):
            raise UsageError("--to unix:PATH cannot take turns with another --to")
        turns = itertools.cycle(args.to)
        each = [mount("/", lambda: next(turns), **given)]
    return rules + each


def mount_one(prefix: str, upstream: str, options: dict[str, Any]) -> Rule:
    """Return ``mount(prefix, upstream)``, where ``unix:PATH`` is HTTP over that socket."""
    if upstream.startswith("unix:"):
        client_options = {**options.get("client_options", {}), "unix_socket": upstream.removeprefix("unix:")}
        return mount(prefix, "http://localhost", **{**options, "client_options": client_options})
    return mount(prefix, upstream, **options)


def tls_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what to serve https with, or ``None`` for http."""
    if args.tls_cert is None:
        if args.tls_key is not None:
            raise UsageError("--tls-key needs --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(args.tls_cert, args.tls_key)
    except OSError as error:
        named = args.tls_cert + (f" and {args.tls_key}" if args.tls_key else "")
        raise UsageError(f"--tls-cert: cannot use {named}: {error}") from error
    return context


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; ``None`` is asyncio's own."""
    if name == "asyncio":
        return None
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    except ImportError as error:
        if name == "auto":
            return None
        raise UsageError("--loop uvloop needs uvloop: pip install 'tornado_proxy[speed]'") from error
    return factory


def make_application(rules: list[Rule], log: AccessLog | None) -> Application:
    """Return the application that serves ``rules``."""
    return Application(rules, log_function=_LogUnproxied(log))


class _LogUnproxied:
    """The application's ``log_function``. Exchanges are logged from ``on_done``, which knows more."""

    of_exchanges = False

    def __init__(self, log: AccessLog | None) -> None:
        self._log = log

    def __call__(self, handler: RequestHandler) -> None:
        if self._log is not None and not isinstance(handler, ProxyHandler):
            self._log.answered_here(handler)


# Running

# Objects that are made, and not yet let go, before the garbage collector looks for circles among them.
GARBAGE_THRESHOLD = 50_000


async def serve(
    args: argparse.Namespace,
    tls: ssl.SSLContext | None,
    sockets: list[socket.socket],
    workers: Workers | None,
    ready: Callable[[], None],
) -> None:
    """Serve until told to stop, then drain. Calls ``ready`` once it accepts."""
    log = None if args.access_log == "off" else AccessLog(args.access_log)
    demo = None
    if args.demo:
        from tornado_proxy.demo import start  # Nobody else needs it.

        demo = await start()
    rules = make_rules(args, demo.mounts() if demo else (), log)
    server = HTTPServer(make_application(rules, log), ssl_options=tls, http2=args.http2)
    stop = stop_requested(workers)
    rest_garbage_collector()
    server.add_sockets(sockets)
    ready()
    await stop.wait()

    draining.begin_drain()
    if running := draining.active_exchanges():
        logger.warning("stopping; waiting for %d exchanges, a second signal ends them", running)
    try:
        await asyncio.wait_for(asyncio.gather(server.drain(), draining.drained()), args.drain_timeout)
    except TimeoutError:
        logger.warning("drain timeout; %d exchanges are cut off", draining.active_exchanges())
        # The log shall have a line for each of these too.
        await draining.end_exchanges()
    if demo:
        await demo.stop()
    await close_clients()
    if log:
        log.close()


def rest_garbage_collector() -> None:
    """Let the garbage collector look less often, and never again at what is there now.

    An exchange leaves no circles, so the collector, which by default looks some ten times for each hundred requests,
    would find nothing and take 6 % of the processor's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, *gc.get_threshold()[1:])


def check(args: argparse.Namespace) -> None:
    """Raise :class:`UsageError` for arguments that contradict each other."""
    if not (args.to or args.mount or args.demo):
        raise UsageError("say where to forward: --to URL, --mount PREFIX=URL or --demo")
    if args.demo and args.to:
        raise UsageError("--demo brings its own upstream for /; leave out --to")
    if args.demo and args.processes > 1:
        raise UsageError("--demo shows the memory of one process; leave out --processes")
    if args.http2 and importlib.util.find_spec("h2") is None:
        raise UsageError("--http2 needs h2: pip install 'tornado_proxy[http2]'")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit: 0 after a drain, 1 when it cannot listen, 2 for arguments that cannot be followed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        check(args)
        tls = tls_context(args)
        make_loop = loop_factory(args.loop)
        # Only to have them checked: where there are several processes, each makes its own.
        make_rules(args, (), None)
    except (UsageError, OptionError) as error:
        parser.error(str(error))

    sockets: list[socket.socket] = []
    lines: list[str] = []
    for where in args.listen or [listener(DEFAULT_LISTEN)]:
        try:
            bound = where.bind()
        except (OSError, ValueError) as error:
            parser.exit(1, f"{parser.prog}: cannot listen on {where.url('http', where.port)}: {error}\n")
        sockets += bound
        port = 0 if where.path else bound[0].getsockname()[1]
        lines.append(f"listening on {where.url('https' if tls else 'http', port)}\n")
    if args.demo:
        lines.append(f"open {lines[0].split()[-1]}/ in a browser\n")

    def announce() -> None:
        write_out("".join(lines))

    workers = fork_workers(args.processes, sockets, announce) if args.processes > 1 else None
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(serve(args, tls, sockets, workers, announce if workers is None else lambda: None))
        # Closing the loop would cancel each exchange that is cut off, and log it as an error; and wait for every name
        # that is still looked up, although nobody asks for it any more.
        os._exit(0)
