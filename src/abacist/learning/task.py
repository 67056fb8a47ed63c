"""The task of a run: its problems, split by split, and whether the policy can take them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from abacist.errors import DataError, ModelError
from abacist.learning.arguments import ScriptArguments
from abacist.learning.config import Config
from abacist.learning.vllm_engine import Server
from abacist.policy.loading import Policy
from abacist.proof.evaluate import refuse_too_long
from abacist.records.secrets import without_secrets
from abacist.task.gist import gist_gold
from abacist.task.problems import (
    Problem,
    load_problems,
    normalise_question,
    reading_options,
)
from abacist.task.prompts import (
    Shots,
    choose_shots,
    load_shots,
    shots_path,
    system_text,
    to_dataset_rows,
)

GENERATED_TRAIN_PROBLEMS = 4000


@dataclass
class Task:
    """What is learned: the problems of each split and how they are put to the model."""

    train: list[Problem]
    selection: list[Problem]
    heldout: list[Problem]
    system_prompt: str | None
    shots: Shots

    def to_json(self) -> dict[str, Any]:
        """How many problems each split has, and what stands before each of them."""
        return {
            "problems": {
                "train": len(self.train),
                "selection": len(self.selection),
                "heldout": len(self.heldout),
            },
            "system_prompt": self.system_prompt and without_secrets(self.system_prompt),
            "shots": len(self.shots),
        }

    def rows(self, problems: Sequence[Problem], *, solutions: bool = False) -> list[dict[str, Any]]:
        return to_dataset_rows(
            problems, system_prompt=self.system_prompt, shots=self.shots, solutions=solutions
        )


def load_task(config: Config) -> Task:
    """Problems of the three splits, the system prompt and the worked examples."""
    return task_of(
        config.script,
        seed=config.training.seed,
        selects=config.training.do_eval,
        data=None if config.data is None else [json.loads(line) for line in config.data],
    )


def task_of(
    script: ScriptArguments,
    *,
    seed: int,
    selects: bool,
    data: list[dict[str, Any]] | None = None,
) -> Task:
    """As :func:`load_task`, by the settings that decide it alone.

    ``selects`` is whether there is a selection split; ``data`` are rows that were given themselves.
    """
    generated = script.dataset_name == "generated"

    def load(split: str, limit: int | None) -> list[Problem]:
        if limit == 0:
            return []
        return load_problems(
            script.dataset_name if data is None else data,
            split=split,
            limit=limit,
            # Held-out problems must not change with the training seed: runs are compared on them.
            seed=seed if split == "train" else 0,
            **reading_options(vars(script)),
        )

    limit = script.num_train_problems or (GENERATED_TRAIN_PROBLEMS if generated else None)
    problems = load("train", limit)
    if any(name.split(".")[0] == "gist" for name in script.reward_funcs):
        # The historic rewards compare text with a gold that was cleaned when the data was read.
        problems = [replace(problem, answer=gist_gold(problem.answer)) for problem in problems]
    shots = _shots(script, problems, seed)
    # A file of examples may hold problems of the other splits, with their answers.
    shown = {normalise_question(shot.question) for shot in shots.all}

    def load_new(split: str, limit: int | None) -> list[Problem]:
        found = load(split, limit)
        return [one for one in found if normalise_question(one.question) not in shown]

    return Task(
        train=problems,
        selection=load_new("selection", script.num_selection_problems) if selects else [],
        heldout=load_new("heldout", script.num_heldout_problems),
        system_prompt=system_text(script.system_prompt),
        shots=shots,
    )


def _shots(script: ScriptArguments, problems: list[Problem], seed: int) -> Shots:
    """Examples drawn from the training problems, or from a file of their own: all of it without a
    number."""
    wanted = script.num_shots
    if script.shots_file is None:
        return choose_shots(problems, wanted or "0", seed=seed)
    found = load_shots(shots_path(script.shots_file), decimal_mark=script.decimal_mark)
    if wanted is not None:
        return choose_shots(found.all, wanted, seed=seed)
    choose_shots(found.all, len(found.all))  # raises where one of them cannot serve
    return found


def split_lines(config: Config, task: Task) -> list[str]:
    """How the problems were split, and where that is not what was asked for."""
    script = config.script
    lines = [
        f"problems: {len(task.train):,} to train on, {len(task.selection):,} for --eval_steps, "
        f"{len(task.heldout):,} held out"
    ]
    parts = [("num_heldout_problems", script.num_heldout_problems, len(task.heldout))]
    if config.training.do_eval:
        parts.append(("num_selection_problems", script.num_selection_problems, len(task.selection)))
    lines += [
        f"  {found} and not {wanted} ({name}): the data has no more in this part"
        for name, wanted, found in parts
        if found < wanted
    ]
    return lines


def check_fit(config: Config, task: Task, policy: Policy, server: Server | None = None) -> None:
    """Refuse, before anything is written, what TRL would turn into zero steps or cut prompts.

    Raises DataError for too few problems or text that would become control tokens, ModelError
    for a prompt and budget that exceed the context, or what the vLLM ``server`` takes.
    """
    if len(task.train) < config.problems_per_step:
        raise DataError(
            f"{len(task.train)} training problems do not fill one step of "
            f"{config.problems_per_step}.",
            "Give more problems, or lower --per_device_train_batch_size or "
            "--gradient_accumulation_steps.",
        )
    rows = task.rows([*task.train, *task.selection, *task.heldout])
    problem_ids = [row["problem_id"] for row in rows]
    prompt_lengths = [len(policy.chat.encode(row["prompt"])) for row in rows]
    refuse_too_long(policy, problem_ids, prompt_lengths, config.max_completion_tokens)
    needed = max(prompt_lengths) + config.max_completion_tokens
    if server is not None and server.max_model_len and needed > server.max_model_len:
        raise ModelError(
            f"The vLLM server at {server.url} takes {server.max_model_len} tokens, and the longest "
            f"prompt and its reply have {needed}.",
            f"Start it with --max-model-len {needed}, or lower --max_completion_length.",
        )
