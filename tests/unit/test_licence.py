"""Whose model it was: read where it is stated, else known by name or tokenizer, else unknown."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from abacist.delivery.licence import Licence
from abacist.errors import UsageError
from abacist.policy.source import Source

Lookalike = Callable[[str], Path]


def of(lookalike: Lookalike, kind: str, name: str, public: str | None = None) -> Licence:
    folder = lookalike(kind)
    return Licence.of(
        Source(name, folder, name, is_adapter=False), public, AutoTokenizer.from_pretrained(folder)
    )


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-Coder-3B", "qwen-research"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("someone/Their-own-1B", None),
    ],
)
def test_a_base_is_known_by_its_name(name: str, licence: str | None, lookalike: Lookalike) -> None:
    assert of(lookalike, "qwen2.5-instruct", name).name == licence


def test_a_llama_is_known_by_its_tokenizer_whatever_its_folder_is_called(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    found = {}
    for kind in ("llama-3.2-instruct", "qwen2.5-instruct"):
        folder = tmp_path / kind[0]
        shutil.copytree(lookalike(kind), folder)
        source = Source(str(folder), folder, str(folder), is_adapter=False)
        found[kind[0]] = Licence.of(source, None, AutoTokenizer.from_pretrained(folder))
    assert found["l"].llama_version == "3.2" and found["l"].public_base is None
    assert found["q"].name is None


def test_what_the_bases_own_card_states_counts_first(lookalike: Lookalike, tmp_path: Path) -> None:
    folder = tmp_path / "Llama-3.2-like"
    shutil.copytree(lookalike("llama-3.2-instruct"), folder)
    (folder / "README.md").write_text("---\nlicense: MIT\n---\n# Mine\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = Source(str(folder), folder, str(folder), is_adapter=False)
    assert Licence.of(source, None, tokenizer).name == "mit"
    for damaged in ("---\nlicense: [\n---\n", "no front matter --- at all", "---\n- a\n---\n"):
        (folder / "README.md").write_text(damaged, encoding="utf-8")
        assert Licence.of(source, None, tokenizer).name == "llama3.2"


@pytest.mark.parametrize("name", ["me/Maths-1B", "me/llama-maths", "Maths-Llama"])
def test_a_llamas_child_is_called_llama_or_refused(name: str, lookalike: Lookalike) -> None:
    found = of(lookalike, "llama-3.2-instruct", "/models/maths")
    with pytest.raises(UsageError, match=r"Llama 3\.2 licence"):
        found.refuse_name(name)
    found.refuse_name("me/Llama-Maths-1B")
    of(lookalike, "qwen2.5-instruct", "Qwen/Qwen2.5-1.5B").refuse_name(name)


def test_a_llamas_card_and_copy_carry_the_notice(lookalike: Lookalike, tmp_path: Path) -> None:
    found = of(lookalike, "llama-3.2-instruct", "/models/maths")
    found.write_notice(tmp_path)
    assert "Llama 3.2 Community License" in (tmp_path / "NOTICE").read_text("utf-8")
    assert "Built with Llama" in "\n".join(found.lines())
    assert found.title("run-1") == "Llama-run-1" and found.title("Llama-2") == "Llama-2"
    other = tmp_path / "other"
    other.mkdir()
    of(lookalike, "qwen2.5-instruct", "Qwen/Qwen2.5-1.5B").write_notice(other)
    assert not list(other.iterdir())


@pytest.mark.parametrize(
    ("found", "head"),
    [
        (Licence("a/b", "apache-2.0", ""), {"license": "apache-2.0"}),
        (Licence("a/b", "llama3.2", ""), {"license": "llama3.2"}),
        (Licence("a/b", None, ""), {}),
        (
            Licence("Qwen/Qwen2.5-3B", "qwen-research", ""),
            {
                "license": "other",
                "license_name": "qwen-research",
                "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
            },
        ),
        (
            Licence("a/b", "their-own", "", "https://example.org/terms"),
            {
                "license": "other",
                "license_name": "their-own",
                "license_link": "https://example.org/terms",
            },
        ),
        (Licence(None, "qwen", ""), {"license": "other", "license_name": "qwen"}),
    ],
)
def test_a_card_names_a_licence_that_the_hub_knows_or_calls_it_other(
    found: Licence, head: dict[str, str]
) -> None:
    assert found.front_matter() == head


def test_a_licence_of_its_own_keeps_its_name_and_link(lookalike: Lookalike, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(lookalike("qwen2.5-instruct"), folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: Their-Own\nlicense_link: TERMS.md\n---\n", "utf-8"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = Licence.of(Source("a/b", folder, "a/b", is_adapter=False), None, tokenizer)
    assert found.front_matter() == {
        "license": "other",
        "license_name": "their-own",
        "license_link": "https://huggingface.co/a/b/blob/main/TERMS.md",
    }


def test_the_first_llama_3_has_words_of_its_own(tmp_path: Path) -> None:
    found = Licence("meta-llama/Meta-Llama-3-8B", "llama3", "")
    assert "Built with Meta Llama 3." in "\n".join(found.lines())
    with pytest.raises(UsageError, match="begins with Llama-3") as raised:
        found.refuse_name("me/Llama-Maths")
    assert "me/Llama-3-Llama-Maths" in raised.value.hint
    found.refuse_name("me/Llama-3-Maths")
    assert found.title("run") == "Llama-3-run" and found.title("Llama 3 run") == "Llama 3 run"
    found.write_notice(tmp_path)
    assert "Meta Llama 3 is licensed" in (tmp_path / "NOTICE").read_text("utf-8")
