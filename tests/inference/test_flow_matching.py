"""Flow matching: paths, conversions, the closed-form field and its transport (guarantees 1-7)."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.inference.flow_matching import (
    FORMS,
    METHODS,
    SCHEDULES,
    DiracMixture,
    Schedule,
    convert,
    integrate,
    interpolate,
    time_grid,
)

PATHS = [Schedule(name, 2.0 if name == "polynomial" else 1.0) for name in SCHEDULES]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("schedule", PATHS, ids=SCHEDULES)
class TestPaths:
    def test_the_velocity_is_the_derivative_of_the_path(self, schedule: Schedule) -> None:
        x0, x1 = normal(4, 3, seed=1, dtype=torch.float64), normal(4, 3, seed=2, dtype=torch.float64)
        for time in (0.05, 0.3, 0.77, 0.95):
            t = torch.tensor(time, dtype=torch.float64)
            xt, velocity = interpolate(x0, x1, t, schedule)
            _, slope = torch.func.jvp(lambda t: interpolate(x0, x1, t, schedule)[0], (t,), (torch.ones_like(t),))
            torch.testing.assert_close(velocity, slope, rtol=0, atol=1e-5)
            assert xt.shape == x1.shape

    def test_the_ends(self, schedule: Schedule) -> None:
        alpha, sigma, *_ = schedule.at(torch.tensor([0.0, 1.0]))
        start = 0.0066 if schedule.name == "vp" else 0.0  # the variance-preserving path only comes near
        torch.testing.assert_close(alpha, torch.tensor([start, 1.0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(sigma, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-4)

    def test_conversions_are_each_others_inverses(self, schedule: Schedule) -> None:
        x, value = normal(5, 3, seed=3, dtype=torch.float64), normal(5, 3, seed=4, dtype=torch.float64)
        t = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
        for source in FORMS:
            for to in FORMS:
                there = convert(value, source, to, x, t, schedule)
                torch.testing.assert_close(convert(there, to, source, x, t, schedule), value, rtol=1e-4, atol=1e-4)

    def test_conversions_know_the_truth(self, schedule: Schedule) -> None:
        """With one x0 and one x1 everything is known."""
        x0, x1, t = normal(5, 3, seed=5), normal(5, 3, seed=6), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
        xt, velocity = interpolate(x0, x1, t, schedule)
        known = {"velocity": velocity, "data": x1, "noise": x0, "score": -x0 / schedule.at(t)[1][:, None]}
        for source in FORMS:
            for to in FORMS:
                torch.testing.assert_close(
                    convert(known[source], source, to, xt, t, schedule), known[to], rtol=2e-3, atol=2e-3
                )


def laws(batch: int, codes: int, seed: int = 0) -> Tensor:
    return (normal(batch, codes, seed=seed) * 1.2).log_softmax(-1)


def expected(log_p: Tensor, count: int) -> list[float]:
    """Counts of the codes among `count` draws of the law log_p [1, V]."""
    return (log_p[0].double().softmax(-1) * count).tolist()


class TestDiracMixture:
    def test_the_velocity_by_monte_carlo(self) -> None:
        """E[x1 - x0 | x_t near x] over many pairs."""
        codebook, log_p, t = normal(3, 1, seed=1) * 2, laws(1, 3, seed=2), 0.4
        draws = torch.multinomial(log_p.exp().expand(1, -1), 2_000_000, replacement=True)[0]
        x1, x0 = codebook[draws], normal(2_000_000, 1, seed=3)
        xt = t * x1 + (1 - t) * x0
        for place in (-0.5, 0.2, 0.7):
            near = (xt - place).abs()[:, 0] < 0.01
            sample = (x1 - x0)[near]
            expected = DiracMixture(codebook, log_p)(torch.tensor([[place]]), t)
            error = 4 * sample.std().item() / math.sqrt(len(sample)) + 0.02  # and the width of the window
            assert abs(sample.mean().item() - expected.item()) < error

    def test_the_velocity_by_autograd(self) -> None:
        """grad log p_t through the score gives the same velocity."""
        codebook, log_p, t = normal(6, 2, seed=1).double(), laws(7, 6, seed=2).double(), 0.55
        x = normal(7, 2, seed=4).double().requires_grad_()
        square = (x[:, None] - t * codebook).square().sum(-1)
        density = torch.logsumexp(log_p - square / (2 * (1 - t) ** 2), -1)
        (score,) = torch.autograd.grad(density.sum(), x)
        u = convert(score, "score", "velocity", x.detach(), torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(DiracMixture(codebook, log_p)(x.detach(), t), u, rtol=1e-4, atol=1e-4)

    def test_noise_ends_on_the_codes_with_their_probabilities(self) -> None:
        codebook, log_p, n = normal(6, 2, seed=7), laws(1, 6, seed=8), 20_000
        field = DiracMixture(codebook, log_p.expand(n, -1))
        counts = field.codes(normal(n, 2, seed=9)).bincount(minlength=6)
        assert chisquare(counts, expected(log_p, n)).statistic < 20.5  # 99.9 % with 5 degrees of freedom

    def test_the_test_above_can_fail(self) -> None:
        """Five Euler steps carry the noise to the wrong law; chi-square sees it."""
        codebook, log_p, n = normal(6, 2, seed=7), laws(1, 6, seed=8), 20_000
        field = DiracMixture(codebook, log_p.expand(n, -1))
        counts = field.codes(normal(n, 2, seed=9), steps=5, method="euler").bincount(minlength=6)
        assert chisquare(counts, expected(log_p, n)).statistic > 1000

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        codebook, log_p, x0 = normal(8, 4, seed=1), laws(64, 8, seed=2), normal(64, 4, seed=3)
        together = DiracMixture(codebook, log_p).codes(x0)
        alone = [DiracMixture(codebook, log_p[i : i + 1]).codes(x0[i : i + 1]).item() for i in range(64)]
        assert together.tolist() == alone

    def test_filtered_codes_are_never_reached(self) -> None:
        codebook, log_p = normal(8, 3, seed=1), laws(500, 8, seed=2)
        log_p[:, ::2] = -math.inf  # shared by all rows: cut out of the codebook
        log_p[:250, 1] = -math.inf  # and one of half the rows
        log_p = log_p.log_softmax(-1)
        codes = DiracMixture(codebook, log_p).codes(normal(500, 3, seed=3))
        assert set(codes[:250].tolist()) == {3, 5, 7} and set(codes[250:].tolist()) == {1, 3, 5, 7}

    @pytest.mark.parametrize("codes", [1, 5])
    def test_certainty(self, codes: int) -> None:
        log_p = torch.full((40, codes), -math.inf)
        log_p[:, -1] = 0
        assert (DiracMixture(normal(codes, 3), log_p).codes(normal(40, 3, seed=1)) == codes - 1).all()


class TestIntegrate:
    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_torchdiffeqs(self, method: str) -> None:
        odeint = pytest.importorskip("torchdiffeq").odeint  # not in the slim install
        field = DiracMixture(normal(6, 2, seed=1).double(), laws(16, 6, seed=2).double())
        x0, grid = normal(16, 2, seed=3).double(), torch.linspace(0, 0.95, 20, dtype=torch.float64)
        ours = integrate(field, x0, grid=grid, method=method)
        theirs = odeint(lambda t, x: field(x, float(t)), x0, grid, method=method)[-1]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    def test_a_gaussian_is_carried_to_a_gaussian(self) -> None:
        """N(m, s^2): u = (alpha' - k alpha) m + k x with k = (alpha alpha' s^2 + sigma sigma') / var_t."""
        mean, scale = 1.5, 0.4

        def field(x: Tensor, t: float) -> Tensor:
            variance = t**2 * scale**2 + (1 - t) ** 2
            return mean + (t * scale**2 - (1 - t)) / variance * (x - t * mean)

        x0 = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
        exact = mean + scale * x0
        torch.testing.assert_close(integrate(field, x0, steps=50), exact, rtol=0, atol=1e-3)

    def test_the_order_of_the_solvers(self) -> None:
        """Half the step: half the error of Euler's, a quarter of the midpoint's. (Gaussians cancel one order more.)"""
        field = DiracMixture(normal(6, 2, seed=1).double(), laws(64, 6, seed=2).double())
        x0 = normal(64, 2, seed=3).double()

        def end(steps: int, method: str) -> Tensor:
            return integrate(field, x0, grid=torch.linspace(0, 0.6, steps + 1, dtype=torch.float64), method=method)

        exact = end(2000, "midpoint")
        for method, ratio in (("euler", 2), ("midpoint", 4)):
            errors = [(end(steps, method) - exact).norm().item() for steps in (40, 80)]
            assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)

    def test_what_is_not_finite_is_said(self) -> None:
        with pytest.raises(InvalidState, match="row 1 is not finite"):
            integrate(lambda x, t: x / torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), steps=2)


