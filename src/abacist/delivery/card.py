"""The model card of a run and of what is exported from it: a README.md with front matter for the
Hub.

Every figure in it comes from the files of the run. It names no path of this machine: a model or
data set that has only a path is said to be local.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from abacist.delivery.commands import Command, commands_for
from abacist.delivery.licence import Licence
from abacist.delivery.prompt_record import is_local, prompt_facts
from abacist.delivery.same_policy import EQUAL_BOUND, KL_BOUND, LOGP_BOUND, Proof
from abacist.errors import AbacistError
from abacist.policy.loading import load_chat
from abacist.policy.source import BUILT_IN, Source, find, is_built_in, read_json
from abacist.proof.ask import Prompting
from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.comparison.sentence import bracket, headline, p_words, percent, points
from abacist.proof.evaluation import Evaluation
from abacist.records.rundir import RunDir, write_aside
from abacist.records.secrets import without_secrets
from abacist.task.prompts import build_messages
from abacist.task.rewards import is_built_in_name

CARD_NAME = "README.md"
MARK = "<!-- written by abacist: an edited card is left alone once this line is gone -->"
# What transformers asks whoever edits its draft to remove, and the whole shape of TRL's draft.
_TRANSFORMERS_DRAFT = "<!-- This model card has been generated automatically according to the"
_TRL_DRAFT = re.compile(
    r"# Model Card for [^\n]*\n+This model is a fine-tuned version of [^\n]*\n"
    r"It has been trained using \[TRL\]\(https://github\.com/huggingface/trl\)\.\n"
)
_TRL_HEADINGS = {"Quick start", "Training procedure", "Framework versions", "Citations"}
_RELATIONS = {"merged": "finetune", "gguf": "quantized", "ollama": "quantized"}
_SETTINGS = (
    "max_steps", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "beta", "loss_type", "temperature", "use_peft", "lora_r", "lora_alpha",
)  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """What a card tells of a run. ``verdict`` is None where nothing was measured, or not yet."""

    run_id: str
    licence: Licence
    base: str
    prompt: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]
    settings: Mapping[str, Any]
    manifest: Mapping[str, Any]
    verdict: Comparison | None
    why_no_verdict: str

    @classmethod
    def of(cls, run: RunDir, licence: Licence, prompt: Mapping[str, Any]) -> RunFacts:
        """Read from the files of ``run``."""
        settings, manifest = run.read_settings(), run.read_manifest()
        verdict, why = None, ""
        try:
            verdict = compare(
                Evaluation.load(run.evals_dir / "before"),
                Evaluation.load(run.evals_dir / "after"),
                control=str(manifest.get("control") or "none"),
            )
        except AbacistError as error:
            is_whole = (run.evals_dir / "verdict.json").exists()
            why = error.message if is_whole else "The run has no verdict: it was not measured "
            why += "" if is_whole else "before and after on held-out problems."
        prompting = Prompting.of(str(run.path))
        messages = build_messages(
            "…", system_prompt=prompting.system_prompt, shots=prompting.shots
        )[:-1]
        base = licence.public_base or Path(str(settings.get("model_name_or_path", "?"))).name
        return cls(run.run_id, licence, base, prompt, messages, settings, manifest, verdict, why)


def write_run_card(path: Path) -> Path | None:
    """Write the card of a run into its directory; None where a person's own card stands there.

    Raises AbacistError if the run, its model or its tokenizer cannot be read.
    """
    run = RunDir.open(path)
    target = path / CARD_NAME
    if target.is_file() and not _is_ours_or_blank(target):
        return None
    chat = load_chat(str(path))
    licence = Licence.of(base_of(path, run.read_settings()), None, chat.tokenizer)
    prompt = prompt_facts(chat, Prompting.of(str(path)))
    facts = RunFacts.of(run, licence, prompt)
    is_adapter = (path / "adapter_config.json").exists()
    text = _card(facts, kind="run" if is_adapter else "full run", proof="", by_llamacpp=False)
    write_aside(target, text.encode("utf-8", "backslashreplace"))
    return target


def base_of(folder: Path, settings: Mapping[str, Any]) -> Source:
    """The model that the run in ``folder`` began with, as it is found now."""
    name = str(settings.get("model_name_or_path") or "")
    if (folder / "adapter_config.json").exists():
        config = read_json(folder / "adapter_config.json")
        name = str(config.get("base_model_name_or_path") or name)
    return find(BUILT_IN if is_built_in(name) else name)


def _is_ours_or_blank(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    if MARK in text or _TRANSFORMERS_DRAFT in text:
        return True
    body = _without_front_matter(text)
    if _TRL_DRAFT.match(body):
        headings = [line.lstrip("# ") for line in body.splitlines() if line.startswith("#")]
        # Code and citations in it may begin with a "#" too, but TRL's do not.
        return set(headings[1:]) <= _TRL_HEADINGS
    peft_draft = ModelCard.from_template(ModelCardData()).text.strip()
    rest = body.removeprefix(peft_draft)
    return (
        rest != body
        and re.fullmatch(r"\s*(### Framework versions\s+- PEFT \S+\s*)?", rest) is not None
    )


def _without_front_matter(text: str) -> str:
    _, fence, body = text.removeprefix("---").partition("\n---\n")
    return (body if text.startswith("---") and fence else text).strip()


def export_card(
    facts: RunFacts, *, kind: str, dtype: str, proofs: Sequence[Proof], notes: Sequence[str]
) -> str:
    """The card of an export, with what was proven of it."""
    by_llamacpp = any("llama.cpp" in proof.reader for proof in proofs)
    return _card(
        facts, kind=kind, proof=_proof_section(kind, dtype, proofs, notes), by_llamacpp=by_llamacpp
    )


def _card(facts: RunFacts, *, kind: str, proof: str, by_llamacpp: bool) -> str:
    sections = [
        _front_matter(facts, kind),
        MARK,
        f"# {facts.licence.title(facts.run_id)}",
        f"`{facts.base}` taught to reason in words and sums by GRPO, with Abacist and TRL.",
        "## What it learned",
        *_verdict_section(facts),
        *(["## Is this the trained policy?", proof] if proof else []),
        "## How it is asked",
        *_prompt_section(facts),
        "## How to load it",
        *_loading_section(facts, commands_for(kind, ".", by_llamacpp=by_llamacpp)),
        "## How it was trained",
        *_training_section(facts),
        "## Licence",
        "\n".join(facts.licence.lines()),
    ]
    return without_secrets("\n\n".join(sections)) + "\n"


def _front_matter(facts: RunFacts, kind: str) -> str:
    licence, source = facts.licence, str(facts.settings.get("dataset_name", ""))
    base = licence.public_base
    is_adapter = kind in ("run", "adapter")
    found: dict[str, Any] = {
        "library_name": {"gguf": "gguf", "ollama": "gguf"}.get(
            kind, "peft" if is_adapter else "transformers"
        ),
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "gsm8k", "trl", "abacist", *(["lora"] if is_adapter else [])],
    }
    if base is not None and base != BUILT_IN:
        found["base_model"] = base
        found["base_model_relation"] = _RELATIONS.get(kind, "adapter" if is_adapter else "finetune")
    found |= licence.front_matter()
    if "/" in source and not is_local(source):
        found["datasets"] = [source]
    return f"---\n{yaml.safe_dump(found, sort_keys=True, allow_unicode=True)}---"


def _verdict_section(facts: RunFacts) -> list[str]:
    verdict = facts.verdict
    if verdict is None:
        return [f"Nothing is claimed. {facts.why_no_verdict}"]
    rows = []
    for name, pair in (
        ("right", verdict.accuracy),
        ("right in any format", verdict.any_format),
        ("right, structures never trained on", verdict.unseen),
    ):
        if pair is not None:
            rows.append(
                f"| {name} | {percent(pair.before)} | {percent(pair.after)} | "
                f"{points(pair.change.value)} {bracket(pair.change)} | "
                f"{len(pair.gained)} / {len(pair.lost)} | {p_words(pair)} |"
            )
    table = "\n".join(
        ["| greedy replies | before | after | change, points | gained / lost | paired test |",
         "|---|---:|---:|---:|---:|---:|", *rows]
    )  # fmt: skip
    return [
        headline(verdict),
        table,
        "Brackets hold 95 % intervals of the paired change; the test is McNemar's, exact. The "
        "problems were held out from training.",
    ]


def _proof_section(kind: str, dtype: str, proofs: Sequence[Proof], notes: Sequence[str]) -> str:
    rounding = {
        "float32": "Numbers are float32: nothing is rounded.",
        "q8_0": "Matrices are Q8_0: 8 bits a number, one scale for 32 neighbours.",
    }.get(dtype, f"Matrices are rounded to the nearest {dtype} (ties to even).")
    if kind == "adapter":
        rounding = "The adapter is float32, as it was trained."
    lines = [f"Yes, as measured when it was exported. {rounding}", *map(proof_sentence, proofs)]
    exact = any(proof.is_exact for proof in proofs)
    bound = (
        f"all greedy replies equal but for ties, log-probabilities within {LOGP_BOUND:.0e}"
        if exact
        else f"at least {EQUAL_BOUND:.0%} of the tokens equal, at most {KL_BOUND:g} nats a token "
        "and less than half of what training changed, where that is known, and accuracy not worse "
        "by the paired test"
    )
    lines.append(f"An export beyond these bounds fails: {bound}.")
    return "\n\n".join([*lines, *notes])


def proof_sentence(proof: Proof) -> str:
    """What was found by one reader, in a few sentences."""
    text = f"Loaded by {proof.reader}: {proof.agreement.sentence()}."
    if proof.untrained_kl is not None:
        text += f" What training changed is a KL of {proof.untrained_kl:.1e} a token."
    if proof.answers is not None:
        pair = proof.answers.accuracy
        text += (
            f" Right on the same {pair.change.n:,} problems: {percent(pair.before)} before "
            f"rounding, {percent(pair.after)} after, {points(pair.change.value)} points "
            f"{bracket(pair.change)}, {p_words(pair)}."
        )
    return text


def _prompt_section(facts: RunFacts) -> list[str]:
    prompt = facts.prompt
    stops = ", ".join(f"`{text}`" for text in prompt["stop_tokens"])
    date = prompt["date_string"]
    lines = [
        "Its own chat template (`chat_template.jinja`)"
        + (f", with `date_string` “{date}”" if date else "")
        + f". A reply ends at {stops}, and had at most {prompt['max_completion_tokens']:,} tokens. "
        "`abacist ask` and `abacist eval` read all this from `config.yaml`.",
    ]
    if not facts.messages:
        return [*lines, "The question alone, without system text or worked examples."]
    shown = "\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in facts.messages)
    return [*lines, "Before the question stand:", _fenced(shown)]


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _loading_section(facts: RunFacts, commands: Sequence[Command]) -> list[str]:
    lines = [f"- {command.what} ({command.tried}): `{command.text}`" for command in commands]
    note = []
    if facts.licence.public_base == BUILT_IN:
        note = ["The base is the model that comes with Abacist, which must be installed for it."]
    return ["\n".join(lines), *note]


def _training_section(facts: RunFacts) -> list[str]:
    settings = facts.settings
    source = str(settings.get("dataset_name", "?"))
    data = "a local data set" if is_local(source) else f"`{source}`"
    rewards = settings.get("reward_funcs") or []
    named = [name if is_built_in_name(name) else name.rpartition("/")[2] for name in rewards]
    rows = [
        f"- data: {data}, {_counts(facts.manifest)}",
        f"- rewards: {', '.join(f'`{name}`' for name in named)}",
        *(f"- `{name}`: {settings[name]}" for name in _SETTINGS if settings.get(name) is not None),
        f"- seed: {facts.manifest.get('seed')}",
    ]
    versions = facts.manifest.get("versions") or {}
    told = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name))
    return ["\n".join([*rows, f"- versions: {told}"])]


_VERSIONS = ("abacist", "trl", "transformers", "peft", "torch")


def _counts(manifest: Mapping[str, Any]) -> str:
    task = manifest.get("task")
    problems = task.get("problems") if isinstance(task, dict) else None
    if not isinstance(problems, dict):
        return "its size is not recorded"
    return (
        f"{problems.get('train', 0):,} problems to train on, {problems.get('heldout', 0):,} held "
        "out"
    )
