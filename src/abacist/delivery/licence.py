"""Whose model a run began with: its name for the public, its licence, and what that asks of names.

What is known for certain is read: the licence in the model card beside the base's files. Else the
name says it, and for Llama 3 the tokenizer does, whatever the folder is called.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from abacist.delivery.prompt_record import is_local
from abacist.errors import UsageError
from abacist.policy.source import BUILT_IN, Source

# The beginning of a base's name, lower-case, without its owner: the licence's name on the Hub.
_BY_NAME = (
    (r"(meta-)?llama-3\.3", "llama3.3"),
    (r"(meta-)?llama-3\.2", "llama3.2"),
    (r"(meta-)?llama-3\.1", "llama3.1"),
    (r"(meta-)?llama-3", "llama3"),
    (r"qwen2\.5-(coder-)?3b", "qwen-research"),
    (r"qwen2\.5-72b", "qwen"),
    (r"qwen(2\.5|3)", "apache-2.0"),
    (r"smollm", "apache-2.0"),
)
_LLAMA = {"llama3": "3", "llama3.1": "3.1", "llama3.2": "3.2", "llama3.3": "3.3"}
_NOTICE = (
    "{family} is licensed under the {family} Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved.\n"
)
_ON_THE_HUB = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0
    epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0
    gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    open-mdw openrail openrail++ osl-3.0 pddl postgresql unlicense unknown wtfpl zlib
    """.split()  # noqa: SIM905
)
"""The licences that a model card may name; another one is ``other``, with a name of its own."""
_CARDS_LONGEST = 1_000_000


@dataclass(frozen=True)
class Licence:
    """``public_base`` is the base's name for others, None if only a folder here is known;
    ``name`` the licence as the Hub calls it, or by its own name where the Hub knows none, None if
    unknown; ``why`` how it is known; ``link`` where its text is, if that is stated."""

    public_base: str | None
    name: str | None
    why: str
    link: str | None = None

    @classmethod
    def of(cls, base: Source, public_name: str | None, tokenizer: Any) -> Licence:
        """The licence of ``base``; ``public_name`` is what the user says it is called."""
        if base.name == BUILT_IN and public_name is None:
            return cls(BUILT_IN, "apache-2.0", "it comes with Abacist")
        public = public_name or (None if is_local(base.name) else base.name)
        stated = _stated(base.folder)
        if stated is not None:
            name, link = stated
            return cls(public, name, "its model card says so", link)
        short = (public or base.folder.name).rpartition("/")[2].lower()
        for pattern, licence in _BY_NAME:
            if re.match(pattern, short):
                return cls(public, licence, f"by its name, {short}")
        if _is_llama_3(tokenizer):
            return cls(public, "llama3.2", "its tokenizer is Llama 3's")
        return cls(public, None, "nothing here says")

    def front_matter(self) -> dict[str, str]:
        """What the head of a card on the Hub says of the licence; nothing where it is unknown."""
        if self.name is None:
            return {}
        if self.name in _ON_THE_HUB:
            return {"license": self.name}
        found = {"license": "other", "license_name": self.name}
        link = self.link or "LICENSE"
        if "://" in link:
            found["license_link"] = link
        elif self.public_base not in (None, BUILT_IN):  # a file beside the base
            found["license_link"] = f"https://huggingface.co/{self.public_base}/blob/main/{link}"
        return found

    @property
    def llama_version(self) -> str | None:
        """The version whose licence is Meta's, if it is."""
        return _LLAMA.get(self.name or "")

    def title(self, run_id: str) -> str:
        """A name for what was trained, that the licence allows."""
        return run_id if self._allows(run_id) else f"{self._first_words}-{run_id}"

    @property
    def _first_words(self) -> str:
        """What a name has to begin with: that of Llama 3.0 asks for its number too."""
        return "Llama-3" if self.llama_version == "3" else "Llama"

    def _allows(self, name: str) -> bool:
        begins = name.replace(" ", "-")
        return self.llama_version is None or begins.startswith(self._first_words)

    @property
    def _family(self) -> str:
        """What Meta's licence calls the models: "Meta Llama 3" is the first of its line."""
        return "Meta Llama 3" if self.llama_version == "3" else f"Llama {self.llama_version}"

    def refuse_name(self, repository: str) -> None:
        """Raise UsageError for a repository name that the base's licence forbids."""
        name = repository.rpartition("/")[2]
        if not self._allows(name):
            raise UsageError(
                f"the {self._family} licence asks that the name of a model derived from it begins "
                f"with {self._first_words}, and {repository!r} does not ({self.why})",
                f"Call it {repository.rpartition('/')[0] or 'you'}/{self._first_words}-{name}.",
            )

    def lines(self) -> list[str]:
        """What the licence is and asks, for a model card."""
        if self.llama_version:
            built = "Built with Meta Llama 3" if self.llama_version == "3" else "Built with Llama"
            return [
                f"{built}. {_NOTICE.format(family=self._family).strip()}",
                "",
                f"The base is under the {self._family} Community License: whoever passes this on "
                f"keeps its name beginning with “{self._first_words}”, shows “{built}”, and passes "
                "on the licence and the file NOTICE.",
            ]
        if self.name is None:
            return [
                "The base model's licence is not known here: look it up before passing this on."
            ]
        return [
            f"The base model is under `{self.name}` ({self.why}); what was learned adds nothing."
        ]

    def write_notice(self, folder: Path) -> None:
        """Put the notice into ``folder`` that Llama's licence wants in every copy."""
        if self.llama_version:
            text = _NOTICE.format(family=self._family)
            (folder / "NOTICE").write_text(text, encoding="utf-8")


def _stated(folder: Path) -> tuple[str, str | None] | None:
    """The licence that the model card in ``folder`` states, if there is one, and its link."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        head = text[:_CARDS_LONGEST].split("---")
        found = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except (OSError, yaml.YAMLError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    licence = found.get("license_name") if found.get("license") == "other" else found.get("license")
    if not isinstance(licence, str) or not licence.isprintable():
        return None
    link = found.get("license_link")
    return licence.lower(), link if isinstance(link, str) and link.isprintable() else None


def _is_llama_3(tokenizer: Any) -> bool:
    texts = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {"<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"} <= texts
