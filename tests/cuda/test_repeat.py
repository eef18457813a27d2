"""The whole mixture and its backward give the same bits however often they run: no sum depends on who comes first."""

import numpy as np
import pytest
from emulation import assert_same_bits

from tinymoe.bench.components import Draw
from tinymoe.cuda import device, emulator, moe, moe_backward, moe_decode

FEW = dict(N=50, D=24, F=40, E=4)
MANY = dict(N=4096, D=1024, F=3584, E=8)  # more tiles than a card takes at a time
WHERE = [("emulated", FEW, 3), pytest.param("gpu", MANY, 100, marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("where", "shape", "repetitions"), WHERE, ids=["emulated", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repetitions_of_the_mixture_and_its_backward_have_the_same_bits(where, shape, repetitions, dtype):
    N, D, F, E = shape.values()
    with device.using(where):
        draw = Draw(dtype, 0)
        x, dy, w_gate, w1, w2, w3 = (draw(*s) for s in ((N, D), (N, D), (E, D), (E, F, D), (E, D, F), (E, F, D)))
        dlogits = draw(N, E, dtype=np.float32)

        def once():
            y, saved = moe(x, w_gate, w1, w2, w3, 2)
            few, _ = moe_decode(device.array(x[:16]), w_gate, w1, w2, w3, 2)
            return y, few, *moe_backward(dy, dlogits, saved)

        first = once()
        for repetition in range(repetitions):
            with emulator.scheduled("shuffled", repetition, 0):
                for found, kept in zip(once(), first, strict=True):
                    if where == "gpu":
                        assert bool((found.view(np.uint8) == kept.view(np.uint8)).all())
                    else:
                        assert_same_bits([found], [kept])
