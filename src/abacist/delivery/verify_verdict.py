"""The verdict, recomputed from the replies behind it: answers, rewards, intervals, tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from abacist.delivery.bundle import VERDICT_FOLDERS
from abacist.delivery.findings import Check
from abacist.delivery.opened import Opened
from abacist.delivery.verify_training import check_reading, check_run_id, item_of, named
from abacist.errors import AbacistError
from abacist.policy.decoding.generation import Completion
from abacist.proof.ask import Prompting
from abacist.proof.comparison.compare import compare
from abacist.proof.evaluate import Paying
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import Rollout
from abacist.task.answers import same_answer
from abacist.task.custom_rewards import RewardFunc
from abacist.task.prompts import build_messages
from abacist.task.reply import parse_reply
from abacist.task.rewards import is_built_in_name, load_reward_funcs


def check_verdict(opened: Opened) -> Check:
    """Judge every reply of the verdict again, and every figure that is made of them."""
    check = Check("verdict")
    judged: dict[str, Evaluation] = {}
    for kind in VERDICT_FOLDERS:
        try:
            evaluation = opened.evaluation(kind)
            if evaluation is not None:
                judged[kind] = _judged(opened, kind, evaluation, check)
        except AbacistError as error:
            check.fault(f"run/evals/{kind}", "", "an evaluation", named(error, opened))
    replies = sum(len(evaluation.rollouts) for evaluation in judged.values())
    check.numbers = {"replies": replies}
    if not judged:
        check.looked_at = "no verdict in it: nothing is claimed about accuracy"
        return check
    check.looked_at = f"{replies:,} replies judged again, every figure recomputed from them"
    name = "run/evals/verdict.json"
    if "before" in judged and "after" in judged and opened.has(name):
        try:
            control = str(opened.settings.get("control") or "none")
            found = compare(judged["before"], judged["after"], control=control)
            check.same_tree(name, opened.document(name), _as_json(found.to_json()))
            check.looked_at += ", and both paired"
            check.numbers |= {"accuracy_before": judged["before"].figures["correct"].to_json(),
                              "accuracy_after": judged["after"].figures["correct"].to_json(),
                              "change": found.changes["correct"].to_json()}  # fmt: skip
        except AbacistError as error:
            check.fault(name, "", "a comparison", named(error, opened))
    elif opened.has(name):
        check.fault(name, "", "a verdict", "no replies that it could be made of")
    elif opened.index.get("run", {}).get("finished") and "after" in judged:
        check.fault(name, "", "a verdict", "no such file")
    return check


def _judged(opened: Opened, kind: str, evaluation: Evaluation, check: Check) -> Evaluation:
    """The evaluation with every reply judged anew; what differs from what is kept is a fault."""
    file = f"run/evals/{kind}/rollouts.parquet"
    document = f"run/evals/{kind}/evaluation.json"
    _check_settings(opened, kind, evaluation, check)
    rewards, weights, is_whole = _rewards(opened, check)
    paying = Paying(rewards, weights)
    golds = {problem.problem_id: problem for problem in evaluation.problems}
    prompting = Prompting.of(str(opened.run.path))
    size = evaluation.settings.num_samples
    judged: list[Rollout] = []
    for start in range(0, len(evaluation.rollouts), size):
        group = evaluation.rollouts[start : start + size]
        problem = golds[str(group[0].problem_id)]
        asked = build_messages(
            problem.question,
            system_prompt=prompting.system_prompt,
            shots=prompting.shots,
            problem_id=problem.problem_id,
        )
        completions = [
            Completion(list(r.completion_ids), r.completion, r.stop_reason) for r in group
        ]
        paid = paying.pay(problem, asked, completions)
        for member, (one, rewards_of_one) in enumerate(zip(group, paid, strict=True)):
            item = item_of(one)
            gold = problem.answer or None
            check.same(file, f"{item}, gold", one.gold, gold)
            check.same(file, f"{item}, messages", [dict(turn) for turn in one.messages], asked)
            check.same(file, f"{item}, member", one.member, member)
            check.same(file, f"{item}, group", one.group, start // size)
            check.same(file, f"{item}, split", one.split, "heldout")
            check_run_id(opened, file, one, evaluation.rollouts[0], check)
            check_reading(file, one, check)
            for name, value in rewards_of_one.items():
                check.same(file, f"{item}, reward {name}", one.rewards.get(name), value)
            check.same(file, f"{item}, difficulty", one.difficulty, problem.difficulty)
            check.same(file, f"{item}, advantage", one.advantage, None)
            if is_whole:
                for name in sorted(one.rewards.keys() - rewards_of_one.keys()):
                    check.fault(file, f"{item}, reward {name}", "a reward", "none of its run")
                total = paying.total(rewards_of_one)
                if total is not None or one.reward != 0:  # where none applied, older ones hold 0
                    check.same(file, f"{item}, reward", one.reward, total)
            answer = parse_reply(one.completion).answer
            judged.append(
                replace(
                    one,
                    gold=gold,
                    read_answer=answer,
                    is_correct=None if gold is None else same_answer(answer, gold),
                    rewards=rewards_of_one if is_whole else {**one.rewards, **rewards_of_one},
                )
            )
    anew = replace(evaluation, rollouts=tuple(judged))
    claimed = opened.document(document)["evaluation"]
    check.same_tree(document, claimed, _as_json(anew.to_json()))
    return anew


def _rewards(opened: Opened, check: Check) -> tuple[list[RewardFunc], list[float] | None, bool]:
    """The rewards that an evaluation reports, their weights, and whether these are all of them.

    Only rewards of ours are called: code that a bundle names is never imported.
    """
    names = opened.settings.get("reward_funcs") or ["default"]
    names = [str(name) for name in ([names] if isinstance(names, str) else names)]
    ours = [name for name in names if is_built_in_name(name)]
    is_whole = len(ours) == len(names)
    if not is_whole:
        own = ", ".join(name for name in names if name not in ours)
        if (note := f"rewards that are code of their own ({own})") not in check.not_checked:
            check.not_checked.append(note)
    weights = opened.settings.get("reward_weights")
    rewards = load_reward_funcs(ours) if ours else []
    if not is_whole or not isinstance(weights, list) or len(weights) != len(rewards):
        return rewards, None, is_whole
    return rewards, [float(weight) for weight in weights], is_whole


def _check_settings(opened: Opened, kind: str, evaluation: Evaluation, check: Check) -> None:
    """Whether the replies were asked for as the run's settings say."""
    file = f"run/evals/{kind}/evaluation.json"
    settings, prompting = evaluation.settings, Prompting.of(str(opened.run.path))
    is_sampled = kind.endswith("-sampled")
    wanted: Mapping[str, Any] = {
        "max_completion_tokens": prompting.max_completion_tokens,
        "system_prompt": prompting.system_prompt,
        "num_shots": len(prompting.shots),
        "native_prompt": False,
        "prefill": "",
        "seed": 0,
        "temperature": 1.0 if is_sampled else 0.0,
    }
    if "max_completion_length" not in opened.settings:
        wanted = {k: v for k, v in wanted.items() if k != "max_completion_tokens"}
    for name, value in wanted.items():
        check.same(file, f"settings.{name}", getattr(settings, name), value)
    if not is_sampled:
        check.same(file, "settings.num_samples", settings.num_samples, 1)


def _as_json(value: Any) -> Any:
    """As it would be read again: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))
