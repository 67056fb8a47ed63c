"""``abacist eval`` as a person uses it: what it keeps, what it survives, what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import abacist
from abacist.cli.main import main
from abacist.policy.decoding import generation
from abacist.policy.decoding.generation import Completion
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import StopReason
from abacist.task.problems import load_problems
from imported import Imported

pytestmark = pytest.mark.e2e

Captured = pytest.CaptureFixture[str]
FEW = ["--num_problems", "12", "--max_completion_length", "40", "--num_samples", "3"]
KEPT = {
    "evaluation.json", "evaluation.md", "rollouts.parquet", "difficulty.png", "sampled",
    "report.html",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evals") / "whole"
    assert main(["eval", "tiny", *FEW, "--batch_size", "64", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Let the model say these texts in turn, each using up its budget unless it is empty."""

    def say(texts: list[str]) -> None:
        def generate(policy: Any, prompts: Any, **how: Any) -> list[list[Completion]]:
            def completion(text: str) -> Completion:
                if not text:
                    return Completion([2], "", StopReason.EMPTY)
                return Completion([5] * how["max_completion_tokens"], text, StopReason.LENGTH)

            said = [texts[number % len(texts)] for number in range(len(prompts))]
            return [[completion(text)] * how["num_samples"] for text in said]

        monkeypatch.setattr(generation, "generate", generate)

    return say


