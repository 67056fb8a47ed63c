"""No tracker can stop a run or lose its verdict, and all are told the same."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from abacist.learning.trackers import shielded as shielding
from abacist.learning.trackers.content import (
    Verdict,
    completions_of,
    run_settings,
    some_of,
    tracker_names,
)
from abacist.learning.trackers.run_identity import RunIdentity
from abacist.learning.trackers.shielded import (
    ShieldedTracker,
    Trackers,
    available_trackers,
    in_words,
)
from abacist.learning.trackers.trace import trace
from abacist.proof.comparison.compare import compare
from abacist.records.provenance import build_manifest
from abacist.records.rundir import RunDir
from evaluated import GOOD, WRONG, evaluation, problem

PROBLEMS = [problem(n) for n in range(20)]
LEARNED = compare(evaluation([WRONG] * 20, PROBLEMS), evaluation([GOOD] * 20, PROBLEMS))


class Tracker(TrainerCallback):
    """Remembers what it is told; fails with ``error`` where it is told ``at``."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.at, self.error = at, error
        self.heard: list[str] = []
        self.verdict: Verdict | None = None
        self.failed: bool | None = None

    def hear(self, what: str) -> None:
        self.heard.append(what)
        if what == self.at and self.error is not None:
            raise self.error

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.hear("on_log")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.hear("on_train_end")

    def log_completions(self, args: Any, state: Any, completions: Any) -> None:
        self.hear(f"{len(completions)} completions")

    def log_verdict(self, args: Any, state: Any, verdict: Verdict) -> None:
        self.verdict = verdict
        self.hear("log_verdict")

    def finish(self, failed: bool) -> None:
        self.failed = failed
        self.hear("finish")


def shielded(tracker: TrainerCallback, warn: Any = pytest.fail) -> Any:
    return ShieldedTracker(tracker, "wandb", warn)


@pytest.mark.parametrize("error", [RuntimeError("no network\ndetails"), SystemExit(1), OSError()])
def test_a_tracker_that_fails_warns_once_is_closed_and_left_alone(error: BaseException) -> None:
    said: list[str] = []
    tracker = Tracker("on_log", error)
    shield = shielded(tracker, said.append)
    for _ in range(3):
        shield.on_log(None, None, None, logs={})
    shield.on_train_end(None, None, None)
    shield.finish(failed=False)
    assert tracker.heard == ["on_log", "finish"] and tracker.failed
    assert len(said) == 1 and "\n" not in said[0] and "wandb" in said[0]


@pytest.mark.parametrize("at", ["on_train_end", "log_verdict", "finish"])
def test_nor_does_one_that_fails_only_at_the_end(at: str) -> None:
    said: list[str] = []
    good, bad = Tracker(), Tracker(at, ConnectionError("gone"))
    with attached([bad, good], said) as trackers:
        for one in trackers.shielded:
            one.call("on_train_end", None, None, None)
        trackers.verdict(LEARNED)
    assert good.heard == ["log_verdict", "on_train_end", "finish"]
    assert len(said) == 1 and bad.heard[-1] == "finish"


def test_a_keyboard_interrupt_still_stops_the_run() -> None:
    with pytest.raises(KeyboardInterrupt):
        shielded(Tracker("on_log", KeyboardInterrupt())).on_log(None, None, None)


def test_every_event_but_the_end_reaches_the_tracker_at_once() -> None:
    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    assert len(events) > 10
    called: list[str] = []
    tracker: Any = SimpleNamespace(finish=lambda failed: called.append("finish"))
    for event in events:
        setattr(tracker, event, lambda *a, _event=event, **k: called.append(_event))
    shield = shielded(tracker)
    for event in events:
        getattr(shield, event)(None, None, None)
    assert called == [event for event in events if event != "on_train_end"]
    called.clear()
    shield.finish(failed=False)
    assert called == ["on_train_end", "finish"]


def attached(trackers: list[Tracker], said: list[str], trainer: Any = None, **how: Any) -> Trackers:
    found = Trackers([], RunIdentity(RunDir(Path("nowhere"))), said.append, **how)
    found.shielded = [ShieldedTracker(one, "wandb", said.append) for one in trackers]
    found.attach(trainer or trainer_of([]))
    return found


def trainer_of(rows: list[tuple[Any, Any, float]], **more: Any) -> Any:
    """A stand-in for TRL's trainer after a generation batch; a row: prompt, completion, reward."""
    return SimpleNamespace(
        args=SimpleNamespace(seed=3, output_dir=more.pop("output_dir", "nowhere")),
        state=SimpleNamespace(global_step=5, max_steps=9, is_world_process_zero=True),
        callback_handler=SimpleNamespace(callbacks=[]),
        log_completions=False,
        num_completions_to_print=more.pop("num_completions_to_print", None),
        log_unique_prompts=more.pop("log_unique_prompts", False),
        _logs={
            "prompt": deque(row[0] for row in rows),
            "completion": deque(row[1] for row in rows),
            "rewards": {"correctness": deque(row[2] for row in rows)},
            "advantages": deque(0.5 for _ in rows),
            "extra": {name: deque(values) for name, values in more.items()},
        },
    )


