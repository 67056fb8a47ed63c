"""What the model is shown: system text, worked examples, question.

The only file that knows wording. The layout asked for in :data:`SYSTEM_PROMPT` is written by
``render_reply``, the same function that renders the examples, so text, examples and parser
cannot drift apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from abacist.errors import DataError, UsageError
from abacist.task.answers import read_answer, same_answer
from abacist.task.golds import DecimalMark
from abacist.task.problems import Problem, draw, load_problems, normalise_question
from abacist.task.reply import parse_reply, render_reply

Message = dict[str, str]

SYSTEM_PROMPT = (
    "Work the problem out one step at a time, then give the result. "
    "Write your whole reply in this layout and nothing outside it:\n"
    + render_reply(
        "the steps, one to a line, each with its calculation",
        "the final number alone: digits, no unit, no currency sign, no words",
    )
)


def system_text(setting: str | None) -> str | None:
    """The system text a setting means: ``default`` is ours, ``none`` is none, else its own words.

    >>> system_text("none") is None, system_text("Be brief.")
    (True, 'Be brief.')
    """
    named = {"default": SYSTEM_PROMPT, "none": None, "": None, None: None}
    return named.get(setting, setting)


#: Worked examples that come with the package, by the name that ``--shots_file`` takes. "steps" is
#: written as small models write by themselves, one labelled step after the other: copying GSM8K's
#: terse solutions cost Qwen2.5-Coder-0.5B half of its right answers (docs/lab.md).
BUILT_IN_SHOTS = {"steps": Path(__file__).with_name("worked_steps.jsonl")}

GIST = "gist"
# The historic one-shot shows the layout on a question without arithmetic; the words are ours.
GIST_SHOT = Problem(
    problem_id="gist-one-shot",
    question="Which prime number is the largest with just one digit?",
    solution="Going down from 9: 9 is 3 times 3 and 8 is 2 times 4, so neither is prime. "
    "7 has no divisor but 1 and itself.",
    answer="7",
    difficulty=1,
)

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, slots=True)
class Shots:
    """Worked examples, with one spare to stand in where a problem would be its own example."""

    chosen: tuple[Problem, ...] = ()
    spares: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def all(self) -> tuple[Problem, ...]:
        """The chosen ones, then the spares."""
        return (*self.chosen, *self.spares)

    def for_question(self, question: str, problem_id: str | None = None) -> list[Problem]:
        """The chosen examples in order, each that is the asked problem replaced by a spare."""
        asked = normalise_question(question)

        def differs(shot: Problem) -> bool:
            return shot.problem_id != problem_id and normalise_question(shot.question) != asked

        fitting = [shot for shot in self.all if differs(shot)]
        return fitting[: len(self.chosen)]


def render_solution(problem: Problem) -> str:
    """The worked solution in the reply format, as the model should have written it.

    Calculator annotations are dropped and the gold loses its grouping commas, because an
    example should earn every reward it is an example for.
    """
    value = read_answer(problem.answer)
    whole = isinstance(value, Fraction) and value.denominator == 1
    answer = str(value) if whole else problem.answer.replace(",", "")
    return render_reply(_CALCULATOR_ANNOTATION.sub("", problem.solution), answer)


def choose_shots(
    problems: Sequence[Problem],
    num_shots: int | str,
    *,
    seed: int = 0,
    exclude: Collection[str] = (),
) -> Shots:
    """``num_shots`` examples and one spare, drawn from ``problems`` by ``seed``.

    ``num_shots`` may be a numeral, or ``"gist"`` for the historic one-shot, which needs no
    problems. Problems whose id is in ``exclude``, that have no worked solution, or whose solution
    does not survive the reply format (it holds a tag, say) are passed over. The draw depends on
    ids, not on order, and more shots begin with the fewer. Raises UsageError for a number that
    is none, DataError if too few problems can serve.
    """
    if num_shots == GIST:
        return Shots((GIST_SHOT,))
    try:
        wanted = int(num_shots)
    except ValueError:
        wanted = -1
    if wanted < 0:
        raise UsageError(
            f"--num_shots {num_shots} is no number of examples.",
            f"Give 0, 1, 2 …, or {GIST!r} for the historic one-shot.",
        )
    if wanted == 0:
        return Shots()
    excluded = set(exclude)
    drawn: list[Problem] = []
    for problem in draw(problems, seed=seed, purpose="shots"):
        if problem.problem_id not in excluded and _can_serve(problem):
            drawn.append(problem)
        if len(drawn) > wanted:
            break
    if len(drawn) < wanted:
        raise DataError(
            f"{wanted} examples were asked for, but only {len(drawn)} of {len(problems)} problems "
            "have a worked solution to show.",
            "Lower --num_shots, or give a file with more worked solutions.",
        )
    return Shots(tuple(drawn[:wanted]), tuple(drawn[wanted:]))


def save_shots(path: Path, shots: Shots) -> None:
    """Write the examples as data rows, so that a run can be asked in its own prompt later.

    The file also serves as a ``--shots_file``.
    """
    rows = [
        {
            "problem_id": shot.problem_id,
            "question": shot.question,
            "answer": f"{shot.solution}\n#### {shot.answer}",
            "spare": index >= len(shots.chosen),
        }
        for index, shot in enumerate(shots.all)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shots_path(name: str) -> Path:
    """The file that ``--shots_file`` names: one of :data:`BUILT_IN_SHOTS`, or a path."""
    return BUILT_IN_SHOTS.get(name, Path(name))


def load_shots(path: Path, *, decimal_mark: DecimalMark = "auto") -> Shots:
    """What :func:`save_shots` wrote, or every row of any data file, as examples in its order.

    Raises DataError for a missing or damaged file.
    """
    shots = load_problems(path, split="all", decimal_mark=decimal_mark)
    return Shots(
        tuple(shot for shot in shots if shot.columns.get("spare") is not True),
        tuple(shot for shot in shots if shot.columns.get("spare") is True),
    )


def _can_serve(problem: Problem) -> bool:
    if not problem.solution:
        return False
    reply = parse_reply(render_solution(problem))
    return reply.strict and same_answer(reply.answer, problem.answer)


def build_messages(
    question: str,
    *,
    system_prompt: str | None = SYSTEM_PROMPT,
    shots: Shots | Sequence[Problem] = (),
    problem_id: str | None = None,
) -> list[Message]:
    """The conversation that asks ``question``: system, then each example as a pair, then the user.

    No system turn is made for None or "". A problem is never its own example: one of ``shots``
    that asks the same, or has the same ``problem_id``, makes way for the spare, or is left out
    where there is none.

    >>> build_messages("How much is 2 + 3?", system_prompt=None)
    [{'role': 'user', 'content': 'How much is 2 + 3?'}]
    """
    if not isinstance(shots, Shots):
        shots = Shots(tuple(shots))
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for shot in shots.for_question(question, problem_id):
        messages.append({"role": "user", "content": shot.question})
        messages.append({"role": "assistant", "content": render_solution(shot)})
    return [*messages, {"role": "user", "content": question}]


def to_dataset_rows(
    problems: Iterable[Problem],
    *,
    system_prompt: str | None = SYSTEM_PROMPT,
    shots: Shots | Sequence[Problem] = (),
    solutions: bool = False,
) -> list[dict[str, object]]:
    """The rows TRL trains on: ``prompt`` (messages), ``answer`` (the gold), and who it is.

    TRL hands every column but ``prompt`` to the reward functions by its name, the problems' other
    columns too (None for a problem that lacks one). ``solutions`` adds the worked solution as
    ``solution``, where the data has no column of that name.
    """
    problems = list(problems)
    others = dict.fromkeys(name for problem in problems for name in problem.columns)
    return [
        {
            **({"solution": problem.solution} if solutions else {}),
            **{name: problem.columns.get(name) for name in others},
            "prompt": build_messages(
                problem.question,
                system_prompt=system_prompt,
                shots=shots,
                problem_id=problem.problem_id,
            ),
            "answer": problem.answer,
            "problem_id": problem.problem_id,
            "difficulty": problem.difficulty,
        }
        for problem in problems
    ]
