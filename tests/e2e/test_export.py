"""``abacist export`` through the command line: whatever leaves a run is the policy it trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.cli.main import main
from abacist.delivery import export as exporting
from abacist.delivery import gguf_file, llamacpp
from abacist.delivery.staging import staged
from abacist.policy.loading import load_policy
from abacist.policy.source import BUILT_IN_FOLDER
from abacist.proof.ask import Prompting
from abacist.records.openings import EVAL, EXPORT, OPENINGS_NAME, read_openings
from faults import fault

pytestmark = pytest.mark.e2e
Captured = pytest.CaptureFixture[str]
Train = Callable[..., Path]

SHORT = [
    *("--dataset_name", "generated", "--num_train_problems", "20", "--num_heldout_problems", "6"),
    *("--num_selection_problems", "0", "--num_consistency_problems", "0"),
    *("--num_generations", "2", "--per_device_train_batch_size", "4", "--warmup_steps", "0"),
    *("--gradient_accumulation_steps", "1", "--max_steps", "1", "--max_completion_length", "12"),
]
LOOKALIKES = ["llama-3.2-instruct", "qwen2.5-instruct"]
WAYS = {"lora": ["--learning_rate", "0.02"], "full": ["--no_use_peft", "--learning_rate", "1e-3"]}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, lookalike: Callable[[str], Path]) -> Train:
    """The run of a look-alike, by its kind and by "lora" or "full": made once, to be read only."""
    made: dict[tuple[str, str], Path] = {}

    def run(kind: str, way: str) -> Path:
        if (kind, way) not in made:
            folder = tmp_path_factory.mktemp("run") / f"{kind}-{way}"
            where = ["--model_name_or_path", str(lookalike(kind)), "--output_dir", str(folder)]
            # Groups of random replies earn alike; a reward of chance moves the weights.
            control = ["--control", "random", "--num_shots", "1"]
            assert main(["train", "any", *where, *SHORT, *WAYS[way], *control, "--force"]) == 0
            made[kind, way] = folder
        return made[kind, way]

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the built-in model: read only."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    few = ["--num_heldout_problems", "6", "--num_selection_problems", "0", "--max_steps", "1"]
    few += ["--num_consistency_problems", "0", "--save_steps", "1"]
    assert main(["train", "tiny", *few, "--output_dir", str(folder)]) == 0
    return folder


def exported(capsys: Captured, run: Path, target: Path, *flags: str, code: int = 0) -> Any:
    capsys.readouterr()
    done = main(["export", str(run), "-o", str(target), "--num_problems", "6", "--json", *flags])
    said = capsys.readouterr()
    assert done == code, said.err
    return json.loads(said.out) if code == 0 else said.err


def written_by_transformers(model: Any, folder: Path, prompting: Prompting) -> list[int]:
    """A greedy reply by transformers alone, from the folder's own tokenizer and stop tokens."""
    from abacist.task.prompts import build_messages

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = build_messages(
        "Ada has 3 apples and 4 coins. How many are there?",
        system_prompt=prompting.system_prompt,
        shots=prompting.shots,
    )
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True,
        date_string="26 Jul 2024",
    )  # fmt: skip
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    found: list[int] = ids[0, prompt["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LOOKALIKES)
@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_a_float32_export_is_the_trained_policy_token_for_token(
    kind: str, way: str, to: str, train: Train, tmp_path: Path, capsys: Captured
) -> None:
    run = train(kind, way)
    found = exported(capsys, run, tmp_path / to, "--to", to, "--dtype", "float32")
    (proof, *_) = found["proofs"]
    agreement = proof["agreement"]
    assert agreement["replies"] == 6 and agreement["equal_replies"] + agreement["tied_replies"] == 6
    assert agreement["largest_logp_difference"] < 1e-4 and proof["fault"] is None
    # And by transformers alone, none of our code between.
    prompting = Prompting.of(str(run))
    before = load_policy(str(run), dtype="float32").model
    extra = {"gguf_file": "model.gguf"} if to == "gguf" else {}
    if to == "gguf":
        extra["config"] = before.config  # the reader knows no scaled rotary frequencies
    after = AutoModelForCausalLM.from_pretrained(tmp_path / to, dtype=torch.float32, **extra)
    after.generation_config = before.generation_config
    one, two = (written_by_transformers(m, run, prompting) for m in (before, after))
    assert one == two


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_fewer_bits_are_measured_and_told_in_the_card(
    kind: str, train: Train, tmp_path: Path, capsys: Captured
) -> None:
    run = train(kind, "lora")
    found = exported(capsys, run, tmp_path / "gguf", "--to", "gguf", "--dtype", "bfloat16")
    (proof, *_) = found["proofs"]
    assert found["dtype"] == "bfloat16" and proof["accuracy"]["test"].startswith("McNemar")
    assert 0 <= proof["agreement"]["kl_a_token"] <= proof["bounds"]["kl_a_token"]
    card = (tmp_path / "gguf" / "README.md").read_text("utf-8")
    assert "rounded to the nearest bfloat16" in card and "KL" in card and "McNemar" in card
    assert str(tmp_path) not in card and str(run.parent) not in card


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_a_merged_export_is_asked_as_its_run_was(
    kind: str, train: Train, tmp_path: Path, capsys: Captured
) -> None:
    run, target = train(kind, "lora"), tmp_path / "merged"
    exported(capsys, run, target, "--to", "merged", "--dtype", "float32")
    moved = shutil.move(target, tmp_path / "elsewhere")
    assert Prompting.of(str(moved)) == Prompting.of(str(run))
    replies = []
    for model in (run, moved):
        question = "Ada has 3 apples and gets 4 more. How many apples does Ada have?"
        assert main(["ask", str(model), question, "--json", "--dtype", "float32"]) == 0
        replies.append(json.loads(capsys.readouterr().out)["replies"][0])
    assert replies[0]["messages"] == replies[1]["messages"] and len(replies[0]["messages"]) == 4
    assert replies[0]["completion_ids"] == replies[1]["completion_ids"]
    own = json.loads((moved / "generation_config.json").read_text("utf-8"))
    assert set(own["eos_token_id"]) == set(load_policy(str(run)).chat.stop_ids)
    assert not {"temperature", "top_p", "repetition_penalty"} & set(own)


def test_the_built_in_model_answers_the_same_as_run_and_as_export(
    tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    exported(capsys, tiny, tmp_path / "merged", "--to", "merged")
    answers = []
    for model in (tiny, tmp_path / "merged"):
        question = "Mia has 12 pens. She buys 7 more. How many pens does Mia have?"
        assert main(["ask", str(model), question, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["replies"][0]["completion"])
    assert answers[0] == answers[1]


def test_an_export_is_evaluated_on_the_held_out_problems_of_its_run(
    tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    exported(capsys, tiny, tmp_path / "merged", "--to", "merged")
    before = {"--num_problems": "6", "--output_dir": str(tmp_path / "eval")}
    flags = [word for pair in before.items() for word in pair]
    assert main(["eval", str(tmp_path / "merged"), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((tiny / "evals" / "after" / "evaluation.json").read_text("utf-8"))
    assert found["greedy"]["counts"] == kept["evaluation"]["counts"]
    assert found["greedy"]["figures"]["correct"] == kept["evaluation"]["figures"]["correct"]
    # Who looks at them notes it in the run; a copy that lies elsewhere belongs to no run.
    noted, faults = read_openings(tiny / OPENINGS_NAME)
    assert faults == [] and noted[-1].purpose == EXPORT and noted[-1].of_the_verdict == 6
    assert main(["eval", str(tiny), "--num_problems", "6", "--json"]) == 0
    noted, faults = read_openings(tiny / OPENINGS_NAME)
    assert faults == [] and (noted[-1].purpose, noted[-1].of_the_verdict) == (EVAL, 6)
    assert noted[-1].checkpoint == "final" and noted[-1].evaluation is not None
    assert (tiny / noted[-1].evaluation / "evaluation.json").is_file()


def test_a_run_of_the_built_in_model_is_loaded_by_peft_alone(tiny: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(tiny)
    ours = load_policy(str(tiny), dtype="float32").model
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model.float()(ids).logits, ours(ids).logits)
    config = json.loads((tiny / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(BUILT_IN_FOLDER)


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_a_run_of_another_model_is_loaded_by_peft_alone(kind: str, train: Train) -> None:
    run = train(kind, "lora")
    model = AutoPeftModelForCausalLM.from_pretrained(run)
    ours = load_policy(str(run), dtype="float32").model
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model.float()(ids).logits, ours(ids).logits)


def test_a_run_that_was_moved_to_another_machine_finds_the_built_in_model(
    tiny: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved)
    path = moved / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = "/elsewhere/lib/abacist/policy/tiny"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert load_policy(str(moved)).base_name == "tiny"
    config["base_model_name_or_path"] = "/elsewhere/lib/policy/tiny"  # a neighbour: not ours
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Exception, match="no folder"):
        load_policy(str(moved))


def test_the_card_of_a_run_is_filled_and_names_no_path(tiny: Path, train: Train) -> None:
    for run in (tiny, train("qwen2.5-instruct", "full")):
        card = (run / "README.md").read_text("utf-8")
        assert card.startswith("---\n") and "[More Information Needed]" not in card
        assert "paired test" in card and "grpo" in card and str(run.parent) not in card
        assert str(BUILT_IN_FOLDER) not in card


def test_an_adapter_is_the_same_and_brings_its_tokenizer(
    train: Train, tmp_path: Path, capsys: Captured
) -> None:
    run, target = train("llama-3.2-instruct", "lora"), tmp_path / "adapter"
    found = exported(capsys, run, target, "--to", "adapter", "--base_model", "meta-llama/Llama-3.2")
    assert found["proofs"][0]["agreement"]["largest_logp_difference"] < 1e-4
    config = json.loads((target / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2"
    assert {"tokenizer.json", "chat_template.jinja", "config.yaml", "NOTICE"} <= {
        path.name for path in target.iterdir()
    }


def test_an_ollama_folder_holds_what_the_run_was_asked_with(
    train: Train, tmp_path: Path, capsys: Captured
) -> None:
    run, target = train("llama-3.2-instruct", "lora"), tmp_path / "ollama"
    found = exported(capsys, run, target, "--to", "ollama", "--dtype", "float32")
    text = (target / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model.gguf\n") and "{{ .System }}" in text
    assert 'PARAMETER stop "<|eot_id|>"' in text and "<|begin_of_text|>" not in text
    assert text.count("MESSAGE user ") == text.count("MESSAGE assistant ") == 1
    assert any("not run through Ollama" in note for note in found["notes"])


def test_a_checkpoint_is_exported_beside_the_run(tiny: Path, capsys: Captured) -> None:
    capsys.readouterr()
    assert (
        main(["export", str(tiny / "checkpoint-1"), "--to", "adapter", "--num_problems", "2"]) == 0
    )
    assert (tiny / "exports" / "adapter-checkpoint-1" / "adapter_model.safetensors").is_file()
    shutil.rmtree(tiny / "exports")


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


@fault("export", "a checkpoint is damaged", "the file, and to take another checkpoint")
def test_a_damaged_checkpoint_is_not_exported(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    run = copied(tiny, tmp_path / "run")
    weights = run / "checkpoint-1" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    said = exported(capsys, run / "checkpoint-1", tmp_path / "out", "--to", "merged", code=1)
    assert "adapter_model.safetensors" in said and not (tmp_path / "out").exists()


@fault("export", "the weights of a run are cut short", "that they are damaged")
def test_damaged_weights_are_not_exported(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    run = copied(tiny, tmp_path / "run")
    weights = run / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    said = exported(capsys, run, tmp_path / "out", "--to", "merged", code=1)
    assert "damaged" in said and not (tmp_path / "out").exists()


@fault("export", "the run is not finished", "how to finish it, or which checkpoint to export")
def test_an_unfinished_run_names_its_checkpoint(
    tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = copied(tiny, tmp_path / "run")
    (run / "adapter_model.safetensors").unlink()
    said = exported(capsys, run, tmp_path / "out", "--to", "merged", code=1)
    assert "--resume" in said and "checkpoint-1" in said


def test_a_run_without_a_verdict_is_exported_and_claims_nothing(
    tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = copied(tiny, tmp_path / "run")
    shutil.rmtree(run / "evals")
    exported(capsys, run, tmp_path / "out", "--to", "adapter")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Nothing is claimed" in card and "no verdict" in card and "Learned" not in card


@fault("export", "--to names no kind", "the kinds there are", exit_code=2)
def test_an_unknown_kind_is_refused(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    said = exported(capsys, tiny, tmp_path / "out", "--to", "onnx", code=2)
    assert "gguf" in said and "merged" in said


def test_a_number_format_of_another_kind_is_refused(
    tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    said = exported(capsys, tiny, tmp_path / "out", "--to", "merged", "--dtype", "q8_0", code=2)
    assert "bfloat16" in said and not (tmp_path / "out").exists()


def test_a_folder_that_is_no_export_is_never_overwritten(
    tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        exported(capsys, tiny, mine, "--to", "adapter", *flags, code=1)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@fault("export", "the disk is full in the middle", "that, and nothing half-written is left")
def test_a_full_disk_leaves_nothing_half_written(
    tiny: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(capsys, tiny, tmp_path / "out" / "gguf", "--to", "gguf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "gguf").iterdir()}
    real = gguf_file.write_gguf

    def fills(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise OSError("229376 requested and 1024 written")  # NumPy's words

    monkeypatch.setattr(gguf_file, "write_gguf", fills)
    flags = ["--to", "gguf", "--overwrite"]
    said = exported(capsys, tiny, tmp_path / "out" / "gguf", *flags, code=1)
    assert "disk is full" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gguf"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "gguf").iterdir()} == before


@fault("export", "what was written is not what was trained", "by how much, and nothing is kept")
@pytest.mark.parametrize(
    ("to", "dtype"),
    [("merged", "float32"), ("gguf", "float32"), ("merged", "bfloat16"), ("gguf", "q8_0")],
)
def test_the_base_in_place_of_the_trained_policy_is_found_out(
    to: str,
    dtype: str,
    train: Train,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "merged", lambda policy: policy.model.unload())
    run = train("qwen2.5-instruct", "lora")
    flags = ["--to", to, "--dtype", dtype]
    said = exported(capsys, run, tmp_path / "out", *flags, code=1)
    assert "not the trained policy" in said and not (tmp_path / "out").exists()


def test_a_query_matrix_in_the_wrong_order_is_found_out(
    train: Train, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "_interleaved", lambda weight, heads: weight)
    run = train("llama-3.2-instruct", "lora")
    said = exported(capsys, run, tmp_path / "out", "--to", "gguf", "--dtype", "float32", code=1)
    assert "not the trained policy" in said


@fault("export", "the package gguf is missing", "how to install it", exit_code=2)
def test_a_missing_gguf_package_is_said_before_any_work(
    tiny: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    said = exported(capsys, tiny, tmp_path / "out", "--to", "gguf", code=2)
    assert "abacist[export]" in said and "Asking" not in said


@fault("export", "the licence forbids the name", "a name that it allows", exit_code=2)
def test_a_name_that_the_licence_forbids_is_refused_before_any_work(
    train: Train, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    run = train("llama-3.2-instruct", "lora")
    flags = ["--to", "merged", "--push_to_hub", "me/Maths-1B"]
    said = exported(capsys, run, tmp_path / "out", *flags, code=2)
    assert "me/Llama-Maths-1B" in said and "Asking" not in said and not (tmp_path / "out").exists()


@fault("export", "there is no token for the Hub", "how to get one", exit_code=2)
def test_without_a_token_nothing_is_begun(
    tiny: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    flags = ["--to", "merged", "--push_to_hub", "me/tiny"]
    said = exported(capsys, tiny, tmp_path / "out", *flags, code=2)
    assert "token" in said and "Loading" not in said


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a" / "b", overwrite=False) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_llama_cpp_itself_reads_the_file_as_the_policy_that_was_trained(
    train: Train, tiny: Path, tmp_path: Path, capsys: Captured
) -> None:
    if llamacpp.find_runtime(None) is None:
        pytest.skip(f"no llama-cpp-python here; {llamacpp.VARIABLE} names a Python that has it")
    runs = [tiny, *(train(kind, "lora") for kind in LOOKALIKES)]
    for number, run in enumerate(runs):
        flags = ["--to", "gguf", "--dtype", "float32"]
        found = exported(capsys, run, tmp_path / str(number), *flags)
        reader, agreement = found["proofs"][1]["reader"], found["proofs"][1]["agreement"]
        assert "llama.cpp" in reader and agreement["largest_logp_difference"] < 1e-4
