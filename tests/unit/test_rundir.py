"""Run directories: nothing of anybody's is lost, one writer at a time, no secret in a manifest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from abacist.errors import RunError
from abacist.records.lock import RunLock, identity, may_run
from abacist.records.provenance import build_manifest, data_fingerprint, scrub_argv
from abacist.records.rundir import RunDir, write_aside, write_json
from abacist.records.secrets import REDACTED, names_a_secret
from abacist.records.settings import read_settings
from abacist.task.problems import Problem


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def finished_run(path: Path | None = None) -> Path:
    with RunDir.reserve(path, name="tiny") as run:
        run.write_manifest(build_manifest(seed=1, argv=["abacist", "train"]))
    return run.path


def contents(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_the_layout_is_what_the_documentation_promises() -> None:
    run = RunDir(Path("runs/x"))
    paths = (run.config_path, run.manifest_path, run.metrics_path, run.timings_path)
    assert [p.name for p in (*paths, run.rollouts_dir, run.evals_dir)] == [
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "timings.jsonl",
        "rollouts",
        "evals",
    ]
    assert run.run_id == "x"


def test_the_default_directory_is_new_for_every_run() -> None:
    assert [str(finished_run()) for _ in range(3)] == [f"runs/tiny-00{n}" for n in (1, 2, 3)]
    os.rename("runs/tiny-002", "runs/tiny-041")
    assert finished_run() == Path("runs/tiny-042")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "/etc", "a\0b", "-rf", "a b", ".x"])
def test_a_run_name_cannot_leave_the_runs_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be named"):
        RunDir.reserve(None, name=name)
    assert contents(tmp_path) == set()


def test_an_empty_directory_may_be_used_and_a_used_one_may_not() -> None:
    Path("out").mkdir()
    path = finished_run(Path("out"))
    with pytest.raises(RunError, match=r"not empty(.|\n)*--overwrite"):
        RunDir.reserve(path, name="tiny")
    assert contents(path) == {"manifest.json"}


def test_overwrite_clears_a_run_of_ours() -> None:
    path = finished_run(Path("out"))
    (path / "rollouts").mkdir()
    (path / "rollouts" / "old.parquet").touch()
    Path("outside").mkdir()
    Path("outside/kept").touch()
    link = path / "rollouts" / "link"
    link.symlink_to(Path("outside").resolve(), target_is_directory=True)
    for name in (
        *("adapter_model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model"),
        *("chat_template.jinja", "model.safetensors.index.json", ".config.yaml.77.tmp"),
    ):
        (path / name).touch()
    for name in ("superseded", "completions", "checkpoint-12", ".saving", "tensorboard", "ref"):
        (path / name).mkdir()
    with RunDir.reserve(path, name="tiny", overwrite=True) as run:
        run.clear()
        assert contents(path) == {"run.lock"}
    assert Path("outside/kept").exists()


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"name": "a web application"}'])
def test_overwrite_never_touches_what_is_not_a_run(manifest: str | None) -> None:
    stranger = Path("out")
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work", encoding="utf-8")
    if manifest is not None:
        (stranger / "manifest.json").write_text(manifest, encoding="utf-8")
    before = contents(stranger)
    with pytest.raises(RunError, match="does not look like a run"):
        RunDir.reserve(stranger, name="tiny", overwrite=True)
    assert contents(stranger) == before


@pytest.mark.parametrize(
    "name",
    [
        "notes.md",
        "runs",
        "wandb",
        "mine.safetensors",
        "rewards.py",
        "my.json",
        "exports.txt",
        "link",
        ".git",
        "checkpoint-best",
        "config.yaml~",
    ],
)
def test_overwrite_never_clears_a_run_that_a_person_has_put_something_into(name: str) -> None:
    path = finished_run(Path("out"))
    Path("outside").mkdir()
    if name == "link":
        (path / name).symlink_to(Path("outside").resolve(), target_is_directory=True)
    else:
        (path / name).write_text("mine", encoding="utf-8")
    before = contents(path)
    with pytest.raises(RunError, match=rf"holds what no run writes: {re.escape(name)}\."):
        RunDir.reserve(path, name="tiny", overwrite=True)
    assert contents(path) == before


def test_overwrite_never_clears_the_directory_one_stands_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = finished_run(Path("out"))
    monkeypatch.chdir(path)
    with pytest.raises(RunError, match="working directory"):
        RunDir.reserve(Path("."), name="tiny", overwrite=True)
    assert contents(Path(".")) == {"manifest.json"}


def test_a_file_in_the_way_is_a_clear_error() -> None:
    Path("out").write_text("a file", encoding="utf-8")
    with pytest.raises(RunError, match="cannot make the run directory"):
        RunDir.reserve(Path("out"), name="tiny")
    with pytest.raises(RunError, match="cannot make the run directory"):
        RunDir.reserve(Path("out/below"), name="tiny")


def test_a_crash_before_the_manifest_does_not_block_the_directory() -> None:
    Path("out").mkdir()
    Path("out/run.lock").write_text(
        '{"pid": 999999999, "started": "x", "host": "y"}', encoding="utf-8"
    )
    finished_run(Path("out"))


HOLD = """
import sys, time
from pathlib import Path
from abacist.records.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold_in_another_process(path: Path) -> subprocess.Popen[str]:
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source},
        encoding="utf-8",
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_live_process_is_refused_and_a_killed_one_leaves_the_way_free() -> None:
    path = finished_run(Path("out"))
    process = hold_in_another_process(path)
    try:
        with pytest.raises(RunError, match=f"process {process.pid} on .* is writing this run"):
            RunDir.open(path).lock()
        with pytest.raises(RunError, match="is writing this run"):
            RunDir.reserve(path, name="tiny", overwrite=True)
        assert (path / "manifest.json").exists()
    finally:
        process.kill()
        if sys.platform == "linux":  # dead, but not yet collected by its parent: this process
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        RunLock(path).acquire()
        process.communicate()


