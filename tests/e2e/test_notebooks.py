"""The notebooks run start to end in a real kernel, as a reader would run them, on fewer steps."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = re.compile(r"^STEPS = \d+", re.MULTILINE)
SMALLER = (
    "num_heldout_problems=8, num_consistency_problems=2, num_train_problems=40, "
    'eval_strategy="no", max_completion_length=48, '
)


def smaller(source: str) -> str:
    """A cell whose trainings take seconds."""
    source = STEPS.sub("STEPS = 1", source)
    return re.sub(r"max_steps=", f"{SMALLER}max_steps=", source)


def run_notebook(path: Path, folder: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = smaller(cell.source)
    environ = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "JPY_PARENT_PID": ""}
    before = {name: os.environ.get(name) for name in environ}
    os.environ.update(environ)
    try:
        client = nbclient.NotebookClient(
            notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        return client.execute()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def pages(notebook: Any) -> list[str]:
    """The HTML of every output."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return [out["data"]["text/html"] for out in outputs if "text/html" in out.get("data", {})]


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["first-run.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_valid_and_without_outputs(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_start_to_end(path: Path, tmp_path: Path) -> None:
    ran = run_notebook(path, tmp_path)
    if keep := os.environ.get("ABACIST_KEEP_NOTEBOOK"):  # to be looked at
        nbformat.write(ran, keep)
    shown = "\n".join(pages(ran))
    assert "correct on 8 problems it never saw" in shown  # the verdict
    assert "step 1/1" in shown  # the training, followed in its cell
    assert "Sound" in shown and "<script" not in shown
    images = [out for cell in ran.cells for out in cell.get("outputs", [])
              if "image/png" in out.get("data", {})]  # fmt: skip
    assert len(images) == 1
    assert (tmp_path / "runs" / "first" / "manifest.json").exists()
