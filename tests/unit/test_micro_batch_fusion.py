"""Several micro-batches in one forward change neither weights nor logs, hold no more than one
of stock TRL's, and leave nothing behind when a step fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.learning import fast_trainer, micro_batch_fusion
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.kernels import build
from abacist.policy.scoring.forward import SharedPrefix
from abacist.policy.scoring.packing import pack

Lookalike = Callable[[str], Path]
G, BUDGET = 4, 12
SHOT = [
    {"role": "user", "content": "Ada has 3 pens and finds 4. How many pens has Ada?"},
    {"role": "assistant", "content": "<reasoning>\n3+4=7\n</reasoning>\n<answer>\n7\n</answer>"},
]


def tied(prompts: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """Rewards under which some groups are silent, and some replies of the others."""
    return [
        1.0 if len(str(prompt)) % 3 == 0 else float(sum(ids) % 3)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def make(
    folder: Path, output: Path, kind: type = GRPOTrainer, *, shots: int = 0, lora: bool = True,
    problems: int = 8, is_full: bool = False, **config: Any,
) -> Any:  # fmt: skip
    questions = [f"How much is {n} and {7**n + 1}?" for n in range(problems)]
    settings: dict[str, Any] = {
        "output_dir": str(output), "bf16": False, "use_cpu": True, "num_generations": G,
        "per_device_train_batch_size": G, "gradient_accumulation_steps": 4,
        "max_completion_length": BUDGET, "learning_rate": 0.02, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "max_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, **config,
    }  # fmt: skip
    torch.manual_seed(0)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=[tied],
        args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_list(
            [{"prompt": [*SHOT * shots, {"role": "user", "content": q}]} for q in questions]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if lora
        else None,
    )
    calls = itertools.count()

    def fixed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draw = torch.Generator().manual_seed(next(calls))
        lengths = torch.randint(
            BUDGET if is_full else 1, BUDGET + is_full, (len(prompt_ids),), generator=draw
        ).tolist()
        written = [torch.randint(20, 200, (n,), generator=draw).tolist() for n in lengths]
        stop = trainer.eos_token_ids[0]
        return [
            [*ids, stop] if row % 3 and not is_full else ids for row, ids in enumerate(written)
        ], None

    trainer._generate_single_turn = fixed
    return trainer


def learned(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged and is no time."""
    times = ("_time", "_runtime", "_per_second", "trainer._prepare_inputs", "abacist.engine")
    return [
        {name: value for name, value in row.items() if not name.endswith(times)}
        for row in trainer.state.log_history
    ]


@pytest.fixture(autouse=True)
def wide_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are short and prompts too here, and so would never be read together."""
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", 1.0)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many micro-batches were read together, each time."""
    found: list[int] = []
    largest = micro_batch_fusion._largest_set

    def counted(trainer: Any, left: int) -> Any:
        together = largest(trainer, left)
        found.append(1 if together is None else len(together.batches))
        return together

    monkeypatch.setattr(micro_batch_fusion, "_largest_set", counted)
    return found


def both(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, train: Any = None, **config: Any
) -> tuple[Any, Any]:
    """A training with its micro-batches read together, and the same with each by itself."""
    trainers = []
    for is_fused in (True, False):
        with monkeypatch.context() as patch:
            if not is_fused:
                patch.setattr(micro_batch_fusion, "_largest_set", lambda trainer, left: None)
                patch.setattr(micro_batch_fusion, "_prefix_of", lambda trainer, left: None)
            trainers.append(make(folder, output, **config))
            (train or (lambda trainer: trainer.train()))(trainers[-1])
    return trainers[0], trainers[1]


