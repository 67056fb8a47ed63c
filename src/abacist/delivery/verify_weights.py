"""Load the weights that a bundle names, and replay the replies that they are said to have written.

Weights are found by their SHA-256: in the bundle, in the folder beside it, or wherever one points.
A bundle names its base model by its Hub id; the sum of an adapter's settings that may be loaded is
small, so that nothing in it can make a library import or fetch anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abacist.delivery.bundle import STREAM_BYTES
from abacist.delivery.findings import Check
from abacist.delivery.opened import Opened
from abacist.delivery.verify_replay import Reply, Tally, replay
from abacist.delivery.verify_training import item_of
from abacist.errors import AbacistError, ModelError, RunError
from abacist.learning.tracking import Watcher
from abacist.policy import quantization
from abacist.policy.decoding.generation import streams_of
from abacist.policy.decoding.token_sampling import Sampling, uniforms_of
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.loading import Policy, load_policy, quiet_libraries
from abacist.policy.quantization import Quantization
from abacist.policy.source import Source, find, read_json

BASE = "base"
# About what is computed without being asked for more: some minutes on a core.
_WORK = 2e13
_LEAST_REPLIES = 4
# Settings of an adapter that say nothing but its shape.
_PLAIN = {
    "r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": bool,
    "use_dora": bool, "fan_in_fan_out": bool, "bias": str, "init_lora_weights": bool,
}  # fmt: skip
_MOST_RANKS = 4096
_MOST_TOKENS = 131_072  # of a reply: uniform numbers are drawn for so many
_MOST_NUMBERS = 2**27  # of one generation, 1 GiB
_MODULE = re.compile(r"[\w.-]{1,200}")
_ROLE = re.compile(r"final|checkpoint-[0-9]{1,9}")  # what a bundle may call weights
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja",
              "added_tokens.json", "tekken.json")  # fmt: skip
# Settings under which TRL, and not our engine, wrote the rollouts of training.
_OTHER_ENGINES = (
    "use_vllm", "use_transformers_continuous_batching", "generation_kwargs", "cache_implementation",
)  # fmt: skip


@dataclass
class _Job:
    """Replies that one set of weights wrote in one way."""

    name: str
    role: str
    max_completion_tokens: int
    sampling: Sampling | None
    replies: list[Reply] = field(default_factory=list)
    is_training: bool = False
    recorded: int = 0  # replies from which those to be replayed were drawn


class _Done:
    """Tells a watcher how many tokens of one model's replies have been judged."""

    def __init__(self, watcher: Watcher, total: int) -> None:
        self._watcher, self._total, self._done = watcher, total, 0

    def of(self, name: str) -> Callable[[int], None]:
        """A function that is told of some more tokens, of the replies called ``name``."""

        def more(tokens: int) -> None:
            self._done += tokens
            self._watcher.progress(self._done, self._total, name)

        return more


