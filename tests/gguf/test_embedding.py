"""Embeddings and output heads in blocks, also where the vocabulary ends before the ranks do."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from engine.config import ParallelConfig
from engine.layers.embedding import VocabEmbedding
from engine.parallel.distributed import init_distributed
from engine.parameter import ParameterBuilder
from engine.quantization_config import MatrixFormat, QuantizationConfig, WeightFormat
from tests.gguf.files import random_blocks
from tests.support.rank_pool import RankContext, run_ranks

NUM_INPUTS = 64


def _embed(context: RankContext, blocks: np.ndarray[Any, Any], hidden: np.ndarray[Any, Any]) -> list[Any]:
    """Every token's row, and the logits of ``hidden``, as one rank has them."""
    mesh = init_distributed(
        ParallelConfig(tp=context.num_ranks), context.rank, context.store, torch.device("cpu"), timeout_s=30.0
    )
    form = MatrixFormat(WeightFormat.GGUF, gguf_type="Q8_0")
    quantization = QuantizationConfig("GGUF", (), by_name={"lm_head": form})
    build = ParameterBuilder(mesh, torch.float32, torch.device("cpu"), quantization=quantization)
    embedding = VocabEmbedding(build, "lm_head", len(blocks), NUM_INPUTS)
    for piece in build.slices:
        first = piece.start[0]
        piece.destination.copy_(torch.from_numpy(blocks[first : first + len(piece.destination)]))
    rows = embedding.forward(torch.arange(len(blocks)))
    logits = embedding.logits(torch.from_numpy(hidden))
    return [rows.numpy(), None if logits is None else logits.numpy()]


@pytest.mark.parametrize("num_rows", [5, 8])
def test_rows_and_logits_on_four_ranks(num_rows: int) -> None:
    """Of 5 rows the last of four ranks has none, and the one before it one of two."""
    generator = np.random.default_rng(num_rows)
    blocks = random_blocks("Q8_0", (num_rows, NUM_INPUTS), generator)
    hidden = generator.normal(size=(3, NUM_INPUTS)).astype(np.float32)
    expected = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
    results = run_ranks(_embed, 4, blocks, hidden)
    for rows, _ in results:
        np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(results[0][1], hidden @ expected.T, rtol=1e-5, atol=1e-5)
    assert [logits for _, logits in results[1:]] == [None] * 3
