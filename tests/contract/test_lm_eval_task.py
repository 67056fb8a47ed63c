"""The task that we write for lm-evaluation-harness, run by the harness itself: our prompt to the
letter, and our verdict on every reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abacist.delivery.neighbours.lm_eval_task import METRICS, write_lm_eval_task
from abacist.errors import AbacistError
from abacist.proof.scorers import lm_eval_flexible
from abacist.task.answers import same_answer
from abacist.task.problems import Problem, load_problems
from abacist.task.prompts import SYSTEM_PROMPT, Shots, build_messages
from abacist.task.reply import parse_reply

pytest.importorskip("lm_eval", reason="lm_eval, a development dependency, is not here")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

HARD = Problem(
    problem_id="braces", question="Is {{answer}} 7, or {% raw %} [1]?\n\nSay 'why'.\n",
    solution="3 + 4 = <<3+4=7>>7", answer="7", difficulty=1,
)  # fmt: skip
SHOTS = tuple(load_problems("generated", limit=3, seed=5))
PROBLEMS = [HARD, *load_problems("generated", split="heldout", limit=4)]


def made(folder: Path, **options: Any) -> Any:
    write_lm_eval_task(folder, PROBLEMS, **options)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load(["abacist_gsm8k"])
    return loaded["tasks"]["abacist_gsm8k"] if "tasks" in loaded else loaded["abacist_gsm8k"]


@pytest.mark.parametrize("shots", [(), SHOTS])
@pytest.mark.parametrize("system_prompt", [SYSTEM_PROMPT, None, "In {{braces}}:\n<answer>\n"])
def test_the_harness_asks_what_we_ask_to_the_letter(
    shots: tuple[Problem, ...], system_prompt: str | None, tmp_path: Path
) -> None:
    task = made(tmp_path, shots=shots, system_prompt=system_prompt)
    docs = list(task.test_docs())
    assert len(docs) == len(PROBLEMS)
    for doc, problem in zip(docs, PROBLEMS, strict=True):
        seen = task.fewshot_context(
            doc, len(shots), apply_chat_template=True, fewshot_as_multiturn=True,
            chat_template=lambda messages, **_: messages,
        )  # fmt: skip
        expected = build_messages(
            problem.question, system_prompt=system_prompt, shots=Shots(shots),
            problem_id=problem.problem_id,
        )  # fmt: skip
        assert [{"role": m["role"], "content": m["content"]} for m in seen] == expected


PIECES = [
    "<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "7", "7.0", "$7", "seven", "####",
    "#### 7", "1,000", "12 or 7", "\\boxed{7}", "**7**", "٣", "²", "\x00", "\ud800", "...", "-7",
    "<reasoning>\n3 + 4 = 7\n</reasoning>\n<answer>\n7\n</answer>", "<|im_end|>", "Question:",
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(tmp_path_factory.mktemp("task"))


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=80))
@example("<answer>" * 3000 + "7")
@example("")
def test_every_reply_gets_our_verdict(task: Any, text: str) -> None:
    doc = next(iter(task.test_docs()))
    got = task.process_results(doc, [text])
    reply = parse_reply(text)
    assert got == {
        "correct": same_answer(reply.answer, "7"),
        "any_format": lm_eval_flexible(text, "7"),
        "strict_format": reply.strict,
    }


def test_a_whole_evaluation_by_the_harness_counts_as_ours(tmp_path: Path) -> None:
    """Through the harness's own evaluator, with a model that replies from a list."""
    from lm_eval.api.model import LM

    right = "<reasoning>\nso\n</reasoning>\n<answer>\n{}\n</answer>"
    replies = {
        problem.question: text.format(problem.answer)
        for problem, text in zip(
            PROBLEMS, [right, "<answer>{}</answer>", "It is {}.", "no idea", right], strict=True
        )
    }
    asked: list[Any] = []

    class Listed(LM):
        tokenizer_name = "listed"

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:
            return str(messages[-1]["content"])

        def chat_template(self, chat_template: Any = False) -> str:
            return ""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            asked.extend(request.args[1] for request in requests)
            return [replies[request.args[0]] for request in requests]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    write_lm_eval_task(tmp_path, PROBLEMS, shots=SHOTS, max_completion_tokens=77)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        Listed(), tasks=["abacist_gsm8k"], task_manager=manager, apply_chat_template=True,
        fewshot_as_multiturn=True, bootstrap_iters=0,
    )  # fmt: skip
    result = found["results"]["abacist_gsm8k"]
    assert {metric: result[f"{metric},none"] for metric in METRICS} == {
        "correct": 3 / 5, "any_format": 4 / 5, "strict_format": 2 / 5,
    }  # fmt: skip
    assert all(one["max_gen_toks"] == 77 and one["do_sample"] is False for one in asked)
    assert all(one["until"] == [] for one in asked)


def test_what_cannot_be_a_task_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for problems, options in (
        ([], {}),
        (PROBLEMS, {"name": "no name"}),
        (SHOTS, {"shots": SHOTS}),
    ):
        with pytest.raises(AbacistError):
            write_lm_eval_task(tmp_path, list(problems), **options)
    assert not list(tmp_path.iterdir())
    write_lm_eval_task(tmp_path, PROBLEMS)
    with pytest.raises(AbacistError, match="exists"):
        write_lm_eval_task(tmp_path, PROBLEMS)