def check_replays(
    opened: Opened,
    bundle: Path,
    *,
    model: str | None,
    weights: Path | None,
    replies: int | None,
    seed: int,
    device: str,
    dtype: str,
    watcher: Watcher,
) -> Check:
    """Replay the verdict's replies and training rollouts by the weights that wrote them."""
    check = Check("replay")
    quiet_libraries()
    if replies == 0:
        check.looked_at = "nothing was replayed, as asked"
        check.not_checked.append("whether the weights write these replies")
        return check
    held = _held_base(opened)
    if held is not None and not held.is_ours:
        check.is_incomplete = True
        check.looked_at = "nothing was replayed"
        check.not_checked.append(
            "whether the weights write these replies: bitsandbytes held the run's base in few bits"
        )
        return check
    roles = _roles(opened)
    jobs = [*_of_verdict(opened), *_of_training(opened, check)]
    if not any(job.is_training for job in jobs):
        check.is_incomplete = True
        check.not_checked.append("training rollouts: the bundle has none that can be replayed")
    try:
        base = find(model or _named_base(opened), revision=_revision(opened, model))
    except AbacistError as error:
        check.is_incomplete = True
        check.looked_at = "nothing was replayed"
        check.not_checked.append(
            f"whether the weights write these replies: {error.message} Give a copy with --model"
        )
        return check
    there = _find_weights(opened, bundle, weights, roles, check)
    is_narrow = _is_narrow(opened, check)
    tallies: dict[str, Tally] = {}
    for role in dict.fromkeys(job.role for job in jobs):
        mine = [job for job in jobs if job.role == role]
        if role != BASE and role not in there:
            check.is_incomplete = True
            names = ", ".join(job.name for job in mine)
            check.not_checked.append(
                f"{names}: the weights of {role} are not at hand (--weights DIR)"
            )
            continue
        watcher.stage(f"Loading {_words(role)}")
        try:
            policy = _load(opened, role, there, base, _revision(opened, model), device, dtype)
        except _OtherAdapter as error:
            names = ", ".join(job.name for job in mine)
            check.not_checked.append(f"{names}: {error.message}")
            check.is_incomplete = True
            continue
        except ModelError as error:
            if role != BASE:
                check.fault(f"weights of {role}", "", "weights that can be loaded", error.message)
                continue
            names = ", ".join(job.name for job in mine)  # the base is not the bundle's
            check.not_checked.append(f"{names}: the base cannot be loaded. {error.message}")
            check.is_incomplete = True
            continue
        why = unsupported_reason(policy.model, FastPart.DECODING)
        for job in mine:
            if why is not None and job.is_training:
                check.not_checked.append(f"{job.name}: TRL wrote its rollouts ({why})")
                check.is_incomplete, job.replies = True, []
            _draw(policy, job, replies, seed, len(jobs))
        watcher.stage(f"Replaying what {_words(role)} wrote")
        done = _Done(watcher, sum(_tokens(job.replies) for job in mine))
        for job in mine:
            if job.replies:
                tallies[job.name] = replay(
                    policy,
                    job.replies,
                    job.sampling,
                    job.max_completion_tokens,
                    check,
                    is_narrow=is_narrow,
                    progress=done.of(job.name),
                )
        del policy
    _sum_up(check, tallies, is_narrow)
    for job in jobs:
        if job.name in tallies and len(job.replies) < job.recorded:
            drawn, met = len(job.replies), 1 - 0.95 ** len(job.replies)
            check.not_checked.append(
                f"{job.name}: {job.recorded - drawn:,} of {job.recorded:,} replies. Had one in "
                f"twenty been changed, the {drawn:,} that were drawn would have met one with a "
                f"chance of {met:.0%} (--replies all)"
            )
    return check


def _held_base(opened: Opened) -> Quantization | None:
    """How the run's base was held, by its adapter, or by its settings where that does not tell."""
    with contextlib.suppress(AbacistError):  # missing or damaged
        adapter = opened.document("run/adapter_config.json")
        held = quantization.recorded(adapter) if isinstance(adapter, dict) else None
        if held is not None:
            return held
    asked = (bits for bits in (4, 8) if opened.settings.get(f"load_in_{bits}bit"))
    return next(map(Quantization, asked), None)


def _is_narrow(opened: Opened, check: Check) -> bool:
    """Whether the run says that it computed in narrower numbers than float32, without
    contradicting itself: the bound for those lets other tokens pass."""
    claimed = str(opened.manifest.get("dtype", "float32"))
    asked = opened.settings.get("dtype")
    if asked not in (None, "auto", claimed):
        check.fault("run/manifest.json", "dtype", claimed, f"{asked} in run/config.yaml")
        return False
    return claimed != "float32"


def _sum_up(check: Check, tallies: Mapping[str, Tally], is_narrow: bool) -> None:
    whole = Tally()
    for tally in tallies.values():
        for name in vars(whole):
            setattr(whole, name, getattr(whole, name) + getattr(tally, name))
    check.looked_at = whole.sentence if tallies else "nothing was replayed"
    check.numbers = {"all": vars(whole), **{name: vars(one) for name, one in tallies.items()}}
    check.notes = [f"{name}: {tally.short}" for name, tally in tallies.items()]
    if is_narrow and tallies:
        check.notes.append(
            "the run's weights or products are in narrower numbers than float32: a token beyond a "
            "tie passes where log-probabilities need not differ by more than the bound in "
            "docs/verify.md"
        )
    if whole.wide_replies:
        check.not_checked.append(
            f"whether {whole.wide_replies:,} replies were changed in {whole.wide:,} tokens that "
            "pass by that bound only"
        )


