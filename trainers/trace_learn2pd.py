"""`draftsmith trace learn2pd`: oracle traces of a masked diffusion model, from which a commit filter is trained."""

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from draftsmith.data import segments
from draftsmith.data.answers import claim, read_questions
from draftsmith.data.decode_traces import SETTINGS, whole_answers, write_traces
from draftsmith.inference import registry
from draftsmith.inference.canvas import CanvasRequest
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.loader import load
from draftsmith.inference.manifest import DTYPES
from draftsmith.inference.nets.masked_lm import MaskedLM
from draftsmith.trainers.trace import add_shares, shares

DECODER = "parallel_diffusion"


def _parser() -> CommandParser:
    made = parser(
        "trace learn2pd",
        "Record what a masked diffusion model predicts in the passes of its own oracle decode, and which of it is "
        "final. Run again, the same command goes on where it was stopped.",
        """draftsmith trace learn2pd exports/segments traces --segments 900
        draftsmith trace learn2pd exports/diffusion traces --prompts prompts.jsonl --answer-length 128
        srun --ntasks 4 draftsmith trace learn2pd exports/diffusion traces --prompts prompts.jsonl --device cuda""",
    )
    made.add_argument("base", metavar="BASE", type=Path, help="export of the masked diffusion model")
    made.add_argument("out", metavar="OUT", type=Path, help="directory; each rank writes shards of its own there")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", type=Path, nargs="+", help="JSONL, as for trace answers")
    source.add_argument("--segments", metavar="N", type=int, help="so many fresh prompts of the segments task")
    made.add_argument("--answer-length", type=int, metavar="G", help="holes behind a prompt (default: 24 of segments)")
    made.add_argument("--block-length", type=int, metavar="BL", help="default: as the base's manifest says")
    made.add_argument("--batch", type=int, default=64, metavar="B", help="prompts of a shard (default: 64)")
    made.add_argument(
        "--explored", type=int, default=1, metavar="N",
        help="further runs over each prompt in which only a part of what is final is committed: what a careful filter "
        "will meet (default: 1; 0: the oracle alone, as published)",
    )  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="of the segments task (default: 0)")
    made.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as the weights are stored)")
    made.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    add_shares(made)
    return made


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    rank, ranks = shares(given.rank, given.ranks)
    base = load(given.base, dtype=given.dtype, device=given.device)
    net: Any = base.part
    if not isinstance(net, MaskedLM):
        raise InvalidType(f"{given.base} is of kind {base.kind!r}: filters are trained for a masked diffusion model")
    stated = {} if base.manifest is None else base.manifest.couplings.decode_defaults
    block_length = given.block_length or stated.get("block_length", 32)
    if given.batch < 1 or block_length < 1 or given.explored < 0:
        raise InvalidValue(
            f"--batch and --block-length must be at least 1 and --explored at least 0, got {given.batch}, "
            f"{block_length} and {given.explored}"
        )
    requests = _requests(given, base, net)
    settings = {
        "base": str(given.base.absolute()),
        "fingerprint": target_fingerprint(base.path),
        "vocab_size": net.config.vocab_size,
        "block_length": block_length,
        "prompts": hashlib.sha256(json.dumps([list(r.tokens) for r in requests]).encode()).hexdigest(),
        "count": len(requests),
        "decode": {"block_length": block_length, "temperature": 0.0, "rule": "low_confidence"},
        "ranks": ranks,
        "batch": given.batch,
        "explored": given.explored,
    }
    claim(given.out, settings, name=SETTINGS)
    standard = {"rule": "low_confidence", "block_length": block_length, "eot": "none"}  # all holes, to the end
    decoder = registry.build_canvas(DECODER, {"target": net}, settings=standard)
    for done in write_traces(
        net,
        requests,
        given.out,
        partial(whole_answers, decoder),
        block_length=block_length,
        batch=given.batch,
        explored=given.explored,
        rank=rank,
        ranks=ranks,
    ):
        print(f"rank {rank} of {ranks}: {done}", file=sys.stderr)
    return 0


def _requests(given: Any, base: Any, net: MaskedLM) -> Sequence[CanvasRequest]:
    """The canvases to be traced, numbered. Raises InvalidValue for prompts that leave no room."""
    if given.segments is not None:
        if given.segments < 1:
            raise InvalidValue(f"--segments must be at least 1, got {given.segments}")
        length = given.answer_length or 24
        # far from where training runs take theirs
        return segments.requests(given.segments, answer_length=length, seed=given.seed, start=1 << 39, part="train")
    if base.tokenizer is None:
        raise InvalidValue(f"{given.base} has no tokenizer: prompts are text")
    answer = given.answer_length
    if answer is None or answer < 1:
        raise InvalidValue("--prompts wants --answer-length G: how many holes stand behind a prompt")
    questions = read_questions(given.prompts, base.tokenizer)
    room = net.config.max_length - answer
    kept = [question for question in questions if len(question.ids) <= room]
    if not kept:
        raise InvalidValue(
            f"no prompt leaves room for {answer} tokens in a canvas of {net.config.max_length}: lower --answer-length"
        )
    if len(kept) < len(questions):
        print(f"{len(questions) - len(kept)} prompts are longer than {room} tokens and left out", file=sys.stderr)
    mask = [net.config.mask_id] * answer
    return [
        CanvasRequest(
            [*q.ids, *mask], range(len(q.ids), len(q.ids) + answer), row_id=q.number, stop_ids=net.config.end_ids
        )
        for q in kept
    ]
