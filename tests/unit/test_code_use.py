"""The use of codes over the last batches, against counts in NumPy over the whole history."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantizing import FSQ, PRODUCT, RESIDUAL, SMALL, VQ_USED, make

from vqgan.train.code_use import code_metrics, new_code_use, seen
from vqgan.train.sharding import make_mesh, shardings

KINDS = {"vq": SMALL, "used": VQ_USED, "fsq": FSQ, "residual": RESIDUAL, "product": PRODUCT}


def history(quantizer, batches):
    """Ids of batches, `[2, 2, 4]` or `[2, 2, 4, q]`, each of which knows a third of the codes."""
    rng = np.random.default_rng(0)
    places, k = quantizer.places, quantizer.codebook_size
    for _ in range(batches):
        ids = (rng.integers(0, k, places) + rng.integers(0, k // 3 + 1, (2, 2, 4, places))) % k
        yield jnp.array(ids if places > 1 else ids[..., 0], jnp.int32)


def by_the_definition(past, places, k, window):
    """Metrics after batches of ids, newest last."""
    rows = [np.asarray(ids).reshape(-1, places).T for ids in past]
    counts = np.array([[np.bincount(row, minlength=k) for row in batch] for batch in rows])
    alive = counts[-window:].any(0)
    ages = np.arange(len(past))[::-1]
    p = np.einsum("sqk,s->qk", counts, (1 - 1 / window) ** ages)
    p = p / p.sum(1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    return {
        "usage": alive.mean(),
        "dead_codes": (~alive).sum(1).mean(),
        "perplexity": np.exp(entropy).mean(),
    }


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("name", KINDS)
def test_metrics_equal_a_count_over_the_last_batches(name, window):
    quantizer = make(KINDS[name])
    use, past, dead = new_code_use(quantizer), [], []

    @jax.jit
    def one_more(use, ids, step):
        use = seen(use, quantizer.occurrences(ids), step, window)
        return use, code_metrics(use, step, window)

    for number, ids in enumerate(history(quantizer, 8)):
        past.append(ids)
        use, found = one_more(use, ids, jnp.int32(number))
        expected = by_the_definition(past, quantizer.places, quantizer.codebook_size, window)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)
        dead.append(float(found["dead_codes"]))
    assert dead[0] > 0 and (min(dead) < dead[0] or window == 1)
    if window == 1:  # the numbers of the last batch
        for key, value in quantizer.statistics(past[-1]).items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


def test_codes_over_eight_devices_are_counted_as_on_one():
    quantizer = make(dataclasses.replace(SMALL, codebook_size=2**14), spread=False)
    mesh = make_mesh(fsdp=2)
    use = jax.device_put(new_code_use(quantizer), shardings(new_code_use(quantizer), mesh))
    assert use.counts.sharding.spec == jax.P(None, "fsdp")  # a large codebook is not on all
    ids = jax.random.randint(jax.random.key(0), (8, 4, 4), 0, 2**14, jnp.int32)

    @jax.jit
    def two_more(use, ids):
        for number in range(2):
            use = seen(use, quantizer.occurrences(ids + number), jnp.int32(number), 5)
        return use, code_metrics(use, jnp.int32(1), 5)

    spread = jax.device_put(ids, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    found, expected = two_more(use, spread), two_more(new_code_use(quantizer), ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert expected[1]["dead_codes"] == 2**14 - len(np.unique([ids, ids + 1]))
