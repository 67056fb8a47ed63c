"""Keywords mean what flags mean; functions and data that stand in no file leave a name behind."""

from __future__ import annotations

import functools
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import abacist
from abacist.errors import AbacistError, DataError, RewardError, UsageError
from abacist.learning.config import flags_of, known_settings, load_config
from abacist.learning.keywords import config_of
from abacist.learning.resume.resuming import Run
from abacist.learning.resume.reward_code import reward_sum
from abacist.task import gist
from abacist.task import given as given_data
from abacist.task.custom_rewards import name_of
from abacist.task.problems import Problem, load_problems
from abacist.task.rewards import correctness, load_reward_funcs


def brief(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def scaled(factor: float) -> Any:
    def paid(completions: list[Any], **columns: Any) -> list[float]:
        return [factor for _ in completions]

    return paid


# Settings


def test_keywords_make_the_configuration_that_flags_make() -> None:
    by_keywords = config_of("tiny", {
        "max_steps": 3, "use_peft": False, "system_prompt": "-- Think", "reward_weights": (1, 0.5),
        "reward_funcs": ["integer", "xml_count"], "seed": None, "dtype": "bfloat16"})  # fmt: skip
    by_flags = load_config("tiny", None, [
        "--max_steps", "3", "--use_peft", "false", "--system_prompt=-- Think", "--reward_weights",
        "1", "0.5", "--reward_funcs", "integer", "xml_count", "--dtype", "bfloat16"])  # fmt: skip
    assert by_keywords.settings == by_flags.settings
    assert by_keywords.to_yaml() == by_flags.to_yaml()


def test_values_of_other_libraries_mean_the_plain_ones() -> None:
    import numpy as np
    import torch
    from transformers.trainer_utils import SaveStrategy

    plain = {
        "max_steps": 3, "learning_rate": 1e-4, "reward_weights": [1.0, 0.5], "use_peft": False,
        "reward_funcs": ["integer", "xml_count"], "dtype": "bfloat16", "save_strategy": "no",
        "lora_target_modules": ["k_proj", "q_proj"], "lr_scheduler_kwargs": {"num_cycles": 1},
        "device": "cpu", "output_dir": "a",
    }  # fmt: skip
    forms: list[dict[str, Any]] = [
        {
            "max_steps": np.int64(3), "learning_rate": np.float32(1e-4), "use_peft": np.bool_(0),
            "reward_weights": np.array([1, 0.5], np.float32), "dtype": torch.bfloat16,
            "reward_funcs": ("integer", "xml_count"), "save_strategy": SaveStrategy.NO,
            "lora_target_modules": {"q_proj", "k_proj"}, "device": torch.device("cpu"),
            "lr_scheduler_kwargs": {"num_cycles": np.int64(1)}, "output_dir": Path("a"),
        },
        {
            "max_steps": torch.tensor(3), "learning_rate": torch.tensor(1e-4),
            "use_peft": torch.tensor(False), "reward_weights": (one for one in (1, 0.5)),
            "reward_funcs": iter(["integer", "xml_count"]),
        },
        {"max_steps": np.array(3), "learning_rate": Decimal("1e-4"), "reward_weights": (1, 0.5)},
    ]  # fmt: skip
    wanted = config_of("tiny", plain).to_yaml()
    for form in forms:
        assert config_of("tiny", plain | form).to_yaml() == wanted


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"reward_weights": {1.0, 2.0}}, "reward_weights is a set, without an order"),
        ({"reward_weights": []}, "reward_weights is empty"),
        ({"lora_target_modules": ()}, "lora_target_modules is empty"),
        ({"reward_funcs": []}, "There are no rewards"),
        ({"output_dir": b"a"}, "output_dir cannot be kept"),
        ({"run_name": object()}, "run_name cannot be kept"),
        ({"output_dir": "caf\udce9"}, "output_dir is no UTF-8: 'caf\\udce9'"),
        ({"model": "caf\udce9"}, "model is no UTF-8"),
        ({"lr_scheduler_kwargs": {"a": object()}}, "lr_scheduler_kwargs cannot be kept"),
        ({"config": {"max_steps": 3}}, "config is a dict"),
        ({"model": object()}, "train() was given a object as the model"),
        ({"model_name_or_path": 5}, "train() was given a int as the model"),
    ],
)
def test_what_no_setting_holds_is_named(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(None, keywords)
    assert said in caught.value.message and caught.value.hint


def test_a_model_in_memory_is_told_how_to_be_saved() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with pytest.raises(UsageError, match="given a LlamaForCausalLM as the model") as caught:
        abacist.train(model=model)
    assert "model.save_pretrained(folder)" in caught.value.hint
    with pytest.raises(RewardError, match="'LlamaForCausalLM' is a model"):
        abacist.train(reward_funcs=[model])


def test_the_short_names_mean_the_long_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, None, None, None, None, None)
    assert config_of(None, {"model": "org/base"}).model.model_name_or_path == "org/base"
    assert config_of(None, {"dataset": Path("org/data")}).script.dataset_name == "org/data"
    assert config_of("tiny", {"model": run}).model.model_name_or_path == str(tmp_path)


