"""What pytest needs to know; the fixtures themselves are in tests/support/fixtures.py."""

from tests.support.fixtures import certificates, echo, expect_log, proxy, upstream, upstreams

__all__ = ["certificates", "echo", "expect_log", "proxy", "upstream", "upstreams"]
