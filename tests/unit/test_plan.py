"""The plan of a run: what it predicts is what is measured, and what it advises follows from it."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers.training_args import OptimizerNames

from abacist.learning.config import Config, load_config
from abacist.learning.dryrun import memory
from abacist.learning.dryrun.memory import Forward, Memory, Part, _saved_bytes, measure_forward
from abacist.learning.dryrun.plan import Plan, _learning_rate, _trial_of, recommend, warn
from abacist.learning.dryrun.probe import GROUP_SIZES, Probe, SolveRates
from abacist.learning.estimate.cost import total_steps
from abacist.learning.health.history import Facts
from abacist.learning.health.rules import rate_out_of_band
from abacist.learning.heldout import HeldoutEvaluation
from abacist.learning.tracking import Silent
from abacist.learning.train import load_parts, make_trainer
from abacist.policy.decoding.cache import Cache
from abacist.policy.decoding.network import DecodingNetwork
from abacist.policy.kernels.decode import Packed
from abacist.proof.statistics import Interval
from abacist.records.rundir import RunDir
from abacist.view.plantext import WIDTH, plan_text

GIB = 2**30
BFLOAT16 = torch.bfloat16
SMALL = ["--num_train_problems", "24", "--num_heldout_problems", "0", "--eval_strategy", "no",
         "--per_device_train_batch_size", "16"]  # fmt: skip

rates = st.integers(1, 12).flatmap(
    lambda samples: st.lists(st.integers(0, samples), min_size=1, max_size=40).map(
        lambda solved: SolveRates(solved, samples)
    )
)


@given(rates)
def test_larger_groups_are_never_predicted_to_be_mixed_less_often(found: SolveRates) -> None:
    shares = [found.predicted_mixed(size).value for size in GROUP_SIZES]
    assert shares == sorted(shares)
    for size in GROUP_SIZES:
        share = found.predicted_mixed(size)
        assert 0 <= share.low <= share.high <= 1 and share.n == len(found.solved)


@given(rates)
def test_the_prediction_knows_no_right_from_wrong(found: SolveRates) -> None:
    mirrored = SolveRates([found.samples - right for right in found.solved], found.samples)
    assert mirrored.predicted_mixed(16).value == pytest.approx(found.predicted_mixed(16).value)


@pytest.mark.parametrize(("first", "second"), [(0.3, 0.5), (2, 2), (0.1, 2)])
def test_the_interval_holds_the_true_share_about_as_often_as_it_says(
    first: float, second: float
) -> None:
    generator = np.random.default_rng(0)
    population = generator.beta(first, second, 100_000)
    hits = {size: 0 for size in GROUP_SIZES}
    rounds = 100
    for _ in range(rounds):
        solved = generator.binomial(8, generator.beta(first, second, 32))
        found = SolveRates([int(right) for right in solved], 8)
        for size in GROUP_SIZES:
            true = np.mean(1 - population**size - (1 - population) ** size)
            share = found.predicted_mixed(size)
            hits[size] += bool(share.low <= true <= share.high)
    # 95 in 100 claimed; the standard deviation of this count is 2.2.
    assert min(hits.values()) >= 88


def test_without_one_right_reply_it_is_not_certain_that_none_will_come() -> None:
    share = SolveRates([0] * 32, 8).predicted_mixed(32)
    assert share.low < 0.01 and 0.1 < share.high < 0.4


class Assembled:
    """A run of the built-in model as the dry run assembles it, in a folder of the test's."""

    def __init__(self, folder: Path, *flags: str) -> None:
        config = load_config(None, None, [*SMALL, *flags])
        task, rewards, self.policy = load_parts(config, Silent())
        run = RunDir(folder)
        trial = _trial_of(config, folder)
        judge = HeldoutEvaluation(trial, task, run, Silent())
        self.config, self.task = config, task
        self.trainer: Any = make_trainer(self.policy, rewards, judge)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    return Assembled(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("flags", [[], ["--no_use_fast_path"], ["--no_use_peft"]])
def test_what_a_full_batch_keeps_is_foretold_by_small_ones(
    flags: list[str], tmp_path: Path
) -> None:
    trainer = Assembled(tmp_path, *flags).trainer
    forward = measure_forward(trainer, prompt_tokens=50, completion_tokens=96)
    hidden, layers = 192 * 4, 4
    foretold = forward.kept_bytes(16, hidden, layers, checkpointing=False)
    kept = _saved_bytes(trainer, 2, 8, 50, 96)
    assert foretold == pytest.approx(kept, rel=0.05)
    assert forward.kept_bytes(16, hidden, layers, checkpointing=True) < foretold


def test_where_each_reply_has_a_prompt_of_its_own_no_more_than_two_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Assembled(tmp_path, "--no_use_fast_path").trainer
    measured = []

    def count(trainer: Any, groups: int, size: int, prompt: int, completion: int) -> int:
        measured.append(groups * size)
        return _saved_bytes(trainer, groups, size, prompt, completion)

    monkeypatch.setattr(memory, "_saved_bytes", count)
    assert measure_forward(trainer, 50, 96).group_size == 8
    assert max(measured) == 2


class _OnItsContext(torch.autograd.Function):
    """Squares, and keeps its input as bitsandbytes' product in 8 bits does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = (x, "no tensor")
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.kept[0] * grads[0]


class _SavedByAutograd(torch.autograd.Function):
    """The same by the rules."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


def _scoring_by(score: Any) -> Any:
    """A trainer of one linear layer, as far as its forward is measured."""
    model: Any = torch.nn.Linear(1, 50)
    model.device = torch.device("cpu")
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(autocast=nullcontext),
        _get_per_token_logps_and_entropies=score,
    )


