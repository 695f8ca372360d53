"""Whose embedding and whose head (vllm-project/vllm #46435: head not shared, nothing accepted)."""

from collections.abc import Iterator
from typing import Any

from draftsmith.inference.hypotheses.base import Facts, Hypothesis


def variants(c: Any, facts: Facts) -> Iterator[Hypothesis]:
    """The drafter's own or the target's embedding; own head, the target's, or the embedding as head."""
    if hasattr(c, "embedding"):
        for source, there in (("own", facts.own_embedding), ("target", facts.same_width)):
            if there and source != c.embedding:
                whose = "the target's" if source == "target" else "the drafter's own"
                yield Hypothesis(
                    "embedding",
                    f"{whose} embedding",
                    {"embedding": source},
                    f"the drafter was trained on {whose} embedding",
                    {"any engine": f"load {whose} embed_tokens"},
                )
    if hasattr(c, "head"):
        heads = (
            ("own", facts.own_head, "the drafter's own head"),
            ("target", facts.same_width, "the target's head"),
            ("embedding", facts.own_embedding or facts.same_width, "a head tied to the embedding"),
        )
        for source, there, text in heads:
            if there and source != c.head:
                tied = "true" if source == "embedding" else "false"
                yield Hypothesis(
                    "head",
                    text,
                    {"head": source},
                    f"the drafter was trained with {text}",
                    {"any engine": f"tie_word_embeddings: {tied}, and load {text}"},
                )
