"""What is wrong in a script, beside settings that TRL no longer takes.

Each rule is about one thing that is known to spoil such runs, and names the line it stands on. The
rewards that ours replace are judged by what they do, so a mended copy of the gist is not blamed for
what its author mended.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from abacist.delivery.importing.notes import Draft
from abacist.delivery.importing.script import Script
from abacist.delivery.importing.script_rewards import Looks, Recognised
from abacist.delivery.importing.settings import secrets_in
from abacist.delivery.importing.values import REST, Function, Made, column_of

LOW_LORA_RATE = 1e-5
SHORT_REPLY_TOKENS = 200
# TRL 0.14, for which such scripts were written, took the first where they set nothing; TRL now
# takes the second.
CHANGED_DEFAULTS: dict[str, tuple[object, object]] = {
    "beta": (0.04, 0.0),
    "temperature": (0.9, 1.0),
    "loss_type": ("grpo", "dapo"),
    "max_completion_length": (256, 512),
}


def note_defects(
    script: Script, seen: Sequence[tuple[Looks, Recognised | None]], draft: Draft
) -> None:
    """Add a note for every defect that is found."""
    for looks, found in seen:
        _of_reward(looks, found, draft)
    _of_formats_together(seen, draft)
    _of_unused_rewards(script, draft)
    _of_golds(script, draft)
    _of_training(script, draft)
    _of_tokenizer(script, draft)
    _of_evaluation(script, draft)
    for line in secrets_in(script.file.tree):
        draft.wrong(line, "a token or key stands in the script: revoke it, and set it outside")


def _of_reward(looks: Looks, found: Recognised | None, draft: Draft) -> None:
    for line in looks.evaluates:
        draft.wrong(line, "eval() or exec() runs what the model wrote: it can do anything")
    for one in looks.patterns:
        if found is None or found.name not in ("strict_format", "soft_format"):
            continue
        if one.stops_at_lines:
            draft.wrong(one.line, "without re.DOTALL a dot matches no line break: reasoning on "
                        "several lines earns nothing")  # fmt: skip
        plain = one.text.replace("\\n", "\n")
        if plain.endswith((">\n$", ">\n\\Z")):
            draft.wrong(one.line, "it wants a line break after the last tag, which a chat model "
                        "does not write: it stops there")  # fmt: skip
    if found is None:
        return
    if found.name == "integer":
        for line in looks.digits[:1]:
            draft.wrong(line, "isdigit() rejects -5 and 1,450, and accepts ²")
    if found.name == "correctness":
        line = looks.shape.line if looks.shape else looks.function.node.lineno
        draft.wrong(line, "right or wrong by equality of texts: $42, 42.0, 1,000, **42** "
                    " and \\boxed{42} are wrong")  # fmt: skip
    if found.name in ("correctness", "integer"):
        opening = [(text, line) for text, line in looks.splits_at if not text.startswith("</")]
        for text, line in opening[:1]:
            said = (
                f"what follows the last {text} is the answer, and without one the whole reply: a "
                "bare 42 is paid, and so is a list of guesses with the right one last"
            )
            if all(note.text != said for note in draft.notes):
                draft.wrong(line, said)
    if found.name == "xml_count" and looks.shape and looks.shape.has_penalty:
        line = looks.counted[-1][1] if looks.counted else looks.function.node.lineno
        draft.wrong(line, "its penalty counts the whole reply where the final line break is "
                    "missing, and has no bound: the shortest wrong reply wins")  # fmt: skip


def _of_formats_together(seen: Sequence[tuple[Looks, Recognised | None]], draft: Draft) -> None:
    strict = [looks for looks, found in seen if found and found.name == "strict_format"]
    soft = [looks for looks, found in seen if found and found.name == "soft_format"]
    if strict and soft and soft[0].patterns and soft[0].patterns[0].stops_at_lines:
        draft.wrong(soft[0].patterns[0].line, "a reply that fits the strict pattern has line "
                    "breaks that this one does not match: no reply earns both")  # fmt: skip


def _of_unused_rewards(script: Script, draft: Draft) -> None:
    """Rewards that nothing in the script names: not a list, not a wrapper, not a text."""
    named: set[str] = set()
    by_condition: set[str] = set()
    skipped = script.reader.skipped_nodes()
    for node in ast.walk(script.file.tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name):
                (by_condition if id(node) in skipped else named).add(name)
            case ast.Constant(value=str() as name):
                named.add(name)
    paid = [value.node for value, _ in script.rewards if isinstance(value, Function)]
    for function in script.reader.functions:
        node = function.node
        names = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
        is_used = (
            any(node is one for one in paid)
            or function.name in named
            or (function.name.startswith("__") and function.name.endswith("__"))
            or bool(getattr(node, "decorator_list", ()))  # a decorator may keep it
            or script.file.module_of(node.lineno) is not None
        )
        if "completions" in names and not is_used:
            if function.name in by_condition:
                draft.left_out(node.lineno, f"{function.name}: it is paid only under a condition "
                               "that does not hold by default")  # fmt: skip
                continue
            draft.wrong(node.lineno, f"{function.name} is defined and not paid: it is not in "
                        "reward_funcs")  # fmt: skip


def _of_golds(script: Script, draft: Draft) -> None:
    """GSM8K's golds keep their commas: 93 of 8,792 match nothing that is compared as text."""
    row = script.data.row
    if row is None:
        return
    for key, value in row.items():
        if key == "prompt" or not isinstance(value, Made) or column_of(value) is None:
            continue
        steps = list(value.chain())
        cuts = any(one.name in ("split", "partition", "rpartition") and "####" in one.args
                   for one in steps)  # fmt: skip
        drops = any(one.name == "replace" and one.args[:2] == [",", ""] for one in steps)
        if cuts and not drops:
            draft.wrong(value.line, "golds keep their commas (1,450), and no reply without them is "
                        "right: 79 training problems of GSM8K")  # fmt: skip


