"""Our rewards as verl calls them, for ``custom_reward_function``:

    reward.custom_reward_function.path=pkg://abacist.delivery.neighbours.verl_reward
    reward.custom_reward_function.name=compute_score

No torch is imported, nothing is raised over what a model wrote, and every call is bounded.
"""

from __future__ import annotations

from typing import Any

from abacist.task.rewards import REWARD_SETS


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """What one completion earns: ``score`` is the sum, ``acc`` 1.0 for a right answer, and every
    reward of the default set by its name. verl logs all of them.

    >>> compute_score("gsm8k", "<answer>\\n18\\n</answer>", "18")["acc"]
    1.0
    """
    paid = {
        reward.__name__: float(
            reward(prompts=[""], completions=[solution_str], answer=[ground_truth])[0] or 0.0
        )
        for reward in REWARD_SETS["default"]
    }
    return {"score": sum(paid.values()), "acc": float(paid["correctness"] > 0), **paid}
