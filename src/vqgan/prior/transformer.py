"""Stage 2: the prior. A decoder-only transformer over the tokenizer's codes.

    slot       0          1      2      ...  t-1
    input      condition  id_0   id_1   ...  id_{t-2}
    predicts   id_0       id_1   id_2   ...  id_{t-1}

The condition is a class, or the null class, which stands for none: it is learned through label
dropout and used for unconditional sampling and for guidance. Or it is a grid of p codes of another
tokenizer, the prefix, as where an image is drawn after a depth map:

    slot       0    ...  p-2      p-1      p     ...  p+t-2
    input      c_0  ...  c_{p-2}  c_{p-1}  id_0  ...  id_{t-2}
    predicts                      id_0     id_1  ...  id_{t-1}

Every slot sees itself and those before it. id_i is the code drawn i-th, by default in raster order;
outside of the transformer, ids and logits are grids in any case.

By configuration this is the paper's minGPT (arXiv:2012.09841) or a LlamaGen-like transformer
(arXiv:2406.06525), the default.

Shape letters: b images, h w the grid, t = h w codes or any number of slots, p slots of the
condition, s slots of a cache, d width, n heads, k codes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from vqgan.errors import InputError
from vqgan.nn import dropout, fold, rotary_table, rotate
from vqgan.prior.cache import KVCache
from vqgan.prior.conditions import (
    CodePrefix,
    Condition,
    check_range,
    class_rows,
    drop_classes,
    prefix_rows,
)
from vqgan.prior.sampling import Sampling, autoregressive
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
    """0 is an unconditional prior, or one with a prefix."""
    null_class: bool = True
    """Whether there is a class that stands for none. Guidance, label dropout and sampling without a
    class need it; an unconditional prior has no other."""
    prefix: CodePrefix | None = None
    """Codes of another tokenizer as the condition, in place of a class; learned positions only."""
    order: tuple[int, ...] = ()
    """Raster positions in the order in which their codes are drawn; empty is raster order."""
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

    @property
    def condition_slots(self) -> int:
        """Slots of the condition."""
        return 1 if self.prefix is None else self.prefix.length

    @property
    def condition_rows(self) -> int:
        """Rows of the condition's embedding."""
        if self.prefix is not None:
            return self.prefix.codebook_size
        return self.num_classes + int(self.null_class)

    def slots(self, grid: tuple[int, int]) -> int:
        """Slots of the condition and of a grid's codes, the last one excepted."""
        return self.condition_slots + grid[0] * grid[1] - 1

    def check(self) -> None:
        """Raises InputError where settings do not fit together."""
        sizes = (self.codebook_size, *self.grid, self.depth, self.heads, self.width)
        if min(sizes) < 1 or self.num_classes < 0 or self.mlp_multiple < 1:
            raise InputError(f"prior: every size must be positive, not {sizes}")
        if self.width % self.heads:
            raise InputError(f"prior: width {self.width} is not a multiple of heads {self.heads}")
        if self.position == "rope2d" and self.head_dim % 4:
            raise InputError(f"prior: rope2d needs width / heads, {self.head_dim}, divisible by 4")
        rows, columns = self.grid
        if self.order and sorted(self.order) != list(range(rows * columns)):
            raise InputError(
                f"prior: order must hold each of 0 to {rows * columns - 1}, the positions of "
                f"grid {self.grid}, once; it has {len(self.order)} entries"
            )
        self._check_condition()

    def _check_condition(self) -> None:
        if not self.null_class and self.num_classes == 0:
            raise InputError("prior: null_class false needs classes, and num_classes is 0")
        if not self.null_class and self.label_dropout:
            raise InputError(
                f"prior: label_dropout {self.label_dropout} needs null_class; set it 0"
            )
        if self.prefix is None:
            return
        self.prefix.check()
        if self.num_classes:
            raise InputError(f"prior: a prefix and {self.num_classes} classes; it takes only one")
        if self.position != "learned":
            raise InputError(f"prior: a prefix needs position learned, not {self.position}")


def _linear(inputs: int, outputs: int, config: PriorConfig, bias: bool, rngs: nnx.Rngs):
    dtype = jnp.dtype(config.dtype)
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=_init, rngs=rngs)


