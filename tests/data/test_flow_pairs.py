"""Pairs for distilled decoding: noise by counter, and a flow whose law is the teacher's."""

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from draftsmith.data.batches import PADDING
from draftsmith.data.flow_pairs import LivePairs, PairsConfig, carry, classes
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.flow_noise import noise
from draftsmith.inference.image_law import ImageLaw
from draftsmith.inference.sampling import SamplingParams
from tests import images

CODES = 6


def law(**options: float) -> ImageLaw:
    return ImageLaw(images.raster(codes=CODES, side=2), SamplingParams(temperature=1.0), guidance=options.get("w", 1.5))


def vectors(width: int = 3) -> Tensor:
    codebook = torch.randn(CODES, width, generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.normalize(codebook, dim=-1) * 1.5


class TestNoise:
    def test_it_is_normal_and_independent_of_the_batch(self) -> None:
        drawn = noise(0, torch.arange(2000), 4, 3)
        assert kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
        assert torch.equal(noise(0, torch.tensor([17, 3]), 4, 3), drawn[[17, 3]])
        assert not torch.equal(noise(1, torch.arange(5), 4, 3), drawn[:5])
        flat = drawn.flatten(1)
        correlation = torch.corrcoef(flat.T) - torch.eye(12)
        assert correlation.abs().max() < 5 / 2000**0.5

    def test_classes_are_even(self) -> None:
        counts = classes(0, torch.arange(3000), 3).bincount(minlength=3)
        assert chisquare(counts).pvalue > 1e-3


class TestCarry:
    @torch.no_grad()
    def test_the_flow_has_the_teachers_law(self) -> None:
        """The first two codes, against the product of the step laws."""
        n, teacher = 8000, law()
        label = torch.full((n,), 1)
        codes = carry(teacher, vectors(), label, noise(2, torch.arange(n), 4, 3))
        first = torch.arange(CODES)
        prefix = torch.stack((first, *[torch.zeros_like(first)] * 3), 1)
        laws = teacher.forced(prefix, torch.full((CODES,), 1)).double()
        joint = (laws[0, 0].unsqueeze(1) * laws[:, 1]).flatten()
        counts = (codes[:, 0] * CODES + codes[:, 1]).bincount(minlength=CODES**2)
        kept = joint * n >= 5
        observed, wanted = counts[kept], joint[kept] / joint[kept].sum() * counts[kept].sum()
        assert kept.sum() > 10 and chisquare(observed, wanted).pvalue > 1e-3

    def test_without_guidance_it_is_another_map(self) -> None:
        """The filters and the guidance are part of the law: the same noise goes elsewhere."""
        start, label = noise(2, torch.arange(200), 4, 3), torch.zeros(200, dtype=torch.int64)
        one, other = (carry(law(w=w), vectors(), label, start) for w in (1.0, 3.0))
        assert (one != other).any(1).float().mean() > 0.05

    def test_a_pair_depends_on_its_number_alone(self) -> None:
        pairs = LivePairs(law(), vectors(), 1000, seed=3)
        together, alone = pairs.fetch([5, 900, 7]), pairs.fetch([900])
        assert torch.equal(together.codes[1], alone.codes[0]) and together.classes[1] == alone.classes[0]
        held_out = LivePairs(law(), vectors(), 1000, first=1 << 40, seed=3).fetch([5])
        assert held_out.sample_id.item() == (1 << 40) + 5
        filled = pairs.fetch([5, PADDING])
        assert filled.sample_id.tolist() == [5, PADDING] and torch.equal(filled.codes[0], together.codes[0])

    def test_next_scale_models_flow_too(self) -> None:
        model = images.next_scale()
        teacher = ImageLaw(model, SamplingParams(temperature=1.0, top_k=4), guidance=1.0)
        codebook = model.tokenizer.vectors.detach()
        codes = carry(teacher, codebook, torch.tensor([0, 2]), noise(0, torch.arange(2), 21, 4))
        assert codes.shape == (2, 21)
        assert (teacher.forced(codes, torch.tensor([0, 2])).gather(-1, codes.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "", "tokenizer": "t"}, r"pairs\.teacher must name"),
        ({"teacher": "a", "tokenizer": ""}, r"pairs\.tokenizer must name"),
        ({"teacher": "a", "tokenizer": "t", "steps": 0}, r"pairs\.steps must be at least 1, got 0"),
        ({"teacher": "a", "tokenizer": "t", "temperature": 0.0}, r"pairs\.temperature must be above 0"),
    ],
)
def test_bad_config(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        PairsConfig(**fields)  # type: ignore[arg-type]
