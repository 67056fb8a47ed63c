"""What ``abacist compare`` shows of a method: several seeds, a control beside it, more examples.

See :mod:`abacist.view.comparison` for two evaluations, and for the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from abacist.proof.comparison.compare import Comparison
from abacist.proof.comparison.seeds import SeedsComparison
from abacist.view.comparison import (
    PARTS_NOTE,
    control_remark,
    difference_row,
    headline,
    kinds_table,
    p_text,
    sides,
)
from abacist.view.sheet import Block, Table, one_line
from abacist.view.tables import bracket, percent, points

SEEDS_NOTE = (
    "The first line is the method's: it allows for new problems and for new seeds (Student's "
    "half-widths between problems and between seeds, squared and added). The second is about these "
    "runs alone, the third about these problems alone."
)


def seeds_page(found: SeedsComparison, base: str) -> list[Block]:
    """The whole page of several seeds against ``base``, the combined estimate first."""
    change, count = found.combined, len(found.comparisons)
    said = "Better" if found.is_better else "Worse" if found.is_worse else "Not proven better"
    worst = found.comparisons[found.worst].accuracy
    letters = [f"B{number}" for number in range(1, count + 1)]
    sentence = (
        f"{said}: {100 * found.mean_before:.1f} % → {100 * found.mean_after:.1f} % correct on "
        f"{change.n:,} problems in the mean of {count} seeds, {points(change.value)} points "
        f"{bracket(change)} for new problems and new seeds. The worst seed: "
        f"{percent(worst.after)}, {points(worst.change.value)} points {bracket(worst.change)}."
    )
    if not found.is_better and not found.is_worse:
        sentence += " Chance alone can make a difference like this."
    controls = {letter: one.control for letter, one in zip(letters, found.comparisons, strict=True)}
    return [
        sentence,
        sides({"A": base, **dict(zip(letters, found.names, strict=True))}),
        *control_remark(controls),
        _estimates(found),
        SEEDS_NOTE,
        _each_seed(found, letters),
        Table(
            ("of which", "points", "95 % interval", "n", "method"),
            [difference_row(name, part) for name, part in found.split.items()],
            has_words=True,
        ),
        PARTS_NOTE,
        kinds_table(found.by_kind()),
    ]


def _estimates(found: SeedsComparison) -> Table:
    spread = f"{100 * found.between_seeds:.1f}"
    rows = [
        difference_row("all seeds", found.combined),
        difference_row("  these seeds, new problems", found.over_problems),
        difference_row("  these problems, new seeds", found.over_seeds),
        ("between seeds", spread, "", f"{len(found.names)}", "standard deviation of their changes"),
    ]
    return Table(("B - A", "points", "95 % interval", "n", "method"), rows, has_words=True)


def _each_seed(found: SeedsComparison, letters: list[str]) -> Table:
    rows = []
    for index, (letter, one) in enumerate(zip(letters, found.comparisons, strict=True)):
        paired = one.accuracy
        label = f"{letter}, the worst" if index == found.worst else letter
        change = points(paired.change.value), bracket(paired.change)
        counts = f"{len(paired.gained):,}", f"{len(paired.lost):,}"
        sides_words = percent(paired.before), percent(paired.after)
        rows.append((label, *sides_words, *change, *counts, p_text(paired), paired.change.method))
    heading = ("each seed", "A", "B", "points", "95 % interval", "gained", "lost", "p", "method")
    return Table(heading, rows, has_words=True)


def control_blocks(
    real: Comparison, gain: Comparison, beyond: Comparison, name: str
) -> list[Block]:
    """The control beside the real run: what each gains over A, and B against the control."""
    rows = []
    for label, one in (("B - A", real), ("control - A", gain), ("B - control", beyond)):
        paired = one.accuracy
        value = points(paired.change.value), bracket(paired.change), p_text(paired)
        sides_words = percent(paired.before), percent(paired.after)
        rows.append((label, *sides_words, *value, f"{paired.change.n:,}", paired.change.method))
    damage = ""
    if gain.accuracy.is_worse:
        damage = " It ends below A, damaged by its training: to beat it says little."
    heading = ("control", "from", "to", "points", "95 % interval", "p", "n", "method")
    return [
        headline(beyond.accuracy, " than its control"),
        f"The control is {one_line(name, 60)}, trained on {gain.control} rewards." + damage,
        Table(heading, rows, has_words=True),
    ]


def shots_page(
    found: Mapping[int, Comparison], run: str, *, trained_at: str = "", is_built_in: bool = False
) -> list[Block]:
    """Base and trained policy by how many worked examples stand in the prompt.

    ``trained_at`` is the number the run was trained with, if known; ``is_built_in`` says that its
    base is the built-in model.
    """
    rows = []
    for number, one in found.items():
        paired = one.accuracy
        change = points(paired.change.value), bracket(paired.change), p_text(paired)
        sides_words = percent(paired.before), percent(paired.after)
        strict = percent(one.after.figures["strict"])
        rows.append((str(number), *sides_words, *change, strict, f"{paired.change.n:,}",
                     paired.change.method))  # fmt: skip
    heading = ("shots", "base", "trained", "points", "95 % interval", "p", "strict", "n", "method")
    better = [number for number, one in found.items() if one.accuracy.is_better]
    missing = [number for number in found if number not in better]
    said = (
        "Better at every number of shots"
        if not missing
        else "Not proven better at "
        + (", ".join(map(str, missing)) + (" shot" if missing == [1] else " shots"))
    )
    return [
        f"{said}: {one_line(run, 60)} against its base, greedy, on the "
        "problems of its verdict. A gain that is only at the trained number of shots is a gain in "
        "following the prompt.",
        *_other_shots(found, trained_at, is_built_in),
        Table(heading, rows, has_words=True),
    ]


def _other_shots(counts: Iterable[int], trained_at: str, is_built_in: bool) -> list[str]:
    """What to think of the numbers of shots that the run was not trained with."""
    if all(str(count) == trained_at for count in counts):
        return []
    if is_built_in and trained_at == "0":
        return [
            "The built-in model has only ever read bare questions, when it was made and in this "
            "run. A prompt with worked examples is text of a kind it has never seen, so low "
            "figures with examples say nothing about the training."
        ]
    if not trained_at:
        return []
    return [
        f"The run was trained with {trained_at} worked "
        f"{'example' if trained_at == '1' else 'examples'} in its prompt: every other row asks it "
        "in a prompt that it was not trained in."
    ]
