"""What is particular to the multi-scale quantizer, and what the rest of the system does with it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import images as image_folder
from tiny import tokenizer_command

from vqgan.cli import main
from vqgan.data.codes import write_codes
from vqgan.data.sources import ArraySource
from vqgan.errors import InputError
from vqgan.eval.runner import evaluate_tokenizer
from vqgan.pictures import to_float
from vqgan.tokenizer.autoencoder import AutoencoderConfig
from vqgan.tokenizer.model import Tokenizer, TokenizerConfig
from vqgan.tokenizer.quantizers import MultiScaleConfig, make_quantizer
from vqgan.tokenizer.quantizers.multiscale import area, area_matrix, cubic, cubic_matrix

SMALL = MultiScaleConfig(scales=(1, 2, 3, 5), codebook_size=16, dim=3, phis=2)
FLAT = dataclasses.replace(SMALL, phis=0)


def latents(seed=0, shape=(2, 5, 5, 3)):
    """Different everywhere, and with a mean of their own."""
    first, second = jax.random.split(jax.random.key(seed))
    whole = jax.random.normal(second, (shape[0], 1, 1, shape[-1]))
    return jax.random.normal(first, shape) + whole


def make(config):
    """With codes among the latents, as after training."""
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    codebook = quantizer.table.codebook
    codebook[...] = jax.random.normal(jax.random.key(1), codebook.shape)
    return quantizer


@jax.jit
def run(quantizer, z):
    return quantizer(z)


# The two ways between grids.


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 5), (13, 13), (7, 2), (8, 1)])
def test_area_is_the_mean_of_the_cells_that_an_output_touches(inputs, outputs):
    x = np.random.default_rng(0).normal(size=inputs)
    edges = np.arange(outputs + 1) * inputs / outputs
    found = area_matrix(inputs, outputs) @ x
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        touched = [x[j] for j in range(inputs) if j < end - 1e-9 and j + 1 > start + 1e-9]
        np.testing.assert_allclose(found[i], np.mean(touched), rtol=1e-5)


def test_cubic_has_the_kernel_of_minus_three_quarters():
    # Doubling: every output lies a quarter from an input; the published weights of that.
    row = np.array([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    matrix = cubic_matrix(8, 16)
    np.testing.assert_allclose(matrix[8, 2:6], row, rtol=1e-6)
    np.testing.assert_allclose(matrix[7, 2:6], row[::-1], rtol=1e-6)
    np.testing.assert_allclose(matrix[0, :2], [row[:3].sum(), row[3]], rtol=1e-6)  # beyond the end
    assert np.count_nonzero(matrix[8]) == 4


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 16), (3, 8), (13, 16), (6, 6)])
def test_cubic_keeps_constants_and_symmetry(inputs, outputs):
    matrix = cubic_matrix(inputs, outputs)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-7)
    if inputs == outputs:
        np.testing.assert_array_equal(matrix, np.eye(inputs))


def test_rows_and_columns_go_to_sizes_of_their_own():
    x = np.asarray(latents(shape=(2, 4, 6, 3)))
    coarse, fine = area(jnp.array(x), (2, 3)), cubic(jnp.array(x), (4, 9))
    np.testing.assert_allclose(coarse, x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4)), rtol=1e-4)
    np.testing.assert_allclose(
        fine, np.einsum("qw,bhwd->bhqd", cubic_matrix(6, 9), x), rtol=1e-4, atol=1e-6
    )


# The quantizer.


def by_hand(z, codes, scales, *, cosine=False):
    """Ids, and z_q up to each scale, in float64 and without convolutions."""
    size, z_q, ids, steps = z.shape[1], np.zeros_like(z), [], []
    for scale in scales:
        down, up = (
            f(*sides) for f, sides in ((area_matrix, (size, scale)), (cubic_matrix, (scale, size)))
        )
        rest = np.einsum("ph,qw,bhwd->bpqd", down, down, z - z_q)
        table = codes
        if cosine:
            rest = rest / np.linalg.norm(rest, axis=-1, keepdims=True)
            table = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
        found = np.square(rest[..., None, :] - table).sum(-1).argmin(-1)
        z_q = z_q + np.einsum("hp,wq,bpqd->bhwd", up, up, codes[found])
        ids.append(found.reshape(len(z), -1))
        steps.append(z_q)
    return np.concatenate(ids, axis=1), steps


@pytest.mark.parametrize("cosine", [False, True])
def test_each_scale_quantises_the_mean_of_what_is_left_over(cosine):
    quantizer, z = make(dataclasses.replace(FLAT, cosine=cosine, beta=0.3)), latents()
    out, flat = run(quantizer, z), np.asarray(z, np.float64)
    codes = np.asarray(quantizer.table.codebook[...], np.float64)
    ids, steps = by_hand(flat, codes, FLAT.scales, cosine=cosine)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.z_q, steps[-1], rtol=1e-4, atol=1e-5)
    distance = np.mean([np.square(step - flat).mean() for step in steps])
    np.testing.assert_allclose(out.losses["codebook"], distance, rtol=1e-5)
    np.testing.assert_allclose(out.losses["commitment"], 0.3 * distance, rtol=1e-5)
    for end, step in zip(FLAT.ends, steps, strict=True):
        np.testing.assert_allclose(quantizer.codes(out.ids[:, :end]), step, rtol=1e-4, atol=1e-5)


def test_convolutions_are_blended_in_by_their_share():
    config = dataclasses.replace(SMALL, scales=(2, 5), phis=2, phi_ratio=0.25)
    quantizer = make(config)
    ids = jnp.array([[3, 1, 4, 1]], jnp.int32)
    h = np.asarray(cubic(quantizer.table.codes(ids.reshape(1, 2, 2)), (5, 5)))
    kernel, bias = (np.asarray(x[...]) for x in (quantizer.phis[0].kernel, quantizer.phis[0].bias))
    around = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2))
    convolved = np.einsum("bhwcij,ijcd->bhwd", windows, kernel) + bias
    expected = 0.75 * h + 0.25 * convolved
    np.testing.assert_allclose(quantizer.codes(ids), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0] * 10),
        (2, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (10, list(range(10))),
    ],
)
def test_scales_share_convolutions_as_published(count, expected):
    config = MultiScaleConfig(phis=count)
    assert [config.phi_of(scale) for scale in range(10)] == expected


def test_loss_teaches_codes_and_convolutions_and_pulls_latents():
    quantizer, z = make(SMALL), latents()
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)

    @jax.jit
    def pulls(params):
        def loss(params, z, name):
            return nnx.merge(graphdef, params, rest)(z).losses[name]

        return {
            name: jax.grad(loss, argnums=(0, 1))(params, z, name)
            for name in ("codebook", "commitment")
        }

    found = pulls(params)
    to_params, to_z = found["codebook"]
    assert not to_z.any() and all(x.any() for x in jax.tree.leaves(to_params))
    to_params, to_z = found["commitment"]
    assert not any(x.any() for x in jax.tree.leaves(to_params))
    ids = run(quantizer, z).ids
    steps = [np.asarray(quantizer.codes(ids[:, :end])) for end in SMALL.ends]
    expected = 0.25 * np.mean([2 * (np.asarray(z) - step) / z.size for step in steps], axis=0)
    np.testing.assert_allclose(to_z, expected, rtol=1e-4, atol=1e-7)


def test_an_image_has_the_same_codes_alone_and_in_a_batch():
    quantizer, z = make(SMALL), latents(shape=(3, 5, 5, 3))
    out, alone = run(quantizer, z), run(quantizer, z[1:2])
    np.testing.assert_array_equal(out.ids[1:2], alone.ids)
    np.testing.assert_array_equal(out.z_q[1:2], alone.z_q)
    np.testing.assert_array_equal(quantizer.codes(out.ids[1:2]), out.z_q[1:2])


@pytest.mark.slow
def test_codes_start_from_what_all_scales_have_to_quantise():
    # As many codes as latents, so that every one of them is a code.
    quantizer = make_quantizer(dataclasses.replace(FLAT, codebook_size=640), rngs=nnx.Rngs(0))
    z, other = latents(shape=(16, 5, 5, 3)), latents(7, (16, 5, 5, 3))
    quantizer.maintain(z, run(quantizer, z).ids, jax.random.key(0))
    codes, rest = np.asarray(quantizer.table.codebook[...]), np.asarray(z)
    for scale in FLAT.scales:
        down, up = area_matrix(5, scale), cubic_matrix(scale, 5)
        rows = np.einsum("ph,qw,bhwd->bpqd", down, down, rest)
        gaps = np.abs(codes[:, None] - rows.reshape(1, -1, 3)).max(-1).min(0)
        assert gaps.max() < 1e-5, scale
        rest = rest - np.einsum("hp,wq,bpqd->bhwd", up, up, rows)
    ids = run(quantizer, other).ids
    errors = [float(jnp.square(other - quantizer.codes(ids[:, :e])).mean()) for e in FLAT.ends]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_dead_codes_move_onto_what_the_codes_of_now_leave_over():
    config = dataclasses.replace(FLAT, codebook_size=64, init_from_data=False, revive_after=1)
    quantizer, z = make(config), latents()
    before, ids = np.asarray(quantizer.table.codebook[...]), run(quantizer, z).ids
    _, steps = by_hand(np.asarray(z), before, FLAT.scales)
    quantizer.maintain(z, ids, jax.random.key(0))
    after, seen = np.asarray(quantizer.table.codebook[...]), []
    moved = (after != before).any(-1)
    assert set(np.flatnonzero(~moved)) == set(np.asarray(ids).ravel())
    for scale, step in zip(FLAT.scales, [0 * steps[0], *steps], strict=False):
        down = area_matrix(5, scale)
        seen.append(np.einsum("ph,qw,bhwd->bpqd", down, down, np.asarray(z) - step).reshape(-1, 3))
    gaps = np.abs(after[moved][:, None] - np.concatenate(seen)[None]).max(-1).min(1)
    assert gaps.max() < 1e-5 and moved.sum() > 10


def test_a_code_that_one_scale_uses_is_alive():
    quantizer = make(dataclasses.replace(FLAT, init_from_data=False, revive_after=1))
    before, z = np.asarray(quantizer.table.codebook[...]), latents()
    ids = jnp.zeros((2, 39), jnp.int32).at[:, 0].set(7).at[:, -1].set(9)
    quantizer.maintain(z, ids, jax.random.key(0))
    moved = (np.asarray(quantizer.table.codebook[...]) != before).any(-1)
    assert np.flatnonzero(~moved).tolist() == [0, 7, 9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": ()}, "at least one"),
        ({"scales": (1, 3, 2)}, "scales (1, 3, 2)"),
        ({"scales": (0, 3)}, "scales (0, 3)"),
        ({"columns": (1, 2)}, "columns (1, 2)"),
        ({"phis": 5}, "phis 5: must be from 0 to the 4 scales"),
        ({"phi_ratio": 1.5}, "phi_ratio 1.5"),
        ({"codebook_size": 0}, "quantizer.codebook_size 0"),
        ({"k_means": 3, "init_from_data": False}, "quantizer.k_means 3"),
    ],
)
def test_configs_that_contradict_themselves(change, words):
    with pytest.raises(InputError) as error:
        make_quantizer(dataclasses.replace(SMALL, **change), rngs=nnx.Rngs(0))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_latents_and_ids_of_other_scales_are_refused_in_one_line():
    quantizer = make(SMALL)
    with pytest.raises(InputError, match=r"^latents of 4x5: .* are for 5x5, so give .*scales$"):
        quantizer(latents(shape=(2, 4, 5, 3)))
    with pytest.raises(InputError, match=r"^ids of shape \(2, 15\): .* one of 1, 5, 14, 39$"):
        quantizer.codes(jnp.zeros((2, 15), jnp.int32))


# The rest of the system.


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def tokenizer():
    autoencoder = AutoencoderConfig(
        base_channels=8,
        norm_groups=4,
        channel_multipliers=(1, 2),
        attention_resolutions=(),
        resolution=16,
        z_channels=8,
    )
    quantizer = dataclasses.replace(SMALL, scales=(1, 2, 4, 8))
    config = TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)
    tokenizer = Tokenizer(config, rngs=nnx.Rngs(0))
    z = tokenizer(to_float(pictures(2))).z
    tokenizer.quantizer.table.codebook[...] = z.reshape(16, -1, 3)[:, 0]
    return tokenizer


def test_tokenizer_decodes_what_it_encodes(tokenizer):
    images = to_float(pictures(2))
    ids, out = tokenizer.encode(images), tokenizer(images)
    assert ids.shape == (2, 85) and len(np.unique(ids)) > 3
    np.testing.assert_array_equal(ids, out.ids)
    np.testing.assert_array_equal(tokenizer.quantizer.codes(ids), out.z_q)
    np.testing.assert_allclose(tokenizer.decode(ids), out.reconstruction, rtol=1e-4, atol=1e-5)
    coarse = tokenizer.decode(ids[:, :5])
    assert coarse.shape == images.shape and np.abs(coarse - out.reconstruction).max() > 1e-3


@pytest.mark.slow
def test_codes_are_stored_and_evaluated(tokenizer, tmp_path):
    images = pictures(4)
    codes = write_codes(
        lambda x: tokenizer.encode(to_float(x)),
        ArraySource(images),
        tmp_path / "codes",
        image_size=16,
        codebook_size=16,
        passes=("center",),
        batch_size=2,
    )
    ids = np.concatenate([tokenizer.encode(to_float(images[i : i + 2])) for i in (0, 2)])
    assert codes.info.grid == (85,)
    np.testing.assert_array_equal([codes[i]["ids"] for i in range(4)], ids)
    counts = np.bincount(ids.ravel(), minlength=16)
    np.testing.assert_array_equal(codes.info.counts, [counts])

    batch = {"image": images, "valid": np.ones(4, bool)}
    found = evaluate_tokenizer(tokenizer, [batch], None)
    np.testing.assert_allclose(found["usage"], (counts > 0).mean(), rtol=1e-6)


def test_a_prior_over_single_ids_refuses_them_before_it_begins(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = (
        f"train-prior small --tokenizer {tmp_path}/tokenizer --data emoji --out {tmp_path}/run"
    )
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    assert exit.value.code == 2 and not (tmp_path / "run").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "multiscale quantizer gives ids of shape 85 an image" in line and "8x8" in line


def test_training_refuses_images_of_another_size_before_it_begins(tmp_path, capsys):
    kind = ["--model.quantizer.kind", "multiscale", "--model.quantizer.scales", "1", "2", "3", "4"]
    with pytest.raises(SystemExit) as exit:
        main(["train-tokenizer", "emoji", "--out", f"{tmp_path}/run", *kind])
    assert exit.value.code == 2 and not (tmp_path / "run").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vqgan: latents of 8x8: quantizer.scales are for 4x4")


@pytest.mark.slow
def test_training_by_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr("vqgan.train.tokenizer.load_lpips", lambda name: None)
    options = ["--model.quantizer.kind", "multiscale", "--model.quantizer.phis", "2"]
    options += ["--model.quantizer.scales", "1", "2", "4", "8", "--run.steps", "6"]
    main(tokenizer_command(image_folder(tmp_path / "images"), tmp_path / "run", *options))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.encode(to_float(pictures(2))).shape == (2, 85)
    assert int(tokenizer.quantizer.table.batches_seen[...]) == 6
