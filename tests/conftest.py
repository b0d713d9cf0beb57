"""What pytest needs to know; the fixtures themselves are in tests/support/fixtures.py."""

from tests.support.fixtures import echo, expect_log, proxy, upstream, upstreams

__all__ = ["echo", "expect_log", "proxy", "upstream", "upstreams"]
