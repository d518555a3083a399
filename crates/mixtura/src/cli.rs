//! What can be typed: one struct per command, its help and its examples. Nothing is read or run here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Train, evaluate, inspect and sample Mixture-of-Experts language models on the CPU.
#[derive(Debug, Parser)]
#[command(
    name = "mixtura",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed while running, 2 wrong usage or config, 130 interrupted after saving.\n\n\
                  Start with:\n  mixtura train\n  mixtura generate runs/quickstart --prompt 'Is the following proposition true: \
                  \"Mars has exactly two natural satellites.\"'"
)]
pub struct Cli {
    /// Print one JSON document on stdout and nothing else there.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say nothing on stderr but warnings and errors.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more on stderr.
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model; without CONFIG, the built-in quickstart.
    Train(TrainArgs),
    /// Loss, perplexity and bits per byte; on propositions also accuracy.
    Eval(EvalArgs),
    /// Continue texts.
    Generate(GenerateArgs),
    /// Talk with a model by its chat template.
    Chat(ChatArgs),
    /// Turn text into a token shard for training.
    Tokenize(TokenizeArgs),
    /// Logits of every position, and with --routing what the routers decided.
    Logits(LogitsArgs),
    /// Parameters, layers, experts and tensors of a model; with data, the load per expert.
    Inspect(InspectArgs),
    /// Check or explain routing policies.
    Route(RouteArgs),
    /// Measure the machine's ceilings, then our share of them.
    Bench(BenchArgs),
    /// Which instruction set and which way of computing bf16 is used and why, threads, memory bandwidth, features.
    Doctor(ThreadArgs),
    /// Print a shell completion script.
    Completions(CompletionsArgs),
}

/// `--threads`, for every command that computes.
#[derive(Debug, Clone, Args)]
pub struct ThreadArgs {
    /// Threads to use; by default one per core that the process may use.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub threads: Option<usize>,
}

/// How a model is run: `--precision` and `--threads`.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// Precision of the matrix products; by default the one the model was trained with, f32 for logits.
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionArg>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
}

/// `--precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// Everything in f32.
    F32,
    /// Products of bf16 operands, accumulated in f32 in the order of AMX: the same bits on every machine.
    Bf16,
    /// Products of bf16 operands, accumulated in the order that this machine does fastest.
    Bf16Native,
    /// Whichever of these trains fastest on this machine (`mixtura doctor` says which, and why).
    Auto,
}

/// `mixtura train`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    mixtura train                                          the quickstart, five minutes on two cores\n  \
    mixtura train configs/shakespeare.toml --set 'data.paths=[\"input.txt\"]'\n  \
    mixtura train --set model.moe.top_k=4 --steps 300 --out runs/k4\n  \
    mixtura train --resume runs/k4                         goes on bit for bit as if never stopped\n  \
    mixtura train --resume runs/k4 --steps 600             makes the run longer, finished or not")]
pub struct TrainArgs {
    /// A run in TOML (see configs/). Unknown keys are errors.
    pub config: Option<PathBuf>,
    /// Overrides one key of the config, for example model.moe.top_k=4; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", allow_hyphen_values = true)]
    pub set: Vec<String>,
    /// The run directory; by default runs/NAME, NAME being the config's.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continues the run in DIR from its newest intact checkpoint; with --steps N, a finished run too.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "out", "set", "seed", "precision"])]
    pub resume: Option<PathBuf>,
    /// Optimizer steps of the whole run (train.steps).
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub steps: Option<u64>,
    /// Saves a checkpoint after step N and stops there, without changing the schedule.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub stop_after: Option<u64>,
    /// Starts even if the run needs more memory than there is.
    #[arg(long)]
    pub force: bool,
    /// Seed of the weights, the data order and the routers' noise (train.seed); at most 2^63 - 1, the largest integer of a config.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Precision of the matrix products (train.precision).
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionArg>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
}

/// How data is read and cut into windows: `--context` and `--text-field`.
#[derive(Debug, Clone, Default, Args)]
pub struct DataArgs {
    /// Tokens that a window sees at most; by default the rows the run was trained on, else the model's context.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// The field of JSON lines that holds the text; by default the run's, else "text".
    #[arg(long, value_name = "NAME")]
    pub text_field: Option<String>,
}

/// `mixtura eval`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mixtura eval runs/quickstart\n  mixtura eval runs/tiny/final --data other.txt --json\n  \
        mixtura eval model/ --data other.jsonl --text-field body --context 256 --stride 128"
)]
pub struct EvalArgs {
    /// A run, a checkpoint or a model directory.
    pub model: PathBuf,
    /// A file to score, all of it: text, JSON lines (.jsonl, .ndjson, .json) or a token shard (.tokens); by default the validation
    /// split of the data the model was trained on, cut and limited as in training.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub windows: DataArgs,
    /// Tokens from one window to the next; by default the context. Every token counts once, so less makes windows overlap, and each
    /// token is predicted from more text before it.
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// Questions to answer per split and depth, on propositions.
    #[arg(long, value_name = "N", default_value_t = 200, allow_negative_numbers = true)]
    pub questions: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compute: ComputeArgs,
}

