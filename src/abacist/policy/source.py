"""Find the files of a model: the built-in one, a folder, or a Hub id. Refuse early, with a hint.

The rest of the program loads every model from one local folder. A Hub id is looked up with a short
deadline first, because the libraries retry an unreachable Hub for half a minute. Then it is
downloaded into the Hub's own cache. Only safetensors are downloaded or read; nothing is unpickled.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from abacist.errors import ModelError
from abacist.task.hub import fault

BUILT_IN = "tiny"
BUILT_IN_FOLDER = Path(str(importlib.resources.files("abacist.policy"))) / "tiny"
_IN_AN_INSTALLATION = ("abacist", "policy", "tiny")
HUB_DEADLINE_SECONDS = 5.0

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_UNWANTED = ["*/*", "consolidated*"]  # other precisions and formats of the same weights
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_SETTINGS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = {  # but files of a run beside them
    "training_args.bin", "optimizer.pt", "scheduler.pt", "grpo_state.pt", "rng_state.pth",
}  # fmt: skip
_ELSEWHERE = "Or name a local folder, or the built-in 'tiny'."


@dataclass(frozen=True)
class Source:
    """A model that was found; ``portable_name`` finds it again, on other machines if possible."""

    name: str
    folder: Path
    portable_name: str
    is_adapter: bool

    def __str__(self) -> str:
        inside = "" if Path(self.name) == self.folder else f" ({self.folder})"
        return f"'{self.name}'{inside}"

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / file).exists() for file in _TOKENIZER_FILES)


def find(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find ``name``: ``tiny``, a folder, or a Hub id, which is downloaded if necessary.

    The built-in comes before a folder of the same name (write ``./tiny`` for the folder), and a
    folder before a Hub id. Raises :class:`ModelError` within seconds if there is no such model, if
    it cannot be reached, or if it has no files that can be loaded.
    """
    if name == BUILT_IN:
        # Other libraries find it by its folder only.
        folder, portable = BUILT_IN_FOLDER, str(BUILT_IN_FOLDER)
        if not (folder / "config.json").exists():
            raise ModelError(
                f"The built-in model is missing from this installation ({folder}).",
                "Install abacist again, or remake the model (see CONTRIBUTING).",
            )
    elif name and (local := Path(name).expanduser()).exists():
        folder, portable = local, str(local.resolve())
    elif not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"There is no folder '{name}'.", "Check the path. " + _ELSEWHERE)
    else:
        folder, portable = _from_hub(name, revision, trust_remote_code), name
    return Source(name, folder, portable, _check_files(name, folder))


def is_built_in(name: str) -> bool:
    """Whether an adapter's base of this name is the built-in model: by its name, or by its folder
    in an installation, be that here or on the machine where the adapter was trained.

    PEFT and transformers know folders and Hub ids only, so adapters of ours name the folder.
    """
    path = Path(name)
    return name == BUILT_IN or path == BUILT_IN_FOLDER or path.parts[-3:] == _IN_AN_INSTALLATION


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``, or a :class:`ModelError` naming it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "The copy is damaged.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object.", "The copy is damaged.")
    return content


def _check_files(name: str, folder: Path) -> bool:
    """Whether ``folder`` holds an adapter (else a model). Raises if it holds neither completely."""
    if not folder.is_dir():
        raise ModelError(f"'{name}' is a file.", "Name the folder that holds config.json.")
    is_adapter = (folder / "adapter_config.json").exists()
    if not is_adapter and not (folder / "config.json").exists():
        inside = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        raise ModelError(
            f"'{name}' is not a model: {folder} has neither config.json nor adapter_config.json.",
            f"Did you mean {inside[-1]}?" if inside else "Name a Hugging Face model folder.",
        )
    for file in _SETTINGS:
        if (folder / file).exists():
            read_json(folder / file)  # transformers ignores some that it cannot read
    expected = _expected_weights(folder, is_adapter)
    missing = [file for file in expected if not (folder / file).exists()]
    if not missing:
        return is_adapter
    pickles = {path.name for pattern in _PICKLES for path in folder.glob(pattern)}
    if pickles - _NO_WEIGHTS:
        raise ModelError(
            f"'{name}' has pickled weights only, and {missing[0]} is missing. Pickles can run "
            "code when they are read, so they are refused.",
            "Use a copy saved as safetensors, or convert this one where you trust it: "
            "model.save_pretrained(folder).",
        )
    raise ModelError(
        f"'{name}' is incomplete: {', '.join(missing[:3])} missing in {folder}.",
        "Download it again; the download or copy was not finished.",
    )


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, dtype as safetensors calls it (``BF16``) and shape of each weight of a base model.

    Reads the headers of the files that the weights are loaded from. Raises SafetensorError or
    OSError for a damaged file.
    """
    for file in _expected_weights(folder, is_adapter=False):
        with safe_open(folder / file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_slice(name)
                yield name, tensor.get_dtype(), tensor.get_shape()


def _expected_weights(folder: Path, is_adapter: bool) -> list[str]:
    if is_adapter:
        return ["adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted({str(file) for file in read_json(index).get("weight_map", {}).values()})


def _from_hub(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    patterns = [*_WANTED, "*.py"] if trust_remote_code else _WANTED

    def fetch(**options: Any) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_UNWANTED,
            etag_timeout=HUB_DEADLINE_SECONDS,
            **options,
        )
        return Path(folder)

    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_DEADLINE_SECONDS)
    except Exception as error:  # unreachable: use what was downloaded before
        try:
            return fetch(local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            raise _hub_error(name, revision, error) from error
    try:
        return fetch()
    except Exception as error:
        raise _hub_error(name, revision, error) from error


def _hub_error(name: str, revision: str | None, error: Exception) -> ModelError:
    message, hint = fault(error, name, "model", revision)
    return ModelError(message, f"{hint} {_ELSEWHERE}")
