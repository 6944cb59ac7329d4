"""Runs the notebooks and keeps what they show.

    python -m needle.notebooks                                     all of them, in place
    python -m needle.notebooks notebooks=[02_reproduce_a_comparison] parameters.EXPERIMENT=002_span_weighting output=out

Each runs in a kernel of its own, in the repository's root. With `parameters` the executed copy has a cell that tells
them, so that a notebook in the repository always shows what its own cells give.
Cost: a few minutes for all, most of them for the students that 03 asks and 05 trains.
"""

import copy
import importlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from needle import artifacts, config
from needle.errors import ConfigError, DataError

PARAMETERS, INJECTED = "parameters", "injected-parameters"


@config.stage("notebooks")
def main(
    cfg: dict[str, Any],
    *,
    notebooks: list[str] | None,
    folder: Path,
    parameters: dict[str, Any],
    output: Path | None,
    timeout_s: Annotated[int, Field(ge=1)],
) -> None:
    paths = _chosen(folder, notebooks)
    if parameters and output is None:
        raise ConfigError("parameters change what a notebook shows: set output=FOLDER for the executed copies")
    for path in paths:
        with kernel() as its_own:
            executed = execute(read(path), parameters=parameters, timeout_s=timeout_s, name=path.stem, kernel=its_own)
        named = foreign_paths(executed)
        if output is None and named:
            raise DataError(f"{path}: an output names {named[0]}, a folder of this machine alone; nothing was saved")
        target = (output or folder) / path.name
        artifacts.write_text_atomic(target, text_of(executed))
        print(f"executed: {target}", flush=True)


def _chosen(folder: Path, names: list[str] | None) -> list[Path]:
    there = {path.stem: path for path in sorted(Path(folder).glob("*.ipynb"))}
    unknown = [name for name in names or () if name not in there]
    if unknown or not there:
        raise ConfigError(f"notebooks={names}: {folder} holds {', '.join(there) or 'no notebook'}")
    return [there[name] for name in names] if names else list(there.values())


def read(path: Path) -> Any:
    """A notebook in the current format. Raises DataError where it is none."""
    nbformat = _library("nbformat")
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read notebook {path}: {error}") from error


@contextmanager
def kernel() -> Iterator[Any]:
    """A kernel for one notebook, or for several one after the other, each of which begins without names: libraries are
    loaded once. It listens on sockets of the file system and on no port."""
    logging.getLogger("traitlets").setLevel(logging.WARNING)  # which kernel runs is no news here
    manager = _library("jupyter_client").AsyncKernelManager(kernel_name="python3", transport="ipc")
    try:
        yield manager
    finally:
        if manager.has_kernel:
            _library("jupyter_core.utils").run_sync(manager.shutdown_kernel)(now=True)


def execute(notebook: Any, *, parameters: Mapping[str, Any], timeout_s: int, name: str, kernel: Any) -> Any:
    """An executed copy.

    Args:
        parameters: name -> value of what the cell tagged `parameters` sets.
        name: for messages.
        kernel: what `kernel` yields.

    Raises:
        ConfigError: a parameter that the notebook does not have.
        DataError: a cell failed.
    """
    nbclient = _library("nbclient")
    made = injected(copy.deepcopy(notebook), parameters, name=name)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if kernel.has_kernel:
        made.cells.insert(0, _library("nbformat").v4.new_code_cell("%reset -f"))
    is_again = kernel.has_kernel
    where = {"metadata": {"path": str(artifacts.REPOSITORY)}}
    client = nbclient.NotebookClient(made, km=kernel, timeout=timeout_s, resources=where, record_timing=False)
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        begins = str(error).splitlines()[2]  # of nbclient's message: the failed cell follows two lines of its own
        raise DataError(f"notebook {name}, the cell `{begins}` ...: {error.ename}: {error.evalue}") from error
    finally:
        if client.kc is not None:  # the kernel is not the client's own, so it lets go of nothing by itself
            client.kc.stop_channels()
        if is_again:
            made.cells.pop(0)
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return made


def injected(notebook: Any, parameters: Mapping[str, Any], *, name: str) -> Any:
    """The notebook with a cell after the one tagged `parameters` that sets them, as papermill does it."""
    if not parameters:
        return notebook
    nbformat = _library("nbformat")
    places = [i for i, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ())]
    text = notebook.cells[places[0]].source if places else ""
    there = re.findall(r"^([A-Z_]+) = ", text, re.MULTILINE)
    unknown = [key for key in parameters if key not in there]
    if unknown:
        raise ConfigError(f"parameters.{unknown[0]}: notebook {name} has {', '.join(there) or 'no parameters'}")
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    cell = nbformat.v4.new_code_cell(lines, metadata={"tags": [INJECTED]}, id=INJECTED)
    notebook.cells.insert(places[0] + 1, cell)
    return notebook


def text_of(notebook: Any) -> str:
    return _library("nbformat").writes(notebook) + "\n"


def output_texts(notebook: Any) -> list[str]:
    """What the outputs say, pictures left out."""
    found = []
    for cell in notebook.cells:
        for one in cell.get("outputs", ()):
            parts = [one.get("text", ""), *(v for k, v in one.get("data", {}).items() if not k.startswith("image/"))]
            found += [part if isinstance(part, str) else str(part) for part in parts if part]
    return found


def foreign_paths(notebook: Any) -> list[str]:
    """Folders of this machine that the outputs name."""
    folders = {str(artifacts.REPOSITORY), str(Path.home()), tempfile.gettempdir()} - {"/"}
    return [folder for folder in sorted(folders) if any(f"{folder}/" in text for text in output_texts(notebook))]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f"{name} is not installed; it comes with the extra dev: pip install -e '.[dev]'") from None


if __name__ == "__main__":
    main()
