"""The resume matrix: a run stopped after any step and resumed ends as if it had not been stopped.

Each :class:`Case` is a configuration in which something else must survive a stop. :func:`complete`
trains it once, with a checkpoint after every step; :func:`resume_from` trains it again from one of
these, in a new trainer; :func:`differences` compares every byte that the two runs leave.
``tests/unit/test_resume.py`` takes a sample, ``make soak`` all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from abacist.learning.arguments import GRPOConfig
from abacist.learning.resume.checkpoints import checkpoints_of, step_of
from abacist.learning.resume.stopping import StopNow, StopRequests
from abacist.learning.tracking import MetricsLog, Silent, is_wall_clock
from abacist.learning.trainer import GRPOTrainer
from lookalikes import build
from soak.ledger import Trial

BASE: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 6,
    "max_steps": 12,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 1,
    "disable_tqdm": True,
    "keep_rollouts": True,
    "seed": 3,
    "report_to": [],
}


@dataclass(frozen=True)
class Case:
    """A configuration: settings over :data:`BASE`, LoRA or not, and how many problems there are.

    With :data:`BASE`, a step takes 2 problems, so 8 problems are an epoch of 4 steps.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    lora_dropout: float | None = 0.0  # None: all weights are trained
    problems: int = 8
    started_adapter: bool = False  # the run starts from an adapter, which is its reference


CASES = (
    Case("lora"),
    Case("full", {"learning_rate": 1e-3}, lora_dropout=None),
    Case("stock path", {"use_fast_path": False}),
    Case("dropout", {}, lora_dropout=0.1),
    Case("kl", {"beta": 0.1}),
    Case("kl full", {"beta": 0.1}, lora_dropout=None),
    Case("kl from an adapter", {"beta": 0.1}, started_adapter=True),
    Case("two iterations", {"num_iterations": 2}),
    Case("two steps a generation", {"steps_per_generation": 2}),
    Case(
        "two steps a generation, two iterations, accumulation",
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
    ),
    Case("accumulation", {"gradient_accumulation_steps": 3, "steps_per_generation": 3}),
    Case(
        "generations inside a step", {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
    ),
    Case("uneven epochs", {"gradient_accumulation_steps": 2, "steps_per_generation": 2}, 0.0, 12),
    Case("one long epoch", {}, problems=40),
    Case("epochs", {"max_steps": -1, "num_train_epochs": 3}),
    Case("no shuffling", {"shuffle_dataset": False}),
    Case("workers", {"dataloader_num_workers": 2}),
    Case(
        "reference sync",
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 3, "learning_rate": 1e-3},
        lora_dropout=None,
    ),
    Case("solve rates", {"problem_sampling": "solve_rate"}, problems=20),
    Case(
        "solve rates, accumulation, short epochs",
        {
            "problem_sampling": "solve_rate",
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 2,
            "num_iterations": 2,
        },
        problems=12,
    ),
    Case("wide windows", {"logging_steps": 5}),
    Case("logs by epoch", {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
    Case("evaluation", {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}),
    Case(
        "best model",
        {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "metric_for_best_model": "reward",
            "load_best_model_at_end": True,
            "save_steps": 2,
        },
    ),
    Case(
        "half of the replies, two iterations",
        {
            "train_replies": 1,
            "num_iterations": 2,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
        },
    ),
    Case("dr_grpo, whitened by batch", {"loss_type": "dr_grpo", "scale_rewards": "batch"}),
)  # fmt: skip


def by_name(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


def make_trainer(case: Case, model_folder: Path, run: Path, **settings: Any) -> GRPOTrainer:
    """A new trainer for the case, as a script would make it."""
    config = GRPOConfig(output_dir=str(run), **{**BASE, **case.settings, **settings})
    torch.manual_seed(0)  # the adapter's first weights
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapter: LoraConfig | None = None
    if case.lora_dropout is not None:
        adapter = LoraConfig(
            r=4, lora_dropout=case.lora_dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if case.started_adapter:
        model = get_peft_model(model, adapter)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02)
        adapter = None
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} + 1?"}],
            "answer": str(n + 1),
            "problem_id": f"p{n}",
            "difficulty": n % 2,
        }
        for n in range(case.problems)
    ]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[length_reward],
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]) if config.eval_strategy != "no" else None,
        processing_class=AutoTokenizer.from_pretrained(model_folder, padding_side="left"),
        peft_config=adapter,
        callbacks=[MetricsLog(run / "metrics.jsonl", run / "timings.jsonl", Silent())],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def length_reward(completions: Any, **columns: Any) -> list[float]:
    """Something that differs within a group."""
    return [len(set(one[0]["content"])) / 10 for one in completions]


