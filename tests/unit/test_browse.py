"""Replies are found by what one asks for, damage is named, what is shown fits and is harmless."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from rich.console import Console

from abacist.errors import RunError
from abacist.proof.browse import (
    Query,
    chosen,
    find,
    group_of,
    one_of_each_group,
    one_of_each_outcome,
    rollouts_at,
    source_of,
)
from abacist.proof.outcomes import Outcome
from abacist.records.rollout import Rollout, StopReason, read_rollouts, write_rollouts
from abacist.task.answers import same_answer
from abacist.task.reply import parse_reply, render_reply
from abacist.task.step_rewards import StepReward, step_rewards
from abacist.view.rollouts import layout_words, verdict_on
from abacist.view.show import group_page, pages, reply_page, rollout_json, summary_lines

RIGHT, WRONG = render_reply("5 + 7 = 12", "12"), render_reply("5 + 7 = 13", "13")
UNFORMATTED, CUT = "5 + 7 = 12, so it is 12", "<reasoning>\n5 +"


def rollout(completion: str, *, step: int = 1, group: int = 0, member: int = 0,
            gold: str | None = "12", problem: str | None = "p0", reward: float | None = 1.0,
            question: str = "Ada has 5 eggs.", split: str = "train") -> Rollout:  # fmt: skip
    answer = parse_reply(completion).answer
    return Rollout(
        run_id="r", step=step, split=split, group=group, member=member,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": question}],
        completion=completion, completion_ids=[1, 2], prompt_tokens=3, completion_tokens=2,
        stop_reason=StopReason.LENGTH if completion == CUT else StopReason.STOPPED, gold=gold,
        problem_id=problem, difficulty=2, read_answer=answer,
        is_correct=None if gold is None else same_answer(answer, gold),
        rewards={"correctness": reward, "xml_count": None}, reward=reward, advantage=0.25,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps of two groups of two replies, and an evaluation; not finished."""
    for step in (1, 2, 10):
        write_rollouts(
            tmp_path / "rollouts" / f"step-{step:06d}.parquet",
            [
                rollout(RIGHT, step=step, group=0, reward=4.0),
                rollout(WRONG, step=step, group=0, member=1, reward=2.0, problem="p0"),
                rollout(UNFORMATTED, step=step, group=1, reward=0.0, problem="p1"),
                rollout(CUT, step=step, group=1, member=1, reward=-0.5, problem="p1",
                        question="How many BUTTONS?"),
            ],
        )  # fmt: skip
    write_rollouts(
        tmp_path / "evals" / "after" / "rollouts.parquet", [rollout(RIGHT, step=0, split="heldout")]
    )
    manifest = {"format": "abacist-run", "format_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query(), [(10, "right"), (10, "wrong"), (10, "unformatted"), (10, "truncated")]),
        (Query(step=2, outcome=Outcome.WRONG), [(2, "wrong")]),
        (Query(outcome=Outcome.RIGHT), [(10, "right"), (2, "right"), (1, "right")]),
        (Query(problem_id="p1", step=1), [(1, "unformatted"), (1, "truncated")]),
        (Query(min_reward=2.0, max_reward=3.9, step=1), [(1, "wrong")]),
        (Query(max_reward=-0.25, step=1), [(1, "truncated")]),
        (Query(text="SO IT IS", step=1), [(1, "unformatted")]),
        (Query(text="buttons", step=1), [(1, "truncated")]),  # of the question, in any case
        (Query(text="system", step=1), []),
        (Query(step=3), []),
        (Query(problem_id="p"), []),  # the whole name, not a part of it
    ],
    ids=str,
)
def test_what_is_asked_for_is_found_newest_step_first(run: Path, query: Query, expected) -> None:
    found = find(source_of(run), query)
    assert [(place.step, place.outcome.value) for place in found.places] == expected
    assert found.steps == {1, 2, 10} and not found.damaged


