"""The state cache: plan and quota, stored numbers against a plain pass, resume, damage, keys, and training from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data import teacher_states
from draftsmith.data.batches import PADDING
from draftsmith.data.corpus import CorpusConfig
from draftsmith.data.state_formats import decode, encode
from draftsmith.data.teacher_states import (
    Plan,
    StateReader,
    StatesConfig,
    TeacherStatesModule,
    plain_states,
    state_layers,
    verify,
)
from draftsmith.data.text import TextConfig, TextDataModule
from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.load_engine import load_engine
from draftsmith.modules.eagle_drafter import EagleDrafter
from draftsmith.modules.eagle_laws import TopLaws
from draftsmith.modules.eagle_target import EagleSizes
from draftsmith.modules.hf_model import HFModel
from draftsmith.modules.losses.divergence import FullLaw
from tests.tiny import write_lm


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A target and a few texts."""
    write_lm(tmp_path / "target", seed=1, layers=6, max_length=64)
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def add{i}(a, b):\n    return a + b * {i}\n" * 6)
    return tmp_path


def data_for(place: Path, separate: bool = True, length: int = 24, **states: Any) -> TeacherStatesModule:
    corpus = CorpusConfig(sources=(str(place / "text"),), dedup=None, val_fraction=0.3)
    text = TextConfig(
        tokenizer=str(place / "target"),
        length=length,
        batch_size=2,
        separate_documents=separate,
        cache_dir=str(place / "cache"),
    )
    return TeacherStatesModule(corpus, text, StatesConfig(target=str(place / "target"), **states))


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_numbers_survive_storing_within_half_a_step(kind: str) -> None:
    states = torch.randn(3, 5, 2, 16) * torch.tensor([1.0, 50.0]).view(1, 1, 2, 1)
    states[0, 0, 0] = 0.0
    stored, scale = encode(states, kind)
    assert not stored.is_floating_point() and scale.dtype == torch.int32
    step = states.abs().amax(-1, keepdim=True) / 127 if kind == "int8" else states.abs() * 2.0**-7
    assert ((decode(stored, scale) - states).abs() <= 0.501 * step + 1e-12).all()


@pytest.mark.parametrize("separate", [True, False])
def test_batches_bring_the_states_of_a_plain_pass(
    place: Path, separate: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_for(place, separate)
    data.prepare_data()
    said = capsys.readouterr().err
    assert "GB in" in said and "relative_rms" in said and said.index("GB in") < said.index("relative_rms")
    data.setup()
    assert data.aux_layers == (2, 3)
    engine = load_engine(place / "target")
    layers = state_layers(engine, None)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            features, last = batch.observed()
            plain = plain_states(engine, batch, layers)
            real = batch.document != PADDING
            assert features.shape[-1] == 64 and real.any()
            for found, expected in ((features, plain[:, :, :2].flatten(2)), (last, plain[:, :, 2])):
                gap = (found - expected)[real].abs()
                assert gap.max() <= 0.51 / 127 * plain.abs().max()
    index = StateReader(data.states_directory / "train").index
    assert index["errors"]["law_tv"] < 0.05 and max(index["errors"]["relative_rms"]) < 0.02


def test_a_second_run_writes_nothing_and_a_killed_one_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_states, "_SHARD_BYTES", 6000)  # a few samples a shard
    data = data_for(place)
    data.prepare_data()
    folder = data.states_directory / "train"
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert len(list(folder.glob("*.safetensors"))) > 2
    data_for(place).prepare_data()
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    (folder / "states.json").unlink()  # killed while the second shard was written
    (folder / "00001.json").unlink()
    (folder / "00002.safetensors").write_bytes(b"torn")
    again = data_for(place)
    again.prepare_data()
    again.setup()
    kept = {p for p, t in before.items() if p.exists() and p.stat().st_mtime_ns == t}
    assert folder / "00000.safetensors" in kept and folder / "00001.safetensors" not in kept
    StateReader(folder, hashes=True)


def test_ranks_share_the_shards(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_states, "_SHARD_BYTES", 6000)
    data = data_for(place)
    TextDataModule.prepare_data(data)
    data._open()
    data.write_states(rank=1, ranks=2)
    folder = data.states_directory / "train"
    names = {p.name for p in folder.glob("*.safetensors")}
    assert "00001.safetensors" in names and "00000.safetensors" not in names and not (folder / "states.json").exists()
    data.write_states(rank=0, ranks=2)
    data.setup()
    assert len(data._packed("train")) > 0


