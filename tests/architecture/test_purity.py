"""Modules that must behave the same in production, in tests and in a simulation: time and chance come in as arguments.

And the environment is read in one place a package, so that what configures a process can be found.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import python_files, relative

# Scheduler, router, journal, placement and scaling take a Clock and a Random.
PURE = (
    "engine/scheduler/",
    "cluster/router/",
    "cluster/frontend/journal",
    "cluster/identity/",
    "cluster/control/placement",
    "cluster/control/autoscal",
    "engine/parallel/expert_balance",
    "engine/executor/watchdog",
    "engine/executor/step_times",
)
IMPURE_MODULES = {"time", "random", "secrets", "uuid", "datetime"}
IMPURE_ATTRIBUTES = {("asyncio", "sleep"), ("numpy", "random"), ("np", "random"), ("os", "urandom")}
# The type that a caller passes in.
ALLOWED_NAMES = {("random", "Random")}

# Modules besides */config.py that look at the environment, each with its reason.
ENVIRONMENT_READERS = {
    "cluster/control/group_host.py": "where Ray and the processes under this one find the group's token",
    "cluster/control/launch.py": "torch reads how much to say on the terminal from this process's environment",
    "cluster/control/ray_node.py": "passes this process's environment, cleaned, to the Ray node it starts",
    "cluster/replica/record_file.py": "where a user's programs keep state is the system's convention, not an option",
    "cluster/control/ray_runtime.py": "Ray reads its settings from this process's environment",
}


def impurities(source: str) -> list[str]:
    """Uses of a clock, a timer or chance that did not come in as an argument."""
    return sorted(set(_impurities(ast.parse(source))))


def _impurities(tree: ast.AST) -> Iterator[str]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = (node.module, alias.name)
                if (node.module in IMPURE_MODULES and name not in ALLOWED_NAMES) or name in IMPURE_ATTRIBUTES:
                    yield ".".join(name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = (node.value.id, node.attr)
            if name in ALLOWED_NAMES and id(node) not in called:
                continue
            if node.value.id in IMPURE_MODULES or name in IMPURE_ATTRIBUTES:
                yield ".".join(name)


def reads_environment(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ("environ", "getenv", "environb"):
                return True
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        ):
            return True
    return False


def test_pure_modules_take_their_clock_and_chance_from_outside() -> None:
    pure = [path for path in python_files("cluster", "engine") if relative(path).startswith(PURE)]
    assert {path.parent.name for path in pure} >= {"scheduler", "router"}
    found = {relative(path): impurities(path.read_text()) for path in pure}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import time\nnow = time.monotonic()", ["time.monotonic"]),
        ("from time import monotonic", ["time.monotonic"]),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(1)", ["asyncio.sleep"]),
        ("import random\nr = random.Random(0)", ["random.Random"]),
        ("import random\nx = random.random()", ["random.random"]),
        ("import random\ndef f(r: random.Random) -> float:\n    return r.random()", []),
        ("def f(clock):\n    return clock.time()", []),
    ],
)
def test_the_purity_guard_sees(source: str, uses: list[str]) -> None:
    assert impurities(source) == uses


def test_the_environment_is_read_in_config_modules_only() -> None:
    readers = {
        relative(path)
        for path in python_files("cluster", "engine")
        if path.name != "config.py" and reads_environment(path.read_text())
    }
    assert readers == set(ENVIRONMENT_READERS)


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"]
)
def test_the_environment_guard_sees(source: str) -> None:
    assert reads_environment(source)
    assert not reads_environment("import os\nos.getpid()")