def is_given(script: Script, name: str) -> bool:
    """Whether the script gives a setting, be its value told or not."""
    return script.config is not None and name in script.config.kwargs


def _of_training(script: Script, draft: Draft) -> None:
    settings = draft.settings
    rate = settings.get("learning_rate")
    uses_lora = "use_peft" in settings and settings["use_peft"].value is True
    if rate and uses_lora and isinstance(rate.value, int | float) and rate.value < LOW_LORA_RATE:
        draft.wrong(rate.line, f"a learning rate of {rate.value:g} is one for full training: with "
                    "LoRA published runs take 1e-5 to 2e-4")  # fmt: skip
    budget = settings.get("max_completion_length")
    if budget and isinstance(budget.value, int) and budget.value < SHORT_REPLY_TOKENS:
        draft.wrong(budget.line, f"{budget.value} tokens cut many solutions off, and what is cut "
                    "off is paid nothing")  # fmt: skip
    if script.config is not None:
        for name, (then, now) in CHANGED_DEFAULTS.items():
            if not is_given(script, name) and name not in settings:
                words = f"{name} is not set: TRL's default was {then} and is {now} now"
                draft.changed(script.config.line, words)
    is_run = any(one.name == "train" and one.of is script.trainer for one in script.calls)
    if not is_run:
        draft.wrong(script.trainer.line, "trainer.train() is never called, as far as it shows")
    if script.own_trainer is not None:
        draft.left_out(script.own_trainer.node.lineno, f"{script.own_trainer.node.name}: what the "
                       "script's own trainer overrides")  # fmt: skip
    if not script.is_config_passed and script.config is not None:
        draft.wrong(script.config.line, "this GRPOConfig is not given to the trainer (args=…), "
                    "which takes TRL's defaults; it is used here")  # fmt: skip
    if REST in script.trainer.kwargs:
        draft.left_out(script.trainer.line, "further arguments of the trainer, which the text does "
                       "not tell")  # fmt: skip
    for other in script.others:
        if other.node is script.trainer.node:
            draft.left_out(other.line, "this trainer is built several times, and a configuration "
                           "holds one training: the last")  # fmt: skip
            continue
        draft.left_out(other.line, f"{other.name}: a training of its own, and a configuration "
                       f"holds one: that of {script.file.where(script.trainer.line)}. Where this "
                       "one comes before it, train it first, and give what it saves with "
                       "--model_name_or_path")  # fmt: skip
    for line, text in script.guesses:
        draft.changed(line, text)
    for name in ("callbacks", "optimizers", "reward_processing_classes"):
        if script.trainer.kwargs.get(name):
            line = script.trainer.lines.get(name, script.trainer.line)
            draft.left_out(line, f"{name}: no counterpart in a configuration")


def _of_tokenizer(script: Script, draft: Draft) -> None:
    tokenizers = [
        one for one in script.calls
        if one.name == "from_pretrained" and "Tokenizer" in one.dotted
    ]  # fmt: skip
    for node in ast.walk(script.file.tree):
        is_pad = isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Attribute) and target.attr in ("pad_token", "pad_token_id")
            for target in node.targets
        )
        if is_pad and "eos" in ast.unparse(node.value):  # type: ignore[attr-defined]
            draft.wrong(node.lineno, "padding with the end token: a mask made from it hides the "  # type: ignore[attr-defined]
                        "ends of replies. A padding token of the model's own is taken")  # fmt: skip
            return
    sides = [one for one in tokenizers if one.kwargs.get("padding_side") == "right"]
    for one in sides:
        line = one.lines.get("padding_side", one.line)
        draft.wrong(line, "padding on the right: replies would be written after it. Prompts are "
                    "padded on the left here")  # fmt: skip
    name = script.model if isinstance(script.model, str) else ""
    if (
        tokenizers
        and "llama" in name.lower()
        and not any("pad_token" in one.kwargs for one in tokenizers)
    ):
        draft.wrong(tokenizers[-1].line, "Llama's tokenizer has no padding token, and the script "
                    "sets none: TRL then pads with the end token")  # fmt: skip
    is_base = name and not any(
        mark in name.lower() for mark in ("instruct", "-it", "chat", "r1", "zephyr")
    )
    if is_base and script.data.messages:
        has_template = any("chat_template" in one.kwargs for one in tokenizers) or any(
            one.name == "get_chat_template" for one in script.calls
        )
        if not has_template:
            draft.changed(script.model_line, f"{name} looks like a base model, which may have no "
                          "chat template and does not stop at the end of a turn: Abacist gives it "
                          "both")  # fmt: skip


def _of_evaluation(script: Script, draft: Draft) -> None:
    given = script.eval_data
    if given is None and REST in script.trainer.kwargs:
        return
    if given is None:
        draft.wrong(script.trainer.line, "nothing is measured on problems that were not trained "
                    "on: rewards rise whether or not it learns. 300 held-out problems are measured "
                    "before and after, and compared")  # fmt: skip
        return
    line = script.trainer.lines.get("eval_dataset", script.trainer.line)
    if given is script.trainer.kwargs.get("train_dataset"):
        draft.wrong(line, "it is evaluated on the training problems: that measures memory. "
                    "Held-out problems are measured here")  # fmt: skip
    else:
        draft.changed(line, "held-out problems are cut from the training split; the test split is "
                      "for `abacist eval --split test`")  # fmt: skip
