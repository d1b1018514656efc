"""For which values of the chart a plan's answer holds. The chart refuses others while they stand beside it."""

from collections.abc import Mapping
from typing import Any

from cluster.plan.layout_plan import one_request_bytes
from cluster.plan.report import PlanReport


def sizing(report: PlanReport, values: Mapping[str, Any]) -> dict[str, Any]:
    """The block ``sizing`` for ``values``, those of the plan, which fits: in the chart's own sections what decides
    whether a replica fits, and in bytes what all its ranks need for weights, everything beside them and one request of
    ``maxLen`` tokens, and what they may use."""
    plan, options = report.plan, report.options
    model, engine = values["model"], values["engine"]
    memory = "gpuMemoryUtilization" if plan.machines.device.is_gpu else "kvCacheMemory"
    needed = (
        rank.beside_cache + one_request_bytes(rank, plan.max_model_len, options.block_size) for rank in plan.ranks
    )
    return {
        "gpus": f"{engine['hosts']}x{engine['devicesPerHost']}x{plan.machines.device.name}",
        "neededBytes": sum(needed),
        "availableBytes": sum(rank.budget for rank in plan.ranks),
        "model": {
            "path": model["path"],
            "dtype": model.get("dtype", "auto"),
            "quantization": model.get("quantization", ""),
            "maxLen": plan.max_model_len,
            "maxNumSeqs": options.max_num_seqs,
            "extraArgs": list(model.get("extraArgs", [])),
        },
        "parallel": dict(values["parallel"]),
        "engine": {
            **{key: engine[key] for key in ("device", "hosts", "devicesPerHost")},
            memory: engine.get(memory, options.utilization),
        },
    }
