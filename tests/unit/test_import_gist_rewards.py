"""Which rewards of a script are known, and how its own are taken out of it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from abacist.delivery.importing.notes import Kind
from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.script_rewards import look_at, recognise
from abacist.errors import UsageError
from unit.test_import_gist import GISTS, imported, notes, script, values


def recognised(text: str) -> str | None:
    reader = Reader(ast.parse(text))
    function = reader.functions[-1]
    found = recognise(look_at(function, reader))
    return found.name if found else None


HEAD = "import re\nfrom math import exp\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # renamed, in loops, through helpers, by other means
        ("def a(completions, gold, **k):\n    out = []\n    for c, g in zip(completions, gold):\n"
         "        if c == g:\n            out.append(2.0)\n        else:\n"
         "            out.append(0.0)\n    return out", "correctness"),
        ("def a(completions, answer, **k):\n    return [2.0 * (c == a) for c, a in "
         "zip(completions, answer)]", "correctness"),
        ("def a(completions, **k):\n    return [0.5 if re.fullmatch('<reasoning>\\n.+\\n"
         "</reasoning>\\n<answer>\\n.+\\n</answer>', c) else 0.0 for c in completions]",
         "strict_format"),
        ("P = '<reasoning>.*</reasoning>.*<answer>.*</answer>'\ndef a(completions, **k):\n"
         "    return [0.5 if re.search(P, c, re.S) else 0.0 for c in completions]", "soft_format"),
        ("def a(completions, **k):\n    return [0.5 if c.strip().isnumeric() else 0.0 "
         "for c in completions]", "integer"),
        # the same names, another thing
        ("def correctness_reward_func(completions, answer, **k):\n    return [2.0 if c == a else "
         "1.0 if a in c else 0.0 for c, a in zip(completions, answer)]", None),
        ("def correctness_reward_func(completions, answer, **k):\n    return [2.0 if "
         "abs(float(c) - float(a)) < 1 else 0.0 for c, a in zip(completions, answer)]", None),
        ("def int_reward_func(completions, **k):\n    return [len(c) / 100 for c in completions]",
         None),
        ("def a(completions, answer, **k):\n    return [2.0 if eval(c) == a else 0.0 "
         "for c, a in zip(completions, answer)]", None),
        ("def a(completions, **k):\n    return [exp(-len(c)) for c in completions]", None),
        ("def a(completions, **k):\n    return [0.5 if '=' in c else 0.0 for c in completions]",
         None),
    ],
)  # fmt: skip
def test_a_reward_is_known_by_what_it_does_and_not_by_its_name(text: str, name: str | None) -> None:
    assert recognised(HEAD + text) == name


def paying(expression: str, columns: str = "answer") -> str:
    names = columns.replace(" ", "")
    loop = "r, a" if "," not in names else "r, a, difficulty"
    return (
        f"{HEAD}P = '<reasoning>.*</reasoning>.*<answer>.*</answer>'\n"
        f"def mine(completions, {columns}, **k):\n"
        f"    return [{expression} for {loop} in zip(completions, {columns})]"
    )


@pytest.mark.parametrize(
    "expression",
    [
        # the branch that pays is the other one
        "0.0 if r == a else 2.0", "2.0 if r != a else 0.0", "2.0 if not r == a else 0.0",
        "-2.0 * (r == a)", "0.0 if r.isdigit() else 0.5", "0.0 if re.match(P, r) else 0.5",
        "0.5 if re.match(P, r) is None else 0.0",
        # something else is equal, or more is asked for
        "2.0 if len(r) == len(a) else 0.0", "2.0 if len(r) == 3 else 0.0",
        "2.0 if r == a and len(r) > 100 else 0.0", "2.0 if r == a or len(r) == 3 else 0.0",
        "2.0 if r.lower() == a.lower() else 0.0", "2.0 if int(r) == int(a) else 0.0",
        "2.0 if r[:3] == a else 0.0", "2.0 if r[0] == a else 0.0", "2.0 if a == a else 0.0",
        "2.0 if r == '7' else 0.0", "2.0 if r == a[0] else 0.0", "2.0 if r == a != '' else 0.0",
        "2.0 if r in a else 0.0", "2.0 * (r == a) + 0.1", "2.0 if r == a else len(r)",
        # digits: somewhere, or in no answer
        "0.5 if any(one.isdigit() for one in r) else 0.0", "0.5 if len(r) < int(500) else 0.0",
        "0.5 if r[0].isdigit() else 0.0", "0.5 if r[-1].isdigit() else 0.0",
        "0.5 if r.isdigit() and len(r) > 2 else 0.0", "0.5 if a.isdigit() else 0.0",
        # patterns: another order, more than the layout, not the reply
        "0.5 if re.match('<answer>.*</answer>.*<reasoning>.*</reasoning>', r) else 0.0",
        "0.5 if re.match('<reasoning>.*</reasoning>.*<answer>\\\\d+</answer>', r) else 0.0",
        "0.5 if re.match('<reasoning>.{99,}</reasoning>.*<answer>.*</answer>', r) else 0.0",
        "0.5 if re.match('<reasoning>.*</reasoning>|<answer>.*</answer>', r) else 0.0",
        "0.5 if re.match('(?!<reasoning>.*</reasoning><answer>.*</answer>)', r) else 0.0",
        "0.5 if re.match(P, a) else 0.0", "0.5 if len(re.findall(P, r)) == 1 else 0.0",
    ],
)  # fmt: skip
def test_a_reward_that_pays_for_anything_else_is_the_scripts_own(expression: str) -> None:
    assert recognised(paying(expression)) is None


def test_another_column_in_the_condition_is_the_scripts_own() -> None:
    pays = "2.0 if r == a and difficulty > 3 else 0.0"
    assert recognised(paying(pays, "answer, difficulty")) is None
    assert recognised(paying("2.0 if r == a else 0.0", "answer, difficulty")) == "correctness"


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("2.0 if r == a else 0.0", "correctness"),
        ("2.0 if a == r.strip() else -1.0", "correctness"),
        ("(r.split('<answer>')[-1] == a.strip()) * 3", "correctness"),
        ("1.0 if re.search('<answer>(.*)</answer>', r).group(1) == a else 0", "correctness"),
        ("0.5 if r.split('<answer>')[-1].isdigit() else 0.0", "integer"),
        ("0.5 if bool(re.match(P, r)) else 0.0", "soft_format"),
        ("0.5 * (re.match(P, r) is not None)", "soft_format"),
    ],
)  # fmt: skip
def test_the_one_positive_shape_is_ours(expression: str, name: str) -> None:
    assert recognised(paying(expression)) == name


COUNTS = """
def tally(text):
    total = 0.0
    if text.count("<reasoning>") == 1:
        total += 0.125
    if text.count("</reasoning>") == 1:
        total += 0.125
    if text.count("<answer>") == 1:
        total {second}
    {more}
    return total
