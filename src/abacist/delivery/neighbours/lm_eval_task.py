"""Our verdict's task for lm-evaluation-harness: the same problems, prompt and rule.

A task of the harness is a YAML file, its rows, and the functions that the YAML names. The functions
are in ``lm_eval_scoring``; the file beside the YAML only imports them, because the harness looks
for functions there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from abacist.errors import DataError, RunError, UsageError
from abacist.records.rundir import write_aside
from abacist.task.problems import Problem
from abacist.task.prompts import SYSTEM_PROMPT, Shots, render_solution

METRICS = ("correct", "any_format", "strict_format")
_SCORING = '''\
"""The functions that the task's YAML names. They need abacist to be installed."""

from abacist.delivery.neighbours.lm_eval_scoring import process_results  # noqa: F401
'''


class _Function(yaml.YAMLObject):
    """A value that the harness reads as a function of a file beside the YAML."""

    yaml_dumper = yaml.SafeDumper
    yaml_tag = "!function"

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def to_yaml(cls, dumper: yaml.SafeDumper, data: _Function) -> yaml.Node:  # type: ignore[override]
        return dumper.represent_scalar(cls.yaml_tag, data.name)


def write_lm_eval_task(
    folder: Path,
    problems: Sequence[Problem],
    *,
    name: str = "abacist_gsm8k",
    system_prompt: str | None = SYSTEM_PROMPT,
    shots: Shots | Sequence[Problem] = (),
    max_completion_tokens: int = 512,
) -> list[Path]:
    """Write a task that asks these problems as ``abacist eval`` does, and judges by the same rule.

    Run it with ``lm_eval --tasks NAME --include_path FOLDER --apply_chat_template
    --fewshot_as_multiturn true`` where abacist is installed. Its metrics: ``correct`` (our answer
    rule), ``any_format`` (the harness's own flexible filter) and ``strict_format``.

    Returns the paths. Raises DataError for no problems or one that is among the examples,
    UsageError for a name that no task can have, RunError if a file exists or cannot be written.
    """
    if not name.isidentifier():
        raise UsageError(
            f"A task cannot be named {name!r}.", "Use letters, digits and underscores."
        )
    if not problems:
        raise DataError("There are no problems to ask.", "Give some.")
    shots = shots if isinstance(shots, Shots) else Shots(tuple(shots))
    for problem in problems:
        if shots.for_question(problem.question, problem.problem_id) != list(shots.chosen):
            raise DataError(
                f"The problem {problem.problem_id} is one of the examples.",
                "The harness shows every problem the same examples: leave one of the two out.",
            )
    rows = folder / f"{name}.jsonl"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.absolute())}},
        "test_split": "test",
        "output_type": "generate_until",
        # Plain fields of a row: the harness would read braces in a question as a template.
        **({"description": "{{system}}"} if system_prompt else {}),
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": len(shots),
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [
                {"question": shot.question, "answer": render_solution(shot)}
                for shot in shots.chosen
            ],
        },
        "generation_kwargs": {
            "until": [],  # a reply ends at the model's own end tokens
            "do_sample": False,
            "max_gen_toks": max_completion_tokens,
        },
        "process_results": _Function(f"{name}_scoring.process_results"),
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in METRICS
        ],
        "metadata": {"version": 1.0},
    }
    if not len(shots):
        task.pop("fewshot_config")
    texts = {
        rows: "".join(
            json.dumps(
                {"system": system_prompt or "", "question": problem.question,
                 "answer": problem.answer, "problem_id": problem.problem_id}
            ) + "\n"
            for problem in problems
        ),
        folder / f"{name}_scoring.py": _SCORING,
        folder / f"{name}.yaml": yaml.safe_dump(task, sort_keys=False, allow_unicode=True),
    }  # fmt: skip
    for path in texts:
        if path.exists():
            raise RunError(f"{path} exists already.", "Choose another folder.")
    written: list[Path] = []
    try:
        for path, text in texts.items():
            write_aside(path, text.encode())
            written.append(path)
    except OSError as error:
        for done in written:
            done.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error}.", "Choose another folder.") from error
    return written
