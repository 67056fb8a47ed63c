"""Writes the report: one HTML file that needs nothing but itself.

The content security policy lets run only the page's own script and style, by their hashes, and
forbids every request. Texts of models and of foreign data are escaped by the template, and
characters that act rather than show (terminal escapes, marks that turn the reading direction) are
written out.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from abacist.errors import AbacistError
from abacist.learning.health.rules import Diagnosis
from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.comparison.sentence import (
    bracket,
    headline,
    judgement,
    p_words,
    percent,
    points,
)
from abacist.proof.comparison.sides import AFTER, BEFORE
from abacist.records.openings import openings_in_words
from abacist.records.secrets import scrubbed, without_secrets
from abacist.task.reply import TAGS
from abacist.task.step_rewards import STEP_OUTCOMES
from abacist.view import evaltext, verdict
from abacist.view.plaintext import cut_middle, visible
from abacist.view.report import figures
from abacist.view.report.explorer import (
    FIELDS,
    OUTCOMES,
    REPLIES_IN_PAGE,
    TRAINING,
    Explorer,
    collect,
)
from abacist.view.report.figures import Chart
from abacist.view.report.reading import EVALUATION, Reading
from abacist.view.report.svg import Styles
from abacist.view.rollouts import outcomes_words
from abacist.view.sheet import Block, Quote, Table

PAGE_NAME = "report.html"
_HERE = Path(__file__).parent
_GROUPS_WITHOUT_SCRIPT = 8
_TAG = re.compile(f"({'|'.join(map(re.escape, TAGS))})")


@dataclass
class RunSection:
    """What the page says of one run, or of one evaluation."""

    id: str
    heading: str
    verdict: str = ""
    judgement: str = ""
    lines: list[str] = field(default_factory=list)
    charts: list[Any] = field(default_factory=list)
    details: list[str | Table] = field(default_factory=list)
    notes: str = ""


def page(readings: Sequence[Reading], *, replies: int = REPLIES_IN_PAGE) -> str:
    """The report on these runs as HTML; several lie over one another in its charts.

    ``replies`` is how many the page holds at most.
    """
    readings = _with_names_apart(readings)
    styles = Styles()
    explorer = collect(readings, replies)
    runs = [_section(reading, number, styles) for number, reading in enumerate(readings)]
    trained = [one for one in readings if one.kind != EVALUATION]
    curves = figures.of_training(trained, styles) if trained else []
    details = [
        (one.name, [_shown(chart) for chart in charts])
        for one in trained
        if (charts := figures.of_rewards(one, styles))
    ]
    paired = _paired(readings)
    health = [(one.name, [_finding(found, one) for found in one.diagnoses]) for one in trained
              if one.steps]  # fmt: skip
    sections = [
        *((run.id, "Verdict" if len(runs) == 1 else run.heading) for run in runs),
        *([("paired", "One against the other")] if paired else []),
        *([("curves", "Curves")] if curves else []),
        *([("advantage", "Advantage and time")] if details else []),
        *([("health", "Health")] if health else []),
        *([("replies", "Replies")] if explorer.rows else []),
        ("setup", "Setup"),
        ("reading", "How to read this"),
    ]
    return _render(
        styles,
        explorer,
        title=", ".join(visible(one.name) for one in readings),
        subtitle=" · ".join(dict.fromkeys(filter(None, map(_subtitle, readings)))),
        remarks=[
            (f"{visible(one.name)}: " if len(readings) > 1 else "") + visible(line)
            for one in readings
            for line in one.remarks
        ],
        sections=sections,
        runs=runs,
        paired=paired,
        curves=[_shown(chart) for chart in curves],
        details=details,
        health=health,
        kept_words=_kept_words(explorer, readings),
        setups=[_setup(one) for one in readings],
    )


def comparison_page(
    blocks: Sequence[Block], names: tuple[str, str], comparison: Comparison | None = None
) -> str:
    """What ``abacist compare`` says, as HTML; of two sides with their charts and replies.

    ``names`` are those of the two sides.
    """
    styles, explorer = Styles(), Explorer()
    first, *rest = [_as_section_part(block) for block in blocks]
    tables_from = next((at for at, part in enumerate(rest) if isinstance(part, Table)), len(rest))
    section = RunSection(
        "run-1", " and ".join(map(visible, names)), verdict=str(first),
        lines=[str(part) for part in rest[:tables_from]], details=rest[tables_from:],
    )  # fmt: skip
    if comparison is not None:
        section.judgement = judgement(comparison.accuracy)
        section.charts = [
            _shown(one) for one in figures.of_comparison(comparison, styles, ("A", "B"))
        ]
        sides = {BEFORE: comparison.before, AFTER: comparison.after}
        both = Reading(
            Path(" and ".join(names)), EVALUATION, evaluations=sides, comparison=comparison,
            sources={BEFORE: "A", AFTER: "B"},
        )  # fmt: skip
        explorer = collect([both])
    return _render(
        styles,
        explorer,
        title="A: " + visible(names[0]) + ", B: " + visible(names[1]),
        sections=[
            ("run-1", "Comparison"),
            *([("replies", "Replies")] if explorer.rows else []),
            ("reading", "How to read this"),
        ],
        runs=[section],
        kept_words=_kept_words(explorer, []),
    )


def _as_section_part(block: Block) -> str | Table:
    """A block of a sheet as the page shows it: lines of a quotation are rows of one cell."""
    if isinstance(block, Quote):
        return Table((block.heading,), [(line,) for line in block.lines])
    return block


def _render(styles: Styles, explorer: Explorer, **given: Any) -> str:
    """The template with its script, its style and their hashes."""
    script = (_HERE / "explorer.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8") + styles.css()
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(_HERE), undefined=jinja2.StrictUndefined
    )
    environment.filters["one_line"] = lambda text: " ".join(text.split())
    absent: dict[str, Any] = {
        "subtitle": "", "remarks": [], "paired": None, "curves": [], "details": [], "health": [],
        "setups": [],
    }  # fmt: skip
    return environment.get_template("page.html").render(
        absent | given,
        replies=_without_script(explorer),
        data=_json(explorer.to_json()),
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        version=importlib.metadata.version("abacist"),
    )


def _with_names_apart(readings: Sequence[Reading]) -> list[Reading]:
    """The readings, each under a name of its own: with its parent folders where two are alike."""
    depth, names = 1, [one.name for one in readings]
    while len(set(names)) < len(names) and depth < 20:
        depth += 1
        names = ["/".join(one.path.resolve().parts[-depth:]) for one in readings]
    return [replace(one, label=name) for one, name in zip(readings, names, strict=True)]


def _section(reading: Reading, number: int, styles: Styles) -> RunSection:
    section = RunSection(f"run-{number + 1}", visible(reading.name))
    evaluations, comparison = reading.evaluations, reading.comparison
    if comparison is not None:
        section.verdict = headline(comparison)
        section.judgement = judgement(comparison.accuracy)
        section.lines = verdict.remarks(comparison)
        section.charts = [_shown(one) for one in figures.of_comparison(comparison, styles)]
        blocks = verdict.verdict_page(
            comparison, evaluations.get(f"{BEFORE}-sampled"), evaluations.get(f"{AFTER}-sampled"),
            num_examples=0,
        )  # fmt: skip
        section.details = [block for block in blocks if isinstance(block, Table)]
        section.notes = verdict.NOTES
    elif found := evaluations.get(AFTER) or evaluations.get(BEFORE):
        sampled = evaluations.get(f"{AFTER}-sampled") or evaluations.get(f"{BEFORE}-sampled")
        when = "" if reading.kind == EVALUATION or AFTER in evaluations else "Before training. "
        section.verdict = when + evaltext.headline(found)
        section.lines = evaltext.remarks(found)
        section.charts = [_shown(figures.of_evaluation(found, sampled, styles))]
        # Headline and remarks stand above; the notes have their own place.
        blocks = evaltext.evaluation_page(found, sampled)[1 + len(section.lines) : -1]
        section.lines += [block for block in blocks if isinstance(block, str)]
        section.details = [block for block in blocks if isinstance(block, Table)]
        section.notes = evaltext.NOTES
    elif not reading.steps:
        section.lines = ["There is nothing to judge yet."]
    if reading.openings and AFTER in evaluations:
        section.lines.append(f"By the run's record, {openings_in_words(reading.openings)}.")
    if reading.steps:
        section.lines.append(_how_far(reading))
    return section


def _how_far(reading: Reading) -> str:
    of = f" of {reading.max_steps}" if reading.max_steps else ""
    seconds = sum(reading.seconds_of("step_time").values())
    took = f", {seconds / 3600:.1f} h of training" if seconds >= 3600 else (
        f", {seconds / 60:.0f} min of training" if seconds >= 60 else "")  # fmt: skip
    return f"{reading.last_step}{of} steps{took}; {reading.rollouts.num_rows:,} replies kept."


def _subtitle(reading: Reading) -> str:
    settings = reading.settings
    model, data = settings.get("model_name_or_path"), settings.get("dataset_name")
    if model is None and reading.evaluations:
        conditions = next(iter(reading.evaluations.values())).conditions
        model, data = conditions.get("model"), conditions.get("problems")
    told = [str(part) for part in (model, data) if part]
    return visible(" on ".join(told))


def _paired(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """Every run against the first, on the problems of their verdicts; None for one run alone."""
    sides = [(one.name, one.evaluations[AFTER]) for one in readings if AFTER in one.evaluations]
    if len(readings) < 2 or len(sides) < 2:
        return None
    (base, first), *others = sides
    rows, lines = [], []
    for name, other in others:
        try:
            found = compare(first, other).accuracy
        except AbacistError as error:
            lines.append(f"{visible(name)} is not compared with {visible(base)}: {error.message}")
            continue
        rows.append(
            (visible(name), percent(found.before), percent(found.after),
             points(found.change.value), bracket(found.change), p_words(found),
             str(len(found.gained)), str(len(found.lost)))
        )  # fmt: skip
    heading = (f"against {visible(base)}", "first", "this", "points", "95 % interval", "p",
               "gained", "lost")  # fmt: skip
    return {"lines": lines, "table": Table(heading, rows) if rows else None}


def _finding(found: Diagnosis, reading: Reading) -> dict[str, str]:
    when = f"step {found.first_step}"
    if found.last_step != found.first_step:
        when += f" to {found.last_step}"
    return {"name": found.name, "when": when, "evidence": visible(found.evidence),
            "remedy": found.remedy}  # fmt: skip


def _kept_words(explorer: Explorer, readings: Sequence[Reading]) -> str:
    if explorer.kept == explorer.total:
        return f"All {explorer.total:,} replies are here."
    where = ", ".join(f"{visible(one.name)}/rollouts" for one in readings if one.kind != EVALUATION)
    return (
        f"{explorer.kept:,} of {explorer.total:,} replies are here, whole groups, chosen so that "
        f"every outcome is among them; so shares cannot be read off this list. All are in "
        f"{where or 'the Parquet files'}."
    )


def _without_script(explorer: Explorer) -> list[dict[str, Any]]:
    """A few groups as the page shows them without its script: of training and evaluations."""
    place = {name: at for at, name in enumerate(FIELDS)}

    def group_of(row: list[Any]) -> tuple[Any, ...]:
        names = ("run", "source", "step", "group", "problem")
        return tuple(row[place[name]] for name in names)

    groups = [(key, list(rows)) for key, rows in groupby(explorer.rows, key=group_of)]
    if len(groups) > _GROUPS_WITHOUT_SCRIPT:
        # Groups of many outcomes say most; late ones more than early ones.
        groups.sort(
            key=lambda one: (len({row[place["outcome"]] for row in one[1]}), one[0][2]),
            reverse=True,
        )
    shown = []
    for (run, source, step, group, problem), rows in groups[:_GROUPS_WITHOUT_SCRIPT]:
        facts = explorer.problems[problem]
        name = explorer.sources[source]
        where = f"Step {step}, group {group}" if name == TRAINING else name.capitalize()
        title = f"{visible(explorer.runs[run])}: {where}" if len(explorer.runs) > 1 else where
        shown.append(
            {
                "title": title,
                "question": visible(facts["question"]),
                "gold": visible(facts["gold"] or "unknown"),
                "replies": [_plain_reply(row, place) for row in rows[:8]],
            }
        )
    return shown


def _plain_reply(row: list[Any], place: Mapping[str, int]) -> dict[str, Any]:
    reward, advantage = row[place["reward"]], row[place["advantage"]]
    facts = [f"reward {reward:.2f}" if reward is not None else "no reward"]
    if advantage is not None:
        facts.append(f"advantage {advantage:+.2f}")
    read = row[place["read"]]
    facts.append("no answer read" if read is None else f"read: {visible(read)}")
    if (steps := row[place["steps"]]) is not None:
        facts.append(f"steps: {outcomes_words(STEP_OUTCOMES[outcome] for _, _, outcome in steps)}")
    text = cut_middle(row[place["text"]], 3_000)
    parts = [
        ("tag" if _TAG.fullmatch(part) else "", visible(part)) for part in _TAG.split(text) if part
    ]
    outcome = OUTCOMES[row[place["outcome"]]]
    return {"outcome": outcome, "facts": ", ".join(facts), "parts": parts or [("", "(nothing)")]}


def _setup(reading: Reading) -> dict[str, Any]:
    manifest = reading.manifest
    facts: list[tuple[str, ...]] = []
    for group in ("versions", "data"):
        found = manifest.get(group)
        if isinstance(found, Mapping):
            facts += [
                (visible(f"{key}"), _told(value))
                for key, value in found.items()
                if value is not None
            ]
    for key in ("git_commit", "platform", "seed", "dtype", "control"):
        if manifest.get(key) is not None:
            facts.append((key.replace("_", " "), _told(manifest[key])))
    if reading.kind == EVALUATION:
        for evaluation in reading.evaluations.values():
            facts = [(visible(key), _told(value)) for key, value in evaluation.conditions.items()]
            break
    argv = manifest.get("argv")
    command = ""
    if reading.settings:
        command = shlex.join(["abacist", "train", "--config", str(reading.path / "config.yaml")])
        if isinstance(argv, list):
            command += f"\n# it was started as: {shlex.join(['abacist', *map(str, argv[1:])])}"
    settings = sorted(
        (visible(str(key)), _told(value)) for key, value in scrubbed(dict(reading.settings)).items()
    )
    return {
        "name": visible(reading.name),
        "command": visible(cut_middle(command, 4_000)),
        "facts": Table(("made with", ""), facts) if facts else None,
        "settings": Table(("setting", "value"), settings) if settings else None,
    }


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return visible(without_secrets(cut_middle(str(value), 600)))


def _shown(chart: Chart) -> dict[str, Any]:
    box = re.search(r'viewBox="0 0 ([\d.]+)', chart.svg)
    is_wide = box is not None and float(box[1]) > 400
    return {"title": chart.title, "caption": chart.caption, "svg": chart.svg,
            "table": chart.table, "is_wide": is_wide}  # fmt: skip


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
