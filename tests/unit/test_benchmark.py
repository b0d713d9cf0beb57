"""What the benchmark makes of what it measured, and that its upstream does what its load expects."""

import os

import pytest

from tests.benchmark import report
from tests.benchmark.candidate import Candidate, Command
from tests.benchmark.figures import ERRORS, RATE, percentile
from tests.benchmark.messages import opened
from tests.benchmark.profiling import by_function
from tests.benchmark.results import Results
from tests.benchmark.running import Unfit, check, running
from tests.benchmark.streams import ages
from tests.benchmark.targets import Target
from tests.benchmark.upstreams import live_upstream


@pytest.fixture
def results():
    results = Results()
    results.runs["small"] = {
        # The machine was busy in the second round, which the ratios do not show.
        "one": [{"rate": 200.0, "errors": 1}, {"rate": 20.0, "errors": 0}, {"rate": 220.0, "errors": 2}],
        "other": [{"rate": 100.0}, {"rate": 10.0}, {"rate": 100.0}],
    }
    return results


class TestResults:
    def test_figures_are_medians_over_the_rounds_and_errors_are_summed(self, results):
        assert results.figure("small", "one", RATE) == 200
        assert results.figure("small", "one", ERRORS) == 3

    def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds(self, results):
        results.runs["small"]["other"][0]["rate"] = 1.0
        assert results.ratio("small", "one", "other", "rate") == 2.2

    def test_what_was_not_measured_has_neither(self, results):
        assert results.figure("small", "other", ERRORS) is None
        assert results.ratio("small", "one", "nobody", "rate") is None
        assert results.figure("large", "one", RATE) is None

    def test_the_figures_of_who_failed_in_a_later_round_do_not_count(self, results):
        results.notes["small", "one"] = "answered with 502"
        assert results.figure("small", "one", RATE) is None


class TestPercentile:
    @pytest.mark.parametrize(("which", "value"), [(50, 50), (99, 99), (100, 100), (1, 1)])
    def test_of_a_hundred(self, which, value):
        assert percentile([float(number) for number in range(100, 0, -1)], which) == value

    def test_of_one(self):
        assert percentile([7.0], 99) == 7


class TestTargets:
    @pytest.mark.parametrize(
        ("at_least", "figure", "verdict"),
        [(True, 1.6, "yes"), (True, 1.59, "no"), (False, 1.6, "yes"), (False, 1.61, "no")],
    )
    def test_a_bound_is_met_by_itself(self, at_least, figure, verdict):
        assert Target("", "small", ("one",), lambda results: figure, 1.6, at_least).verdict(Results()) == verdict

    def test_nobody_can_tell_where_the_machine_was_not_ours(self, results):
        target = Target("", "small", ("one", "other"), lambda results: 2.0, 1.6)
        assert target.verdict(results) == "yes"
        for figures in results.runs["small"]["other"]:
            figures["others"] = 30.0
        assert target.verdict(results) == "unclear"

    def test_what_is_met_in_company_is_met(self, results):
        for figures in results.runs["small"]["one"]:
            figures["others"] = 30.0
        for figure, verdict in ((4.0, "yes"), (6.0, "unclear")):
            target = Target("", "small", ("one",), lambda results, seen=figure: seen, 5, at_least=False)
            assert target.verdict(results) == verdict


class TestReport:
    def test_a_table_gives_ratios_also_where_none_of_the_usual_was_measured(self, results):
        text = report.write(results, ["a machine"])
        assert "- a machine\n" in text
        row = next(line for line in text.splitlines() if line.startswith("| other"))
        assert [cell.strip() for cell in row.split("|")[2:4]] == ["100", "0.50"]

    def test_only_what_is_between_the_marks_is_replaced(self, tmp_path):
        path = tmp_path / "README.md"
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        report.put(path, "new\n")
        report.put(path, "newer\n")
        assert path.read_text() == f"before\n{report.BEGIN}\n\nnewer\n\n{report.END}\nafter\n"

    def test_a_file_without_marks_is_the_report(self, tmp_path):
        report.put(tmp_path / "figures.md", "new\n")
        assert (tmp_path / "figures.md").read_text() == "new\n"


class TestProfile:
    def test_a_function_counts_by_itself_and_once_where_it_is_above_others(self):
        text = by_function("main (a.py:1);walk (a.py:7);walk (a.py:7);leaf (b.py:2) 3\nmain (a.py:1) 1\n")
        assert "   75.0         75.0   leaf (b.py)" in text
        assert "    0.0         75.0   walk (a.py)" in text
        assert "   25.0        100.0   main (a.py)" in text
        assert text.endswith("   75.0   b.py\n   25.0   a.py")


@pytest.fixture(scope="module")
def port():
    core = min(os.sched_getaffinity(0))
    with running(Candidate("upstream", live_upstream, python=True), 0, core=core) as upstream:
        yield upstream.port


class TestUpstream:
    """The one that is ours, with the load that is ours."""

    def test_a_message_comes_back(self, port):
        opened(port).close()

    def test_a_body_is_read_to_its_end(self, port):
        check(port, "PUT", "/swallow", 300_000, len("300000"))

    def test_stamps_are_fresh(self, port):
        assert 0 <= min(ages(port, 0.1)) < 100

    def test_a_wrong_length_is_noticed(self, port):
        with pytest.raises(Unfit, match="200 with 1024 bytes in place of 1000"):
            check(port, "GET", "/", 0, 1000)

    def test_what_does_not_start_says_why(self):
        core = min(os.sched_getaffinity(0))
        broken = Candidate("broken", lambda place: Command(["-c", "raise SystemExit('no such luck')"]), python=True)
        with pytest.raises(Unfit, match="did not start: no such luck"), running(broken, 0, core=core):
            pass
