"""What a run with nothing to do costs grows as the number of models does, and one change costs one.

Counted in calls of functions, which are the same on a busy machine; times are the benchmark's.
"""

from __future__ import annotations

import importlib.util
import pstats
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

FEW, MANY = 20, 100


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The benchmark command, with its projects in a folder of this test."""
    described = importlib.util.spec_from_file_location("benchmark_run", ROOT / "benchmarks" / "run.py")
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module
    described.loader.exec_module(module)
    module.FOLDER = tmp_path_factory.mktemp("scale")
    return module


@pytest.fixture(scope="module")
def projects(benchmark: ModuleType) -> dict[int, Path]:
    """Built projects with nothing to do, smoke tests included: number of models -> folder."""
    return {count: benchmark.built(f"ours-{count}", count) for count in (FEW, MANY)}


def calls(benchmark: ModuleType, folder: Path, *arguments: str) -> int:
    """Return how many functions a run of doit calls."""
    profile = folder / "profile"
    benchmark.run([sys.executable, "-m", "cProfile", "-o", str(profile), "-m", "doit", *arguments], folder)
    return int(pstats.Stats(str(profile)).total_calls)  # type: ignore[attr-defined]


def test_cost_grows_as_the_number_of_models_does(benchmark: ModuleType, projects: dict[int, Path]) -> None:
    few, many = (calls(benchmark, projects[count]) for count in (FEW, MANY))
    each = (many - few) / (MANY - FEW)
    fixed = few - each * FEW
    assert each < 1200, f"{each:.0f} calls for each model version, three tasks"
    assert fixed < 500_000, f"{fixed:.0f} calls for none"


def test_a_model_costs_few_times_what_a_copied_file_costs(benchmark: ModuleType, projects: dict[int, Path]) -> None:
    bare = {}
    for count in (3 * FEW, 3 * MANY):
        folder, _ = benchmark.peer("doit", count, ROOT)
        calls(benchmark, folder)
        bare[count] = calls(benchmark, folder)
    each = (bare[3 * MANY] - bare[3 * FEW]) / (MANY - FEW)
    few, many = (calls(benchmark, projects[count]) for count in (FEW, MANY))
    assert (many - few) / (MANY - FEW) < 3.0 * each


def test_one_change_among_many_costs_one(benchmark: ModuleType, projects: dict[int, Path]) -> None:
    counted = []
    for count, folder in projects.items():
        idle = calls(benchmark, folder, *benchmark.BUILD)
        benchmark.project(folder.name, count, edited=count // 2)
        counted.append(calls(benchmark, folder, *benchmark.BUILD) - idle)
        benchmark.project(folder.name, count)
        benchmark.run(benchmark.DOIT, folder)
    few, many = counted
    # What is read and checked again when pipeline.yaml has changed grows with it; tracing and proving does not.
    assert (many - few) / (MANY - FEW) < 2500


def test_memory(benchmark: ModuleType, projects: dict[int, Path]) -> None:
    few, many = (benchmark.run(benchmark.DOIT, projects[count]).peak_mb for count in (FEW, MANY))
    each_kb = (many - few) / (MANY - FEW) * 1024
    assert 20 < many < 60
    assert each_kb < 90, f"{each_kb:.0f} kB for each model version"
