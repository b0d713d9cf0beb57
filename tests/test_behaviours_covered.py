"""What this directory's README says is tested is tested where it says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = (TESTS / "README.md").read_text(encoding="utf-8")
# As numbered in the list of behaviours that the proxy carries over.
BEHAVIOURS = range(1, 38)
# `proxy/test_x.py`, `proxy/test_x.py::TestY`, `proxy/test_x.py::TestY::test_z`
TEST = re.compile(r"`((?:[a-z]+/)*test_\w+\.py)(?:::(\w+))?(?:::(\w+))?`")


def scenarios() -> Iterator[tuple[str, list[str]]]:
    """Yield each scenario's id, and the files that its row names."""
    for row in README.splitlines():
        if ids := re.match(r"\| ((?:[A-Z]{2}-\d\d(?:, )?)+) \|", row):
            for name in ids[1].split(", "):
                yield name, [path for path, *_ in TEST.findall(row)]


def test_every_file_is_named_and_every_name_is_a_file():
    """Those of ``unit`` are called as their modules are, and those of ``applications`` as what they run."""
    alike = ("unit/", "real/applications/")
    files = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert {match[0] for match in TEST.findall(README)} - files == set()
    assert {path for path in files if not path.startswith(alike)} <= {match[0] for match in TEST.findall(README)}


def test_every_part_of_the_support_is_in_its_index():
    index = (TESTS / "support" / "__init__.py").read_text(encoding="utf-8")
    parts = {path.stem for path in (TESTS / "support").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"^``(\w+)``", index, re.MULTILINE)) == parts


def test_every_behaviour_is_named():
    named = set()
    for path in (TESTS / "proxy").glob("test_*.py"):
        named |= {int(number) for number in re.findall(r"\bBehaviour (\d+):", path.read_text(encoding="utf-8"))}
    assert sorted(named) == list(BEHAVIOURS)


@pytest.mark.parametrize(("scenario", "files"), [pytest.param(*row, id=row[0]) for row in scenarios()])
def test_every_scenario_is_named_by_a_file_of_its_row(scenario, files):
    texts = [(TESTS / path).read_text(encoding="utf-8") for path in files]
    # Some rows are commands.
    assert not files or any(re.search(rf"\b{scenario}\b", text) for text in texts)


@pytest.mark.parametrize("named", sorted({match[0] for match in TEST.finditer(README) if match[2]}))
def test_every_class_and_method_that_is_named_is_there(named):
    match = TEST.fullmatch(named)
    assert match is not None
    text = (TESTS / match[1]).read_text(encoding="utf-8")
    assert re.search(rf"^class {match[2]}\b", text, re.MULTILINE)
    assert match[3] is None or f" def {match[3]}(" in text
