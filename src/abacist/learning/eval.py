"""``abacist eval`` from start to end: load, ask, keep. Read :func:`_evaluate` top to bottom.

What was not asked for is what the model was trained with, if it is a run, and else the default,
so that the plain command measures a run as its own verdict did.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from abacist.errors import DataError, UsageError
from abacist.learning.openings import note_asked
from abacist.learning.paths import with_data_beside
from abacist.learning.rewards import reported_rewards
from abacist.learning.seen import seen_by
from abacist.learning.tracking import Silent, Watcher, told_of
from abacist.policy.choices import (
    MATMUL_PRECISIONS,
    explain_matmul_precision,
    float32_matmul_precision,
)
from abacist.policy.loading import Policy, load_policy, quiet_libraries
from abacist.policy.source import BUILT_IN, find, read_json
from abacist.proof.ask import Prompting, run_folder, run_settings
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import GREEDY, SAMPLED, Evaluation
from abacist.proof.native import (
    NATIVE_COMPLETION_TOKENS,
    NATIVE_SHOTS,
    NativeForm,
    NativePrompt,
    native_form,
)
from abacist.proof.overlap import Overlap
from abacist.proof.unfinished import SAMPLED_FOLDER, EvaluationFolder, says_how_to_go_on
from abacist.records.openings import EVAL
from abacist.records.provenance import data_fingerprint, package_versions
from abacist.records.seen import Seen
from abacist.task.given import GivenData
from abacist.task.golds import DecimalMark
from abacist.task.plain import is_number, is_whole, plain
from abacist.task.problems import MADE_HERE, Problem, draw, load_problems, reading_options
from abacist.task.prompts import Shots, choose_shots, load_shots, shots_path, system_text
from abacist.task.variants.perturb import perturb_all

EVALS_FOLDER = Path("evals")
_VERSIONS = ("abacist", "torch", "transformers")
_SAMPLING_DEFAULTS = ("repetition_penalty", "temperature", "top_p", "top_k")
DEFAULT_DATASET, GENERATED = "openai/gsm8k", "generated"
GIVEN = "given problems"
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
    problems: GivenData | None = None
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
    float32_matmul_precision: str | None = None
    attn_implementation: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


# The least that each may be, of those that are numbers.
_LEAST = {
    "num_problems": 1, "max_completion_length": 1, "num_samples": 1, "batch_size": 1, "perturb": 0,
    "seed": 0,
}  # fmt: skip


def request_of(settings: Mapping[str, Any]) -> Request:
    """The request of one command or one call; what is None, and switches that are off, say nothing.

    Raises UsageError for a value of another kind, one that is out of range, and for what cannot be
    meant together.
    """
    given = {
        name: value if name == "problems" else plain(value)
        for name, value in settings.items()
        if value is not None
    }
    if is_whole(given.get("num_shots")):
        given["num_shots"] = str(given["num_shots"])
    kinds = {one.name: str(one.type) for one in fields(Request)}
    for name, value in given.items():
        if (least := _LEAST.get(name)) is not None:
            if not is_whole(value) or value < least:
                raise UsageError(f"--{name} {value!r} is not a whole number of at least {least}")
        elif kinds[name] == "bool" and not isinstance(value, bool):
            raise UsageError(f"--{name} is a switch, and {value!r} is not True or False")
        elif kinds[name].startswith(("str", "Path")) and not isinstance(value, str):
            raise UsageError(f"--{name} {value!r} is not a text")
    if "output_dir" in given:
        given["output_dir"] = Path(given["output_dir"])
    if (split := given.get("split")) is not None and split not in _SPLITS:
        raise UsageError(f"there is no split {split!r}", f"Choose one of {', '.join(_SPLITS)}.")
    if (precision := given.get("float32_matmul_precision", "highest")) not in MATMUL_PRECISIONS:
        raise UsageError(
            f"--float32_matmul_precision {precision!r} is not a precision that PyTorch knows",
            f"Choose one of {', '.join(MATMUL_PRECISIONS)}.",
        )
    if given.get("num_samples", 1) == 1 and "temperature" in given:
        raise UsageError(
            "--temperature applies to sampled replies only, and --num_samples is 1",
            "Ask for sampled replies with --num_samples 4; a greedy reply is always written too.",
        )
    temperature = given.get("temperature", 1.0)
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise UsageError(f"--temperature {temperature!r} is not a number above 0")
    if given.get("native_prompt") and (given.get("system_prompt") or given.get("prefill")):
        raise UsageError(
            "--native_prompt is a prompt of its own",
            "Leave out --system_prompt and --prefill, or --native_prompt.",
        )
    if given.get("problems") is not None and given.get("dataset_name") is not None:
        raise UsageError("problems and a data set were given", "Give one of them.")
    if given.get("problems") is not None and given.get("split", "all") != "all":
        raise UsageError(
            f"--split {given['split']} of problems that are given", "Leave it out: all are asked."
        )
    return Request(**given)


@dataclass(frozen=True)
class Data:
    """The problems of an evaluation, and where they come from."""

    problems: list[Problem]
    source: str
    split: str
    perturbed: str = ""
    reading: Mapping[str, Any] = field(default_factory=dict)
    is_own: bool = False  # the run's own, of which a split was held out
    overlap: Overlap = field(default_factory=Overlap)

    @property
    def name(self) -> str | None:
        """What they are of; None for the run's own data as it is."""
        if self.perturbed:
            return f"{self.source} with other numbers"
        return None if self.is_own else self.source

    @property
    def sentence(self) -> str:
        """In words, for a person."""
        told = f"{len(self.problems):,} of {self.source}, {_SPLITS[self.split]}"
        return f"{told}; {self.perturbed}" if self.perturbed else told


