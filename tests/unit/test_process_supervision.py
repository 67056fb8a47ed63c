"""``step_reward_weight``: tokens are paid for their own step, beside what their reply earns."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.cli.main import main
from abacist.errors import DataError, UsageError
from abacist.learning import process_supervision
from abacist.learning.arguments import GRPOConfig
from abacist.learning.config import load_config
from abacist.learning.process_supervision import step_advantages
from abacist.learning.rollout_rows import Scored
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import read_rollout_table, read_rollouts
from abacist.task.problems import load_problems
from abacist.task.prompts import to_dataset_rows
from abacist.task.reply import render_reply
from abacist.task.step_rewards import StepReward, step_rewards

Lookalike = Callable[[str], Path]
G = 4
SOLUTION = "5 * 4 = 20 pens\n20 - 3 = 17 pens"
GOLD = "17"
RIGHT = render_reply("She buys 5 * 4 = 20 pens.\nShe keeps 20 - 3 = 17 pens.\nSo 17.", "17")
ASTRAY = render_reply("She buys 5 * 4 = 20 pens.\nShe keeps 20 + 3 = 23, “all of them” – ½.", "23")
FALSE = render_reply("She buys 5 * 4 = 25 pens.\nShe keeps 25 - 3 = 22 pens.", "22")
BARE = render_reply("I think so: ½ é 日本.", "9")


class Characters:
    """A tokenizer whose tokens are single characters; 0 ends a reply."""

    def encode(self, text: str) -> list[int]:
        return [ord(one) for one in text]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(one) for one in ids if one)


def paid_steps(
    replies: list[str],
    alone: list[float],
    *,
    tokenizer: Any = None,
    weight: float = 1.0,
    size: int = G,
    solution: Any = SOLUTION,
) -> tuple[torch.Tensor, dict[str, list[float]], list[list[int]]]:
    """Advantages [N, T], what was logged, and the ids of the replies."""
    batch, logged, ids, _ = after_paying_steps(replies, alone, tokenizer, weight, size, solution)
    return batch["advantages"], logged, ids


def after_paying_steps(
    replies: list[str], alone: list[float], tokenizer: Any = None, weight: float = 1.0,
    size: int = G, solution: Any = SOLUTION, process: int = 0,
) -> tuple[Any, Any, Any, list[list[StepReward]]]:  # fmt: skip
    """The batch, what was logged, the ids of the replies, and the steps that were found."""
    tokenizer = tokenizer or Characters()
    ids = [[*tokenizer.encode(reply), 0] for reply in replies]
    width = max(map(len, ids)) + 3
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(step_reward_weight=weight),
        _tokenizer=tokenizer,
        eos_token_ids=[0],
        num_generations=size,
        accelerator=SimpleNamespace(process_index=process),
        _metrics={"train": defaultdict(list)},
    )
    rows = [{"answer": GOLD, "solution": solution}] * len(replies)
    scored = Scored(rows, [], replies, ids, torch.empty(0))
    batch = {
        "advantages": torch.tensor(alone),
        "completion_ids": torch.zeros(len(ids), width),
        "completion_mask": mask,
    }
    steps = process_supervision.pay_steps(trainer, scored, batch)
    return batch, trainer._metrics["train"], ids, steps


def test_each_token_has_what_its_reply_earned_and_what_its_step_did() -> None:
    replies, alone = [RIGHT, ASTRAY, FALSE, BARE], [1.5, -0.5, -0.5, -0.5]
    found, logged, _ = paid_steps(replies, alone, weight=0.5)
    rewards: list[list[float | None]] = [
        [1.0, 1.0, 1.0], [1.0, 0.0, None], [0.0, None, None], [0.0],
    ]  # fmt: skip
    judged = [one for of_reply in rewards for one in of_reply if one is not None]
    means, scale = [1 / 2, 1 / 2, 1.0], statistics.stdev(judged) + 1e-4
    for row, reply in enumerate(replies):
        expected = torch.full((found.shape[1],), alone[row])
        steps = step_rewards(reply, SOLUTION, is_correct=row == 0)
        assert [one.reward for one in steps] == rewards[row]
        for step, mean in zip(steps, means, strict=False):
            if step.reward is not None:
                expected[step.start : step.end] += 0.5 * (step.reward - mean) / scale
        expected[len(reply) + 1 :] = 0.0  # after its end
        torch.testing.assert_close(found[row], expected)
    assert logged["step_reward"] == [statistics.fmean(judged)]
    assert logged["frac_step_reward_zero_std"] == [0.0]


def test_a_group_whose_replies_go_wrong_alike_is_counted_as_one_without_signal() -> None:
    found, logged, _ = paid_steps([ASTRAY] * 4, [0.0] * 4, weight=0.5)
    assert logged["step_reward"] == [0.5] and logged["frac_step_reward_zero_std"] == [1.0]
    assert not found.any()


def test_a_step_is_compared_with_those_of_its_place_so_that_late_ones_are_not_discouraged() -> None:
    # All first steps are right, and half of the second ones: the first have nothing to teach.
    found = step_advantages([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert [of_reply[0] for of_reply in found] == [0.0] * 4
    assert found[0][1] == found[2][1] == -found[1][1] == -found[3][1] > 1


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), max_size=5), min_size=1, max_size=8)
)  # fmt: skip
def test_the_advantages_of_a_place_add_up_to_nothing(rewards: list[list[float | None]]) -> None:
    found = step_advantages(rewards)
    assert [len(of_reply) for of_reply in found] == [len(of_reply) for of_reply in rewards]
    for place in zip_longest(*found, fillvalue=0.0):
        assert sum(place) == pytest.approx(0.0, abs=1e-9)
    for of_reply, advantages in zip(rewards, found, strict=True):
        for reward, advantage in zip(of_reply, advantages, strict=True):
            assert advantage == 0 if reward is None else advantage * (reward - 0.5) >= 0


def test_a_group_in_which_no_reply_is_right_learns_from_its_steps() -> None:
    found, _, _ = paid_steps([ASTRAY, FALSE], [0.0, 0.0], size=2)
    kept, wrong = ASTRAY.index("She buys"), FALSE.index("She buys")
    assert found[0, kept] > 0 > found[1, wrong]
    assert found[0, len(ASTRAY) - 5] == found[1, len(FALSE) - 5] == 0  # the answers


def test_groups_are_compared_with_themselves_alone() -> None:
    one, _, _ = paid_steps([RIGHT, ASTRAY], [1.0, -1.0], size=2)
    both, _, _ = paid_steps([RIGHT, ASTRAY, FALSE, FALSE], [1.0, -1.0, 0.0, 0.0], size=2)
    assert torch.equal(both[:2, : one.shape[1]], one[:, : both.shape[1]])
    assert not both[2:].any()  # all its steps are alike


def test_each_process_pays_its_own_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    replies, alone = [RIGHT, ASTRAY, FALSE, ASTRAY], [1.0, -1.0, 0.5, -0.5]
    whole, logged, _, _ = after_paying_steps(replies, alone, size=2)
    of_first = [
        [one.reward for one in step_rewards(reply, SOLUTION, is_correct=reply == RIGHT)]
        for reply in replies[:2]
    ]
    monkeypatch.setattr(process_supervision, "gather_object", lambda mine: of_first + mine)
    second, logged_there, _, steps = after_paying_steps(replies[2:], alone[2:], size=2, process=1)
    width = second["advantages"].shape[1]
    assert torch.equal(second["advantages"], whole["advantages"][2:, :width])
    assert logged_there == logged and len(steps) == 2


def test_without_a_gold_no_conclusion_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GOLD", None)
    *_, steps = after_paying_steps([RIGHT, ASTRAY], [0.0, 0.0], size=2)
    assert [[one.reward for one in of_reply] for of_reply in steps] == [[1, 1, None], [1, 0, None]]


@pytest.mark.parametrize("solution", ["It is 17.", "", None, 17])
def test_without_steps_in_the_reference_right_replies_still_show_the_way(solution: Any) -> None:
    found, logged, _ = paid_steps([RIGHT, ASTRAY], [1.0, -1.0], size=2, solution=solution)
    at = ASTRAY.index("She buys")
    assert found[0, at] > 1 and found[1, at] < -1 and logged["step_reward"] == [3 / 4]


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "llama-3.2-instruct"])
def test_the_tokens_of_a_step_write_the_step_and_no_more(name: str, lookalike: Lookalike) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lookalike(name))
    ids = tokenizer.encode(ASTRAY, add_special_tokens=False)
    text = process_supervision.CompletionText(ids, tokenizer.decode)
    for step in step_rewards(ASTRAY, SOLUTION, is_correct=False):
        first, last = text.tokens_until(step.start), text.tokens_until(step.end)
        written = tokenizer.decode(ids[first:last])
        assert written.strip("\n") in ASTRAY[step.start : step.end + 3]
        assert ASTRAY[step.start : step.end].strip() in written.strip()


@given(st.lists(st.sampled_from("a é²日\n\ud83d𝄞"), max_size=12).map("".join), st.data())
def test_as_few_tokens_as_write_so_many_characters(text: str, data: st.DataObject) -> None:
    ids = Characters().encode(text)
    found = process_supervision.CompletionText(ids, Characters().decode)
    chars = data.draw(st.integers(0, len(text)))
    assert found.whole == text and found.tokens_until(chars) == chars


def test_no_beginning_of_a_long_reply_is_written_out_twice() -> None:
    tried: list[int] = []

    class Counting(Characters):
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            tried.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    reply = "1 + 1 = 2\n" * 200
    text = process_supervision.CompletionText(Counting().encode(reply), Counting().decode)
    steps = step_rewards(text.whole, SOLUTION, is_correct=True)
    paid = process_supervision.by_token([text], [steps], [[1.0] * len(steps)], len(reply))
    assert len(steps) == 200 and paid.all() and len(tried) <= len(set(tried)) + 1


@pytest.mark.parametrize(("shown", "count"), [("4 + 4 = 8", 1), ("4 + 4 = 9", 0), ("", 0)])
def test_solutions_count_that_show_a_true_equation(shown: str, count: int) -> None:
    rows = [{"question": f"{question} {shown}?", "answer": f"{text}\n#### 8"}
            for question, text in (("How many", shown), ("And how many", "It is 8."))]  # fmt: skip
    found = process_supervision.showing_steps(load_problems(rows, split="all"))
    assert found == (count, 2)
    with pytest.raises(DataError, match="needs worked solutions") if not count else nullcontext():
        process_supervision.refuse_without_equations(*found)


def test_solutions_are_found_that_stand_late_in_the_data() -> None:
    rows = [{"question": f"How much is {at} + 1?", "answer": str(at + 1)} for at in range(900)]
    rows += [{"question": f"And {at} + 2?", "answer": f"{at} + 2 = {at + 2}\n#### {at + 2}"}
             for at in range(100)]  # fmt: skip
    problems = load_problems(rows, split="all")
    assert process_supervision.showing_steps(problems) == (20, 200)


# With TRL


QUESTIONS = [f"Ada buys {n} packs of 4 pens and gives 3 away. How many?" for n in range(2, 10)]
ROWS = [
    {
        "prompt": [{"role": "user", "content": question}],
        "answer": str(4 * n - 3),
        "solution": f"{n} * 4 = {4 * n}\n{4 * n} - 3 = {4 * n - 3}",
    }
    for n, question in enumerate(QUESTIONS, start=2)
]


def length(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [float(len(ids) % 3) for ids in completion_ids]


def make(folder: Path, output: Path, kind: type = GRPOTrainer, **settings: Any) -> Any:
    """A trainer whose replies are written for it: of four, one right, two astray, one bare."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    torch.manual_seed(0)
    rows = settings.pop("rows", ROWS)
    given_settings: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "num_generations": G,
        "per_device_train_batch_size": 2 * G, "max_completion_length": 90, "learning_rate": 0.01,
        "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "step_reward_weight": 1.0, **settings,
    }  # fmt: skip
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=[length],
        args=GRPOConfig(**given_settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )

    def written(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        texts = []
        for at, ids in enumerate(prompt_ids):
            n = int(tokenizer.decode(ids).split("buys ")[1].split()[0])
            right, astray = f"{n} * 4 = {4 * n}\n", f"{n} + 4 = {n + 4}\n"
            ways = (
                right + f"{4 * n} - 3 = {4 * n - 3}",
                right + f"{4 * n} + 3 = 99",
                astray,
                f"No {n}",
            )
            texts.append(render_reply(ways[at % G], "1"))
        stop = trainer.eos_token_ids[0]
        return [[*tokenizer.encode(one, add_special_tokens=False), stop] for one in texts], None

    trainer._generate_single_turn = written
    trainer.model.train()
    return trainer


def batches_of(trainer: Any) -> list[dict[str, Any]]:
    rows = [row for row in list(trainer.train_dataset)[:2] for _ in range(G)]
    trainer._prepare_inputs(rows)
    return list(trainer._buffered_inputs)


def gradient(trainer: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_what_rounding_leaves_of_equal_rewards_is_no_signal(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    trainer = make(lookalike("qwen2.5-instruct"), tmp_path, num_generations=8,
                   per_device_train_batch_size=16)  # fmt: skip
    trainer.reward_funcs = [lambda completions, **columns: [0.3] * len(completions)]
    rows = [row for row in list(trainer.train_dataset)[:2] for _ in range(8)]
    batch = trainer._generate_and_score_completions(rows)
    if not torch.tensor(list(trainer._logs["advantages"])).any():  # TRL's copy
        pytest.skip("the mean of equal rewards is exact on this machine")
    of_steps, ends = batch["advantages"], batch["completion_mask"].sum(dim=1) - 1
    assert of_steps[2].any()  # it went astray, and its conclusion is not judged
    assert of_steps[2, ends[2]] == 0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_gradient_is_stock_trls_of_these_advantages(
    loss_type: str, micro_batches: int, lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    ours = make(folder, tmp_path, loss_type=loss_type, gradient_accumulation_steps=micro_batches,
                per_device_train_batch_size=2 * G // micro_batches)  # fmt: skip
    batches = batches_of(ours)
    assert all(one["advantages"].shape == one["completion_ids"].shape for one in batches)
    stock = make(folder, tmp_path, trl.GRPOTrainer, loss_type=loss_type,
                 gradient_accumulation_steps=micro_batches,
                 per_device_train_batch_size=2 * G // micro_batches)  # fmt: skip
    expected, found = gradient(stock, batches), gradient(ours, batches)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    without = [one | {"advantages": one["advantages"].mean(dim=1)} for one in batches]
    assert float((gradient(stock, without) - expected).abs().max()) > 1e-3 * float(
        expected.abs().max()
    )


def test_replies_are_chosen_by_how_large_their_tokens_advantages_are(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    trainer = make(lookalike("qwen2.5-instruct"), tmp_path, train_replies=2)
    (batch,) = batches_of(trainer)
    kept = batch["completion_mask"].any(dim=1)
    assert int(kept.sum()) == 4 and not batch["advantages"][~kept].any()
    whole = batches_of(make(lookalike("qwen2.5-instruct"), tmp_path))[0]
    sizes = [
        math.sqrt(float((row[row != 0] ** 2).mean())) if row.any() else 0.0
        for row in whole["advantages"]
    ]
    chosen = {tuple(ids.tolist()) for ids in batch["completion_ids"][kept]}
    is_chosen = [tuple(ids.tolist()) in chosen for ids in whole["completion_ids"]]
    for at in (0, G):
        group = list(zip(sizes[at : at + G], is_chosen[at : at + G], strict=True))
        inside, outside = (
            [size for size, one in group if one is wanted] for wanted in (True, False)
        )
        assert len(inside) == 2 and min(inside) >= max(outside) - 1e-4


def test_rollouts_keep_what_the_reply_as_a_whole_earned_and_how_each_step_was_paid(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    folder, kept = lookalike("qwen2.5-instruct"), {}
    for weight in (0.0, 1.0):
        trainer = make(folder, tmp_path / str(weight), step_reward_weight=weight,
                       keep_rollouts=True, max_steps=1)  # fmt: skip
        trainer.train()
        kept[weight] = [one.advantage for one in read_rollouts(tmp_path / str(weight) / "rollouts")]
        assert ("step_reward" in trainer.state.log_history[0]) is (weight > 0)
    assert kept[0.0] == kept[1.0]
    # Of a run that pays no steps the file is as it always was.
    names = {weight: read_rollout_table(tmp_path / str(weight) / "rollouts").column_names
             for weight in kept}  # fmt: skip
    assert names[1.0] == [*names[0.0], "steps"]
    solutions = {row["answer"]: row["solution"] for row in ROWS}
    outcomes = set()
    for one in read_rollouts(tmp_path / "1.0" / "rollouts"):
        expected = step_rewards(
            one.completion, solutions[str(one.gold)], is_correct=bool(one.is_correct)
        )
        assert one.steps == expected
        outcomes.add(tuple(step.outcome for step in expected))
    assert outcomes == {
        ("right", "right", "wrong"), ("right", "wrong", "not judged"),
        ("wrong", "not judged"), ("wrong",),
    }  # fmt: skip


def test_each_reply_has_its_own_steps_in_the_order_of_the_replies() -> None:
    replies = [ASTRAY, BARE, RIGHT, FALSE]
    *_, found = after_paying_steps(replies, [0.0] * len(replies))
    for of_reply, reply in zip(found, replies, strict=True):
        assert of_reply == step_rewards(reply, SOLUTION, is_correct=reply == RIGHT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step_reward_weight", "-1"], r"--step_reward_weight -1.* is not at least 0"),
        (["--step_reward_weight", "1", "--loss_type", "vespo"], r"1 pays tokens, and --loss_type"),
        (["--step_reward_weight", "1", "--loss_type", "luspo", "--importance_sampling_level",
          "sequence"], r"pays tokens, and --loss_type luspo"),
        (["--step_reward_weight", "2", "--importance_sampling_level", "sequence"],
         r"--step_reward_weight 2 pays tokens, and --importance_sampling_level"),
        (["--step_reward_weight", "1", "--off_policy_mask_threshold", "0.5"], r"pays tokens"),
        (["--step_reward_weight", "1", "--use_liger_kernel", "true"],
         r"1 pays tokens, and --use_liger_kernel"),
    ],
)  # fmt: skip
def test_what_weighs_whole_replies_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, None, flags)
    load_config(None, None, [*flags, "--step_reward_weight", "0"])


@pytest.mark.parametrize("control", ["random", "format"])
def test_a_placebo_pays_no_steps(control: str) -> None:
    flags = ["--control", control, "--step_reward_weight"]
    config = load_config("tiny", None, [*flags, "0.5"])
    assert config.training.step_reward_weight == 0 and "step_reward_weight" not in config.to_yaml()
    assert f"without step_reward_weight: --control {control} does not pay" in config.notes[0]
    assert not any("without" in note for note in load_config("tiny", None, [*flags, "0"]).notes)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_amount_is_refused_in_a_script_too(
    weight: float, lookalike: Lookalike, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"must be a finite number of at least 0"):
        make(lookalike("qwen2.5-instruct"), tmp_path, step_reward_weight=weight)


@pytest.mark.parametrize("lacks", ["solution", "answer"])
def test_data_without_solutions_is_refused_before_anything_is_done(
    lacks: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    rows = [{name: value for name, value in row.items() if name != lacks} for row in ROWS]
    with pytest.raises(DataError, match="needs the columns answer and solution"):
        make(lookalike("qwen2.5-instruct"), tmp_path, rows=rows)
    make(lookalike("qwen2.5-instruct"), tmp_path, rows=rows, step_reward_weight=0.0)


def test_the_command_pays_steps_and_logs_how_many_are_right(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([
        "train", "--step_reward_weight", "1", "--max_steps", "2", "--num_generations", "4",
        "--per_device_train_batch_size", "16", "--num_heldout_problems", "0",
        "--num_selection_problems", "0", "--eval_strategy", "no", "--output_dir", str(run),
    ]) == 0  # fmt: skip
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    shares = [line["step_reward"] for line in logged if "step_reward" in line]
    assert len(shares) == 2 and all(0 < share <= 1 for share in shares)


def test_the_command_refuses_data_without_worked_solutions_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "bare.jsonl", tmp_path / "run"
    rows = [{"question": question, "answer": str(4 * n)} for n, question in enumerate(QUESTIONS)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["train", "--dataset_name", str(data), "--output_dir", str(run), "--num_generations",
             "2", "--per_device_train_batch_size", "2", "--max_steps", "1",
             "--num_heldout_problems", "0", "--eval_strategy", "no"]  # fmt: skip
    assert main([*flags, "--step_reward_weight", "1"]) != 0
    said = capsys.readouterr().err
    assert "needs worked solutions" in said and "Traceback" not in said and not run.exists()
    assert main([*flags, "--step_reward_weight", "0"]) == 0
    # A recipe that pays steps is for GSM8K; of other data it does not demand solutions.
    capsys.readouterr()
    recipe = ["train", "qwen2.5-0.5b", "--model_name_or_path", "tiny", *flags[1:], "--num_shots",
              "0", "--gradient_accumulation_steps", "1", "--overwrite"]  # fmt: skip
    assert main(recipe) == 0
    said = capsys.readouterr().out
    assert re.search(r"without the recipe's step_reward_weight: 0 of \d worked solutions", said)
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert "step_reward_weight" not in settings
    assert main(["train", "--resume", str(run), "--max_steps", "2"]) == 0
    # The command that began it resumes it too.
    again = [*recipe[:-1], "--resume", str(run), "--max_steps", "2"]
    at = again.index("--output_dir")
    capsys.readouterr()
    assert main(again[:at] + again[at + 2 :]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["5 * 4 = 20", None, 3, ""])
def test_one_rule_says_which_solution_a_problem_is_paid_by(column: Any) -> None:
    rows = [
        {"question": question, "answer": f"{n} * 4 = {4 * n}\n#### {4 * n}", "solution": column}
        for n, question in enumerate(QUESTIONS, start=2)
    ]
    without = [{name: row[name] for name in ("question", "answer")} for row in rows]
    for problems in (load_problems(rows, split="all"), load_problems(without, split="all")):
        for problem, row in zip(problems, to_dataset_rows(problems, solutions=True), strict=True):
            of_row = process_supervision.reference_in(row)
            assert process_supervision.reference_of(problem) == of_row
    assert "* 4 =" in of_row
    assert process_supervision.reference_in({"solution": column}) == (
        column if isinstance(column, str) else ""
    )
