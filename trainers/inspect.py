"""`draftsmith inspect`: the tokens that a run would train on, before it trains on them.

For a few samples: which tokens are labels and which are only context, which token predicts which label, where documents
begin; and whether texts and conversations come back unchanged from tokens (exit code 1 if one does not).
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftsmith.data.batches import PADDING, TokenBatch
from draftsmith.data.chat import encode_chat, render
from draftsmith.data.corpus import CorpusConfig, read_documents
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.data.tokenizer import decode, encode_texts
from draftsmith.inference.commands._args import parser
from draftsmith.inference.errors import InvalidValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_STYLES = {"label": "green", "context": "yellow", "padding": "bright_black", "boundary": "bold magenta"}
_EXAMPLE = """draftsmith inspect -c lm/debug --n 2
draftsmith inspect --text chats.jsonl --field messages --tokenizer runs/demo/exports/target"""


@dataclass(frozen=True)
class TokenView:
    """One position of a sample."""

    t: int
    id: int
    text: str  # of this token alone; a part of a character shows as U+FFFD
    kind: str  # "label": predicted by t - 1; "context": seen, not learned; "padding"
    document: int  # number within the sample, -1: padding
    position: int  # what the network is told


@dataclass(frozen=True)
class RoundTrip:
    """Whether one document comes back from its tokens."""

    source: str
    kind: str  # "chat": template -> tokens -> text; "text"
    equal: bool
    expected: str  # around the first difference; "" when equal
    got: str


def main(argv: list[str]) -> int:
    made = parser(
        "inspect", "Show the tokens, labels and documents that a run would train on, and check round trips.", _EXAMPLE
    )
    made.add_argument(
        "-c", "--config", metavar="CONFIG", help="a training config: a file, or a shipped name (lm/debug)"
    )
    made.add_argument(
        "--text", metavar="FILE", help="instead of a config: a corpus source (file, folder, glob, stdlib)"
    )
    made.add_argument("--tokenizer", metavar="DIR", help="with --text: a tokenizer directory, or bpe:N")
    made.add_argument("--field", default="text", help="with --text: key of the text or messages (default: text)")
    made.add_argument("--chat-template", default="", help='with --text: a Jinja file, or "simple"')
    made.add_argument("--length", type=int, default=128, help="with --text: tokens per sample (default: 128)")
    made.add_argument("--separate", action="store_true", help="with --text: keep documents apart")
    made.add_argument("--n", type=int, default=3, help="samples, and documents for the round trip (default: 3)")
    made.add_argument(
        "--rows", type=int, default=12, help="rows of the shift table, from the first label on; 0: all (default: 12)"
    )
    made.add_argument("--json", action="store_true", help="print everything as JSON")
    given = made.parse_args(argv)
    if (given.config is None) == (given.text is None):
        raise InvalidValue("give either -c CONFIG or --text FILE; see 'draftsmith inspect --help'")
    if given.n < 1 or given.rows < 0:
        raise InvalidValue(f"--n must be at least 1 and --rows at least 0, got {given.n} and {given.rows}")
    if given.text is not None and given.tokenizer is None:
        raise InvalidValue("--text needs --tokenizer DIR (or bpe:N to train one on that text)")
    with tempfile.TemporaryDirectory() as cache:
        data = _from_config(given.config) if given.config is not None else _from_text(given, cache)
        print("preparing the data", file=sys.stderr)
        data.prepare_data()
        data.setup("fit")
        samples = [view_sample(batch, row, data.tokenizer) for batch, row in _rows(data, given.n)]
        trips = round_trips(data, given.n)
        if given.json:
            _print_json(data, samples, trips)
        else:
            _print(data, samples, trips, given.rows)
    return 0 if all(trip.equal for trip in trips) else 1


def view_sample(batch: TokenBatch, row: int, tokenizer: "PreTrainedTokenizerFast") -> list[TokenView]:
    """One row of a batch, position by position."""
    columns = (batch.ids[row], batch.loss_mask[row], batch.document[row], batch.positions()[row])
    return [
        TokenView(
            t,
            token,
            decode(tokenizer, [token]),
            "padding" if document == PADDING else "label" if label else "context",
            document,
            position if batch.separate else t,
        )
        for t, (token, label, document, position) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]


def round_trips(data: TextDataModule, count: int) -> list[RoundTrip]:
    """text -> tokens -> text of the first `count` documents; of conversations, the rendered template's text."""
    tokenizer = data.tokenizer
    trips = []
    for document in islice(read_documents(data.corpus, data.text.streaming), count):
        if document.messages:
            kind, expected = "chat", render(tokenizer, document.messages)
            got = decode(tokenizer, encode_chat(tokenizer, document.messages).ids)
        else:
            kind, expected = "text", document.text
            got = decode(tokenizer, encode_texts(tokenizer, [document.text])[0])
        same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), len(got))
        equal = expected == got
        around = slice(max(0, same - 20), same + 20)
        trips.append(
            RoundTrip(document.source, kind, equal, "" if equal else expected[around], "" if equal else got[around])
        )
    return trips


