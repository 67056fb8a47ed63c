"""``abacist bundle RUN``: what a result rests on, in one file that anybody can check.

The file holds the settings, the manifest, the metrics, the verdict with every reply behind it, the
rollouts of steps that came right after a checkpoint (so that the weights that wrote them exist)
with the random stream they were drawn from, and the record of when each split was opened: the run's
own, and by the dates of its files. Weights
are named by their SHA-256: small adapters are inside, large ones lie beside the file, and whole
models stay where they are. Directories of this machine and secrets are left out.

``abacist.delivery.verify`` reads it again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from abacist.delivery import archive
from abacist.delivery.opened import is_known
from abacist.errors import AbacistError, RunError
from abacist.learning.resume import checkpoints
from abacist.learning.resume.training_state import load_state
from abacist.records.openings import asked_keys, verdict_keys
from abacist.records.rollout import Rollout, read_rollouts, rollout_files
from abacist.records.rundir import RunDir, read_json_lines
from abacist.records.secrets import without_secrets
from abacist.records.seen import read_object

SUFFIX = ".bundle.zip"
MOST_REPLAYED_STEPS = 4
MOST_BYTES_OF_ROLLOUTS = 2 * 2**20  # all steps if they fit, else a seeded sample of them
MOST_BYTES_OF_WEIGHTS_INSIDE = 4 * 2**20
VERDICT_FOLDERS = ("before", "after", "before-sampled", "after-sampled")
STREAM_BYTES = 5056  # the state of torch's generator on the CPU
_SEED = 0  # of what is sampled here; whoever verifies draws the replies to replay anew
_COPIED = ("metrics.jsonl", "timings.jsonl", "openings.jsonl", "seen.json", "shots.jsonl")
_LOGGED = {"metrics.jsonl", "timings.jsonl"}
# Settings, and entries of the manifest, whose value may be a path. All others are left as they
# are, secrets apart: a prompt may well hold "</think>", "metres/second" or LaTeX.
_PATHS = {"argv", "source", "dataset_name", "model", "deepspeed", "recipe", "rewards",
          "reward_funcs", "forced"}  # fmt: skip
_PATH_SUFFIXES = ("_path", "_dir", "_file", "_folder", "_config")
_NEEDED_TO_LOAD = ("config.json", "generation_config.json")
# A directory of this machine within a longer text.
_DIRECTORIES = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s'\"]+[/\\])+")
_ABSOLUTE = re.compile(r"(?:[/\\~]|[A-Za-z]:[/\\])")


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written: where, how large, and what to publish beside it."""

    path: Path
    size_bytes: int
    fingerprint: str
    beside: list[Path]
    beside_bytes: int
    notes: list[str]


@dataclass
class _Parts:
    """What is gathered of a run."""

    members: dict[str, bytes] = field(default_factory=dict)
    replays: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, list[Path]] = field(default_factory=dict)  # by role
    notes: list[str] = field(default_factory=list)