def test_the_same_process_cannot_open_a_run_twice_until_it_lets_go() -> None:
    path = finished_run(Path("out"))
    first, second = RunDir.open(path), RunDir.open(path)
    with first:
        first.lock()
        first.lock()
        with pytest.raises(RunError, match=f"process {os.getpid()}"):
            second.lock()
    second.lock()
    second.release()
    second.release()
    assert contents(path) == {"manifest.json"}


@pytest.mark.parametrize("kernel_locks", [True, False])
def test_without_kernel_locks_the_named_process_decides(
    monkeypatch: pytest.MonkeyPatch, kernel_locks: bool
) -> None:
    path = finished_run(Path("out"))
    if not kernel_locks:
        monkeypatch.setattr("abacist.records.lock._flock", lambda descriptor: None)
    alive = identity(os.getppid())
    lock_file = path / "run.lock"

    def is_free(owner: object) -> bool:
        lock_file.write_text(json.dumps(owner), encoding="utf-8")
        lock = RunLock(path)
        try:
            lock.acquire()
        except RunError:
            return False
        lock.release()
        return True

    assert not is_free(alive)
    assert is_free(alive | {"pid": 2**22 + 1}), "no such process"
    assert is_free(alive | {"host": "elsewhere"}) is kernel_locks, "another host cannot be seen"
    if alive["started"] is not None:
        assert is_free(alive | {"started": "an earlier process"}), "its id was given again"
    for damaged in ({}, {"pid": -1}, {"pid": "one"}, [], None):
        assert is_free(damaged)
    RunLock(path).acquire()
    with pytest.raises(RunError):
        RunLock(path).acquire()


