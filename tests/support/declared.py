"""What a client declares that it cannot do, as tests of the proxy that are skipped with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import pytest

# Which client goes to the upstream where a test names none; None is the default one.
CLIENT = os.environ.get("TORNADO_PROXY_TEST_CLIENT")

# Tests by a pattern in their ids, and the capability that they need.
NEEDS = [
    ("TestBrokenBodies::test_(a_response_that_has_begun|so_it_is_where_the_compression)", "early_response"),
    ("TestFullDuplex|TestEarlyAnswer|TestARefusedUpload", "early_response"),
    ("test_in_an_upload_that_the_upstream_reads|test_in_a_full_duplex_exchange", "early_response"),
    ("test_the_response_may_come_before_the_request_is_complete", "early_response"),
    ("test_expect.py|TestExpectations", "expect_continue"),
    ("TestInterimResponses|test_of_an_interim_response", "interim"),
    ("TestTrailersOverHTTP2", "trailers"),
    ("TestRequestTrailers|TestSmuggling", "request_trailers"),
    ("test_the_head_byte_for_byte", "eight_bit_target"),
    ("TestATLSConnectionThatIsCut", "sees_tls_cut"),
    ("test_the_wait_for_a_free_client_does_not_count|test_it_counts_after_a_wait", "tells_sending"),
]
# Others, by the clients that they are not for.
NOT_FOR = [
    # Of libcurl's own callbacks, queue and clock.
    ("TestAnExceptionInACallback|TestAClockThatJumps|test_while_queued", ("simple", "httpx", "aiohttp"), "curl's own"),
    # What the libraries allocate for each connection, and let go of in circles, is theirs.
    (
        "TestBytesHeld",
        ("httpx", "aiohttp"),
        "declared: about a megabyte for each stalled transfer, freed by the collector",
    ),
    (r"gains_no_framing\[HEAD-HTTP/1.1 200 OK.r.n.r.n-", ("aiohttp",), "aiohttp closes the connection behind it"),
]


def skip_declared(items: Iterable[pytest.Item]) -> None:
    """Skip what the client says that it cannot do."""
    if CLIENT in (None, "curl"):
        return
    from tornado_proxy.clients import client_class

    can = client_class(str(CLIENT)).capabilities
    for item in items:
        if "tests/proxy/" not in item.nodeid:
            continue
        reasons = [
            f"declared: no {need}" for ids, need in NEEDS if re.search(ids, item.nodeid) and not getattr(can, need)
        ]
        reasons += [reason for ids, clients, reason in NOT_FOR if re.search(ids, item.nodeid) and CLIENT in clients]
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))
