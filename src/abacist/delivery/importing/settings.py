"""TRL's, PEFT's and transformers' arguments in a script, as settings of ``abacist train``.

Most have the same name there and here. What is decided by the machine (precision, attention,
devices, vLLM) is left to the machine that trains, so that the configuration runs on any.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

from abacist.delivery.importing.notes import Draft
from abacist.delivery.importing.script import Script
from abacist.delivery.importing.values import PLAIN, REST, Made, Symbol, Unknown, is_plain
from abacist.learning.limits import RETIRED, SWITCHES

_PRECISION = "mixed precision is chosen for the machine that trains"
_VLLM = "replies are written by Abacist's own engine; --use_vllm samples with vLLM"
_HUB = "nothing is uploaded by a training; `abacist export` takes the result out"
_MACHINE = "is left to the machine that trains"
# Settings of GRPOConfig that have no place in a configuration, with the reason.
_LEFT_OUT = {
    "output_dir": "every run gets a new folder in runs/; --output_dir names one",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "use_vllm": _VLLM,
    "do_train": "a run trains",
    "do_eval": "held-out problems are measured anyway",
    "per_device_eval_batch_size": "held-out problems are measured --eval_batch_size at a time",
    "num_generations_eval": "held-out problems get one greedy reply each",
    "eval_accumulation_steps": "held-out problems are measured --eval_batch_size at a time",
    "load_best_model_at_end": "the last policy is the result; picking the best by what it is "
    "measured on flatters it",
    "metric_for_best_model": "the last policy is the result",
    "greater_is_better": "the last policy is the result",
    "disable_tqdm": "progress is shown by Abacist",
    "remove_unused_columns": "all columns reach the rewards anyway",
    "dataloader_pin_memory": _MACHINE,
    "local_rank": _MACHINE,
    "ddp_find_unused_parameters": _MACHINE,
    "torch_compile": "the fast path does not compile",
    "gradient_checkpointing_kwargs": "Abacist sets them",
    "use_liger_kernel": "Abacist's scoring keeps no logits either",
    "use_liger_loss": "Abacist's scoring keeps no logits either",
    "resume_from_checkpoint": "`abacist train --resume RUN` goes on with a run",
    "trust_remote_code": "code that comes with a model is never run unless you say so",
    "model_init_kwargs": "dtype and attention are chosen for the machine that trains",
}  # fmt: skip
_RENAMED = {"no_cuda": "use_cpu", "evaluation_strategy": "eval_strategy"}
_NARROW_OPTIMIZERS = re.compile(r"8bit|4bit|paged|bnb|galore|apollo|lomo|ademamix")
_LORA = {
    "r": ("lora_r", 8),
    "lora_alpha": ("lora_alpha", 8),
    "lora_dropout": ("lora_dropout", 0.0),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
}
_LORA_QUIET = {"task_type", "inference_mode", "random_state", "loftq_config", "model",
               "use_gradient_checkpointing", "target_modules", "max_seq_length"}  # fmt: skip
_LOADER_QUIET = {"model_name", "pretrained_model_name_or_path", "device_map", "use_cache",
                 "max_seq_length", "max_lora_rank", "low_cpu_mem_usage"}  # fmt: skip


def training_settings(script: Script, known: Collection[str], draft: Draft) -> None:
    """Carry over what the script gives to ``GRPOConfig``."""
    if script.config is None:
        if script.is_config_passed:
            draft.left_out(script.trainer.line, "the settings that the trainer is given cannot be "
                           "told from the text: give them as flags")  # fmt: skip
        else:
            draft.wrong(
                script.trainer.line, "the trainer gets no GRPOConfig: all of TRL's defaults"
            )
        return
    lines = script.config.lines
    given = dict(script.config.kwargs)
    if script.config.args:  # output_dir is the one that may stand without its name
        given.setdefault("output_dir", script.config.args[0])
    for name, value in given.items():
        line = lines.get(name, script.config.line)
        _training_setting(name, value, line, known, draft)
    for call in script.calls:
        is_setter = call.name.startswith("set_") or call.name == "update"
        if is_setter and any(step is script.config for step in call.chain()):
            draft.left_out(call.line, f"{call.name}(): what it sets is not read: give it as flags")
    _refuse_half_groups(script, draft)


def _training_setting(
    name: str, value: Any, line: int, known: Collection[str], draft: Draft
) -> None:
    name = _RENAMED.get(name, name)
    if name == REST:
        why = getattr(value, "why", "is computed when the script runs")
        draft.left_out(line, f"further settings, whose value {why}: give them as flags")
        return
    if isinstance(value, Symbol):  # IntervalStrategy.STEPS, say
        value = value.last.lower()
    if name in _LEFT_OUT or name.startswith(("vllm_", "hub_")):
        reason = _LEFT_OUT.get(name) or (_VLLM if name.startswith("vllm_") else _HUB)
        if value is not False and value is not None:
            draft.left_out(line, f"{name}: {reason}")
        if name == "model_init_kwargs" and isinstance(value, dict):
            _loader_settings(value, getattr(value, "lines", {}), line, draft)
        return
    is_told = not isinstance(value, Unknown) and is_plain(value)
    if not is_told and name in known and name not in RETIRED:
        why = getattr(value, "why", "is computed when the script runs")
        draft.left_out(line, f"{name}: its value {why}; give --{name} yourself")
        return
    if value is None:
        return
    if name == "warmup_ratio" and is_told:
        _warmup(value, line, draft)
    elif name in RETIRED:
        is_off = value is False or str(value).lower() in ("false", "no")
        if not (name in SWITCHES and is_off):
            if name in known:
                draft.left_out(line, f"{name}: {RETIRED[name]}")
            else:
                draft.wrong(line, f"{name}: TRL has no such setting. {RETIRED[name]}")
    elif name not in known:
        draft.left_out(line, f"{name}: TRL has no such setting")
    elif name == "optim" and _NARROW_OPTIMIZERS.search(str(value)):
        draft.left_out(line, f"optim {value}: needs a package of its own and CUDA; AdamW is used, "
                       "whose state is small with LoRA")  # fmt: skip
    elif name == "report_to":
        _report_to(value, line, draft)
    elif value == []:
        draft.left_out(line, f"{name}: an empty list, which is as good as none")
    elif name == "eval_strategy" and value == "epoch":
        draft.left_out(line, "eval_strategy epoch: --eval_steps N measures held-out problems")
    elif name == "run_name" and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(value)):
        draft.left_out(line, f"run_name {value!r}: a run's folder is called after it, so only "
                       "letters, digits, dots, dashes and underscores will do")  # fmt: skip
    else:
        draft.set(name, plain(value), line)


def plain(value: Any) -> Any:
    """A value of the script's as YAML takes it: dicts that know their lines become plain ones."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _warmup(value: Any, line: int, draft: Draft) -> None:
    if isinstance(value, int | float) and 0 <= value < 1:
        draft.set("warmup_steps", value, line, "warmup_ratio, which TRL has no more")
    else:
        draft.left_out(line, f"warmup_ratio {value}: --warmup_steps takes a fraction below 1")


