"""Dense matrix products in PyTorch: what its BLAS and oneDNN reach at the shapes of `mixtura bench gemm`."""

import torch

from common import DTYPES, median_seconds, row

SHAPES = {"2048^3": (2048, 2048, 2048), "512x2048x512": (512, 2048, 512), "64x2048x512": (64, 2048, 512)}

for precision, dtype in DTYPES.items():
    for shape, (m, n, k) in SHAPES.items():
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        repeats = 7 if m * n * k > 1e9 else 41
        row("gemm", shape, precision, median_seconds(lambda: a @ b, repeats), flops=2 * m * n * k)
