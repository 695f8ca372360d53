"""How an EAGLE head begins: from its target's own matrices, or from a head that somebody trained before."""

import torch
from torch.nn import functional as F

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.eagle_head import EagleConfig, EagleHead, load_tensors
from draftsmith.modules.eagle_target import EagleSizes, EagleTarget
from draftsmith.modules.hf_model import DTYPES


def lend(net: EagleHead, target: EagleTarget) -> None:
    """Give a head what it reads of the target."""
    if not net.config.own_embedding:
        net.use_embedding(lambda: target.embedding)
    if net.config.version == 1:
        net.use_output(lambda x: F.linear(x, target.head_weight, target.head_bias))


def warm_start(path: str, sizes: EagleSizes, target: EagleTarget) -> EagleHead:
    """The head in a directory of any format that `draftsmith` reads, with its own sizes and draft vocabulary.

    Raises InvalidValue for what is no EAGLE head, or one of another target or method.
    """
    from draftsmith.inference.formats import read_drafter

    record = read_drafter(path, target_layers=target.config.get_text_config().num_hidden_layers)
    if not isinstance(record.fields, EagleConfig):
        raise InvalidValue(f"{path} holds no EAGLE head ({record.format}): model.init_from starts from one")
    net = EagleHead(record.fields)
    load_tensors(net, record.tensors, path)
    if net.config.own_embedding:
        net.embed_tokens.weight.requires_grad_(sizes.own_embedding)
    want, got = sizes.config(target.config), net.config
    for name in ("version", "vocab_size", "target_hidden_size"):
        if getattr(want, name) != getattr(got, name):
            raise InvalidValue(
                f"{path} has {name} {getattr(got, name)}, this run {getattr(want, name)}: it is a head for another "
                "target or method"
            )
    return net


@torch.no_grad()
def initialise(net: EagleHead, target: EagleTarget, *, output: bool) -> None:
    """Copy the target's embedding, and with `output` its head's rows of the draft vocabulary, where widths agree."""
    config = net.config
    net.to(DTYPES["float32"])  # master weights, whatever the target's are
    if config.own_embedding and config.hidden_size == config.target_hidden_size:
        net.embed_tokens.weight.copy_(target.embedding)
    same = config.version == 3 and config.hidden_size == config.target_hidden_size
    if output and same and (not config.reduced or bool(net.t2d.any())):  # type: ignore[union-attr]
        net.lm_head.weight.copy_(target.head_weight[net.draft_ids()])
