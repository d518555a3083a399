"""The tables of `gemm`, `layer` and `train`: ours, PyTorch's and the other Rust trainer's side by side."""

import statistics

RUST = "rusting_brain"
BOTH = ("bf16", "bf16-native")


def work(ours, theirs, rust):
    """Every row that has a peer, then the layers as a whole, then what the training steps held and learned."""
    tables = [rows(ours, theirs, rust), combined_layer(ours, theirs, rust), training_details(ours, theirs)]
    return [line for table in tables if table for line in [*table, ""]]


def rows(ours, theirs, rust):
    lines = [
        f"| work | shape | precision | ours | PyTorch | {RUST} | unit | ours / PyTorch | ours / {RUST} | spread ours / PyTorch / {RUST} |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for name, shape in kinds(ours):
        unit, key = ("tokens/s", "tokens_per_second") if name == "train_step" else ("GFLOP/s", "gflops")
        for precision, label in precisions(ours, name, shape):
            sides = [
                [row[key] for row in side.get((name, shape, p), [])]
                for side, p in ((ours, precision), (theirs, peer(precision)), (rust, precision))
            ]
            if sides[1] or sides[2]:
                a, b, c = [statistics.median(side) if side else None for side in sides]
                spreads = " / ".join(spread(side) for side in sides)
                lines.append(
                    f"| {name} | {shape} | {label} | {number(a)} | {number(b)} | {number(c)} | {unit} "
                    f"| {times(a, b)} | {times(a, c)} | {spreads} |"
                )
    return lines if len(lines) > 2 else []


def combined_layer(ours, theirs, rust):
    """Forward plus backward of a layer, the figure that the targets speak of."""
    lines = [
        f"| layer, forward + backward | precision | ours ms | PyTorch ms | {RUST} ms | ours / PyTorch, speed | ours / {RUST}, speed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in [shape for name, shape in kinds(ours) if name == "layer_forward"]:
        for precision, label in precisions(ours, "layer_forward", shape):
            a, b, c = [layer_ms(side, shape, p) for side, p in ((ours, precision), (theirs, peer(precision)), (rust, precision))]
            lines.append(f"| {shape} | {label} | {number(a, 1)} | {number(b, 1)} | {number(c, 1)} | {times(b, a)} | {times(c, a)} |")
    return lines if len(lines) > 2 else []


def training_details(ours, theirs):
    """Memory and the loss after the last steps, so that a fast wrong step cannot hide."""
    lines = ["| training step | peak MiB | ce, first step | ce, mean of last 5 |", "| --- | ---: | ---: | ---: |"]
    for who, results in (("Mixtura", ours), ("Hugging Face", theirs)):
        for (name, _, precision), rows in results.items():
            if name != "train_step":
                continue
            peak = statistics.median(row["peak_mib"] for row in rows)
            first = statistics.median(row["losses"][0] for row in rows)
            last = statistics.median(statistics.mean(row["losses"][-5:]) for row in rows)
            how = f" ({rows[0]['implementation']})" if "implementation" in rows[0] else ""
            lines.append(f"| {who} {precision}{how} | {peak:.0f} | {first:.3f} | {last:.3f} |")
    return lines if len(lines) > 2 else []


def kinds(results):
    """Name and shape of what was measured, in the order of measuring."""
    return list(dict.fromkeys((name, shape) for name, shape, _ in results))


def precisions(ours, name, shape):
    """Our precisions and their labels, then once more the better of the two orders of bf16: what PyTorch's bf16 is to be held against."""
    found = [precision for n, s, precision in ours if (n, s) == (name, shape)]
    labelled = [(precision, precision) for precision in found]
    if all(precision in found for precision in BOTH):
        better = better_order(ours, name, shape)
        labelled.append((better, f"**better of both bf16: {better}**"))
    return labelled


def better_order(ours, name, shape):
    """By the median time; one order for a layer's two directions, since a model trains in one."""
    if name.startswith("layer_"):
        return min(BOTH, key=lambda precision: layer_ms(ours, shape, precision))
    return min(BOTH, key=lambda precision: statistics.median(row["ms"] for row in ours[name, shape, precision]))


def layer_ms(side, shape, precision):
    keys = [(f"layer_{way}", shape, precision) for way in ("forward", "backward")]
    if not all(key in side for key in keys):
        return None
    return sum(statistics.median(row["ms"] for row in side[key]) for key in keys)


def peer(precision):
    """PyTorch has one bf16."""
    return precision.removesuffix("-native")


def number(value, digits=0):
    return "–" if value is None else f"{value:.{digits}f}"


def times(a, b):
    return "–" if a is None or b is None else f"{a / b:.2f}x"


def spread(values):
    """(max - min) / median over the rounds."""
    return f"{(max(values) - min(values)) / statistics.median(values):.0%}" if values else "–"
