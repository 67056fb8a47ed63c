"""Scripts of other people become configurations that train; what was wrong is said, with lines.

The scripts are in tests/gists: ten ways to write the same thing, none of them run.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abacist.cli.main import main
from abacist.delivery.importing import importing
from abacist.delivery.importing.importing import Imported, import_gist
from abacist.delivery.importing.notes import Kind
from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.script import take_apart
from abacist.delivery.importing.scriptfile import read_script, script_of
from abacist.delivery.importing.settings import upstream_name
from abacist.delivery.importing.values import Function, Unknown
from abacist.errors import AbacistError, DataError, RunError, UsageError
from abacist.learning.config import load_config
from abacist.learning.train import train

GISTS = Path(__file__).parents[1] / "gists"
TRAINABLE = [
    "one_file.py", "with_main.py", "other_tags.py", "data_class.py", "leaky.py", "own_trainer.py",
    "json_lines.py", "from_trl.py", "notebook.ipynb",
]  # fmt: skip


def notes(found: Imported, kind: Kind) -> str:
    return "\n".join(
        f"{found.script.where(note.line)}: {note.text}" for note in found.of_kind(kind)
    )


def values(found: Imported) -> dict[str, Any]:
    return {name: one.value for name, one in found.settings.items()}


def imported(text: str, tmp_path: Path, name: str = "script.py", **options: Any) -> Imported:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return import_gist(path, **options)


# A script that is complete; tests put other lines into it.
SCRIPT = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
def right(completions, answer, **kwargs):
    return [1.0 if c[0]["content"] == a else 0.0 for c, a in zip(completions, answer)]
rows = load_dataset("openai/gsm8k", "main", split="train")
{before}
trainer = GRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs={rewards},
    args=GRPOConfig("out", {arguments}),
    train_dataset=rows,
)
trainer.train()
"""


def script(before: str = "", arguments: str = "", rewards: str = "[right]") -> str:
    return SCRIPT.format(before=before, arguments=arguments, rewards=rewards)


