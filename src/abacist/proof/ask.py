"""Put one question to a model, in the prompt it was trained with.

A model that learned under one system text and five worked examples answers worse, and in
another format, under another. So what a run recorded about its prompt (``config.yaml`` and
``shots.jsonl``) is used again; any other model gets the default prompt. The reply is read by
the rule that trains and measures, and comes back as the record that training and evaluation
write, so nothing that handles a :class:`Rollout` needs to know where it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from abacist.errors import RunError, UsageError
from abacist.policy.decoding.generation import generate
from abacist.policy.decoding.progress import Progress
from abacist.policy.loading import Policy
from abacist.policy.source import BUILT_IN
from abacist.records.rollout import Rollout
from abacist.records.rundir import RunDir, read_settings
from abacist.records.seen import run_of
from abacist.task.prompts import SYSTEM_PROMPT, Shots, build_messages, load_shots, system_text
from abacist.task.reply import parse_reply

DEFAULT_COMPLETION_TOKENS = 512
SPLIT = "ask"


@dataclass(frozen=True, slots=True)
class Prompting:
    """How a model wants to be asked, and how long its replies may be, in tokens."""

    system_prompt: str | None = SYSTEM_PROMPT
    shots: Shots = field(default_factory=Shots)
    max_completion_tokens: int = DEFAULT_COMPLETION_TOKENS

    @classmethod
    def of(cls, model: str) -> Prompting:
        """What the run recorded that ``model`` is, or is a checkpoint of; else the default.

        The built-in model is asked as its recipe trains it.

        Raises :class:`RunError` if a run is there whose record cannot be read: asked in another
        prompt, the model would be judged for what it was not taught.
        """
        config_path = _config_path(model)
        if config_path is None:
            return cls()
        config = read_settings(config_path)
        tokens = config.get("max_completion_length", DEFAULT_COMPLETION_TOKENS)
        if not isinstance(tokens, int) or tokens < 1:
            raise RunError(
                f"{config_path}: max_completion_length is {tokens!r}, not a number of tokens.",
                "Mend that line.",
            )
        return cls(
            system_text(config.get("system_prompt", "default")),
            _shots(config, config_path.parent),
            tokens,
        )


def run_settings(model: str) -> dict[str, Any]:
    """The settings of the run that ``model`` is, or lies in; {} for other models.

    Raises :class:`RunError` if they cannot be read.
    """
    path = _config_path(model)
    return {} if path is None or model == BUILT_IN else read_settings(path)


def ask(
    policy: Policy,
    question: str,
    prompting: Prompting,
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Rollout]:
    """``num_samples`` replies to ``question``; greedy at temperature 0. ``progress`` is told of
    every token.

    Text in the question that the model would read as a control token is broken up by
    :meth:`Chat.escape`; the messages of the rollouts show what was really asked. Raises
    :class:`UsageError` for an empty question, :class:`ModelError` for one that does not fit
    the model's context.
    """
    if not question.strip():
        raise UsageError("There is no question.", 'Ask one: abacist ask MODEL "How many …?"')
    messages = build_messages(
        policy.chat.escape(question.strip()),
        system_prompt=prompting.system_prompt,
        shots=prompting.shots,
    )
    (completions,) = generate(
        policy,
        [messages],
        max_completion_tokens=prompting.max_completion_tokens,
        temperature=temperature,
        num_samples=num_samples,
        seed=seed,
        progress=progress,
    )
    prompt_tokens = len(policy.chat.encode(messages))
    return [
        Rollout(
            run_id=policy.name,
            step=0,
            split=SPLIT,
            group=0,
            member=member,
            messages=messages,
            completion=completion.text,
            completion_ids=completion.ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(completion.ids),
            stop_reason=completion.stop_reason,
            read_answer=parse_reply(completion.text).answer,
        )
        for member, completion in enumerate(completions)
    ]


def run_folder(model: str) -> Path | None:
    """The folder of the run that ``model`` is, or lies in (a checkpoint, a merged copy); else None.

    A folder with a ``config.yaml`` counts as a run: that is all that asking needs.
    """
    folder = Path(model).expanduser()
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / "config.yaml").is_file():
            return place
    owner = run_of(folder.resolve()) if folder.is_dir() else None
    return owner if owner and (owner / "config.yaml").is_file() else None


def _config_path(model: str) -> Path | None:
    """What says how ``model`` is to be asked, if anything does."""
    if model == BUILT_IN:
        return Path(str(resources.files("abacist"))) / "recipes" / "tiny.yaml"
    run = run_folder(model)
    return None if run is None else run / "config.yaml"


def _shots(config: dict[str, Any], folder: Path) -> Shots:
    if str(config.get("num_shots") or "0") == "0" and not config.get("shots_file"):
        return Shots()
    path = RunDir(folder).shots_path
    if not path.is_file():
        raise RunError(
            f"{folder}: was trained with worked examples in its prompt, and shots.jsonl, which "
            "holds them, is missing.",
            "Copy it from where the run was made.",
        )
    return load_shots(path)
