"""The pass of diagnosis, written apart with every coupling as a value, is that of the served head."""

from pathlib import Path

import pytest
import torch

from draftsmith.inference.hypotheses.contexts import Contexts, draw
from draftsmith.inference.hypotheses.subjects import eagle_subject, target_matrices
from draftsmith.inference.loader import LoadedPart, load
from draftsmith.inference.nets.eagle_head import EagleHead, load_tensors
from draftsmith.modules.eagle_rollout import rollout
from tests.eagles import VARIANTS, toy_record, write_target

STEPS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedPart:
    return load(write_target(Path(tmp_path_factory.mktemp("target"))))


@pytest.fixture(scope="module")
def contexts(target: LoadedPart) -> Contexts:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 64, (n,), generator=generator).tolist() for n in (3, 5, 9, 4) * 2]
    return draw(target, prompts, 8, length=16, anchors=4, steps=STEPS)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_pass_is_that_of_the_served_head(name: str, target: LoadedPart, contexts: Contexts) -> None:
    config = VARIANTS[name]
    record = toy_record(config, seed=4)
    subject = eagle_subject(target, record)
    logits, ids = subject.logits(subject.couplings, contexts, slice(0, 8))
    head = EagleHead(config)
    load_tensors(head, record.tensors, name)
    lent = target_matrices(target.path)
    if not config.own_embedding:
        head.use_embedding(lambda: lent["embedding"])
    if config.version == 1:
        head.use_output(target.part.head)
    with torch.no_grad():
        features = torch.cat([contexts.state(i, slice(0, 8)) for i in config.aux_layers], -1)
        embeds = head.embed(contexts.tokens[:8])
        for k, out in enumerate(rollout(head, embeds, head.project(features[:, :-1]), STEPS)):
            want = head.logits(out)
            rows = contexts.rows[:8].unsqueeze(-1).expand(-1, -1, want.shape[-1])
            near = 1e-5 * float(want.abs().max())
            assert torch.allclose(logits[:, :, k], want.gather(1, rows), atol=near, rtol=0), k
    assert torch.equal(ids, head.draft_ids())