def bundle(path: Path, output: Path | None = None, *, overwrite: bool = False) -> Bundle:
    """Pack the run in ``path``. Without ``output``: ``NAME.bundle.zip`` in the working directory.

    Raises RunError if it is no run, holds nothing that could be checked, is damaged where that
    cannot be passed over, or if the file exists or cannot be written. A checkpoint that is damaged
    and whatever else is missing is passed over with a note.
    """
    run = RunDir.open(path)
    manifest, settings = run.read_manifest(), run.read_settings()
    target = Path(f"{run.run_id}{SUFFIX}") if output is None else output
    beside = target.with_name(target.name.removesuffix(".zip").removesuffix(".bundle") + ".weights")
    if target.is_dir():
        raise RunError(f"{target}: a folder is in its place.", "Name a file with -o.")
    if target.exists() and not overwrite:
        raise RunError(f"{target}: exists already.", "Name another with -o, or add --overwrite.")
    if target.exists() and not archive.is_bundle(target):
        raise RunError(f"{target}: not overwritten, it is no bundle.", "Name another with -o.")
    parts = _Parts()
    parts.members["run/config.yaml"] = _portable_yaml(run.config_path, settings)
    parts.members["run/manifest.json"] = _json(cleaned(manifest))
    for name in _COPIED:
        if (run.path / name).is_file():
            parts.members[f"run/{name}"] = without_secrets_in(run.path / name)
    for name in _LOGGED & {name.removeprefix("run/") for name in parts.members}:
        parts.members[f"run/{name}"] = _portable_lines(parts.members[f"run/{name}"])
    _add_verdict(run, manifest, parts)
    _add_replays(run, parts)
    _add_rollouts(run, parts)
    if not any("rollouts" in name for name in parts.members):
        raise RunError(
            f"{run.path}: there is nothing to check: no verdict and no rollouts. "
            + " ".join(parts.notes),
            "Train with --keep_rollouts true, and let it come to its verdict.",
        )
    parts.members["opened.json"] = _json(_opened(run))
    trains = _add_loading(run, parts)
    weights, sources = _weights_table(parts, trains)
    index = {
        "run": {
            **_run_ids(parts, run),
            "finished": bool(manifest.get("finished")),
            "trains": trains,
            "base": portable(str(settings.get("model_name_or_path", "tiny"))),
            "made_with": (manifest.get("versions") or {}).get("abacist"),
        },
        "replays": parts.replays,
        "weights": weights,
        "notes": parts.notes,
    }
    packed, fingerprint = archive.pack(index, parts.members)
    copied = _copy_beside(beside, sources)
    try:
        archive.write(target, packed)
    except BaseException:
        _take_back(beside, copied)
        raise
    notes = list(parts.notes)
    if trains == "full" and weights:
        notes.append(
            "The weights are a whole model and are not in it: whoever verifies needs them "
            "(--weights RUN), or checks the rest."
        )
    everything = [beside / f"{digest}.safetensors" for digest in sources]
    size = sum(place.stat().st_size for place in everything)
    return Bundle(target, len(packed), fingerprint, everything, size, notes)


def portable(value: Any) -> Any:
    """``value``, nested, without directories of this machine and without secrets.

    >>> portable({"argv": ["/home/me/abacist", "--output_dir=/tmp/x/run"], "data": "openai/gsm8k"})
    {'argv': ['abacist', '--output_dir=run'], 'data': 'openai/gsm8k'}
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    text = without_secrets(value)
    if _ABSOLUTE.match(text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return _DIRECTORIES.sub("", text)


def cleaned(value: Any) -> Any:
    """``value``, nested settings or a manifest, without secrets, and :func:`portable` where a path
    may stand.

    >>> cleaned({"system_prompt": "</think> m/s", "shots_file": "/home/me/shots.jsonl"})
    {'system_prompt': '</think> m/s', 'shots_file': 'shots.jsonl'}
    """
    if isinstance(value, Mapping):
        return {
            key: portable(item) if _may_be_path(str(key)) else cleaned(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def _may_be_path(name: str) -> bool:
    return name in _PATHS or name.endswith(_PATH_SUFFIXES)


def _portable_lines(data: bytes) -> bytes:
    """JSON lines of which the texts are :func:`portable`; a line without any stays as it is."""
    lines = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
            clean = portable(row)
        except (ValueError, RecursionError):  # torn: whoever reads it passes it over too
            row = clean = None
        lines.append(line if clean == row else json.dumps(clean).encode())
    return b"\n".join(lines)


def _portable_conditions(path: Path) -> bytes:
    """An evaluation or a verdict. Its conditions may quote what a failed reward said, with paths
    and secrets; all else is questions, replies and figures, and stays."""
    document = read_object(path)
    clean = {
        key: value | {"conditions": portable(value["conditions"])}
        if isinstance(value, dict) and value.get("conditions")
        else value
        for key, value in document.items()
    }
    return path.read_bytes() if clean == document else _json(clean)


def without_secrets_in(path: Path) -> bytes:
    """A text file's bytes; if it holds a secret, without it."""
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    clean = without_secrets(text)
    return data if clean == text else clean.encode("utf-8", "replace")


def _run_ids(parts: _Parts, run: RunDir) -> dict[str, Any]:
    """What the run is called in its rollouts. Its directory may have been renamed or copied since,
    and a run that was resumed after that has several names, of which the last is its own."""
    found: dict[str, None] = {}
    for name, data in sorted(parts.members.items(), key=lambda member: _when(member[0])):
        if name.endswith(".parquet"):
            column = pq.read_table(io.BytesIO(data), columns=["run_id"])["run_id"]
            found |= dict.fromkeys(sorted(map(str, column.unique().to_pylist())))
    ids = list(found) or [run.run_id]
    return {"run_id": ids[-1], **({"earlier_run_ids": ids[:-1]} if len(ids) > 1 else {})}


