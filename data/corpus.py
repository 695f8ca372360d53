"""Where text comes from: documents out of the standard library, files, JSONL, Parquet and Hugging Face data sets.

A source is a string, `[TAG=]WHAT`, where WHAT is one of
  stdlib:code                    Python's own library, docstrings taken out (no download needed)
  stdlib:prose                   its docstrings, module by module, and the pydoc topics
  stdlib                         both
  PATH                           a file, a folder (recursive) or a glob; by suffix .jsonl, .parquet, else plain text
  DIR of `Dataset.save_to_disk`  a local Hugging Face data set
  hf:NAME[:CONFIG][@SPLIT]       a Hugging Face data set by name (the only form that may use the network)
  log:PATH                       a server's request log (JSON lines, see log_lines.py): prompts and their answers
Near-duplicates are dropped, then whole groups (packages, files, or the rows' `group_field`) go either to training or to
validation.
"""

import ast
import glob
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftsmith.data.log_lines import UnusableLine, parse_line
from draftsmith.data.near_duplicates import near_duplicates
from draftsmith.inference.errors import InvalidValue, MissingExtra, unknown_choice

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")  # what a folder is searched for
PIECE = 1 << 16  # characters after which a long text file is cut, at the next blank line
_STDLIB_SKIP_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_STDLIB_SKIP = ("encodings", "pydoc_data", "_sysconfigdata")  # tables rather than code; the topics are taken as prose
_MIN_DOCSTRING = 40  # characters


@dataclass(frozen=True)
class Document:
    """One text, or one conversation."""

    text: str  # of a conversation: its contents joined, for duplicate search only
    source: str  # file (and line) or data set it came from
    group: str  # package, file or record: never divided between training and validation
    tag: str = ""  # domain; statistics are split by it
    messages: tuple[Mapping[str, str], ...] = ()  # role and content of each turn; empty for plain text
    ids: tuple[int, ...] = ()  # the tokens that a server logged; taken instead of the text's
    prompt_ids: int = 0  # so many of them are the prompt


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents, and how they are divided."""

    sources: tuple[str, ...] = ("stdlib",)
    field: str = "text"  # key of the text in JSONL, Parquet and data set rows; a list of messages there makes it chat
    prompt_field: str = ""  # with answer_field: each row is a question and its answer (chat of two turns)
    answer_field: str = ""
    group_field: str = ""  # key of the rows' group; empty: every row is its own group
    tag_field: str = ""  # key of the rows' tag; empty: the source's TAG
    dedup: float | None = 0.8  # Jaccard index of word 5-shingles from which a document is dropped; null keeps all
    val_fraction: float = 0.05  # share of GROUPS that goes to validation
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise InvalidValue("corpus.sources is empty: name at least one, for example stdlib or a path")
        if not 0 <= self.val_fraction < 1:
            raise InvalidValue(f"corpus.val_fraction must lie in [0, 1), got {self.val_fraction}")
        if bool(self.prompt_field) != bool(self.answer_field):
            raise InvalidValue("corpus.prompt_field and corpus.answer_field go together: set both or neither")
        if self.dedup is not None and not 0 < self.dedup <= 1:
            raise InvalidValue(f"corpus.dedup must lie in (0, 1], got {self.dedup}: use null to keep near-duplicates")


@dataclass(frozen=True)
class Corpus:
    """Documents divided by group; `duplicates` counts what near-duplicate removal dropped."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    read: int
    duplicates: int

    def summary(self) -> str:
        """One line for the log."""
        groups = {d.group for d in (*self.train, *self.val)}
        return (
            f"{self.read} documents read, {self.duplicates} near-duplicates dropped, {len(self.train)} for training "
            f"and {len(self.val)} for validation ({len(groups)} groups)"
        )


