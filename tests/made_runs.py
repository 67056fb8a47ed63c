"""Run folders made of texts, without a model: what the report is tested on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from abacist.proof.comparison.compare import compare
from abacist.proof.evaluation import Evaluation
from abacist.records.provenance import build_manifest
from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.records.rundir import RunDir, write_json
from abacist.task.answers import same_answer
from abacist.task.reply import parse_reply, render_reply
from abacist.task.step_rewards import step_rewards
from evaluated import BARE, GOOD, SILENT, WORKLESS, WRONG, evaluation

TEXTS = (GOOD, WRONG, WORKLESS, BARE, SILENT, render_reply("1 + 1 = 2", "2") + " and more")
SETTINGS = {
    "model_name_or_path": "tiny",
    "dataset_name": "generated",
    "max_steps": 4,
    "num_generations": 4,
    "reward_weights": None,
    "learning_rate": 1e-3,
}

#: What a model might write to harm a page, a terminal or a table, each on its own.
HOSTILE = (
    "<script>window.harmed = 1</script>",
    "</script><script>window.harmed = 1</script>",
    '<img src=x onerror="window.harmed = 1">',
    "<svg onload=window.harmed=1>",
    "<iframe srcdoc='<script>parent.harmed=1</script>'></iframe>",
    '"><body onload=window.harmed=1>',
    "<a href='javascript:window.harmed=1'>click</a>",
    "javascript:window.harmed=1",
    "<style>body{display:none}</style>",
    "<link rel=stylesheet href=http://localhost:9/x.css>",
    "<meta http-equiv=refresh content='0;url=http://localhost:9/'>",
    "<base href=http://localhost:9/>",
    "<form action=http://localhost:9/><button>go</button></form>",
    "<object data=http://localhost:9/></object>",
    "<embed src=http://localhost:9/>",
    "<video src=http://localhost:9/ autoplay></video>",
    "<math><mi xlink:href='javascript:window.harmed=1'>x</mi></math>",
    "<!-- ", "--> <b>bold</b>", "<![CDATA[", "]]>", "&lt;b&gt;", "&#x3c;script&#x3e;", "&amp;amp;",
    "{{ 7 * 7 }}", "{% raw %}", "{# comment #}", "${7*7}", "#{7*7}", "<%= 7 * 7 %>",
    "\x1b[2J\x1b[31mred", "\x1b]8;;http://localhost:9\x07link\x1b]8;;\x07", "\x07\x08\x7f",
    "a\x00b", "\ud800 half \udfff", "\u202eright to left\u202c", "\u2066isolated\u2069",
    "\u061c\u180e", "\u200b\u200d\ufeff", "line\u2028separator\u2029", "\r\rreturn",
    "=cmd|' /C calc'!A0", "@SUM(1+1)", "+1+1", "-1+1",
    "[link](javascript:window.harmed=1)", "![image](http://localhost:9/x.png)", "`code` **bold**",
    "$\\frac{1}{2}$ $$x$$", "\\u003cscript\\u003e", "😀" * 50, "Z̤͔a̘l̡g̢o̧" * 20, "é́" * 30,
    "<reasoning>" * 200, "</answer>" * 200, "<answer>\n" + "7" * 3000 + "\n</answer>",
    "x" * 30_000, "word " * 5_000,
)  # fmt: skip


def made_run(
    path: Path,
    *,
    steps: int = 4,
    groups: int = 2,
    texts: Sequence[str] = TEXTS,
    finished: bool = True,
    seed: int = 0,
    pays_steps: bool = False,
) -> Path:
    """A whole run in ``path``: config, manifest, metrics, times, rollouts, both evaluations.

    Replies are ``texts`` in turn, beginning at number ``seed``; with ``pays_steps`` each of their
    steps was paid.
    """
    texts_in_turn = itertools.cycle([*texts[seed:], *texts[:seed]])
    run = RunDir(path)
    path.mkdir(parents=True)
    run.write_manifest(
        build_manifest(seed=seed, argv=["abacist", "train"], source="generated")
        | {"finished": finished, "control": "none"}
    )
    run.config_path.write_text(yaml.safe_dump(SETTINGS | {"max_steps": steps}), encoding="utf-8")
    with (
        run.metrics_path.open("w", encoding="utf-8") as metrics,
        run.timings_path.open("w", encoding="utf-8") as timings,
    ):
        for step in range(1, steps + 1):
            rows = [
                rollout(path.name, step, group, member, next(texts_in_turn))
                for group in range(groups)
                for member in range(4)
            ]
            if pays_steps:
                rows = [with_steps(row) for row in rows]
            write_rollouts(run.rollouts_dir / f"step-{step:06d}.parquet", rows)
            mean = sum(row.reward or 0 for row in rows) / len(rows)
            row = {
                "step": step, "loss": 0.1, "grad_norm": 0.5, "entropy": 0.3, "reward": mean,
                "frac_reward_zero_std": 0.25, "completions/mean_length": 20.0 + step,
                "completions/clipped_ratio": 0.1, "rewards/correctness/mean": mean / 2,
                "rewards/strict_format/mean": 0.4,
            }  # fmt: skip
            metrics.write(json.dumps(row) + "\n")
            timings.write(json.dumps({"step": step, "step_time": 2.5, "rollout_time": 1.0}) + "\n")
        metrics.write(json.dumps({"step": steps, "eval_accuracy": 0.5}) + "\n")
    if finished:
        before, after = made_evaluations()
        before.save(run.evals_dir / "before")
        after.save(run.evals_dir / "after")
        write_json(run.evals_dir / "verdict.json", compare(before, after).to_json())
    return path


def made_evaluations() -> tuple[Evaluation, Evaluation]:
    """Twenty problems before and after: six gained, one lost."""
    before = [[GOOD] if at % 4 == 0 else [WRONG] for at in range(20)]
    after = [[GOOD] if at % 2 == 0 or at == 1 else [WRONG] for at in range(20)]
    after[4] = [SILENT]
    return evaluation(before), evaluation(after)


def with_steps(row: Rollout) -> Rollout:
    """The reply as a training with step rewards keeps it, by a reference that comes to 7 and 12."""
    solution = "3 + 4 = 7, 7 + 5 = 12"
    steps = step_rewards(row.completion, solution, is_correct=row.is_correct)
    return replace(row, steps=steps)


def rollout(run_id: str, step: int, group: int, member: int, text: str) -> Rollout:
    """One reply to the problem whose answer is 7, judged and paid for being right."""
    answer = parse_reply(text).answer
    is_correct = same_answer(answer, "7")
    rewards = {"correctness": 2.0 * is_correct, "strict_format": 0.5 * parse_reply(text).strict}
    return Rollout(
        run_id=run_id, step=step, split="train", group=group, member=member,
        messages=[{"role": "system", "content": "Think."},
                  {"role": "user", "content": f"How much is 3 + 4, asked for time {group}?"}],
        completion=text, completion_ids=[1, 2], prompt_tokens=9,
        completion_tokens=1 + len(text) // 4,
        stop_reason=StopReason.EMPTY if not text else StopReason.STOPPED,
        problem_id=f"p{group:03d}", difficulty=2, gold="7", read_answer=answer,
        is_correct=is_correct, rewards=rewards, reward=sum(rewards.values()),
        advantage=sum(rewards.values()) - 1.0,
    )  # fmt: skip
