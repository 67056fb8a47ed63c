"""The audit: it finds every known defect of the historic set, none of ours, and never crashes."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import abacist
from abacist.errors import DataError, RewardError, UsageError
from abacist.task.answers import gold_text, read_answer, same_answer
from abacist.task.audit.audit import _Inspection, audit
from abacist.task.audit.conditions import length_advantages, stress_findings
from abacist.task.audit.findings import Audit, Finding, Kind
from abacist.task.audit.hacks import lists
from abacist.task.audit.renderings import ASKED, layouts, numeral, other_value, same_value
from abacist.task.audit.trial import MishapKind, Trial
from abacist.task.problems import Problem, load_problems
from abacist.task.reply import completion_text, parse_reply
from abacist.task.rewards import correctness, integer
from abacist.view.audit import WIDTH, audit_text

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"
PROBLEMS = load_problems("generated", limit=12)


def short(*rewards: Any, **options: Any) -> Audit:
    return audit(rewards, PROBLEMS, thorough=False, **options)


def kinds(found: Audit) -> set[Kind]:
    return {finding.kind for finding in found.findings}


def the(found: Audit, kind: Kind, reward: str = "") -> Finding:
    """The one finding of this kind (about this reward)."""
    all_of_kind = [
        one for one in found.findings if one.kind is kind and (not reward or reward in one.rewards)
    ]
    assert len(all_of_kind) == 1, [one.kind for one in found.findings]
    return all_of_kind[0]


def paid_by(rule: Callable[[str, str], float], name: str = "mine") -> Callable[..., list[float]]:
    """A reward function from a rule of text and gold."""

    def func(completions: Any, answer: Sequence[str], **columns: Any) -> list[float]:
        texts = map(completion_text, completions)
        return [rule(text, gold) for text, gold in zip(texts, answer, strict=True)]

    func.__name__ = name
    return func


# The default set


def test_the_default_set_is_sound_and_nothing_is_found() -> None:
    found = audit(["default"], PROBLEMS)
    assert (found.findings, found.remarks) == ((), ())
    assert found.sound and not found.hackable
    assert (found.nominal_maximum, found.reachable_maximum) == (4.0, 4.0)
    assert found.answer_rewards == ("correctness",) and found.home == ASKED
    assert found.num_problems == len(PROBLEMS)


# The gist set: one test for each defect of GIST_DEFECTS, in its order


@pytest.fixture(scope="module")
def gist() -> Audit:
    return audit(["gist"], PROBLEMS)


def test_gist_strict_and_soft_exclude_one_another_and_the_maximum_is_three_and_a_half(
    gist: Audit,
) -> None:
    assert the(gist, Kind.EXCLUSION).rewards == (
        "soft_format_reward_func",
        "strict_format_reward_func",
    )
    assert (gist.nominal_maximum, gist.reachable_maximum) == (4.0, 3.5)
    assert "4 nominal, 3.5" in the(gist, Kind.UNREACHABLE).evidence


def test_gist_strict_wants_one_line_and_a_final_newline(gist: Audit) -> None:
    evidence = the(gist, Kind.UNPAID_LAYOUT, "strict_format_reward_func").evidence
    assert "on none of 16 right solutions" in evidence
    assert "“reasoning on one line, final newline”" in evidence


def test_gist_soft_pays_nothing_for_the_layout_that_is_asked_for(gist: Audit) -> None:
    evidence = the(gist, Kind.UNPAID_LAYOUT, "soft_format_reward_func").evidence
    assert "“tags inline, reasoning on one line”" in evidence


def test_gist_an_honest_reply_earns_three_at_most_and_less_without_final_newline() -> None:
    two_lines = [problem for problem in PROBLEMS if problem.difficulty > 1]
    found = audit(["gist"], two_lines, thorough=False)
    honest = found.earned[0]
    assert honest.reply == ASKED and 2 < honest.total < 3
    assert "3.00 “… and a final newline”" in the(found, Kind.HONEST_BELOW_MOST).evidence


def test_gist_length_alone_earns_advantages_of_nearly_one_and_a_half(gist: Audit) -> None:
    evidence = the(gist, Kind.LENGTH_LEAK).evidence
    assert "from -1.43 to +1.43 in all-wrong groups" in evidence


def test_gist_xmlcount_has_no_lower_bound(gist: Audit) -> None:
    finding = the(gist, Kind.UNBOUNDED)
    assert finding.rewards == ("xmlcount_reward_func",)
    assert "without bound below" in finding.evidence


def test_gist_a_bare_number_earns_two_and_a_half(gist: Audit) -> None:
    evidence = the(gist, Kind.TAGLESS).evidence
    assert re.search(r"a bare \d+, without any tag, earns 2\.50", evidence)


def test_gist_pays_for_twelve_answers_of_which_the_last_is_right(gist: Audit) -> None:
    assert "twelve answer blocks, last" in the(gist, Kind.LISTED).evidence
    assert gist.hackable and not gist.sound
    assert "twelve answer blocks in the layout" in the(gist, Kind.HACKABLE).evidence


@pytest.mark.parametrize(
    "way", ["a currency sign", "a full stop", "decimals", "thousands commas", "bold", "boxed"]
)
def test_gist_correctness_is_equality_of_strings(way: str) -> None:
    problems = [dataclasses.replace(PROBLEMS[0], answer="1450")]
    found = audit(["gist.correctness_reward_func"], problems, thorough=False)
    shown = same_value(Fraction(1450))[way]
    assert f"{way} ({shown})" in the(found, Kind.FALSE_NEGATIVE).evidence


def test_gist_int_rejects_minus_and_commas_and_accepts_a_superscript(gist: Audit) -> None:
    missed = the(gist, Kind.MISSED_INTEGER)
    assert missed.rewards == ("int_reward_func",)
    assert "-7" in missed.evidence and "1,450" in missed.evidence
    assert "²" in the(gist, Kind.NOT_A_NUMBER).evidence


def test_gist_one_character_of_reasoning_and_a_wrong_answer_earn_one_and_a_half(
    gist: Audit,
) -> None:
    assert "final newline” earns 1.50" in the(gist, Kind.WRONG_HACK).evidence
    assert "earns 3.50" in the(gist, Kind.WORKLESS).evidence


# What facts say of the gist's own code, which ours has mended: slow and raising rewards


class Clock:
    """A processor's clock that only a reward moves: no test depends on the machine's speed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(time, "process_time", lambda: self.seconds)

    def reward(self, seconds_of: Callable[[int], float]) -> Callable[..., list[float]]:
        def rule(text: str, gold: str) -> float:
            self.seconds += seconds_of(len(text))
            return 0.0

        return paid_by(rule)


