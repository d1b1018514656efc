"""``remuda doctor``: whether the hosts and the links between them are fit to serve, before any weight is read."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli import options as common
from cluster.cli import serve_options as options
from cluster.config import load_serve_config

EXAMPLES = (
    "Examples: remuda doctor --address 10.0.0.1:6379 | "
    "remuda doctor /models/Llama-3.1-70B --tp 8 --pp 2 --address 10.0.0.1:6379 --json"
)
_NO_MODEL = "Its checkpoint is looked for on every host, and its layout's ranks are measured. [all hosts, no model]"


def doctor(
    model: Annotated[str | None, typer.Argument(help=_NO_MODEL, show_default=False)] = None,
    tensor_parallel_size: options.TensorParallelSize = None,
    pipeline_parallel_size: options.PipelineParallelSize = None,
    data_parallel_size: options.DataParallelSize = None,
    expert_parallel_size: options.ExpertParallelSize = None,
    tp_across_hosts: options.TpAcrossHosts = None,
    device: options.Device = None,
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

    Options mean what they mean for serve, and are read from the same environment and file. Exit status 0: fit, perhaps
    with warnings; 1: something would not work, and what to change is said; 2: an option is wrong.
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    from cluster.doctor.config import quiet_torch

    quiet_torch()
    # These need torch and Ray, which take longer to import than the rest of the command.
    from cluster.control.preflight import preflight
    from cluster.control.ray_runtime import RayRuntime
    from cluster.doctor.examine import examine
    from cluster.doctor.report import WIDTH, as_object, print_examination

    checked = preflight(load_serve_config(flags, config))
    launch = checked.launch
    runtime = RayRuntime.start_local(launch.cpu_slots) if launch.address is None else RayRuntime.join(launch.address)
    with runtime:
        found = examine(runtime, launch, None if model is None else checked.model)
    if as_json:
        sys.stdout.write(json.dumps(as_object(found)) + "\n")
    else:
        print_examination(found, Console(width=WIDTH, highlight=False, markup=False))
    raise typer.Exit(0 if found.is_well else 1)