def load_corpus(config: CorpusConfig) -> Corpus:
    """Read everything into memory, drop near-duplicates, divide by group.

    Raises InvalidValue for an unreadable or empty source, and when the split leaves a side empty although asked for.
    """
    documents = list(read_documents(config))
    kept = documents
    if config.dedup is not None:
        verdict = near_duplicates([d.text for d in documents], config.dedup)
        kept = [d for d, twin in zip(documents, verdict, strict=True) if twin < 0]
    train, val = _divide(kept, config)
    return Corpus(tuple(train), tuple(val), len(documents), len(documents) - len(kept))


def is_validation(group: str, config: CorpusConfig) -> bool:
    """Whether a group belongs to validation: by a hash of its name and the seed, whatever other data there is."""
    return _split_hash(group, config.split_seed) < config.val_fraction


def _split_hash(group: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _divide(documents: list[Document], config: CorpusConfig) -> tuple[list[Document], list[Document]]:
    if config.val_fraction == 0:
        return documents, []
    groups = sorted({d.group for d in documents}, key=lambda g: _split_hash(g, config.split_seed))
    chosen = {g for g in groups if is_validation(g, config)}
    if not chosen:
        chosen = {groups[0]}  # a handful of groups: the first by hash, so that there is something to validate on
    if len(chosen) == len(groups):
        raise InvalidValue(
            f"all {len(groups)} groups of the corpus fall to validation (val_fraction={config.val_fraction}): "
            "lower corpus.val_fraction (0 for none), add sources, or set corpus.group_field"
        )
    return [d for d in documents if d.group not in chosen], [d for d in documents if d.group in chosen]


def read_documents(config: CorpusConfig, streaming: bool = False) -> Iterator[Document]:
    """All documents of all sources, in a fixed order, lazily; blank ones are left out.

    streaming: read Hugging Face data sets row by row instead of preparing them on disk.
    Raises InvalidValue when a source cannot be read or nothing is left.
    """
    empty = True
    for spec in config.sources:
        tag, what = _parse(spec)
        if what == "stdlib" or what.startswith("stdlib:"):
            documents = _stdlib(what.removeprefix("stdlib").removeprefix(":"), tag)
        elif what.startswith("hf:") or _is_saved_dataset(Path(what)):
            documents = _rows_to_documents(_dataset_rows(what, streaming), what, tag, config)
        elif what.startswith("log:"):
            documents = _logged(what.removeprefix("log:"), tag)
        else:
            documents = _files(what, tag, config)
        for document in documents:
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise InvalidValue(f"the corpus is empty: no text in {', '.join(config.sources)}")


def signature(config: CorpusConfig) -> str:
    """A short key of what `read_documents` would read, from names, sizes and times of files (contents are not read)."""
    parts: list[object] = [asdict(config)]
    for spec in config.sources:
        _, what = _parse(spec)
        if what.startswith("stdlib"):
            parts.append(["stdlib", sys.version])
        elif what.startswith("hf:"):
            parts.append(what)
        elif _is_saved_dataset(Path(what)):
            parts.extend([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(Path(what).rglob("*")))
        else:
            files = _expand(what.removeprefix("log:"))
            parts.extend([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digest(documents: Iterable[Document]) -> str:
    """sha256 over the documents' contents, in order: the data fingerprint of the provenance."""
    total = hashlib.sha256()
    for d in documents:
        served = [d.ids, d.prompt_ids] if d.ids else []  # other documents keep the fingerprint that they always had
        content = json.dumps([d.text, d.tag, [dict(m) for m in d.messages], *served], ensure_ascii=True)
        total.update(hashlib.sha256(content.encode()).digest())
    return total.hexdigest()


def _parse(spec: str) -> tuple[str, str]:
    tagged = None if Path(spec).exists() else re.match(r"([\w-]+)=(.+)", spec, re.DOTALL)
    tag, what = (tagged[1], tagged[2]) if tagged else ("", spec)
    if what.startswith("stdlib:") and what not in ("stdlib:code", "stdlib:prose"):
        raise unknown_choice("corpus source", what, ("stdlib", "stdlib:code", "stdlib:prose"))
    return tag, what


# --- the standard library -------------------------------------------------------------------------------------------


def _stdlib(domain: str, tag: str) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    want_code, want_prose = domain in ("", "code"), domain in ("", "prose")
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if _STDLIB_SKIP_DIRS & set(parts[:-1]) or parts[0].startswith(_STDLIB_SKIP):
            continue
        group, name = parts[0].removesuffix(".py"), "/".join(parts)
        divided = _code_and_prose(path)
        if divided is None:
            continue
        code, prose = divided
        if want_code:
            yield Document(code, f"stdlib/{name}", group, tag or "code")
        if want_prose:
            yield Document(prose, f"stdlib/{name}:docstrings", group, tag or "prose")
    topics = root / "pydoc_data" / "topics.py"
    if want_prose and topics.is_file():
        for name, text in _pydoc_topics(topics).items():
            yield Document(text, f"stdlib/pydoc_data/topics:{name}", f"topics.{name}", tag or "prose")


def _code_and_prose(path: Path) -> tuple[str, str] | None:
    """(the file without its docstrings, its docstrings); None for files that are not Python in UTF-8."""
    try:
        source = path.read_bytes().decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in sources that are not ours
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):
        return None
    lines = source.splitlines(keepends=True)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        if not isinstance(first.value.value, str) or first.end_lineno is None or first.end_col_offset is None:
            continue
        found.append((first.lineno, inspect.cleandoc(first.value.value)))
        before = lines[first.lineno - 1].encode()[: first.col_offset]
        after = lines[first.end_lineno - 1].encode()[first.end_col_offset :]
        if not before.strip() and not after.strip():  # the string has its lines to itself
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
            if len(node.body) == 1 and not isinstance(node, ast.Module):
                lines[first.lineno - 1] = before.decode() + "pass\n"
    prose = [text for _, text in sorted(found) if len(text) >= _MIN_DOCSTRING]
    return "".join(lines).lstrip("\n"), "\n\n".join(prose)


def _pydoc_topics(path: Path) -> dict[str, str]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(sorted(ast.literal_eval(node.value).items()))
    return {}


# --- files ----------------------------------------------------------------------------------------------------------


def _expand(what: str) -> list[Path]:
    path = Path(what).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not found:
            raise InvalidValue(
                f"no text in folder {what!r}: looked for {', '.join(TEXT_SUFFIXES)}; give a glob for others"
            )
        return found
    if path.exists():
        return [path]
    found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise InvalidValue(f"no such file, folder or pattern: {what!r} (a Hugging Face data set is written hf:{what})")
    return found


def _files(what: str, tag: str, config: CorpusConfig) -> Iterator[Document]:
    paths = _expand(what)
    for path in paths:
        try:
            if path.suffix == ".jsonl":
                yield from _rows_to_documents(_json_lines(path), str(path), tag, config)
            elif path.suffix == ".parquet":
                yield from _rows_to_documents(_parquet_rows(path), str(path), tag, config)
            else:
                for number, piece in enumerate(_pieces(path)):
                    # a lone file is its own corpus: its pieces are the groups, else there would be nothing to divide
                    group = f"{path}#{number}" if len(paths) == 1 else str(path)
                    yield Document(piece, f"{path}#{number}", group, tag)
        except OSError as e:
            raise InvalidValue(f"cannot read {str(path)!r}: {e.strerror or e}") from e


def _logged(what: str, tag: str) -> Iterator[Document]:
    """One document a served request: its tokens where the log has them, else its text or its chat."""
    for path in _expand(what):
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                found = parse_line(line)
            except UnusableLine as problem:
                raise InvalidValue(f"{where}: {problem}") from problem
            tag_of_it = found.tag if found.tag and not tag else tag
            if found.prompt_ids is not None and found.answer_ids is not None:
                ids = (*found.prompt_ids, *found.answer_ids)
                words = " ".join(map(str, ids))  # for the search of duplicates, whatever texts are there
                yield Document(words, where, where, tag_of_it, ids=ids, prompt_ids=len(found.prompt_ids))
            elif found.answer is None or (found.messages is None and found.prompt is None):
                raise InvalidValue(
                    f"{where}: token ids of only one of prompt and answer, and no text of the other: ask the server "
                    "for both (vLLM: return_token_ids)"
                )
            elif not found.answer:
                continue
            elif found.messages is not None:
                turns = (*found.messages, {"role": "assistant", "content": found.answer})
                yield Document("\n".join(m["content"] for m in turns), where, where, tag_of_it, turns)
            else:
                yield Document(f"{found.prompt}{found.answer}", where, where, tag_of_it)


def _lines(path: Path) -> Iterator[str]:
    """The file's lines with their ends, UTF-8; a byte order mark is dropped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise InvalidValue(
                    f"{path}:{number}: not UTF-8 (byte 0x{line[e.start]:02x} at column {e.start + 1}): convert the "
                    "file, for example with iconv -f LATIN1 -t UTF-8"
                ) from e


def _pieces(path: Path) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        piece.append(line)
        size += len(line)
        if (size >= PIECE and not line.strip()) or size >= 2 * PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InvalidValue(f"{path}:{number}: not JSON ({e.msg} at column {e.colno}): one object per line") from e
        if not isinstance(row, dict):
            raise InvalidValue(f"{path}:{number}: a {type(row).__name__} where an object per line is expected")
        yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise MissingExtra("reading Parquet needs pyarrow: pip install 'draftsmith[train]'") from e
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}#{number}", row
                    number += 1
    except pyarrow.ArrowInvalid as e:
        raise InvalidValue(f"{path} is not a readable Parquet file: {str(e).splitlines()[0]}") from e


# --- rows -----------------------------------------------------------------------------------------------------------


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _dataset_rows(what: str, streaming: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as e:
        raise MissingExtra("Hugging Face data sets need the package datasets: pip install 'draftsmith[train]'") from e
    if not what.startswith("hf:"):
        data = datasets.load_from_disk(what)
        if isinstance(data, datasets.DatasetDict):
            if "train" not in data:
                raise InvalidValue(f"data set {what!r} has no split 'train', only {', '.join(data)}: give one's folder")
            data = data["train"]
        yield from ((f"{what}#{number}", row) for number, row in enumerate(data))
        return
    name, _, split = what.removeprefix("hf:").partition("@")
    name, _, subset = name.partition(":")
    try:
        data = datasets.load_dataset(name, subset or None, split=split or "train", streaming=streaming)
        for number, row in enumerate(data):
            yield f"{what}#{number}", row
    except (OSError, ValueError, RuntimeError) as e:  # no network, unknown name or split, a loading script
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InvalidValue(
            f"cannot load the Hugging Face data set {name!r}: {reason}; without a network give local files"
        ) from e


def _rows_to_documents(
    rows: Iterable[tuple[str, Mapping[str, Any]]], source: str, tag: str, config: CorpusConfig
) -> Iterator[Document]:
    for where, row in rows:
        group = str(_value(row, config.group_field, where)) if config.group_field else where
        row_tag = str(_value(row, config.tag_field, where)) if config.tag_field else tag
        messages: tuple[Mapping[str, str], ...] = ()
        if config.prompt_field:
            question, answer = (_value(row, key, where) for key in (config.prompt_field, config.answer_field))
            messages = _messages(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], where
            )
        else:
            value = _value(row, config.field, where)
            if isinstance(value, list):
                messages = _messages(value, where)
            elif isinstance(value, str):
                yield Document(value, where, group, row_tag)
                continue
            else:
                raise InvalidValue(
                    f"{where}: field {config.field!r} is a {type(value).__name__}; expected text or a list of messages"
                )
        yield Document("\n".join(m["content"] for m in messages), where, group, row_tag, messages)


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise InvalidValue(f"{where}: no field {key!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    return row[key]


def _messages(turns: list[Any], where: str) -> tuple[Mapping[str, str], ...]:
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise InvalidValue(f'{where}: a message must be {{"role": text, "content": text}}, got {str(turn)[:80]}')
    return tuple({"role": t["role"], "content": t["content"]} for t in turns)
