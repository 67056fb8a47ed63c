"""A sound bundle holds everywhere, and what could not be checked is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from abacist.cli.main import main
from abacist.delivery import verify_replay, verify_weights
from abacist.delivery.bundle import Bundle, bundle
from abacist.delivery.findings import alike
from abacist.delivery.verify import Request, Verification, verify
from abacist.errors import ModelError, UsageError
from abacist.policy.quantization import Quantization
from abacist.records.openings import EVAL, Opening, note_opening
from bundles import Members, edit_json, edit_line, edit_settings, faults_of, tampered
from imported import Imported
from made_runs import rollout

pytestmark = pytest.mark.slow

METRICS = "run/metrics.jsonl"
OPENINGS = "run/openings.jsonl"


@pytest.fixture(scope="module")
def sound(short_bundle: Bundle) -> Verification:
    return verify(Request(short_bundle.path, replies=2**31, fingerprint=short_bundle.fingerprint))


def test_a_sound_bundle_holds_and_every_token_is_the_same(sound: Verification) -> None:
    assert sound.holds and sound.is_complete, faults_of(sound)
    counts = {check.name: check.numbers for check in sound.checks}["replay"]["all"]
    # 10 greedy and 12 sampled replies before and after, 16 rollouts of each of two steps.
    assert counts["replies"] == 2 * (10 + 12) + 2 * 16
    assert counts["same_replies"] + counts["near_replies"] == counts["replies"]
    assert counts["same"] + counts["near"] == counts["tokens"] > 500


def test_every_check_looked_at_something(sound: Verification) -> None:
    numbers = {check.name: check.numbers for check in sound.checks}
    assert numbers["training"] == {"replies": 32, "steps": 2, "logged_steps": 2}
    assert numbers["verdict"]["replies"] == 44
    assert numbers["data"]["problems"] == 74
    assert numbers["splits"]["opened_once"] is True
    assert numbers["splits"]["openings"] == 7
    said = {check.name: check.notes for check in sound.checks}["splits"]
    assert "put to the trained model once, after 2 steps" in " ".join(said)
    assert numbers["splits"]["selection_steps"] == [1, 2]


WITH_THREADS = """
import sys, torch
from abacist.cli.main import main
torch.set_num_threads(int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("threads, kernels", [("2", "0"), ("3", "1")])
def test_replay_holds_with_other_threads_and_without_kernels(
    short_bundle: Bundle, threads: str, kernels: str, imported: Imported
) -> None:
    done = imported.run(
        *(
            "-c",
            WITH_THREADS,
            threads,
            "verify",
            str(short_bundle.path),
            "--replies",
            "all",
            "--json",
        ),
        env=imported.env | {"ABACIST_KERNELS": kernels},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["checks"]["replay"]["numbers"]["all"]
    assert counts["tokens"] - counts["same"] - counts["near"] == 0
    assert counts["near"] <= 2


def test_a_run_from_before_openings_were_noted_is_verified_and_said_to_have_no_record(
    short_bundle: Bundle, tmp_path: Path
) -> None:
    def as_before(index: dict[str, Any], members: Members) -> None:
        del members[OPENINGS]
        edit_json("run/manifest.json", lambda it: it.pop("keeps_openings"))(index, members)

    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", as_before, anew=True)
    found = verify(Request(file, replies=0))
    splits = {check.name: check for check in found.checks}["splits"]
    assert found.holds and splits.numbers["opened_once"] is True
    assert "before Abacist kept such a record" in " ".join(splits.not_checked)
    assert "by the evaluations that the run's folder holds" in " ".join(splits.notes)


def test_a_later_look_at_the_verdicts_problems_shows_although_its_evaluation_is_gone(
    short_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "tiny-001"))
    note_opening(run, Opening("heldout", EVAL, 10, "checkpoint-1", 1, 10, "evals/peek-001"))
    found = verify(Request(bundle(run, tmp_path / "x.bundle.zip").path, replies=0))
    splits = {check.name: check for check in found.checks}["splits"]
    assert found.holds and splits.numbers["opened_once"] is False
    assert "2 times: " in splits.notes[0] and "abacist eval of checkpoint-1" in splits.notes[0]


def test_an_evaluation_that_has_no_line_in_the_record_is_named(
    short_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "tiny-001"))
    shutil.copytree(run / "evals" / "after", run / "evals" / "peek-001")
    shutil.copytree(run / "evals" / "after", run / "evals" / "mine" / "sampled")
    found = verify(Request(bundle(run, tmp_path / "x.bundle.zip").path, replies=0))
    said = faults_of(found)
    assert "openings.jsonl, evals/peek-001: claimed every opening, found no line" in said
    assert "openings.jsonl, evals/mine/sampled: claimed every opening" in said
    note_opening(run, Opening("heldout", EVAL, 10, "final", 2, 10, "evals/peek-001"))
    note_opening(run, Opening("heldout", EVAL, 10, "final", 2, 10, "evals/mine"))
    assert verify(Request(bundle(run, tmp_path / "y.bundle.zip").path, replies=0)).holds


