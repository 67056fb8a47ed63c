"""A bundle from a stranger, laid out as a run in a folder, and what can be read of it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abacist.delivery import archive
from abacist.delivery.archive import Contents
from abacist.delivery.findings import Check
from abacist.errors import RunError
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import Rollout, read_rollouts
from abacist.records.rundir import RunDir, read_json_lines

_VERDICT = r"(?:before|after)(?:-sampled)?"
# What a bundle may hold. Nothing else is written to the disk of whoever verifies.
_KNOWN = re.compile(
    r"opened\.json|streams/checkpoint-\d{1,9}\.bin|weights/[0-9a-f]{64}\.safetensors|run/(?:"
    r"config\.yaml|manifest\.json|metrics\.jsonl|timings\.jsonl|openings\.jsonl|seen\.json|"
    r"shots\.jsonl|adapter_config\.json|config\.json|generation_config\.json|evals/verdict\.json|"
    rf"evals/{_VERDICT}/(?:evaluation\.json|rollouts\.parquet)|"
    r"rollouts/step-\d{6,9}(?:-part\d{1,6})?\.parquet)"
)
_MOST_ROWS, _MOST_VALUES, _MOST_TABLE_BYTES = 500_000, 2 * 10**8, 2**30
_ROWS_AT_A_TIME = 16


def is_known(name: str) -> bool:
    """Whether a bundle may hold a member of this name."""
    return _KNOWN.fullmatch(name) is not None


@dataclass
class Opened:
    """A bundle that was laid out. ``run`` looks like the run's folder, without its weights."""

    contents: Contents
    folder: Path
    run: RunDir
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any]
    _rollouts: dict[str, list[Rollout]] = field(default_factory=dict)
    _evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def index(self) -> Mapping[str, Any]:
        """What ``bundle.json`` holds."""
        return self.contents.index

    def has(self, name: str) -> bool:
        """Whether the bundle has this member."""
        return name in self.contents.members

    @property
    def run_ids(self) -> list[str]:
        """What the run is called in its rollouts; several names if it was renamed and resumed."""
        run = self.index.get("run")
        run = run if isinstance(run, Mapping) else {}
        earlier = run.get("earlier_run_ids")
        return [str(one) for one in [*(earlier if isinstance(earlier, list) else []),
                                     *([run["run_id"]] if "run_id" in run else [])]]  # fmt: skip

    def rollout_names(self) -> list[str]:
        """The members that hold training rollouts, in the order of their steps."""
        names = [name for name in self.contents.members if name.startswith("run/rollouts/")]
        return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])

    def rollouts(self, name: str) -> list[Rollout]:
        """The rollouts of a member. Raises RunError if they cannot be read."""
        if name not in self._rollouts:
            _refuse_huge_table(name, self.contents.members[name])
            self._rollouts[name] = read_rollouts(self.folder / name)
        return self._rollouts[name]

    def evaluation(self, kind: str) -> Evaluation | None:
        """The evaluation ``before``, ``after`` …; None if there is none.

        Raises RunError if it is there and cannot be read.
        """
        if not self.has(f"run/evals/{kind}/evaluation.json"):
            return None
        if kind not in self._evaluations:
            name = f"run/evals/{kind}/rollouts.parquet"
            if not self.has(name):
                raise RunError(f"{name}: missing.")
            _refuse_huge_table(name, self.contents.members[name])
            self._evaluations[kind] = Evaluation.load(self.run.evals_dir / kind)
        return self._evaluations[kind]

    def document(self, name: str) -> Any:
        """A member's JSON. Raises RunError if it is missing or damaged."""
        try:
            return json.loads(self.contents.members[name].decode("utf-8"))
        except KeyError:
            raise RunError(f"{name}: missing.") from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{name}: damaged ({error}).") from error

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a member that holds one a line; [] if it is missing."""
        return read_json_lines(self.folder / name)[0] if self.has(name) else []


def lay_out(path: Path, contents: Contents, folder: Path, check: Check) -> Opened:
    """Write the members into ``folder``. What no bundle may hold is a fault, and is not written.

    Raises RunError if the settings or the manifest cannot be read: nothing can be checked then.
    """
    for name, data in contents.members.items():
        if not is_known(name):
            check.fault(name, "", "nothing of this name", f"a file of {len(data):,} bytes")
            continue
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    run = RunDir(folder / "run")
    try:
        return Opened(contents, folder, run, run.read_manifest(), run.read_settings())
    except RunError as error:
        why = " ".join(error.message.replace(f"{folder}/", "").split())[:300]
        hint = "It is not a bundle as `abacist bundle` writes it. Fetch it again."
        raise RunError(f"{path}: nothing can be checked: {why}", hint) from error


def _refuse_huge_table(name: str, data: bytes) -> None:
    """Raise RunError for a Parquet file that would unpack to far more than rollouts are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            meta = file.metadata
            chunks = [
                meta.row_group(group).column(column)
                for group in range(min(meta.num_row_groups, 1000))
                for column in range(meta.num_columns)
            ]
            size = sum(chunk.total_uncompressed_size for chunk in chunks)
            values = sum(chunk.num_values for chunk in chunks)
            if meta.num_rows > _MOST_ROWS or meta.num_row_groups > 1000 or values > _MOST_VALUES:
                raise RunError(f"{name}: refused, it has {meta.num_rows:,} rows.")
            if size > archive.MOST_BYTES_OF_A_MEMBER:
                raise RunError(f"{name}: refused, it would have {size:,} bytes when unpacked.")
            total = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME):
                total += batch.nbytes
                if total > _MOST_TABLE_BYTES:
                    raise RunError(f"{name}: refused, its rows have more than {total:,} bytes.")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{name}: not a readable rollout file ({error}).") from error
