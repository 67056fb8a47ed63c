"""Tokens stay where they are, strangers' code stays unrun, and no network is no obstacle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from abacist.cli.main import main
from abacist.records.secrets import without_secrets
from faults import fault

pytestmark = pytest.mark.e2e

SHORT = ["--max_steps", "2", "--num_heldout_problems", "2", "--num_selection_problems", "0",
         "--num_train_problems", "16", "--per_device_train_batch_size", "8",
         "--num_generations", "4", "--save_steps", "1",
         "--max_completion_length", "16"]  # fmt: skip
Captured = pytest.CaptureFixture[str]

HF_TOKEN = "hf_PlantedPlantedPlantedPlantedPlan"
WANDB_KEY = "0123456789planted0123456789planted012345"
NETRC_KEY = "netrcplantedcafecafecafecafecafecafecafe"
STORED_TOKEN = "hf_StoredStoredStoredStoredStored"
SECRETS = (HF_TOKEN, WANDB_KEY, NETRC_KEY, STORED_TOKEN)


def planted(home: Path, **more: str) -> dict[str, str]:
    """An environment that holds every kind of token, with a home of its own."""
    (home / ".netrc").write_text(
        f"machine api.wandb.ai login user password {NETRC_KEY}\n", encoding="utf-8"
    )
    (home / ".netrc").chmod(0o600)
    (home / "hf").mkdir()
    (home / "hf" / "token").write_text(STORED_TOKEN, encoding="utf-8")
    ours = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    return ours | {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": HF_TOKEN,
        "WANDB_API_KEY": WANDB_KEY,
        "WANDB_MODE": "offline",
        "TMPDIR": str(home),
        "PYTHONPATH": os.pathsep.join(sys.path),
    } | more  # fmt: skip


# Several commands in one process: most of the time of one goes into importing torch.
DRIVER = """
import json, os, sys
from abacist.cli.main import main
from abacist.policy.kernels import build
if "XDG_CACHE_HOME" not in os.environ:  # kernels of this test alone: to optimize takes longer
    build.FLAGS = ("-O1", *build.FLAGS[1:])
for words in json.loads(sys.argv[1]):
    code = main(words)
    print(f"exit code {code}", flush=True)
"""


def abacist(
    *commands: list[str], env: dict[str, str], cwd: Path, before: tuple[str, ...] = ()
) -> tuple[str, str]:
    """What the commands wrote to stdout and stderr, in a process of their own."""
    done = subprocess.run(
        [*before, sys.executable, "-c", DRIVER, json.dumps(commands)],
        env=env, cwd=cwd, stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=600,
    encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def holders(folder: Path) -> list[str]:
    """The files below a folder that hold a planted token, but for those it was planted in."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".netrc", "token"):
            held = path.read_bytes()
            if path.suffix == ".parquet":  # compressed
                held = repr(pq.read_table(path).to_pylist()).encode()
            found += [str(path) for secret in SECRETS if secret.encode() in held]
    return found


TELLTALE = """
import os
def telltale(completions, **columns):
    keys = [os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]]
    keys += open(os.path.expanduser("~/.netrc")).read().split()
    keys.append(open(os.path.join(os.environ["HF_HOME"], "token")).read())
    raise ValueError(f"the server did not like {keys}")
"""


@fault("secrets", "tokens in the environment, ~/.netrc and the Hub's token file",
       "nothing of them, in any file of the run, in W&B's files or on the screen", 0)  # fmt: skip
@fault("secrets", "an error whose message quotes tokens",
       "the message, with the tokens blotted out")  # fmt: skip