def test_only_the_published_fingerprint_tells_of_a_date_that_nothing_contradicts(
    short_bundle: Bundle, tmp_path: Path
) -> None:
    def later(record: Any) -> None:
        entry = next(entry for entry in record if entry["by"] == "evals/after-sampled")
        when = datetime.fromisoformat(entry["date"]) + timedelta(hours=3)
        entry["date"] = when.isoformat()

    edit = edit_json("opened.json", later)
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", edit, anew=True)
    assert verify(Request(file, replies=0)).holds
    found = verify(Request(file, replies=0, fingerprint=short_bundle.fingerprint))
    assert "bundle.json, fingerprint: claimed" in faults_of(found)
    assert verify(Request(short_bundle.path, replies=0, fingerprint=short_bundle.fingerprint)).holds


@pytest.mark.parametrize("given", ["", "abc", "z" * 64, "0" * 63])
def test_a_fingerprint_that_is_none_is_refused(short_bundle: Bundle, given: str) -> None:
    with pytest.raises(UsageError, match="is not one"):
        verify(Request(short_bundle.path, fingerprint=given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"device": "cuda:99"}, "cuda"),
        ({"dtype": "bf16"}, "There is no dtype 'bf16'"),
        ({"weights": Path("nowhere")}, "no such folder of weights"),
    ],
)
def test_a_flag_that_cannot_be_followed_says_nothing_of_the_bundle(
    given: dict[str, Any], says: str, short_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=says):
        verify(Request(short_bundle.path, **given))
    ((name, value),) = given.items()
    assert main(["verify", str(short_bundle.path), f"--{name}", str(value)]) == 2
    assert says in capsys.readouterr().err


def test_a_base_that_cannot_be_loaded_leaves_its_replies_unchecked_and_is_no_fault(
    short_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **how: Any) -> Any:
        raise ModelError("The copy is damaged.")

    with monkeypatch.context() as patch:
        patch.setattr(verify_weights, "_load", fails)
        found = verify(Request(short_bundle.path, replies=4))
    replay = {check.name: check for check in found.checks}["replay"]
    assert replay.is_incomplete and any(
        "base cannot be loaded" in one for one in replay.not_checked
    )
    assert all(fault.file != "weights of base" for fault in replay.faults)