LENGTHS = (1_000, 8_000, 32_000)


def test_a_reward_that_takes_quadratic_time_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    func = Clock(monkeypatch).reward(lambda length: 0.2 * (length / 32_000) ** 2)
    slow, *more = stress_findings(Trial(func, 2.0), PROBLEMS[0], LENGTHS)
    assert slow.kind is Kind.SLOW and not more
    assert "0.2 s for 32,000 characters of" in slow.evidence
    assert "to the power of 2.0" in slow.evidence


@pytest.mark.parametrize("disturbed", [1, 2, 3])
def test_quadratic_time_is_found_where_short_calls_are_measured_too_slow(
    monkeypatch: pytest.MonkeyPatch, disturbed: int
) -> None:
    calls: dict[int, int] = {}

    def seconds_of(length: int) -> float:
        calls[length] = calls.get(length, 0) + 1
        alone = 0.2 * (length / 32_000) ** 2
        return alone + (0.04 if length < 20_000 and calls[length] % 4 < disturbed else 0.0)

    func = Clock(monkeypatch).reward(seconds_of)
    slow, *more = stress_findings(Trial(func, 2.0), PROBLEMS[0], LENGTHS)
    assert slow.kind is Kind.SLOW and not more


def test_a_reward_in_linear_time_is_not_slow_where_one_long_call_was_disturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: dict[int, int] = {}

    def seconds_of(length: int) -> float:
        calls[length] = calls.get(length, 0) + 1
        alone = 0.12 * length / 32_000
        return alone * (4 if length > 20_000 and calls[length] % 2 else 1)

    func = Clock(monkeypatch).reward(seconds_of)
    assert not list(stress_findings(Trial(func, 2.0), PROBLEMS[0], LENGTHS))


