"""Train the text tokenizer: a SentencePiece model of the captions and transcripts of shards, and of the prompts.

    python tools/train_sentencepiece.py --shards "data/train/*.tar" --out data/text.model
    python tools/train_sentencepiece.py --config run.yaml --vocab-size 32000    # a run's data.sources, data.text_model

The model is unigram with byte fallback, so it can write any text; white space is kept as it is and digits stand alone.
The same text gives the same model.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.load import load_config
from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.captions import captions
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.sources.records import open_records
from megatron_gemini.data.sources.schema import Schema
from megatron_gemini.modalities.bad_sample import BadSample, DataUnreachable, guarded
from megatron_gemini.modalities.text.preprocess import check_text
from megatron_gemini.registry import TASKS

BYTES = 256  # pieces that byte fallback takes, beside the one for unknown
SMALL, LARGE = 512, 131_072  # least and most pieces of the default size: the first is what a toy needs
WORDS_A_PIECE = 4  # different words of the text for each piece of the default size
LONGEST_LINE = 4000  # bytes; SentencePiece ignores longer ones


@dataclass(frozen=True)
class Corpus:
    """What to read, each set of shards once, and the prompts that are asked of it."""

    sources: list[SourceConfig]
    prompts: list[str]


def corpus_of(patterns: Sequence[str], config_path: str | None) -> tuple[Corpus, str]:
    """What to read, and the model file that the config names ("" without one)."""
    if config_path is None:
        prompts = [prompt for task in TASKS.entries() for prompt in task.prompts]
        return Corpus([SourceConfig(shards=p) for p in dict.fromkeys(patterns)], list(dict.fromkeys(prompts))), ""
    data = load_config(["--config", config_path]).data
    if not data.sources:
        raise ValueError(f"{config_path} has no data.sources to train on")
    sources = list({(source.shards, str(source.fields)): source for source in data.sources}.values())
    prompts = [prompt for source in data.sources for prompt in source.prompts or TASKS.get(source.task).prompts]
    return Corpus(sources, list(dict.fromkeys(prompts))), data.text_model


def lines(corpus: Corpus, limit: int, skipped: Counter[str]) -> Iterator[str]:
    """Texts of about `limit` samples, evenly spaced, each followed by the next prompt, with the text filled in."""
    opened = [(open_records(source, wanted(source)), source) for source in corpus.sources]
    step = -(-sum(len(records) for records, _ in opened) // limit)
    prompts = itertools.cycle(corpus.prompts or ["{text}"])
    for records, source in opened:
        for sample in range(0, len(records), step):
            try:
                with guarded("read", records.key(sample)):
                    members = records.read(sample, wanted(source))
                    texts = [check_text(text) for text in sample_texts(source, members)]
            except BadSample as error:
                skipped[error.reason] += 1
                continue
            for text in texts:
                yield from split_lines(text)
                yield from split_lines(next(prompts).replace("{text}", text))


def wanted(source: SourceConfig) -> list[str]:
    """The members or columns that may hold text."""
    schema = Schema.of(source)
    described = [field.name for field in schema.task.own_fields if field.keys]
    if not described:
        return list(dict.fromkeys([*schema.members(TEXT), RECORD]))
    return schema.members(*(name for name in schema.task.field_names if name == TEXT or name in described))


def sample_texts(source: SourceConfig, members: Mapping[str, bytes]) -> list[str]:
    """The texts of the documents or conversations that the task reads; for another task, the caption or transcript.

    Beside captions, shards may hold descriptions of documents, which are told by their keys: whoever names shards alone
    does not say what is in them.
    """
    schema = Schema.of(source)
    described = [field for field in schema.task.own_fields if field.keys]
    texts = []
    if not described or TEXT in schema.task.field_names:
        texts += captions(schema.find(TEXT, members))
    for field in described:
        texts += [text for _, content in schema.find(field.name, members) for text in field.texts(content)]
    if not described and RECORD in members:
        description = decode_json(members[RECORD])
        keys = set(description) if isinstance(description, dict) else set()
        for field in (field for task in TASKS.entries() for field in task.own_fields if keys & set(field.keys)):
            texts += field.texts(members[RECORD])
    return texts


def split_lines(text: str) -> Iterator[str]:
    """Lines that SentencePiece accepts: not empty, not too long."""
    for line in text.replace("\0", " ").splitlines():
        for begin in range(0, len(line), LONGEST_LINE // 4):  # a character has at most 4 bytes
            yield line[begin : begin + LONGEST_LINE // 4]


def train(texts: Iterator[str], size: int, exact: bool, coverage: float) -> bytes:
    """The model file. Raises ValueError when `exact` and the text gives fewer pieces than `size`, saying how many."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=exact,
            byte_fallback=True,
            character_coverage=coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # sums of several threads come in any order, and with them the last bit
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(explain(str(error), size)) from None
    return model.getvalue()


