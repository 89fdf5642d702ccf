"""What `vllm_speed` makes of rows that an engine gave, and of the sizes of an engine."""

import pytest

from experiments.harness import journal
from experiments.speed import vllm_claims, vllm_engine, vllm_jobs, vllm_speed

pytest.importorskip("torch", reason="needs torch: make test-torch")
from experiments.speed import vllm_kernels

SIZES = vllm_kernels.Sizes(8, 2, 128, 8, "bfloat16", 16, 2048, 1, (16,))


def tokens(run, *prompts):
    leads = [[(token, 0.5 - 0.1 * n) for n, token in enumerate(prompt)] for prompt in prompts]
    return {"part": "tokens", "backend": "CUSTOM", "run": run, "tokens_of": leads}


def test_tokens_are_counted_to_the_first_that_differs():
    base = [tokens("first", [1, 2, 3], [4, 5, 6])]
    own = [tokens("first", [1, 2, 3], [4, 9, 6]), tokens("preempted", [7, 2, 3], [4, 9, 6])]
    first, second = (vllm_speed._compared(row, own, base) for row in own)
    assert (first["equal"], first["equal_first"], first["tokens"]) == (4, 6, 6)
    # where they part first, the baseline's second token, it led by 0.4
    assert first["lead"] == pytest.approx(0.4)
    assert second["equal_first"] == 3 and "tokens_of" not in second


def test_claims_of_speed_and_memory():
    def row(backend, rate, held):
        case = {"batch": 8, "context": 32768, "tokens_per_second": rate, "kv_tokens": held}
        return {"part": "speed", "backend": backend} | case

    rows = [row("TRITON_ATTN", 400.0, 1000), row("CUSTOM", 500.0, 3590), row("other", 600.0, 3700)]
    found = {claim.statement: claim.verdict for claim in vllm_claims.claims(rows)}
    assert found == {
        "vLLM, 8 x 32768: faster than TRITON_ATTN": "holds",
        "vLLM, 8 x 32768: faster than other": "missed",
        "vLLM: at least 3.6 times the tokens of bfloat16 in the same bytes": "missed",
    }


def test_claims_of_windows_devices_and_servers():
    speed = {"part": "speed", "backend": "CUSTOM", "batch": 8, "context": 100, "kv_tokens": 1}
    two = {"part": "tensor", "devices": 2, "bits": 8, "tokens": 9, "equal": 9}
    server = {"part": "serve", "compiled": 0}
    rows = [
        speed | {"tokens_per_second": 100.0},
        speed | {"tokens_per_second": 89.0, "window": 128},
        two | {"run": "first"},
        two | {"run": "prefixes cached", "equal": 8, "lead": 0.25},
        two | {"devices": 1, "run": "first"},
        server | {"start_seconds": 60.0, "seconds": 0.5, "tokens": 32},
        server | {"compiled": 1, "note": "ended with 1"},
    ]
    found = {claim.statement: (claim.verdict, claim.measured) for claim in vllm_claims.claims(rows)}
    assert found == {
        "vLLM, 8 x 100, a window of 128: at least 0.9 of the speed without": (
            "does not hold", "89 tokens a second against 100, 0.89"
        ),
        "vLLM, 8 bits: two GPUs give the tokens of one, first": (
            "holds", "9 of 9 before the first that differs"
        ),
        "vLLM, 8 bits: two GPUs give the tokens of one, prefixes cached": (
            "does not hold", "8 of 9 before the first that differs, where it leads by 0.2 at most"
        ),
        "vLLM: `vllm serve` answers over HTTP": ("holds", "up after 60 s, 32 tokens in 0.5 s"),
        "vLLM: `vllm serve` answers over HTTP, the model compiled by torch": (
            "does not hold", "ended with 1"
        ),
    }  # fmt: skip


