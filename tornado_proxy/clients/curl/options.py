"""What ``client_options`` may say to the curl client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tornado_proxy.clients.settings import PoolSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class CurlOptions(PoolSettings):
    """What ``client_options`` may say to the curl client. A client is shared by all mounts whose options are equal."""

    # With HTTP/2 and HTTP/3, several requests at a time share a connection. libcurl then holds up to 20 MB for each
    # response that nobody reads, because it reads on for the others. False gives each request under way a connection of
    # its own, which is not read while its reader stalls.
    multiplex: bool = True
    # Seconds after which a connection, however busy, takes no further request. What is under way on it goes on. Without
    # this one in steady use would never notice that the upstream's name leads elsewhere.
    max_connection_seconds: int = 300
    # Seconds that a resolved name is kept.
    dns_cache_seconds: int = 60

    # "2" is over TLS.
    versions: ClassVar[tuple[str, ...]] = ("1.1", "2", "2-prior-knowledge", "3")
