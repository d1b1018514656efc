"""What is mutated, and what each mutant has to get past: cheapest first."""

from dataclasses import dataclass

SIMULATION = ("-m", "cluster.simulate", "-x", "--seeds", "100")
EXPLORATION = ("-m", "cluster.simulate", "-x", "--explore")


def tests(*paths: str) -> tuple[str, ...]:
    """Arguments of Python that run them to the first failure, always with the same examples."""
    return ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *paths)


@dataclass(frozen=True)
class Subject:
    """``num_mutants`` are drawn of those that the tool makes of ``file``. ``hurdles``: see ``tests``."""

    file: str
    num_mutants: int
    hurdles: tuple[tuple[str, ...], ...]


# Virtual time first: the fleet's tests wait in real time, and a busy machine is no defect.
_FAILOVER = (SIMULATION, EXPLORATION, tests("tests/failover/test_fleet.py"))
_HISTORIES = tests("tests/unit/replica/test_held_streams.py", "tests/unit/replica/test_stream_history.py")

SUBJECTS = (
    Subject("cluster/frontend/journal.py", 13, (tests("tests/property/test_journal.py"), *_FAILOVER)),
    Subject(
        "cluster/replica/recovery.py",
        13,
        (tests("tests/property/test_recovery.py"), SIMULATION, EXPLORATION),
    ),
    Subject(
        "engine/scheduler/block_pool.py",
        13,
        (
            tests("tests/property/test_block_pool.py"),
            tests(
                "tests/unit/scheduler/test_block_pool.py",
                "tests/unit/scheduler/test_prefix_cache.py",
                "tests/unit/scheduler/test_scheduler.py",
            ),
            tests("tests/property/test_scheduler.py"),
            SIMULATION,
        ),
    ),
    Subject("cluster/replica/stream_history.py", 2, (_HISTORIES, *_FAILOVER)),
    Subject("cluster/replica/held_streams.py", 2, (_HISTORIES, *_FAILOVER)),
)


def name_of(hurdle: tuple[str, ...]) -> str:
    """For the table."""
    if hurdle == SIMULATION:
        return "simulation, 100 seeds"
    if hurdle == EXPLORATION:
        return "simulation, every single fault"
    return ", ".join(argument for argument in hurdle if argument.startswith("tests/"))
