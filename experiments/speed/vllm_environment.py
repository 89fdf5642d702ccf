"""vLLM for a GPU machine that reaches no package index: gathered in one place, unpacked in another.

    python -m experiments.speed.vllm_environment gather PIECES
    python -m experiments.speed.vllm_environment start PIECES --out ROWS.json

`gather` runs where the index is, under the GPU machine's version of Python: it takes vLLM and what
of its requirements such a machine lacks (one that has torch, transformers and what these bring),
leaves out what offline generation with Triton attention does not load, and zeroes device code of
other architectures, so that it compresses. The result is an xz archive in pieces that can be
carried one at a time.

`start` puts the pieces together, unpacks them into a folder of its own, and generates there with
the engine: a small Llama with random weights, no tokenizer, no network. It says how long each step
took.
"""

import argparse
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

VLLM = "vllm==0.26.0"
"""Of the last line that pins torch 2.11; built for CUDA 13."""

LACKING = Path(__file__).with_name("vllm_lacking.txt").read_text().split()
"""What of its requirements a machine with torch and transformers lacks."""

NOT_LOADED = (
    "vllm/vllm-rs",
    "vllm/_moe_C_stable_libtorch*",
    "vllm/vllm_flash_attn/*.so",
    "vllm/_flashmla*",
    "vllm/_qutlass*",
    "vllm/cumem_allocator*",
    "vllm/third_party/fmha_sm100",
    "vllm/third_party/deep_gemm",
    "vllm/entrypoints/serve/instrumentator/static",
    "pycountry/locales",
    "bin",
)
EXTENSION = "vllm/_C_stable_libtorch.abi3.so"
NAMED_ONLY = "vllm/vllm_flash_attn/_vllm_fa2_C.py"
"""The package raises unless one of its extensions can be imported; its functions are not called."""

TINY = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=1024,
    intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    head_dim=128, vocab_size=32000, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=10000.0, torch_dtype="bfloat16", hidden_act="silu", tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="vLLM for a machine without a package index")
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("gather", help="make the pieces; needs the package index")
    make.add_argument("pieces", type=Path)
    make.add_argument("--mebibytes", type=int, default=50, help="of a piece, at most")
    make.add_argument("--capability", type=int, default=90, help="whose device code is kept")
    make.set_defaults(run=lambda a: gather(a.pieces, a.mebibytes << 20, a.capability))
    run = commands.add_parser("start", help="unpack the pieces and generate")
    run.add_argument("pieces", type=Path)
    run.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "vllm_environment"
    )
    run.add_argument("--out", type=Path, required=True, help="JSON of what was measured")
    run.add_argument("--backend", default="TRITON_ATTN")
    run.set_defaults(run=lambda a: start(a.pieces, a.folder, a.out, a.backend))
    inside = commands.add_parser("generate", help="what `start` runs inside of the environment")
    inside.add_argument("out", type=Path)
    inside.add_argument("backend")
    inside.set_defaults(run=lambda a: generate(a.out, a.backend))
    chosen = parser.parse_args(arguments)
    chosen.run(chosen)


def gather(pieces: Path, size: int, capability: int) -> None:
    """Write the archive's pieces, of at most `size` bytes, into an empty folder."""
    pieces.mkdir(parents=True, exist_ok=True)
    if any(pieces.iterdir()):
        raise ValueError(f"pieces: got {pieces} with files in it, expected an empty folder")
    with tempfile.TemporaryDirectory() as scratch:
        tree, pip = Path(scratch) / "tree", [sys.executable, "-m", "pip"]
        options = ["--no-deps", "--only-binary=:all:", "--quiet"]
        subprocess.run([*pip, "install", *options, "--target", tree, *LACKING], check=True)
        subprocess.run([*pip, "download", *options, "-d", scratch, VLLM], check=True)
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree)
        strip(tree, capability)
        archive_of(tree, pieces, size)


