"""What ``client_options`` may say to the curl client."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

HTTP_VERSIONS = ("1.1", "2", "2-prior-knowledge", "3")

_NUMBERS = ("max_clients", "max_idle_connections", "max_idle_seconds", "max_connection_seconds", "dns_cache_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurlOptions:
    """What ``client_options`` may say to the curl client. A client is shared by all mounts whose options are equal."""

    # Verify the upstream's certificate and that it is for the URL's host. Switching it off lets anyone on the way
    # read and change the traffic.
    validate_cert: bool = True
    # File with the certificates to trust; None is libcurl's own store.
    ca_certs: str | None = None
    # Our certificate and its key, PEM files.
    client_cert: str | None = None
    client_key: str | None = None
    # "1.1", "2" (over TLS), "2-prior-knowledge", "3".
    http_version: str = "1.1"
    # With HTTP/2 and HTTP/3, several requests at a time share a connection. libcurl then holds up to 20 MB for each
    # response that nobody reads, because it reads on for the others. False gives each request under way a connection of
    # its own, which is not read while its reader stalls.
    multiplex: bool = True
    # Connect to this unix-domain socket in place of the URL's host.
    unix_socket: str | None = None
    # Transfers at a time; later ones wait for at most connect_timeout, then fail with 503. None is no limit.
    max_clients: int | None = None
    # Idle connections kept, all upstreams together, and for how many seconds. Keep the latter below the upstream's own
    # keep-alive time: a connection that dies as it is reused costs a retry, or an error where a retry is not safe.
    max_idle_connections: int = 256
    max_idle_seconds: int = 60
    # Seconds after which a connection, however busy, takes no further request. What is under way on it goes on. Without
    # this one in steady use would never notice that the upstream's name leads elsewhere.
    max_connection_seconds: int = 300
    # Seconds that a resolved name is kept.
    dns_cache_seconds: int = 60

    def __post_init__(self) -> None:
        if self.http_version not in HTTP_VERSIONS:
            raise ValueError(f"http_version {self.http_version!r} is unknown; write one of {', '.join(HTTP_VERSIONS)}")
        for name in ("ca_certs", "client_cert", "client_key", "unix_socket"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path or "\0" in path):
                raise ValueError(f"{name} {path!r} is not a path that libcurl takes; write a string")
            if path is not None and name != "unix_socket" and not os.access(path, os.R_OK):
                raise ValueError(f"{name} {path!r} cannot be read; write the path of a PEM file")
        for name in ("validate_cert", "multiplex"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r} is not a bool; write True or False")
        for name in _NUMBERS:
            number = getattr(self, name)
            if name == "max_clients" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**31:
                raise ValueError(f"{name} {number!r} is not a positive whole number; write one such as 100")

    @classmethod
    def parse(cls, given: dict[str, Any]) -> CurlOptions:
        """Return the options that ``given`` says. Raises ``ValueError`` with the name and the cure."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is not known to the curl client; it knows {', '.join(known)}")
        if given.get("http_version") in (2, 3):
            # As the command line reads it.
            given = {**given, "http_version": str(given["http_version"])}
        return cls(**given)
