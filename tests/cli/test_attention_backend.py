"""Who may choose how GPUs attend, and what is said where it cannot be."""

import importlib.util

import msgspec
import pytest

from bench.gpu_serving import TINY
from cluster.config import Device, load_serve_config
from cluster.control.preflight import check_attention, check_attention_dtype, preflight
from cluster.replica.placed_rank import PlacedRank
from cluster.replica.rank_plan import GangEndpoints, worker_configs
from engine.attention.registry import BACKENDS, CHOICES
from engine.errors import EngineFailure, InvalidOption
from engine.executor.in_process import InProcessExecutor


def test_the_choices_are_those_of_the_command_line() -> None:
    for name in CHOICES:
        assert load_serve_config({"attention_backend": name}).attention_backend == name
    assert {name for name in CHOICES.values() if name is not None} <= BACKENDS.keys()
    with pytest.raises(InvalidOption, match="attention.backend"):
        load_serve_config({"attention_backend": "fast"})


def test_by_default_nothing_is_asked_of_the_machine() -> None:
    plan = preflight(load_serve_config({"device": "cpu"})).launch.replica
    assert plan.attention_backend == "auto"


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_it_is_refused_on_cpus(name: str) -> None:
    with pytest.raises(InvalidOption, match=f"--attention-backend {name} is for GPUs; on CPUs leave it out"):
        preflight(load_serve_config({"device": "cpu", "attention_backend": name}))


def test_it_is_refused_where_another_is_prescribed() -> None:
    with pytest.raises(InvalidOption, match="--deterministic has an attention of its own"):
        check_attention("triton", Device.CUDA, is_deterministic=True)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="FlashInfer is installed")
def test_it_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(InvalidOption, match="flashinfer is not installed; pip install flashinfer-python"):
        check_attention("flashinfer", Device.CUDA, is_deterministic=False)


def test_flashinfer_is_refused_in_float32() -> None:
    check_attention_dtype("flashinfer", "bfloat16")
    check_attention_dtype("auto", "float32")
    with pytest.raises(InvalidOption, match="computes in bfloat16, not float32; add --dtype bfloat16"):
        check_attention_dtype("flashinfer", "float32")


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="FlashInfer is installed")
def test_the_choice_reaches_the_rank() -> None:
    """Which then finds nothing of that name on this machine."""
    plan = preflight(load_serve_config({"device": "cpu"})).launch.replica
    plan = msgspec.structs.replace(plan, attention_backend="flashinfer")
    endpoints = GangEndpoints(leader_host="here", local="unix:@none", remote="", secret="")
    config = worker_configs(plan, [PlacedRank(0, "here")], endpoints, "127.0.0.1", 0)[0]
    with pytest.raises(EngineFailure, match="No module named 'flashinfer'"):
        InProcessExecutor(msgspec.structs.replace(config, model=str(TINY)))
