"""From recipe, file and flags to one checked configuration.

The order is defaults < recipe < ``--config`` file < flags. Recipes and files are flat YAML with
the names of the flags, so there is one vocabulary, one table of names and one way to cast
values: everything goes through the same argument parser, TRL's and transformers' dataclasses
behind it. A recipe may begin with ``extends: OTHER``. Unknown, misspelt and retired names
are errors that say what to write instead, with the line they stand on.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from abacist.errors import UsageError
from abacist.learning import process_supervision, reply_selection
from abacist.learning.arguments import GRPOConfig, ModelConfig, ScriptArguments
from abacist.learning.helptext import recipe_names
from abacist.learning.inherited import followers, prompt_of, run_to_continue, settings_of
from abacist.learning.limits import (
    RETIRED,
    SWITCHES,
    named,
    refuse_out_of_range,
    split_at_commas,
    trackers,
)
from abacist.learning.paths import with_absolute_paths, with_data_beside
from abacist.learning.resume.checkpoints import asks_for_none, run_to_resume
from abacist.policy.choices import choose_device
from abacist.proof.comparison.compare import NO_CONTROL
from abacist.records.settings import parse_settings
from abacist.task.rewards import refuse_unusable_weights

AUTO = "auto"
_NUMBER = re.compile(r"-[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)
DEFAULT_RECIPE = "tiny"
# The recipe for a model given by a flag alone: nothing in it is about one model.
GENERAL_RECIPE = "any"
# Where TRL and transformers have another.
OUR_DEFAULTS = {"project": "abacist"}
# Where a run is kept is not part of what it does: config.yaml must run again as it stands.
NOT_SAVED = ("output_dir", "overwrite", "extends", "resume_from_checkpoint", "force")


@dataclass
class Config:
    """A checked configuration, with every explicit setting and where it came from."""

    recipe: str | None
    training: GRPOConfig
    model: ModelConfig
    script: ScriptArguments
    settings: dict[str, Any]
    sources: dict[str, str]
    # The source of what a run that is trained further brings along; "" as a recipe's, if none does.
    of_run: str = ""
    notes: list[str] = field(default_factory=list)
    # What stands in no file, given in Python: rewards by the name that `script` has for them, and
    # the rows of the data set, each a line of JSON (`learning.keywords`).
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    data: list[str] | None = None

    @property
    def name(self) -> str:
        """What the run is called unless ``run_name`` says otherwise."""
        return self.training.run_name or self.recipe or "run"

    @property
    def device(self) -> str:
        """The device that is asked for; ``auto`` if none is."""
        return "cpu" if self.training.use_cpu else self.model.device

    @property
    def chooses_checkpointing(self) -> bool:
        """Whether ``gradient_checkpointing`` is auto: decided once the model is there."""
        is_auto = self.settings.get("gradient_checkpointing") == AUTO
        return is_auto and "activation_checkpointing" not in self.settings  # its newer name

    @property
    def problems_per_step(self) -> int:
        """How many prompts one generation batch holds, over all processes."""
        return int(self.training.generation_batch_size or 0) // int(
            self.training.num_generations or 1
        )

    @property
    def max_completion_tokens(self) -> int:
        """TRL's ``max_completion_length``, which is always set here."""
        return int(self.training.max_completion_length or 256)

    def copy(self) -> Config:
        """A copy that can be changed, one level deep, without changing this one."""
        return replace(
            self,
            training=copy.copy(self.training),
            model=copy.copy(self.model),
            script=copy.copy(self.script),
            settings=dict(self.settings),
            sources=dict(self.sources),
            notes=list(self.notes),
        )

    def is_brought_along(self, name: str) -> bool:
        """Whether a setting has its value from the recipe, or from the run that is trained further:
        nobody typed it."""
        source = self.sources.get(name)
        return source is not None and (source in ("", self.of_run) or source.startswith("follows "))

    def leave_out(self, name: str, why: str) -> None:
        """Take a setting of ``training`` back to its default, with a note."""
        owner = "that run" if self.of_run and self.sources[name] == self.of_run else "the recipe"
        whose = f"{owner}'s " if self.is_brought_along(name) else ""
        self.notes.append(f"without {whose}{name}: {why}")
        del self.settings[name], self.sources[name]
        setattr(self.training, name, GRPOConfig.__dataclass_fields__[name].default)

    def to_yaml(self) -> str:
        """The text of ``config.yaml``: task and model in full, training where it was set."""
        # What the machine chose (no source) is left to the next machine.
        chosen = {key: value for key, value in self.settings.items() if key in self.sources}
        whole = chosen | asdict(self.script) | asdict(self.model)
        kept = {key: value for key, value in whole.items() if key not in NOT_SAVED}
        return yaml.safe_dump(kept, sort_keys=True, allow_unicode=True)

    def lines(self) -> list[str]:
        """The explicit settings, one a line, each with its source, then the notes."""
        width = max(map(len, self.settings), default=0)
        shown = [
            f"{key:<{width}}  {_shown(value)}" + (f"   ({source})" if source else "")
            for key, value in sorted(self.settings.items())
            for source in [self.sources.get(key, "machine")]
        ]
        return shown + self.notes


