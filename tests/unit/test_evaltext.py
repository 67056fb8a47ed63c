"""The page and the plot of an evaluation: complete, harmless, and at most 100 columns wide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abacist.proof.evaluation import Evaluation
from abacist.proof.overlap import Overlap
from abacist.view.charts import difficulty_plot, difficulty_series, save_difficulty_chart
from abacist.view.evaltext import (
    evaluation_json,
    evaluation_markdown,
    evaluation_text,
    headline,
    remarks,
)
from evaluated import BARE, GOOD, SILENT, WRONG, evaluation, problem


@pytest.fixture
def pair() -> tuple[Evaluation, Evaluation]:
    problems = [problem(n, 1 + n % 4, bool(n % 2)) for n in range(24)]
    greedy = evaluation([GOOD, WRONG, BARE, SILENT] * 6, problems)
    sampled = evaluation(
        [[GOOD, WRONG], [GOOD, GOOD], [BARE, SILENT], [WRONG, WRONG]] * 6, problems
    )
    return replace(greedy, conditions={"model": "m\x1b[2J", "date": "none"}), sampled


def test_the_page_fits_a_terminal_and_holds_nothing_that_acts(
    pair: tuple[Evaluation, Evaluation],
) -> None:
    text = evaluation_text(*pair)
    assert max(map(len, text.split("\n"))) <= 100
    assert "\x1b" not in text and "\x1b" not in evaluation_markdown(*pair)
    for wanted in ("pass@1", "by steps", "by size of the answer", "unseen structures"):
        assert wanted in text


def test_the_table_across_difficulty_holds_structure_steps_accuracy_and_consistency(
    pair: tuple[Evaluation, Evaluation],
) -> None:
    lines = evaluation_text(*pair).split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith("by steps"))
    for name in ("n", "correct", "adherence", "valid steps", "same format", "same answer"):
        assert name in lines[start]
    rows = [line.split("  ") for line in lines[start + 1 : start + 5]]
    assert [row[1].strip() for row in rows] == ["1 step", "2 steps", "3 steps", "4 steps"]
    assert all(" 6  " in line and line.count("[") == 5 for line in lines[start + 1 : start + 5])


def test_without_samples_there_is_no_consistency(pair: tuple[Evaluation, Evaluation]) -> None:
    assert "same format  " not in evaluation_text(pair[0])


def test_a_native_prompt_is_told_with_the_figure_that_may_be_compared() -> None:
    found = evaluation([GOOD, WRONG])
    native = replace(found, settings=replace(found.settings, native_prompt=True))
    assert "in its own best-known prompt: 50.0 %" in headline(native)
    assert "in the form asked for" in evaluation_text(native)


def test_the_same_evaluation_gives_the_same_plot(
    pair: tuple[Evaluation, Evaluation], tmp_path: Path
) -> None:
    for name in ("one.png", "two.png"):
        save_difficulty_chart(tmp_path / name, *pair)
    first = (tmp_path / "one.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "two.png").read_bytes()


def test_one_problem_makes_a_plot_too(tmp_path: Path) -> None:
    save_difficulty_chart(tmp_path / "one.png", evaluation([SILENT]), None)
    assert (tmp_path / "one.png").stat().st_size > 1_000


def test_a_model_that_never_writes_the_tags_is_pointed_to_other_ways_of_asking() -> None:
    boxed = "So it is \\boxed{7}."
    (said,) = remarks(evaluation([boxed] * 10))
    assert said.startswith("None of 10 replies") and "--native_prompt" in said
    assert "--num_shots 2" in said
    text = evaluation_text(evaluation([boxed] * 10))
    assert text.index("--native_prompt") < text.index("how it was asked")
    (said,) = remarks(evaluation([boxed] * 19 + [GOOD]))
    assert said.startswith("Only 1 of 20 replies")
    for_examples = evaluation([boxed] * 10)
    shown = replace(for_examples, settings=replace(for_examples.settings, num_shots=4))
    (said,) = remarks(shown)
    assert "--native_prompt" in said and "--num_shots" not in said


def test_a_model_that_writes_the_tags_or_was_asked_natively_needs_no_such_remark() -> None:
    assert remarks(evaluation([WRONG] * 10)) == []
    assert remarks(evaluation([BARE] * 8 + [WRONG] * 2)) == []
    native = evaluation([BARE] * 10)
    assert remarks(replace(native, settings=replace(native.settings, native_prompt=True))) == []


def test_an_evaluation_of_seen_problems_says_so_beside_its_headline_figure() -> None:
    found = evaluation([GOOD, WRONG])
    seen = Overlap(2, {"p000": "train"}, is_left_out=False)
    assert "on 2 problems (1 of them seen in training)" in headline(replace(found, overlap=seen))
    left_out = replace(found, overlap=replace(seen, looked_at=3, is_left_out=True))
    assert "on 2 problems, by our" in headline(left_out)
    assert evaluation_json(left_out)["seen"]["seen"] == 1


def test_kinds_of_which_none_was_sampled_have_a_row_all_the_same() -> None:
    problems = [problem(number, difficulty=1 + number % 3) for number in range(6)]
    few = [one for one in problems if one.difficulty != 3]
    greedy = evaluation([GOOD] * 6, problems)
    sampled = evaluation([[GOOD] * 2] * 4, few, temperature=1.0)
    row = next(
        line for line in evaluation_text(greedy, sampled).splitlines() if "3 steps" in line
    )  # fmt: skip
    assert row.split()[-2:] == ["-", "-"]


def test_a_difficulty_of_which_nothing_was_sampled_leaves_a_gap_in_the_chart() -> None:
    problems = [problem(n, difficulty=1 + n % 3) for n in range(9)]
    greedy = evaluation([GOOD] * 9, problems)
    sampled = evaluation([[GOOD, WRONG]] * 2, problems[:2])
    series = difficulty_series(greedy, sampled)
    gaps = {name: [one is None for one in found] for name, found in series.items()}
    assert [False, False, True] in gaps.values() and [False] * 3 in gaps.values()
    assert difficulty_plot(greedy, sampled) is not None
