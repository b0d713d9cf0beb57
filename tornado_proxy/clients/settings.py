"""What ``client_options`` may say to a client."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from tornado_proxy.clients.dial import tls_context


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``client_options`` may say to every client. A client's own subclass says what else it knows.

    Each is checked by its type: a ``str | None`` is a path, an ``int`` is positive.
    """

    # Verify the upstream's certificate and that it is for the URL's host. Switching it off lets anyone on the way
    # read and change the traffic.
    validate_cert: bool = True
    # File with the certificates to trust; None is what Python, or libcurl, trusts.
    ca_certs: str | None = None
    # Our certificate and its key, PEM files.
    client_cert: str | None = None
    client_key: str | None = None
    # Connect to this unix-domain socket in place of the URL's host.
    unix_socket: str | None = None
    # One of `versions`.
    http_version: str = "1.1"
    # Transfers at a time; later ones wait for at most connect_timeout, then fail with 503. None is no limit.
    max_clients: int | None = None

    versions: ClassVar[tuple[str, ...]] = ("1.1",)

    def __post_init__(self) -> None:
        if self.http_version not in self.versions:
            raise ValueError(f"http_version {self.http_version!r} is unknown; write one of {', '.join(self.versions)}")
        for field in fields(self):
            value = getattr(self, field.name)
            given = f"{field.name} {value!r}"
            match field.type:
                case "bool":
                    if not isinstance(value, bool):
                        raise ValueError(f"{given} is not a bool; write True or False")
                case "str | None" if value is not None:
                    if not isinstance(value, str) or not value or "\0" in value:
                        raise ValueError(f"{given} is not a path; write a string")
                    if field.name != "unix_socket" and not os.access(value, os.R_OK):
                        raise ValueError(f"{given} cannot be read; write the path of a PEM file")
                case "int" | "int | None" if value is not None or field.type == "int":
                    # libcurl's largest.
                    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                        raise ValueError(f"{given} is not a positive whole number; write one such as 100")

    @classmethod
    def parse(cls, client: str, given: dict[str, Any]) -> Self:
        """Return the settings that ``given`` says. Raises ``ValueError`` with the name and the cure."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is not known to the {client} client; it knows {', '.join(known)}")
        if given.get("http_version") in (2, 3):
            # As the command line reads it.
            given = {**given, "http_version": str(given["http_version"])}
        return cls(**given)

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of these settings."""
        return tls_context(self.validate_cert, self.ca_certs, self.client_cert, self.client_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings(Settings):
    """Those of a client that keeps connections."""

    # Idle connections kept, all upstreams together, and for how many seconds. Keep the latter below the upstream's own
    # keep-alive time: a connection that dies as it is reused costs a retry, or an error where a retry is not safe.
    max_idle_connections: int = 256
    max_idle_seconds: int = 60