def test_without_a_query_it_is_one_reply_of_each_outcome_right_first(run: Path) -> None:
    found = find(source_of(run), Query())
    shown = one_of_each_outcome(found, 3)
    assert [place.outcome.value for place in shown] == ["right", "unformatted", "truncated"]
    assert [one.completion for one in rollouts_at(shown)] == [RIGHT, UNFORMATTED, CUT]
    assert one_of_each_outcome(find(source_of(run), Query(step=3)), 3) == []


def test_a_seed_chooses_at_random_and_always_the_same(run: Path) -> None:
    places = find(source_of(run), Query(min_reward=-9)).places
    picked = chosen(places, 5, seed=1)
    assert picked == chosen(places, 5, seed=1) != chosen(places, 5)
    assert [place for place in places if place in picked] == picked  # newest first all the same
    assert {tuple(chosen(places, 5, seed=seed)) for seed in range(9)} > {tuple(picked)}
    assert chosen(places, 99, seed=3) == places


def test_a_group_is_whole_and_appears_once(run: Path) -> None:
    source = source_of(run)
    first, *others = one_of_each_group(find(source, Query(step=2)).places)
    assert len(others) == 1
    members = group_of(source, first)
    assert [(one.step, one.group, one.member) for one in members] == [(2, 0, 0), (2, 0, 1)]


def test_a_group_that_two_processes_wrote_is_put_together(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    for rank in (0, 1):
        write_rollouts(folder / f"step-000001-rank{rank}.parquet",
                       [rollout(RIGHT, member=rank)])  # fmt: skip
    source = source_of(tmp_path)
    places = find(source, Query()).places
    assert len(places) == 2
    assert [one.member for one in group_of(source, places[0])] == [0, 1]


def test_the_newest_step_is_told_by_its_number_and_not_by_its_name(tmp_path: Path) -> None:
    for step in (2, 999_999, 1_000_000):
        for part in ("-part2", "-part10") if step == 2 else ("",):
            write_rollouts(tmp_path / "rollouts" / f"step-{step:06d}{part}.parquet",
                           [rollout(RIGHT, step=step)])  # fmt: skip
    source = source_of(tmp_path)
    assert [place.step for place in find(source, Query()).places] == [1_000_000]
    names = [file.name for file in source.files]
    assert names == [
        "step-000002-part2.parquet", "step-000002-part10.parquet", "step-999999.parquet",
        "step-1000000.parquet",
    ]  # fmt: skip
    assert [one.step for one in read_rollouts(tmp_path / "rollouts")][-1] == 1_000_000
    (tmp_path / "rollouts" / f"step-{'9' * 200}.parquet").touch()  # no name makes it fail
    assert find(source_of(tmp_path), Query()).damaged


def test_generations_of_a_step_whose_groups_were_numbered_alike_are_not_mixed(
    tmp_path: Path,
) -> None:
    for part, ranks in ((1, 2), (2, 2)):
        for rank in range(ranks):
            write_rollouts(
                tmp_path / "rollouts" / f"step-000001-part{part}-rank{rank}.parquet",
                [rollout(RIGHT, member=rank, problem=f"p{part}")],
            )
    source = source_of(tmp_path)
    places = one_of_each_group(find(source, Query()).places)
    groups = [group_of(source, place) for place in places]
    assert sorted([(one.problem_id, one.member) for one in group] for group in groups) == [
        [("p1", 0), ("p1", 1)],
        [("p2", 0), ("p2", 1)],
    ]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("completion", ["a", None]),
        ("completion", [b"\xff", b"5"]),
        ("completion", [["5"], ["6"]]),
        ("messages", ["a question", "another"]),
        ("messages", [None, None]),
        ("step", ["one", "two"]),
        ("group", [None, 1]),
        ("completion_tokens", [2.5, 1.0]),
        ("stop_reason", [None, "stopped"]),
        ("reward", ["much", "little"]),
        ("reward_correctness", [["a"], ["b"]]),
        ("trained", ["yes", "perhaps"]),
        ("steps", ["right", "wrong"]),
        ("steps", [[1.0], [0.0]]),
        ("steps", [[{"start": "here", "end": 2, "reward": 1.0}], None]),
        ("steps", [[{"start": 2**40, "end": 2**41, "reward": 1.0}], None]),
    ],
    ids=str,
)
def test_a_column_that_no_rollout_has_is_named_and_never_a_traceback(
    run: Path, column: str, values: list[object]
) -> None:
    path = run / "rollouts" / "step-000010.parquet"
    table = pq.read_table(path).slice(0, 2)
    if column in table.column_names:
        table = table.drop_columns([column])
    pq.write_table(table.append_column(column, pa.array(values)), path)
    found = find(source_of(run), Query(text="5"))
    (said,) = found.damaged
    assert path.name in said and column in said
    assert {place.step for place in found.places} == {1, 2}