def _from_config(config: str) -> TextDataModule:
    from draftsmith.trainers.cli import data_from_config

    data = data_from_config(config)
    if not isinstance(data, TextDataModule):
        raise InvalidValue(
            f"inspect shows packed text (TextDataModule); the data of {config!r} are {type(data).__name__}: "
            "give the text itself with --text and --tokenizer"
        )
    return data


def _from_text(given: "object", cache: str) -> TextDataModule:
    a = vars(given)
    corpus = CorpusConfig((a["text"],), field=a["field"], dedup=None, val_fraction=0.0)
    text = TextConfig(
        a["tokenizer"],
        length=a["length"],
        batch_size=1,
        separate_documents=a["separate"],
        chat_template=a["chat_template"],
        shuffle=False,
        cache_dir=cache,
    )
    return TextDataModule(corpus, text)


def _rows(data: TextDataModule, count: int) -> Iterator[tuple[TokenBatch, int]]:
    for batch in data.train_dataloader():
        assert isinstance(batch, TokenBatch)
        for row in range(min(count, batch.ids.shape[0])):
            yield batch, row
            count -= 1
        if count == 0:
            return


# --- printing ---


def _print_json(data: TextDataModule, samples: list[list[TokenView]], trips: list[RoundTrip]) -> None:
    result = {
        "vocab_size": data.vocab_size,
        "data": data.summary(),
        "samples": [[asdict(v) for v in views] for views in samples],
        "round_trips": [asdict(trip) for trip in trips],
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))


def _print(data: TextDataModule, samples: list[list[TokenView]], trips: list[RoundTrip], rows: int) -> None:
    # NO_COLOR (no-color.org) asks for no escape codes at all; rich alone would still print bold and dim
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False, markup=False)
    plain = console.color_system is None
    console.print(data.summary(), soft_wrap=True)
    legend = Text.assemble(
        ("label", _STYLES["label"]), ", ", ("<context, not learned>" if plain else "context", _STYLES["context"]), ", ",
        ("padding", _STYLES["padding"]), ", ", ("‖ a document begins", _STYLES["boundary"]),
    )  # fmt: skip
    console.print(legend)
    for number, views in enumerate(samples):
        labels = sum(v.kind == "label" for v in views)
        padded = sum(v.kind == "padding" for v in views)
        console.print(f"\nsample {number}: {len(views)} tokens, {labels} labels, {padded} padding", style="bold")
        console.print(_colored(views, data, plain), soft_wrap=True)
        console.print(_shift_table(views, rows))
    console.print("\nround trips", style="bold")
    for trip in trips:
        if trip.equal:
            console.print(f"  equal      {trip.kind}  {trip.source}", soft_wrap=True)
        else:
            console.print(f"  DIFFERENT  {trip.kind}  {trip.source}", style="red", soft_wrap=True)
            console.print(
                f"             expected ...{trip.expected!r}\n             got      ...{trip.got!r}", soft_wrap=True
            )


def _colored(views: list[TokenView], data: TextDataModule, plain: bool) -> Text:
    """The sample's text, runs of one kind decoded together so that characters of several tokens stay whole."""
    text = Text()
    start = 0
    for end in range(1, len(views) + 1):
        first = views[start]
        if end < len(views) and (views[end].kind, views[end].document) == (first.kind, first.document):
            continue
        if start and first.document != views[start - 1].document and first.kind != "padding":
            text.append("‖", _STYLES["boundary"])
        run = f"({end - start} padding)" if first.kind == "padding" else decode(
            data.tokenizer, [v.id for v in views[start:end]]
        )  # fmt: skip
        text.append(f"<{run}>" if plain and first.kind == "context" else run, _STYLES[first.kind])
        start = end
    return text


def _shift_table(views: list[TokenView], rows: int) -> Table:
    table = Table("t", "document", "position", "token", "predicts", box=None, pad_edge=False, header_style="bold")
    first_label = next((v.t for v in views if v.kind == "label"), 0)
    start = max(0, first_label - 4) if rows else 0
    for v in views[start : start + rows if rows else None]:
        following = views[v.t + 1] if v.t + 1 < len(views) else None
        label = repr(following.text) if following and following.kind == "label" else "-"
        cells = (str(v.t), str(v.document), str(v.position), repr(v.text), label)
        table.add_row(*(Text(cell, _STYLES[v.kind] if i == 3 else "") for i, cell in enumerate(cells)))
    return table
