"""What tests spawn in processes of their own (functions of a test file cannot be pickled under importlib mode)."""

import torch
import torch.distributed as dist
from torch import Tensor


def _join(rank: int, store: str, ranks: int = 2) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)


def emo_vocabulary_parallel(rank: int, store: str) -> None:
    """EMO and cross-entropy with the head's rows on two ranks, uneven parts, against the whole head."""
    from draftsmith.modules.losses.chunked_head import chunked_head
    from draftsmith.modules.losses.costs import TokenCosts
    from draftsmith.modules.losses.divergence import RowLoss, ce
    from draftsmith.modules.losses.emo import EMO, Mix
    from draftsmith.modules.losses.row_gradients import VocabShard

    _join(rank, store)
    n, d, v = 19, 6, 23
    start, size = ((0, 9), (9, 14))[rank]
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, d, generator=g, dtype=torch.float64) for s in (n, v))
    labels, kept = torch.randint(v, (n,), generator=g), torch.arange(n) % 4 > 0
    costs = TokenCosts.of(torch.randn(v, 5, generator=g, dtype=torch.float64))
    bias = torch.linspace(-1, 1, v, dtype=torch.float64)

    def run(loss: RowLoss, shard: VocabShard | None, mode: str) -> tuple[Tensor, ...]:
        part = slice(None) if shard is None else slice(start, start + size)
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight[part], bias[part]))
        out = chunked_head(
            h, w, labels, row_loss=loss, example_weight=kept, bias=b, chunk_rows=4, mode=mode, shard=shard
        )
        (2.0 * out.mean).backward()
        assert out.stats is not None and h.grad is not None and w.grad is not None and b.grad is not None
        stats = (out.stats.loss, out.stats.agree, out.stats.alpha)
        return out.total.detach(), h.grad, w.grad, b.grad, *stats, *out.stats.more.values()

    shard, rows = VocabShard(start, size, v), slice(start, start + size)
    for mode in ("grad_in_forward", "recompute"):
        for whole, part in [
            (EMO(costs, mix), EMO(costs.shard(start, size), mix)) for mix in (Mix(), Mix("emo_anchored", "shift"))
        ] + [(ce, ce)]:
            want, got = run(whole, None, mode), run(part, shard, mode)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                torch.testing.assert_close(a, b[rows] if i in (2, 3) else b)
    dist.destroy_process_group()
