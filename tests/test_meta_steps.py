"""Every training step and decode round on the `meta` device in bfloat16: dtype and device mistakes show without a GPU.

Where a step reads values, `HostReads` answers (masks select everything, numbers are 1, what the host copies is 0), so
the tests also count the reads: each is a synchronisation on a GPU. Where the answers end a computation early the test
says so: `osd_sources.rewrite` plans its rows from counts that are read, so the writing itself is run with counts given;
prompt lookup proposes on the host from the tokens read (zeros here, which repeat, so it does propose).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith.data.batches import OnlineBatch, TokenBatch
from draftsmith.inference import registry
from draftsmith.inference.engine import Engine
from draftsmith.inference.hf_adapter import HFEngine
from draftsmith.inference.native import NativeEngine
from draftsmith.inference.nets.causal_lm import CausalLM, CausalLMConfig
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.eagle_target import EagleSizes, EagleTarget
from draftsmith.modules.emo_lm import EMOLM, EMOConfig
from draftsmith.modules.hf_model import FrozenTeacher, HFModel
from draftsmith.modules.lm import LM
from draftsmith.modules.losses.divergence import NEEDS_FULL_SUPPORT, ROW_LOSSES
from draftsmith.modules.osd_drafter import OSDDrafter
from draftsmith.modules.osd_sources import write_answers
from draftsmith.trainers.meta import HostReads

V = 64
ARCH = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL = HFModel(arch=ARCH, dtype="bfloat16")
BF16 = torch.bfloat16


def ready(module: Any) -> Any:
    """The module with its network on meta, and just enough of a trainer for `training_step`."""
    with torch.device("meta"):
        module.configure_model()
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    module.trainer = SimpleNamespace(strategy=strategy, world_size=2, global_step=0)
    module.log = lambda name, value, **rest: None
    return module


def hf(**changes: Any) -> Any:
    with torch.device("meta"):
        return HFModel(arch=ARCH | changes, dtype="bfloat16").build().eval().requires_grad_(False)


def native() -> Engine:
    config = CausalLMConfig.from_hf(hf().config)
    with torch.device("meta"):
        net = CausalLM(config)
    return NativeEngine(net.to(BF16).eval().requires_grad_(False))


def adapted() -> Engine:
    """An `HFEngine`. It tries a model out by comparing numbers when it wraps one, which meta tensors have not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEngine, "_probe", lambda self: None)
        return HFEngine(hf())


def text(separate: bool = False) -> TokenBatch:
    shape = (3, 16)
    kinds = {"loss_mask": torch.int8, "document": torch.int32}
    fields = {name: torch.zeros(shape, dtype=dtype, device="meta") for name, dtype in kinds.items()}
    ids, rows = torch.zeros(shape, dtype=torch.int64, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    return TokenBatch(ids, fields["loss_mask"], fields["document"], rows, separate)


def online(processed: bool = False) -> OnlineBatch:
    records, time, marked, kept = 2, 12, 5, 8

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return OnlineBatch(
        contexts=empty(records, time),
        lengths=empty(records),
        row=empty(marked),
        position=empty(marked),
        law_ids=empty(marked, kept),
        logprob_bits=empty(marked, kept, dtype=torch.int32),
        tail_bits=empty(marked, dtype=torch.int32),
        requests=empty(records),
        processed=processed,
    )


def learns(module: Any, batch: Any) -> HostReads:
    """One training step and its gradients; what the host read in it."""
    with HostReads() as reads:
        loss = module.training_step(batch, 0)
        loss.backward()
    assert loss.device.type == "meta" and loss.dtype == torch.float32 and loss.shape == ()
    for name, p in module.named_parameters():
        assert p.dtype == BF16 and p.device.type == "meta", name
        assert p.grad is not None and p.grad.dtype == BF16 and p.grad.device.type == "meta", name
    return reads


# --- training steps


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_the_lm(separate: bool, checkpointing: bool) -> None:
    reads = learns(ready(LM(SMALL, gradient_checkpointing=checkpointing)), text(separate)).reads
    # the guard against losses that are not finite; and transformers, which without positions looks for packed ones
    assert reads["number"] == 1 + (not separate)
    assert reads["copy"] == 0


@pytest.mark.parametrize("loss", sorted(ROW_LOSSES))
def test_a_step_of_offline_osd(loss: str) -> None:
    module = OSDDrafter(draft=SMALL, loss=loss)
    module.use_teacher(FrozenTeacher(hf(hidden_size=64, intermediate_size=96)))
    reads = learns(ready(module), text()).reads
    passes = 1 + (loss != "ce")  # of transformers' classes: the draft, and the teacher
    assert reads["number"] == 1 + passes and reads["copy"] == 0
    assert all(p.grad is None for p in module._teacher().model.parameters())


@pytest.mark.parametrize("loss", sorted(ROW_LOSSES))
@pytest.mark.parametrize("processed", [False, True])
def test_a_step_of_online_osd(loss: str, processed: bool) -> None:
    if processed and loss in NEEDS_FULL_SUPPORT:
        pytest.skip("refused at the step: infinite against laws with zeros")
    reads = learns(ready(OSDDrafter(draft=SMALL, loss=loss)), online(processed)).reads
    assert reads["number"] == 2 and reads["copy"] == 0


@pytest.mark.parametrize("costs", ["head", "adaptive"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_emo(costs: str, checkpointing: bool) -> None:
    module = EMOLM(SMALL, EMOConfig(costs=costs), gradient_checkpointing=checkpointing)
    reads = learns(ready(module), text()).reads
    assert reads["number"] == 2 and reads["copy"] == 0  # as in maximum likelihood
    # the distinct labels of a chunk (one here; recomputed in backward it is read again)
    assert reads["mask"] >= 1
    if module.costs is not None:
        assert module.costs.unit.device.type == "meta" and module.costs.unit.dtype == torch.float32


@pytest.mark.parametrize(
    "sizes", [EagleSizes(), EagleSizes(draft_vocab_size=40), EagleSizes(1)], ids=["all", "reduced", "eagle1"]
)
@pytest.mark.parametrize("separate", [False, True])
def test_a_step_of_eagle(sizes: EagleSizes, separate: bool) -> None:
    module = EagleDrafter(SMALL, sizes, steps=2 if sizes.version == 3 else 1)
    module.use_target(EagleTarget.of(hf()))
    with HostReads():  # a reduced vocabulary is looked at
        ready(module)
    module.net.to(BF16)
    reads = learns(module, text(separate)).reads
    assert reads["copy"] == 0 and reads["number"] >= 2  # the guard, and whether there was a label


def test_the_students_own_answers_are_written() -> None:
    student, teacher = adapted(), adapted()
    batch = text()
    with HostReads() as reads:
        written, lengths = write_answers(
            batch.ids,
            [4, 5, 6],
            [16, 16, 12],
            student=student,
            teacher=teacher,
            by_student=torch.zeros(batch.ids.shape, dtype=torch.bool, device="meta"),
            temperature=1.0,
            seed=0,
            row_ids=batch.sample_id,
            stop_ids=[1],
        )
    assert written.shape == batch.ids.shape and written.device.type == lengths.device.type == "meta"
    assert sum(reads.reads.values()) <= 1  # one look, after 16 tokens, at whether every row has stopped


# --- decode rounds

SETTINGS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "speculative": {"draft_length": 3, "schedule": "constant", "fallback": "never"},
    "prompt_lookup": {"draft_length": 3, "schedule": "constant", "fallback": "never"},
}
SAMPLING = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.8),
    "processed": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
}


