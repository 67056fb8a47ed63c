"""No secret is left in settings that are shown to others, and nothing else is taken from them."""

from __future__ import annotations

import pytest

from abacist.records.secrets import REDACTED, scrubbed

SECRET = "s3cret-and-long"


@pytest.mark.parametrize(
    "settings",
    [
        {"hub_token": SECRET},
        {"manifest": {"argv": [{"API_KEY": SECRET}]}},
        {"trackers": ({"password": [SECRET, SECRET]},)},
        {"credentials": {"user": {"value": SECRET}}},  # however deep beneath the name
        {"url": f"https://me:{SECRET}@host/x"},
        {"prompt": f"the key is {SECRET}"},  # known to this machine
        [SECRET],
    ],
    ids=str,
)
def test_no_secret_is_left_wherever_it_stands(
    settings: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert SECRET not in str(scrubbed(settings))


def test_what_is_no_secret_stays_and_the_settings_given_are_left_as_they_were() -> None:
    given = {"seed": 3, "max_tokens": "5", "pad_token_id": 0, "lr": 1e-3, "names": ("a", None)}
    assert scrubbed(given) == given | {"names": ["a", None]}
    hidden = {"api_key": {"id": "x", "uses": 2}}
    assert scrubbed(hidden) == {"api_key": {"id": REDACTED, "uses": 2}}
    assert hidden == {"api_key": {"id": "x", "uses": 2}}
