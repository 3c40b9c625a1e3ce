"""The prior against taming's minGPT on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import import_taming, import_torch

from vqgan.prior.transformer import Prior, PriorConfig

pytestmark = pytest.mark.parity

VOCABULARY, CLASSES, GRID = 40, 5, (3, 5)


@pytest.fixture(scope="module")
def mingpt():
    torch = import_torch()
    torch.manual_seed(0)
    # One slot for the class and one for each code but the last.
    gpt = import_taming("modules.transformer.mingpt").GPT(
        VOCABULARY, GRID[0] * GRID[1], n_layer=3, n_head=4, n_embd=32
    )
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return gpt.eval()


def from_mingpt(gpt) -> Prior:
    """taming's weights in ours; class c is token c there and row c of `condition` here."""
    source = {name: value.detach().numpy() for name, value in gpt.named_parameters()}
    ours = {
        "tokens.embedding": source.pop("tok_emb.weight"),
        "positions.embedding": source.pop("pos_emb")[0],
    }
    null = np.zeros((1, 32), np.float32)
    ours["condition.embedding"] = np.concatenate([ours["tokens.embedding"][:CLASSES], null])
    layers = {"ln1": "norm1", "ln2": "norm2", "attn": "attention", "ln_f": "norm"}
    for name, value in source.items():
        name = name.replace("mlp.0", "mlp.up").replace("mlp.2", "mlp.down")
        *path, kind = [layers.get(part, part) for part in name.split(".")]
        kind = {"weight": "kernel" if value.ndim == 2 else "scale"}.get(kind, kind)
        ours[".".join([*path, kind])] = value.T
    config = PriorConfig(
        codebook_size=VOCABULARY,
        grid=GRID,
        num_classes=CLASSES,
        depth=3,
        heads=4,
        width=32,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
    )
    graph, state = nnx.split(Prior(config, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(state):
        value = ours.pop(".".join(map(str, path)))
        assert value.shape == variable.shape, path
        variable[...] = jnp.asarray(value)
    assert not ours
    return nnx.merge(graph, state)


def test_logits_equal_mingpt(mingpt):
    torch = import_torch()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (4, *GRID)).astype(np.int32)
    classes = rng.integers(0, CLASSES, 4).astype(np.int32)
    sequence = np.concatenate([classes[:, None], ids.reshape(4, -1)[:, :-1]], axis=1)
    with torch.no_grad():
        expected = mingpt(torch.from_numpy(sequence).long())[0].numpy()
    logits = from_mingpt(mingpt)(jnp.asarray(ids), jnp.asarray(classes))
    scale = np.abs(expected).max()
    assert scale > 1
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=1e-5 * scale)


def test_greedy_samples_equal_mingpts_cached_sampler(mingpt):
    torch = import_torch()
    drawn, past = torch.arange(CLASSES)[:, None], None
    with torch.no_grad():
        for length in range(GRID[0] * GRID[1]):
            logits, _, present = mingpt.forward_with_past(
                drawn[:, -1:], past=past, past_length=length
            )
            past = [present] if past is None else [*past, present]
            drawn = torch.cat([drawn, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    greedy = from_mingpt(mingpt).sample(jnp.arange(CLASSES), rng=jax.random.key(0), temperature=0.0)
    assert np.array_equal(greedy.reshape(CLASSES, -1), drawn[:, 1:].numpy())
