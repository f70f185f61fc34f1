"""The loss (Eq. 2 of ScaleLong) by hand, and the stratified times."""

import pytest
import torch

from scalelong_fast.diffusion import create_schedule, diffusion_loss, list_schedules, stratified_uniform
from scalelong_fast.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=3):
    g = generator(1)
    x0, noise = torch.randn(2, size, 2, 4, 4, generator=g)
    return x0, noise, torch.rand(size, generator=g)


class Recorder(torch.nn.Module):
    """Predicts a linear function of what it gets and remembers it."""

    def forward(self, x, timesteps, y=None):
        self.seen = (x, timesteps, y)
        return 0.5 * x + 1e-3 * timesteps.view(-1, 1, 1, 1)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 256, 1000])
def test_each_stratum_gives_one_value(batch_size):
    for seed in range(5):
        u = stratified_uniform(batch_size, generator=generator(seed))
        assert u.dtype == torch.float32
        strata = torch.floor(u.double() * batch_size).long()
        assert torch.equal(strata.sort().values, torch.arange(batch_size))


def test_strata_come_in_random_order():
    u = stratified_uniform(64, generator=generator())
    assert not torch.equal(u, u.sort().values)
    assert not torch.equal(u, stratified_uniform(64, generator=generator(1)))
    assert torch.equal(u, stratified_uniform(64, generator=generator()))


def test_values_at_the_end_of_a_stratum_stay_below_it_in_fp32(monkeypatch):
    # The largest float64 below 1 rounds to 1 in fp32.
    top = 1 - 2**-53
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), top, dtype=torch.float64))
    for batch_size in (1, 3, 256):
        u = stratified_uniform(batch_size, generator=generator()).double()
        assert u.max() < 1
        strata = torch.floor(u * batch_size).long()
        assert torch.equal(strata.sort().values, torch.arange(batch_size))


def test_each_entry_alone_is_uniform():
    g = generator()
    first = torch.stack([stratified_uniform(4, generator=g)[0] for _ in range(4000)])
    # Five standard errors of the mean of 4000 uniforms (standard deviation 1/sqrt(12)).
    assert abs(first.mean().item() - 0.5) < 5 * 12**-0.5 / 4000**0.5


def test_batch_size_must_be_positive():
    with pytest.raises(UserError, match="batch_size: got 0"):
        stratified_uniform(0, generator=generator())


@pytest.mark.parametrize("name", list_schedules())
def test_loss_by_hand(name):
    x0, noise, u = batch()
    y = torch.tensor([4, 5, 6])
    schedule, model = create_schedule(name), Recorder()
    loss = diffusion_loss(model, schedule, x0, noise, u, y)

    t = u if name == "vpsde" else torch.floor(1000 * u).long()
    total = 0.0
    for i in range(3):
        alpha, sigma = (v.item() for v in schedule.alpha_sigma(t[i : i + 1]))
        x_t = alpha * x0[i].double() + sigma * noise[i].double()
        timestep = 999 * t[i].item() if name == "vpsde" else t[i].item()
        total += (noise[i].double() - 0.5 * x_t - 1e-3 * timestep).square().sum().item()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total / noise.numel(), rel=1e-5)

    x_t, timesteps, seen_y = model.seen
    assert x_t.dtype == timesteps.dtype == torch.float32
    assert timesteps.shape == (3,)
    assert seen_y is y


def test_perfect_prediction_has_no_loss():
    x0, noise, u = batch()
    assert diffusion_loss(lambda x, t, y: noise, create_schedule("ddpm"), x0, noise, u).item() == 0


def test_half_precision_predictions_are_compared_in_fp32():
    x0, _, u = batch()
    noise = torch.full_like(x0, 1.001)  # bfloat16 cannot tell it from 1
    predicted = torch.ones_like(x0).bfloat16()
    loss = diffusion_loss(lambda x, t, y: predicted, create_schedule("vpsde"), x0, noise, u)
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("name", list_schedules())
def test_loss_and_gradient_trace_as_one_graph(name):
    x0, noise, u = batch()
    schedule = create_schedule(name)
    results = []
    for compile_it in (False, True):
        weight = torch.tensor(0.3, requires_grad=True)

        def step(x0, noise, u, weight=weight):
            return diffusion_loss(lambda x, t, y: weight * x, schedule, x0, noise, u)

        loss = (torch.compile(step, fullgraph=True, backend="aot_eager") if compile_it else step)(x0, noise, u)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    torch.testing.assert_close(results[1], results[0])


def test_an_output_that_would_broadcast_is_refused():
    x0, noise, u = batch()
    with pytest.raises(UserError, match=r"model: got \(3, 1, 4, 4\)"):
        diffusion_loss(lambda x, t, y: x[:, :1], create_schedule("vpsde"), x0, noise, u)
