"""The whole projection by every backend: a group for each batch, number of restarts and precision.

`pytest bench --benchmark-only` prints a table for each group. The extra information of each row has the time
of one step and the useful GFLOP/s, counted as `defgan-fast bench` counts them.
"""

from __future__ import annotations

import pytest
import torch

from defgan_fast.benchmark import flops, generators, peers, run
from defgan_fast.precisions import ON_CPU

STEPS = 20
SIZES = [(1, 1), (1, 10), (10, 10)]
BACKENDS = [peers.ours(precision) for precision in ON_CPU] + peers.pytorch_peers() + peers.jax_peers()


@pytest.mark.parametrize(("images", "restarts"), SIZES)
@pytest.mark.parametrize("peer", BACKENDS, ids=lambda peer: f"{peer.name}-{peer.precision}")
def test_projection(benchmark, checked, generator, peer, images, restarts):
    torch.compiler.reset()  # the compiled step of an earlier size would count as a recompilation
    benchmark.group = f"{images} x {restarts} {peer.precision}"
    try:
        prepared, work = checked(peer, images, restarts)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.pedantic(prepared, args=(STEPS,), rounds=run.REPETITIONS, warmup_rounds=1)
    seconds = benchmark.stats.stats.median / STEPS
    flop = flops.flop_per_step(generator, generators.latent_size(generator)) * work.rows
    benchmark.extra_info["ms_per_step"] = round(1e3 * seconds, 3)
    benchmark.extra_info["gflops_useful"] = round(1e-9 * flop / seconds, 1)