def _when(name: str) -> tuple[int, list[int]]:
    """Orders the members that hold rollouts by when they were written."""
    part = 0 if "/before" in name else 2 if "/after" in name else 1
    return part, [int(number) for number in re.findall(r"\d+", name)]


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True)
    return (text + "\n").encode("utf-8", "backslashreplace")


def _portable_yaml(path: Path, settings: Mapping[str, Any]) -> bytes:
    clean = cleaned(settings)
    if clean == settings:
        return path.read_bytes()
    return yaml.safe_dump(clean, sort_keys=True, allow_unicode=True).encode()


def _add_verdict(run: RunDir, manifest: Mapping[str, Any], parts: _Parts) -> None:
    """The evaluations before and after, with every reply, and the verdict."""
    for name in VERDICT_FOLDERS:
        folder = run.evals_dir / name
        files = [folder / "evaluation.json", folder / "rollouts.parquet"]
        if all(file.is_file() for file in files):
            read_rollouts(files[1])  # a damaged one is named here, not by a stranger
            parts.members[f"run/evals/{name}/{files[0].name}"] = _portable_conditions(files[0])
            parts.members[f"run/evals/{name}/{files[1].name}"] = files[1].read_bytes()
    verdict = run.evals_dir / "verdict.json"
    if verdict.is_file() and "run/evals/after/evaluation.json" in parts.members:
        parts.members["run/evals/verdict.json"] = _portable_conditions(verdict)
    else:
        why = "the run is finished" if manifest.get("finished") else "the run was not finished"
        parts.notes.append(f"There is no verdict in it ({why}): nothing is claimed about accuracy.")


def _add_replays(run: RunDir, parts: _Parts) -> None:
    """Steps that came right after a checkpoint: their rollouts, weights and random stream."""
    if (count := run.read_manifest().get("processes", 1)) != 1:
        parts.notes.append(f"No training rollouts can be replayed: {count} processes wrote them, "
                           "each from a random stream of its own.")  # fmt: skip
        return
    found = []
    for checkpoint in checkpoints.checkpoints_of(run.path):
        step = checkpoints.step_of(checkpoint)
        rollouts = next(
            (
                place
                for part in ("", "-part1")
                if (place := run.rollouts_dir / f"step-{step + 1:06d}{part}.parquet").is_file()
            ),
            None,
        )
        if rollouts is None:
            continue  # the last one, or its step used completions that were written before
        try:
            found.append((step, rollouts, *_stream_of(checkpoint)))
        except RunError as error:
            parts.notes.append(f"{checkpoint.name} is passed over: {portable(error.message)}")
    chosen = random.Random(_SEED).sample(found, min(MOST_REPLAYED_STEPS, len(found)))
    for step, rollouts, stream, draws in sorted(chosen):
        name = f"streams/checkpoint-{step}.bin"
        parts.members[name] = stream
        parts.members[f"run/rollouts/{rollouts.name}"] = _sound(rollouts)
        parts.replays.append(
            {
                "step": step + 1,
                "checkpoint": f"checkpoint-{step}",
                "rollouts": f"run/rollouts/{rollouts.name}",
                "stream": name,
                "draws_before": draws,
            }
        )
        parts.weights[f"checkpoint-{step}"] = _weights_in(run.path / f"checkpoint-{step}")
    if not parts.replays:
        parts.notes.append("No training rollouts can be replayed: no checkpoint with the step "
                           "after it is kept.")  # fmt: skip


def _stream_of(checkpoint: Path) -> tuple[bytes, int]:
    """The state of torch's generator after ``checkpoint``, and how many numbers are drawn from it
    before the rollouts are."""
    if (wrong := checkpoints.defect(checkpoint)) is not None:
        raise RunError(f"{wrong}.")
    if not _weights_in(checkpoint):
        raise RunError("it holds no safetensors.")
    state = load_state(checkpoint / "grpo_state.pt")
    stream = state.get("random", {}).get("torch")
    if stream is None or stream.numel() != STREAM_BYTES:
        raise RunError("its random stream is not kept in a form that can be replayed.")
    if state.get("buffered") is not None:
        raise RunError("the next step used completions that were written before it.")
    epoch = read_object(checkpoint / "trainer_state.json").get("epoch") or 0
    # At the start of an epoch torch's data loader draws one number.
    return bytes(stream.tolist()), int(float(epoch).is_integer())


