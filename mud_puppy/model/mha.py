"""`FlashMHA`: multi-head attention as a Flax NNX module, for models outside of this decoder."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import flash_attention
from mud_puppy.kernels.arguments import check_window


class FlashMHA(nnx.Module):
    """Projections to queries, keys and values, `flash_attention`, and the projection back.

        layer = FlashMHA(512, 8, num_kv_heads=2, rngs=nnx.Rngs(0))
        y = layer(x)                                       # [B, T, 512] -> [B, T, 512]

    `num_kv_heads` divides `num_heads` (grouped-query attention) and is `num_heads` when None;
    `head_dim` is embed_dim / num_heads when None. `causal` and `window` are those of
    `flash_attention`. `dropout` sets attention weights to 0, by a key of the stream "dropout" for
    each call; `deterministic` switches it off. Parameters are `param_dtype`, products `dtype`
    (`param_dtype` when None). It has no position encoding and does not partition itself over a
    mesh. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = True,
        causal: bool = True,
        window: int | None = None,
        dropout: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        check_window("FlashMHA", window, causal)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability below 1; got {dropout}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.causal, self.window = causal, window
        self.dropout, self.deterministic = dropout, deterministic
        rngs = rngs or nnx.Rngs(0)
        options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = nnx.Linear(embed_dim, heads * self.head_dim, **options)
        self.out = nnx.Linear(self.num_heads * self.head_dim, embed_dim, **options)
        if dropout and "dropout" not in rngs and "default" not in rngs:
            raise ValueError('dropout needs a stream "dropout": pass nnx.Rngs(params=0, dropout=1)')
        self.rngs = rngs.dropout.fork() if dropout else None

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "B T E"]:
        """Attention of x to itself; tokens of different `segment_ids` do not see each other."""
        if x.ndim != 3 or x.shape[2] != self.qkv.in_features:
            raise ValueError(
                f"FlashMHA: expected x [B, T, {self.qkv.in_features}], got {list(x.shape)}"
            )
        B, T, _ = x.shape
        H, K = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).reshape(B, T, H + 2 * K, self.head_dim)
        q, k, v = jnp.split(heads, (H, H + K), axis=2)
        dropout, seed = 0.0, None
        if self.rngs is not None and not self.deterministic:
            dropout, seed = self.dropout, jax.random.bits(self.rngs())
        attended = flash_attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            segment_ids=segment_ids,
            dropout=dropout,
            dropout_seed=seed,
            implementation=implementation,
        )
        return self.out(attended.reshape(B, T, H * self.head_dim))


def _check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for name, size in (*sizes.items(), ("head_dim", 1 if head_dim is None else head_dim)):
        if size < 1:
            raise ValueError(f"FlashMHA: {name} must be at least 1, got {size}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}: pass head_dim"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
