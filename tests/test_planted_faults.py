"""scripts/planted_faults.py: its table belongs to the sources and tests as they are, and it reads pytest rightly."""

import re
import shlex

import fault_table
import planted_faults
import pytest
from fault_table import FAULTS
from planted_faults import ROOT, Outcome, outcome_of


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_at_one_place_and_changes_it(fault):
    assert (ROOT / fault.file).read_text().count(fault.text) == 1
    assert fault.fault != fault.text
    assert fault.part in fault_table.PARTS


@pytest.mark.parametrize("tests", sorted({fault.tests for fault in FAULTS}))
def test_the_tests_of_a_fault_are_there(tests):
    files = [argument for argument in shlex.split(tests) if argument.startswith("tests/")]
    assert files
    for path, _, test in (argument.partition("::") for argument in files):
        source = (ROOT / path).read_text()
        assert not test or f"\ndef {test}(" in source


def test_the_written_table_has_every_fault_and_all_are_caught():
    rows = planted_faults.written()
    assert list(rows) == [(fault.name, fault.file) for fault in FAULTS]
    for caught_by in rows.values():
        path, test = re.fullmatch(r"`(tests/.+)::(\w+)`(?: \(dies\)| \(hangs\))?", caught_by).groups()
        assert f"\ndef {test}(" in (ROOT / path).read_text()


END = "\n===== 1 failed, 1 passed in 0.10s =====\n"
RUNS = {  # of pytest: its status and output, the test named, and how it went
    "passes": (0, f"tests/test_a.py::test_one PASSED [100%]{END}", None, "passes"),
    "fails": (
        1,
        f"tests/test_a.py::test_one[x - y] FAILED [50%]\nFAILED tests/test_a.py::test_one[x-y] - assert 0{END}",
        "tests/test_a.py::test_one[x-y]",
        "fails",
    ),
    "errs": (1, f"ERROR tests/test_a.py::test_one - E{END}", "tests/test_a.py::test_one", "fails"),
    "dies": (
        -11,
        "tests/test_a.py::test_one PASSED [50%]\ntests/test_a.py::test_2[a b] ",
        "tests/test_a.py::test_2[a b]",
        "dies",
    ),
    "dies with a word": (1, "tests/test_a.py::test_one Fatal error: x\n", "tests/test_a.py::test_one", "dies"),
    "is no module": (2, f"ERROR tests/test_a.py - E{END}", None, "pytest ended with status 2 and no failed test"),
    "is empty": (5, "\n=== no tests ran in 0.01s ===\n", None, "pytest ended with status 5 and no failed test"),
}


@pytest.mark.parametrize("which", RUNS)
def test_what_a_run_says(which):
    status, output, test, how = RUNS[which]
    found = outcome_of(status, output)
    assert (found.test, found.how) == (test, how)
    assert found.catches == which.startswith(("fails", "errs", "dies"))


def test_results_come_into_the_table_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(planted_faults, "TABLE", tmp_path / "table.md")
    one, other = FAULTS[0], FAULTS[-1]
    planted_faults.write([(one, Outcome("tests/test_a.py::test_one[1]", "fails")), (other, Outcome(None, "passes"))])
    planted_faults.write([(other, Outcome("tests/test_a.py::test_two[1]", "dies"))])
    rows = planted_faults.written()
    assert rows.pop((one.name, one.file)) == "`tests/test_a.py::test_one`"
    assert rows.pop((other.name, other.file)) == "`tests/test_a.py::test_two` (dies)"
    assert set(rows.values()) == {"not tried"}


def test_a_fault_that_is_nowhere_is_refused(capsys):
    with pytest.raises(SystemExit):
        planted_faults.main(["--only", "no such fault"])
    assert "no fault has 'no such fault'" in capsys.readouterr().err


def test_the_faults_are_listed(capsys):
    assert planted_faults.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(FAULTS)
