"""Adapters on a base model in NF4: what PEFT computes with bitsandbytes' own dequantized weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.lora.adapters import BASES, adapt
from tests.lora.mixed import Adapted, mixed_logits
from tests.quantization.checkpoints import make_float_llama
from tests.quantization.comparison import make
from tests.quantization.four_bit_checkpoints import FORMATS
from tests.support.conformance import Conforms
from tests.support.rank_pool import run_ranks


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    float_dir = tmp_path_factory.mktemp("float")
    make_float_llama(float_dir)
    made = make(FORMATS["nf4"], float_dir, tmp_path_factory.mktemp("nf4"))
    directory: Path = tmp_path_factory.mktemp("adapters")
    return dataclasses.replace(adapt(made.float_directory, directory, BASES["llama"].adapters), base=made.directory)


@pytest.mark.parametrize("tp", [1, 2])
def test_mixed_adapters_on_nf4(nf4: Adapted, conforms: Conforms, tp: int) -> None:
    conforms("Llama", "nf4 + 2 adapters", tp=tp, oracle="PEFT, bitsandbytes")
    ours = mixed_logits(None, nf4, 1, 1) if tp == 1 else run_ranks(mixed_logits, tp, nf4, tp, 1)[0]
    for which, expected in nf4.logits.items():
        assert expected.std() >= 1.0, "an absolute tolerance means little on smaller logits"
        np.testing.assert_allclose(ours[which], expected, rtol=0, atol=1e-4)