def test_damage_is_noticed(place: Path) -> None:
    data = data_for(place)
    data.prepare_data()
    folder = data.states_directory / "train"
    shard = folder / "00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InvalidState, match="is not what was written"):
        StateReader(folder, hashes=True)
    shard.write_bytes(content[:-8])
    with pytest.raises(InvalidState, match="delete it"):
        data.setup()


def test_states_of_another_target_are_noticed(place: Path) -> None:
    data = data_for(place)
    data.prepare_data()
    write_lm(place / "other", seed=2, layers=6, max_length=64)
    other = load_engine(place / "other")
    with pytest.raises(InvalidState, match="another target or text"):
        verify(data.states_directory / "train", TextDataModule._packed(data, "train"), other, state_layers(other, None))


def test_everything_that_decides_the_states_is_in_their_key(place: Path) -> None:
    write_lm(place / "other", seed=2, layers=6, max_length=64)
    plain = data_for(place).states_key()
    others = [
        data_for(place, separate=False),
        data_for(place, length=25),
        data_for(place, aux_layers=(2, 4)),
        data_for(place, format="bfloat16"),
        data_for(place, laws=4),
    ]
    changed = data_for(place)
    changed.states = StatesConfig(target=str(place / "other"))
    keys = [plain, *(d.states_key() for d in (*others, changed))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("laws", [0, 5])
def test_the_plan_is_exact_and_the_quota_is_checked_before_anything_is_written(place: Path, laws: int) -> None:
    data = data_for(place, laws=laws)
    data.prepare_data()
    index = StateReader(data.states_directory / "train").index
    plan = Plan(index["samples"], index["length"], index["states"], index["width"], index["format"], laws)
    tensors = sum(torch.tensor(x.shape).prod() * x.element_size() for x in _tensors(data.states_directory / "train"))
    assert int(tensors) == round(plan.gigabytes * 1e9)
    small = data_for(place, max_gb=1e-6, format="bfloat16")
    with pytest.raises(InvalidValue, match=r"more than states\.max_gb"):
        small.prepare_data()
    assert not small.states_directory.exists()


def _tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [x for path in folder.glob("*.safetensors") for x in load_file(path).values()]


def test_settings_that_cannot_be_are_refused(place: Path) -> None:
    with pytest.raises(InvalidValue, match="did you mean 'int8'"):
        StatesConfig(format="int9")
    with pytest.raises(InvalidValue, match=r"states\.laws must be at least 0"):
        StatesConfig(laws=-1)
    with pytest.raises(InvalidValue, match="keeps 321 tokens of each law, the target has 320"):
        data_for(place, laws=321).prepare_data()
    with pytest.raises(InvalidValue, match="max_gb"):
        StatesConfig(max_gb=0)
    with pytest.raises(InvalidValue, match="no such target directory"):
        TeacherStatesModule(states=StatesConfig(target=str(place / "nobody"))).states_key()
    with pytest.raises(InvalidValue, match="layer 7, the target has 6"):
        data_for(place, aux_layers=(7,)).prepare_data()


def test_training_on_cached_states_is_training_on_live_ones(place: Path) -> None:
    """The same loss but for the quantisation, from the target's embedding and head alone."""
    data = data_for(place, format="bfloat16")
    data.prepare_data()
    data.setup()
    spec = HFModel(path=str(place / "target"))
    losses = []
    batch = next(iter(data.val_dataloader()))
    for cached in (True, False):
        torch.manual_seed(0)
        module = EagleDrafter(spec, steps=3, cached=cached)
        module.configure_model()
        assert (module.target.model is None) == cached  # type: ignore[union-attr]
        brought = batch if cached else next(iter(TextDataModule.val_dataloader(_without_states(place))))
        with torch.no_grad():
            losses.append(float(module.unroll(brought, statistics=False).total))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]


def _without_states(place: Path) -> TextDataModule:
    like = data_for(place)
    data = TextDataModule(like.corpus, like.text)
    data.prepare_data()
    data.setup()
    return data


def test_the_index_holds_what_was_measured(place: Path) -> None:
    data = data_for(place)
    data.prepare_data()
    index = json.loads((data.states_directory / "val" / "states.json").read_text())
    assert set(index["errors"]) == {"relative_rms", "law_tv", "law_agree"} and len(index["errors"]["relative_rms"]) == 3


