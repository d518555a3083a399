"""Training steps of models of several sizes, ours and theirs in turn: speed in the steady state, memory and page faults."""

import shutil
import statistics

from comparing.running import PEERS, ROOT, json_lines, say, watched
from comparing.work import LEFT_OUT, TRAIN_SHAPE, our_losses, our_run

# Name, shape, steps.
SIZES = [
    ("26M", TRAIN_SHAPE, 24),
    ("120M", "d512 L8 h8 E8 k2 f1152 V512 b4 s512", 12),
    ("480M", "d768 L12 h12 E8 k2 f2048 V512 b4 s512", 8),
]
PRECISIONS = ["f32", "bf16-native"]


def lines(data, scratch, options):
    lines = [
        f"Training steps by size: {options.rounds} round(s), ours and Hugging Face's OLMoE (grouped_mm, fused AdamW) in turn; medians over "
        f"the steps after the first {LEFT_OUT}, then over the rounds. Memory is the most that the process ever held, faults are those of "
        "the whole run (minor + major). Again with: `bench/compare scale`.",
        "",
        "| parameters | shape | precision | ours tokens/s | theirs | ratio | ours MiB | theirs | ratio | ours faults | theirs | ce after the last step, ours / theirs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, shape, steps in SIZES:
        for precision in [p for p in options.precisions if name in options.sizes]:
            ours, theirs = [], []
            for n in range(options.rounds):
                say(f"{name} {precision}, round {n + 1} of {options.rounds}: ours")
                ours.append(our_size(data, scratch, shape, steps, precision))
                say(f"{name} {precision}, round {n + 1} of {options.rounds}: theirs")
                theirs.append(their_size(data, shape, steps, precision.removesuffix("-native"), options))
            lines.append(line(name, shape, precision, ours, theirs))
            say(lines[-1])
    return lines


def our_size(data, scratch, shape, steps, precision):
    run = scratch / f"scale-{len(list(scratch.iterdir()))}"
    s = dict((axis[0], int(axis[1:])) for axis in shape.split())
    sizes = {
        "model.vocab": s["V"], "model.d_model": s["d"], "model.layers": s["L"], "model.heads": s["h"], "model.context": s["s"],
        "model.moe.experts": s["E"], "model.moe.top_k": s["k"], "model.moe.d_expert": s["f"],
        "data.batch": s["b"], "data.context": s["s"],
    }
    changes = [argument for key, value in sizes.items() for argument in ("--set", f"{key}={value}")]
    usage, _ = watched(our_run(data, run, *changes, "--precision", precision, "--steps", str(steps)), ROOT)
    losses = our_losses(run)
    # The weights of the largest are 2 GB: one run's at a time.
    shutil.rmtree(run)
    speed = statistics.median(step["tokens_per_second"] for step in losses[LEFT_OUT:])
    return {"tokens_per_second": speed, "ce": losses[-1]["ce"], **usage}


def their_size(data, shape, steps, precision, options):
    command = [options.python, "train_step.py", str(data), str(steps), precision, "grouped_mm", shape, "fused"]
    usage, out = watched(command, PEERS)
    row = json_lines(out)[0]
    return {"tokens_per_second": row["tokens_per_second"], "ce": row["losses"][-1], **usage}


def line(name, shape, precision, ours, theirs):
    both = [{key: statistics.median(r[key] for r in rows) for key in rows[0]} for rows in (ours, theirs)]
    a, b = both
    faults = [f"{r['minor']:.0f} + {r['major']:.0f}" for r in both]
    return (
        f"| {name} | {shape} | {precision} | {a['tokens_per_second']:.0f} | {b['tokens_per_second']:.0f} "
        f"| {a['tokens_per_second'] / b['tokens_per_second']:.2f}x | {a['peak_mib']:.0f} | {b['peak_mib']:.0f} | {a['peak_mib'] / b['peak_mib']:.2f}x "
        f"| {faults[0]} | {faults[1]} | {a['ce']:.3f} / {b['ce']:.3f} |"
    )