def _report_to(value: Any, line: int, draft: Draft) -> None:
    names = [value] if isinstance(value, str) else list(value)
    kept = []
    for name in map(str, names):
        if name in ("none", "all"):
            continue
        if name not in ("wandb", "trackio", "tensorboard"):
            draft.left_out(line, f"report_to {name}: wandb, trackio or tensorboard")
        elif find_spec(name) is None:
            draft.left_out(line, f"report_to {name}: it is not installed here")
        else:
            kept.append(name)
    draft.set("report_to", kept or ["none"], line)


def _refuse_half_groups(script: Script, draft: Draft) -> None:
    """A batch that holds no whole groups: TRL counted it in prompts when such scripts ran."""
    named = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    given = {*script.config.kwargs} if script.config is not None else set()
    untold = [name for name in named if name in given and name not in draft.settings]
    if untold == ["per_device_train_batch_size"] and script.config is not None:
        of_it = script.config.lines.get(untold[0], script.config.line)
        one_group = _number(draft, "num_generations", 8)
        draft.set(untold[0], one_group, of_it, "one group: the script's text does not tell it")
    if untold:
        return  # a batch of which a part cannot be known is not judged
    size = _number(draft, "num_generations", 8)
    batch = _number(draft, "per_device_train_batch_size", 8)
    steps = _number(draft, "gradient_accumulation_steps", 1)
    if draft.settings.keys() & {"generation_batch_size", "steps_per_generation"}:
        return
    if size < 2 or batch < 1 or steps < 1:
        return  # refused with the rest, by its own name
    line = next(
        (draft.settings[name].line for name in ("per_device_train_batch_size", "num_generations")
         if name in draft.settings), None)  # fmt: skip
    if (batch * steps) % size:
        now = size if script.uses_unsloth else batch * size
        draft.wrong(
            line,
            f"a batch of {batch} × {steps} accumulated holds no whole groups of {size}: TRL "
            "refuses it. It counted prompts once, and counts replies now",
        )
        draft.set("per_device_train_batch_size", now, line, f"replies: {now // size} × {size}")
        batch = now
    problems = batch * steps // size
    if problems < 4 and line is not None:
        few = "1 problem" if problems == 1 else f"{problems} problems"
        draft.wrong(
            line,
            f"a step learns from {few}: its gradient is mostly noise. Published runs take 16 to "
            "256; --gradient_accumulation_steps raises it",
        )


