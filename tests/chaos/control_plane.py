"""Ray's own processes die under a gang on one host, where there is no other."""

import dataclasses
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cell import Cell, Choice, Expected, Moment, Row, Strike, moments_of, run_cell, unfaulted
from tests.chaos.clients import run_all
from tests.chaos.comparison import judge_cut_off
from tests.chaos.processes import OPTIONS, kill, kill_program, only
from tests.chaos.site import OneHost, one_host, settle

SILENT_S = 65.0
"""Ray's own patience with its control service is 60 s."""
END_TIMEOUT_S = 100.0


def control_plane(directory: Path, choice: Choice) -> Iterator[Row]:
    """The control service dies, and stays away. A rank that is lost then is replaced by the process that stands by; a
    leader cannot be."""
    kill_gcs = kill_program("gcs_server")
    first = Cell("kill -9 GCS", Moment.DECODE, kill_gcs)
    silent = Cell(f"no GCS for {SILENT_S:g} s", Moment.PREFILL, lambda site: None)
    without_rank = Cell("no GCS, kill -9 rank 1", Moment.DECODE, kill("rank 1"), only("rank 1"))
    leader = "no GCS, kill -9 leader"
    chosen = choice.of([first, silent, without_rank, leader])
    cells = [cell for cell in chosen if isinstance(cell, Cell)]
    moments = moments_of([*cells, *([first] if leader in chosen else [])])
    with one_host(directory, *OPTIONS) as site:
        expected, rows = unfaulted(site, moments)
        yield from (dataclasses.replace(row, site="tp2") for row in rows)
        gone_s = time.monotonic()
        if first not in cells:
            settle(site)
            kill_gcs(site)
        for cell in cells:
            if cell is silent:
                time.sleep(max(0.0, gone_s + SILENT_S - time.monotonic()))  # the fault itself
            yield run_cell("tp2", site, cell, expected)
        if leader in chosen:
            yield _ended(site, leader, "leader", "control service", expected)


def raylet(directory: Path, choice: Choice) -> Iterator[Row]:
    """All ranks and the leader are its children."""
    with one_host(directory, *OPTIONS) as site:
        for fault in choice.of(["kill -9 raylet"]):
            yield from _alone(site, fault, "raylet/raylet", "")


def control_process(directory: Path, choice: Choice) -> Iterator[Row]:
    """It supervises the gang, and Ray ends with it."""
    with one_host(directory, *OPTIONS) as site:
        for fault in choice.of(["kill -9 control process"]):
            yield from _alone(site, fault, "remuda: control", "the control process ended")


def _alone(site: OneHost, fault: str, program: str, reason: str) -> Iterator[Row]:
    """First without a fault."""
    expected, rows = unfaulted(site, (Moment.DECODE,))
    yield from (dataclasses.replace(row, site="tp2") for row in rows)
    yield _ended(site, fault, program, reason, expected)


def _ended(site: OneHost, fault: str, program: str, reason: str, expected: Expected) -> Row:
    """What is right: each request ends with one error behind the beginning of its answer, and the server with status 1
    and the reason; nothing is left."""
    settle(site)
    strike = Strike(Moment.DECODE, site.num_live, lambda: _kill(site, program))
    clients = run_all(Moment.bodies(Moment.DECODE), site.urls, None, strike)
    outcome = judge_cut_off(clients, expected[Moment.DECODE], strike.struck_s)
    wrong = [*strike.wrong, *outcome.notes]
    assert site.served.process is not None
    try:
        status = site.served.process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        wrong.append("the server did not end")
    else:
        wrong += [] if status == 1 else [f"status {status}"]
    if reason not in site.log or "Traceback" in site.log:
        wrong.append(site.log)
    wrong += site.served.left_processes(30.0)
    return Row("tp2", fault, Moment.DECODE, outcome, (), tuple(wrong))


def _kill(site: OneHost, program: str) -> None:
    (kill("leader") if program == "leader" else kill_program(program))(site)
