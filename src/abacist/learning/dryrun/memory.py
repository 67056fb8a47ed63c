"""What a run needs of memory, part by part, and what there is.

Two phases alternate. A *rollout* holds the copy of the weights that our engine decodes with
and the keys and values of every reply in work; a *training* pass holds gradients and whatever the
forward keeps for the backward. They share the weights, the adapter and the optimizer's state,
so the peak of a run is the larger of the two.

Sizes of weights come from the loaded tensors. What a forward keeps for its backward depends on the
model, the adapter, mixed precision, the attention and the path the training takes, so it is
measured: a small batch is sent through the very forward that will train, autograd's list of saved
tensors is added up, and the sum is scaled to the real batch, in which it is linear. What is
short-lived (logits of a chunk, one layer's gradients) is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.autograd.function import BackwardCFunction

from abacist.learning import fastpath, micro_batch_fusion
from abacist.policy import families, mxint8, quantization
from abacist.policy.decoding.cache import PREFILL_TOKENS
from abacist.policy.families import FastPart
from abacist.policy.kernels import build
from abacist.policy.model_parts import base_of
from abacist.policy.scoring import head

ROOMY_FRACTION = 0.7  # of the memory: what may be spent on speed
SAFE_FRACTION = 0.9  # of the memory there is; the rest goes to fragments and short-lived tensors

_CGROUP = Path("/sys/fs/cgroup")
_QUICK_PROMPT_TOKENS, _QUICK_COMPLETION_TOKENS = 64, 8
_CGROUP_FILES = ("memory.max", "memory.current")
_LOGIT_COPIES = 3  # logits, probabilities and what is made of them, in float32


@dataclass(frozen=True)
class Part:
    """One thing that takes memory: for the whole run, or only while a phase lasts."""

    name: str
    bytes: int
    phase: str = "both"  # both, rollout or training


@dataclass(frozen=True)
class Memory:
    """The parts, and how many bytes there are for them on ``device``."""

    parts: tuple[Part, ...]
    available_bytes: int
    device: str

    @property
    def rollout_bytes(self) -> int:
        """The peak while replies are written."""
        return sum(part.bytes for part in self.parts if part.phase != "training")

    @property
    def training_bytes(self) -> int:
        """The peak of a forward and backward pass."""
        return sum(part.bytes for part in self.parts if part.phase != "rollout")

    @property
    def peak_bytes(self) -> int:
        """The peak of the run."""
        return max(self.rollout_bytes, self.training_bytes)

    @property
    def loaded_bytes(self) -> int:
        """What is held before the first step: the weights, with the adapter's."""
        return sum(part.bytes for part in self.parts if part.name in ("weights", "adapter"))

    @property
    def fits(self) -> bool:
        """Whether the peak leaves a tenth of the memory free."""
        return self.peak_bytes <= SAFE_FRACTION * self.available_bytes


def plan_memory(trainer: Any, forward: Forward, prompt_tokens: int, eval_rows: int) -> Memory:
    """Every part for the trainer's settings; ``prompt_tokens`` is the longest prompt."""
    args, model = trainer.args, trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = trained_bytes(model) if isinstance(model, PeftModel) else 0
    everything = _bytes([*model.parameters(), *model.buffers()]) + quantization.scale_bytes(model)
    parts = [
        Part("weights", everything - adapter),
        Part("adapter", adapter),
        Part("optimizer state", optimizer_bytes(args.optim, trained)),
        Part("gradients", trained_bytes(model), "training"),
        *_rollout_parts(trainer, prompt_tokens, eval_rows),
        *_training_parts(trainer, forward),
    ]
    if args.beta and not isinstance(model, PeftModel):
        parts.insert(2, Part("reference model", everything))
    device = trainer.model.device
    return Memory(
        tuple(part for part in parts if part.bytes),
        available_bytes(device, everything),
        str(device),
    )


def with_micro_batch(
    memory: Memory, trainer: Any, forward: Forward, rows: int, checkpointing: bool
) -> Memory:
    """The same plan with another micro-batch, or with gradient checkpointing on or off."""
    others = [p for p in memory.parts if p.name not in _TRAINING_NAMES]
    changed = _training_parts(trainer, forward, rows=rows, checkpointing=checkpointing)
    return replace(memory, parts=(*others, *changed))


_TRAINING_NAMES = ("activations", "backward of one layer", "logits of a chunk")


