"""Our two GSM8K filters against lm-evaluation-harness itself: every verdict, not a sample of rules.

The harness's own task file says which filters with which patterns; its own classes run them.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abacist.proof.scorers import lm_eval_flexible, lm_eval_strict, until_stop
from abacist.task.problems import load_problems

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval, a development dependency, is not here")

from lm_eval.api.metrics import exact_match_hf_evaluate  # noqa: E402
from lm_eval.api.registry import get_filter  # noqa: E402
from lm_eval.filters import extraction, selection  # noqa: E402, F401  (they register themselves)
from lm_eval.models.utils import postprocess_generated_text  # noqa: E402

TASK: dict[str, Any] = yaml.safe_load(
    (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8")
)
OURS = {"strict-match": lm_eval_strict, "flexible-extract": lm_eval_flexible}
GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"


def harness(name: str) -> Callable[[str, str], bool]:
    """The harness's verdict on one completion, by the filter of this name."""
    (described,) = (each["filter"] for each in TASK["filter_list"] if each["name"] == name)
    steps = [
        get_filter(step["function"])(**{k: v for k, v in step.items() if k != "function"})
        for step in described
    ]
    (metric,) = TASK["metric_list"]
    options = {
        key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    }

    def verdict(text: str, gold: str) -> bool:
        responses: Any = [[text]]
        for step in steps:
            responses = list(step.apply(responses, [{}]))
        scored = exact_match_hf_evaluate(predictions=responses, references=[gold], **options)
        return bool(scored["exact_match"])

    return verdict


THEIRS = {name: harness(name) for name in OURS}


def agree(text: str, gold: str) -> None:
    for name, ours in OURS.items():
        assert ours(text, gold) is THEIRS[name](text, gold), (name, text, gold)


PIECES = [
    "####", "#### ", "#### -", "#", " ", "\n", "\r\n", "\u2028", "\u00a0", "\x00", ".", "..", "...",
    ",", "$", "-", "−", "--", "1", "18", "18.", "18.00", "1,450", "$1,450.00", "-7", "−7", "٣", "²",
    "[invalid]", "[INVALID]", "é", "İ", "\ud800", "<answer>", "</answer>", "<|im_end|>", "</s>",
    "Question:", "x", "the answer is ", "**", "\\boxed{18}", "%", "1e3",
]  # fmt: skip
soup = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
# A gold is a data set's text: it never ends in NUL, which NumPy's strings would drop.
golds = st.one_of(
    st.sampled_from(["18", "-7", "1,450", "1450", "0", "so 6*3 = <<6*3=18>>18\n#### 18", ""]),
    soup.map(lambda text: text.replace("\x00", "").replace("\ud800", "")),
)


def test_the_harness_is_the_version_our_filters_were_written_for() -> None:
    assert importlib.metadata.version("lm_eval").startswith("0.4.")
    assert TASK["metadata"]["version"] == 3.0
    assert {each["name"] for each in TASK["filter_list"]} == OURS.keys()


@settings(max_examples=600, deadline=None)
@given(soup | st.text(max_size=60), golds)
@example("", "")
@example("...", "..")
@example("nothing", "[invalid]")
@example("$", "")
@example("#### ,", "")
@example("#### 18.\n", "18")
def test_every_verdict_on_hostile_text_is_the_harness_s(text: str, gold: str) -> None:
    agree(text, gold)


@settings(max_examples=200, deadline=None)
@given(soup)
def test_every_text_is_cut_where_the_harness_cuts_it(text: str) -> None:
    assert until_stop(text) == postprocess_generated_text(
        text, TASK["generation_kwargs"]["until"], None
    )


HOSTILE = ["-", "$", ",", ".", "#", "#### ", "#### -", "1", "1,", "$.", "-1 ", "Question", "<", " "]


@pytest.mark.parametrize("unit", HOSTILE)
def test_long_repetitions_get_the_harness_s_verdict_too(unit: str) -> None:
    for text in (unit * 3_000, "#### 18 " + unit * 3_000, unit * 3_000 + "#### 18"):
        agree(text, "18")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the lab's data (../shared/gsm8k) is not here")
def test_on_real_solutions_in_many_forms_every_verdict_is_the_harness_s() -> None:
    problems = load_problems(GSM8K, split="test", limit=250)
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        whole = f"{problem.solution}\n#### {problem.answer}"  # what the harness has for gold
        for gold in (problem.answer, whole):
            for text in (
                whole,
                problem.solution,
                f"<reasoning>\n{problem.solution}\n</reasoning>\n<answer>\n{problem.answer}\n"
                "</answer>",
                f"The answer is **${problem.answer}.00**.",
                f"#### {other.answer}\nQuestion: {other.question}\nAnswer: {whole}",
                json.dumps(whole),
            ):
                agree(text, gold)
                agree(until_stop(text), gold)
