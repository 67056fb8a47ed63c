"""``import_gist``: a training script of another project becomes a configuration of ours.

The script is read, not run: ``take_apart`` finds what it is made of, the settings that have a
counterpart are carried over, and everything else is named with its line. The configuration is
checked by the very reader that ``abacist train`` uses before anything is written.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from abacist.delivery.importing.defects import CHANGED_DEFAULTS, is_given, note_defects
from abacist.delivery.importing.notes import Draft, Kind, Note, Setting
from abacist.delivery.importing.reward_settings import reward_settings
from abacist.delivery.importing.script import take_apart
from abacist.delivery.importing.scriptfile import ScriptFile, read_script
from abacist.delivery.importing.settings import lora_settings, model_settings, training_settings
from abacist.delivery.importing.task_settings import data_settings, prompt_settings
from abacist.errors import DataError, RunError, UsageError
from abacist.records.rundir import write_aside

_ORDER = (
    "model_name_or_path", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules", "dataset_name", "dataset_config", "dataset_train_split",
    "question_column", "answer_column", "num_train_problems", "system_prompt", "num_shots",
    "shots_file", "reward_funcs", "reward_weights", "allow_hackable_rewards",
)  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """What a script became.

    ``settings`` are in the order in which they are written. ``files`` are written beside the
    configuration, by the end of their names.
    """

    script: ScriptFile
    settings: dict[str, Setting]
    notes: list[Note]
    files: dict[str, str]

    def of_kind(self, kind: Kind) -> list[Note]:
        """The notes of one kind, in the order of their lines."""
        found = [note for note in self.notes if note.kind is kind]
        return sorted(found, key=lambda note: note.line or 0)

    def text_for(self, config: Path) -> str:
        """The configuration as YAML, to be written to ``config``."""
        head = (
            f"# From {_one_line(self.script.path.name)}, by `abacist import-gist`.\n"
            f"# Train: abacist train --config {_one_line(config.name)}\n"
        )
        return head + "".join(
            _yaml_line(name, self._placed(name, setting.value, config), self._comment(setting))
            for name, setting in self.settings.items()
        )

    def paths_for(self, config: Path) -> dict[Path, str]:
        """Every file that belongs to a configuration at ``config``, with its text."""
        texts = {config: self.text_for(config)}
        return texts | {_beside(config, end): text for end, text in self.files.items()}

    def write(self, config: Path, *, overwrite: bool = False) -> list[Path]:
        """Write the configuration and what belongs to it; returns the paths.

        Raises RunError where one of them exists and ``overwrite`` is not set, or cannot be written.
        """
        texts = self.paths_for(config)
        if taken := [path for path in texts if path.exists()]:
            is_ours = all(path.is_file() for path in taken)
            if not overwrite or not is_ours or self.script.path.resolve() in map(_resolved, taken):
                raise RunError(
                    f"{taken[0]} exists already.",
                    "Write elsewhere with -o FILE, or over it with --overwrite.",
                )
        written: list[Path] = []
        try:
            for path, text in reversed(texts.items()):  # the configuration last: it names the rest
                new = not path.exists()
                write_aside(path, text.encode("utf-8", "backslashreplace"))
                written += [path] if new else []
        except OSError as error:
            for other in written:
                other.unlink(missing_ok=True)
            raise RunError(f"{path} cannot be written: {error.strerror}.", "Choose -o FILE.") from (
                error
            )
        return list(texts)

    def _placed(self, name: str, value: Any, config: Path) -> Any:
        """Names of files beside the configuration as whole paths: it may be used from anywhere."""
        if name == "shots_file":
            return str(_beside(config, value))
        if name == "reward_funcs":
            return [
                str(_beside(config, one)) if one.startswith("_rewards.py:") else one
                for one in value
            ]
        return value

    def _comment(self, setting: Setting) -> str:
        where = self.script.where(setting.line) if setting.line else ""
        return ", ".join(part for part in (where, setting.why) if part)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "script": str(self.script.path),
            "settings": {
                name: {"value": one.value, "line": one.line, "why": one.why}
                for name, one in self.settings.items()
            },
            "notes": [
                {"kind": note.kind.name.lower(), "line": note.line, "text": note.text,
                 "where": self.script.where(note.line)}
                for note in self.notes
            ],
        }  # fmt: skip


def import_gist(
    path: Path,
    *,
    faithful: bool = False,
    model: str | None = None,
    dataset: str | None = None,
) -> Imported:
    """Read a script or notebook that trains with TRL's GRPOTrainer.

    ``faithful`` keeps the script's rewards as they are, defects included, and its prompt. ``model``
    and ``dataset`` are taken instead of the script's.

    Raises DataError for a file that cannot be read as Python 3, UsageError for a script that is no
    GRPO training, or holds something without which there is no run (line included).
    """
    file = read_script(path)
    try:
        return _imported(file, faithful, model, dataset)
    except RecursionError:
        raise DataError(
            f"{path} is nested too deeply to be read.", "Cut it to the part that trains."
        ) from None


def _imported(file: ScriptFile, faithful: bool, model: str | None, dataset: str | None) -> Imported:
    from dataclasses import fields

    from trl import GRPOConfig

    script = take_apart(file)
    draft = Draft()
    # Abacist's own settings (overwrite, force, …) are no script's to give.
    training_settings(script, {one.name for one in fields(GRPOConfig)}, draft)
    lora_settings(script, draft, faithful=faithful)
    model_settings(script, draft, model=model)
    if "model_name_or_path" not in draft.settings:
        why = getattr(script.model, "why", "cannot be told from the text")
        line = getattr(script.model, "line", script.model_line) or script.model_line
        raise UsageError(
            f"{file.path}, {file.where(line)}: which model is trained {why}.",
            "Give it: --model_name_or_path NAME.",
        )
    data_settings(script, draft, dataset=dataset)
    tags = prompt_settings(script, draft, faithful=faithful)
    seen = reward_settings(script, tags, draft, faithful=faithful)
    if faithful and script.config is not None:
        for name, (then, _) in CHANGED_DEFAULTS.items():
            if not is_given(script, name):
                draft.set(name, then, script.config.line, "TRL's default when it was written")
    note_defects(script, seen, draft)
    draft.set("keep_rollouts", True, None, "every reply can be read afterwards")
    first = {name: draft.settings[name] for name in _ORDER if name in draft.settings}
    found = Imported(file, first | draft.settings, draft.notes, draft.files)
    _check(found)
    return found


def _check(found: Imported) -> None:
    """Have ``abacist train``'s own reader take the configuration. Raises UsageError, with lines."""
    from abacist.learning.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(found.text_for(config), encoding="utf-8", errors="backslashreplace")
        try:
            load_config(None, str(config), [])
        except UsageError as error:
            named = [
                f"{name}, {found.script.where(one.line)}"
                for name, one in found.settings.items()
                if one.line and name in error.message
            ]
            where = f" ({'; '.join(named)})" if named else ""
            message = error.message.replace(f" ({config.name})", "").replace(str(config), "")
            raise UsageError(
                f"{found.script.path}: this cannot be trained{where}: {message}", error.hint
            ) from error


def _beside(config: Path, end: str) -> Path:
    return config.absolute().with_name(config.stem + end)


def _resolved(path: Path) -> Path:
    return path.resolve()


def _one_line(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text)


def _yaml_line(name: str, value: Any, comment: str) -> str:
    remark = f"  # {_one_line(comment)}" if comment else ""
    if isinstance(value, str) and "\n" in value:
        literal = yaml.ScalarNode("tag:yaml.org,2002:str", value, style="|")
        key = yaml.ScalarNode("tag:yaml.org,2002:str", name)
        block = yaml.serialize(
            yaml.MappingNode("tag:yaml.org,2002:map", [(key, literal)]),
            allow_unicode=True, width=10**9,
        )  # fmt: skip
        return f"#{remark.removeprefix('  #')}\n{block}" if remark else block
    text = yaml.safe_dump(value, allow_unicode=True, width=10**9, default_flow_style=True)
    return f"{name}: {text.removesuffix('...' + chr(10)).strip()}{remark}\n"