/// `mixtura generate`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    mixtura generate runs/quickstart --prompt 'Is the following proposition true: \"Mars has exactly two natural satellites.\"'\n  \
    mixtura generate runs/shakespeare --prompt 'ROMEO:' --max-tokens 300 --temperature 0.8 --top-p 0.95 --seed 7\n  \
    mixtura generate runs/quickstart --prompt-file - < question.txt\n  \
    mixtura generate runs/quickstart --prompts questions.txt --json       one text per line, all at once\n  \
    mixtura generate runs/quickstart --prompt 'Earth' --max-tokens 5 --routing")]
#[command(group = clap::ArgGroup::new("start").required(true))]
pub struct GenerateArgs {
    /// A run, a checkpoint or a model directory.
    pub model: PathBuf,
    /// The text to continue; several are continued together.
    #[arg(long, value_name = "TEXT", group = "start", allow_hyphen_values = true)]
    pub prompt: Vec<String>,
    /// A file with a text to continue on each line: the line, or in .jsonl a string or the field "prompt" of an object; - reads stdin.
    #[arg(long, value_name = "FILE", group = "start")]
    pub prompts: Option<PathBuf>,
    /// A file with the text to continue, every byte of it; - reads it from stdin.
    #[arg(long, value_name = "FILE", group = "start")]
    pub prompt_file: Option<PathBuf>,
    /// Token ids to continue, separated by commas, just as they are.
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', group = "start", allow_negative_numbers = true)]
    pub ids: Option<Vec<u32>>,
    /// Takes special tokens that the text spells out, such as <|im_start|>, for these tokens instead of for text.
    #[arg(long, conflicts_with = "ids")]
    pub special: bool,
    /// Tokens to add at most; the model may end sooner, and its context may.
    #[arg(long, value_name = "N", default_value_t = 200, allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// Also the experts and weights of every token, in every MoE layer.
    #[arg(long)]
    pub routing: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compute: ComputeArgs,
}

/// `mixtura chat`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    mixtura chat model/ --temperature 0.7 --top-p 0.95\n  \
    echo 'What is a mixture of experts?' | mixtura chat model/ --system 'Answer in one sentence.' --json")]
pub struct ChatArgs {
    /// A model directory with a chat template, or a run or a checkpoint with --template.
    pub model: PathBuf,
    /// What the model is told first.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// A Jinja template to use instead of the model's own.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 1024, allow_negative_numbers = true)]
    pub max_tokens: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compute: ComputeArgs,
}

/// How tokens are chosen, and where a text stops.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// 0 takes the likeliest token each time; 1 draws from the model's own distribution.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Draws from the K likeliest tokens; 0 from all.
    #[arg(long, value_name = "K", default_value_t = 0, allow_negative_numbers = true)]
    pub top_k: usize,
    /// Draws from the smallest set of tokens whose probabilities reach P.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f64,
    /// Leaves out tokens less likely than this share of the likeliest one's probability.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f64,
    /// Makes tokens that occurred less likely where above 1, more likely where below.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f64,
    /// Seed of the draws; the same prompt, options and seed give the same text, whatever else is generated.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,
    /// Ends the text in front of this; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// With --json: the log probability of every new token, and those of the N likeliest at its place.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub log_probabilities: Option<usize>,
}

/// `mixtura tokenize`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    mixtura tokenize books/*.txt --tokenizer olmoe/tokenizer.json --out corpus.tokens\n  \
    mixtura tokenize pages.jsonl --text-field content --tokenizer byte --out pages.tokens --json\n\n\
    Train on it with kind = \"shards\", paths = [\"corpus.tokens\"] and the same tokenizer under [data].")]
pub struct TokenizeArgs {
    /// Text files (a document each) and JSON lines (.jsonl, .ndjson, .json; a document per line).
    #[arg(required = true, value_name = "FILES")]
    pub files: Vec<PathBuf>,
    /// byte, propositions, a tokenizer.json, or a run or model directory that holds one.
    #[arg(long, value_name = "T")]
    pub tokenizer: String,
    /// The shard to write; it appears once it is complete.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The field of JSON lines that holds the text (data.text_field).
    #[arg(long, value_name = "NAME", default_value = "text", allow_hyphen_values = true)]
    pub text_field: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
}

/// `mixtura logits`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mixtura logits runs/quickstart --ids 1,2,3 --routing --json\n  mixtura logits model/ --text 'Earth has'"
)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub struct LogitsArgs {
    /// A run, a checkpoint or a model directory.
    pub model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', group = "input", allow_negative_numbers = true)]
    pub ids: Option<Vec<u32>>,
    /// A text for the model's tokenizer; of several, the document is a list.
    #[arg(long, value_name = "TEXT", group = "input", allow_hyphen_values = true)]
    pub text: Vec<String>,
    /// A file with a text on each line: the line, or in .jsonl a string or the field "prompt" of an object; - reads stdin.
    #[arg(long, value_name = "FILE", group = "input")]
    pub texts: Option<PathBuf>,
    /// A file with such a text, every byte of it; - reads it from stdin.
    #[arg(long, value_name = "FILE", group = "input")]
    pub text_file: Option<PathBuf>,
    /// Takes special tokens that the text spells out, such as <|im_start|>, for these tokens instead of for text.
    #[arg(long, conflicts_with = "ids")]
    pub special: bool,
    /// Also experts, weights and scores of every MoE layer.
    #[arg(long)]
    pub routing: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compute: ComputeArgs,
}