class TestBadInput:
    @pytest.mark.parametrize(
        ("steps", "grid", "message"),
        [
            (None, None, "exactly one of steps"),
            (3, [0.0, 1.0], "exactly one of steps"),
            (0, None, "at least one step, got steps=0"),
            (None, [0.0, 0.5, 0.5], "strictly ascending"),
            (None, [0.0], "strictly ascending"),
            (None, [-0.1, 1.0], "strictly ascending"),
        ],
    )
    def test_grids(self, steps: int | None, grid: list[float] | None, message: str) -> None:
        with pytest.raises(InvalidValue, match=message):
            time_grid(steps, None if grid is None else torch.tensor(grid))

    def test_times(self) -> None:
        with pytest.raises(InvalidValue, match=r"must be in \[0, 1\], got values from 0.5 to 1.5"):
            interpolate(normal(2, 3), normal(2, 3), torch.tensor([0.5, 1.5]))
        with pytest.raises(InvalidValue, match=r"one per row \(2\), got shape \[3\]"):
            interpolate(normal(2, 3), normal(2, 3), torch.zeros(3))
        with pytest.raises(InvalidValue, match="same shape"):
            interpolate(normal(2, 3), normal(2, 4), torch.zeros(2))

    @pytest.mark.parametrize(
        ("log_p", "message"),
        [
            (torch.full((1, 3), math.nan), "row 0 holds NaN"),
            (torch.full((1, 3), -math.inf), "row 0 gives no code any mass"),
            (torch.full((1, 3), 1 / 3), "expected log-probabilities"),
            (torch.zeros(1, 4), "for a codebook"),
        ],
    )
    def test_laws(self, log_p: Tensor, message: str) -> None:
        with pytest.raises(InvalidValue, match=message):
            DiracMixture(normal(3, 2), log_p)

    def test_names(self) -> None:
        with pytest.raises(InvalidValue, match=r"unknown flow schedule 'cos'.*did you mean 'cosine'"):
            Schedule("cos")
        with pytest.raises(InvalidValue, match="goes with schedule polynomial only"):
            Schedule("linear", 2.0)
        with pytest.raises(InvalidValue, match="unknown solver 'rk4'"):
            integrate(lambda x, t: x, normal(1, 1), steps=1, method="rk4")
        with pytest.raises(InvalidValue, match="unknown form"):
            convert(normal(1, 1), "velocity", "epsilon", normal(1, 1), torch.tensor(0.5))
        with pytest.raises(InvalidValue, match=r"x must be \[B, 2\]"):
            DiracMixture(normal(3, 2), laws(1, 3))(normal(1, 3), 0.5)