def _add_rollouts(run: RunDir, parts: _Parts) -> None:
    """The rollouts of every step if they are small, else of a seeded sample of steps."""
    kept = rollout_files(run.rollouts_dir)
    files = [
        file for file in kept if is_known(_member(file)) and _member(file) not in parts.members
    ]
    if other := [file for file in kept if not is_known(_member(file))]:
        parts.notes.append(
            f"{len(other):,} files of rollouts/ are left out, {portable(other[0].name)} the first: "
            "only those of a run in one process can be checked."
        )
    room = MOST_BYTES_OF_ROLLOUTS - sum(
        len(data) for name, data in parts.members.items() if name.startswith("run/rollouts/")
    )
    if sum(file.stat().st_size for file in files) > room:
        random.Random(_SEED).shuffle(files)
    left_out = 0
    for file in files:
        if (size := file.stat().st_size) > room:
            left_out += 1
            continue
        try:
            parts.members[_member(file)] = _sound(file)
            room -= size
        except RunError as error:
            parts.notes.append(f"{file.name} is left out: {portable(error.message)}")
    if left_out:
        parts.notes.append(f"The rollouts of {left_out:,} steps are left out, to keep it small.")


def _member(file: Path) -> str:
    return f"run/rollouts/{file.name}"


def _sound(file: Path) -> bytes:
    read_rollouts(file)
    return file.read_bytes()


def _weights_in(folder: Path) -> list[Path]:
    adapter = folder / "adapter_model.safetensors"
    return [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))


def _add_loading(run: RunDir, parts: _Parts) -> str:
    """What the weights are loaded with; whether they are ``lora`` or ``full``."""
    if "run/evals/after/evaluation.json" in parts.members:
        parts.weights["final"] = _weights_in(run.path)
        if not parts.weights["final"]:
            del parts.weights["final"]
            parts.notes.append("The trained weights are not in the run: its verdict cannot be "
                               "replayed.")  # fmt: skip
    folders = [run.path, *(run.path / role for role in parts.weights if role != "final")]
    for folder in folders:
        if (file := folder / "adapter_config.json").is_file():
            parts.members["run/adapter_config.json"] = _json(cleaned(read_object(file)))
            return "lora"
    for folder in folders:
        for name in _NEEDED_TO_LOAD:
            if (file := folder / name).is_file():
                parts.members[f"run/{name}"] = _json(cleaned(read_object(file)))
        if "run/config.json" in parts.members:
            break
    return "full"


