"""What ``abacist compare`` shows: two evaluations, paired, every number with n, interval, method.

A page is a list of blocks of :mod:`abacist.view.sheet`, so text and Markdown cannot disagree. A is
what is compared with, B what is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from abacist.proof.comparison.change import Paired
from abacist.proof.comparison.compare import NO_CONTROL, Comparison
from abacist.proof.comparison.seeds import SeedsComparison
from abacist.proof.comparison.sentence import (
    CHANCE,
    bracket,
    change_sentence,
    p_words,
    percent,
    points,
)
from abacist.proof.comparison.split import Part
from abacist.proof.metrics import SHARES
from abacist.proof.statistics import Interval
from abacist.view.sheet import Block, Quote, Table, one_line
from abacist.view.verdict import example_lines

IDS_SHOWN = 10
_ID_COLUMNS = 40

PARTS_NOTE = (
    "Each part counts problems whose reply became right (or stopped being right), by what was "
    "wrong with the reply on the other side: format, the right number is at its end, but in no "
    "answer block; parser, it has an answer block, and only lm-eval's flexible rule reads the "
    "right number; reasoning, no rule finds the right number. The parts add up to the "
    "difference."
)


def pair_page(
    comparison: Comparison, names: tuple[str, str], *, num_examples: int = 3
) -> list[Block]:
    """The whole page of B against A; ``names`` are those of A and B."""
    by_kind = comparison.by_kind()
    return [
        headline(comparison.accuracy),
        *control_remark({"B": comparison.control}),
        sides({"A": names[0], "B": names[1]}),
        accuracy_table(comparison),
        split_table(comparison.split),
        PARTS_NOTE,
        kinds_table({label: pair.change for label, pair in by_kind.items()},
                    {label: (pair.before, pair.after) for label, pair in by_kind.items()}),
        measures_table(comparison),
        *changed_problems(comparison.accuracy),
        *(Quote(*example_lines(number, example, ("A", "B")))
          for number, example in enumerate(comparison.examples(num_examples), start=1)),
    ]  # fmt: skip


def headline(paired: Paired, subject: str = "") -> str:
    """The comparison in one sentence, and a second where the first could be taken for more."""
    said = "Better" if paired.is_better else "Worse" if paired.is_worse else "Not proven better"
    return change_sentence(f"{said}{subject}", paired, "problems")


def sides(names: Mapping[str, str]) -> Table:
    """A table of the names of the sides."""
    rows = [(letter, one_line(name, 90)) for letter, name in names.items()]
    return Table(("compared", ""), rows, has_words=True)


def control_remark(controls: Mapping[str, str]) -> list[Block]:
    """Says of each side that was trained on placebo rewards that it was; nothing of others."""
    return [
        f"{name} is a control, trained on {control} rewards: what it gains does not come from "
        "being paid for right answers."
        for name, control in controls.items()
        if control != NO_CONTROL
    ]


def accuracy_table(comparison: Comparison) -> Table:
    """Accuracy on both sides, the difference by formula and by resampling, and the test."""
    paired = comparison.accuracy
    changed = len(paired.gained) + len(paired.lost)
    rows = [
        ("A", percent(paired.before), plain_bracket(paired.before), *tail(paired.before)),
        ("B", percent(paired.after), plain_bracket(paired.after), *tail(paired.after)),
        difference_row("B - A", paired.change),
        difference_row("B - A, by resampling", comparison.resampled),
        ("could it be chance?", p_words(paired), "", f"{changed:,}", paired.test),
    ]
    kind = "sampled" if comparison.is_sampled else "greedy"
    return Table((f"correct, {kind}", "", "95 % interval", "n", "method"), rows, has_words=True)


def split_table(split: Mapping[str, Part]) -> Table:
    """The change by where it comes from; the parts add up to the last line."""
    rows = []
    for name, part in split.items():
        gained, lost = f"{len(part.gained):,}", f"{len(part.lost):,}"
        value, interval = points(part.change.value), bracket(part.change)
        rows.append((name, value, interval, gained, lost, *tail(part.change)))
    total = math.fsum(part.change.value for part in split.values())
    rows.append(("in all", points(total), "", "", "", "", ""))
    heading = ("of which", "points", "95 % interval", "gained", "lost", "n", "method")
    return Table(heading, rows, has_words=True)


def kinds_table(
    changes: Mapping[str, Interval], sides: Mapping[str, tuple[Interval, Interval]] | None = None
) -> Table:
    """Accuracy by number of steps and by structure; A and B too where ``sides`` has them."""
    rows = []
    for label, change in changes.items():
        both = [percent(side) for side in sides[label]] if sides else []
        value = (points(change.value), bracket(change))
        rows.append((label, *both, *value, *tail(change)))
    heading = ("correct by difficulty", *(["A", "B"] if sides else []), "points", "95 % interval")
    return Table((*heading, "n", "method"), rows, has_words=True)


def measures_table(comparison: Comparison) -> Table:
    """Every other figure that both evaluations have."""
    before, after = comparison.before.figures, comparison.after.figures
    labels = {
        **{name: label for name, label in SHARES.items() if name != "correct"},
        "lm_eval_strict": "lm-eval's strict filter",
        "format_consistency": "all in strict format",
        "answer_consistency": "all say the same",
    }
    rows = []
    for name, label in labels.items():
        if change := comparison.changes.get(name):
            both = percent(before[name]), percent(after[name])
            rows.append((label, *both, points(change.value), bracket(change), *tail(change)))
    tokens = comparison.changes["completion_tokens"]
    lengths = [f"{side['completion_tokens'].value:.1f}" for side in (before, after)]
    interval = f"[{tokens.low:+.1f}, {tokens.high:+.1f}]"
    rows.append(("tokens a reply", lengths[0], lengths[1], f"{tokens.value:+.1f}", interval,
                 *tail(tokens)))  # fmt: skip
    heading = ("also measured", "A", "B", "B - A", "95 % interval", "n", "method")
    return Table(heading, rows, has_words=True)


def changed_problems(paired: Paired) -> list[Block]:
    """The ids of the problems that were gained and lost, the first few of each."""
    return [
        f"{said} {len(ids):,}: {_few(ids)}"
        for said, ids in (("Gained", paired.gained), ("Lost", paired.lost))
        if ids
    ]


def paired_cells(paired: Paired) -> tuple[str, str, str, str]:
    """Accuracy on both sides, the difference in points and its interval."""
    both = percent(paired.before), percent(paired.after)
    return *both, points(paired.change.value), bracket(paired.change)


def difference_row(label: str, change: Interval) -> tuple[str, ...]:
    """A difference with everything that belongs to it."""
    return label, points(change.value), bracket(change), *tail(change)


def tail(interval: Interval) -> tuple[str, str]:
    """n and method of an interval."""
    return f"{interval.n:,}", interval.method


def plain_bracket(interval: Interval) -> str:
    """The bounds of a share, in per cent."""
    if not math.isfinite(interval.low):
        return "-"
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _few(ids: Sequence[str]) -> str:
    shown = ", ".join(one_line(one, _ID_COLUMNS) for one in ids[:IDS_SHOWN])
    more = len(ids) - IDS_SHOWN
    return f"{shown} and {more:,} more (--json has all)." if more > 0 else f"{shown}."


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
        sentence += CHANCE
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
        counts = f"{len(paired.gained):,}", f"{len(paired.lost):,}", p_words(paired)
        rows.append((label, *paired_cells(paired), *counts, paired.change.method))
    heading = ("each seed", "A", "B", "points", "95 % interval", "gained", "lost", "p", "method")
    return Table(heading, rows, has_words=True)


def control_blocks(
    real: Comparison, gain: Comparison, beyond: Comparison, name: str
) -> list[Block]:
    """The control beside the real run: what each gains over A, and B against the control."""
    rows = []
    for label, one in (("B - A", real), ("control - A", gain), ("B - control", beyond)):
        cells = paired_cells(one.accuracy)
        rows.append((label, *cells, p_words(one.accuracy), *tail(one.accuracy.change)))
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
        cells = paired_cells(one.accuracy)
        more = p_words(one.accuracy), percent(one.after.figures["strict"])
        rows.append((str(number), *cells, *more, *tail(one.accuracy.change)))
    heading = ("shots", "base", "trained", "points", "95 % interval", "p", "strict", "n", "method")
    better = [number for number, one in found.items() if one.accuracy.is_better]
    missing = [number for number in found if number not in better]
    said = "Better at every number of shots"
    if missing:
        shots = "shot" if missing == [1] else "shots"
        said = f"Not proven better at {', '.join(map(str, missing))} {shots}"
    return [
        f"{said}: {one_line(run, 60)} against its base, greedy, on the "
        "problems of its verdict. A gain that is only at the trained number of shots is a gain in "
        "following the prompt.",
        *_other_shots(found, trained_at, is_built_in),
        Table(heading, rows, has_words=True),
    ]


def _other_shots(counts: Iterable[int], trained_at: str, is_built_in: bool) -> list[str]:
    """How to read the numbers of shots that the run was not trained with."""
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
