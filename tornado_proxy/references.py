"""What points at the upstream in a response, and must point at us: redirects (RFC 9110 section 10.2.2) and cookies.

Pure functions, which never raise: what is not understood passes byte for byte.
"""

from __future__ import annotations

import re

from tornado_proxy.urls import DEFAULT_PORTS, UpstreamURL, tail_below

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_URL_REFERENCE = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.\-]*):)?//([^/?#]*)([^?#]*)(.*)", re.DOTALL)
_PATH_REFERENCE = re.compile(r"(/[^?#]*)(.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@\\\s]+))(?::([0-9]{0,5}))?")
# At most one way to match each character, so that it cannot backtrack far.
_REFRESH = re.compile(r"([\s0-9.]*(?:[;,]\s*)?url\s*=\s*)(.*)", re.IGNORECASE | re.DOTALL)


def rewrite_location(value: str, *, upstream: UpstreamURL, mount: str | None, scheme: str, host: str | None) -> str:
    """Return a Location or Content-Location as the downstream must see it (RFC 9110 sections 8.7 and 10.2.2).

    What points to the upstream's base or below comes back under ``mount``: a URL of the upstream's origin with the
    public ``scheme`` and ``host``, ``//host/path`` with ``host``, an absolute path as a path. ``host`` ``None`` means
    that the request named none; then they become paths too. ``mount`` ``None`` means that the prefix is not known; then
    only the origin is replaced, and only above an empty base path. A path that already is under the mount, above an
    empty base, keeps its path. All else is returned byte for byte: relative references, other hosts, garbage. Query and
    fragment are never changed. Never raises.
    """
    if _CONTROL.search(value):
        return value
    base = upstream.path.rstrip("/")

    url = _URL_REFERENCE.fullmatch(value)
    if url is not None:
        given_scheme, authority, path, rest = url.groups()
        if not _is_upstream(given_scheme, authority, upstream):
            return value
        public = path if mount is None and not base else _under_mount(path, base, mount)
        if public is None:
            return value
        if host is None:
            return _path_only(public or "/") + rest
        origin = f"//{host}" if given_scheme is None else f"{scheme}://{host}"
        return f"{origin}{public}{rest}"

    reference = _PATH_REFERENCE.fullmatch(value)
    if reference is None:
        return value
    public = _under_mount(reference[1], base, mount)
    if public is None:
        return value
    return (public if reference[1] == public else _path_only(public)) + reference[2]


def rewrite_refresh(value: str, *, upstream: UpstreamURL, mount: str | None, scheme: str, host: str | None) -> str:
    """Return a Refresh with its URL as ``rewrite_location`` would have it, all else byte for byte.

    Refresh is in no RFC; the syntax is that of the HTML standard: ``5; url=/x``, the URL bare or in quotes.
    """
    match = _REFRESH.fullmatch(value)
    if match is None:
        return value
    head, url = match.groups()
    tail = ""
    if url[:1] in ("'", '"'):
        quote = url[0]
        url, closing, tail = url[1:].partition(quote)
        head, tail = head + quote, closing + tail
    return head + rewrite_location(url, upstream=upstream, mount=mount, scheme=scheme, host=host) + tail


def rewrite_set_cookie(
    value: str,
    *,
    base: str,
    mount: str | None,
    domain: str | None = None,
    path: str | None = None,
) -> str:
    """Return one Set-Cookie line as the downstream must see it (RFC 6265 section 4.1).

    A Path at the upstream's ``base`` or below comes back under ``mount``; the base itself becomes the mount without a
    slash at its end, so that the cookie is sent to ``/foo`` as well as to ``/foo/x``. ``domain`` and ``path`` replace
    the value of an attribute that is there, and add none. All else stays byte for byte, and so does a ``__Host-``
    cookie, which is valid only with ``Path=/`` and without Domain.
    """
    pair, *attributes = value.split(";")
    if not attributes or pair.lstrip()[:7].lower() == "__host-":
        return value
    parts = [pair]
    for attribute in attributes:
        name, _, content = attribute.partition("=")
        kind, content = name.strip().lower(), content.strip()
        if kind == "path":
            new = _cookie_path(content, base, mount) if path is None else path
        elif kind == "domain":
            new = domain
        else:
            new = None
        parts.append(attribute if new is None or new == content else f"{name.rstrip()}={new}")
    return ";".join(parts)


def _is_upstream(scheme: str | None, authority: str, upstream: UpstreamURL) -> bool:
    """True when scheme and authority are the upstream's; userinfo never is."""
    if scheme is not None and scheme.lower() != upstream.scheme:
        return False
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return False
    ipv6, name, port = match.groups()
    if (ipv6 or name).lower() != upstream.host.lower():
        return False
    return (int(port) if port else DEFAULT_PORTS[upstream.scheme]) == upstream.effective_port


def _path_only(path: str) -> str:
    """Return a reference to ``path`` on the same host.

    "/bar//evil" under the mount "/" would become "//evil", another host. RFC 3986 section 4.2 has the cure, and
    browsers take "\\" for "/".
    """
    return "/." + path if path[1:2] in ("/", "\\") else path


def _under_mount(path: str, base: str, mount: str | None) -> str | None:
    """Return the public path for a path of the upstream, ``None`` when it has none."""
    if mount is None:
        return None
    mount = mount.rstrip("/")
    # Above an empty base, a path that starts with the mount most likely comes from an upstream that knows the mount
    # (X-Forwarded-Prefix). Prefixing it again is the worse guess.
    if not base and mount and tail_below(mount, path) is not None:
        return path
    tail = tail_below(base, path)
    return None if tail is None else mount + tail or "/"


def _cookie_path(path: str, base: str, mount: str | None) -> str | None:
    """Return the public Path of a cookie, ``None`` to leave it."""
    if not path.startswith("/"):
        return None
    if mount is not None and path == (base or "/"):
        return mount.rstrip("/") or "/"
    return _under_mount(path, base.rstrip("/"), mount)
