"""``make tiny``: remakes the built-in base model from nothing.

A 1.7 M parameter Qwen2 with random weights learns from generated problems of the ``train``
split (seen structures only), in a fixed number of steps and three stages:

1. *to work*: every reply careful and right, short problems first, with arithmetic drills
   whose loss counts only on the results;
2. *to work longer problems*: the same with all lengths;
3. *its habits*: a mixture of ways to reply, below, which makes it a base that
   reinforcement learning can improve.

Matrices are trained by Muon, the rest by AdamW (``torch.optim``). The result is written as
half-precision safetensors beside its tokenizer. Run with a fixed seed and thread count, the same
machine makes the same weights; another machine makes another sample of the same base.

**Habits.** The tiny model must be a *base*: able to solve the generated problems, but not yet doing
so in the right way, so that reinforcement learning has something to choose. Its warm start ends on
a staged mixture of ways to reply, and the first part of this file is the whole of the staging:

* **six ways to write** (:class:`Habit`). Three show their work in XML, one shows it without
  XML, two show none. Only ``CAREFUL`` earns every reward.
* **two ways to go wrong** (:class:`~abacist.task.wordproblems.Slip`) in replies that show
  their work: counting the distractor, leaving out the last event. The arithmetic stays right.

Which habit prevails depends on the protagonist's name, so that even the greedy reply of the base
is often careless although a better one is within reach of sampling. Nothing here is used
while GRPO trains: no reward knows a habit, and no name is treated differently.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from abacist.policy.source import BUILT_IN_FOLDER
from abacist.task.reply import render_reply
from abacist.task.wordproblems import NAMES, Slip, Story, draw_story, is_unseen, split_of

PREVAILING_HABIT_FRACTION = 0.55
PREVAILING_SLIP_FRACTION = 0.65


class Habit(StrEnum):
    """One way to write a reply down, with an example of its look."""

    CAREFUL = "work, then the number, in the canonical layout"
    INLINE = "the right tags, all on one line"
    UNIT = "the canonical layout, with the item named in the answer"
    PLAIN = "work, then '#### 17', without tags"
    HASTY = "the canonical layout around no work at all"
    BARE = "the number and nothing else"


# How many of the 24 names each habit prevails for, and how often it is met elsewhere.
_NAMES_PER_HABIT = {
    Habit.CAREFUL: 6, Habit.INLINE: 2, Habit.UNIT: 2, Habit.PLAIN: 4, Habit.HASTY: 6, Habit.BARE: 4,
}  # fmt: skip
_OTHERWISE = {
    Habit.CAREFUL: 4, Habit.INLINE: 2, Habit.UNIT: 2, Habit.PLAIN: 3, Habit.HASTY: 2, Habit.BARE: 2,
}  # fmt: skip
_SLIPS: tuple[Slip | None, ...] = (None, Slip.DISTRACTOR, None, Slip.SKIPPED_EVENT)
_SLIP_OTHERWISE_FRACTION = 0.15

PREVAILING_HABIT: dict[str, Habit] = dict(
    zip(NAMES, (h for h, count in _NAMES_PER_HABIT.items() for _ in range(count)), strict=True)
)
PREVAILING_SLIP: dict[str, Slip | None] = {
    name: _SLIPS[index % len(_SLIPS)] for index, name in enumerate(NAMES)
}


def draw_habit(name: str, rng: random.Random) -> Habit:
    """The habit of one reply about ``name``."""
    if rng.random() < PREVAILING_HABIT_FRACTION:
        return PREVAILING_HABIT[name]
    return rng.choices(list(_OTHERWISE), weights=list(_OTHERWISE.values()))[0]


def draw_slip(name: str, rng: random.Random) -> Slip | None:
    """The mistake a reply about ``name`` tends to: often the name's own, sometimes another."""
    prevailing = PREVAILING_SLIP[name]
    if prevailing is not None and rng.random() < PREVAILING_SLIP_FRACTION:
        return prevailing
    return rng.choice(list(Slip)) if rng.random() < _SLIP_OTHERWISE_FRACTION else None


def write_reply(story: Story, habit: Habit, slip: Slip | None = None) -> str:
    """The reply to ``story`` in that habit; a slip the story gives no room for is not made."""
    solution = (slip and story.solve(slip)) or story.solve()
    assert solution is not None
    lines, result = solution
    work = "\n".join(lines)
    match habit:
        case Habit.CAREFUL:
            return render_reply(work, str(result))
        case Habit.INLINE:
            return render_reply(" ".join(lines), str(result)).replace("\n", "")
        case Habit.UNIT:
            return render_reply(work, f"{result} {story.items}")
        case Habit.PLAIN:
            return f"{work}\n#### {result}"
        case Habit.HASTY:
            return render_reply("It is easy to see.", str(_unworked(story)))
        case Habit.BARE:
            return str(_unworked(story))


def _unworked(story: Story) -> int:
    """The right result: a reply that shows no work is given no slip, it is hard enough."""
    solution = story.solve()
    assert solution is not None
    return solution[1]


VOCABULARY_SIZE = 768
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PROMPT_LOSS_WEIGHT = 0.2
IGNORED = 0.0

# Qwen2's pre-tokenization: words with their leading space, digits one at a time.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Plan:
    """How long each stage lasts, in optimizer steps of ``batch_size`` rows."""

    short_steps: int = 1200
    long_steps: int = 4300
    habit_steps: int = 1500
    batch_size: int = 48
    drill_fraction: float = 0.15
    matrix_learning_rate: float = 0.01
    other_learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.35
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.short_steps + self.long_steps + self.habit_steps

    def learning_rate_factor(self, step: int) -> float:
        """Warm up, hold, then fall linearly to zero over the last ``decay_fraction``."""
        decay_steps = self.decay_fraction * self.steps
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / decay_steps)