@dataclass(frozen=True)
class EvalResult:
    """A finished evaluation: where it is kept, and what was found."""

    path: Path
    greedy: Evaluation
    sampled: Evaluation | None


Render = Callable[[Path, Evaluation, Evaluation | None], None]


def evaluate_model(
    request: Request, *, watcher: Watcher | None = None, render: Render | None = None
) -> EvalResult:
    """Measure a model or a run as ``request`` asks, and keep everything in one folder.

    One reply to each problem is greedy; with ``num_samples`` > 1 that many are sampled besides.
    ``render`` writes what a person reads. Killed at any moment, the same request goes on where it
    was. Raises AbacistError for anything a person can mend; nothing is overwritten unasked.
    """
    recorded = run_settings(request.model).get("float32_matmul_precision", "highest")
    precision = request.float32_matmul_precision or str(recorded)
    with float32_matmul_precision(precision):
        return _evaluate(request, precision, watcher or Silent(), render)


def _evaluate(
    request: Request, precision: str, watcher: Watcher, render: Render | None
) -> EvalResult:
    quiet_libraries()
    watcher.stage(f"Loading {request.model}")
    trust = request.trust_remote_code
    # A wrong name shows before any data is read.
    found = find(request.model, revision=request.revision, trust_remote_code=trust)
    settings = run_settings(request.model)
    data = load_data(request, settings, seen_by(found.folder))
    rewards, weights = reported_rewards(
        settings, watcher.note, brought_in=run_folder(request.model) or found.folder, trust=trust
    )
    if data.overlap.sentence:
        watcher.note(f"  {data.overlap.sentence}")
    policy = load_policy(
        request.model,
        dtype=request.dtype,
        device=request.device,
        attn_implementation=request.attn_implementation,
        revision=request.revision,
        trust_remote_code=trust,
    )
    if (products := explain_matmul_precision(precision, policy.model)) is not None:
        policy.choices.append(products)
        watcher.note(f"  {products.what}: {products.value} ({products.why})")
    form = native_form(policy) if request.native_prompt else None
    prompting = prompting_of(request, data, form)
    native = None
    if form is not None and form is not NativeForm.BUILT_IN:
        native = NativePrompt.of(policy, form, prompting.shots)
        policy, prompting = native.policy, replace(prompting, shots=native.shots)
    conditions = _conditions(request, data, policy, prompting, form)
    asked = _asked(request, data, policy, prompting)
    asked["rewards"] = [reward.__name__ for reward in rewards]
    num_replies = len(data.problems) * (1 + request.num_samples * (request.num_samples > 1))
    with _folder(request, data, asked) as folder, says_how_to_go_on(folder, num_replies):
        watcher.note(f"  kept in {folder.path}; if stopped, the same command goes on from there")
        if folder.resumed:
            watcher.note("  resuming the unfinished evaluation there")
        note_asked(
            request.model,
            data.problems,
            watcher,
            split=data.split,
            purpose=EVAL,
            data=data.name,
            folder=folder.path,
            is_resumed=folder.resumed,
        )

        def ask(kind: str, **how: Any) -> Evaluation:
            replies = len(data.problems) * int(how.get("num_samples", 1))
            watcher.stage(f"Asking, {kind}: {replies:,} replies to {len(data.problems):,} problems")
            evaluation = evaluate(
                policy,
                data.problems,
                system_prompt=prompting.system_prompt,
                shots=prompting.shots,
                max_completion_tokens=prompting.max_completion_tokens,
                batch_size=request.batch_size,
                prefill=request.prefill,
                seed=request.seed,
                progress=told_of(watcher, kind),
                run_id=_name(request.model),
                split=data.split,
                native_messages=native.messages if native else None,
                rewards=rewards,
                reward_weights=weights,
                conditions=conditions,
                parts=folder.parts(kind),
                **how,
            )
            return replace(evaluation, overlap=data.overlap)

        greedy = ask(GREEDY)
        sampled = None
        if request.num_samples > 1:
            how = {"num_samples": request.num_samples, "temperature": request.temperature}
            sampled = ask(SAMPLED, **how)
            sampled.save(folder.path / SAMPLED_FOLDER)
        greedy.save(folder.path)
        if render is not None:
            render(folder.path, greedy, sampled)
        folder.finish()
        return EvalResult(folder.path, greedy, sampled)


