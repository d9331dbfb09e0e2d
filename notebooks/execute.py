"""Execute the notebooks again, in place, and keep their outputs: `make notebooks`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent


def execute(path: Path, folder: Path) -> NotebookNode:
    """Run all cells in a folder; the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata.clear()  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if not _warning(one)]
    return notebook


def _warning(output: NotebookNode) -> bool:
    """Whether it is only words on stderr, as warnings of libraries are."""
    return output.output_type == "stream" and output.name == "stderr" and not re.search(r"Error", output.text)


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        print(path.name, flush=True)
        nbformat.write(execute(path, HERE), path)


if __name__ == "__main__":
    sys.exit(main())
