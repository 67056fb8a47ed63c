"""What a script says in other ways is read or named, and nothing false is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abacist.delivery.importing.importing import Imported
from abacist.delivery.importing.notes import Kind
from abacist.errors import UsageError
from unit.test_import_gist import imported, notes, script, values

SYSTEM = "Write <reasoning>steps</reasoning> and <answer>number</answer>."
MESSAGES = '[{"role": "system", "content": SYS}, {"role": "user", "content": q}]'


def everything(found: Imported) -> str:
    return "\n".join(notes(found, kind) for kind in Kind)


def mapped(define: str, step: str, **options: str) -> str:
    """A script whose rows are mapped: ``define`` stands above, ``step`` is what is called."""
    before = (
        f"SYS = {SYSTEM!r}\n"
        "def gold(text): return text.split('####')[-1].strip().replace(',', '')\n"
        f"def chat(q): return {MESSAGES}\n{define}\nrows = rows.{step}"
    )
    return script(before, **options)


def rewards_of(found: Imported) -> dict[str, Any]:
    module: dict[str, Any] = {}
    exec(found.files["_rewards.py"], module)
    return module


# --- the prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("define", "step"),
    [
        ("def f(x):\n    x['prompt'] = chat(x['question'])\n    return x", "map(f)"),
        ("def f(x):\n    x.update(prompt=chat(x['question']))\n    return x", "map(f)"),
        ("def f(x):\n    y = dict(x)\n    y['prompt'] = chat(y.pop('question'))\n    return y",
         "map(f)"),
        ("", "map(lambda x: {**x, 'prompt': chat(x['question'])})"),
        ("", "map(lambda x: x | {'prompt': chat(x.get('question'))})"),
        ("", "map(lambda x: dict(x, prompt=chat(x['question'])))"),
        ("from functools import partial\n"
         "def f(x, system): return {'prompt': [{'role': 'system', 'content': system}]}",
         "map(partial(f, system=SYS))"),
        ("import functools\ndef f(system, x): return {'prompt': [{'role': 'system', "
         "'content': system}, {'role': 'user', 'content': x['question']}]}",
         "map(functools.partial(f, SYS))"),
        ("def f(x, system): return {'prompt': [{'role': 'system', 'content': system}]}",
         "map(f, fn_kwargs={'system': SYS})"),
        ("def f(q): return {'prompt': chat(q)}", "map(f, input_columns=['question'])"),
        ("def f(x, i): return {'prompt': chat(x['question'])}", "map(f, with_indices=True)"),
        ("def f(b): return {'prompt': [chat(q) for q in b['question']]}", "map(f, batched=True)"),
        ("def f(b):\n    out = []\n    for q, a in zip(b['question'], b['answer']):\n"
         "        out.append(chat(q))\n    return {'prompt': out}", "map(f, batched=True)"),
        ("def f(b):\n    out = {'prompt': []}\n    for i in range(len(b['question'])):\n"
         "        out['prompt'].append(chat(b['question'][i]))\n    return out",
         "map(f, batched=True)"),
        ("def f(b):\n    b['prompt'] = [chat(q) for i, q in enumerate(b['question'])]\n"
         "    return b", "map(f, batched=True)"),
        ("def first(x): return {'q': x['question']}",
         "map(first).map(lambda x: {'prompt': chat(x['q'])})"),
        ("", "rename_column('question', 'problem')"
             ".map(lambda x: {'prompt': chat(x['problem'])})"),
        ("class Task:\n    def __init__(self, system): self.system = system\n"
         "    def f(self, x): return {'prompt': [{'role': 'system', 'content': self.system}]}",
         "map(Task(SYS).f)"),
        # plain text, with the question in it
        ("T = SYS + '\\n\\nQ: {q}\\n'", "map(lambda x: {'prompt': T.format(q=x['question'])})"),
        ("T = SYS + '\\n{}'", "map(lambda x: {'prompt': T.format(x['question'])})"),
        ("T = SYS + '\\nQ: %q'", "map(lambda x: {'prompt': T.replace('%q', x['question'])})"),
        ("", "map(lambda x: {'prompt': '\\n'.join([SYS, x['question']])})"),
        ("", "map(lambda x: {'prompt': f'{SYS}\\nQuestion: {x[\"question\"]}'})"),
        ("", "map(lambda x: {'prompt': SYS + '\\n' + x['question'].strip()})"),
        # the instructions in the user's turn
        ("", "map(lambda x: {'prompt': [{'role': 'user', 'content': SYS + '\\n' + x['question']}]})"
         ),
        ("", "map(lambda x: {'prompt': [dict(role='user', content=f'{SYS} {x[\"question\"]}')]})"),
    ],
)  # fmt: skip
def test_the_system_text_is_read_however_the_rows_are_mapped(
    define: str, step: str, tmp_path: Path
) -> None:
    found = imported(mapped(define, step), tmp_path)
    assert values(found)["system_prompt"] == SYSTEM
    assert "question_column" not in values(found)


@pytest.mark.parametrize(
    "imports",
    ["from prompts import f", "import prompts\nf = prompts.f", "from prompts import *",
     "from prompts import f as g\nf = g"],
)  # fmt: skip
def test_a_function_of_a_module_beside_the_script_is_followed_with_its_lines(
    imports: str, tmp_path: Path
) -> None:
    (tmp_path / "texts.py").write_text(f"SYS = {SYSTEM!r}\n", encoding="utf-8")
    (tmp_path / "prompts.py").write_text(
        "from texts import SYS\n\n\ndef f(x):\n"
        "    return {'prompt': [{'role': 'system', 'content': SYS},\n"
        "                       {'role': 'user', 'content': 'Problem: ' + x['question']}]}\n",
        encoding="utf-8",
    )
    found = imported(script(f"{imports}\nrows = rows.map(f)"), tmp_path)
    assert values(found)["system_prompt"] == SYSTEM
    assert "prompts.py, line 6: the words around the question" in notes(found, Kind.LEFT_OUT)
    assert "# prompts.py, line 5" in found.text_for(tmp_path / "x.yaml")


def test_a_module_beside_the_script_does_not_take_its_name(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text("STEPS = 7\n", encoding="utf-8")
    body = script("", "max_steps=STEPS").replace("\n", "\n    ")
    text = f"from steps import *\nif __name__ == '__main__':\n    {body}"
    assert values(imported(text, tmp_path))["max_steps"] == 7


def test_constants_of_a_module_beside_the_script_are_read(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text(
        "STEPS = 70\nKW = {'beta': 0.02}\nif __name__ == '__main__':\n    STEPS = 1\n",
        encoding="utf-8",
    )
    before = "from settings import STEPS\nimport settings"
    found = values(imported(script(before, "max_steps=STEPS, **settings.KW"), tmp_path))
    assert (found["max_steps"], found["beta"]) == (70, 0.02)


@pytest.mark.parametrize(
    ("define", "step", "said"),
    [
        ("from far.away import f", "map(f)", "what far.away.f makes of a row"),
        ("from far.away import build", "map(lambda x: {'prompt': build(x['question'])})",
         "the prompt is computed"),
        ("def f(x):\n    return far(x)", "map(f)", "what f makes of a row"),
        ("def f(x): return {'prompt': chat(x['question']) + [far(x)]}", "map(f)",
         "a turn of the prompt is computed"),
        ("def f(x, s): return {'prompt': [{'role': 'system', 'content': s}]}",
         "map(f, fn_kwargs=far())", "the system text is computed"),
        ("", "map(lambda x: {'prompt': [{'role': 'system', 'content': far(SYS)}]})",
         "the system text is computed"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_not_read_is_named_with_the_flag_that_gives_one(
    define: str, step: str, said: str, tmp_path: Path
) -> None:
    found = imported(mapped(define, step), tmp_path)
    told = notes(found, Kind.LEFT_OUT)
    assert said in told and "--system_prompt" in told
    assert "plain text" not in everything(found)
    assert "no system text asks" not in everything(found)


def test_the_words_around_the_question_are_named(tmp_path: Path) -> None:
    step = "map(lambda x: {'prompt': f'{SYS}\\nQ: {x[\"question\"]} Think!\\nA:'})"
    told = notes(imported(mapped("", step), tmp_path), Kind.LEFT_OUT)
    assert "the words around the question ('Q:', 'Think!\\nA:')" in told


# --- what a reward is handed ----------------------------------------------------------------------

CHAT = "map(lambda x: {'prompt': chat(x['question'])%s})"
TEXT = "map(lambda x: {'prompt': SYS + x['question'], 'answer': gold(x['answer'])})"


@pytest.mark.parametrize(
    ("reward", "step"),
    [
        # GSM8K's answer as it stands
        ("def mine(completions, answer, **k):\n    return [float(gold(a) in c[0]['content'] and "
         "'####' in a) for c, a in zip(completions, answer)]", CHAT % ""),
        ("import re\nGOLD = re.compile(r'#### (-?[0-9.]+)')\n"
         "def number(a): return GOLD.search(a)[1]\n"
         "def mine(completions, answer, **k):\n    return [float(number(a) in c[0]['content']) "
         "for c, a in zip(completions, answer)]", CHAT % ""),
        ("def mine(completions, solution, **k):\n    return [float(a.split('\\n#### ')[1] in "
         "c[0]['content']) for c, a in zip(completions, solution)]",
         "rename_column('answer', 'solution')." + CHAT % ""),
        # the gold under another name
        ("def mine(completions, ground_truth, **k):\n    return [float(c[0]['content'][-1] == g) "
         "for c, g in zip(completions, ground_truth)]",
         CHAT % ", 'ground_truth': gold(x['answer'])"),
        ("def mine(*, completions, target, **k):\n    return [float(c[-1]['content'][-1] == g) "
         "for c, g in zip(completions, target)]", CHAT % ", 'target': gold(x['answer'])"),
        # texts
        ("def mine(completions, answer, **k):\n    return [float(c.endswith(a)) for c, a in "
         "zip(completions, answer)]", TEXT),
        ("def mine(prompts, completions, answer, **k):\n    return [float(c.endswith(a) and "
         "p.endswith('?')) for p, c, a in zip(prompts, completions, answer)]", TEXT),
    ],
)  # fmt: skip
def test_a_reward_that_asks_for_something_else_gets_it_and_pays(
    reward: str, step: str, tmp_path: Path
) -> None:
    found = imported(mapped(reward, step, rewards="[mine]"), tmp_path)
    assert values(found)["reward_funcs"] == ["_rewards.py:mine"]
    asked = [[{"role": "user", "content": "How many?"}]]
    replied = [[{"role": "assistant", "content": "It is 5"}]]
    mine = rewards_of(found)["mine"]
    assert mine.__name__ == "mine"
    assert mine(prompts=asked, completions=replied, answer=["5"], problem_id=["a"]) == [1.0]
    assert mine(prompts=asked, completions=replied, answer=["6"], problem_id=["a"]) == [0.0]
    assert "it is handed" in notes(found, Kind.CHANGED)


def test_a_reward_that_asks_for_what_it_gets_is_taken_out_as_it_is(tmp_path: Path) -> None:
    reward = (
        "def mine(completions, answer, n=3, **k):\n"
        "    return [len(c[0]['content']) / n for c in completions]"
    )
    step = CHAT % ", 'answer': gold(x['answer'])"
    found = imported(mapped(reward, step, rewards="[mine]"), tmp_path)
    assert "as_in_script" not in found.files["_rewards.py"]
    assert "it is handed" not in everything(found)


def test_a_column_that_the_script_computes_keeps_a_reward_out_by_name(tmp_path: Path) -> None:
    reward = "def mine(completions, level, **k): return [0.0 for c in completions]"
    step = CHAT % ", 'level': len(x['question'])"
    found = imported(mapped(reward, step, rewards="[right, mine]"), tmp_path)
    assert "mine: its column level is made by the script" in notes(found, Kind.LEFT_OUT)


def test_a_reward_that_cannot_see_the_reply_is_wrong(tmp_path: Path) -> None:
    reward = "def mine(completions, **k): return [-abs(20 - len(c)) for c in completions]"
    found = imported(mapped(reward, CHAT % "", rewards="[right, mine]"), tmp_path)
    assert "mine never reads the content of a message" in notes(found, Kind.WRONG)
    both = reward.replace("len(c)", "len(c if isinstance(c, str) else c[0]['content'])")
    for step in (CHAT % "", TEXT):
        found = imported(mapped(both, step, rewards="[right, mine]"), tmp_path)
        assert "message" not in notes(found, Kind.WRONG)


# --- several trainings ----------------------------------------------------------------------------


def test_other_trainings_are_named_and_their_rewards_are_not_called_unpaid(tmp_path: Path) -> None:
    before = (
        "from trl import SFTTrainer\nSFTTrainer(model='x').train()\n"
        "def early(completions, **k): return [0.0 for c in completions]\n"
        "GRPOTrainer(model='x', reward_funcs=[early], args=GRPOConfig('a'), train_dataset=rows)"
    )
    found = imported(script(before), tmp_path)
    told = notes(found, Kind.LEFT_OUT)
    assert "line 8: SFTTrainer: a training of its own" in told
    assert "line 10: GRPOTrainer: a training of its own" in told
    assert "--model_name_or_path" in told
    assert "early" not in notes(found, Kind.WRONG)
    assert values(found)["reward_funcs"] == ["correctness"]


def test_a_trainer_that_a_loop_builds_is_named_once(tmp_path: Path) -> None:
    text = script().replace("trainer = ", "for seed in (1, 2, 3):\n  trainer = ")
    text = text.replace('"out", ', '"out", seed=seed').replace(
        "trainer.train()", "  trainer.train()"
    )
    found = imported(text, tmp_path)
    assert values(found)["seed"] == 3
    assert notes(found, Kind.LEFT_OUT).count("is built several times") == 1


# --- settings that are changed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "arguments", "value"),
    [
        ("kw = {'num_iterations': 3, 'top_k': 5}\nkw.pop('top_k')", "**kw", 3),
        ("kw = dict(top_k=2)\nkw.setdefault('num_iterations', 3)", "**kw", 3),
        ("kw = dict(num_iterations=3)\nkw.setdefault('num_iterations', 9)", "**kw", 3),
        ("kw = {'a': 3}\nkw['num_iterations'] = kw.pop('a')", "**kw", 3),
        ("kw = {'num_iterations': 9}\nkw.update(num_iterations=3)", "**kw", 3),
        ("kw = {}\nkw.update([('num_iterations', 3)])", "**kw", 3),
        ("kw = dict({'num_iterations': 9}, num_iterations=3)", "**kw", 3),
        ("kw = {'num_iterations': 3}\nother = kw.copy()\nother['num_iterations'] = 9", "**kw", 3),
        ("import copy\nkw = {'num_iterations': 3}\ncopy.copy(kw)['num_iterations'] = 9",
         "**kw", 3),
        ("kw = {'num_iterations': 3}\ndef change(d): d |= {'num_iterations': 4}\nchange(kw)",
         "**kw", 4),
        ("kw = {k: v for k, v in {'num_iterations': 3, 'top_k': None}.items() if v}", "**kw", 3),
        ("kw = {'top_k': 1, 'num_iterations': 3}\ndel kw['top_k']", "**kw", 3),
        ("n = 0\nfor one in (1, 2): n += one", "num_iterations=n", 3),
        ("match 'b':\n    case 'a':\n        n = 1\n    case _:\n        n = 3",
         "num_iterations=n", 3),
        ("class C:\n    n = 2\n    @property\n    def more(self): return self.n + 1",
         "num_iterations=C().more", 3),
        ("", "num_iterations=1 << 2", 4),
    ],
)  # fmt: skip
def test_settings_are_read_however_a_dict_is_changed(
    before: str, arguments: str, value: int, tmp_path: Path
) -> None:
    found = values(imported(script(before, arguments), tmp_path))
    assert found["num_iterations"] == value
    assert "top_k" not in found or "top_k=2" in before


def test_the_line_of_a_setting_is_known_through_the_functions_that_hand_it_on(
    tmp_path: Path,
) -> None:
    before = (
        "def make(**more): return GRPOConfig('out', **more)\n"
        "config = make(\n    beta=0.2,\n    num_iterations=3,\n)"
    )
    text = script(before).replace('GRPOConfig("out", )', "config")
    found = imported(text, tmp_path).settings["num_iterations"]
    assert found.value == 3
    assert text.split("\n")[(found.line or 0) - 1].strip() == "num_iterations=3,"


CONFIG = "config = GRPOConfig('out', num_iterations=2, beta=0.1)\n"


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ("setattr(config, 'num_iterations', 5)", 5),
        ("for k, v in {'num_iterations': 5}.items(): setattr(config, k, v)", 5),
        ("from dataclasses import replace\nconfig = replace(config, num_iterations=5)", 5),
        ("import dataclasses as d\nother = d.replace(config, num_iterations=5)", 2),
        ("import copy\nother = copy.deepcopy(config)\nother.num_iterations = 5", 2),
        ("config.num_iterations = getattr(config, 'num_iterations') + 3", 5),
        ("if 1 > 0: config.num_iterations = 5", 5),
        ("if far():\n    config.num_iterations = 5\nelse:\n    config.num_iterations = 5", 5),
        ("if far(): config.num_iterations = 5", None),
        ("if far():\n    config.num_iterations = 5\nelse:\n    config.num_iterations = 6", None),
        ("while far(): config.num_iterations *= 2", None),
        ("for n in far(): config.num_iterations = n", None),
        ("setattr(config, 'num_iterations', far())", None),
    ],
)  # fmt: skip
def test_a_configuration_is_read_as_it_is_when_it_is_given(
    lines: str, value: int | None, tmp_path: Path
) -> None:
    text = script(CONFIG + lines).replace('GRPOConfig("out", )', "config")
    found = imported(text, tmp_path)
    assert values(found).get("num_iterations") == value
    assert values(found)["beta"] == 0.1
    assert ("num_iterations: its value" in notes(found, Kind.LEFT_OUT)) is (value is None)


@pytest.mark.parametrize(
    ("before", "arguments"),
    [
        ("kw = {}\nkw.update(far())", "**kw"),
        ("kw = {}\nfor k in far(): kw[k] = 1", "**kw"),
        ("kw = {**far()}", "**kw"),
        ("kw = {'a': 1}\nkw |= far()", "**kw"),
        ("", "**far()"),
    ],
)
def test_settings_whose_names_are_not_told_are_named(
    before: str, arguments: str, tmp_path: Path
) -> None:
    told = notes(imported(script(before, arguments), tmp_path), Kind.LEFT_OUT)
    assert "further settings" in told


def test_settings_on_the_object_whose_names_are_not_told_are_named(tmp_path: Path) -> None:
    for line in ("for k, v in far().items(): setattr(config, k, v)",
                 "config.set_training(learning_rate=1e-3)"):  # fmt: skip
        text = script(CONFIG + line).replace('GRPOConfig("out", )', "config")
        told = notes(imported(text, tmp_path), Kind.LEFT_OUT)
        assert "condition" not in told
        assert "further settings" in told or "set_training(): what it sets is not read" in told


def test_a_value_that_is_set_and_not_told_is_not_called_unset(tmp_path: Path) -> None:
    text = script("", "max_completion_length=far(), max_prompt_length=far(), no_such=far()")
    found = imported(text, tmp_path)
    told = everything(found)
    assert "max_completion_length is not set" not in told
    assert "max_completion_length: its value is computed" in told
    assert "--max_prompt_length" not in told and "--no_such" not in told
    assert "max_prompt_length: TRL has no such setting" in told
    assert "max_completion_length" not in values(imported(text, tmp_path, faithful=True))


@pytest.mark.parametrize("setting", ["label_names=[]", "reward_weights=[]", "report_to=[]"])
def test_an_empty_list_is_no_reason_to_refuse(setting: str, tmp_path: Path) -> None:
    found = imported(script("", setting), tmp_path)
    assert [] not in values(found).values()


# --- LoRA -----------------------------------------------------------------------------------------

LORA = (
    "from peft import LoraConfig, get_peft_model\n"
    "lora = LoraConfig(r=32, target_modules='all-linear')"
)
MODEL = "from transformers import AutoModel\nmodel = AutoModel.from_pretrained('Qwen/Qwen2.5-0.5B')"


@pytest.mark.parametrize(
    ("before", "argument"),
    [
        ("", "lora if far() else None"),
        ("use = None\nif far(): use = lora", "use"),
        ("if far():\n    use = lora\nelse:\n    use = None", "use"),
        ("def pick(on):\n    if on:\n        return lora\n    return None", "pick(far())"),
        ("", "far(lora)"),
        ("kw = {}\nif far(): kw['peft_config'] = lora", "**kw"),
    ],
)
def test_lora_that_a_condition_decides_on_is_not_called_given_to_nothing(
    before: str, argument: str, tmp_path: Path
) -> None:
    given = argument if argument.startswith("**") else f"peft_config={argument}"
    text = script(f"{LORA}\n{before}").replace(
        "train_dataset=rows,", f"train_dataset=rows, {given},"
    )
    for faithful in (False, True):
        found = imported(text, tmp_path, faithful=faithful)
        assert "given to nothing" not in everything(found)
        if "far(lora)" not in text and "pick" not in text:
            assert (values(found)["use_peft"], values(found)["lora_r"]) == (True, 32)
            assert "whether LoRA is used depends" in notes(found, Kind.CHANGED)


def test_one_of_two_loras_is_taken_and_named(tmp_path: Path) -> None:
    given = "train_dataset=rows, peft_config=lora if far() else LoraConfig(r=8),"
    found = imported(script(LORA).replace("train_dataset=rows,", given), tmp_path)
    assert values(found)["lora_r"] == 32
    assert "which of several LoRA configurations" in notes(found, Kind.CHANGED)
    assert "whether LoRA is used" not in everything(found)


def test_a_model_that_gets_lora_by_a_condition(tmp_path: Path) -> None:
    before = f"{LORA}\n{MODEL}\nif far(): model = get_peft_model(model, lora)"
    text = script(before).replace('model="Qwen/Qwen2.5-0.5B-Instruct"', "model=model")
    found = imported(text, tmp_path)
    assert values(found)["model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    assert values(found)["lora_r"] == 32
    assert "whether LoRA is used depends" in notes(found, Kind.CHANGED)
    assert "given to nothing" not in everything(found)


def test_lora_behind_an_option_that_is_off_is_named(tmp_path: Path) -> None:
    before = (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lora', "
        "action='store_true')\na = p.parse_args()\nfrom peft import LoraConfig"
    )
    given = "train_dataset=rows, peft_config=LoraConfig(r=8) if a.lora else None,"
    found = imported(script(before).replace("train_dataset=rows,", given), tmp_path)
    assert values(found)["use_peft"] is False
    assert "--use_peft uses LoRA" in notes(found, Kind.LEFT_OUT)
    assert "given to nothing" not in everything(found)


# --- rewards that are written otherwise -----------------------------------------------------------

JUDGE = "class Judge:\n    def __call__(self, completions, **k): return [0.0]\n"
BASE = "def base(completions, scale=1.0, **k): return [scale for c in completions]\n"


@pytest.mark.parametrize(
    ("before", "reward"),
    [
        (JUDGE, "Judge()"),
        (f"{BASE}from functools import partial", "partial(base, scale=0.5)"),
        (f"{BASE}def wrap(f):\n    def inner(completions, **k): return f(completions)\n"
         "    return inner", "wrap(base)"),
        ("def keep(f):\n    KEPT.append(f)\n    return f\nKEPT = []\n@keep\n"
         "def base(completions, **k): return [0.0]", "base"),
        (f"{BASE}ALL = {{'base': base}}\nimport sys", "ALL[sys.argv[1]]"),
        (f"{BASE}import sys", "globals()['base']"),
        (f"{BASE}import sys", "base if sys.argv[1:] else right"),
        (f"{BASE}class Task:\n    def judge(self, completions, **k): return base(completions)",
         "Task().judge"),
    ],
)  # fmt: skip
def test_a_reward_that_is_used_in_another_way_is_not_called_unpaid(
    before: str, reward: str, tmp_path: Path
) -> None:
    found = imported(script(before, rewards=f"[right, {reward}]"), tmp_path)
    assert "not paid" not in everything(found)
    assert values(found)["reward_funcs"] == ["correctness"]
    assert len(found.of_kind(Kind.LEFT_OUT)) > 1  # the folder, and the reward


def test_a_reward_behind_an_option_that_is_off_is_named(tmp_path: Path) -> None:
    before = f"{BASE}DEBUG = False\npaid = [right]\nif DEBUG:\n    paid.append(base)"
    found = imported(script(before, rewards="paid"), tmp_path)
    assert "base: it is paid only under a condition" in notes(found, Kind.LEFT_OUT)
    assert "base" not in notes(found, Kind.WRONG)


@pytest.mark.parametrize(
    ("before", "rewards"),
    [
        ("ALL = {'a': right, 'b': base}", "list(ALL.values())"),
        ("ALL = {'a': right, 'b': base}", "[ALL[name] for name in ('a', 'b')]"),
        ("ALL = {'a': right, 'b': base}", "[*ALL.values()]"),
        ("ALL = [(right, 1), (base, 2)]", "[f for f, weight in ALL]"),
        ("ALL = [right]\nALL += [base]", "ALL"),
        ("ALL = [base]\nALL.insert(0, right)", "ALL"),
        ("ALL = [right, base, base]\nALL.pop()", "ALL"),
        ("ALL = []\nfor one in (right, base): ALL.append(one)", "ALL"),
        ("def choose(*all): return list(all)", "choose(right, base)"),
    ],
)
def test_a_list_of_rewards_is_read_however_it_is_made(
    before: str, rewards: str, tmp_path: Path
) -> None:
    found = imported(script(f"{BASE}{before}", rewards=rewards), tmp_path)
    assert values(found)["reward_funcs"] == ["correctness", "_rewards.py:base"]


@pytest.mark.parametrize("rewards", ["[f for f in far()]", "far", "sorted(far())", "[]"])
def test_a_list_of_rewards_that_is_not_told_is_asked_for(rewards: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line \d+.*rewards") as error:
        imported(script("far = far()", rewards=rewards), tmp_path)
    assert "reward_funcs" in str(error.value.hint)


def test_rewards_of_a_module_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text(
        "def plain(completions, **k): return [c[0]['content'].count('=') for c in completions]\n"
        "def other(completions, **k): return [len(c.split('<SOLUTION>')) for c in completions]\n"
        "def named(completions, truth, **k): return [0.0 for c in completions]\n"
        "class Lib:\n    @staticmethod\n    def judge(completions, **k): return [0.0]\n"
        "unpaid = lambda completions, **k: [0.0]\n",
        encoding="utf-8",
    )
    before = "import judges\nfrom judges import Lib, plain"
    step = CHAT % ", 'truth': gold(x['answer'])"
    rewards = "[right, plain, judges.other, judges.named, Lib.judge, judges.Lib.judge]"
    found = imported(mapped(before, step, rewards=rewards), tmp_path)
    assert values(found)["reward_funcs"][1:] == [f"{tmp_path.resolve()}/judges.py:plain"]
    told = everything(found)
    assert "not beside the script" not in told and "not paid" not in told
    assert "other of judges.py looks for <SOLUTION>" in told
    assert "named of judges.py is handed the gold as truth in the script" in told
    assert "judge of judges.py is a method of the class Lib" in told


# --- what is chosen where the text leaves it open -------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train_dataset=rows", "train_dataset=far(rows) if far() else rows", "which rows"),
        ('GRPOConfig("out", )', "GRPOConfig('a') if far() else GRPOConfig('b')",
         "which GRPOConfig"),
        ("train_dataset=rows,", "train_dataset=rows, **far()", "further arguments of the trainer"),
    ],
)  # fmt: skip
def test_a_choice_that_the_text_leaves_open_is_named(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    found = imported(script().replace(old, new), tmp_path)
    assert said in everything(found)
    if said.startswith("further"):
        assert "nothing is measured" not in everything(found)
