"""The distilled decoder's network: causal, keeps what is clean, starts as its teacher, refuses untrained starts."""

import pytest
import torch
from torch import Tensor

from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.nets.distilled import DistilledConfig, DistilledDecoder
from tests import images


def student(starts: tuple[int, ...] = (0, 4), **changes: object) -> DistilledDecoder:
    torch.manual_seed(1)
    fields: dict[str, object] = {"codes": 16, "code_dim": 4, "side": 4, "num_classes": 3, "hidden_size": 32}
    fields |= {"num_layers": 2, "num_heads": 2, "intermediate_size": 48, "starts": starts} | changes
    net = DistilledDecoder(DistilledConfig(**fields))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    net.codebook.normal_(generator=torch.Generator().manual_seed(7))
    return net.eval()


def drawn(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 16, 4, generator=generator), torch.arange(batch) % 3


@torch.no_grad()
def test_a_position_reads_its_own_noise_and_what_stands_before() -> None:
    net, (x, classes) = student(), drawn()
    clean = torch.zeros(3, dtype=torch.int64)
    before = torch.cat([net.head(net(x, clean, classes)[0]), net(x, clean, classes)[1]], -1)
    for j in (0, 7, 15):
        changed = x.clone()
        changed[:, j] += 1
        after = torch.cat([net.head(net(changed, clean, classes)[0]), net(changed, clean, classes)[1]], -1)
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-6)
        assert (after[:, j:] - before[:, j:]).abs().amax((0, 2)).min() > 1e-4


@torch.no_grad()
def test_it_knows_codes_from_noise_and_classes_apart() -> None:
    net, (x, classes) = student(), drawn()
    base = net.head(net(x, torch.zeros(3, dtype=torch.int64), classes)[0])
    assert (net.head(net(x, torch.full((3,), 4), classes)[0]) - base).abs().max() > 1e-3
    assert (net.head(net(x, torch.zeros(3, dtype=torch.int64), (classes + 1) % 3)[0]) - base).abs().max() > 1e-3


class TestSample:
    def test_one_pass_is_the_argmax(self) -> None:
        net, (x, classes) = student(), drawn()
        codes, vectors = net.sample(x, classes)
        logits = net.head(net(x, torch.zeros(3, dtype=torch.int64), classes)[0])
        assert torch.equal(codes, logits.argmax(-1)) and torch.equal(vectors, net.codebook[codes])

    def test_later_passes_keep_what_stands_before_them(self) -> None:
        net, (x, classes) = student(), drawn()
        one, _ = net.sample(x, classes)
        two, vectors = net.sample(x, classes, (0, 4))
        assert torch.equal(two[:, :4], one[:, :4]) and torch.equal(vectors[:, :4], net.codebook[one[:, :4]])
        assert (two[:, 4:] != one[:, 4:]).any()

    def test_the_split(self) -> None:
        net, (x, classes) = student(), drawn()
        _, free = net(x, torch.zeros(3, dtype=torch.int64), classes)
        codes, vectors = net.sample(x, classes, split=0)
        torch.testing.assert_close(vectors, free)
        nearest = torch.cdist(free, net.codebook.expand(3, -1, -1)).argmin(-1)
        assert torch.equal(codes, nearest)
        half, mixed = net.sample(x, classes, split=8)
        assert torch.equal(mixed[:, :8], net.codebook[half[:, :8]]) and torch.equal(mixed[:, 8:], free[:, 8:])

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        net, (x, classes) = student(), drawn(5)
        together, _ = net.sample(x, classes, (0, 4))
        assert [
            net.sample(x[i : i + 1], classes[i : i + 1], (0, 4))[0][0].tolist() for i in range(5)
        ] == together.tolist()

    @pytest.mark.parametrize("starts", [(), (4,), (0, 5), (0, 4, 4), (4, 0)])
    def test_starts_that_were_not_trained(self, starts: tuple[int, ...]) -> None:
        x, classes = drawn()
        with pytest.raises(InvalidValue, match=r"among those trained, \[0, 4\]; got"):
            student().sample(x, classes, starts)


@torch.no_grad()
def test_it_starts_as_its_teacher() -> None:
    """With a codebook that spans them, the projection gives every code the teacher's own embedding."""
    teacher, net = images.raster(), student(code_dim=16)
    codebook = torch.eye(16)
    net.start_from(teacher, codebook)
    torch.testing.assert_close(net.word_embed(codebook), teacher.embed_tokens.weight, rtol=1e-4, atol=1e-4)
    for own, given in zip(net.layers, teacher.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), given.parameters(), strict=True))
    with pytest.raises(InvalidValue, match="hidden_size is 16, the teacher's 32"):
        student(hidden_size=16, code_dim=16).start_from(teacher, codebook)


@pytest.mark.parametrize(
    ("starts", "message"), [((), "got \\[\\]"), ((2,), "ascend from 0"), ((0, 16), "below 16"), ((0, 4, 2), "ascend")]
)
def test_bad_starts(starts: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        DistilledConfig(16, 4, 4, 3, 32, 1, 2, 48, starts)


def test_bad_classes_and_split() -> None:
    net, (x, classes) = student(), drawn()
    with pytest.raises(InvalidValue, match=r"class ids must lie in \[0, 2\]"):
        net.check_classes(torch.tensor([3]))
    with pytest.raises(InvalidValue, match=r"split must lie in \[0, 16\], got 17"):
        net.sample(x, classes, split=17)
    with pytest.raises(InvalidValue, match=r"the codebook is \[3, 4\], must be \[16, 4\]"):
        net.attach(torch.zeros(3, 4))
