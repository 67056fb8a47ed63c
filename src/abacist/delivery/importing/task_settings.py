"""Data, prompt and rewards of a script, as settings of ``abacist train``."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from abacist.delivery.importing.notes import Draft
from abacist.delivery.importing.script import Script
from abacist.delivery.importing.script_data import Message
from abacist.delivery.importing.script_rewards import (
    OUR_TAG_NAMES,
    TAG,
)
from abacist.delivery.importing.values import Made, column_of
from abacist.errors import UsageError
from abacist.task.reply import parse_reply

_FILES = {"json", "csv", "parquet", "arrow", "text"}
# What is read of the data's way, or changes none of its rows.
_READ_STEPS = frozenset(
    {
        "map", "select", "take", "shuffle", "[]", "cast", "with_format", "set_format",
        "remove_columns", "select_columns", "flatten_indices", "rename_column", "rename_columns",
    }
)  # fmt: skip
_READ_ARGUMENTS = frozenset(
    {"path", "name", "split", "data_files", "cache_dir", "num_proc", "token", "trust_remote_code"}
)
# "Question:" on the last line of what stands before it, which is no instruction.
_LABEL = re.compile(r"(.*?)((?:(?<=\n)|\A)[^\n]{0,20}:\s*)?", re.DOTALL)
_SLICE = re.compile(r"\[:(\d+)\]")


def data_settings(script: Script, draft: Draft, *, dataset: str | None) -> None:
    """Where the problems come from. Raises UsageError, with the line, if that cannot be told."""
    data = script.data
    if dataset is not None:
        draft.set("dataset_name", dataset, None, "as you said")
        return
    load = data.load
    if load is None or load.name not in ("load_dataset", "load_from_disk", "from_json", "from_csv"):
        at = load.line if load is not None else script.trainer.lines.get("train_dataset")
        what = (
            f"the rows are made by {load.name}" if load else "where the rows come from is not told"
        )
        raise UsageError(
            f"{script.file.path}, {script.file.where(at or script.trainer.line)}: {what}.",
            "Write the rows to a JSONL file with the columns question and answer, and give it: "
            "--dataset_name FILE.",
        )
    name = load.args[0] if load.args else load.kwargs.get("path")
    config = load.args[1] if len(load.args) > 1 else load.kwargs.get("name")
    line = load.line
    if isinstance(name, str) and name in _FILES and "data_files" in load.kwargs:
        name, config = load.kwargs["data_files"], None
        line = load.lines["data_files"]
        if isinstance(name, dict):
            name = name.get("train")
        if isinstance(name, list) and len(name) == 1:
            name = name[0]
    if not isinstance(name, str) or not name:
        raise UsageError(
            f"{script.file.path}, {script.file.where(line)}: which data set is loaded cannot be "
            "told from the text.",
            "Give it: --dataset_name NAME.",
        )
    if name == "gsm8k":
        draft.changed(line, "gsm8k is openai/gsm8k on the Hub now")
        name = "openai/gsm8k"
    draft.set("dataset_name", name, line)
    if isinstance(config, str):
        draft.set("dataset_config", config, line)
    _split(script, draft)
    _columns(script, draft)
    for step in data.steps:
        if step.name in ("filter", "train_test_split", "shard"):
            draft.left_out(step.line, f"{step.name}(): rows are split by Abacist, and all are read")
        elif step.name not in _READ_STEPS:
            draft.left_out(step.line, f"{step.name}: what it does to the rows is not carried over")
    load = data.load
    for name, value in load.kwargs.items() if load is not None else ():
        if load is not None and name not in _READ_ARGUMENTS and value is not None:
            draft.left_out(
                load.lines.get(name, load.line), f"load_dataset({name}=…): not carried over"
            )


def _split(script: Script, draft: Draft) -> None:
    data = script.data
    split = data.split if isinstance(data.split, str) else "train"
    base, _, _ = split.partition("[")
    if base in ("test", "validation+test", "train+test", "all"):
        draft.wrong(
            data.split_line,
            f"it trains on the split {base!r}, so that no figure on the test problems means "
            "anything; here on train",
        )
        base = "train"
    if not isinstance(data.split, str | None) or "+" in split:
        draft.left_out(data.split_line, "several splits, or one that is not told: only "
                       f"{base or 'train'!r} is read")  # fmt: skip
    if base not in ("train", ""):
        draft.set("dataset_train_split", base, data.split_line)
    limit = int(found[1]) if (found := _SLICE.search(split)) else data.limit
    if limit:
        line = data.limit_line or data.split_line
        draft.set("num_train_problems", limit, line, "drawn by the seed")
    elif "[" in split or any(step.name == "select" for step in data.steps):
        draft.left_out(
            data.split_line or data.limit_line, "a part of the rows: --num_train_problems N"
        )


def _columns(script: Script, draft: Draft) -> None:
    data = script.data
    asked = next((one for one in reversed(data.messages) if one.role == "user"), None)
    question = column_of(asked.content if asked else data.plain_prompt)
    if question not in (None, "question"):
        draft.set("question_column", question, asked.line if asked else None)
    if data.row is None:
        return
    named = ("answer", "ground_truth", "gold", "target", "label", "solution", "final_answer")
    key = next((one for one in named if one in data.row), None)
    answer = column_of(data.row[key]) if key else None
    if answer not in (None, "answer"):
        draft.set("answer_column", answer, data.row.lines.get(key))


def prompt_settings(script: Script, draft: Draft, *, faithful: bool) -> set[str]:
    """System text and examples. Returns the names of the tags of the script's reply format."""
    messages = script.data.messages
    system = next((one for one in messages if one.role == "system"), None)
    text = system.content if system and isinstance(system.content, str) else None
    line = system.line if system else None
    if script.data.plain_prompt is not None:
        line = script.data.row.lines.get("prompt") if script.data.row is not None else None
        draft.changed(line, "the prompt is plain text: here it is a conversation, in the template "
                      "of the model")  # fmt: skip
        text = _around(script.data.plain_prompt, line, draft)
    elif messages and messages[-1].role == "user":
        before = _around(messages[-1].content, messages[-1].line, draft)
        if system is None and before is not None:
            text, line = before, messages[-1].line
            draft.changed(line, "the words before the question are the system text here")
        elif before is not None:
            draft.left_out(messages[-1].line, "the words before the question: it is put as it "
                           "stands")  # fmt: skip
    tags = set(TAG.findall(text or ""))
    is_other = bool(tags) and not tags >= OUR_TAG_NAMES
    for at, why in script.data.unread:
        draft.left_out(at, f"{why}: give the system text with --system_prompt")
    if text is None:
        if system is not None:
            draft.left_out(line, "the system text is computed; ours is used (--system_prompt gives "
                           "another)")  # fmt: skip
        elif messages and not script.data.unread:
            draft.wrong(messages[0].line, "no system text asks for the layout that rewards look "
                        "for; ours is used")  # fmt: skip
        draft.set("system_prompt", "default", None)
    elif faithful or tags >= OUR_TAG_NAMES:
        draft.set("system_prompt", text, line)
    elif is_other:
        named = ", ".join(f"<{tag}>" for tag in sorted(tags))
        draft.changed(
            line,
            f"its reply format is another one ({named}): rewards and verdict here read <reasoning> "
            "and <answer>, so our system text asks for those",
        )
        draft.set("system_prompt", "default", None)
    else:
        draft.changed(line, "its system text asks for no tags, and rewards and verdict here read "
                      "<reasoning> and <answer>: ours is used")  # fmt: skip
        draft.set("system_prompt", "default", None)
    _examples(script, messages, draft)
    return tags


