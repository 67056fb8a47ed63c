"""``abacist export`` from start to end: look, ask, write, load again, compare, put in place.

Read :func:`export` top to bottom. The trained policy is asked first and then let go, so that no
more than two copies of the model are in memory at a time.
"""

from __future__ import annotations

import contextlib
import gc
import io
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from abacist.delivery import card, gguf_file, llamacpp, ollama, push
from abacist.delivery.licence import Licence
from abacist.delivery.prompt_record import prompt_facts, write_prompt_record
from abacist.delivery.same_policy import (
    Agreement,
    Proof,
    Read,
    agreement,
    paired,
    read_replies,
    refuse_other,
    rows_of,
)
from abacist.delivery.staging import refuse_taken, staged
from abacist.errors import ModelError, RunError, UsageError
from abacist.learning.eval import Request, load_data
from abacist.learning.openings import note_asked
from abacist.learning.resume import checkpoints
from abacist.learning.seen import seen_by
from abacist.learning.tracking import Silent, Watcher, told_of
from abacist.policy import quantization
from abacist.policy.chat import Chat
from abacist.policy.decoding.generation import generate
from abacist.policy.loading import Policy, load_policy, quiet_libraries
from abacist.policy.source import Source, find, read_json, stored_tensors
from abacist.proof.ask import Prompting
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import Evaluation
from abacist.records.openings import EXPORT
from abacist.records.provenance import (
    EXPORT_FORMAT,
    EXPORT_NAME,
    EXPORT_VERSION,
    package_versions,
)
from abacist.records.rollout import Rollout
from abacist.records.rundir import RunDir, write_json
from abacist.task.answers import same_answer
from abacist.task.problems import Problem
from abacist.task.reply import parse_reply

KINDS = ("adapter", "merged", "gguf", "ollama")
EXPORTS_FOLDER = "exports"
GGUF_NAME = "model.gguf"
DEFAULT_PROBLEMS = 200
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportRequest:
    """What was asked for, in the words of the flags; None where nothing was said."""

    run: str
    to: str
    output_dir: Path | None = None
    overwrite: bool = False
    dtype: str = "auto"
    base_model: str | None = None
    num_problems: int = DEFAULT_PROBLEMS
    batch_size: int = 64
    dataset_name: str | None = None
    llamacpp_python: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    push: push.Push | None = None


@dataclass(frozen=True)
class Exported:
    """A finished export: where it is, in which numbers, and what was proven of it."""

    path: Path
    kind: str
    dtype: str
    proofs: list[Proof]
    notes: list[str]
    size_bytes: int
    addresses: list[str]


@dataclass(frozen=True)
class Trained:
    """The trained policy's replies to the held-out problems, and what it makes of them."""

    replies: Evaluation
    reads: list[Read]
    untrained_kl: float | None
    prompt_ids: list[list[int]]


@dataclass(frozen=True)
class Origin:
    """The run that is exported, and where in it."""

    run: RunDir
    model: str
    settings: dict[str, Any]
    manifest: dict[str, Any]
    prompting: Prompting