def usual_size(texts: Sequence[str]) -> int:
    """Pieces for so much text: a quarter of its different words, as a power of two, and room for its characters.

    The number of words grows as the root of the text does: a megabyte of English gives 2,048, and 100 give 32,768.
    """
    words, characters = {word for text in texts for word in text.split()}, len(set().union(*texts))
    size = 1 << max(len(words) // WORDS_A_PIECE, 1).bit_length() - 1
    # Every character has a piece of its own, beside the bytes; without as many again no words would be learned.
    least = 1 << (BYTES + 2 * characters).bit_length()
    return max(SMALL, least, min(size, LARGE))


def explain(error: str, size: int) -> str:
    """SentencePiece's words, as what a user can do."""
    largest = re.search(r"too high.*?<= *(\d+)", error)
    if largest:
        return f"--vocab-size is {size}, and this text gives at most {largest[1]} pieces; choose {largest[1]} or fewer"
    smallest = re.search(r"smaller than required_chars\. *\d+ vs (\d+)", error)
    if smallest:
        return f"--vocab-size is {size}, and the text's characters alone take {smallest[1]}; choose more"
    return f"SentencePiece cannot train on this text: {error}"


def run(given: argparse.Namespace) -> None:
    """Read, train, write."""
    if given.vocab_size is not None and not BYTES < given.vocab_size <= 1_000_000:
        raise ValueError(f"--vocab-size is {given.vocab_size}; it must be from {BYTES + 1} to 1000000")
    if given.samples < 1:
        raise ValueError(f"--samples is {given.samples}; it must be 1 or more")
    if not 0.98 <= given.character_coverage <= 1:
        raise ValueError(f"--character-coverage is {given.character_coverage}; choose 0.98 to 1")
    corpus, named = corpus_of(given.shards or (), given.config)
    out = Path(given.out or named)
    if not given.out and not named:
        raise ValueError("give --out FILE, or a --config with data.text_model")
    skipped: Counter[str] = Counter()
    texts = list(lines(corpus, given.samples, skipped))
    if not texts:
        raise ValueError(
            f"there is no text in {', '.join(source.shards for source in corpus.sources)}: {dict(skipped)}"
        )
    size = given.vocab_size or usual_size(texts)
    model = train(iter(texts), size, given.vocab_size is not None, given.character_coverage)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_bytes(model)
    os.replace(partial, out)
    made = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    usual = "" if given.vocab_size else f" (at most {size} for so much text; --vocab-size N gives another number)"
    skipped_note = f"; skipped {dict(skipped)}" if skipped else ""
    print(f"{out}: {made} pieces{usual} from {len(texts)} lines of {len(corpus.sources)} sets of shards{skipped_note}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", nargs="+", metavar="PATTERN", help="tars to read; quote globs and {000..015}")
    source.add_argument("--config", metavar="FILE", help="run config whose data.sources are read")
    parser.add_argument("--out", metavar="FILE", help="the model (default: data.text_model of the config)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"exact number of pieces, {BYTES} of them bytes (default: by the number of different words, {SMALL} to "
        f"{LARGE}, or fewer where the text gives no more)",
    )
    parser.add_argument(
        "--samples", type=int, default=1_000_000, metavar="N", help="most samples to read (default: %(default)s)"
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the text's characters that get a piece; the rest are bytes (default: %(default)s; 0.9995 for Chinese)",
    )
    given = parser.parse_args(argv)
    try:
        run(given)
    except (ValueError, OSError, DataUnreachable) as error:
        print(f"train_sentencepiece: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