def _words(role: str) -> str:
    return {BASE: "the base model", "final": "the trained model"}.get(role, role)


def _tokens(replies: Sequence[Reply]) -> int:
    return sum(len(reply.recorded.completion_ids) for reply in replies)


def _roles(opened: Opened) -> dict[str, list[dict[str, Any]]]:
    """What the index says of the weights, checked for its form."""
    table = opened.index.get("weights")
    roles = {}
    for role, files in (table if isinstance(table, dict) else {}).items():
        good = isinstance(files, list) and _ROLE.fullmatch(role) is not None
        good = good and all(
            isinstance(one, dict)
            and re.fullmatch(r"[0-9a-f]{64}", str(one.get("sha256")))
            and re.fullmatch(r"(?:adapter_)?model[\w.-]*\.safetensors", str(one.get("name")))
            for one in files
        )
        if not good:
            raise RunError("bundle.json: its table of weights is malformed.")
        roles[role] = files
    return roles


def _named_base(opened: Opened) -> str:
    return str(opened.settings.get("model_name_or_path", "tiny"))


def _revision(opened: Opened, model: str | None) -> str | None:
    """That of the run's own base; another model, named by whoever verifies, is as it is."""
    revision = opened.settings.get("model_revision")
    return None if model is not None or revision is None else str(revision)


def _of_verdict(opened: Opened) -> list[_Job]:
    """The replies before training are the base model's, those after the trained model's."""
    jobs = []
    for kind, name in (
        ("before", "greedy replies before training"),
        ("before-sampled", "sampled replies before training"),
        ("after", "greedy replies after training"),
        ("after-sampled", "sampled replies after training"),
    ):
        try:
            evaluation = opened.evaluation(kind)
        except RunError:
            continue  # named by `verify_verdict`
        if evaluation is None:
            continue
        settings = evaluation.settings
        if not 0 < settings.max_completion_tokens <= _MOST_TOKENS:
            raise RunError(f"The bundle's max_completion_tokens of evals/{kind} is too large.")
        sampling = Sampling(settings.temperature) if settings.temperature > 0 else None
        role = "final" if kind.startswith("after") else BASE
        job = _Job(name, role, settings.max_completion_tokens, sampling)
        file = f"run/evals/{kind}/rollouts.parquet"
        job.replies = [Reply(file, item_of(one), one, None) for one in evaluation.rollouts]
        jobs.append(job)
    return jobs


def _of_training(opened: Opened, check: Check) -> list[_Job]:
    """The rollouts of the steps right after a checkpoint, with their uniform numbers."""
    settings = opened.settings
    if settings.get("chat_template_kwargs"):
        check.not_checked.append("training rollouts: their prompts had chat_template_kwargs")
        return []
    asked = [name for name in _OTHER_ENGINES if settings.get(name)]
    if asked or settings.get("use_fast_path") is False:
        what = ", ".join(asked) or "use_fast_path false"
        check.not_checked.append(f"training rollouts: {what}; TRL drew them by its own numbers")
        return []
    jobs = []
    entries = opened.index.get("replays")
    for entry in entries if isinstance(entries, list) else []:
        name, stream = str(entry.get("rollouts")), str(entry.get("stream"))
        role = str(entry.get("checkpoint"))
        if not _ROLE.fullmatch(role):
            raise RunError("bundle.json: its list of replays is malformed.")
        if not opened.has(name) or not opened.has(stream):
            check.fault("bundle.json", f"replay of {role}", f"{name} and {stream}", "not both")
            continue
        rollouts = opened.rollouts(name)
        budget = int(settings.get("max_completion_length") or 256)
        if not 0 < budget <= _MOST_TOKENS:
            raise RunError(f"The bundle's max_completion_length is {budget:,}.")
        uniforms = _uniforms(opened.contents.members[stream], entry, len(rollouts), budget)
        job = _Job(
            f"training rollouts of step {entry.get('step')}",
            role,
            budget,
            _sampling(settings),
            [Reply(name, item_of(r), r, row) for r, row in zip(rollouts, uniforms, strict=True)],
            is_training=True,
        )
        jobs.append(job)
    return jobs


