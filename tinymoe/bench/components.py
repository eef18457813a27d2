"""What `tinymoe bench kernels` times: each component's inputs and passes, its FLOPs and its compulsory bytes.

A component is a row of `COMPONENTS`, in the shapes alphabet of the whole project. The FLOPs of a pass are those of its
formula, a multiplication and an addition being two, whatever a kernel does beside. Its bytes are each input once and
each result once: of the experts' weights those of chosen experts; what a forward saves counts where the backward reads
it, and not in the forward, which could do without.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinymoe import cuda
from tinymoe.cuda import device
from tinymoe.cuda.grouped_gemm import RUNGS, grouped_dw, grouped_dx, grouped_linear, grouped_swiglu

Passes = dict[str, Callable[[], Any]]  # name -> what is timed
Work = Sequence[tuple[float, float]]  # FLOPs and bytes of each pass
BLOCK = 1_000_003  # random numbers drawn on the host and laid end to end: a prime, so that no two rows are the same
EPS, THETA = 1e-5, 1e6


class Size(NamedTuple):
    """Shapes to time at: one sequence of N tokens, and in decoding one token over a cache of C."""

    N: int
    C: int
    D: int
    F: int
    E: int
    k: int
    H: int
    G: int
    K: int
    V: int

    @property
    def S(self) -> int:
        """Slots: pairs of a token and an expert of its choice."""
        return self.N * self.k

    @property
    def fair(self) -> int:
        """An expert's fair share of the slots, rounded up: a capacity."""
        return min(self.N, -(-self.S // self.E))

    @property
    def chosen(self) -> float:
        """How many experts have a token, expected where each is as likely as the others."""
        return self.E * (1 - (1 - self.k / self.E) ** self.N)


MIXTRAL = dict(D=4096, F=14336, E=8, k=2, H=32, G=8, K=128, V=32000)
SIZES = {
    "toy": Size(N=40, C=100, D=32, F=48, E=4, k=2, H=4, G=2, K=16, V=64),
    "small": Size(N=512, C=2048, D=1024, F=3584, E=8, k=2, H=8, G=2, K=128, V=8192),
    "mixtral-1": Size(N=1, C=32768, **MIXTRAL),
    "mixtral-256": Size(N=256, C=1024, **MIXTRAL),
    "mixtral-4096": Size(N=4096, C=4096, **MIXTRAL),
    "mixtral-16384": Size(N=16384, C=16384, **MIXTRAL),
}


class Draw:
    """Random arrays of the device: the same in the same order from the same seed.

    Parameters
    ----------
    dtype
        Of the arrays that name none.
    seed
        Of the random numbers.
    """

    def __init__(self, dtype: str, seed: int):
        self.dtype = device.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: Any = None) -> Any:
        """Return normal numbers."""
        values = device.empty(shape, dtype or self.dtype)
        flat = values.reshape(-1)
        block = device.array(self.rng.standard_normal(min(BLOCK, flat.size), np.float32).astype(values.dtype))
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            part[...] = block[: part.size]
        return values

    def ids(self, below: int, count: int) -> Any:
        """Return uniform ids."""
        return device.array(self.rng.integers(0, below, count).astype(np.int32))

    def experts(self, s: Size) -> Any:
        """Return (N, k) experts of tokens that like all alike."""
        return device.array(np.argsort(self.rng.random((s.N, s.E)))[:, : s.k].astype(np.int32))


class Component(NamedTuple):
    """What is timed of a component, and what it must do at least.

    Parameters
    ----------
    make
        Draws inputs and returns the passes over them.
    work
        FLOPs and bytes of each of these passes, at a size and with elements of so many bytes.
    dtypes
        Those to time it in.
    equals
        The component whose passes give the same results, with which it is compared before it is timed.
    cannot
        Why it is not timed at a size in a dtype; empty where it is.
    """

    make: Callable[[Size, Draw], Passes]
    work: Callable[[Size, int], Work]
    dtypes: tuple[str, ...] = ("bfloat16",)
    equals: str | None = None
    cannot: Callable[[Size, str], str] = lambda s, dtype: ""


def _both(forward: Callable[[], tuple[Any, Any]], backward: Callable[[Any], Any]) -> Passes:
    saved = forward()[1]
    return {"forward": forward, "backward": lambda: backward(saved)}


def _embedding(s: Size, draw: Draw) -> Passes:
    tokens, weight, dy = draw.ids(s.V, s.N), draw(s.V, s.D), draw(s.N, s.D)
    return _both(lambda: cuda.embedding(tokens, weight), lambda saved: cuda.embedding_backward(dy, saved))


def _rmsnorm(s: Size, draw: Draw) -> Passes:
    x, weight, dy = draw(s.N, s.D), draw(s.D), draw(s.N, s.D)
    return _both(lambda: cuda.rmsnorm(x, weight, EPS), lambda saved: cuda.rmsnorm_backward(dy, saved))


def _linear(s: Size, draw: Draw) -> Passes:
    x, w, dy = draw(s.N, s.D), draw(s.D, s.D), draw(s.N, s.D)
    return _both(lambda: cuda.linear(x, w), lambda saved: cuda.linear_backward(dy, saved))


def _rope(s: Size, draw: Draw) -> Passes:
    x, dy = draw(1, s.N, s.H, s.K), draw(1, s.N, s.H, s.K)
    rotation = cuda.rope_table(np.arange(s.N), s.K, THETA, np.float32)
    return _both(lambda: cuda.rope(x, rotation), lambda saved: cuda.rope_backward(dy, saved))


def _attention(s: Size, draw: Draw) -> Passes:
    q, do = draw(1, s.N, s.H, s.K), draw(1, s.N, s.H, s.K)
    k, v = draw(1, s.N, s.G, s.K), draw(1, s.N, s.G, s.K)
    return _both(lambda: cuda.attention(q, k, v), lambda saved: cuda.attention_backward(do, saved))


def _attention_decode(s: Size, draw: Draw) -> Passes:
    q, k, v = draw(1, 1, s.H, s.K), draw(1, s.C, s.G, s.K), draw(1, s.C, s.G, s.K)
    return {"forward": lambda: cuda.attention_decode(q, k, v)}


def _router(s: Size, draw: Draw) -> Passes:
    x, w_gate = draw(s.N, s.D), draw(s.E, s.D)
    dweights, dlogits = draw(s.N, s.k, dtype=np.float32), draw(s.N, s.E, dtype=np.float32)
    return _both(
        lambda: cuda.route(x, w_gate, s.k),
        lambda saved: cuda.route_backward(dweights, dlogits, saved),
    )


def _dispatch(s: Size, draw: Draw) -> Passes:
    experts = draw.experts(s)
    return {"forward": lambda: cuda.dispatch(experts, s.E)}


def _drop_overflow(s: Size, draw: Draw) -> Passes:
    experts = draw.experts(s)
    return {"forward": lambda: cuda.drop_overflow(experts, s.E, s.fair)}


def _expert_choice(s: Size, draw: Draw) -> Passes:
    x, w_gate = draw(s.N, s.D), draw(s.E, s.D)
    dweights, dlogits = draw(s.N, s.E, dtype=np.float32), draw(s.N, s.E, dtype=np.float32)
    return _both(
        lambda: cuda.expert_choice(x, w_gate, s.fair),
        lambda saved: cuda.expert_choice_backward(dweights, dlogits, saved),
    )


def _router_noise(s: Size, draw: Draw) -> Passes:
    x, w_noise = draw(s.N, s.D), draw(s.E, s.D)
    normal, dnoise = draw(s.N, s.E, dtype=np.float32), draw(s.N, s.E, dtype=np.float32)
    return _both(
        lambda: cuda.router_noise(x, w_noise, normal),
        lambda saved: cuda.router_noise_backward(dnoise, saved),
    )


def _gather(s: Size, draw: Draw) -> Passes:
    plan, x, drows = cuda.dispatch(draw.experts(s), s.E), draw(s.N, s.D), draw(s.S, s.D)
    return _both(lambda: cuda.gather(x, plan), lambda saved: cuda.gather_backward(drows, saved))


def _combine(s: Size, draw: Draw) -> Passes:
    plan, out, dy = cuda.dispatch(draw.experts(s), s.E), draw(s.S, s.D), draw(s.N, s.D)
    weights = draw(s.N, s.k, dtype=np.float32)
    return _both(lambda: cuda.combine(out, weights, plan), lambda saved: cuda.combine_backward(dy, saved))


def _grouped_gemm(rung: str) -> Callable[[Size, Draw], Passes]:
    def make(s: Size, draw: Draw) -> Passes:
        tokens, offsets, _ = cuda.dispatch(draw.experts(s), s.E)
        x, w, dy = draw(s.N, s.D), draw(s.E, s.F, s.D), draw(s.S, s.F)
        return {
            "forward": lambda: grouped_linear(x, w, offsets, tokens, using=rung),
            "dx": lambda: grouped_dx(dy, w, offsets, using=rung),
            "dw": lambda: grouped_dw(dy, x, offsets, tokens, using=rung),
        }

    return make


def _grouped_gemm_work(s: Size, b: int) -> Work:
    flops, x, w, y = 2 * s.S * s.D * s.F, s.N * s.D, s.D * s.F, s.S * s.F
    return [
        (flops, b * (x + s.chosen * w + y)),
        (flops, b * (y + s.chosen * w + s.S * s.D)),
        (flops, b * (x + y + s.E * w)),
    ]


def _grouped_swiglu(rung: str) -> Callable[[Size, Draw], Passes]:
    def make(s: Size, draw: Draw) -> Passes:
        tokens, offsets, _ = cuda.dispatch(draw.experts(s), s.E)
        x, w1, w3 = draw(s.N, s.D), draw(s.E, s.F, s.D), draw(s.E, s.F, s.D)
        return {"forward": lambda: grouped_swiglu(x, w1, w3, offsets, tokens, rung)[2]}

    return make


def _weights(s: Size, draw: Draw) -> tuple[Any, Any, Any]:
    return draw(s.E, s.F, s.D), draw(s.E, s.D, s.F), draw(s.E, s.F, s.D)


def _experts(s: Size, draw: Draw) -> Passes:
    plan, rows, dout, weights = cuda.dispatch(draw.experts(s), s.E), draw(s.S, s.D), draw(s.S, s.D), _weights(s, draw)
    return _both(
        lambda: cuda.expert_ffn(rows, *weights, plan.offsets),
        lambda saved: cuda.expert_ffn_backward(dout, saved),
    )


def _experts_work(s: Size, b: int) -> Work:
    flops, w, rows = 6 * s.S * s.D * s.F, 3 * s.D * s.F, s.S * s.D
    return [
        (flops, b * (2 * rows + s.chosen * w)),
        (2 * flops, b * (3 * rows + 2 * s.S * s.F + (s.chosen + s.E) * w)),
    ]


def _moe(s: Size, draw: Draw) -> Passes:
    x, dy, w_gate, weights = draw(s.N, s.D), draw(s.N, s.D), draw(s.E, s.D), _weights(s, draw)
    return _both(lambda: cuda.moe(x, w_gate, *weights, s.k), lambda saved: cuda.moe_backward(dy, None, saved))


def _moe_work(s: Size, b: int) -> Work:
    flops, w, rows, gate = (6 * s.S * s.F + 2 * s.N * s.E) * s.D, 3 * s.D * s.F, s.N * s.D, s.E * s.D
    return [
        (flops, b * (2 * rows + gate + s.chosen * w)),
        (2 * flops, b * (3 * rows + 2 * s.S * s.F + 2 * gate + (s.chosen + s.E) * w)),
    ]


def _varied_moe(s: Size, draw: Draw) -> Passes:
    x, dy, w_gate, weights = draw(s.N, s.D), draw(s.N, s.D), draw(s.E, s.D), _weights(s, draw)
    jitter, normal = draw(s.N, s.D, dtype=np.float32), draw(s.N, s.E, dtype=np.float32)
    variation = cuda.Variation(jitter, draw(s.E, s.D), normal)
    return _both(
        lambda: cuda.varied_moe(x, w_gate, *weights, s.k, variation),
        lambda saved: cuda.varied_moe_backward(dy, None, saved),
    )


def _varied_moe_work(s: Size, b: int) -> Work:
    (forward, read), (backward, moved) = _moe_work(s, b)
    flops, gate, drawn = 2 * s.N * s.E * s.D, s.E * s.D, 4 * s.N * (s.D + s.E)  # jitter, and normal or its slope
    return [(forward + flops, read + b * gate + drawn), (backward + 2 * flops, moved + 2 * b * gate + drawn)]


def _cross_entropy(s: Size, draw: Draw) -> Passes:
    logits, targets = draw(s.N, s.V), draw.ids(s.V, s.N)
    return _both(lambda: cuda.cross_entropy(logits, targets), lambda saved: cuda.cross_entropy_backward(1.0, saved))


def _expert_load(s: Size, draw: Draw) -> Passes:
    experts = draw.experts(s)
    return {"forward": lambda: cuda.expert_load(experts, s.E)}


def _switch_loss(s: Size, draw: Draw) -> Passes:
    logits, load = draw(s.N, s.E), cuda.expert_load(draw.experts(s), s.E)
    return _both(lambda: cuda.switch_loss(logits, load), lambda saved: cuda.switch_loss_backward(1.0, saved))


def _z_loss(s: Size, draw: Draw) -> Passes:
    logits = draw(s.N, s.E)
    return _both(lambda: cuda.z_loss(logits), lambda saved: cuda.z_loss_backward(1.0, saved))


def _adamw(s: Size, draw: Draw) -> Passes:
    optimizer, grads = cuda.AdamW({"w1": draw(s.F, s.D)}), {"w1": draw(s.F, s.D)}
    return {"step": lambda: optimizer.step(grads)}


def _slow_or_narrow(rung: str) -> Callable[[Size, str], str]:
    def cannot(s: Size, dtype: str) -> str:
        if RUNGS[rung].only_bfloat16 and dtype != "bfloat16":
            return f"it does not take {dtype}"
        if RUNGS[rung].kernels.only_for not in (None, device.architecture()) and device.current() == "gpu":
            return f"it is for {RUNGS[rung].kernels.only_for}"
        if rung in ("1_naive", "2_tiled") and s.N > 4096:
            return "more than 4096 tokens take it too long"
        return ""

    return cannot


NAIVE = "grouped_gemm 1_naive"
FUSED = [rung for rung in RUNGS if RUNGS[rung].only_bfloat16]  # which have both products and the SwiGLU in one pass
COMPONENTS = {
    "embedding": Component(
        _embedding,
        lambda s, b: [
            (0, 4 * s.N + b * s.D * (s.N + s.V * (1 - (1 - 1 / s.V) ** s.N))),  # of the weight the rows that occur
            (s.N * s.D, 4 * s.N + b * s.D * (s.N + s.V)),
        ],
    ),
    "rmsnorm": Component(
        _rmsnorm,
        lambda s, b: [(4 * s.N * s.D, b * (2 * s.N + 1) * s.D), (9 * s.N * s.D, b * (3 * s.N + 2) * s.D)],
    ),
    "linear": Component(
        _linear,
        lambda s, b: [(2 * s.N * s.D**2, b * (2 * s.N + s.D) * s.D), (4 * s.N * s.D**2, b * (3 * s.N + 2 * s.D) * s.D)],
    ),
    "rope": Component(_rope, lambda s, b: 2 * [(3 * s.N * s.H * s.K, (2 * b * s.H + 4) * s.N * s.K)]),
    "attention": Component(  # of each pair of a query and a key that it sees: two products, backward five
        _attention,
        lambda s, b: [
            (4 * s.K * s.H * s.N * (s.N + 1) / 2, b * 2 * s.N * (s.H + s.G) * s.K),
            (10 * s.K * s.H * s.N * (s.N + 1) / 2, b * 4 * s.N * (s.H + s.G) * s.K),
        ],
    ),
    "attention_decode": Component(
        _attention_decode, lambda s, b: [(4 * s.K * s.H * s.C, b * 2 * (s.H + s.C * s.G) * s.K)]
    ),
    "router": Component(
        _router,
        lambda s, b: [
            (2 * s.N * s.E * s.D, b * (s.N + s.E) * s.D + 4 * (s.N * s.E + 2 * s.S)),
            (4 * s.N * s.E * s.D, b * 2 * (s.N + s.E) * s.D + 4 * (s.N * s.E + 3 * s.S)),
        ],
    ),
    "expert_choice": Component(
        _expert_choice,
        lambda s, b: [
            (2 * s.N * s.E * s.D, b * (s.N + s.E) * s.D + 12 * s.N * s.E),
            (4 * s.N * s.E * s.D, b * 2 * (s.N + s.E) * s.D + 16 * s.N * s.E),
        ],
    ),
    "router_noise": Component(
        _router_noise,
        lambda s, b: [
            (2 * products * s.N * s.E * s.D, b * products * (s.N + s.E) * s.D + 8 * s.N * s.E) for products in (1, 2)
        ],
    ),
    "dispatch": Component(_dispatch, lambda s, b: [(0, 4 * (3 * s.S + s.E + 1))], ("int32",)),
    "drop_overflow": Component(_drop_overflow, lambda s, b: [(0, 8 * s.S)], ("int32",)),
    "gather": Component(
        _gather,
        lambda s, b: [(flops, b * (s.N + s.S) * s.D + 4 * s.S) for flops in (0, s.S * s.D)],
    ),
    "combine": Component(
        _combine,
        lambda s, b: [
            (2 * s.S * s.D, b * (s.N + s.S) * s.D + 8 * s.S),
            (3 * s.S * s.D, b * (s.N + 2 * s.S) * s.D + 12 * s.S),
        ],
    ),
    **{
        f"grouped_gemm {rung}": Component(
            *(_grouped_gemm(rung), _grouped_gemm_work, ("float32", "bfloat16")),
            equals=None if rung == "1_naive" else NAIVE,
            cannot=_slow_or_narrow(rung),
        )
        for rung in RUNGS
    },
    **{
        f"grouped_swiglu {rung}": Component(
            _grouped_swiglu(rung),
            lambda s, b: [(4 * s.S * s.D * s.F, b * (s.N * s.D + 2 * s.chosen * s.D * s.F + 3 * s.S * s.F))],
            equals=None if rung == FUSED[0] else f"grouped_swiglu {FUSED[0]}",
            cannot=_slow_or_narrow(rung),
        )
        for rung in FUSED
    },
    "experts": Component(_experts, _experts_work),
    "moe": Component(_moe, _moe_work),
    "varied_moe": Component(_varied_moe, _varied_moe_work),  # with jitter and noise
    "cross_entropy": Component(
        _cross_entropy, lambda s, b: [(3 * s.N * s.V, reads * b * s.N * s.V + 4 * s.N) for reads in (1, 2)]
    ),
    "expert_load": Component(_expert_load, lambda s, b: [(s.S, 4 * (s.S + s.E))], ("int32",)),
    "switch_loss": Component(
        _switch_loss,
        lambda s, b: [(6 * s.N * s.E, b * (s.N + 1) * s.E), (5 * s.N * s.E, b * (2 * s.N + 1) * s.E)],
        ("float32",),
    ),
    "z_loss": Component(
        _z_loss, lambda s, b: [(4 * s.N * s.E, b * s.N * s.E), (2 * s.N * s.E, b * 2 * s.N * s.E)], ("float32",)
    ),
    "optimizer": Component(  # master, m and v read and written in float32, the gradient read, the weight written
        _adamw, lambda s, b: [(12 * s.D * s.F, (24 + 2 * b) * s.D * s.F)]
    ),
}
