"""Every behaviour carried over from the seed has a test that names it."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
# As numbered in the list of behaviours that the proxy carries over.
BEHAVIOURS = range(1, 38)


def test_every_behaviour_is_named():
    named = set()
    for path in (TESTS / "proxy").glob("test_*.py"):
        named |= {int(number) for number in re.findall(r"\bBehaviour (\d+):", path.read_text(encoding="utf-8"))}
    assert sorted(named) == list(BEHAVIOURS)
