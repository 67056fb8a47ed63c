"""Which questions a run has seen, so that no evaluation takes them for new.

``seen.json`` is written when a run begins. It holds hashes of the normalised questions (case,
spacing and Unicode composition do not count), so it works without the data file, whatever that
file is called later, and gives no question away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abacist.errors import RunError
from abacist.records.provenance import MANIFEST_FORMAT
from abacist.records.rundir import write_json
from abacist.task.rows import normalise_question

SEEN_NAME = "seen.json"
SEEN_FORMAT, SEEN_VERSION = "abacist-seen", 1
TRAIN, SELECTION, EXAMPLE = "train", "selection", "example"
KINDS = (TRAIN, SELECTION, EXAMPLE)
_KEY_CHARACTERS = 16


def question_key(question: str) -> str:
    """The first 16 hex digits of the SHA-256 of the normalised question.

    >>> question_key("How  many eggs?") == question_key("how many EGGS? ")
    True
    """
    text = normalise_question(question).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:_KEY_CHARACTERS]


@dataclass(frozen=True)
class Seen:
    """Keys of the questions a run has seen, by kind: ``train`` (its training data, whether or not
    each was drawn), ``selection`` (measured during training) and ``example`` (shown in prompts).

    ``is_complete`` is False where the record was pieced together and may lack some.
    """

    keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    is_complete: bool = True

    @classmethod
    def of(
        cls,
        train: Iterable[str] = (),
        selection: Iterable[str] = (),
        examples: Iterable[str] = (),
        *,
        is_complete: bool = True,
    ) -> Seen:
        """Made of the questions themselves."""
        kinds = zip(KINDS, (train, selection, examples), strict=True)
        keys = {kind: frozenset(map(question_key, questions)) for kind, questions in kinds}
        return cls(keys, is_complete)

    def kind_of(self, question: str) -> str | None:
        """Which of :data:`KINDS` the question is of, the first that fits; None if it is new."""
        key = question_key(question)
        return next((kind for kind in KINDS if key in self.keys.get(kind, ())), None)

    def __or__(self, other: Seen) -> Seen:
        both = {
            kind: self.keys.get(kind, frozenset()) | other.keys.get(kind, frozenset())
            for kind in KINDS
        }
        return Seen(both, self.is_complete and other.is_complete)

    def write(self, folder: Path) -> None:
        """Keep it as ``seen.json`` in ``folder``."""
        kinds = {kind: sorted(self.keys.get(kind, ())) for kind in KINDS}
        head = {"format": SEEN_FORMAT, "format_version": SEEN_VERSION}
        write_json(folder / SEEN_NAME, {**head, "is_complete": self.is_complete, **kinds})

    @classmethod
    def read(cls, folder: Path) -> Seen | None:
        """What :meth:`write` kept in ``folder``; None if there is no such file of ours.

        Raises RunError if it is damaged or of a newer Abacist.
        """
        path = folder / SEEN_NAME
        hint = "Remove that file: what was seen is then read from the run's data and rollouts."
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: damaged ({error}).", hint) from error
        if not isinstance(document, dict) or document.get("format") != SEEN_FORMAT:
            return None
        if document.get("format_version") != SEEN_VERSION:
            raise RunError(
                f"{path}: of format {document.get('format_version')}, this Abacist reads format "
                f"{SEEN_VERSION}.",
                "Use the Abacist that wrote it, or a newer one.",
            )
        kinds = {kind: document.get(kind) for kind in KINDS}
        keys = {
            kind: frozenset(found)
            for kind, found in kinds.items()
            if isinstance(found, list) and all(isinstance(key, str) for key in found)
        }
        if keys.keys() != kinds.keys():
            raise RunError(f"{path}: damaged (a list of questions is missing).", hint)
        return cls(keys, document.get("is_complete") is True)


def run_of(folder: Path) -> Path | None:
    """``folder`` itself if it holds a record, else the run that it is or lies in, if any."""
    if Seen.read(folder) is not None:
        return folder
    for place in (folder, *folder.parents):
        if read_object(place / "manifest.json").get("format") == MANIFEST_FORMAT:
            return place
    return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
