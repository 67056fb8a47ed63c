"""What a notebook's user gets: progress, results that show themselves, short errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import abacist
from abacist import api
from abacist.errors import AbacistError, RewardError, UsageError
from abacist.learning.resume.resuming import Run
from abacist.learning.tracking import Silent
from abacist.proof.ask import Answers
from abacist.proof.comparison.compare import compare
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import Rollout, StopReason
from abacist.view.results import result_frame, result_plot, result_text
from evaluated import GOOD, WRONG, evaluation, problem

SOURCE = Path(abacist.__file__).resolve().parents[1]
PROBLEMS = [problem(number) for number in range(6)]
HOSTILE = "<b>\x1b[2J\u202e\ud800"


class Display:
    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def HTML(self, data: str) -> str:
        return data

    def display(self, page: str, *, display_id: bool) -> Any:
        self.outputs.append([page])
        return SimpleNamespace(update=self.outputs[-1].append)


def pretend(monkeypatch: pytest.MonkeyPatch, shell: object) -> Display:
    display = Display()
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # type: ignore[arg-type]
    return display


def results(tmp_path: Path) -> tuple[Run, Evaluation, Any, Answers]:
    before = evaluation([HOSTILE] * 6, PROBLEMS)
    after = evaluation([GOOD] * 5 + [WRONG], PROBLEMS)
    found = compare(before, after)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "reward": 1.0, "rewards/correctness/mean": 0.2 * step,
                        "rewards/mine/mean": 3.0, "completions/mean_length": 40.0}) + "\n"
            for step in (1, 2, 3)
        ) + json.dumps({"step": 2, "eval_accuracy": 0.5}) + "\n", encoding="utf-8",
    )  # fmt: skip
    rollout = Rollout("m", 0, "ask", 0, 0, [{"role": "user", "content": "2 + 2?"}], HOSTILE, [1],
                      1, 1, StopReason.STOPPED, read_answer="4")  # fmt: skip
    run = Run(tmp_path, before, after, None, None, found)
    return run, dataclasses.replace(after, sampled=before), found, Answers("2 + 2?", (rollout,) * 3)


# Progress


def told(progress: bool | None, monkeypatch: pytest.MonkeyPatch, shell: object) -> int:
    display = pretend(monkeypatch, shell)
    with api._shown(progress) as watcher:
        if watcher is not None:
            watcher.step({"step": 1, "reward": 1.0})
    return len(display.outputs)


def test_a_notebook_follows_the_work_unless_it_is_told_not_to(monkeypatch) -> None:
    in_kernel = SimpleNamespace(kernel=object())
    assert told(None, monkeypatch, in_kernel) == 1
    assert told(False, monkeypatch, in_kernel) == 0
    assert told(None, monkeypatch, SimpleNamespace()) == 0


def test_a_script_is_silent_unless_it_asks_and_a_terminal_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    for progress, is_terminal, speaks in (
        (None, False, False), (True, False, True), (None, True, True), (False, True, False),
    ):  # fmt: skip
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_it=is_terminal: is_it)
        with api._shown(progress) as watcher:
            assert (watcher is not None) == speaks
    own = Silent()
    with api._shown(None, own) as watcher:
        assert watcher is own


def test_a_call_is_one_training_by_its_configuration(monkeypatch) -> None:
    seen = []

    run = SimpleNamespace(stopped="so that no page is written")

    def training(config: Any, watcher: Any) -> SimpleNamespace:
        seen.append(config)
        return run

    monkeypatch.setattr("abacist.learning.train.train", training)
    config = api.config_of("tiny", {"max_steps": 3})
    assert abacist.train(config) == abacist.train("tiny", max_steps=3, progress=False) == run
    assert seen[0].to_yaml() == seen[1].to_yaml()
    abacist.train("tiny", save_steps=5)
    assert seen[2].training.save_steps == 5


# Results


def test_every_result_is_one_line_a_text_a_plot_and_a_table(tmp_path: Path) -> None:
    for result in results(tmp_path):
        assert len(repr(result)) < 200 + len(str(tmp_path)) and "\n" not in repr(result)
        text = result_text(result)
        assert len(text) > 40 and "\x1b" not in text and "\u202e" not in text
        assert max(map(len, result_text(result, 70).splitlines())) <= 90
        assert len(result_frame(result)) > 0
        if not isinstance(result, Answers):
            assert result_plot(result)._repr_png_().startswith(b"\x89PNG")


def test_the_tables_of_a_run_hold_its_steps_its_replies_and_its_problems(tmp_path: Path) -> None:
    run, found, compared, answers = results(tmp_path)
    metrics = result_frame(run)
    assert list(metrics["step"]) == [1, 2, 3] and metrics["eval_accuracy"].notna().sum() == 1
    assert len(result_frame(run, "rollouts")) == 0
    problems = result_frame(run, "problems")
    assert problems.equals(result_frame(compared))
    assert list(problems["outcome"]) == ["gained"] * 5 + ["wrong both times"]
    assert (problems["before"].sum(), problems["after"].sum()) == (0.0, 5.0)
    replies = result_frame(found)
    assert len(replies) == 6 and {"question", "gold", "is_correct", "completion"} <= set(replies)
    assert list(result_frame(answers)["read_answer"]) == ["4"] * 3
    with pytest.raises(UsageError, match="no table 'problem'"):
        result_frame(run, "problem")
    with pytest.raises(UsageError, match="is one table"):
        result_frame(found, "problems")
    with pytest.raises(UsageError, match="has no verdict"):
        result_frame(Run(tmp_path, None, None, None, None, None), "problems")


@pytest.mark.parametrize("width", [None, "80", 5, -1, 72.5, True])
def test_a_width_that_holds_no_line_is_refused(tmp_path: Path, width: Any) -> None:
    for result in results(tmp_path):
        with pytest.raises(UsageError, match="width is"):
            result_text(result, width)


def test_what_may_differ_in_a_comparison_is_one_name_or_several_and_no_other(
    tmp_path: Path,
) -> None:
    run, *_ = results(tmp_path)
    assert run.before is not None and run.after is not None
    for allowed in ("prompt", ["prompt"], ("prompt", "shots"), None):
        assert abacist.compare(run.before, run.after, allow_different=allowed).accuracy
    with pytest.raises(UsageError, match="no 'promt'"):
        abacist.compare(run.before, run.after, allow_different=["promt"])


def test_what_has_no_plot_says_so(tmp_path: Path) -> None:
    *_, answers = results(tmp_path)
    with pytest.raises(UsageError, match="no plot of <Answers"):
        result_plot(answers)


def test_a_run_that_has_logged_nothing_can_be_drawn_or_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(AbacistError, match="holds no run"):
        result_plot(Run(tmp_path, None, None, None, None, None))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": NaN, "loss": 1}\n', encoding="utf-8"
    )
    assert result_plot(Run(tmp_path, None, None, None, None, None))._repr_png_()


def test_two_evaluations_are_compared_as_objects_and_as_folders(tmp_path: Path) -> None:
    run, *_ = results(tmp_path)
    assert run.before is not None and run.after is not None
    by_object = abacist.compare(run.before, run.after)
    run.before.save(tmp_path / "a")
    run.after.save(tmp_path / "b")
    by_folder = abacist.compare(tmp_path / "a", str(tmp_path / "b"))
    assert by_object.accuracy == by_folder.accuracy
    assert by_folder.names == (str(tmp_path / "a"), str(tmp_path / "b"))
    for alone in (run.before, tmp_path / "a"):
        with pytest.raises(UsageError, match="one evaluation"):
            abacist.compare(alone)
    twice = abacist.compare(run.before, run.before)
    assert twice.names[0] != twice.names[1]
    with pytest.raises(UsageError, match="no sampled replies"):
        abacist.compare(run.before, run.after, sampled=True)


def test_no_pandas_is_loaded_until_a_table_is_asked_for() -> None:
    code = (
        "import sys, abacist\n"
        "import abacist.task.audit.findings as findings\n"
        "abacist.audit\n"
        "assert callable(findings.Audit.to_pandas) and 'pandas' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('abacist.view')]\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)},
                   check=True, timeout=120)  # fmt: skip


# Help


def test_help_of_the_package_is_a_page_that_begins_with_what_one_does() -> None:
    assert abacist.__doc__ is not None
    lines = abacist.__doc__.splitlines()
    assert len(lines) < 45 and max(map(len, lines)) <= 100
    for name in ("train", "evaluate", "compare", "ask", "audit", "load_run"):
        assert f"abacist.{name}(" in abacist.__doc__
        function = getattr(abacist, name)
        assert "abacist." in (inspect.getdoc(function) or "")
        assert "Raises" in pydoc.render_doc(function) or name == "ask"


def test_a_notebook_completes_what_the_package_offers_and_nothing_else() -> None:
    names = {name for name in dir(abacist) if not name.startswith("__")}
    assert names == {name for name in abacist.__all__ if not name.startswith("__")}


def test_help_of_a_method_says_what_it_gives(tmp_path: Path) -> None:
    assert callable(abacist.load_run) and callable(abacist.ask)
    for kind in (Run, Answers):
        for method in ("text", "plot", "to_pandas"):
            assert len(inspect.getdoc(getattr(kind, method)) or "") > 40


# Errors


def rendered(call: Any) -> str:
    with pytest.raises(AbacistError) as caught:
        call()
    (text,) = caught.value._render_traceback_()
    return text


def test_in_a_notebook_a_wrong_keyword_ends_in_one_line_without_our_frames() -> None:
    text = rendered(lambda: abacist.train("tiny", lerning_rate=1e-3))
    last = text.splitlines()[-1]
    assert last == "UsageError: train() has no keyword 'lerning_rate'; did you mean learning_rate?"
    assert "keywords.py" not in text and "test_api.py" in text


def test_in_a_notebook_what_a_reward_raised_is_shown_where_it_stands() -> None:
    def failing(completions: Any, **columns: Any) -> list[float]:
        return [1 / 0 for _ in completions]

    def call() -> None:
        from abacist.task.custom_rewards import checked

        checked(failing, 0)(prompts=["p"], completions=[HOSTILE])

    text = rendered(call)
    assert "return [1 / 0 for _ in completions]" in text
    assert "ZeroDivisionError: division by zero\n\n" in text
    assert "RewardError: The reward 'failing' raised ZeroDivisionError" in text
    assert "\x1b" not in text and "custom_rewards.py" not in text


def test_the_hint_stands_below_the_error() -> None:
    text = RewardError("a\x1b[2J", "b")._render_traceback_()
    assert text == ["RewardError: a\\x1b[2J\n  b"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": "a"}, "temperature is 'a'"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"max_completion_length": "x"}, "max_completion_length is 'x'"),
        ({"seed": None}, "seed is None"),
        ({"num_samples": True}, "num_samples is True"),
        ({"temperature": True}, "temperature is True"),
        ({"attn_implementation": 5}, "attn_implementation is 5"),
        ({"trust_remote_code": "no"}, "trust_remote_code is 'no'"),
        ({"progress": "no"}, "progress is 'no'"),
    ],
)
def test_what_ask_cannot_do_is_said_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(api, "load_policy", None)
    with pytest.raises(UsageError, match=said):
        abacist.ask("tiny", "2 + 2?", **options)


@pytest.mark.parametrize(
    "question",
    [{"question": "2 + 2?"}, 5, None, PROBLEMS[0], PROBLEMS[:2], {"2 + 2?"}, b"2 + 2?", ["a", 5]],
)
def test_what_is_no_question_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, question: object
) -> None:
    monkeypatch.setattr(api, "load_policy", None)
    with pytest.raises(UsageError, match=r"ask\(\) was given a .* as a question"):
        abacist.ask("tiny", question)


def test_a_run_is_read_again_and_what_names_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, *_ = results(tmp_path)
    opened: list[Path] = []

    def stop(path: Path) -> None:
        opened.append(path)
        raise InterruptedError

    monkeypatch.setattr("abacist.records.rundir.RunDir.open", stop)
    for given in (run, tmp_path, str(tmp_path)):
        with pytest.raises(InterruptedError):
            abacist.load_run(given)
    assert opened == [tmp_path] * 3
    for other in (None, 5, b"runs/a", PROBLEMS):
        with pytest.raises(UsageError, match="load_run"):
            abacist.load_run(other)


def test_evaluate_takes_rows_as_problems_or_as_the_dataset_and_not_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def stop(request: Any, **_: Any) -> None:
        asked.append(request.problems)
        raise InterruptedError

    monkeypatch.setattr(api, "evaluate_model", stop)
    rows = [{"question": "2 + 2?", "answer": "4"}]
    for given in ({"problems": rows}, {"dataset": rows}):
        with pytest.raises(InterruptedError):
            abacist.evaluate("tiny", **given)
    assert asked[0] == asked[1] and asked[0] is not None
    for other in (rows, "generated"):
        with pytest.raises(UsageError, match="problems and dataset are one setting"):
            abacist.evaluate("tiny", rows, dataset=other)
    with pytest.raises(UsageError, match="--split test of problems that are given"):
        abacist.evaluate("tiny", rows, split="test")


def test_evaluate_takes_values_of_other_libraries_as_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numpy as np
    import torch

    asked: list[Any] = []

    def stop(request: Any, **_: Any) -> None:
        asked.append(request)
        raise InterruptedError

    monkeypatch.setattr(api, "evaluate_model", stop)
    forms: list[tuple[Any, dict[str, Any]]] = [
        ("openai/gsm8k", {"num_samples": 4, "temperature": 0.7, "dtype": "bfloat16",
                          "device": "cpu", "num_shots": 2, "native_prompt": True, "seed": 3}),
        (Path("openai/gsm8k"), {
            "num_samples": np.int64(4), "temperature": np.float32(0.7), "dtype": torch.bfloat16,
            "device": torch.device("cpu"), "num_shots": np.int64(2), "native_prompt": np.bool_(1),
            "seed": torch.tensor(3)}),
    ]  # fmt: skip
    for data, options in forms:
        with pytest.raises(InterruptedError):
            abacist.evaluate("tiny", data, **options)
    with pytest.raises(InterruptedError):
        abacist.evaluate("tiny", dataset="openai/gsm8k", **forms[0][1])
    assert asked[0] == asked[1] == asked[2] and asked[0].dataset_name == "openai/gsm8k"
    for name, value in {"output_dir": 5, "split": ["all"], "system_prompt": 5, "num_shots": 2.5,
                        "temperature": True, "revision": b"main"}.items():  # fmt: skip
        with pytest.raises(UsageError, match=f"--{name}"):
            abacist.evaluate("tiny", num_samples=2, **{name: value})
