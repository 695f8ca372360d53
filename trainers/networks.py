"""The networks of a training module on the `meta` device: their sizes without their weights, a 70B in seconds."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.modules.hf_model import DTYPES, HFModel, refuse_changed_logits
from draftsmith.modules.lm import LM
from draftsmith.modules.osd_drafter import OSDDrafter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Weightless(HFModel):
    """An `HFModel` that is built on the meta device: no weight file is read, none is made."""

    def build(self) -> "PreTrainedModel":
        """In train mode. Raises as `HFModel.build`."""
        if self.arch is not None:
            with torch.device("meta"):
                return super().build()
        from transformers import AutoConfig, AutoModelForCausalLM

        here = Path(str(self.path)).expanduser()
        try:
            config = AutoConfig.from_pretrained(
                str(here) if here.is_dir() else self.path, revision=self.revision or "main", trust_remote_code=False
            )
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype])
        except (OSError, ValueError, KeyError) as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise InvalidValue(f"cannot read the config of model {self.path!r}: {reason}") from e
        refuse_changed_logits(model)
        model.config.use_cache = False
        return model.train()


def weightless(spec: HFModel, dtype: str | None = None) -> Weightless:
    """The same model without weights, in its own number format or another."""
    return Weightless(**(dataclasses.asdict(spec) | ({} if dtype is None else {"dtype": dtype})))


def trained(module: pl.LightningModule) -> dict[str, HFModel]:
    """What a module trains, by the prefix of its keys in a checkpoint. Raises InvalidType for an unknown module."""
    if isinstance(module, LM):
        return {"net.": module.spec}
    if isinstance(module, OSDDrafter):
        return {f"nets.{i}.": spec for i, spec in enumerate(module.specs.values())}
    raise InvalidType(
        f"the networks of {type(module).__name__} are not known here: give a config whose model is LM or OSDDrafter"
    )


def teacher(module: pl.LightningModule) -> HFModel | None:
    """The frozen target that a module holds beside what it trains."""
    return module.teacher_spec if isinstance(module, OSDDrafter) else None


def without_weights(module: pl.LightningModule, dtype: str | None = None) -> list["PreTrainedModel"]:
    """Build a fresh module on the meta device, as `configure_model` would; the networks that it trains.

    Args: dtype: of the trained networks, instead of their own (the teacher keeps its own).
    """
    trained(module)  # for its error
    if isinstance(module, LM):
        module.spec = weightless(module.spec, dtype)
        module.configure_model()
        return [module._built()]
    assert isinstance(module, OSDDrafter)
    module.specs = {key: weightless(spec, dtype) for key, spec in module.specs.items()}
    if module.teacher_spec is not None:
        module.teacher_spec = weightless(module.teacher_spec)
    module.configure_model()
    return [module.net(i) for i in range(len(module.specs))]


def parameter_count(model: "PreTrainedModel") -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def parameter_bytes(model: "PreTrainedModel") -> int:
    """Bytes of them."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
