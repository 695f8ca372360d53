"""The served copy of a training draft: the same function, independent weights, swapped as a whole."""

from typing import Any

import pytest
import torch

from draftsmith.inference.errors import InvalidState, InvalidType
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.served_draft import ServedDraft, embedding_rows, engine_of, write_weights
from tests.fakes import markov
from tests.tiny import lm

IDS = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def logits(engine: Any) -> torch.Tensor:
    return engine.head(engine.forward(IDS)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_computes_what_the_model_computes(tied: bool) -> None:
    model = lm()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    engine = engine_of(model)
    assert isinstance(engine, NativeEngine)
    assert torch.allclose(logits(engine), model(IDS).logits, atol=1e-4)


def test_other_families_are_adapted() -> None:
    model = gpt2().eval()
    engine = engine_of(model.train())
    assert isinstance(engine, HFEngine) and not engine.training and model.training
    assert torch.allclose(logits(engine), model.eval()(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("make", [lm, gpt2])
def test_training_on_does_not_change_the_copy(make: Any) -> None:
    model = make()
    engine = engine_of(model)
    before = logits(engine)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(logits(engine), before)
    write_weights(engine, model.state_dict())
    assert torch.allclose(logits(engine), model.eval()(IDS).logits, atol=1e-4)
    assert not torch.allclose(logits(engine), before, atol=1e-2)


def test_a_candidate_serves_only_after_the_swap() -> None:
    model = lm()
    served = ServedDraft(lambda: engine_of(model))
    first = logits(served.active)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    candidate = served.prepare(model.state_dict())
    assert candidate is not served.active
    assert torch.equal(logits(served.active), first) and served.version == 0
    served.swap()
    assert served.active is candidate and served.version == 1
    assert torch.allclose(logits(served.active), model(IDS).logits, atol=1e-4)


def test_another_architecture_is_refused() -> None:
    engine = engine_of(lm(layers=2))
    with pytest.raises(InvalidState, match=r"layers\.1"):
        write_weights(engine, lm(layers=1).state_dict())


def test_embedding_rows() -> None:
    for model in (lm(), gpt2()):
        assert torch.equal(embedding_rows(engine_of(model)), model.get_input_embeddings().weight)


def test_engines_without_a_network_say_so() -> None:
    with pytest.raises(InvalidType, match="MarkovEngine"):
        write_weights(markov(5), {})
    engines = iter([markov(5, 1, seed=1), markov(5, 1, seed=2)])
    served = ServedDraft(lambda: next(engines), lambda engine, weights: setattr(engine, "table", weights["table"]))
    served.prepare({"table": torch.zeros(5, 5)})
    served.swap()
    assert torch.equal(served.active.head(served.active.forward(torch.zeros(1, 1).long())[0]), torch.zeros(1, 1, 5))