/// `mixtura inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  mixtura inspect runs/quickstart\n  \
        mixtura inspect runs/quickstart --data                  on what the run held back\n  \
        mixtura inspect runs/quickstart --data questions.txt")]
pub struct InspectArgs {
    /// A run, a checkpoint or a model directory.
    pub model: PathBuf,
    /// Routes a text file, or without FILE what the model's run held back: the load of every expert, the tokens it takes most,
    /// and for a model of propositions how much its experts tell of form and of content.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub data: Option<Option<PathBuf>>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub windows: DataArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
}

/// `mixtura route`.
#[derive(Debug, Args)]
pub struct RouteArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: RouteCommand,
}

/// `mixtura route ...`.
#[derive(Debug, Subcommand)]
pub enum RouteCommand {
    /// Recompute every case of a golden-vector file and compare.
    #[command(
        after_help = "Examples:\n  mixtura route check golden.json\n  mixtura route check golden.json --case E14.olmoe --json"
    )]
    Check {
        /// A file of golden vectors.
        file: PathBuf,
        /// Only this case.
        #[arg(long, value_name = "ID")]
        case: Option<String>,
    },
    /// Say what a policy does, its rules and its source.
    #[command(after_help = "Examples:\n  mixtura route explain --policy top_k\n  mixtura route explain")]
    Explain {
        /// The policy's name; without it, the list of them.
        #[arg(long, value_name = "NAME")]
        policy: Option<String>,
    },
    /// What each library's balance loss is worth on the same routing, and which coefficients are equal.
    #[command(after_help = "Examples:\n  mixtura route losses --experts 64 --top-k 8 --layers 16\n  \
        mixtura route losses --experts 8 --top-k 2 --layers 32 --from hf --to megatron --coef 0.01")]
    Losses(LossesArgs),
}

/// `mixtura route losses`.
#[derive(Debug, Args)]
pub struct LossesArgs {
    /// Experts of a layer.
    #[arg(long, value_name = "E", default_value_t = 8, allow_negative_numbers = true)]
    pub experts: usize,
    /// Experts that a token visits.
    #[arg(long, value_name = "K", default_value_t = 2, allow_negative_numbers = true)]
    pub top_k: usize,
    /// MoE layers of the model.
    #[arg(long, value_name = "L", default_value_t = 2, allow_negative_numbers = true)]
    pub layers: usize,
    /// The library a coefficient comes from; the table names them.
    #[arg(long, value_name = "LIBRARY", requires_all = ["to", "coef"])]
    pub from: Option<String>,
    /// The library it goes to.
    #[arg(long, value_name = "LIBRARY", requires_all = ["from", "coef"])]
    pub to: Option<String>,
    /// The coefficient in the library it comes from.
    #[arg(long, value_name = "C", requires_all = ["from", "to"], allow_negative_numbers = true)]
    pub coef: Option<f64>,
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchTarget {
    /// Dense matrix products.
    Gemm,
    /// An MoE layer, forward and backward.
    Layer,
    /// A whole training step.
    Train,
    /// One token at a time, of one sequence and of eight.
    Decode,
    /// A prompt of 512 tokens.
    Prefill,
    /// An MoE layer over a range of token counts, then over a range of expert counts at equal work; only on request.
    Scaling,
    /// Everything but `scaling`.
    All,
}

/// `mixtura bench`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mixtura bench\n  mixtura bench layer --precision bf16 --json\n  mixtura bench decode --model model/ --precision f32"
)]
pub struct BenchArgs {
    /// What to measure; the ceilings always come first.
    #[arg(value_enum, default_value = "all")]
    pub target: BenchTarget,
    /// Only this precision; by default all of them.
    #[arg(long, value_enum)]
    pub precision: Option<PrecisionArg>,
    /// For decode and prefill: a model directory to measure instead of random weights.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Every way of computing the bf16 precisions that this machine has, not only the one it chose.
    #[arg(long)]
    pub every_way: bool,
    /// Seconds per row, at least; the median of the repetitions is printed.
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_negative_numbers = true)]
    pub seconds: f64,
    /// Divides every size, to see that the command runs where its figures do not matter.
    #[arg(long, value_name = "N", default_value_t = std::num::NonZeroU16::MIN, hide = true)]
    pub shrink: std::num::NonZeroU16,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
}

/// `mixtura completions`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  mixtura completions bash > ~/.local/share/bash-completion/completions/mixtura")]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}
