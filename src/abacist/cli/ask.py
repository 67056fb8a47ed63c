"""``abacist ask MODEL "question"``: what does it answer, and how does it get there?

One question, a file of questions, or a conversation at a terminal. Each question is asked afresh,
in the prompt that the model was trained with: it has learned to answer single questions, and an
earlier one in front of it would be a prompt that it has never seen.
"""

from __future__ import annotations

import functools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from abacist.cli import console
from abacist.cli.flags import Parser, add_loading_flags, loading_options, not_negative, positive
from abacist.errors import AbacistError, DataError, UsageError

if TYPE_CHECKING:
    from abacist.learning.tracking import Watcher
    from abacist.policy.loading import Policy
    from abacist.proof.ask import Answers, Prompting
    from abacist.records.rollout import Rollout

MAX_QUESTION_BYTES = 1_000_000
PROMPT = "question> "
GREETING = (
    "One question a line, each asked afresh: earlier ones are not remembered. Ctrl-C ends a reply, "
    "Ctrl-D the conversation."
)
ASKS_ANEW = "note: parts of the question would have been control tokens to this model, or no text "
ASKS_ANEW += "at all; they were broken up."


@dataclass
class _Asker:
    """A loaded model, and how it is asked and shown."""

    options: Namespace
    policy: Policy
    prompting: Prompting
    stdout: TextIO
    watcher: Watcher

    @property
    def streams(self) -> bool:
        """Whether a reply is shown while it is written: one alone, and where a person looks."""
        return not self.options.json and self.options.num_samples == 1 and self.stdout.isatty()

    def ask(self, question: str) -> None:
        """Put one question, and show what is answered."""
        from abacist.learning.tracking import told_of
        from abacist.proof.ask import Answers
        from abacist.view.answers import Stream, ending_lines

        if self.streams:
            stream = Stream(functools.partial(print, end="", flush=True, file=self.stdout))
            try:
                (reply,) = self._replies(question, wrote=stream)
            except KeyboardInterrupt:
                print(file=self.stdout)  # what was written stays a line of its own
                raise
            stream.end(reply.completion)
            self._note_changes(question, reply)
            print("\n".join(["", *ending_lines(reply)]), file=self.stdout)
        else:
            replies = self._replies(question, progress=told_of(self.watcher, "reply"))
            self.show(Answers(question, tuple(replies)), self._print_one)

    def ask_each(self, questions: list[str]) -> None:
        """Put all questions, and show the answers in their order, each as soon as it is there."""
        from abacist.learning.tracking import told_of
        from abacist.proof.ask import Answers, ask_each

        waiting: dict[int, list[Rollout]] = {}
        shown = 0

        def answered(number: int, replies: list[Rollout]) -> None:
            nonlocal shown
            waiting.setdefault(number, replies)
            while shown in waiting:
                found = Answers(questions[shown], tuple(waiting[shown]))
                self.show(found, self._print_line)
                shown += 1

        for number, replies in enumerate(
            ask_each(
                self.policy,
                questions,
                self.prompting,
                **self._sampling(),
                progress=told_of(self.watcher, "replies"),
                answered=answered,
            )
        ):
            answered(number, replies)

    def show(self, answers: Answers, print_json: Callable[[dict[str, Any]], None]) -> None:
        """One question's answers: for a machine, or with the question where there are several."""
        from abacist.view.answers import answers_text
        from abacist.view.plaintext import visible

        self._note_changes(answers.question, answers.replies[0])
        if self.options.json:
            print_json(_document(self.options.model, answers))
            return
        heading = f"== {visible(answers.question.strip())}\n\n" if self.options.file else ""
        ending = "\n" if self.options.file else ""
        print(f"{heading}{answers_text(answers)}{ending}", file=self.stdout, flush=True)

    @staticmethod
    def _note_changes(question: str, reply: Rollout) -> None:
        if reply.messages[-1]["content"] != question.strip():
            print(ASKS_ANEW, file=sys.stderr)

    def _print_one(self, document: dict[str, Any]) -> None:
        console.print_json(document, self.stdout)

    def _print_line(self, document: dict[str, Any]) -> None:
        print(json.dumps(document), file=self.stdout, flush=True)

    def _replies(self, question: str, **told: Any) -> list[Rollout]:
        from abacist.proof.ask import ask

        return ask(self.policy, question, self.prompting, **self._sampling(), **told)

    def _sampling(self) -> dict[str, Any]:
        return {
            "temperature": self.options.temperature,
            "num_samples": self.options.num_samples,
            "seed": self.options.seed,
        }


