"""Abacist in Python: train, evaluate, compare and ask, with the flags of the commands as keywords.

A keyword has the name of the flag, its meaning and its checks. In a notebook and on a terminal the
work shows how far it is; elsewhere it is silent unless ``progress=True``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, overload

from abacist.errors import UsageError
from abacist.learning.config import Config
from abacist.learning.eval import Request, evaluate_model, request_of
from abacist.learning.keywords import config_of, model_name, unknown_keyword
from abacist.learning.resume.resuming import Run
from abacist.learning.seen import without_seen
from abacist.learning.tracking import Silent, Watcher, told_of
from abacist.policy.loading import load_policy, quiet_libraries
from abacist.proof.ask import Answers, Prompting, ask_each, sampling_temperature
from abacist.proof.comparison.compare import Comparison
from abacist.proof.comparison.gate import pair_gate
from abacist.proof.comparison.sides import AFTER, BEFORE, Side, load_side
from abacist.proof.evaluation import Evaluation
from abacist.task.given import GivenData
from abacist.task.plain import is_number, is_whole, plain
from abacist.view.live import Live

PathLike = str | os.PathLike[str]
RewardLike = str | Callable[..., Any]
_LOADING = ("device", "dtype", "attn_implementation", "revision", "trust_remote_code")


def train(
    recipe: PathLike | Config | None = None,
    *,
    model: PathLike | Run | None = None,
    dataset: PathLike | GivenData | None = None,
    reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
    reward_weights: Sequence[float] | None = None,
    max_steps: int | None = None,
    num_generations: int | None = None,
    learning_rate: float | None = None,
    max_completion_length: int | None = None,
    num_heldout_problems: int | None = None,
    output_dir: PathLike | None = None,
    resume: PathLike | Run | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    watcher: Watcher | None = None,
    **flags: Any,
) -> Run:
    """Teach a model with GRPO, and measure it before and after on the same held-out problems.

    Examples::

        run = abacist.train("tiny")                        # the built-in recipe: minutes on a CPU
        run = abacist.train(model="Qwen/Qwen2.5-1.5B-Instruct", dataset="openai/gsm8k",
                            reward_funcs=["default", my_reward], max_steps=200)
        run = abacist.train(resume="runs/tiny-001")        # go on where it was stopped

    Args:
        recipe: the name of a recipe, or a YAML file of settings such as a run's ``config.yaml``.
            With nothing at all it is ``tiny``.
        model: ``"tiny"``, a folder, an adapter, a Hub id, or a run, which is trained further.
        dataset: ``"generated"``, a Hub id, a file, a folder, or the rows themselves: problems,
            dicts with ``question`` and ``answer``, a ``datasets.Dataset`` or a table of pandas.
            Rows are kept in the run as ``data.jsonl``.
        reward_funcs: names (``"default"``, ``"correctness"``, ``"path/to/file.py:function"``) and
            functions ``f(prompts, completions, **columns) -> list[float]``, lambdas and closures
            too. Of a function that stands in no file, ``config.yaml`` holds only the name: give it
            again to resume.
        reward_weights: one for each reward; ``"default"`` is five.
        resume: a run, or one of its checkpoints.
        progress: True and False show it and hide it, wherever this runs.
        watcher: receives the progress in place of what shows it by default.
        **flags: every other flag of ``abacist train --help_all``, without its dashes.

    Returns a :class:`Run`: ``run.comparison`` is the verdict, ``run.path`` the directory,
    ``run.text()``, ``run.plot()`` and ``run.to_pandas()`` show it. Raises
    :class:`~abacist.errors.AbacistError` for anything a person can mend.
    """
    from abacist.learning.train import train as run

    named = {
        "model": model, "dataset": dataset, "reward_funcs": reward_funcs,
        "reward_weights": reward_weights, "max_steps": max_steps,
        "num_generations": num_generations, "learning_rate": learning_rate,
        "max_completion_length": max_completion_length,
        "num_heldout_problems": num_heldout_problems, "output_dir": output_dir, "resume": resume,
        "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None} | flags
    if isinstance(recipe, Config):
        if given:
            raise UsageError("train() takes a Config alone", f"Set {next(iter(given))} in it.")
        config = recipe
    else:
        config = config_of(recipe, given)
    with _shown(progress, watcher) as told:
        trained = run(config, told)
    if not trained.stopped:
        from abacist.delivery.ending import write_page_and_card

        write_page_and_card(trained.path)
    return trained


def evaluate(
    model: PathLike | Run,
    problems: PathLike | GivenData | None = None,
    *,
    dataset: PathLike | GivenData | None = None,
    split: str | None = None,
    num_problems: int | None = None,
    num_samples: int = 1,
    temperature: float | None = None,
    max_completion_length: int | None = None,
    native_prompt: bool = False,
    output_dir: PathLike | None = None,
    progress: bool | None = None,
    **flags: Any,
) -> Evaluation:
    """Measure a model on problems with known answers, every figure with its 95 % interval.

    A run is asked as it was trained, on its own held-out problems, unless you say otherwise.

    Examples::

        found = abacist.evaluate("tiny", num_problems=50)
        found = abacist.evaluate(run, dataset="openai/gsm8k", split="test", num_samples=4)
        found.accuracy                                     # Interval(value=…, low=…, high=…)

    Args:
        model: ``"tiny"``, a run, a folder, an adapter or a Hub id.
        problems: the problems themselves, rows with ``question`` and ``answer``, or where they
            come from, as ``dataset`` of :func:`train`; ``split`` says which part.
        dataset: the same, by the name that :func:`train` has for it.
        num_problems: at most so many.
        num_samples: sampled replies to each problem beside the greedy one, if more than 1; they
            are the evaluation ``found.sampled``.
        native_prompt: ask in the model's own best-known prompt: the honest baseline.
        output_dir: where it is kept; else a new folder in the run's ``evals/``, or in ``evals/``.
        progress: True and False show it and hide it, wherever this runs.
        **flags: every other flag of ``abacist eval --help``, without its dashes.

    Returns an :class:`Evaluation`; it is kept in ``found.path``. Raises
    :class:`~abacist.errors.AbacistError` for anything a person can mend.
    """
    known = {one.name for one in fields(Request)}
    for name in flags:
        if name not in known:
            raise UsageError(unknown_keyword("evaluate", name, known | {"dataset"}))
    if problems is not None and dataset is not None:
        raise UsageError("problems and dataset are one setting", "Give one of them.")
    given = problems if dataset is None else dataset
    if given is not None and flags.get("dataset_name") is not None:
        raise UsageError("dataset and dataset_name are one setting", "Give one of them.")
    is_named = isinstance(given, str | os.PathLike)
    named = {
        "model": model_name(model, "evaluate"),
        "problems": None if is_named else given, "dataset_name": given if is_named else None,
        "split": split,
        "num_problems": num_problems, "num_samples": num_samples, "temperature": temperature,
        "max_completion_length": max_completion_length, "native_prompt": native_prompt,
        "output_dir": output_dir,
    }  # fmt: skip
    request = request_of({**flags, **{name: one for name, one in named.items() if one is not None}})
    from abacist.view.report.writing import write_evaluation

    with _shown(progress) as told:
        found = evaluate_model(request, watcher=told, render=write_evaluation)
    return replace(found.greedy, path=found.path, sampled=found.sampled)


def compare(
    a: PathLike | Run | Evaluation,
    b: PathLike | Run | Evaluation | None = None,
    *,
    sampled: bool = False,
    allow_different: str | Sequence[str] | None = (),
    include_seen: bool = False,
) -> Comparison:
    """Is B better than A on the same problems, and by how much? Paired, problem by problem.

    A run stands for its evaluation after training; given alone, it is compared with its own before
    training.

    Examples::

        found = abacist.compare("runs/tiny-001", "runs/tiny-002")
        found.accuracy.is_better                           # the interval and the exact test agree

    Args:
        a: a run, by its directory or as an object, a folder that ``abacist eval`` kept, or an
            evaluation.
        b: the same.
        sampled: of a run, the sampled evaluations, not the greedy ones.
        allow_different: compare although these differ: ``prompt``, ``shots``, ``budget``,
            ``sampling``.
        include_seen: compare also on problems that a side has seen in training, which are left
            out by default.

    Returns a :class:`Comparison`: ``found.accuracy`` is the paired test, ``found.changes`` every
    figure's change. Raises :class:`~abacist.errors.AbacistError` where the two are not of the same
    problems, asked alike.
    """
    if b is None and _is_evaluation(a):
        raise UsageError(
            "compare() was given one evaluation", "Give two, or a run, which has its own before."
        )
    first = _side(a, AFTER if b is not None else BEFORE, sampled)
    sides = [first, _side(a if b is None else b, AFTER, sampled)]
    if sides[0].name == sides[1].name:
        words = ("the first", "the second")
        sides = [
            replace(side, name=f"{word}: {side.name}")
            for word, side in zip(words, sides, strict=True)
        ]
    left_out = ""
    if not include_seen:
        sides, left_out = without_seen(sides)
    allowed = (allow_different,) if isinstance(allow_different, str) else allow_different or ()
    gate = pair_gate(sides[0], sides[1], allow_different=allowed)
    notes = (*([left_out] if left_out else []), *gate.notes)
    return replace(gate.found, names=(sides[0].name, sides[1].name), notes=notes)


@overload
def ask(model: PathLike | Run, question: str, **options: Any) -> Answers: ...
@overload
def ask(model: PathLike | Run, question: Sequence[str], **options: Any) -> list[Answers]: ...
def ask(
    model: PathLike | Run,
    question: str | Sequence[str],
    *,
    num_samples: int = 1,
    temperature: float | None = None,
    max_completion_length: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **loading: Any,
) -> Answers | list[Answers]:
    """Put a question to a model, in the prompt it was trained with; or each of several.

    Examples::

        abacist.ask(run, "Ada has 3 boxes with 4 pens in each box. How many pens?").answer   # '12'
        abacist.ask("tiny", question, num_samples=8).agreement      # the share of the majority

    Args:
        model: ``"tiny"``, a run, a folder, an adapter or a Hub id.
        question: one, or a list; the model is loaded once for all of them.
        num_samples: replies to each question.
        temperature: 0 is greedy; by default 0 for one reply and 1 for several.
        max_completion_length: tokens a reply may have; as trained, else 512.
        **loading: ``device``, ``dtype``, ``attn_implementation``, ``revision``,
            ``trust_remote_code``.

    Returns :class:`Answers`, one for each question: ``.answer``, ``.agreement``, ``.replies``.
    """
    for name in loading:
        if name not in _LOADING:
            known = {*_LOADING, "num_samples", "temperature", "max_completion_length", "seed"}
            raise UsageError(unknown_keyword("ask", name, known))
    loading = {name: plain(value) for name, value in loading.items() if value is not None}
    for name, value in loading.items():
        if not isinstance(value, bool if name == "trust_remote_code" else str):
            raise UsageError(f"{name} is {value!r}, a {type(value).__name__}")
    num_samples, temperature, max_completion_length, seed = plain(
        (num_samples, temperature, max_completion_length, seed)
    )
    for what, value, least in (
        ("num_samples", num_samples, 1),
        ("max_completion_length", max_completion_length, 1),
        ("seed", seed, 0),
    ):
        if what == "max_completion_length" and value is None:
            continue
        if not is_whole(value) or value < least:
            raise UsageError(f"{what} is {value!r}, not a whole number of at least {least}")
    if temperature is not None and not (is_number(temperature) and 0 <= temperature < math.inf):
        raise UsageError(f"temperature is {temperature!r}, not a number of at least 0")
    warmth = sampling_temperature(temperature, num_samples)
    questions = _questions(question)
    name = model_name(model, "ask")
    quiet_libraries()
    prompting = Prompting.of(name)
    if max_completion_length is not None:
        prompting = replace(prompting, max_completion_tokens=max_completion_length)
    with _shown(progress) as told:
        watcher = told or Silent()
        watcher.stage(f"Loading {name}")
        policy = load_policy(name, **loading)
        watcher.stage("Asking")
        asked = ask_each(
            policy, questions, prompting, temperature=warmth, num_samples=num_samples, seed=seed,
            progress=told_of(watcher, "reply"),
        )  # fmt: skip
    answers = [Answers(one, tuple(found)) for one, found in zip(questions, asked, strict=True)]
    return answers[0] if isinstance(question, str) else answers


def _questions(given: object) -> list[str]:
    """One question or several as a list. Raises UsageError for what is no text, with its kind."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, Mapping | Set | bytes):
        given = [given]
    questions: list[str] = []
    for one in given:
        if not isinstance(one, str):
            raise UsageError(
                f"ask() was given a {type(one).__name__} as a question",
                "Give a text or a list of texts, such as problem.question of a Problem.",
            )
        questions.append(one)
    if not questions:
        raise UsageError("ask() takes a question, or a list of questions", "Give texts.")
    return questions