def _training_parts(
    trainer: Any, forward: Forward, rows: int | None = None, checkpointing: bool | None = None
) -> list[Part]:
    args, model = trainer.args, trainer.model
    rows = args.per_device_train_batch_size if rows is None else rows
    checkpointing = args.gradient_checkpointing if checkpointing is None else checkpointing
    config = model.config.get_text_config()
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    hidden = config.hidden_size * families.compute_dtype_of(base_of(model)).itemsize
    at_a_time = rows * _joined(trainer, forward, rows)
    kept = forward.kept_bytes(at_a_time, hidden, layers, bool(checkpointing))
    device = trainer.model.device.type
    logits = head._CHUNK_ELEMENTS.get(device, head._CHUNK_ELEMENTS["cuda"])
    at_once = max(head._MIN_CHUNK_TOKENS, logits // vocabulary)
    chunk = min(at_once, rows * forward.completion_tokens)
    # What a layer kept is freed while its gradients are made: about half of it is there at once.
    layer = at_a_time / forward.group_size * forward.group_bytes / layers / 2
    return [
        Part("activations", int(kept), "training"),
        Part("backward of one layer", int(layer), "training"),
        Part("logits of a chunk", chunk * vocabulary * 4 * _LOGIT_COPIES, "training"),
    ]


def _joined(trainer: Any, forward: Forward, rows: int) -> float:
    """How many micro-batches of ``rows`` are fused at most, see ``micro_batch_fusion``."""
    prompt = forward.group_tokens - forward.group_size * forward.completion_tokens
    if fastpath.unsupported_reason(trainer, FastPart.SCORING) is not None:
        return 1.0
    packed = rows / forward.group_size * forward.group_tokens
    bound = micro_batch_fusion.SHARE_OF_STOCK * rows * (prompt + forward.completion_tokens)
    return max(1.0, min(trainer.args.gradient_accumulation_steps, bound / packed))


def _rollout_parts(trainer: Any, prompt_tokens: int, eval_rows: int) -> list[Part]:
    args, model = trainer.args, trainer.model
    config = model.config.get_text_config()
    if args.use_vllm:
        if args.vllm_mode != "colocate":
            return []
        total = total_bytes(trainer.model.device)
        return [Part("vLLM", int(args.vllm_gpu_memory_utilization * total), "rollout")]
    weight = base_of(model).get_input_embeddings().weight
    # Not every family has groups of heads, or names the width of its MLP.
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element_size = 4 if build.widens(weight) else weight.element_size()
    each_token = 2 * config.num_hidden_layers * heads * size * element_size
    rows = int(args.generation_batch_size)
    prompts = rows // trainer.num_generations
    budget = trainer.max_completion_length
    uses_engine = fastpath.unsupported_reason(trainer, FastPart.DECODING) is None
    cache = rows * budget + (prompts if uses_engine else rows) * prompt_tokens
    # Measuring held-out problems writes one reply to each prompt.
    cache = max(cache, eval_rows * (budget + prompt_tokens))
    rows = max(rows, eval_rows)
    reading = min(PREFILL_TOKENS, rows * prompt_tokens) if uses_engine else rows * prompt_tokens
    wide = 6 * config.hidden_size + 3 * inner
    copied = _copied_bytes(base_of(model)) if uses_engine else 0
    return [
        Part("copy of the weights to decode with", copied, "rollout"),
        Part("KV cache", cache * each_token, "rollout"),
        Part("reading prompts", reading * wide * element_size, "rollout"),
        Part("next-token logits", rows * config.vocab_size * 4 * _LOGIT_COPIES, "rollout"),
    ]


def _copied_bytes(model: Any) -> int:
    """What decoding copies: fused and adapted projections, and all that a kernel packs."""
    total = 0
    for name, module in model.named_modules():
        adapted = isinstance(module, LoraLayer)
        linear = module.get_base_layer() if adapted else module
        if not isinstance(linear, nn.Linear) or ".lora_" in name or name.endswith(".base_layer"):
            continue
        is_fused = name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        if adapted or is_fused or build.supports_weight(mxint8.weight_of(linear)):
            total += quantization.dense_bytes(linear)
    return total


def optimizer_bytes(name: Any, trained: Iterable[torch.Tensor]) -> int:
    """Adam's two moments, in the dtype of the weights, unless ``name`` says otherwise."""
    kind = str(getattr(name, "value", name))
    if "adafactor" in kind or kind == "sgd":
        return 0
    moments = 1 if any(word in kind for word in ("lion", "rmsprop", "adagrad")) else 2
    return sum(moments * p.numel() * (1 if "8bit" in kind else p.element_size()) for p in trained)


def trained_bytes(model: Any) -> int:
    """Bytes of the weights that training changes."""
    return _bytes(weight for weight in model.parameters() if weight.requires_grad)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, those that are one and the same counted once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def available_bytes(device: torch.device, held_bytes: int = 0) -> int:
    """What can still be had on ``device``, and what this process holds there already."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total
        return int(min(free + torch.cuda.memory_reserved(device), allowed))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    free = int(psutil.virtual_memory().available)
    if (container := _container_bytes()) is not None:
        limit, used = container
        free = min(free, limit - used)
    return free + held_bytes


def total_bytes(device: torch.device) -> int:
    """All the memory of ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limit, _ = _container_bytes() or (math.inf, 0)
    return int(min(psutil.virtual_memory().total, limit))


def _container_bytes() -> tuple[int, int] | None:
    """Limit and use of a container, if any: the machine's own figures mislead there."""
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="utf-8") for name in _CGROUP_FILES)
        return int(limit), int(used)
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return None