# --- the likeliest tokens of each law instead of the last state


def test_kept_laws_are_those_of_a_plain_pass_and_their_error_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_for(place, laws=12)
    data.prepare_data()
    said = capsys.readouterr().err
    assert "2 states of width 32 in int8 and 12 tokens of each law" in said and "law_mass" in said
    data.setup()
    engine = load_engine(place / "target")
    batch = next(iter(data.val_dataloader()))
    features, last = batch.observed()
    kept = batch.laws()
    assert last is None and features.shape[-1] == 64 and kept is not None and data.aux_layers == (2, 3)
    real = batch.document != PADDING
    plain = engine.head(plain_states(engine, batch, state_layers(engine, None))[:, :, -1]).log_softmax(-1)
    ids, logp = kept
    torch.testing.assert_close(logp[real], plain.topk(12, -1).values[real], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(logp[real], plain.gather(-1, ids)[real], rtol=1e-3, atol=2e-3)
    errors = StateReader(data.states_directory / "train").index["errors"]
    assert len(errors["relative_rms"]) == 2 and errors["law_agree"] > 0.99
    assert 0 < errors["law_mass"] < 1 and errors["law_tv"] == pytest.approx(1 - errors["law_mass"], abs=1e-3)
    other = load_engine(write_lm(place / "other", seed=2, layers=6, max_length=64))
    with pytest.raises(InvalidState, match="another target or text"):
        verify(data.states_directory / "train", TextDataModule._packed(data, "train"), other, state_layers(other, None))


@pytest.mark.parametrize("draft_vocab_size", [None, 200])
@pytest.mark.parametrize("loss", ["ce", "kl", "jsd", "tv", "nla", "lk_hybrid"])
def test_a_head_learns_the_same_from_kept_laws_as_from_last_states(
    place: Path, loss: str, draft_vocab_size: int | None
) -> None:
    """With all tokens kept the loss is that of whole laws; with a few it stays finite, and so do the gradients."""
    spec, losses = HFModel(path=str(place / "target")), {}
    for laws in (0, 320, 3):
        data = data_for(place, format="bfloat16", laws=laws)
        data.prepare_data()
        data.setup()
        torch.manual_seed(0)
        sizes = EagleSizes(draft_vocab_size=draft_vocab_size)
        module = EagleDrafter(spec, sizes, steps=2, cached=True, loss=loss)
        module.configure_model()
        assert module.net is not None
        if draft_vocab_size is not None:
            module.net.set_draft_vocabulary(torch.arange(draft_vocab_size) + 60)
        out = module.unroll(next(iter(data.val_dataloader())), statistics=False)
        out.total.backward()
        assert len(out.step) > 0
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.net.parameters())
        losses[laws] = float(out.total.detach())
    assert losses[320] == pytest.approx(losses[0], rel=5e-3)
    assert losses[3] < float("inf") and losses[3] != losses[0]  # other laws, whose mean loss may lie close


def test_a_few_tokens_of_a_law_over_a_draft_vocabulary_by_hand() -> None:
    ids = torch.tensor([[3, 1], [0, 2], [4, 0]])
    p = torch.tensor([[0.5, 0.25], [0.9, 0.1], [0.6, 0.2]])
    t2d = torch.tensor([False, True, False, True, False, True])  # draft ids 0, 1, 2 are 1, 3, 5
    laws = TopLaws.of(ids, p.log(), t2d, 3)
    assert laws.argmax.tolist() == [3, 0, 4] and laws.known.tolist() == [True, False, False]
    row = laws.at(torch.tensor([0, 2, 0]))[0:2]
    assert isinstance(row, FullLaw)
    torch.testing.assert_close(row.logprobs.exp(), torch.tensor([[0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"loss": "rkl"}, "rkl needs whole laws"), ({"head": EagleSizes(version=1)}, "EAGLE-1 learns")],
)
def test_what_needs_whole_laws_says_so(place: Path, settings: dict[str, Any], said: str) -> None:
    data = data_for(place, laws=3, **({"aux_layers": (6,)} if "head" in settings else {}))
    data.prepare_data()
    data.setup()
    module = EagleDrafter(HFModel(path=str(place / "target")), steps=1, cached=True, **settings)
    module.configure_model()
    with pytest.raises(InvalidValue, match=said):
        module.unroll(next(iter(data.val_dataloader())), statistics=False)
