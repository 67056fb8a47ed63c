"""The commands that take an export elsewhere, each with whether we ever ran it.

"tried" means that this export, or the tests of Abacist, ran it; what was not run is said to be so.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

PROBLEM = "Ada has 3 boxes with 4 pens in each box. How many pens are there?"


@dataclass(frozen=True, slots=True)
class Command:
    """What it is for, the command itself, and how far it was tried, in words."""

    what: str
    text: str
    tried: str

    @property
    def line(self) -> str:
        """For a terminal: the command, then what it is and whether it was tried."""
        return f"{self.text}\n      # {self.what}: {self.tried}"


def _in_double_quotes(place: str) -> str:
    """A text of Python that may stand within double quotes of a shell."""
    return re.sub(r'(["$`\\])', r"\\\1", repr(place))


IN_TESTS = "run in Abacist's tests"
NOT_TRIED = "not tried by us"
BY_VLLM = "tried with vLLM 0.31 on a CPU only"


def commands_for(kind: str, place: str, *, by_llamacpp: bool = False) -> list[Command]:
    """The commands for a ``kind`` of export, or "run" for a run's own directory, at ``place``."""
    quoted = shlex.quote(place)
    asked = Command("Abacist", f'abacist ask {quoted} "{PROBLEM}"', IN_TESTS)
    if kind in ("run", "adapter"):
        return [
            asked,
            Command(
                "PEFT",
                'python -c "from peft import AutoPeftModelForCausalLM as A; '
                f'print(A.from_pretrained({_in_double_quotes(place)}))"',
                IN_TESTS,
            ),
            # It names the base, the rank and the template to vLLM.
            Command("vLLM", f"abacist serve {quoted}", BY_VLLM),
        ]
    if kind in ("merged", "full run"):
        by_vllm = BY_VLLM if kind == "merged" else NOT_TRIED
        return [
            asked,
            Command("vLLM", f"vllm serve {quoted}", by_vllm),
            Command("transformers", f"transformers serve {quoted}", NOT_TRIED),
            Command(
                "lm-eval, with our task (docs/neighbours.md writes it)",
                f"lm_eval --model hf --model_args pretrained={quoted} --tasks abacist_gsm8k "
                "--include_path task --apply_chat_template --fewshot_as_multiturn true",
                NOT_TRIED,
            ),
        ]
    file = shlex.quote(f"{place}/model.gguf")
    runtime = "its library was run by this export" if by_llamacpp else NOT_TRIED
    found = [
        Command(
            "transformers' reader",
            'python -c "from transformers import AutoModelForCausalLM as A; '
            f"print(A.from_pretrained({_in_double_quotes(place)}, gguf_file='model.gguf'))\"",
            "its reader was run by this export",
        ),
        Command("llama.cpp", f"llama-server -m {file} --jinja", f"the program {NOT_TRIED}; "
                f"{runtime}" if by_llamacpp else NOT_TRIED),
    ]  # fmt: skip
    if kind == "ollama":
        create = f"ollama create trained -f {shlex.quote(place + '/Modelfile')}"
        found.append(Command("Ollama", f"{create} && ollama run trained", NOT_TRIED))
    return found