def _norm(config: PriorConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(config.width, epsilon=1e-5, use_bias=config.bias, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention: of a whole sequence, or of its next slots over a cache."""

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
        x: Float[Array, "b m d"],
        rotation: Float[Array, "m pairs 2"] | None,
        cache: KVCache,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "b m d"], KVCache]:
        q, k, v = self._project(x, rotation)
        cache = cache.write(k, v, slot)
        mask = cache.mask(slot, x.shape[1])
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
        x: Float[Array, "b m d"],
        rotation: Float[Array, "m pairs 2"] | None,
        cache: KVCache,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "b m d"], KVCache]:
        attended, cache = self.attention.step(self.norm1(x), rotation, cache, slot)
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class Prior(Pretrained):
    """A distribution over grids of codes, given a condition or nothing.

    A condition is an int32 class an image, in [0, num_classes), or None; with a prefix, int32
    `[b, y, x]` codes of the other tokenizer. `__call__`, `log_prob` and `sample` are compiled once
    a shape and also work inside a caller's own `jax.jit`, where the values of ids, conditions and
    numbers cannot be checked.
    """

    config_class = PriorConfig

    def __init__(self, config: PriorConfig, *, rngs: nnx.Rngs):
        config.check()
        super().__init__(config, rngs=rngs)
        embed = partial(nnx.Embed, features=config.width, embedding_init=_init, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        self.condition = embed(config.condition_rows, dtype=dtype)
        self.tokens = embed(config.codebook_size, dtype=dtype)
        slots = config.slots(config.grid)
        self.positions = embed(slots, dtype=dtype) if config.position == "learned" else None
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = _norm(config, rngs)
        self.head = _linear(config.width, config.codebook_size, config, False, rngs)

    def __call__(
        self,
        ids: Int[Array, "b h w"],
        condition: Condition | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Logits of every id given the condition and the ids drawn before it.

        Args:
          key: turns dropout and label dropout on; None is evaluation.

        Raises:
          InputError: a grid, an id or a condition that does not fit.
        """
        return self._logits(ids, self._checked(ids, condition), key)

    def log_prob(
        self, ids: Int[Array, "b h w"], condition: Condition | None = None
    ) -> Float[Array, "b"]:
        """Natural-log likelihood of each image's codes. Raises InputError as the call does."""
        return self._log_prob(ids, self._checked(ids, condition))

    def sample(
        self,
        condition: Condition | None = None,
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
          condition: a class or a grid of codes an image, or None.
          batch: number of images where there is no condition; by default 1.
          grid: rows and columns, by default the config's; learned positions have no other.
          temperature: divides the logits; 0 takes the likeliest code.
          top_k: draw from the k likeliest codes only.
          top_p: then from the fewest of these that hold this much probability.
          guidance: scale of classifier-free guidance; away from 1, every step runs twice the batch.

        Raises:
          InputError: a condition, the grid or a number does not fit or is out of range.
        """
        sampling = Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        if sampling.guidance is not None:
            self._check_guidance(guidance, condition)
        if condition is not None and batch not in (None, len(condition)):
            raise InputError(f"batch {batch}: does not match the {len(condition)} conditions")
        size = (batch or 1) if condition is None else len(condition)
        grid = self.config.grid if grid is None else grid
        self._check_grid(grid)
        return self._sample(self._condition_rows(condition, size), rng, sampling, grid)

    def _checked(self, ids: Array, condition: Array | None) -> Int[Array, "b p"]:
        """Rows of the condition of a batch of ids, after both were checked."""
        self._check_grid(ids.shape[1:])
        check_range("id", ids, self.config.codebook_size)
        return self._condition_rows(condition, len(ids))

    def _check_grid(self, grid: tuple[int, ...]) -> None:
        config = self.config
        if tuple(grid) == config.grid:
            return
        if config.position == "learned":
            raise InputError(f"grid {tuple(grid)}: learned positions need {config.grid}")
        if config.order:
            raise InputError(f"grid {tuple(grid)}: the order of drawing needs {config.grid}")

    def _check_guidance(self, scale: Any, condition: Array | None) -> None:
        if self.config.prefix is not None or not self.config.null_class:
            raise InputError(f"guidance {scale}: this prior has no null class to lead away from")
        if condition is None:
            raise InputError(f"guidance {scale}: needs a condition to lead away from")

    def _condition_rows(self, condition: Array | None, batch: int) -> Int[Array, "b p"]:
        config = self.config
        if config.prefix is not None:
            return prefix_rows(condition, batch, config.prefix)
        return class_rows(condition, batch, config.num_classes, config.null_class)

    @jax.jit
    def _logits(
        self, ids: Int[Array, "b h w"], rows: Int[Array, "b p"], key: Key[Array, ""] | None
    ) -> Float[Array, "b h w k"]:
        config = self.config
        b, h, w = ids.shape
        if key is not None and config.num_classes and config.null_class:
            drop_key = jax.random.fold_in(key, 0)
            rows = drop_classes(rows, config.num_classes, config.label_dropout, drop_key)
        before = self._drawn(ids.reshape(b, h * w))[:, :-1]
        x = jnp.concatenate([self.condition(rows), self.tokens(before)], axis=1)
        x = self._placed(x, jnp.arange(x.shape[1]))
        x = dropout(x, config.dropout, fold(key, 1))
        rotation = self._rotation((h, w))
        for i, block in enumerate(self.blocks):
            run = jax.checkpoint(Block.__call__) if config.remat else Block.__call__
            x = run(block, x, rotation, fold(key, 2 + i))
        logits = self._predict(x[:, config.condition_slots - 1 :])
        return self._raster(logits).reshape(b, h, w, -1)

    @jax.jit
    def _log_prob(self, ids: Int[Array, "b h w"], rows: Int[Array, "b p"]) -> Float[Array, "b"]:
        return token_log_prob(self._logits(ids, rows, None), ids).sum((1, 2))

    @partial(jax.jit, static_argnames="grid")
    def _sample(
        self,
        rows: Int[Array, "b p"],
        rng: Key[Array, ""],
        sampling: Sampling,
        grid: tuple[int, int],
    ) -> Int[Array, "b h w"]:
        config, images = self.config, len(rows)
        if sampling.guidance is not None:
            rows = jnp.concatenate([rows, jnp.full_like(rows, config.num_classes)])
        inputs = self.condition(rows)
        shape = (len(rows), config.heads, config.slots(grid), config.head_dim)
        caches = [KVCache.init(shape, config.dtype) for _ in self.blocks]
        last, rotation = config.condition_slots - 1, self._rotation(grid)
        if last:
            before = self._placed(inputs[:, :last], jnp.arange(last))
            _, caches = self._advance(before, jnp.zeros((), int), caches, rotation)

        def step(x, position, caches):
            return self._step(x, last + position, caches, rotation=rotation)

        ids = autoregressive(
            step,
            self.tokens,
            inputs[:, last],
            caches,
            length=grid[0] * grid[1],
            sampling=sampling,
            rng=rng,
        )
        return self._raster(ids).reshape(images, *grid)

    def _step(
        self,
        x: Float[Array, "b d"],
        slot: Int[Array, ""],
        caches: list[KVCache],
        *,
        rotation: Float[Array, "t pairs 2"] | None,
    ) -> tuple[Float[Array, "b k"], list[KVCache]]:
        """Logits after one more input, and the caches with it."""
        x, caches = self._advance(self._placed(x, slot)[:, None], slot, caches, rotation)
        return self._predict(x)[:, 0], caches

    def _advance(
        self,
        x: Float[Array, "b m d"],
        slot: Int[Array, ""],
        caches: list[KVCache],
        rotation: Float[Array, "t pairs 2"] | None,
    ) -> tuple[Float[Array, "b m d"], list[KVCache]]:
        """The blocks' output at the inputs of slots from `slot` on, and the caches with them."""
        if rotation is not None:
            rotation = jax.lax.dynamic_slice_in_dim(rotation, slot, x.shape[1])
        written = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, rotation, cache, slot)
            written.append(cache)
        return x, written

    def _placed(
        self, x: Float[Array, "b ... d"], slots: Int[Array, "..."]
    ) -> Float[Array, "b ... d"]:
        """Inputs with the learned positions of their slots, where positions are learned."""
        return x if self.positions is None else x + self.positions(slots)[None]

    def _rotation(self, grid: tuple[int, int]) -> Float[Array, "t pairs 2"] | None:
        """The rotary table of the slots: the condition's, then those of the ids but the last."""
        if self.config.position == "learned":
            return None
        table = rotary_table(grid, self.config.head_dim)
        first = jnp.zeros_like(table[:1])
        if self.config.class_slot_rotation == "identity":
            first = first.at[..., 0].set(1.0)
        return jnp.concatenate([first, self._drawn(table[None])[0, :-1]])

    def _predict(self, x: Float[Array, "b t d"]) -> Float[Array, "b t k"]:
        return self.head(self.norm(x)).astype(jnp.float32)

    def _drawn(self, x: Shaped[Array, "b t ..."]) -> Shaped[Array, "b t ..."]:
        """From raster order into the order of drawing."""
        return x[:, np.array(self.config.order)] if self.config.order else x

    def _raster(self, x: Shaped[Array, "b t ..."]) -> Shaped[Array, "b t ..."]:
        """From the order of drawing into raster order."""
        return x[:, np.argsort(self.config.order)] if self.config.order else x


def token_log_prob(
    logits: Float[Array, "b h w k"], ids: Int[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """Natural-log probability of each id under its logits."""
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