def test_another_programs_types_are_read_where_they_say_the_same(run: Path) -> None:
    path = run / "rollouts" / "step-000010.parquet"
    table = pq.read_table(path)
    theirs = {"step": pa.int32(), "difficulty": pa.float64(), "gold": pa.large_string()}
    for name, kind in theirs.items():
        column = table.column_names.index(name)
        table = table.set_column(column, name, table[name].cast(kind))
    turns = [[{"role": "user", "content": None}, None]] * 4
    kind = table.schema.field("messages").type
    column = table.column_names.index("messages")
    pq.write_table(table.set_column(column, "messages", pa.array(turns, kind)), path)
    found = find(source_of(run), Query(text="5 + 7"))
    assert not found.damaged
    (one, *_) = rollouts_at(found.places)
    assert (one.step, one.difficulty, one.gold) == (10, 2, "12")
    for page in (reply_page(one, 80), group_page([one], 80)):
        assert printed(page, 80)
    assert rollout_json(one)["messages"] == [{"role": "user", "content": ""}]


def test_measurements_are_shown_by_the_name_of_their_folder(run: Path) -> None:
    source = source_of(run, "after")
    assert [one.split for one in rollouts_at(find(source, Query()).places)] == ["heldout"]
    assert source_of(run / "evals" / "after").files == source.files
    assert source_of(source.files[0]).files == source.files
    with pytest.raises(RunError, match="no replies of 'later'") as error:
        source_of(run, "later")
    assert "train, after" in error.value.hint
    with pytest.raises(RunError, match="one kind of replies"):
        source_of(source.files[0], "after")


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1", b"\x00" * 400], ids=["empty", "cut short", "not Parquet"]
)
def test_a_damaged_file_is_named_and_the_rest_is_read(run: Path, damage: bytes) -> None:
    bad = run / "rollouts" / "step-000010.parquet"
    bad.write_bytes(damage)
    found = find(source_of(run), Query())
    assert [name for name in found.damaged if bad.name in name] and len(found.damaged) == 1
    assert {place.step for place in found.places} == {2}  # the newest that can be read
    assert find(source_of(run), Query(step=10)).places == []


def test_another_programs_table_is_damage_too(run: Path) -> None:
    other = run / "rollouts" / "step-000011.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), other)
    table = pq.read_table(run / "rollouts" / "step-000002.parquet")
    column = table.column_names.index("stop_reason")
    odd = table.set_column(column, "stop_reason", pa.array(["bored"] * 4))
    pq.write_table(odd, run / "rollouts" / "step-000002.parquet")
    found = find(source_of(run), Query(min_reward=-9))
    assert ["no column" in found.damaged[0], "'bored'" in found.damaged[1]] == [True, True]
    assert {place.step for place in found.places} == {1, 10}


def test_a_strangers_run_is_shown_without_a_manifest(run: Path) -> None:
    (run / "manifest.json").unlink()
    assert source_of(run).is_finished is None
    (run / "manifest.json").write_text("{", encoding="utf-8")
    assert source_of(run).is_finished is None  # damaged: no reason to hide the replies


