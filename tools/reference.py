"""Write what is generated of docs/: commands.md, and the list of pages at the end of index.md.

    make docs

The command reference comes from the parsers: the help of every verb, and every setting of `train`.
A test compares it with what this writes. Texts of TRL and transformers are not copied;
`abacist train --help_all` prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from abacist.cli.main import VERBS, main
from abacist.learning.config import full_parser, load_config
from abacist.learning.helptext import TRAIN_FLAGS, own_texts, recipe_names

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "commands.md"
INDEX = DOCS / "index.md"
BEFORE_THE_LIST = "\nWritten by `make docs`.\n\n"
_VALUES = {flag.name: flag.value for group in TRAIN_FLAGS for flag in group.flags}
_RECIPE_COLUMNS = (
    "recipe",
    "model",
    "trained",
    "problems × replies a step",
    "steps",
    "learning rate",
    "rewards",
    "their weights",
    "examples",
    "tokens a reply",
)
_KINDS = {int: "N", float: "X", str: "TEXT"}


def page() -> str:
    """The whole page."""
    verbs = "\n\n".join(f"## abacist {verb}\n\n{_block(help_of(verb))}" for verb in VERBS)
    return f"""\
# Commands

Written by `make docs` from the parsers; a test holds that it is what they say. What the commands
print with `--json` is in [the skill file](../skills/abacist/SKILL.md).

Every command exits with 0 when it is done, 1 when it failed, 2 when the command line is wrong, 130
when it was interrupted and 143 when it was terminated. 3 is an answer: of `compare` that B is not
better, of `audit` that a reward is not sound, of `verify` that not all could be replayed.
A flag may be written `--num-shots=5` or `--num_shots 5`.

{_block(help_of())}

{verbs}

{recipes()}

{settings()}"""


def help_of(*verb: str) -> str:
    """What ``abacist VERB --help`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*verb, "--help"])
    if code != 0:
        raise SystemExit(f"abacist {' '.join(verb)} --help ends with {code}")
    return printed.getvalue().rstrip()


def recipes() -> str:
    """What each recipe of ``abacist train`` holds, one a row."""
    rows = []
    for name in recipe_names():
        config = load_config(name, None, [])
        training, script = config.training, config.script
        named = "model_name_or_path" in config.settings
        length = f"{training.max_steps}" if training.max_steps > 0 else "1 epoch"
        weights = " ".join(f"{weight:g}" for weight in training.reward_weights or []) or "all 1"
        paid = " ".join(script.reward_funcs) + (", steps" if training.step_reward_weight else "")
        cells = (
            f"`{name}`",
            f"{config.model.model_name_or_path}" if named else "yours",
            f"LoRA r{config.model.lora_r}" if config.model.use_peft else "all weights",
            f"{config.problems_per_step} × {training.num_generations}",
            length,
            f"{training.learning_rate:g}",
            paid,
            weights,
            str(script.num_shots or 0),
            str(training.max_completion_length),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return f"""\
## Recipes

`abacist train NAME` takes the settings of a recipe; flags and `--config` win over them. The
comments in `src/abacist/recipes/NAME.yaml` say why each is as it is. "Steps" among the rewards
stands for `--step_reward_weight`.

| {" | ".join(_RECIPE_COLUMNS)} |
|{"---|" * len(_RECIPE_COLUMNS)}
{chr(10).join(rows)}"""


def settings() -> str:
    """Every setting of ``abacist train``, in two tables: with our text, and by name alone."""
    texts = own_texts()
    ours, others = [], []
    for action in full_parser()._actions:
        if argparse.SUPPRESS in (action.help, action.dest) or action.dest == "help":
            continue
        if action.option_strings[0].startswith("--no_"):
            continue
        row = f"| `{action.option_strings[0]}` | {_value(action)} | {_default(action)} |"
        if action.dest in texts:
            ours.append(f"{row} {_cell(texts[action.dest])} |")
        else:
            others.append(row)
    return f"""\
## Every setting of abacist train

Each is a flag, a key of a `--config` file, and a key of a recipe. The defaults are those without a
recipe; a recipe changes some, and a run says before it begins which values it takes and where each
came from. A switch is set by `--name` or `--name true`, and unset by `--name false`; one that is
true by default also by `--no_name`.

| setting | takes | default | |
|---|---|---|---|
{_sorted(ours)}

The rest are TRL's and transformers', and do what they do there; `abacist train --help_all` prints
their texts.

| setting | takes | default |
|---|---|---|
{_sorted(others)}
"""


def index() -> str:
    """docs/index.md as it stands, with the list of pages as it should be."""
    lead, mark, _ = INDEX.read_text(encoding="utf-8").partition(BEFORE_THE_LIST)
    if not mark:
        raise SystemExit(f"{INDEX} does not hold {BEFORE_THE_LIST.strip()!r}")
    titles = {
        path.name: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in sorted(DOCS.glob("*.md"))
        if path != INDEX
    }
    return lead + mark + "".join(f"- [{title}]({name})\n" for name, title in titles.items())


def _sorted(rows: list[str]) -> str:
    return "\n".join(sorted(rows, key=lambda row: row.split("`")[1]))


def _value(action: argparse.Action) -> str:
    """What follows a flag, in a word."""
    if action.choices:
        return " ".join(f"`{choice}`" for choice in action.choices)
    name = action.option_strings[0]
    if name in _VALUES:
        return _VALUES[name] or "switch"
    if action.type is string_to_bool or isinstance(action.default, bool):
        return "switch"
    kind = _KINDS.get(action.type, "TEXT")  # type: ignore[call-overload]
    return f"{kind} …" if action.nargs in ("+", "*") else kind


def _default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value == [] or value == "":
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"`{_cell(str(getattr(value, 'value', value)))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    INDEX.write_text(index(), encoding="utf-8")
    print(f"written: {PAGE}, {INDEX}")
