import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqgan.errors import InputError
from vqgan.eval.image import codebook_usage, entropy_bits, perplexity, psnr, ssim


def _pair(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = np.cumsum(rng.normal(size=(2, height, width, channels)), axis=2)
    a = np.clip(a / 4, -1, 1)
    b = np.clip(a + np.array([0.05, 0.5]).reshape(2, 1, 1, 1) * rng.normal(size=a.shape), -1, 1)
    return a.astype(np.float32), b.astype(np.float32)


@pytest.mark.parametrize("shape", [(11, 11, 3), (20, 27, 3), (32, 16, 1)])
def test_ssim_is_that_of_scikit_image(shape):
    a, b = _pair(*shape)
    expected = [
        structural_similarity(
            x,
            y,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2.0,
            channel_axis=-1,
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(ssim)(a, b), expected, atol=1e-4)


def test_psnr_is_that_of_scikit_image():
    a, b = _pair(20, 27, 3)
    expected = [peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(psnr)(a, b), expected, rtol=1e-5)


def test_psnr_of_a_known_error():
    black = jnp.full((1, 4, 4, 3), -1.0)
    np.testing.assert_allclose(psnr(black, black + 0.2), 20.0, rtol=1e-5)
    np.testing.assert_allclose(psnr(black, -black), 0.0, atol=1e-6)


def test_equal_images_score_best():
    a, b = (jnp.asarray(x) for x in _pair(16, 16, 3))
    np.testing.assert_allclose(ssim(a, a), 1.0, atol=1e-6)
    assert np.isposinf(psnr(a, a)).all()
    assert (ssim(a, b) < 1).all()


def test_ssim_of_images_below_its_window_is_refused():
    with pytest.raises(InputError, match=r"10x64.*11x11"):
        ssim(jnp.zeros((1, 10, 64, 3)), jnp.zeros((1, 10, 64, 3)))


def test_uniform_codes_use_the_whole_codebook():
    counts = jnp.full((8,), 5)
    assert codebook_usage(counts) == 1.0
    np.testing.assert_allclose(entropy_bits(counts), 3.0, rtol=1e-6)
    np.testing.assert_allclose(perplexity(counts), 8.0, rtol=1e-6)


def test_unused_codes_count_for_nothing():
    counts = jnp.array([2, 0, 1, 1, 0, 0, 0, 0])
    assert codebook_usage(counts) == 3 / 8
    np.testing.assert_allclose(entropy_bits(counts), 1.5, rtol=1e-6)
    np.testing.assert_allclose(perplexity(counts), 2**1.5, rtol=1e-6)


def test_one_code_or_none_has_no_entropy():
    for counts in (jnp.array([0, 7]), jnp.zeros(2, jnp.int32)):
        assert entropy_bits(counts) == 0.0
        assert perplexity(counts) == 1.0


def test_counts_beyond_int32_in_sum_keep_their_entropy():
    counts = jnp.full((4,), 2**30, jnp.int32)
    np.testing.assert_allclose(jax.jit(entropy_bits)(counts), 2.0, rtol=1e-6)
