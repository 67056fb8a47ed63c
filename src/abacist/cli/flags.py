"""The flags people use, as a table that costs nothing to print.

``abacist train`` takes every flag of TRL's ``GRPOConfig``, ``ModelConfig`` and script
arguments by its own name, about two hundred. Asking TRL for their help takes seconds and
buries the thirty that matter, so those stand here; ``--help_all`` asks TRL for the rest. A
contract test holds that each name below is TRL's, or is listed in :data:`OWN_FLAGS`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from abacist.errors import UsageError

_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)


class Flag(NamedTuple):
    """One flag of ``abacist train``: its name as typed, what follows it, and what it does."""

    name: str
    value: str
    help: str


class Group(NamedTuple):
    """Flags that belong together, under a heading."""

    title: str
    flags: tuple[Flag, ...]


TRAIN_FLAGS = (
    Group(
        "model",
        (
            Flag("--model_name_or_path", "MODEL", "Hub id, folder, adapter, or `tiny`; a run "
                 "brings its settings and its prompt"),
            Flag("--dtype", "TYPE", "bfloat16, float16, float32 or auto"),
            Flag("--attn_implementation", "NAME", "flash_attention_2, sdpa or eager"),
            Flag("--device", "NAME", "cuda, mps, cpu or auto"),
            Flag("--use_peft", "", "train a LoRA adapter: the default; --no_use_peft trains all"),
            Flag("--trust_remote_code", "", "run code that comes with the model: never by default"),
            Flag("--lora_r", "N", "rank of the adapter"),
            Flag("--lora_alpha", "N", "its scale: the adapter is multiplied by alpha / r"),
            Flag("--lora_dropout", "P", "dropout before the adapter"),
            Flag("--lora_target_modules", "NAME …", "the layers that get one, or all-linear"),
        ),
    ),
    Group(
        "problems and prompt",
        (
            Flag("--dataset_name", "DATA", "Hub id, folder, or JSONL, CSV or Parquet file"),
            Flag("--dataset_config", "NAME", "its configuration on the Hub (GSM8K: main)"),
            Flag("--dataset_train_split", "NAME", "the split to learn from"),
            Flag("--dataset_test_split", "NAME", "its test split, which no training reads"),
            Flag("--question_column", "NAME", "its column of questions; the usual ones are found"),
            Flag("--answer_column", "NAME", "its column of solutions or golds"),
            Flag("--decimal_mark", "MARK", "of golds such as 3,5: point or comma"),
            Flag("--num_heldout_problems", "N", "problems of the verdict, before and after"),
            Flag("--num_consistency_problems", "N", "of these, get 4 sampled replies each (100)"),
            Flag("--num_shots", "N", "solved examples in every prompt, or `gist` for its own"),
            Flag("--system_prompt", "TEXT", "default, none, or your own text asking for a format"),
        ),
    ),
    Group(
        "rewards",
        (
            Flag("--reward_funcs", "NAME …", "rewards by name, the sets `default` and `gist`, or "
                 "your own module.function"),
            Flag("--reward_weights", "W …", "one factor for each"),
            Flag("--allow_hackable_rewards", "", "train on them although the audit says no"),
            Flag("--control", "KIND", "random or format: a placebo under the same budget"),
        ),
    ),
    Group(
        "learning",
        (
            Flag("--num_generations", "N", "replies to each problem: the size of a group; the "
                 "batch follows, unless it is given too"),
            Flag("--max_completion_length", "N", "tokens a reply may have"),
            Flag("--temperature", "T", "of sampling while learning"),
            Flag("--learning_rate", "LR", "with LoRA about ten times that of full training"),
            Flag("--beta", "B", "weight of the KL term; 0 needs no reference model"),
            Flag("--loss_type", "NAME", "dapo, dr_grpo, grpo, bnpo, …"),
            Flag("--max_steps", "N", "optimizer steps; wins over epochs. In a shorter run than the "
                 "recipe's, warm-up and measurements follow"),
            Flag("--num_train_epochs", "N", "times through the problems"),
            Flag("--per_device_train_batch_size", "N", "replies in one forward pass"),
            Flag("--gradient_accumulation_steps", "N", "forward passes in one step"),
            Flag("--use_vllm", "", "sample with vLLM"),
            Flag("--nan_policy", "NAME", "stop or skip, once a NaN step has been refused"),
            Flag("--seed", "N", "of everything that is drawn"),
        ),
    ),
    Group(
        "the run",
        (
            Flag("--output_dir", "DIR", "where it is kept; a new folder in runs/ unless given"),
            Flag("--overwrite", "", "replace a run that stands there already"),
            Flag("--run_name", "NAME", "what trackers call it, and its folder in runs/"),
            Flag("--report_to", "NAME …", "wandb, trackio, tensorboard; metrics.jsonl is always "
                 "written"),
            Flag("--logging_steps", "N", "steps between two lines of metrics"),
            Flag("--eval_steps", "N", "steps between two looks at held-out problems"),
            Flag("--save_steps", "N", "steps between two checkpoints"),
            Flag("--resume", "RUN", "go on with a run, or from one of its checkpoints, exactly; "
                 "with more --max_steps a finished one too"),
            Flag("--resume_from_checkpoint", "PATH", "TRL's name for it; `latest` is that of "
                 "--output_dir"),
            Flag("--force", "", "resume although settings, data or rewards are not the run's"),
            Flag("--max_hours", "H", "save and stop before a step that would take it past H hours"),
            Flag("--config", "FILE", "flags from a YAML file; what is typed wins over it"),
            Flag("--dry_run", "", "plan only, keep nothing: memory, time, what there is to learn "
                 "from --dry_run_problems N (32)"),
            Flag("--json", "", "the result as one JSON object on stdout, the rest on stderr"),
        ),
    ),
)  # fmt: skip

# Not TRL's: Abacist's own, or read before TRL's are.
OWN_FLAGS = frozenset(
    {
        "--allow_hackable_rewards",
        "--answer_column",
        "--config",
        "--control",
        "--decimal_mark",
        "--device",
        "--dry_run",
        "--force",
        "--json",
        "--max_hours",
        "--nan_policy",
        "--num_consistency_problems",
        "--num_heldout_problems",
        "--num_shots",
        "--overwrite",
        "--question_column",
        "--resume",
        "--system_prompt",
    }
)


def render(groups: Sequence[Group], width: int = 96) -> str:
    """The table as text, two columns, at most ``width`` characters wide.

    >>> print(render([Group("sums", (Flag("--add", "N", "a number"),))]))
    sums:
      --add N  a number
    """
    rows = [f"{flag.name} {flag.value}".rstrip() for group in groups for flag in group.flags]
    column = 2 + max(map(len, rows)) + 2
    blocks = []
    for group in groups:
        lines = [f"{group.title}:"]
        for flag in group.flags:
            left = f"  {flag.name} {flag.value}".rstrip().ljust(column)
            lines += textwrap.wrap(
                flag.help, width, initial_indent=left, subsequent_indent=" " * column
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def normalise(argv: Sequence[str]) -> list[str]:
    """Flags in one spelling: ``--num-shots=5`` becomes ``--num_shots 5``, as TRL would read it.

    Only what looks like a flag is touched, and nothing after a bare ``--``.

    >>> normalise(["tiny", "--learning-rate=-1e-3", "--use_peft"])
    ['tiny', '--learning_rate', '-1e-3', '--use_peft']
    """
    spelled: list[str] = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return [*spelled, *argv[index:]]
        if argument.startswith("--") and _FLAG.fullmatch(argument):
            name, equals, value = argument.partition("=")
            spelled.append("--" + name[2:].replace("-", "_"))
            if equals:
                spelled.append(value)
        else:
            spelled.append(argument)
    return spelled


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of ``words`` that a person who typed ``word`` most likely meant, if any.

    >>> nearest("trian", ["train", "ask"])
    'train'
    """
    return next(iter(difflib.get_close_matches(word[:80].lower(), list(words), n=1)), None)


class Parser(argparse.ArgumentParser):
    """argparse for the verbs whose flags are all their own, with our errors for its own."""

    def __init__(self, verb: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"abacist {verb}",
            description=textwrap.fill(description, 96),
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=34, width=96
            ),
            allow_abbrev=False,
        )

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options in ``argv``. Raises :class:`UsageError` for anything wrong with them."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            guess = nearest(unknown[0], self._option_string_actions)
            if guess and unknown[0].startswith("-"):
                raise UsageError(f"{self.prog} has no {unknown[0]!r}", f"Did you mean {guess}?")
            self.error(f"{self.prog} does not take {unknown[0]!r}")
        return options

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help says what it takes.")
