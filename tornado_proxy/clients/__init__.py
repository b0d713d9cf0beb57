"""Clients by name, and the instances that are shared.

Modules of clients are imported when one is first asked for, so that what a client needs is needed only then.
"""

from __future__ import annotations

import asyncio
import importlib
import weakref
from typing import Any

from tornado_proxy.clients.base import HTTPClient

NAMES = {"curl": ("tornado_proxy.clients.curl", "CurlClient")}
DEFAULT_CLIENT = "curl"

# One instance for each loop, class and set of options. Made on first use, so each forked process has its own.
_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, HTTPClient]] = weakref.WeakKeyDictionary()


def client_class(client: str | type[HTTPClient]) -> type[HTTPClient]:
    """Return the class that ``client`` names. Raises ``ValueError`` with the known names."""
    if not isinstance(client, str):
        return client
    if client not in NAMES:
        raise ValueError(f"client {client!r} is unknown; write one of {', '.join(map(repr, NAMES))}")
    module, name = NAMES[client]
    found: type[HTTPClient] = getattr(importlib.import_module(module), name)
    return found


def check_client(client: object, options: dict[str, Any]) -> None:
    """Raise ``ValueError``, naming the option and the cure, unless such a client can be made."""
    if isinstance(client, HTTPClient):
        return
    check = getattr(client_class(client), "check_options", None)  # type: ignore[arg-type]
    if check is not None:
        try:
            check(options)
        except ValueError as exc:
            raise ValueError(f"client_options: {exc}") from None


def shared_client(client: str | type[HTTPClient] | HTTPClient, options: dict[str, Any]) -> HTTPClient:
    """Return the running loop's instance for these options; it is closed by :func:`close_clients`."""
    if isinstance(client, HTTPClient):
        return client
    loop = asyncio.get_running_loop()
    clients = _shared.get(loop)
    if clients is None:
        _close_abandoned()
        clients = _shared[loop] = {}
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


def close_clients() -> None:
    """Close the running loop's shared clients: at the end of a process, or of a test."""
    for client in _shared.pop(asyncio.get_running_loop(), {}).values():
        client.close()