def test_a_config_file_is_a_recipe_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tiny\nmax_steps: 4\n", encoding="utf-8")
    for config in (
        config_of(file, {}),
        config_of(str(file), {}),
        config_of(None, {"config": file}),
    ):
        assert config.training.max_steps == 4 and config.recipe is None


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"lerning_rate": 1e-3}, "'lerning_rate'; did you mean learning_rate?"),
        ({"rewards": ["default"]}, "'rewards'; did you mean reward_"),
        ({"Max_Steps": 3}, "'Max_Steps'; did you mean max_steps?"),
        ({"lr": 1e-3}, "'lr': It is learning_rate."),
        ({"qqqq": 1}, "'qqqq'; help(abacist.train) lists them"),
        ({"learning_rate": -1}, "--learning_rate -1.0 is not at least 0"),
        ({"max_steps": "three"}, "--max_steps: invalid int value"),
        ({"max_steps": [1, 2]}, "max_steps takes one value, and was given a list of 2"),
        ({"model": "a", "model_name_or_path": "b"}, "are one setting"),
        ({"num_generations": 1}, "num_generations"),
    ],
)
def test_a_wrong_keyword_is_refused_in_one_line(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of("tiny", keywords)
    assert said in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("recipe", [3, ["tiny"], brief], ids=["number", "list", "function"])
def test_what_is_no_recipe_is_told_what_it_is(recipe: object) -> None:
    with pytest.raises(UsageError, match="not a recipe"):
        config_of(recipe, {})
    with pytest.raises(UsageError, match="no recipe 'tyni'"):
        config_of("tyni", {})


def test_every_named_keyword_of_train_is_a_setting() -> None:
    import inspect

    from abacist.learning.keywords import ALIASES

    own = {"recipe", "progress", "watcher", "flags"}
    for name in inspect.signature(abacist.train).parameters.keys() - own:
        assert ALIASES.get(name, name) in known_settings(), name


@given(st.dictionaries(st.sampled_from(["system_prompt", "run_name"]), st.text(min_size=1)))
def test_a_text_reaches_its_setting_whatever_it_holds(settings: dict[str, str]) -> None:
    from abacist.learning.config import _Parser

    assert _Parser().given(flags_of(settings)) == settings


# Functions as rewards


def test_functions_are_known_by_a_name_of_their_own() -> None:
    rewards = [
        "default", lambda completions, **k: [0.0 for _ in completions], scaled(0.5), brief,
        lambda completions, **k: [1.0 for _ in completions],
    ]  # fmt: skip
    config = config_of("tiny", {"reward_funcs": rewards})
    names = config.script.reward_funcs
    assert names[:3] == ["default", "<function lambda>", "<function paid>"]
    assert names[4] == "<function lambda_2>"
    assert names[3].endswith(("test_keywords.py:brief", "test_keywords.brief"))
    found = load_reward_funcs(names, 5.0, config.functions)
    assert [one.__name__ for one in found[5:]] == ["lambda", "paid", "brief", "lambda_2"]
    assert found[-1](prompts=["p"], completions=["a"]) == [1.0]


def test_rewards_of_ours_keep_their_names() -> None:
    config = config_of("tiny", {"reward_funcs": [correctness, gist.int_reward_func]})
    assert config.script.reward_funcs == ["correctness", "gist.int_reward_func"]
    assert config.functions == {}
    assert config_of("tiny", {"reward_funcs": "integer"}).script.reward_funcs == ["integer"]
    assert config_of("tiny", {"reward_funcs": correctness}).script.reward_funcs == ["correctness"]


def test_a_function_of_a_module_is_named_by_its_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def brief(completions, **columns):\n    return [0.5 for _ in completions]\n"
        "two = [lambda completions, **k: [1.0 for _ in completions]]\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine  # type: ignore[import-not-found]

    assert name_of(mine.brief) == f"{tmp_path / 'mine.py'}:brief"
    assert name_of(mine.two[0]) == "<function lambda>"
    assert name_of(functools.partial(mine.brief)) == "<function brief>"
    (func,) = load_reward_funcs([name_of(mine.brief)])
    assert func(prompts=["p"], completions=["c"]) == [0.5]
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "mine.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    script_func = type(brief)(brief.__code__, {}, "brief")
    script_func.__module__, main.brief = "__main__", script_func  # type: ignore[attr-defined]
    assert name_of(script_func) == "<function brief>"  # importing a script would run it again


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([3], "is a int, not a function"),
        ([str], "a class"),
        ([lambda text: 1.0], "cannot be called as TRL calls it"),
        ({"default"}, "reward_funcs is a set"),
        ([scaled(1.0), scaled(2.0)], "are called 'paid'"),
    ],
    ids=["number", "class", "signature", "set", "twins"],
)
def test_what_cannot_be_a_reward_is_refused_before_anything_is_loaded(
    rewards: Any, said: str
) -> None:
    with pytest.raises(RewardError, match=said):
        config = config_of("tiny", {"reward_funcs": rewards})
        load_reward_funcs(config.script.reward_funcs, 5.0, config.functions)


