"""Put problems to a policy and grade what it replies.

The prompt, the answer rule and the rewards are those of training: what is measured here is what
is paid there. The result is an :class:`~abacist.proof.evaluation.Evaluation`, which knows its
figures; this file only asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from abacist.errors import DataError
from abacist.proof.evaluation import Evaluation, Settings
from abacist.records.rollout import Rollout
from abacist.task.answers import same_answer
from abacist.task.problems import Problem
from abacist.task.prompts import Message, Shots, build_messages
from abacist.task.reply import parse_reply
from abacist.task.rewards import load_reward_funcs

if TYPE_CHECKING:  # the proof floor reads and compares kept evaluations without torch
    from abacist.policy.decoding import Completion
    from abacist.policy.loading import Policy

__all__ = ["Evaluation", "Settings", "evaluate"]


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    system_prompt: str | None = None,
    shots: Shots | Sequence[Problem] = (),
    max_completion_tokens: int,
    num_samples: int = 1,
    temperature: float = 0.0,
    batch_size: int = 64,
    prefill: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    run_id: str = "",
    split: str = "heldout",
    step: int = 0,
    generate: Callable[..., list[list[Completion]]] | None = None,
) -> Evaluation:
    """Ask every problem ``num_samples`` times and grade the replies.

    ``temperature`` 0 is greedy. ``prefill`` opens every reply and counts as part of it.
    ``progress`` is called with (replies done, replies in all). ``run_id``, ``split`` and ``step``
    go into the rollouts. ``generate`` stands in for :func:`abacist.policy.decoding.generate`.

    Raises DataError for no problems or two under one id, and whatever ``generate`` raises.
    """
    _refuse_unusable(problems)
    if generate is None:
        from abacist.policy import decoding

        generate = decoding.generate
    conversations = [
        build_messages(
            problem.question,
            system_prompt=system_prompt,
            shots=shots,
            problem_id=problem.problem_id,
        )
        for problem in problems
    ]
    completions = generate(
        policy,
        conversations,
        max_completion_tokens=max_completion_tokens,
        temperature=temperature,
        num_samples=num_samples,
        batch_size=batch_size,
        prefill=prefill,
        seed=seed,
        progress=progress,
    )
    prompt_lengths = [len(policy.chat.encode(asked, prefill=prefill)) for asked in conversations]
    texts = [completion.text for group in completions for completion in group]
    golds = [problem.answer for problem in problems for _ in range(num_samples)]
    prompts = [asked for asked in conversations for _ in range(num_samples)]
    paid = _pay(prompts, texts, golds)

    rollouts: list[Rollout] = []
    for group, problem in enumerate(problems):
        for member, completion in enumerate(completions[group]):
            answer = parse_reply(completion.text).answer
            rewards = paid[len(rollouts)]
            rollouts.append(
                Rollout(
                    run_id=run_id,
                    step=step,
                    split=split,
                    group=group,
                    member=member,
                    messages=conversations[group],
                    completion=completion.text,
                    completion_ids=completion.ids,
                    prompt_tokens=prompt_lengths[group],
                    completion_tokens=len(completion.ids),
                    stop_reason=completion.stop_reason,
                    problem_id=problem.problem_id,
                    difficulty=problem.difficulty,
                    gold=problem.answer,
                    read_answer=answer,
                    is_correct=same_answer(answer, problem.answer),
                    rewards=rewards,
                    reward=sum(value for value in rewards.values() if value is not None),
                )
            )
    settings = Settings(
        max_completion_tokens=max_completion_tokens,
        num_samples=num_samples,
        temperature=temperature,
        system_prompt=system_prompt,
        num_shots=len(shots),
        prefill=prefill,
        seed=seed,
    )
    return Evaluation(tuple(problems), tuple(rollouts), settings)


def _refuse_unusable(problems: Sequence[Problem]) -> None:
    if not problems:
        raise DataError("There are no problems to evaluate on.", "Give at least one.")
    problem_id, count = Counter(problem.problem_id for problem in problems).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{count} problems have the id {problem_id!r}; results could not be told apart.",
            "Give every problem an id of its own.",
        )


def _pay(
    prompts: list[list[Message]], texts: list[str], golds: list[str]
) -> list[dict[str, float | None]]:
    """What each of the five rewards pays for each reply, by the reward's name."""
    paid: list[dict[str, float | None]] = [{} for _ in texts]
    for reward in load_reward_funcs(["default"]):
        for row, value in zip(paid, reward(prompts, texts, answer=golds), strict=True):
            row[reward.__name__] = value
    return paid
