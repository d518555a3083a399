"""The other Rust crate that trains MoE layers, rusting_brain: builds the program in bench/peers/rusting_brain and runs it."""

import os
import subprocess
import tomllib

from comparing.running import PEERS, THREADS, json_lines, say

PROGRAM = PEERS / "rusting_brain"


def build():
    """Whether the program could be built. Cargo runs in its directory, whose own settings turn on the CPU's instructions."""
    say("building bench/peers/rusting_brain")
    out = subprocess.run(["cargo", "build", "--release", "--quiet", "--locked"], cwd=PROGRAM, capture_output=True, text=True, env=environment())
    if out.returncode != 0:
        say(f"rusting_brain is left out: its program could not be built\n{out.stderr.strip()}")
    return out.returncode == 0


def rows():
    """Its layers, with its matrix products on as many threads of their own as is faster: its experts already share the threads."""
    best = {}
    for product_threads in (1, THREADS):
        command = [str(PROGRAM / "target" / "release" / "rusting_brain_peer")]
        out = subprocess.run(command, capture_output=True, text=True, env=environment(product_threads))
        if out.returncode != 0:
            raise SystemExit(f"bench/peers/rusting_brain failed:\n{out.stderr}")
        for row in json_lines(out.stdout):
            key = row["name"], row["shape"]
            if key not in best or row["ms"] < best[key]["ms"]:
                best[key] = {**row, "product_threads": product_threads}
    return list(best.values())


def environment(product_threads=1):
    # Its build does not go where ours goes.
    rest = {key: value for key, value in os.environ.items() if key not in ("CARGO_TARGET_DIR", "RUSTFLAGS")}
    return {**rest, "RAYON_NUM_THREADS": str(THREADS), "MATMUL_NUM_THREADS": str(product_threads)}


def version():
    """What its lock file says."""
    with open(PROGRAM / "Cargo.lock", "rb") as file:
        packages = tomllib.load(file)["package"]
    return next(f"rusting_brain {package['version']}" for package in packages if package["name"] == "rusting_brain")
