"""What the three peer scripts share: thread count, median timing, one JSON object per line on stdout.

Every script does the work its name says in PyTorch and prints rows with the keys of `mixtura bench --json`, so that
`bench/compare` can set them side by side.
"""

import json
import time

import torch

torch.set_num_threads(2)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def median_seconds(work, repeats):
    """Median wall time of `work()` over `repeats` runs after one warm-up run."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def row(name, shape, precision, seconds, flops=None, tokens=None, **more):
    """Prints one measurement."""
    out = {
        "name": name,
        "shape": shape,
        "precision": precision,
        "ms": seconds * 1e3,
        "gflops": flops / seconds / 1e9 if flops else None,
        "tokens_per_second": tokens / seconds if tokens else None,
        **more,
    }
    print(json.dumps(out), flush=True)
