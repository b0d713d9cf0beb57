"""What ``client_options`` may say to the clients other than curl."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from tornado_proxy.clients.dial import tls_context


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``client_options`` may say to every client. The names mean what they mean to the curl client."""

    # Verify the upstream's certificate and that it is for the URL's host. Switching it off lets anyone on the way
    # read and change the traffic.
    validate_cert: bool = True
    # File with the certificates to trust; None is what Python trusts.
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
        for name in ("ca_certs", "client_cert", "client_key"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                raise ValueError(f"{name} {path!r} cannot be read; write the path of a PEM file")
        if not isinstance(self.validate_cert, bool):
            raise ValueError(f"validate_cert {self.validate_cert!r} is not a bool; write True or False")
        for name in ("max_clients", "max_idle_connections", "max_idle_seconds", "max_connection_seconds"):
            # Not every client knows all of them.
            number = getattr(self, name, 1)
            if name == "max_clients" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} {number!r} is not a positive whole number; write one such as 100")

    @classmethod
    def parse(cls, client: str, given: dict[str, Any]) -> Self:
        """Return the settings that ``given`` says. Raises ``ValueError`` with the name and the cure."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is not known to the {client} client; it knows {', '.join(known)}")
        return cls(**given)

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of these settings."""
        return tls_context(self.validate_cert, self.ca_certs, self.client_cert, self.client_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings(Settings):
    """Those of a client that keeps connections."""

    # Idle connections kept, and for how many seconds. Keep the latter below the upstream's own keep-alive time.
    max_idle_connections: int = 256
    max_idle_seconds: int = 60