@pytest.mark.parametrize("square", [_OnItsContext, _SavedByAutograd])
def test_a_tensor_that_a_function_keeps_is_counted_wherever_it_keeps_it(square: Any) -> None:
    def score(model: Any, ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        # The second keeps what the first made, and it is the first's output that a sum follows.
        return square.apply(square.apply(model(ids.float()[..., None]))).sum(-1), None

    tokens, hidden = 2 * 3 * (4 + 5), 50
    floats_of_linear = tokens * 1
    found = _saved_bytes(_scoring_by(score), 2, 3, 4, 5)
    assert found == 4 * (floats_of_linear + 2 * tokens * hidden)


def test_what_a_measured_forward_kept_is_freed_after_it() -> None:
    class Token:
        pass

    class Holding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.token = Token()
            held.append(weakref.ref(ctx.token))
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    def score(model: Any, ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        # An exponential saves its output, which leads back to it.
        return Holding.apply(model(ids.float()[..., None])).exp().sum(-1), None

    held: list[weakref.ref[Token]] = []
    _saved_bytes(_scoring_by(score), 2, 3, 4, 5)
    gc.collect()
    assert len(held) == 1 and held[0]() is None


def test_micro_batches_that_will_be_read_together_are_counted_together(tmp_path: Path) -> None:
    flags = ["--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "8"]
    trainer = Assembled(tmp_path, *flags).trainer

    def foretold(prompt_tokens: int) -> int:
        forward = measure_forward(trainer, prompt_tokens, completion_tokens=30)
        (part,) = memory._training_parts(trainer, forward)[:1]
        return part.bytes - int(forward.kept_bytes(8, 192 * 4, 4, checkpointing=False))

    assert foretold(prompt_tokens=20) == 0  # a group alone has more than a third
    assert foretold(prompt_tokens=600) > 0
    trainer.args.gradient_accumulation_steps = 1
    assert foretold(prompt_tokens=600) == 0


def test_the_measurement_leaves_weights_and_gradients_as_they_were(tiny: Assembled) -> None:
    before = {name: p.detach().clone() for name, p in tiny.trainer.model.named_parameters()}
    measure_forward(tiny.trainer, 40, 32)
    for name, weight in tiny.trainer.model.named_parameters():
        assert torch.equal(before[name], weight) and weight.grad is None


def test_the_copy_to_decode_with_has_the_size_that_the_engine_makes_it(tiny: Assembled) -> None:
    model: Any = tiny.trainer.model
    with torch.inference_mode():
        network = DecodingNetwork(model, 8)
    products: list[Any] = [network.head]
    for layer in network.layers:
        products += [layer.query_key_value, layer.attention_out, layer.swiglu, layer.down]
    if not all(isinstance(product, Packed) for product in products):
        pytest.skip("without kernels the engine copies nothing that tells its size")
    made = 4 * sum(product._packed.numel() for product in products)
    # Packed weights are filled up to whole panels.
    assert made == pytest.approx(memory._copied_bytes(model.get_base_model()), rel=0.02)


def test_the_cache_of_keys_and_values_has_the_size_that_the_engine_makes_it(
    tiny: Assembled,
) -> None:
    trainer, budget = tiny.trainer, tiny.trainer.max_completion_length
    with torch.inference_mode():
        network = DecodingNetwork(trainer.model, 8)

    def made(prompts: int, rows: int) -> int:
        cache = Cache(network, max_rows=rows, max_prompts=prompts, prompt_tokens=50,
                      completion_tokens=budget)  # fmt: skip
        return cache._prompts.nbytes + cache._rows.nbytes

    def foretold(eval_rows: int) -> int:
        parts = {part.name: part for part in memory._rollout_parts(trainer, 50, eval_rows)}
        assert parts["KV cache"].phase == "rollout"
        return parts["KV cache"].bytes

    rows = trainer.args.generation_batch_size
    assert foretold(eval_rows=0) == made(rows // trainer.num_generations, rows)
    # A measurement of more problems than a step has replies needs more.
    assert foretold(eval_rows=4 * rows) == made(4 * rows, 4 * rows)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_the_state_of_an_optimizer_has_the_size_that_torch_makes_it(name: str, kind: Any) -> None:
    trained = [torch.nn.Parameter(torch.ones(30, 7, dtype=d)) for d in (torch.float32, BFLOAT16)]
    optimizer = kind(trained)
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values()]
    made = sum(one.nbytes for one in state if one.numel() > 1)  # steps are counted in one number
    assert memory.optimizer_bytes(OptimizerNames(name), trained) == made


def test_moments_in_8_bits_take_a_byte_each() -> None:
    trained = [torch.ones(30, 7, dtype=torch.float32)]
    for name, bytes_each in (("adamw_bnb_8bit", 2), ("paged_adamw_8bit", 2), ("lion_8bit", 1)):
        assert memory.optimizer_bytes(name, trained) == bytes_each * 210


def test_a_kl_term_needs_a_second_model_only_where_all_weights_are_trained(
    tiny: Assembled, tmp_path: Path
) -> None:
    def parts(trainer: Any) -> dict[str, int]:
        found = memory.plan_memory(trainer, Forward(0.0, 1e6, 100, 8, 96), 50, eval_rows=0)
        assert found.device == "cpu" and all(part.bytes > 0 for part in found.parts)
        return {part.name: part.bytes for part in found.parts if part.phase == "both"}

    full = Assembled(tmp_path, "--no_use_peft", "--beta", "0.04").trainer
    weights = sum(p.nbytes for p in full.model.parameters())
    found = parts(full)
    assert found.keys() == {"weights", "reference model", "optimizer state"}
    assert found["reference model"] == found["weights"] == pytest.approx(weights, rel=0.01)
    assert found["optimizer state"] == pytest.approx(2 * weights, rel=0.01)
    full.args.beta = 0.0
    assert parts(full).keys() == {"weights", "optimizer state"}
    tiny.trainer.args.beta = 0.04
    assert "reference model" not in parts(tiny.trainer)  # it is the same model without its adapter
    tiny.trainer.args.beta = 0.0


def test_the_parts_add_up_and_checkpointing_and_small_batches_need_less(tiny: Assembled) -> None:
    forward = measure_forward(tiny.trainer, 50, 96)
    found = memory.plan_memory(tiny.trainer, forward, 50, eval_rows=0)
    shared = sum(part.bytes for part in found.parts if part.phase == "both")
    assert found.training_bytes == shared + sum(
        part.bytes for part in found.parts if part.phase == "training"
    )
    own = sum(p.numel() * p.element_size() for p in tiny.trainer.model.parameters())
    assert found.loaded_bytes == pytest.approx(own, rel=0.01)

    def changed(rows: int, checkpointing: bool) -> int:
        return memory.with_micro_batch(
            found, tiny.trainer, forward, rows, checkpointing
        ).training_bytes

    assert changed(16, False) == found.training_bytes
    assert changed(8, False) < changed(16, False) and changed(16, True) < changed(16, False)


def interval(value: float) -> Interval:
    return Interval(value, value, value, 32, "told")


def planned(solved: list[int], **told: Any) -> Plan:
    """A plan with these solve rates, plenty of memory, and whatever else is told."""
    shares = {"correct": 0.5, "any_format": 0.5, "strict": 0.5, "adheres": 0.5, "stopped": 1.0}
    shares |= told.pop("figures", {})
    probe = Probe(
        rates=SolveRates(solved, 8),
        figures={name: interval(value) for name, value in shares.items()},
        rewards={"correctness": interval(1.0)},
        varied=interval(told.pop("varied", 0.5)),
        lengths=told.pop("lengths", (60,) * 256),
        seconds=2.0,
    )
    there = told.pop("available_bytes", 8 * GIB)
    parts = (Part("weights", GIB), Part("KV cache", GIB, "rollout"))
    return Plan(
        model="\x1b[2Jmine", steps=60, problems_per_step=2, num_generations=8, budget_tokens=96,
        longest_prompt_tokens=50, memory=Memory(parts, there, "cpu"), burst=None, seconds={},
        checkpoint_bytes=0, probe=probe,
    )  # fmt: skip


def advised(plan: Plan, tiny: Assembled, config: Config | None = None) -> dict[str, Any]:
    forward = Forward(0.0, 1e6, 100, 8, 96)
    found = recommend(plan, config or tiny.config, tiny.trainer, forward, 2048)
    return {one.setting: one for one in found}


def test_larger_groups_are_advised_where_they_would_be_mixed_and_not_where_none_would(
    tiny: Assembled,
) -> None:
    some = advised(planned([1] * 8 + [0] * 24), tiny)["num_generations"]
    assert some.flags.startswith("--num_generations ") and "not" in some.reason
    assert advised(planned([0] * 32), tiny)["num_generations"].flags == ""
    assert advised(planned([8] * 32), tiny)["num_generations"].flags == ""
    assert advised(planned([4] * 32), tiny)["num_generations"].flags == ""


def test_the_flags_it_gives_are_taken_by_train(tiny: Assembled) -> None:
    plan = planned(
        [1] * 8 + [0] * 24, figures={"stopped": 0.5}, lengths=(96,) * 256, available_bytes=2**20
    )
    flags = [one.flags for one in advised(plan, tiny).values() if one.flags]
    assert len(flags) >= 3
    for given_flags in flags:
        load_config("tiny", None, [*SMALL, *given_flags.split()])


def test_a_budget_that_cuts_is_raised_and_one_that_is_never_used_is_lowered(
    tiny: Assembled,
) -> None:
    cut = advised(planned([4] * 32, figures={"stopped": 0.5}, lengths=(96,) * 256), tiny)
    assert cut["max_completion_length"].flags == "--max_completion_length 192"
    idle = advised(planned([4] * 32, lengths=(20,) * 256), tiny)
    assert idle["max_completion_length"].flags == "--max_completion_length 32"
    assert advised(planned([4] * 32), tiny)["max_completion_length"].flags == ""


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"solved": [8] * 32}, "little to learn"),
        ({"solved": [0] * 32, "figures": {"any_format": 0.0}}, "too hard"),
        ({"solved": [0] * 32, "figures": {"any_format": 0.4}}, "format comes first"),
        ({"solved": [4] * 32, "figures": {"stopped": 0.0}}, "cut off"),
        ({"solved": [4] * 32, "figures": {"strict": 0.0}}, "never seen"),
        ({"solved": [4] * 32, "varied": 0.0}, "gradient is 0"),
        ({"solved": [4] * 32, "available_bytes": GIB}, "Memory"),
    ],
)
def test_what_would_teach_nothing_or_break_is_warned_of(
    told: dict[str, Any], said: str, tiny: Assembled
) -> None:
    assert any(said in warning for warning in warn(planned(**told), tiny.config))


