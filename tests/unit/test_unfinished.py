"""An unfinished evaluation is taken up by its own command, and by no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abacist.errors import ModelError, RunError
from abacist.proof.evaluate import evaluate
from abacist.proof.unfinished import EvaluationFolder, Parts
from abacist.records.rollout import StopReason, read_rollouts
from evaluated import GOOD, POLICY, WRONG, Completion, evaluation, problem

ASKED = {"model": "tiny", "seed": 0}


def test_parts_come_back_by_problem_in_the_order_of_members(tmp_path: Path) -> None:
    found = evaluation([[GOOD, WRONG], [WRONG, GOOD]])
    with EvaluationFolder.open(tmp_path / "new", ASKED) as folder:
        parts = folder.parts("sampled")
        assert parts.read() == {} and not folder.resumed
        parts.add(found.rollouts[2:])
        parts.add(found.rollouts[:2])
        assert folder.parts("greedy").read() == {}
        kept = parts.read()
    assert kept == {"p001": list(found.rollouts[2:]), "p000": list(found.rollouts[:2])}


def test_replies_that_are_kept_are_not_asked_for_again(tmp_path: Path) -> None:
    problems = [problem(number) for number in range(5)]
    asked: list[int] = []

    def generate(policy: Any, prompts: Any, **how: Any) -> list[list[Completion]]:
        asked.append(len(prompts))
        return [[Completion([1, 2], GOOD, StopReason.STOPPED)] for _ in prompts]

    policy = type("Policy", (), {"chat": POLICY.chat, "context_tokens": 100})()

    def run(parts: Any) -> Any:
        return evaluate(policy, problems, max_completion_tokens=9, batch_size=1,
                        generate=generate, parts=parts)  # fmt: skip

    with EvaluationFolder.open(tmp_path, ASKED) as folder:
        parts = folder.parts("greedy")
        first = evaluation([GOOD] * 5).rollouts[:2]
        parts.add(first)
        found = run(parts)
        assert asked == [3], "two of five were there"
        assert [r.problem_id for r in found.rollouts] == [p.problem_id for p in problems]
        assert [r.group for r in found.rollouts] == [0, 1, 2, 3, 4]
        asked.clear()
        assert run(parts).rollouts == found.rollouts and asked == []


def test_a_prompt_too_long_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    policy = type("Policy", (), {"chat": POLICY.chat, "context_tokens": 9})()
    with EvaluationFolder.open(tmp_path, ASKED) as folder, pytest.raises(ModelError) as caught:
        evaluate(policy, [problem(0)], max_completion_tokens=9, parts=folder.parts("greedy"))
    assert "exceeds the model's context of 9" in str(caught.value)


def test_the_same_request_is_taken_up_and_another_is_refused_by_name(tmp_path: Path) -> None:
    EvaluationFolder.open(tmp_path / "e", ASKED).__exit__(None, None, None)
    with EvaluationFolder.open(tmp_path / "e", ASKED) as again:
        assert again.resumed
        with pytest.raises(RunError, match="is writing"):
            EvaluationFolder.open(tmp_path / "e", ASKED)
    with pytest.raises(RunError, match="seed was 0, now 1"):
        EvaluationFolder.open(tmp_path / "e", ASKED | {"seed": 1})
    with EvaluationFolder.open(tmp_path / "e", ASKED | {"seed": 1}, overwrite=True) as other:
        assert not other.resumed


def test_numbered_folders_never_meet_unless_one_is_unfinished(tmp_path: Path) -> None:
    def opened(asked: dict[str, Any], *, finish: bool) -> str:
        with EvaluationFolder.open_numbered(tmp_path, "x", asked) as folder:
            if finish:
                evaluation([GOOD]).save(folder.path)
                folder.finish()
            return folder.path.name

    assert opened(ASKED, finish=False) == "x-001"
    assert opened(ASKED | {"seed": 1}, finish=True) == "x-002"
    assert opened(ASKED, finish=True) == "x-001"
    assert opened(ASKED, finish=True) == "x-003"


def test_a_damaged_part_is_named_with_a_way_on(tmp_path: Path) -> None:
    with EvaluationFolder.open(tmp_path, ASKED) as folder:
        folder.parts("greedy").add(evaluation([GOOD]).rollouts)
        part = tmp_path / "unfinished" / "greedy-00001.parquet"
        part.write_bytes(part.read_bytes()[:50])
        with pytest.raises(RunError, match="greedy-00001") as caught:
            folder.parts("greedy").read()
    assert "Remove that file" in caught.value.hint


def test_a_file_torn_by_a_kill_does_not_stop_the_resume_and_goes_at_the_end(tmp_path: Path) -> None:
    EvaluationFolder.open(tmp_path, ASKED).__exit__(None, None, None)
    (tmp_path / ".evaluation.json.123.tmp").write_bytes(b"{")
    with EvaluationFolder.open(tmp_path, ASKED) as again:
        assert again.resumed
        again.finish()
    assert list(tmp_path.iterdir()) == []


def test_replies_whose_request_is_lost_are_neither_used_nor_cleared(tmp_path: Path) -> None:
    with EvaluationFolder.open(tmp_path, ASKED) as folder:
        folder.parts("greedy").add(evaluation([GOOD]).rollouts)
    (tmp_path / "unfinished" / "asked.json").write_bytes(b"{")
    with pytest.raises(RunError, match=r"asked\.json: missing or damaged"):
        EvaluationFolder.open(tmp_path, ASKED)
    assert (tmp_path / "unfinished" / "greedy-00001.parquet").exists()


def asking_one_by_one(stops_after: int | None = None) -> Any:
    """A ``generate`` that tells of each reply as it ends, the last problem first, and of each
    twice; it is interrupted after so many."""

    def generate(policy: Any, prompts: Any, **how: Any) -> list[list[Completion]]:
        groups = [[Completion([1, 2], GOOD, StopReason.STOPPED)] for _ in prompts]
        for told, number in enumerate(reversed(range(len(prompts)))):
            if told == stops_after:
                raise KeyboardInterrupt
            how["ended"](number, groups[number])
            how["ended"](number, groups[number])
        return groups

    return generate


def test_what_is_interrupted_keeps_every_reply_that_had_ended(tmp_path: Path) -> None:
    problems = [problem(number) for number in range(5)]
    policy = type("Policy", (), {"chat": POLICY.chat, "context_tokens": 100})()

    def run(parts: Any, generate: Any) -> Any:
        return evaluate(policy, problems, max_completion_tokens=9, generate=generate, parts=parts)

    with EvaluationFolder.open(tmp_path / "a", ASKED) as folder:
        with pytest.raises(KeyboardInterrupt):
            run(folder.parts("greedy"), asking_one_by_one(stops_after=2))
        assert folder.count_replies() == 2
        assert set(folder.parts("greedy").read()) == {"p003", "p004"}
    with EvaluationFolder.open(tmp_path / "a", ASKED) as folder:
        found = run(folder.parts("greedy"), asking_one_by_one())
        assert folder.count_replies() == 5
    with EvaluationFolder.open(tmp_path / "b", ASKED) as folder:
        assert run(folder.parts("greedy"), asking_one_by_one()) == found


def test_replies_are_written_every_few_seconds_and_not_each_in_a_file(tmp_path: Path) -> None:
    replies = evaluation([GOOD] * 5).rollouts
    seconds = iter([0.0, 1.0, 4.0, 4.0, 5.0, 8.0, 8.0, 8.0])
    parts = Parts(tmp_path, "greedy", clock=lambda: next(seconds))
    for reply in replies[:4]:
        parts.keep([reply])
    assert [len(read_rollouts(path)) for path in sorted(tmp_path.iterdir())] == [2, 2]
    parts.flush()
    assert len(list(tmp_path.iterdir())) == 2, "nothing gathered, nothing written"


def test_a_part_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    found = evaluation([[GOOD, WRONG]])
    with EvaluationFolder.open(tmp_path, ASKED) as folder:
        parts = folder.parts("sampled")
        parts.add(found.rollouts)
        parts.add(found.rollouts)
        assert parts.read() == {"p000": list(found.rollouts)}
