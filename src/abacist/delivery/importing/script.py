"""What a training script is made of: trainer, settings, model, LoRA, data, prompt, rewards."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.script_data import Data, read_data
from abacist.delivery.importing.scriptfile import ScriptFile
from abacist.delivery.importing.values import (
    REST,
    Class,
    Made,
    Symbol,
    Unknown,
    options_of,
)
from abacist.errors import UsageError

_POSITIONAL = (
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
    "reward_processing_classes", "callbacks", "optimizers", "peft_config",
)  # fmt: skip
_LORA_CALLS = ("LoraConfig", "get_peft_model")


@dataclass
class Script:
    """A script that trains with GRPO, taken apart."""

    file: ScriptFile
    reader: Reader
    calls: list[Made]
    trainer: Made
    #: further trainers: one configuration holds one training
    others: list[Made]
    own_trainer: Class | None
    config: Made | None
    is_config_passed: bool
    loader: Made | None
    model: Any
    model_line: int
    lora: Made | None
    is_lora_passed: bool
    #: whether a condition that is not known decides on LoRA
    is_lora_conditional: bool
    data: Data
    eval_data: Any
    rewards: list[tuple[Any, int]]
    #: what was taken where the text leaves a choice, with its line
    guesses: list[tuple[int, str]]

    @property
    def uses_unsloth(self) -> bool:
        return any(
            isinstance(binding.value, Symbol) and binding.value.dotted.startswith("unsloth")
            for binding in self.reader.module.names.values()
        )


def take_apart(file: ScriptFile) -> Script:
    """Find the trainer of a script and what it is given.

    Raises UsageError for a script that builds no GRPO trainer, naming what it builds instead.
    """
    reader = Reader(file.tree, {name: one.tree for name, one in file.modules.items()})
    trainers = [one for one in reader.made if one.name.endswith("GRPOTrainer")]
    if not trainers:
        _follow_the_rest(reader)
        trainers = [one for one in reader.made if one.name.endswith("GRPOTrainer")]
    calls = list(reader.made)
    if not trainers:
        raise _no_trainer(file, calls)
    trainer = trainers[-1]
    given = dict(zip(_POSITIONAL, trainer.args, strict=False)) | trainer.kwargs
    guesses: list[tuple[int, str]] = []
    config = _config(given, trainer, calls, guesses)
    loader, name, name_line, applied = _model(given.get("model"), calls)
    if loader is not None and not isinstance(given.get("model"), Made | str):
        guesses.append((loader.line, "which model the trainer is given cannot be told from the "
                        "text: the one that is loaded here is taken"))  # fmt: skip
    loras = [one for one in calls if one.name in _LORA_CALLS and one.name != "get_peft_model"]
    loras += [one for one in calls if one.name == "get_peft_model" and "unsloth" in one.dotted]
    loras += [one for one in calls if one.name == "get_peft_model" and "r" in one.kwargs]
    given_lora = given.get("peft_config")
    lora = next((one for one in options_of(given_lora) if isinstance(one, Made)), applied)
    # Of what is not told it cannot be said that it is no LoRA.
    is_untold = isinstance(given_lora, Unknown) or (
        lora is None and (REST in given or isinstance(given.get("model"), Unknown))
    )
    is_passed = lora is not None or is_untold
    if lora is None and loras:
        lora = loras[-1]
    has_lora = {
        any(step.name == "get_peft_model" for step in one.chain())
        for one in options_of(given.get("model")) if isinstance(one, Made)
    }  # fmt: skip
    is_choice = lora is not None and (is_untold or len(has_lora) > 1)
    if is_untold and all(isinstance(one, Made) for one in options_of(given_lora)):
        is_choice = False
        guesses.append((lora.line if lora else trainer.line, "which of several LoRA configurations "
                        "is used depends on a condition: this one is taken"))  # fmt: skip
    return Script(
        file=file,
        reader=reader,
        calls=calls,
        trainer=trainer,
        others=[
            one for one in calls
            if one is not trainer and one.name.endswith("Trainer") and one.name[:1].isupper()
        ],
        own_trainer=trainer.of if isinstance(trainer.of, Class) else None,
        config=config,
        is_config_passed=given.get("args") is not None or REST in given,
        loader=loader,
        model=name,
        model_line=name_line or trainer.lines.get("model", trainer.line),
        lora=lora,
        is_lora_passed=is_passed,
        is_lora_conditional=is_choice,
        data=read_data(given.get("train_dataset"), reader, calls, guesses),
        eval_data=given.get("eval_dataset"),
        rewards=_rewards(given.get("reward_funcs"), trainer, file),
        guesses=guesses,
    )  # fmt: skip


def _config(
    given: dict[str, Any], trainer: Made, calls: list[Made], guesses: list[tuple[int, str]]
) -> Made | None:
    passed = given.get("args")
    if isinstance(passed, Made):
        return passed
    found = [one for one in options_of(passed) if isinstance(one, Made)]
    found = found or [one for one in calls if one.name.endswith("GRPOConfig")]
    if not found:
        return None
    if passed is not None:
        guesses.append((found[-1].line, "which GRPOConfig the trainer is given "
                        f"{_why(passed)}: this one is taken"))  # fmt: skip
    return found[-1]


def _why(value: Any) -> str:
    return value.why if isinstance(value, Unknown) else "cannot be told from the text"


def _follow_the_rest(reader: Reader) -> None:
    """Functions that something foreign calls: by a decorator, ``fire``, a command line."""
    for function in list(reader.functions):
        names = {
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(function.node)
            if isinstance(node, ast.Name | ast.Attribute)
        }
        if any(name.endswith("GRPOTrainer") for name in names):
            reader.follow(function)


def _no_trainer(file: ScriptFile, calls: list[Made]) -> UsageError:
    others = [one for one in calls if one.name.endswith("Trainer")]
    if others:
        other = others[-1]
        return UsageError(
            f"{file.path}, {file.where(other.line)}: this builds a {other.name}, no GRPOTrainer.",
            "Abacist trains with GRPO only.",
        )
    configs = [one for one in calls if one.name.endswith("GRPOConfig")]
    if configs:
        return UsageError(
            f"{file.path}, {file.where(configs[-1].line)}: there is a GRPOConfig, but no "
            "GRPOTrainer that it is given to.",
            "Give the script or notebook that holds both.",
        )
    return UsageError(
        f"{file.path} builds no GRPOTrainer: it is no training script.",
        "import-gist reads scripts and notebooks that train with TRL's GRPOTrainer.",
    )


def _model(given: Any, calls: list[Made]) -> tuple[Made | None, Any, int, Made | None]:
    """The call that loads the model, its name with its line, and the LoRA put on it."""
    applied: Made | None = None
    at = given
    for _ in range(20):
        options = [one for one in options_of(at) if isinstance(one, Made)]
        at = next((one for one in options if one.name == "get_peft_model"), [*options, at][0])
        if not isinstance(at, Made):
            break
        if at.name == "get_peft_model":
            second = at.args[1] if len(at.args) > 1 else at.kwargs.get("peft_config")
            applied = second if isinstance(second, Made) else at
            at = at.args[0] if at.args else at.kwargs.get("model")
        elif at.name == "from_pretrained" or "model_name" in at.kwargs:
            return at, *_name_of(at), applied
        elif isinstance(at.of, Made):
            at = at.of
        else:
            at = at.args[0] if at.args else None
    if isinstance(given, str):
        return None, given, 0, applied
    loads = [one for one in calls if one.name == "from_pretrained" and "Token" not in one.dotted]
    if loads:
        return loads[-1], *_name_of(loads[-1]), applied
    return None, given, 0, applied


def _name_of(loader: Made) -> tuple[Any, int]:
    for key in ("model_name", "pretrained_model_name_or_path"):
        if key in loader.kwargs:
            return loader.kwargs[key], loader.lines.get(key, loader.line)
    return (loader.args[0] if loader.args else None), loader.line


def _rewards(given: Any, trainer: Made, file: ScriptFile) -> list[tuple[Any, int]]:
    line = trainer.lines.get("reward_funcs", trainer.line)
    rewards = list(given) if isinstance(given, list | tuple) else [given]
    if given is None or isinstance(given, Unknown) or not rewards:
        where = file.where(getattr(given, "line", line))
        why = "is an empty list" if given == [] else _why(given)
        raise UsageError(
            f"{file.path}, {where}: which rewards are trained on cannot be told from the text: "
            f"reward_funcs {why}.",
            "Write them into the call: reward_funcs=[first, second].",
        )
    return [(one, line) for one in rewards]
