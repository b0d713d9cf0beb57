"""Certificates of an authority of our own, made by the openssl program: a root, an intermediate, a server.

Most servers in the world send a chain of two, and a server that sends only its own certificate works with the clients
of whoever tried it and fails with others; so the one here has a chain too.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

OPENSSL = shutil.which("openssl")

AUTHORITY = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
SERVER = """basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth,clientAuth
subjectAltName=DNS:localhost,IP:127.0.0.1
"""


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM."""

    root: Path  # what a client trusts
    chain: Path  # what the server sends: its own certificate and the intermediate
    alone: Path  # the server's own certificate, without the intermediate
    key: Path  # of the server
    combined: Path  # chain and key in one file


def make_certificates(directory: Path) -> Certificates:
    """Make a new authority and a certificate for 127.0.0.1 and localhost."""
    root = _sign(directory, "root", AUTHORITY, signer="root")
    intermediate = _sign(directory, "intermediate", AUTHORITY, signer="root")
    alone = _sign(directory, "server", SERVER, signer="intermediate")
    key = directory / "server.key"
    chain, combined = directory / "chain.pem", directory / "combined.pem"
    chain.write_bytes(alone.read_bytes() + intermediate.read_bytes())
    combined.write_bytes(chain.read_bytes() + key.read_bytes())
    return Certificates(root, chain, alone, key, combined)


def _sign(directory: Path, name: str, extensions: str, *, signer: str) -> Path:
    """Return the certificate of a new key, signed by `signer`, which may be the key itself."""
    key, request, certificate = (directory / f"{name}.{suffix}" for suffix in ("key", "csr", "pem"))
    (directory / "extensions").write_text(extensions, encoding="ascii")
    _openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", key)
    _openssl("req", "-new", "-key", key, "-subj", f"/CN=test {name}", "-out", request)
    signing = ["-signkey", key] if signer == name else []
    if not signing:
        signing = ["-CA", directory / f"{signer}.pem", "-CAkey", directory / f"{signer}.key", "-CAcreateserial"]
    extended = ["-extfile", directory / "extensions"]
    _openssl("x509", "-req", "-in", request, "-days", "2", *signing, *extended, "-out", certificate)
    return certificate


def _openssl(*arguments: str | Path) -> None:
    assert OPENSSL is not None
    done = subprocess.run([OPENSSL, *map(str, arguments)], capture_output=True, check=False, timeout=30)
    assert done.returncode == 0, f"openssl {arguments}: {done.stderr.decode()}"