def test_the_verdict_comes_before_the_end_and_a_run_that_fails_says_so() -> None:
    tracker = Tracker()
    with attached([tracker], []) as trackers:
        (shield,) = trackers.shielded
        shield.call("on_train_end", None, None, None)
        trackers.verdict(LEARNED)
    assert tracker.heard == ["log_verdict", "on_train_end", "finish"] and tracker.failed is False
    with pytest.raises(ZeroDivisionError), attached([other := Tracker()], []):
        raise ZeroDivisionError
    assert other.heard == ["finish"] and other.failed


def test_a_run_without_held_out_problems_ends_without_a_verdict() -> None:
    with attached([tracker := Tracker()], []) as trackers:
        trackers.verdict(None)
    assert tracker.heard == ["finish"]


def test_the_verdict_holds_the_figures_of_the_comparison_and_its_sentence() -> None:
    verdict = Verdict.of(LEARNED)
    assert verdict.judgement == "learned" and verdict.sentence.startswith("Learned: 0.0 % → 100.0")
    figures = verdict.figures
    assert (figures["verdict/before"], figures["verdict/after"], figures["verdict/gain"]) == (
        0,
        1,
        1,
    )
    assert (figures["verdict/gained"], figures["verdict/lost"]) == (20, 0)
    assert 0 < figures["verdict/gain_low"] <= 1 and figures["verdict/p_value"] < 1e-5
    assert {type(value) for value in figures.values()} <= {int, float}


def test_trackers_that_cannot_be_had_are_left_out_with_one_warning_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "trackio" else object()
    )
    assert available_trackers(["wandb", "trackio"], said.append) == ["wandb"]
    assert len(said) == 1 and "pip install 'abacist[trackio]'" in said[0]


