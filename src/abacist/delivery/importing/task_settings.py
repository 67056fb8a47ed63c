"""Data, prompt and rewards of a script, as settings of ``abacist train``."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from abacist.delivery.importing.extraction import CannotTake, RewardFile
from abacist.delivery.importing.notes import Draft
from abacist.delivery.importing.script import Message, Script, column_of
from abacist.delivery.importing.script_rewards import (
    GIST_NAMES,
    OUR_TAG_NAMES,
    TAG,
    Looks,
    Recognised,
    look_at,
    recognise,
)
from abacist.delivery.importing.values import Class, Function, Instance, Made, Symbol
from abacist.errors import UsageError
from abacist.task.reply import parse_reply
from abacist.task.rewards import REWARD_SETS, is_built_in_name

_FILES = {"json", "csv", "parquet", "arrow", "text"}
# What is read of the data's way, or changes none of its rows.
_READ_STEPS = frozenset(
    {
        "map", "select", "take", "shuffle", "[]", "cast", "with_format", "set_format",
        "remove_columns", "select_columns", "flatten_indices",
    }
)  # fmt: skip
_READ_ARGUMENTS = frozenset(
    {"path", "name", "split", "data_files", "cache_dir", "num_proc", "token", "trust_remote_code"}
)
_SLICE = re.compile(r"\[:(\d+)\]")
_TRLS_REWARDS = {
    "accuracy_reward": ("correctness", "pays nothing for <answer>42</answer>"),
    "think_format_reward": ("strict_format", "asks for <think> tags"),
}


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
        text, line = _plain_text(script, draft)
    tags = set(TAG.findall(text or ""))
    is_other = bool(tags) and not tags >= OUR_TAG_NAMES
    if text is None:
        if system is not None:
            draft.left_out(line, "the system text is computed; ours is used")
        elif messages:
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
    _around_question(messages, draft)
    return tags


def _plain_text(script: Script, draft: Draft) -> tuple[str | None, int | None]:
    """What stands before the question in a prompt that is plain text."""
    prompt, line = script.data.plain_prompt, script.data.row.lines.get("prompt")
    draft.changed(line, "the prompt is plain text: here it is a conversation, in the template of "
                  "the model")  # fmt: skip
    first = prompt
    while isinstance(first, Made) and first.name == "text" and first.args:
        first = first.args[0]
    return (first.strip() or None if isinstance(first, str) else None), line


def _around_question(messages: list[Message], draft: Draft) -> None:
    if messages and isinstance(messages[-1].content, Made) and messages[-1].content.name == "text":
        draft.left_out(messages[-1].line, "the words around the question: it is put as it stands")


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


def reward_settings(
    script: Script, tags: set[str], draft: Draft, *, faithful: bool
) -> list[tuple[Looks, Recognised | None]]:
    """Rewards by name, with their weights; returns what the script's own functions show.

    Raises UsageError if nothing is left that could be paid.
    """
    taken = RewardFile(script.file, dict(script.reader.module.names))
    names: dict[str, float] = {}
    seen: list[tuple[Looks, Recognised | None]] = []
    weights = _weights(script, draft)
    is_other = bool(tags) and not tags >= OUR_TAG_NAMES
    gone: list[tuple[int, str]] = []
    for at, (value, line) in enumerate(script.rewards):
        weight = weights[at] if at < len(weights) else 1.0
        if not isinstance(value, Function):
            name = _foreign_reward(script, value, line, draft, gone)
            if name is not None:
                names[name] = names.get(name, 0.0) + weight
            continue
        looks = look_at(value, script.reader)
        found = recognise(looks)
        seen.append((looks, found))
        at_line = value.node.lineno
        if found is not None and (not faithful or found.is_historic):
            name = f"gist.{GIST_NAMES[found.name]}" if faithful else found.name
            if is_other and not faithful:
                continue
            names[name] = names.get(name, 0.0) + weight * found.weight
            note = f"{value.name} is our `{name}`"
            factor = f", {found.weight:g} times as much" if found.weight != 1 else ""
            draft.changed(at_line, note + factor)
            continue
        foreign = looks.tags - OUR_TAG_NAMES
        if foreign and not faithful:
            named = ", ".join(f"<{tag}>" for tag in sorted(foreign))
            gone.append((at_line, f"{value.name} looks for {named}, which is another format"))
            continue
        try:
            name = taken.take(value)
        except CannotTake as reason:
            gone.append((at_line, f"{value.name}: {reason} ({script.file.where(reason.line)})"))
            continue
        names[name] = names.get(name, 0.0) + weight
        draft.changed(at_line, f"{value.name} is the script's own: it is taken out, into a file "
                      "beside the configuration")  # fmt: skip
        if value.node.args.kwarg is None:
            draft.wrong(at_line, f"{value.name} takes no **kwargs: TRL hands every column to every "
                        "reward, and the call fails. It takes them now")  # fmt: skip
    for line, why in gone:
        draft.left_out(line, why)
    if is_other and not faithful:
        # What is paid for which part of another format says nothing of ours.
        own = {name: weight for name, weight in names.items() if name in taken.parts}
        names = dict.fromkeys([func.__name__ for func in REWARD_SETS["default"]], 1.0) | own
        draft.changed(script.rewards[0][1], "what it pays for its format: our set `default` is paid"
                      + (", and the script's own beside it" if own else ""))  # fmt: skip
    if not names:
        line, why = gone[0] if gone else (script.trainer.line, "no reward is given")
        raise UsageError(
            f"{script.file.path}, {script.file.where(line)}: none of the rewards can be carried "
            f"over: {why}.",
            "Put your rewards into a module of their own, and name them: --reward_funcs "
            "module.function.",
        )
    _say_missing_packages(taken, draft)
    if taken.parts:
        draft.files["_rewards.py"] = taken.text()
    line = script.rewards[0][1]
    sets = {"gist": [f"gist.{func.__name__}" for func in REWARD_SETS["gist"]],
            "default": [func.__name__ for func in REWARD_SETS["default"]]}  # fmt: skip
    whole = next((one for one, members in sets.items() if set(members) <= set(names)), None)
    is_even = all(abs(weight - 1) < 1e-9 for weight in names.values())
    places = {name: f"_rewards.py:{name}" for name in taken.parts}
    if whole is not None and is_even:
        rest = [places.get(name, name) for name in names if name not in sets[whole]]
        draft.set("reward_funcs", [whole, *rest], line)
    else:
        draft.set("reward_funcs", [places.get(name, name) for name in names], line)
        if not is_even:
            draft.set("reward_weights", [round(weight, 6) for weight in names.values()], line)
    if faithful:
        draft.set("allow_hackable_rewards", True, None, "the script's rewards, as they are")
    return seen


def _weights(script: Script, draft: Draft) -> list[float]:
    given = draft.settings.pop("reward_weights", None)
    if given is None or not isinstance(given.value, list):
        return []
    if script.rewards and len(given.value) != len(script.rewards):
        draft.wrong(given.line, f"{len(given.value)} reward_weights for {len(script.rewards)} "
                    "rewards: TRL refuses that. The rest weigh 1 here")  # fmt: skip
    return [float(one) if isinstance(one, int | float) else 1.0 for one in given.value]


def _foreign_reward(
    script: Script, value: Any, line: int, draft: Draft, gone: list[tuple[int, str]]
) -> str | None:
    """The name of a reward that is not a function of the script's, or None with a reason."""
    match value:
        case Symbol():
            if value.dotted.startswith("abacist.") and is_built_in_name(value.last):
                return value.last
            if value.dotted.startswith("trl.") and value.last in _TRLS_REWARDS:
                name, why = _TRLS_REWARDS[value.last]
                draft.changed(line, f"TRL's {value.last} {why}: `{name}` is in its place")
                return name
            beside = script.file.path.parent / Path(*value.dotted.split(".")[:-1])
            if beside.with_suffix(".py").is_file():
                return f"{beside.resolve()}.py:{value.last}"
            gone.append((line, f"{value.dotted} is imported from a module that is not beside the "
                         "script: name it with --reward_funcs"))  # fmt: skip
        case str():
            gone.append((line, f"{value!r} is a reward model: rewards here are functions"))
        case Class() | Instance():
            gone.append((line, "an object of the script's own class: write it as a function"))
        case Made():
            gone.append((line, f"what {value.name}() of {script.file.where(value.line)} makes: "
                         "write it as a function"))  # fmt: skip
        case _:
            gone.append((line, "a reward that the text does not tell: write it as a function"))
    return None


def _say_missing_packages(taken: RewardFile, draft: Draft) -> None:
    from importlib.util import find_spec

    for package in sorted(taken.packages):
        try:
            is_here = find_spec(package) is not None
        except (ImportError, ValueError):
            is_here = False
        if not is_here:
            draft.left_out(None, f"the package {package}, which a reward needs, is not installed "
                           "here")  # fmt: skip
