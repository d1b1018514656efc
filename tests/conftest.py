"""What every test gets: a seed of its own, one computing thread, no network, and a check for processes left behind."""

import os
import random
import sys
import uuid
import zlib
from collections.abc import Iterator

# Before anything imports torch or huggingface_hub, and inherited by every process that a test starts.
RUN_MARK = "REMUDA_TEST_RUN"
os.environ[RUN_MARK] = uuid.uuid4().hex
os.environ["HF_HUB_OFFLINE"] = "1"
# A process that sets its title would write over its environment, and so over the mark.
os.environ["SPT_NOENV"] = "1"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is imported: where there is no GPU, its kernels run in its interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"
# A process that names itself (every worker of Ray does) would else write over its environment, and the mark in it.
os.environ["SPT_NOENV"] = "1"

import psutil
import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.browser", "tests.support.conformance", "tests.support.hosts.fixture"]

settings.register_profile("remuda", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)

LEFT_BEHIND_WAIT_S = 5.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="base of every test's seed (default 0)")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("remuda" if config.getoption("--seed") == 0 else "random")


def pytest_report_header(config: pytest.Config) -> str:
    return f"remuda: seed {config.getoption('--seed')} (another: --seed N)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, why_not in (("gpu", _why_no_gpu), ("netns", _why_no_hosts)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why_not()) is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"


def _why_no_hosts() -> str | None:
    from tests.support.hosts.namespaces import why_not

    return why_not()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed: the same whatever ran before it, another one under another ``--seed``."""
    return zlib.crc32(f"{request.config.getoption('--seed')} {request.node.nodeid}".encode())


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Seed the global generators of what is imported already; code of ours takes its generator as an argument."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _processes_of_this_run() -> list[psutil.Process]:
    """Every live process that inherited this run's mark, however far it has detached itself from us."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # multiprocessing's own helper processes end with this one.
            if process.environ().get(RUN_MARK) == os.environ[RUN_MARK] and not any(
                part.startswith("from multiprocessing.") for part in process.cmdline()
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """What the tests started must have ended by itself when the last of them has."""
    yield
    _, alive = psutil.wait_procs(_processes_of_this_run(), timeout=LEFT_BEHIND_WAIT_S)
    if not alive:
        return
    named = [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in alive if process.is_running()]
    for process in alive:
        process.kill()
    pytest.fail("processes were left behind:\n" + "\n".join(named))
