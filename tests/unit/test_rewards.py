"""The five rewards, how they are found by name, and the guard around a user's own."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import time
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import RewardError
from abacist.task import rewards as rewards_module
from abacist.task.answers import gold_text
from abacist.task.custom_rewards import checked, import_reward
from abacist.task.reply import TAGS, render_reply
from abacist.task.rewards import (
    REWARD_SETS,
    REWARDS,
    BuiltInReward,
    built_in,
    correctness,
    integer,
    load_reward_funcs,
    soft_format,
    strict_format,
    valid_steps,
    xml_count,
)

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"
FIVE = REWARD_SETS["default"]


def scores(text: str, gold: Any = "12") -> tuple[float, ...]:
    """correctness, integer, strict_format, soft_format, xml_count"""
    return tuple(
        func(
            prompts=["p"], completions=[text], completion_ids=[[1]], answer=[gold], question=["q"]
        )[0]
        for func in FIVE
    )


CANONICAL = render_reply("5 + 7 = 12", "12")
MENTION = render_reply("I write it in <answer>3</answer>.", "12")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CANONICAL, (2.0, 0.5, 0.5, 0.5, 0.5)),
        (CANONICAL + "\n", (2.0, 0.5, 0.5, 0.5, 0.5)),
        (render_reply("a\nb\n\nc", "12"), (2.0, 0.5, 0.5, 0.5, 0.5)),
        (render_reply("a", "$12.00"), (2.0, 0.0, 0.5, 0.5, 0.5)),
        (render_reply("a", "13"), (0.0, 0.5, 0.5, 0.5, 0.5)),
        (CANONICAL + "\n\n", (2.0, 0.5, 0.0, 0.5, 0.5)),
        (CANONICAL + "\n" + "x" * 50, (2.0, 0.5, 0.0, 0.0, 0.45)),
        (CANONICAL + "\n" + "x" * 500, (2.0, 0.5, 0.0, 0.0, 0.375)),
        ("Sure. " + CANONICAL, (2.0, 0.5, 0.0, 0.0, 0.5)),
        ("<reasoning>a</reasoning><answer>12</answer>", (2.0, 0.5, 0.0, 0.5, 0.5)),
        ("<reasoning></reasoning><answer></answer>", (0.0, 0.0, 0.0, 0.5, 0.5)),
        ("<answer>12</answer>", (2.0, 0.5, 0.0, 0.0, 0.25)),
        ("<answer>12</answer><reasoning>a</reasoning>", (2.0, 0.5, 0.0, 0.0, 0.25)),
        (CANONICAL * 2, (2.0, 0.5, 0.0, 0.0, 0.0)),
        ("<answer>12</answer><answer>13</answer>", (0.0, 0.0, 0.0, 0.0, 0.0)),
        (MENTION, (2.0, 0.5, 0.0, 0.0, 0.25)),
        (MENTION.replace("12", "13"), (0.0, 0.5, 0.0, 0.0, 0.25)),
        (MENTION.replace("12", "12 apples") + "x" * 200, (2.0, 0.0, 0.0, 0.0, 0.125)),
        ("12", (0.0, 0.0, 0.0, 0.0, 0.0)),
        ("#### 12", (0.0, 0.0, 0.0, 0.0, 0.0)),
        ("<reasoning>", (0.0, 0.0, 0.0, 0.0, 0.125)),
        ("", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_the_five_pay_by_the_table(text: str, expected: tuple[float, ...]) -> None:
    assert scores(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "pays"),
    [
        (CANONICAL, True),
        (render_reply("5 + 7 = 12, and 12 / 4 = 3", "wrong"), True),  # the answer does not matter
        (render_reply("5 + 7 = 12, and 12 / 4 = 4", "12"), False),
        (render_reply("It is twelve.", "12"), False),
        (render_reply("-", "5 + 7 = 12"), False),  # no reasoning
        ("5 + 7 = 12", False),
        ("<reasoning>5 + 7 = 12", False),  # cut off: no block
    ],
)
def test_valid_steps_pays_for_work_that_is_shown_and_true_throughout(text: str, pays: bool) -> None:
    assert valid_steps(None, [text]) == [0.5 * pays]
    assert load_reward_funcs(["default", "valid_steps"]) == [*FIVE, valid_steps]


@pytest.mark.parametrize(
    "gold", ["12", "12.0", "$12", 12, 12.0, "So 5 + 7 = <<5+7=12>>12.\n#### 12"]
)
def test_the_gold_may_be_a_number_a_text_or_a_whole_solution(gold: Any) -> None:
    assert scores(CANONICAL, gold)[0] == 2.0


def test_a_gold_of_none_is_not_applicable() -> None:
    assert correctness(None, [CANONICAL, CANONICAL], answer=[None, "12"]) == [None, 2.0]
    assert correctness(None, [CANONICAL], answer=["nan"]) == [0.0]


def test_completions_may_be_texts_messages_parts_or_empty() -> None:
    forms = [
        CANONICAL,
        [{"role": "assistant", "content": CANONICAL}],
        [{"role": "assistant", "content": [{"type": "text", "text": CANONICAL}]}],
        [{"role": "assistant", "content": None}],
        [],
        None,
    ]
    for func in FIVE:
        paid = func(prompts=[[]] * 6, completions=forms, answer=["12"] * 6)
        assert paid[0] == paid[1] == paid[2] > 0
        assert paid[3:] == [0.0, 0.0, 0.0]
        assert func(prompts=[], completions=[], answer=[]) == []


def test_a_missing_or_misfit_gold_column_is_an_error_that_says_so() -> None:
    with pytest.raises(RewardError, match="no column `answer`"):
        correctness(["p"], [CANONICAL])
    with pytest.raises(RewardError, match="2 golds for 1"):
        correctness(["p"], [CANONICAL], answer=["12", "13"])


def test_every_reward_can_be_pickled_and_has_its_name() -> None:
    assert [func.__name__ for func in FIVE] == [
        "correctness",
        "integer",
        "strict_format",
        "soft_format",
        "xml_count",
    ]
    assert all(pickle.loads(pickle.dumps(func)) is func for func in FIVE)


PIECES = [
    *TAGS,
    *TAGS,
    "\n",
    "\n",
    " ",
    "12",
    "12",
    "13",
    "12 apples",
    "$12",
    "12.0",
    "work",
    "x" * 70,
]
PIECES += [
    "\n</reasoning>\n<answer>\n",
    "<reasoning>\nwork",
    "\n</answer>",
    "12</answer>",
    "<reasoning>as <answer>13</answer>",
    "<answer>12 apples</answer>",
    "12 (3 boxes of 4)",
    "12 (13)",
    "<b>12</b>",
    CANONICAL,
]
reply_like = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)
wrapped = st.builds(
    "{}<answer>{}</answer>{}".format, reply_like, st.sampled_from(PIECES), reply_like
)
right_or_wrong = st.sampled_from(
    [CANONICAL, MENTION, render_reply("work", "13"), CANONICAL + "x" * 200]
)
any_reply = st.one_of(reply_like, wrapped, right_or_wrong, st.text())


@settings(max_examples=1_500)
@given(any_reply)
def test_no_wrong_reply_outscores_a_correct_one(text: str) -> None:
    correct, *shaping = scores(text)
    assert correct in (0.0, 2.0)
    # 2.0 lies between them, so that any wrong reply earns less than any correct one.
    assert sum(shaping) > 0.0 if correct else sum(shaping) <= 2.0
    assert all(0.0 <= reward <= 0.5 for reward in shaping)
    assert shaping[1] <= shaping[2]  # strict implies soft


@given(st.lists(any_reply, max_size=5))
def test_a_batch_is_paid_as_its_members_are(texts: list[str]) -> None:
    for func in FIVE:
        batch = func(prompts=texts, completions=texts, answer=["12"] * len(texts))
        alone = [func(prompts=[t], completions=[t], answer=["12"])[0] for t in texts]
        assert batch == alone


HOSTILE = ["<answer>", "<answer></answer>", "<answer>1</answer>", "</reasoning><answer>", "<", "9"]
HOSTILE += ["1,", "=", "1+", "(", "\\boxed{", " ", "\n", "\u200b", "\ud800", "½", "\x00"]


@pytest.mark.parametrize("unit", HOSTILE)
def test_no_reward_takes_more_than_50_ms_on_100_kb(unit: str) -> None:
    body = (unit * 100_000)[:100_000]
    for text in (body, f"<answer>{body[:990]}</answer>", f"<answer>{body}</answer>"):
        for func in FIVE:
            best = math.inf
            for _ in range(5):
                start = time.process_time()
                func(prompts=["p"], completions=[text], answer=["12"])
                best = min(best, time.process_time() - start)
                if best < 0.05:
                    break
            assert best < 0.05, func.__name__


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not in ../shared/gsm8k")
def test_every_gsm8k_gold_in_the_canonical_layout_earns_full_marks() -> None:
    solutions = []
    for name in ("train.jsonl", "test.jsonl"):
        with open(GSM8K / name, encoding="utf-8", newline="\n") as lines:
            solutions += [json.loads(line)["answer"] for line in lines]
    replies = [render_reply(s.rpartition("####")[0], gold_text(s)) for s in solutions]
    totals = [
        sum(rewards)
        for rewards in zip(
            *(func(prompts=None, completions=replies, answer=solutions) for func in FIVE),
            strict=True,
        )
    ]
    assert len(totals) == 8_792 and set(totals) == {4.0}


# --- by name -------------------------------------------------------------------------------------


def test_names_aliases_and_sets_resolve_in_order() -> None:
    assert load_reward_funcs(["default"]) == list(FIVE)
    assert load_reward_funcs(["xml_count", "integer"]) == [xml_count, integer]
    assert load_reward_funcs(
        ["correctness_reward_func", "int_reward_func", "strict_format_reward_func"]
    ) == [correctness, integer, strict_format]
    assert load_reward_funcs(["soft_format_reward_func", "xmlcount_reward_func"]) == [
        soft_format,
        xml_count,
    ]
    assert load_reward_funcs(["gist"]) == list(REWARD_SETS["gist"])
    historic = load_reward_funcs(["gist.int_reward_func", "integer"])
    assert historic[0] is REWARD_SETS["gist"][3] and historic[1] is integer
    assert load_reward_funcs([]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corectness", "Did you mean 'correctness'"),
        ("gists", "Did you mean 'gist'"),
        ("gist.nothing_like_it", "There is no reward"),
        ("zzz", "There is no reward 'zzz'"),
        ("", "There is no reward ''"),
        ("no.such.module", "cannot be imported: ModuleNotFoundError"),
        ("math.sqroot", "Did you mean 'sqrt'"),
        ("math.pi", "is a float, not a function"),
        ("decimal.Decimal", "is a class, not a function"),
        ("math.sqrt", "cannot be called as TRL calls it"),
        ("nowhere/to/be/found.py:f", "There is no reward file"),
        ("rewards.py", "does not name a reward function"),
        ("a:", "does not name a reward function"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(RewardError, match="(?s)" + message.replace("(", r"\(")) as raised:
        load_reward_funcs([name])
    assert raised.value.hint


def test_a_reward_named_twice_is_refused() -> None:
    with pytest.raises(RewardError, match="called 'integer'"):
        load_reward_funcs(["default", "int_reward_func"])


def test_a_users_function_is_found_in_a_file_and_in_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "def longest(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    file = tmp_path / "my_rewards_for_this_test.py"
    file.write_text(
        source + "def one_line(prompts, completions): return []\nboom = 1\n", encoding="utf-8"
    )
    (from_file,) = load_reward_funcs([f"{file}:longest"])
    assert from_file.__name__ == "longest"
    assert from_file(prompts=["p"], completions=["abc"], trainer_state=None) == [3.0]
    assert pickle.loads(pickle.dumps(from_file))(["p"], ["ab"]) == [2.0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward_funcs(["my_rewards_for_this_test.longest"])[0](["p"], ["a"]) == [1.0]
    with pytest.raises(RewardError, match="by keywords"):
        import_reward("my_rewards_for_this_test:one_line")
    with pytest.raises(RewardError, match="Did you mean 'longest'"):
        import_reward("my_rewards_for_this_test.longst")


def test_a_file_that_fails_on_import_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def f(:\n", encoding="utf-8")
    with pytest.raises(RewardError, match=r"broken.py:f' cannot be imported: SyntaxError"):
        import_reward(f"{file}:f")


# --- the guard -----------------------------------------------------------------------------------


def given_back(rewards: Any, prompts: Any, completions: Any, **columns: Any) -> Any:
    return rewards


def raises_on_bad(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [1.0 / ("bad" not in text) for text in completions]


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 2.0],
        (True, None),
        [Fraction(1, 2), Decimal("0.5")],
        [None, None],
    ],
)
def test_numbers_and_nones_pass_the_guard_as_floats(rewards: Any) -> None:
    expected = [None if reward is None else float(reward) for reward in rewards]
    assert checked(partial(given_back, rewards))(["p", "p"], ["a", "b"]) == expected


@pytest.mark.parametrize(
    "wrong",
    [math.nan, math.inf, -math.inf, 1e30, "1", b"1", [1.0], 1j, object(), 10**400],
)
def test_a_reward_that_is_no_usable_number_is_named_with_its_sample(wrong: Any) -> None:
    guarded = checked(partial(given_back, [0.0, wrong]))
    with pytest.raises(RewardError, match=r"'given_back' returned .* for sample 1, 'second'"):
        guarded(prompts=["p", "p"], completions=["first", "second"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        ([], "returned 0 rewards for 2 completions"),
        (None, "returned a NoneType"),
        (1.0, "returned a float"),
        ("12", "returned a str"),
        ({0: 1.0, 1: 1.0}, "returned a dict"),
    ],
)
def test_a_result_that_is_no_list_of_the_right_length_is_named(wrong: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked(partial(given_back, wrong))(prompts=["p", "p"], completions=["a", "b"])


def test_a_reward_that_raises_is_named_with_the_sample_it_raises_on() -> None:
    guarded = checked(raises_on_bad)
    assert guarded(["p"], ["good"]) == [1.0]
    with pytest.raises(RewardError, match="ZeroDivisionError on sample 2, 'a bad one'") as raised:
        guarded(prompts=["p"] * 3, completions=["good", "good", "a bad one"], answer=["1"] * 3)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_the_guard_keeps_the_name_pickles_and_is_put_on_once() -> None:
    guarded = checked(raises_on_bad)
    assert guarded.__name__ == "raises_on_bad"
    assert checked(guarded) is guarded
    assert pickle.loads(pickle.dumps(guarded))(["p"], ["good"]) == [1.0]


def test_our_own_error_passes_the_guard_unchanged() -> None:
    with pytest.raises(RewardError, match="no column `answer`"):
        checked(correctness)(["p"], ["a"])


async def awaited(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [1.0 / len(text) for text in completions]


def test_a_coroutine_reward_stays_awaitable_and_guarded() -> None:
    guarded = checked(awaited)
    assert asyncio.iscoroutinefunction(guarded.__call__)
    assert asyncio.run(guarded(prompts=["p"], completions=["ab"])) == [0.5]
    with pytest.raises(RewardError, match="'awaited' raised ZeroDivisionError"):
        asyncio.run(guarded(prompts=["p"], completions=[""]))


def test_what_is_known_of_a_built_in_reward_is_one_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from abacist.learning.health.history import Facts
    from abacist.learning.health.rules import Watch
    from abacist.learning.rewards import control_rewards
    from abacist.task import rewards
    from abacist.task.audit.trial import Trial
    from abacist.view.step import out_of

    def brief(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.25] * len(completions)

    assert control_rewards("format", [brief, xml_count], None, seed=0)[0] == [xml_count]
    row = rewards.BuiltInReward(brief, None, 0.25, is_form_only=True)
    monkeypatch.setattr(rewards, "REWARDS", (*rewards.REWARDS, row))
    # Read by name, by the placebo, by the live view, and by the health rules.
    assert load_reward_funcs(["brief"]) == [brief]
    with pytest.raises(RewardError, match="Did you mean 'brief'"):
        load_reward_funcs(["breif"])
    assert control_rewards("format", [brief, correctness], None, seed=0)[0] == [brief]
    assert out_of("brief", 0.1) == "0.10/0.25"
    # By the audit: a built-in reward needs no watchdog.
    assert rewards.is_built_in(brief) and not rewards.is_built_in(lambda **given: [])
    assert Trial(brief, 0.0).is_usable
    watch = Watch(Facts(learning_rate=1e-4, problems_per_step=8, max_steps=60))
    for step in range(1, 61):
        paid = {"rewards/brief/mean": step / 240, "rewards/brief/std": 0.01}
        flat = {"rewards/correctness/mean": 0.2, "rewards/correctness/std": 0.5}
        watch.see({"step": step, "loss": 0.1, "reward": 1.0, **paid, **flat})
    assert "brief" in watch.found["format only"].evidence


def test_names_and_aliases_are_each_of_one_built_in_reward() -> None:
    names = [name for reward in REWARDS for name in reward.names]
    assert len(set(names)) == len(names)
    assert {func.__name__ for func in REWARD_SETS["gist"]} <= set(names)
    for reward in REWARDS:
        assert built_in(reward.name) is reward and getattr(rewards_module, reward.name)
        paid = [each for text in (CANONICAL, MENTION, "") for each in _paid(reward, text)]
        assert max(paid) == reward.maximum and min(paid) >= 0
        wrong = CANONICAL.replace("\n12\n", "\n13\n")
        if reward.is_form_only:
            assert _paid(reward, CANONICAL) == _paid(reward, wrong)


def _paid(reward: BuiltInReward, text: str) -> list[float]:
    return [value for value in reward.func(["p"], [text], answer=["12"]) if value is not None]
