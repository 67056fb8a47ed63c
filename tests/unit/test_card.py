"""A model card tells what the run's files hold, claims nothing else, and names no path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from abacist.delivery import card
from abacist.delivery.card import RunFacts, export_card, proof_sentence, write_run_card
from abacist.delivery.commands import commands_for
from abacist.delivery.licence import Licence
from abacist.delivery.prompt_record import is_local, portable_settings, prompt_facts
from abacist.delivery.same_policy import Agreement, Proof
from abacist.policy.loading import load_chat
from abacist.proof.ask import Prompting
from abacist.records.rundir import RunDir
from made_runs import made_run

QWEN = Licence("Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0", "by its name")


def facts(run: Path, licence: Licence = QWEN) -> RunFacts:
    return RunFacts.of(RunDir(run), licence, prompt_facts(load_chat("tiny"), Prompting(None)))


def shown(run: Path, licence: Licence = QWEN, kind: str = "merged") -> str:
    return export_card(facts(run, licence), kind=kind, dtype="bfloat16", proofs=[], notes=[])


def test_the_verdict_stands_with_its_interval_and_its_test(tmp_path: Path) -> None:
    text = shown(made_run(tmp_path / "run"))
    assert "correct on 20 problems" in text and "McNemar" in text and "gained 6, lost 1" in text
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct" and head["license"] == "apache-2.0"
    assert {"grpo", "gsm8k", "trl", "abacist"} <= set(head["tags"])


def test_a_run_that_was_not_measured_claims_nothing(tmp_path: Path) -> None:
    text = shown(made_run(tmp_path / "run", finished=False))
    assert "Nothing is claimed" in text and "earned:" not in text
    run = made_run(tmp_path / "damaged")
    (run / "evals" / "after" / "evaluation.json").write_text("{", encoding="utf-8")
    assert "Nothing is claimed" in shown(run) and "damaged" in shown(run)


def test_a_control_run_says_so(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    (run / "manifest.json").write_text(json.dumps(manifest | {"control": "random"}), "utf-8")
    assert "Control, random rewards." in shown(run)


def test_no_path_of_this_machine_stands_in_it(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    data, rewards = tmp_path / "data", tmp_path / "mine.py"
    data.mkdir()
    settings |= {
        "model_name_or_path": str(tmp_path / "models" / "Own-1B"),
        "dataset_name": str(data),
        "reward_funcs": ["default", f"{rewards}:shouts"],
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    text = shown(run, Licence(None, None, "nothing here says"))
    assert str(tmp_path) not in text and "Own-1B" in text and "mine.py:shouts" in text
    assert "base_model:" not in text.split("---")[1] and "datasets:" not in text
    kept = portable_settings(settings, Prompting(None))
    assert str(tmp_path) not in json.dumps(kept) and "dataset_name" not in kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [("openai/gsm8k", False), ("generated", False), ("/data/gsm8k", True), ("./x", True),
     ("a/b/c", True), ("~/gsm8k", True)],
)  # fmt: skip
def test_a_path_is_told_from_a_name(name: str, expected: bool) -> None:
    assert is_local(name) == expected


def test_a_prompt_with_fences_in_it_stays_inside_its_fence(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    settings["system_prompt"] = "Reply in\n```\nthis\n```\n# not a heading"
    (run / "config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    text = shown(run)
    assert "````text\n[system]\nReply in\n```\nthis\n```\n# not a heading\n````" in text


def proof(kl: float, untrained: float | None) -> Proof:
    return Proof("a reader", False, Agreement(10, 9, 0, 100, 99, 0, 0.1, 0.01, kl), None, untrained)


def test_rounding_is_set_beside_what_training_changed() -> None:
    assert "What training changed is a KL of 1.0e-03" in proof_sentence(proof(1e-6, 1e-3))
    assert "training changed" not in proof_sentence(proof(1e-3, None))


def test_a_llamas_card_says_built_with_llama(tmp_path: Path) -> None:
    text = shown(made_run(tmp_path / "run"), Licence("meta-llama/Llama-3.2-1B", "llama3.2", ""))
    assert "Built with Llama" in text and "# Llama-run" in text


def test_every_command_says_whether_it_was_tried() -> None:
    for kind in ("run", "full run", "adapter", "merged", "gguf", "ollama"):
        found = commands_for(kind, "/a place/x")
        assert found and all(one.tried for one in found)
        for one in found:
            if one.what in ("vLLM", "Ollama", "lm-eval", "llama.cpp"):
                assert "not tried" in one.tried
    (runtime,) = (c for c in commands_for("gguf", "x", by_llamacpp=True) if c.what == "llama.cpp")
    assert "library was run" in runtime.tried and "not tried" in runtime.tried


def test_a_persons_own_card_is_left_alone_and_a_blank_is_filled(
    tmp_path: Path, lookalike: Callable[[str], Path]
) -> None:
    run = made_run(tmp_path / "run")
    for path in lookalike("qwen2.5-instruct").iterdir():
        shutil.copy(path, run / path.name)
    readme = run / card.CARD_NAME
    readme.write_text("# Mine\nI wrote this.", encoding="utf-8")
    assert write_run_card(run) is None and "I wrote this" in readme.read_text("utf-8")
    readme.write_text("# Model Card\n[More Information Needed]", encoding="utf-8")
    assert write_run_card(run) == readme and "gained 6, lost 1" in readme.read_text("utf-8")
    assert write_run_card(run) == readme  # its own is renewed
    readme.write_text(readme.read_text("utf-8").replace(card.MARK, "edited"), encoding="utf-8")
    assert write_run_card(run) is None
