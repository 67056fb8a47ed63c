"""``abacist ask MODEL "question"``: what does it answer, and how does it get there?"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from abacist.cli import console
from abacist.cli.flags import Parser, add_loading_flags, loading_options, not_negative, positive
from abacist.errors import UsageError

if TYPE_CHECKING:
    from abacist.learning.tracking import Watcher
    from abacist.records.rollout import Rollout

MAX_QUESTION_BYTES = 1_000_000
WIDTH = 96


def run(argv: list[str]) -> int:
    """Run the verb; a reply in no good format is shown as it is and is no failure."""
    options = _parser().read(argv)
    temperature = _temperature(options)
    question = _question(options.question)
    with console.stdout_for(result_only=options.json) as stdout:
        console.say_starting()
        from abacist.learning.tracking import told_of
        from abacist.policy.loading import load_policy, quiet_libraries
        from abacist.proof.ask import Prompting, ask

        quiet_libraries()
        prompting = Prompting.of(options.model)
        if options.max_completion_length is not None:
            prompting = replace(prompting, max_completion_tokens=options.max_completion_length)
        with _watcher() as watcher:
            watcher.stage(f"Loading {options.model}")
            policy = load_policy(options.model, **loading_options(options))
            watcher.stage("Asking")
            rollouts = ask(
                policy,
                question,
                prompting,
                temperature=temperature,
                num_samples=options.num_samples,
                seed=options.seed,
                progress=told_of(watcher, "reply"),
            )
        if rollouts[0].messages[-1]["content"] != question.strip():
            print(
                "note: parts of the question would have been control tokens to this model, or "
                "no text at all; they were broken up.",
                file=sys.stderr,
            )
        if options.json:
            document = {"model": options.model, "question": question}
            console.print_json({**document, "replies": [_row(one) for one in rollouts]}, stdout)
        else:
            print(render(rollouts), file=stdout)
    return 0


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


def render(rollouts: Sequence[Rollout]) -> str:
    """The replies for a person: reasoning, answer, and what is wrong with the format, if anything.

    Control characters of the model are shown as escapes.
    """
    blocks = [_render_one(rollout) for rollout in rollouts]
    if len(blocks) == 1:
        return blocks[0]
    from abacist.view.plaintext import visible

    numbered = [f"-- reply {number}\n{block}" for number, block in enumerate(blocks, start=1)]
    counts = Counter(rollout.read_answer for rollout in rollouts).most_common()
    tally = ", ".join(
        f"{'no answer' if answer is None else visible(answer)} ({count} of {len(rollouts)})"
        for answer, count in counts
    )
    return "\n\n".join([*numbered, f"answers: {tally}"])


def _render_one(rollout: Rollout) -> str:
    from abacist.task.reply import parse_reply
    from abacist.view.plaintext import fold, visible

    reply = parse_reply(rollout.completion)
    shown = reply.reasoning if reply.soft and reply.reasoning is not None else reply.text
    lines = [f"  {line}".rstrip() for line in fold(visible(shown.strip("\n")), WIDTH - 2)]
    if reply.soft and reply.answer is not None:
        lines += ["", f"answer: {visible(reply.answer)}"]
    else:
        answer = "none could be read" if reply.answer is None else visible(reply.answer)
        lines += [
            "",
            f"answer: {answer}",
            "The reply is shown as it was written; its format is off:",
        ]
    if not reply.strict:
        lines += [f"  - {visible(defect.sentence)}" for defect in reply.defects]
    lines.append(f"({rollout.completion_tokens} tokens. {rollout.stop_reason.sentence})")
    return "\n".join(lines)


def _row(rollout: Rollout) -> dict[str, Any]:
    from abacist.task.reply import parse_reply

    reply = parse_reply(rollout.completion)
    return {
        **asdict(rollout),
        "reasoning": reply.reasoning,
        "strict_format": reply.strict,
        "defects": [defect.sentence for defect in reply.defects],
    }


def _temperature(options: Namespace) -> float:
    """Greedy for one reply; several greedy replies would all be the same."""
    if options.temperature is None:
        return 0.0 if options.num_samples == 1 else 1.0
    if options.temperature == 0 and options.num_samples > 1:
        raise UsageError(
            "several replies at --temperature 0 would all be the same",
            "Leave --temperature out, or ask for one reply.",
        )
    return float(options.temperature)


def _question(given: str | None) -> str:
    if given not in (None, "-"):
        return str(given)
    if given is None and sys.stdin.isatty():
        print("Your question, then Ctrl-D:", file=sys.stderr)
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # stdin was replaced by something that has only text
        return sys.stdin.read(MAX_QUESTION_BYTES)
    return str(stream.read(MAX_QUESTION_BYTES).decode("utf-8", errors="replace"))


def _parser() -> Parser:
    parser = Parser(
        "ask",
        "Puts a question to a model and shows its reasoning and its answer. A run is asked in the "
        "prompt it was trained with.",
        'examples:\n  abacist ask tiny "Ada has 3 boxes with 4 pens in each box. How many pens?"\n'
        "  abacist ask runs/tiny-001 < question.txt",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a run, a Hub id, a folder, an adapter, or tiny"
    )
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?", help="read from stdin if absent or -"
    )
    replies = parser.add_argument_group("replies")
    replies.add_argument("--num_samples", type=positive, default=1, metavar="N",
                         help="how many (1)")  # fmt: skip
    replies.add_argument("--temperature", type=not_negative, metavar="T",
                         help="0 is greedy (0 for one reply, 1 for several)")  # fmt: skip
    replies.add_argument("--max_completion_length", type=positive, metavar="N",
                         help="tokens a reply may have (as trained, else 512)")  # fmt: skip
    replies.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    replies.add_argument("--json", action="store_true",
                         help="one JSON object on stdout, all else on stderr")  # fmt: skip
    add_loading_flags(parser)
    return parser
