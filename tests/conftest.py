"""What pytest needs to know; the fixtures themselves are in tests/support/fixtures.py."""

import pytest

from tests.support.declared import skip_declared
from tests.support.fixtures import certificates, echo, expect_log, proxy, served, upstream, upstreams

__all__ = ["certificates", "echo", "expect_log", "proxy", "served", "upstream", "upstreams"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_declared(items)
