"""The notebooks run from the first cell to the last, and say what they show."""

import ast
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT


def test_two_towers_take_100_lines_and_each_step_is_worth_what_the_text_says() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "two_towers.ipynb", as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line.strip() for cell in code for line in cell.splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 100
    NotebookClient(notebook, timeout=600).execute()
    shown = ast.literal_eval(notebook.cells[-2].outputs[-1]["data"]["text/plain"])
    steps = [re.findall(r"[\d.]+", text) for text in shown.values()]
    _, table, softmax, logq, history = [(float(new), float(known)) for new, known in steps]
    assert softmax[1] < table[1] < logq[1] < history[1]
    assert history[0] > 0.1 > max(table[0], softmax[0], logq[0])


def test_the_tour_runs_from_a_clean_kernel(project: Path) -> None:
    tour = nbformat.read(project / "notebooks" / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(tour, timeout=600, resources=resources).execute()
