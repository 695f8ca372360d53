"""The speed table at 11M, 50M and 150M parameters: random weights, and a draft whose acceptance is SET.

Run from the repository's root, alone on the machine (about 25 minutes for everything):

    python -m benchmarks.sizes --json sizes.json

What a draft gets accepted usually depends on training; here it is a knob. The target's own greedy continuation is
computed once; the draft proposes it, but each position is corrupted with probability 1 - alpha (by the counter
generator, keyed by the position, so that ours and transformers' assisted generation meet the same corruptions). A real
draft network of a plausible size runs beside it and is paid for. So speed differs between sizes by arithmetic and
overhead alone, and the host time per round (Python outside the network calls) is seen apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.inference import bench, bench_report
from draftsmith.inference.bench import BenchSettings, Contestant, Parts, Prompt
from draftsmith.inference.costs import CostCurve, calibrate, measure
from draftsmith.inference.decoders.autoregressive import AutoregressiveDecoder
from draftsmith.inference.decoders.speculative import SpeculativeDecoder, SpeculativeSettings
from draftsmith.inference.drafters.base import DraftSession, DraftTask, Proposal
from draftsmith.inference.drafters.model import ModelDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.environment import git, machine, versions
from draftsmith.inference.forecast import forecast
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.metrics import Estimate
from draftsmith.inference.peers import PEERS, TransformersPeers
from draftsmith.inference.requests import Decoder, RoundStats, TokenRequest
from draftsmith.inference.rng import Stream, uniform
from draftsmith.inference.sampling import PenaltyState


@dataclass(frozen=True)
class Size:
    """Architecture of a target and of its draft (Llama, tied head)."""

    vocab: int
    width: int
    layers: int
    mlp: int
    heads: int
    draft_width: int
    draft_layers: int


SIZES = {
    "tiny": Size(97, 32, 2, 64, 4, 16, 1),  # for tests
    "11M": Size(4096, 320, 8, 880, 5, 96, 2),
    "50M": Size(8192, 640, 9, 1728, 10, 192, 2),
    "150M": Size(16384, 960, 12, 2560, 15, 256, 3),
}


def write_model(folder: Path, vocab: int, width: int, layers: int, mlp: int, heads: int, seed: int) -> Path:
    """A random Llama directory; weights large enough that greedy continuations do not collapse into one token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        initializer_range=width**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_models(folder: Path, name: str) -> tuple[Path, Path]:
    """Target and draft directories of a size."""
    size = SIZES[name]
    target = write_model(folder / "target", size.vocab, size.width, size.layers, size.mlp, size.heads, seed=0)
    width, heads = size.draft_width, max(size.draft_width // 32, 1)
    return target, write_model(folder / "draft", size.vocab, width, size.draft_layers, 2 * width, heads, seed=1)


class Scripts:
    """What the draft will propose at each position of each row: the target's greedy tokens, some corrupted.

    Rows are told apart by their prompt; all prompts have the same length.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], alpha: float, vocab: int
    ):
        self.length = len(prompts[0])
        self.tokens: dict[tuple[int, ...], list[int]] = {}
        for row, (prompt, new) in enumerate(zip(prompts, continuations, strict=True)):
            true = [*prompt, *new]
            kept = (uniform(0, row, torch.arange(len(true)), Stream.DATA) < alpha).tolist()
            wrong = [(token + 1) % vocab for token in true]
            self.tokens[tuple(prompt)] = [t if k else w for t, k, w in zip(true, kept, wrong, strict=True)]

    def of(self, tokens: Sequence[int]) -> list[int]:
        """The script of the row that begins with these tokens; it is as long as prompt and continuation."""
        return self.tokens[tuple(tokens[: self.length])]


class ScriptedDrafter:
    """Pays for a draft network and proposes the script instead of its tokens."""

    role = "draft"
    tokenizer = None

    def __init__(self, engine: Engine, scripts: Scripts):
        self.inner = ModelDrafter(engine)
        self.scripts = scripts

    @property
    def vocab_size(self) -> int | None:
        return self.inner.vocab_size

    def start(self, task: DraftTask) -> DraftSession:
        return _ScriptedSession(self.inner.start(task), self.scripts)


class _ScriptedSession:
    def __init__(self, inner: DraftSession, scripts: Scripts):
        self._inner = inner
        self._scripts = scripts

    @property
    def calls(self) -> int:
        return self._inner.calls

    def room(self, length: int) -> int:
        return self._inner.room(length)

    def propose(
        self, tokens: Sequence[Sequence[int]], want: Sequence[int], u: Tensor | None, penalties: PenaltyState | None
    ) -> Proposal | None:
        paid = self._inner.propose(tokens, want, u, penalties)
        if paid is None:
            return None
        g = paid.tokens.shape[1]
        rows = []
        for committed in tokens:
            script = self._scripts.of(committed)[len(committed) : len(committed) + g]
            rows.append(script + [0] * (g - len(script)))
        return Proposal(torch.tensor(rows, device=paid.tokens.device), paid.n, paid.law)

    def commit(self, lengths: Sequence[int]) -> None:
        self._inner.commit(lengths)

    def select(self, rows: Sequence[int]) -> None:
        self._inner.select(rows)


def scripted_assistant(path: Path, scripts: Scripts) -> Any:
    """transformers' draft model that pays for its own forward pass and then says what the script says."""
    from transformers import GenerationConfig, LlamaForCausalLM

    class Scripted(LlamaForCausalLM):
        def forward(  # generate reads the signature: without attention_mask it would feed the whole text again
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            logits_to_keep: int = 0,
            **kwargs: Any,
        ) -> Any:
            assert input_ids is not None
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            if start == 0:
                self.script = torch.tensor(scripts.of(input_ids[0].tolist()))
            out = super().forward(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
            rows = out.logits.shape[1]
            end = start + input_ids.shape[1]
            at = torch.arange(end - rows, end).clamp_max(len(self.script) - 2) + 1  # row i predicts index i + 1
            out.logits.zero_()
            out.logits.scatter_(-1, self.script[at][None, :, None], 50.0)
            return out

    model = Scripted.from_pretrained(str(path), dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    return model


class Stopwatch:
    """An engine that adds up the seconds of its own calls."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        start = time.perf_counter()
        try:
            return self._engine.forward(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start

    def head(self, hidden: Tensor) -> Tensor:
        start = time.perf_counter()
        try:
            return self._engine.head(hidden)
        finally:
            self.seconds += time.perf_counter() - start


def host_time(
    target: Engine, draft: Engine, scripts: Scripts, requests: Sequence[TokenRequest], g: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per round by where they go: target calls, draft calls, host (everything else). CPU only."""
    out = {}
    for name in ("plain", "speculative"):
        watch, small = Stopwatch(target), Stopwatch(draft)
        decoder: Decoder = AutoregressiveDecoder(watch)
        if name == "speculative":
            settings = SpeculativeSettings(draft_length=g, schedule="constant", fallback="never")
            decoder = SpeculativeDecoder(watch, ScriptedDrafter(small, scripts), settings=settings)
        decoder.decode(requests)  # warm-up
        samples = []
        for _ in range(5):
            watch.seconds = small.seconds = 0.0
            result = decoder.decode(requests)
            rounds = result.nfe["target"]
            parts = {"target": watch.seconds, "draft": small.seconds}
            parts["host"] = result.seconds - watch.seconds - small.seconds
            samples.append({part: 1e3 * seconds / rounds for part, seconds in parts.items()})
        out[name] = {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}
    return out


def run_size(
    name: str, folder: Path, alphas: Sequence[float], settings: BenchSettings, prompts: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The table of one size, at each acceptance and batch; JSON-ready. prompts: at each batch, as many as fill it."""
    size = SIZES[name]
    target_path, draft_path = write_models(folder, name)
    target, draft = load_engine(target_path), load_engine(draft_path)
    most = max(prompts, *settings.batches)
    ids = [[(17 * row + 5 * i + row * i) % size.vocab for i in range(32)] for row in range(most)]
    tell(f"{name}: greedy continuations")
    requests = [TokenRequest(p, max_new_tokens=settings.max_new_tokens, row_id=i) for i, p in enumerate(ids)]
    continuations = AutoregressiveDecoder(target).decode(requests).output
    peers = TransformersPeers(target_path, draft_path, dtype=torch.float32, g=settings.g)
    parts = Parts(target, draft)
    tables = []
    for alpha in alphas:
        scripts = Scripts(ids, continuations, alpha, size.vocab)
        peers.draft = scripted_assistant(draft_path, scripts)
        blocks, forecasts = [], {}
        for batch in settings.batches:
            tell(f"{name}, alpha {alpha}, batch {batch}: cost curve")
            curve = _curve(target, draft, scripts, requests[:batch], settings)
            predicted = forecast(Estimate(alpha, None, None), curve)
            forecasts[str(batch)] = {**predicted.to_json(), "costs": curve.to_json()}
            table = _contestants(target, draft, scripts, settings, batch, predicted.g, curve, peers)
            blocks.append(
                bench.measure_batch(
                    parts, [Prompt(tuple(p)) for p in ids[: max(prompts, batch)]], settings, batch, table,
                    lambda share, what, alpha=alpha: tell(f"{name}, alpha {alpha}, {what}"),
                )
            )  # fmt: skip
        predicted_all = {"batches": forecasts}
        tables.append(
            {
                "alpha": alpha,
                "forecast": predicted_all,
                "batches": blocks,
                "summary": bench_report.summary(predicted_all, blocks, settings.seed),
                "warnings": bench_report.warnings(blocks, settings.repetitions, bench.ENOUGH),
                "milliseconds_per_round": host_time(target, draft, scripts, requests[:1], settings.g),
            }
        )
    count = {part: sum(p.numel() for p in model.parameters()) for part, model in
             (("target", peers.target), ("draft", peers.draft))}  # fmt: skip
    return {"size": name, "parameters": count, "tables": tables}


def _curve(
    target: Engine, draft: Engine, scripts: Scripts, requests: Sequence[TokenRequest], settings: BenchSettings
) -> CostCurve:
    context = scripts.length + settings.max_new_tokens // 2
    bare = measure(target, ModelDrafter(draft), batch=len(requests), context=context)
    rounds = {0: RoundStats(), 1: RoundStats(), 8: RoundStats()}
    for g, stats in rounds.items():
        decoder = _constant(target, draft, scripts, g) if g else AutoregressiveDecoder(target)
        for turn in range(3):
            found = decoder.decode(requests).rounds
            if turn:  # the first is a warm-up
                stats.extend(found, row_offset=turn * len(requests))
    return calibrate(bare, rounds)


def _constant(target: Engine, draft: Engine, scripts: Scripts, g: int) -> SpeculativeDecoder:
    settings = SpeculativeSettings(draft_length=g, schedule="constant", fallback="never")
    return SpeculativeDecoder(target, ScriptedDrafter(draft, scripts), settings=settings)


def _contestants(
    target: Engine,
    draft: Engine,
    scripts: Scripts,
    settings: BenchSettings,
    batch: int,
    best: int,
    curve: CostCurve,
    peers: TransformersPeers,
) -> list[Contestant]:
    def ours(decoder: Decoder) -> bench.Decode:
        def decode(requests: Sequence[TokenRequest], seed: int) -> tuple[list[list[int]], RoundStats | None]:
            result = decoder.decode(requests)
            return result.output, result.rounds

        return decode

    auto = SpeculativeSettings(draft_length=best, schedule="cost")
    automatic = SpeculativeDecoder(target, ScriptedDrafter(draft, scripts), settings=auto, costs=curve)
    table = [
        Contestant("plain", "draftsmith plain", False, ours(AutoregressiveDecoder(target))),
        Contestant("speculative", f"draftsmith speculative, g = {settings.g}", False,
                   ours(_constant(target, draft, scripts, settings.g))),
        Contestant("speculative_best", f"draftsmith speculative, g = {best} (forecast best)", False,
                   ours(_constant(target, draft, scripts, best))),
        Contestant("speculative_auto", "draftsmith speculative, automatic", False, ours(automatic)),
    ]  # fmt: skip
    for name in PEERS:
        if name != "hf_prompt_lookup" and peers.why_not(name, batch) is None:
            table.append(Contestant(name, peers.label(name), True, bench.peer(peers, name)))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="11M,50M,150M")
    parser.add_argument("--alpha", default="0.8,0.0", help="set acceptances; 0 is the useless draft")
    parser.add_argument("--batch", default="1,8,16")
    parser.add_argument("--g", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    batches = tuple(int(b) for b in given.batch.split(","))
    settings = BenchSettings(
        max_new_tokens=given.max_new_tokens, batches=batches, g=given.g, repetitions=given.repetitions
    )
    report: dict[str, Any] = {
        "settings": {**vars(settings), "batches": list(batches), "threads": given.threads, "dtype": "float32"},
        "environment": {
            "machine": machine(),
            "versions": versions(),
            "commit": git(Path(__file__).parent, "rev-parse", "HEAD"),
        },
        "sizes": [],
    }
    alphas = [float(a) for a in given.alpha.split(",")]
    for name in given.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            made = run_size(name, Path(folder), alphas, settings, given.prompts, _tell)
        report["sizes"].append(made)
        print(_text(made), flush=True)
        if given.json:
            given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _tell(what: str) -> None:
    import sys

    print(what, file=sys.stderr, flush=True)


def _text(made: dict[str, Any]) -> str:
    lines = [
        f"{made['size']}: target {made['parameters']['target']:,}, draft {made['parameters']['draft']:,} parameters"
    ]
    for table in made["tables"]:
        lines.append(f"set acceptance {table['alpha']}")
        for block in table["batches"]:
            lines += [f" batch {block['batch']}", *bench_report.table(block)]
        for name, parts in table["milliseconds_per_round"].items():
            lines.append(f"  {name}, ms per round: " + ", ".join(f"{part} {ms:.3f}" for part, ms in parts.items()))
        lines += [f"  warning: {line}" for line in table["warnings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