def test_what_keeps_no_rollouts_is_told_what_would(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        source_of(tmp_path / "nowhere")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(RunError, match="keeps no replies") as error:
        source_of(tmp_path)
    assert "keep_rollouts=True" in error.value.hint
    (tmp_path / "completions").mkdir()
    with pytest.raises(RunError) as error:
        source_of(tmp_path)
    assert "completions/" in error.value.hint


def printed(page: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(page)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        (RIGHT, "12", "Right: the answer block holds “12”, the gold is “12”."),
        (WRONG, "12", "Wrong: the answer block holds “13”, the gold is “12”."),
        (UNFORMATTED, "12", "no answer is read (there is no <answer> tag)"),
        ("<answer>13</answer> 12", "12", "Right in another format, not by our rule"),
        (CUT, "12", "Cut off after 2 tokens"),
        (
            "<answer>3</answer><answer>4</answer>",
            "12",
            "the answer blocks do not hold the same integer",
        ),
        ("<answer></answer>", "12", "the answer block is empty"),
        (RIGHT, None, "Not judged, there is no gold"),
    ],
)
def test_a_sentence_says_why_a_reply_was_judged_so(completion, gold, expected) -> None:
    assert expected in verdict_on(rollout(completion, gold=gold))


def test_every_defect_of_the_layout_is_named() -> None:
    assert layout_words(RIGHT) == "Layout: strict."
    said = layout_words("Hm <reasoning>x</reasoning> y <answer>1</answer> z")
    for words in ("before the first", "between the blocks", "after the last", "alone on its line"):
        assert words in said


