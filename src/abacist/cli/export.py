"""``abacist export RUN --to KIND``: what a run learned, in another form, proven to be the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abacist.cli import console
from abacist.cli.flags import Parser, positive
from abacist.errors import UsageError

if TYPE_CHECKING:
    from abacist.delivery.export import Exported

KINDS = ("adapter", "merged", "gguf", "ollama")
NUMBERS = ("auto", "float32", "bfloat16", "float16", "q8_0")


def run(argv: list[str]) -> int:
    """Run the verb; an export that is not the trained policy is a failure, and nothing is kept."""
    options = vars(_parser().read(argv))
    as_json = options.pop("json")
    name, private = options.pop("push_to_hub"), options.pop("private")
    rollouts = options.pop("push_rollouts")
    if name is None and (private or rollouts):
        raise UsageError(
            "--private and --push_rollouts belong to --push_to_hub",
            "Name the repository: --push_to_hub you/Model-name.",
        )
    with console.stdout_for(result_only=as_json) as stdout:
        from abacist.delivery.export import ExportRequest, export
        from abacist.delivery.push import Push
        from abacist.view.live import Live

        push = None if name is None else Push(name, private, rollouts)
        with Live() as watcher:
            found = export(ExportRequest(**options, push=push), watcher)
        if as_json:
            console.print_json(_document(found), stdout)
        else:
            print("\n" + text_of(found), file=stdout)
    return 0


def text_of(found: Exported) -> str:
    """What was exported and proven, and the commands that take it further."""
    from abacist.delivery.card import proof_sentence

    lines = [f"{found.path}: {found.kind}, {found.dtype}, {found.size_bytes / 1e6:,.1f} MB."]
    lines += ["It is the trained policy.", *map(proof_sentence, found.proofs), *found.notes]
    lines += [f"Pushed to {address}" for address in found.addresses]
    lines += ["Take it further:", *(f"  {command.line}" for command in _commands(found))]
    return "\n\n".join(lines)


def _commands(found: Exported) -> list[Any]:
    from abacist.delivery.commands import commands_for

    by_llamacpp = any("llama.cpp" in proof.reader for proof in found.proofs)
    return commands_for(found.kind, str(found.path), by_llamacpp=by_llamacpp)


def _document(found: Exported) -> dict[str, Any]:
    return {
        "path": found.path,
        "kind": found.kind,
        "dtype": found.dtype,
        "size_bytes": found.size_bytes,
        "proofs": [proof.to_json() for proof in found.proofs],
        "notes": found.notes,
        "addresses": found.addresses,
        "commands": [
            {"what": one.what, "command": one.text, "tried": one.tried} for one in _commands(found)
        ],
    }


def _parser() -> Parser:
    parser = Parser(
        "export",
        "Writes the trained policy of a run in another form, loads it again, and compares it with "
        "the run on held-out problems, token by token. What is not the same policy is not kept.",
        "examples:\n  abacist export runs/tiny-001 --to merged\n"
        "  abacist export runs/qwen2.5-1.5b-001 --to gguf --dtype q8_0\n"
        "  abacist export runs/qwen2.5-1.5b-001/checkpoint-100 --to ollama -o ~/models/mine",
    )
    parser.add_argument("run", metavar="RUN", help="a run, or one of its checkpoints")
    parser.add_argument("--to", choices=KINDS, required=True, help="a PEFT adapter, a model folder "
                        "of its own, a GGUF file, or that with a Modelfile")  # fmt: skip
    add = parser.add_argument_group("result").add_argument
    add(
        "-o",
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="the folder of the export (RUN/exports/KIND)",
    )
    add("--overwrite", action="store_true", help="replace an export that is there already")
    add("--dtype", choices=NUMBERS, default="auto", help="the numbers: auto is the base model's; "
        "q8_0 for gguf and ollama")  # fmt: skip
    add("--base_model", metavar="NAME", help="what the base is called on the Hub, where the run "
        "knows a folder only")  # fmt: skip
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    add = parser.add_argument_group("proof").add_argument
    add("--num_problems", type=positive, default=200, metavar="N", help="held-out problems to "
        "compare on (200)")  # fmt: skip
    add("--dataset_name", metavar="DATA", help="take them from here (the run's own)")
    add("--batch_size", type=positive, default=64, metavar="N", help="replies in work at a time "
        "(64)")  # fmt: skip
    add("--llamacpp_python", metavar="PYTHON", help="a Python that has llama-cpp-python, to read "
        "the GGUF file through llama.cpp itself (this one, if it has)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model: "
        "never by default")  # fmt: skip
    add = parser.add_argument_group("Hub").add_argument
    add("--push_to_hub", metavar="NAME", help="upload it as OWNER/NAME, once it is proven")
    add("--private", action="store_true", help="for nobody else to see")
    add("--push_rollouts", action="store_true", help="upload the run's replies as a data set too, "
        "NAME-rollouts")  # fmt: skip
    return parser