def assert_same(together: Any, alone: Any, tolerance: float = 1e-6) -> None:
    assert float((learned(together) - learned(alone)).abs().max()) < tolerance
    assert len(logs(together)) == len(logs(alone))
    for ours, theirs in zip(logs(together), logs(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=20 * tolerance, abs=tolerance, nan_ok=True)


CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo, a KL term": {"beta": 0.2, "loss_type": "grpo"},
    "bnpo, two updates from one generation": {"num_iterations": 2, "loss_type": "bnpo"},
    "dr_grpo, accumulation over two": {"gradient_accumulation_steps": 2, "loss_type": "dr_grpo"},
    "dapo, a generation for two steps": {"steps_per_generation": 8},
    "dapo, two generations in a step": {"steps_per_generation": 2},
    "cispo, shared worked examples": {"shots": 2, "loss_type": "cispo"},
    "sapo, half a group at once": {"per_device_train_batch_size": 2, "shots": 2,
                                   "gradient_accumulation_steps": 8, "loss_type": "sapo"},
    "checkpointed layers": {"gradient_checkpointing": True},
    "all weights": {"lora": False, "learning_rate": 1e-3},
    "truncated completions masked, sequence-level ratios": {
        "mask_truncated_completions": True, "importance_sampling_level": "sequence",
        "loss_type": "grpo"},
    "epochs that end within a step": {"max_steps": -1, "num_train_epochs": 2, "problems": 6,
                                      "steps_per_generation": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logs_are_those_of_one_micro_batch_at_a_time(
    case: str, sizes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = lookalike("qwen2.5-instruct")
    together, alone = both(folder, tmp_path, monkeypatch, **CASES[case])
    assert max(sizes) > 1
    assert_same(together, alone)


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prefixes that were read once for several forwards."""
    found: list[int] = []
    compute = SharedPrefix.compute

    def counted(prefix: SharedPrefix, *args: Any) -> None:
        if not prefix._computed:
            found.append(len(prefix.token_ids))
        compute(prefix, *args)

    monkeypatch.setattr(SharedPrefix, "compute", counted)
    monkeypatch.setattr(micro_batch_fusion, "LEAST_PREFIX_TOKENS", 4)
    return found


@pytest.mark.parametrize("share", [0.0, 0.6])  # one micro-batch at a time, and some together
@pytest.mark.parametrize("case", CASES)
def test_a_prefix_read_once_for_a_step_changes_neither_weights_nor_logs(
    case: str,
    share: float,
    prefixes: list[int],
    lookalike: Lookalike,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", share)
    settings = {"shots": 2, **CASES[case]}
    together, alone = both(lookalike("qwen2.5-instruct"), tmp_path, monkeypatch, **settings)
    if share == 0.0:
        used = not settings.get("gradient_checkpointing")
        assert bool(prefixes) == used and all(tokens > 60 for tokens in prefixes)
    assert_same(together, alone)


@pytest.mark.parametrize("kind", ["llama-3.2-instruct", "qwen2.5-instruct"])
def test_a_shared_prefix_is_exact_without_kernels(
    kind: str,
    prefixes: list[int],
    lookalike: Lookalike,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", 0.0)
    together, alone = both(lookalike(kind), tmp_path, monkeypatch, shots=1)
    assert prefixes
    assert_same(together, alone)


def test_a_prefix_that_prompts_do_not_begin_with_is_not_used(
    prefixes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a script changes what the trainer had buffered."""
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", 0.0)
    other = SharedPrefix(range(100, 170))
    trainers = []
    for prefix in (other, None):
        monkeypatch.setattr(micro_batch_fusion, "_prefix_of", lambda *_, prefix=prefix: prefix)
        trainers.append(make(lookalike("qwen2.5-instruct"), tmp_path, shots=2))
        trainers[-1].train()
    assert not prefixes
    assert torch.equal(*map(learned, trainers))


def test_a_prefix_without_its_backward_would_be_noticed(
    prefixes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", 0.0)
    monkeypatch.setattr(SharedPrefix, "backward", lambda prefix: None)
    together, alone = both(lookalike("qwen2.5-instruct"), tmp_path, monkeypatch, shots=2)
    assert prefixes
    assert float((learned(together) - learned(alone)).abs().max()) > 1e-4


def test_under_bfloat16_the_difference_is_rounding(
    sizes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = both(lookalike("llama-3.2-instruct"), tmp_path, monkeypatch, bf16=True)
    assert max(sizes) > 1
    assert_same(together, alone, tolerance=2e-3)


def test_the_comparison_would_notice_a_part_that_is_lost(
    lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lookalike("qwen2.5-instruct")
    monkeypatch.setattr(micro_batch_fusion, "_gradient", torch.zeros_like)
    together, alone = both(folder, tmp_path, monkeypatch)
    assert float((learned(together) - learned(alone)).abs().max()) > 1e-4


def kept_bytes(trainer: Any) -> int:
    """The most that any graph of a training keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    held: dict[int, int] = {}
    totals: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            held[place.data_ptr()] = place.nbytes()
        return tensor

    whole = trainer._get_per_token_logps_and_entropies

    def watched(*args: Any, **kwargs: Any) -> Any:
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = whole(*args, **kwargs)
        totals.append(sum(held.values()))
        return found

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()
    return max(totals)


@pytest.mark.parametrize("share", [micro_batch_fusion.SHARE_OF_STOCK, 1.0])
def test_a_set_keeps_no_more_for_its_backward_than_stock_for_one_micro_batch(
    share: float,
    sizes: list[int],
    lookalike: Lookalike,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", share)
    folder = lookalike("qwen2.5-instruct")
    ours, stock = (
        kept_bytes(make(folder, tmp_path, kind, shots=4, max_steps=1, beta=0.1))
        for kind in (GRPOTrainer, trl.GRPOTrainer)
    )
    assert max(sizes) > 1 and ours < share * stock


def test_no_forward_reads_more_tokens_than_stocks_padded_micro_batch(
    sizes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, shares = fast_trainer.score, []

    def spied(model: Any, ids: Any, mask: Any, width: int, **options: Any) -> Any:
        if torch.is_grad_enabled():
            packing = pack(ids, mask, width, options["skip_rows"])
            shares.append(len(packing.token_ids) / (G * ids.shape[1]) if packing else 0.0)
        return score(model, ids, mask, width, **options)

    monkeypatch.setattr(fast_trainer, "score", spied)
    make(lookalike("qwen2.5-instruct"), tmp_path).train()
    assert len(shares) == len(sizes) < 8 and sum(sizes) == 8
    assert max(shares) <= 1.0


def test_where_packing_saves_too_little_each_micro_batch_is_read_by_itself(
    sizes: list[int], lookalike: Lookalike, tmp_path: Path
) -> None:
    # Row by row without padding, a second reply of full length is more than stock would hold.
    make(
        lookalike("qwen2.5-instruct"), tmp_path, is_full=True, max_steps=2, beta=0.1,
        per_device_train_batch_size=1,
    ).train()  # fmt: skip
    assert sizes == [1] * 8


def test_a_step_that_failed_leaves_nothing_to_the_next(
    sizes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lookalike("qwen2.5-instruct")
    together = make(folder, tmp_path, shots=2)
    whole = together.compute_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        if together._step == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    together.compute_loss = broken
    with pytest.raises(KeyboardInterrupt):
        together.train()
    assert sizes == [4] and together._fusion._fused is None
    assert all(weight.grad is None for weight in together.model.parameters())
    together.compute_loss, together._step = whole, 0
    together.train()

    monkeypatch.setattr(micro_batch_fusion, "_largest_set", lambda trainer, left: None)
    fresh = make(folder, tmp_path, shots=2)
    fresh._generate_single_turn([[1]])  # as the failed training has used one generation
    fresh.train()
    assert float((learned(together) - learned(fresh)).abs().max()) < 1e-6


def surviving(failing: int) -> type:
    """A trainer that goes on after an error in the micro-batch number ``failing``."""

    class Patient(GRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self._step == failing:
                raise MemoryError
            return loss

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                return super().training_step(*args, **kwargs)
            except MemoryError:
                self._step += 1
                return torch.zeros(())

    return Patient


def test_an_error_that_a_script_survives_costs_the_step_no_later_micro_batch(
    lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lookalike("qwen2.5-instruct")
    together, alone = both(folder, tmp_path, monkeypatch, kind=surviving(0), max_steps=1)
    assert_same(together, alone)


def test_an_error_that_a_script_survives_keeps_what_came_through_the_prefix(
    prefixes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch_fusion, "SHARE_OF_STOCK", 0.0)
    folder = lookalike("qwen2.5-instruct")
    together, alone = both(folder, tmp_path, monkeypatch, kind=surviving(2), max_steps=1, shots=2)
    assert prefixes
    assert_same(together, alone)


def test_a_script_that_changes_a_micro_batch_trains_on_what_it_made_of_it(
    sizes: list[int], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(trainer: Any) -> None:
        whole = trainer.compute_loss

        def changed(model: Any, inputs: Any, **kwargs: Any) -> Any:
            if trainer._step % 4 == 2:
                inputs = {**inputs, "completion_ids": inputs["completion_ids"] + 1}
            if trainer._step % 4 == 1:  # and looks at one twice
                whole(model, inputs, **kwargs)
            return whole(model, inputs, **kwargs)

        trainer.compute_loss = changed
        trainer.train()

    folder = lookalike("qwen2.5-instruct")
    together, alone = both(folder, tmp_path, monkeypatch, train, shots=2)
    assert max(sizes) > 2
    assert_same(together, alone)
