"""The five rewards, and one more by name: pure functions of one reply, as TRL calls them.

- ``correctness`` 2.0: the answer equals the gold (column ``answer``), by the rule of ``answers``;
- ``integer`` 0.5: the answer is a bare integer numeral;
- ``strict_format`` 0.5: exactly the canonical layout;
- ``soft_format`` 0.5: a reasoning block, then an answer block, only white space around and between;
- ``xml_count`` 0 to 0.5: 0.125 for each of the four tags that stands once and in order, less 0.001
  (0.125 at most) for each character after the last closing tag;
- ``valid_steps`` 0.5, not in the default set: the reasoning shows work, and every step is true.

Of the five, no wrong reply outscores a correct one: 2.0 is the most that a wrong one can earn, and
a correct one earns more, because ``parse_reply`` sees an answer only between answer tags that stand
once, behind a reasoning block whose tags do (``xml_count`` pays for either), or in a bare integer
(``integer`` pays for it).

Each is called as TRL calls it, ``f(prompts=..., completions=..., **columns)``, with completions
that are texts or lists of messages, can be pickled, and never raises over what a model wrote.
``load_reward_funcs`` finds these, the historic ``gist`` set, and a user's own by name.

To add a built-in reward: write the function, add its row to :data:`REWARDS`, and, if it is to be
paid by default, its name to :data:`REWARD_SETS`. Nothing else lists rewards by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from abacist.errors import RewardError, UsageError
from abacist.task import gist, steps
from abacist.task.answers import gold_of, is_integer_numeral, same_answer
from abacist.task.custom_rewards import (
    DEFAULT_TIMEOUT_SECONDS,
    RewardFunc,
    call_reward,
    checked,
    function_name,
    import_reward,
    refuse_lost,
    stands_in_no_file,
)
from abacist.task.reply import (
    ANSWER_CLOSE,
    REASONING_CLOSE,
    TAGS,
    Reply,
    completion_text,
    parse_reply,
)

# The five functions ask for the reply of the same completion one after the other. Long texts are
# not kept, so that the cache holds some tens of megabytes at the worst.
_MAX_CACHED_CHARS = 8_192
_parse_and_keep = lru_cache(maxsize=2_048)(parse_reply)


def _replies(completions: Sequence[Any]) -> list[Reply]:
    texts = map(completion_text, completions)
    return [
        _parse_and_keep(text) if len(text) <= _MAX_CACHED_CHARS else parse_reply(text)
        for text in texts
    ]


def correctness(
    prompts: Any, completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    """2.0 where the answer equals the gold; None (not applicable) where the gold is None.

    ``answer`` is the column of golds: numbers as text, or whole GSM8K solutions ending ``#### n``.
    Raises RewardError if the column is missing or of another length than ``completions``.
    """
    if answer is None:
        raise RewardError(
            "The reward 'correctness' needs the gold answers, and there is no column `answer`.",
            "Name the gold column of the data set `answer`, or leave this reward out.",
        )
    if isinstance(answer, str) or not isinstance(answer, Sized):
        raise RewardError(
            f"The reward 'correctness' got a {type(answer).__name__} as the column of golds.",
            "The column `answer` must hold one gold for each completion: a list.",
        )
    if len(answer) != len(completions):
        raise RewardError(
            f"The reward 'correctness' got {len(answer)} golds for {len(completions)} completions.",
            "The column `answer` must hold one gold for each completion.",
        )
    return [
        None if gold is None else 2.0 if same_answer(reply.answer, gold) else 0.0
        for reply, gold in zip(_replies(completions), map(gold_of, answer), strict=True)
    ]


def integer(prompts: Any, completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 where the answer is a bare integer numeral: a sign and correct grouping are allowed."""
    return [
        0.5 if reply.answer is not None and is_integer_numeral(reply.answer) else 0.0
        for reply in _replies(completions)
    ]


