"""MAUVE from its definition: joint clusters of two sets of features, and the frontier of their histograms."""

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.text_metrics import frontier_area

_VARIANCE = 0.9  # kept by the principal components that are clustered
_RUNS = 5  # starts of k-means


def mauve(human: Tensor, model: Tensor, clusters: int | None = None, seed: int = 0) -> float:
    """MAUVE of two sets of text features [B, D], in [0, 1]: 1 where they cannot be told apart.

    Args: clusters: default a tenth of the texts of a side, at least 2 (the paper's rule).
    Raises InvalidValue for sets of different width, or fewer than two texts.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    if human.ndim != 2 or model.ndim != 2 or human.shape[1] != model.shape[1] or min(len(human), len(model)) < 2:
        raise InvalidValue(
            f"mauve wants two sets of at least 2 features of one width, got {tuple(human.shape)} and "
            f"{tuple(model.shape)}"
        )
    both = torch.nn.functional.normalize(torch.cat([human, model]).double(), dim=-1).numpy()
    reduced = PCA(n_components=_VARIANCE, svd_solver="full").fit_transform(both) if both.std(0).any() else both
    count = clusters or max(2, min(len(human), len(model)) // 10)
    labels = torch.from_numpy(KMeans(count, n_init=_RUNS, random_state=seed).fit_predict(reduced)).long()
    p, q = (torch.bincount(part, minlength=count).double() for part in (labels[: len(human)], labels[len(human) :]))
    return frontier_area(p / p.sum(), q / q.sum())