def _around(prompt: Any, line: int | None, draft: Draft) -> str | None:
    """The instructions that stand before the question in a text; other words are named."""
    if isinstance(prompt, str):
        return None  # a text without a question
    pieces = prompt.args if isinstance(prompt, Made) and prompt.name == "text" else [prompt]
    if sum(not isinstance(one, str) for one in pieces) > 1:
        draft.left_out(line, "further columns in the prompt: the question is put as it stands")
    first = pieces[0] if isinstance(pieces[0], str) else ""
    before, label = _LABEL.fullmatch(first.rstrip()).groups()  # type: ignore[union-attr]
    after = [one.strip() for one in pieces[1:] if isinstance(one, str)]
    if words := [repr(_short(one)) for one in ((label or "").strip(), *after) if one]:
        draft.left_out(line, f"the words around the question ({', '.join(words)}): it is put as it "
                       "stands")  # fmt: skip
    return before.strip() or None


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def _examples(script: Script, messages: list[Message], draft: Draft) -> None:
    pairs = [
        (asked, told)
        for asked, told in pairwise(messages)
        if asked.role == "user" and told.role == "assistant"
    ]
    if not pairs:
        return
    line = pairs[0][1].line
    if all(isinstance(part.content, str) for pair in pairs for part in pair):
        rows = []
        for asked, told in pairs:
            reply = parse_reply(told.content)
            if reply.answer is None and "####" not in told.content:
                draft.left_out(told.line, "an example whose answer stands in another format")
                continue
            solution = told.content
            if reply.answer is not None:
                solution = f"{reply.reasoning or ''}\n#### {reply.answer}"
            rows.append({"question": asked.content, "answer": solution})
        if rows:
            draft.files["_shots.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
            draft.set("shots_file", "_shots.jsonl", line)
        return
    tests = [one for one in script.calls if one.name == "load_dataset" and _reads_test(one)]
    tests += [one for one in script.calls if one.name == "select" and _reads_test(one)]
    leaks = [one for one in tests if one not in script.data.steps and one is not script.data.load]
    if leaks:
        draft.wrong(
            leaks[0].line,
            "worked examples come from the test split: their answers are shown, and the problems "
            "are measured. Here they are drawn from the training problems",
        )
    counts = [
        count
        for one in script.calls
        if one.name == "select" and one not in script.data.steps
        and isinstance(one.args[0] if one.args else None, Made)
        and (count := _count_of(one))
    ]  # fmt: skip
    if counts:
        draft.set("num_shots", str(counts[0]), line, "drawn from the training problems")
    else:
        draft.left_out(line, "worked examples that are computed: --num_shots N draws N of them")


def _count_of(select: Made) -> int | None:
    rows = select.args[0]
    number = (
        rows.args[-1] if isinstance(rows, Made) and rows.name == "range" and rows.args else None
    )
    return number if isinstance(number, int) and 0 < number < 100 else None


def _reads_test(call: Made) -> bool:
    for step in call.chain():
        named = [step.kwargs.get("split"), *step.args]
        if any(isinstance(one, str) and one.partition("[")[0] == "test" for one in named):
            return True
    return False
