"""A short run of the built-in recipe, its bundle, and ways to tamper with one."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from abacist.delivery import archive
from abacist.delivery.archive import Contents
from abacist.delivery.verify import Verification
from abacist.learning.config import load_config
from abacist.learning.train import train

Members = dict[str, bytes]
Edit = Callable[[dict[str, Any], Members], None]

SHORT = ["--max_steps", "2", "--save_steps", "1", "--save_total_limit", "5", "--warmup_steps", "0",
         "--num_train_problems", "60", "--num_heldout_problems", "10", "--eval_steps", "1",
         "--num_selection_problems", "4", "--num_consistency_problems", "3",
         "--per_device_train_batch_size", "16", "--num_generations", "4",
         "--max_completion_length", "64", "--learning_rate", "3e-3"]  # fmt: skip


def short_run(folder: Path, *flags: str) -> Path:
    """A whole run with the built-in model in ``folder``: seconds."""
    train(load_config("tiny", None, [*SHORT, "--output_dir", str(folder), *flags]))
    return folder


def forget_the_end(run: Path) -> None:
    """As if the run had been killed right after its last checkpoint."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    del manifest["finished"]
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name in ("after", "after-sampled"):
        shutil.rmtree(run / "evals" / name)
    (run / "evals" / "verdict.json").unlink()  # written only at the end
    (run / "adapter_model.safetensors").unlink()


def tampered(bundle: Path, target: Path, edit: Edit, *, anew: bool) -> Path:
    """A copy of ``bundle`` after ``edit(index, members)``.

    With ``anew`` whoever edits makes all sums again, as if the bundle had always been so; else only
    the members change.
    """
    contents: Contents = archive.read(bundle)
    index, members = json.loads(json.dumps(contents.index)), dict(contents.members)
    edit(index, members)
    if anew:
        own = {key: value for key, value in index.items() if key != "files"}
        packed, _ = archive.pack(own, members)
    else:
        packed = zipped({archive.INDEX_NAME: _index_bytes(index), **dict(sorted(members.items()))})
    target.write_bytes(packed)
    return target


def _index_bytes(index: Mapping[str, Any]) -> bytes:
    return json.dumps(index, ensure_ascii=False, indent=1, sort_keys=True).encode()


def zipped(members: Mapping[str, bytes], **attributes: Any) -> bytes:
    """A zip laid out as ours are, of these members; ``attributes`` are set on every entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            for attribute, value in attributes.items():
                setattr(entry, attribute, value)
            packed.writestr(entry, data)
    return buffer.getvalue()


def edit_json(name: str, change: Callable[[Any], None]) -> Edit:
    """Change a member that is JSON."""

    def edit(index: dict[str, Any], members: Members) -> None:
        value = json.loads(members[name])
        change(value)
        members[name] = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

    return edit


def edit_line(name: str, number: int, change: Callable[[Any], None]) -> Edit:
    """Change one line of a member that holds a JSON object a line."""

    def edit(index: dict[str, Any], members: Members) -> None:
        lines = members[name].decode().rstrip("\n").split("\n")
        value = json.loads(lines[number])
        change(value)
        lines[number] = json.dumps(value)
        members[name] = ("\n".join(lines) + "\n").encode()

    return edit


def edit_table(name: str, change: Callable[[pa.Table], pa.Table]) -> Edit:
    """Put another table in the place of a member that is a Parquet file."""

    def edit(index: dict[str, Any], members: Members) -> None:
        table = change(pq.read_table(io.BytesIO(members[name])))
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        members[name] = buffer.getvalue().to_pybytes()

    return edit


def edit_rows(name: str, change: Callable[[list[dict[str, Any]]], None]) -> Edit:
    """Change the rows of a member that is a Parquet file."""

    def changed(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        change(rows)
        return pa.Table.from_pylist(rows, schema=table.schema)

    return edit_table(name, changed)


def edit_settings(old: str, new: str) -> Edit:
    """Replace a piece of the run's ``config.yaml``."""

    def edit(index: dict[str, Any], members: Members) -> None:
        text = members["run/config.yaml"].decode()
        assert old in text
        members["run/config.yaml"] = text.replace(old, new).encode()

    return edit


def faults_of(found: Verification) -> str:
    """What was found wrong, a line each, with the check that found it."""
    return "\n".join(f"{check.name}: {fault}" for check in found.checks for fault in check.faults)
