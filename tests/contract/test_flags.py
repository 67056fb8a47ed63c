"""The flags that `abacist train --help` shows are TRL's, by TRL's names."""

from __future__ import annotations

import dataclasses

from trl import GRPOConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from abacist.cli.flags import OWN_FLAGS, TRAIN_FLAGS
from abacist.learning.config import full_help

TRL_FLAGS = {
    f"--{field.name}"
    for arguments in (GRPOConfig, ModelConfig, GRPOScriptArguments)
    for field in dataclasses.fields(arguments)
}


def test_every_flag_shown_is_trls_or_declared_ours() -> None:
    shown = {flag.name for group in TRAIN_FLAGS for flag in group.flags}
    assert shown - TRL_FLAGS == OWN_FLAGS


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
    read_by_the_verb = {"--config", "--dry_run", "--json", "--resume"}
    shown = {flag.name for group in TRAIN_FLAGS for flag in group.flags}
    assert shown - read_by_the_verb <= taken
