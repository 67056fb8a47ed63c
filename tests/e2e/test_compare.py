"""``abacist compare`` as people type it: runs and evaluations, seeds, a control, shots, a gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from abacist.cli.main import main
from abacist.learning import fewshot
from abacist.policy.decoding.progress import Decoded
from abacist.proof.evaluation import Evaluation
from abacist.records.provenance import build_manifest
from abacist.records.rundir import RunDir
from evaluated import BARE, GOOD, WRONG, evaluation, problem

pytestmark = pytest.mark.e2e

PROBLEMS = [problem(n, difficulty=1 + n % 2) for n in range(40)]
BEFORE = [BARE] * 5 + [WRONG] * 25 + [GOOD] * 10
Captured = pytest.CaptureFixture[str]
Made = Callable[..., str]


def right_on(count: int) -> list[str]:
    return [GOOD] * count + [WRONG] * (40 - count)


@pytest.fixture
def run_of(tmp_path: Path) -> Made:
    """Makes a finished run by what it replied after its training; returns its path."""

    def make(name: str, after: Sequence[str], **settings: object) -> str:
        with RunDir.reserve(tmp_path / name, name=name) as run:
            run.write_manifest(build_manifest(seed=0, argv=[]))
            run.config_path.write_text(
                yaml.safe_dump({"control": "none"} | settings), encoding="utf-8"
            )
            for when, replies in (("before", BEFORE), ("after", after)):
                evaluation(replies, PROBLEMS).save(run.evals_dir / when)
                several = [[reply] * 2 for reply in replies]
                evaluation(several, PROBLEMS).save(run.evals_dir / f"{when}-sampled")
        return str(run.path)

    return make


def compared(capsys: Captured, *argv: str) -> tuple[int, str]:
    code = main(["compare", *argv])
    return code, " ".join(capsys.readouterr().out.split())


def test_a_run_alone_is_compared_with_its_own_before_and_passes_the_gate(
    run_of: Made, capsys: Captured
) -> None:
    code, out = compared(capsys, run_of("a", right_on(38)))
    assert code == 0 and out.startswith("Better: 25.0 % → 95.0 % correct on 40 problems")
    assert "a, before training" in out and "McNemar, exact" in out and "bootstrap" in out


def test_two_runs_are_compared_after_training_and_the_gate_stops_what_is_no_better(
    run_of: Made, capsys: Captured
) -> None:
    good, same, poor = (run_of(f"right-on-{n}", right_on(n)) for n in (38, 37, 12))
    assert compared(capsys, poor, good)[0] == 0
    code, out = compared(capsys, good, same)
    assert code == 3 and out.startswith("Not proven better: 95.0 % → 92.5 %")
    assert compared(capsys, good, poor)[0] == 3
    assert compared(capsys, poor, good, "--at_least", "30")[0] == 0
    code, out = compared(capsys, poor, good, "--at_least", "60")
    assert code == 3 and "by more than 60 points: exit code 3" in out
    assert compared(capsys, f"{good}/evals/before", good)[0] == 0


def test_sampled_evaluations_are_found_beside_the_greedy_ones(
    run_of: Made, capsys: Captured
) -> None:
    run = run_of("a", right_on(38))
    for argv in ([run], [f"{run}/evals/before", run], [f"{run}/evals/before-sampled", run]):
        code, out = compared(capsys, *argv, "--sampled")
        assert code == 0 and "correct, sampled" in out and "sign-flip permutation" in out


def test_several_seeds_are_one_method_with_or_without_a_base(
    run_of: Made, capsys: Captured
) -> None:
    runs = [run_of(f"s{n}", right_on(36 + n), seed=n) for n in range(3)]
    for argv in (["--seeds", *runs], [f"{runs[0]}/evals/before", *runs, "--seeds"]):
        code, out = compared(capsys, *argv)
        assert code == 0 and "in the mean of 3 seeds" in out and "B1, the worst" in out
        assert "problems crossed with 3 seeds" in out and "Note:" not in out
    other = run_of("other", right_on(36), seed=0, learning_rate=1.0)
    again = run_of("again", right_on(36), seed=0, learning_rate=2.0)
    code, out = compared(capsys, "--seeds", other, again)
    assert "in more than its seed: learning_rate: 1.0 and 2.0" in out and "the same seed" in out


def test_a_control_stands_beside_the_run_and_must_be_beaten_too(
    run_of: Made, capsys: Captured
) -> None:
    run = run_of("real", right_on(38), control="none", max_steps=5)
    placebo = run_of("placebo", right_on(11), control="random", max_steps=5)
    strong = run_of("strong", right_on(37), control="format", max_steps=9)
    code, out = compared(capsys, run, "--control", placebo)
    assert code == 0 and "Better than its control" in out and "trained on random rewards" in out
    assert "B - control" in out and "control - A" in out and "Note:" not in out
    code, out = compared(capsys, run, "--control", strong)
    assert code == 3 and "Not proven better than its control" in out
    assert "in more than their rewards: max_steps: 5 and 9" in out
    assert "B is a control" in compared(capsys, placebo)[1]
    assert "was not trained as a control" in compared(capsys, placebo, "--control", run)[1]


def test_json_is_one_object_and_markdown_is_written_where_asked(
    run_of: Made, tmp_path: Path, capsys: Captured
) -> None:
    page, html = tmp_path / "page.md", tmp_path / "page.html"
    written = ["--markdown", str(page), "--html", str(html)]
    assert main(["compare", run_of("a", right_on(38)), "--json", *written]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["better"] is True and document["headline"].startswith("Better: ")
    accuracy = document["comparison"]["paired"]["accuracy"]
    assert len(accuracy["gained"]) == 30 and accuracy["change"]["method"] == "Newcombe, paired"
    parts = document["comparison"]["split"].values()
    assert sum(p["change"]["value"] for p in parts) == pytest.approx(accuracy["change"]["value"])
    assert document["examples"][0]["outcome"] == "gained"
    assert page.read_text(encoding="utf-8").startswith("# Abacist comparison\n\nBetter: ")
    assert "Better: " in html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 2, "nothing to compare"),
        (["a", "b", "c"], 2, "add --seeds"),
        (["nowhere"], 1, "no such folder"),
        (["."], 1, "neither a run nor an evaluation"),
        (["a", "--seeds", "b"], 2, "two or more"),
        (["a", "--seeds", "b", "./b"], 2, "named twice"),
        (["a", "b", "--shots", "1"], 2, "--shots is about one run"),
        (["a", "--seeds", "b", "c", "--control", "d"], 2, "--control takes one run"),
        (["a", "--allow_different", "problems"], 2, "invalid choice"),
        (["a", "--at_least", "many"], 2, "not a number"),
        (["a", "--shots", "1", "--sampled"], 2, "--sampled has no effect with --shots"),
        (["a", "--shots", "1", "--include_seen", "--examples", "2"], 2, "have no effect with"),
        (["a", "--shots", "1", "--allow_different", "budget"], 2, "--allow_different has"),
        (["--seeds", "a", "b", "--examples", "2"], 2, "--examples has no effect with --seeds"),
        (["a", "--markdown", "."], 2, "is a folder"),
        (["a", "--markdown", "-"], 2, "not to stdout"),
        (["a", "--markdown", "/dev/null"], 2, "is no Markdown file"),
        (["a", "--markdown", "/dev/null/page.md"], 2, "cannot be written"),
        (["a", "--html", "."], 2, "is a folder"),
        (["a", "--html", "-"], 2, "not to stdout"),
        (["a", "--html", "/dev/null"], 2, "is no HTML file"),
        (["a", "--html", "/dev/null/page.html"], 2, "cannot be written"),
        (["a", "--markdown", "page.html", "--html", "./page.html"], 2, "name one file"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_remedy(
    argv: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *argv]) == code
    err = capsys.readouterr().err
    assert says in err and len(err.strip().split("\n")) > 1 and "Traceback" not in err


def test_other_problems_or_conditions_are_refused_by_name(
    run_of: Made, tmp_path: Path, capsys: Captured
) -> None:
    run = run_of("a", right_on(38))
    for name, other in {
        "fewer": evaluation(BEFORE[:39], PROBLEMS[:39]),
        "budget": evaluation(BEFORE, PROBLEMS, max_completion_tokens=40),
    }.items():
        other.save(tmp_path / name)
        assert main(["compare", str(tmp_path / name), run]) == 1
    err = capsys.readouterr().err
    assert "0 only in the first, 1 only in the second" in err
    assert "max_completion_tokens: 40 against 50" in err and "--allow_different budget" in err
    assert main(["compare", str(tmp_path / "budget"), run, "--allow_different", "budget"]) == 0
    (tmp_path / "budget" / "evaluation.json").write_text("{", encoding="utf-8")
    assert main(["compare", str(tmp_path / "budget"), run]) == 1
    assert "damaged" in capsys.readouterr().err


def test_a_run_that_was_broken_off_has_nothing_to_compare(run_of: Made, capsys: Captured) -> None:
    run = Path(run_of("a", right_on(38)))
    (run / "evals" / "after" / "evaluation.json").unlink()
    assert main(["compare", str(run)]) == 1
    assert "no evaluation after training" in capsys.readouterr().err


def interrupt_after_the_first_reply(found: Decoded) -> None:
    if found.ended:
        raise KeyboardInterrupt


def test_a_control_is_trained_and_named_and_a_run_is_measured_at_other_shots(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "placebo"
    flags = ["--control", "random", "--max_steps", "1", "--num_heldout_problems", "6"]
    flags += ["--num_selection_problems", "0", "--num_train_problems", "30", "--num_generations"]
    flags += ["4", "--per_device_train_batch_size", "8", "--output_dir", str(run)]
    assert main(["train", *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Control, random rewards. No proven change" in out and "not for right answers" in out
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["control"] == "random"
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["control"] == "random"
    assert "random_control" in (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert (
        json.loads((run / "evals" / "verdict.json").read_text(encoding="utf-8"))["control"]
        == "random"
    )

    kept = run / "evals" / "shots-1"
    with monkeypatch.context() as patch:
        patch.setattr(fewshot, "told_of", lambda *_: interrupt_after_the_first_reply)
        assert main(["compare", str(run), "--shots", "0", "1"]) == 130
    said = capsys.readouterr().err
    assert "of 6 replies are kept in" in said and "Give the same command again" in said
    replies = {path: path.read_bytes() for path in kept.glob("before/unfinished/*.parquet")}
    assert replies and not (kept / "before" / "evaluation.json").exists()
    assert main(["compare", str(run), "--shots", "0", "1"]) == 3
    assert "Measuring the base" in capsys.readouterr().out
    assert not (kept / "before" / "unfinished").exists()
    assert Evaluation.load(kept / "before").settings.num_shots == 1
    assert not (run / "evals" / "shots-0").exists()  # what the run itself has measured
    code, again = compared(capsys, str(run), "--shots", "1", "0")
    assert code == 3 and "Measuring" not in again and "shots base trained" in again


@pytest.mark.parametrize("flag", ["--markdown", "--html"])
def test_a_persons_own_file_is_never_replaced_by_a_page(
    flag: str, run_of: Made, tmp_path: Path, capsys: Captured
) -> None:
    run = run_of("a", right_on(38))
    mine = tmp_path / {"--markdown": "README.md", "--html": "index.html"}[flag]
    mine.write_text("# Comparison of my own, <title>Abacist</title>\n", encoding="utf-8")
    assert main(["compare", run, flag, str(mine)]) == 2
    assert "is no page of Abacist's: it is left alone" in capsys.readouterr().err
    assert mine.read_text(encoding="utf-8").startswith("# Comparison of my own")
    mine.write_text("", encoding="utf-8")  # an empty file holds nothing to lose
    for _ in range(2):
        assert main(["compare", run, flag, str(mine)]) == 0
    assert "Better: " in mine.read_text(encoding="utf-8")


def test_a_file_of_another_kind_is_never_replaced_by_the_page(
    run_of: Made, tmp_path: Path, capsys: Captured
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine", encoding="utf-8")
    run = run_of("a", right_on(38))
    assert main(["compare", run, "--markdown", str(notes)]) == 2
    assert notes.read_text(encoding="utf-8") == "mine" and "left alone" in capsys.readouterr().err
    page = tmp_path / "page.md"
    for _ in range(2):  # its own page may be written again
        assert main(["compare", run, "--markdown", str(page)]) == 0


def test_evaluations_are_told_apart_from_inside_their_run_as_from_above(
    run_of: Made, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    run = Path(run_of("placebo", right_on(38), control="random"))
    above = compared(capsys, str(run / "evals" / "before"), str(run / "evals" / "after"))
    assert above[0] == 0 and "B is a control" in above[1]
    monkeypatch.chdir(run / "evals")
    assert "B is a control" in compared(capsys, "before", "after")[1]
    monkeypatch.chdir(run / "evals" / "after")
    assert "B is a control" in compared(capsys, "../before", ".")[1]
    assert compared(capsys, "../before", ".", "--sampled")[0] == 0


def test_what_a_run_says_of_itself_reaches_the_terminal_harmless(
    run_of: Made, tmp_path: Path, capsys: Captured
) -> None:
    evil = "be \x1b]0;owned\x07\x1b[2J"
    runs = [run_of(f"s{n}", right_on(38), system_prompt=f"{evil}{n}") for n in (0, 1)]
    page = tmp_path / "page.md"
    main(["compare", "--seeds", *runs, "--markdown", str(page)])
    said = capsys.readouterr().out
    assert "system_prompt: " in " ".join(said.split())
    assert not set("\x1b\x07") & set(said + page.read_text(encoding="utf-8"))
