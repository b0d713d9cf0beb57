"""Clients by name, and the instances that are shared.

Modules of clients are imported when one is first asked for, so that what a client needs is needed only then.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import weakref
from collections.abc import Iterable
from typing import Any

from tornado_proxy.clients.base import Capabilities, HTTPClient

log = logging.getLogger(__name__)

NAMES = {
    "curl": ("tornado_proxy.clients.curl", "CurlClient"),
    "simple": ("tornado_proxy.clients.simple", "SimpleClient"),
    "httpx": ("tornado_proxy.clients.httpx", "HttpxClient"),
    "aiohttp": ("tornado_proxy.clients.aiohttp", "AiohttpClient"),
}
DEFAULT_CLIENT = "curl"

# What to do about a client whose library is missing.
_CURES = {
    "curl": "needs pycurl; pip install pycurl, or write client='simple', which is pure Python",
    "httpx": "needs httpx; pip install 'tornado_proxy[httpx]'",
    "aiohttp": "needs aiohttp 3.12 or later; pip install 'tornado_proxy[aiohttp]'",
}

# One instance for each loop, class and set of options. Made on first use, so each forked process has its own.
_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, HTTPClient]] = weakref.WeakKeyDictionary()
# The loop that asked last, and its instances: to look them up in a weak dictionary would take longer.
_last: tuple[asyncio.AbstractEventLoop, dict[object, HTTPClient]] | None = None


@functools.cache
def default_client() -> str:
    """Return the name of the client for mounts that name none: ``"simple"`` where pycurl is missing."""
    try:
        client_class(DEFAULT_CLIENT)
    except ValueError:
        log.warning("pycurl is not installed; the simple client, which is slower, is used in its place")
        return "simple"
    return DEFAULT_CLIENT


def client_class(client: str | type[HTTPClient]) -> type[HTTPClient]:
    """Return the class that ``client`` names. Raises ``ValueError`` with the known names, or with what to install."""
    if not isinstance(client, str):
        return client
    if client not in NAMES:
        raise ValueError(f"client {client!r} is unknown; write one of {', '.join(map(repr, NAMES))}")
    module, name = NAMES[client]
    try:
        found: type[HTTPClient] = getattr(importlib.import_module(module), name)
    except ImportError as exc:
        if client not in _CURES or (exc.name or "").startswith("tornado_proxy"):
            raise
        raise ValueError(f"client {client!r} {_CURES[client]} ({exc})") from exc
    return found


def check_client(client: object, options: dict[str, Any]) -> None:
    """Raise ``ValueError``, naming the option and the cure, unless such a client can be made."""
    if isinstance(client, HTTPClient):
        return
    found = client_class(client)  # type: ignore[arg-type]
    try:
        _check_capabilities(found, options)
        check = getattr(found, "check_options", None)
        if check is not None:
            check(options)
    except ValueError as exc:
        raise ValueError(f"client_options: {exc}") from None


def _check_capabilities(client: type[HTTPClient], options: dict[str, Any]) -> None:
    can: Capabilities = client.capabilities
    version = options.get("http_version")
    if version == "3" and not can.http3:
        raise ValueError(f"http_version '3' is more than {client.__name__} can; write client='curl'")
    if version in ("2", "2-prior-knowledge") and not can.http2:
        raise ValueError(f"http_version {version!r} is more than {client.__name__} can; write client='curl'")
    if options.get("unix_socket") is not None and not can.unix_socket:
        raise ValueError(f"unix_socket is more than {client.__name__} can; write client='curl'")


def shared_client(
    client: str | type[HTTPClient] | HTTPClient,
    options: dict[str, Any],
    loop: asyncio.AbstractEventLoop | None = None,
) -> HTTPClient:
    """Return the running loop's instance for these options; it is closed by :func:`close_clients`.

    ``loop`` is that loop, where the caller knows it: to ask takes a system call in Python 3.11.
    """
    if isinstance(client, HTTPClient):
        if options:
            raise ValueError("client_options cannot be applied to a client that exists already")
        return client
    global _last
    if loop is None:
        loop = asyncio.get_running_loop()
    # Read once: other threads may have loops too.
    last = _last
    if last is not None and last[0] is loop:
        clients = last[1]
    else:
        if (of_loop := _shared.get(loop)) is None:
            _close_abandoned()
            of_loop = _shared[loop] = {}
        clients = of_loop
        _last = loop, clients
    key = (client, repr(sorted(options.items()))) if options else client
    found = clients.get(key)
    if found is None:
        found = clients[key] = client_class(client)(**options)
    return found


def _close_abandoned() -> None:
    """Close the clients of loops that were closed: each refers to its loop, so none would ever be let go."""
    for ref in _shared.keyrefs():
        loop = ref()
        if loop is not None and loop.is_closed():
            for client in _shared.pop(loop, {}).values():
                client.close()


def close_clients() -> asyncio.Future[None]:
    """Close the running loop's shared clients: at the end of a process, or of a test.

    Transfers end at once. What is returned is done when every connection is closed, for those who want to wait.
    Clients that you made yourself are yours to close.
    """
    global _last
    _last = None
    clients = list(_shared.pop(asyncio.get_running_loop(), {}).values())
    for client in clients:
        client.close()
    return asyncio.ensure_future(_all_closed(clients))


async def _all_closed(clients: Iterable[HTTPClient]) -> None:
    for client in clients:
        await client.wait_closed()
