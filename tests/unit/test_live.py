"""The terminal while training: exact plain lines, and a panel that survives any metrics."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from abacist.view.live import Live
from abacist.view.pace import Pace, duration
from abacist.view.plaintext import cut_middle, fold, visible
from abacist.view.step import Step

METRICS = {
    "reward": 1.5,
    "rewards/correctness/mean": 0.75,
    "rewards/xml_count/mean": 0.4,
    "completions/mean_length": 48.3,
    "completions/clipped_ratio": 0.03,
    "frac_reward_zero_std": 0.25,
    "loss": 0.0123,
    "learning_rate": 1e-3,
    "step_seconds": 2.0,
}


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock) -> tuple[Live, io.StringIO]:
    out = io.StringIO()
    return Live(Console(file=out, force_terminal=False, width=40), clock=clock), out


def drawn(clock: Clock) -> tuple[Live, Console]:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, record=True, _environ={"TERM": "xterm"}
    )
    return Live(console, clock=clock), console


def test_a_step_is_one_line_that_names_everything_known() -> None:
    live, out = plain(Clock())
    live.step({"step": 1, "max_steps": 11} | METRICS)
    assert out.getvalue() == (
        "step 1/11 | reward 1.50 | correctness 0.75/2, xml_count 0.40/0.5 | 48 tokens a reply"
        " | stopped 97% | groups without signal 25% | loss 0.0123 | 20 s left\n"
    )


def test_where_steps_are_paid_their_share_is_said() -> None:
    live, out = plain(Clock())
    live.step({"step": 1, "max_steps": 11, "step_reward": 0.625} | METRICS)
    assert "groups without signal 25% | step_reward 0.625 | loss 0.0123" in out.getvalue()


def test_plain_lines_come_first_every_tenth_and_last() -> None:
    clock = Clock()
    live, out = plain(clock)
    for done in range(1, 101):
        live.progress(done, 100, "problems answered")
        clock.now += 0.01
    printed = [int(line.split()[2]) for line in out.getvalue().splitlines()]
    assert printed == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_plain_lines_come_after_ten_seconds_when_progress_is_slow() -> None:
    clock = Clock()
    live, out = plain(clock)
    for step in range(1, 8):
        live.step({"step": step, "max_steps": 1000, "reward": 1.0})
        clock.now += 5
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [
        "1/1000", "3/1000", "5/1000", "7/1000",
    ]  # fmt: skip


def test_the_last_line_is_printed_even_when_training_stops_early() -> None:
    clock = Clock()
    live, out = plain(clock)
    live.stage("Learning")
    for step in range(1, 6):
        live.step({"step": step, "max_steps": 1000, "reward": 1.0})
        clock.now += 0.25
    live.close()
    live.close()
    assert out.getvalue().splitlines() == [
        "== Learning",
        "step 1/1000 | reward 1.00",
        "step 5/1000 | reward 1.00 | 4 min 09 s left",
    ]


def test_an_evaluation_in_the_middle_of_training_does_not_swallow_steps() -> None:
    clock = Clock()
    live, out = plain(clock)
    live.step({"step": 1, "loss": 0.5})
    live.step({"step": 2, "loss": 0.5})
    live.progress(5, 5, "held-out problems")
    live.step({"step": 3, "loss": 0.5})
    live.step({"step": 3, "eval_accuracy": 0.4})
    live.note("held-out accuracy 40.0 %")
    live.close()
    assert out.getvalue().splitlines() == [
        "step 1 | loss 0.5",
        "step 2 | loss 0.5",
        "held-out problems: 5 of 5 (100%)",
        "step 3 | loss 0.5",
        "step 3 | measured: accuracy 0.400",
        "held-out accuracy 40.0 %",
    ]


def test_the_time_left_follows_the_measured_speed() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left(10) == ""
    pace.mark(0)
    assert pace.left(10) == "" and pace.left(10, seconds_each=60) == "10 min 00 s left"
    clock.now = 6.0
    pace.mark(2)
    assert pace.left(10, seconds_each=60) == "24 s left"
    assert pace.left(None) == "" and pace.left(2) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (3599.9, "1 h 00 min"), (90061, "25 h 01 min")],
)
def test_durations_round_to_whole_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_panel_shows_a_bar_for_every_reward_and_where_it_started() -> None:
    clock = Clock()
    live, console = drawn(clock)
    live.stage("Learning")
    live.step({"step": 1, "max_steps": 20, "rewards/correctness/mean": 0.25})
    clock.now += 3
    live.step(
        {"step": 2, "max_steps": 20, "rewards/my_reward/mean": 7.0, "rewards/odd/mean": math.nan}
        | METRICS
    )
    live.note("saved")
    live.close()
    last = console.export_text().rsplit("step 2/20", 1)[1]
    assert "reward 1.50 | 54 s left" in last
    assert "correctness" in last and "0.75/2" in last and "at first 0.25" in last
    assert "7.00" in last and "7.00/" not in last and "n/a" in last
    assert "stopped 97%" in last and "groups without signal 25%" in last
    assert last.count("━") >= 30 + 11  # the custom reward is full, correctness three eighths


def test_control_characters_of_a_custom_name_or_a_note_never_reach_the_terminal() -> None:
    for live, read in (
        (lambda pair: (pair[0], pair[1].getvalue))(plain(Clock())),
        (lambda pair: (pair[0], pair[1].export_text))(drawn(Clock())),
    ):
        live.note("\x1b[2Jnote [bold]as it is[/bold] \ud800")
        live.step({"step": 1, "max_steps": 2, "rewards/\x07[red]bell/mean": 0.1})
        live.close()
        text = read()
        assert r"\x1b[2Jnote [bold]as it is[/bold] \ud800" in text
        assert r"\x07[red]bell" in text and "\x07" not in text


number = st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.booleans()


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from([*METRICS, "step", "max_steps", "kl"]), number))
def test_no_metrics_raise_and_only_finite_figures_are_worded(metrics: dict[str, object]) -> None:
    step = Step.read(metrics)
    assert "nan" not in " ".join(step.words()) and "inf" not in " ".join(step.words())
    for live in (plain(Clock())[0], drawn(Clock())[0]):
        with live:
            live.step(metrics)


@settings(deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_visible_text_holds_nothing_that_acts_and_can_be_encoded(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    spaces = " \n\t\xa0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
    assert all(character.isprintable() or character in spaces for character in shown)
    assert visible(shown) == shown


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(10, 60))
def test_folded_lines_fit_their_width(text: str, width: int) -> None:
    from rich.cells import cell_len

    assert all(cell_len(line) <= width for line in fold(visible(text), width))


def test_the_middle_of_a_long_text_is_cut_and_counted() -> None:
    assert cut_middle("short", 100) == "short"
    cut = cut_middle("a" * 100_000 + "end", 300)
    assert cut.endswith("aend") and "99,703 characters left out" in cut and len(cut) < 350


def test_the_parts_of_a_short_step_print_nothing_and_of_a_long_one_a_line_every_half_minute() -> (
    None
):
    clock = Clock()
    live, out = plain(clock)
    live.stage("Training")
    for token in range(1, 801):  # 100 seconds of rollouts
        clock.now += 0.125
        live.within_step(1, "rollouts", token, 800, f"token {token}")
    live.step({"step": 1, "max_steps": 2, "reward": 1.0})
    for token in range(1, 201):  # 25 seconds
        clock.now += 0.125
        live.within_step(2, "training", token, 1000, f"token {token}")
    live.close()
    assert out.getvalue().splitlines() == [
        "== Training",
        "step 1, rollouts: token 240 | 1 min 10 s left in this part",
        "step 1, rollouts: token 480 | 40 s left in this part",
        "step 1, rollouts: token 720 | 10 s left in this part",
        "step 1/2 | reward 1.00",
    ]


def test_the_panel_moves_within_a_step_and_forgets_it_with_the_next() -> None:
    clock = Clock()
    live, console = drawn(clock)
    live.within_step(1, "rollouts", 10, 100, "3 of 8 replies, token 5 of at most 20")
    clock.now += 2
    live.within_step(1, "rollouts", 20, 100, "4 of 8 replies, token 6 of at most 20")
    live.within_step(1, "training", 0, 8, "micro-batch 1 of 8")
    live.step({"step": 1, "max_steps": 2, "reward": 1.0})
    live.close()
    text = console.export_text()
    assert (
        "step 1, rollouts: 4 of 8 replies, token 6 of at most 20 | 16 s left in this part" in text
    )
    assert "step 1, training: micro-batch 1 of 8" in text
    assert "micro-batch" not in text.rsplit("step 1/2", 1)[1]


def test_words_of_tokens_wait_for_a_tenth_of_the_way_or_ten_seconds() -> None:
    clock = Clock()
    live, out = plain(clock)
    for done in range(101):
        live.progress(float(done), 100.0, "before training", f"token {done}")
        clock.now += 0.5
    printed = [line.split()[3] for line in out.getvalue().splitlines()]
    assert printed == [str(done) for done in range(10, 101, 10)]


def test_the_pace_of_every_token_looks_back_over_seconds_and_not_over_a_moment() -> None:
    clock = Clock()
    pace = Pace(clock)
    for done in range(10_000):  # 100 tokens a second
        clock.now += 0.01
        pace.mark(done)
    clock.now += 1.0  # a new prompt is read
    pace.mark(10_000)
    assert len(pace.marks) <= 20 and clock.now - pace.marks[0][0] > 10
    assert pace.left(20_000) in {f"1 min {seconds} s left" for seconds in range(44, 52)}