def strip(tree: Path, capability: int) -> None:
    """Leave out of an installation what is not loaded."""
    for pattern in (*NOT_LOADED, "**/__pycache__"):
        for path in list(tree.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    extension = tree / EXTENSION
    extension.write_bytes(without_other_code(extension.read_bytes(), capability))
    (tree / NAMED_ONLY).write_text('"""Names an extension that is not here."""\n')


def without_other_code(binary: bytes, capability: int) -> bytes:
    """A shared object with zeros for the device code of all other architectures; sizes stay.

    A fat binary is a header (magic 0xBA55ED50, version 1, its own size, bytes that follow), then
    entries: kind and version (16 bits each), header size, payload size, and the architecture at
    byte 28.
    """
    data = bytearray(binary)
    for match in re.finditer(re.escape(struct.pack("<IH", 0xBA55ED50, 1)), binary):
        header, size = struct.unpack_from("<HQ", binary, match.start() + 6)
        entry = match.start() + header
        end = entry + size
        if header != 16 or end > len(binary):
            continue  # the magic number by chance
        while entry < end:
            _, _, own, payload = struct.unpack_from("<HHIQ", binary, entry)
            (architecture,) = struct.unpack_from("<I", binary, entry + 28)
            if own == 0 or entry + own + payload > end:
                break
            if architecture != capability:
                data[entry + own : entry + own + payload] = bytes(payload)
            entry += own + payload
    return bytes(data)


def archive_of(tree: Path, pieces: Path, size: int) -> None:
    """The tree as .tar.xz, cut into `piece.00` and so on."""
    whole = pieces / "whole.tar.xz"
    with tarfile.open(whole, "w:xz", preset=3) as archive:
        for path in sorted(tree.iterdir()):
            archive.add(path, path.name)
    with whole.open("rb") as file:
        for number, part in enumerate(iter(lambda: file.read(size), b"")):
            (pieces / f"piece.{number:02d}").write_bytes(part)
    whole.unlink()


def unpack(pieces: Path, folder: Path) -> None:
    """Put the pieces together and unpack them."""
    found = sorted(pieces.glob("piece.*"))
    if not found:
        raise ValueError(f"pieces: got none in {pieces}, expected piece.00 and those after it")
    joined = b"".join(piece.read_bytes() for piece in found)
    with tempfile.TemporaryFile() as file:
        file.write(lzma.decompress(joined))
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(folder, filter="data")


def start(pieces: Path, folder: Path, out: Path, backend: str) -> None:
    """Unpack unless `folder` is there, and generate in a process of its own."""
    begun = time.perf_counter()
    if not folder.exists():
        unpack(pieces, folder)
    unpacked = time.perf_counter() - begun
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | OFFLINE | {"PYTHONPATH": path}
    command = [sys.executable, "-P", __file__, "generate", str(out), backend]
    subprocess.run(command, check=True, env=environment)
    rows = json.loads(out.read_text())
    out.write_text(json.dumps({"unpack_seconds": round(unpacked, 1)} | rows, indent=1) + "\n")


OFFLINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # multicast, which virtual machines may not have
}


def load(model: str, **settings):
    """vLLM's `LLM` of a folder, without tokenizer."""
    import vllm.model_executor.models.registry as registry

    # the model class would be looked at in a process of its own, which costs a second start
    registry._run_in_subprocess = lambda function: function()
    from vllm import LLM

    defaults = dict(skip_tokenizer_init=True, disable_log_stats=True, seed=0)
    return LLM(model=model, **(defaults | settings))


def save_random(folder: Path) -> None:
    """A Llama with random weights that are the same however many devices load it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1024, vocab_size=2048, initializer_range=0.1)
    known = {k: v for k, v in TINY.items() if k not in ("architectures", "model_type")}
    config = LlamaConfig(**(known | sizes | {"torch_dtype": "float32"}))
    LlamaForCausalLM(config).save_pretrained(folder)


def engine(folder: Path, backend: str, **settings):
    """vLLM's `LLM` of the small model, whose configuration goes to `folder`."""
    (folder / "config.json").write_text(json.dumps(TINY))
    defaults = dict(
        load_format="dummy", enforce_eager=True, max_model_len=2048, gpu_memory_utilization=0.3,
        max_num_seqs=16, dtype="bfloat16", attention_config={"backend": backend},
    )  # fmt: skip
    return load(str(folder), **(defaults | settings))


def prompts() -> list[dict]:
    """Eight prompts of 100 to 450 tokens."""
    return [
        {"prompt_token_ids": [(7 * i + 13 * j) % 31000 + 3 for j in range(100 + 50 * i)]}
        for i in range(8)
    ]


def greedy(llm, count: int = 32) -> list[list[int]]:
    """`count` tokens after each prompt."""
    from vllm import SamplingParams

    rule = SamplingParams(max_tokens=count, temperature=0.0, detokenize=False, ignore_eos=True)
    done = llm.generate(prompts(), rule, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done]


def generate(out: Path, backend: str) -> None:
    """Start the engine, generate twice, and write times and tokens."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        llm = engine(Path(folder), backend)
        up = time.perf_counter()
        tokens = greedy(llm)
        first = time.perf_counter()
        again = greedy(llm)
        second = time.perf_counter()
    row = {
        "vllm": VLLM.split("==")[1],
        "backend": backend,
        "start_seconds": round(up - begun, 1),
        "first_seconds": round(first - up, 2),
        "second_seconds": round(second - first, 2),
        "same_again": tokens == again,
        "tokens": tokens,
    }
    out.write_text(json.dumps(row, indent=1) + "\n")
    print({name: value for name, value in row.items() if name != "tokens"}, flush=True)


if __name__ == "__main__":
    main()
