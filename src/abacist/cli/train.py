"""``abacist train``: read the command line, have the run made, say how it ended.

Only the recipe and the flags that steer this file are read here. Everything else belongs to
``learning.config``, which knows TRL's names and explains the ones it does not know.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from abacist.cli import console
from abacist.cli.flags import render
from abacist.cli.launch import Launch, hand_over, take_launch
from abacist.errors import UsageError
from abacist.learning.helptext import TRAIN_FLAGS, recipe_names

if TYPE_CHECKING:
    from abacist.learning.config import Config

WIDTH = 96
LINES_IN_VIEW = 30
MAX_SHOWN_QUESTION = 240
SHELL_CHARACTERS = frozenset('"\\$`!%')  # mean something in double quotes, in one shell or another
DRY_RUN_PROBLEMS = 32
NO_VERDICT = "There is no verdict: no problems were held out (--num_heldout_problems 0)."


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: ``flags`` is the rest of the line, for ``learning.config``.

    ``dry_run_problems`` is how many problems a dry run asks; None trains. ``launch`` is how several
    processes are to be started.
    """

    recipe: str | None
    config_path: str | None
    flags: list[str]
    as_json: bool
    dry_run_problems: int | None = None
    launch: Launch | None = None


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
    if request.launch is not None:
        rest = list(argv)
        take_launch(rest)
        if (code := hand_over(request.launch, rest)) is not None:
            return code
    with console.stdout_for(result_only=request.as_json) as stdout:
        console.say_starting()
        from abacist.delivery.ending import write_page_and_card
        from abacist.learning import processes
        from abacist.learning.config import load_config
        from abacist.learning.train import train
        from abacist.view.live import Live
        from abacist.view.verdict import verdict_json, verdict_text

        processes.refuse_missing_cards()
        config = load_config(request.recipe, request.config_path, request.flags)
        if request.dry_run_problems is not None:
            return say_plan(config, request.dry_run_problems, request.as_json, stdout)
        with Live() as watcher:
            result = train(config, watcher=watcher)
        if not processes.is_main():
            return 0
        if result.stopped:
            resume = processes.command_to_resume(result.path)
            return say_stopped(str(result.path), result.stopped, resume, request.as_json, stdout)
        sampled = (result.sampled_before, result.sampled_after)
        compared = result.comparison
        if request.as_json:
            verdict = verdict_json(compared, *sampled) if compared else None
            report = write_page_and_card(result.path)
            told = {"run": result.path, "verdict": verdict, "report": report}
            console.print_json(told, stdout)
        else:
            width = console.columns(stdout)
            text = verdict_text(compared, *sampled, width=width) if compared else NO_VERDICT
            print(text)
            in_short, *_ = text.split("\n\n")
            if len(text.split("\n")) > LINES_IN_VIEW:  # its first sentence has left the screen
                print(f"\nIn short:\n{in_short}")
            if (report := write_page_and_card(result.path)) is not None:
                print(f"\nLook at it in a browser: {report}")
                run = shlex.quote(str(result.path))
                print(f"or read its replies here: {console.program()} show {run}")
            print(f"\nThe run is in {result.path}. Put a question to what it has learned:\n")
            heldout = result.before.problems if result.before else ()
            print(f"  {next_command(str(result.path), [p.question for p in heldout])}")
    return 0


def say_plan(config: Config, num_problems: int, as_json: bool, stdout: TextIO) -> int:
    """What a dry run found; 1 where the run does not fit, so that ``&&`` does not start it."""
    from abacist.learning.dryrun.plan import plan
    from abacist.view.live import Live
    from abacist.view.plantext import plan_text

    with Live() as watcher:
        found = plan(config, watcher, num_problems=num_problems)
    if as_json:
        console.print_json(found.to_json(), stdout)
    else:
        print(f"\n{plan_text(found)}")
    return 0 if found.fits else 1