def _folder(request: Request, data: Data, asked: dict[str, Any]) -> EvaluationFolder:
    """The folder asked for, or the next free one: in the run's ``evals/`` if it is a run."""
    if request.output_dir is not None:
        return EvaluationFolder.open(request.output_dir, asked, overwrite=request.overwrite)
    parts = [_name(data.source), data.split]
    parts += ["perturbed"] * (request.perturb is not None) + ["native"] * request.native_prompt
    if not run_settings(request.model):
        return EvaluationFolder.open_numbered(
            EVALS_FOLDER, "-".join([_name(request.model), *parts]), asked
        )
    folder = Path(request.model).expanduser()
    run = run_folder(request.model) or folder
    if run.resolve() != folder.resolve():  # a checkpoint, or a copy inside the run
        parts = [_name(request.model), *parts]
    return EvaluationFolder.open_numbered(run / "evals", "-".join(parts), asked)


def _name(text: str) -> str:
    """The last part of a path or id, as a plain file name."""
    path = Path(text).expanduser()
    last = path.stem if path.is_file() else (path.resolve() if path.exists() else path).name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def _asked(request: Request, data: Data, policy: Policy, prompting: Prompting) -> dict[str, Any]:
    """Everything the replies depend on; the batch size does not matter (in float32)."""
    versions = package_versions()
    return {
        "model": request.model,
        "weights": _weights_fingerprint(request),
        "dataset_name": data.source,
        "split": data.split,
        "num_problems": len(data.problems),
        "problems": data_fingerprint(data.problems),
        "system_prompt": prompting.system_prompt,
        "num_shots": len(prompting.shots),
        "shots": data_fingerprint(prompting.shots.all),
        "native_prompt": request.native_prompt,
        "prefill": request.prefill,
        "max_completion_length": prompting.max_completion_tokens,
        "num_samples": request.num_samples,
        "temperature": request.temperature if request.num_samples > 1 else 0.0,
        "seed": request.seed,
        "date": policy.chat.date_string,
        **{choice.what: choice.value for choice in policy.choices},
        "versions": {name: versions[name] for name in _VERSIONS},
    }


