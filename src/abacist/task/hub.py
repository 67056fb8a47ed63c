"""Errors of the Hub as a message and a hint: why a model or data set was not found.

Four things look alike in a traceback and need different answers: the user asked to stay offline,
there is no way to the Hub, the Hub knows no such thing (or not for this account), and the Hub
itself failed.
"""

from __future__ import annotations

import os

from abacist.errors import first_line

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_DATASETS_VARIABLE = "HF_DATASETS_OFFLINE"
_LOGIN = "run 'hf auth login' (or set HF_TOKEN)"


def fault(error: Exception, name: str, kind: str, revision: str | None = None) -> tuple[str, str]:
    """Message and hint for ``error``, met when ``name`` was asked of the Hub and is not cached.

    ``kind`` is "model" or "data set".
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too: ask for it first
        return (
            f"'{name}' is gated: its owners want their licence accepted first.",
            f"Accept it on {page}, then {_LOGIN}.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no folder '{name}' here, and on the Hub no such {kind} for you.",
            f"Check the spelling on {page}; if it is private, {_LOGIN}.",
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"'{name}' has no revision '{revision}'.",
            f"See {page}/tree/main for its branches and tags.",
        )
    if isinstance(error, HFValidationError):
        return (
            f"There is no folder '{name}' here, and it cannot be a Hub id either.",
            "Hub ids look like Qwen/Qwen2.5-1.5B-Instruct.",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return offline(name, kind)
    if isinstance(error, HfHubHTTPError):
        return (
            f"'{name}' is not in the local cache, and the Hub ({constants.ENDPOINT}) would not "
            f"send it: {first_line(error)}",
            f"Try again later, or look at {page}.",
        )
    return (
        f"'{name}' is not in the local cache, and the Hub ({constants.ENDPOINT}) cannot be "
        f"reached: {first_line(error)}",
        "Check the network and the proxy (HTTPS_PROXY). Without a network, copy it to this "
        "machine and name its folder.",
    )


def offline(name: str, kind: str) -> tuple[str, str]:
    """Message and hint where the user asked to stay offline and ``name`` is not cached."""
    variables = _OFFLINE_VARIABLES + ((_DATASETS_VARIABLE,) if kind == "data set" else ())
    set_ones = [variable for variable in variables if os.environ.get(variable)]
    named = " and ".join(set_ones) or _OFFLINE_VARIABLES[0]
    return (
        f"'{name}' is not in the local cache, and offline mode ({named}) forbids fetching it.",
        f"Unset {named} to download it, or name a folder on this machine.",
    )