def test_a_healthy_plan_warns_of_nothing_but_the_steps_it_could_not_take(tiny: Assembled) -> None:
    warnings = warn(planned([4] * 32), tiny.config)
    assert len(warnings) == 1 and warnings[0].startswith("Memory")  # planned() has no burst


def test_the_screen_is_narrow_and_shows_no_control_character(tiny: Assembled) -> None:
    plan = planned([0, 4, 8] * 10)
    plan = replace(plan, warnings=tuple(warn(plan, tiny.config)))
    text = plan_text(replace(plan, recommendations=tuple(advised(plan, tiny).values())))
    assert max(map(len, text.split("\n"))) <= WIDTH and "\x1b" not in text
    assert "does not fit" in text


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--max_steps", "7"], 7),
        (["--max_steps", "-1", "--num_train_epochs", "1"], 12),
        (["--max_steps", "-1", "--num_train_epochs", "2", "--num_iterations", "2"], 48),
        (["--max_steps", "-1", "--num_train_epochs", "1", "--gradient_accumulation_steps", "2"], 6),
        # An epoch ends in a step of what is left.
        (
            [
                "--max_steps",
                "-1",
                "--num_train_epochs",
                "2",
                "--gradient_accumulation_steps",
                "5",
                "--steps_per_generation",
                "1",
            ],
            6,
        ),
    ],
)
def test_the_number_of_steps_is_the_one_that_training_will_take(
    flags: list[str], steps: int, tmp_path: Path
) -> None:
    run = Assembled(tmp_path, *flags)
    assert total_steps(run.config, 24) == steps
    if "--max_steps" in flags and "7" not in flags:
        args = run.trainer.args
        micro_batches = len(run.trainer.get_train_dataloader())
        told = run.trainer.set_initial_training_values(args, run.trainer.get_train_dataloader())
        assert steps in told, (micro_batches, told)


class _Lora(PeftModel):
    """So many weights and nothing else."""

    def __init__(self, count: int) -> None:
        torch.nn.Module.__init__(self)
        self.weights = [torch.empty(count, device="meta")]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.weights)


@pytest.mark.parametrize("rate", [1e-9, 5e-7, 8e-6, 2e-5, 3e-4, 4e-3, 0.3])
@pytest.mark.parametrize("count", [1_900_000, 1_500_000_000])
@pytest.mark.parametrize("uses_lora", [True, False])
def test_the_dry_run_and_the_health_rules_say_the_same_of_a_learning_rate(
    rate: float, count: int, uses_lora: bool
) -> None:
    model: Any = _Lora(count)
    if not uses_lora:
        model = SimpleNamespace(parameters=model.parameters)
    config: Any = SimpleNamespace(training=SimpleNamespace(learning_rate=rate))
    facts = Facts(learning_rate=rate, uses_lora=uses_lora, parameters=count)
    said = rate_out_of_band(facts)
    advised = _learning_rate(config, model)
    assert bool(advised.flags) is (said is not None)
    if said:
        start = float(advised.flags.split()[1])
        assert rate_out_of_band(replace(facts, learning_rate=start)) is None
