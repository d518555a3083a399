"""Loss curves from equal weights on equal batches: a fast wrong step cannot hide there."""

import statistics
import subprocess

from comparing.running import BENCH, ROOT, python_rows, say
from comparing.work import TRAIN_SHAPE, our_losses, our_run

SEEDS, STEPS = (1, 2, 3), 60


def lines(data, scratch, options):
    """Both train from our first weights on our batches, without auxiliary losses, in f32; ours in bf16 too."""
    lines = [
        f"Loss curves over {STEPS} steps of {TRAIN_SHAPE}, from equal weights on equal batches, no auxiliary loss. A seed changes weights and data.",
        "",
        "| seed | Hugging Face f32: first, last 10 | Mixtura f32: first, last 10 | largest difference, first 20 steps | mean difference, last 10 | Mixtura bf16-native: last 10 |",
        "| ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for seed in SEEDS:
        say(f"loss curves, seed {seed} of {len(SEEDS)}")
        same = ["--seed", str(seed), "--set", f"data.seed={seed}", "--set", "model.moe.balance.coefficient=0.0"]
        start, runs = scratch / f"start-{seed}", {}
        # A step at rate 0 leaves the weights as they were drawn.
        train(our_run(data, start, *same, "--steps", "1", "--set", "optimizer.lr=0.0"))
        for precision in ("f32", "bf16-native"):
            run = scratch / f"curve-{seed}-{precision}"
            train(our_run(data, run, *same, "--steps", str(STEPS), "--precision", precision))
            runs[precision] = [step["ce"] for step in our_losses(run)]
        batches = scratch / f"batches-{seed}.jsonl"
        example = ["cargo", "run", "--release", "--quiet", "-p", "mixtura-data", "--example", "batches", "--"]
        arguments = [str(BENCH / "train_step.toml"), str(STEPS), str(seed), str(data)]
        batches.write_bytes(subprocess.run([*example, *arguments], cwd=ROOT, check=True, capture_output=True).stdout)
        theirs = python_rows(options, ["loss_curve.py", str(start / "final"), str(batches)])[0]["losses"]
        ours, apart = runs["f32"], [abs(a - b) for a, b in zip(runs["f32"], theirs)]
        last = lambda losses: statistics.mean(losses[-10:])
        lines.append(
            f"| {seed} | {theirs[0]:.5f}, {last(theirs):.4f} | {ours[0]:.5f}, {last(ours):.4f} "
            f"| {max(apart[:20]):.1e} | {last(ours) - last(theirs):+.4f} | {last(runs['bf16-native']):.4f} |"
        )
    return lines


def train(command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
