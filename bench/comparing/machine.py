"""What a report says of the machine, so that figures of two classes of CPU cannot be taken for one another.

Everything about the CPU but its stepping comes from our binary, which looks it up to choose its ways.
"""

import os
import pathlib
import platform
import re
import statistics
import subprocess

from comparing.running import ROOT, our_json

# What `mixtura doctor` calls them, what people call them, and what a file name says; the most that a CPU has names its class.
FEATURES = [
    ("avx2", "AVX2", "avx2"),
    ("avx512", "AVX-512", "avx512"),
    ("avx512bf16", "AVX512-BF16", "avx512-bf16"),
    ("amx", "AMX", "amx"),
]


class Machine:
    """The CPU, the ways that our precisions take on it, and its ceilings, measured as often as `measure` is called."""

    def __init__(self):
        self.doctor = our_json("doctor")
        self.ceilings = {}

    def measure(self):
        """Measures the ceilings once more; `mixtura bench` measures them before anything else."""
        for row in our_json("bench", "gemm", "--precision", "f32", "--seconds", "0.01"):
            figure = row["gflops"] if row["gflops"] is not None else row["gbps"]
            if row["name"].startswith("ceiling_") and figure is not None:
                self.ceilings.setdefault(row["name"], []).append(figure)

    def class_name(self):
        """For a file name: the CPU's name, family and model, and its widest feature, such as amd-epyc-family25-model1-avx2."""
        identity = self.identity()
        words = [self.doctor["cpu"]]
        words += [f"{key}{identity[key]}" for key in ("family", "model") if key in identity]
        words += [name for feature, _, name in FEATURES if feature in self.doctor["isa_available"]][-1:]
        return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")

    def identity(self):
        """Vendor, family and model as our binary read them, and the stepping as the kernel did."""
        found = re.fullmatch(r"(\S+) family (\S+) model (\S+)", self.doctor["cpu_id"] or "")
        if not found:
            return {}
        identity = {"vendor": found[1], "family": int(found[2], 0), "model": int(found[3], 0)}
        stepping = re.search(r"^stepping\s*:\s*(\d+)", cpuinfo(), re.MULTILINE)
        return {**identity, "stepping": int(stepping[1])} if stepping else identity

    def head(self, versions):
        """The table that a report opens with."""
        doctor, identity = self.doctor, self.identity()
        numbers = " ".join(f"{key} {identity[key]} (0x{identity[key]:x})" for key in ("family", "model", "stepping") if key in identity)
        has = ", ".join(f"{name} {'yes' if feature in doctor['isa_available'] else 'no'}" for feature, name, _ in FEATURES)
        memory = f"{doctor['memory_bytes'] / 2**30:.0f} GiB" if doctor["memory_bytes"] else "memory unknown"
        lines = [
            "| machine | |",
            "| --- | --- |",
            f"| CPU | {doctor['cpu']}: {identity.get('vendor', platform.machine())} {numbers} |",
            f"| it has | {has} |",
            f"| and | {os.cpu_count()} cores, {memory}, {platform.system()} {platform.release()} |",
            f"| f32 | by FMA on {doctor['isa']}: {doctor['isa_reason']} |",
        ]
        lines += [f"| {way['precision']} | by {way['way']} on {way['isa']}, because {way['reason']} |" for way in doctor["ways"]]
        lines += [
            f"| auto | {doctor['fastest_precision']}: {doctor['fastest_reason']} |",
            f"| ceilings | {self.ceilings_text()} |",
            f"| versions | {', '.join([f'Mixtura {our_version(doctor)}', *versions])} |",
        ]
        return lines

    def ceilings_text(self):
        """The medians of this run; what the CPU does not have is named too."""
        words = [("ceiling_f32", "f32 FMA", "GFLOP/s"), ("ceiling_vdpbf16ps", "bf16 dot product (VDPBF16PS)", "GFLOP/s")]
        words += [("ceiling_amx", "AMX bf16", "GFLOP/s"), ("ceiling_read", "reading memory", "GB/s")]
        texts = []
        for name, what, unit in words:
            values = self.ceilings.get(name)
            if not values:
                texts.append(f"{what}: there is none")
            else:
                digits = 1 if unit == "GB/s" else 0
                texts.append(f"{what} {statistics.median(values):.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        return "; ".join(texts) + f"; medians of {max(map(len, self.ceilings.values()))} measurements between the others"


def cpuinfo():
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def our_version(doctor):
    """Version and commit; a plus where the tree is not what was committed."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{doctor['version']} ({git('rev-parse', '--short', 'HEAD') or 'no commit'}{changed})"
