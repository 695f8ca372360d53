"""`draftsmith ngram TARGET SOURCE...`: count a tri-gram table, or order a retrieval store, over a corpus.

Documents are read one after the other, tokenised with the target's tokenizer and never counted across their borders. A
table keeps counts only, so the corpus may be larger than memory; a store keeps the corpus itself. With --samples the
target continues the documents' beginnings and its own outputs are counted, which drafts better than foreign text.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from draftsmith.data.corpus import CorpusConfig, Document, read_documents
from draftsmith.data.token_store import encode_documents
from draftsmith.data.tokenizer import load_tokenizer
from draftsmith.inference import registry
from draftsmith.inference.checkpoint import check_destination
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.couplings import tokenizer_identity
from draftsmith.inference.drafters.rest import RestStore, build_store
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.load_ngram import write_ngram
from draftsmith.inference.loader import LoadedPart, load
from draftsmith.inference.ngram_table import K, NgramTable, TableBuilder
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams

_BATCH = 16


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    for name in ("k", "span", "prompt_length", "sample_length"):
        if getattr(given, name) < 1:
            raise InvalidValue(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    check_destination(given.out, overwrite=given.overwrite)
    identity = tokenizer_identity(given.target)
    if identity is None:
        raise InvalidValue(f"{given.target} has no tokenizer: a table counts the ids of the target's own tokenizer")
    config = CorpusConfig(sources=tuple(given.source), field=given.field, dedup=None)
    documents = read_documents(config, streaming=True)
    description: dict[str, object] = {"sources": list(given.source)}
    if given.samples:
        target = load(given.target)
        vocab_size, texts = target.vocab_size, sampled(target, documents, given.samples, given)
        description |= {"samples": given.samples, "sample_length": given.sample_length, "seed": given.seed}
    else:
        vocab_size, texts = identity.vocab_size, encoded(documents, given.target)
    part = counted(texts, vocab_size, given)
    manifest = write_ngram(
        part,
        given.out,
        tokenizer=identity,
        command=shlex.join(["draftsmith", "ngram", *argv]),
        description=description,
        overwrite=given.overwrite,
    )
    size = sum(entry.bytes for entry in manifest.files.values()) / 2**20
    what = f"{len(part)} keys" if isinstance(part, NgramTable) else f"{len(part.text)} tokens"
    print(f"{given.out}: {manifest.net}, {what}, {size:.1f} MB")
    return 0


def encoded(documents: Iterable[Document], target: Path) -> Iterator[list[int]]:
    """Token ids of each document, one at a time."""
    for document in encode_documents(documents, load_tokenizer(target), add_bos=False, answers_only=False):
        yield document.ids.tolist()


def sampled(target: LoadedPart, documents: Iterable[Document], count: int, given: Namespace) -> Iterator[list[int]]:
    """`count` continuations by the target at T=1, each behind the first tokens of a document, with that prompt."""
    prompt_length, length = given.prompt_length, given.sample_length
    decoder = registry.build(
        "autoregressive",
        {"target": target},
        sampling=SamplingParams(temperature=1.0),
        seed=given.seed,
        vocab_size=target.vocab_size,
    )
    texts = (ids[:prompt_length] for ids in encoded(documents, target.path) if len(ids) >= prompt_length)
    prompts = islice(texts, count)
    done = 0
    while batch := list(islice(prompts, _BATCH)):
        requests = [TokenRequest(ids, length, row_id=done + i, stop_ids=target.stop_ids) for i, ids in enumerate(batch)]
        outputs = decoder.decode(requests).output
        done += len(batch)
        print(f"sampled {done} of {count}", file=sys.stderr)
        for prompt, output in zip(batch, outputs, strict=True):
            yield [*prompt, *output]
    if done == 0:
        raise InvalidValue(f"no document has {prompt_length} tokens to begin a sample with: lower --prompt-length")


def counted(texts: Iterable[list[int]], vocab_size: int, given: Namespace) -> NgramTable | RestStore:
    """The table or the store of token sequences."""
    if given.store:
        if given.bigrams:
            raise InvalidValue("--bigrams counts for a table: leave it out with --store")
        return build_store(list(texts), vocab_size, given.span)
    builder = TableBuilder(vocab_size, given.k, bigrams=given.bigrams)
    for ids in texts:
        builder.add(ids)
    print(f"{builder.documents} documents, {builder.tokens} tokens, {builder.skipped} too short", file=sys.stderr)
    return builder.table()


def _parser() -> CommandParser:
    made = parser(
        "ngram",
        "Build an n-gram table (decoders aded and tree) or a retrieval store (decoder tree) for a target.",
        """draftsmith ngram exports/target stdlib:code --out exports/table
        draftsmith ngram exports/target prompts.jsonl --samples 200 --out exports/own-table
        draftsmith decode exports/target --draft exports/table --decoder aded --prompt "def add(a, b):" """,
    )
    made.add_argument("target", metavar="TARGET", type=Path, help="directory of the target, for its tokenizer")
    made.add_argument("source", metavar="SOURCE", nargs="+", help="stdlib[:code|:prose], file, folder, glob, hf:NAME")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the export")
    made.add_argument("--field", default="text", help="key of the text in JSONL and Parquet rows (default: text)")
    made.add_argument("--k", type=int, default=K, help="most entries a key (default: %(default)s)")
    made.add_argument("--bigrams", action="store_true", help="also count single tokens: what unseen pairs fall back to")
    made.add_argument("--store", action="store_true", help="a retrieval store (suffix array) instead of a table")
    made.add_argument("--span", type=int, default=16, help="longest match of a store (default: %(default)s)")
    made.add_argument(
        "--samples", type=int, default=0, metavar="N", help="count N continuations by the target, not the documents"
    )
    made.add_argument("--prompt-length", type=int, default=8, metavar="N", help="tokens before a sample (default: 8)")
    made.add_argument("--sample-length", type=int, default=64, metavar="N", help="tokens of a sample (default: 64)")
    made.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    made.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    return made
