"""MAUVE of two sets of text features: by the package mauve-text where that is installed (extra `mauve`), else from its
definition.

Source: "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers" (arXiv 2102.01454).
Both take joint principal components, joint clusters and the frontier of the two histograms by the same settings. They
differ in whose k-means finds the clusters (faiss, scikit-learn): compare figures of one implementation only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.text_metrics import frontier_area

_VARIANCE = 0.9  # kept by the principal components that are clustered
_RUNS = 5  # starts of k-means
_PACKAGE = "mauve-text"


def mauve(human: Tensor, model: Tensor, clusters: int | None = None, seed: int = 0) -> float:
    """MAUVE of two sets of text features [B, D], in [0, 1]: 1 where they cannot be told apart; see `implementation`.

    Args: clusters: default a tenth of the texts of a side, at least 2 (the paper's rule).
    Raises InvalidValue for sets of different width, or fewer than two texts.
    """
    if human.ndim != 2 or model.ndim != 2 or human.shape[1] != model.shape[1] or min(len(human), len(model)) < 2:
        raise InvalidValue(
            f"mauve wants two sets of at least 2 features of one width, got {tuple(human.shape)} and "
            f"{tuple(model.shape)}"
        )
    count = clusters or max(2, min(len(human), len(model)) // 10)
    by = by_definition if _installed() is None or not _differing(human, model) else by_package
    return by(human, model, count, seed)


def implementation() -> str:
    """What computes `mauve` here, for logs: the package and its version, or draftsmith."""
    found = _installed()
    return "draftsmith, from its definition" if found is None else f"{_PACKAGE} {found}"


def by_definition(human: Tensor, model: Tensor, clusters: int, seed: int = 0) -> float:
    """MAUVE with scikit-learn's k-means."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    both = torch.nn.functional.normalize(torch.cat([human, model]).double(), dim=-1).numpy()
    if _differing(human, model):
        both = PCA(n_components=_VARIANCE, svd_solver="full").fit_transform(both)
    labels = torch.from_numpy(KMeans(clusters, n_init=_RUNS, random_state=seed).fit_predict(both)).long()
    p, q = (torch.bincount(part, minlength=clusters).double() for part in (labels[: len(human)], labels[len(human) :]))
    return frontier_area(p / p.sum(), q / q.sum())


def by_package(human: Tensor, model: Tensor, clusters: int, seed: int = 0) -> float:
    """MAUVE by mauve-text. It is given features, so that it loads no model. Raises ImportError where it is missing."""
    from mauve import compute_mauve

    with _silent():
        found = compute_mauve(
            p_features=human.double().numpy(), q_features=model.double().numpy(), num_buckets=clusters, seed=seed,
            kmeans_explained_var=_VARIANCE, kmeans_num_redo=_RUNS, verbose=False,
        )  # fmt: skip
    return float(found.mauve)


def _installed() -> str | None:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        return None


def _differing(human: Tensor, model: Tensor) -> bool:
    """Whether there is any variance in the directions; without it there are no principal components."""
    return bool(torch.nn.functional.normalize(torch.cat([human, model]).double(), dim=-1).std(0).any())


@contextmanager
def _silent() -> Iterator[None]:
    """faiss warns, from C++, of clusters with fewer than 39 points; MAUVE's rule always gives 20."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
