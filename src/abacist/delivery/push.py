"""Take an export to the Hub, and a run's rollouts as a data set.

What can be refused is refused before anything is measured: no token, a name that is none, a name
that the base's licence forbids, an adapter whose base nobody else has. This was tested against a
stand-in for the Hub and never against the Hub itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from abacist.delivery.licence import Licence
from abacist.errors import AbacistError, RunError, UsageError, first_line
from abacist.policy.source import BUILT_IN
from abacist.records.rundir import RunDir

ROLLOUTS_SUFFIX = "-rollouts"


@dataclass(frozen=True)
class Push:
    """Where an export goes on the Hub; ``rollouts`` says whether its rollouts go too."""

    name: str
    private: bool = False
    rollouts: bool = False


def refuse_unpushable(push: Push) -> None:
    """Raise UsageError without a token, or for a name that the Hub would refuse."""
    try:
        validate_repo_id(push.name)
    except HFValidationError as error:
        raise UsageError(
            f"{push.name!r} cannot be a name on the Hub: {first_line(error)}",
            "Names look like you/Model-name.",
        ) from error
    if not huggingface_hub.get_token():
        raise UsageError(
            "--push_to_hub needs a token, and there is none",
            "Run 'hf auth login' (or set HF_TOKEN), then export again.",
        )


def refuse_by_licence(push: Push, kind: str, licence: Licence) -> None:
    """Raise UsageError for a name that the base's licence forbids, or an adapter of a base that
    others cannot have."""
    licence.refuse_name(push.name)
    if kind == "adapter" and licence.public_base in (None, BUILT_IN):
        raise UsageError(
            "an adapter on the Hub names its base, and this base has no name there",
            "Use --to merged, or say what the base is called with --base_model OWNER/NAME.",
        )


def push_folder(push: Push, folder: Path, api: Any = None) -> str:
    """Upload a finished export and return its address. Raises AbacistError if the Hub refuses."""
    api = api or huggingface_hub.HfApi()
    try:
        url = _made(push, push.name, "model", api)
        api.upload_folder(
            repo_id=push.name,
            folder_path=str(folder),
            repo_type="model",
            commit_message="Export by Abacist",
        )
    except AbacistError:
        raise
    except Exception as error:
        raise _failed(push.name, error, f"The export is whole, in {folder}.") from error
    return str(url)


def push_rollouts(push: Push, run: RunDir, licence: Licence, api: Any = None) -> str:
    """Upload the run's rollouts as a data set called ``NAME-rollouts`` and return its address.

    Raises RunError if the run kept none, AbacistError if the Hub refuses.
    """
    api = api or huggingface_hub.HfApi()
    refuse_no_rollouts(run)
    name = push.name + ROLLOUTS_SUFFIX
    try:
        url = _made(push, name, "dataset", api)
        api.upload_file(
            path_or_fileobj=rollouts_card(run, push.name, licence).encode(),
            path_in_repo="README.md",
            repo_id=name,
            repo_type="dataset",
        )
        api.upload_folder(
            repo_id=name,
            folder_path=str(run.rollouts_dir),
            path_in_repo="data",
            allow_patterns=["*.parquet"],
            repo_type="dataset",
            commit_message="Rollouts, by Abacist",
        )
    except AbacistError:
        raise
    except Exception as error:
        raise _failed(name, error, "The model is there already.") from error
    return str(url)


def _made(push: Push, name: str, kind: str, api: Any) -> Any:
    """Create the repository ``name`` unless it is there; returns its address.

    Raises UsageError if it has to be private and is not: one that exists keeps who may see it.
    """
    url = api.create_repo(name, private=push.private, repo_type=kind, exist_ok=True)
    if push.private and not api.repo_info(name, repo_type=kind).private:
        raise UsageError(
            f"--private: {name} is on the Hub already, for everybody to see; nothing was uploaded "
            "to it",
            "Make it private in its settings there, or push to another name.",
        )
    return url


def refuse_no_rollouts(run: RunDir) -> None:
    """Raise RunError if the run kept no rollouts."""
    if not any(run.rollouts_dir.glob("*.parquet")):
        raise RunError(f"{run.path}: it kept no rollouts to push.", "Leave --push_rollouts out.")


def rollouts_card(run: RunDir, model: str, licence: Licence) -> str:
    """The card of the data set."""
    head: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
        "tags": ["grpo", "gsm8k", "rollouts", "abacist"],
    }
    head |= licence.front_matter()
    return (
        f"---\n{yaml.safe_dump(head)}---\n\n"
        f"# Rollouts of {licence.title(run.run_id)}\n\n"
        f"Every reply that [{model}](https://huggingface.co/{model}) was trained on, with what "
        "each reward paid for it and its advantage, one row a reply: `step`, `problem_id`, "
        "`messages`, `completion`, `read_answer`, `is_correct`, `reward`, `advantage`.\n\n"
        + "\n".join(licence.lines())
        + "\n"
    )


def _failed(name: str, error: Exception, kept: str) -> AbacistError:
    return AbacistError(
        f"{name} was not pushed: {first_line(error)}", f"{kept} Push it again, or by hand with hf."
    )
