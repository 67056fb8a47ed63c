"""What ``abacist eval`` puts to a model: which problems, in which prompt, with what budget.

What was not asked for is what the model was trained with, if it is a run, and else the default,
so that the plain command measures a run as its own verdict did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abacist.delivery.ask import Prompting
from abacist.errors import DataError
from abacist.policy.source import BUILT_IN
from abacist.proof.native import NATIVE_COMPLETION_TOKENS, NATIVE_SHOTS, NativeForm
from abacist.proof.overlap import Overlap
from abacist.records.seen import Seen
from abacist.task.golds import DecimalMark
from abacist.task.problems import MADE_HERE, Problem, draw, load_problems
from abacist.task.prompts import Shots, choose_shots, load_shots, system_text
from abacist.task.variants.perturb import perturb_all

DEFAULT_DATASET, GENERATED = "openai/gsm8k", "generated"
# Evaluations with different seeds are compared, so the seed of sampling changes no problem and
# no example.
FIXED_SEED = 0
_SPLITS = {
    "all": "every row",
    "test": "its test split",
    "heldout": "held out from training",
    "selection": "kept from training for --eval_steps",
    "train": "of those trained on",
}


@dataclass(frozen=True)
class Request:
    """What was asked for, in the words of the flags; None where nothing was said."""

    model: str
    dataset_name: str | None = None
    dataset_config: str | None = None
    question_column: str = "question"
    answer_column: str = "answer"
    decimal_mark: DecimalMark = "auto"
    skip_bad_rows: bool = False
    split: str | None = None
    num_problems: int | None = None
    include_seen: bool = False
    perturb: int | None = None
    num_shots: str | None = None
    shots_file: str | None = None
    system_prompt: str | None = None
    max_completion_length: int | None = None
    prefill: str = ""
    native_prompt: bool = False
    num_samples: int = 1
    temperature: float = 1.0
    batch_size: int = 64
    seed: int = 0
    output_dir: Path | None = None
    overwrite: bool = False
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Data:
    """The problems of an evaluation, and where they come from."""

    problems: list[Problem]
    source: str
    split: str
    perturbed: str = ""
    columns: Mapping[str, Any] | None = None
    overlap: Overlap = field(default_factory=Overlap)

    @property
    def sentence(self) -> str:
        """In words, for a person."""
        told = f"{len(self.problems):,} of {self.source}, {_SPLITS[self.split]}"
        return f"{told}; {self.perturbed}" if self.perturbed else told


def load_data(request: Request, recorded: Mapping[str, Any], seen: Seen | None = None) -> Data:
    """The problems asked for; ``recorded`` is the settings of the run, {} if it is none.

    Problems that the model has ``seen`` in training are left out, unless they were asked for: by
    ``include_seen``, or as the split of a run's own data that it was trained on. Raises DataError
    for data that cannot be used, or all of it seen; single rows without a gold are kept.
    """
    is_own = request.dataset_name is None and bool(recorded)
    default = GENERATED if request.model == BUILT_IN else DEFAULT_DATASET
    source = request.dataset_name or str(recorded.get("dataset_name", default))
    split = request.split or _default_split(source, is_own)
    columns: dict[str, Any] = {
        "question_column": request.question_column,
        "answer_column": request.answer_column,
        "decimal_mark": request.decimal_mark,
        "dataset_config": request.dataset_config,
        "skip_bad_rows": request.skip_bad_rows,
    }
    limit = request.num_problems
    if is_own:
        columns |= {name: recorded[name] for name in columns if name in recorded}
        names = {"train_split": "dataset_train_split", "test_split": "dataset_test_split"}
        columns |= {ours: recorded[name] for ours, name in names.items() if name in recorded}
        if split == "heldout":
            limit = limit or recorded.get("num_heldout_problems") or None
    # What is made on the spot is made in the number wanted, and a run's own held-out problems are
    # cut as its verdict cut them; of other data the limit counts what is left to ask.
    cut_first = is_own or source in MADE_HERE
    problems = load_problems(
        source,
        split=split,
        limit=limit if cut_first else None,
        seed=FIXED_SEED,
        keep_without_gold=True,
        **columns,
    )
    leave_out = not (request.include_seen or (is_own and split in ("train", "selection")))
    overlap = Overlap.of(problems, seen, leave_out=leave_out)
    if leave_out:
        problems = _unseen(problems, overlap, source)
    if limit is not None and not cut_first:
        problems = draw(problems, seed=FIXED_SEED, purpose="limit")[:limit]
    if not leave_out:
        overlap = Overlap.of(problems, seen, leave_out=False)
    if not any(problem.answer for problem in problems):
        raise DataError(
            f"{source}: none of its {len(problems)} rows has a gold answer.",
            "Name the column that holds it with --answer_column.",
        )
    perturbed = ""
    if request.perturb is not None:
        asked = len(problems)
        problems, _ = perturb_all(problems, seed=request.perturb)
        overlap = overlap.of_variants(request.perturb, problems)
        perturbed = f"with other numbers (seed {request.perturb}); {asked - len(problems):,} of "
        perturbed += f"{asked:,} have no sure variant"
        if not problems:
            raise DataError(
                f"{source}: none of {asked} problems could be given other numbers.",
                "That needs worked solutions with calculator annotations, as GSM8K's.",
            )
    return Data(problems, source, split, perturbed, columns, overlap)


def _unseen(problems: list[Problem], overlap: Overlap, source: str) -> list[Problem]:
    new = [problem for problem in problems if problem.problem_id not in overlap.kinds]
    if not new:
        raise DataError(
            f"{source}: this run has seen all {len(problems):,} of these problems in training, so "
            "they say nothing of how it does on new ones.",
            "Leave out --dataset_name and --split to ask what was held out for it, name other "
            "data, or ask these all the same with --include_seen.",
        )
    return new


def _default_split(source: str, is_own: bool) -> str:
    if is_own or source in MADE_HERE:
        return "heldout"
    return "all" if Path(source).expanduser().is_file() else "test"


def prompting_of(request: Request, data: Data, form: NativeForm | None) -> Prompting:
    """How the problems are put: as trained, or as asked; ``form`` is the native prompt's, if any.

    Raises DataError or UsageError if the worked examples cannot be had.
    """
    prompting = Prompting.of(request.model)
    if form is not None:
        tokens = prompting.max_completion_tokens
        if form is not NativeForm.BUILT_IN:
            tokens = max(tokens, NATIVE_COMPLETION_TOKENS)
        prompting = Prompting(None, Shots(), tokens)
    elif request.system_prompt is not None:
        prompting = replace(prompting, system_prompt=system_text(request.system_prompt))
    if request.max_completion_length is not None:
        prompting = replace(prompting, max_completion_tokens=request.max_completion_length)
    wanted = request.num_shots
    if form is NativeForm.COMPLETION and wanted is None and request.shots_file is None:
        wanted = str(NATIVE_SHOTS)
    if wanted is None and request.shots_file is not None:
        mark = request.decimal_mark
        return replace(prompting, shots=load_shots(Path(request.shots_file), decimal_mark=mark))
    if wanted is None:
        return prompting
    return replace(prompting, shots=choose_shots(_examples(request, data, wanted), wanted))


def _examples(request: Request, data: Data, wanted: str) -> list[Problem]:
    """The problems that worked examples are drawn from: never those of the split asked."""
    if not wanted.isdecimal() or int(wanted) == 0:
        return []
    if request.shots_file is not None:
        mark = request.decimal_mark
        return load_problems(request.shots_file, split="all", decimal_mark=mark)
    try:
        return load_problems(data.source, split="train", **(data.columns or {}))
    except DataError as error:
        raise DataError(
            f"No worked examples can be drawn: {error.message}",
            "Name a file that holds some with --shots_file.",
        ) from error
