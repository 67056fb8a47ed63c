"""The training state beside weights and optimizer: captured from the trainer, and restored.

transformers keeps the weights, the optimizer, the schedule and one file of random states. TRL's
GRPO loop depends on more: which completions are still to be used, how far the sampler is, what has
been summed up since the last log. :func:`capture` takes all of it between two steps;
:func:`restore` puts it back, in the same process (a step that was interrupted is taken back) or in
a new one (a resumed run). It is kept in one file that PyTorch loads weights-only.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from abacist.errors import RunError, first_line

STATE_FORMAT = 1
# Files that grow by lines: what was written after a checkpoint is cut when it is resumed.
KEPT_LINES = ("metrics.jsonl", "timings.jsonl")

State = dict[str, Any]

# What is kept of the trainer as it is: the name in a state, and the trainer's own.
_COPIED = {
    "microsteps": "_step",
    "epoch_ended": "epoch_ended",
    "last_logged": "_globalstep_last_logged",
    "first_tokens": "_initial_num_input_tokens_seen",
    "grad_norm": "last_grad_norm",
    "learning_rate": "last_learning_rate",
}
# TRL's controller of the entropy bonus, which moves within a step: before the backward.
_ENTROPY = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")


def load_adapters(model: PeftModel, checkpoint: Path) -> None:
    """Give every adapter of ``model`` the weights that it has in ``checkpoint``.

    PEFT saves the adapter ``default`` in the folder itself and any other, such as TRL's reference
    ``ref``, in a folder of its name. transformers before 5.23 loads only the latter where there are
    any, and the trained adapter would go on from its first weights.

    Raises RunError if the checkpoint lacks a weight that is trained.
    """
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for adapter in model.peft_config:
        folder = checkpoint if adapter == "default" else checkpoint / adapter
        weights = load_file(folder / "adapter_model.safetensors")
        loaded: Any = set_peft_model_state_dict(model, weights, adapter_name=adapter)
        # The other adapters, and what the base model holds, are missing here by design.
        missing = trained.intersection(loaded.missing_keys)
        lacking = sorted(name for name in missing if f".{adapter}" in name)
        if lacking:
            raise RunError(
                f"{folder} lacks {len(lacking)} of the weights that are trained, such as "
                f"{lacking[0]}.",
                "Resume with the run's own adapter shape, or from a checkpoint before this one.",
            )


def capture(trainer: Any) -> State:
    """The state of ``trainer`` now, which must be between two optimizer steps."""
    state = trainer.state
    reuses = trainer.args.steps_per_generation * trainer.num_iterations
    mid_buffer = trainer._step % reuses != 0
    return {
        "format": STATE_FORMAT,
        "step": state.global_step,
        **{name: getattr(trainer, attribute) for name, attribute in _COPIED.items()},
        "entropy": {name: getattr(trainer, name) for name in _ENTROPY if hasattr(trainer, name)},
        # The mean loss is over the steps since this one; before transformers 5.19 since step 0.
        "first_step": getattr(trainer, "_initial_global_step", 0),
        "buffered": trainer._buffered_inputs if mid_buffer else None,
        "metrics": {
            mode: {name: list(values) for name, values in metrics.items()}
            for mode, metrics in trainer._metrics.items()
        },
        "completions": _completions(trainer) if trainer.log_completions else None,
        "loss": trainer._tr_loss.detach().clone(),
        "loss_total": float(trainer._total_loss_scalar),
        "peak_learning_rate": float(trainer.args.learning_rate),
        "tokens_seen": state.num_input_tokens_seen,
        "flos": [float(state.total_flos), float(trainer.current_flos)],
        "sampler": trainer.sampler.state_dict() if trainer.sampler is not None else None,
        "random": random_state(),
        "kept_bytes": kept_bytes(Path(str(trainer.args.output_dir))),
        "seconds": time.time() - trainer.began,
        "tracker": tracker_ids(),
    }


def restore(trainer: Any, saved: State) -> None:
    """Restore what :func:`capture` took. Weights and optimizer are not touched."""
    state = trainer.state
    for name, attribute in _COPIED.items():
        setattr(trainer, attribute, saved[name])
    for attribute, value in saved.get("entropy", {}).items():  # older states have none
        setattr(trainer, attribute, value)
    trainer._initial_global_step = saved["first_step"]
    trainer._buffered_inputs = _on_device(saved["buffered"], trainer.accelerator.device)
    for mode, metrics in saved["metrics"].items():
        trainer._metrics[mode] = defaultdict(list, {name: list(v) for name, v in metrics.items()})
    if saved["completions"] is not None and trainer.log_completions:
        _put_completions(trainer, saved["completions"])
    trainer._pending_metrics.clear()
    trainer._pending_extra_logs.clear()
    trainer._tr_loss = saved["loss"].to(trainer.args.device).clone()
    trainer._total_loss_scalar = saved["loss_total"]
    state.num_input_tokens_seen = saved["tokens_seen"]
    state.total_flos, trainer.current_flos = saved["flos"]
    trainer.began = time.time() - saved["seconds"]
    if trainer.sampler is not None and saved["sampler"] is not None:
        trainer.sampler.load_state_dict(saved["sampler"], mid_epoch=is_mid_epoch(state))
    set_random_state(saved["random"])


def is_mid_epoch(state: Any) -> bool:
    """Whether a trainer's state is inside an epoch: transformers counts whole ones exactly."""
    return state.epoch is not None and state.epoch != int(state.epoch)


