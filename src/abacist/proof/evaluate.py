"""Put problems to a policy and grade what it replies.

The prompt and the answer rule are those of training, and the rewards those that the caller names.
The result is an :class:`~abacist.proof.evaluation.Evaluation`, which derives the figures; this file
only asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from abacist.errors import AbacistError, DataError, ModelError
from abacist.policy.decoding.progress import Decoded, Progress
from abacist.proof.evaluation import Evaluation, Settings
from abacist.proof.unfinished import Parts
from abacist.records.rollout import Rollout
from abacist.task.answers import same_answer
from abacist.task.custom_rewards import RewardFunc
from abacist.task.gist import gist_gold
from abacist.task.problems import Problem
from abacist.task.prompts import Message, Shots, build_messages
from abacist.task.reply import parse_reply
from abacist.task.rewards import REWARD_SETS, load_reward_funcs, pay

if TYPE_CHECKING:  # the proof layer reads and compares kept evaluations without torch
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
    rewards: Sequence[RewardFunc] | None = None,
    reward_weights: Sequence[float] | None = None,
    conditions: Mapping[str, str] | None = None,
    parts: Parts | None = None,
) -> Evaluation:
    """Ask every problem ``num_samples`` times and grade the replies.

    ``temperature`` 0 is greedy. ``prefill`` opens every reply and counts as part of it.
    ``progress`` is told how far it is, after every token where that is known. ``run_id``, ``split``
    and ``step`` go into the rollouts, ``conditions`` into the evaluation. ``generate`` stands in
    for :func:`abacist.policy.decoding.generation.generate`, ``native_messages`` for our own prompt.
    ``rewards`` are reported for every reply, as ``load_reward_funcs`` gives them (the default set).
    One that fails is not called again: its values are None from there on, and ``conditions`` says
    so under "rewards". With ``parts`` replies are kept as they come, and those already kept there
    are not asked for again.

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
        problem_ids = [problem.problem_id for problem in problems]
        refuse_too_long(policy, problem_ids, prompt_lengths, max_completion_tokens)
    paying = Paying(load_reward_funcs(["default"]) if rewards is None else rewards, reward_weights)
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
        paid = paying.pay(problem, conversations[at], group)
        rollouts = []
        for member, completion in enumerate(group):
            answer = parse_reply(completion.text).answer
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
                    rewards=paid[member],
                    reward=paying.total(paid[member]),
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
    noted = dict(conditions or {})
    if paying.faults:
        noted["rewards"] = " ".join(paying.faults)
    return Evaluation(tuple(problems), tuple(replies), settings, noted)


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


def refuse_too_long(
    policy: Policy, problem_ids: Sequence[str], prompt_lengths: Sequence[int], budget_tokens: int
) -> None:
    """Raise ModelError, with the problem, if the longest prompt and a reply exceed the context."""
    tokens, at = max((tokens, at) for at, tokens in enumerate(prompt_lengths))
    if tokens + budget_tokens > policy.context_tokens:
        raise ModelError(
            f"Problem {problem_ids[at]} has a prompt of {tokens} tokens; with the {budget_tokens} "
            f"of --max_completion_length that exceeds the model's context of "
            f"{policy.context_tokens}.",
            "Lower --max_completion_length or the number of worked examples.",
        )


class Paying:
    """The rewards that an evaluation reports, and what went wrong with them."""

    def __init__(self, rewards: Sequence[RewardFunc], weights: Sequence[float] | None) -> None:
        self.rewards = list(rewards)
        self.names = [reward.__name__ for reward in rewards]
        self.weights = dict(zip(self.names, weights or [1.0] * len(self.names), strict=True))
        # The historic rewards expect golds that were cleaned when the data was read.
        self.cleans_golds = any(reward in REWARD_SETS["gist"] for reward in rewards)
        self.faults: list[str] = []

    def pay(
        self, problem: Problem, asked: list[Message], group: Sequence[Completion]
    ) -> list[dict[str, float | None]]:
        """What each reward pays for each reply to one problem, by the reward's name."""
        paid: list[dict[str, float | None]] = [dict.fromkeys(self.names) for _ in group]
        gold: str | None = problem.answer or None
        if gold is not None and self.cleans_golds:
            gold = gist_gold(gold)
        known = {"answer": gold, "problem_id": problem.problem_id, "difficulty": problem.difficulty}
        columns = {
            name: [value] * len(group) for name, value in {**problem.columns, **known}.items()
        }
        texts = [[{"role": "assistant", "content": completion.text}] for completion in group]
        ids = [completion.ids for completion in group]
        for name, values in pay(self.rewards, [asked] * len(group), texts, ids, columns):
            if not isinstance(values, Exception):
                for row, value in zip(paid, values, strict=True):
                    row[name] = value
            elif gold is not None:  # in training every problem has a gold
                message = values.message if isinstance(values, AbacistError) else str(values)
                self.faults.append(f"'{name}' is not reported from there on. {message}")
                self.rewards = [one for one in self.rewards if one.__name__ != name]
        return paid

    def total(self, paid: Mapping[str, float | None]) -> float | None:
        """The weighted sum of one reply's rewards; None where none applied."""
        known = [(self.weights[name], value) for name, value in paid.items() if value is not None]
        return sum(weight * value for weight, value in known) if known else None