def test_no_token_is_written_or_shown_by_a_run_that_succeeds_or_by_one_that_fails(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(TELLTALE, encoding="utf-8")
    good = ["train", "--output_dir", "good", "--report_to", "wandb", *SHORT]
    bad = ["train", "--output_dir", "bad", "--reward_funcs", "default", "mine.py:telltale", *SHORT]
    out, err = abacist(good, bad, env=planted(tmp_path), cwd=tmp_path)
    assert "exit code 0" in out and "exit code 1" in out
    assert list((tmp_path / "wandb").rglob("*.wandb"))  # W&B did write
    assert "the server did not like" in err
    assert not any(secret in out + err for secret in SECRETS)
    assert holders(tmp_path) == []


@fault("secrets", "a token on the command line (--hub_token)",
       "that tokens stay off command lines, and where they belong", 2)  # fmt: skip
def test_a_token_on_the_command_line_is_refused_and_not_repeated(
    tmp_path: Path, capsys: Captured
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(f"hub_token: {HF_TOKEN}\n", encoding="utf-8")
    for words in (
        ["--hub_token", HF_TOKEN],
        [f"--hub_token={WANDB_KEY}"],
        ["--config", str(config)],
    ):
        assert main(["train", *words]) == 2
        out, err = capsys.readouterr()
        assert "HF_TOKEN" in err and not any(secret in out + err for secret in SECRETS)


def test_credentials_in_a_url_are_shown_nowhere(tmp_path: Path, capsys: Captured) -> None:
    url = "https://me:verysecretword@example.org/data.jsonl"
    assert main(["train", "--dataset_name", url, "--output_dir", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert "example.org" in err and "verysecretword" not in out + err
    assert not (tmp_path / "run").exists()


def test_ordinary_words_are_not_taken_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    text = "commit 0123456789abcdef0123456789abcdef01234567 at https://host/path?x=1, hf_hub 1.2"
    assert without_secrets(text) == text


# Strangers' code


@pytest.fixture
def model_with_code(lookalike: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model that brings code of its own, which leaves a trace when it runs."""
    folder = tmp_path / "stranger"
    shutil.copytree(lookalike("qwen2.5-instruct"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": "code.StrangerConfig",
        "AutoModelForCausalLM": "code.StrangerForCausalLM",
    }
    config["model_type"] = "stranger"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class StrangerConfig(Qwen2Config):\n    model_type = 'stranger'\n"
        "class StrangerForCausalLM(Qwen2ForCausalLM):\n    config_class = StrangerConfig\n",
        encoding="utf-8",
    )
    return folder


@fault(
    "strangers", "a model that brings code of its own", "that it is not run, and the flag for it"
)
def test_code_of_a_model_is_run_only_when_asked_for_and_that_is_recorded(
    model_with_code: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    run = tmp_path / "run"
    flags = ["train", "--model_name_or_path", str(model_with_code), "--output_dir", str(run)]
    flags += ["--dataset_name", "generated", *SHORT, "--gradient_accumulation_steps", "1"]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "--trust_remote_code" in error and "Traceback" not in error
    assert not (tmp_path / "ran").exists() and not run.exists()

    assert main([*flags, "--trust_remote_code", "--max_steps", "1"]) == 0
    assert (tmp_path / "ran").exists()
    assert "warning: --trust_remote_code" in capsys.readouterr().out
    assert (
        json.loads((run / "manifest.json").read_text(encoding="utf-8"))["trust_remote_code"] is True
    )


# No network


def without_network() -> tuple[str, ...]:
    """The words before a command that take its network away; skips where that cannot be had."""
    words = ("unshare", "--map-root-user", "--net")
    if not shutil.which("unshare") or subprocess.run([*words, "true"], check=False).returncode:
        pytest.skip("this system does not let a user make a network namespace (unshare -rn)")
    return words


@fault("network", "no network at all, without any offline setting",
       "nothing: training, its verdict, ask and eval do not need one", 0)  # fmt: skip
def test_training_asking_and_measuring_need_no_network(tmp_path: Path) -> None:
    before = without_network()
    # Nor is there anything in a cache: the kernels are compiled here.
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE", "XDG_CACHE_HOME")
    env = {key: value for key, value in os.environ.items() if key not in offline}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    commands = [
        ["train", "--output_dir", "run", *SHORT],
        ["ask", "run", "How much is 1 + 1?"],
        ["eval", "run", "--num_problems", "2", "--output_dir", "measured"],
        ["train", "--dataset_name", "openai/gsm8k"],
    ]
    out, err = abacist(*commands, env=env, cwd=tmp_path, before=before)
    codes = [line for line in out.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0"] * 3 + ["exit code 1"], err
    assert err.count("error:") == 1 and "answer" in out
    assert "cannot be reached" in err and "--dataset_name generated" in err


# A tracker that is down


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        pytest.param("init", "no route to host", id="at the start",
                     marks=fault("trackers", "W&B cannot be reached at the start",
                                 "one warning; the run completes", 0)),
        pytest.param("log", "connection reset", id="in the middle",
                     marks=fault("trackers", "W&B goes away in the middle",
                                 "one warning; the run completes", 0)),
    ],
)  # fmt: skip
def test_a_tracker_that_is_down_costs_one_warning_and_not_the_run(
    moment: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    wandb = pytest.importorskip("wandb")

    def down(*args: object, **kwargs: object) -> None:
        raise ConnectionError(f"{said} (key {WANDB_KEY})")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    if wandb.run is not None:  # another test's
        wandb.finish()
    if moment == "init":
        monkeypatch.setattr(wandb, "init", down)
    else:
        monkeypatch.setattr("transformers.integrations.WandbCallback.on_log", down)
    run = tmp_path / "run"
    assert main(["train", "--output_dir", str(run), "--report_to", "wandb", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out.count("is left out from here on") == 1 and said in out
    assert WANDB_KEY not in out + err
    assert (run / "adapter_model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) >= 2
