"""What goes to the Hub: a finished folder, under a name that is allowed; tried on a stand-in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from abacist.delivery import push as pushing
from abacist.delivery.licence import Licence
from abacist.delivery.push import Push, push_folder, push_rollouts, refuse_by_licence
from abacist.errors import AbacistError, RunError, UsageError
from abacist.records.rundir import RunDir
from made_runs import made_run

APACHE = Licence("Qwen/Qwen2.5-0.5B", "apache-2.0", "by its name")


class Hub:
    """Keeps what it is told; ``breaks`` names the call that fails, ``public`` the repositories
    that were there before."""

    def __init__(self, breaks: str = "", public: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.breaks = breaks
        self.public = public

    def repo_info(self, name: str, repo_type: str) -> SimpleNamespace:
        return SimpleNamespace(private=name not in self.public)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> str:
            if name == self.breaks:
                raise RuntimeError("503: the Hub is asleep\nand more")
            self.calls.append((name, {**dict(enumerate(args)), **kwargs}))
            return f"hub://{args[0] if args else kwargs.get('repo_id')}"

        return call


def test_an_export_is_uploaded_whole_and_private_if_asked(tmp_path: Path) -> None:
    hub = Hub()
    assert push_folder(Push("me/maths", private=True), tmp_path, hub) == "hub://me/maths"
    (made, how), (uploaded, what) = hub.calls
    assert made == "create_repo" and how["private"] is True and how["repo_type"] == "model"
    assert uploaded == "upload_folder" and what["folder_path"] == str(tmp_path)


def test_nothing_private_goes_to_a_repository_that_everybody_sees(tmp_path: Path) -> None:
    hub = Hub(public=("me/maths", "me/maths-rollouts"))
    run = RunDir(made_run(tmp_path / "run"))
    with pytest.raises(UsageError, match="me/maths is on the Hub already"):
        push_folder(Push("me/maths", private=True), tmp_path, hub)
    with pytest.raises(UsageError, match="me/maths-rollouts is on the Hub already"):
        push_rollouts(Push("me/maths", private=True), run, APACHE, hub)
    assert {name for name, _ in hub.calls} == {"create_repo"}
    push_folder(Push("me/maths"), tmp_path, hub)  # nobody asked for a private one
    assert hub.calls[-1][0] == "upload_folder"


def test_rollouts_become_a_data_set_with_a_card(tmp_path: Path) -> None:
    run = RunDir(made_run(tmp_path / "run"))
    hub = Hub()
    assert push_rollouts(Push("me/maths"), run, APACHE, hub) == "hub://me/maths-rollouts"
    names = [name for name, _ in hub.calls]
    assert names == ["create_repo", "upload_file", "upload_folder"]
    card = hub.calls[1][1]["path_or_fileobj"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0" and head["configs"][0]["data_files"].endswith("parquet")
    assert hub.calls[2][1]["allow_patterns"] == ["*.parquet"] and str(tmp_path) not in card


@pytest.mark.parametrize("breaks", ["create_repo", "upload_folder"])
def test_a_hub_that_fails_is_named_and_the_export_is_kept(breaks: str, tmp_path: Path) -> None:
    with pytest.raises(AbacistError, match="503") as raised:
        push_folder(Push("me/maths"), tmp_path, Hub(breaks))
    assert str(tmp_path) in raised.value.hint and "and more" not in raised.value.message


def test_a_run_that_kept_no_rollouts_has_none_to_push(tmp_path: Path) -> None:
    run = RunDir(made_run(tmp_path / "run"))
    for path in run.rollouts_dir.iterdir():
        path.unlink()
    with pytest.raises(RunError, match="no rollouts"):
        push_rollouts(Push("me/maths"), run, APACHE, Hub())


@pytest.mark.parametrize("name", ["a b", "me/you/them", "", "me/-x", "x" * 100])
def test_a_name_that_is_none_is_refused_and_a_good_one_needs_a_token(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_" + "x" * 20)
    with pytest.raises(UsageError, match="name on the Hub"):
        pushing.refuse_unpushable(Push(name))
    pushing.refuse_unpushable(Push("me/maths"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="token"):
        pushing.refuse_unpushable(Push("me/maths"))


@pytest.mark.parametrize("base", [None, "tiny"])
def test_an_adapter_of_a_base_that_nobody_else_has_is_not_pushed(base: str | None) -> None:
    with pytest.raises(UsageError, match="names its base"):
        refuse_by_licence(Push("me/maths"), "adapter", Licence(base, None, ""))
    refuse_by_licence(Push("me/maths"), "merged", Licence(base, None, ""))
    refuse_by_licence(Push("me/maths"), "adapter", APACHE)
