"""A bundle holds the evidence and nothing of the machine; a stranger's file does no harm."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from abacist.cli.main import main
from abacist.delivery import archive
from abacist.delivery import bundle as bundling
from abacist.delivery.bundle import Bundle, bundle, cleaned, portable
from abacist.delivery.verify import Request, verify
from abacist.errors import AbacistError, RunError
from abacist.records.rollout import read_rollouts, write_rollouts
from bundles import Edit, Members, edit_json, edit_rows, short_run, tampered, zipped

pytestmark = pytest.mark.slow


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """A copy of the short run that may be damaged."""
    return Path(shutil.copytree(short_run, tmp_path / "tiny-001"))


@pytest.fixture(scope="module")
def made(short_bundle: Bundle) -> Path:
    return short_bundle.path


def test_the_same_run_gives_the_same_bytes(short_run: Path, tmp_path: Path) -> None:
    one, two = (bundle(short_run, tmp_path / name) for name in ("a.zip", "b.zip"))
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.fingerprint == two.fingerprint == archive.read(one.path).fingerprint


def test_everything_that_a_verification_needs_is_in_it(made: Path) -> None:
    contents = archive.read(made)
    assert not contents.altered
    assert {"run/config.yaml", "run/manifest.json", "run/metrics.jsonl", "run/seen.json",
            "run/evals/verdict.json", "run/evals/after-sampled/rollouts.parquet",
            "streams/checkpoint-0.bin", "streams/checkpoint-1.bin", "opened.json",
            } <= contents.members.keys()  # fmt: skip
    assert [entry["step"] for entry in contents.index["replays"]] == [1, 2]
    # At the start of an epoch torch's data loader draws a number before the rollouts do.
    assert [entry["draws_before"] for entry in contents.index["replays"]] == [1, 0]


def test_nothing_of_the_machine_and_no_secret_is_in_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretindeed")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["argv"] = [f"{tmp_path}/bin/abacist", "--output_dir", f"{tmp_path}/x", "hf_verysecret"]
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("shots_file: null\n", "")
    config.write_text(f"{text}shots_file: {tmp_path}/my shots.jsonl\n", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "note": "hf_verysecretindeed"}\n')
    contents = archive.read(bundle(run, tmp_path / "x.zip").path)
    home = str(Path.home())
    for name, data in contents.members.items():
        assert str(tmp_path).encode() not in data, name
        assert b"verysecret" not in data, name
        assert home == "/" or f"{home}/".encode() not in data, name
    assert b"shots_file: my shots.jsonl" in contents.members["run/config.yaml"]


@pytest.mark.parametrize(
    "text, left",
    [
        ("/home/me/my data/train.jsonl", "train.jsonl"),
        ("~/models/qwen/", "qwen"),
        (r"C:\Users\me\data.csv", "data.csv"),
        ("--output_dir=/tmp/x/run", "--output_dir=run"),
        ("see '/srv/a/b.py:brief'", "see 'b.py:brief'"),
        ("openai/gsm8k", "openai/gsm8k"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("https://host.example/a/b", "https://host.example/a/b"),
        ("data/train.jsonl", "data/train.jsonl"),
        ("1/2 of 3/4", "1/2 of 3/4"),
    ],
)
def test_directories_go_and_names_stay(text: str, left: str) -> None:
    assert portable({"a": [text, 1, None]}) == {"a": [left, 1, None]}


PROSE = [
    "Think within <think>...</think>, then <answer>...</answer>.",
    "/no_think Answer in metres/second.",
    r"Use LaTeX: \text{a}\text{b}, \frac{1}{2}\cdot\sqrt{3}.",
    "Use + - * / (, ) and /answer/with/slashes.",
    "~/ or C:\\x\\y: a drive",
]


@pytest.mark.parametrize("prompt", PROSE)
def test_a_prompt_is_kept_word_for_word(prompt: str) -> None:
    settings = {"system_prompt": prompt, "shots_file": "/home/me/shots.jsonl", "seed": 3,
                "chat_template_kwargs": {"style": prompt}, "model_name_or_path": "/srv/m/qwen",
                "lora_target_modules": r"model\.layers\.\d+\.q_proj", "reward_funcs": ["/a/b.py:f"],
                "model_init_kwargs": {"cache_dir": "/home/me/cache"}}  # fmt: skip
    assert cleaned(settings) == settings | {
        "shots_file": "shots.jsonl", "model_name_or_path": "qwen", "reward_funcs": ["b.py:f"],
        "model_init_kwargs": {"cache_dir": "cache"},
    }  # fmt: skip
    manifest = {"task": {"system_prompt": prompt}, "argv": ["/home/me/bin/abacist"]}
    assert cleaned(manifest) == manifest | {"argv": ["abacist"]}


def test_a_prompt_loses_its_secrets_all_the_same() -> None:
    assert (
        "hf_abc" not in cleaned({"system_prompt": "</think> hf_abcdefghijklmnop"})["system_prompt"]
    )


@pytest.mark.slow
def test_a_run_whose_prompt_looks_like_paths_holds(tmp_path: Path) -> None:
    flags = ("--system_prompt", " ".join(PROSE[:4]), "--max_steps", "1", "--save_steps", "1",
             "--num_heldout_problems", "2", "--num_consistency_problems", "0",
             "--eval_strategy", "no", "--num_selection_problems", "0")  # fmt: skip
    made = bundle(short_run(tmp_path / "prose", *flags), tmp_path / "x.bundle.zip")
    found = verify(Request(made.path, replies=2))
    assert found.holds, [fault for check in found.checks for fault in check.faults]


def test_what_a_failed_reward_said_and_what_was_logged_lose_their_directories(
    run: Path, tmp_path: Path
) -> None:
    fault = "brief failed: [Errno 2] no /srv/private/words.txt, hf_abcdefghijklmnop"
    for name, part in (("after/evaluation.json", "evaluation"), ("verdict.json", "after")):
        path = run / "evals" / name
        document = json.loads(path.read_text(encoding="utf-8"))
        document[part]["conditions"] = {"rewards": fault}
        path.write_text(json.dumps(document), encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "note": "see /srv/private/words.txt"}\n{"torn')
    made = bundle(run, tmp_path / "x.zip")
    members = archive.read(made.path).members
    for name, data in members.items():
        assert b"/srv/private" not in data and b"abcdefghijklmnop" not in data, name
    assert b"no words.txt" in members["run/evals/after/evaluation.json"]
    assert b"no words.txt" in members["run/evals/verdict.json"]
    was = (run / "metrics.jsonl").read_bytes().split(b"\n")
    assert members["run/metrics.jsonl"].split(b"\n")[:5] == was[:5]
    assert verify(Request(made.path, replies=0)).holds


# Runs of every kind.


def _stopped(run: Path) -> None:
    for name in ("after", "after-sampled"):
        shutil.rmtree(run / "evals" / name)
    (run / "evals" / "verdict.json").unlink()
    (run / "adapter_model.safetensors").unlink()
    _edit_manifest(run, finished=False)


def _never_judged(run: Path) -> None:
    shutil.rmtree(run / "evals")


def _of_an_older_version(run: Path) -> None:
    (run / "seen.json").unlink()
    _edit_manifest(run, dtype=None, recipe=None, task=None, control=None)


def _without_metrics(run: Path) -> None:
    for name in ("metrics.jsonl", "timings.jsonl"):
        (run / name).unlink()


def _edit_manifest(run: Path, **changes: Any) -> None:
    path = run / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in manifest.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def _damaged_checkpoint(run: Path) -> None:
    path = run / "checkpoint-1" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _damaged_rollouts(run: Path) -> None:
    path = run / "rollouts" / "step-000002.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def _checkpoints_gone(run: Path) -> None:
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "change, note, is_complete",
    [
        (_stopped, "no verdict in it (the run was not finished)", True),
        (_never_judged, "no verdict in it (the run is finished)", True),
        (_of_an_older_version, "", True),
        (_damaged_checkpoint, "checkpoint-1 is passed over", True),
        (_checkpoints_gone, "No training rollouts can be replayed", False),
    ],
)
def test_a_run_of_every_kind_is_bundled_with_a_note_and_holds(
    run: Path, tmp_path: Path, change: Callable[[Path], None], note: str, is_complete: bool
) -> None:
    change(run)
    made = bundle(run, tmp_path / "x.zip")
    assert note in " ".join(made.notes) and len(made.notes) == bool(note)
    assert str(tmp_path) not in " ".join(made.notes)
    found = verify(Request(made.path, replies=3))
    assert found.holds, [fault for check in found.checks for fault in check.faults]
    assert found.is_complete is is_complete


def test_a_run_that_was_renamed_holds_and_so_does_one_resumed_under_its_new_name(
    run: Path, tmp_path: Path
) -> None:
    renamed = run.rename(tmp_path / "my best run")
    made = bundle(renamed, tmp_path / "x.zip")
    assert archive.read(made.path).index["run"]["run_id"] == "tiny-001"
    found = verify(Request(made.path, replies=0))
    assert found.holds, [fault for check in found.checks for fault in check.faults]
    for path in [*renamed.glob("evals/after*/*.parquet"), renamed / "rollouts/step-000002.parquet"]:
        write_rollouts(path, [replace(one, run_id="my best run") for one in read_rollouts(path)])
    made = bundle(renamed, tmp_path / "y.zip")
    index = archive.read(made.path).index["run"]
    assert (index["run_id"], index["earlier_run_ids"]) == ("my best run", ["tiny-001"])
    found = verify(Request(made.path, replies=0))
    assert found.holds, [fault for check in found.checks for fault in check.faults]


def test_replies_of_another_run_are_no_part_of_this_one(made: Path, tmp_path: Path) -> None:
    for name in ("run/rollouts/step-000001.parquet", "run/evals/after/rollouts.parquet"):
        for rows in (slice(2, 3), slice(None)):  # one row, or all of a file

            def other(them: list[dict[str, Any]], rows: slice = rows) -> None:
                for row in them[rows]:
                    row["run_id"] = "tiny-002"

            file = tampered(made, tmp_path / "x.bundle.zip", edit_rows(name, other), anew=True)
            found = verify(Request(file, replies=0))
            faults = [fault for check in found.checks for fault in check.faults]
            assert faults and all("run_id" in fault.item for fault in faults)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: (run / "manifest.json").unlink(), "not a run"),
        (lambda run: shutil.rmtree(run), "no such run"),
        (lambda run: (run / "config.yaml").unlink(), "cannot be read"),
        (
            lambda run: (run / "evals/after/rollouts.parquet").write_bytes(b"PAR1"),
            "not a readable rollout file",
        ),
        (lambda run: (run / "adapter_model.safetensors").write_bytes(b"torn"), "damaged"),
        (_damaged_rollouts, "not a readable rollout file"),
        (
            lambda run: (shutil.rmtree(run / "evals"), shutil.rmtree(run / "rollouts")),
            "there is nothing to check",
        ),
    ],
)
def test_a_run_that_cannot_be_bundled_is_refused_in_one_message_and_leaves_nothing(
    run: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(run)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(RunError, match=message):
        bundle(run, target / "x.zip")
    assert not list(target.iterdir())


def test_an_existing_file_is_replaced_only_if_asked(short_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.zip"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="exists already"):
        bundle(short_run, target)
    with pytest.raises(RunError, match="it is no bundle"):
        bundle(short_run, target, overwrite=True)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("thesis.tex", "years of work")
    with pytest.raises(RunError, match="it is no bundle"):
        bundle(short_run, tmp_path / "other.zip", overwrite=True)
    assert target.read_text(encoding="utf-8") == "mine"
    target.unlink()
    bundle(short_run, target)
    with pytest.raises(RunError, match="exists already"):
        bundle(short_run, target)
    assert bundle(short_run, target, overwrite=True).size_bytes == target.stat().st_size


def test_a_full_disk_leaves_nothing_of_a_bundle(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(bundling, "MOST_BYTES_OF_WEIGHTS_INSIDE", 0)
    monkeypatch.setattr(archive, "write_aside", full)
    with pytest.raises(RunError, match="No space left"):
        bundle(short_run, tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())


def test_large_adapters_lie_beside_it_and_are_found_there_or_where_one_points(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundling, "MOST_BYTES_OF_WEIGHTS_INSIDE", 0)
    made = bundle(short_run, tmp_path / "x.bundle.zip")
    assert {path.parent for path in made.beside} == {tmp_path / "x.weights"}
    assert len(made.beside) == 3 and not any(
        "weights/" in n for n in archive.read(made.path).members
    )
    found = verify(Request(made.path, replies=2))
    assert found.holds and found.is_complete
    moved = tmp_path / "elsewhere"
    (tmp_path / "x.weights").rename(moved)
    found = verify(Request(made.path, replies=2))
    assert found.holds and not found.is_complete
    for place in (moved, short_run):
        assert verify(Request(made.path, replies=2, weights=place)).is_complete
    (tmp_path / "x.weights").mkdir()
    for path in moved.iterdir():  # another file under the right name
        (tmp_path / "x.weights" / path.name).write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert not verify(Request(made.path, replies=2)).holds


def test_a_whole_model_is_not_in_the_bundle_and_is_found_by_its_sum(tmp_path: Path) -> None:
    flags = ("--use_peft", "false", "--learning_rate", "1e-4", "--max_steps", "1")
    run = short_run(tmp_path / "full", *flags)
    made = bundle(run, tmp_path / "full.bundle.zip")
    assert made.size_bytes < 500_000 and "--weights" in made.notes[-1] and not made.beside
    found = verify(Request(made.path, replies=3))
    assert found.holds and not found.is_complete
    found = verify(Request(made.path, replies=3, weights=run))
    assert found.holds and found.is_complete
    assert {check.name: check for check in found.checks}["replay"].numbers["all"]["replies"] == 15


def test_steps_that_begin_an_epoch_are_replayed_like_any_other(tmp_path: Path) -> None:
    # 8 problems, 4 a step: the third step begins the second epoch, and its data loader draws first.
    run = short_run(
        tmp_path / "epochs", "--num_train_problems", "8", "--max_steps", "3",
        "--num_heldout_problems", "2", "--num_consistency_problems", "0", "--eval_strategy", "no",
        "--num_selection_problems", "0", "--gradient_accumulation_steps", "2",
        "--per_device_train_batch_size", "8",
    )  # fmt: skip
    made = bundle(run, tmp_path / "x.bundle.zip")
    draws = [entry["draws_before"] for entry in archive.read(made.path).index["replays"]]
    assert draws == [1, 0, 1]
    found = verify(Request(made.path, replies=2**31))
    assert found.holds and found.is_complete


# Hostile files.


def _entries(**members: bytes) -> dict[str, bytes]:
    return {archive.INDEX_NAME: b"{}", **members}


def _bomb() -> bytes:
    data = zipped({"a": b"\0" * 2**20})
    # The list of members says that it unpacks to 3 GiB.
    at = data.index(b"PK\x01\x02")
    return data[: at + 24] + struct.pack("<L", 3 * 2**30) + data[at + 28 :]


def _two_of_one_name() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            packed.writestr(zipfile.ZipInfo("bundle.json"), b"{}")
    return buffer.getvalue()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no zip": lambda: b"\x89PNG" + b"\0" * 100,
    "a gzip": lambda: b"\x1f\x8b" + b"\0" * 100,
    "a path upwards": lambda: zipped(_entries(**{"../../evil": b"x"})),
    "an absolute path": lambda: zipped(_entries(**{"/etc/evil": b"x"})),
    "a backslash": lambda: zipped(_entries(**{"run\\evil": b"x"})),
    "a drive": lambda: zipped(_entries(**{"C:evil": b"x"})),
    "a hidden file": lambda: zipped(_entries(**{"run/.bashrc": b"x"})),
    "a link": lambda: zipped(_entries(link=b"/etc/passwd"), external_attr=0o120777 << 16),
    "a folder": lambda: zipped(_entries(**{"run/": b""})),
    "a device": lambda: zipped(_entries(x=b""), external_attr=0o020666 << 16),
    "a comment": lambda: zipped(_entries(), comment=b"hello"),
    "a bomb": _bomb,
    "another way of packing": lambda: zipped(_entries(), compress_type=zipfile.ZIP_LZMA),
    "two members of one name": _two_of_one_name,
    "names that differ in case": lambda: zipped(_entries(a=b"1", A=b"2")),
    "thousands of members": lambda: zipped({f"a{n}": b"" for n in range(5001)}),
    "bytes before it": lambda: b"PK\x03\x04" + zipped(_entries()),
    "bytes behind it": lambda: zipped(_entries()) + b"\0" * 30,
    "no index": lambda: zipped({"a": b"1"}),
    "an index that is no JSON": lambda: zipped({archive.INDEX_NAME: b"{"}),
    "an index without end": lambda: zipped({archive.INDEX_NAME: b"[" * 100_000}),
    "another's index": lambda: zipped({archive.INDEX_NAME: b'{"format": "x"}'}),
    "a newer format": lambda: zipped(
        {archive.INDEX_NAME: b'{"format": "abacist-bundle", "format_version": 99}'}
    ),
    "an index that lists nothing": lambda: zipped(
        {archive.INDEX_NAME: b'{"format": "abacist-bundle", "format_version": 1, "files": 3}'}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_bundle_is_refused_in_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle.zip"
    path.write_bytes(HOSTILE[name]())
    with pytest.raises(RunError) as refused:
        verify(Request(path))
    assert refused.value.hint and "\n" not in refused.value.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.bundle.zip"]


def test_a_bundle_cut_short_anywhere_is_refused(made: Path, tmp_path: Path) -> None:
    data = made.read_bytes()
    path = tmp_path / "x.zip"
    for length in (1, 30, len(data) // 3, len(data) // 2, len(data) - 23, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(RunError):
            archive.read(path)


def test_a_flipped_bit_anywhere_is_refused_or_named(made: Path, tmp_path: Path) -> None:
    data, path = made.read_bytes(), tmp_path / "x.zip"
    was = archive.read(made)
    for at in range(0, len(data), len(data) // 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            found = archive.read(path)
        except RunError:
            continue
        assert found.altered or found.members == was.members


def _put(name: str, data: bytes) -> Callable[[dict[str, Any], Members], None]:
    return lambda index, members: members.update({name: data})


def _billion_laughs() -> bytes:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    return "\n".join(lines).encode()


def _huge_table() -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": pa.nulls(600_000, pa.int8())}), buffer)
    return bytes(buffer.getvalue().to_pybytes())


def _put_setting(name: str, value: Any) -> Edit:
    def edit(index: dict[str, Any], members: Members) -> None:
        settings = yaml.safe_load(members["run/config.yaml"]) | {name: value}
        members["run/config.yaml"] = yaml.safe_dump(settings).encode()

    return edit


ODD = {
    "a member of another name": _put("run/evil.pkl", b"cos\nsystem\n"),
    "a member outside": _put("weights/evil.safetensors", b"x"),
    "settings that refer to themselves": _put("run/config.yaml", _billion_laughs()),
    "settings that are none": _put("run/config.yaml", b"!!python/object/apply:os.system [id]"),
    "a manifest that is none": _put("run/manifest.json", b"[]"),
    "a table of endless rows": _put("run/rollouts/step-000001.parquet", _huge_table()),
    "a table that is none": _put("run/rollouts/step-000001.parquet", b"PAR1PAR1"),
    "a stream that is none": _put("streams/checkpoint-0.bin", b"abc"),
    "an adapter of endless ranks": edit_json(
        "run/adapter_config.json", lambda it: it.update(r=10**9)
    ),
    "an adapter that imports": edit_json(
        "run/adapter_config.json",
        lambda it: it.update(megatron_config={}, megatron_core="antigravity", target_modules="a*"),
    ),
    "an adapter of no kind": edit_json(
        "run/adapter_config.json", lambda it: it.update(peft_type=["LORA"])
    ),
    "replies without end": _put_setting("max_completion_length", 10**9),
    "an evaluation of replies without end": edit_json(
        "run/evals/before-sampled/evaluation.json",
        lambda it: it["evaluation"]["settings"].update(max_completion_tokens=10**9),
    ),
    "an evaluation of samples without end": edit_json(
        "run/evals/after/evaluation.json",
        lambda it: it["evaluation"]["settings"].update(num_samples=10**12),
    ),
    "an evaluation of half a sample": edit_json(
        "run/evals/after/evaluation.json",
        lambda it: it["evaluation"]["settings"].update(num_samples=0.5),
    ),
    "problems that are none": edit_json(
        "run/evals/after/evaluation.json", lambda it: it.update(problems=[[1]])
    ),
    "a record that is none": _put("opened.json", b'[{"by": 3, "date": "soon"}]'),
    "weights that are none": lambda index, members: index.update(weights={"final": [3]}),
    "weights outside": lambda index, members: index["weights"].update(
        final=[{"name": "../../x", "sha256": "0" * 64}]
    ),
    "replays that are none": lambda index, members: index.update(replays=[3]),
}
# Weights go by a role, and the folder that they are loaded from once went by it too.
HOSTILE_ROLES = ["../../evil", "/tmp/abacist-evil", "checkpoint-1/../../../evil",
                 "checkpoint-\u0661", "checkpoint-1\n", "", ".", "base", "final/"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_contents_are_faults_or_refused_and_never_a_crash(
    name: str, made: Path, tmp_path: Path
) -> None:
    file = tampered(made, tmp_path / "x.bundle.zip", ODD[name], anew=True)
    try:
        assert not verify(Request(file, replies=1)).holds
    except AbacistError as error:
        assert "\n" not in error.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.bundle.zip"]


def test_a_million_problems_are_not_made_for_a_stranger(made: Path, tmp_path: Path) -> None:
    edit = _put_setting("num_train_problems", 10**9)
    file = tampered(made, tmp_path / "x.bundle.zip", edit, anew=True)
    data = {check.name: check for check in verify(Request(file, replies=1)).checks}["data"]
    assert "more than 1,000,000 problems" in " ".join(data.not_checked)


@pytest.mark.parametrize(
    "change",
    [{"peft_type": "PROMPT_TUNING"}, {"rank_pattern": {"q_proj": 4}}, {"modules_to_save": ["x"]}],
)
def test_an_adapter_that_is_not_replayed_is_said_and_no_fault(
    change: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    edit = edit_json("run/adapter_config.json", lambda it: it.update(change))
    file = tampered(made, tmp_path / "x.bundle.zip", edit, anew=True)
    found = verify(Request(file, replies=1))
    replay = {check.name: check for check in found.checks}["replay"]
    assert replay.holds and not found.is_complete
    assert "not replayed" in " ".join(replay.not_checked)


@pytest.mark.parametrize("role", HOSTILE_ROLES)
def test_weights_of_an_odd_role_are_a_fault_and_nothing_is_written_for_them(
    role: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(index: dict[str, Any], members: Members) -> None:
        index["weights"][role] = index["weights"].pop("checkpoint-1")
        index["replays"][1]["checkpoint"] = role

    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a" / "b"))
    before = sorted(tmp_path.rglob("*"))
    file = tampered(made, tmp_path / "x.bundle.zip", rename, anew=True)
    found = verify(Request(file, replies=1))
    assert not {check.name: check for check in found.checks}["replay"].holds
    assert sorted(tmp_path.rglob("*")) == sorted([*before, file])
    assert not Path("/tmp/abacist-evil").exists()


def test_a_replay_by_an_odd_role_alone_is_a_fault(made: Path, tmp_path: Path) -> None:
    file = tampered(
        made,
        tmp_path / "x.bundle.zip",
        lambda index, members: index["replays"][0].update(checkpoint="../../evil"),
        anew=True,
    )
    found = verify(Request(file, replies=1))
    assert not {check.name: check for check in found.checks}["replay"].holds


def test_the_commands_say_what_they_did(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert main(["bundle", str(short_run)]) == 0
        told = capsys.readouterr().out
        assert "tiny-001.bundle.zip" in told and "abacist verify" in told
        assert main(["bundle", str(short_run), "--json", "--overwrite"]) == 0
        fingerprint = json.loads(capsys.readouterr().out)["fingerprint"]
        assert fingerprint in told
        assert main(["verify", "tiny-001.bundle.zip", "--replies", "1", "--fingerprint",
                     fingerprint]) == 0  # fmt: skip
        told = capsys.readouterr().out
        assert "Holds" in told and "What a bundle cannot show" in told
        assert main(["verify", str(short_run)]) == 1
    finally:
        os.chdir(here)