def strict_format(prompts: Any, completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 where the reply is laid out exactly as ``render_reply`` does it."""
    return [0.5 if reply.strict else 0.0 for reply in _replies(completions)]


def soft_format(prompts: Any, completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 for one reasoning block and then one answer block, whatever the white space."""
    return [0.5 if reply.soft else 0.0 for reply in _replies(completions)]


def xml_count(prompts: Any, completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.125 for each tag in place, less up to 0.125 for text after the last closing tag."""
    return [_count_tags(completion_text(completion)) for completion in completions]


def _count_tags(text: str) -> float:
    starts = [text.find(tag) for tag in TAGS if text.count(tag) == 1]
    in_order: list[int] = []  # how many tags stand in order up to and with this one
    for number, start in enumerate(starts):
        before = (in_order[earlier] for earlier in range(number) if starts[earlier] < start)
        in_order.append(1 + max(before, default=0))
    ends = [text.rfind(tag) + len(tag) for tag in (REASONING_CLOSE, ANSWER_CLOSE) if tag in text]
    surplus = len(text[max(ends) :].strip()) if ends else 0
    return max(0.0, 0.125 * max(in_order, default=0) - min(0.125, 0.001 * surplus))


def valid_steps(prompts: Any, completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 where the reasoning shows at least one equation, and each one it shows is true.

    It needs no gold. Where right answers are rare it tells replies apart that ``correctness`` pays
    alike: of a group of wrong ones, some often have true steps (docs/rewards.md). Alone it can be
    earned by "1 + 1 = 2".
    """
    return [0.5 if steps.valid_steps(reply.reasoning) else 0.0 for reply in _replies(completions)]


# The gist's names for the five, for scripts that import them by these names.
correctness_reward_func = correctness
int_reward_func = integer
strict_format_reward_func = strict_format
soft_format_reward_func = soft_format
xmlcount_reward_func = xml_count


@dataclass(frozen=True, slots=True)
class BuiltInReward:
    """One row of :data:`REWARDS`.

    ``alias`` is the gist's name for it, which both this function and the historic one answer to.
    ``maximum`` is the most that it pays for one completion. ``is_form_only`` says that it
    looks at the layout only, and not at what the answer is.
    """

    func: RewardFunc
    alias: str | None
    maximum: float
    is_form_only: bool

    @property
    def name(self) -> str:
        """The name of the function, which logs and rollouts carry."""
        return self.func.__name__

    @property
    def names(self) -> tuple[str, ...]:
        """The name, and the alias where there is one."""
        return (self.name,) if self.alias is None else (self.name, self.alias)


#: Every built-in reward. What is known of one is read from here: what the live view draws, what
#: ``--control format`` keeps, what the health rules and the audit take it for.
REWARDS: tuple[BuiltInReward, ...] = (
    BuiltInReward(correctness, "correctness_reward_func", 2.0, is_form_only=False),
    BuiltInReward(integer, "int_reward_func", 0.5, is_form_only=False),
    BuiltInReward(strict_format, "strict_format_reward_func", 0.5, is_form_only=True),
    BuiltInReward(soft_format, "soft_format_reward_func", 0.5, is_form_only=True),
    BuiltInReward(xml_count, "xmlcount_reward_func", 0.5, is_form_only=True),
    BuiltInReward(valid_steps, None, 0.5, is_form_only=False),
)

REWARD_SETS: dict[str, tuple[RewardFunc, ...]] = {
    "default": (correctness, integer, strict_format, soft_format, xml_count),
    "gist": (
        gist.xmlcount_reward_func,
        gist.soft_format_reward_func,
        gist.strict_format_reward_func,
        gist.int_reward_func,
        gist.correctness_reward_func,
    ),
}
_GIST = "gist."
HISTORIC = {f"{_GIST}{func.__name__}": func for func in REWARD_SETS["gist"]}
"""The gist's own functions by the names that choose them alone."""


def built_in(name: str) -> BuiltInReward | None:
    """The row of :data:`REWARDS` with this name or alias; None for a user's own reward.

    >>> built_in("xmlcount_reward_func").maximum, built_in("my_reward")
    (0.5, None)
    """
    return next((reward for reward in REWARDS if name in reward.names), None)


def is_built_in(func: Any) -> bool:
    """Whether this very function is one of :data:`REWARDS` or of the sets."""
    known = (tuple(reward.func for reward in REWARDS), *REWARD_SETS.values())
    return any(func is one for funcs in known for one in funcs)


def pay(
    rewards: Sequence[RewardFunc],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Iterator[tuple[str, list[float | None] | Exception]]:
    """What each reward pays for each completion, by name; called as TRL calls it.

    ``columns`` holds lists of as many values as there are completions. A reward that raises, or
    returns another number of values, yields the error in place of its list.
    """
    for reward in rewards:
        try:
            values = call_reward(reward, prompts, completions, completion_ids, columns)
            if len(values) != len(completions):
                raise RewardError(f"The reward '{reward.__name__}' returned {len(values)} values.")
            yield reward.__name__, values
        except Exception as error:  # whatever a user's function does
            yield reward.__name__, error


def load_reward_funcs(
    names: Sequence[str],
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    given: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> list[Callable[..., Any]]:
    """The reward functions with these names, in their order.

    A name is one of :data:`REWARDS`, a gist alias of one ("int_reward_func"), a historic one
    ("gist.int_reward_func"), a set ("default", "gist"), or a user's own, as ``module.function`` or
    ``path/to/file.py:function``; a user's own comes :func:`checked`, and with a time limit a batch.
    ``given`` holds functions that are there already, by name.

    Raises RewardError for a name that is unknown or given twice, and for a function that cannot be
    imported or called.

    >>> [func.__name__ for func in load_reward_funcs(["integer", "correctness_reward_func"])]
    ['integer', 'correctness']
    """
    if isinstance(names, str):
        names = [names]
    funcs = [func for name in names for func in _resolve(name, timeout_seconds, given)]
    seen: set[str] = set()
    for func in funcs:
        if func.__name__ in seen:
            raise RewardError(
                f"Two of the rewards {', '.join(names)} are called '{func.__name__}'.",
                "Name each reward once; to make it count more, use --reward_weights. Two functions "
                "of one name are told apart once one has another __name__.",
            )
        seen.add(func.__name__)
    return funcs


MOST_WEIGHT = 1e6  # of --reward_weights, of either sign


def refuse_unusable_weights(
    weights: Sequence[float], named: str = "--reward_weights", *, may_be_zero: bool = False
) -> None:
    """Raise UsageError for factors of rewards that overflow, or under which nothing is paid."""
    for weight in weights:
        if not abs(weight) <= MOST_WEIGHT:
            raise UsageError(
                f"{named} {weight} is not finite, or beyond {MOST_WEIGHT:g}",
                "Give smaller numbers: only their ratio counts.",
            )
    if weights and not any(weights) and not may_be_zero:
        raise UsageError(f"{named} are all 0: nothing is paid", "Give one above 0.")


def built_in_funcs(name: str) -> tuple[RewardFunc, ...]:
    """The functions of ours that a name means; none where it means none of ours."""
    if name in REWARD_SETS:
        return REWARD_SETS[name]
    row = built_in(name)
    func = HISTORIC.get(name) if row is None else row.func
    return () if func is None else (func,)


def is_built_in_name(name: str) -> bool:
    """Whether a name means a reward or a set of ours, whatever stands in the working directory.

    >>> [is_built_in_name(name) for name in ("default", "gist.int_reward_func", "mine.brief")]
    [True, True, False]
    """
    return bool(built_in_funcs(name))


def _resolve(
    name: str, timeout_seconds: float, given: Mapping[str, Callable[..., Any]]
) -> Sequence[Any]:
    if name in given:
        func = checked(given[name], timeout_seconds)
        if stands_in_no_file(name):  # several lambdas are told apart by their names
            func.__name__ = function_name(name)
        return (func,)
    refuse_lost(name)
    if ours := built_in_funcs(name):
        return ours
    if ("." in name and not name.startswith(_GIST)) or ":" in name:
        return (checked(import_reward(name), timeout_seconds),)
    known = [*(each for reward in REWARDS for each in reward.names), *HISTORIC, *REWARD_SETS]
    close = get_close_matches(name, known, n=1)
    raise RewardError(
        f"There is no reward '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""),
        f"Rewards: {', '.join(reward.name for reward in REWARDS)}; "
        f"sets: {', '.join(REWARD_SETS)}; "
        "your own: module.function or path/to/file.py:function.",
    )
