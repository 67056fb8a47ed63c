"""What a training script is made of: trainer, settings, model, LoRA, data, prompt, rewards."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.scriptfile import ScriptFile
from abacist.delivery.importing.values import Class, Function, Made, Symbol, Table, Unknown
from abacist.errors import UsageError

_POSITIONAL = (
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
    "reward_processing_classes", "callbacks", "optimizers", "peft_config",
)  # fmt: skip
_LORA_CALLS = ("LoraConfig", "get_peft_model")


@dataclass
class Message:
    """One turn of the prompt: its role, its content as read, and the line."""

    role: str
    content: Any
    line: int


@dataclass
class Data:
    """Where the training rows come from, and what is done to them."""

    load: Made | None = None
    split: Any = None
    split_line: int = 0
    steps: list[Made] = field(default_factory=list)
    row: Any = None
    messages: list[Message] = field(default_factory=list)
    plain_prompt: Any = None
    limit: int | None = None
    limit_line: int = 0


@dataclass
class Script:
    """A script that trains with GRPO, taken apart."""

    file: ScriptFile
    reader: Reader
    calls: list[Made]
    trainer: Made
    own_trainer: Class | None
    config: Made | None
    is_config_passed: bool
    loader: Made | None
    model: Any
    model_line: int
    lora: Made | None
    is_lora_passed: bool
    data: Data
    eval_data: Any
    rewards: list[tuple[Any, int]]

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
    reader = Reader(file.tree)
    trainers = [one for one in reader.made if one.name.endswith("GRPOTrainer")]
    if not trainers:
        _follow_the_rest(reader)
        trainers = [one for one in reader.made if one.name.endswith("GRPOTrainer")]
    calls = list(reader.made)
    if not trainers:
        raise _no_trainer(file, calls)
    trainer = trainers[-1]
    given = dict(zip(_POSITIONAL, trainer.args, strict=False)) | trainer.kwargs
    configs = [one for one in calls if one.name.endswith("GRPOConfig")]
    passed = given.get("args")
    config = passed if isinstance(passed, Made) else configs[-1] if configs else None
    loader, name, name_line, applied = _model(given.get("model"), calls)
    loras = [one for one in calls if one.name in _LORA_CALLS and one.name != "get_peft_model"]
    loras += [one for one in calls if one.name == "get_peft_model" and "unsloth" in one.dotted]
    loras += [one for one in calls if one.name == "get_peft_model" and "r" in one.kwargs]
    given_lora = given.get("peft_config")
    lora = given_lora if isinstance(given_lora, Made) else applied
    is_passed = lora is not None
    if lora is None and loras:
        lora = loras[-1]
    return Script(
        file=file,
        reader=reader,
        calls=calls,
        trainer=trainer,
        own_trainer=trainer.of if isinstance(trainer.of, Class) else None,
        config=config,
        is_config_passed=passed is not None,
        loader=loader,
        model=name,
        model_line=name_line or trainer.lines.get("model", trainer.line),
        lora=lora,
        is_lora_passed=is_passed,
        data=_data(given.get("train_dataset"), reader, calls),
        eval_data=given.get("eval_dataset"),
        rewards=_rewards(given.get("reward_funcs"), trainer, file),
    )


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
    if given is None or isinstance(given, Unknown):
        where = file.where(getattr(given, "line", line))
        raise UsageError(
            f"{file.path}, {where}: which rewards are trained on cannot be told from the text.",
            "Write them into the call: reward_funcs=[first, second].",
        )
    return [(one, line) for one in rewards]


def _data(given: Any, reader: Reader, calls: list[Made]) -> Data:
    data = Data()
    start = given
    if not isinstance(start, Made):
        loads = [one for one in calls if one.name == "load_dataset"]
        start = loads[-1] if loads else None
    if start is None:
        return data
    chain = list(start.chain())
    for step in chain:
        if step.name in ("load_dataset", "from_list", "from_dict", "from_pandas", "load_from_disk",
                         "from_json", "from_csv", "from_generator"):  # fmt: skip
            data.load = step
            if "split" in step.kwargs or len(step.args) > 4:
                data.split = step.kwargs.get("split")
                data.split_line = step.lines.get("split", step.line)
        elif step.name == "[]" and step.args and isinstance(step.args[0], str):
            data.split, data.split_line = step.args[0], step.line
        elif step.name == "select":
            data.limit, data.limit_line = _length(step), step.line
        elif step.name == "take" and step.args and isinstance(step.args[0], int):
            data.limit, data.limit_line = step.args[0], step.line
    data.steps = [step for step in reversed(chain) if step is not data.load]
    for step in data.steps:
        function = step.args[0] if step.args else step.kwargs.get("function")
        if step.name == "map" and isinstance(function, Function):
            row = Made("row", "row", [], {}, function.node)
            _read_row(reader.follow(function, row), data)
    return data


def _length(select: Made) -> int | None:
    """How many rows ``select(range(n))`` keeps."""
    rows = select.args[0] if select.args else select.kwargs.get("indices")
    if isinstance(rows, Made) and rows.name == "range":
        numbers = [one for one in rows.args if isinstance(one, int)]
        if len(numbers) == len(rows.args) and 0 < len(numbers) < 4 and numbers[2:] != [0]:
            return len(range(*numbers))
    return len(rows) if isinstance(rows, list) else None


def _read_row(row: Any, data: Data) -> None:
    """The prompt in what a ``map`` returns."""
    if not isinstance(row, Table):
        return
    data.row = row
    prompt = row.get("prompt")
    if isinstance(prompt, Made) and prompt.name == "apply_chat_template":
        prompt = prompt.args[0] if prompt.args else prompt.kwargs.get("conversation")
    if isinstance(prompt, list):
        data.messages = [
            Message(str(turn.get("role")), turn.get("content"), turn.lines.get("content", 0))
            for turn in prompt
            if isinstance(turn, Table)
        ]
    elif prompt is not None:
        data.plain_prompt = prompt


def column_of(value: Any) -> str | None:
    """The column of a row that a value was made from."""
    if isinstance(value, Made):
        if value.name == "text":
            return next((found for part in value.args if (found := column_of(part))), None)
        for step in value.chain():
            is_row = isinstance(step.of, Made) and step.of.name == "row"
            if is_row and step.name in ("[]", "get") and step.args:
                return str(step.args[0])
        for one in (*value.args, *value.kwargs.values()):
            if (found := column_of(one)) is not None:
                return found
    return None
