"""The references that the kernels' tests lean on, against torch in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.kernels import decode_attention, flash_attention, linear_cross_entropy, token_logps

torch = pytest.importorskip("torch")


def draws(*shapes):
    r = np.random.default_rng(0)
    return [r.normal(size=s) for s in shapes]


def agree(f, g, arrays, cotangents):
    """Results and gradients of f (JAX, in float64) and g (torch) at the same float64 arrays.

    The largest difference over the largest number.
    """
    with jax.enable_x64(True):
        y, pull = jax.vjp(f, *map(jnp.asarray, arrays))
        ours = [*y, *pull(tuple(map(jnp.asarray, cotangents)))]
    given = [torch.tensor(x, requires_grad=True) for x in arrays]
    y = g(*given)
    total = sum((a * torch.tensor(c)).sum() for a, c in zip(y, cotangents, strict=True))
    theirs = [*(a.detach() for a in y), *torch.autograd.grad(total, given)]
    pairs = zip(ours, theirs, strict=True)
    return [np.abs(np.asarray(a) - b.numpy()).max() / np.abs(b.numpy()).max() for a, b in pairs]


def attention(q, k, v, sinks, bias, ids, *, window=9, softcap=3.0, scale=0.3):
    """Every option at once, written down a second time."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    x = torch.einsum("bthd,bshd->bhts", q, k) * scale
    x = softcap * torch.tanh(x / softcap) + bias
    i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    seen = (j <= i) & (j > i - window)
    seen = seen & (ids[:, S - T :, None] == ids[:, None, :])
    x = torch.where(seen[:, None], x, -torch.inf)
    sink = sinks[None, :, None, None].expand(*x.shape[:3], 1)
    lse = torch.logsumexp(torch.cat([x, sink], -1), -1)
    return torch.einsum("bhts,bshd->bthd", torch.exp(x - lse[..., None]), v), lse.transpose(1, 2)


def test_attention():
    B, T, S, H, K, D, Dv = 2, 13, 20, 6, 2, 8, 5
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, Dv), (H,), (1, H, T, S)
    ids = np.random.default_rng(1).integers(-1, 2, (B, S))

    def ours(window=9, shift=0):
        def f(q, k, v, sinks, bias):
            call = inspect.unwrap(flash_attention)
            return call(
                q, k, v, sinks=jnp.roll(sinks, shift), bias=bias, window=window, softcap=3.0,
                scale=0.3, segment_ids=jnp.asarray(ids[:, S - T :]),
                kv_segment_ids=jnp.asarray(ids), implementation="reference", return_lse=True,
            )  # fmt: skip

        return f

    arrays, cotangents = draws(*shapes), draws((B, T, H, Dv), (B, T, H))

    def theirs(*args):
        return attention(*args, torch.tensor(ids))

    assert max(agree(ours(), theirs, arrays, cotangents)) < 1e-10
    assert min(agree(ours(window=8), theirs, arrays, cotangents)) > 1e-3
    assert min(agree(ours(shift=1), theirs, arrays, cotangents)[:2]) > 1e-3


@pytest.mark.parametrize("wrong", [False, True])
def test_decode(wrong):
    """One new token: torch's attention over the slots up to its position."""
    B, S, H, K, D = 2, 12, 4, 2, 8
    q, k, v = draws((B, 1, H, D), (B, S, K, D), (B, S, K, D))
    at = np.array([[11], [5]])
    with jax.enable_x64(True):
        got = inspect.unwrap(decode_attention)(
            *map(jnp.asarray, (q, k, v)), jnp.asarray(at - wrong), implementation="reference"
        )
    mask = torch.tensor(np.arange(S)[None] <= at)[:, None, None]
    tensors = [torch.tensor(x).transpose(1, 2) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=mask, enable_gqa=True
    )
    error = np.abs(np.asarray(got) - want.transpose(1, 2).numpy()).max()
    assert error > 0.01 if wrong else error < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    B, T, D, V, cap, smoothing, z = 2, 7, 8, 30, 4.0, 0.2, 0.05
    y = np.random.default_rng(1).integers(0, V, (B, T))
    y[0, :3] = -100

    def ours(smoothing=smoothing, z=z):
        def f(hidden, head):
            return (
                inspect.unwrap(linear_cross_entropy)(
                    hidden, head, jnp.asarray(y), softcap=cap, label_smoothing=smoothing,
                    z_loss=z, reduction=reduction, implementation="reference",
                ),
            )  # fmt: skip

        return f

    def theirs(hidden, head):
        x = cap * torch.tanh(hidden @ head.T / cap)
        loss = torch.nn.functional.cross_entropy(
            x.transpose(1, 2), torch.tensor(y), label_smoothing=smoothing, reduction="none"
        )
        counts = torch.tensor(y) != -100
        loss = loss + torch.where(counts, z * torch.logsumexp(x, -1) ** 2, 0)
        return ({"mean": loss.sum() / counts.sum(), "sum": loss.sum(), "none": loss}[reduction],)

    arrays = draws((B, T, D), (V, D))
    cotangents = draws((B, T)) if reduction == "none" else [np.ones(())]
    # The core's results are float32.
    assert max(agree(ours(), theirs, arrays, cotangents)) < 1e-6
    for wrong in ({"smoothing": 0.1}, {"z": 0.04}):
        assert min(agree(ours(**wrong), theirs, arrays, cotangents)) > 1e-3


def test_token_logps():
    B, T, D, V = 2, 7, 8, 30
    y = np.random.default_rng(1).integers(0, V, (B, T))

    def ours(temperature):
        def f(hidden, head):
            return inspect.unwrap(token_logps)(
                hidden, head, jnp.asarray(y), temperature=temperature, implementation="reference"
            )

        return f

    def theirs(hidden, head):
        found = torch.distributions.Categorical(logits=hidden @ head.T / 0.7)
        return found.log_prob(torch.tensor(y)), found.entropy()

    arrays, cotangents = draws((B, T, D), (V, D)), draws((B, T), (B, T))
    assert max(agree(ours(0.7), theirs, arrays, cotangents)) < 1e-6
    assert min(agree(ours(0.8), theirs, arrays, cotangents)) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_flash_mha(causal, use_bias):
    ours = mp.FlashMHA(32, 4, causal=causal, use_bias=use_bias)
    theirs = torch.nn.MultiheadAttention(32, 4, bias=use_bias, batch_first=True)
    pairs = [(ours.qkv, theirs.in_proj_weight, theirs.in_proj_bias)]
    pairs += [(ours.out, theirs.out_proj.weight, theirs.out_proj.bias)]
    with torch.no_grad():
        for layer, weight, bias in pairs:
            weight.copy_(torch.tensor(np.asarray(layer.kernel[...]).T))
            if use_bias:
                layer.bias[...] = jnp.asarray(draws(layer.bias.shape)[0], jnp.float32)
                bias.copy_(torch.tensor(np.asarray(layer.bias[...])))
    x = np.random.default_rng(2).normal(size=(2, 9, 32)).astype(np.float32)
    mask = torch.triu(torch.ones(9, 9, dtype=torch.bool), 1) if causal else None
    with torch.no_grad():
        want = theirs(*[torch.tensor(x)] * 3, attn_mask=mask, need_weights=False)[0].numpy()
    with jax.default_matmul_precision("highest"):  # a GPU would multiply float32 in TF32
        found, rolled = (np.asarray(ours(jnp.asarray(y))) for y in (x, np.roll(x, 1, 1)))
    assert np.abs(found - want).max() < 1e-5
    assert np.abs(rolled - want).max() > 0.1
