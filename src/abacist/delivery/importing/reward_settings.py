"""The rewards of a script, as settings of ``abacist train`` and a file of the script's own ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from abacist.delivery.importing.extraction import CannotTake, RewardFile
from abacist.delivery.importing.notes import Draft
from abacist.delivery.importing.reward_inputs import inputs_of
from abacist.delivery.importing.script import Script
from abacist.delivery.importing.script_rewards import (
    GIST_NAMES,
    OUR_TAG_NAMES,
    Looks,
    Recognised,
    look_at,
    recognise,
)
from abacist.delivery.importing.values import Class, Function, Instance, Made, Symbol, Unknown
from abacist.errors import UsageError
from abacist.task.rewards import REWARD_SETS, is_built_in_name

_TRLS_REWARDS = {
    "accuracy_reward": ("correctness", "pays nothing for <answer>42</answer>"),
    "think_format_reward": ("strict_format", "asks for <think> tags"),
}


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
    gold = draft.settings["answer_column"].value if "answer_column" in draft.settings else "answer"
    for at, (value, line) in enumerate(script.rewards):
        weight = weights[at] if at < len(weights) else 1.0
        if not isinstance(value, Function) or script.file.module_of(value.node.lineno):
            name = _foreign_reward(script, value, line, draft, gone, gold, faithful=faithful)
            if name is not None:
                names[name] = names.get(name, 0.0) + weight
            continue
        looks = look_at(value, script.reader)
        found = recognise(looks)
        seen.append((looks, found))
        at_line = value.node.lineno
        if value.of_class:
            gone.append((at_line, f"{value.name} is a method of the class {value.of_class}: write "
                         "it as a function"))  # fmt: skip
            continue
        if found is not None and (not faithful or found.is_historic):
            name = f"gist.{GIST_NAMES[found.name]}" if faithful else found.name
            if is_other and not faithful:
                continue
            names[name] = names.get(name, 0.0) + weight * found.weight
            note = f"{value.name} is our `{name}`"
            factor = f", {found.weight:g} times as much" if found.weight != 1 else ""
            draft.changed(at_line, note + factor)
            continue
        if not faithful and (foreign := _other_format(value.name, looks)):
            gone.append((at_line, foreign))
            continue
        try:
            inputs = inputs_of(looks, script, gold)
            name = taken.take(value, inputs.adapter, inputs.arguments)
        except CannotTake as reason:
            gone.append((at_line, f"{value.name}: {reason} ({script.file.where(reason.line)})"))
            continue
        names[name] = names.get(name, 0.0) + weight
        handed = f"; it is handed {inputs}, as in the script" if inputs else ""
        draft.changed(at_line, f"{value.name} is the script's own: it is taken out, into a file "
                      f"beside the configuration{handed}")  # fmt: skip
        if script.data.is_text and looks.reads_messages and not looks.tells_types:
            draft.wrong(at_line, f"{value.name} reads messages, and the prompts are texts: TRL "
                        "hands it texts. Here they are messages")  # fmt: skip
        if script.data.is_text is False and not (looks.reads_messages or looks.hands_on):
            draft.wrong(at_line, f"{value.name} never reads the content of a message: what it is "
                        "handed is a list of one message, whatever the reply")  # fmt: skip
        if value.node.args.kwarg is None:
            draft.wrong(at_line, f"{value.name} takes no **kwargs: TRL hands every column to every "
                        "reward, and the call fails. It takes them now")  # fmt: skip
    for line, why in gone:
        draft.left_out(line, why)
    if is_other and not faithful:
        # What is paid for which part of another format says nothing of ours.
        own = {one: weight for one, weight in names.items() if one in taken.parts or ":" in one}
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


def _other_format(name: str, looks: Looks) -> str:
    """What a reward looks for that is not in our format, or ""."""
    foreign = ", ".join(f"<{tag}>" for tag in sorted(looks.tags - OUR_TAG_NAMES))
    return f"{name} looks for {foreign}, which is another format" if foreign else ""


def _foreign_reward(
    script: Script,
    value: Any,
    line: int,
    draft: Draft,
    gone: list[tuple[int, str]],
    gold: str,
    *,
    faithful: bool,
) -> str | None:
    """The name of a reward that is not a function of the script's, or None with a reason."""
    function = script.reader.resolved(value)
    if isinstance(function, Function):
        try:
            return _beside(script, function, gold, faithful=faithful)
        except CannotTake as reason:
            gone.append((line, str(reason)))
            return None
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
        case Unknown():
            said = [f"`{one.name}`" for one in value.options if isinstance(one, Function)]
            gone.append((line, f"{' or '.join(said) or 'a reward'}: which one is paid {value.why}; "
                         "write those that are paid into reward_funcs"))  # fmt: skip
        case _:
            gone.append((line, "a reward that the text does not tell: write it as a function"))
    return None


def _beside(script: Script, function: Function, gold: str, *, faithful: bool) -> str:
    """The name of a reward in a module beside the script. Raises CannotTake where it is none."""
    node = function.node
    module = script.file.module_of(node.lineno)
    assert module is not None  # whatever is resolved stands in one
    name = f"{function.name} of {module.path.name}"
    if function.of_class:
        raise CannotTake(f"{name} is a method of the class {function.of_class}: write it as a "
                         "function", node.lineno)  # fmt: skip
    if not any(one is node for one in module.tree.body):
        raise CannotTake(f"{name} is made in a function: write it as a function of the module",
                         node.lineno)  # fmt: skip
    looks = look_at(function, script.reader)
    if not faithful and (foreign := _other_format(name, looks)):
        raise CannotTake(foreign, node.lineno)
    inputs = inputs_of(looks, script, gold)
    if script.data.is_text is None:  # and so it is not known to want texts
        inputs = replace(inputs, texts=False)
    if inputs:
        raise CannotTake(f"{name} is handed {inputs} in the script, and would not be here: put it "
                         "into the script, and import that again", node.lineno)  # fmt: skip
    return f"{module.path.resolve()}:{function.name}"


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
