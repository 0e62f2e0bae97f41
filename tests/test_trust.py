"""docs/trust.md: its promises have tests, its guards mutants, and its tables say what came out."""

import ast
import functools

import pytest

from .trust import document, last
from .trust.kinds import Guard, Promise
from .trust.mutating import Copy, Verdict, judge, mutant
from .trust.running import Outcome, outcomes
from .trust.subjects import ROOT, named_tests, subjects

SUBJECTS = subjects()
PROMISES = [promise for subject in SUBJECTS.values() for promise in subject.promises]
GUARDS = [guard for subject in SUBJECTS.values() for guard in subject.guards]
BUDGET = "test_budget.py::test_nan_fails_and_infinities_must_agree"


@functools.cache
def defined(file: str) -> set[str]:
    """Names of the tests and classes at the top of a file in tests/, those bound by assignment, too."""
    found = set()
    for node in ast.parse((ROOT / "tests" / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_every_test_that_is_named_exists():
    for test in {*named_tests(PROMISES), *(guard.test for guard in GUARDS)}:
        file, *inside = test.partition("[")[0].split("::")
        assert not inside or inside[0] in defined(file), test


def test_nothing_is_said_twice():
    for words in ([promise.words for promise in PROMISES], [guard.words for guard in GUARDS]):
        assert len(words) == len(set(words))


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_has_promises_and_guards(name):
    assert SUBJECTS[name].promises and SUBJECTS[name].guards


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.words)
def test_every_mutant_can_be_made(guard):
    whole = (ROOT / guard.file).read_text()
    changed = mutant(guard, whole)
    assert changed != whole
    compile(changed, guard.file, "exec")


def test_a_guard_that_moved_is_an_error():
    guard = Guard("a guard", "file.py", "a == b", "True", "test_x.py")
    with pytest.raises(ValueError, match=r"stands 0 times in file\.py"):
        mutant(guard, "a != b")
    with pytest.raises(ValueError, match="stands 2 times"):
        mutant(guard, "a == b == a == b")


def test_mutants_are_killed_or_survive():
    file = "seqcore/testing/budget.py"
    killed = Guard("compared", file, "Budget(same_infinities and within,", "Budget(within,", BUDGET)
    survives = Guard("a comment", file, "# Infinite entries", "# Entries", BUDGET)
    assert [verdict.word for verdict in judge([killed, survives], jobs=1)] == ["killed", "survived"]


def test_a_test_that_does_not_pass_unmutated_kills_nothing(monkeypatch):
    for status, word in ((1, "pytest's status is 1 unmutated"), (4, "pytest's status is 4 unmutated")):
        monkeypatch.setattr(Copy, "status", lambda *_, status=status: status)
        assert [verdict.word for verdict in judge(GUARDS[:1], jobs=1)] == [word]


def test_a_promise_counts_the_cases_of_its_tests_and_of_no_others():
    promise = Promise("holds", "by trying", ("test_a.py", "test_b.py::test_one", "test_b.py::test_two[x]"))
    names = ["test_a.py::test_any[3]", "test_b.py::test_one[y]", "test_b.py::test_two[y]", "test_b.py::test_one_more"]
    ended = [Outcome(name, "passed", 10) for name in names] + [Outcome("test_a.py::test_gpu", "skipped", 1)]
    found = last.of_promises([promise], ended[:1], ended)["holds"]
    assert (found["usual"], found["nightly"]) == (10, 20)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 0, 1)


def test_what_held_is_what_passed_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(last, "FILE", tmp_path / "last.json")
    assert last.held() == frozenset()
    (held, failed, skipped, *_), (killed, survived, *_) = PROMISES, GUARDS
    ended = {held: "passed", failed: "failed", skipped: "skipped"}
    outcomes = [Outcome(test, word, 1) for promise, word in ended.items() for test in promise.tests]
    judged = [Verdict(killed, "killed", 1.0), Verdict(survived, "survived", 1.0)]
    found = {"promises": last.of_promises(ended, outcomes, outcomes), "guards": last.of_guards(judged)}
    last.write(found)
    assert last.held() == {held.words, killed.words}
    monkeypatch.setattr(last, "where", lambda: {"sources": "others"})
    assert last.held() == frozenset()


REPORT = """
<testsuites><testsuite>
  <testcase classname="" name="tests.test_a"><skipped/></testcase>
  <testcase classname="tests.test_b" name="test_one[x]">
    <properties><property name="cases" value="7"/></properties>
  </testcase>
  <testcase classname="tests.test_b.TestCache" name="runTest"><failure/></testcase>
</testsuite></testsuites>
"""


def test_reports_name_tests_as_promises_do(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert list(outcomes(report)) == [
        Outcome("test_a.py", "skipped", 1),
        Outcome("test_b.py::test_one[x]", "passed", 7),
        Outcome("test_b.py::TestCache::runTest", "failed", 1),
    ]


def test_the_document_is_current():
    assert document.is_current(), "run `python -m tests.trust --only table`"