def _is_evaluation(given: object) -> bool:
    if isinstance(given, Evaluation):
        return True
    return isinstance(given, str | os.PathLike) and (Path(given) / "evaluation.json").is_file()


def _side(given: PathLike | Run | Evaluation, when: str, sampled: bool) -> Side:
    if isinstance(given, Evaluation):
        wanted = given.sampled if sampled else given
        if wanted is None:
            raise UsageError(f"{given!r} has no sampled replies", "Leave sampled out.")
        name = str(given.path) if given.path else f"{wanted!r}".strip("<>")
        return Side(name, wanted, folder=given.path)
    if not isinstance(given, Run):
        if not isinstance(given, str | os.PathLike):
            raise UsageError(
                f"compare() was given a {type(given).__name__}",
                "Give runs or evaluations, by their folders or as objects.",
            )
        return load_side(os.fspath(given), when, sampled=sampled)
    return load_side(str(given.path), when, sampled=sampled)


@contextmanager
def _shown(progress: bool | None, watcher: Watcher | None = None) -> Iterator[Watcher | None]:
    """The watcher to tell: the one given, else a panel in a notebook's cell or on a terminal."""
    if progress not in (None, True, False):
        raise UsageError(f"progress is {progress!r}, not True, False or None")
    if watcher is not None or progress is False:
        yield watcher
        return
    live = Live.here()
    if live is None and (progress or getattr(sys.stdout, "isatty", lambda: False)()):
        live = Live()
    if live is None:
        yield None
        return
    with live:
        yield live
