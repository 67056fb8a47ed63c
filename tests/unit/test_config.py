"""Recipes, files and flags: one vocabulary, one order, and errors that say what to write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from abacist.cli.train import read_request
from abacist.errors import UsageError
from abacist.learning.arguments import GRPOConfig
from abacist.learning.config import full_help, load_config
from abacist.learning.helptext import recipe_names
from abacist.learning.limits import OBJECTS, OBJECTS_OR_FILES, RETIRED
from abacist.learning.task import load_task
from abacist.task.rewards import built_in, load_reward_funcs


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_nothing_given_is_the_tiny_recipe() -> None:
    config = load_config(None, None, [])
    assert not {"flag", None} & {*config.sources.values()} and "project" not in config.settings
    assert config.recipe == "tiny" and config.model.model_name_or_path == "tiny"


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "learning_rate: 0.5\nseed: 7\n")
    config = load_config("tiny", path, ["--learning_rate", "0.25"])
    assert (config.training.learning_rate, config.training.seed) == (0.25, 7)
    assert config.training.num_generations == 8
    assert (config.sources["learning_rate"], config.sources["seed"]) == ("flag", "my.yaml")


def test_a_foreign_model_without_a_recipe_gets_the_general_recipe_not_the_tiny_one() -> None:
    config = load_config(None, None, ["--model_name_or_path", "some/model"])
    assert config.recipe == "any" and config.script.dataset_name == "openai/gsm8k"
    assert config.script.system_prompt == "default"


def test_other_data_alone_keeps_the_built_in_model() -> None:
    config = load_config(None, None, ["--dataset_name", "mine.jsonl"])
    assert config.recipe == "tiny" and config.model.model_name_or_path == "tiny"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_saved_settings_make_the_same_configuration(
    name: str, tmp_path: Path
) -> None:
    config = load_config(name, None, [])
    again = load_config(None, write(tmp_path / "config.yaml", config.to_yaml()), [])
    assert again.model == config.model and again.script == config.script
    for key in config.settings:
        if hasattr(config.training, key):
            assert getattr(again.training, key) == getattr(config.training, key), key


def test_the_saved_file_says_nothing_of_where_the_run_is_kept(tmp_path: Path) -> None:
    config = load_config("tiny", None, ["--output_dir", str(tmp_path), "--overwrite"])
    assert not {"output_dir", "overwrite", "extends"} & set(yaml.safe_load(config.to_yaml()))


def test_what_the_machine_chose_is_not_saved_for_the_next_machine() -> None:
    assert "bf16" not in yaml.safe_load(load_config("tiny", None, []).to_yaml())
    assert yaml.safe_load(load_config("tiny", None, ["--bf16", "false"]).to_yaml())["bf16"] is False


def test_instruct_recipes_answer_to_their_long_names() -> None:
    assert load_config("qwen2.5-1.5b-instruct", None, []).recipe == "qwen2.5-1.5b"


def test_dashes_and_underscores_and_equals_signs_are_the_same_flag() -> None:
    for flags in (["--num-generations", "4"], ["--num_generations=4"]):
        assert load_config("tiny", None, flags).training.num_generations == 4


def test_numbers_in_yaml_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "learning_rate: 1e-5\n")  # YAML 1.1 reads a string
    assert load_config("tiny", path, []).training.learning_rate == 1e-5


@pytest.mark.parametrize(("every", "is_said"), [("20", True), ("6", False), ("0.5", False)])
def test_a_run_that_ends_before_its_first_look_says_so(every: str, is_said: bool) -> None:
    config = load_config("tiny", None, ["--max_steps", "6", "--eval_steps", every])
    assert any(f"eval_steps is {every} and the run" in line for line in config.lines()) is is_said


def test_whole_numbers_are_shown_as_such() -> None:
    lines = load_config("tiny", None, ["--eval_steps", "20"]).lines()
    assert next(line.split()[1] for line in lines if line.startswith("eval_steps")) == "20"


def test_eval_steps_alone_switch_evaluation_on() -> None:
    config = load_config("any", None, ["--eval_steps", "5"])
    assert config.training.eval_strategy == "steps" and config.training.do_eval


@pytest.mark.parametrize("key", sorted(RETIRED))
def test_every_retired_key_is_explained_as_flag_and_with_its_line_in_a_file(
    key: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as flag:
        load_config("tiny", None, [f"--{key}", "1"])
    assert RETIRED[key] == flag.value.hint
    path = write(tmp_path / "old.yaml", f"seed: 1\n{key}: 1\n")
    with pytest.raises(UsageError, match="line 2"):
        load_config("tiny", path, [])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learnin_rate", "1"], "Did you mean learning_rate"),
        (["--num_generation", "8"], "Did you mean num_generations"),
        (["--learning_rate", "fast"], "invalid float value"),
        (["--num_generations", "7", "--per_device_train_batch_size", "64"], "divisible"),
        (["--zzz", "1"], "--help_all"),
    ],
)
def test_a_wrong_flag_is_named_with_its_mend(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config("tiny", None, flags)
    assert said in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "no settings"), ("a: [", "not YAML"), ("sed: 3\n", "line 1")],
)
def test_a_broken_config_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        load_config(None, write(tmp_path / "broken.yaml", text), [])


def test_an_unknown_recipe_or_file_is_named_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"Did you mean qwen2\.5-1\.5b"):
        load_config("qwen-1.5b", None, [])
    with pytest.raises(UsageError, match="cannot read the config"):
        load_config(None, "nowhere.yaml", [])


OPEN_R1 = """\
model_name_or_path: some/model
torch_dtype: bfloat16
dataset_prompt_column: problem
hub_strategy: every_save
log_completions: true
max_prompt_length: 512
num_generations: 8
push_to_hub: false
report_to: [wandb]
warmup_ratio: 0.1
benchmarks: null
wandb_projekt: mine
"""


def test_all_settings_that_are_not_known_are_told_at_once_each_with_its_line_and_mend(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError) as error:
        load_config(None, write(tmp_path / "grpo.yaml", OPEN_R1), [])
    said = str(error.value)
    for line, key in ((2, "torch_dtype"), (3, "dataset_prompt_column"), (6, "max_prompt_length"),
                      (10, "warmup_ratio"), (11, "benchmarks"), (12, "wandb_projekt")):  # fmt: skip
        assert f"{key} ({tmp_path / 'grpo.yaml'}, line {line}): " in said
    assert "6 settings of" in said and RETIRED["torch_dtype"] in said
    assert not any(name in said for name in ("push_to_hub", "hub_strategy", "log_completions"))
    with pytest.raises(UsageError, match=r"2 settings of the command line(.|\n)*--sed(.|\n)*--lr"):
        load_config(None, None, ["--sed", "1", "--beta", "0", "--lr", "1"])


@pytest.mark.parametrize(
    "line", ["push_to_hub: false", "fast_inference: no", "overwrite_output_dir: false", "lr: null",
             "max_prompt_length: null", "deepspeed: null", "auto_find_batch_size: False"],
)  # fmt: skip
def test_a_setting_we_lack_that_is_switched_off_asks_for_nothing(line: str, tmp_path: Path) -> None:
    config = load_config("tiny", write(tmp_path / "a.yaml", f"seed: 3\n{line}\n"), [])
    assert config.training.seed == 3 and line.split(":")[0] not in config.settings


@pytest.mark.parametrize(
    "flags", [["--push_to_hub", "false"], ["--push-to-hub=False"], ["--no_push_to_hub"]]
)
def test_and_so_on_the_command_line(flags: list[str]) -> None:
    config = load_config("tiny", None, [*flags, "--seed", "5"])
    assert config.training.seed == 5 and not config.training.push_to_hub


@pytest.mark.parametrize(
    "line",
    ["push_to_hub: true", "push_to_hub: 0", "lr: 0", "lr: false", "fast_inference: true",
     "max_prompt_length: 0", "pushtohub: false"],
)  # fmt: skip
def test_one_that_asks_for_something_is_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1"):
        load_config("tiny", write(tmp_path / "a.yaml", f"{line}\n"), [])
    with pytest.raises(UsageError):
        load_config("tiny", None, ["--push_to_hub"])
    with pytest.raises(UsageError):
        load_config("tiny", None, ["--push_to_hub", "--seed", "1"])


def test_the_full_help_lists_no_flag_that_is_refused() -> None:
    listed = set(re.findall(r"^  (--[a-z]\w*)", full_help(), re.MULTILINE))
    assert len(listed) > 150
    assert not {flag.removeprefix("--").removeprefix("no_") for flag in listed} & set(RETIRED)


@pytest.mark.parametrize(
    ("flag", "said"),
    [(["--learning_rate", "-1"], "--learning_rate -1.0 is not at least 0"),
     (["--beta=-1"], "--beta -1.0"), (["--seed", "-1"], "--seed -1 "),
     (["--loss_type", "gpro"], "Did you mean grpo"), (["--report_to", "wanbd"], "mean wandb"),
     (["--lora_r", "0"], "--lora_r 0 is not at least 1")],
)  # fmt: skip
def test_a_value_that_means_nothing_is_told_as_it_was_set(flag: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        load_config("tiny", None, flag)


def test_local_paths_are_kept_whole_so_that_a_run_goes_on_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "mine.py").write_text("def pays(completions, **c): ...", encoding="utf-8")
    (tmp_path / "tiny").mkdir()  # the built-in name wins over a folder
    flags = ["--dataset_name", "data.jsonl", "--model_name_or_path", "tiny"]
    flags += ["--reward_funcs", "default", "mine.pays", "mine.py:pays", "elsewhere.pays"]
    config = load_config("tiny", None, flags)
    assert config.script.dataset_name == str(tmp_path / "data.jsonl")
    assert config.model.model_name_or_path == "tiny"
    ours = [str(tmp_path / "mine.pays"), f"{tmp_path / 'mine.py'}:pays"]
    assert config.script.reward_funcs == ["default", *ours, "elsewhere.pays"]
    assert load_config("any", None, ["--model_name_or_path", "Qwen/Qwen2.5-0.5B"]).script == (
        load_config("any", None, []).script
    )


@pytest.mark.parametrize("recipe", ["any-cpu", "qwen2.5-0.5b", "smollm2-135m", "qwen2.5-1.5b-cpu"])
def test_recipes_for_a_machine_without_a_gpu_are_small_and_form_cannot_outweigh_an_answer(
    recipe: str,
) -> None:
    config = load_config(recipe, None, [])
    training, script = config.training, config.script
    assert config.problems_per_step in (4, 12) and training.num_generations == 8
    assert 160 <= config.max_completion_tokens <= 300 and script.num_shots == "2"
    assert 3e-5 <= training.learning_rate <= 5e-5 and training.scale_rewards == "none"
    names = [reward.__name__ for reward in load_reward_funcs(script.reward_funcs)]
    most = {name: weight * built_in(name).maximum
            for name, weight in zip(names, training.reward_weights, strict=True)}  # fmt: skip
    assert most.pop("correctness") > 4 * sum(most.values())
    assert config.chooses_checkpointing and script.num_heldout_problems <= 400


@pytest.mark.parametrize(
    ("flags", "left_out", "why"),
    [
        (["--beta", "0.04"], "train_replies", "--beta 0.04: its KL term is taken over all"),
        (["--entropy_coef", "0.01"], "train_replies", "does not go with --entropy_coef"),
        (["--loss_type", "vespo"], "step_reward_weight", "vespo weighs whole replies"),
        (["--use_liger_kernel", "true"], "step_reward_weight", "weighs whole replies"),
        (["--control", "format"], "step_reward_weight", "--control format does not pay for"),
    ],
)
def test_what_only_the_recipe_asks_for_gives_way_to_a_flag(
    flags: list[str], left_out: str, why: str, tmp_path: Path
) -> None:
    config = load_config("qwen2.5-0.5b", None, flags)
    (note,) = (note for note in config.notes if "the recipe's" in note)
    assert note.startswith(f"without the recipe's {left_out}: {left_out} ") or "control" in why
    assert why in note
    default = GRPOConfig.__dataclass_fields__[left_out].default
    assert getattr(config.training, left_out) == default
    # And it stays so where the run's settings are read again.
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(None, str(tmp_path / "config.yaml"), [])
    assert getattr(again.training, left_out) == getattr(config.training, left_out)


def test_a_recipe_that_a_file_extends_gives_way_to_the_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: qwen2.5-0.5b\nbeta: 0.04\nlora_r: 8", encoding="utf-8")
    config = load_config(None, str(mine), ["--num_generations", "4"])
    assert config.training.train_replies is None and config.model.lora_r == 8
    assert config.sources["lora_r"] == "mine.yaml" and config.sources["shots_file"] == ""
    mine.write_text("extends: qwen2.5-0.5b\nbeta: 0.04\ntrain_replies: 4", encoding="utf-8")
    with pytest.raises(UsageError, match=r"train_replies \(mine.yaml\) 4 does not go with"):
        load_config(None, str(mine), [])


def test_a_placebo_for_which_nothing_is_left_to_pay_is_refused() -> None:
    flags = ["--reward_weights", "0", "0", "0", "0", "0"]
    assert load_config("qwen2.5-0.5b", None, flags).training.step_reward_weight == 1
    with pytest.raises(UsageError, match="--reward_weights are all 0: nothing is paid"):
        load_config("qwen2.5-0.5b", None, [*flags, "--control", "format"])


def test_a_copy_that_leaves_a_setting_out_does_not_change_what_it_was_copied_from() -> None:
    config = load_config("qwen2.5-0.5b", None, [])
    before = config.to_yaml()
    config.copy().leave_out("step_reward_weight", "a reason")
    assert config.to_yaml() == before and config.training.step_reward_weight == 1


def test_what_a_person_asks_for_does_not_give_way(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train_replies: 3", encoding="utf-8")
    for recipe, file, flags in (
        ("qwen2.5-0.5b", None, ["--beta", "0.04", "--train_replies", "4"]),
        ("qwen2.5-0.5b", str(tmp_path / "mine.yaml"), ["--beta", "0.04"]),
        ("qwen2.5-0.5b", None, ["--loss_type", "vespo", "--step_reward_weight", "2"]),
    ):
        with pytest.raises(UsageError, match="Leave out one of the two"):
            load_config(recipe, file, flags)
    flags = ["--num_generations", "16"]
    assert load_config("qwen2.5-0.5b", None, flags).training.train_replies == 8
    with_kl = load_config("qwen2.5-0.5b", None, [*flags, "--beta", "0.1"])
    assert with_kl.training.train_replies is None


def test_a_reward_of_the_recipe_keeps_its_weight_beside_others_which_count_once() -> None:
    def weights(*flags: str, recipe: str = "any-cpu") -> Any:
        return load_config(recipe, None, list(flags)).training.reward_weights

    assert weights() == weights("--reward_funcs", "default") == [1.0, 0.2, 0.2, 0.2, 0.2]
    form = [0.2, 0.2, 0.2, 0.2]
    assert weights("--reward_funcs", "default", recipe="qwen2.5-0.5b") == [1.0, *form]
    with_own = ("--reward_funcs", "mine.py:brief", "default", "valid_steps")
    assert weights(*with_own) == [1.0, 1.0, *form, 1.0]
    assert weights("--reward_funcs", "int_reward_func", "correctness") == [0.2, 1.0]
    for others in (["mine.py:brief"], ["gist"], ["gist.int_reward_func", "valid_steps"]):
        assert weights("--reward_funcs", *others) is None
    both = ("--reward_funcs", "correctness", "integer", "--reward_weights", "1", "3")
    assert weights(*both) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("given", "kept"), [("false", "none"), ("True", "group"), ("batch", "batch")]
)
def test_scale_rewards_in_words_is_what_trl_computes_with(given: str, kept: str) -> None:
    config = load_config("tiny", None, ["--scale_rewards", given])
    assert config.training.scale_rewards == kept


@pytest.mark.parametrize("given", [["none"], ["tensorboard"]])
def test_a_saved_configuration_is_read_back_whatever_it_reports_to(
    given: list[str], tmp_path: Path
) -> None:
    config = load_config("gist", None, ["--report_to", *given])
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(None, str(saved), [])
    assert again.training.report_to == config.training.report_to
    assert again.to_yaml() == config.to_yaml()
    # A file of an older version holds an empty list.
    settings = yaml.safe_load(config.to_yaml()) | {"report_to": []}
    saved.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert load_config(None, str(saved), []).training.report_to == []


@pytest.mark.parametrize("off", ["false", "none", "False"])
def test_no_resume_may_be_asked_for_in_words(off: str, tmp_path: Path) -> None:
    config = load_config("tiny", None, ["--resume_from_checkpoint", off])
    assert config.training.resume_from_checkpoint is None
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: tiny\nresume_from_checkpoint: {off}\n", encoding="utf-8")
    assert load_config(None, str(path), []).training.resume_from_checkpoint is None


def test_switching_off_one_precision_asks_for_no_other() -> None:
    assert not load_config("tiny", None, ["--use_cpu", "--fp16", "false"]).training.bf16
    assert not load_config("tiny", None, ["--use_cpu", "--bf16", "false"]).training.bf16


def test_no_examples_is_a_number_too_where_a_file_of_them_is_set() -> None:
    generated = ["--dataset_name", "generated", "--num_train_problems", "20"]
    count = [
        len(load_task(load_config("qwen2.5-0.5b", None, [*flags, *generated])).shots)
        for flags in ([], ["--num_shots", "0"], ["--num_shots", "1"])
    ]
    assert count == [2, 0, 1]


def test_data_that_moved_with_its_run_is_found_beside_its_settings(tmp_path: Path) -> None:
    row = json.dumps({"question": "One and one?", "answer": "2"})
    (tmp_path / "data.jsonl").write_text(row + "\n", encoding="utf-8")
    saved = tmp_path / "config.yaml"
    saved.write_text("dataset_name: /gone/run/data.jsonl\n", encoding="utf-8")
    assert load_config(None, str(saved), []).script.dataset_name == str(tmp_path / "data.jsonl")
    saved.write_text("dataset_name: /gone/run/other.jsonl\n", encoding="utf-8")
    assert load_config(None, str(saved), []).script.dataset_name == "/gone/run/other.jsonl"


@pytest.mark.parametrize("source", ["generated", "file"])
def test_runs_with_other_seeds_are_judged_on_the_same_problems(source: str, tmp_path: Path) -> None:
    flags = ["--num_heldout_problems", "5", "--num_train_problems", "20"]
    if source == "file":
        rows = [json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(400)]
        flags += ["--dataset_name", write(tmp_path / "mine.jsonl", "\n".join(rows))]
    one, two = (load_task(load_config("tiny", None, [*flags, "--seed", seed])) for seed in "07")
    assert one.heldout == two.heldout and one.selection == two.selection
    assert len(one.heldout) == 5 and one.train != two.train


@pytest.mark.parametrize("text", ["run_name: 2024-13-01\n", "seed: 0b_\n", "seed: " + "[" * 5000])
def test_a_file_that_yaml_stumbles_over_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.yaml: not YAML"):
        load_config("any", str(tmp_path / "mine.yaml"), [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_generations: [4, --overwrite]", r"num_generations \(mine\.yaml\) takes one value"),
        ("seed: [4]", "takes one value, not a list of 1"),
        ("reward_weights: [1, --overwrite]", "'--overwrite' is no value, it begins with a dash"),
        ("reward_funcs: [default, -o]", "'-o' is no value"),
        ("max_steps: 3\nseed: 1\nmax_steps: 4", "max_steps stands there twice, in lines 1 and 3"),
        (
            "generation_kwargs:\n  top_k: 1\n  top_k: 2",
            "top_k stands there twice, in lines 2 and 3",
        ),
        (f"learning_rate: 0x{'f' * 5000}", "line 1: learning_rate is neither a text, a number"),
        (f"reward_weights: [1, 0x{'f' * 5000}]", "line 1: reward_weights is neither a text"),
        ("system_prompt: &x [*x]", r"\*x refers to another part"),
        ("system_prompt: &x a\nrun_name: *x", r"\*x refers to another part"),
        ("reward_weights: [[1, 2]]", "neither a text, a number nor a list"),
        ("generation_kwargs: {a: 2024-01-01}", "generation_kwargs is neither"),
        ("run_name: !!binary aGVsbG8=", "is no part of a setting"),
        ("seed: !!bool x", "the tag .*bool is no part of a setting"),
        ("seed: !!int ''", "the tag .*int is no part of a setting"),
        ("1: 2", "line 1: 1 is no name of a setting"),
        ("<<: {seed: 1}", "is no name of a setting"),
        ("- seed", "it holds no settings"),
        ("seed: 1 # " + "x" * 2**20, "settings are no megabyte"),
    ],
)
def test_a_file_of_settings_holds_settings_and_no_flags(
    text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        load_config("any", str(tmp_path / "mine.yaml"), [])


@pytest.mark.parametrize("name", ["max_hours", "num_train_epochs", "epsilon", "max_steps"])
@pytest.mark.parametrize("value", ["1e308", "-1e11", "inf", "1" + "0" * 400])
def test_a_number_that_sums_would_overflow_is_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"--{name} .* is beyond 1e\+10|--{name}: invalid int"):
        load_config("tiny", None, [f"--{name}={value}"])


@pytest.mark.parametrize("value", ["-1", "4294967296", "10000000001"])
def test_a_seed_out_of_range_is_told_the_range(value: str) -> None:
    with pytest.raises(UsageError, match=rf"--seed {value} is not at least 0 and below 4.29"):
        load_config("tiny", None, [f"--seed={value}"])


@pytest.mark.parametrize("name", OBJECTS_OR_FILES)
def test_an_object_where_a_file_may_stand_is_refused_by_its_flag(name: str) -> None:
    with pytest.raises(UsageError, match=rf"--{name} .*is no JSON object"):
        load_config("tiny", None, [f"--{name}", "{bad"])


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("text", ["{bad", "[1]", "5", "", "[" * 50_000])
def test_what_is_no_json_object_is_refused_by_its_flag(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=rf"--{name} .*is no JSON object"):
        load_config("tiny", None, [f"--{name}={text}"])


def test_a_list_of_a_file_may_hold_negative_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "reward_funcs: [correctness, integer, xml_count]\nreward_weights: [1, -0.5, -1.0e-05]",
        encoding="utf-8",
    )
    config = load_config("tiny", str(tmp_path / "mine.yaml"), [])
    assert config.training.reward_weights == [1.0, -0.5, -1e-05]
    flags = "--reward_funcs correctness integer --reward_weights 1 -2E-6"
    assert load_config("tiny", None, flags.split()).training.reward_weights == [1.0, -2e-6]


def test_an_empty_variable_is_no_run_to_resume() -> None:
    with pytest.raises(UsageError, match="--resume was given an empty text"):
        read_request(["--resume", "", "--seed", "1"])
