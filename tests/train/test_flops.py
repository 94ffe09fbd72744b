"""The arithmetic of a step: against what XLA counts, and against the paper's sums."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from conftest import HAS_GPU

from models import PRESETS, ModelConfig
from train.config import OptimizerConfig
from train.flops import model_flops, peak_flops
from train.step import init


def parameters(config: ModelConfig, vocab_size: int, length: int):
    return jax.eval_shape(lambda: init(config, OptimizerConfig(), vocab_size=vocab_size, max_length=length)[1].params)


def test_gpt2_small_takes_as_many_flops_as_a_hand_counts():
    config = ModelConfig(**{**vars(PRESETS["gpt2-small"]), "attention": "dense", "dtype": "bfloat16"})
    length = 8192
    # 12 blocks of 4 + 8 matrices of 768 x 768, and the embeddings; biases and norms are less than 0.1% of it.
    matrices = 12 * 12 * 768**2 + 50_304 * 768
    attention = 12 * 12 * 768 * length / 2  # a token and layer: 12 FLOPs a pair and feature, half of the pairs
    counted = model_flops(config, parameters(config, 50_257, length), sequences=2, length=length)
    assert counted == pytest.approx(2 * length * (6 * matrices + attention), rel=2e-3)


@pytest.mark.skipif(HAS_GPU, reason="XLA does not count what it leaves to cuBLAS")
def test_the_formula_agrees_with_xla():
    config = ModelConfig(layers=2, width=128, heads=2, attention="identity", dtype="float32")
    optimizer = OptimizerConfig()
    model, state = init(config, optimizer, vocab_size=256, max_length=64)

    def loss(params, tokens):
        return model.merge(params, state.fixed)(tokens).sum()

    tokens = jax.ShapeDtypeStruct((4, 64), "uint8")
    compiled = jax.jit(jax.grad(functools.partial(loss))).lower(state.params, tokens).compile()
    counted = model_flops(config, state.params, sequences=4, length=64)
    # XLA also counts what is no product of matrices: norms, gelu, sums.
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.15)


def test_only_the_pairs_that_a_kind_asks_for_count():
    shape = {"layers": 2, "width": 64, "heads": 2, "dtype": "float32"}

    def attention(kind: str) -> float:
        config = ModelConfig(**shape, attention=kind)
        without = ModelConfig(**shape, attention="identity")
        params = parameters(without, 256, 100)
        return model_flops(config, params, 3, 100) - model_flops(without, params, 3, 100)

    dense = attention("dense")
    assert dense == 3 * 2 * 12 * 64 * 100 * 101 / 2
    assert attention("cudnn") == dense
    assert attention("hash(10, exclude_self=False)") == pytest.approx(dense * (10 * 10 * 11 / 2) / (100 * 101 / 2))
    assert attention("hash(10)") == pytest.approx(dense * (10 * 10 * 9 / 2) / (100 * 101 / 2))
    row, column = np.indices((100, 100))
    near, same = row - column < 3, row % 4 == column % 4
    pairs = ((near | same) & (column <= row)).sum()
    assert attention("hash(4, local_window=3, exclude_self=False)") == pytest.approx(dense * pairs / (100 * 101 / 2))
    assert attention("hash(4, local_window=3)") == pytest.approx(dense * (pairs - 100) / (100 * 101 / 2))
    kept = attention("dense, drop(0.5)") / dense
    assert kept == pytest.approx((1 + 0.25) / 2, abs=0.03)  # one draw
    # A window of 3 to 6 (of 1 to 4 at the start), and in all but the first chunk of 4 up to 2 keys: 2 in all chunks.
    pairs = (1 + 2 + 3 + 4) + 24 * (3 + 4 + 5 + 6 + 4 * 2)
    assert attention("sparsek(2, window=3, chunk_size=4)") == pytest.approx(dense * pairs / (100 * 101 / 2))
    # Of 12 whole blocks of 8 and one of 4: the own one up to the query, and two before it where there are as many.
    pairs = 12 * 8 * 9 / 2 + 4 * 5 / 2 + 8 * 8 + 2 * 8 * (10 * 8 + 4)
    for kind in ("moba", "random_blocks", "oracle_blocks"):
        assert attention(f"{kind}(8, top_k=3)") == pytest.approx(dense * pairs / (100 * 101 / 2))
    assert attention("reformer(4)") == pytest.approx(dense / 4)
    mask = (column <= row) & ((row - column < np.array([5, 25])[:, None, None]) | (column < 2))
    windows = attention("window((5, 0), num_sinks=2, slope=(0.0, 0.25))")
    assert windows == pytest.approx(dense * mask.sum() / 2 / (100 * 101 / 2))


def test_learned_positions_are_looked_up_not_multiplied():
    rotary, learned = (ModelConfig(layers=1, width=64, heads=2, positions=p) for p in ("rotary", "learned"))
    rotary, learned = (ModelConfig(**{**vars(config), "dtype": "float32"}) for config in (rotary, learned))
    counted = [model_flops(config, parameters(config, 256, 1000), 1, 100) for config in (rotary, learned)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_are_known_or_none(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak
