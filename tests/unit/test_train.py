"""A training leaves what it is given as it was, and refuses a watcher that it could not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abacist.cli.main import main
from abacist.errors import UsageError
from abacist.learning import train as training
from abacist.learning import trainer
from abacist.learning.config import Config, load_config
from abacist.learning.dryrun.plan import plan
from abacist.learning.trackers.run_identity import RunIdentity
from abacist.learning.trackers.shielded import Trackers
from abacist.learning.tracking import Silent
from abacist.records.rundir import RunDir

SMALL = ["--num_train_problems", "24", "--num_heldout_problems", "3", "--eval_strategy", "no",
         "--num_consistency_problems", "0", "--num_selection_problems", "0",
         "--per_device_train_batch_size", "8", "--max_completion_length", "8", "--max_steps", "1",
         "--save_strategy", "no", "--reward_funcs", "default"]  # fmt: skip


class Stopped(Exception):
    pass


class StopsOnceItIsAssembled(Silent):
    def note(self, text: str) -> None:
        if "this run is kept in" in text:
            raise Stopped


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--run_name", "mine"],
        ["--control", "format", "--reward_weights", "1", "2", "3", "4", "5"],
        ["--gradient_checkpointing", "auto", "--num_selection_problems", "2"],
    ],
    ids=["plain", "named", "a control", "auto"],
)
def test_a_config_that_was_trained_by_trains_again_as_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def trackers_of(config: Config, run: RunDir, watcher: Any) -> Trackers:
        asked.append({name: vars(config.training)[name] for name in ("report_to", "run_name")})
        asked[-1]["log_completions"] = config.training.log_completions
        return Trackers([], RunIdentity(run), watcher.note)

    monkeypatch.setattr(training, "trackers_of", trackers_of)
    monkeypatch.chdir(tmp_path)
    tracked = ["--report_to", "tensorboard", "--log_completions"]
    config = load_config(None, None, [*SMALL, *tracked, *flags])
    before = {**vars(config.training)}, {**vars(config.script)}, {**vars(config.model)}
    settings = dict(config.settings)
    for _ in range(2):
        with pytest.raises(Stopped):
            training.train(config, StopsOnceItIsAssembled())
    assert (vars(config.training), vars(config.script), vars(config.model)) == before
    assert config.settings == settings
    assert asked[0] == asked[1] and asked[0]["report_to"] == ["tensorboard"]
    assert asked[0]["log_completions"]
    assert asked[0]["run_name"] == ("mine" if "mine" in flags else None)


@pytest.mark.parametrize("num_sampled", ["0", "2"])
def test_what_was_measured_before_training_is_not_measured_again_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_sampled: str
) -> None:
    run = tmp_path / "run"
    flags = [*SMALL, "--num_consistency_problems", num_sampled, "--save_strategy", "steps"]
    assert main(["train", *flags, "--save_steps", "1", "--output_dir", str(run)]) == 0
    assert "Measuring before training" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--max_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "Measuring before training" not in said and "Measuring after training" in said
    opened = (run / "openings.jsonl").read_text(encoding="utf-8")
    assert opened.count('"evals/before"') == 1


class OfAnEarlierVersion:
    """A watcher that was written before there were warnings and replies to tell of."""

    def stage(self, name: str) -> None:
        raise AssertionError("the work has begun")

    note = step = progress = within_step = stage


@pytest.mark.parametrize("work", [training.train, plan], ids=["train", "dry run"])
def test_a_watcher_that_lacks_a_method_is_refused_before_the_work_begins(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no warning, no replies") as error:
        work(load_config(None, None, SMALL), OfAnEarlierVersion())
    assert "Silent" in error.value.hint and not list(tmp_path.iterdir())


class Derived(Silent):
    """A watcher of one's own that writes one method."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)
        raise Stopped


def test_one_that_derives_from_silent_has_all_that_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    watcher = Derived()
    with pytest.raises(Stopped):
        training.train(load_config(None, None, SMALL), watcher)
    assert watcher.stages == ["Loading (recipe tiny)"]


@pytest.mark.parametrize(("wants", "keeps"), [(False, False), (True, False), (False, True)])
def test_replies_are_parsed_only_for_who_wants_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wants: bool, keeps: bool
) -> None:
    told: list[int] = []
    parsed: list[int] = []

    class Watches(Silent):
        wants_replies = wants

        def replies(self, step: int, rollouts: Any) -> None:  # type: ignore[override]
            told.append(len(rollouts))

    def counted(*args: Any, **kwargs: Any) -> Any:
        parsed.append(1)
        return rollouts_of(*args, **kwargs)

    rollouts_of = trainer.rollouts_of
    monkeypatch.setattr(trainer, "rollouts_of", counted)
    flags = ["--output_dir", str(tmp_path / "run"), "--keep_rollouts", str(keeps).lower()]
    training.train(load_config(None, None, [*SMALL, *flags]), Watches())
    assert bool(told) == wants and bool(parsed) == (wants or keeps)
