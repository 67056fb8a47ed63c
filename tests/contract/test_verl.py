"""Our data and reward as verl uses them.

Where verl is installed (it wants ray and torch; an environment of its own), its own data set, its
loader of reward functions and its reward manager run them. Without it, what they do is done here:
the schema is read as they read it, and the function is called with their keywords.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abacist.delivery.neighbours.verl_data import write_verl_data
from abacist.delivery.neighbours.verl_reward import compute_score
from abacist.errors import AbacistError
from abacist.task.problems import load_problems
from abacist.task.prompts import SYSTEM_PROMPT, build_messages
from abacist.task.rewards import REWARD_SETS

TRAIN, HELDOUT = (load_problems("generated", split=one, limit=6) for one in ("train", "heldout"))
SHOTS = tuple(load_problems("generated", limit=9, seed=4)[-2:])
LAYOUT = "<reasoning>\nso\n</reasoning>\n<answer>\n{}\n</answer>"
TEXTS = [LAYOUT, "<answer>{}</answer>", "{}", "", "<answer>${}.00</answer> and more", LAYOUT + "\n"]


def earned(text: str, gold: str) -> dict[str, float]:
    return {
        reward.__name__: reward([""], [text], answer=[gold])[0] for reward in REWARD_SETS["default"]
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("verl")
    return write_verl_data(folder, {"train": TRAIN, "test": HELDOUT}, shots=SHOTS)


def test_rows_have_verls_columns_and_our_prompt(files: list[Path]) -> None:
    train, test = (pq.read_table(path).to_pylist() for path in files)
    for rows, problems, split in ((train, TRAIN, "train"), (test, HELDOUT, "test")):
        assert [path.stem for path in files] == ["train", "test"]
        for index, (row, problem) in enumerate(zip(rows, problems, strict=True)):
            assert list(row) == [
                "data_source", "prompt", "ability", "reward_model", "extra_info",
            ]  # fmt: skip
            assert row["prompt"] == build_messages(
                problem.question, system_prompt=SYSTEM_PROMPT, shots=SHOTS
            )
            assert row["reward_model"] == {"style": "rule", "ground_truth": problem.answer}
            assert (row["extra_info"]["split"], row["extra_info"]["index"]) == (split, index)


@settings(max_examples=100)
@given(st.text(max_size=200))
@example("<answer>" * 20_000)
@example("\ud800")
def test_a_score_is_the_sum_of_our_rewards_whatever_was_written(text: str) -> None:
    found = compute_score(
        data_source="abacist", solution_str=text, ground_truth="18",
        extra_info={"num_turns": None, "rollout_reward_scores": {}}, reward_router_address=None,
    )  # fmt: skip
    paid = earned(text, "18")
    assert found == {"score": sum(paid.values()), "acc": paid["correctness"] / 2, **paid}


def test_what_exists_is_left_alone_and_empty_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AbacistError, match="holds no problems"):
        write_verl_data(tmp_path, {"train": TRAIN, "test": []})
    assert not list(tmp_path.iterdir())
    (tmp_path / "train.parquet").write_text("mine", encoding="utf-8")
    with pytest.raises(AbacistError, match="exists"):
        write_verl_data(tmp_path, {"test": HELDOUT, "train": TRAIN})
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]


# --- with verl itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verl() -> Any:
    return pytest.importorskip("verl", reason="verl is not installed here")


def test_verls_own_data_set_reads_the_files(
    verl: Any, files: list[Path], lookalike: Callable[[str], Path]
) -> None:
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    rl_dataset = importlib.import_module("verl.utils.dataset.rl_dataset")
    tokenizer = AutoTokenizer.from_pretrained(lookalike("qwen2.5-instruct"))
    config = OmegaConf.create({"max_prompt_length": 2048, "filter_overlong_prompts_workers": 1})
    rows = rl_dataset.RLHFDataset([str(files[0])], tokenizer, config)
    assert len(rows) == len(TRAIN)
    for row, problem in zip(rows, TRAIN, strict=True):
        assert row["raw_prompt"] == build_messages(
            problem.question, system_prompt=SYSTEM_PROMPT, shots=SHOTS
        )
        assert row["reward_model"]["ground_truth"] == problem.answer


def test_verls_own_loader_and_reward_manager_pay_what_we_pay(
    verl: Any, files: list[Path], lookalike: Callable[[str], Path]
) -> None:
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    custom = importlib.import_module("verl.trainer.ppo.reward").get_custom_reward_fn
    manager = importlib.import_module("verl.workers.reward_manager.naive").NaiveRewardManager
    config = OmegaConf.create({"reward": {"custom_reward_function": {
        "path": "pkg://abacist.delivery.neighbours.verl_reward", "name": "compute_score"}}}
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(lookalike("qwen2.5-instruct"))
    rows = pq.read_table(files[0]).to_pylist()
    texts = [text.format(problem.answer) or " " for text, problem in zip(TEXTS, TRAIN, strict=True)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id
    responses = torch.tensor([one + [pad] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * (1 + len(one)) + [0] * (longest - len(one)) for one in ids])
    batch = verl.DataProto.from_dict(
        tensors={
            "prompts": torch.full((len(ids), 1), pad), "responses": responses,
            "attention_mask": mask,
        },
        non_tensors={
            "data_source": [row["data_source"] for row in rows],
            "reward_model": [row["reward_model"] for row in rows],
            "extra_info": [row["extra_info"] for row in rows],
        },
    )  # fmt: skip
    paid = manager(tokenizer, num_examine=0, compute_score=custom(config))(batch, return_dict=True)
    for row, (text, problem) in enumerate(zip(texts, TRAIN, strict=True)):
        expected = earned(text, problem.answer)
        assert paid["reward_tensor"][row].sum().item() == pytest.approx(sum(expected.values()))
        assert paid["reward_tensor"][row, len(ids[row]) - 1] == paid["reward_tensor"][row].sum()
        for name, value in expected.items():
            assert paid["reward_extra_info"][name][row] == value
