"""Reads back what trackers wrote: W&B's offline log, Trackio's database, TensorBoard's events."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7  # of the file, and of every piece: checksum (4), length (2), kind (1)
_BLOCK_BYTES = 32_768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _messages(path: Path) -> Iterator[bytes]:
    """The messages in a ``.wandb`` file, which is a log of LevelDB's kind behind a header."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, message = _HEADER_BYTES, b""
    while at + _HEADER_BYTES <= len(data):
        left_in_block = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left_in_block < _HEADER_BYTES:
            at += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        piece = data[at + _HEADER_BYTES : at + _HEADER_BYTES + length]
        at += _HEADER_BYTES + length
        message = piece if kind in (_WHOLE, _FIRST) else message + piece
        if kind in (_WHOLE, _LAST):
            yield message


class WandbFile:
    """One run of W&B's offline mode: project, name, id, config, history and summary."""

    def __init__(self, path: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        self.path = path
        self.project = self.name = self.run_id = ""
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        for message in _messages(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.project, self.name = record.run.project, record.run.display_name
            self.run_id = record.run.run_id
        if kind == "exit":
            self.exit_code = record.exit.exit_code
        if kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            self.config |= _items(config.update)
        if kind == "history":
            self.history.append(_items(record.history.item))
        if kind == "summary":
            self.summary |= _items(record.summary.update)

    def table(self, key: str) -> list[list[Any]]:
        """The rows of every piece of a table, in the order in which they were logged."""
        rows: list[list[Any]] = []
        for line in self.history:
            if f"{key}/path" in line:
                file = self.path.parent / "files" / line[f"{key}/path"]
                rows += json.loads(file.read_text(encoding="utf-8"))["data"]
        return rows


def _items(items: Any) -> dict[str, Any]:
    return {
        "/".join(item.nested_key) if item.nested_key else item.key: json.loads(item.value_json)
        for item in items
    }


def wandb_files(folder: Path) -> list[WandbFile]:
    """What W&B wrote below ``folder``, oldest first."""
    paths = folder.glob("wandb/offline-run-*/*.wandb")
    return [WandbFile(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]
