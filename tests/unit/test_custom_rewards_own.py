"""A reward of the user's own cannot change what others see, nor end the program."""

from __future__ import annotations

import asyncio
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abacist.errors import RewardError
from abacist.task.custom_rewards import call_reward, checked, import_reward

COMPLETIONS = [[{"role": "assistant", "content": "a\nb"}], [{"role": "assistant", "content": "c"}]]


def tidies(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    for completion in completions:
        completion[0]["content"] = "tidy"
    prompts.clear()
    answer[0] = "another"
    return [0.0] * len(completions)


async def tidies_later(**columns: Any) -> list[float]:
    return tidies(**columns)


def empties(completions: list[Any], **_: Any) -> list[float]:
    completions.clear()
    return []


@pytest.mark.parametrize("func", [tidies, tidies_later])
def test_what_a_reward_does_to_its_arguments_stays_with_it(func: Any) -> None:
    prompts, answer = ["p", "q"], ["1", "2"]
    completions = [[dict(message) for message in one] for one in COMPLETIONS]
    paid = checked(func)(prompts=prompts, completions=completions, answer=answer)
    assert (asyncio.run(paid) if asyncio.iscoroutine(paid) else paid) == [0.0, 0.0]
    assert completions == COMPLETIONS and prompts == ["p", "q"] and answer == ["1", "2"]


def spoils_what_lies_deeper(
    completions: list[Any], completion_ids: list[list[int]], source: list[dict[str, str]], **_: Any
) -> list[float]:
    completions[0][0]["content"][0]["text"] = "other"
    completion_ids[0].append(7)
    source[0]["name"] = "other"
    return [0.0]


def test_parts_of_messages_token_ids_and_columns_of_objects_stay_too() -> None:
    given = {
        "prompts": ["p"],
        "completions": [[{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]],
        "completion_ids": [[1, 2]],
        "source": [{"name": "gsm8k"}],
    }
    before = copy.deepcopy(given)
    assert checked(spoils_what_lies_deeper)(**given) == [0.0]
    assert given == before


def test_a_reward_that_empties_its_list_is_told_how_many_rewards_were_due() -> None:
    with pytest.raises(RewardError, match="0 rewards for 2 completions"):
        checked(empties)(prompts=["p", "q"], completions=COMPLETIONS)


@pytest.mark.parametrize("code", ["0", "3", "'bye'"])
def test_a_file_that_ends_the_program_when_it_is_imported_is_an_error(
    code: str, tmp_path: Path
) -> None:
    file = tmp_path / "script.py"
    file.write_text(f"import sys\nsys.exit({code})\n", encoding="utf-8")
    with pytest.raises(RewardError, match="ends the program") as found:
        import_reward(f"{file}:pays")
    assert "__main__" in found.value.hint


def test_a_file_of_a_package_is_told_by_which_name_it_can_be_imported(tmp_path: Path) -> None:
    package = tmp_path / "own_rewards_x"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base.py").write_text("PAY = 1.0\n", encoding="utf-8")
    file = package / "short.py"
    code = "from .base import PAY\n\ndef brief(completions, **_):\n    return [PAY]\n"
    file.write_text(code, encoding="utf-8")
    with pytest.raises(RewardError, match="relative import") as found:
        import_reward(f"{file}:brief")
    named = found.value.hint.rpartition("example ")[2].rstrip(".")
    assert import_reward(named)(completions=["x"]) == [1.0]


@pytest.mark.parametrize("named", ["{0}/edited_rewards.py:pays", "{0}/edited_rewards.pays",
                                   "edited_rewards.pays"])  # fmt: skip
def test_a_file_that_was_edited_in_between_is_read_again_and_one_that_was_not_is_not(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, name = tmp_path / "edited_rewards.py", named.format(tmp_path)
    code = "def pays(completions, **_):\n    return [{}] * len(completions)\n"
    file.write_text(code.format("1.0"), encoding="utf-8")
    first = import_reward(name)
    assert first(["x"]) == [1.0]
    assert import_reward(name) is first
    file.write_text(code.format("2.0"), encoding="utf-8")  # of the same second and size
    edited = import_reward(name)
    assert edited(["x"]) == [2.0] and edited is import_reward(name)
    for broken in ("def pays(:\n", code.format("3.0") + "raise ValueError\n"):
        file.write_text(broken, encoding="utf-8")
        for _ in range(2):  # not the old one at the second try
            with pytest.raises(RewardError, match=r"SyntaxError|ValueError"):
                import_reward(name)
        file.write_text(code.format("2.0"), encoding="utf-8")
        assert import_reward(name)(["x"]) == [2.0], "not what the broken one left behind"


def test_two_files_whose_names_differ_in_a_sign_do_not_take_each_others_place(
    tmp_path: Path,
) -> None:
    names = []
    for pay, stem in enumerate(("a-b", "a_b")):
        file = tmp_path / f"{stem}.py"
        file.write_text(f"def pays(completions, **_):\n    return [{pay}.0]\n", encoding="utf-8")
        names.append(f"{file}:pays")
    assert [import_reward(name)(["x"]) for name in names * 2] == [[0.0], [1.0]] * 2


class Unsized:
    """What an array of no dimension is: it has a length and cannot tell it."""

    def __iter__(self) -> Iterator[float]:
        raise TypeError("iteration over a 0-d array")

    def __len__(self) -> int:
        raise TypeError("len() of unsized object")


@pytest.mark.parametrize(
    "returned", [Unsized(), {0.5, 1.0}, frozenset([0.0, 1.0]), iter([0.0, 1.0]), 0.5, "ab", None]
)
def test_what_is_no_list_in_the_order_of_the_completions_is_refused_by_name(returned: Any) -> None:
    def odd(completions: list[Any], **_: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match=rf"'odd' returned a {type(returned).__name__}\."):
        checked(odd)(prompts=["p", "q"], completions=COMPLETIONS)


def test_an_asynchronous_reward_is_awaited_where_a_loop_runs_already_as_in_a_notebook() -> None:
    async def cell() -> list[float | None]:
        return call_reward(tidies_later, ["p", "q"], COMPLETIONS, [[1], [2]], {"answer": ["1"]})

    assert asyncio.run(cell()) == [0.0, 0.0]
    assert asyncio.run(cell()) == asyncio.run(cell())


def leaves(**columns: Any) -> list[float]:
    sys.exit(0)


def gives_up(**columns: Any) -> list[float]:
    raise asyncio.CancelledError


@pytest.mark.parametrize("func", [leaves, gives_up])
def test_a_reward_that_leaves_the_program_is_an_error_of_the_reward(func: Any) -> None:
    # Else a training would end there with exit code 0, as if it were done.
    with pytest.raises(RewardError, match=rf"'{func.__name__}' raised \w+ on a batch of 2"):
        checked(func)(prompts=["p", "q"], completions=COMPLETIONS)


def test_sigterm_in_a_reward_still_ends_the_program() -> None:
    def terminated(**columns: Any) -> list[float]:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        checked(terminated)(prompts=["p", "q"], completions=COMPLETIONS)


def test_a_column_may_have_any_name() -> None:
    def of_self(completions: Any, **columns: Any) -> list[float]:
        return [float(one == "x") for one in columns["self"]]

    columns: dict[str, Any] = {"self": ["x", "y"]}
    assert checked(of_self)(prompts=["p", "q"], completions=COMPLETIONS, **columns) == [1.0, 0.0]
