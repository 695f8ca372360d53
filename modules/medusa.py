"""Medusa-1's loss on a frozen target: all that training the baseline heads needs beside an optimizer.

Source: Medusa (arXiv 2401.10774), section 2.2.1 (the base model stays as it is). The legacy trainer sums the
heads unweighted; here head m counts decay^m, as in the paper.
Shape letters: B batch, T time, D width, M heads, V vocabulary.
"""

from torch import Tensor

from draftsmith.data.batches import TokenBatch
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.medusa import MedusaHeads
from draftsmith.modules.losses.chunked_head import chunked_head
from draftsmith.modules.losses.divergence import ROW_LOSSES


def medusa_loss(
    heads: MedusaHeads,
    last: Tensor,  # [B, T, D], the target's states after its final norm, without gradient
    batch: TokenBatch,
    decay: float = 0.8,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over heads of decay^m times the mean cross-entropy of head m; row t of head m is held to token t + m + 2.

    A row counts iff that token is a label of the row's document. Raises InvalidValue for a decay outside (0, 1].
    """
    if not 0 < decay <= 1:
        raise InvalidValue(f"decay must lie in (0, 1], got {decay}")
    total = last.new_zeros(())
    for m, (blocks, matrix) in enumerate(heads.parts()):
        shift = m + 2
        label = batch.loss_mask[:, shift:].bool() & (batch.document[:, shift:] == batch.document[:, :-shift])
        out = chunked_head(
            blocks(last[:, :-shift]).flatten(0, 1),
            matrix.weight,
            batch.ids[:, shift:].flatten(),
            row_loss=ROW_LOSSES["ce"],
            example_weight=label.flatten(),
            chunk_rows=chunk_rows,
            statistics=False,
        )
        total = total + decay**m * out.mean
    return total
