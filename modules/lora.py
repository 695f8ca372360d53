"""LoRA: low-rank adapters on a frozen causal language model, by `peft` (extra `lora`); exports have them merged.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The network keeps its class: adapters
are put inside its linear maps, so that body, head and losses see the model they know. The head is frozen and costs no
gradient.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from draftsmith.inference.errors import InvalidValue, MissingExtra


@dataclass(frozen=True)
class LoRAConfig:
    """Size and place of the adapters."""

    r: int = 16  # rank; memory and time of the adapters grow with it
    alpha: float = 32.0  # the adapter's product is scaled by alpha / r
    dropout: float = 0.0  # on the adapter's input
    targets: tuple[str, ...] = ()  # names of linear maps, for example q_proj; empty: all but the head

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise InvalidValue(
                f"lora wants r >= 1, alpha > 0 and dropout in [0, 1); got r={self.r}, alpha={self.alpha}, "
                f"dropout={self.dropout}"
            )

    @classmethod
    def of(cls, config: "LoRAConfig | Mapping[str, Any] | None") -> "LoRAConfig | None":
        """From itself, or from the plain dict that a checkpoint's hyper-parameters hold."""
        return config if config is None or isinstance(config, LoRAConfig) else cls(**config)


def inject(net: Any, config: LoRAConfig) -> None:
    """Put adapters into a transformers model and freeze everything else, in place.

    Raises MissingExtra without peft, InvalidValue for targets that the model does not have.
    """
    if find_spec("peft") is None:
        raise MissingExtra("LoRA needs peft, which is not installed: pip install 'draftsmith[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(settings, net)
    except ValueError as e:
        raise InvalidValue(f"lora.targets {list(config.targets)}: {str(e).splitlines()[0]}") from e


def merged(net: Any) -> Any:
    """A copy of an adapted model with the adapters added into its weights: the plain class, without peft."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(net)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner, _, last = name.rpartition(".")
            setattr(plain.get_submodule(owner), last, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain
