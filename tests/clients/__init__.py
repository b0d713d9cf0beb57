"""The contract that every client passes, and each one's quirks."""

import pytest

pytest.register_assert_rewrite("tests.clients.contract", "tests.clients.wire_contract", "tests.clients.support")
