"""Launch every kernel in every instantiation, once and small: what compute-sanitizer is to look at.

Run as ``compute-sanitizer --tool racecheck python tests/every_kernel.py``. Says which were not launched, as status 1.
"""

import sys
from contextlib import contextmanager

import numpy as np

from tinymoe import cuda
from tinymoe.bench.components import COMPONENTS, SIZES, Draw
from tinymoe.cuda import device
from tinymoe.cuda.decode import store
from tinymoe.cuda.dispatch import FEW_PAIRS, dropped_share
from tinymoe.cuda.experts import swiglu
from tinymoe.cuda.few_tokens import few_tokens_ffn
from tinymoe.cuda.grouped_gemm import RUNGS, grouped_swiglu
from tinymoe.cuda.linear import linear_few
from tinymoe.cuda.router import top_k_ids

TOY = SIZES["toy"]
ODD = dict(D=33, F=35)  # no multiple of what a thread loads at once
STEPS = dict(D=64, F=64)  # of a warp on tensor cores, in the kernels for few rows
WIDE = [TOY._replace(K=head) for head in (64, 128, 256)]  # one after another, of attention's kernels


def launch_all():
    """Run every pass of every component, at sizes of all kinds, and what no component runs."""
    narrow = {rung for rung, of in RUNGS.items() if of.only_bfloat16}  # which take rows of whole 16 bytes only
    everything = [name for name in COMPONENTS if name.split()[-1] not in narrow]
    few = ["router", "expert_choice", "router_noise"]
    for dtype in ("float32", "bfloat16"):
        launch(TOY, dtype, COMPONENTS)
        for size in WIDE:
            launch(size, dtype, ["attention", "attention_decode"])
        launch(TOY._replace(**ODD), dtype, everything)
        launch(TOY._replace(E=33), dtype, few)
        launch(TOY._replace(E=33, **ODD), dtype, few)
        for size in (TOY, TOY._replace(**ODD), TOY._replace(**STEPS)):
            launch_few(size, Draw(dtype, 0))
    launch_the_rest(Draw("bfloat16", 0))


def launch(size, dtype, names):
    """Run every pass of some components."""
    for component in (COMPONENTS[name] for name in names):
        if not component.cannot(size, dtype) and (dtype == "float32" or component.dtypes != ("float32",)):
            for run in component.make(size, Draw(dtype, 0)).values():
                run()


def launch_few(s, draw):
    """Run the components of decoding, of two tokens, and SwiGLU by itself, which tensor cores do with a product."""
    plan = cuda.dispatch(draw.experts(s._replace(N=2)), s.E)
    weights = draw(s.E, s.F, s.D), draw(s.E, s.D, s.F), draw(s.E, s.F, s.D)
    few_tokens_ffn(draw(2, s.D), draw(2, s.k, dtype=np.float32), plan, *weights)
    linear_few(draw(2, s.D), draw(s.F, s.D))
    keys, values, of_each = draw(2, 5, s.G, s.K), draw(2, 5, s.G, s.K), device.array(np.array([3, 5], np.int32))
    store(draw(2, s.G, s.K), draw(2, s.G, s.K), keys, values, of_each, of_each)
    swiglu(draw(s.N, s.F), draw(s.N, s.F))


def launch_the_rest(draw):
    """Run what serves other kernels or nobody but the training's log."""
    plan = cuda.dispatch(draw.experts(TOY), TOY.E)
    dropped_share(plan)
    cuda.dispatch(draw.experts(TOY._replace(N=FEW_PAIRS)), TOY.E)  # too many pairs for one block
    for E in (TOY.E, 33):
        top_k_ids(draw(TOY.N, E, dtype=np.float32), TOY.k)
    for rung, of in RUNGS.items():
        if of.only_bfloat16 and of.kernels.only_for in (None, *runnable()):
            x, w1, w3 = draw(TOY.N, TOY.D), draw(TOY.E, TOY.F, TOY.D), draw(TOY.E, TOY.F, TOY.D)
            grouped_swiglu(x, w1, w3, plan.offsets, plan.tokens, using=rung)


def runnable():
    """Return the architectures whose own instructions this device has: the emulator's are everyone's."""
    return [device.architecture()] if device.current() == "gpu" else ["sm_90a"]


@contextmanager
def watched():
    """Yield the set that every launch inside of it adds its file and kernel to."""
    seen, launched = set(), device.Kernels.launch

    def noting(kernels, expression, *arguments, **more):
        seen.add((kernels.source.name, expression))
        launched(kernels, expression, *arguments, **more)

    device.Kernels.launch = noting
    try:
        yield seen
    finally:
        device.Kernels.launch = launched


def declared():
    """Return the file and the name of every kernel that this device can run."""
    here = None, *runnable()
    return {(k.source.name, name) for k in device.ALL if k.only_for in here for name in k.expressions}


def main():
    """Launch them and say what is missing."""
    if device.current() == "gpu":  # each array by itself, or the sanitizer sees nothing between arrays of one pool
        import cupy

        cupy.cuda.set_allocator(None)
    with watched() as launched:
        launch_all()
    device.synchronize()
    missing = declared() - launched
    print(f"{len(launched)} kernels launched, {len(missing)} not", *sorted(missing), sep="\n")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
