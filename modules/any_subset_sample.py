"""The text panel of any-subset training: a validation sample with a gap that the model filled, for TensorBoard.

TensorBoard strips styles from text, so colours are squares: green before a token that is the text's own, red before
another, with the text's own behind it.
"""

from typing import Any

import torch
from torch import Tensor

from draftsmith.inference.nets.any_subset_lm import AnySubsetLM
from draftsmith.inference.orders import lattice_rank, order_of

HOLES, WINDOW = 12, 64  # tokens that are filled, of so many
RIGHT, WRONG = "\N{LARGE GREEN SQUARE}", "\N{LARGE RED SQUARE}"


@torch.no_grad()
def infilled(net: AnySubsetLM, ids: Tensor, tokenizer: Any | None) -> str:
    """Markdown: the middle of the first tokens of int64 [N] filled greedily, one after the other.

    The number of forwards depends on N alone. tokenizer: None shows the ids.
    """
    ids = ids[: min(WINDOW, net.config.max_length)]
    count = min(HOLES, len(ids) - 1)
    first = (len(ids) - count) // 2
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[first : first + count] = False
    rank, num_visible = lattice_rank(visible.unsqueeze(0)), visible.sum().view(1)
    tokens = torch.where(visible, ids, net.config.mask_id).unsqueeze(0)
    for position in order_of(rank)[0, len(ids) - count :]:
        hidden = net(tokens, rank, num_visible, position.view(1, 1))
        tokens[0, position] = net.head(hidden)[0, 0].argmax()
    return panel(ids.tolist(), tokens[0].tolist(), range(first, first + count), tokenizer)


def panel(truth: list[int], filled: list[int], holes: range, tokenizer: Any | None) -> str:
    """Markdown of a filled sample; holes: its positions that were filled."""

    def shown(ids: list[int]) -> str:
        text = " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))
        return text.replace("`", "'").replace("\n", "\N{RETURN SYMBOL}") or "\N{OPEN BOX}"

    middle = []
    for i in holes:
        same = truth[i] == filled[i]
        middle.append(f"{RIGHT if same else WRONG}`{shown([filled[i]])}`{'' if same else f' (`{shown([truth[i]])}`)'}")
    before, after = truth[: holes.start], truth[holes.stop :]
    right = sum(truth[i] == filled[i] for i in holes)
    return f"`{shown(before)}` {' '.join(middle)} `{shown(after)}`\n\n{right} of {len(holes)} tokens are the text's own"