def test_what_a_journal_holds_is_not_started_again(monkeypatch, tmp_path):
    """Over two devices beside the tokens of one, run by run."""
    monkeypatch.setenv(journal.FOLDER, str(tmp_path))
    monkeypatch.setattr(vllm_speed.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm_speed, "_has_gpu", lambda: False)
    monkeypatch.setattr(vllm_jobs.vllm_environment, "save_random", lambda folder: None)
    one = {"part": "tensor", "backend": "CUSTOM", "devices": 1}
    runs = {"first": [1, 2, 3], "prefixes cached": [1, 5, 6]}
    answers = [one | {"run": run, "tokens_of": tokens(run, x)["tokens_of"]}
               for run, x in runs.items()]  # fmt: skip
    started = []

    class Child:
        def __init__(self, folder, name, job):
            started.append(name)
            self.devices = job["head"]["devices"]

        def rows(self, seconds):
            return [answer | {"devices": self.devices} for answer in answers]

        def close(self):
            pass

    monkeypatch.setattr(vllm_speed, "_Child", Child)
    config = vllm_speed.Config(parts=("tensor",), bits=(8,))
    held = journal.open_journal("vllm_speed", config, ("cases", "backends"))
    held.measure("tensor 8 1", lambda: answers)
    rows = list(vllm_speed.run(config, lambda names, _: names))
    assert started == ["tensor 8 2"]
    assert [(row["devices"], row["equal"], row["equal_first"]) for row in rows] == [
        (1, 3, 3), (1, 3, 1), (2, 3, 3), (2, 3, 1)
    ]  # fmt: skip


def test_tokens_of_a_cache_are_those_of_its_log():
    said = vllm_engine._Said()
    record = vllm_engine.logging.makeLogRecord({"msg": "GPU KV cache size: 1,001,600 tokens"})
    said.emit(record)
    assert said.found == "1,001,600"
    # the same engine: 2 layers with 2 heads of 128 at 8 bits in 1 GiB, as vLLM 0.26 made them
    assert vllm_kernels.pages_of(SIZES, 2, 1 << 30) * 64 == 1_001_600


def test_every_engine_has_its_own_settings(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[[1, 2], [3]]")
    parts = "speed", "tokens", "perplexity"
    config = vllm_speed.Config(
        folder=str(tmp_path), ids=str(file), parts=parts, windows=(0, 128), chunk=96
    )
    jobs = vllm_jobs.jobs_of(config, tmp_path)
    settings = {name: job["settings"] for name, job in jobs.items()}
    assert settings["speed CUSTOM 0"]["block_size"] == 64
    assert settings["speed turboquant_4bit_nc 0"]["kv_cache_dtype"] == "turboquant_4bit_nc"
    assert "kv_cache_dtype" not in settings["speed TRITON_ATTN 0"]
    same = [{x["kv_cache_memory_bytes"] for name, x in settings.items() if part in name}
            for part in ("speed", "tokens")]  # fmt: skip
    assert [len(x) for x in same] == [1, 1]
    assert settings["tokens CUSTOM 8 0"]["max_num_seqs"] == 2
    assert settings["tokens CUSTOM 8 0"]["max_num_batched_tokens"] == 96
    own = settings["perplexity CUSTOM 4 128"]
    assert own["additional_config"] == {"turboquant": {"bits": 4, "window": 128}}
    assert own["max_num_batched_tokens"] == 64
    assert [job["head"].get("window", 0) for job in jobs.values()].count(128) == 5


def test_losses_are_compared_token_by_token():
    base, own = ([{"part": "perplexity", "losses_of": x}] for x in ([1.0, 3.0], [1.5, 3.1]))
    found = vllm_speed._compared(own[0], own, base)
    assert (found["tokens"], found["loss"]) == (2, pytest.approx(2.3))
    # differences of 0.5 and 0.1: their mean, and half of what they lie apart
    assert found["difference"] == pytest.approx(0.3)
    assert found["error"] == pytest.approx(0.2)


@pytest.mark.parametrize("window", [0, 64])
def test_calls_are_those_of_single_tokens_and_of_a_chunk_behind_a_past(window):
    sizes = vllm_kernels.Sizes(4, 2, 32, 4, "float32", 3, 256, 5, (1, 2), window)
    names = [name for name, *_ in vllm_kernels.recorded(sizes)]
    # for each batch its attention; one encode of single tokens, one of chunks; one tile
    assert sorted(names) == ["decode", "decode_attention", "decode_attention", "encode", "encode"]


@pytest.mark.filterwarnings("default")
def test_their_own_compressed_cache_has_its_pages():
    """The first runner of vLLM 0.26 asks for those of `auto`; runs where vLLM is installed."""
    pytest.importorskip("vllm", reason="needs vLLM 0.26")
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend

    vllm_engine._mend_theirs()
    assert TurboQuantConfig.get_boundary_skip_layers(None) == []
    *_, size = TurboQuantAttentionBackend.get_kv_cache_shape(3, 16, 8, 128, cache_dtype_str="auto")
    # 48 GiB for 32 layers with 8 heads held 1,502,432 tokens by its log
    assert size == (48 << 30) // (32 * 8 * 1_502_432)
