"""``abacist eval`` from start to end: load, ask, keep. Read :func:`examine` from top to bottom."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abacist.delivery.ask import Prompting, run_folder, run_settings
from abacist.delivery.examtask import Data, Request, load_data, prompting_of
from abacist.learning.resume.stopping import Interrupted
from abacist.learning.seen import seen_by
from abacist.learning.tracking import Silent, Watcher, told_of
from abacist.policy.decoding import engine
from abacist.policy.loading import Policy, load_policy, quiet_libraries
from abacist.policy.source import find, read_json
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import GREEDY, SAMPLED, Evaluation
from abacist.proof.native import NativeForm, NativePrompt, native_form
from abacist.proof.unfinished import SAMPLED_FOLDER, UNFINISHED, EvaluationFolder
from abacist.records.provenance import data_fingerprint

EVALS_FOLDER = Path("evals")
_VERSIONS = ("abacist", "torch", "transformers")
_SAMPLING_DEFAULTS = ("repetition_penalty", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Examined:
    """A finished evaluation: where it is kept, and what was found."""

    path: Path
    greedy: Evaluation
    sampled: Evaluation | None


Render = Callable[[Path, Evaluation, Evaluation | None], None]


def examine(
    request: Request, *, watcher: Watcher | None = None, render: Render | None = None
) -> Examined:
    """Measure a model or a run as ``request`` asks, and keep everything in one folder.

    One reply to each problem is greedy; with ``num_samples`` > 1 that many are sampled besides.
    ``render`` writes what a person reads. Killed at any moment, the same request goes on where it
    was. Raises AbacistError for anything a person can mend; nothing is overwritten unasked.
    """
    watcher = watcher or Silent()
    quiet_libraries()
    watcher.stage(f"Loading {request.model}")
    trust = request.trust_remote_code
    # A wrong name shows before any data is read.
    found = find(request.model, revision=request.revision, trust_remote_code=trust)
    data = load_data(request, run_settings(request.model), seen_by(found.folder))
    if data.overlap.sentence:
        watcher.note(f"  {data.overlap.sentence}")
    policy = load_policy(
        request.model,
        dtype=request.dtype,
        device=request.device,
        attn_implementation=request.attn_implementation,
        revision=request.revision,
        trust_remote_code=trust,
    )
    form = native_form(policy) if request.native_prompt else None
    prompting = prompting_of(request, data, form)
    native = None
    if form is not None and form is not NativeForm.BUILT_IN:
        native = NativePrompt.of(policy, form, prompting.shots)
        policy, prompting = native.policy, replace(prompting, shots=native.shots)
    conditions = _conditions(request, data, policy, prompting, form)
    asked = _asked(request, data, policy, prompting)
    num_replies = len(data.problems) * (1 + request.num_samples * (request.num_samples > 1))
    with _folder(request, data, asked) as folder, _says_how_to_go_on(folder, num_replies):
        watcher.note(f"  kept in {folder.path}; if stopped, the same command goes on from there")
        if folder.resumed:
            watcher.note("  an unfinished evaluation is there, and is taken up")

        def ask(kind: str, **how: Any) -> Evaluation:
            replies = len(data.problems) * int(how.get("num_samples", 1))
            watcher.stage(f"Asking, {kind}: {replies:,} replies to {len(data.problems):,} problems")
            evaluation = evaluate(
                policy,
                data.problems,
                system_prompt=prompting.system_prompt,
                shots=prompting.shots,
                max_completion_tokens=prompting.max_completion_tokens,
                batch_size=request.batch_size,
                prefill=request.prefill,
                seed=request.seed,
                progress=told_of(watcher, kind),
                run_id=_name(request.model),
                split=data.split,
                native_messages=native.messages if native else None,
                conditions=conditions,
                parts=folder.parts(kind),
                **how,
            )
            return replace(evaluation, overlap=data.overlap)

        greedy = ask(GREEDY)
        sampled = None
        if request.num_samples > 1:
            how = {"num_samples": request.num_samples, "temperature": request.temperature}
            sampled = ask(SAMPLED, **how)
            sampled.save(folder.path / SAMPLED_FOLDER)
        greedy.save(folder.path)
        if render is not None:
            render(folder.path, greedy, sampled)
        folder.finish()
        return Examined(folder.path, greedy, sampled)


@contextmanager
def _says_how_to_go_on(folder: EvaluationFolder, num_replies: int) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a message: what is kept, and how the evaluation goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
        if isinstance(stop, SystemExit) and stop.code != 128 + number:
            raise
        raise Interrupted(
            f"{'interrupted' if number == signal.SIGINT else 'terminated'}. "
            f"{folder.count_replies():,} of {num_replies:,} replies are kept in "
            f"{folder.path / UNFINISHED}.",
            "Give the same command again: it asks for the others and ends in the same figures.",
            number,
        ) from None


def _folder(request: Request, data: Data, asked: dict[str, Any]) -> EvaluationFolder:
    """The folder asked for, or the next free one: in the run's ``evals/`` if it is a run."""
    if request.output_dir is not None:
        return EvaluationFolder.open(request.output_dir, asked, overwrite=request.overwrite)
    parts = [_name(data.source), data.split]
    parts += ["perturbed"] * (request.perturb is not None) + ["native"] * request.native_prompt
    if not run_settings(request.model):
        return EvaluationFolder.open_numbered(
            EVALS_FOLDER, "-".join([_name(request.model), *parts]), asked
        )
    folder = Path(request.model).expanduser()
    run = run_folder(request.model) or folder
    if run.resolve() != folder.resolve():  # a checkpoint, or a copy inside the run
        parts = [_name(request.model), *parts]
    return EvaluationFolder.open_numbered(run / "evals", "-".join(parts), asked)