class _Parser(HfArgumentParser):
    """transformers' parser, with errors of ours and without defaults: only what was given."""

    def __init__(self) -> None:
        # allow_abbrev would let `--lr` mean whichever flag happens to begin so.
        super().__init__(
            [ScriptArguments, ModelConfig, GRPOConfig],  # type: ignore[list-item]
            allow_abbrev=False,
            prog="abacist train",
        )
        # argparse takes -1e-05 for the name of a flag, and would end a list there.
        self._negative_number_matcher = re.compile(rf"(?:{_NUMBER.pattern})\Z", re.IGNORECASE)
        for action in self._actions:
            action.default = OUR_DEFAULTS.get(action.dest, action.default)
            if action.dest == "gradient_checkpointing" and "--gradient_checkpointing" in (
                action.option_strings
            ):
                action.type = _switch_or_auto

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)  # one of its two spellings
        raise UsageError(message, "abacist train --help lists the flags and what they take.")

    def known(self) -> set[str]:
        return {action.dest for action in self._actions}

    def given(self, tokens: list[str]) -> dict[str, Any]:
        """The settings named in ``tokens``, cast to their types."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return vars(self.parse_args(tokens))

    def hide(self, names: Iterable[str]) -> None:
        """Leave the settings ``names`` out of the help."""
        for action in self._actions:
            if action.dest in names:
                action.help = argparse.SUPPRESS


def load_config(recipe: str | None, config_path: str | None, flags: list[str]) -> Config:
    """The configuration for one command line.

    Args:
        recipe: name of a built-in recipe, or None.
        config_path: a YAML file of settings, or None.
        flags: ``["--key", "value", …]`` as typed.

    Raises:
        UsageError: unknown, misspelt or retired names; values of the wrong type; settings
            that do not fit together; an unknown recipe or an unreadable file.
    """
    parser = _Parser()
    known = parser.known()
    typed = parser.given(_checked_flags(flags, known))
    run = run_to_resume(typed.get("resume_from_checkpoint"), typed.get("output_dir"))
    if run is not None:
        typed["output_dir"] = str(run)
        if recipe is None and config_path is None and (run / "config.yaml").exists():
            config_path = str(run / "config.yaml")
    notes: list[str] = []
    layers: list[tuple[str, dict[str, Any]]] = []
    began = run_to_continue(typed.get("model_name_or_path"))
    of_run = "" if began is None else str(began.config_path)
    if began is not None and recipe is None and config_path is None:
        layers.append((of_run, settings_of(began, known)))
        notes.append(f"as {began.path} was trained, unless set otherwise; it goes on as a new run")
    elif began is not None:
        layers.append((of_run, prompt_of(began, known)))
    elif recipe is None and config_path is None:
        model = typed.get("model_name_or_path", "tiny")
        recipe = DEFAULT_RECIPE if model == "tiny" else GENERAL_RECIPE
    if recipe is not None:
        recipe = recipe.lower().removesuffix("-instruct")
        layers.append(("", _read_recipe(recipe, known)))
    if config_path is not None:
        extended, of_file = _read_yaml(Path(config_path), known)
        if extended is not None:
            layers.append(("", _read_recipe(extended, known)))
        layers.append((Path(config_path).name, of_file))
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    brought_along: dict[str, Any] = {}
    cast = []
    for source, layer in layers:
        _refuse_lists(layer, source)
        cast.append((source, parser.given(flags_of(layer))))
    for source, layer in [*cast, ("flag", typed)]:
        settings.update(layer)
        sources.update(dict.fromkeys(layer, source))
        if source in ("", of_run):
            brought_along |= layer
    given = {key: value for key, value in settings.items() if sources[key] not in ("", of_run)}
    for key, (value, followed) in followers(brought_along, given).items():
        settings[key], sources[key] = value, f"follows {followed}"
    if asks_for_none(settings.get("resume_from_checkpoint")):
        settings.pop("resume_from_checkpoint", None)
    _read_lists(settings, sources)
    refuse_out_of_range(settings, sources)
    if config_path is not None:
        settings = with_data_beside(settings, Path(config_path).parent)
    elif began is not None:
        settings = with_data_beside(settings, began.path)
    settings = with_absolute_paths(settings)
    notes += _fit_to_machine(settings)
    config = Config(
        recipe,
        *_build(settings, notes),
        settings=settings,
        sources=sources,
        of_run=of_run,
        notes=notes,
    )
    _refuse_or_leave_out(config)
    _refuse_quantized_alone(config)
    notes += _step_in_words(config)
    return config


def known_settings() -> dict[str, bool]:
    """The name of every setting that is taken, and whether it is a list."""
    return {action.dest: action.nargs in ("+", "*") for action in _Parser()._actions}


def full_parser() -> argparse.ArgumentParser:
    """The parser of every setting that is taken, to be read, not used: retired ones are hidden."""
    parser = _Parser()
    parser.hide(RETIRED)
    return parser


def full_help() -> str:
    """Help for every setting that is taken."""
    return full_parser().format_help()


def _build(
    settings: Mapping[str, Any], notes: list[str]
) -> tuple[GRPOConfig, ModelConfig, ScriptArguments]:
    def part(kind: type) -> dict[str, Any]:
        names = {f.name for f in fields(kind)}
        return {key: value for key, value in settings.items() if key in names}

    training = part(GRPOConfig)
    if training.get("gradient_checkpointing") == AUTO:  # a bool for TRL
        training["gradient_checkpointing"] = False
    training.setdefault("output_dir", None)
    training = {**OUR_DEFAULTS, **training}
    training["disable_tqdm"] = True  # progress is the watcher's
    if "eval_steps" in training:
        training.setdefault("eval_strategy", "steps")
        training["do_eval"] = True
    # Held-out accuracy is ours (GRPOTrainer.evaluate); these only satisfy TRL's own check.
    training.setdefault("num_generations_eval", training.get("num_generations", 8))
    training.setdefault("per_device_eval_batch_size", training["num_generations_eval"])
    try:
        with warnings.catch_warnings():
            # gradient_checkpointing is deprecated only in name, and the old name works everywhere.
            warnings.simplefilter("ignore", FutureWarning)
            parsed = GRPOConfig(**training)
        return parsed, ModelConfig(**part(ModelConfig)), ScriptArguments(**part(ScriptArguments))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"these settings do not fit together: {error}") from error


def _refuse_or_leave_out(config: Config) -> None:
    """Raise UsageError where the choice of replies, or pay for steps, cannot be meant.

    What was brought along is left out instead. A control pays no steps, whoever asks for it.
    """
    control = config.script.control
    if control != NO_CONTROL and process_supervision.weight_of(config.training):
        config.leave_out("step_reward_weight", f"--control {control} does not pay for right steps")
    for name, refuse in (
        ("train_replies", reply_selection.refuse_contradictions),
        ("step_reward_weight", process_supervision.refuse_contradictions),
    ):
        is_brought_along = config.is_brought_along(name)
        try:
            refuse(config.training, name if is_brought_along else named(name, config.sources))
        except UsageError as error:
            if not is_brought_along:
                raise
            config.leave_out(name, error.message)
    refuse_paying_nothing(config)


def refuse_paying_nothing(config: Config) -> None:
    """Raise UsageError where all rewards weigh 0 and, now, steps are not paid either."""
    refuse_unusable_weights(
        config.training.reward_weights or [],
        named("reward_weights", config.sources),
        may_be_zero=bool(process_supervision.weight_of(config.training)),
    )


def _refuse_quantized_alone(config: Config) -> None:
    """Raise UsageError for a base in 4 or 8 bits with what does not work on one."""
    model, held = config.model, config.model.quantization
    if held is None:
        return
    flag = named(f"load_in_{held.bits}bit", config.sources)
    if model.load_in_4bit and model.load_in_8bit:
        raise UsageError(
            f"{named('load_in_4bit', config.sources)} and {flag} contradict each other",
            "Give one of them.",
        )
    if not model.use_peft:
        raise UsageError(
            f"{flag} with all weights trained (use_peft off): a weight of {held.bits} bits cannot "
            "take a small step",
            "Train an adapter, which is the default, or leave it out.",
        )
    device, _ = choose_device(config.device)
    if held.on(device).is_ours and model.use_dora:
        raise UsageError(
            f"{flag} with --use_dora on a CPU: DoRA reads the base's weights, which our kernels "
            "hold as codes",
            "Leave out one of them.",
        )
    if config.training.use_vllm:
        raise UsageError(
            f"{flag} with --use_vllm: TRL merges the adapter into the {held.bits}-bit weights for "
            "vLLM, and they would round it away",
            "Leave out one of them.",
        )


def _switch_or_auto(text: str) -> bool | str:
    """A switch as transformers reads it, or ``auto``.

    >>> _switch_or_auto("auto"), _switch_or_auto("no"), _switch_or_auto("True")
    ('auto', False, True)
    """
    return AUTO if text.lower() == AUTO else bool(string_to_bool(text))


def _read_lists(settings: dict[str, Any], sources: Mapping[str, str]) -> None:
    """Lists whose names cannot hold a comma may be written with commas."""
    if "report_to" in settings:
        settings["report_to"] = trackers(settings["report_to"], sources)
    if (scale := str(settings.get("scale_rewards")).lower()) in ("true", "false"):
        # TRL knows the two as values of Python only, and refuses the words after the first rollout.
        settings["scale_rewards"] = "group" if scale == "true" else "none"
    if settings.get("lora_target_modules"):
        settings["lora_target_modules"] = split_at_commas(settings["lora_target_modules"])


def _step_in_words(config: Config) -> list[str]:
    """What one step consists of, and a warm-up that the run does not outlast."""
    training = config.training
    size, problems = int(training.num_generations or 1), config.problems_per_step
    lines = [
        f"a step: {problems} problem{'s' * (problems != 1)} × {size} replies = "
        f"{problems * size} replies "
        f"of at most {config.max_completion_tokens} tokens"
    ]
    if training.world_size > 1:
        share = problems * size // training.world_size
        lines.append(
            f"{training.world_size} processes share it, {share} replies each; with one process a "
            f"step would have {share} (--per_device_train_batch_size is for each)"
        )
    if 0 < training.max_steps <= training.warmup_steps and training.warmup_steps >= 1:
        lines.append(
            f"warning: the learning rate rises over {training.warmup_steps:g} warm-up steps "
            f"(warmup_steps) and the run ends after {training.max_steps}, so little is learned"
        )
    looks_every = training.eval_steps if training.eval_strategy == "steps" else None
    if looks_every and 0 < training.max_steps < looks_every:
        lines.append(
            f"nothing is measured while training: eval_steps is {looks_every:g} and the run ends "
            f"after {training.max_steps}"
        )
    return lines


def _fit_to_machine(settings: dict[str, Any]) -> list[str]:
    """Choose mixed precision unless it is set: TRL's default is bf16, which needs a GPU."""
    notes = []
    # Without a GPU accelerate takes several processes for one, unless it is told.
    is_one_of_several = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    if settings.get("device") == "cpu" or is_one_of_several:
        settings["use_cpu"] = True
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu")
    settings.setdefault("dataloader_pin_memory", on_gpu)
    if "bf16" not in settings and not settings.get("fp16"):
        settings["bf16"] = on_gpu and torch.cuda.is_bf16_supported()
        if settings["bf16"]:
            notes.append("bf16 mixed precision: this GPU computes in it")
    return notes


