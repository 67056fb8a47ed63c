"""Perturbed problems are exact, and where one could not be trusted there is none."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.task.problems import Problem, load_problems, normalise_question
from abacist.task.steps import equations, evaluate
from abacist.task.variants.perturb import Refusal, perturb, perturb_all
from abacist.task.variants.story_numbers import numerals, story_numbers
from abacist.task.variants.worked import read_steps
from abacist.task.wordproblems import Step, Story, record, stories

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir(), reason="the lab's data (../shared/gsm8k) is not here"
)


def problem(question: str, solution: str, answer: str) -> Problem:
    return Problem("p", question, solution, answer, 1)


EGGS = problem(
    "Ada has 12 eggs. She eats 7 of them. How many are left?",
    "Ada has 12-7=<<12-7=5>>5 eggs left.",
    "5",
)


def annotations(solution: str) -> list[tuple[Fraction | None, Fraction]]:
    """What each annotation comes to and what it says, read without the code under test."""
    found = []
    for left, right in re.findall(r"<<([^=]*)=([^>]*)>>", solution):
        tokens = re.findall(r"[0-9,]*\.?[0-9]+|[-+*/()]", left)
        line = [Fraction(t.replace(",", "")) if t[-1].isdigit() else t for t in tokens]
        found.append((evaluate(line), Fraction(right.replace(",", ""))))
    return found


def skeleton(text: str) -> list[str]:
    return re.split(r"[0-9][0-9,.]*[0-9]|[0-9]", text)


def is_exact(variant: Problem) -> bool:
    found = annotations(variant.solution)
    return (
        bool(found)
        and all(value == said for value, said in found)
        and found[-1][1] == Fraction(variant.answer.replace(",", ""))
        and all(equation.is_true for equation in equations(variant.solution))
    )


@needs_gsm8k
def test_every_variant_of_gsm8k_is_exact_and_new_and_tells_the_same_story() -> None:
    originals = load_problems(GSM8K, split="test", limit=500)
    variants, reasons = perturb_all(originals, seed=3)
    assert len(variants) + reasons.total() == len(originals)
    assert 0.3 < len(variants) / len(originals) < 0.6
    by_id = {each.problem_id: each for each in originals}
    for variant in variants:
        original = by_id[variant.problem_id.removesuffix("~3")]
        assert is_exact(variant), variant
        assert variant.answer != original.answer
        assert skeleton(variant.question) == skeleton(original.question)
        assert len(variant.answer.replace(",", "")) <= len(original.answer.replace(",", "")) + 1
        assert (variant.difficulty, variant.structure) == (original.difficulty, original.structure)
    questions = [normalise_question(each.question) for each in originals + variants]
    assert len(set(questions)) == len(questions)


def retold(story: Story, old: str, new: str) -> Story | None:
    """The story with the numbers of the question ``new``, if one number became one number."""
    pairs = zip(numerals(old), numerals(new), strict=True)
    changed = {int(a.value): int(b.value) for a, b in pairs}

    def with_numbers(step: Step) -> Step:
        return replace(step, n=changed.get(step.n, step.n), k=changed.get(step.k, step.k))

    return replace(story, steps=tuple(map(with_numbers, story.steps)))


def test_a_variant_s_gold_is_what_the_story_s_own_solver_says() -> None:
    made = 0
    for count, story in enumerate(stories("train", 5)):
        if count == 400:
            break
        if story.distractor:
            continue
        row = record(story)
        solution, _, gold = str(row["answer"]).partition("\n####")
        original = Problem(f"s{count}", str(row["question"]), solution, gold.strip(), 1)
        variant = perturb(original, seed=0)
        if variant is None:
            continue
        other = retold(story, original.question, variant.question)
        assert other is not None and other.question() == variant.question
        solved = other.solve()
        if solved is not None:  # None beyond the generator's own limit of 200
            assert str(solved[1]) == variant.answer, (variant, solved)
            made += 1
    assert made > 50


def test_the_same_seed_gives_the_same_variant_and_another_seed_another() -> None:
    assert perturb(EGGS, seed=1) == perturb(EGGS, seed=1)
    assert len({str(perturb(EGGS, seed=seed)) for seed in range(20)}) > 10
    variant = perturb(EGGS, seed=1)
    assert variant is not None and variant.problem_id == "p~1"


def test_more_variants_hold_the_fewer_and_no_question_twice() -> None:
    few, _ = perturb_all([EGGS], seed=0, variants=3)
    many, reasons = perturb_all([EGGS], seed=0, variants=60)
    assert many[: len(few)] == few
    assert len({each.question for each in many}) == len(many)
    assert len(many) + reasons.total() == 60 and set(reasons) <= {Refusal.DUPLICATE}


@pytest.mark.parametrize(
    ("reason", "question", "solution", "answer"),
    [
        (Refusal.NO_ANNOTATIONS, "Ada has 12 eggs.", "She has 12 eggs.", "12"),
        (Refusal.NO_ANNOTATIONS, "Ada has 12 eggs.", "<<12**9=12>>12", "12"),
        (Refusal.NO_ANNOTATIONS, "Ada has 12 eggs.", "<<12/0=12>>12", "12"),
        (Refusal.NO_ANNOTATIONS, "Ada has 12 eggs.", "<<x*12=12>>12", "12"),
        (Refusal.NO_ANNOTATIONS, "Ada has 12 eggs.", "<<12*2=24>>24 <<24", "24"),
        (Refusal.INEXACT, "Ada cuts 20 feet in 6.", "20/6=<<20/6=3>>3", "3"),
        (Refusal.GOLD, "Ada has 12 eggs and eats 7.", "12-7=<<12-7=5>>5", "6"),
        (Refusal.GOLD, "Ada has 12 eggs and eats 7.", "12-7=<<12-7=5>>5", "$5"),
        (Refusal.COMPARISON, "Ada needs at least 12 eggs, has 7.", "<<12-7=5>>5", "5"),
        (Refusal.TEXT, "Ada has 12 eggs, eats 7.", "2x, so <<12-7=5>>5", "5"),
        (Refusal.TEXT, "Ada has 12½ eggs, eats 7.", "<<12-7=5>>5", "5"),
        (Refusal.NOTHING_TO_CHANGE, "Ada has 3 eggs, eats 2.", "<<3-2=1>>1", "1"),
        (Refusal.NOTHING_TO_CHANGE, "20% of the eggs in 1995", "<<20+20=40>>40", "40"),
        (Refusal.UNUSED, "Of 30 eggs 18 are hers, 13 his.", "<<18+13=31>>31", "31"),
        (Refusal.UNUSED, "Of thirty eggs 18 are hers, 13 his.", "<<18+13=31>>31", "31"),
        (Refusal.UNTRACED, "Ada has 12 eggs, he 9.", "<<12+9=21>>21 <<21+8=29>>29", "29"),
        (Refusal.UNTRACED, "Ada has 12 eggs, he 9.", "8 more: <<12+9=21>>21", "21"),
        (Refusal.AMBIGUOUS, "5 rows of 9, and 45 more", "<<5*9=45>>45 <<45+45=90>>90", "90"),
        (Refusal.AMBIGUOUS, "Ada has 12 eggs, eats 7.", "<<12-7=5>>5, so five eggs", "5"),
        (Refusal.UNUSED_RESULT, "5 and 9, 45", "<<5+9=14>>14 <<45+9=54>>54", "54"),
        (Refusal.NO_FIT, "Ada has 9 eggs, eats 8.", "<<9-8=1>>1", "1"),
        (Refusal.EQUATIONS, "5 rows of 10", "5+5=10, and <<5*10=50>>50", "50"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_its_reason(
    reason: Refusal, question: str, solution: str, answer: str
) -> None:
    doubtful = problem(question, solution, answer)
    assert perturb(doubtful, seed=0) is None
    made, reasons = perturb_all([doubtful], seed=0)
    assert not made and reasons == Counter([reason])


@pytest.mark.parametrize(
    "question",
    [
        "It is {} percent.", "{}% of them", "It costs ${}.50", "{}/16 of them", "at 10:{} sharp",
        "the {}th day", "on page {}", "in room {}", "a ${} bill", "7-{} eggs", "a {}-sided die",
        "at {} p.m.", "size A{}", "{}x6 planks", "It is {} o'clock", "ten to fifteen, or {}",
        "in May {}", "a dozen, {} or so, and 12 inches",
    ],
)  # fmt: skip
def test_a_number_that_names_shares_or_repeats_a_word_stays(question: str) -> None:
    number = "12" if "dozen" in question else "15"
    numbers = story_numbers(question.format(number))
    assert Fraction(number) not in numbers.bounds


def test_years_stay_and_sums_of_money_of_that_size_do_not() -> None:
    numbers = story_numbers("In 1995 it cost $1995; in 2010 it cost 2,010 dollars.")
    assert not numbers.bounds  # the sums stand beside years of the same value
    numbers = story_numbers("In 1995 it cost $1996 and 2,010 dollars.")
    assert sorted(map(int, numbers.bounds)) == [1996, 2010]


def test_what_a_solution_makes_of_a_share_is_a_constant() -> None:
    constants = story_numbers("20% off, then 3/4 of it, for a week").constants
    for text in ("20", "0.2", "0.8", "80", "1.2", "3", "4", "0.75", "0.25", "7", "1"):
        assert Fraction(text) in constants


def test_numbers_are_written_as_the_old_ones_were() -> None:
    sale = problem(
        "Ada sells 1,200 eggs at $.50 and keeps 25 cards at $3.25.",
        "1,200*.50=$<<1200*.50=600.00>>600.00 and 25*3.25=<<25*3.25=81.25>>81.25, in all "
        "600+81.25=$<<600+81.25=681.25>>681.25",
        "681.25",
    )
    variant = perturb(sale, seed=2)
    assert variant is not None and is_exact(variant)
    assert re.search(r"sells 1,\d{3} eggs at \$\.50 and", variant.question)
    assert re.search(r"<<1\d{3}\*\.50=\d{3}\.00>>\d{3}\.00", variant.solution)


def test_an_article_fits_its_number() -> None:
    for seed in range(30):
        rope = problem("Ada cuts a 12 foot rope in 6.", "12/6=<<12/6=2>>2 feet", "2")
        variant = perturb(rope, seed=seed)
        assert variant is None or not re.search(r"\ba (8|11|18)", variant.question)


def test_a_day_keeps_to_twenty_four_hours_and_a_week_to_seven_days() -> None:
    for seed in range(30):
        work = problem(
            "Ada works 9 hours, 6 days on end, and rests 20 hours.",
            "9*6=<<9*6=54>>54 hours, 54+20=<<54+20=74>>74",
            "74",
        )
        variant = perturb(work, seed=seed)
        assert variant is not None
        hours, days, rest = (int(each.value) for each in numerals(variant.question))
        assert hours <= 12 and days <= 7 and rest <= 24


pieces = ["<<", ">>", "12", "7", "5", "1,2", "<<12-7=5>>5", "eggs", "twelve", "<<5=5>>5"]
texts = st.lists(st.sampled_from([*"<>=-+*/() \n½٣x$.%é\ud800\x00", *pieces]), max_size=12).map(
    "".join
)


@settings(deadline=None, max_examples=300)
@given(texts | st.text(max_size=60), texts | st.text(max_size=60), st.sampled_from(["5", "", "x"]))
def test_no_text_raises_and_what_comes_is_exact(question: str, solution: str, gold: str) -> None:
    variant = perturb(problem(question, solution, gold), seed=0)
    assert variant is None or is_exact(variant)


@pytest.mark.parametrize("unit", ["<<", "<<1+1=", "(", "1,", "1 ", "((((", "<<((1))=1>>", "a 12 "])
def test_long_texts_are_refused_or_done_and_never_hang(unit: str) -> None:
    for length in (4_900, 1_000_000):
        long = unit * (length // len(unit))
        assert perturb(problem(long, "<<12-7=5>>5", "5"), seed=0) is None
        assert perturb(problem("Ada has 12, eats 7.", long, "5"), seed=0) is None


def test_an_expression_of_brackets_only_nests_as_deep_as_it_is_short() -> None:
    assert read_steps("<<" + "(" * 90 + "1" + ")" * 90 + "=1>>1")
    assert not read_steps("<<" + "(" * 500 + "1" + ")" * 500 + "=1>>1")
    assert not read_steps("<<12-7=5>>5 and <<12>>")
