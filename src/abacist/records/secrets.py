"""Removes tokens and keys from whatever is shown or written.

They come in through the environment, files that other tools keep, and now and then a URL; they
get out in the messages of libraries, which quote what they were given.
"""

from __future__ import annotations

import functools
import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
)
REDACTED = "<redacted>"

# "max_new_tokens" and "tokenizer_name" are no secrets.
_SECRET_NAME = re.compile(r"token(?!s|iz)|key|secret|passw|credential", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would blot out ordinary words
_HF_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_SHAPED_LIKE_ONE = re.compile(
    r"\b(sk-|gh[a-z]_|github_pat_|wandb_v\d_)[\w-]{16,}|(?<=://)[^/@\s]{1,200}(?=@)"
)


def without_secrets(text: str) -> str:
    """``text`` without tokens: those this machine knows, and whatever is shaped like one.

    >>> without_secrets("401 for hf_abcdefghij at https://me:word@host/x")
    '401 for hf_… at https://<redacted>@host/x'
    """
    for variable in SECRET_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, f"<{variable}>")
    home = os.environ.get("HOME", ""), os.environ.get("NETRC", ""), os.environ.get("HF_HOME", "")
    for secret in _kept_in_files(*home):
        text = text.replace(secret, REDACTED)
    return _SHAPED_LIKE_ONE.sub(REDACTED, _HF_TOKEN.sub("hf_…", text))


def names_a_secret(name: str) -> bool:
    """Whether a flag or key of this name may hold a secret. A count of tokens does not.

    >>> names_a_secret("--hub_token"), names_a_secret("max_new_tokens")
    (True, False)
    """
    return bool(_SECRET_NAME.search(name))


def scrubbed(value: Any) -> Any:
    """Nested settings without tokens, for a tracker or a page: a copy, with tuples as lists.

    Texts lose what :func:`without_secrets` removes; a text under a name that :func:`names_a_secret`
    is removed whole, however deep it stands there. Numbers stay.

    >>> scrubbed({"seed": 3, "hub_token": "xyz", "urls": ("https://me:word@host/x",)})
    {'seed': 3, 'hub_token': '<redacted>', 'urls': ['https://<redacted>@host/x']}
    """
    return _scrubbed(value, is_secret=False)


def _scrubbed(value: Any, *, is_secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _scrubbed(item, is_secret=is_secret or names_a_secret(str(key)))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_scrubbed(item, is_secret=is_secret) for item in value]
    if isinstance(value, str):
        return REDACTED if is_secret else without_secrets(value)
    return value


@functools.lru_cache(maxsize=4)
def _kept_in_files(home: str, netrc_path: str, hf_home: str) -> tuple[str, ...]:
    """The tokens that `wandb login` and `hf auth login` have left on this machine."""
    found = []
    try:
        logins = netrc.netrc(netrc_path or str(Path(home) / ".netrc")).hosts.values()
        found += [password for _, _, password in logins if password]
    except (OSError, netrc.NetrcParseError, ValueError):
        pass
    try:
        folder = Path(hf_home) if hf_home else Path(home) / ".cache" / "huggingface"
        found.append((folder / "token").read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        pass
    return tuple(secret for secret in found if len(secret) >= _SHORTEST)