@pytest.mark.parametrize("width", [24, 40, 80, 100])
def test_pages_fit_the_screen(run: Path, width: int) -> None:
    source = source_of(run)
    found = find(source, Query(step=2))
    rollouts = rollouts_at(found.places)
    lines = summary_lines(source, found, width)
    for page in (*pages(rollouts, width), group_page(rollouts[:2] * 4, width, marked=1)):
        lines += printed(page, width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert "5 + 7 = 12" in text and "not finished" in " ".join(text.split())


def test_a_group_is_a_table_and_replies_side_by_side() -> None:
    members = [rollout(RIGHT, reward=4.0), rollout(WRONG, member=1, reward=2.0)]
    lines = printed(group_page(members, 100, marked=1), 100)
    text = "\n".join(lines)
    assert "step 1 | problem p0 (2 steps) | group 0 | 2 replies | gold “12”" in text
    assert re.search(r"^ *0 +right +4\.00 +4\.00 +n/a +\+0\.25 +12 +2$", text, re.MULTILINE)
    assert re.search(r"^ *>1 +wrong +2\.00", text, re.MULTILINE)
    beside = next(line for line in lines if line.startswith("reply 0: right, 4.00"))
    assert "reply 1: wrong, 2.00" in beside
    assert "12" in next(line for line in lines if re.match("12 +13", line))


STEPS = "Eggs:\n5 + 7 = 12 eggs\n3 * 3 = 9\n12 - 3 = 9\n9 + 1 = 11"


def paid(completion: str, solution: str = "5 + 7 = 12") -> Rollout:
    """The reply of a run that pays steps."""
    steps = step_rewards(completion, solution, is_correct=False)
    return replace(rollout(completion), steps=steps)


def test_of_a_reply_whose_steps_were_paid_each_is_shown_with_how() -> None:
    lines = printed(reply_page(paid(render_reply(STEPS, "13")), 80), 80)
    at = lines.index("Steps: 1 right, 2 wrong, 2 not judged")
    assert lines[at + 1 : at + 7] == [
        "  right      5 + 7 = 12 eggs",
        "  wrong      3 * 3 = 9",
        "  not judged 12 - 3 = 9",
        "  wrong      9 + 1 = 11",
        "  not judged 13",
        "",
    ]
    group = "\n".join(printed(group_page([paid(STEPS), rollout(RIGHT)], 100), 100))
    assert group.count("Steps: 1 right, 2 wrong, 1 not judged") == 1


def test_a_reply_without_steps_says_so_and_one_of_a_run_that_pays_none_does_not() -> None:
    assert "Steps: none, the reply is empty" in printed(reply_page(paid(""), 80), 80)
    assert "Steps: 1 wrong" in printed(reply_page(paid("12"), 80), 80)
    assert "Steps" not in "\n".join(printed(reply_page(rollout(STEPS), 80), 80))


@pytest.mark.parametrize("width", [24, 40, 80])
def test_however_many_and_however_hostile_steps_are_their_lines_are_few_and_fit(width: int) -> None:
    line = "5 + 7 = 12 \x1b[2J[red]字\t\u202e" + "字 long " * 300
    reply = paid("\n".join([line] * 280))
    assert reply.steps and len(reply.steps) == 280
    lines = printed(reply_page(reply, width), width)
    at = next(at for at, one in enumerate(lines) if one.startswith("Steps: "))
    end = lines.index("", at)
    assert end - at <= 27 and "[... 257 steps ...]" in "".join(lines[at:end])
    assert max(map(cell_len, lines)) <= width
    assert not set("".join(lines)) & set("\x1b\u202e")


@pytest.mark.parametrize(
    "step", [StepReward(-5, 3, 1.0), StepReward(0, 10**9, 1.0), StepReward(4, 4, 0.0),
             StepReward(9, 2, None), StepReward(3, 5, math.nan)], ids=str
)  # fmt: skip
def test_steps_outside_their_reply_are_counted_and_not_shown(step: StepReward) -> None:
    reply = replace(rollout(STEPS), steps=[step, StepReward(6, 21, 0.0)])
    lines = printed(reply_page(reply, 80), 80)
    at = next(at for at, one in enumerate(lines) if one.startswith("Steps: "))
    shown = lines[at + 1 : lines.index("", at)]
    assert shown[-1] == "  wrong      5 + 7 = 12 eggs"
    assert shown[:-1] == (["  not judged s:"] if step.start == 3 else [])


def test_a_machine_gets_the_steps_by_name() -> None:
    reply = paid("5 + 7 = 12\n1 + 1 = 2\n2 + 2 = 4")
    assert json.loads(json.dumps(rollout_json(reply)))["steps"] == [
        {"start": 0, "end": 11, "reward": 1.0},
        {"start": 11, "end": 21, "reward": 0.0},
        {"start": 21, "end": 30, "reward": None},
    ]
    assert rollout_json(rollout(RIGHT))["steps"] is None


HOSTILE = [
    "\x1b[2J\x1b[31mred", "[red]markup[/red] [/]", "\u202etxt.exe", "\x00\x07", "a" * 300_000,
    "\n" * 9_000, "字" * 900, "<answer>" * 5_000, "<answer>" + "9" * 100_000 + "</answer>",
    "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "{{7*7}}", "\u200b\ufeff\u2066x",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_as_it_was_and_bounded(text: str) -> None:
    one = rollout(text, gold=text[:50], problem=text, question=text)
    for width in (40, 90):
        for page in (reply_page(one, width), group_page([one, one], width)):
            lines = printed(page, width)
            assert len(lines) < 200 and max(map(cell_len, lines)) <= width
            shown = "\n".join(lines)
            assert not re.search(
                "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066]", shown
            )
    assert rollout_json(one)["completion"] == text


def test_markup_is_text() -> None:
    assert "[red]markup[/red]" in "\n".join(
        printed(reply_page(rollout("[red]markup[/red]"), 80), 80)
    )


def test_the_four_tags_are_coloured_and_nothing_else_changes() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard",
                      _environ={})  # fmt: skip
    console.print(reply_page(rollout(RIGHT), 80))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[36m<answer>\x1b[0m" in written
    assert "<answer>\n  12\n  </answer>" in re.sub(r"\x1b\[[0-9;]*m", "", written).replace(
        " \n", "\n"
    )
