"""The doctor: every finding is a line, nothing is changed, no secret is told."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import evaluated
from abacist.cli.doctor import machine
from abacist.cli.doctor.machine import GIB, Finding, State, examine
from abacist.cli.doctor.run import summarise
from abacist.cli.main import main
from abacist.errors import RunError
from abacist.learning.dryrun import memory
from abacist.learning.resume.checkpoints import seal
from abacist.policy import source
from abacist.records.provenance import build_manifest
from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.records.rundir import RunDir


@pytest.fixture
def tiny(lookalike: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-alike in the place of the built-in model."""
    monkeypatch.setattr(source, "BUILT_IN_FOLDER", lookalike("qwen2.5-instruct"))


def found(check: Callable[[], Iterator[Finding]]) -> Finding:
    return list(check())[-1]


# This machine


def test_a_healthy_machine_is_ready(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nready\n")
    assert "answers a problem with" in out
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_with_its_remedy_and_fails(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "BUILT_IN_FOLDER", tmp_path / "gone")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "mend  built-in model" in out
    assert out.endswith("\nto mend: built-in model\n")


def test_json_says_the_same(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ready"] is True
    states = {finding["name"]: finding["state"] for finding in document["findings"]}
    assert states["built-in model"] == "ok"
    assert {"python", "packages", "device", "dtype", "attention", "memory", "disk"} <= set(states)


def test_a_check_that_breaks_is_a_finding(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("libcudart.so: cannot open, token hf_abcdefghij")
        yield

    monkeypatch.setattr(machine, "_choices", broken)
    (finding,) = [one for one in examine() if one.name == "choices"]
    assert finding.state is State.MEND
    assert "libcudart" in finding.found and "abcdefghij" not in finding.found


def test_packages_outside_their_range_are_to_mend_unless_optional(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared = [
        "trl<1.17,>=1.16",
        "torch>=2.11",
        "psutil>=6",
        'scipy>=1; python_version < "3"',
        'wandb>=99; extra == "wandb"',
        'vllm>=0.22; extra == "vllm"',
        'nonesuch; extra == "dev"',
    ]
    versions = {"trl": "1.18.0", "torch": "2.13.0+cpu", "wandb": "0.31.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    monkeypatch.setattr(metadata, "version", version)
    findings = list(machine._packages())
    assert [(one.state.value, one.found) for one in findings] == [
        ("mend", "trl 1.18.0 is outside the supported trl<1.17,>=1.16"),
        ("mend", "psutil is not installed"),
        ("note", "wandb 0.31.0 is outside the supported wandb>=99"),
        ("note", "optional, and not installed: vllm"),
        ("ok", "torch 2.13.0+cpu"),
    ]


def test_the_limit_of_a_container_counts_and_not_the_machine_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    has = SimpleNamespace(available=50 * GIB, total=64 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: has)
    assert "50.0 GiB free of 64.0 GiB" in found(machine._memory).found
    (tmp_path / "memory.current").write_text(f"{GIB}\n", encoding="utf-8")
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert "50.0 GiB free of 64.0 GiB" in found(machine._memory).found
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n", encoding="utf-8")
    finding = found(machine._memory)
    assert "1.0 GiB free of 2.0 GiB" in finding.found
    assert finding.state is State.MEND


def test_a_full_disk_is_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(GIB, GIB, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert found(machine._disk).state is State.MEND


def test_tokens_and_keys_are_said_to_be_there_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")  # there is no key to speak of without it
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.delenv("WANDB_MODE")
    findings = [found(machine._hub_token), found(machine._wandb)]
    assert [one.state for one in findings] == [State.OK, State.OK]
    assert not any(secret in str(findings) for secret in ("abcdefghij", "0123456789"))


def test_a_wandb_login_is_read_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert found(machine._wandb).state is State.NOTE
    (tmp_path / "netrc").write_text(
        "machine api.wandb.ai login user password secret\n", encoding="utf-8"
    )
    assert found(machine._wandb) == Finding("W&B", State.OK, "logged in")
    (tmp_path / "netrc").write_bytes(b"machine \xff\xfe nonsense")
    assert found(machine._wandb).state is State.NOTE


def test_the_hub_is_called_only_when_asked_for(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def head(url: str, timeout: float) -> None:
        calls.append((url, timeout))
        raise ConnectionError("no way")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    assert "Hub" not in {one.name for one in examine()}
    assert calls == []
    (hub,) = [one for one in examine(online=True) if one.name == "Hub"]
    assert hub.state is State.MEND and "no way" in hub.found
    assert len(calls) == 1 and calls[0][1] <= 10


# A run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that came to its end, without torch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = RunDir(tmp_path / "tiny-001")
    run.path.mkdir()
    run.write_manifest(build_manifest(seed=7, argv=["train"]))
    run.config_path.write_text(
        "model_name_or_path: tiny\ndataset_name: generated\n", encoding="utf-8"
    )
    run.metrics_path.write_text(
        '{"step": 1, "reward": 1.0}\n{"step": 2, "reward": 2.5}\n', encoding="utf-8"
    )
    run.rollouts_dir.mkdir()
    pq.write_table(pa.table({"x": range(16)}), run.rollouts_dir / "step-1.parquet")
    for step in (2, 10):
        (run.path / f"checkpoint-{step}").mkdir()
        (run.path / f"checkpoint-{step}" / "weights").write_bytes(b"1234")
        seal(run.path / f"checkpoint-{step}", step)
    save_file({"w": np.zeros(64, np.float32)}, run.path / "adapter_model.safetensors")
    return run


def test_a_run_tells_what_it_holds(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run.path)]) == 0
    out = capsys.readouterr().out
    for piece in ("seed 7", "tiny on generated", "step 2, reward 2.5", "16 replies in 1 files",
                  "at steps 2, 10", "a trained adapter", "nothing to mend"):  # fmt: skip
        assert piece in out


def test_an_unfinished_run_is_no_illness(run: RunDir) -> None:
    for name in ("adapter_model.safetensors", "metrics.jsonl", "rollouts/step-1.parquet"):
        (run.path / name).unlink()
    assert State.MEND not in {finding.state for finding in summarise(run.path)}


def test_damage_is_named_file_by_file(run: RunDir) -> None:
    run.config_path.write_bytes(b"\xff\xfe: [")
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "rew')
    (run.rollouts_dir / "step-2.parquet").write_bytes(b"PAR1 torn")
    (run.path / "checkpoint-10" / "weights").write_bytes(b"1235")
    to_mend = {one.name: one for one in summarise(run.path) if one.state is State.MEND}
    assert set(to_mend) == {"config", "metrics", "rollouts", "checkpoints"}
    assert "damaged lines: 1" in to_mend["metrics"].found
    assert "step 2" in to_mend["metrics"].found
    assert "step-2.parquet" in to_mend["rollouts"].found
    assert "checkpoint-10" in to_mend["checkpoints"].found
    assert "newest sound" in to_mend["checkpoints"].remedy


def test_weights_that_are_cut_short_and_evaluations_that_cannot_be_read_are_to_mend(
    run: RunDir,
) -> None:
    weights = run.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    evaluated.evaluation([evaluated.GOOD], [evaluated.problem(0)]).save(run.evals_dir / "before")
    evaluated.evaluation([evaluated.GOOD], [evaluated.problem(0)]).save(run.evals_dir / "after")
    (run.evals_dir / "after" / "evaluation.json").write_text("[]", encoding="utf-8")
    mend = {one.name: one.found for one in summarise(run.path) if one.state is State.MEND}
    assert mend.keys() == {"model", "evaluations"}
    assert "cut short" in mend["model"] and "after" in mend["evaluations"]
    sound = [one.found for one in summarise(run.path) if one.name == "evaluations"]
    assert "before" in sound
    run.write_manifest(run.read_manifest() | {"finished": True})
    (run.evals_dir / "before" / "evaluation.json").write_text("{", encoding="utf-8")
    told = [one.found for one in summarise(run.path) if one.name == "evaluations"]
    assert len(told) == 2 and not any("none, though" in one for one in told)
    shutil.rmtree(run.evals_dir)
    (told,) = [one.found for one in summarise(run.path) if one.name == "evaluations"]
    assert told == "none, though the run came to its end"


def steps(run: RunDir, **changes: Any) -> None:
    """A course of 40 steps, one like the other but for the changes, which map a step to a value."""
    row = {"loss": 0.01, "grad_norm": 0.05, "reward": 1.0, "reward_std": 1.0, "entropy": 0.1,
           "rewards/correctness/mean": 0.5, "rewards/correctness/std": 0.9,
           "completions/clipped_ratio": 0.0, "completions/mean_length": 40.0,
           "frac_reward_zero_std": 0.2}  # fmt: skip
    with run.config_path.open("a", encoding="utf-8") as file:
        file.write("num_generations: 8\nper_device_train_batch_size: 64\n")
    for step in range(1, 41):
        changed = {name: value(step) for name, value in changes.items()}
        with run.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row, **changed}) + "\n")


def test_a_run_that_went_well_is_said_to_have(run: RunDir) -> None:
    run.metrics_path.unlink()
    steps(run)
    assert {one.state for one in summarise(run.path)} == {State.OK}


def test_a_fault_that_lasted_is_to_mend_and_one_that_passed_is_a_note(run: RunDir) -> None:
    run.metrics_path.unlink()
    steps(
        run,
        frac_reward_zero_std=lambda step: 1.0 if step <= 15 else 0.2,
        kl=lambda step: 0.01 if step < 20 else 4.0,
    )
    findings = {one.name: one for one in summarise(run.path)}
    passed, lasts = findings["no signal"], findings["KL drift"]
    assert passed.state is State.NOTE and lasts.state is State.MEND
    assert "from step 10 to step 15, then no more" in passed.found
    assert "to the end" in lasts.found and lasts.remedy


def test_nonsense_in_the_metrics_does_not_stop_the_doctor(run: RunDir) -> None:
    nonsense = [{"step": "x", "loss": [], "reward": {}}, {"step": None}, {"step": 1e400}, {}]
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in nonsense)
    assert list(summarise(run.path))


def test_the_last_replies_are_summed_up(run: RunDir) -> None:
    replies = [
        Rollout("tiny-001", 2, "train", 0, member, [], text, [1], 3, 1, reason, is_correct=right)
        for member, (text, reason, right) in enumerate(
            [("12", StopReason.STOPPED, True), ("1", StopReason.LENGTH, False),
             ("", StopReason.LENGTH, False)]
        )
    ]  # fmt: skip
    write_rollouts(run.rollouts_dir / "step-2.parquet", replies)
    (said,) = [one.found for one in summarise(run.path) if one.name == "replies"]
    assert "of the 3 of step 2: 2 cut off, 1 complete, 1 correct" in said
    assert "(3): There is no <reasoning> tag." in said


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError):
        list(summarise(tmp_path))
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert "no such run directory" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path), "--online"]) == 2


def test_a_command_to_type_has_its_path_in_quotes_where_it_needs_them(
    run: RunDir, tmp_path: Path
) -> None:
    (run.path / "adapter_model.safetensors").unlink()
    spaced = tmp_path / "my runs"
    run.path.rename(spaced)
    hints = [finding.remedy for finding in summarise(spaced) if finding.remedy]
    assert any(f"--resume '{spaced}'" in hint for hint in hints)