def _weights_table(parts: _Parts, trains: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the index says of the weights by role, and the files to be copied beside, by sum."""
    sums: dict[Path, str] = {}
    for path in {path for paths in parts.weights.values() for path in paths}:
        _refuse_torn(path)
        with path.open("rb") as file:
            sums[path] = hashlib.file_digest(file, "sha256").hexdigest()
    by_sum = {digest: path for path, digest in sorted(sums.items())}
    size = sum(path.stat().st_size for path in by_sum.values())
    is_inside = trains == "lora" and size <= MOST_BYTES_OF_WEIGHTS_INSIDE
    if is_inside:
        for digest, path in by_sum.items():
            parts.members[f"weights/{digest}.safetensors"] = path.read_bytes()
    where = "inside" if is_inside else "beside" if trains == "lora" else "with the run"
    table = {
        role: [
            {"name": p.name, "bytes": p.stat().st_size, "sha256": sums[p], "where": where}
            for p in paths
        ]
        for role, paths in sorted(parts.weights.items())
    }
    return table, by_sum if where == "beside" else {}


def _refuse_torn(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: damaged ({error}).", "Restore the file, then bundle.") from error


def _copy_beside(folder: Path, sources: Mapping[str, Path]) -> list[Path]:
    """Copy weights beside the bundle, each whole or not at all; those that were not there."""
    made: list[Path] = []
    try:
        for digest, source in sources.items():
            place = folder / f"{digest}.safetensors"
            if place.exists() and place.stat().st_size == source.stat().st_size:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            aside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
            try:
                shutil.copyfile(source, aside)
                os.replace(aside, place)
            finally:
                aside.unlink(missing_ok=True)
            made.append(place)
    except OSError as error:
        _take_back(folder, made)
        raise RunError(
            f"{folder}: the weights were not copied there ({error.strerror or error}).",
            "Nothing is left of the bundle. Free some space, or choose another place with -o.",
        ) from error
    return made


def _take_back(folder: Path, made: Iterable[Path]) -> None:
    for place in made:
        place.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _opened(run: RunDir) -> list[dict[str, Any]]:
    """Each time a split was opened, oldest first: which, when, how many problems, and by what.

    Dates are those of the files, in UTC; None for all where copying has evidently changed them.
    """
    selection = []
    if run.metrics_path.is_file():
        rows, _ = read_json_lines(run.metrics_path)
        selection = [row["step"] for row in rows if "eval_accuracy" in row and "step" in row]
    found: list[dict[str, Any]] = [
        {"split": "selection", "by": "metrics.jsonl", "step": step, "date": None}
        for step in selection
    ]
    verdict = verdict_keys(run.path)
    for path in sorted(run.evals_dir.glob("**/evaluation.json")):
        folder = path.parent
        asked = asked_keys(folder)
        settings = (read_object(path).get("evaluation") or {}).get("settings") or {}
        found.append(
            {
                "split": _split_in(folder),
                "by": folder.relative_to(run.path).as_posix(),
                "date": _date(path),
                "problems": len(asked),
                "of_the_verdict": len(asked & verdict),
                "greedy": not settings.get("temperature"),
            }
        )
    for checkpoint in checkpoints.checkpoints_of(run.path):
        found.append({"by": checkpoint.name, "date": _date(checkpoint / "manifest.json"),
                      "step": checkpoints.step_of(checkpoint), "split": None})  # fmt: skip
    if not is_in_order(found, run.metrics_path.with_name("timings.jsonl")):
        for entry in found:
            entry["date"] = None
    return sorted(found, key=lambda entry: (entry["date"] or "", entry["by"]))


def is_in_order(opened: Iterable[Mapping[str, Any]], timings: Path) -> bool:
    """Whether the dates of a run can be those of its making: each thing after what it needs."""
    return not order_faults(opened, timings)


def order_faults(opened: Iterable[Mapping[str, Any]], timings: Path) -> list[tuple[str, str, str]]:
    """Dates that contradict one another, as (what, its date, what it must be)."""
    dates = {
        str(entry.get("by")): datetime.fromisoformat(str(entry["date"]))
        for entry in opened
        if entry.get("date")
    }
    steps = sorted(
        (int(str(name).rpartition("-")[2]), name)
        for name in dates
        if re.fullmatch(r"checkpoint-\d{1,9}", name)
    )
    order: list[str] = [n for n in ("evals/before", "evals/before-sampled") if n in dates]
    order += [name for _, name in steps]
    order += [n for n in ("evals/after", "evals/after-sampled") if n in dates]
    faults: list[tuple[str, str, str]] = []
    for earlier, later in itertools.pairwise(order):
        if dates[later] < dates[earlier]:
            must = f"a date not before that of {earlier}, {_written(dates[earlier])}"
            faults.append((later, _written(dates[later]), must))
    seconds = training_seconds(timings)
    if seconds and "evals/before" in dates and "evals/after" in dates and not faults:
        passed = (dates["evals/after"] - dates["evals/before"]).total_seconds()
        if passed < seconds - 2:
            must = f"a date at least {seconds:.0f} s after evals/before: training took so long"
            faults.append(("evals/after", _written(dates["evals/after"]), must))
    return faults


def training_seconds(timings: Path) -> float:
    """The seconds of all steps that were made, by ``timings.jsonl``."""
    try:
        rows, _ = read_json_lines(timings)
    except OSError:
        return 0.0
    times = [row.get("step_time") for row in rows]
    return sum(time for time in times if isinstance(time, float))


def _date(path: Path) -> str | None:
    try:
        return _written(datetime.fromtimestamp(int(path.stat().st_mtime), UTC))
    except OSError:
        return None


def _written(date: datetime) -> str:
    return date.isoformat().replace("+00:00", "Z")


def _split_in(folder: Path) -> str | None:
    try:
        rollouts: list[Rollout] = read_rollouts(folder / "rollouts.parquet")
    except AbacistError:
        return None
    return rollouts[0].split if rollouts else None
