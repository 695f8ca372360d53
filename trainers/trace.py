"""`draftsmith trace answers`: a target answers prompts; the text that drafts should be trained on.

Other kinds of traces have a file and options of their own: `trace_learn2pd`.
"""

import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

from draftsmith.data.answers import answer, claim, digest, read_questions
from draftsmith.inference import registry
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.loader import check_role, load
from draftsmith.inference.manifest import DTYPES
from draftsmith.inference.sampling import SamplingParams

# (rank, ranks) as launchers set them: torchrun, SLURM
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def _parser() -> CommandParser:
    made = parser(
        "trace",
        "Let a target answer prompts (JSON lines). Run again, the same command goes on where it was stopped.",
        """draftsmith trace answers exports/target traced --prompts prompts.jsonl --max-new-tokens 512 --batch 16
        srun --ntasks 4 draftsmith trace answers exports/target traced --prompts prompts.jsonl --device cuda""",
    )
    made.add_argument(
        "what",
        choices=("answers", "learn2pd"),
        help="what is written: the target's answers; learn2pd: a diffusion model's oracle passes (has its own --help)",
    )
    made.add_argument("target", metavar="TARGET", help="export or Hugging Face directory of the target")
    made.add_argument("out", metavar="OUT", type=Path, help="directory; each rank writes a file of its own there")
    made.add_argument("--prompts", metavar="FILE", type=Path, nargs="+", required=True, help="JSONL")
    made.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    made.add_argument(
        "--max-length", type=int, metavar="N", help="of prompt and answer (default: what the target allows)"
    )
    made.add_argument("--batch", type=int, default=8, metavar="B", help="prompts decoded together (default: 8)")
    made.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    for setting in fields(SamplingParams):
        made.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=setting.type if isinstance(setting.type, type) else float,
            default=setting.default,
            metavar="X",
            help=f"{setting.metadata['help'].replace('%', '%%')} (default: {setting.default})",
        )
    made.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as the weights are stored)")
    made.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    made.add_argument("--engine", default="auto", help="auto, native, or hf (adapter over transformers)")
    add_shares(made)
    return made


def add_shares(made: CommandParser) -> None:
    """The options of `shares`."""
    made.add_argument("--rank", type=int, metavar="I", help="this process of --ranks (default: as the launcher says)")
    made.add_argument("--ranks", type=int, metavar="N", help="processes that share the work")


def shares(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """(rank, ranks) as given, else as torchrun or SLURM set them, else (0, 1). Raises InvalidValue for bad ones."""
    if (rank is None) != (ranks is None):
        raise InvalidValue("--rank and --ranks go together: give both or neither")
    if rank is None or ranks is None:
        found = next(((a, b) for a, b in _LAUNCHERS if a in os.environ and b in os.environ), None)
        rank, ranks = (0, 1) if found is None else (int(os.environ[found[0]]), int(os.environ[found[1]]))
    if not 0 <= rank < ranks:
        raise InvalidValue(f"rank must lie in 0..{ranks - 1}, got {rank}")
    return rank, ranks


def main(argv: list[str]) -> int:
    if argv[:1] == ["learn2pd"]:
        from draftsmith.trainers import trace_learn2pd  # which imports this file

        return trace_learn2pd.main(argv[1:])
    given = _parser().parse_args(argv)
    rank, ranks = shares(given.rank, given.ranks)
    if given.batch < 1 or given.max_new_tokens < 1:
        raise InvalidValue(
            f"--batch and --max-new-tokens must be at least 1, got {given.batch}, {given.max_new_tokens}"
        )
    sampling = SamplingParams(**{f.name: getattr(given, f.name) for f in fields(SamplingParams)})
    target = load(given.target, dtype=given.dtype, device=given.device, engine=given.engine)
    check_role(target, "target")
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise InvalidValue(f"{given.target} has no tokenizer: answers are text")
    questions = read_questions(given.prompts, tokenizer)
    limit = min(given.max_length or target.part.spec.max_length, target.part.spec.max_length)
    settings = {
        "target": target_fingerprint(target.path),
        "prompts": digest(questions),
        "sampling": asdict(sampling),
        "seed": given.seed,
        "max_new_tokens": given.max_new_tokens,
        "max_length": limit,
        "ranks": ranks,
    }
    claim(given.out, settings)
    decoder = registry.build(
        "autoregressive",
        {"target": target.part},
        sampling=sampling,
        seed=given.seed,
        tokenizer=tokenizer,
        vocab_size=target.vocab_size,
    )
    for done in answer(
        questions,
        given.out,
        decoder.decode,
        tokenizer,
        max_new_tokens=given.max_new_tokens,
        max_length=limit,
        stop_ids=target.stop_ids,
        batch=given.batch,
        rank=rank,
        ranks=ranks,
    ):
        print(f"rank {rank} of {ranks}: {done}", file=sys.stderr)
    return 0