def _uniforms(state: bytes, entry: Mapping[str, Any], rows: int, budget: int) -> torch.Tensor:
    """The numbers [rows, budget] that the engine drew: see ``Engine.complete``."""
    if len(state) != STREAM_BYTES:
        raise RunError(f"{entry.get('stream')}: not a random stream ({len(state)} bytes).")
    generator = torch.Generator()
    try:
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    except RuntimeError as error:
        raise RunError(f"{entry.get('stream')}: not a random stream.") from error
    if entry.get("draws_before") == 1:
        torch.empty((), dtype=torch.int64).random_(generator=generator)
    _refuse_too_many(rows, budget)
    return torch.rand((rows, budget), generator=generator, dtype=torch.float64)


def _refuse_too_many(rows: int, budget_tokens: int) -> None:
    if rows * budget_tokens > _MOST_NUMBERS:
        raise RunError(
            f"The bundle says that {rows:,} replies of up to {budget_tokens:,} tokens were drawn "
            f"at once, more than {_MOST_NUMBERS:,} random numbers."
        )


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    given = {
        name: settings[name]
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if settings.get(name) is not None
    }
    return Sampling(**given)


def _draw(policy: Policy, job: _Job, wanted: int | None, seed: int, num_jobs: int) -> None:
    """Keep as many replies of ``job`` as are to be replayed, drawn by ``seed``, and give sampled
    ones of an evaluation their numbers."""
    if job.sampling is not None and job.replies and job.replies[0].uniforms is None:
        job.replies = _with_numbers(policy, job)
    model: Any = policy.model
    size = sum(weight.numel() for weight in model.parameters())
    if wanted is None:
        tokens = sum(one.recorded.prompt_tokens for one in job.replies) + _tokens(job.replies)
        mean = max(1.0, tokens / max(1, len(job.replies)))
        wanted = max(_LEAST_REPLIES, int(_WORK / (2.0 * size * mean * num_jobs)))
    job.recorded = len(job.replies)
    if wanted < len(job.replies):
        chosen = random.Random(f"{seed}/{job.name}").sample(range(len(job.replies)), wanted)
        job.replies = [job.replies[at] for at in sorted(chosen)]


def _with_numbers(policy: Policy, job: _Job) -> list[Reply]:
    """The replies with the uniform numbers that ``policy.decoding.generation`` gives them."""
    firsts = [reply for reply in job.replies if reply.recorded.member == 0]
    samples = len(job.replies) // max(1, len(firsts))
    prompts = [
        policy.chat.encode([dict(turn) for turn in reply.recorded.messages]) for reply in firsts
    ]
    streams = streams_of(prompts, samples, 0)
    if len(streams) != len(job.replies):
        raise RunError(f"{job.replies[0].file}: its problems have not all as many replies.")
    _refuse_too_many(len(streams), job.max_completion_tokens)
    uniforms = uniforms_of(streams, job.max_completion_tokens)
    return [
        Reply(reply.file, reply.item, reply.recorded, row)
        for reply, row in zip(job.replies, uniforms, strict=True)
    ]


