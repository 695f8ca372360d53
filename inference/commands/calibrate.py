"""`draftsmith calibrate TARGET DRAFT`: measure how often drawn tokens are accepted, for the policies of trees."""

import sys
from pathlib import Path

from draftsmith.inference import metrics, registry
from draftsmith.inference.commands._args import parser
from draftsmith.inference.couplings import target_fingerprint
from draftsmith.inference.decoders.tree import TreeDecoder
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.loader import check_pair, check_role, load
from draftsmith.inference.manifest import DTYPES
from draftsmith.inference.prompts import read_prompts
from draftsmith.inference.requests import RoundStats, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.tree_calibration import CALIBRATION_FILE, Calibrator
from draftsmith.inference.tree_settings import TreeSettings, conditions


def main(argv: list[str]) -> int:
    made = parser(
        "calibrate",
        "Measure acceptance by sibling rank and draft probability; the file beside the draft is used by the policies "
        "dyspec, dyspec_threshold and sequoia of the tree decoder.",
        "draftsmith calibrate exports/target exports/draft --prompts prompts.jsonl --temperature 0.7",
    )
    made.add_argument("target", metavar="TARGET", help="export or Hugging Face directory of the target")
    made.add_argument("draft", metavar="DRAFT", help="export or Hugging Face directory of the draft")
    made.add_argument("--prompts", metavar="FILE", required=True, help="JSONL, 'prompt' or 'prompt_ids' in each line")
    made.add_argument(
        "--temperature", type=float, default=1.0, help="of the target; 0 is greedy (default: %(default)s)"
    )
    made.add_argument("--draft-temperature", type=float, default=0.0, help="of the draft; 0: the target's (default)")
    made.add_argument("--widths", default="6-3-2", help="shape of the measured trees (default: %(default)s)")
    made.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    made.add_argument("--batch", type=int, default=1, metavar="B", help="prompts decoded together (default: 1)")
    made.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    made.add_argument("--out", metavar="FILE", type=Path, help=f"default: {CALIBRATION_FILE} in DRAFT")
    made.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as the weights are stored)")
    made.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    made.add_argument("--allow-mismatch", action="store_true", help="go on with a draft made for another target")
    given = made.parse_args(argv)
    if given.batch < 1:
        raise InvalidValue(f"--batch must be at least 1, got {given.batch}")
    target = load(given.target, dtype=given.dtype, device=given.device)
    draft = load(given.draft, dtype=given.dtype, device=given.device)
    check_role(target, "target")
    check_role(draft, "draft")
    sampling = SamplingParams(temperature=given.temperature)
    settings = TreeSettings(policy="fixed", widths=given.widths, draft_temperature=given.draft_temperature)
    decoder = registry.build(
        "tree",
        {"target": target.part, "draft": draft.part},
        sampling=sampling,
        settings=settings,
        seed=given.seed,
        tokenizer=target.tokenizer,
        vocab_size=check_pair(target, draft, given.allow_mismatch),
    )
    assert isinstance(decoder, TreeDecoder)
    decoder.watcher = calibrator = Calibrator()
    requests = [
        TokenRequest(line.ids(target.tokenizer), given.max_new_tokens, row_id=number, stop_ids=target.stop_ids)
        for number, line in enumerate(read_prompts(given.prompts))
    ]
    rounds = RoundStats()
    for start in range(0, len(requests), given.batch):
        rounds.extend(decoder.decode(requests[start : start + given.batch]).rounds, row_offset=start)
        print(f"{min(start + given.batch, len(requests))}/{len(requests)} prompts", file=sys.stderr)
    fingerprint = {"target": target_fingerprint(target.path), "draft": target_fingerprint(draft.path)}
    found = calibrator.result(fingerprint | conditions(settings, sampling))
    out = given.out or draft.path / CALIBRATION_FILE
    found.save(out)
    counts = metrics.count(rounds)
    vector = " ".join(f"{p:.3f}" for p in found.sequoia[1:])
    print(f"{out}: {found.tests} draws tested, tau {counts.tau:.3f}; the k-th child is accepted with {vector}")
    return 0