def test_the_command_exits_with_what_it_found(
    short_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(short_bundle.path), "--replies", "0"]) == 0
    assert "Holds" in capsys.readouterr().out
    edit = edit_line(METRICS, 0, lambda row: row.update(reward=3.9))
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", edit, anew=True)
    assert main(["verify", str(file), "--replies", "0", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["checks"]["training"]["faults"][0] == {
        "file": METRICS, "item": "step 1, reward", "claimed": "3.9",
        "found": told["checks"]["training"]["faults"][0]["found"],
    }  # fmt: skip


def test_data_that_is_not_at_hand_makes_it_incomplete(
    short_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Golds could then be whatever the replies say.
    renamed = edit_settings("dataset_name: generated", "dataset_name: openai/gsm8k")
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", renamed, anew=True)
    assert main(["verify", str(file), "--replies", "0"]) == 3
    told = " ".join(capsys.readouterr().out.split())
    assert "INCOMPLETE" in told and "until then they are whatever the bundle says" in told


def test_of_how_many_replies_a_sample_was_replayed_is_said(short_bundle: Bundle) -> None:
    found = verify(Request(short_bundle.path, replies=4, seed=1))
    assert found.holds
    (replay,) = [check for check in found.checks if check.name == "replay"]
    told = "\n".join(replay.not_checked)
    assert "greedy replies after training: 6 of 10 replies" in told
    assert "the 4 that were drawn would have met one with a chance of 19%" in told


def test_a_base_that_is_not_at_hand_is_said_and_the_rest_is_checked(
    short_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no-such-model")
    assert main(["verify", str(short_bundle.path), "--model", missing]) == 3
    told = capsys.readouterr().out
    told = "".join(told.split())  # lines are broken where they end
    assert "INCOMPLETE" in told and "no-such-model" in told and "recomputedfromthem" in told


def test_replies_on_a_base_that_bitsandbytes_held_are_said_not_to_be_replayed(
    short_bundle: Bundle, tmp_path: Path
) -> None:
    edit = edit_settings("load_in_4bit: false", "load_in_4bit: true")
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", edit, anew=True)
    found = verify(Request(file, replies=4))
    replay = {check.name: check for check in found.checks}["replay"]
    assert replay.holds and replay.is_incomplete and not found.is_complete
    assert any("in few bits" in one for one in replay.not_checked)


def test_a_run_that_went_on_from_an_adapter_on_few_bits_is_known_by_the_adapters_record(
    short_bundle: Bundle, tmp_path: Path
) -> None:
    """No flag of its own says so."""
    record = Quantization(4).record()
    edit = edit_json(
        "run/adapter_config.json", lambda adapter: adapter.update(quantization_config=record)
    )
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", edit, anew=True)
    replay = {check.name: check for check in verify(Request(file, replies=4)).checks}["replay"]
    assert replay.is_incomplete and any("in few bits" in one for one in replay.not_checked)


def test_another_base_than_the_one_trained_from_is_seen(
    short_bundle: Bundle, lookalike: Callable[[str], Path]
) -> None:
    found = verify(Request(short_bundle.path, model=str(lookalike("qwen")), replies=4))
    assert not {check.name: check for check in found.checks}["replay"].holds


def test_a_token_at_a_boundary_counts_as_a_tie_and_one_beside_it_does_not() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    sampling = verify_replay.Sampling()

    def beyond(uniform: float, token: int, **how: Any) -> float:
        reply = _reply([token], torch.tensor([uniform], dtype=torch.float64))
        gaps = verify_replay._gaps(reply, [0], logits, sampling)
        return (gaps.beyond_wide if how.get("narrow") else gaps.beyond)[0]

    assert beyond(0.3, 1) <= 0 and beyond(0.25 - 5e-6, 1) <= 0 and beyond(0.5 + 5e-6, 1) <= 0
    assert beyond(0.25 - 5e-5, 1) > 0 and beyond(0.5 + 5e-5, 1) > 0
    assert beyond(0.22, 1, narrow=True) <= 0 < beyond(0.05, 1, narrow=True)
    assert beyond(0.0, 0) <= 0 and beyond(1 - 1e-12, 3) <= 0 < beyond(0.999, 0)


def test_greedy_scores_tie_within_the_bound_and_not_beyond_it() -> None:
    logits = torch.tensor([[1.0, 1.0 + 5e-5, 1.0 + 3e-4]])

    def beyond(token: int) -> float:
        reply = _reply([token], None)
        return verify_replay._gaps(reply, [0], logits, None).beyond[0]

    assert beyond(2) <= 0 < beyond(1)
    logits[0, 2] = 0.0
    assert beyond(0) <= 0 and beyond(1) <= 0 < beyond(2)


def _reply(ids: list[int], uniforms: torch.Tensor | None) -> verify_replay.Reply:
    one = replace(rollout("r", 1, 0, 0, "x"), completion_ids=ids, completion_tokens=len(ids))
    return verify_replay.Reply("f", "i", one, uniforms)


def test_values_agree_by_rounding_and_never_by_type() -> None:
    assert alike(0.1 + 0.2, 0.3) and alike(None, None) and alike(float("nan"), float("nan"))
    assert not alike(True, 1) and not alike(None, 0.0) and not alike("1", 1) and not alike(3, 4)
