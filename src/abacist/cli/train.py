"""``abacist train``: read the command line, have the run made, say how it ended.

Only the recipe and the flags that steer this file are read here. Everything else belongs to
``learning.config``, which knows TRL's names and explains the ones it does not know.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from abacist.cli import console
from abacist.cli.flags import TRAIN_FLAGS, render
from abacist.errors import UsageError

WIDTH = 96
NO_VERDICT = "There is no verdict: no problems were held out (--num_heldout_problems 0)."


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: ``flags`` is the rest of the line, for ``learning.config``."""

    recipe: str | None
    config_path: str | None
    flags: list[str]
    as_json: bool


def run(argv: list[str]) -> int:
    """Run the verb; returns 0 also when the model did not improve: the verdict says so."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    if "--help_all" in argv:
        from abacist.learning.config import full_help

        print(full_help())
        return 0
    request = read_request(argv)
    with console.stdout_for(result_only=request.as_json) as stdout:
        from abacist.learning.config import load_config
        from abacist.learning.train import train
        from abacist.view.live import Live
        from abacist.view.verdict import verdict_json, verdict_text

        config = load_config(request.recipe, request.config_path, request.flags)
        with Live() as watcher:
            result = train(config, watcher=watcher)
        sampled = (result.sampled_before, result.sampled_after)
        compared = result.comparison
        if request.as_json:
            verdict = verdict_json(compared, *sampled) if compared else None
            console.print_json({"run": result.path, "verdict": verdict}, stdout)
        else:
            print(verdict_text(compared, *sampled) if compared else NO_VERDICT)
            print(f"\nThe run is in {result.path}. Put a question to what it has learned:\n")
            print(f"  {next_command(str(result.path))}")
    return 0


def read_request(argv: list[str]) -> Request:
    """Split a normalised command line; :class:`UsageError` if it names two recipes or configs.

    >>> read_request(["gist", "--config", "my.yaml", "--seed", "1"])
    Request(recipe='gist', config_path='my.yaml', flags=['--seed', '1'], as_json=False)
    """
    recipes: list[str] = []
    flags = list(argv)
    while flags and not flags[0].startswith("-"):
        recipes.append(flags.pop(0))
    if len(recipes) > 1:
        raise UsageError(
            f"two recipes were named: {' and '.join(recipes[:2])}",
            "Name one, then flags: abacist train RECIPE --num_generations 16",
        )
    config_path: str | None = None
    while "--config" in flags:
        at = flags.index("--config")
        value = flags[at + 1 : at + 2]
        if config_path is not None or not value or value[0].startswith("--"):
            raise UsageError("--config takes one YAML file, once", "--config my.yaml")
        config_path = value[0]
        del flags[at : at + 2]
    as_json = "--json" in flags
    return Request(
        recipe=recipes[0] if recipes else None,
        config_path=config_path,
        flags=[flag for flag in flags if flag != "--json"],
        as_json=as_json,
    )


def next_command(run_path: str) -> str:
    """The command that puts a question to the run, ready to be pasted."""
    question = (
        "Mia buys 3 boxes with 8 pens in each box. Mia gives 5 pens to Leo. "
        "How many pens does Mia have now?"
    )
    return f'{_program()} ask {shlex.quote(run_path)} "{question}"'


def _program() -> str:
    """How to type this program's name where the user stands: the way it was started."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m abacist"
    found = shutil.which("abacist")
    if started.name != "abacist" or (found and Path(found).resolve() == started.resolve()):
        return "abacist"
    return shlex.quote(str(started))


def recipes() -> list[str]:
    """Names of the recipes in the package, without loading anything that reads them."""
    folder = resources.files("abacist") / "recipes"
    if not folder.is_dir():
        return []
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def help_text() -> str:
    """The help of ``abacist train``."""
    named = textwrap.fill(
        f"recipes: {', '.join(recipes()) or 'none found'}",
        WIDTH,
        subsequent_indent=" " * 9,
        break_on_hyphens=False,
    )
    return f"""\
usage: abacist train [RECIPE] [--config FILE] [flags]

Teaches a model with GRPO and measures it, before and after, on the same held-out problems.
Without a recipe it is `tiny`: the built-in model and generated problems, minutes on any CPU.

  abacist train
  abacist train qwen2.5-1.5b --num_generations 16 --report_to wandb
  abacist train --config runs/…/config.yaml

{named}

Defaults < recipe < --config < flags. The flags are TRL's; these are the ones most used.

{render(TRAIN_FLAGS, WIDTH)}

`abacist train --help_all` shows the rest."""
