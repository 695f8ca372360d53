"""The copy of a draft that serves while the draft itself is being trained: two engines, one of them active.

New weights go into the spare one; a swap exchanges the two between requests, so a request is served by one version from
its first to its last token. (Exactness would hold anyway: a draft's law may change whenever it likes, as long as the
acceptance test sees the law that was sampled from.)
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.inference.engine import Engine
from draftsmith.inference.errors import InvalidState, InvalidType
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import FAMILIES, CausalLM, CausalLMConfig


def engine_of(model: Any) -> Engine:
    """An independent served copy of a transformers model: native where there is a native net, else adapted.

    It is what `load` makes of the model's export, without the way over the disk.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        return HFEngine(copy.deepcopy(model).eval().requires_grad_(False))
    weights = model.state_dict()
    sample = next(iter(weights.values()))
    with torch.device("meta"):
        net = CausalLM(CausalLMConfig.from_hf(config))
    net = net.to(sample.dtype).to_empty(device=sample.device).eval().requires_grad_(False)
    engine = NativeEngine(net)
    write_weights(engine, weights)
    return engine


def network_of(engine: Engine) -> nn.Module:
    """The network behind an engine. Raises InvalidType for an engine of another make."""
    if isinstance(engine, NativeEngine):
        return engine.net
    if isinstance(engine, HFEngine):
        model: nn.Module = engine.model
        return model
    raise InvalidType(f"{type(engine).__name__} has no network whose weights could be exchanged")


@torch.no_grad()
def write_weights(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Overwrite an engine's parameters in place. Raises InvalidState naming the first that `weights` lacks."""
    for name, parameter in network_of(engine).named_parameters():
        if name not in weights:
            raise InvalidState(
                f"the new draft has no parameter {name!r}: it is another architecture than the served one"
            )
        parameter.copy_(weights[name])


def embedding_rows(engine: Engine) -> Tensor:
    """The input embeddings [V, D] of a native or adapted model."""
    network = network_of(engine)
    if isinstance(network, CausalLM):
        return network.model.embed_tokens.weight.detach()
    embedding: nn.Embedding = network.get_input_embeddings()  # type: ignore[operator]  # transformers is not typed
    return embedding.weight.detach()


class ServedDraft:
    """Double buffer of one draft.

    Args: make: builds one engine; called twice. write: puts weights into an engine (default `write_weights`).
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        write: Callable[[Engine, Mapping[str, Tensor]], None] = write_weights,
    ) -> None:
        self.active = make()
        self.spare = make()
        self.version = 0  # how many swaps there were
        self._write = write

    def prepare(self, weights: Mapping[str, Tensor]) -> Engine:
        """Put a candidate into the spare engine, which does not serve, and return it."""
        self._write(self.spare, weights)
        return self.spare

    def swap(self) -> None:
        """The prepared candidate serves from the next request on."""
        self.active, self.spare = self.spare, self.active
        self.version += 1