def say_stopped(run_path: str, why: str, resume: str, as_json: bool, stdout: TextIO) -> int:
    """A run that stopped in time, as asked, is no failure: say how it goes on."""
    resume = console.as_typed(resume)
    if as_json:
        stopped = {"run": run_path, "verdict": None, "stopped": why, "resume": resume}
        console.print_json(stopped, stdout)
    else:
        print(f"Stopped by {why}. Go on with:\n\n  {resume}")
    return 0


def read_request(argv: list[str]) -> Request:
    """Split a normalised command line; :class:`UsageError` if it names two recipes or configs.

    >>> read_request(["gist", "--config", "my.yaml", "--seed", "1"]).flags
    ['--seed', '1']
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
    if "--resume" in flags:
        at = flags.index("--resume")
        if not flags[at + 1 : at + 2] or flags[at + 1].startswith("--"):
            raise UsageError("--resume takes a run or one of its checkpoints", "--resume runs/…")
        if not flags[at + 1].strip():  # an empty variable of the shell
            raise UsageError("--resume was given an empty text", "--resume runs/…")
        flags[at] = "--resume_from_checkpoint"
    launch = take_launch(flags)
    dry_run_problems = _take_dry_run(flags)
    if launch is not None and dry_run_problems is not None:
        raise UsageError("--dry_run plans one process", "Leave --accelerate_config out.")
    as_json = "--json" in flags
    return Request(
        recipe=recipes[0] if recipes else None,
        config_path=config_path,
        flags=[flag for flag in flags if flag != "--json"],
        as_json=as_json,
        dry_run_problems=dry_run_problems,
        launch=launch,
    )


def _take_dry_run(flags: list[str]) -> int | None:
    """Take ``--dry_run`` and ``--dry_run_problems N``, which implies it, out of ``flags``."""
    problems = None
    while "--dry_run" in flags:
        flags.remove("--dry_run")
        problems = DRY_RUN_PROBLEMS
    while "--dry_run_problems" in flags:
        at = flags.index("--dry_run_problems")
        value = "".join(flags[at + 1 : at + 2])
        if not (value.isascii() and value.isdigit() and 0 < len(value) < 7 and int(value)):
            raise UsageError(
                f"--dry_run_problems takes a number of problems, not {value!r}",
                f"--dry_run_problems {DRY_RUN_PROBLEMS}",
            )
        problems = int(value)
        del flags[at : at + 2]
    return problems


def next_command(run_path: str, heldout: Iterable[str]) -> str:
    """The command that puts a question to the run, ready to be pasted.

    The question is the first of ``heldout`` that is short and can stand in double quotes, else the
    first that is short. Without one the command reads the question from the keyboard.
    """
    command = f"{console.program()} ask {shlex.quote(run_path)}"
    folded = (" ".join(question.split()) for question in heldout)
    short = [
        question
        for question in folded
        if 0 < len(question) <= MAX_SHOWN_QUESTION
        and question.isprintable()
        and not question.startswith("-")  # it would be taken for a flag
    ]
    plain = [question for question in short if not set(question) & SHELL_CHARACTERS]
    if plain:
        return f'{command} "{plain[0]}"'
    return f"{command} {shlex.quote(short[0])}" if short else command


def help_text() -> str:
    """The help of ``abacist train``."""
    named = textwrap.fill(
        f"recipes: {', '.join(recipe_names()) or 'none found'}",
        WIDTH,
        subsequent_indent=" " * 9,
        break_on_hyphens=False,
    )
    return f"""\
usage: abacist train [RECIPE] [--config FILE] [flags]

Teaches a model with GRPO and measures it, before and after, on the same held-out problems.
Without a recipe it is `tiny`: the built-in model and generated problems, minutes on any CPU; `any`
if --model_name_or_path is given; with --config, the file and the defaults alone.

  abacist train
  abacist train qwen2.5-1.5b --num_generations 16 --report_to wandb
  abacist train --config runs/…/config.yaml

{named}

Defaults < recipe < --config < flags. The flags are TRL's; these are the ones most used.

{render(TRAIN_FLAGS, WIDTH)}

`abacist train --help_all` shows the rest."""
