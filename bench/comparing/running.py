"""Runs our binary, the peers' scripts and whole processes; a peer prints one JSON object per measurement."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

BENCH = pathlib.Path(__file__).resolve().parent.parent
ROOT = BENCH.parent
PEERS = BENCH / "peers"
THREADS = 2


def say(text):
    print(text, file=sys.stderr, flush=True)


def our_binary():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return str(target / "release" / "mixtura")


def our_json(*arguments):
    """What one of our commands prints with `--json`, on as many threads as the peers have."""
    arguments = [*arguments, "--threads", str(THREADS)]
    out = subprocess.run([our_binary(), "-q", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if out.returncode != 0:
        raise SystemExit(f"mixtura {' '.join(arguments)} exited with {out.returncode}")
    return json.loads(out.stdout)


def python_rows(options, arguments):
    """The measurements that a script of bench/peers prints."""
    out = subprocess.run([options.python, *arguments], cwd=PEERS, capture_output=True, text=True)
    if out.returncode != 0:
        raise SystemExit(f"bench/peers/{arguments[0]} failed:\n{out.stderr}")
    return json_lines(out.stdout)


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def watched(command, directory, quiet=False):
    """Runs a command; how long it took, the most memory that it held, its page faults, and what it printed."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], cwd=directory, stdout=out, stderr=subprocess.DEVNULL if quiet else None)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(process.args)} exited with {process.returncode}")
        out.seek(0)
        figures = {"seconds": seconds, "peak_mib": usage.ru_maxrss / 1024, "minor": usage.ru_minflt, "major": usage.ru_majflt}
        return figures, out.read()


def collect(into, rows):
    """Files every row under what was measured: a list with one row per round."""
    for row in rows:
        into.setdefault((row["name"], row["shape"], row["precision"]), []).append(row)