def _weights_fingerprint(request: Request) -> str:
    """A hash of names, sizes and dates of the model's files: changed weights are seen by it."""
    found = find(request.model, revision=request.revision)
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(found.folder.iterdir())
        if file.suffix == ".safetensors" or file.name.endswith("config.json")
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _conditions(
    request: Request, data: Data, policy: Policy, prompting: Prompting, form: NativeForm | None
) -> dict[str, str]:
    """In words, what the numbers depend on beside model and problems."""
    notes = dict(policy.chat.notes)
    if form is not None:
        prompt = f"the model's own best-known: {form.sentence}"
    elif prompting.system_prompt is None:
        prompt = "the question, without system text"
    else:
        words = " ".join(prompting.system_prompt.split())
        prompt = f"system text ({words if len(words) <= 60 else words[:57] + '…'}), the question"
    if request.prefill:
        prompt += f"; every reply opened with {request.prefill!r}"
    sampled = ""
    if request.num_samples > 1:
        sampled = f"; {request.num_samples} more replies drawn at temperature "
        sampled += f"{request.temperature:g}, no top-p or top-k, seed {request.seed}"
    return {
        "model": request.model + (f" on {policy.base_name}" * (policy.base_name != policy.name)),
        "problems": data.sentence,
        **({"seen in training": data.overlap.sentence} if data.overlap.sentence else {}),
        "prompt": prompt,
        "examples": f"{len(prompting.shots)} in the prompt",
        "template": notes.get("template", ""),
        "date": notes.get("date", "the template prints none"),
        "decoding": "greedy" + sampled,
        "repetition penalty": "none" + _ignored_defaults(request, policy),
        "budget": f"{prompting.max_completion_tokens} tokens a reply",
        "stop tokens": notes.get("stop tokens", ", ".join(map(str, policy.chat.stop_ids))),
        "arithmetic": policy.arithmetic,
    }


def _ignored_defaults(request: Request, policy: Policy) -> str:
    """What the checkpoint's own generation config asks for, which is not done here."""
    revision = request.revision if policy.base_name == request.model else None
    path = find(policy.base_name, revision=revision).folder / "generation_config.json"
    own = read_json(path) if path.is_file() else {}
    told = [
        f"{name} {own[name]:g}"
        for name in _SAMPLING_DEFAULTS
        if type(own.get(name)) in (int, float)
    ]
    return f"; the checkpoint's own defaults are ignored: {', '.join(told)}" if told else ""


def load_data(request: Request, recorded: Mapping[str, Any], seen: Seen | None = None) -> Data:
    """The problems asked for; ``recorded`` is the settings of the run, {} if it is none.

    Problems that the model has ``seen`` in training are left out, unless they were asked for: by
    ``include_seen``, or as the split of a run's own data that it was trained on. Raises DataError
    for data that cannot be used, or all of it seen; single rows without a gold are kept.
    """
    given = request.problems
    is_own = request.dataset_name is None and given is None and bool(recorded)
    if is_own and (run := run_folder(request.model)) is not None:
        recorded = with_data_beside(recorded, run)
    default = GENERATED if request.model == BUILT_IN else DEFAULT_DATASET
    source = request.dataset_name or str(recorded.get("dataset_name", default))
    split = request.split or _default_split(source, is_own)
    if given is not None:
        source, split = GIVEN, "all"
    reading = reading_options(vars(request))
    limit = request.num_problems
    if is_own:
        reading |= reading_options(recorded)
        if split == "heldout":
            limit = limit or recorded.get("num_heldout_problems") or None
    # What is made on the spot is made in the number wanted, and a run's own held-out problems are
    # cut as its verdict cut them; of other data the limit counts what is left to ask.
    cut_first = is_own or source in MADE_HERE
    problems = load_problems(
        source if given is None else given,
        split=split,
        limit=limit if cut_first else None,
        seed=FIXED_SEED,
        # The training read its own splits without them, before it drew as many as it wanted.
        keep_without_gold=not is_own or split in ("test", "all"),
        **reading,
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
    return Data(problems, source, split, perturbed, reading, is_own, overlap)


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
        file = shots_path(request.shots_file)
        return replace(prompting, shots=load_shots(file, decimal_mark=mark))
    if wanted is None:
        return prompting
    return replace(prompting, shots=choose_shots(_examples(request, data, wanted), wanted))


def _examples(request: Request, data: Data, wanted: str) -> list[Problem]:
    """The problems that worked examples are drawn from: never those of the split asked."""
    if not wanted.isdecimal() or int(wanted) == 0:
        return []
    if request.shots_file is not None:
        mark = request.decimal_mark
        return load_problems(shots_path(request.shots_file), split="all", decimal_mark=mark)
    try:
        return load_problems(data.source, split="train", **data.reading)
    except DataError as error:
        raise DataError(
            f"No worked examples can be drawn: {error.message}",
            "Name a file that holds some with --shots_file.",
        ) from error