def test_a_kept_name_of_a_lost_function_says_how_to_give_it_again() -> None:
    with pytest.raises(RewardError, match="'brevity' was given as a Python function") as caught:
        load_reward_funcs(["default", "<function brevity>"])
    assert "reward_funcs=[…, brevity]" in caught.value.hint
    with pytest.raises(RewardError, match="no reward 'function brevity'"):
        load_reward_funcs(["function brevity"])


def test_a_changed_function_is_seen_and_the_same_one_given_again_is_not() -> None:
    def again(bonus: float, text: str = "x") -> Any:
        def paid(completions: Any, words: Any = frozenset("ab"), **columns: Any) -> list[float]:
            return [bonus if text in "abc" else 0.0 for _ in completions]

        return paid

    same, other = reward_sum(again(0.5)), reward_sum(again(0.6))
    assert same == reward_sum(again(0.5)) != other
    assert reward_sum(again(0.5, "y")) != same
    assert reward_sum(lambda completions: [1.0]) != reward_sum(lambda completions: [2.0])
    first, second = (lambda completions: [1.0]), (lambda completions: [1.0])
    assert reward_sum(first) == reward_sum(second)  # though they stand in other places

    def outer(bonus: float) -> Any:
        def helper() -> float:
            return bonus

        return lambda completions: [helper() for _ in completions]

    assert reward_sum(outer(1.0)) == reward_sum(outer(1.0)) != reward_sum(outer(2.0))
    itself: list[Any] = []
    itself.append(itself)
    assert reward_sum(lambda completions, kept=itself: [1.0])  # ends
    bound = [reward_sum(functools.partial(scaled(1.0), factor=n)) for n in (1, 1, 2)]
    assert bound[0] == bound[1] != bound[2]

    class Paid:
        def __init__(self, most: float) -> None:
            self.most = most

        def __call__(self, completions: Any, **columns: Any) -> list[float]:
            return [self.most]

    sums = [reward_sum(Paid(most)) for most in (1.0, 1.0, 2.0)]
    assert sums[0] == sums[1] != sums[2]
    assert reward_sum(correctness) == "correctness"


# Data


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"question": f"How much is {n} + 1?", "answer": n + 1, "level": n} for n in range(count)
    ]


def test_rows_are_cut_like_a_file_that_holds_them(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f"{line}\n" for line in given_data.lines_of(rows())), encoding="utf-8")
    for split in ("train", "selection", "heldout", "all"):
        assert load_problems(rows(), split=split) == load_problems(file, split=split)
    assert load_problems(rows(), split="all")[3].columns["level"] == 3
    assert load_problems((row for row in rows()), limit=2) == load_problems(rows(), limit=2)


@given(st.integers(0, 400))
def test_a_problem_that_is_given_is_read_as_itself(seed: int) -> None:
    problems = load_problems("generated", limit=3, seed=seed)
    assert load_problems(problems, split="all") == problems
    assert load_problems([Problem("a", "2?", "", "1,450", 1)], split="all")[0].answer == "1,450"