def test_a_tracker_that_cannot_be_made_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str, place: RunIdentity) -> Any:
        raise RuntimeError("half installed")

    said: list[str] = []
    monkeypatch.setattr(shielding, "_made", broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert not Trackers(["wandb"], RunIdentity(RunDir(Path("r"))), said.append).shielded
    assert said == ["wandb cannot be started and is left out: half installed"]


# Completions


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


def test_completions_are_told_and_printed_as_trls_flags_say(tmp_path: Path) -> None:
    said: list[str] = []
    rows = [(CHAT, [{"role": "assistant", "content": f"reply {n}"}], float(n)) for n in range(4)]
    trainer = trainer_of(rows, output_dir=str(tmp_path), num_completions_to_print=2)
    trackers = attached([tracker := Tracker()], said, trainer, log_completions=True)
    assert trainer.log_completions and trainer.num_completions_to_print == -1  # TRL prints nothing
    for logs in ({"loss": 0.1}, {"eval_accuracy": 0.5}, {"train_loss": 0.1}, {}):
        trackers.on_log(trainer.args, trainer.state, None, logs=logs)
    assert tracker.heard == ["4 completions"] and len(said) == 2
    assert all("1 + 1?" in one and "Be brief" not in one for one in said)


@pytest.mark.parametrize(
    "break_logs",
    [
        lambda logs: logs["extra"].update(source=deque(["x"])),  # log_extra with too few values
        lambda logs: logs["extra"].update(source=deque("xyz")),  # with too many
        lambda logs: logs["advantages"].clear(),
        lambda logs: logs.pop("rewards"),
        lambda logs: logs["prompt"].__setitem__(0, [{"role": "user"}, 3]),
    ],
    ids=["few", "many", "no advantages", "another TRL", "odd prompt"],
)
def test_completions_that_cannot_be_told_cost_one_warning(break_logs: Any, tmp_path: Path) -> None:
    said: list[str] = []
    trainer = trainer_of([("q", "a", 1.0), ("q", "b", 2.0)], output_dir=str(tmp_path))
    trackers = attached([tracker := Tracker()], said, trainer, log_completions=True)
    break_logs(trainer._logs)
    for _ in range(3):
        trackers.on_log(trainer.args, trainer.state, None, logs={"loss": 0.1})
    assert len(said) == 1 and "--log_completions" in said[0] and "\n" not in said[0]
    assert tracker.heard == []  # and the tracker itself goes on
    assert not trainer.log_completions  # TRL would make a table of the same columns


def test_without_the_flag_no_completion_leaves_the_run(tmp_path: Path) -> None:
    trainer = trainer_of([("q", "a", 1.0)], output_dir=str(tmp_path))
    trackers = attached([Tracker()], [], trainer)
    assert trackers not in trainer.callback_handler.callbacks
    assert not trainer.log_completions and not list(tmp_path.iterdir())


def test_a_row_has_trls_columns_and_holds_whatever_was_written() -> None:
    hostile = "a\x00b\ud800<script>"
    trainer = trainer_of([(CHAT, hostile, float("nan")), ("plain", "b", 2.0)], source=["x", None])
    first, second = (one.row() for one in completions_of(trainer))
    assert list(first) == ["step", "prompt", "completion", "correctness", "source", "advantage"]
    assert first["prompt"] == "SYSTEM\nBe brief.\n\nUSER\n1 + 1?"
    assert first["correctness"] is None and first["completion"] == "a\x00b\ufffd<script>"
    assert second["prompt"] == "USER\nplain" and second["source"] is None
    json.dumps([first, second], ensure_ascii=False, allow_nan=False).encode()
    assert "correctness n/a" in in_words(completions_of(trainer)[0])


def test_unique_prompts_give_one_row_each() -> None:
    rows = [("a", "1", 0.0), ("a", "2", 0.0), ("b", "3", 0.0)]
    assert [one.text for one in completions_of(trainer_of(rows, log_unique_prompts=True))] == [
        "1",
        "3",
    ]


def test_a_sample_is_the_same_for_the_same_seed_in_order_and_at_most_so_many() -> None:
    every = completions_of(trainer_of([("q", str(n), 0.0) for n in range(50)]))
    some = some_of(every, 7, seed=1)
    assert some == some_of(every, 7, seed=1) != some_of(every, 7, seed=2)
    assert [int(one.text) for one in some] == sorted(int(one.text) for one in some)
    assert len(some) == 7 and some_of(every, None, 1) == some_of(every, 50, 1) == every
    assert some_of(every, 0, 1) == some_of([], 5, 1) == []


# Names, settings, place


def test_only_a_prefix_tells_an_evaluation_from_training() -> None:
    named = tracker_names({"eval_accuracy": 1, "rewards/eval_like/mean": 2, "train_loss": 3})
    assert named == {"eval/accuracy": 1, "train/rewards/eval_like/mean": 2, "train/train_loss": 3}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "mine")
    run.write_manifest(build_manifest(seed=4, argv=["train"]) | {"dtype": "bfloat16"})
    run.config_path.write_text("dtype: auto\nlora_r: 8\n", encoding="utf-8")
    return run


def test_no_token_is_among_the_settings_told(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "system_prompt: key 0123456789abcdef\nmy_token: xyzzyxyzzy\nmax_tokens: 3\n"
    run.config_path.write_text(text + "nested: {inside: [{api_key: plugh}]}\n", encoding="utf-8")
    told = run_settings(run)
    said = json.dumps(told)
    assert not any(secret in said for secret in ("0123456789abcdef", "xyzzy", "plugh"))
    assert told["max_tokens"] == 3 and told["system_prompt"] == "key <WANDB_API_KEY>"


def test_the_dtype_told_is_the_one_that_was_chosen(run: RunDir) -> None:
    told = run_settings(run)
    assert (told["dtype"], told["lora_r"], told["manifest"]["seed"]) == ("bfloat16", 8, 4)


def test_what_a_person_set_wins_over_the_environment_and_that_over_ours(run: RunDir) -> None:
    variables = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "named"}
    assert RunIdentity(run, environment={}).project_in("WANDB_PROJECT") == "abacist"
    assert RunIdentity(run, environment={}).name_in("WANDB_NAME") == "mine"
    ours = RunIdentity(run, environment=variables)
    assert (ours.project_in("WANDB_PROJECT"), ours.name_in("WANDB_NAME")) == ("theirs", "named")
    assert ours.project_in("TRACKIO_PROJECT") == "abacist"
    given = RunIdentity(run, project="flag", name="flagged", environment=variables)
    assert (given.project_in("WANDB_PROJECT"), given.name_in("WANDB_NAME")) == ("flag", "flagged")