@dataclass(frozen=True)
class Forward:
    """What one forward keeps for its backward, without gradient checkpointing.

    ``group_bytes`` is for one group with the whole budget written; ``fixed_bytes`` does not grow
    with the batch (weights cast once, for example).
    """

    fixed_bytes: float
    group_bytes: float
    group_tokens: int  # positions that the backbone computes for one group
    group_size: int
    completion_tokens: int

    def kept_bytes(self, rows: float, hidden_bytes: int, layers: int, checkpointing: bool) -> float:
        """For a micro-batch of ``rows`` completions; ``hidden_bytes`` of one position."""
        groups = rows / self.group_size
        if not checkpointing:
            return self.fixed_bytes + groups * self.group_bytes
        # Only the input of each layer is kept, and one layer at a time is computed again.
        inputs = groups * self.group_tokens * hidden_bytes * layers
        return self.fixed_bytes + inputs + groups * self.group_bytes / layers


def measure_forward(
    trainer: Any, prompt_tokens: int, completion_tokens: int, *, is_quick: bool = False
) -> Forward:
    """Send three small batches through the trainer's own forward and scale up what they keep.

    Call it before training: gradient checkpointing must not be on yet. ``is_quick`` takes a short
    piece of the prompt too: a token of it is taken to keep what a token of a completion keeps,
    which is a little too much.
    """
    size = min(trainer.num_generations, trainer.args.per_device_train_batch_size)
    reads_prompt_once = fastpath.unsupported_reason(trainer, FastPart.SCORING) is None
    # Where every reply is read with a prompt of its own, one reply stands for its group: of a whole
    # one, measured without checkpointing, there may be more than the memory holds.
    rows = size if reads_prompt_once else 1
    short = max(8, min(completion_tokens // 2, 32))
    prompt = prompt_tokens
    if is_quick:
        short, prompt = _QUICK_COMPLETION_TOKENS, min(prompt_tokens, _QUICK_PROMPT_TOKENS)
    one = _saved_bytes(trainer, 1, rows, prompt, short)
    longer = _saved_bytes(trainer, 1, rows, prompt, 2 * short)
    two = _saved_bytes(trainer, 2, rows, prompt, short)
    each_token = max(0.0, (longer - one) / short)
    fixed = max(0.0, 2.0 * one - two)
    each_of_prompt = each_token / size if reads_prompt_once else each_token
    measured = (
        one
        - fixed
        + each_token * (completion_tokens - short)
        + each_of_prompt * (prompt_tokens - prompt)
    )
    return Forward(
        fixed_bytes=fixed,
        group_bytes=measured * size / rows,
        group_tokens=(1 if reads_prompt_once else size) * prompt_tokens + size * completion_tokens,
        group_size=size,
        completion_tokens=completion_tokens,
    )


def _saved_bytes(trainer: Any, groups: int, size: int, prompt: int, completion: int) -> int:
    """Bytes that autograd keeps of one forward, the model's own weights left out."""
    model = trainer.model
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # Without its graph: a node that saved its own output would hold itself, and all before it.
        return tensor.detach()

    generator = torch.Generator().manual_seed(0)
    vocabulary = min(100, model.config.get_text_config().vocab_size)
    opening = torch.randint(vocabulary, (groups, 1, prompt), generator=generator)
    replies = torch.randint(vocabulary, (groups, size, completion), generator=generator)
    ids = torch.cat([opening.expand(-1, size, -1), replies], dim=2).flatten(0, 1)
    ids = ids.to(model.device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), torch.enable_grad():
        with trainer.accelerator.autocast():
            # The graph must live until all is counted, or a storage could be counted twice.
            graph = trainer._get_per_token_logps_and_entropies(
                model, ids, torch.ones_like(ids), completion, compute_entropy=True
            )
        for tensor in _tensors_on_contexts(graph):
            count(tensor)
        found = sum(kept.values())
        del graph
    return found


def _tensors_on_contexts(outputs: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    """What functions written in Python keep as attributes of their ``ctx``, unseen by the hooks.

    bitsandbytes' product in 8 bits keeps its input so.
    """
    waiting = [x.grad_fn for x in outputs if x is not None and x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        if isinstance(node, BackwardCFunction):
            for value in vars(node).values():
                values = value if isinstance(value, tuple | list) else (value,)
                yield from (each for each in values if isinstance(each, torch.Tensor))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)


def gib(count: float) -> str:
    """Bytes as GiB, with as many digits as matter; small ones as MiB.

    >>> gib(7_000_000), gib(3 * 2**30)
    ('7 MiB', '3.0 GiB')
    """
    size = count / 2**30
    if size < 0.1:
        return f"{size * 1024:.0f} MiB"
    digits = 0 if size >= 100 else 1 if size >= 1 else 2
    return f"{size:.{digits}f} GiB"
