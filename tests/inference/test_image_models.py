"""Image tokenizers and autoregressive image models: specs/image-ar.md, guarantees 1-7, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor

from draftsmith.inference.decoders.image_autoregressive import ImageAutoregressiveDecoder, ImageRequest
from draftsmith.inference.errors import InvalidValue
from draftsmith.inference.image_law import ImageLaw, ImageModel
from draftsmith.inference.nets.image_ar import ImageARConfig
from draftsmith.inference.nets.image_tokenizer import ImageTokenizerConfig
from draftsmith.inference.nets.next_scale_ar import NextScaleAR, NextScaleConfig
from draftsmith.inference.sampling import SamplingParams
from tests import images

SAMPLING = SamplingParams(temperature=1.0)
SCALES = (1, 2, 4)


def pixels(batch: int = 3, seed: int = 5) -> Tensor:
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_codes(count: int, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(0, 16, (batch, count), generator=torch.Generator().manual_seed(seed))


MODELS = pytest.mark.parametrize("model", [images.raster(), images.next_scale()], ids=["raster", "next_scale"])


class TestTokenizer:
    @pytest.mark.parametrize("normalized", [False, True])
    def test_the_nearest_code(self, normalized: bool) -> None:
        net = images.tokenizer(normalized=normalized)
        z = net.latent(pixels()).permute(0, 2, 3, 1)
        slow = (z.unsqueeze(-2) - net.vectors).square().sum(-1).argmin(-1)
        assert torch.equal(net.nearest(z), slow)
        if normalized:
            torch.testing.assert_close(net.vectors.norm(dim=-1), torch.ones(16))

    @pytest.mark.parametrize("scales", [(), SCALES])
    def test_codes_and_their_vectors_decode_alike(self, scales: tuple[int, ...]) -> None:
        net = images.tokenizer(scales)
        codes = net.encode(pixels())
        assert codes.shape == (3, net.config.num_tokens)
        assert torch.equal(net.decode(codes), net.decode(net.embed(codes)))

    @pytest.mark.parametrize("scales", [(), SCALES])
    def test_the_gradient_goes_straight_through(self, scales: tuple[int, ...]) -> None:
        net = images.tokenizer(scales)
        z = net.latent(pixels()).detach().requires_grad_()
        found = net.quantize(z)
        (through,) = torch.autograd.grad(net.decode_latent(found.latent).square().sum(), z)
        latent = found.latent.detach().requires_grad_()
        (direct,) = torch.autograd.grad(net.decode_latent(latent).square().sum(), latent)
        torch.testing.assert_close(through, direct)

    def test_scales_add_up(self) -> None:
        net = images.tokenizer(SCALES)
        z = net.latent(pixels())
        found = net.quantize(z)
        totals = net.sum_scales(net.embed(found.codes))
        torch.testing.assert_close(totals[-1], found.latent)
        parts = [net.contribution(k, _square(net, found.codes, k)) for k in range(len(SCALES))]
        torch.testing.assert_close(sum(parts), totals[-1])
        # what is left after the scales is what they do not say
        torch.testing.assert_close(z - sum(parts), z - totals[-1])

    @pytest.mark.parametrize(
        ("images_", "message"),
        [
            (torch.rand(2, 1, 8, 8) * 16, r"pixels must lie in \[-1, 1\], got .* to 1[45]"),
            (torch.rand(2, 3, 8, 8), r"images must be \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"),
            (torch.full((1, 1, 8, 8), float("nan")), "pixels must lie"),
        ],
    )
    def test_bad_images(self, images_: Tensor, message: str) -> None:
        with pytest.raises(InvalidValue, match=message):
            images.tokenizer().encode(images_)

    def test_bad_codes_and_configs(self) -> None:
        with pytest.raises(InvalidValue, match=r"codes must lie in \[0, 16\), got 3 to 16"):
            images.tokenizer().decode(torch.tensor([[3] * 15 + [16]]))
        with pytest.raises(InvalidValue, match="10 pixels do not divide by 4"):
            ImageTokenizerConfig(resolution=10, multipliers=(1, 1, 1))
        for scales in ((2, 1, 4), (1, 2)):
            with pytest.raises(InvalidValue, match="end with the latent's side 4"):
                ImageTokenizerConfig(resolution=8, multipliers=(1, 1), normalized=False, scales=scales)
        with pytest.raises(InvalidValue, match="normalized=false"):
            ImageTokenizerConfig(resolution=8, multipliers=(1, 1), scales=(1, 4))


def _square(net: object, codes: Tensor, k: int) -> Tensor:
    first = sum(p * p for p in SCALES[:k])
    vectors = images.tokenizer(SCALES).embed(codes[:, first : first + SCALES[k] ** 2])
    return vectors.transpose(1, 2).reshape(len(codes), -1, SCALES[k], SCALES[k])


@MODELS
class TestModels:
    @torch.no_grad()
    def test_steps_are_the_whole_pass(self, model: ImageModel) -> None:
        codes, classes = some_codes(sum(model.groups)), torch.tensor([0, 2, 3])
        whole = model.logits(codes, classes)
        assert whole.std() > 0.3  # or the comparison would say nothing
        for prefix in (0, sum(model.groups[:2])):
            state = model.prefilled(classes, codes[:, :prefix]) if prefix else model.start(classes)
            at, parts = prefix, []
            for size in model.groups[_group_at(model, prefix) :]:
                parts.append(model.next_logits(state))
                at += size
                if at < sum(model.groups):
                    model.advance(state, codes[:, at - size : at])
            torch.testing.assert_close(torch.cat(parts, 1), whole[:, prefix:], rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_nothing_sees_its_own_group_or_later_ones(self, model: ImageModel) -> None:
        codes, classes = some_codes(sum(model.groups)), torch.tensor([0, 1, 2])
        before, first = model.logits(codes, classes), 0
        for size in model.groups:
            changed = codes.clone()
            changed[:, first] = (changed[:, first] + 5) % 16
            after = model.logits(changed, classes)
            first += size
            torch.testing.assert_close(after[:, :first], before[:, :first], rtol=0, atol=1e-6)
            if first < sum(model.groups):
                assert (after[:, first:] - before[:, first:]).abs().max() > 1e-4

    @torch.no_grad()
    def test_the_class_matters(self, model: ImageModel) -> None:
        codes = some_codes(sum(model.groups), batch=2)[:1].expand(4, -1)
        logits = model.logits(codes, torch.arange(4))
        assert all((logits[0] - logits[i]).abs().max() > 1e-2 for i in range(1, 4))

    @torch.no_grad()
    def test_guidance(self, model: ImageModel) -> None:
        codes, classes = some_codes(sum(model.groups)), torch.tensor([0, 1, 2])
        conditional, without = model.logits(codes, classes), model.logits(codes, torch.full((3,), 3))
        strong = ImageLaw(model, SAMPLING, guidance=2.0)
        sizes = torch.tensor(model.groups)
        weights = torch.tensor([model.guidance_weight(2.0, k) for k in range(len(model.groups))])
        weights = weights.repeat_interleave(sizes).view(1, -1, 1)
        expected = (without + weights * (conditional - without)).softmax(-1)
        torch.testing.assert_close(strong.forced(codes, classes), expected)
        progress, parts, at = strong.start(classes), [], 0
        for size in model.groups:
            parts.append(strong.next(progress))
            at += size
            strong.advance(progress, codes[:, at - size : at])
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ImageLaw(model, SAMPLING).forced(codes, classes), conditional.softmax(-1))

    @torch.no_grad()
    def test_an_image_does_not_depend_on_its_batch(self, model: ImageModel) -> None:
        law = ImageLaw(model, SamplingParams(temperature=0.8, top_k=6), guidance=1.5)
        requests = [ImageRequest(i % 3, row_id=i) for i in range(5)]
        together = ImageAutoregressiveDecoder(law, seed=3).decode(requests)
        alone = [ImageAutoregressiveDecoder(law, seed=3).decode([r]).output[0] for r in requests]
        assert together.output == alone and together.nfe == {"target": len(model.groups)}
        assert sum(together.rounds.committed) == 5 * sum(model.groups)


def _group_at(model: ImageModel, codes: int) -> int:
    return next(k for k in range(len(model.groups)) if sum(model.groups[:k]) == codes)


def test_the_formulas_ends() -> None:
    raster, scales = images.raster(), images.next_scale()
    codes, classes = some_codes(16), torch.tensor([0, 1, 2])
    with torch.no_grad():
        none = ImageLaw(raster, SAMPLING, guidance=0.0).forced(codes, classes)
        torch.testing.assert_close(none, raster.logits(codes, torch.full((3,), 3)).softmax(-1))
    assert scales.guidance_weight(2.0, 0) == 1 and scales.guidance_weight(2.0, 2) == 3
    assert not ImageLaw(scales, SAMPLING, guidance=0.0).guided


@torch.no_grad()
def test_samples_have_the_models_law() -> None:
    """Two codes drawn, 16 x 16 outcomes pooled to 36 cells, against the product of the step laws."""
    law = ImageLaw(images.raster(codes=6, side=2), SAMPLING, guidance=1.5)
    n, classes = 20_000, torch.tensor([1])
    output = torch.tensor(
        ImageAutoregressiveDecoder(law, seed=1).decode([ImageRequest(1, row_id=i) for i in range(n)]).output
    )
    first = torch.arange(6)
    prefix = torch.stack((first, *[torch.zeros_like(first)] * 3), 1)
    laws = law.forced(prefix, classes.expand(6))
    joint = laws[0, 0].unsqueeze(1) * laws[:, 1]
    counts = (output[:, 0] * 6 + output[:, 1]).bincount(minlength=36)
    expected = joint.flatten().double()
    kept = expected * n >= 5
    assert kept.sum() > 15
    observed, wanted = counts[kept].tolist(), (expected[kept] / expected[kept].sum() * counts[kept].sum()).tolist()
    assert chisquare(observed, wanted).pvalue > 1e-3
    uniform = [sum(observed) / len(observed)] * len(observed)
    assert chisquare(observed, uniform).pvalue < 1e-9  # the test sees another law


def test_training_inputs_are_those_of_sampling() -> None:
    net = images.next_scale()
    codes, classes = some_codes(21), torch.tensor([0, 1, 2])
    with torch.no_grad():
        inputs = net.inputs(codes)
        state, first = net.start(classes), 0
        for k, size in enumerate(net.groups[:-1]):
            net.next_logits(state)
            net.advance(state, codes[:, first : first + size])
            first += size
            made = first - 1
            expected = net.word_embed(inputs[:, made : made + net.groups[k + 1]])
            torch.testing.assert_close(state.inputs, expected, rtol=0, atol=1e-5)


def test_dropout_is_for_training_alone() -> None:
    net = images.raster(dropout=0.5)
    codes, classes = some_codes(16), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(net.logits(codes, classes), net.logits(codes, classes))
        net.train()
        assert not torch.equal(net.logits(codes, classes), net.logits(codes, classes))


class TestBadInput:
    def test_classes(self) -> None:
        law = ImageLaw(images.raster(), SAMPLING)
        for bad in (-1, 4):
            with pytest.raises(InvalidValue, match=rf"class ids must lie in \[0, 3\] .*, got {bad} to {bad}"):
                law.start(torch.tensor([bad]))
        with pytest.raises(InvalidValue, match="no unconditional row"):
            ImageLaw(images.raster(class_dropout=0.0), SAMPLING, guidance=2.0)
        with pytest.raises(InvalidValue, match="no image was asked for"):
            ImageAutoregressiveDecoder(law).decode([])

    def test_options(self) -> None:
        with pytest.raises(InvalidValue, match="guidance must be 0 or more"):
            ImageLaw(images.raster(), SAMPLING, guidance=-0.5)
        with pytest.raises(InvalidValue, match="top_k 17 is above the 16 codes"):
            ImageLaw(images.raster(), SamplingParams(temperature=1.0, top_k=17))
        with pytest.raises(InvalidValue, match="no penalties"):
            ImageLaw(images.raster(), SamplingParams(temperature=1.0, repetition_penalty=1.2))

    def test_models(self) -> None:
        with pytest.raises(InvalidValue, match="heads whose width divides by 4"):
            ImageARConfig(8, 2, 1, 24, 1, 4, 8)
        with pytest.raises(InvalidValue, match="attach it first"):
            NextScaleAR(NextScaleConfig(16, 4, SCALES, 3, 32, 1, 2)).inputs(some_codes(21))
        with pytest.raises(InvalidValue, match="are not the tokenizer's"):
            NextScaleAR(NextScaleConfig(16, 4, (1, 4), 3, 32, 1, 2), images.tokenizer(SCALES))
        law = ImageLaw(images.next_scale(), SAMPLING)
        with pytest.raises(InvalidValue, match="a prefix of 3 codes ends inside a group"):
            law.start(torch.tensor([0]), some_codes(3, batch=1))


def test_one_place_attends_like_a_hand_written_head() -> None:
    """Rotary positions over a grid: the score of two codes depends on their distance by row and by column alone."""
    net = images.raster()
    cos, sin = net.rope.at(torch.arange(17), torch.float32)
    x = torch.randn(16, generator=torch.Generator().manual_seed(2))

    def turned(position: int) -> Tensor:
        return x * cos[position] + x.roll(8) * sin[position]

    place = {(r, c): turned(1 + 4 * r + c) for r in range(4) for c in range(4)}
    down, right = place[0, 0] @ place[1, 0], place[0, 0] @ place[0, 1]
    torch.testing.assert_close(place[2, 1] @ place[3, 1], down)
    torch.testing.assert_close(place[2, 1] @ place[2, 2], right)
    assert (down - right).abs() > 1e-3 and F.mse_loss(turned(0), x) == 0  # the class is not turned
