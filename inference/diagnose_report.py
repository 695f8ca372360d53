"""What a diagnosis shows: a page for people, a document for machines."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.diagnose import Verdict, fixes
from draftsmith.inference.hypotheses.confirm import couplings_json

ROWS = 8  # of the evidence table
_SAYS = {
    "healthy": "healthy: no coupling makes it better",
    "named": "a wrong coupling explains the loss",
    "tie": "wrong couplings explain the loss, and the contexts cannot tell some of them apart",
    "certain": "the files are wrong",
    "unexplained": "no coupling explains it: the drafter is under-trained, or was trained for another target or data",
}


def page(verdict: Verdict) -> str:
    """The verdict, the evidence, the fix for each reader."""
    return "\n".join(_lines(verdict))


def _lines(v: Verdict) -> Iterator[str]:
    yield f"verdict   {_SAYS[v.status]}"
    for text in v.certain:
        yield f"certain   {text}"
    if v.status == "certain" and v.couplings is None:
        return
    for found in v.findings:
        yield f"named     {found.hypothesis.family}: {found.hypothesis.explain}"
        for other in found.ties:
            yield f"  or      {other.family}: {other.explain} (the contexts do not tell them apart)"
        yield f"          S {found.before:.3f} -> {found.after:.3f} (gain at least {found.gain_low:.3f})"
    for reader, texts in fixes(v).items():
        for text in texts:
            yield f"fix       {reader}: {text}"
    yield f"S         {v.deployed:.3f} as deployed, {v.final:.3f} with the fixes, {v.unigram:.3f} by the mean law alone"
    yield "          (expected accepted drafts at an anchor, true prefixes: for comparison only)"
    if "fresh" in v.confirmed:
        fresh = v.confirmed["fresh"]
        for name in ("before", "after"):
            mean, low, high = fresh[name]
            yield f"fresh     S {name}: {mean:.3f} [{low:.3f}, {high:.3f}] on {fresh['contexts']} other contexts"
    if "decoding" in v.confirmed:
        yield from _decoded(v.confirmed["decoding"])
    if v.table:
        yield f"evidence  {'hypothesis':<52} {'S':>7} {'gain':>8} {'at least':>9}"
        for row in v.table[:ROWS]:
            yield f"          {row.hypothesis.name[:52]:<52} {row.score:7.3f} {row.gain:+8.3f} {row.low:+9.3f}"
    for note in v.notes:
        yield f"note      {note}"
    yield f"tried     {v.tried} couplings in {v.seconds:.1f} s"


def _decoded(found: dict[str, Any]) -> Iterator[str]:
    for name in ("before", "after"):
        side = found[name]
        if "not_run" in side:
            yield f"decoded   {name}: not run ({side['not_run']})"
        elif side["tau"] is not None:
            mean, low, high = side["tau"]
            same = "the target's own text" if side["equals_plain_greedy"] else "NOT the target's own text"
            yield f"decoded   {name}: {mean:.2f} tokens per target call [{low:.2f}, {high:.2f}], {same}"


def document(v: Verdict) -> dict[str, Any]:
    """The verdict as plain values."""
    return {
        "status": v.status,
        "exit_code": v.exit_code,
        "certain": v.certain,
        "findings": [
            {
                "family": found.hypothesis.family,
                "name": found.hypothesis.name,
                "explain": found.hypothesis.explain,
                "changes": {k: list(x) if isinstance(x, tuple) else x for k, x in found.hypothesis.changes.items()},
                "ties": [{"family": other.family, "name": other.name} for other in found.ties],
                "before": found.before,
                "after": found.after,
                "gain_low": found.gain_low,
            }
            for found in v.findings
        ],
        "fixes": dict(fixes(v)),
        "deployed": v.deployed,
        "final": v.final,
        "unigram": v.unigram,
        "confirmed": v.confirmed,
        "couplings": None if v.couplings is None else couplings_json(v.couplings),
        "evidence": [
            {
                "family": row.hypothesis.family,
                "name": row.hypothesis.name,
                "score": row.score,
                "gain": row.gain,
                "gain_low": row.low,
                "temperature": row.temperature,
            }
            for row in v.table
        ],
        "tried": v.tried,
        "seconds": v.seconds,
        "notes": v.notes,
    }
