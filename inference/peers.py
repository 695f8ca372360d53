"""The peers of a bench: transformers' own decoding, run in this process and at its best (contract 15).

Assisted generation runs twice: at its defaults (20 tokens, confidence threshold 0.4; where scikit-learn is installed
the threshold is fitted anew every round), and with a constant draft length, no confidence test and no refit. A bar
counts against the faster of the two. Read in transformers 5.23: generation/candidate_generator.py and utils.py.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftsmith.inference.errors import InvalidValue


@dataclass(frozen=True)
class Peer:
    """One way in which transformers decodes."""

    name: str
    label: str
    needs_draft: bool = False
    single: bool = False  # takes one sequence at a time, whatever the batch


PEERS = {
    peer.name: peer
    for peer in (
        Peer("hf_generate", "transformers generate"),
        Peer("hf_assisted", "transformers assisted, its defaults", needs_draft=True, single=True),
        Peer("hf_assisted_constant", "transformers assisted, constant g = {g}", needs_draft=True, single=True),
        Peer("hf_prompt_lookup", "transformers prompt lookup", single=True),
    )
}
ASSISTED = ("hf_assisted", "hf_assisted_constant")


def refit_installed() -> bool:
    """Whether assisted generation, at its defaults, fits its threshold anew every round (scikit-learn is there)."""
    return importlib.util.find_spec("sklearn") is not None


@contextmanager
def without_refit() -> Iterator[None]:
    """Assisted generation as if scikit-learn were missing: its per-round fit costs more than a small draft does."""
    from transformers.generation import candidate_generator

    original = candidate_generator.is_sklearn_available
    candidate_generator.is_sklearn_available = lambda: False
    try:
        yield
    finally:
        candidate_generator.is_sklearn_available = original


class TransformersPeers:
    """Target and draft as transformers' own classes, ready to decode greedily or at a temperature."""

    def __init__(
        self,
        target: Path,
        draft: Path | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        temperature: float = 0.0,
        g: int = 5,
        lookup_tokens: int = 10,
        stop_ids: Sequence[int] = (),
    ) -> None:
        with quiet():
            self.target = _model(target, dtype, device)
            self.draft: Any = None if draft is None else _model(draft, dtype, device)
        self.temperature = temperature
        self.g = g
        self.lookup_tokens = lookup_tokens
        self.stop_ids = list(stop_ids)

    def label(self, name: str) -> str:
        """The peer's row label."""
        return PEERS[name].label.format(g=self.g)

    def why_not(self, name: str, batch: int) -> str | None:
        """The reason why a peer is not offered at this batch; None when it is."""
        peer = PEERS[name]
        if peer.needs_draft and self.draft is None:
            return "needs a draft"
        if peer.single and batch > 1:
            return f"not offered at batch {batch}: assisted generation takes one sequence at a time"
        if peer.needs_draft and self.draft.config.vocab_size != self.target.config.vocab_size:
            return "not offered: the heads differ in size, so transformers would translate through text"
        return None

    def decode(self, name: str, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        """New tokens of each prompt, cut after the first stop id (which is kept). Sampling is seeded by `seed`."""
        longest = max(len(prompt) for prompt in prompts)
        pad = self.stop_ids[0] if self.stop_ids else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=self.target.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.target.device)
        assistant: dict[str, Any] = {}
        if PEERS[name].needs_draft:
            self.draft.generation_config = self._draft_settings(name)  # a call leaves its fitted values behind
            assistant["assistant_model"] = self.draft
        lookup = {"prompt_lookup_num_tokens": self.lookup_tokens} if name == "hf_prompt_lookup" else {}
        settings = self._settings(max_new_tokens, pad, **lookup)
        if self.temperature > 0:
            torch.manual_seed(seed)
        with torch.inference_mode(), without_refit() if name == "hf_assisted_constant" else nullcontext():
            rows = self.target.generate(ids, attention_mask=mask, generation_config=settings, **assistant)
        return [self._cut(row) for row in rows[:, longest:].tolist()]

    def _settings(self, max_new_tokens: int, pad: int, **more: Any) -> Any:
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids or None,
            pad_token_id=pad,
            use_cache=True,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
            **more,
        )

    def _draft_settings(self, name: str) -> Any:
        from transformers import GenerationConfig

        if name == "hf_assisted":
            return GenerationConfig()
        return GenerationConfig(
            num_assistant_tokens=self.g, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )

    def _cut(self, row: list[int]) -> list[int]:
        for i, token in enumerate(row):
            if token in self.stop_ids:
                return row[: i + 1]
        return row


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log lines and loading bars for the duration."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _model(path: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InvalidValue(
            f"transformers cannot load {path} as a peer (--no-peers leaves them out): {reason:.200}"
        ) from None
    model.generation_config = GenerationConfig()  # the directory's own sampling settings would bend the comparison
    return model.to(device).eval()
