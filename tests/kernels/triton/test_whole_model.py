"""A whole mixture of experts, its prompt and decoding steps, by the kernels of CUDA devices: norms, rotation, the write
to the cache, attention, experts, the draw. What it computes is compared with the CPU's path in the same format."""

from pathlib import Path

import pytest
import torch

import engine
from engine.attention.registry import attention_backend
from engine.config import Dtype, LoadFormat
from engine.executor.sampler import sample
from engine.executor.sampling_row import SamplingRow
from engine.kernels import elementwise, gpu_experts, sampling
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.request import SamplingParams
from engine.weights.loader import load_weights
from tests.support.model_driver import ModelDriver

# What it compares is compared on a GPU by bench/gpu_checks.py, with tensors that are there.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")

TINY = Path(engine.__path__[0]) / "assets" / "remuda-tiny"
PROMPTS = [[5, 9, 300, 17, 44, 1000, 3, 8, 21], [7, 7, 7]]
NUM_DECODES = 2


def logits_of_a_run(kind: str) -> list[torch.Tensor]:
    """Of both prompts, computed together, and of steps in which both decode the same tokens."""
    config = ModelConfig.from_directory(TINY)
    model = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, str(TINY), LoadFormat.SAFETENSORS, lambda done, total: None)
    driver = ModelDriver(model, Mesh(), torch.float32)
    driver.backend = attention_backend(name=kind)
    streams = [driver.add(prompt) for prompt in PROMPTS]
    driver.step([(stream, len(stream.token_ids)) for stream in streams])
    for number in range(NUM_DECODES):
        for stream in streams:
            stream.token_ids.append(40 + number)
        driver.step([(stream, 1) for stream in streams])
    return [torch.cat(stream.logits) for stream in streams]


def use_triton(patch: pytest.MonkeyPatch, whether: bool) -> None:
    """The interpreter takes tensors on the CPU."""
    for module in (elementwise, gpu_experts, sampling):
        patch.setattr(module, "runs_on_gpu", lambda tensor: whether)


@torch.inference_mode()
def test_logits_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of_a_run("reference")
    use_triton(monkeypatch, True)
    found = logits_of_a_run("cuda")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.7}, {"top_p": 0.95, "top_k": 30}, {"min_p": 0.05, "top_p": 0.5}], ids=str
)
def test_tokens_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, options: dict[str, float]) -> None:
    """Greedy and drawn rows together, and one of no use."""
    logits = torch.randn(6, 5000) * 3
    logits[4, 100] = torch.nan
    rows = [
        SamplingRow(r, SamplingParams(max_tokens=1, temperature=0.0 if r == 2 else 0.8, seed=r, **options), [1], 1)  # type: ignore[arg-type]
        for r in range(6)
    ]
    expected = sample(logits.clone(), rows)
    use_triton(monkeypatch, True)
    found = sample(logits.clone(), rows)
    assert found == expected and found.valid == [True] * 4 + [False, True]
