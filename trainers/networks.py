"""The networks of a training module on the `meta` device: their sizes without their weights, a 70B in seconds."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.eagle_target import EagleTarget
from draftsmith.modules.emo_lm import EMOLM
from draftsmith.modules.hf_model import DTYPES, HFModel, head_rows, refuse_changed_logits
from draftsmith.modules.learned_part import LearnedPart
from draftsmith.modules.lm import LM
from draftsmith.modules.losses.costs import TokenCosts
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.trainers.meta import HostReads

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


def without_weights(module: pl.LightningModule) -> dict[str, nn.Module]:
    """Build a fresh module on the meta device, as `configure_model` would, with its teacher and its token costs.

    Returns the networks that it trains, adapters put in, by the prefix of their keys in a checkpoint. Raises
    InvalidType for an unknown module.
    """
    if isinstance(module, EagleDrafter):
        return {"net.": _eagle(module)}
    if isinstance(module, OSDDrafter):
        module.specs = {key: weightless(spec) for key, spec in module.specs.items()}
        if module.teacher_spec is not None:
            module.teacher_spec = weightless(module.teacher_spec)
        module.configure_model()
        return {f"nets.{i}.": module.net(i) for i in range(len(module.specs))}
    if isinstance(module, LM):
        module.spec = weightless(module.spec)
        if isinstance(module, EMOLM):
            _emo(module)
        else:
            module.configure_model()
        return {"net.": module._built()}
    if isinstance(module, LearnedPart):
        with torch.device("meta"):
            module.net = module.build()
        return {"net.": module.net}
    raise InvalidType(
        f"the networks of {type(module).__name__} are not known here: give a config whose model is LM, EMOLM, "
        "OSDDrafter, EagleDrafter or a LearnedPart"
    )


def _eagle(module: EagleDrafter) -> nn.Module:
    target = EagleTarget.of(weightless(module.teacher_spec).build().eval().requires_grad_(False))
    if module.cached:
        target.model = None  # its embedding and head alone are read
    module.use_target(target)
    # a warm start reads its head, and looks at the numbers
    with HostReads(), torch.device("meta" if module.init_from is None else "cpu"):
        module.configure_model()
    return module._built().to("meta")


def _emo(module: EMOLM) -> None:
    """Costs without numbers can neither be judged nor projected: they are given their size afterwards."""
    emo = module.emo
    if emo.costs != "adaptive":
        module.emo = dataclasses.replace(emo, costs="adaptive", project=None, force_adaptive=True)
    with torch.device("meta"):  # of the adapters
        module.configure_model()
    module.emo, net = emo, module._built()
    if emo.costs == "adaptive":
        return
    model: Any = net if emo.costs == "head" else weightless(HFModel(path=emo.costs)).build()
    if head_rows(model) != head_rows(net):
        raise InvalidValue(
            f"cost embedding has {head_rows(model)} rows, logits have {head_rows(net)}: see model.emo.costs"
        )
    width = emo.project or model.config.hidden_size
    module.costs = TokenCosts(torch.empty(head_rows(net), width, dtype=DTYPES[emo.cost_dtype], device="meta"))


def teacher(module: pl.LightningModule) -> "PreTrainedModel | None":
    """The frozen target that runs beside what a module trains (after `without_weights`)."""
    if isinstance(module, OSDDrafter):
        return None if module.teacher is None else module.teacher.model
    if isinstance(module, EagleDrafter):
        model: PreTrainedModel | None = module._target().model
        return model
    return None


def teacher_tensors(module: pl.LightningModule) -> list[Tensor]:
    """What a module holds of its target, tied tensors once: all of it, or where states are cached two tables."""
    model = teacher(module)
    if model is not None:
        return list(model.parameters())
    if not isinstance(module, EagleDrafter):
        return []
    target = module._target()
    tables = [target.embedding, target.head_weight, *([] if target.head_bias is None else [target.head_bias])]
    return list({id(table): table for table in tables}.values())


def costs(module: pl.LightningModule) -> TokenCosts | None:
    """The token costs that a module keeps; None: it has none, or makes them anew in each step."""
    if isinstance(module, EMOLM):
        return module.costs
    if isinstance(module, OSDDrafter) and module.loss_name == "emo":
        return module._emo_loss().costs
    return None


def trained_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Those that learn: of a network with adapters, theirs alone."""
    return [p for p in net.parameters() if p.requires_grad]


def family(net: Any) -> str:
    """The architecture, as transformers calls it; a net of ours by its class."""
    named = getattr(net.config, "model_type", None) or getattr(net.config, "family", None)
    return str(named or type(net).__name__)


def token_rows(net: Any) -> int:
    """Ids that a network knows: the rows of its head, of an EAGLE head those of its target's."""
    ours = dataclasses.is_dataclass(net.config)
    rows: int = net.config.vocab_size if ours else head_rows(net)
    return rows


def count(tensors: Iterable[Tensor]) -> int:
    """Elements."""
    return sum(t.numel() for t in tensors)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return count(model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of them."""
    return size(model.parameters())