def test_opening_what_is_not_a_run_is_an_error_that_says_why() -> None:
    with pytest.raises(RunError, match="no such run directory"):
        RunDir.open(Path("missing"))
    Path("out").mkdir()
    with pytest.raises(RunError, match=r"no manifest\.json"):
        RunDir.open(Path("out"))
    for text, why in {
        "{": "damaged",
        "\xff": "not that of a run",
        "[" * 100_000: "damaged",
        '{"format": "abacist-run", "format_version": 99}': "run of format 99",
        '{"format": "other"}': "not that of a run",
    }.items():
        Path("out/manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(RunError, match=why if text != "\xff" else "damaged"):
            RunDir.open(Path("out"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("versions", ["torch"]),
        ("versions", {"torch": 2}),
        ("data", "gsm8k"),
        ("data", {"problems": "many"}),
        ("seed", "0"),
        ("seed", True),
        ("processes", 1.5),
        ("finished", "no"),
        ("resumed", {}),
    ],
)
def test_a_wrong_type_in_a_manifest_is_named_wherever_it_is_read(name: str, value: object) -> None:
    manifest = build_manifest(seed=7, argv=[], problems=[PROBLEM], source="x")
    Path("out").mkdir()
    (Path("out") / "manifest.json").write_text(
        json.dumps(manifest | {name: value}), encoding="utf-8"
    )
    with pytest.raises(RunError, match=rf"damaged \((data\.|versions\.)?{name}|damaged \({name}\."):
        RunDir.open(Path("out"))


PROBLEM = Problem("id", "How many?", "2+2=4", "4", 1)


def test_the_manifest_says_what_made_the_run_and_opens_again() -> None:
    manifest = build_manifest(
        seed=7, argv=["abacist", "train", "--hub_token", "abc"], problems=[PROBLEM], source="x"
    )
    with RunDir.reserve(None, name="tiny") as run:
        run.write_manifest(manifest)
    assert RunDir.open(run.path).read_manifest() == manifest
    assert manifest["seed"] == 7
    assert manifest["argv"][-1] == REDACTED
    assert manifest["data"]["problems"] == 1
    assert set(manifest["versions"]) >= {
        *("abacist", "python", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    }


def test_the_same_inputs_give_the_same_manifest_bytes() -> None:
    for name in ("a", "b"):
        write_json(Path(name), build_manifest(seed=1, argv=["x"], problems=[PROBLEM]))
    assert Path("a").read_bytes() == Path("b").read_bytes()


def test_writing_a_manifest_imports_no_torch() -> None:
    code = (
        "import sys; from abacist.records import provenance, rundir, rollout;"
        "provenance.build_manifest(seed=1, argv=[]);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": source})
    assert done.returncode == 0


def test_the_data_fingerprint_sees_every_change_and_the_order() -> None:
    other = Problem("id2", "How few?", "", "3", 1)
    variants = [
        [PROBLEM],
        [PROBLEM, other],
        [other, PROBLEM],
        [Problem("id", "How many?", "", "5", 1)],
        [Problem("id", "How much?", "", "4", 1)],
        [Problem("idHow", " many?", "", "4", 1)],
    ]
    assert len({data_fingerprint(variant) for variant in variants}) == len(variants)
    assert data_fingerprint(iter([PROBLEM])) == data_fingerprint([PROBLEM])


@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_token", "s3cret"],
        ["--hub-token=s3cret"],
        ["--api_key", "s3cret", "--seed", "1"],
        ["--push_to_hub_token", "s3cret"],
        ["--password", "-s3cret"],
        ["--keys", "a", "s3cret"],
        ["hub_token=s3cret"],
        ["--model", "hf_s3cretAAAAAAAAAAAAAAAAAAAA"],
        ["--dataset_name", "https://me:s3cret@example.org/x"],
        ["--CLIENT_SECRET", "s3cret"],
    ],
)
def test_no_secret_reaches_the_manifest(argv: list[str]) -> None:
    assert "s3cret" not in json.dumps(build_manifest(seed=1, argv=argv))
    assert REDACTED in " ".join(scrub_argv(argv))


def test_no_secret_reaches_the_manifest_in_a_data_sources_address() -> None:
    manifest = build_manifest(seed=1, argv=[], source="https://me:s3cret@example.org/x")
    assert manifest["data"]["source"] == f"https://{REDACTED}@example.org/x"


def test_what_is_no_secret_stays() -> None:
    argv = ["train", "--max_new_tokens", "9", "--tokenizer_name", "x", "--hub_token", "--seed", "3"]
    assert scrub_argv(argv) == argv
    assert not names_a_secret("max_completion_tokens")


def test_json_is_sorted_indented_utf8_and_takes_any_text() -> None:
    write_json(Path("x.json"), {"b": "é\u2028", "a": "\udcff"})
    assert Path("x.json").read_bytes() == '{\n  "a": "\\udcff",\n  "b": "é\u2028"\n}\n'.encode()
    assert json.loads(Path("x.json").read_text(encoding="utf-8"))["a"] == "\udcff"


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_aside(Path("deep/x"), b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space") as caught:
        write_aside(Path("deep/x"), b"new")
    assert caught.value.filename == "deep/x"  # and not the neighbour that was being written
    assert Path("deep/x").read_bytes() == b"old"
    assert contents(tmp_path / "deep") == {"x"}


def test_a_process_that_may_run_is_told_from_one_that_cannot() -> None:
    dead = next(n for n in range(4_000_000, 4_194_000) if not Path(f"/proc/{n}").exists())
    assert may_run(os.getpid()) and may_run(os.getppid()) and may_run(1)
    assert not may_run(dead) and not may_run(10**30)


@pytest.mark.parametrize("text", ["run_name: 2024-13-01\n", "seed: 0b_\n", "a: [\n"])
def test_settings_that_yaml_stumbles_over_are_a_damaged_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"config\.yaml: cannot be read"):
        read_settings(tmp_path / "config.yaml")
