"""Put questions to a model, each by itself, in the prompt it was trained with.

A model that learned under one system text and five worked examples answers worse, and in
another format, under another. So what a run recorded about its prompt (``config.yaml`` and
``shots.jsonl``) is used again; any other model gets the default prompt. The reply is read by
the rule that trains and measures, and comes back as the record that training and evaluation
write, so nothing that handles a :class:`Rollout` needs to know where it came from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from abacist.errors import RunError, UsageError
from abacist.policy.decoding.generation import Completion, generate
from abacist.policy.decoding.progress import Progress
from abacist.policy.loading import Policy
from abacist.policy.source import BUILT_IN
from abacist.records.rollout import Rollout
from abacist.records.rundir import RunDir
from abacist.records.seen import run_of
from abacist.records.settings import read_settings
from abacist.task.answers import read_answer
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


@dataclass(frozen=True)
class Answers:
    """The replies to one question, and the answer most of them give.

    ``replies`` are records as in training; ``answer`` is the text that the most frequent answer
    was first written as, None where no reply gives one; ``agreement`` is the share of all replies
    that give it. Answers are told apart by value: 19 and 19.0 are one. ``tied`` holds every answer
    that is given as often as the most frequent, itself included: more than one is no majority.
    """

    question: str
    replies: tuple[Rollout, ...]

    def __repr__(self) -> str:
        """One line; the replies are in ``replies``."""
        count = len(self.replies)
        if count == 1:
            return f"<Answers: {self.answer!r}>"
        votes = next(iter(self.votes.values()), 0)
        tie = f", tied with {len(self.tied) - 1} more" if len(self.tied) > 1 else ""
        return f"<Answers: {self.answer!r} ({votes} of {count} replies{tie})>"

    @cached_property
    def votes(self) -> dict[str, int]:
        """How many replies give each answer, the most frequent first, then by first appearance."""
        written: dict[object, str] = {}
        counts: Counter[str] = Counter()
        for reply in self.replies:
            if reply.read_answer is not None:
                number = read_answer(reply.read_answer)
                key = reply.read_answer.strip() if number is None else number
                counts[written.setdefault(key, reply.read_answer)] += 1
        return dict(counts.most_common())

    @property
    def answer(self) -> str | None:
        return next(iter(self.votes), None)

    @property
    def agreement(self) -> float:
        return next(iter(self.votes.values()), 0) / len(self.replies)

    @property
    def tied(self) -> tuple[str, ...]:
        most = max(self.votes.values(), default=0)
        return tuple(answer for answer, votes in self.votes.items() if votes == most)


def sampling_temperature(given: float | None, num_samples: int) -> float:
    """The temperature: 0, greedy, for one reply and 1 for several, unless one is ``given``.

    Raises UsageError for several greedy replies, which would all be the same, and for what is no
    temperature.
    """
    if given is None:
        return 0.0 if num_samples == 1 else 1.0
    if not 0 <= given < math.inf:
        raise UsageError(f"a temperature of {given} is not a number of at least 0")
    if given == 0 and num_samples > 1:
        raise UsageError(
            "several replies at --temperature 0 would all be the same",
            "Leave --temperature out, or ask for one reply.",
        )
    return float(given)


def ask(
    policy: Policy,
    question: str,
    prompting: Prompting,
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    wrote: Callable[[str], None] | None = None,
) -> list[Rollout]:
    """``num_samples`` replies to ``question``; greedy at temperature 0. ``progress`` is told of
    every token, and so is ``wrote``, of one reply only: the text so far.

    Text in the question that the model would read as a control token is broken up by
    :meth:`Chat.escape`; the messages of the rollouts show what was really asked. Raises
    :class:`UsageError` for an empty question, :class:`ModelError` for one that does not fit
    the model's context.
    """
    (rollouts,) = ask_each(
        policy, [question], prompting, temperature=temperature, num_samples=num_samples, seed=seed,
        progress=progress, wrote=wrote,
    )  # fmt: skip
    return rollouts


def ask_each(
    policy: Policy,
    questions: Sequence[str],
    prompting: Prompting,
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
    wrote: Callable[[str], None] | None = None,
    answered: Callable[[int, list[Rollout]], None] | None = None,
) -> list[list[Rollout]]:
    """:func:`ask` of several questions, each by itself; ``batch_size`` replies at a time.

    ``answered`` is called with the number of a question and its replies soon after they have ended,
    in no particular order, and perhaps twice. A question that is empty or does not fit is refused
    before anything is asked.
    """
    for question in questions:
        if not question.strip():
            raise UsageError("There is no question.", 'Ask one: abacist ask MODEL "How many …?"')
    conversations = [
        build_messages(
            policy.chat.escape(question.strip()),
            system_prompt=prompting.system_prompt,
            shots=prompting.shots,
        )
        for question in questions
    ]

    def rollouts(number: int, completions: Sequence[Completion]) -> list[Rollout]:
        messages = conversations[number]
        prompt_tokens = len(policy.chat.encode(messages))
        return [
            Rollout(
                run_id=policy.name,
                step=0,
                split=SPLIT,
                group=number,
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

    def ended(number: int, completions: list[Completion]) -> None:
        if answered is not None:
            answered(number, rollouts(number, completions))

    found = generate(
        policy,
        conversations,
        max_completion_tokens=prompting.max_completion_tokens,
        temperature=temperature,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        ended=None if answered is None else ended,
        wrote=wrote,
    )
    return [rollouts(number, completions) for number, completions in enumerate(found)]


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
    path, wanted = RunDir(folder).shots_path, config.get("num_shots")
    if str(wanted or "0") == "0" and not config.get("shots_file"):
        return Shots()
    if not path.is_file():
        if str(wanted) == "0":  # none of the file was asked for
            return Shots()
        raise RunError(
            f"{folder}: was trained with worked examples in its prompt, and shots.jsonl, which "
            "holds them, is missing.",
            "Copy it from where the run was made.",
        )
    return load_shots(path)
