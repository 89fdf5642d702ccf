"""Files changed at random, and what reading them ends in.

The suite reads a few hundred. For many, each kind in a process of its own that is watched:
`python -m tests.damaged 25000` prints how many of each kind were loaded, refused, raised anything
else, took longer than a minute or ended the process.
"""

import collections
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tests.models import conftest
from turboquant_jax import cache
from turboquant_jax.cache import storage
from turboquant_jax.cli import settings
from turboquant_jax.models.checkpoint import load

KINDS = ("gguf", "folder", "cache", "allocation")
SMALL = dataclasses.replace(
    conftest.TINY, num_layers=1, hidden_size=8, intermediate_size=8, head_dim=4, num_heads=2,
    num_kv_heads=1,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "a é 東"}]
JUNK = ["null", "true", "-1", "0", "1", "2147483648", "18446744073709551616", "1e30", "0.5", "NaN"]
JUNK += [
    "Infinity",
    '""',
    '"x"',
    json.dumps("é" * 99),
    "[]",
    "{}",
    "[[]]",
    "[null]",
    '{"type": "x"}',
]
EXTREME = [0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def changed_bytes(rng: np.random.Generator, raw: bytes, end: int | None = None) -> bytes:
    """One or two bits, bytes, numbers or stretches changed, before `end`; or the file cut."""
    for _ in range(rng.integers(1, 3)):
        size = max(1, len(raw) if end is None else min(end, len(raw)))
        at, length = int(rng.integers(size)), int(rng.integers(1, 9))
        head, tail = raw[:at], raw[at + length :]
        new = [
            bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 : at + length],
            rng.bytes(length),
            b"",
            raw[at : at + length] * 2,
            int(rng.choice(np.array(EXTREME, np.uint64))).to_bytes(8, "little")[:length],
        ][rng.integers(5)] if raw else b""  # fmt: skip
        raw = head + new + (tail if rng.random() < 0.98 else b"")
    return raw


def changed_json(rng: np.random.Generator, text: str) -> str:
    """One to three values replaced by junk or by each other, left out, or put elsewhere."""
    root = [json.loads(text)]
    for _ in range(rng.integers(1, 4)):
        places = list(_places(root))
        where, key = places[rng.integers(len(places))]
        other, name = places[rng.integers(len(places))]
        choice = rng.integers(4)
        if choice == 0 and where is not root:
            del where[key]
        elif choice == 1 and isinstance(where, dict):
            where[str(rng.choice(["x", "type", "é"]))] = where.pop(key)
        elif choice == 2:
            where[key] = json.loads(json.dumps(other[name]))
        else:
            where[key] = json.loads(JUNK[rng.integers(len(JUNK))])
    return json.dumps(root[0]) if root else ""


def _places(node: Any):
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], list | dict):
            yield from _places(node[key])


