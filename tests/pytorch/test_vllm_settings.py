"""What of a vLLM configuration is served, and the metadata that its builder makes."""

import sys
import types
from dataclasses import replace

import pytest

from tests.pytorch.skip import torch
from tests.pytorch.vllm_steps import BLOCK, CPU, DIM, Engine, config_of
from turboquant_jax import vllm
from turboquant_jax.vllm import settings
from turboquant_jax.vllm.jobs import Chunk


class Settings:
    """The part of a vLLM configuration that is looked at."""

    def __init__(self, entry=None, **changed):
        made = types.SimpleNamespace
        text = dict(
            model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=DIM,
            max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
        )  # fmt: skip
        self.additional_config = {} if entry is None else {settings.NAME: entry}
        self.cache_config = made(block_size=changed.pop("block_size", 64), cache_dtype="auto")
        self.parallel_config = made(pipeline_parallel_size=1, decode_context_parallel_size=1)
        self.kv_transfer_config = self.speculative_config = None
        self.use_v2_model_runner = False
        described = made(to_dict=lambda: text)
        self.model_config = made(
            hf_config=described, get_num_kv_heads=lambda parallel: 2, dtype=torch.float32
        )
        vars(self).update(changed)


def test_settings_of_an_engine():
    assert settings.cache_config(Settings()) == replace(config_of(4), block=BLOCK)
    assert settings.cache_config(Settings({"bits": 8})).key.bits == 8
    windowed = settings.cache_config(Settings({"window": 128}))
    assert (windowed.window, windowed.sinks) == (128, 4)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            dict(entry={"bits": 9}),
            "got {'bits': 9, 'window': 0, 'sinks': 0}, expected bits, one of",
        ),
        (dict(entry={"window": 9}), "multiple of 64"),
        (dict(entry={"sinks": 4}), "with a window sinks"),
        (dict(entry={"other": 1}), "'other': 1}, expected bits"),
        (dict(block_size=16), "block_size: got 16, expected 64"),
        (dict(kv_transfer_config="some"), "kv_transfer_config: got some, expected None"),
        (dict(use_v2_model_runner=True), "VLLM_USE_V2_MODEL_RUNNER: got 1, expected 0"),
    ],
)
def test_other_settings_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        settings.cache_config(Settings(**made))


def test_another_vllm_is_left_as_it_is(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.33.0"))
    vllm.register()  # whatever else it has it is not asked for
    assert "no backend for vllm 0.33.0, only for 0.26.x" in caplog.text


@pytest.mark.filterwarnings("default")
def test_metadata_of_a_mixed_step():
    """vLLM's own metadata of single tokens before chunks; runs where vLLM is installed."""
    pytest.importorskip("vllm", reason="needs vLLM 0.26")
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from turboquant_jax.vllm.backend import TurboQuantBuilder

    made, layer = types.SimpleNamespace, Engine().layer
    implementation = made(layer_over=lambda memory, number: layer)
    config = made(
        scheduler_config=made(max_num_seqs=4),
        parallel_config=made(decode_context_parallel_size=1),
        compilation_config=made(
            static_forward_context={"one": made(impl=implementation, kv_cache=None)}
        ),
        speculative_config=None,
    )
    builder = TurboQuantBuilder(made(), ["one"], config, CPU)
    starts, ends = torch.tensor([0, 1, 2, 42, 242]).int(), torch.tensor([128, 70, 90, 200]).int()
    found = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=ends,
            seq_lens_cpu_upper_bound=ends,
            num_reqs=4,
            num_actual_tokens=242,
            max_query_len=200,
            max_seq_len=200,
            block_table_tensor=torch.arange(1, 17, dtype=torch.int32).view(4, 4),
            slot_mapping=torch.zeros(242, dtype=torch.int64),
        ),
    )
    batch, blocks = found.batch, found.batch.chunk_jobs
    assert found.tokens == 242 and batch.singles == 2
    assert batch.lengths.tolist() == [127, 69, 50, 0]
    assert batch.chunks == (Chunk(2, 2, 40, 50), Chunk(3, 42, 200, 0))
    # the first token fills block 1 of its request, whose pages are 1 to 4; the second fills none
    assert batch.filled.page.tolist() == [2, -1, -1, -1] and batch.filled.number.tolist()[0] == 1
    # the chunks fill block 0 of pages 9 to 12, and blocks 0 to 2 of pages 13 to 16
    assert blocks.counts == (1, 3)
    ((first, rest),) = blocks.calls
    assert first.page[:4].tolist() == [9, 13, -1, -1] and rest.page[:4].tolist() == [-1, -1, 14, 15]
    assert rest.opening[:4].tolist() == [9, 13, 13, 13] and (rest.page[4:] == -1).all()