def test_a_resumed_run_knows_its_tracker_runs_and_one_that_begins_does_not(run: RunDir) -> None:
    RunIdentity(run).remember("wandb", id="abc", project="p")
    RunIdentity(run).remember("trackio", name="n")
    assert RunIdentity(run, is_resumed=True).known("wandb") == {"id": "abc", "project": "p"}
    assert RunIdentity(run, is_resumed=True).known("trackio") == {"name": "n"}
    assert (
        RunIdentity(run).known("wandb")
        == {}
        == RunIdentity(run, is_resumed=True).known("tensorboard")
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"wandb": 3}', "[" * 100_000, "\x00"])
def test_a_damaged_trackers_file_costs_the_run_in_the_tracker_only(run: RunDir, text: str) -> None:
    run.trackers_path.write_text(text, encoding="utf-8")
    assert RunIdentity(run, is_resumed=True).known("wandb") == {}
    RunIdentity(run).remember("wandb", id="new")
    assert RunIdentity(run, is_resumed=True).known("wandb") == {"id": "new"}


def wandb_of(run: RunDir, environment: dict[str, str], open_run: Any = None) -> Any:
    from abacist.learning.trackers.wandb_run import WandbRun

    tracker: Any = object.__new__(WandbRun)
    tracker.identity = RunIdentity(run, is_resumed=True, environment=environment)
    tracker.began_run = open_run is None
    tracker._table, tracker._waiting, tracker._logs_until_piece = None, [], 1
    return tracker


def test_wandb_is_asked_for_the_run_it_knows_unless_the_environment_names_one(run: RunDir) -> None:
    pytest.importorskip("wandb")
    assert wandb_of(run, {})._wanted() == {"project": "abacist", "name": "mine"}
    RunIdentity(run).remember("wandb", id="abc", project="p", entity="", name="mine")
    wanted = wandb_of(run, {"WANDB_PROJECT": "other"})._wanted()
    assert wanted == {"project": "p", "name": "mine", "id": "abc", "resume": "allow"}
    assert "id" not in wandb_of(run, {"WANDB_RUN_ID": "theirs"})._wanted()


@pytest.mark.parametrize(("joined", "failed"), [(None, False), (None, True), ("a sweep's", False)])
def test_a_wandb_run_ends_with_the_training_that_began_it(
    run: RunDir, joined: str | None, failed: bool
) -> None:
    pytest.importorskip("wandb")
    codes: list[int] = []
    tracker = wandb_of(run, {}, joined)
    tracker._wandb = SimpleNamespace(run="open", finish=lambda exit_code: codes.append(exit_code))
    tracker.finish(failed)
    assert codes == ([] if joined else [int(failed)])


@pytest.mark.parametrize("fails_before", [False, True])
def test_a_wandb_run_ends_also_where_its_last_rows_cannot_be_told(
    run: RunDir, fails_before: bool
) -> None:
    pytest.importorskip("wandb")
    codes: list[int] = []
    said: list[str] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("gone")

    tracker = wandb_of(run, {})
    tracker._waiting = [{"step": 1, "completion": "a"}]
    tracker._wandb = SimpleNamespace(
        run="open", Table=broken, log=broken, finish=lambda exit_code: codes.append(exit_code)
    )
    shield = shielded(tracker, said.append)
    if fails_before:
        shield.call("log_completions", None, None, [])
    shield.finish(failed=False)
    assert len(codes) == 1  # else the next training of a notebook would join this run
    assert len(said) == 1


def test_traces_of_a_training_and_of_its_files_name_a_reward_alike() -> None:
    trackio = SimpleNamespace(Trace=lambda messages, metadata: (messages, metadata))
    messages, about = trace(
        trackio,
        CHAT,
        "2",
        {"correctness": 2.0, "mine": None},
        {"gold": None, "rewards/correctness": 9},
    )
    assert messages == [*CHAT, {"role": "assistant", "content": "2"}]
    assert about == {"rewards/correctness": 2.0}


def test_a_table_of_a_long_run_stays_within_its_rows_and_its_pieces(run: RunDir) -> None:
    pytest.importorskip("wandb")
    logged: list[Any] = []
    tracker = wandb_of(run, {})

    class Table:
        def __init__(self, columns: list[str], **how: Any) -> None:
            self.columns, self.rows = columns, 0

        def add_data(self, *row: Any) -> None:
            self.rows += 1

    tracker._wandb = SimpleNamespace(
        Table=Table, log=logged.append, run="open", finish=lambda exit_code: None
    )
    args, steps = SimpleNamespace(seed=0), 2000
    state = SimpleNamespace(max_steps=steps, logging_steps=1, global_step=0)
    assert steps % 23 != 1  # rows are waiting at the end
    every = completions_of(trainer_of([("q", str(n), 0.0) for n in range(100)]))
    for state.global_step in range(1, steps + 1):
        step = [replace(one, step=state.global_step) for one in every]
        tracker.log_completions(args, state, step)
    assert logged[0]["train/global_step"] == 1 and tracker._waiting
    tracker.finish(failed=True)  # a run that is interrupted keeps what was still to be told
    assert len(logged) <= 91 and logged[-1]["train/global_step"] == steps
    assert tracker._table.rows == 20_000