def decoder(name: str, kind: str, sampling: SamplingParams) -> Any:
    def make() -> Engine:
        return native() if kind == "native" else adapted()

    parts: dict[str, Any] = {"target": make()}
    if name == "speculative":
        parts["draft"] = make()
    return registry.build(name, parts, sampling=sampling, settings=SETTINGS[name], seed=0)


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("sampling", sorted(SAMPLING))
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_decode_rounds_read_once_each(name: str, sampling: str, kind: str) -> None:
    made = decoder(name, kind, SAMPLING[sampling])
    requests = [TokenRequest((0,) * n, max_new_tokens=6, row_id=n) for n in (5, 7, 9)]  # ragged
    with HostReads() as reads:
        result = made.decode(requests)
    # what the host copies is zeros: k = 0 accepted and token 0 next, so every round commits one token to every row
    assert result.output == [[0] * 6] * 3
    assert result.nfe["target"] == 6
    assert reads.reads["copy"] == 6  # the round's only wait for the device
    assert reads.reads["number"] == reads.reads["mask"] == 0


def test_drafts_were_really_proposed() -> None:
    for name in ("speculative", "prompt_lookup"):
        made, offered = decoder(name, "native", SAMPLING["greedy"]), []
        verify = made._verify

        def watch(session: Any, proposal: Any, *rest: Any, verify: Any = verify, offered: list[int] = offered) -> Any:
            offered.append(proposal.tokens.shape[1])
            return verify(session, proposal, *rest)

        made._verify = watch
        with HostReads():
            made.decode([TokenRequest((0,) * 8, max_new_tokens=6, row_id=0)])
        assert offered and max(offered) == 3, name


# --- the tests can fail


def test_a_tensor_left_on_the_cpu_is_noticed() -> None:
    batch = text()
    batch.ids = torch.ones(batch.ids.shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="devices cpu, meta"), HostReads():
        ready(LM(SMALL)).training_step(batch, 0)


def test_a_float32_weight_in_a_bf16_network_is_noticed() -> None:
    module = ready(LM(SMALL))
    module.net.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False, device="meta")
    with pytest.raises(RuntimeError, match="dtype"), HostReads():
        module.training_step(text(), 0)


def test_a_further_read_in_a_round_is_counted() -> None:
    made = decoder("autoregressive", "native", SAMPLING["greedy"])
    head = made._target.head

    class Reading:
        """The engine, with a host read in its head."""

        def __getattr__(self, name: str) -> Any:
            return getattr(native_engine, name)

        def head(self, hidden: Tensor) -> Tensor:
            assert float(hidden.sum()) == 1.0
            return head(hidden)

    native_engine = made._target
    made._target = Reading()
    with HostReads() as reads:
        made.decode([TokenRequest((0, 0), max_new_tokens=3, row_id=0)])
    assert reads.reads["number"] == 3