def test_a_lazy_pattern_across_lines_takes_quadratic_time() -> None:
    pattern = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
    soft = paid_by(lambda text, gold: 0.5 if pattern.match(text) else 0.0)
    found = list(stress_findings(Trial(soft, 0.2), PROBLEMS[0], (1_000, 8_000, 400_000)))
    assert [one.kind for one in found] == [Kind.SLOW]
    assert "characters of changes of block" in found[0].evidence


def test_a_reward_that_raises_without_text_is_fragile() -> None:
    def reads_content(completions: Any, **columns: Any) -> list[float]:
        return [float(len(completion[0]["content"].split())) for completion in completions]

    evidence = the(short(correctness, reads_content), Kind.FRAGILE).evidence
    assert "on None, [], content None, content parts" in evidence


# Rewards of a user's own


def test_a_reward_for_the_gold_anywhere_in_the_text_is_hackable() -> None:
    found = short(paid_by(lambda text, gold: float(gold in text)))
    assert found.hackable
    assert Kind.LISTED in kinds(found)


def test_a_reward_for_length_is_hackable_and_leaks_length() -> None:
    found = short(correctness, paid_by(lambda text, gold: len(text) / 500, "long"))
    assert found.hackable
    assert {Kind.LENGTH_LEAK, Kind.UNBOUNDED} <= kinds(found)


def test_a_set_without_an_answer_reward_is_warned_of_and_not_refused() -> None:
    found = short("strict_format", "soft_format")
    assert kinds(found) == {Kind.NOTHING_FOR_THE_ANSWER}
    assert found.sound and found.answer_rewards == ()


def test_a_reward_in_a_layout_of_its_own_is_audited_there() -> None:
    boxed = re.compile(r"\\boxed\{([^{}]*)\}$")

    def rule(text: str, gold: str) -> float:
        found = boxed.search(text)
        return float(found is not None and same_answer(found[1], gold))

    found = short(paid_by(rule))
    assert found.home == "<think>, then \\boxed{}"  # the first of two homes that pay
    assert found.answer_rewards == ("mine",) and not found.hackable
    assert the(found, Kind.FALSE_NEGATIVE).evidence.startswith("boxed")  # a box in the box


def test_a_reward_for_true_work_whatever_the_answer_is_not_taken_for_one_for_the_answer() -> None:
    found = audit(["default", "valid_steps"], PROBLEMS)
    assert found.answer_rewards == ("correctness",) and found.sound
    assert found.reachable_maximum == 4.5
    # What the reward can be had for is said: a true sum that has nothing to do with the problem.
    evidence = the(found, Kind.WRONG_HACK).evidence
    assert kinds(found) == {Kind.WRONG_HACK} and "“a true sum about nothing and any" in evidence

    def rule(text: str, gold: str) -> float:  # the answer, and only if there is work
        return float(bool(correctness(None, [text], [gold])[0]) and "=" in text)

    assert short(paid_by(rule)).answer_rewards == ("mine",)


def test_a_reward_for_the_right_number_within_the_reasoning_is_no_reward_for_work() -> None:
    def rule(text: str, gold: str) -> float:
        return float(gold in re.findall(r"\d+", parse_reply(text).reasoning or ""))

    found = short(paid_by(rule))
    assert found.answer_rewards == ("mine",) and found.hackable  # by listing numbers there