def _number(draft: Draft, name: str, default: int) -> int:
    value = draft.settings[name].value if name in draft.settings else default
    return value if isinstance(value, int) else default


def lora_settings(script: Script, draft: Draft, *, faithful: bool) -> None:
    """Carry over the adapter, or that there is none."""
    lora = script.lora
    if lora is None:
        _no_lora(script, draft)
        return
    if script.is_lora_conditional:
        draft.changed(lora.line, "whether LoRA is used depends on what is known when the script "
                      "runs: it is used here (--no_use_peft trains all weights)")  # fmt: skip
    if not script.is_lora_passed:
        draft.wrong(
            lora.line,
            "the LoRA configuration is given to nothing, so that all weights are trained"
            + ("" if faithful else "; it is used here (--no_use_peft trains all)"),
        )
        if faithful:
            draft.set("use_peft", False, lora.line)
            return
    if lora.name not in ("get_peft_model", "LoraConfig"):  # TRL's get_peft_config, say
        draft.left_out(lora.line, f"what {lora.name}() makes: --lora_r, --lora_alpha … set it here")
        return
    draft.set("use_peft", True, lora.line)
    is_unsloth = lora.name == "get_peft_model"
    for theirs, (ours, default) in _LORA.items():
        value = lora.kwargs.get(theirs, lora.args[0] if theirs == "r" and lora.args else None)
        line = lora.lines.get(theirs, lora.line)
        if is_unsloth and isinstance(value, Made):
            value = None
        if isinstance(value, PLAIN) and value is not None:
            draft.set(ours, value, line)
        elif value is not None:
            draft.left_out(line, f"LoRA's {theirs}: its value is computed when the script runs")
        elif theirs in ("r", "lora_alpha"):
            draft.set(ours, 16 if is_unsloth else default, None, "the library's default")
    _targets(lora, draft)
    if lora.kwargs.get("use_gradient_checkpointing"):
        line = lora.lines.get("use_gradient_checkpointing", lora.line)
        draft.set("gradient_checkpointing", True, line)
    for name, value in lora.kwargs.items():
        if name == REST:
            draft.left_out(lora.lines.get(name, lora.line), "further settings of LoRA, which the "
                           "text does not tell")  # fmt: skip
            continue
        quiet = name in _LORA or name in _LORA_QUIET or value in ("none", None, False, [])
        if not quiet:
            draft.left_out(lora.lines.get(name, lora.line), f"LoRA's {name}: no counterpart")


def _no_lora(script: Script, draft: Draft) -> None:
    draft.set("use_peft", False, None, "the script trains all weights")
    if script.is_lora_passed:
        draft.left_out(script.trainer.lines.get("peft_config", script.trainer.line), "whether LoRA "
                       "is used cannot be told from the text: --use_peft uses it")  # fmt: skip
        return
    for node in ast.walk(script.file.tree):
        func = node.func if isinstance(node, ast.Call) else None
        name = getattr(func, "id", getattr(func, "attr", ""))
        if name in ("LoraConfig", "get_peft_model") and isinstance(node, ast.Call):
            draft.left_out(node.lineno, f"{name}: the script does not come by here, as far as it "
                           "shows; --use_peft uses LoRA")  # fmt: skip
            return


def _targets(lora: Made, draft: Draft) -> None:
    targets = lora.kwargs.get("target_modules")
    line = lora.lines.get("target_modules", lora.line)
    if isinstance(targets, str):
        targets = [targets]
    if isinstance(targets, list) and targets and all(isinstance(one, str) for one in targets):
        if targets != ["all-linear"] and any(re.search(r"[^\w.\-]", one) for one in targets):
            draft.left_out(line, "LoRA's target_modules is a pattern: all linear layers get one")
        else:
            draft.set("lora_target_modules", targets, line)
    elif targets is not None and targets != []:
        draft.left_out(line, "LoRA's target_modules is computed: all linear layers get one")
    elif lora.name != "get_peft_model":
        draft.wrong(
            lora.line,
            "LoRA without target_modules is put on two of the seven linear layers; here on all",
        )