# --- the ten --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with the columns of all the scripts."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = []
    for n in range(40):
        question, gold = f"Ada has {n} eggs and finds {n + 3}. How many are there?", 2 * n + 3
        solution = f"{n} + {n + 3} = {gold}\n#### {gold}"
        rows.append({"question": question, "answer": solution})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_script_becomes_a_configuration_that_trains_a_step(
    name: str, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = import_gist(GISTS / name)
    config = tmp_path / "config.yaml"
    found.write(config)
    size = values(found).get("num_generations", 8)
    flags = {
        "model_name_or_path": "tiny", "dataset_name": problems, "max_steps": 1,
        "per_device_train_batch_size": 2 * size, "gradient_accumulation_steps": 1,
        "max_completion_length": 8, "num_heldout_problems": 0, "num_consistency_problems": 0,
        "save_strategy": "no", "report_to": "none", "output_dir": tmp_path / "run",
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    if name == "json_lines.py":  # its columns are its file's
        flags |= {"question_column": "question", "answer_column": "answer"}
    given = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    if "eval_steps" in values(found):
        given += ["--eval_strategy", "no"]
    run = train(load_config(None, str(config), given))
    metrics = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert any("reward" in json.loads(line) for line in metrics)


def test_a_script_that_no_configuration_can_take_the_place_of_says_why_with_the_line() -> None:
    with pytest.raises(UsageError, match=r"reward_model\.py, line 10: .* is a reward model"):
        import_gist(GISTS / "reward_model.py")


def test_the_gists_own_shape_is_read_whole() -> None:
    found = import_gist(GISTS / "one_file.py")
    got = values(found)
    assert got["model_name_or_path"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert got["reward_funcs"] == ["default"]
    assert got["run_name"] == "qwen-grpo"  # the branch that is taken
    assert (got["lora_r"], got["lora_alpha"], got["use_peft"]) == (16, 64, True)
    assert (got["per_device_train_batch_size"], got["gradient_accumulation_steps"]) == (16, 4)
    assert got["warmup_steps"] == 0.1
    assert got["system_prompt"].startswith("\nAnswer in this form:\n<reasoning>\n")
    wrong = notes(found, Kind.WRONG)
    for line, part in {
        22: "the last <answer>", 53: "equality of texts", 58: "isdigit", 63: "re.DOTALL",
        69: "no reply earns both", 82: "shortest wrong reply", 103: "5e-06", 111: "whole groups",
        114: "max_prompt_length", 122: "given to nothing", 133: "padding with the end token",
        135: "not trained on",
    }.items():  # fmt: skip
        assert any(one.startswith(f"line {line}:") and part in one for one in wrong.splitlines()), (
            line,
            part,
        )
    assert "bf16" not in got and "output_dir" not in got


def test_a_faithful_import_keeps_the_historic_rewards_and_trains_what_the_script_trains() -> None:
    got = values(import_gist(GISTS / "one_file.py", faithful=True))
    assert got["reward_funcs"] == ["gist"]
    assert got["allow_hackable_rewards"] is True
    assert got["use_peft"] is False  # its LoRA is given to nothing


def test_a_faithful_import_takes_mended_rewards_out_as_they_are(tmp_path: Path) -> None:
    found = import_gist(GISTS / "with_main.py", faithful=True)
    assert values(found)["reward_funcs"] == ["_rewards.py:right", "_rewards.py:laid_out"]
    module: dict[str, Any] = {}
    exec(found.files["_rewards.py"], module)  # our own writing
    reply = [[{"content": "<reasoning>\n1\n</reasoning>\n<answer>\n5\n</answer>"}]]
    assert module["right"](reply, answer=["5"], problem_id=["a"]) == [1.0]
    assert module["laid_out"](reply) == [0.25]


def test_what_is_paid_becomes_a_weight() -> None:
    """A reward of 1 and -1 is one of 2 and 0 to GRPO, which subtracts the mean of the group."""
    got = values(import_gist(GISTS / "with_main.py"))
    assert got["reward_funcs"] == ["correctness", "strict_format"]
    assert got["reward_weights"] == [1.0, 0.5]
    got = values(import_gist(GISTS / "json_lines.py"))
    assert got["reward_weights"] == [1.0, 0.5]  # 2.0 × 1.0 of 2.0, 0.5


def test_another_reply_format_is_called_one_and_gets_our_prompt_and_rewards() -> None:
    found = import_gist(GISTS / "other_tags.py")
    got = values(found)
    assert got["system_prompt"] == "default"
    assert got["reward_funcs"] == ["default", "_rewards.py:no_apologies"]
    assert "<SOLUTION>, <think>" in notes(found, Kind.CHANGED)
    assert "line 49: near_answer looks for <SOLUTION>" in notes(found, Kind.LEFT_OUT)
    kept = import_gist(GISTS / "other_tags.py", faithful=True)
    assert "<SOLUTION>" in values(kept)["system_prompt"]
    assert "whole = re.compile(" in kept.files["_rewards.py"]


def test_examples_of_the_test_split_and_training_on_it_are_named() -> None:
    found = import_gist(GISTS / "leaky.py")
    wrong = notes(found, Kind.WRONG)
    assert "line 14: worked examples come from the test split" in wrong
    assert "line 50: it trains on the split 'test'" in wrong
    assert "line 71: it is evaluated on the training problems" in wrong
    assert "line 67: trust_remote_code" in wrong
    assert "line 11: a token or key" in wrong
    assert "hf_" not in found.text_for(Path("x.yaml")) + wrong
    assert values(found)["num_shots"] == "4"
    assert "dataset_train_split" not in values(found)


def test_examples_that_are_written_out_become_a_file_of_examples() -> None:
    found = import_gist(GISTS / "data_class.py")
    (row,) = [json.loads(line) for line in found.files["_shots.jsonl"].splitlines()]
    assert row["question"].startswith("Mia has 4 boxes") and row["answer"].endswith("#### 19")
    assert values(found)["shots_file"] == "_shots.jsonl"


def test_lines_of_a_notebook_are_told_by_cell() -> None:
    found = import_gist(GISTS / "notebook.ipynb")
    assert "code cell 6, line 6: max_prompt_length" in notes(found, Kind.WRONG)
    assert values(found)["per_device_train_batch_size"] == 6


# --- kinds of expressions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "arguments", "value"),
    [
        ("", "num_iterations=2 * 3 - 4", 2),
        ("n = 1\nn += 2", "num_iterations=n", 3),
        ("settings = dict(num_iterations=5)", "**settings", 5),
        ("settings = {'num_iterations': 1}\nsettings['num_iterations'] = 4", "**settings", 4),
        ("base = {'num_iterations': 1}", "**{**base, 'num_iterations': 3}", 3),
        ("base = {'num_iterations': 1} | {'num_iterations': 2}", "**base", 2),
        ("import os", "num_iterations=int(os.environ.get('N', '6'))", 6),
        ("name = 'a-Llama'", "num_iterations=7 if 'Llama' in name else 1", 7),
        ("from types import SimpleNamespace as S\no = S(n=2)", "num_iterations=o.n", 2),
        (
            "def pick(a, b=4):\n    if a:\n        return b\n    return 0",
            "num_iterations=pick(1)",
            4,
        ),
        ("a, (b, c) = 1, (2, 3)", "num_iterations=c", 3),
        ("import sys\nn = 3 if sys.argv else 3", "num_iterations=n", 3),
        ("try:\n    n = 2\nexcept Exception:\n    n = 9", "num_iterations=n", 2),
    ],
)
def test_values_are_worked_out_as_far_as_the_text_tells(
    before: str, arguments: str, value: Any, tmp_path: Path
) -> None:
    assert values(imported(script(before, arguments), tmp_path))["num_iterations"] == value


@pytest.mark.parametrize(
    "before",
    [
        "import sys\nn = int(sys.argv[1])",
        "import torch\nn = torch.cuda.device_count()",
        "n = 1\nfor _ in open('x'):\n    n += 1",
        "import random\nif random.random() < 0.5:\n    n = 1\nelse:\n    n = 2",
        "n = 10 ** 10 ** 10",
        "n = len('a' * 10 ** 12)",
        "n = missing",
    ],
)
def test_a_value_that_the_text_does_not_tell_is_left_out_and_named(
    before: str, tmp_path: Path
) -> None:
    found = imported(script(before, "num_iterations=n"), tmp_path)
    assert "num_iterations" not in values(found)
    assert "num_iterations: its value" in notes(found, Kind.LEFT_OUT)


def test_nothing_of_a_script_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    before = (
        f"open({str(mark)!r}, 'w').write('x')\n"
        f"__import__('os').system('touch {mark}')\n"
        f"class Meta(type):\n    def __getattr__(cls, name): open({str(mark)!r}, 'w')\n"
        "class C(metaclass=Meta): pass\nC.x"
    )
    imported(script(before), tmp_path)
    assert not mark.exists()


def test_settings_made_on_the_object_count_with_their_line(tmp_path: Path) -> None:
    text = script().replace("args=GRPOConfig(", "args=config if True else GRPOConfig(")
    text = text.replace(
        "trainer = ", "config = GRPOConfig('o', beta=0.1)\nconfig.beta = 0.3\ntrainer = "
    )
    found = imported(text, tmp_path)
    assert found.settings["beta"].value == 0.3
    assert text.split("\n")[(found.settings["beta"].line or 0) - 1] == "config.beta = 0.3"


def test_a_trainer_that_a_framework_would_call_is_found(tmp_path: Path) -> None:
    body = "\n".join("    " + line for line in script().split("\n"))
    text = f"import fire\ndef go(steps=3):\n{body}\nfire.Fire(go)\n"
    assert values(imported(text, tmp_path))["reward_funcs"] == ["correctness"]


@pytest.mark.parametrize(
    ("name", "upstream"),
    [
        ("unsloth/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("unsloth/qwen2.5-3b-unsloth-bnb-4bit", "Qwen/Qwen2.5-3b"),
        ("unsloth/gemma-3-1b-it", "google/gemma-3-1b-it"),
        ("unsloth/something-new-bnb-4bit", "unsloth/something-new"),
        ("someone/Llama-3.2-1B-Instruct-bnb-4bit", "someone/Llama-3.2-1B-Instruct-bnb-4bit"),
        ("tiny", "tiny"),
    ],
)
def test_copies_of_models_get_the_name_of_what_they_copy(name: str, upstream: str) -> None:
    assert upstream_name(name) == upstream


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "batch", "is_wrong"),
    [
        ("num_generations=8, per_device_train_batch_size=8", 8, False),
        (
            "num_generations=8, per_device_train_batch_size=4, gradient_accumulation_steps=2",
            4,
            False,
        ),
        (
            "num_generations=8, per_device_train_batch_size=2, gradient_accumulation_steps=2",
            16,
            True,
        ),
        ("num_generations=5", 40, True),
    ],
)
def test_a_batch_that_holds_no_whole_groups_was_counted_in_prompts(
    arguments: str, batch: int, is_wrong: bool, tmp_path: Path
) -> None:
    found = imported(script("", arguments), tmp_path)
    assert values(found).get("per_device_train_batch_size", 8) == batch
    assert ("no whole groups" in notes(found, Kind.WRONG)) is is_wrong


def test_a_setting_that_cannot_be_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"temperature, line 11.*0\.0 is not above 0"):
        imported(script("", "temperature=0.0"), tmp_path)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", "print 'hello'\n", r"line 1.*\n.*Python 2"),
        ("a.py", "def f(:\n    pass\n", "line 1"),
        ("a.py", "x = (\n" * 500, "line"),
        ("a.py", "x = " + "-" * 5000 + "1", "no training script|nested too deeply"),
        ("a.py", "import os\nprint(os.getcwd())\n", "no training script"),
        ("a.py", "", "no training script"),
        ("a.py", "from trl import SFTTrainer\nSFTTrainer(model='x').train()\n",
         "line 2: this builds a SFTTrainer"),
        ("a.py", "from trl import GRPOConfig\nc = GRPOConfig('x')\n", "no GRPOTrainer that"),
        ("a.py", "x = 1\n" * 300_000, "no script is that long"),
        ("a.ipynb", "{\"cells\": 3}", "no Jupyter notebook"),
        ("a.ipynb", "not json", "no Jupyter notebook"),
        ("a.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": "a b c"}]}),
         "code cell 1, line 1"),
        ("a.yaml", "learning_rate: 1\n", "no training script"),
    ],
)  # fmt: skip
def test_what_is_no_training_script_is_refused_with_the_place(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AbacistError, match=message):
        imported(content, tmp_path, name)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"import os\n\x80\x81\xff")
    with pytest.raises(DataError, match="line 2: this is no UTF-8 text"):
        import_gist(path)
    with pytest.raises(DataError, match="folder"):
        import_gist(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        import_gist(tmp_path / "absent.py")
    path.write_bytes(b"x = '\x00'")
    with pytest.raises(AbacistError):
        import_gist(path)


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ('model="Qwen/Qwen2.5-0.5B-Instruct"', "model=sys.argv[1]", "--model_name_or_path"),
        ('load_dataset("openai/gsm8k", "main", split="train")', "Dataset.from_list([{}])",
         "line 6: the rows are made by from_list"),
        ('"openai/gsm8k"', "sys.argv[2]", "line 6: which data set"),
        ("[right]", "make_rewards()", "none of the rewards"),
    ],
)  # fmt: skip
def test_what_no_run_can_do_without_is_asked_for(
    line: str, other: str, message: str, tmp_path: Path
) -> None:
    text = "import sys; from datasets import Dataset" + script().replace(line, other)
    with pytest.raises(UsageError, match=message):
        imported(text, tmp_path)


