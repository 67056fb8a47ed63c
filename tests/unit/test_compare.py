"""A comparison pairs problem by problem, refuses what cannot be paired, and shows real examples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import AbacistError
from abacist.proof.comparison.compare import Comparison, changes, compare
from abacist.proof.evaluation import Evaluation
from abacist.proof.statistics import mcnemar
from abacist.task.problems import Problem
from abacist.task.reply import render_reply
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


def test_a_change_is_proven_where_interval_and_test_agree_and_not_by_one_of_them() -> None:
    few, enough = pair([WRONG] * 5, [GOOD] * 5).accuracy, pair([WRONG] * 6, [GOOD] * 6).accuracy
    assert few.change.low > 0 and few.p_value == 0.0625 and not few.is_better
    assert enough.change.low > 0 and enough.p_value < 0.05 and enough.is_better
    few, enough = pair([GOOD] * 5, [WRONG] * 5).accuracy, pair([GOOD] * 6, [WRONG] * 6).accuracy
    assert few.change.high < 0 and few.p_value == 0.0625 and not few.is_worse
    assert enough.change.high < 0 and enough.p_value < 0.05 and enough.is_worse
    # Neither by the interval alone nor by the test alone.
    for change, p_value in ((enough.change, 0.051), (replace(enough.change, high=0.001), 0.049)):
        doubtful = replace(enough, change=change, p_value=p_value)
        assert not doubtful.is_worse and not doubtful.is_better


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
    assert "1 only in the first, 1 only in the second (such as p000, p007), 2 in both" in message
    changed = replace(problem(1), answer="8")
    assert "p001 has another answer" in refusal(
        base, evaluation([GOOD] * 3, [problem(0), changed, problem(2)])
    )


@pytest.mark.parametrize(
    ("settings", "what", "said"),
    [
        ({"temperature": 1.0}, "sampling", "kind: 'greedy' against 'sampled'"),
        ({"max_completion_tokens": 40}, "budget", "max_completion_tokens: 50 against 40"),
        ({"system_prompt": "Think!"}, "prompt", "system_prompt: None against 'Think!'"),
        ({"prefill": "<reasoning>"}, "prompt", "prefill: '' against '<reasoning>'"),
        ({"shots": [problem(50)]}, "shots", "num_shots: 0 against 1"),
    ],
)
def test_different_conditions_are_refused_by_name_unless_the_difference_is_meant(
    settings: dict[str, Any], what: str, said: str
) -> None:
    base, other = evaluation([WRONG] * 3), evaluation([GOOD] * 3, **settings)
    assert f"differ in their {what}" in refusal(base, other) and said in refusal(base, other)
    assert compare(base, other, allow_different=[what]).accuracy.change.value == 1
    with pytest.raises(AbacistError):
        compare(base, other, allow_different={"prompt", "shots", "budget", "sampling"} - {what})


def test_every_difference_is_named_at_once() -> None:
    message = refusal(
        evaluation([GOOD]), evaluation([[GOOD, BARE]], max_completion_tokens=40, prefill="<r>")
    )
    for said in ("prompt", "sampling", "budget", "num_samples: 1 against 2", "50 against 40"):
        assert said in message


def test_other_worked_examples_are_a_difference_though_their_number_is_the_same() -> None:
    base = evaluation([GOOD], shots=[problem(50)])
    assert "differ in their shots" in refusal(base, evaluation([GOOD], shots=[problem(51)]))


def test_another_seed_of_sampling_is_no_difference() -> None:
    compare(evaluation([[GOOD, BARE]]), evaluation([[GOOD, BARE]], seed=1))


def test_sampled_replies_are_compared_by_each_problems_share() -> None:
    before = evaluation([[WRONG, GOOD], [WRONG, WRONG], [GOOD, GOOD], [GOOD, WRONG]])
    after = evaluation([[GOOD, GOOD], [GOOD, WRONG], [GOOD, WRONG], [WRONG, GOOD]])
    found = compare(before, after)
    assert found.accuracy.gained == ("p000", "p001") and found.accuracy.lost == ("p002",)
    assert found.accuracy.both == ("p003",) and found.accuracy.neither == ()
    assert found.accuracy.change.value == pytest.approx(1 / 8)
    assert found.differences == {"p000": 0.5, "p001": 0.5, "p002": -0.5, "p003": 0.0}
    first = found.examples(1)[0]
    assert not first.before.is_correct and first.after.is_correct
    assert found.shown_work is None


def test_a_native_prompt_is_judged_by_the_form_it_asks_for() -> None:
    ours = evaluation([BARE, WRONG, BARE])
    native = replace(ours, settings=replace(ours.settings, native_prompt=True))
    assert "differ in their prompt" in refusal(native, evaluation([GOOD] * 3))
    found = compare(native, evaluation([GOOD] * 3), allow_different=["prompt"])
    assert found.accuracy.before.value == pytest.approx(2 / 3)
    assert sum(part.change.value for part in found.split.values()) == pytest.approx(1 / 3)


MISREAD = render_reply("It is 8, no, it is 7.", "7 or 8") + "\nSo it is 7"


def test_a_change_is_split_into_what_the_replies_lacked() -> None:
    before = [BARE, WRONG, MISREAD, GOOD, GOOD, BARE, GOOD]
    after = [GOOD, GOOD, GOOD, BARE, WRONG, WRONG, GOOD]
    split = pair(before, after).split
    assert (split["format"].gained, split["format"].lost) == (("p000",), ("p003",))
    assert (split["parser"].gained, split["parser"].lost) == (("p002",), ())
    assert (split["reasoning"].gained, split["reasoning"].lost) == (("p001",), ("p004",))


@given(st.data(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_parts_of_a_change_add_up_to_it_greedy_or_sampled(
    data: st.DataObject, num_samples: int
) -> None:
    texts = st.sampled_from([GOOD, WRONG, BARE, SILENT, WORKLESS, MISREAD])
    replies = st.lists(
        st.lists(texts, min_size=num_samples, max_size=num_samples), min_size=4, max_size=4
    )
    found = compare(evaluation(data.draw(replies)), evaluation(data.draw(replies)))
    parts = [part.change.value for part in found.split.values()]
    assert sum(parts) == pytest.approx(found.accuracy.change.value, abs=1e-12)
    for part in found.split.values():
        assert not math.isfinite(part.change.low) or part.change.low <= part.change.value
    gained = {i for part in found.split.values() for i in part.gained}
    assert set(found.accuracy.gained) <= gained


def test_difficulty_and_structure_are_compared_apart() -> None:
    problems = [problem(n, difficulty=1 + n % 2, unseen=n < 2) for n in range(4)]
    kinds = pair([WRONG] * 4, [GOOD, WRONG, GOOD, WRONG], problems).by_kind()
    assert list(kinds) == ["1 step", "2 steps", "seen structures", "unseen structures"]
    assert kinds["1 step"].change.value == 1 and kinds["2 steps"].change.value == 0
    assert kinds["unseen structures"].gained == ("p000",)


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
    assert document["split"]["reasoning"]["gained"] == ["p000", "p005"]
    assert document["accuracy_by_bootstrap"]["method"].startswith("bootstrap over problems")
    assert document["changes"]["strict"]["method"] == "Newcombe, paired"
    assert document["after"]["figures"]["correct"]["value"] == pytest.approx(4 / 6)