def test_a_negative_weight_is_a_penalty() -> None:
    wordy = paid_by(lambda text, gold: min(1.0, len(text) / 1000), "wordy")
    found = short(correctness, wordy, weights=[1.0, -0.5])
    assert not found.hackable
    assert {Kind.LENGTH_LEAK, Kind.WORKLESS} <= kinds(found)


def test_a_constant_reward_can_never_be_earned() -> None:
    assert the(short(correctness, paid_by(lambda text, gold: 1.0)), Kind.NEVER_PAID)


def test_a_reward_that_fails_on_some_text_is_named_with_the_reply() -> None:
    def rule(text: str, gold: str) -> float:
        return float(parse_reply(text).answer == gold) / (0 if "boxed" in text else 1)

    finding = the(short(paid_by(rule)), Kind.FAILS)
    assert "ZeroDivisionError" in finding.evidence and "box" in finding.evidence


@pytest.mark.parametrize("returned", [None, "text", [1.0], [float("nan")] * 14, {"a": 1}])
def test_rubbish_is_a_finding_and_the_other_rewards_are_audited(returned: Any) -> None:
    def rubbish(completions: Any, **columns: Any) -> Any:
        return returned

    found = short(correctness, rubbish)
    assert the(found, Kind.FAILS).rewards == ("rubbish",)
    assert found.answer_rewards == ("correctness",) and not found.sound


def test_a_reward_that_leaves_the_program_is_a_finding() -> None:
    def leaves(completions: Any, **columns: Any) -> Any:
        raise SystemExit(2)

    assert the(short(leaves), Kind.FAILS)