def model_settings(script: Script, draft: Draft, *, model: str | None) -> None:
    """The model by its name, and how the script loads it."""
    loader = script.loader
    if loader is not None:
        _loader_settings(loader.kwargs, loader.lines, loader.line, draft)
    if model is not None:
        draft.set("model_name_or_path", model, None, "as you said")
        return
    name = script.model
    if not isinstance(name, str) or not name:
        return
    upstream = upstream_name(name)
    draft.set("model_name_or_path", upstream, script.model_line)
    if upstream != name:
        draft.changed(script.model_line, f"{name} is {upstream}, whose weights it holds")


def _loader_settings(given: dict[str, Any], lines: dict[str, int], at: int, draft: Draft) -> None:
    for name, value in given.items():
        line = lines.get(name, at)
        if name in _LOADER_QUIET or value is None or value is False:
            continue
        if name in ("torch_dtype", "dtype"):
            kind = value.last if isinstance(value, Symbol) else str(value)
            if kind in ("float32", "float"):
                draft.set("dtype", "float32", line)
            else:
                draft.left_out(line, f"{name}: --dtype auto chooses for the machine that trains")
        elif name == "attn_implementation":
            draft.left_out(line, f"{name}: the fastest that is installed is taken")
        elif name == "revision" and isinstance(value, str):
            draft.set("model_revision", value, line)
        elif name in ("token", "use_auth_token"):
            draft.left_out(line, f"{name}: set HF_TOKEN, or run `hf auth login`")
        elif name in ("load_in_4bit", "load_in_8bit", "quantization_config"):
            draft.left_out(line, f"{name}: {_FEW_BITS}")
        elif name in ("fast_inference", "gpu_memory_utilization"):
            draft.left_out(line, f"{name}: {_VLLM}")
        elif name == "trust_remote_code":
            draft.wrong(line, "trust_remote_code runs whatever code comes with the model; "
                        "none of the usual ones needs it, and it is left out")  # fmt: skip
        else:
            draft.left_out(line, f"{name}: no counterpart")


_FEW_BITS = (
    "a 1.5B base in bfloat16 takes 3 GB; --load_in_4bit holds one that is too large for the card"
)
_MIRRORS = {  # Unsloth's copies by the beginning of their name: whose they are, and how they begin
    "llama-3-": ("meta-llama", "Meta-Llama-3-"),
    "llama-": ("meta-llama", "Llama-"),
    "meta-llama-": ("meta-llama", "Llama-"),
    "qwen": ("Qwen", "Qwen"),
    "gemma-": ("google", "gemma-"),
    "smollm": ("HuggingFaceTB", "SmolLM"),
    "phi-": ("microsoft", "Phi-"),
    "mistral-": ("mistralai", "Mistral-"),
    "deepseek-": ("deepseek-ai", "DeepSeek-"),
}


def upstream_name(name: str) -> str:
    """The model that a copy of Unsloth's, quantised or not, was made from.

    >>> upstream_name("unsloth/Llama-3.2-1B-Instruct-bnb-4bit")
    'meta-llama/Llama-3.2-1B-Instruct'
    >>> upstream_name("unsloth/Qwen2.5-1.5B"), upstream_name("mine/Qwen2.5-1.5B")
    ('Qwen/Qwen2.5-1.5B', 'mine/Qwen2.5-1.5B')
    """
    owner, slash, model = name.partition("/")
    model = re.sub(r"(-unsloth)?-bnb-4bit$", "", model)
    if owner.lower() == "meta-llama" and model.lower().startswith("meta-llama-3.1"):
        return f"meta-llama/Llama-{model[len('meta-llama-') :]}"
    if owner != "unsloth" or not slash:
        return name
    for begins, (whose, proper) in _MIRRORS.items():
        if model.lower().startswith(begins):
            return f"{whose}/{proper}{model[len(begins) :]}"
    return f"unsloth/{model}"


def secrets_in(tree: ast.AST) -> list[int]:
    """Lines in which a token or key stands in a text of the script."""
    token = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|[0-9a-f]{40}")
    # Forty hex digits are W&B's key, and also the revision of a model.
    revisions = {
        id(word.value) for word in ast.walk(tree)
        if isinstance(word, ast.keyword) and word.arg and "revision" in word.arg
    }  # fmt: skip
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and len(node.value) < 200
        and id(node) not in revisions
        and token.fullmatch(node.value)
    ]