def test_a_dataset_of_the_hugging_face_library_is_rows() -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(rows())
    assert load_problems(data, split="all") == load_problems(rows(), split="all")
    with pytest.raises(DataError, match="several splits: 'train'") as caught:
        load_problems(DatasetDict({"train": data}))
    assert "data['train']" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no problems in it"),
        (["How much is 2?"], "row 1 is a str, not a dict"),
        ([*rows(2), {"question": "?", "answer": 2, "seen": {1, 2}}], "row 3 has a set in 'seen'"),
        ([{"question": "", "answer": "2"}] * 3, "row 1: the row has an empty 'question'"),
        ({"question": "1?", "answer": "1"}, "one dict"),
        (3, "The data is a int"),
    ],
    ids=["empty", "texts", "a set", "no question", "one row", "a number"],
)  # fmt: skip
def test_data_that_is_no_table_is_named(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_problems(data, split="all")


def test_a_pandas_table_is_rows() -> None:
    import pandas as pd

    table = pd.DataFrame(rows())
    assert load_problems(table, split="all") == load_problems(rows(), split="all")
    assert load_problems(table, split="all")[3].columns["level"] == 3
    named = table.rename(columns={"level": "features"})  # as an attribute of a Dataset is called
    assert load_problems(named, split="all")[3].columns["features"] == 3


def test_a_cell_of_numpy_or_decimal_is_the_number_that_it_was_written_as() -> None:
    import numpy as np
    import pandas as pd
    from datasets import Dataset, Features, Value

    cells = [np.int64(3), np.float32(0.1), Decimal("2.50"), np.array([0.1], np.float32)]
    data = [{"question": f"{at}?", "answer": cell} for at, cell in enumerate(cells)]
    answers = [problem.answer for problem in load_problems(data, split="all")]
    assert answers == ["3", "0.1", "2.5", "0.1"]
    narrow = {"question": ["1?"], "answer": [0.1]}
    kinds = Features({"question": Value("string"), "answer": Value("float32")})
    for table in (
        pd.DataFrame(narrow).astype({"answer": "float32"}),
        Dataset.from_dict(narrow, features=kinds),
    ):
        assert [problem.answer for problem in load_problems(table, split="all")] == ["0.1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": "3"}, "limit of '3' problems is no whole number"),
        ({"limit": 2.5}, "limit of 2.5"),
        ({"limit": True}, "limit of True"),
        ({"question_column": None}, "question_column is None"),
        ({"answer_column": 3}, "answer_column is 3"),
    ],
)
def test_how_problems_are_read_is_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_problems(rows(), split="all", **options)


def test_given_rows_have_no_test_split_and_a_resumed_run_takes_none() -> None:
    with pytest.raises(DataError, match="no test split"):
        load_problems(rows(), split="test")
    with pytest.raises(UsageError, match="resumed with the data it was begun with"):
        config_of(None, {"resume": "runs/a", "dataset": rows()})
    with pytest.raises(DataError, match="no rows"):
        config_of("tiny", {"dataset": []})


def test_rows_become_lines_that_a_stranger_can_read() -> None:
    config = config_of("tiny", {"dataset": rows(3)})
    assert [json.loads(line)["level"] for line in config.data or []] == [0, 1, 2]
    assert config.script.dataset_name == given_data.NAME


# Asking for what there is


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: abacist.evaluate("tiny", num_problem=3), "did you mean num_problems?"),
        (
            lambda: abacist.evaluate("tiny", num_problems=0),
            "--num_problems 0 is not a whole number",
        ),
        (lambda: abacist.evaluate("tiny", num_problems=True), "--num_problems True"),
        (lambda: abacist.evaluate("tiny", temperature=0.5), "num_samples is 1"),
        (lambda: abacist.evaluate("tiny", num_samples=2, temperature=0), "not a number above 0"),
        (lambda: abacist.evaluate("tiny", include_seen="no"), "is a switch"),
        (lambda: abacist.evaluate("tiny", split="tset"), "no split 'tset'"),
        (lambda: abacist.evaluate("tiny", rows(), dataset="generated"), "Give one of them"),
        (lambda: abacist.evaluate("tiny", native_prompt=True, prefill="a"), "prompt of its own"),
        (lambda: abacist.evaluate(3), "was given a int as the model"),
        (lambda: abacist.ask("tiny", "?", sed=1), "did you mean seed?"),
        (lambda: abacist.ask("tiny", "?", num_samples=0), "num_samples is 0"),
        (lambda: abacist.ask("tiny", []), "a question, or a list"),
        (lambda: abacist.ask("tiny", "?", num_samples=2, temperature=0), "would all be the same"),
        (lambda: abacist.ask("tiny", "  "), "no question"),
        (lambda: abacist.compare(3, "b"), "was given a int"),
        (lambda: abacist.compare("nowhere", "b"), "no such folder"),
        (lambda: abacist.train(max_step=3), "did you mean max_steps?"),
        (lambda: abacist.train(config_of("tiny", {}), max_steps=3), "takes a Config alone"),
    ],
)
def test_bad_input_is_refused_with_the_mend(call: Any, said: str) -> None:
    with pytest.raises(AbacistError) as caught:
        call()
    assert said in str(caught.value)