def _name(text: str) -> str:
    """The last part of a path or id, as a plain file name."""
    path = Path(text).expanduser()
    last = path.stem if path.is_file() else (path.resolve() if path.exists() else path).name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def _asked(request: Request, data: Data, policy: Policy, prompting: Prompting) -> dict[str, Any]:
    """Everything the replies depend on; the batch size does not matter (in float32)."""
    shots = (*prompting.shots.chosen, *prompting.shots.spares)
    return {
        "model": request.model,
        "weights": _weights_fingerprint(request),
        "dataset_name": data.source,
        "split": data.split,
        "num_problems": len(data.problems),
        "problems": data_fingerprint(data.problems),
        "system_prompt": prompting.system_prompt,
        "num_shots": len(prompting.shots),
        "shots": data_fingerprint(shots),
        "native_prompt": request.native_prompt,
        "prefill": request.prefill,
        "max_completion_length": prompting.max_completion_tokens,
        "num_samples": request.num_samples,
        "temperature": request.temperature if request.num_samples > 1 else 0.0,
        "seed": request.seed,
        "date": policy.chat.date_string,
        **{choice.what: choice.value for choice in policy.choices},
        "versions": {name: _version(name) for name in _VERSIONS},
    }


def _version(package: str) -> str | None:
    from abacist import __version__

    return __version__ if package == "abacist" else version(package)


def _weights_fingerprint(request: Request) -> str:
    """A hash of names, sizes and dates of the model's files: changed weights are seen by it."""
    found = find(request.model, revision=request.revision)
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(found.folder.iterdir())
        if file.suffix == ".safetensors" or file.name.endswith("config.json")
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _conditions(
    request: Request,
    data: Data,
    policy: Policy,
    prompting: Prompting,
    form: NativeForm | None,
) -> dict[str, str]:
    """In words, what the numbers depend on beside model and problems."""
    notes = dict(policy.chat.notes)
    values = {choice.what: choice.value for choice in policy.choices}
    is_ours = engine.obstacle(policy.model) is None
    attention = "our engine's" if is_ours else values["attention"]
    if form is not None:
        prompt = f"the model's own best-known: {form.sentence}"
    elif prompting.system_prompt is None:
        prompt = "the question, without system text"
    else:
        words = " ".join(prompting.system_prompt.split())
        prompt = f"system text ({words if len(words) <= 60 else words[:57] + '…'}), the question"
    if request.prefill:
        prompt += f"; every reply opened with {request.prefill!r}"
    sampled = ""
    if request.num_samples > 1:
        sampled = f"; {request.num_samples} more replies drawn at temperature "
        sampled += f"{request.temperature:g}, no top-p or top-k, seed {request.seed}"
    return {
        "model": request.model + (f" on {policy.base_name}" * (policy.base_name != policy.name)),
        "problems": data.sentence,
        **({"seen in training": data.overlap.sentence} if data.overlap.sentence else {}),
        "prompt": prompt,
        "examples": f"{len(prompting.shots)} in the prompt",
        "template": notes.get("template", ""),
        "date": notes.get("date", "the template prints none"),
        "decoding": "greedy" + sampled,
        "repetition penalty": "none" + _ignored_defaults(request, policy),
        "budget": f"{prompting.max_completion_tokens} tokens a reply",
        "stop tokens": notes.get("stop tokens", ", ".join(map(str, policy.chat.stop_ids))),
        "arithmetic": f"{values['dtype']} on {values['device']}, {attention} attention",
    }


def _ignored_defaults(request: Request, policy: Policy) -> str:
    """What the checkpoint's own generation config asks for, which is not done here."""
    revision = request.revision if policy.base_name == request.model else None
    path = find(policy.base_name, revision=revision).folder / "generation_config.json"
    own = read_json(path) if path.is_file() else {}
    told = [f"{name} {own[name]:g}" for name in _SAMPLING_DEFAULTS if _is_number(own.get(name))]
    return f"; the checkpoint's own defaults are left aside: {', '.join(told)}" if told else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
