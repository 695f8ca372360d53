"""What `draftsmith test` says of sampled text: diversity, oracle perplexity, MAUVE, and a baseline of equal entropy.

EMO sharpens a model's laws, and a sharper law looks better by most measures: so a maximum-likelihood baseline is shown
as it is and at the temperature at which its laws are as sharp as the tested model's.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from draftsmith.inference import registry
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.served_draft import engine_of
from draftsmith.inference.text_metrics import (
    continuation_nll,
    distinct_n,
    features,
    matched_temperature,
    mean_entropy,
)
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.lm import LM
from draftsmith.trainers.mauve import implementation, mauve

_NGRAMS = (1, 2, 4)


class TextEval(Callback):
    """Samples continuations of validation prompts at temperature 1, without truncation, when a model is tested.

    Logs text/WHOSE/distinct_N, text/WHOSE/entropy, text/WHOSE/mauve and text/WHOSE/oracle_perplexity; WHOSE is human
    (the text that really follows), model, and with a baseline: baseline and matched.
    """

    def __init__(
        self,
        samples: int = 64,
        prompt_length: int = 16,
        max_new_tokens: int = 48,
        oracle: str | None = None,
        baseline: str | None = None,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        """Args:
        samples: continuations; MAUVE is rough below some hundreds. Cost: samples x max_new_tokens, per model.
        prompt_length: tokens of a prompt.
        max_new_tokens: tokens of a continuation.
        oracle: directory of a larger model of the same tokenizer: its perplexity of the samples, and the features of
            MAUVE. Without it there is no oracle perplexity, and the tested model's own features are taken.
        baseline: directory of the same model continued by maximum likelihood.
        batch: texts at once.
        seed: of the sampling.
        """
        for name, value in (
            ("samples", samples), ("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens), ("batch", batch)
        ):  # fmt: skip
            if value < 1:
                raise InvalidValue(f"TextEval {name} must be at least 1, got {value}")
        self.samples, self.prompt_length, self.max_new_tokens = samples, prompt_length, max_new_tokens
        self.oracle, self.baseline, self.batch, self.seed = oracle, baseline, batch, seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises InvalidType for a module that is no language model."""
        if not isinstance(pl_module, LM):
            raise InvalidType(f"TextEval tests an LM or EMOLM, got {type(pl_module).__name__}")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "prompts"):
            raise InvalidValue("TextEval needs prompts from the data module: use draftsmith.data.text.TextDataModule")
        whole = data.prompts(self.samples, self.prompt_length + self.max_new_tokens, self.max_new_tokens)
        texts = [list(request.prompt) for request in whole]
        net: Any = pl_module.net
        rank_zero_info(f"text/*/mauve is computed by {implementation()}")
        for name, value in self.measure(net, texts).items():
            pl_module.log(name, value, batch_size=1)

    def measure(self, net: Any, human: Sequence[Sequence[int]]) -> dict[str, float]:
        """All figures of a network against human texts, each prompt_length + max_new_tokens long."""
        prompts = [list(text[: self.prompt_length]) for text in human]
        oracle = None if self.oracle is None else HFModel(path=self.oracle).build().eval()
        was_training = net.training
        net.eval()
        try:
            entropies = {"model": mean_entropy(net, human, batch=self.batch)}
            written = {"human": [list(text[self.prompt_length :]) for text in human]}
            written["model"] = self._sample(net, prompts, 1.0)
            found: dict[str, float] = {}
            if self.baseline is not None:
                other = HFModel(path=self.baseline).build().eval()
                temperature = matched_temperature(other, human, entropies["model"])
                for name, t in (("baseline", 1.0), ("matched", temperature)):
                    written[name] = self._sample(other, prompts, t)
                    entropies[name] = mean_entropy(other, human, t, self.batch)
                found["text/matched/temperature"] = temperature
            judge = net if oracle is None else oracle
            seen = {name: features(judge, self._joined(prompts, texts), self.batch) for name, texts in written.items()}
            for name, texts in written.items():
                found |= {f"text/{name}/distinct_{n}": distinct_n(texts, n) for n in _NGRAMS}
                if name != "human":
                    found[f"text/{name}/entropy"] = entropies[name]
                    found[f"text/{name}/mauve"] = mauve(seen["human"], seen[name], seed=self.seed)
                if oracle is not None:
                    nll, count = continuation_nll(oracle, prompts, texts, self.batch)
                    found[f"text/{name}/oracle_perplexity"] = math.exp(nll / max(1, count))
        finally:
            net.train(was_training)
        return found

    def _sample(self, net: Any, prompts: Sequence[Sequence[int]], temperature: float) -> list[list[int]]:
        engine = engine_of(net)
        decoder = registry.build(
            "autoregressive", {"target": engine}, sampling=SamplingParams(temperature=temperature), seed=self.seed
        )
        texts: list[list[int]] = []
        for start in range(0, len(prompts), self.batch):
            requests = [
                TokenRequest(tuple(ids), self.max_new_tokens, row_id=start + i)
                for i, ids in enumerate(prompts[start : start + self.batch])
            ]
            texts += decoder.decode(requests).output
        return texts

    @staticmethod
    def _joined(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[*p, *t] for p, t in zip(prompts, texts, strict=True)]
