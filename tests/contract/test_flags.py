"""The flags that `abacist train --help` shows are TRL's, by TRL's names."""

from __future__ import annotations

import dataclasses

from trl import GRPOConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from abacist.learning.arguments import GRPOConfig as OurConfig
from abacist.learning.arguments import ModelConfig as OurModel
from abacist.learning.arguments import ScriptArguments as OurScript
from abacist.learning.config import full_help
from abacist.learning.helptext import TRAIN_FLAGS, text_of

TRL_FLAGS = {
    f"--{field.name}"
    for arguments in (GRPOConfig, ModelConfig, GRPOScriptArguments)
    for field in dataclasses.fields(arguments)
}


OWN_FIELDS = {
    field.name: field
    for kind in (OurConfig, OurModel, OurScript)
    for field in dataclasses.fields(kind)
}
READ_BY_THE_VERB = {
    "--accelerate_config", "--config", "--dry_run", "--json", "--num_processes", "--resume",
}  # fmt: skip


def test_every_flag_shown_is_trls_or_ours() -> None:
    shown = {flag.name for group in TRAIN_FLAGS for flag in group.flags}
    ours = {f"--{name}" for name in OWN_FIELDS}
    assert shown - TRL_FLAGS <= ours | READ_BY_THE_VERB


def test_every_setting_of_ours_has_one_text_which_both_helps_show() -> None:
    of_trl = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    help_all = " ".join(full_help().split())
    for name, field in OWN_FIELDS.items():
        if field.metadata == of_trl.get(name, dataclasses.field()).metadata:
            continue  # TRL's own
        assert dict(field.metadata) == text_of(name), name
        assert " ".join(text_of(name)["help"].split()) in help_all, name


def test_flags_shown_without_a_value_are_switches() -> None:
    types = {
        f"--{field.name}": field.type
        for arguments in (GRPOConfig, ModelConfig, GRPOScriptArguments)
        for field in dataclasses.fields(arguments)
    }
    for flag in (flag for group in TRAIN_FLAGS for flag in group.flags):
        if flag.name in types:
            assert (types[flag.name] in (bool, "bool")) is (flag.value == ""), flag.name


def test_every_flag_shown_is_taken() -> None:
    taken = set(full_help().replace(",", " ").split())
    shown = {flag.name for group in TRAIN_FLAGS for flag in group.flags}
    assert shown - READ_BY_THE_VERB <= taken