def test_a_column_that_is_not_there_is_named() -> None:
    def judged(completions: Any, solution: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    found = short(judged, correctness)
    assert "`solution`" in the(found, Kind.NO_COLUMN).evidence
    assert found.answer_rewards == ("correctness",)


def test_a_reward_that_pays_by_chance_is_said_and_left_out() -> None:
    rng = random.Random(0)
    found = short(correctness, paid_by(lambda text, gold: 5 * rng.random(), "chance"))
    assert the(found, Kind.NOT_DETERMINISTIC).rewards == ("chance",)
    assert not found.hackable


def test_a_hang_is_ended_and_named() -> None:
    backtracks = re.compile(r"(\w+\s?)+\d!$")

    def hangs(completions: Any, **columns: Any) -> list[float]:
        return [float(bool(backtracks.match("word " * 20))) for _ in completions]

    trial = Trial(hangs, limit_seconds=0.4)
    variants = list(layouts(PROBLEMS[0]))[:2]
    assert trial.pay(PROBLEMS[0], variants) == [None, None]
    assert not trial.is_usable
    assert [mishap.kind for mishap in trial.mishaps] == [MishapKind.HUNG] * 2
    assert "'hangs' was stopped" in trial.mishaps[0].message
    assert trial.mishaps[0].sample == ASKED


def test_the_rest_is_audited_without_a_reward_that_hangs() -> None:
    waiting = threading.Event()  # never set

    def hangs(completions: Any, **columns: Any) -> list[float]:
        if any("1, 2, 3" in completion_text(each) for each in completions):
            waiting.wait(5)
        return [0.0] * len(completions)

    inspection = _Inspection([correctness, hangs], [1.0, 1.0], PROBLEMS, thorough=False)
    inspection.all_trials[1].limit_seconds = 0.2
    found = inspection.run(60.0, None)
    assert "'hangs' was stopped" in the(found, Kind.HANGS).evidence
    assert found.num_problems == len(PROBLEMS) and found.answer_rewards == ("correctness",)


def test_a_coroutine_is_awaited() -> None:
    async def later(completions: Any, **columns: Any) -> list[float]:
        return [1.0 for _ in completions]

    assert Kind.FAILS not in kinds(short(correctness, later))


def test_a_reward_that_does_not_apply_is_not_paid() -> None:
    def sometimes(completions: Any, **columns: Any) -> list[float | None]:
        return [None for _ in completions]

    assert not short(correctness, sometimes).hackable


def test_outside_the_main_thread_it_audits_too() -> None:
    found: list[Audit] = []
    thread = threading.Thread(target=lambda: found.append(short("default")))
    thread.start()
    thread.join()
    assert found[0].sound


# What it is given, what it gives


def test_bad_input_is_said_in_words() -> None:
    with pytest.raises(UsageError):
        audit([], PROBLEMS)
    with pytest.raises(UsageError):
        audit(["default"], PROBLEMS, [1.0])
    with pytest.raises(DataError):
        audit(["default"], [])
    with pytest.raises(RewardError):
        audit(["no_such_reward"], PROBLEMS)
    for rewards in (None, 5, {"default"}, [None], [["default"]]):
        with pytest.raises(RewardError):
            audit(rewards, PROBLEMS)
    for weights in ("ab", ["a"], [float("nan")], [1e308], [0.0], [True], {"default": 1}):
        with pytest.raises(UsageError, match="--reward_weights"):
            audit("correctness", PROBLEMS, weights)
    for seconds in (0, -1, None, "10", float("nan")):
        with pytest.raises(UsageError, match="max_seconds"):
            audit("correctness", PROBLEMS, max_seconds=seconds)
    for problems in (None, 5, PROBLEMS[0], {"question": "1 + 1?", "answer": "2"}, ["1 + 1?"]):
        with pytest.raises(DataError):
            audit("correctness", problems)


def test_rewards_and_problems_come_in_every_form_that_training_takes(tmp_path: Path) -> None:
    import numpy as np
    import pandas as pd
    from datasets import Dataset

    rows = [{"question": f"{n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
            for n in range(10, 14)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read = load_problems(rows, split="all")
    wanted = audit(["correctness"], read, [2.0], thorough=False)
    assert wanted.num_problems_given == 4
    forms = (rows, tuple(read), iter(read), (row for row in rows), Dataset.from_list(rows),
             pd.DataFrame(rows), tmp_path / "data.jsonl", str(tmp_path / "data.jsonl"))  # fmt: skip
    for problems in forms:
        assert audit("correctness", problems, 2, thorough=False) == wanted
    for rewards in (correctness, (correctness,), iter(["correctness"])):
        assert audit(rewards, read, np.array([2.0]), thorough=False) == wanted
    for name in ("generated", "gsm_symbolic"):
        made = audit("integer", name, max_seconds=0.5, thorough=False)
        assert made.num_problems_given == 4_000


def test_a_gold_too_long_to_be_rewritten_is_left_out_and_said() -> None:
    long = Problem("long", "How much is it?", "", "9" * 5_000, 1)
    found = audit(["default"], [*PROBLEMS[:4], long], thorough=False)
    assert found.sound and found.num_problems_given == 4
    assert found.remarks == (
        "Left out: 1 of the problems, whose golds have more than 1,000 digits.",
    )
    with pytest.raises(DataError):
        audit(["default"], [long])


def test_no_list_hidden_in_the_reasoning_or_in_glosses_is_paid_for_its_number() -> None:
    for problem in PROBLEMS:
        for hack in lists(problem):
            paid = correctness(None, [hack.text], answer=[problem.answer])
            assert paid == [0.0], hack.name


def test_out_of_time_it_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abacist.task.audit.audit.NUM_REPLIES_NEEDED", 0)
    found = short("default", max_seconds=1e-9)
    assert found.num_problems == 5
    assert "Time ran out after 5 of 12 problems" in found.remarks[0]


def test_a_reward_too_slow_to_be_tried_is_left_out_and_said() -> None:
    def waits(completions: Any, **columns: Any) -> list[float]:
        time.sleep(0.002 * len(completions))
        return [0.0] * len(completions)

    found = short(correctness, waits, max_seconds=3)
    assert found.sound and found.answer_rewards == ("correctness",)
    assert "“waits” takes" in found.remarks[0]


def test_what_is_left_out_might_pay_for_the_answer_so_the_rest_is_not_condemned() -> None:
    def judged(completions: Any, solution: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    brief = paid_by(lambda text, gold: max(0.0, 1 - len(text) / 1000), "brief")
    assert short(brief).hackable
    assert not short(brief, judged).hackable
    assert Kind.NOTHING_FOR_THE_ANSWER not in kinds(short("strict_format", judged))


def test_the_same_audit_twice_is_the_same(gist: Audit) -> None:
    assert audit(["gist"], PROBLEMS).to_json() == gist.to_json()


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int, str]] = []
    short("default", on_progress=lambda *progress: told.append(progress))
    assert told[-1][0] == told[-1][1] == len(PROBLEMS) + 4


def test_the_text_fits_the_screen_and_the_json_is_json(gist: Audit) -> None:
    text = audit_text(gist, "generated problems")
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert text.startswith("Not sound: a reply that solves nothing earns")
    document = json.loads(json.dumps(gist.to_json(), allow_nan=False))
    assert document["hackable"] is True and document["findings"][0]["kind"] == "hackable"
    assert len(gist.summary().split("\n")) == 1


def test_text_of_a_users_reward_cannot_write_to_the_terminal() -> None:
    def raises(completions: Any, **columns: Any) -> Any:
        raise ValueError("\x1b[2Jgone")

    raises.__name__ = "\x1b[31mred"
    assert "\x1b" not in audit_text(short(raises), "generated problems")


def test_it_is_public() -> None:
    assert abacist.audit is audit


# The forms themselves


@given(st.fractions(max_denominator=8).map(lambda value: value.limit_denominator(8)))
def test_forms_keep_or_change_the_value_by_our_rule(value: Fraction) -> None:
    assert read_answer(numeral(value)) == value
    for name, text in same_value(value).items():
        assert read_answer(text) == value, name
    for name, text in other_value(value).items():
        assert read_answer(text) != value, name


@given(st.integers(-(10**12), 10**12))
def test_forms_of_integers_too(number: int) -> None:
    value = Fraction(number)
    assert all(read_answer(text) == value for text in same_value(value).values())
    assert all(read_answer(text) != value for text in other_value(value).values())


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository")
@pytest.mark.parametrize("split", ["train", "test"])
def test_on_every_gsm8k_gold_no_rewriting_is_read_wrongly(split: str) -> None:
    """OpenAI's released sample solutions are not at hand offline; the golds are."""
    golds = {
        gold_text(problem.answer)
        for problem in load_problems(GSM8K, split="all" if split == "train" else split)
    }
    assert len(golds) > 300
    for gold in golds:
        value = read_answer(gold)
        assert value is not None
        assert all(same_answer(text, gold) for text in same_value(value).values()), gold
        assert not any(same_answer(text, gold) for text in other_value(value).values()), gold


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository")
def test_the_figures_of_the_gist_on_gsm8k() -> None:
    problems = load_problems(GSM8K, split="all", limit=150)
    found = audit(["gist"], problems, thorough=False)
    earned = {one.label: one.total for one in found.earned}
    assert earned["a right solution"] == pytest.approx(2.714, abs=0.03)
    assert earned["without the answer, best"] == 1.5
    assert "3.00 “… and a final newline”" in the(found, Kind.HONEST_BELOW_MOST).evidence


def test_length_advantages_are_trls_and_nought_for_equal_pay() -> None:
    problem = Problem("p", "How much is 2 + 3?", "2 + 3 = 5", "5", 1)
    same = length_advantages([Trial(integer, 0.0)], [1.0], [problem], right=True)
    assert same == (0.0, 0.0)
    shorter = Trial(paid_by(lambda text, gold: -float(len(text))), 0.0)
    least, most = length_advantages([shorter], [1.0], [problem], right=True)
    assert (least, most) == (pytest.approx(-1.43, abs=0.01), pytest.approx(1.43, abs=0.01))
