"""A comparison pairs problem by problem, refuses what cannot be paired, and shows real examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import AbacistError
from abacist.proof.compare import Comparison, changes, compare
from abacist.proof.evaluation import Evaluation
from abacist.proof.statistics import mcnemar
from abacist.task.problems import Problem
from evaluated import BARE, GOOD, SILENT, WORKLESS, WRONG, evaluation, problem

BEFORE = [WRONG, WRONG, GOOD, GOOD, BARE, SILENT]
AFTER = [GOOD, WRONG, GOOD, WRONG, GOOD, GOOD]


def pair(
    before: Sequence[str], after: Sequence[str], problems: Sequence[Problem] | None = None
) -> Comparison:
    return compare(evaluation(before, problems), evaluation(after, problems))


def test_every_problem_is_gained_lost_right_both_times_or_wrong_both_times() -> None:
    accuracy = pair(BEFORE, AFTER).accuracy
    assert accuracy.gained == ("p000", "p004", "p005")
    assert accuracy.lost == ("p003",)
    assert accuracy.both == ("p002",) and accuracy.neither == ("p001",)
    assert accuracy.change.value == pytest.approx(2 / 6)
    assert accuracy.p_value == mcnemar(3, 1) and not accuracy.is_better


def test_any_format_tells_what_is_left_of_a_gain_without_the_format() -> None:
    comparison = pair([BARE] * 20, [GOOD] * 20)
    assert comparison.accuracy.is_better and comparison.accuracy.change.value == 1
    assert comparison.any_format.change.value == 0 and comparison.any_format.p_value == 1
    assert pair([GOOD] * 20, [BARE] * 20).accuracy.is_worse


def test_work_shown_both_times_leaves_out_replies_without_work() -> None:
    comparison = pair([WRONG, WORKLESS, WRONG, BARE], [GOOD, GOOD, WRONG, GOOD])
    worked = comparison.shown_work
    assert worked is not None
    assert (worked.gained, worked.neither, worked.change.n) == (("p000",), ("p002",), 2)
    assert pair([WORKLESS], [GOOD]).shown_work is None


def test_unseen_structures_are_paired_apart_and_absent_without_any() -> None:
    problems = [problem(0, 1, True), problem(1, 1, False), problem(2, 1, None)]
    unseen = pair([WRONG] * 3, [GOOD] * 3, problems).unseen
    assert unseen is not None and unseen.gained == ("p000",) and unseen.change.n == 1
    assert pair([WRONG], [GOOD]).unseen is None


def test_the_order_of_the_problems_does_not_matter() -> None:
    problems = [problem(n) for n in range(6)]
    turned = compare(evaluation(BEFORE, problems), evaluation(AFTER[::-1], problems[::-1]))
    straight = pair(BEFORE, AFTER)
    assert turned.accuracy == straight.accuracy and turned.any_format == straight.any_format
    assert turned.examples() == [
        replace(example, after=replace(example.after, group=5 - example.after.group))
        for example in straight.examples()
    ]


def refusal(before: Evaluation, after: Evaluation) -> str:
    with pytest.raises(AbacistError) as raised:
        compare(before, after)
    assert raised.value.hint
    return raised.value.message


def test_different_problems_are_refused_with_the_difference() -> None:
    base = evaluation([GOOD] * 3)
    other = evaluation([GOOD] * 3, [problem(n) for n in (1, 2, 7)])
    message = refusal(base, other)
    assert "1 only before, 1 only after (such as p000, p007), 2 in both" in message
    changed = replace(problem(1), answer="8")
    assert "p001 has another answer" in refusal(
        base, evaluation([GOOD] * 3, [problem(0), changed, problem(2)])
    )


def test_different_conditions_are_refused_with_the_difference() -> None:
    base = evaluation([GOOD])
    assert "kind: greedy before, sampled after" in refusal(
        base, evaluation([GOOD], temperature=1.0)
    )
    budget = evaluation([GOOD], max_completion_tokens=40)
    assert "max_completion_tokens: 50 before, 40 after" in refusal(base, budget)
    sampled = evaluation([[GOOD, BARE]])
    assert "one reply to each, not 2" in refusal(sampled, sampled)


def test_a_prefilled_control_can_be_compared() -> None:
    control = evaluation([WRONG] * 3, prefill="<reasoning>\n")
    assert compare(control, evaluation([GOOD] * 3)).accuracy.change.value == 1


def test_sampled_figures_change_by_problem_not_by_reply() -> None:
    before = evaluation([[GOOD, WRONG]] * 10)
    after = evaluation([[GOOD, GOOD]] * 5 + [[GOOD, WRONG]] * 5)
    found = changes(before, after)
    assert found["correct"].value == pytest.approx(0.25) and found["correct"].n == 10
    assert found["answer_consistency"].value == pytest.approx(0.5)
    assert found["format_consistency"].value == 0
    assert found["reward_correctness"].value == pytest.approx(0.5)
    assert set(found) == set(before.figures)


def test_examples_show_a_gain_a_gain_on_an_unseen_structure_and_one_still_wrong() -> None:
    problems = [problem(n, difficulty=1 + n % 3, unseen=n % 2 == 1) for n in range(8)]
    before = [WRONG] * 6 + [GOOD, WRONG]
    after = [GOOD, GOOD, WORKLESS, GOOD, WRONG, WRONG, WRONG, GOOD]
    comparison = pair(before, after, problems)
    shown = [(e.outcome, e.problem.problem_id) for e in comparison.examples()]
    # On seen structures p000 shows its work and p002 does not; on unseen ones p001 has two steps.
    assert shown == [("gained", "p000"), ("gained", "p001"), ("still wrong", "p004")]
    assert [e.outcome for e in comparison.examples(2)] == ["gained", "still wrong"]
    assert [e.outcome for e in comparison.examples(1)] == ["gained"]
    assert comparison.examples(0) == []
    first = comparison.examples()[0]
    assert first.before.completion == WRONG and first.after.completion == GOOD
    assert first.problem == problems[0]


def test_examples_are_filled_up_from_the_lost_when_nothing_was_gained() -> None:
    comparison = pair([GOOD, GOOD, WRONG], [WRONG, GOOD, WRONG])
    assert [e.outcome for e in comparison.examples()] == ["lost", "still wrong"]
    assert pair([GOOD], [GOOD]).examples() == []


@given(
    st.lists(
        st.tuples(*[st.sampled_from([GOOD, WRONG, BARE, SILENT])] * 2), min_size=1, max_size=8
    ),
    st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_examples_are_different_problems_one_still_wrong_if_there_is_one(
    replies: list[tuple[str, str]], count: int
) -> None:
    before, after = zip(*replies, strict=True)
    comparison = pair(before, after)
    shown = comparison.examples(count)
    assert len({e.problem.problem_id for e in shown}) == len(shown) <= count
    if comparison.accuracy.neither and count > 1:
        assert shown[-1].outcome == "still wrong"
    assert shown == comparison.examples(count)


def test_the_json_names_tests_and_changed_problems() -> None:
    document = pair(BEFORE, AFTER).to_json()
    json.dumps(document, allow_nan=False)
    assert document["paired"]["accuracy"]["lost"] == ["p003"]
    assert document["paired"]["unseen_structures"] is None
    assert document["changes"]["strict"]["method"] == "Newcombe, paired"
    assert document["after"]["figures"]["correct"]["value"] == pytest.approx(4 / 6)