def _find_weights(
    opened: Opened,
    bundle: Path,
    folder: Path | None,
    roles: Mapping[str, Sequence[Mapping[str, Any]]],
    check: Check,
) -> dict[str, dict[str, Path]]:
    """By role, the files of its weights by name; only roles of which every file is at hand.

    What lies in the bundle under a sum that is not its own is used, and a fault; elsewhere files
    are found by their sum.
    """
    stem = bundle.name.removesuffix(".zip").removesuffix(".bundle")
    places = [bundle.with_name(f"{stem}.weights"), bundle.parent]
    outside: dict[int, list[Path]] = {}
    found: dict[str, dict[str, Path]] = {}
    for role, files in roles.items():
        mine = {}
        for entry in files:
            digest, name = str(entry["sha256"]), str(entry["name"])
            member = f"weights/{digest}.safetensors"
            if opened.has(member):
                mine[name] = opened.folder / member
                now = hashlib.sha256(opened.contents.members[member]).hexdigest()
                check.same(member, f"weights of {role}, SHA-256", digest, now)
                continue
            beside = [place / f"{digest}.safetensors" for place in places]
            place = next((one for one in beside if one.is_file()), None)
            if place is not None and _sum(place) != digest:
                check.fault(place.name, f"weights of {role}, SHA-256", digest, _sum(place))
            elif place is None and folder is not None:
                outside = outside or _by_size(folder)
                near = outside.get(int(entry.get("bytes") or 0), [])
                place = next((one for one in near if _sum(one) == digest), None)
            if place is not None:
                mine[name] = place
        if files and len(mine) == len(files):
            found[role] = mine
    return found


def _by_size(folder: Path) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found.setdefault(path.stat().st_size, []).append(path)
    return found


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(
    opened: Opened,
    role: str,
    there: Mapping[str, Mapping[str, Path]],
    base: Source,
    revision: str | None,
    device: str,
    dtype: str,
) -> Policy:
    """The policy of a role. Raises ModelError if it cannot be loaded."""
    # In float32: narrower numbers would add their own rounding to the run's.
    how: Any = {"device": device, "dtype": "float32" if dtype == "auto" else dtype}
    if (held := _held_base(opened)) is not None:
        how |= {"quantization": held, "dequantized": True}
    if role == BASE:
        return load_policy(base.name, revision=revision, **how)
    # No name that a stranger chose: the bundle's words are not part of any path that is written.
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=opened.folder))
    for name, path in there[role].items():
        (folder / name).symlink_to(path.resolve())
    if "adapter_model.safetensors" in there[role]:
        named: Any = {"base_model_name_or_path": base.name, "revision": revision}
        if base.is_adapter:
            own = read_json(base.folder / "adapter_config.json")
            named = {name: own.get(name) for name in named}
        config = _plain_adapter(opened) | named
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_policy(str(folder), **how)
    for name in ("config.json", "generation_config.json"):
        if opened.has(f"run/{name}"):
            shutil.copyfile(opened.run.path / name, folder / name)
    if len(there[role]) > 1:
        _write_weight_map(folder, there[role])
    for pattern in _TOKENIZER:
        for path in base.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    return load_policy(str(folder), **how)


def _write_weight_map(folder: Path, files: Mapping[str, Path]) -> None:
    from safetensors import safe_open

    weights: dict[str, str] = {}
    for name, path in files.items():
        with safe_open(path, "pt") as tensors:
            weights |= dict.fromkeys(tensors.keys(), name)
    text = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class _OtherAdapter(ModelError):
    """An adapter of a kind that is not replayed: nothing is wrong with it."""


def _plain_adapter(opened: Opened) -> dict[str, Any]:
    """The adapter's settings, of which only those are taken that say nothing but its shape."""
    given = opened.document("run/adapter_config.json")
    if not isinstance(given, dict) or not isinstance(given.get("peft_type"), str):
        raise ModelError("The bundle's adapter_config.json is that of no adapter.")
    if given["peft_type"] != "LORA":
        raise _OtherAdapter("an adapter that is no LoRA is not replayed")
    targets = given.get("target_modules")
    good = targets == "all-linear" or (
        isinstance(targets, list)
        and 0 < len(targets) <= 2000
        and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in targets)
    )
    kept = {
        name: given[name]
        for name, kind in _PLAIN.items()
        if name in given and isinstance(given[name], kind)  # type: ignore[arg-type]
    }
    odd = [name for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "megatron_config",
                             "layer_replication", "trainable_token_indices", "target_parameters")
           if given.get(name)]  # fmt: skip
    if not good or not 0 < kept.get("r", 0) <= _MOST_RANKS:
        what = "its ranks or the modules it is on"
        raise ModelError(f"The bundle's adapter cannot be loaded from a stranger: {what}.")
    if odd:
        raise _OtherAdapter(f"a LoRA with {', '.join(odd)} is not replayed")
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets, **kept}
