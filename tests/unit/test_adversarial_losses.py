import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqgan.adversarial.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    pixel_loss,
)

REAL = jnp.array([2.0, 0.0])
FAKE = jnp.array([-3.0, 1.0, 0.5])


def _softplus(*x):
    return np.mean([np.log1p(np.exp(v)) for v in x])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # relu(1 - r) = 0, 1 and relu(1 + f) = 0, 2, 1.5
        ("hinge", 0.5 * (0.5 + 3.5 / 3)),
        ("vanilla", 0.5 * (_softplus(-2, 0) + _softplus(-3, 1, 0.5))),
        ("non_saturating", _softplus(-2, 0) + _softplus(-3, 1, 0.5)),
    ],
)
def test_discriminator_loss(kind, expected):
    np.testing.assert_allclose(discriminator_loss(kind, REAL, FAKE), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("hinge", 0.5), ("vanilla", 0.5), ("non_saturating", _softplus(3, -1, -0.5))],
)
def test_generator_loss(kind, expected):
    np.testing.assert_allclose(generator_loss(kind, FAKE), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non_saturating"])
def test_the_players_pull_fake_logits_apart(kind):
    fake = jnp.array([0.3, -0.2])
    down = jax.grad(lambda f: discriminator_loss(kind, f, f - 0.1))(fake)
    up = jax.grad(lambda f: generator_loss(kind, f))(fake)
    against = jax.grad(lambda f: discriminator_loss(kind, REAL, f))(fake)
    assert np.isfinite(down).all()
    assert (up < 0).all() and (against > 0).all()


@pytest.mark.parametrize("kind", ["vanilla", "non_saturating"])
def test_extreme_logits_stay_finite(kind):
    far = jnp.array([1e4, -1e4])
    assert np.isfinite(discriminator_loss(kind, far, far))
    assert np.isfinite(jax.grad(lambda f: generator_loss(kind, f))(far)).all()


def test_pixel_losses():
    a, b = jnp.zeros((1, 1, 2, 1)), jnp.array([1.0, -3.0]).reshape(1, 1, 2, 1)
    assert pixel_loss("l1", a, b) == 2.0
    assert pixel_loss("l2", a, b) == 5.0


def test_adaptive_weight_is_the_ratio_of_norms():
    nll, gan = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]])
    np.testing.assert_allclose(adaptive_weight(nll, gan), 5.0 / (2.0 + 1e-4), rtol=1e-6)


def test_adaptive_weight_is_clipped_and_carries_no_gradient():
    nll, nothing = jnp.array([3.0, 4.0]), jnp.zeros(2)
    assert adaptive_weight(nll, nothing) == 1e4
    assert adaptive_weight(nothing, nothing) == 0.0
    assert adaptive_weight(nll, nothing, maximum=7.0) == 7.0
    for argument in (0, 1):
        assert not jax.grad(adaptive_weight, argnums=argument)(nll, nll).any()
        assert not jax.grad(adaptive_weight, argnums=argument)(nothing, nothing).any()
