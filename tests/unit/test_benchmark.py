"""What the benchmark makes of what it measured, and that its upstream does what its load expects."""

import argparse
import os
import pstats
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.benchmark import h2load, report
from tests.benchmark.__main__ import chosen
from tests.benchmark.candidate import Candidate, Command, Finder
from tests.benchmark.figures import ERRORS, RATE, percentile
from tests.benchmark.http2 import SCENARIO, http2_candidates, ours_over_http1, ours_over_http2
from tests.benchmark.messages import opened
from tests.benchmark.profiling import by_function
from tests.benchmark.results import Results
from tests.benchmark.running import Unfit, check, check_http2, running
from tests.benchmark.scenarios import SCENARIOS
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


class TestH2load:
    """What it writes, of 128 requests that all went well."""

    SAID = (
        "Application protocol: h2c\n"
        "\n"
        "finished in 25.60ms, 5000.00 req/s, 5.10MB/s\n"
        "requests: 128 total, 128 started, 128 done, 128 succeeded, 0 failed, 0 errored, 0 timeout\n"
        "status codes: 128 2xx, 0 3xx, 0 4xx, 0 5xx\n"
        "traffic: 130.00KB (133120) total, 366B (366) headers (space savings 88.27%), 128.00KB (131072) data\n"
    )
    LOG = "".join(f"1795456264174346\t200\t{1000 * number}\n" for number in range(1, 129))

    def test_requests_a_second_and_milliseconds_of_each(self):
        said = h2load.read(self.SAID, self.LOG, "h2c", 128)
        assert said.rate == 5000
        assert (said.took[0], said.took[-1], len(said.took)) == (1.0, 128.0, 128)

    @pytest.mark.parametrize(
        ("good", "bad"),
        [
            ("protocol: h2c", "protocol: http/1.1"),
            ("128 succeeded, 0 failed", "127 succeeded, 1 failed"),
            ("0 errored", "1 errored"),
            ("0 timeout", "1 timeout"),
            ("128 2xx, 0 3xx", "127 2xx, 1 3xx"),
            ("(131072) data", "(131071) data"),
        ],
    )
    def test_whatever_is_wrong_is_said(self, good, bad):
        with pytest.raises(Unfit, match="h2load did not say"):
            h2load.read(self.SAID.replace(good, bad), self.LOG, "h2c", 128)


class TestHttp2:
    def test_its_candidates_meet_there_and_nowhere_else(self):
        args = argparse.Namespace(only=None, all=True)
        usual = Candidate("usual", lambda place: Command([]), everywhere=True)
        own = replace(usual, name="own", scenario=SCENARIO)
        for name, scenario in SCENARIOS.items():
            assert chosen([usual, own], scenario, args) == [own if name == SCENARIO else usual]

    def test_without_h2load_there_are_none_and_it_is_said(self, tmp_path, monkeypatch):
        def absent(name, path):
            return None

        monkeypatch.setattr("tests.benchmark.candidate.shutil.which", absent)
        assert http2_candidates(Finder((str(tmp_path),))) == ([], ["http2 (no h2load on the PATH)"])

    @pytest.mark.parametrize("which", [0, 1], ids=["standalone", "mounted"])
    def test_ours_answer_it_before_they_are_loaded(self, port, which):
        core = min(os.sched_getaffinity(0))
        with running(ours_over_http2("asyncio")[which], port, core=core) as proxy:
            assert proxy.http2
            check_http2(proxy.port, "/", 1024)
            with pytest.raises(Unfit, match="200 with 1024 bytes in place of 1000"):
                check_http2(proxy.port, "/", 1000)

    def test_who_speaks_only_http1_is_unfit(self, port):
        core = min(os.sched_getaffinity(0))
        with running(ours_over_http1("asyncio")[0], port, core=core) as proxy:
            assert not proxy.http2
            with pytest.raises(Unfit, match="GET / over HTTP/2: "):
                check_http2(proxy.port, "/", 1024)


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


class TestProfiled:
    @pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)", "pass"])
    def test_a_profile_is_written_however_the_program_leaves(self, tmp_path, leave):
        """The standalone proxy leaves by ``os._exit``, behind which cProfile's own command writes nothing."""
        (tmp_path / "program.py").write_text(f"import os, sys\ndef work(): pass\nwork()\n{leave}\n", encoding="utf-8")
        path = tmp_path / "profile"
        command = [sys.executable, "-m", "tests.benchmark.profiled", str(path), "-m", "program"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert "work" in {name for _, _, name in pstats.Stats(str(path)).stats}