def save_state(saved: State, path: Path) -> None:
    """Write a captured state."""
    torch.save(saved, path)


def load_state(path: Path) -> State:
    """Read a captured state, weights-only. Raises RunError for anything that is not one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"{path.parent} cannot be resumed: it has no {path.name}.",
            "It was saved with save_only_model, or by another number of processes.",
        ) from None
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        raise RunError(
            f"{path} cannot be read: {first_line(error)}",
            "Nothing in it was run. Resume from another checkpoint.",
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != STATE_FORMAT:
        raise RunError(f"{path} is not a trainer state that this Abacist can read.")
    return saved


def random_state() -> State:
    """The states of Python's, numpy's and torch's generators, in types that load weights-only."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_state(saved: Mapping[str, Any]) -> None:
    """Restore every generator; one of a device that this machine lacks is left out."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"].cpu())
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in saved["cuda"]])
    if torch.backends.mps.is_available() and saved["mps"] is not None:
        torch.mps.set_rng_state(saved["mps"].cpu())


def kept_bytes(run: Path) -> dict[str, int]:
    """The sizes of the files that grow by lines, in bytes."""
    sizes = {}
    for name in KEPT_LINES:
        try:
            sizes[name] = (run / name).stat().st_size
        except FileNotFoundError:
            sizes[name] = 0
    return sizes


def cut_after(run: Path, step: int, sizes: Mapping[str, int]) -> None:
    """Cut what ``run`` recorded after ``step``: lines beyond ``sizes``, rollouts of later steps."""
    for name, size in sizes.items():
        path = run / name
        if name in KEPT_LINES and path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
    for path in (run / "rollouts").glob("step-*.parquet"):
        digits = path.name.removeprefix("step-")[:6]
        if digits.isdigit() and int(digits) > step:
            path.unlink()


def to_disk(file: BinaryIO) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def tracker_ids() -> dict[str, str]:
    """The ids under which remote trackers know this run, as environment variables."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    return {"WANDB_RUN_ID": str(run.id)} if run is not None else {}


@contextmanager
def joined_trackers(saved: State) -> Iterator[None]:
    """Within, W&B goes on with the run it knows, unless the environment says otherwise.

    Afterwards the environment is as before: the next training of this process is another run.
    """
    run_id = saved["tracker"].get("WANDB_RUN_ID")
    if run_id is None or "WANDB_RUN_ID" in os.environ:
        yield
        return
    given = {"WANDB_RUN_ID": str(run_id)}
    if "WANDB_RESUME" not in os.environ:
        given["WANDB_RESUME"] = "allow"
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)


def _completions(trainer: Any) -> State:
    """What TRL's table of completions holds, images left out."""
    logs = trainer._logs
    return {
        "prompt": list(logs["prompt"]),
        "completion": list(logs["completion"]),
        "advantages": list(logs["advantages"]),
        "rewards": {name: list(values) for name, values in logs["rewards"].items()},
        "extra": {name: list(values) for name, values in logs["extra"].items()},
    }


def _put_completions(trainer: Any, saved: State) -> None:
    for name in ("prompt", "completion", "advantages"):
        trainer._logs[name] = deque(saved[name], maxlen=trainer._logs[name].maxlen)
    for name in ("rewards", "extra"):
        trainer._logs[name].clear()
        for column, values in saved[name].items():
            trainer._logs[name][column].extend(values)


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_device(item, device) for item in value)
    return value