def run(argv: list[str]) -> int:
    """Run the verb; a reply in no good format is shown as it is and is no failure."""
    options = _parser().read(argv)
    if options.file is not None and options.question is not None:
        raise UsageError("a question and a file of questions were given", "Give one of them.")
    questions = None if options.file is None else read_questions(Path(options.file))
    talks = questions is None and options.question is None and sys.stdin.isatty()
    if talks and options.json:
        raise UsageError("--json wants a question", 'abacist ask MODEL "How many …?" --json')
    question = "" if talks or questions is not None else _question(options.question)
    with console.stdout_for(result_only=options.json) as stdout:
        console.say_starting()
        from abacist.learning.tracking import Silent
        from abacist.policy.loading import load_policy, quiet_libraries
        from abacist.proof.ask import Prompting, sampling_temperature

        options.temperature = sampling_temperature(options.temperature, options.num_samples)
        quiet_libraries()
        prompting = Prompting.of(options.model)
        if options.max_completion_length is not None:
            prompting = replace(prompting, max_completion_tokens=options.max_completion_length)
        with _watcher() as watcher:
            watcher.stage(f"Loading {options.model}")
            policy = load_policy(options.model, **loading_options(options))
            asker = _Asker(options, policy, prompting, stdout, watcher)
            if questions is not None:
                watcher.stage("Asking")
                asker.ask_each(questions)
            elif not talks and not asker.streams:
                watcher.stage("Asking")
                asker.ask(question)
        asker.watcher = Silent()  # from here on the terminal is for the replies
        if talks:
            _talk(asker)
        elif questions is None and asker.streams:
            asker.ask(question)
    return 0


def _talk(asker: _Asker) -> None:
    """Ask what is typed, line by line, until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and found again

    print(GREETING, file=sys.stderr)
    while True:
        try:
            question = input(PROMPT)
        except EOFError:
            print(file=sys.stderr)
            return
        if not question.strip():
            continue
        try:
            asker.ask(question)
        except KeyboardInterrupt:
            print("(interrupted)", file=sys.stderr)
        except AbacistError as error:  # a question too long for the model, for example
            console.say_error(error.message, error.hint)


def read_questions(path: Path) -> list[str]:
    """The questions in a file: one a line, or the column ``question`` of JSON Lines or a table.

    Raises DataError, with the line, for a row without one, and for a file without any.
    """
    from abacist.task.sources import READABLE_SUFFIXES, read_file

    if path.suffix.lower() not in READABLE_SUFFIXES:
        try:
            text = path.read_bytes().decode("utf-8", errors="replace").removeprefix("\ufeff")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        questions = [line.strip() for line in text.split("\n") if line.strip()]
    else:
        questions = []
        for row in read_file(path):
            asked = row.fields.get("question")
            if row.defect or not isinstance(asked, str) or not asked.strip():
                why = row.defect or "has no text in 'question'"
                raise DataError(f"{path}, {row.place}: the row {why}.", "Mend or remove it.")
            questions.append(asked)
    if not questions:
        raise DataError(f"{path}: there is no question in it.", "Write one a line.")
    return questions


@contextmanager
def _watcher() -> Iterator[Watcher]:
    """Shows on stderr how far it is, where a person waits there: a real model takes minutes."""
    from abacist.learning.tracking import Silent
    from abacist.view.live import Live

    if not sys.stderr.isatty():
        yield Silent()
        return
    from abacist.view.screen import console_on

    with Live(console_on(stderr=True)) as live:
        yield live


def _document(model: str, answers: Answers) -> dict[str, Any]:
    return {
        "model": model,
        "question": answers.question,
        "answer": answers.answer,
        "agreement": answers.agreement,
        "votes": answers.votes,
        "tied": list(answers.tied) if len(answers.tied) > 1 else [],
        "replies": [_row(one) for one in answers.replies],
    }


def _row(rollout: Rollout) -> dict[str, Any]:
    from abacist.task.reply import parse_reply

    reply = parse_reply(rollout.completion)
    return {
        **asdict(rollout),
        "reasoning": reply.reasoning,
        "strict_format": reply.strict,
        "defects": [defect.sentence for defect in reply.defects],
    }


def _question(given: str | None) -> str:
    if given not in (None, "-"):
        return str(given)
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # stdin was replaced by something that has only text
        return sys.stdin.read(MAX_QUESTION_BYTES)
    return str(stream.read(MAX_QUESTION_BYTES).decode("utf-8", errors="replace"))


def _parser() -> Parser:
    parser = Parser(
        "ask",
        "Puts a question to a model and shows its reasoning and its answer. A run is asked in the "
        "prompt it was trained with. Without a question, on a terminal, it asks what you type, one "
        "question a line, each afresh.",
        'examples:\n  abacist ask tiny "Ada has 3 boxes with 4 pens in each box. How many pens?"\n'
        "  abacist ask runs/tiny-001 --num_samples 8 < question.txt\n"
        "  abacist ask runs/tiny-001 --file questions.jsonl --json > answers.jsonl",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a run, a Hub id, a folder, an adapter, or tiny"
    )
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?", help="read from stdin if absent or -"
    )
    parser.add_argument("--file", metavar="FILE", help="ask every line of it, or every 'question' "
                        "of a .jsonl, .json, .csv or .parquet file")  # fmt: skip
    replies = parser.add_argument_group("replies")
    replies.add_argument("--num_samples", type=positive, default=1, metavar="N",
                         help="how many to each question (1), and what most answer")  # fmt: skip
    replies.add_argument("--temperature", type=not_negative, metavar="T",
                         help="0 is greedy (0 for one reply, 1 for several)")  # fmt: skip
    replies.add_argument("--max_completion_length", type=positive, metavar="N",
                         help="tokens a reply may have (as trained, else 512)")  # fmt: skip
    replies.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of sampling (0)"
    )
    replies.add_argument("--json", action="store_true",
                         help="one JSON object on stdout, one a line with --file; all else on "
                         "stderr")  # fmt: skip
    add_loading_flags(parser)
    return parser
