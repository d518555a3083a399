"""A routed SwiGLU layer in PyTorch with `torch.nn.functional.grouped_mm`: forward, and backward of the same pass.

Router, top-k, sort by expert, gather, three grouped products, weighted combine: the work of `mixtura bench layer`.
FLOPs count the expert products only: 2 * 3 * T * k * d * f forward, twice that backward. The slope of the loss is given,
so that neither side's figure holds a loss; ours has one pass over y in its backward figure.
"""

import time

import torch
import torch.nn.functional as F

from common import DTYPES, row

SHAPES = [(2048, 512, 1024, 16, 2), (2048, 512, 256, 64, 8), (4096, 1024, 2048, 8, 2)]


def moe(x_td, router_ed, gate_efd, up_efd, down_edf, k):
    experts = router_ed.shape[0]
    scores_te = torch.softmax(x_td.float() @ router_ed.float().T, -1)
    weights_tk, experts_tk = scores_te.topk(k, -1)
    weights_tk = weights_tk / weights_tk.sum(-1, keepdim=True)
    flat = experts_tk.reshape(-1)
    order = flat.argsort(stable=True)
    token_of_row = order // k
    offsets = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
    rows = x_td[token_of_row]
    hidden = F.silu(F.grouped_mm(rows, gate_efd.transpose(1, 2), offs=offsets)) * F.grouped_mm(
        rows, up_efd.transpose(1, 2), offs=offsets
    )
    out = F.grouped_mm(hidden, down_edf.transpose(1, 2), offs=offsets)
    y_td = torch.zeros_like(x_td)
    return y_td.index_add_(0, token_of_row, out * weights_tk.reshape(-1)[order, None].to(out.dtype))


def median(values):
    return sorted(values)[len(values) // 2]


for precision, dtype in DTYPES.items():
    for t, d, f, e, k in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(t, d, dtype=dtype, requires_grad=True)
        router = torch.randn(e, d, requires_grad=True)
        weights = [
            (torch.randn(e, f, d) / d**0.5).to(dtype).requires_grad_(),
            (torch.randn(e, f, d) / d**0.5).to(dtype).requires_grad_(),
            (torch.randn(e, d, f) / f**0.5).to(dtype).requires_grad_(),
        ]
        dy = torch.randn(t, d, dtype=dtype)
        forward, backward = [], []
        for _ in range(6):
            for p in [*weights, x, router]:
                p.grad = None
            start = time.perf_counter()
            y = moe(x, router, *weights, k)
            middle = time.perf_counter()
            y.backward(dy)
            forward.append(middle - start)
            backward.append(time.perf_counter() - middle)
        shape, flops = f"T{t} d{d} f{f} E{e} k{k}", 2 * 3 * t * k * d * f
        row("layer_forward", shape, precision, median(forward[1:]), flops=flops, tokens=t)
        row("layer_backward", shape, precision, median(backward[1:]), flops=2 * flops, tokens=t)
