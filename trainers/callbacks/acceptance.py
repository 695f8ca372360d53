"""Acceptance by really decoding: at each validation the draft's served form drafts for the target on held-out prompts.

Checkpoints are chosen by `val/alpha_decode` (or `val/tau`), not by a loss: it is what the export will do when served.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from draftsmith.inference import registry
from draftsmith.inference.drafters.eagle import EagleTreeDrafter
from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidType, InvalidValue, unknown_choice
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.load_eagle import own_tree
from draftsmith.inference.load_engine import load_engine
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.inference.prompts import read_prompts
from draftsmith.inference.requests import RoundStats, TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import engine_of, write_weights
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.metrics import Acceptance
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers.strategies import gathered

POLICIES = ("chain", "auto")


class AcceptanceEval(Callback):
    """Decodes held-out prompts speculatively at each validation; logs val/alpha_decode, its interval, and val/tau.

    Prompts: `prompts`, else the data module's own (`val_requests()` of online data, `prompts()` of text). The target is
    the data module's engine, else the module's teacher; training on cached states holds none, so it is loaded here.
    Ranks share the prompts. Of several drafts the online router chooses. An EAGLE head drafts in the tree decoder.
    """

    def __init__(
        self,
        requests: int = 16,
        prompt_length: int = 32,
        max_new_tokens: int = 64,
        draft_length: int = 5,
        temperature: float = 1.0,
        batch: int = 16,
        prompts: str | None = None,
        seed: int = 0,
        policy: str = "chain",
    ) -> None:
        """Args:
        requests: how many prompts; cost grows with requests x max_new_tokens.
        prompt_length: tokens of a prompt cut out of text.
        max_new_tokens: at most so many per prompt.
        draft_length: g; of an EAGLE head's trees the depth.
        temperature: 0 measures greedy matches.
        batch: prompts decoded together.
        prompts: JSONL file of prompts instead.
        seed: of the sampling; the same at each validation, so that validations compare.
        policy: how an EAGLE head drafts. chain: `draft_length` tokens one after the other. auto: its own tree, as its
            export does where nothing is chosen.
        """
        for name, value in (("requests", requests), ("max_new_tokens", max_new_tokens), ("batch", batch)):
            if value < 1:
                raise InvalidValue(f"AcceptanceEval {name} must be at least 1, got {value}")
        self.num_requests, self.prompt_length, self.max_new_tokens = requests, prompt_length, max_new_tokens
        self.sampling = SamplingParams(temperature=temperature)
        if policy not in POLICIES:
            raise unknown_choice("AcceptanceEval policy", policy, POLICIES)
        self.settings = registry.make_settings("speculative", {"draft_length": draft_length, "fallback": "never"})
        sizes = {"nodes": draft_length} if policy == "chain" else {}
        self.tree_settings = registry.make_settings("tree", {"policy": policy, "depth": draft_length, **sizes})
        self.batch, self.prompts, self.seed = batch, prompts, seed
        self.metric = Acceptance()
        self._requests: list[TokenRequest] = []
        self._target: Engine | None = None
        self._drafts: list[Engine | EagleTreeDrafter] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises InvalidType for a module that has no draft."""
        if not isinstance(pl_module, OSDDrafter | EagleDrafter):
            raise InvalidType(
                f"AcceptanceEval measures an OSDDrafter or an EagleDrafter, got {type(pl_module).__name__}"
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        module = cast(OSDDrafter | EagleDrafter, pl_module)
        self._prepare(trainer, module)
        self.metric.to(module.device)
        self.metric.update(RoundStats())  # a rank without prompts takes part in the sums too
        mine = self._requests[trainer.global_rank :: trainer.world_size]
        for index, group in self._by_draft(trainer, mine).items():
            self._decode(index, group)
        values = {name: value.float() for name, value in self.metric.compute().items()}
        names = {"alpha": "alpha_decode", "alpha_low": "alpha_decode_low", "alpha_high": "alpha_decode_high"}
        for name, value in values.items():
            if name != "accepted_rate" and not bool(value.isnan()):
                module.log(f"val/{names.get(name, name)}", value, prog_bar=name == "tau", batch_size=1)
        self._histogram(trainer)
        self.metric.reset()

    def _prepare(self, trainer: pl.Trainer, module: OSDDrafter | EagleDrafter) -> None:
        """Prompts and target once, the drafts' weights each time."""
        if not self._requests:
            self._requests = self._find_requests(trainer)
        if self._target is None:
            self._target = self._find_target(trainer, module)
        if isinstance(module, EagleDrafter):
            assert module.net is not None
            self._drafts = [served_head(module.net)]  # a head is small: a new copy costs less than keeping track
            return
        for index, net in enumerate(module.nets):
            with gathered(trainer, net):
                if index == len(self._drafts):
                    self._drafts.append(engine_of(net))
                else:
                    write_weights(cast(Engine, self._drafts[index]), net.state_dict())

    def _find_requests(self, trainer: pl.Trainer) -> list[TokenRequest]:
        data: Any = getattr(trainer, "datamodule", None)
        if self.prompts is not None:
            tokenizer = getattr(getattr(data, "target", None), "tokenizer", None) or getattr(data, "tokenizer", None)
            found = [
                TokenRequest(tuple(line.ids(tokenizer)), self.max_new_tokens, tag=line.tag)
                for line in read_prompts(self.prompts)
            ]
        elif hasattr(data, "val_requests"):
            found = [replace(r, max_new_tokens=min(r.max_new_tokens, self.max_new_tokens)) for r in data.val_requests()]
        elif hasattr(data, "prompts"):
            found = data.prompts(self.num_requests, self.prompt_length, self.max_new_tokens)
        else:
            found = []
        if not found:
            raise InvalidValue("AcceptanceEval has no prompts: set its `prompts` file, or data.traffic.val_prompts")
        return [replace(r, row_id=i) for i, r in enumerate(found[: self.num_requests])]

    def _find_target(self, trainer: pl.Trainer, module: OSDDrafter | EagleDrafter) -> Engine:
        target = getattr(getattr(trainer, "datamodule", None), "target", None)
        if target is not None:
            engine: Engine = target.part
            return engine
        teacher = module.target if isinstance(module, EagleDrafter) else module.teacher
        if teacher is None:
            raise InvalidValue("AcceptanceEval has no target: set model.teacher.path")
        if teacher.model is None:  # cached states
            spec = cast(EagleDrafter, module).teacher_spec
            return load_engine(str(spec.path), dtype=spec.dtype, device=module.device)
        return HFEngine(teacher.model)

    def _by_draft(self, trainer: pl.Trainer, requests: Sequence[TokenRequest]) -> dict[int, list[TokenRequest]]:
        router = getattr(getattr(getattr(trainer, "datamodule", None), "stream", None), "router", None)
        groups: dict[int, list[TokenRequest]] = {}
        for request in requests:
            groups.setdefault(router(request) if router is not None else 0, []).append(request)
        return groups

    def _decode(self, index: int, requests: Sequence[TokenRequest]) -> None:
        assert self._target is not None
        draft = self._drafts[index]
        head = isinstance(draft, EagleTreeDrafter)
        decoder = registry.build(
            "tree" if head else "speculative",
            {"target": self._target, "draft": draft},
            sampling=self.sampling,
            settings=self.tree_settings if head else self.settings,
            seed=self.seed,
            vocab_size=min(self._target.spec.vocab_size, draft.spec.vocab_size),
        )
        for start in range(0, len(requests), self.batch):
            self.metric.update(decoder.decode(requests[start : start + self.batch]).rounds)

    def _histogram(self, trainer: pl.Trainer) -> None:
        board: Any = getattr(trainer.logger, "experiment", None)
        if hasattr(board, "add_histogram") and trainer.is_global_zero:
            lengths = [k for row in self.metric.histogram().values() for k, n in enumerate(row) for _ in range(n)]
            if lengths:
                board.add_histogram("val/accepted_length", torch.tensor(lengths), trainer.global_step)


def served_head(net: EagleHead) -> EagleTreeDrafter:
    """An independent copy of a head that is being trained, as `load` makes it of its export."""
    head = EagleHead(net.config).to(net.device, net.dtype)
    head.load_state_dict(net.state_dict())
    head.eval().requires_grad_(False).fuse()
    return own_tree(head)
