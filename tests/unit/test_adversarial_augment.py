import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqgan.adversarial.augment import diff_augment
from vqgan.adversarial.losses import lecam_loss, r1_penalty

X = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (6, 16, 16, 3)), jnp.float32)


def changed(*policy, seed=0, x=X):
    return np.asarray(diff_augment(x, policy, jax.random.key(seed)))


def test_no_policy_changes_nothing():
    np.testing.assert_array_equal(changed(), X)


@pytest.mark.parametrize("name", ["colour", "translation", "cutout"])
def test_every_image_is_drawn_for_by_itself_and_by_the_key(name):
    same = jnp.broadcast_to(X[:1], X.shape)
    one = changed(name, x=same)
    assert any(not np.array_equal(one[0], other) for other in one[1:])
    np.testing.assert_array_equal(one, changed(name, x=same))
    assert not np.array_equal(one, changed(name, seed=1, x=same))


def test_translation_moves_by_at_most_an_eighth_and_brings_in_zeros():
    for image, moved in zip(np.asarray(X), changed("translation"), strict=True):
        shifts = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if np.array_equal(
                np.pad(image, ((2, 2), (2, 2), (0, 0)))[2 - dy :, 2 - dx :][:16, :16], moved
            )
        ]
        assert len(shifts) == 1


def test_cutout_leaves_the_rest_alone():
    seen = set()
    for seed in range(8):
        for image, cut in zip(np.asarray(X), changed("cutout", seed=seed), strict=True):
            hole = (cut == 0).all(-1)
            np.testing.assert_array_equal(cut[~hole], image[~hole])
            rows, columns = hole.any(1).sum(), hole.any(0).sum()
            assert hole.sum() == rows * columns and min(rows, columns) >= 4
            seen.add((rows, columns))
    assert max(seen) == (8, 8)


def test_colour_keeps_what_it_does_not_change():
    """Contrast and saturation scale differences, brightness shifts: grey images stay grey."""
    grey = jnp.broadcast_to(X[..., :1], X.shape)
    y = changed("colour", x=grey)
    np.testing.assert_allclose(y[..., 0], y[..., 1], atol=1e-5)
    shift = y.mean((1, 2, 3)) - np.asarray(grey).mean((1, 2, 3))
    assert (np.abs(shift) <= 0.5).all() and shift.std() > 0.05
    ratio = y.std((1, 2, 3)) / np.asarray(grey).std((1, 2, 3))
    assert (ratio >= 0.5).all() and (ratio <= 1.5).all()


def test_gradients_come_back_through_it():
    """For one draw the change is affine, so its gradient says exactly what a move does."""
    policy = ("colour", "translation", "cutout")
    weights = jnp.asarray(np.random.default_rng(2).normal(size=X.shape), jnp.float32)

    def total(x):
        return (diff_augment(x, policy, jax.random.key(3)) * weights).sum()

    move = X[::-1] - X
    expected = total(X + move) - total(X)
    assert abs(expected) > 1
    np.testing.assert_allclose((jax.grad(total)(X) * move).sum(), expected, rtol=1e-3)


def test_lecam_by_hand():
    real, fake = jnp.array([2.0, -1.0]), jnp.array([-3.0, 1.0])
    # Against a fake average of 0.5: 1.5 and 0; against a real one of 1: 4 and 0.
    assert lecam_loss(real, fake, jnp.array([1.0, 0.5])) == (1.5**2 + 4.0**2) / 2


def test_r1_of_a_linear_judge_is_half_its_squared_weight():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(16, 16, 3)), jnp.float32)

    def judge(x):
        return jnp.einsum("bhwc,hwc->b", x, w)[:, None] * jnp.array([[1.0, 3.0]])

    np.testing.assert_allclose(r1_penalty(judge, X), 0.5 * 4 * np.sum(w**2), rtol=1e-5)