def export(request: ExportRequest, watcher: Watcher | None = None) -> Exported:
    """Write the trained policy of a run in another form, and prove that it is the same policy.

    Raises AbacistError for anything a person can mend, and where what was written is not the
    trained policy; nothing is left half-written then.
    """
    watcher = watcher or Silent()
    quiet_libraries()
    origin = open_origin(request)
    target = (request.output_dir or default_target(origin, request.to)).expanduser().resolve()
    refuse_taken(target, overwrite=request.overwrite)
    dtype = dtype_of(request, origin)
    if request.push is not None:
        push.refuse_unpushable(request.push)
        if request.push.rollouts:
            push.refuse_no_rollouts(origin.run)
    runtime = None
    if request.to in ("gguf", "ollama"):
        runtime = llamacpp.find_runtime(request.llamacpp_python)
    watcher.stage(f"Loading {request.run}")
    policy = load_exact(origin.model, request)
    chat = policy.chat
    licence = Licence.of(base_source(origin), request.base_model, chat.tokenizer)
    if request.push is not None:
        push.refuse_by_licence(request.push, request.to, licence)
    if request.to == "adapter" and not isinstance(policy.model, PeftModel):
        raise UsageError(
            f"{request.run} trained all weights: there is no adapter to export",
            "Use --to merged.",
        )
    modelfile = None
    if request.to in ("gguf", "ollama"):
        gguf_file.refuse_unmapped(_bare(policy.model), chat.tokenizer)
    if request.to == "ollama":
        pieces = ollama.template_of(chat)
        modelfile = ollama.modelfile(chat, origin.prompting, pieces, GGUF_NAME)
    # An adapter is its float32 file again, on the base as it is stored.
    is_exact = dtype == "float32" or request.to == "adapter"
    written = "float32" if is_exact else dtype
    problems = problems_of(request, origin)
    data = request.dataset_name
    note_asked(origin.model, problems, watcher, split="heldout", purpose=EXPORT, data=data)
    trained = ask_trained(policy, origin, problems, request, watcher, is_exact=is_exact)
    with staged(target, overwrite=request.overwrite) as folder:
        watcher.stage(f"Writing {request.to} in {written}")
        tell = _teller(watcher, "tensors", "tensors")
        config = write(policy, folder, request.to, written, licence.title(origin.run.run_id), tell)
        del policy
        gc.collect()
        write_prompt_record(folder, origin.run, origin.settings, origin.prompting)
        if modelfile is not None:
            (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        watcher.stage("Loading it again, to compare")
        proofs, notes = prove_all(
            folder, config, chat, origin, trained, request, runtime, watcher, is_exact=is_exact
        )
        if request.to == "adapter" and request.base_model is not None:
            name_base(folder, request.base_model)  # last: here it may not be reachable
        facts = card.RunFacts.of(origin.run, licence, prompt_facts(chat, origin.prompting))
        text = card.export_card(facts, kind=request.to, dtype=written, proofs=proofs, notes=notes)
        (folder / card.CARD_NAME).write_text(text, encoding="utf-8", errors="backslashreplace")
        licence.write_notice(folder)
        record = _record(facts, request.to, written, proofs, notes)
        write_json(
            folder / EXPORT_NAME, record | {"files": sorted(p.name for p in folder.iterdir())}
        )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    addresses = []
    if request.push is not None:
        watcher.stage(f"Pushing to {request.push.name}")
        addresses.append(push.push_folder(request.push, target))
        if request.push.rollouts:
            addresses.append(push.push_rollouts(request.push, origin.run, licence))
    return Exported(target, request.to, written, proofs, notes, size, addresses)


def open_origin(request: ExportRequest) -> Origin:
    """The run, or the checkpoint of one, that ``request`` names.

    Raises RunError if it is none, is damaged, or has no trained model yet.
    """
    path = Path(request.run).expanduser()
    is_checkpoint = path.name.startswith("checkpoint-")
    run = RunDir.open(path.parent if is_checkpoint else path)
    if is_checkpoint and (wrong := checkpoints.defect(path)):
        raise RunError(f"{path} is not exported: {wrong}.", "Export another checkpoint.")
    if not is_checkpoint and not any(path.glob("*model*.safetensors")):
        saved = checkpoints.checkpoints_of(path)
        raise RunError(
            f"{path}: holds no trained model, the run is not finished.",
            f"Finish it with abacist train --resume {shlex.quote(str(path))}"
            + (f", or export {saved[-1]}." if saved else "."),
        )
    settings = run.read_settings()
    return Origin(run, str(path), settings, run.read_manifest(), Prompting.of(str(path)))


def default_target(origin: Origin, kind: str) -> Path:
    """``RUN/exports/KIND``; of a checkpoint ``RUN/exports/KIND-checkpoint-N``."""
    name = Path(origin.model).name
    suffix = f"-{name}" if name.startswith("checkpoint-") else ""
    return origin.run.path / EXPORTS_FOLDER / f"{kind}{suffix}"


def dtype_of(request: ExportRequest, origin: Origin) -> str:
    """The number format to write: as asked, else as the base is stored.

    Raises UsageError for one that this kind does not have.
    """
    known = list(gguf_file.NUMBERS) if request.to in ("gguf", "ollama") else list(_TORCH)
    if request.to == "adapter":
        known = ["float32"]
    if request.dtype not in ("auto", *known):
        raise UsageError(
            f"--to {request.to} has no --dtype {request.dtype}",
            f"It has {', '.join(known)}; auto is that of the base model.",
        )
    if request.dtype != "auto":
        return request.dtype
    if request.to == "adapter":
        return "float32"
    # All weights are kept in float32 while they are trained: the base's dtype is the start's.
    base = base_source(origin)
    stored = {dtype for _, dtype, shape in stored_tensors(base.folder) if len(shape) > 1}
    found = {_STORED.get(dtype, "float32") for dtype in stored}
    return found.pop() if len(found) == 1 else "float32"


def load_exact(model: str, request: ExportRequest) -> Policy:
    """A policy in float32, whatever its files hold, so that two are compared by what they hold."""
    return load_policy(
        model,
        dtype="float32",
        device=request.device,
        dequantized=True,
        trust_remote_code=request.trust_remote_code,
    )


def problems_of(request: ExportRequest, origin: Origin) -> list[Problem]:
    """Problems that were held out from the run, to compare on.

    Raises DataError if its data is gone.
    """
    asked = Request(
        model=origin.model, num_problems=request.num_problems, dataset_name=request.dataset_name
    )
    settings = origin.settings
    return load_data(asked, settings, seen_by(origin.run.path)).problems


def ask_trained(
    policy: Policy,
    origin: Origin,
    problems: list[Problem],
    request: ExportRequest,
    watcher: Watcher,
    *,
    is_exact: bool,
) -> Trained:
    """The trained policy's greedy replies, what it makes of them, and how far training moved it."""
    watcher.stage(f"Asking the trained policy: {len(problems):,} held-out problems")
    replies = evaluate(
        policy,
        problems,
        system_prompt=origin.prompting.system_prompt,
        shots=origin.prompting.shots,
        max_completion_tokens=origin.prompting.max_completion_tokens,
        batch_size=request.batch_size,
        progress=told_of(watcher, "trained policy"),
        rewards=[],
    )
    tell = _teller(watcher, "reading its replies")
    reads = read_replies(policy, replies, tell)
    written = [list(reply.completion_ids) for reply in replies.rollouts]
    untrained = None
    if not is_exact and isinstance(policy.model, PeftModel):
        with policy.model.disable_adapter():
            before = read_replies(policy, replies, _teller(watcher, "before training"), reads)
        untrained = agreement(reads, before, written).kl_a_token
    prompts = [prompt for prompt, _ in rows_of(policy, replies)]
    return Trained(replies, reads, untrained, prompts)


def _teller(watcher: Watcher, label: str, unit: str = "replies") -> Callable[[int, int], None]:
    return lambda done, total: watcher.progress(done, total, label, f"{done:,} of {total:,} {unit}")


def write(
    policy: Policy,
    folder: Path,
    kind: str,
    dtype: str,
    name: str,
    tell: Callable[[int, int], None],
) -> Any:
    """Put the policy into ``folder`` in the form that was asked for; returns the model's config.

    The policy is used up: its adapter becomes part of its weights.
    """
    if kind == "adapter":
        write_adapter(policy, folder)
        return policy.model.config
    model = merged(policy)
    if kind == "merged":
        write_merged(model, policy.chat, folder, dtype)
    else:
        path = folder / GGUF_NAME
        gguf_file.write_gguf(model, policy.chat, path, dtype=dtype, name=name, tell=tell)
    return model.config


def prove_all(
    folder: Path,
    config: Any,
    chat: Chat,
    origin: Origin,
    trained: Trained,
    request: ExportRequest,
    runtime: llamacpp.Runtime | None,
    watcher: Watcher,
    *,
    is_exact: bool,
) -> tuple[list[Proof], list[str]]:
    """Load what stands in ``folder`` by every reader there is, and compare it with the policy.

    Returns what was found, and in words what was not tried. Raises ModelError where one of them
    reads another policy.
    """
    is_gguf = request.to in ("gguf", "ollama")
    if is_gguf:
        reader, again = "transformers' GGUF reader", load_gguf(folder, chat, config)
    else:
        reader = "PEFT" if request.to == "adapter" else "transformers"
        again = load_exact(str(folder), request)
        refuse_other_chat(chat, again.chat, origin.prompting, folder)
    proofs = [prove(reader, again, trained, request, watcher, is_exact=is_exact)]
    refuse_other(proofs[0])
    notes: list[str] = []
    if is_gguf and runtime is None:
        notes.append(llamacpp.NOT_TRIED)
    if runtime is not None:
        del again
        path = folder / GGUF_NAME
        found, told = through_llamacpp(runtime, path, chat, trained, watcher, is_exact=is_exact)
        refuse_other(found)
        proofs.append(found)
        notes.append(told)
    if request.to == "ollama":
        notes.append(ollama.NOT_TRIED)
    adapter = {} if request.to != "adapter" else read_json(folder / "adapter_config.json")
    if (held := quantization.recorded(adapter)) is not None:
        notes.append(f"It learned on a base in {held}. PEFT, transformers and vLLM do not hold the "
            "base so by themselves, and on another base it is another policy: for them, "
            "`abacist export --to merged`.")  # fmt: skip
    return proofs, notes


def _record(
    facts: card.RunFacts, kind: str, dtype: str, proofs: list[Proof], notes: list[str]
) -> dict[str, Any]:
    """What ``abacist.json`` holds: what this is, how it is asked, and what was proven of it."""
    return {
        "format": EXPORT_FORMAT,
        "format_version": EXPORT_VERSION,
        "kind": kind,
        "dtype": dtype,
        "base_model": facts.licence.public_base,
        "prompt": dict(facts.prompt),
        "proofs": [_finite(proof.to_json()) for proof in proofs],
        "notes": notes,
        "versions": package_versions(),
    }


def merged(policy: Policy) -> Any:
    """The model without an adapter: what the adapter adds is in its weights, in float32."""
    if not isinstance(policy.model, PeftModel):
        return policy.model
    return policy.model.merge_and_unload(safe_merge=True)


def _bare(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def write_merged(model: Any, chat: Chat, folder: Path, dtype: str) -> None:
    """A model folder of its own: weights rounded to the nearest number, tokenizer with template,
    generation config with the stop tokens and nothing that changes what is sampled."""
    chat.apply_to(model)
    model.config._name_or_path = ""
    model.to(_TORCH[dtype]).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def write_adapter(policy: Policy, folder: Path) -> None:
    """The PEFT adapter, its tokenizer, and a reference to its base that can be followed."""
    policy.model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank
    policy.chat.tokenizer.save_pretrained(folder)
    policy.model.generation_config.save_pretrained(folder)


def name_base(folder: Path, name: str) -> None:
    """Let the adapter in ``folder`` name its base as others know it."""
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": name})


def load_gguf(folder: Path, chat: Chat, config: Any) -> Policy:
    """The GGUF file in ``folder`` as transformers reads it, in float32.

    Raises ModelError if its settings are not those of the model.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
        found = AutoConfig.from_pretrained(folder, gguf_file=GGUF_NAME)
        # Its reader does not know of scaled rotary frequencies, which are a tensor of the file.
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_NAME, config=config, dtype=torch.float32
        )
    for name in _SAME_SETTINGS:
        one, other = getattr(config, name, None), getattr(found, name, None)
        if isinstance(one, float) and isinstance(other, float):
            is_same = abs(one - other) <= 1e-6 * abs(one)
        else:
            is_same = one == other
        if not is_same:
            raise ModelError(f"The GGUF file says {name} {other} where the model has {one}.")
    one, other = config.rope_parameters["rope_theta"], found.rope_parameters["rope_theta"]
    if abs(one - other) > 1e-6 * abs(one):
        raise ModelError(f"The GGUF file says rope_theta {other} where the model has {one}.")
    network.requires_grad_(False)
    network.eval()
    return Policy(network, chat, [], str(folder), str(folder), folder)


def base_source(origin: Origin) -> Source:
    """The model that training began with; what was trained itself where that is gone.

    Raises ModelError for an adapter whose base cannot be found.
    """
    model = find(origin.model)
    try:
        base = card.base_of(model.folder, origin.settings)
    except ModelError:
        if model.is_adapter:
            raise
        return model
    return model if base.is_adapter else base


_SAME_SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip


def refuse_other_chat(one: Chat, other: Chat, prompting: Prompting, folder: Path) -> None:
    """Raise ModelError if the export would be asked or stopped otherwise than the run."""
    if one.stop_ids != other.stop_ids:
        raise ModelError(f"The export stops at {other.stop_ids}, the run at {one.stop_ids}.")
    if Prompting.of(str(folder)) != prompting:
        raise ModelError("The export's record of its prompt is not the run's.")


def prove(
    reader: str,
    again: Policy,
    trained: Trained,
    request: ExportRequest,
    watcher: Watcher,
    *,
    is_exact: bool,
) -> Proof:
    """Compare the policy that was loaded ``again`` with the trained one."""
    tell = _teller(watcher, "comparing")
    reads = read_replies(again, trained.replies, tell, trained.reads)
    written = [list(reply.completion_ids) for reply in trained.replies.rollouts]
    for (prompt, _), asked in zip(rows_of(again, trained.replies), trained.prompt_ids, strict=True):
        if prompt != asked:
            raise ModelError(
                "The export's tokenizer makes other tokens of a prompt than the run's."
            )
    found = agreement(trained.reads, reads, written)
    answers = None
    if not is_exact:
        different = [
            number
            for number, (read, ids) in enumerate(zip(reads, written, strict=True))
            if read.best_C.tolist() != ids
        ]
        # The other replies are the same: at each of their tokens it would have written that token.
        completions = (
            generate(
                again,
                [trained.replies.rollouts[number].messages for number in different],
                max_completion_tokens=trained.replies.settings.max_completion_tokens,
                batch_size=request.batch_size,
                progress=told_of(watcher, "replies that differ"),
            )
            if different
            else []
        )
        ids = {n: one[0].ids for n, one in zip(different, completions, strict=True)}
        answers = paired(trained.replies, regraded(trained.replies, ids, again.chat))
    return Proof(reader, is_exact, found, answers, trained.untrained_kl)


def regraded(replies: Evaluation, others: dict[int, list[int]], chat: Chat) -> Evaluation:
    """The evaluation with other replies to some problems, by number, read and graded anew."""

    def of(reply: Rollout, ids: list[int]) -> Rollout:
        text = chat.decode(ids)
        answer = parse_reply(text).answer
        return replace(
            reply,
            completion=text,
            completion_ids=ids,
            completion_tokens=len(ids),
            stop_reason=chat.stop_reason(ids, replies.settings.max_completion_tokens),
            read_answer=answer,
            is_correct=None if reply.gold is None else same_answer(answer, reply.gold),
        )

    rollouts = [
        of(reply, others[number]) if number in others else reply
        for number, reply in enumerate(replies.rollouts)
    ]
    return replace(replies, rollouts=tuple(rollouts))


def through_llamacpp(
    runtime: llamacpp.Runtime,
    path: Path,
    chat: Chat,
    trained: Trained,
    watcher: Watcher,
    *,
    is_exact: bool,
) -> tuple[Proof, str]:
    """The same comparison through llama.cpp's own runtime, and what it says of the tokenizer."""
    written = [list(reply.completion_ids) for reply in trained.replies.rollouts]
    texts = [
        str(chat.tokenizer.decode(ids, skip_special_tokens=False)) for ids in trained.prompt_ids
    ]
    reads, others, prompts = llamacpp.read(
        runtime,
        path,
        list(zip(trained.prompt_ids, written, strict=True)),
        texts,
        [read.kept_CK for read in trained.reads],
        stop_ids=list(chat.stop_ids),
        budget_tokens=trained.replies.settings.max_completion_tokens,
        tell=_teller(watcher, "llama.cpp"),
    )
    different = sum(a != b for a, b in zip(prompts, trained.prompt_ids, strict=True))
    if different:
        raise ModelError(
            f"llama.cpp makes other tokens of {different} of {len(prompts)} prompts than the run's "
            "tokenizer.",
            "Nothing was kept. Please report this, with the base model's name.",
        )
    found: Agreement = agreement(trained.reads, reads, written)
    answers = None if is_exact else paired(trained.replies, regraded(trained.replies, others, chat))
    note = f"{runtime.version}: all {len(prompts)} prompts become the same tokens there."
    return Proof(runtime.version, is_exact, found, answers, trained.untrained_kl), note


def _finite(value: Any) -> Any:
    """Nested JSON without NaN, which it does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