def test_a_model_and_a_data_set_can_be_given_for_those_that_are_not_told(tmp_path: Path) -> None:
    text = script().replace('"Qwen/Qwen2.5-0.5B-Instruct"', "pick()").replace("load_", "make_")
    found = imported(text, tmp_path, model="tiny", dataset="generated")
    assert values(found)["model_name_or_path"] == "tiny"
    assert values(found)["dataset_name"] == "generated"


PIECES = [
    "GRPOTrainer(", ")", "GRPOConfig(", "reward_funcs=", "[", "]", "{", "}", "lambda x: x", "\n",
    "    ", "def f(x):\n", "if x:\n", "x = ", "x", "**x", "*x", "f'{x!r:>{y}}'", "1", "10**99",
    "'a'", "load_dataset('a')", ".map(f)", "class A(B):\n", "return ", ", ", "args=", "%pip\n",
    "!ls", "@", "global x\n", "x[0]", "x.y", "x.y = 3\n", " + ", "for x in f():\n",
    "from trl import *\n",
]  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=300))
@example("x = " + "f(" * 90 + ")" * 90)
@example("def f():\n    return f()\nf()")
@example("a=[1]\n" + "a=[a,a]\n" * 60 + "x = str(a) == a")
@example("a='x'*1\n" + "a=a+a\n" * 100)
@example("a={}\na['a']=a\nx=f'{a}'")
@example("if a:\n    x=1\n" + "elif a:\n    x=2\n" * 400)
@example("def f(x):\n    f(x); f(x)\nf(1)\nGRPOTrainer()")
@example("a = '{0}{0}' * 1\nx = '{0:999999999}'.format(1)\ny=f'{1:999999999}'")
@example("\ud800")
def test_no_text_raises_anything_but_an_error_of_ours(text: str) -> None:
    try:
        take_apart(script_of(text, Path("script.py")))
    except AbacistError as error:
        assert error.message