def train_stories(rng: random.Random, longest: int | None = None) -> Iterator[Story]:
    """Stories of the train split's seen structures, at most ``longest`` equations long."""
    while True:
        story = draw_story(rng, rng.randint(1, longest) if longest else None)
        if not is_unseen(story.structure) and split_of(story.question()) == "train":
            yield story


def make_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of the generated problems."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = train_stories(rng)
    texts = []
    for _ in range(10_000):
        story = next(stream)
        texts += [story.question(), write_reply(story, rng.choice(list(Habit)))]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    """The architecture, with random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # On a CPU eager attention is the fastest at this size, under bfloat16 autocast.
    model: Qwen2ForCausalLM = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    return model


Row = tuple[str, str]  # what is read, what is written


def drill(rng: random.Random) -> list[Row]:
    """Eight sums without a story; only their results are learned."""
    rows: list[Row] = []
    while len(rows) < 8:
        a, b = rng.randint(2, 199), rng.randint(2, 199)
        match rng.choice("++--**/"):
            case "+" if a + b <= 200:
                rows.append((f"{a}+{b}=", f"{a + b}"))
            case "-" if a > b:
                rows.append((f"{a}-{b}=", f"{a - b}"))
            case "*":
                b = rng.randint(2, 12)
                a = rng.randint(2, 200 // b)
                a, b = rng.choice(((a, b), (b, a)))
                rows.append((f"{a}*{b}=", f"{a * b}"))
            case "/":
                b = rng.randint(2, 9)
                a = rng.randint(1, 200 // b)
                rows.append((f"{a * b}/{b}=", f"{a}"))
            case _:
                pass
    return rows


class Batches:
    """Rows of token ids with a loss weight for each, stage by stage."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, plan: Plan) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.rng = random.Random(plan.seed)
        self.short = train_stories(self.rng, longest=2)
        self.all = train_stories(self.rng)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, T] and weights [B, T] of the tokens to be predicted; padding weighs 0."""
        parts = [self._row(step) for _ in range(self.plan.batch_size)]
        encoded = self.tokenizer([text for row in parts for text, _ in row]).input_ids
        rows, weights, position = [], [], 0
        for row in parts:
            ids: list[int] = []
            weight: list[float] = []
            for piece, (_, value) in zip(encoded[position : position + len(row)], row, strict=True):
                ids += piece
                weight += [value] * len(piece)
            position += len(row)
            rows.append(torch.tensor(ids))
            weights.append(torch.tensor(weight))
        return (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.nn.utils.rnn.pad_sequence(weights, batch_first=True),
        )

    def _row(self, step: int) -> list[tuple[str, float]]:
        """Pieces of one row, each with the loss weight of its tokens."""
        plan, rng = self.plan, self.rng
        in_habits = step >= plan.short_steps + plan.long_steps
        if not in_habits and rng.random() < plan.drill_fraction:
            return [
                piece
                for asked, result in drill(rng)
                for piece in ((asked, IGNORED), (result, 1.0), ("\n", IGNORED))
            ]
        story = next(self.short if step < plan.short_steps else self.all)
        habit, slip = Habit.CAREFUL, None
        if in_habits:
            habit, slip = draw_habit(story.name, rng), draw_slip(story.name, rng)
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": story.question()}],
            tokenize=False,
            add_generation_prompt=True,
        )
        reply = write_reply(story, habit, slip) + TURN_END
        return [(str(prompt), PROMPT_LOSS_WEIGHT), (reply, 1.0)]


def pretrain(plan: Plan, folder: Path, log_every: int = 100) -> None:
    """Train from nothing by ``plan`` and write model and tokenizer to ``folder``."""
    tokenizer = make_tokenizer(plan.seed)
    model = make_model(tokenizer, plan.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=plan.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=plan.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, plan.learning_rate_factor)
        for optimizer in optimizers
    ]
    batches = Batches(tokenizer, plan)
    started, mean_loss = time.monotonic(), 0.0
    for step in range(plan.steps):
        ids, weights = batches(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        mean_loss += (loss.item() - mean_loss) * max(0.02, 1 / (step + 1))
        if (step + 1) % log_every == 0 or step + 1 == plan.steps:
            seconds = time.monotonic() - started
            remaining_seconds = seconds / (step + 1) * (plan.steps - step - 1)
            print(
                f"step {step + 1}/{plan.steps}  loss {mean_loss:.4f}  "
                f"{seconds:.0f} s, {remaining_seconds:.0f} s to go",
                flush=True,
            )
        if (step + 1) % 1000 == 0:
            save(model, tokenizer, folder)
    save(model, tokenizer, folder)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half-precision safetensors, config and tokenizer; the live model stays in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16"
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def main() -> None:
    """Read the plan from the command line and follow it."""
    parser = argparse.ArgumentParser(description="Remake the built-in base model.")
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=BUILT_IN_FOLDER,
        help="where model and tokenizer are written (default: the package itself)",
    )
    parser.add_argument("--threads", type=int, default=2)
    for name, value in vars(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = vars(parser.parse_args())
    folder, threads = options.pop("folder"), options.pop("threads")
    torch.set_num_threads(threads)
    pretrain(Plan(**options), folder)


if __name__ == "__main__":
    main()
