"""GSM-Symbolic problems come sound, in splits of their own, or with the way to install them."""

from __future__ import annotations

import sys

import pytest

from abacist.errors import DataError
from abacist.task.answers import read_answer
from abacist.task.problems import load_problems
from abacist.task.symbolic import gsm_symbolic


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError) as caught:
        load_problems("gsm_symbolic", limit=3)
    assert "pip install 'abacist[reasoning-gym]'" in str(caught.value)
    assert "generated" in str(caught.value)


def test_an_unknown_split_is_refused_before_the_package_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="gsm_symbolic problems have no split 'test'"):
        load_problems("gsm_symbolic", split="test")


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("reasoning_gym", reason="reasoning-gym, optional, is not here")

    def test_its_problems_read_and_name_their_template(self) -> None:
        problems = load_problems("gsm_symbolic", limit=150, seed=2)
        assert len(problems) == 150
        assert len({problem.structure for problem in problems}) > 40
        for problem in problems:
            gold = read_answer(problem.answer)
            last_line = problem.solution.rpartition("\n")[2]
            assert gold is not None and problem.solution
            assert str(abs(int(gold))) in last_line.replace(",", "") or gold.denominator > 1
            assert not problem.question.endswith("Do not include units.")

    def test_the_splits_share_no_question_and_the_same_seed_begins_the_same(self) -> None:
        splits = {
            split: load_problems("gsm_symbolic", split=split, limit=60, seed=4)
            for split in ("train", "selection", "heldout")
        }
        questions = [problem.question for split in splits.values() for problem in split]
        assert len(set(questions)) == 180
        fewer = load_problems("gsm_symbolic", split="heldout", limit=20, seed=4)
        assert fewer == splits["heldout"][:20]
        assert fewer != load_problems("gsm_symbolic", split="heldout", limit=20, seed=5)

    def test_a_rounded_or_broken_worked_solution_is_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import reasoning_gym

        def row(number: int, working: str) -> dict[str, object]:
            return {"question": f"Number {number}?", "metadata": {"answer_cot": working}}

        class Made(list[dict[str, object]]):
            task_indices = range(1000)

        good, rounded, off = "So 9 - 2 = 7 eggs.\n#### 7", "3 * .5 = 1\n#### 1", "It is 8.\n#### 7"
        rows = [row(n, (good, rounded, off)[n % 3]) for n in range(90)]
        monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *_, **__: Made(rows + rows))
        kept = list(gsm_symbolic(1000, seed=0, split="train"))
        assert kept and {record["answer"] for record in kept} == {good}
        assert len({record["question"] for record in kept}) == len(kept) <= 30