def same_bytes(one: Path, other: Path) -> bool:
    names = ["evaluation.json", "rollouts.parquet", "sampled/evaluation.json"]
    names += ["sampled/rollouts.parquet", "difficulty.png", "evaluation.md"]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_an_evaluation_leaves_figures_replies_page_and_plot_and_nothing_else(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == KEPT
    greedy, sampled = Evaluation.load(whole), Evaluation.load(whole / "sampled")
    assert greedy.settings.kind == "greedy" and len(greedy.rollouts) == 12
    assert sampled.settings.kind == "sampled" and len(sampled.rollouts) == 36
    assert [*sampled.attempts] == ["pass@1", "pass@2", "pass@3", "majority@3"]
    assert sampled.attempts["pass@1"].value == pytest.approx(sampled.accuracy.value)
    assert (
        "repetition penalty" in greedy.conditions and "float32" in greedy.conditions["arithmetic"]
    )
    assert (whole / "difficulty.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_on_the_page_stands_with_its_interval_n_and_method(
    whole: Path, capsys: Captured
) -> None:
    page = (whole / "evaluation.md").read_text(encoding="utf-8")
    figures = [line for line in page.split("\n") if line.startswith("| ") and " % |" in line]
    assert len(figures) > 20
    assert all(r"\[" in line and ("Wilson" in line) and " 12 " in line for line in figures)
    assert "lm-eval's strict filter" in page and "![" in page


def test_figures_do_not_depend_on_the_batch_size_nor_on_a_kill(
    whole: Path,
    imported: Imported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    folder = tmp_path / "killed"
    command = ["eval", "tiny", *FEW, "--batch_size", "2", "--output_dir", str(folder)]
    process = imported.start("-m", "abacist", *command)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("unfinished/greedy-*.parquet")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "evaluation.json").exists()

    kept = [path.read_bytes() for path in sorted(folder.glob("unfinished/*-00001.parquet"))]
    asked: list[int] = []
    generate = generation.generate

    def counting(policy: Any, prompts: Any, **how: Any) -> Any:
        asked.append(len(prompts) * how["num_samples"])
        return generate(policy, prompts, **how)

    monkeypatch.setattr(generation, "generate", counting)
    assert main(command) == 0
    assert kept and sum(asked) < 12 + 36, "what was kept is not asked again"
    assert same_bytes(folder, whole)
    assert not (folder / "unfinished").exists()
    assert "resuming the unfinished evaluation" in capsys.readouterr().out


def test_another_command_does_not_continue_an_unfinished_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fails(*args: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    command = ["eval", "tiny", "--num_problems", "4", "--output_dir", str(folder)]
    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate", fails)
        assert main([*command, "--max_completion_length", "9"]) == 130
    assert main([*command, "--max_completion_length", "8"]) == 1
    said = capsys.readouterr().err
    assert "max_completion_length was 9, now 8" in said and "--overwrite" in said
    assert main([*command, "--max_completion_length", "8", "--overwrite"]) == 0
    assert Evaluation.load(folder).settings.max_completion_tokens == 8


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interrupted_evaluation_keeps_what_had_ended_and_says_how_it_goes_on(
    stop: BaseException, code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    folder, told = tmp_path / "stopped", 0
    command = ["eval", "tiny", *FEW, "--output_dir", str(folder)]
    generate = generation.generate

    def stopped(policy: Any, prompts: Any, *, ended: Any, **how: Any) -> Any:
        def tell(number: int, group: list[Completion]) -> None:
            nonlocal told
            if told == 5:
                raise stop
            told += 1
            ended(number, group)

        return generate(policy, prompts, ended=tell, **how)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate", stopped)
        assert main(command) == code
    said = capsys.readouterr().err
    assert f"5 of 48 replies are kept in {folder / 'unfinished'}" in said
    assert "same command again" in said
    asked: list[int] = []

    def counting(policy: Any, prompts: Any, **how: Any) -> Any:
        asked.append(len(prompts))
        return generate(policy, prompts, **how)

    monkeypatch.setattr(generation, "generate", counting)
    assert main(command) == 0
    assert asked == [7, 12], "the five greedy replies are not asked for again"
    assert same_bytes(folder, whole)


def test_a_finished_evaluation_and_strange_folders_are_not_overwritten(
    whole: Path, tmp_path: Path, capsys: Captured
) -> None:
    before = (whole / "evaluation.json").stat().st_mtime_ns
    assert main(["eval", "tiny", *FEW, "--output_dir", str(whole)]) == 1
    assert "is kept there already" in capsys.readouterr().err
    assert (whole / "evaluation.json").stat().st_mtime_ns == before
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert main(["eval", "tiny", "--output_dir", str(tmp_path), "--overwrite"]) == 1
    assert "thesis.tex" in capsys.readouterr().err and (tmp_path / "thesis.tex").exists()


def test_a_model_that_never_stops_or_says_nothing_is_counted_not_dropped(
    hostile: Callable[[list[str]], None], tmp_path: Path, capsys: Captured
) -> None:
    hostile(["", "\x1b[2J" + "1 + 1 = 3 <answer>" * 50, "<reasoning>", "7"])
    out = tmp_path / "hostile"
    assert main(["eval", "tiny", "--num_problems", "8", "--output_dir", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["greedy"]
    assert found["counts"] == {
        "problems": 8, "problems_without_gold": 0, "replies": 8, "replies_never_stopped": 6,
        "replies_empty": 2, "replies_without_answer": 8,
    }  # fmt: skip
    assert found["figures"]["correct"] == {
        **found["figures"]["correct"], "value": 0.0, "n": 8,
    }  # fmt: skip
    assert "6 never stopped, 2 are empty" in (out / "evaluation.md").read_text(encoding="utf-8")


def test_problems_without_gold_are_kept_counted_and_never_right(
    hostile: Callable[[list[str]], None], tmp_path: Path, capsys: Captured
) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "Why?", "answer": "because"}]
    rows += [{"question": "And?", "answer": ""}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    hostile(["<answer>2</answer>"])
    flags = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--json"]
    assert main(["eval", "tiny", *flags]) == 0
    found = json.loads(capsys.readouterr().out)["greedy"]
    assert found["counts"]["problems_without_gold"] == 2
    assert found["figures"]["correct"]["value"] == pytest.approx(1 / 3)
    assert [row["label"] for row in found["by_answer_size"]] == ["0 to 9", "no gold"]
    data.write_text(json.dumps(rows[2]), encoding="utf-8")
    assert main(["eval", "tiny", *flags[:2], "--output_dir", str(tmp_path / "none")]) == 1
    assert "none of its 1 rows has a gold" in capsys.readouterr().err


def test_without_a_name_each_evaluation_gets_a_folder_of_its_own(
    hostile: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(["7"])
    for _ in range(2):
        assert main(["eval", "tiny", "--num_problems", "2"]) == 0
    assert main(["eval", "tiny", "--num_problems", "3", "--perturb", "1"]) == 0
    assert sorted(path.name for path in Path("evals").iterdir()) == [
        "tiny-generated-heldout-001",
        "tiny-generated-heldout-002",
        "tiny-generated-heldout-perturbed-001",
    ]
    asked = {p.question for p in load_problems("generated", split="heldout", limit=3)}
    perturbed = Evaluation.load(Path("evals/tiny-generated-heldout-perturbed-001"))
    assert perturbed.problems and not {p.question for p in perturbed.problems} & asked


def a_run_paid_by(rewards: list[str], folder: Path) -> Path:
    """What counts as a run for ``eval``: the built-in model and a config."""
    shutil.copytree(Path(abacist.__file__).parent / "policy" / "tiny", folder)
    (folder / "config.yaml").write_text(json.dumps({"reward_funcs": rewards}), encoding="utf-8")
    return folder


def test_a_run_is_shown_with_its_own_rewards_and_without_those_that_are_gone(
    hostile: Callable[[list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(["a b c"])
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def brief(completions, **kw):\n    return [0.75] * len(completions)\n", encoding="utf-8"
    )
    run = a_run_paid_by([f"{mine}:brief", "strict_format"], tmp_path / "run")
    flags = ["eval", str(run), "--dataset_name", "generated", "--num_problems", "3"]
    assert main([*flags, "--output_dir", "one"]) == 0
    page = capsys.readouterr().out
    assert "brief" in page and "0.75" in page and "xml_count" not in page
    assert list(Evaluation.load(Path("one")).rewards) == ["brief", "strict_format"]
    mine.write_text("raise OSError('moved')", encoding="utf-8")
    assert main([*flags, "--output_dir", "two"]) == 0
    told = capsys.readouterr()
    assert "moved" in told.out + told.err
    assert list(Evaluation.load(Path("two")).rewards) == ["strict_format"]


@pytest.mark.parametrize("named", ["run/evil.py:pays", "{here}/run/evil.py:pays", "evil.pays"])
def test_code_that_came_with_a_run_is_not_run_unless_it_is_trusted(
    named: str,
    hostile: Callable[[list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(["a b c"])
    run = a_run_paid_by([named.format(here=tmp_path), "strict_format"], tmp_path / "run")
    code = f"open({str(tmp_path / 'was_run')!r}, 'w', encoding='utf-8').close()\n"
    code += "def pays(completions, **kw):\n    return [1.0] * len(completions)\n"
    for place in (run, tmp_path):
        (place / "evil.py").write_text(code, encoding="utf-8")
    flags = ["eval", str(run), "--dataset_name", "generated", "--num_problems", "2"]
    assert main([*flags, "--output_dir", "one"]) == 0
    told = capsys.readouterr()
    assert "--trust_remote_code" in told.out + told.err and not (tmp_path / "was_run").exists()
    assert list(Evaluation.load(Path("one")).rewards) == ["strict_format"]
    assert main([*flags, "--trust_remote_code", "--output_dir", "two"]) == 0
    assert (tmp_path / "was_run").exists()


def test_a_file_called_gist_does_not_hide_the_historic_rewards_of_a_run(
    hostile: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(["a b c"])
    (tmp_path / "gist.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    run = a_run_paid_by(["gist.int_reward_func"], tmp_path / "run")
    flags = ["eval", str(run), "--dataset_name", "generated", "--num_problems", "2"]
    assert main([*flags, "--output_dir", "one"]) == 0
    assert list(Evaluation.load(Path("one")).rewards) == ["int_reward_func"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--temperature", "1"], "--num_samples"),
        (["--native_prompt", "--prefill", "x"], "--native_prompt"),
        (["--num_shots", "many"], "is no number of examples"),
        (["--split", "dev"], "--split"),
        (["--num_samples", "2", "--temperature", "0"], "greedy"),
        (["--num_sample", "2"], "Did you mean --num_samples"),
    ],
)
def test_flags_that_make_no_sense_are_usage_errors_with_a_way_on(
    flags: list[str], says: str, capsys: Captured, tmp_path: Path
) -> None:
    flags = [*flags, "--output_dir", str(tmp_path / "x")]
    assert main(["eval", "tiny", *flags]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["qwen2.5-instruct", "llama-3.2-base"])
def test_a_native_prompt_is_told_and_read_in_its_own_form(
    kind: str, lookalike: Callable[[str], Path], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "native"
    flags = ["--native_prompt", "--dataset_name", "generated", "--num_problems", "2"]
    flags += ["--max_completion_length", "4", "--output_dir", str(out), "--json"]
    assert main(["eval", str(lookalike(kind)), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    evaluation = Evaluation.load(out)
    turns = evaluation.rollouts[0].messages
    if kind.endswith("instruct"):
        assert len(turns) == 1 and "\\boxed{}" in turns[0]["content"]
        assert "repetition_penalty 1.1" in evaluation.conditions["repetition penalty"]
    else:
        assert len(turns) == 17 and "#### " in turns[1]["content"]
        assert evaluation.settings.num_shots == 8
    assert evaluation.settings.native_prompt and found["greedy"]["own_form"]["n"] == 2
    assert "its own best-known prompt" in found["headline"]
