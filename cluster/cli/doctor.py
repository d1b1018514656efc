"""``remuda doctor``: whether the hosts and the links between them are fit to serve, before any weight is read."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.cli import options as common
from cluster.cli import serve_options as options
from cluster.config import load_serve_config

EXAMPLES = (
    "Examples: remuda doctor --address 10.0.0.1:6379 | "
    "remuda doctor /models/Llama-3.1-70B --tp 8 --pp 2 --address 10.0.0.1:6379 --json | "
    "remuda doctor /models/Llama-3.1-8B --replicas 4 --dtype bfloat16 --address 10.0.0.1:6379"
)
_NO_MODEL = "Its checkpoint is looked for on every host, and its layout's ranks are measured. [all hosts, no model]"


def doctor(
    model: Annotated[str | None, typer.Argument(help=_NO_MODEL, show_default=False)] = None,
    tensor_parallel_size: options.TensorParallelSize = None,
    pipeline_parallel_size: options.PipelineParallelSize = None,
    data_parallel_size: options.DataParallelSize = None,
    expert_parallel_size: options.ExpertParallelSize = None,
    enable_eplb: options.EnableEplb = None,
    num_redundant_experts: options.NumRedundantExperts = None,
    replicas: options.Replicas = None,
    tp_across_hosts: options.TpAcrossHosts = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    revision: options.Revision = None,
    address: options.Address = None,
    cpu_slots: options.CpuSlots = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    kv_cache_memory: options.KvCacheMemory = None,
    config: options.Config = None,
    as_json: common.Json = False,
) -> None:
    """Check every host of a Ray cluster, and every link between ranks over the transport that will carry their data.

    Every replica's ranks are measured. Options mean what they mean for serve, and are read from the same environment
    and file. Exit status 0: fit, perhaps with warnings; 1: something would not work, and what to change is said; 2: an
    option is wrong.
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    from cluster.doctor.config import quiet_torch

    quiet_torch()
    # These need torch and Ray, which take longer to import than the rest of the command.
    from cluster.control.device_choice import with_device
    from cluster.control.preflight import preflight
    from cluster.control.ray_runtime import RayRuntime
    from cluster.doctor.examine import examine
    from cluster.doctor.report import WIDTH, as_object, print_examination

    checked = preflight(load_serve_config(flags, config))
    launch = checked.launch
    runtime = RayRuntime.start_local(launch.cpu_slots) if launch.address is None else RayRuntime.join(launch.address)
    with runtime, rounds_shown(Console(stderr=True, highlight=False)) as show:
        launch = with_device(launch, runtime.nodes())
        found = examine(runtime, launch, None if model is None else checked.model, show)
    if as_json:
        sys.stdout.write(json.dumps(as_object(found)) + "\n")
    else:
        print_examination(found, Console(width=WIDTH, highlight=False, markup=False))
    raise typer.Exit(0 if found.is_well else 1)


@contextmanager
def rounds_shown(console: Console) -> Iterator[Callable[[int, int], None]]:
    """For the rounds in which links are measured (how many are done, and how many there are): a bar, or where nobody
    watches one line that says how many."""
    columns = (TextColumn("measuring links, round"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(num_done: int, num_rounds: int) -> None:
            bar.update(task, completed=num_done, total=num_rounds)
            if num_done == 0 and not console.is_terminal:
                console.print(f"measuring links in {num_rounds} rounds")

        yield show