def complete(case: Case, model_folder: Path, run: Path, **settings: Any) -> Path:
    """Train the case without a stop."""
    run.mkdir(parents=True)
    trainer = make_trainer(case, model_folder, run, **settings)
    trainer.train()
    trainer.save_model()
    return run


def resume_from(
    case: Case, model_folder: Path, whole: Path, step: int, run: Path, **settings: Any
) -> Path:
    """Train the case again from the checkpoint after ``step`` of the run ``whole``.

    What ``whole`` recorded later is left in place, as a crash would leave it.
    """
    shutil.copytree(whole, run)
    for path in run.glob("*.safetensors"):
        path.unlink()
    for path in checkpoints_of(run):
        if step_of(path) > step:
            shutil.rmtree(path)
    trainer = make_trainer(case, model_folder, run, **settings)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return run


def stop_in_step(
    case: Case, model_folder: Path, run: Path, microstep: int, **settings: Any
) -> StopNow:
    """Train the case until SIGTERM arrives in the middle of a microstep, after its sampling."""
    run.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(case, model_folder, run, save_steps=1000, **settings)
    compute_loss, passed = trainer.compute_loss, []

    def interrupted_loss(*args: Any, **kwargs: Any) -> Any:
        passed.append(None)
        if len(passed) == microstep:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = interrupted_loss  # type: ignore[method-assign]
    try:
        with StopRequests() as trainer.stops:
            trainer.train(resume_from_checkpoint=bool(checkpoints_of(run)))
    except StopNow as stop:
        return stop
    raise AssertionError("the training was not stopped")


def differences(one: Path, other: Path) -> list[str]:
    """The names of what two runs of a case left differently, wall-clock times aside."""
    these, those = _everything(one), _everything(other)
    names = sorted(these.keys() | those.keys())
    return [name for name in names if not _same(these.get(name), those.get(name))]


def _everything(run: Path) -> dict[str, Any]:
    last = checkpoints_of(run)[-1]
    kept: dict[str, Any] = {"last checkpoint": last.name}
    for path in sorted([*run.glob("*.safetensors"), *run.glob("rollouts/*"), *last.rglob("*")]):
        if path.suffix in (".safetensors", ".parquet"):
            kept[path.relative_to(run).as_posix()] = path.read_bytes()
    kept["metrics.jsonl"] = (run / "metrics.jsonl").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "grpo_state.pt"):
        kept[name] = torch.load(last / name, map_location="cpu", weights_only=True)
    for timed in ("seconds", "kept_bytes"):
        kept["grpo_state.pt"].pop(timed)
    metrics = kept["grpo_state.pt"]["metrics"]
    metrics["train"] = {k: v for k, v in metrics["train"].items() if not is_wall_clock(k)}
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    kept["log history"] = [
        {key: value for key, value in row.items() if not is_wall_clock(key)}
        for row in state["log_history"]
    ]
    return kept


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)


def resumed_everywhere(case: Case, place: Path) -> Trial:
    """The case resumed after every step, each time in a new trainer: one check a step."""
    model = build("qwen2.5-instruct", place / "model", size=32)
    whole = complete(case, model, place / "whole" / "run")
    trial = Trial()
    for step in map(step_of, checkpoints_of(whole)):
        resumed = resume_from(case, model, whole, step, place / str(step) / "run")
        trial.expect(f"resumed after step {step}", differences(whole, resumed))
        shutil.rmtree(resumed.parent)
    return trial
