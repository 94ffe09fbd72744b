"""The benchmark of sampling with a cache, on a case so small that only the machinery is tested."""

import json

import pytest

from benchmarks import decoding
from models import ModelConfig
from models.presets import PRESETS
from scfa_jax.layers import bucket_order


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(preset="tiny", layers=1, width=32, heads=2, dtype="float32"))


def test_it_times_a_prompt_and_tokens_with_and_without_a_cache(tmp_path, capsys):
    argv = ["--preset", "tiny", "--kinds", "hash(4)/bucket", "--lengths", "24", "--tokens", "3", "--samples", "2"]
    argv += ["--dtype", "float32"]
    assert decoding.main([*argv, "--out", str(tmp_path)]) == 0
    assert "| hash(4)/bucket | 24 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "decoding.json").read_text())
    (row,) = written["rows"]
    assert row["same_first_token"]
    assert row["cached_ms_per_token"] == row["times"]["cached"]["median_ms"] / 3
    assert row["recomputed_ms_per_token"] == row["times"]["recomputed"]["median_ms"]
    assert row["cached_tokens_per_second"] == 1e3 / row["cached_ms_per_token"]
    keys_and_values, hash_and_order, index = 2 * 27 * 32 * 4, 2 * 27 * 2 * 4, 2 * 4  # the model's index and the layer's
    assert row["cache_bytes"] == keys_and_values + hash_and_order + index
    assert set(row["compile_s"]) == {"prompt", "cached", "recomputed"}


def test_what_hash_layers_read_is_as_asked_or_as_the_library_chooses():
    keeps_order = lambda room: bucket_order.pays(room, 16)
    chosen = [keeps_order(room) for room in (2, 10**9)]
    for what, kept in {"bucket": [True, True], "all": [False, False], "": chosen}.items():
        with decoding.reading(what):
            assert [keeps_order(room) for room in (2, 10**9)] == kept
    assert chosen == [False, True]


def test_mistakes_are_one_line(tmp_path, capsys):
    for mistake in (
        ["--tokens", "0"],
        ["--lengths", "0"],
        ["--preset", "none"],
        ["--kinds", "reformer(4)"],
        ["--kinds", "hash(4)/some"],
    ):
        argv = ["--preset", "tiny", "--out", str(tmp_path), *mistake]
        assert decoding.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "decoding.json").exists()
