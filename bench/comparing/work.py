"""Matrix products, MoE layers and whole training steps: our rows and the peers'."""

import json
import statistics

from comparing import rust_peer
from comparing.running import BENCH, ROOT, THREADS, our_binary, our_json, python_rows, watched

TRAIN_SHAPE = "d256 L4 h4 E16 k2 f512 V512 b16 s128"
TRAIN_STEPS = 24
# The first steps, in which memory is mapped and libraries choose their kernels, are left out of the medians.
LEFT_OUT = 3
MEASURED = ("gemm", "layer_forward", "layer_backward")


def our_rows(part, data, scratch):
    if part != "train":
        return [row for row in our_json("bench", part) if row["name"] in MEASURED]
    return [our_training(precision, data, scratch) for precision in ("f32", "bf16", "bf16-native")]


def their_rows(part, data, options):
    """PyTorch's rows for products and layers, for training steps those of the faster implementation of Hugging Face's experts."""
    if part != "train":
        return python_rows(options, [{"gemm": "gemm.py", "layer": "moe_layer.py"}[part]])
    rows = []
    for precision in ("f32", "bf16"):
        both = [python_rows(options, ["train_step.py", str(data), str(TRAIN_STEPS), precision, how])[0] for how in ("eager", "grouped_mm")]
        rows.append(max(both, key=lambda row: row["tokens_per_second"]))
    return rows


def rust_rows(part, options):
    """The other Rust trainer has layers only."""
    return rust_peer.rows() if part == "layer" and options.rust_peer else []


def our_run(data, run, *more):
    """The command of one `mixtura train` of the Hugging Face shape."""
    command = [our_binary(), "-q", "train", str(BENCH / "train_step.toml"), "--set", f'data.paths=["{data}"]']
    return [*command, "--threads", str(THREADS), "--out", str(run), *more]


def our_losses(run):
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [step for step in steps if "ce" in step]


def our_training(precision, data, scratch):
    """One `mixtura train` run of the Hugging Face shape; the median step without the first three."""
    run = scratch / f"run-{precision}-{len(list(scratch.iterdir()))}"
    usage, _ = watched(our_run(data, run, "--precision", precision, "--steps", str(TRAIN_STEPS)), ROOT)
    steps = our_losses(run)
    speed = statistics.median(step["tokens_per_second"] for step in steps[LEFT_OUT:])
    return {
        "name": "train_step",
        "shape": TRAIN_SHAPE,
        "precision": precision,
        "tokens_per_second": speed,
        "ms": 16 * 128 / speed * 1e3,
        "losses": [step["ce"] for step in steps],
        "peak_mib": usage["peak_mib"],
    }
