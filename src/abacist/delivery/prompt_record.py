"""How an export is to be asked: a run's own record of its prompt, without what names a machine.

A run says how it is asked in ``config.yaml`` and ``shots.jsonl``, and what it has seen in
``seen.json``; ``abacist ask``, ``eval`` and ``train`` read them. An export carries the same files,
so the same code reads them there: of the settings those of prompt, budget and data.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from abacist.policy.chat import Chat
from abacist.proof.ask import Prompting
from abacist.records.rundir import RunDir, write_aside
from abacist.records.seen import SEEN_NAME
from abacist.task.problems import MADE_HERE
from abacist.task.prompts import save_shots
from abacist.task.rewards import is_built_in_name

_PROMPT = ("system_prompt", "max_completion_length")
_DATA = (
    "dataset_config", "dataset_train_split", "dataset_test_split", "question_column",
    "answer_column", "decimal_mark", "skip_bad_rows", "num_heldout_problems",
)  # fmt: skip


def portable_settings(settings: Mapping[str, Any], prompting: Prompting) -> dict[str, Any]:
    """Of a run's settings those that say how it is asked and on what, without local paths."""
    kept = {name: settings[name] for name in _PROMPT if name in settings}
    kept["num_shots"], kept["shots_file"] = str(len(prompting.shots)), None
    if settings.get("num_shots") == "gist":
        kept["num_shots"] = "gist"
    source = settings.get("dataset_name")
    if isinstance(source, str) and not is_local(source):
        kept |= {"dataset_name": source}
        kept |= {name: settings[name] for name in _DATA if name in settings}
    rewards = settings.get("reward_funcs")
    if isinstance(rewards, list) and all(map(is_built_in_name, rewards)):
        kept["reward_funcs"] = rewards
    return kept


def is_local(name: str) -> bool:
    """Whether a model or data set is named by a path, which means nothing elsewhere."""
    if name in MADE_HERE:
        return False
    return name[:1] in "./~" or "\\" in name or name.count("/") > 1 or Path(name).exists()


def write_prompt_record(
    folder: Path, run: RunDir, settings: Mapping[str, Any], prompting: Prompting
) -> None:
    """Put into ``folder`` what says how the model there is asked, as a run of ours says it."""
    text = "# How this model was trained to be asked: read by `abacist ask`, `eval` and `train`.\n"
    text += yaml.safe_dump(portable_settings(settings, prompting), allow_unicode=True)
    write_aside(folder / "config.yaml", text.encode("utf-8", "backslashreplace"))
    if prompting.shots:
        save_shots(folder / "shots.jsonl", prompting.shots)
    if (run.path / SEEN_NAME).is_file():
        shutil.copyfile(run.path / SEEN_NAME, folder / SEEN_NAME)


def prompt_facts(chat: Chat, prompting: Prompting) -> dict[str, Any]:
    """The same for machines that do not know us: texts, ids and numbers."""
    return {
        "system_prompt": prompting.system_prompt,
        "num_shots": len(prompting.shots),
        "date_string": chat.date_string,
        "chat_template_kwargs": chat.chat_template_kwargs,
        "stop_token_ids": list(chat.stop_ids),
        "stop_tokens": stop_texts(chat),
        "pad_token_id": chat.pad_id,
        "max_completion_tokens": prompting.max_completion_tokens,
    }


def stop_texts(chat: Chat) -> list[str]:
    """The texts of the tokens that end a reply."""
    texts = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))
    return [text for text in texts if text is not None]