def mine(completions, **k):
    return [tally(c) for c in completions]
"""


@pytest.mark.parametrize(
    ("second", "more", "name"),
    [
        ("+= 0.125", "pass", "xml_count"),
        ("-= 0.125", "pass", None),
        ("+= -0.125", "pass", None),
        ("+= 0.5", "pass", None),
        ("+= 0.125", "if len(text) > 200: total += 1.0", None),
        ("+= 0.125", "total += 1.0", None),
        ("+= 0.125", "if text.count('<answer>') == 2: total += 0.125", None),
        ("+= 0.125", "if text.count('please') == 1: total += 0.125", None),
        ("+= 0.125", "total = total * len(text)", None),
    ],
)
def test_tags_are_counted_where_all_that_is_paid_is_equal_and_for_a_tag(
    second: str, more: str, name: str | None
) -> None:
    assert recognised(COUNTS.format(second=second, more=more)) == name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.0 if one == gold", "2.0 if one.strip('.') == gold"),
        ('.split("<answer>")[-1]', '.split("<answer>")[0]'),
        ("one.isdigit()", "one.isdecimal()"),
        ("re.match(pattern", "re.search(pattern"),
        ("- 1) * 0.001", "- 2) * 0.001"),
        ("* 0.001", "* 0.01"),
        ('count("\\n<answer>\\n") == 1', 'count("<answer>\\n") == 1'),
    ],
)
def test_a_faithful_import_takes_the_gists_function_only_for_one_that_does_the_same(
    old: str, new: str, tmp_path: Path
) -> None:
    text = (GISTS / "one_file.py").read_text(encoding="utf-8")
    assert old in text
    got = values(imported(text.replace(old, new), tmp_path, faithful=True))["reward_funcs"]
    assert got != ["gist"] and any(one.startswith("_rewards.py:") for one in got)


def test_a_mended_pattern_is_not_blamed(tmp_path: Path) -> None:
    before = (
        "import re\ndef form(completions, **kw):\n"
        "    p = r'^<reasoning>\\n.*?\\n</reasoning>\\n<answer>\\n.*?\\n</answer>$'\n"
        "    return [0.5 if re.match(p, c[0]['content'], {}) else 0.0 for c in completions]"
    )
    blamed, mended = (
        notes(imported(script(before.format(flags), rewards="[right, form]"), tmp_path), Kind.WRONG)
        for flags in ("0", "re.DOTALL")
    )
    assert "re.DOTALL" in blamed and "re.DOTALL" not in mended


def test_a_reward_is_taken_out_with_all_that_it_needs_and_nothing_else(tmp_path: Path) -> None:
    before = (
        "import re, json\nfrom collections import Counter as Many\nimport torch\n"
        "LIMIT = 3\nWORDS = {'so': 1}\nPATTERN = re.compile(rf'\\d{{{LIMIT}}}')\n"
        "def helper(text):\n    # keeps its comment\n"
        "    return len(PATTERN.findall(text)) * WORDS['so']\n"
        "def mine(completions):\n    n = max(1, sum(Many('a').values()))\n"
        "    return [helper(c[0]['content']) / n for c in completions]\n"
        "model = torch.nn.Linear(1, 1)"
    )
    found = imported(script(before, rewards="[right, mine]"), tmp_path)
    text = found.files["_rewards.py"]
    assert "torch" not in text and "json" not in text and "load_dataset" not in text
    assert "# keeps its comment" in text
    module: dict[str, Any] = {}
    exec(text, module)
    assert module["mine"]([[{"content": "123 456 7"}]], answer=["1"]) == [2.0]
    assert "mine takes no **kwargs" in notes(found, Kind.WRONG)


@pytest.mark.parametrize(
    ("before", "reward", "why"),
    [
        ("from transformers import AutoTokenizer\ntok = AutoTokenizer.from_pretrained('x')\n"
         "def mine(completions, **k): return [len(tok(c)) for c in completions]", "mine", "`tok`"),
        ("class Judge:\n    def __call__(self, completions, **k): return [0.0]\n", "Judge()",
         "own class"),
        ("from functools import partial\ndef base(completions, x, **k): return [x]\n",
         "partial(base, x=1)", "partial"),
        ("from far.away import judge", "judge", "far.away.judge"),
        ("def mine(completions, **k): return [nowhere(c) for c in completions]", "mine",
         "`nowhere` is not defined"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_taken_out_is_named_with_what_it_lacks(
    before: str, reward: str, why: str, tmp_path: Path
) -> None:
    found = imported(script(before, rewards=f"[right, {reward}]"), tmp_path)
    assert values(found)["reward_funcs"] == ["correctness"]
    assert why in notes(found, Kind.LEFT_OUT)
    with pytest.raises(UsageError, match="none of the rewards"):
        imported(script(before, rewards=f"[{reward}]"), tmp_path)


NEEDS = "def mine(completions, **k): return [{reads} for c in completions]"


@pytest.mark.parametrize(
    ("before", "reads", "paid"),
    [
        ("W = (1, 2)", "float(W == (1, 2))", 1.0),
        ("W = {1, 2}", "float(W == {2, 1})", 1.0),
        ("W = float('inf')", "float(len(c) < W)", 1.0),
        ("W = -float('inf')", "float(len(c) < W)", 0.0),
        ("import math\nW = math.pi", "W", 3.141592653589793),
        ("W = [1.5, {'a': (1,)}]", "W[1]['a'][0]", 1),
        ("x = 5", "sum(x for x in [1]) + x", 6),
        ("x = 5", "(lambda y: x + y)(1)", 6),
        ("a, b = 1, 2", "a + b", 3),
        ("W = [1]\ndef add(): W.append(2); return len(W)", "add()", 2),
        ("def max(a, b): return 7", "max(1, 2)", 7),
        ("W = frozenset(['a'])", "len(W)", 1),
    ],
)
def test_a_constant_is_taken_out_as_it_is_written(
    before: str, reads: str, paid: float, tmp_path: Path
) -> None:
    found = imported(script(f"{before}\n{NEEDS.format(reads=reads)}", rewards="[mine]"), tmp_path)
    module: dict[str, Any] = {}
    exec(found.files["_rewards.py"], module)
    assert module["mine"](["x"]) == [paid]


@pytest.mark.parametrize(
    "before",
    [
        "W = []\nfor n in range(3): W.append(n)",
        "W = []\nfor n in range(3): W += [n]",
        "W = [3, 1]\nW.sort()", "W = [3, 1]\nW.remove(3)", "W = [3, 1]\nW.pop()",
        "W = {}\nw = 'a'\nW[w] = 1", "W = {}\ndel W['a']", "W = {'a': []}\nW['a'].append(1)",
        "W = []\nV = W\nV.append(1)", "import random\nW = [1, 2]\nrandom.shuffle(W)",
        "W = [[1]]\nfor one in W: one.append(2)", "W = {1}\nW.add(2)", "W = {1}\nW |= {2}",
        "def fill(them): them.append(1)\nW = []\nfill(W)",
        "W = []\ndef fill(): W.append(1)\nfill()",
        "W = 1\ndef change():\n    global W\n    W = 2\nchange()",
        "try:\n    import quick\n    W = True\nexcept ImportError:\n    W = False",
        "W = 0\nfor n in range(3): W = n", "W = 0\nwhile W < 3: W = W + 1",
        "N = 1\nW = [N]\nN = 2", "W = [one for one in 'ab']", "W = 1\ndel W",
        "with open('x') as file: W = 3",
    ],
)  # fmt: skip
def test_a_value_that_the_script_may_change_is_not_taken_out(before: str, tmp_path: Path) -> None:
    text = script(f"{before}\n{NEEDS.format(reads='len([W])')}", rewards="[right, mine]")
    found = imported(text, tmp_path)
    assert "_rewards.py" not in found.files
    assert "mine: it needs `" in notes(found, Kind.LEFT_OUT)


def test_two_rewards_of_one_factory_do_not_become_one(tmp_path: Path) -> None:
    before = (
        "def make(limit):\n    def mine(completions, **k):\n"
        "        return [float(len(c) < limit) for c in completions]\n    return mine"
    )
    found = imported(script(before, rewards="[make(3), make(500)]"), tmp_path)
    module: dict[str, Any] = {}
    exec(found.files["_rewards.py"], module)
    assert module["mine"](["four"]) == [0.0]
    assert "stands for several values" in notes(found, Kind.LEFT_OUT)


@pytest.mark.parametrize(
    "before",
    [
        "@launch()\ndef mine(completions, **k): return [0.0]",
        "@launch\ndef mine(completions, **k): return [0.0]",
        "def mine(completions, n=launch(), **k): return [0.0]",
        "def mine(completions, *, n=[launch()], **k): return [0.0]",
        "def mine(completions: launch(), **k): return [0.0]",
        "def mine(completions, **k) -> launch(): return [0.0]",
        "def mine(completions, n=[launch() for _ in 'a'], **k): return [0.0]",
        "def mine(completions, n=(lambda: launch())(), **k): return [0.0]",
        "import re\nW = re.compile(launch())\ndef mine(completions, **k): return [len(W)]",
        "W = set([launch()])\ndef mine(completions, **k): return [len(W)]",
        "W = dict(a=launch())\ndef mine(completions, **k): return [len(W)]",
        "from collections import Counter\nW = Counter(x for x in launch())\n"
        "def mine(completions, **k): return [len(W)]",
        "def set(x): return [launch()]\nW = set('a')\ndef mine(completions, **k): return [len(W)]",
        "re = launch\nW = re.compile('a')\ndef mine(completions, **k): return [len(W)]",
        "@launch\ndef help(): return 0.0\ndef mine(completions, **k): return [help()]",
        "mine = lambda completions, n=launch(), **k: [0.0]",
        "W = frozenset('a' * 10 ** 10)\ndef mine(completions, **k): return [len(W)]",
    ],
)
def test_importing_the_written_file_runs_nothing_of_the_script(before: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    run = f"def launch(*a):\n    open({str(mark)!r}, 'w')\n    return lambda f=0: f\n"
    other = "\ndef other(completions, **k): return [launch() for c in completions]"
    found = imported(script(run + before + other, rewards="[right, other, mine]"), tmp_path)
    exec(found.files["_rewards.py"], {})
    assert not mark.exists()
    assert "line" in notes(found, Kind.LEFT_OUT)
    assert not any("mine" in str(one) for one in values(found)["reward_funcs"])


def test_a_module_beside_the_script_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text(
        "def mine(completions, **k): return [0.0]\n", encoding="utf-8"
    )
    before = "from judges import mine"
    found = imported(script(before, rewards="[right, mine]"), tmp_path)
    assert values(found)["reward_funcs"][1] == f"{tmp_path.resolve()}/judges.py:mine"


def test_an_own_reward_of_our_name_gets_another(tmp_path: Path) -> None:
    before = "def correctness(completions, **k): return [len(c) / 9 for c in completions]"
    found = imported(script(before, rewards="[right, correctness]"), tmp_path)
    assert values(found)["reward_funcs"] == ["correctness", "_rewards.py:script_correctness"]