class Kind:
    """Sound files of a kind in a folder, and how they are read."""

    def __init__(self, name: str, folder: Path):
        self.folder = folder
        self.read: Callable[[], None] = getattr(self, f"_{name}")()
        self.sound = {p: p.read_bytes() for p in sorted(folder.iterdir())}

    def outcome(self, seed: int) -> str:
        """Change one file, read, and put it back: "loaded", "refused", or what was raised."""
        rng = np.random.default_rng(seed)
        path = list(self.sound)[rng.integers(len(self.sound))]
        raw, end = self.sound[path], None
        if path.suffix in (".gguf", ".safetensors"):  # mostly the header
            end = None if rng.random() < 0.1 else int(0.4 * len(raw))
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(changed_json(rng, raw.decode()), "utf-8")
        else:
            path.write_bytes(changed_bytes(rng, raw, end))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.read()
            return "loaded"
        except (ValueError, FileNotFoundError) as error:
            return "refused" if "\n" not in str(error) else f"several lines: {error!r}"
        except BaseException as error:  # a panic of the tokenizers package is one
            if isinstance(error, KeyboardInterrupt):
                raise
            return "raised: " + "".join(traceback.format_exception(error))
        finally:
            path.write_bytes(raw)

    def _gguf(self):
        model = conftest.random_model(SMALL)
        changes = {"tokenizer.chat_template": TEMPLATE, "general.name": "small"}
        path = self.folder / "small.gguf"
        conftest._write_gguf(path, SMALL, conftest._gguf_tensors(model), **changes)
        return lambda: _use(path)

    def _folder(self):
        tokenizer = _byte_fallback()
        config = dataclasses.replace(SMALL, vocab_size=tokenizer.get_vocab_size())
        tokenizer.save(str(self.folder / "tokenizer.json"))
        tensors = conftest._huggingface_tensors(conftest.random_model(config))
        first = {name: tensors.pop(name) for name in list(tensors)[:3]}
        names = {"a.safetensors": first, "b.safetensors": tensors}
        for name, part in names.items():
            save_file(part, self.folder / name)
        sizes = dict(
            vocab_size=config.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        )  # fmt: skip
        special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
        entries = {
            "config": conftest.TINY_ENTRIES | sizes,
            "generation_config": {"eos_token_id": [1, 2], "top_p": 0.9},
            "model.safetensors.index": {
                "weight_map": {tensor: name for name, part in names.items() for tensor in part}
            },
            "tokenizer_config": special
            | {"chat_template": [{"name": "default", "template": TEMPLATE}]},
            "special_tokens_map": special,
        }
        for name, content in entries.items():
            (self.folder / f"{name}.json").write_text(json.dumps(content))
        return lambda: _use(self.folder)

    def _cache(self):
        codec = cache.CodecConfig(3)
        config = cache.CacheConfig(1, 1, 8, codec, codec, block=8, window=3, sinks=1)
        state = jax.jit(lambda: cache.create(config, 1, 20, key=jax.random.key(4)))()
        path = self.folder / "cache.safetensors"
        storage.save(state, path, model="small")
        return lambda: storage.restore(state, path, model="small")

    def _allocation(self):
        path = self.folder / "bits.json"
        path.write_text('{"keys": [4, 3, 3], "values": [2, 3, 8], "code": "trellis"}')

        return lambda: settings.allocation(path)


def _byte_fallback() -> Tokenizer:
    """As of Llama 2, its vocabulary small."""
    words = [f"<0x{i:02X}>" for i in range(256)] + ["▁", "a", "▁a", "é", "b", "▁ab", "ab"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *words])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<unk>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def _use(path: Path) -> None:
    """Everything between a path and the ids that go into the decoder, and back."""
    tokenizer = load(path).tokenizer
    ids = tokenizer.encode("ab é 東 <tool> 12\n")
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat(CHAT)


def worker(kind: str, first: int, last: int, journal: Path) -> None:
    """Read cases first to last - 1, the journal always naming the one that is being read."""
    counts: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = Kind(kind, Path(folder))
        for seed in range(first, last):
            _note(journal, seed, counts)
            outcome = files.outcome(seed)
            counts[outcome.split(":")[0]] += 1
            if outcome not in ("loaded", "refused"):
                print(f"{kind} {seed} {outcome}", flush=True)
    _note(journal, last, counts)


def _note(journal: Path, reached: int, counts: collections.Counter) -> None:
    """Whole, whenever it is read."""
    new = journal.with_suffix(".new")
    new.write_text(json.dumps([reached, counts]))
    new.replace(journal)


def watched(kind: str, count: int, patience: float = 60) -> collections.Counter:
    """Outcomes of `count` cases; a case that ends the process or its patience is one of them."""
    total: collections.Counter = collections.Counter()
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        while first < count:
            journal.unlink(missing_ok=True)
            call = [sys.executable, "-m", "tests.damaged", kind, str(first), str(count), journal]
            process = subprocess.Popen(call)
            seen, since, hung = "", time.monotonic(), False
            while process.poll() is None and not hung:
                time.sleep(0.5)
                said = journal.read_text() if journal.exists() else ""
                if said != seen:
                    seen, since = said, time.monotonic()
                hung = bool(seen) and time.monotonic() - since > patience
            process.kill()
            process.wait()
            if not journal.exists():
                raise RuntimeError(f"{kind}: no case was read")
            first, counts = json.loads(journal.read_text())
            total.update(counts)
            if first < count:
                how = "took too long" if hung else "ended the process"
                print(f"{kind} {first} {how}", flush=True)
                total[how] += 1
                first += 1
    return total


if __name__ == "__main__":
    if sys.argv[1] in KINDS:
        worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        for each in KINDS:
            print(each, dict(watched(each, int(sys.argv[1]))), flush=True)
