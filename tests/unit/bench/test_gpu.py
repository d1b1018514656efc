"""The GPU's benchmark where there is no GPU, and the ways it drives a model."""

import pytest
import torch

from bench import gpu
from bench.gpu_checks import _tiny, _tiny_logits
from engine.config import Dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    assert gpu.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_what_the_checks_compare_with_runs_on_the_cpu() -> None:
    """The reference of the whole-model checks: finite, and the same in another run."""
    found = _tiny_logits(_tiny(Dtype.FLOAT32, torch.device("cpu")))
    assert found.shape[0] == 9 and torch.isfinite(found).all()
    assert torch.equal(found, _tiny_logits(_tiny(Dtype.FLOAT32, torch.device("cpu"))))