def _checked_flags(flags: list[str], known: set[str]) -> list[str]:
    """The flags with underscores for dashes, without retired ones that are switched off.

    Raises UsageError with all that are unknown.
    """
    tokens: list[str] = []
    wrong: list[_Unknown] = []
    is_dropped = False
    for at, token in enumerate(flags):
        if token.startswith("--"):
            name, equals, value = token.removeprefix("--").partition("=")
            key = name.replace("-", "_")
            following = flags[at + 1 : at + 2]
            value = value if equals else "".join(following)
            is_dropped = _asks_for_nothing(key, value)
            unknown = None if is_dropped else _unknown(key, known, f"--{name}")
            wrong += [unknown] if unknown else []
            token = f"--{key}{equals}{value if equals else ''}"
        if not is_dropped:
            tokens.append(token)
    _refuse_unknown(wrong, "the command line")
    return tokens


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A name that is no setting: where it is, what is wrong with it, what to write instead."""

    where: str
    wrong: str
    instead: str


def _unknown(key: str, known: set[str], where: str) -> _Unknown | None:
    bare = key.removeprefix("no_")
    if bare in RETIRED or key in RETIRED:
        instead = RETIRED.get(key, RETIRED.get(bare, ""))
        return _Unknown(where, "is not a setting of Abacist", instead)
    if key in known or bare in known:
        return None
    close = difflib.get_close_matches(key, sorted(known | set(RETIRED)), n=1, cutoff=0.7)
    hint = f"Did you mean {close[0]}?" if close else "abacist train --help_all lists every setting."
    return _Unknown(where, "is not a known setting", hint)


def _asks_for_nothing(key: str, value: Any) -> bool:
    """Whether a setting that Abacist does not have is switched off, and so is no fault.

    >>> [_asks_for_nothing("push_to_hub", value) for value in (False, "false", None, True, "")]
    [True, True, True, False, False]
    >>> _asks_for_nothing("no_push_to_hub", ""), _asks_for_nothing("lr", "0")
    (True, False)
    """
    if key.removeprefix("no_") in SWITCHES and key.startswith("no_"):
        return True
    if key not in RETIRED:
        return False
    is_off = value is False or str(value).lower() in ("false", "no", "f", "n")
    return value is None or (key in SWITCHES and is_off)


def _refuse_unknown(wrong: Sequence[_Unknown], where: str) -> None:
    if len(wrong) == 1:
        (only,) = wrong
        raise UsageError(f"{only.where} {only.wrong}", only.instead)
    if wrong:
        lines = "\n".join(f"{one.where}: {one.instead}" for one in wrong)
        raise UsageError(f"{len(wrong)} settings of {where} are not known to Abacist", lines)


def _read_recipe(name: str, known: set[str]) -> dict[str, Any]:
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"there is no recipe {name!r}", f"{hint}Recipes: {', '.join(names)}.")
    text = (
        resources.files("abacist").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    )
    extended, settings = _parse_yaml(text, f"{name}.yaml", known)
    return {**(_read_recipe(extended, known) if extended else {}), **settings}


def _read_yaml(path: Path, known: set[str]) -> tuple[str | None, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the config {path}: {error}", "--config takes a YAML file."
        ) from error
    return _parse_yaml(text, str(path), known)


def _parse_yaml(text: str, where: str, known: set[str]) -> tuple[str | None, dict[str, Any]]:
    """The recipe that it ``extends``, which lies under it, and one flat mapping."""
    try:
        found = parse_settings(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}", "Write one 'key: value' a line.") from error
    settings, wrong = found.values, []
    for key, line in found.lines.items():
        if key != "extends" and not _asks_for_nothing(key, settings[key]):
            unknown = _unknown(key, known, where=f"{key} ({where}, line {line})")
            wrong += [unknown] if unknown else []
    _refuse_unknown(wrong, where)
    under = settings.pop("extends", None)
    kept = {key: value for key, value in settings.items() if not _asks_for_nothing(key, value)}
    return str(under) if under else None, kept


def _refuse_lists(settings: Mapping[str, Any], source: str) -> None:
    """Raise UsageError for a list where one value is taken: its rest would be read as flags."""
    given = {key: value for key, value in settings.items() if isinstance(value, list)}
    lists = known_settings() if given else {}
    for key, value in given.items():
        if not lists.get(key):
            raise UsageError(f"{key} ({source}) takes one value, not a list of {len(value)}")


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Values of YAML or Python as they would be typed, so that they are cast like flags; null
    means unset. Raises UsageError for an item of a list that would be taken for a flag itself.

    >>> flags_of({"use_peft": False, "system_prompt": "--", "reward_weights": [1, 2], "seed": None})
    ['--use_peft=false', '--system_prompt=--', '--reward_weights', '1', '2']
    """
    tokens: list[str] = []
    for key, value in settings.items():
        if isinstance(value, list):
            # A run without trackers keeps an empty list.
            names = ["none"] if key == "report_to" and not value else value
            typed = [_typed(name) for name in names]
            for item in typed:
                if item.startswith("-") and not _NUMBER.fullmatch(item):
                    raise UsageError(f"{key}: {item[:60]!r} is no value, it begins with a dash")
            tokens += [f"--{key}", *typed]
        elif value is not None:
            tokens.append(f"--{key}={_typed(value)}")
    return tokens


def _typed(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    # eval_steps and its like are floats, because they may be shares of the run.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
