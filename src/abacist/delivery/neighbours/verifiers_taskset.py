"""Our task and rewards as an environment of ``verifiers`` (0.4, its ``v1``).

``verifiers`` finds an environment by the name of a module at the top level, so a file of one's own
opens the door (examples/abacist_gsm8k.py is that file):

    from abacist.delivery.neighbours.verifiers_taskset import AbacistTaskset
    __all__ = ["AbacistTaskset"]

Then ``vf-eval abacist-gsm8k`` runs it. Only this module needs verifiers; abacist does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

from abacist.proof.scorers import lm_eval_flexible
from abacist.task import rewards
from abacist.task.problems import load_problems
from abacist.task.prompts import build_messages, choose_shots, system_text
from abacist.task.reply import parse_reply

_TURNS = {"user": vf.UserMessage, "assistant": vf.AssistantMessage}


class ProblemData(vf.TaskData):
    """One problem: what is asked, and the gold."""

    gold: str = ""
    difficulty: int | None = None


class ProblemTask(vf.Task[ProblemData, vf.State, vf.TaskConfig]):
    """One problem with our five rewards; the sum of the default set is its reward."""

    @property
    def key(self) -> str:
        return self.data.id or self.hash

    @vf.reward
    async def correctness(self, trace: vf.Trace) -> float:
        """2.0 for the right answer, by the rule of the verdict."""
        (paid,) = rewards.correctness([""], [trace.last_reply], answer=[self.data.gold])
        return paid or 0.0

    @vf.reward
    async def integer(self, trace: vf.Trace) -> float:
        """0.5 for a bare integer."""
        return rewards.integer([""], [trace.last_reply])[0]

    @vf.reward
    async def strict_format(self, trace: vf.Trace) -> float:
        """0.5 for exactly the layout."""
        return rewards.strict_format([""], [trace.last_reply])[0]

    @vf.reward
    async def soft_format(self, trace: vf.Trace) -> float:
        """0.5 for the two blocks in order."""
        return rewards.soft_format([""], [trace.last_reply])[0]

    @vf.reward
    async def xml_count(self, trace: vf.Trace) -> float:
        """Up to 0.5 for tags in place."""
        return rewards.xml_count([""], [trace.last_reply])[0]

    @vf.metric
    async def any_format(self, trace: vf.Trace) -> float:
        """Whether the last number is right, whatever the format; lm-eval's flexible filter."""
        return float(lm_eval_flexible(trace.last_reply, self.data.gold))

    async def validate(self, runtime: vf.Runtime) -> bool:
        """Whether the gold itself earns full marks."""
        reply = f"<reasoning>\nso\n</reasoning>\n<answer>\n{self.data.gold}\n</answer>"
        (paid,) = rewards.correctness([""], [reply], answer=[self.data.gold])
        return paid == 2.0 and parse_reply(reply).strict


class ProblemsConfig(vf.TasksetConfig):
    """Which problems are asked, and how; the names are those of ``abacist train``."""

    dataset_name: str = "generated"
    """`generated`, a Hub id (openai/gsm8k), a folder, or a file."""
    dataset_config: str | None = None
    split: str = "train"
    """train, selection, heldout or test."""
    num_problems: int | None = None
    """At most so many, drawn by the seed."""
    seed: int = 0
    system_text: str = "default"
    """default, none, or a text of your own. (`system_prompt` is verifiers' own: a file.)"""
    num_shots: int = 0
    """Worked examples before every question, drawn from the training problems."""


class AbacistTaskset(vf.Taskset[ProblemTask, ProblemsConfig]):
    """Word problems with one integer as the answer, asked as ``abacist train`` asks them."""

    def load(self) -> Iterator[ProblemTask]:
        config = self.config
        where = {"dataset_config": config.dataset_config}
        problems = load_problems(
            config.dataset_name, split=config.split, limit=config.num_problems, seed=config.seed,
            **where,
        )  # fmt: skip
        pool = load_problems(config.dataset_name, **where) if config.num_shots else []
        shots = choose_shots(pool, config.num_shots, seed=config.seed)
        for problem in problems:
            turns = build_messages(
                problem.question, system_prompt=None, shots=shots, problem_id=problem.problem_id
            )
            yield ProblemTask(
                ProblemData(
                    id=problem.problem_id,
                    system_prompt=system_text(config.system_text),
                    # A text where there is one turn: every harness takes that.
                    prompt=problem.question
                    if len(turns) == 1
                    else [_TURNS[turn["role"]](content=turn["content"]) for turn in turns],
                    gold=problem.answer,
                    difficulty=problem.difficulty,
                ),
                config.task,
            )


__all__ = ["AbacistTaskset"]
