"""Put problems to a policy and grade what it replies.

The prompt, the answer rule and the rewards are those of training: what is measured here is what
is paid there. The result is an :class:`~abacist.proof.evaluation.Evaluation`, which knows its
figures; this file only asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from abacist.errors import DataError, ModelError
from abacist.policy.decoding.progress import Decoded, Progress
from abacist.proof.evaluation import Evaluation, Settings
from abacist.proof.unfinished import Parts
from abacist.records.rollout import Rollout
from abacist.task.answers import same_answer
from abacist.task.problems import Problem
from abacist.task.prompts import Message, Shots, build_messages
from abacist.task.reply import parse_reply
from abacist.task.rewards import load_reward_funcs

if TYPE_CHECKING:  # the proof floor reads and compares kept evaluations without torch
    from abacist.policy.decoding.generation import Completion
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
    progress: Progress | None = None,
    run_id: str = "",
    split: str = "heldout",
    step: int = 0,
    generate: Callable[..., list[list[Completion]]] | None = None,
    native_messages: Callable[[Problem], list[Message]] | None = None,
    conditions: Mapping[str, str] | None = None,
    parts: Parts | None = None,
) -> Evaluation:
    """Ask every problem ``num_samples`` times and grade the replies.

    ``temperature`` 0 is greedy. ``prefill`` opens every reply and counts as part of it.
    ``progress`` is told how far it is, after every token where that is known. ``run_id``, ``split``
    and ``step`` go into the rollouts, ``conditions`` into the evaluation. ``generate`` stands in
    for :func:`abacist.policy.decoding.generation.generate`, ``native_messages`` for our own prompt.
    With ``parts`` replies are kept as they come, and those already kept there are not asked for
    again.

    Raises DataError for no problems, two under one id or text that would be control tokens,
    ModelError for a prompt and budget that exceed the context, and whatever ``generate`` raises.
    """
    _refuse_unusable(problems)
    if generate is None:
        from abacist.policy.decoding import generation as decoding

        generate = decoding.generate

    def ours(problem: Problem) -> list[Message]:
        return build_messages(
            problem.question,
            system_prompt=system_prompt,
            shots=shots,
            problem_id=problem.problem_id,
        )

    conversations = [(native_messages or ours)(problem) for problem in problems]
    prompt_lengths = [len(policy.chat.encode(asked, prefill=prefill)) for asked in conversations]
    if parts is not None:  # hours may pass before the part with the longest prompt
        _refuse_too_long(policy, problems, prompt_lengths, max_completion_tokens)
    kept = {} if parts is None else parts.read()
    waiting = [at for at, problem in enumerate(problems) if problem.problem_id not in kept]
    done = Decoded.all_ended(
        [reply.completion_tokens for replies in kept.values() for reply in replies],
        max_completion_tokens,
    )

    def keep(number: int, group: Sequence[Completion]) -> None:
        """Grade all replies to one of the waiting problems; those known already stay."""
        at = waiting[number]
        problem = problems[at]
        if problem.problem_id in kept:
            return
        gold = problem.answer or None
        paid = _pay(conversations[at], [completion.text for completion in group], gold)
        rollouts = []
        for member, completion in enumerate(group):
            answer = parse_reply(completion.text).answer
            rewards = paid[member]
            rollouts.append(
                Rollout(
                    run_id=run_id,
                    step=step,
                    split=split,
                    group=at,
                    member=member,
                    messages=conversations[at],
                    completion=completion.text,
                    completion_ids=completion.ids,
                    prompt_tokens=prompt_lengths[at],
                    completion_tokens=len(completion.ids),
                    stop_reason=completion.stop_reason,
                    problem_id=problem.problem_id,
                    difficulty=problem.difficulty,
                    gold=gold,
                    read_answer=answer,
                    is_correct=None if gold is None else same_answer(answer, gold),
                    rewards=rewards,
                    reward=sum(value for value in rewards.values() if value is not None),
                )
            )
        kept[problem.problem_id] = rollouts
        if parts is not None:
            parts.keep(rollouts)

    if waiting:
        try:
            completions = generate(
                policy,
                [conversations[at] for at in waiting],
                max_completion_tokens=max_completion_tokens,
                temperature=temperature,
                num_samples=num_samples,
                batch_size=batch_size,
                prefill=prefill,
                seed=seed,
                progress=_behind(progress, done),
                ended=None if parts is None else keep,
            )
            for number, group in enumerate(completions):
                keep(number, group)
        finally:  # also where it is interrupted
            if parts is not None:
                parts.flush()
    settings = Settings(
        max_completion_tokens=max_completion_tokens,
        num_samples=num_samples,
        temperature=temperature,
        system_prompt=system_prompt,
        num_shots=len(shots),
        prefill=prefill,
        seed=seed,
        native_prompt=native_messages is not None,
    )
    replies = [rollout for problem in problems for rollout in kept[problem.problem_id]]
    return Evaluation(tuple(problems), tuple(replies), settings, dict(conditions or {}))


def _behind(progress: Progress | None, done: Decoded) -> Progress | None:
    """``progress`` of what is still to do, told as that of the whole."""
    if progress is None:
        return None
    return lambda rest: progress(rest.after(done))


def _refuse_unusable(problems: Sequence[Problem]) -> None:
    if not problems:
        raise DataError("There are no problems to evaluate on.", "Give at least one.")
    problem_id, count = Counter(problem.problem_id for problem in problems).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{count} problems have the id {problem_id!r}; results could not be told apart.",
            "Give every problem an id of its own.",
        )


def _refuse_too_long(
    policy: Policy, problems: Sequence[Problem], prompt_lengths: Sequence[int], budget_tokens: int
) -> None:
    tokens, at = max((tokens, at) for at, tokens in enumerate(prompt_lengths))
    if tokens + budget_tokens > policy.context_tokens:
        raise ModelError(
            f"Problem {problems[at].problem_id} has a prompt of {tokens} tokens; with the "
            f"{budget_tokens} of --max_completion_length that exceeds the model's context of "
            f"{policy.context_tokens}.",
            "Lower --max_completion_length or --num_shots.",
        )


def _pay(asked: list[Message], texts: list[str], gold: str | None) -> list[dict[str, float | None]]:
    """What each of the five rewards pays for each reply to one problem, by the reward's name."""
    paid: list[dict[str, float | None]] = [{} for _ in texts]
    prompts, golds = [asked] * len(texts), [gold] * len(texts)
    for reward in load_reward_funcs(["default"]):
        for row, value in zip(paid, reward(prompts, texts, answer=golds), strict=True):
            row[reward.__name__] = value
    return paid
