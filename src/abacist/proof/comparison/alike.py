"""Whether two evaluations may be compared. Every difference in conditions is named.

The same model scores 73 or 38 depending on how it is asked, so two evaluations are compared only
if they put the same problems with the same golds, in the same prompt, with the same budget and
the same sampling. A difference that is meant can be allowed by its name, the problems' cannot.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from abacist.errors import AbacistError, UsageError
from abacist.proof.evaluation import Evaluation, Settings
from abacist.records.rollout import Rollout
from abacist.task.sources import shown

PROMPT, SHOTS, BUDGET, SAMPLING = "prompt", "shots", "budget", "sampling"
#: What may be allowed to differ, with what it means.
ALLOWABLE = {
    PROMPT: "the system text, or how the reply or the question begins",
    SHOTS: "the worked examples in the prompt",
    BUDGET: "how many tokens a reply may have",
    SAMPLING: "greedy or sampled, the temperature, how many replies",
}
_CONDITION_OF = {
    "num_shots": SHOTS,
    "max_completion_tokens": BUDGET,
    "kind": SAMPLING,
    "num_samples": SAMPLING,
    "temperature": SAMPLING,
}
# Other draws under the same conditions: what an interval is for.
_NO_CONDITION = ("seed",)


def refuse_unlike(
    before: Evaluation, after: Evaluation, *, allow_different: Collection[str] = ()
) -> None:
    """Raise AbacistError, naming every difference, unless problems and conditions are the same.

    ``allow_different`` holds names of :data:`ALLOWABLE`; UsageError for another.
    """
    for name in allow_different:
        if name not in ALLOWABLE:
            raise UsageError(
                f"allow_different has no {name!r}", f"Choose among {', '.join(ALLOWABLE)}."
            )
    _refuse_other_problems(before, after)
    found = conditions_apart(before, after)
    unmeant = {name: said for name, said in found.items() if name not in allow_different}
    if unmeant:
        raise AbacistError(
            f"The evaluations differ in their {_listed([*unmeant])}: "
            + "; ".join(line for said in unmeant.values() for line in said)
            + ".",
            "Evaluate both under the same conditions. If the difference is what you ask about: "
            f"--allow_different {' '.join(unmeant)}",
        )


def conditions_apart(before: Evaluation, after: Evaluation) -> dict[str, list[str]]:
    """What the two were asked differently, by the names of :data:`ALLOWABLE`, in words."""
    found: dict[str, list[str]] = {}
    for name in ("kind", *(field.name for field in fields(Settings))):
        one, two = getattr(before.settings, name, None), getattr(after.settings, name, None)
        if one != two and name not in _NO_CONDITION:
            said = f"{name}: {shown(one)} against {shown(two)}"
            found.setdefault(_CONDITION_OF.get(name, PROMPT), []).append(said)
    second = {rollout.problem_id: rollout for rollout in after.rollouts}
    for rollout in before.rollouts:
        other = second.get(rollout.problem_id)
        what = other and _other_words(rollout, other)
        if what and what not in found:
            turn = {PROMPT: "another text", SHOTS: "other worked examples"}[what]
            found[what] = [f"problem {rollout.problem_id} was put with {turn}"]
    return found


def other_circumstances(before: Evaluation, after: Evaluation) -> list[str]:
    """What else both evaluations recorded and differs (dtype, device …), for the reader to weigh.

    The model is what is compared, and is left out.
    """
    first, second = before.conditions, after.conditions
    return [
        f"{name}: {shown(first[name])} against {shown(second[name])}"
        for name in first
        if name in second and first[name] != second[name] and name != "model"
    ]


def _refuse_other_problems(before: Evaluation, after: Evaluation) -> None:
    first = {problem.problem_id: problem for problem in before.problems}
    second = {problem.problem_id: problem for problem in after.problems}
    hint = "Evaluate both models on the same problems: same source, split, limit and seed."
    if first.keys() != second.keys():
        only_first = [problem_id for problem_id in first if problem_id not in second]
        only_second = [problem_id for problem_id in second if problem_id not in first]
        named = ", ".join([*only_first[:2], *only_second[:2]])
        raise AbacistError(
            f"The evaluations are of different problems: {len(only_first)} only in the "
            f"first, {len(only_second)} only in the second (such as {named}), "
            f"{len(first.keys() & second.keys())} in both.",
            hint,
        )
    for problem_id, problem in first.items():
        other = second[problem_id]
        if (problem.question, problem.answer) != (other.question, other.answer):
            what = "answer" if problem.question == other.question else "question"
            raise AbacistError(
                f"Problem {problem_id} has another {what} in the first than in the second.", hint
            )


def _other_words(one: Rollout, other: Rollout) -> str | None:
    """Where two prompts for one problem part: in the examples, in the rest, or not at all."""
    first = [(turn["role"], turn["content"]) for turn in one.messages]
    second = [(turn["role"], turn["content"]) for turn in other.messages]
    if first == second:
        return None

    def frame(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [turn for turn in turns if turn[0] == "system"] + turns[-1:]

    return PROMPT if frame(first) != frame(second) else SHOTS


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
