"""docs/reliability.md says what the tests that inject faults say."""

from __future__ import annotations

from faults import MARKS, PAGE, TESTS
from imported import Imported


def test_the_table_of_faults_is_what_the_tests_that_inject_them_say(imported: Imported) -> None:
    # In a process of its own: a collection within a collection would load every test twice.
    printed = imported.run(str(TESTS / "faults.py"), cwd=TESTS.parent)
    assert printed.returncode == 0, printed.stderr
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    table, _, _ = rest.partition(MARKS[1])
    assert table.strip() == printed.stdout.strip(), "run: python tests/faults.py --write"