@settings(max_examples=60)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_no_script_that_has_a_trainer_raises_anything_else(text: str) -> None:
    whole = script("", "**x", rewards="[right, x]").replace("rows = ", text + "\nrows = ")
    try:
        import_gist_text(whole)
    except AbacistError as error:
        assert error.message


def import_gist_text(text: str) -> None:
    file = script_of(text, Path("script.py"))
    importing._imported(file, False, None, None)


# --- writing --------------------------------------------------------------------------------------


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    found = import_gist(GISTS / "data_class.py")
    config = tmp_path / "mine.yaml"
    (tmp_path / "mine_rewards.py").write_text("# mine\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"mine_rewards\.py exists"):
        found.write(config)
    assert [path.name for path in tmp_path.iterdir()] == ["mine_rewards.py"]
    written = found.write(config, overwrite=True)
    assert {path.name for path in written} == {"mine.yaml", "mine_shots.jsonl", "mine_rewards.py"}
    with pytest.raises(RunError, match="exists"):
        found.write(config)


def test_a_write_that_fails_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = import_gist(GISTS / "data_class.py")
    original = importing.write_aside

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".yaml":
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(importing, "write_aside", full)
    with pytest.raises(RunError, match=r"mine\.yaml cannot be written: No space left"):
        found.write(tmp_path / "mine.yaml")
    assert not list(tmp_path.iterdir())


def test_the_script_itself_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    found = imported(script(), tmp_path)
    with pytest.raises(RunError, match="exists"):
        found.write(path, overwrite=True)
    assert path.read_text(encoding="utf-8") == script()


def test_the_file_says_the_line_of_each_setting_and_reads_back(tmp_path: Path) -> None:
    found = import_gist(GISTS / "one_file.py")
    config = tmp_path / "it.yaml"
    found.write(config)
    text = config.read_text(encoding="utf-8")
    assert "learning_rate: 5.0e-06  # line 103\n" in text
    assert yaml.safe_load(text) == values(found)


def test_the_verb_lists_what_it_found_and_gives_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import-gist", str(GISTS / "one_file.py")]) == 0
    shown = capsys.readouterr().out
    assert "wrong in the script (" in shown and "abacist train --config one_file.yaml" in shown
    assert main(["import-gist", str(GISTS / "one_file.py")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["import-gist", str(GISTS / "one_file.py"), "--json", "-o", "b.yaml"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["lora_r"] == {"value": 16, "line": 123, "why": ""}
    assert {note["kind"] for note in document["notes"]} == {"wrong", "changed", "left_out"}


def test_an_unknown_value_is_no_value() -> None:
    reader = Reader(ast.parse("import sys\nx = sys.argv[1]\ndef f(): pass"))
    assert isinstance(reader.module.names["x"].value, Unknown)
    assert isinstance(reader.module.names["f"].value, Function)
    assert read_script(GISTS / "one_file.py").where(3) == "line 3"


@pytest.mark.parametrize(
    ("rows", "limit", "left_out"),
    [
        ('load_dataset("openai/gsm8k", "main")["train"].select(range(0, 1000, 10))', 100, ""),
        ('load_dataset("openai/gsm8k", "main")["train"].select(range(20, 50))', 30, ""),
        ('load_dataset("openai/gsm8k", "main")["train"].take(64)', 64, ""),
        ('load_dataset("openai/gsm8k", "main")["train"].repeat(3)', None, "repeat: what it does"),
        ('load_dataset("openai/gsm8k", "main", split="train", revision="abc")', None, "revision=…"),
        ('load_dataset("openai/gsm8k", "main", split="train[:100]+test")', 100, "several splits"),
    ],
)
def test_of_the_data_all_is_carried_over_or_named(
    rows: str, limit: int | None, left_out: str, tmp_path: Path
) -> None:
    found = imported(script(before=f"rows = {rows}"), tmp_path)
    assert values(found).get("num_train_problems") == limit
    assert left_out in notes(found, Kind.LEFT_OUT)


def test_abacists_own_settings_are_not_a_scripts_to_give(tmp_path: Path) -> None:
    given = "overwrite=True, force=True, allow_hackable_rewards=True, num_heldout_problems=0"
    found = imported(script(arguments=given), tmp_path)
    assert not {"overwrite", "force", "allow_hackable_rewards", "num_heldout_problems"} & set(
        values(found)
    )
    assert notes(found, Kind.LEFT_OUT).count("TRL has no such setting") == 4


def test_dictionaries_are_settings_too(tmp_path: Path) -> None:
    given = 'chat_template_kwargs={"enable_thinking": False}, lr_scheduler_kwargs=dict(a=(1, 2))'
    found = values(imported(script(arguments=given), tmp_path))
    assert found["chat_template_kwargs"] == {"enable_thinking": False}
    assert found["lr_scheduler_kwargs"] == {"a": [1, 2]}


def test_a_batch_that_cannot_be_known_is_not_judged(tmp_path: Path) -> None:
    given = "per_device_train_batch_size=int(input()), num_generations=16"
    found = imported(script(arguments=given), tmp_path)
    assert "holds no whole groups" not in notes(found, Kind.WRONG)
    assert values(found)["per_device_train_batch_size"] == 16


def test_what_trl_took_by_default_is_named_and_kept_by_a_faithful_import(tmp_path: Path) -> None:
    found = imported(script(arguments="temperature=0.7"), tmp_path)
    changed = notes(found, Kind.CHANGED)
    assert "loss_type is not set: TRL's default was grpo and is dapo now" in changed
    assert "temperature" not in changed and "beta" not in values(found)
    kept = values(imported(script(arguments="temperature=0.7"), tmp_path, faithful=True))
    assert (kept["beta"], kept["loss_type"], kept["temperature"]) == (0.04, "grpo", 0.7)


def test_only_what_is_wrong_is_blamed(tmp_path: Path) -> None:
    before = """
def texts(completions):
    return [one[0]["content"] for one in completions]

def unpaid(completions, **columns):
    return [0.0 for _ in texts(completions)]

WEIGHTS = load(revision="0123456789abcdef0123456789abcdef01234567")
KEY = "0123456789abcdef0123456789abcdef01234568"
"""
    told = notes(imported(script(before=before), tmp_path), Kind.WRONG)
    assert "unpaid is defined and not paid" in told and "texts is defined" not in told
    assert told.count("revoke it") == 1


def test_weights_of_another_number_than_the_rewards_are_named(tmp_path: Path) -> None:
    found = imported(script(arguments="reward_weights=[1.0, 2.0]"), tmp_path)
    assert "2 reward_weights for 1 rewards: TRL refuses that" in notes(found, Kind.WRONG)


def test_a_reward_of_a_module_is_trls_only_if_it_comes_from_trl(tmp_path: Path) -> None:
    theirs = "from trl.rewards import accuracy_reward\n"
    found = imported(script(before=theirs, rewards="[accuracy_reward]"), tmp_path)
    assert values(found)["reward_funcs"] == ["correctness"]
    another = "from rewards import accuracy_reward\n"
    with pytest.raises(UsageError, match="not beside the script"):
        imported(script(before=another, rewards="[accuracy_reward]"), tmp_path)


def test_a_format_cannot_ask_for_gigabytes() -> None:
    for text in ('"{0:{1}}".format("a", 2000000000)', '"{:2000000000}".format("a")'):
        reader = Reader(ast.parse(f"x = {text}"))
        assert isinstance(reader.module.names["x"].value, Unknown)
    narrow = Reader(ast.parse('x = "{:>4}|{}".format("a", 1)'))
    assert narrow.module.names["x"].value == "   a|1"


def test_the_recipe_gist_and_an_imported_one_take_the_same_steps() -> None:
    recipe = load_config("gist", None, ["--use_cpu", "--report_to", "none"]).settings
    found = values(import_gist(GISTS / "one_file.py", faithful=True))
    names = ["per_device_train_batch_size", "gradient_accumulation_steps", "num_generations",
             "beta", "temperature", "loss_type"]  # fmt: skip
    assert [recipe.get(name) for name in names] == [found.get(name) for name in names]
