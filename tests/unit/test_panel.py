"""What is drawn while a model trains fits every screen, whatever was logged or replied."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from abacist.records.rollout import Rollout, StopReason
from abacist.task.answers import same_answer
from abacist.task.reply import parse_reply, render_reply
from abacist.view import panel as drawing
from abacist.view.live import Live, lowest_and_highest
from abacist.view.pace import Speed, Trail
from abacist.view.panel import Motion, Samples, Scene, joined, panel
from abacist.view.step import Step

METRICS = {
    "step": 12, "max_steps": 60, "reward": 1.5, "rewards/correctness/mean": 0.75,
    "rewards/strict_format/mean": 0.4, "rewards/a_reward_with_a_name_that_never_ends/mean": 7.0,
    "completions/mean_length": 48.3, "completions/clipped_ratio": 0.03,
    "frac_reward_zero_std": 0.25, "loss": 0.0123, "entropy": 0.7, "step_time": 2.0,
    "num_tokens": 5000,
}  # fmt: skip
WARNING = "warning at step 3: nothing moves, for a reason that takes many words to say. " * 3


def rollout(completion: str, *, group: int = 0, member: int = 0, reward: float | None = 1.0,
            question: str = "Ada has 5 eggs. How many eggs has she?") -> Rollout:  # fmt: skip
    answer = parse_reply(completion).answer
    return Rollout(
        run_id="r", step=12, split="train", group=group, member=member,
        messages=[{"role": "user", "content": question}], completion=completion,
        completion_ids=[1], prompt_tokens=1, completion_tokens=1, stop_reason=StopReason.STOPPED,
        gold="12", read_answer=answer, is_correct=same_answer(answer, "12"), reward=reward,
        rewards={"correctness": reward}, advantage=0.5,
    )  # fmt: skip


RIGHT, WRONG = render_reply("5 + 7 = 12", "12"), render_reply("5 + 7 = 13", "13")


def scene(samples: list[Rollout] | None = None) -> Scene:
    step = Step.read(METRICS)
    found = Scene(step=step, first=step, left="2 min 05 s left", measured=(10, 0.45))
    for name, value in step.rewards.items():
        for share in range(9):
            found.trail(f"reward {name}").add(value * share / 8)
    found.speeds = ["2,310 tokens a second in rollouts", "840 in the whole step"]
    found.within = Motion("step 13, rollouts", "12 of 32 replies, token 9", 30, 90, "5 s left")
    found.progress = Motion("selection problems", "3 of 9", 3, 9, "")
    found.warnings = [WARNING, WARNING]
    found.samples = Samples(12, samples or [rollout(WRONG), rollout(RIGHT)])
    return found


def shown(found: Scene, width: int, height: int, *, ascii_only: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height + 1, _environ={})
    console.print(panel(found, width, height, ascii_only=ascii_only))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in written.splitlines()]


@pytest.mark.parametrize("width", [20, 33, 40, 46, 60, 80, 81, 120, 300])
@pytest.mark.parametrize("height", [1, 4, 9, 14, 23, 39, 80])
def test_no_line_is_wider_than_the_screen_and_no_panel_higher(width: int, height: int) -> None:
    lines = shown(scene(), width, height)
    motion = 2 * 3  # the work in hand and the heading are never given up
    assert len(lines) <= max(height, motion + 2)
    assert max(map(cell_len, lines)) <= width


def test_at_80_columns_everything_stands_in_one_view() -> None:
    text = "\n".join(shown(scene(), 80, 50))
    for expected in (
        "step 12/60 | reward 1.50 | 2 min 05 s left", "0.75/2", "at first 0.75", "right", "38%",
        "measured", "45%", "at step 10", "tokens a reply", "stopped 97%",
        "groups without signal 25%", "2,310 tokens a second in rollouts | 840 in the whole step",
        "! warning at step 3", "step 13, rollouts: 12 of 32 replies, token 9 | 5 s left",
        "a reply of step 12: wrong, reward 1.00, advantage +0.50",
        "a reply of step 12: right", "How many eggs has she?",
        "Wrong: the answer block holds “13”, the gold is “12”.",
    ):  # fmt: skip
        assert expected in text, expected
    assert re.search("▁▂.*█", text), "no sparkline"
    assert text.count("How many eggs has she?") == 1  # the two replies answer one question


def test_replies_give_way_before_warnings_and_warnings_before_figures() -> None:
    tall, short, low = (
        "\n".join(shown(scene(), 80, height)) for height in (50, 24, 13)
    )  # fmt: skip
    assert "a reply of" in tall and "a reply of" not in short
    assert "! warning" in short and "! warning" not in low
    assert "correctness" in low and "step 12/60" in low


def test_with_room_for_one_reply_the_lowest_and_the_highest_take_turns() -> None:
    pair = [rollout(WRONG), rollout(RIGHT)]
    found = {}
    for step in (12, 13):
        one = scene()
        one.warnings, one.samples = [], Samples(step, pair)
        lines = [line for line in shown(one, 80, 30) if f"a reply of step {step}" in line]
        assert len(lines) == 1
        found[step] = lines[0]
    assert "wrong" in found[12] and "right" in found[13]


def test_replies_are_laid_out_once_and_again_only_for_another_screen_or_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    laid_out: list[int] = []
    lines_of = drawing.reply_lines

    def counted(*args: Any, **kwargs: Any) -> list[str]:
        laid_out.append(1)
        return lines_of(*args, **kwargs)

    monkeypatch.setattr(drawing, "reply_lines", counted)
    found = scene()
    first = shown(found, 80, 50)
    for done in range(20):
        found.within = Motion("step 13, rollouts", f"token {done}", done, 90, "")
        shown(found, 80, 50)
    assert len(laid_out) == 2
    assert shown(found, 60, 50) != first and len(laid_out) == 4  # the screen was made narrower
    found.samples = Samples(13, [rollout("another, 12")])
    assert "another, 12" in "\n".join(shown(found, 60, 50)) and len(laid_out) == 5


def test_a_terminal_is_redrawn_at_most_four_times_a_second_while_tokens_come() -> None:
    clock = Clock()
    live, _ = drawn(clock)
    panels: list[Any] = []
    draw = live.screen.draw
    live.screen.draw = lambda panel: (panels.append(panel), draw(panel))  # type: ignore[method-assign,assignment,func-returns-value]
    for token in range(1000):  # ten seconds
        live.within_step(1, "rollouts", token, 1000, f"token {token}")
        clock.now += 0.01
    assert 30 <= len(panels) <= 41


def test_on_a_terminal_a_line_that_goes_on_is_set_in_deeper_than_it_began() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=24, _environ={"TERM": "xterm"})
    live = Live(console)
    live.note("  eval_steps  20 words of a line that goes on")
    live.stage("A stage that is longer than 24")
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert text.splitlines() == [
        "  eval_steps  20 words",
        "    of a line that goes",
        "    on",
        "== A stage that is",
        "longer than 24",
    ]


def test_without_unicode_the_panel_is_ascii() -> None:
    found = scene([rollout("no tags, 12")])
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, _environ={})
    assert console.options.ascii_only
    bars = shown(found, 80, 30, ascii_only=True)
    assert not [line for line in bars if re.search("[▁▂▃▄▅▆▇█─]", line)]


HOSTILE = [
    "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\x00", "\ud800 half", "[bold red]markup[/]",
    "\r\rover", "<script>alert(1)</script>", "a" * 200_000, "\n" * 5_000, "字" * 500,
    "e\u0301" * 400, "\x9b31m", "\u2028\u2029", "<reasoning>" * 3_000, "\t" * 300,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_model_wrote_is_shown_and_not_obeyed(text: str) -> None:
    one = rollout(text, question=text)
    for width in (40, 80):
        lines = shown(scene([one]), width, 60)
        assert len(lines) <= 60 and max(map(cell_len, lines)) <= width
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800\u2028]", "\n".join(lines))
    assert "[bold red]" in "\n".join(shown(scene([one]), 80, 60)) or "bold" not in text


odd = st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.booleans()
names = st.sampled_from([*METRICS, "eval_accuracy", "rewards/\x07x/mean"])


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(names, odd), max_size=4), st.integers(20, 90))
def test_no_sequence_of_metrics_raises_or_outgrows_the_screen(rows: list, width: int) -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=30,
        _environ={"TERM": "xterm"},
    )  # fmt: skip
    with Live(console) as live:
        for row in rows:
            live.step(row)
            live.progress(1.0, math.nan, "odd")
            live.progress(1.0, 0.0, "odd")
            live.within_step(1, "rollouts", math.inf, math.nan, "")
    assert not math.isnan(width)


def test_a_metric_without_a_text_for_a_name_is_passed_over() -> None:
    out = io.StringIO()
    with Live(Console(file=out, force_terminal=False)) as live:
        live.step({1: 2, None: 3, "reward": 1.0, "step": 1})  # type: ignore[dict-item]
    assert out.getvalue() == "step 1 | reward 1.00\n"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(clock: Clock, environ: dict[str, str] | None = None) -> tuple[Live, Console]:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, height=50, record=True,
        _environ={"TERM": "xterm-256color"} | (environ or {}),
    )  # fmt: skip
    return Live(console, clock=clock), console


def test_a_warning_stays_in_view_and_is_said_once_more_at_the_end() -> None:
    live, console = drawn(Clock())
    live.warning("warning at step 1: no signal.\n  Give harder problems.")
    for step in range(2, 5):
        live.step({"step": step, "max_steps": 9, "reward": 1.0})
        last = console.export_text(clear=True)
        assert "! warning at step 1: no signal." in last and "Give harder problems." in last
    live.close()
    text = console.export_text()
    assert text.count("warning at step 1: no signal.\n  Give harder problems.") == 1
    assert "! warning" not in text


def test_in_a_log_a_warning_is_a_line_and_replies_are_none() -> None:
    out = io.StringIO()
    with Live(Console(file=out, force_terminal=False)) as live:
        live.warning("warning at step 1: no signal.")
        live.replies(1, [rollout(RIGHT)])
    assert out.getvalue() == "warning at step 1: no signal.\n"


def test_no_color_leaves_cursor_and_text_and_takes_colours() -> None:
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        live, console = drawn(Clock(), environ)
        live.warning("warning at step 1")
        live.step(METRICS)
        live.close()
        written = console.file.getvalue()  # type: ignore[attr-defined]
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", written)) == coloured
        assert "\x1b[?25l" in written and "correctness" in written


def test_the_speed_of_rollouts_and_of_whole_steps_is_told_apart() -> None:
    clock = Clock()
    live, console = drawn(clock)
    for step in (1, 2):
        for done in range(0, 101, 10):
            live.within_step(step, "rollouts", done, 100, "")
            clock.now += 0.1
        clock.now += 4
        live.step({"step": step, "reward": 1.0, "num_tokens": 600 * step, "step_time": 5.0})
    live.close()
    assert "100 tokens a second in rollouts | 120 in the whole step" in console.export_text()


def test_a_resumed_run_claims_no_speed_for_what_came_before_it() -> None:
    live, console = drawn(Clock())
    live.step({"step": 31, "reward": 1.0, "num_tokens": 90_000, "step_time": 1.0})
    live.step({"step": 32, "reward": 1.0, "num_tokens": 90_500, "step_time": 1.0})
    live.close()
    text = console.export_text()
    assert "90,000" not in text and "500 tokens a second in the whole step" in text


def test_speed_counts_over_a_count_that_begins_anew() -> None:
    clock = Clock()
    speed = Speed(clock)
    assert speed.a_second() is None
    for done in (0, 10, 20, 0, 10):
        speed.mark(done)
        clock.now += 1
    assert speed.a_second() == pytest.approx(30 / 3)


def test_a_trail_of_any_length_keeps_its_shape_in_few_points() -> None:
    trail = Trail()
    for value in range(100_000):
        trail.add(float(value))
    assert len(trail.points) < Trail.MOST
    line = trail.drawn(8, 0.0, 100_000.0)
    assert len(line) <= 8 and list(line) == sorted(line) and len(set(line)) > 3
    assert Trail().drawn(8, 0.0, 1.0) == ""


@given(st.lists(st.floats(), max_size=40), st.floats(), st.floats(), st.integers(0, 20))
@example([1e308], 0.0, 1e-231, 4)  # a share beyond all floats
def test_a_sparkline_is_drawn_of_any_numbers(values, low, high, width) -> None:
    trail = Trail()
    for value in values:
        trail.add(value)
    assert len(trail.drawn(width, low, high)) <= max(width, 1)


@given(st.lists(st.text(max_size=30), max_size=6), st.integers(5, 60))
def test_joined_lines_fit(parts: list[str], width: int) -> None:
    assert all(cell_len(line) <= width for line in joined(parts, width))


def test_the_lowest_and_highest_are_the_extremes_of_the_group_that_differs_most() -> None:
    rows = [
        rollout("a", group=0, reward=4.0), rollout("b", group=0, member=1, reward=3.5),
        rollout("c", group=1, reward=2.0), rollout("d", group=1, member=1, reward=0.0),
        rollout("e", group=2, reward=None), rollout("f", group=2, member=1, reward=math.nan),
    ]  # fmt: skip
    assert [one.completion for one in lowest_and_highest(rows)] == ["d", "c"]
    assert lowest_and_highest(rows[:1]) == rows[:1]
    assert len(lowest_and_highest(rows[4:])) == 2


@pytest.mark.parametrize(
    ("environ", "lines"),
    [({}, 3), ({"CI": "true"}, 0), ({"CI": "false"}, 3), ({"CI": ""}, 3)],
    ids=str,
)
def test_within_a_step_ci_hears_less(monkeypatch, environ: dict[str, str], lines: int) -> None:
    monkeypatch.delenv("CI", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    clock, out = Clock(), io.StringIO()
    live = Live(Console(file=out, force_terminal=False), clock=clock)
    live.stage("Training")
    for token in range(800):
        clock.now += 0.125
        live.within_step(1, "rollouts", token, 800, f"token {token}")
    assert len(out.getvalue().splitlines()) == 1 + lines
