"""The multi-scale quantizer against PyTorch's own layers, put together as VAR publishes it.

VAR (arXiv:2404.02905) is on no registry; what is here is its formula in `interpolate` and `Conv2d`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_same_ids, nchw, nhwc
from flax import nnx
from reference import import_torch

from vqgan.tokenizer.quantizers import MultiScaleConfig, make_quantizer

pytestmark = pytest.mark.parity

# Those of the paper, and others that do not divide one another.
SCALES = [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 4, 7)]
PHI_OF = {10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3), 3: (0, 0, 1)}


def by_torch(z, codebook, phis, scales, *, ratio, beta, cosine):
    """Ids of each scale, f_hat up to each, the loss, and what each scale had to quantise."""
    torch = import_torch()
    resize, normalize = torch.nn.functional.interpolate, torch.nn.functional.normalize
    size, channels, f_hat = tuple(z.shape[2:]), z.shape[1], torch.zeros_like(z)
    rest, ids, steps, searched, loss = z.detach(), [], [], [], 0
    for i, scale in enumerate(scales):
        pooled = resize(rest, size=(scale, scale), mode="area").permute(0, 2, 3, 1)
        rows, table = pooled.reshape(-1, channels), codebook.detach()
        if cosine:
            rows, table = normalize(rows, dim=1), normalize(table, dim=1)
        found = torch.cdist(rows, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        h = codebook[found].reshape(len(z), scale, scale, channels).permute(0, 3, 1, 2)
        h = resize(h, size=size, mode="bicubic", align_corners=False)
        if phis:
            h = (1 - ratio) * h + ratio * phis[PHI_OF[len(scales)][i] if len(phis) > 1 else 0](h)
        f_hat, rest = f_hat + h, rest - h.detach()
        loss = loss + ((f_hat - z.detach()) ** 2).mean() + beta * ((f_hat.detach() - z) ** 2).mean()
        ids.append(found.reshape(len(z), -1))
        steps.append(f_hat)
        searched.append(rows.reshape(len(z), -1, channels))
    return torch.cat(ids, 1), steps, loss / len(scales), torch.cat(searched, 1), table


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("scales", "count"), [(SCALES[0], 4), (SCALES[1], 2), (SCALES[1], 1)])
def test_ids_latents_loss_and_gradients_equal_the_formula_in_torch(scales, count, cosine):
    torch = import_torch()
    torch.manual_seed(0)
    size = scales[-1]
    codebook = (0.6 * torch.randn(96, 8)).requires_grad_()
    phis = [torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(count)]
    z = (torch.randn(2, 8, size, size) + torch.randn(2, 8, 1, 1)).requires_grad_()
    options = {"ratio": 0.4, "beta": 0.3, "cosine": cosine}
    ids, steps, loss, searched, table = by_torch(z, codebook, phis, scales, **options)
    (loss * z.numel()).backward()  # so that gradients are about 1

    config = MultiScaleConfig(
        scales=scales,
        codebook_size=96,
        dim=8,
        phis=count,
        phi_ratio=0.4,
        beta=0.3,
        cosine=cosine,
    )
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    quantizer.table.codebook[...] = jnp.asarray(codebook.detach().numpy())
    for ours, theirs in zip(quantizer.phis, phis, strict=True):
        ours.kernel[...] = jnp.asarray(theirs.weight.detach().numpy().transpose(2, 3, 1, 0))
        ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)

    def objective(z, params):
        out = nnx.merge(graphdef, params, rest)(z)
        return sum(out.losses.values()) * z.size, out

    latents = jnp.asarray(nhwc(z.detach().numpy()))
    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (ours, out), (to_z, to_params) = step(latents, params)
    assert_same_ids(
        out.ids,
        ids.numpy(),
        lambda: np.square(searched.numpy()[:, :, None] - table.numpy()).sum(-1),
    )
    np.testing.assert_allclose(ours / z.numel(), loss.item(), rtol=1e-5)
    for end, theirs in zip(config.ends, steps, strict=True):
        found = nchw(quantizer.codes(out.ids[:, :end]))
        assert_close(found, theirs.detach().numpy(), 1e-5)
    np.testing.assert_array_equal(quantizer.codes(out.ids), out.z_q)
    assert_close(nchw(to_z), z.grad.numpy(), 1e-4)
    assert_close(to_params["table"]["codebook"][...], codebook.grad.numpy(), 1e-4)
    for i, theirs in enumerate(phis):
        kernel = np.asarray(to_params["phis"][i]["kernel"][...]).transpose(3, 2, 0, 1)
        assert_close(kernel, theirs.weight.grad.numpy(), 1e-4)
