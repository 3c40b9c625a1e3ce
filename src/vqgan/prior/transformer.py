"""Stage 2: the prior. A decoder-only transformer over the tokenizer's codes in raster order.

    slot       0          1      2      ...  t-1
    input      condition  id_0   id_1   ...  id_{t-2}
    predicts   id_0       id_1   id_2   ...  id_{t-1}

The condition is a class, or the null class, which stands for none: it is learned through label
dropout and used for unconditional sampling and for guidance. By configuration this is the paper's
minGPT (arXiv:2012.09841) or a LlamaGen-like transformer (arXiv:2406.06525), the default.

Shape letters: b images, h w the grid, t = h w slots, d width, n heads, k codes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from vqgan.errors import InputError
from vqgan.nn import dropout, fold, rotary_table, rotate
from vqgan.prior.cache import KVCache
from vqgan.prior.sampling import Sampling, autoregressive, is_known
from vqgan.serialization import Pretrained

# Of minGPT and LlamaGen, for embeddings and every linear layer; biases start at 0.
_init = nnx.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A transformer over code sequences; the defaults are LlamaGen-B's.

    The paper's minGPT is `position="learned", norm="layernorm", mlp="gelu", bias=True`.
    """

    codebook_size: int
    grid: tuple[int, int]
    """Rows and columns of the code grid. Rotary positions sample other grids too."""
    num_classes: int = 0
    """0 is an unconditional prior."""
    depth: int = 12
    heads: int = 12
    width: int = 768
    position: Literal["learned", "rope2d"] = "rope2d"
    class_slot_rotation: Literal["identity", "zero"] = "identity"
    """`zero` blanks the query and key of slot 0 under rope2d, as LlamaGen's table does."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    mlp_multiple: int = 32
    """The hidden width of swiglu, 8/3 of `width`, is rounded up to it; LlamaGen has 256."""
    bias: bool = False
    """On linear layers and LayerNorm. The head has none."""
    dropout: float = 0.1
    """On embeddings and on both branches of each block."""
    attention_dropout: float = 0.0
    label_dropout: float = 0.1
    """How often training replaces the class by the null class."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters, normalisation, softmax and logits are float32."""
    remat: bool = False
    """Recompute each block in the backward pass: memory of one block instead of `depth`."""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        if self.mlp == "gelu":
            return 4 * self.width
        return -(-(8 * self.width // 3) // self.mlp_multiple) * self.mlp_multiple

    def check(self) -> None:
        """Raises InputError where sizes do not fit together."""
        sizes = (self.codebook_size, *self.grid, self.depth, self.heads, self.width)
        if min(sizes) < 1 or self.num_classes < 0 or self.mlp_multiple < 1:
            raise InputError(f"prior: every size must be positive, not {sizes}")
        if self.width % self.heads:
            raise InputError(f"prior: width {self.width} is not a multiple of heads {self.heads}")
        if self.position == "rope2d" and self.head_dim % 4:
            raise InputError(f"prior: rope2d needs width / heads, {self.head_dim}, divisible by 4")


def _linear(inputs: int, outputs: int, config: PriorConfig, bias: bool, rngs: nnx.Rngs):
    dtype = jnp.dtype(config.dtype)
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=_init, rngs=rngs)


def _norm(config: PriorConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(config.width, epsilon=1e-5, use_bias=config.bias, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention: of a whole sequence, or of one position over a cache."""

    def __init__(self, config: PriorConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.dropout = config.attention_dropout
        width, bias = config.width, config.bias
        self.query = _linear(width, width, config, bias, rngs)
        self.key = _linear(width, width, config, bias, rngs)
        self.value = _linear(width, width, config, bias, rngs)
        self.proj = _linear(width, width, config, bias, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotation: Float[Array, "t pairs 2"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        q, k, v = self._project(x, rotation)
        mask = jnp.tri(x.shape[1], dtype=bool)
        return self._merge(attend(q, k, v, mask, rate=self.dropout, key=key))

    def step(
        self,
        x: Float[Array, "b 1 d"],
        rotation: Float[Array, "1 pairs 2"] | None,
        cache: KVCache,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b 1 d"], KVCache]:
        q, k, v = self._project(x, rotation)
        cache = cache.write(k, v, position)
        mask = cache.mask(position)
        attended = attend(q, cache.keys, cache.values, mask, rate=0.0, key=None)
        return self._merge(attended), cache

    def _project(
        self, x: Float[Array, "b t d"], rotation: Float[Array, "t pairs 2"] | None
    ) -> tuple[Float[Array, "b n t c"], Float[Array, "b n t c"], Float[Array, "b n t c"]]:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)

    def _merge(self, attended: Float[Array, "b n t c"]) -> Float[Array, "b t d"]:
        b, _, t, _ = attended.shape
        return self.proj(attended.swapaxes(1, 2).reshape(b, t, -1))


def attend(
    q: Float[Array, "b n t c"],
    k: Float[Array, "b n s c"],
    v: Float[Array, "b n s c"],
    mask: Bool[Array, "t s"],
    *,
    rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "b n t c"]:
    """Scaled dot-product attention with a float32 softmax and dropout on its weights.

    Written out, as `jax.nn.dot_product_attention` has no dropout and wants positions before heads,
    a slow layout for the cache.
    """
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bntc,bnsc->bnts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf))
    return jnp.einsum("bnts,bnsc->bntc", dropout(weights, rate, key).astype(v.dtype), v)


class GeluMLP(nnx.Module):
    """Two layers with exact GELU between them."""

    def __init__(self, config: PriorConfig, *, rngs: nnx.Rngs):
        self.up = _linear(config.width, config.mlp_width, config, config.bias, rngs)
        self.down = _linear(config.mlp_width, config.width, config, config.bias, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class SwiGLU(nnx.Module):
    """Gated layers (arXiv:2002.05202): down(silu(gate(x)) * up(x)).

    Gate and up share one kernel, `d 2 hidden`: at sampling's few rows one product is up to twice as
    fast as two.
    """

    def __init__(self, config: PriorConfig, *, rngs: nnx.Rngs):
        self.gate_up = nnx.LinearGeneral(
            config.width,
            (2, config.mlp_width),
            use_bias=config.bias,
            dtype=jnp.dtype(config.dtype),
            kernel_init=_init,
            rngs=rngs,
        )
        self.down = _linear(config.mlp_width, config.width, config, config.bias, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        gate_up = self.gate_up(x)
        return self.down(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :])


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: PriorConfig, *, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.norm1 = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        self.mlp = (GeluMLP if config.mlp == "gelu" else SwiGLU)(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotation: Float[Array, "t pairs 2"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        attended = self.attention(self.norm1(x), rotation, fold(key, 0))
        x = x + dropout(attended, self.dropout, fold(key, 1))
        return x + dropout(self.mlp(self.norm2(x)), self.dropout, fold(key, 2))

    def step(
        self,
        x: Float[Array, "b 1 d"],
        rotation: Float[Array, "1 pairs 2"] | None,
        cache: KVCache,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b 1 d"], KVCache]:
        attended, cache = self.attention.step(self.norm1(x), rotation, cache, position)
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class Prior(Pretrained):
    """A distribution over grids of codes, given a class or nothing.

    A condition is an int32 class an image, in [0, num_classes), or None. `__call__`, `log_prob` and
    `sample` are compiled once a shape and also work inside a caller's own `jax.jit`, where
    the values of ids, classes and numbers cannot be checked.
    """

    config_class = PriorConfig

    def __init__(self, config: PriorConfig, *, rngs: nnx.Rngs):
        config.check()
        super().__init__(config, rngs=rngs)
        embed = partial(nnx.Embed, features=config.width, embedding_init=_init, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        self.condition = embed(config.num_classes + 1, dtype=dtype)
        self.tokens = embed(config.codebook_size, dtype=dtype)
        rows, columns = config.grid
        self.positions = (
            embed(rows * columns, dtype=dtype) if config.position == "learned" else None
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = _norm(config, rngs)
        self.head = _linear(config.width, config.codebook_size, config, False, rngs)

    def __call__(
        self,
        ids: Int[Array, "b h w"],
        condition: Int[Array, "b"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Logits of every id given the condition and the ids before it.

        Args:
          key: turns dropout and label dropout on; None is evaluation.

        Raises:
          InputError: a grid, an id or a class that does not fit.
        """
        return self._logits(ids, self._checked(ids, condition), key)

    def log_prob(
        self, ids: Int[Array, "b h w"], condition: Int[Array, "b"] | None = None
    ) -> Float[Array, "b"]:
        """Natural-log likelihood of each image's codes. Raises InputError as the call does."""
        return self._log_prob(ids, self._checked(ids, condition))

    def sample(
        self,
        condition: Int[Array, "b"] | None = None,
        *,
        rng: Key[Array, ""],
        batch: int | None = None,
        grid: tuple[int, int] | None = None,
        temperature: float | int | Float[Array, ""] = 1.0,
        top_k: int | Int[Array, ""] | None = None,
        top_p: float | int | Float[Array, ""] | None = None,
        guidance: float | int | Float[Array, ""] = 1.0,
    ) -> Int[Array, "b h w"]:
        """Draws grids of codes, deterministically in `rng`.

        Args:
          condition: a class an image, or None.
          batch: number of images where there is no condition; by default 1.
          grid: rows and columns, by default the config's; learned positions have no other.
          temperature: divides the logits; 0 takes the likeliest code.
          top_k: draw from the k likeliest codes only.
          top_p: then from the fewest of these that hold this much probability.
          guidance: scale of classifier-free guidance; away from 1, every step runs twice the batch.

        Raises:
          InputError: a class, the grid or a number is out of range.
        """
        sampling = Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        if condition is None and sampling.guidance is not None:
            raise InputError(f"guidance {guidance}: needs a condition to lead away from")
        if condition is not None and batch not in (None, len(condition)):
            raise InputError(f"batch {batch}: does not match the {len(condition)} conditions")
        size = (batch or 1) if condition is None else len(condition)
        grid = self.config.grid if grid is None else grid
        self._check_grid(grid)
        return self._sample(self._classes(condition, size), rng, sampling, grid)

    def _checked(self, ids: Array, condition: Array | None) -> Int[Array, "b"]:
        """Classes of a batch of ids, after both were checked."""
        self._check_grid(ids.shape[1:])
        _check_range("id", ids, self.config.codebook_size)
        return self._classes(condition, len(ids))

    def _check_grid(self, grid: tuple[int, ...]) -> None:
        if self.config.position == "learned" and tuple(grid) != self.config.grid:
            raise InputError(f"grid {tuple(grid)}: learned positions need {self.config.grid}")

    def _classes(self, condition: Array | None, batch: int) -> Int[Array, "b"]:
        """Rows of the condition's embedding; the last one, `num_classes`, is the null class."""
        if condition is None:
            return jnp.full(batch, self.config.num_classes, jnp.int32)
        if self.config.num_classes == 0:
            raise InputError("a condition: this prior is unconditional, leave it out")
        if len(condition) != batch:
            raise InputError(f"{len(condition)} conditions for {batch} images: one each is needed")
        _check_range("class", condition, self.config.num_classes)
        return jnp.asarray(condition, jnp.int32)

    @jax.jit
    def _logits(
        self, ids: Int[Array, "b h w"], classes: Int[Array, "b"], key: Key[Array, ""] | None
    ) -> Float[Array, "b h w k"]:
        config = self.config
        b, h, w = ids.shape
        if key is not None:
            dropped = jax.random.bernoulli(
                jax.random.fold_in(key, 0), config.label_dropout, classes.shape
            )
            classes = jnp.where(dropped, config.num_classes, classes)
        before = ids.reshape(b, h * w)[:, :-1]
        x = jnp.concatenate([self.condition(classes)[:, None], self.tokens(before)], axis=1)
        if self.positions is not None:
            x = x + self.positions.embedding[...].astype(x.dtype)[None]
        x = dropout(x, config.dropout, fold(key, 1))
        rotation = self._rotation((h, w))
        for i, block in enumerate(self.blocks):
            run = jax.checkpoint(Block.__call__) if config.remat else Block.__call__
            x = run(block, x, rotation, fold(key, 2 + i))
        return self._predict(x).reshape(b, h, w, -1)

    @jax.jit
    def _log_prob(self, ids: Int[Array, "b h w"], classes: Int[Array, "b"]) -> Float[Array, "b"]:
        return token_log_prob(self._logits(ids, classes, None), ids).sum((1, 2))

    @partial(jax.jit, static_argnames="grid")
    def _sample(
        self,
        classes: Int[Array, "b"],
        rng: Key[Array, ""],
        sampling: Sampling,
        grid: tuple[int, int],
    ) -> Int[Array, "b h w"]:
        config, length = self.config, grid[0] * grid[1]
        images = len(classes)
        if sampling.guidance is not None:
            classes = jnp.concatenate([classes, jnp.full_like(classes, config.num_classes)])
        shape = (len(classes), config.heads, length, config.head_dim)
        caches = [KVCache.init(shape, config.dtype) for _ in self.blocks]
        ids = autoregressive(
            partial(self._step, rotation=self._rotation(grid)),
            self.tokens,
            self.condition(classes),
            caches,
            length=length,
            sampling=sampling,
            rng=rng,
        )
        return ids.reshape(images, *grid)

    def _step(
        self,
        x: Float[Array, "b d"],
        position: Int[Array, ""],
        caches: list[KVCache],
        *,
        rotation: Float[Array, "t pairs 2"] | None,
    ) -> tuple[Float[Array, "b k"], list[KVCache]]:
        """Logits after one more input, and the caches with it."""
        if self.positions is not None:
            x = x + self.positions(position)[None]
        if rotation is not None:
            rotation = jax.lax.dynamic_slice_in_dim(rotation, position, 1)
        x, written = x[:, None], []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, rotation, cache, position)
            written.append(cache)
        return self._predict(x)[:, 0], written

    def _rotation(self, grid: tuple[int, int]) -> Float[Array, "t pairs 2"] | None:
        """The rotary table of the slots: the condition's, then those of the ids but the last."""
        if self.config.position == "learned":
            return None
        table = rotary_table(grid, self.config.head_dim)
        first = jnp.zeros_like(table[:1])
        if self.config.class_slot_rotation == "identity":
            first = first.at[..., 0].set(1.0)
        return jnp.concatenate([first, table[:-1]])

    def _predict(self, x: Float[Array, "b t d"]) -> Float[Array, "b t k"]:
        return self.head(self.norm(x)).astype(jnp.float32)


def token_log_prob(
    logits: Float[Array, "b h w k"], ids: Int[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """Natural-log probability of each id under its logits."""
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _check_range(name: str, values: Any, limit: int) -> None:
    """Raises InputError for a value outside [0, limit), where this process holds the values now."""
    if not is_known(values) or not getattr(values, "is_fully_addressable", True):
        return
    values = np.asarray(values)
    wrong = values[(values < 0) | (values >= limit)]
    if wrong.size:
        raise InputError(f"{name} {wrong[0]}: this prior has {limit}, 0 to {limit - 1}")
