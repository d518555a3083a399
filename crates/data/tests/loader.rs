//! Batches: the same with and without prefetch, resumed at the exact batch, mixed as specified, and errors that name the file.

use std::path::{Path, PathBuf};

use mixtura_data::corpus::{ScoredWindows, ShardWriter, TokenRun, WindowSource};
use mixtura_data::propositions::Counted;
use mixtura_data::{
    Batch, DataConfig, DataError, DataKind, IGNORED, Mixing, RowSource, Scheduler, SourceConfig, Tokenizer,
    TokenizerChoice, open,
};
use proptest::prelude::*;

fn text_of(words: usize, salt: usize) -> String {
    (0..words).map(|i| format!("word{} ", (i * 7919 + salt * 31) % 97)).collect::<String>() + "\n"
}

/// Three files of different lengths in a folder of their own.
fn files() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|i| folder.path().join(format!("part{i}.txt"))).collect();
    for (i, path) in paths.iter().enumerate() {
        std::fs::write(path, text_of(400 * (i + 1), i)).unwrap();
    }
    (folder, paths)
}

fn text_config(paths: Vec<PathBuf>) -> DataConfig {
    DataConfig { kind: DataKind::Text, paths, context: 32, batch: 4, seed: 3, prefetch: 0, ..DataConfig::default() }
}

fn first_batches(config: &DataConfig, count: usize) -> Vec<Batch> {
    let mut loader = open(config).unwrap().train;
    (0..count).map(|_| loader.next_batch()).collect()
}

#[test]
fn prefetch_changes_nothing() {
    let (_folder, paths) = files();
    for config in [text_config(paths), DataConfig { batch: 3, context: 160, ..DataConfig::default() }] {
        let plain = first_batches(&DataConfig { prefetch: 0, ..config.clone() }, 20);
        for prefetch in [1, 4] {
            assert_eq!(first_batches(&DataConfig { prefetch, ..config.clone() }, 20), plain);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_resumed_loader_continues_exactly(
        before in 0..60usize, mixing in 0..3usize, prefetch in 0..3usize, seed: u64, generated: bool
    ) {
        let (_folder, paths) = files();
        let mixing = [Mixing::Dispersed, Mixing::Grouped, Mixing::Random][mixing];
        let config = match generated {
            true => DataConfig { batch: 2, context: 160, prefetch, seed, ..DataConfig::default() },
            false => DataConfig { mixing, prefetch, seed, ..text_config(paths) },
        };
        let mut whole = open(&config).unwrap().train;
        for _ in 0..before {
            whole.next_batch();
        }
        // Through text, as a checkpoint keeps it.
        let saved = serde_json::to_string(&whole.state()).unwrap();
        let mut resumed = open(&config).unwrap().train;
        resumed.next_batch();
        resumed.restore(&serde_json::from_str(&saved).unwrap()).unwrap();
        for _ in 0..8 {
            prop_assert_eq!(whole.next_batch(), resumed.next_batch());
            prop_assert_eq!(whole.state(), resumed.state());
        }
    }

    #[test]
    fn an_epoch_visits_every_window_once(tokens in 40..900usize, context in 2..20usize, bos: bool, seed: u64) {
        let run = TokenRun::from_ids((0..tokens as u32).collect());
        let rows = WindowSource::shuffled(run, context, bos.then_some(9999), seed).unwrap();
        let epoch = rows.rows_per_epoch().unwrap();
        for first in [0, epoch, 7 * epoch] {
            let mut predicted = Vec::new();
            for row in first..first + epoch {
                let (mut ids, mut targets) = (vec![0; context], vec![IGNORED; context]);
                rows.fill(row, &mut ids, &mut targets);
                prop_assert!(ids[1..] == targets[..context - 1]);
                let first = if bos { 9999 } else { targets[0].wrapping_sub(1) };
                prop_assert_eq!(ids[0], first);
                predicted.extend(targets);
            }
            predicted.sort_unstable();
            predicted.dedup();
            prop_assert_eq!(predicted.len() as u64, epoch * context as u64);
            prop_assert_eq!(predicted[predicted.len() - 1] - predicted[0] + 1, predicted.len() as u32);
        }
    }

    #[test]
    fn every_token_is_predicted_once_from_what_stands_before_it(
        tokens in 0..90usize, context in 2..20usize, part in 0.0..1.0f64, bos: bool
    ) {
        let stride = 1 + (part * context as f64) as usize;
        let run: Vec<u32> = (0..tokens as u32).collect();
        let windows = ScoredWindows::new(TokenRun::from_ids(run), context, stride, bos.then_some(9999));
        let predictable = if bos { tokens } else { tokens.saturating_sub(1) };
        prop_assert_eq!(windows.is_some(), predictable > 0);
        let Some(windows) = windows else { return Ok(()) };
        let (mut counted, mut reached) = (Vec::new(), 0);
        let lengths = std::iter::repeat_n(windows.positions(), windows.whole()).chain(windows.tail());
        for (window, length) in lengths.enumerate() {
            prop_assert!(length <= context && length > 0);
            let (mut ids, mut targets) = (vec![7777; length], vec![7777; length]);
            windows.fill(window, &mut ids, &mut targets);
            let first = window * stride;
            prop_assert_eq!(ids[0], if bos { 9999 } else { first as u32 });
            for t in 0..length {
                let predicted = (first + t + usize::from(!bos)) as u32;
                prop_assert!(t == 0 || ids[t] == predicted - 1);
                prop_assert!(targets[t] == predicted || targets[t] == IGNORED);
                // Only what the windows before have counted is context.
                prop_assert_eq!(targets[t] == IGNORED, first + t < reached);
            }
            reached = first + length;
            counted.extend(targets.into_iter().filter(|target| *target != IGNORED));
        }
        prop_assert_eq!(counted, (u32::from(!bos)..tokens as u32).collect::<Vec<_>>());
    }

    #[test]
    fn overlapping_windows_are_those_of_the_sliding_loop_of_transformers_users(
        tokens in 2..90usize, context in 2..20usize, part in 0.0..1.0f64
    ) {
        let stride = 1 + (part * (context - 1) as f64) as usize;
        // for begin in range(0, n, stride): end = min(begin + context, n); the last end - previous_end tokens count.
        let (mut expected, mut previous_end) = (Vec::new(), 0);
        for begin in (0..tokens).step_by(stride) {
            let end = (begin + context).min(tokens);
            let counted = end - previous_end;
            // Of what is counted, the first token of the window has nothing before it.
            expected.push((begin, end, counted.min(end - begin - 1)));
            previous_end = end;
            if end == tokens {
                break;
            }
        }
        let run: Vec<u32> = (0..tokens as u32).collect();
        let windows = ScoredWindows::new(TokenRun::from_ids(run), context, stride, None).unwrap();
        let lengths = std::iter::repeat_n(windows.positions(), windows.whole()).chain(windows.tail());
        let ours: Vec<(usize, usize, usize)> = lengths
            .enumerate()
            .map(|(window, length)| {
                let (mut ids, mut targets) = (vec![0; length], vec![0; length]);
                windows.fill(window, &mut ids, &mut targets);
                let counted = targets.iter().filter(|target| **target != IGNORED).count();
                (ids[0] as usize, targets.len() + ids[0] as usize + 1, counted)
            })
            .collect();
        prop_assert_eq!(ours, expected);
    }

    #[test]
    fn no_source_is_a_row_ahead_of_its_share(shares in prop::collection::vec(1..50u64, 1..6), batch in 1..9usize) {
        let mut scheduler = Scheduler::new(Mixing::Dispersed, 0, &shares);
        let total: u64 = shares.iter().sum();
        for number in 1..40u64 {
            let made = scheduler.next_batch(batch);
            let drawn = number * batch as u64;
            for (source, share) in shares.iter().enumerate() {
                let expected = *share as f64 * drawn as f64 / total as f64;
                prop_assert!((scheduler.drawn()[source] as f64 - expected).abs() < 1.0);
                let here = made.iter().filter(|s| **s == source).count() as u64;
                prop_assert!(here <= (batch as u64 * share).div_ceil(total) + 1);
            }
        }
    }
}

#[test]
fn the_dispersing_scheduler_gives_the_published_batches() {
    let mut scheduler = Scheduler::new(Mixing::Dispersed, 0, &[6, 3, 2, 1]);
    let batches: Vec<Vec<usize>> = (0..3).map(|_| scheduler.next_batch(4)).collect();
    assert_eq!(batches, [vec![0, 1, 2, 0], vec![0, 1, 3, 0], vec![0, 2, 1, 0]]);
}

#[test]
fn grouped_batches_hold_one_source_and_shares_are_kept() {
    let (_folder, paths) = files();
    let sources = paths.into_iter().zip([2, 1, 1]).map(|(path, share)| SourceConfig { path, share: Some(share) });
    let config = DataConfig { sources: sources.collect(), mixing: Mixing::Grouped, ..text_config(vec![]) };
    let mut seen = [0; 3];
    for batch in first_batches(&config, 40) {
        assert!(batch.sources.iter().all(|source| *source == batch.sources[0]));
        seen[batch.sources[0] as usize] += 1;
    }
    assert_eq!(seen, [20, 10, 10]);
}

#[test]
fn a_state_of_other_data_is_refused_and_every_difference_named() {
    let (_folder, paths) = files();
    let config = text_config(paths);
    let state = open(&config).unwrap().train.state();
    let missing = config.paths[..2].to_vec();
    for (other, words) in [
        (DataConfig { seed: 4, ..config.clone() }, &["data.seed was 3", "is 4 now"][..]),
        (DataConfig { batch: 5, ..config.clone() }, &["data.batch was 4", "is 5 now"]),
        (DataConfig { context: 31, seed: 4, ..config.clone() }, &["data.context was 32", "is 31 now", "data.seed"]),
        (DataConfig { mixing: Mixing::Random, ..config.clone() }, &["data.mixing was dispersed", "is random now"]),
        (DataConfig { validation_fraction: 0.5, ..config.clone() }, &["data.validation_fraction was 0.05"]),
        (DataConfig { tokenizer: Some(TokenizerChoice::Propositions), ..config.clone() }, &["data.tokenizer"]),
        (DataConfig { paths: missing, ..config.clone() }, &["data.paths[2]", "is not there now"]),
    ] {
        let error = open(&other).unwrap().train.restore(&state).unwrap_err();
        assert!(matches!(error, DataError::State { .. }), "{error}");
        words.iter().for_each(|word| assert!(error.to_string().contains(word), "{word:?} in: {error}"));
    }
    // What changes no row is free, and so is the place of a file.
    let folder = tempfile::tempdir().unwrap();
    let moved = |path: &PathBuf| {
        let to = folder.path().join(path.file_name().unwrap());
        std::fs::copy(path, &to).unwrap();
        to
    };
    let paths = config.paths.iter().map(moved).collect();
    let free = DataConfig { paths, prefetch: 3, validation_batches: 1, ..config.clone() };
    open(&free).unwrap().train.restore(&state).unwrap();
    // Content counts, not length.
    let text = std::fs::read_to_string(&free.paths[1]).unwrap();
    std::fs::write(&free.paths[1], text.replacen("word", "drow", 1)).unwrap();
    let error = open(&free).unwrap().train.restore(&state).unwrap_err().to_string();
    assert!(error.contains("data.paths[1]") && error.contains("blake3"), "{error}");
    let mut impossible = state.clone();
    impossible.batches = 3;
    assert!(open(&config).unwrap().train.restore(&impossible).is_err());
    impossible.drawn = vec![u64::MAX, u64::MAX, 2];
    assert!(open(&config).unwrap().train.restore(&impossible).is_err());
}

#[test]
fn validation_is_held_back_and_always_the_same() {
    let (_folder, paths) = files();
    let config = DataConfig { validation_fraction: 0.25, validation_batches: 0, ..text_config(paths) };
    let data = open(&config).unwrap();
    let passes: Vec<Vec<Batch>> = (0..2).map(|_| data.validation.batches().collect()).collect();
    assert_eq!(passes[0], passes[1]);
    let rows: usize = passes[0].iter().map(|b| b.batch).sum();
    assert_eq!(rows as u64, data.validation.rows());
    let held: u64 = passes[0].iter().map(|b| b.counted() as u64).sum();
    let total = held + data.train_tokens.unwrap();
    assert!((held as f64 / total as f64 - 0.25).abs() < 0.03, "{held} of {total}");
    // All of it counts: bytes are tokens, and an eos follows each of the three parts.
    let bytes: u64 = config.paths.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    assert_eq!(total, bytes + 6);
    // Whole rows come first, in batches of data.batch: what a limit of batches cuts off are the ends.
    let shapes: Vec<(usize, usize)> = passes[0].iter().map(|b| (b.batch, b.seq)).collect();
    let tails = shapes.iter().position(|(_, seq)| *seq < 32).unwrap();
    assert!(shapes[..tails - 1].iter().all(|shape| *shape == (4, 32)), "{shapes:?}");
    assert!(shapes[tails..].len() == 3 && shapes[tails..].iter().all(|(rows, seq)| *rows == 1 && *seq < 32));
    let limited = DataConfig { validation_batches: 3, ..config };
    assert_eq!(open(&limited).unwrap().validation.batches().collect::<Vec<_>>(), passes[0][..3]);
}

#[test]
fn json_lines_and_shards_give_the_same_tokens_as_text() {
    let folder = tempfile::tempdir().unwrap();
    let (text, lines, shard) =
        (folder.path().join("a.txt"), folder.path().join("a.jsonl"), folder.path().join("a.tokens"));
    let document = text_of(600, 5);
    std::fs::write(&text, &document).unwrap();
    std::fs::write(&lines, serde_json::json!({"id": 1, "body": document}).to_string() + "\n").unwrap();
    let mut writer = ShardWriter::create(&shard, 259).unwrap();
    writer.push(&Tokenizer::byte().encode(&document).unwrap()).unwrap();
    writer.push(&[Tokenizer::byte().eos().unwrap()]).unwrap();
    writer.finish().unwrap();

    let config = DataConfig { validation_fraction: 0.0, ..text_config(vec![text]) };
    let lines = DataConfig { kind: DataKind::Jsonl, paths: vec![lines], text_field: "body".into(), ..config.clone() };
    let tokenizer = Some(TokenizerChoice::Byte);
    let shard = DataConfig { kind: DataKind::Shards, paths: vec![shard], tokenizer, ..config.clone() };
    let batches = first_batches(&config, 12);
    assert_eq!(first_batches(&lines, 12), batches);
    assert_eq!(first_batches(&shard, 12), batches);
}

#[test]
fn json_lines_are_split_by_document() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many.jsonl");
    let line = |i: usize| serde_json::json!({"text": format!("document {i} {}", text_of(20, i))}).to_string();
    let mut lines: Vec<String> = (0..200).map(line).collect();
    let config = DataConfig { kind: DataKind::Jsonl, validation_fraction: 0.2, ..text_config(vec![path.clone()]) };
    let mut tokens = Vec::new();
    for _ in 0..2 {
        std::fs::write(&path, lines.join("\n")).unwrap();
        tokens.push(open(&config).unwrap().train_tokens);
        lines.reverse();
    }
    assert_eq!(tokens[0], tokens[1], "the split does not depend on the order of the documents");
}

#[test]
fn rows_of_propositions_count_the_answer_and_its_end_only() {
    let config = DataConfig { batch: 4, context: 200, prefetch: 0, ..DataConfig::default() };
    for (loss_on, all) in [(Counted::Answer, false), (Counted::All, true)] {
        let mut data = open(&DataConfig { loss_on, ..config.clone() }).unwrap();
        let batch = data.train.next_batch();
        let (bos, eos, pad) = (data.tokenizer.bos(), data.tokenizer.eos(), data.tokenizer.pad());
        assert_eq!(batch.ids[0], bos.unwrap());
        for (row_ids, row_targets) in batch.ids.chunks(batch.seq).zip(batch.targets.chunks(batch.seq)) {
            let mut in_answer = false;
            for t in 0..batch.seq {
                let (id, target) = (row_ids[t], row_targets[t]);
                let next = row_ids.get(t + 1).copied();
                if target != IGNORED {
                    assert!(next.is_none_or(|next| next == target));
                    assert!(Some(target) != bos && Some(id) != pad && Some(id) != eos);
                }
                let text = data.tokenizer.decode(&[id]);
                in_answer = (in_answer || text == "\n" || text == ".\"") && Some(id) != eos;
                let counts = Some(id) != eos && Some(id) != pad && (all || in_answer);
                assert_eq!(target != IGNORED, counts, "{loss_on:?} position {t}: {text:?}");
            }
        }
    }
}

#[test]
fn packed_rows_are_nearly_full() {
    let mut data = open(&DataConfig { batch: 32, context: 256, prefetch: 0, ..DataConfig::default() }).unwrap();
    let batch = data.train.next_batch();
    let padding = batch.ids.iter().filter(|id| Some(**id) == data.tokenizer.pad()).count();
    let share = padding as f64 / batch.ids.len() as f64;
    println!(
        "padding {:.1} %, counted {:.1} %",
        100.0 * share,
        100.0 * batch.counted() as f64 / batch.ids.len() as f64
    );
    assert!(share < 0.12, "{share}");
}

fn check_refused(config: DataConfig, words: &[&str]) {
    let error = open(&config).map(|_| ()).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} should name {word:?}");
    }
    assert!(!error.contains('\n'), "one paragraph: {error}");
}

#[test]
fn files_that_cannot_be_used_are_refused_by_name_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let text = |path: &Path| text_config(vec![path.into()]);
    let jsonl = |path: &Path| DataConfig { kind: DataKind::Jsonl, ..text(path) };
    let tokenizer = Some(TokenizerChoice::Byte);
    let shard = |path: &Path| DataConfig { kind: DataKind::Shards, tokenizer: tokenizer.clone(), ..text(path) };

    check_refused(text(&folder.path().join("nowhere.txt")), &["nowhere.txt", "does not exist"]);
    check_refused(text(folder.path()), &["cannot read"]);
    check_refused(text(&file("empty.txt", b"")), &["empty.txt", "0 bytes"]);
    check_refused(text(&file("blank.txt", b" \n\n")), &["blank.txt", "white space"]);
    check_refused(text(&file("binary.txt", b"\x7fXLF\x00\x01")), &["binary.txt", "NUL", "byte 4"]);
    check_refused(text(&file("program.txt", b"\x7fELF\x00\x01")), &["program.txt", "an executable"]);
    check_refused(text(&file("a.txt.gz", b"\x1f\x8b\x08\x00")), &["a.txt.gz", "gzip", "gunzip"]);
    check_refused(jsonl(&file("utf16.jsonl", b"\xff\xfe{\x00}\x00")), &["utf16.jsonl", "UTF-16", "iconv"]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    check_refused(text(&file("lfs.txt", pointer)), &["lfs.txt", "Git LFS pointer", "git lfs pull"]);
    check_refused(shard(&file("lfs.tokens", pointer)), &["lfs.tokens", "Git LFS pointer", "git lfs pull"]);
    check_refused(jsonl(&file("shard.jsonl", b"MIXTOKEN\x01\x00\x00\x00")), &["shard.jsonl", "a token shard"]);
    check_refused(text(&file("latin.txt", b"caf\xe9 noir")), &["latin.txt", "0xe9", "byte 3"]);
    check_refused(text(&file("short.txt", b"hello")), &["short.txt", "5 tokens", "context 32"]);
    check_refused(jsonl(&file("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": 3}")), &["a.jsonl", "line 2", "a number"]);
    check_refused(jsonl(&file("b.jsonl", b"{\"text\": \"x\"}\n{oops")), &["b.jsonl", "line 2", "not JSON"]);
    check_refused(jsonl(&file("c.jsonl", b"{\"body\": \"x\"}")), &["c.jsonl", "\"body\"", "text_field"]);
    check_refused(jsonl(&file("d.jsonl", b"{\"text\": \"\"}")), &["d.jsonl", "non-empty"]);
    check_refused(jsonl(&file("e.jsonl", b"[1]")), &["e.jsonl", "element 1", "a number"]);
    check_refused(shard(&file("a.tokens", b"")), &["a.tokens", "empty"]);
    check_refused(shard(&file("b.tokens", b"MIXTOKEN")), &["b.tokens", "too few"]);
    check_refused(shard(&file("c.tokens", &[b'x'; 80])), &["c.tokens", "MIXTOKEN"]);

    let good = folder.path().join("good.tokens");
    let mut writer = ShardWriter::create(&good, 259).unwrap();
    assert!(writer.push(&[259]).is_err());
    writer.push(&[7; 2000]).unwrap();
    writer.finish().unwrap();
    open(&shard(&good)).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    check_refused(shard(&file("cut.tokens", &bytes[..bytes.len() - 2])), &["cut.tokens", "promises 2000 tokens"]);
    let mut damaged = bytes.clone();
    damaged[64..66].copy_from_slice(&[0xff, 0xff]);
    check_refused(shard(&file("damaged.tokens", &damaged)), &["damaged.tokens", "65535", "position 0"]);
    let mut flipped = bytes;
    flipped[70] ^= 1;
    let path = file("flipped.tokens", &flipped);
    let error = mixtura_data::corpus::ShardReader::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(error.contains("flipped.tokens") && error.contains("damaged"), "{error}");
    let large = folder.path().join("large.tokens");
    let mut writer = ShardWriter::create(&large, 70_000).unwrap();
    writer.push(&[69_999; 64]).unwrap();
    writer.finish().unwrap();
    check_refused(shard(&large), &["large.tokens", "70000", "259"]);
}

#[test]
fn impossible_configurations_are_refused_by_key() {
    let (_folder, paths) = files();
    let good = text_config(paths);
    check_refused(DataConfig { context: 1, ..good.clone() }, &["data.context = 1"]);
    check_refused(DataConfig { batch: 0, ..good.clone() }, &["data.batch = 0"]);
    check_refused(DataConfig { context: usize::MAX, ..good.clone() }, &["data.context", "2^24"]);
    check_refused(DataConfig { validation_batches: usize::MAX, ..good.clone() }, &["data.validation_batches", "2^24"]);
    check_refused(DataConfig { bpe_vocab: usize::MAX, ..good.clone() }, &["data.bpe_vocab", "2^24"]);
    check_refused(DataConfig { validation_fraction: 1.5, ..good.clone() }, &["data.validation_fraction = 1.5"]);
    check_refused(DataConfig { validation_fraction: f64::NAN, ..good.clone() }, &["data.validation_fraction"]);
    check_refused(DataConfig { paths: vec![], ..good.clone() }, &["data.paths"]);
    check_refused(DataConfig { kind: DataKind::Propositions, ..good.clone() }, &["data.paths", "generated"]);
    check_refused(DataConfig { kind: DataKind::Shards, ..good.clone() }, &["data.tokenizer"]);
    let generated = DataConfig::default();
    check_refused(DataConfig { context: 20, ..generated.clone() }, &["data.context = 20", "at least"]);
    let mut depths = generated.clone();
    depths.propositions.depths = vec![1, 4];
    check_refused(depths, &["data.propositions.depths = [1, 4]"]);
    let mut modalities = generated;
    modalities.propositions.modalities = vec![];
    check_refused(modalities, &["data.propositions.modalities"]);
}

#[test]
fn a_config_survives_toml_and_unknown_keys_are_refused() {
    let config = DataConfig {
        kind: DataKind::Text,
        paths: vec!["a.txt".into()],
        sources: vec![SourceConfig { path: "b.txt".into(), share: Some(3) }],
        tokenizer: Some(TokenizerChoice::File("t/tokenizer.json".into())),
        ..DataConfig::default()
    };
    let text = toml::to_string(&config).unwrap();
    assert_eq!(toml::from_str::<DataConfig>(&text).unwrap(), config);
    for wrong in
        ["contxt = 3", "[propositions]\ndepth = [1]", "kind = \"txt\"", "sources = [{path = \"a\", weight = 1}]"]
    {
        assert!(toml::from_str::<DataConfig>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn few_documents_and_short_files_are_trained_on_and_something_is_held_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("few.jsonl");
    let config = |paths: Vec<PathBuf>| DataConfig { kind: DataKind::Jsonl, ..text_config(paths) };
    for count in [2, 8, 20, 50] {
        for salt in 0..10 {
            let line = |i: usize| serde_json::json!({"text": format!("{i} of {salt} {}", text_of(20, i))}).to_string();
            std::fs::write(&path, (0..count).map(line).collect::<Vec<_>>().join("\n")).unwrap();
            let data = open(&config(vec![path.clone()])).unwrap_or_else(|e| panic!("{count} documents, {salt}: {e}"));
            let held: usize = data.validation.batches().map(|batch| batch.counted()).sum();
            assert!(held > 0, "{count} documents, {salt}");
        }
    }
    let single = folder.path().join("single.jsonl");
    std::fs::write(&single, serde_json::json!({"text": text_of(90, 1)}).to_string()).unwrap();
    check_refused(config(vec![single.clone()]), &["1 in all", "validation_fraction = 0"]);
    open(&DataConfig { validation_fraction: 0.0, ..config(vec![single.clone()]) }).unwrap();
    assert!(open(&config(vec![single, path])).is_ok(), "a file of one document beside others is trained on whole");

    // One short file among others is a row with padding; the others' rows are what they would be without it.
    let (_folder, mut paths) = files();
    let before = first_batches(&DataConfig { mixing: Mixing::Grouped, ..text_config(paths.clone()) }, 4);
    for (name, text) in [("short.txt", "a few words"), ("one.txt", "x")] {
        let short = folder.path().join(name);
        std::fs::write(&short, text).unwrap();
        paths.push(short);
    }
    let config = text_config(paths.clone());
    let batches = first_batches(&config, 400);
    let rows = |source: u32| {
        let rows = batches.iter().flat_map(|b| b.sources.iter().zip(b.ids.chunks(b.seq).zip(b.targets.chunks(b.seq))));
        rows.filter(move |(from, _)| **from == source).map(|(_, row)| row)
    };
    let (ids, targets) = rows(3).next().expect("the short file is drawn");
    let tokenizer = Tokenizer::byte();
    // Of its eleven bytes ten are trained on, and the eos.
    assert_eq!(tokenizer.decode(&ids[1..11]), "a few word");
    assert_eq!((targets[10], targets[11], ids[12]), (tokenizer.eos().unwrap(), IGNORED, tokenizer.pad().unwrap()));
    assert_eq!(rows(4).next().map(|(_, targets)| targets[0]), Some(u32::from(b'x')));
    let first = |source: u32, batches: &[Batch]| -> Vec<u32> {
        let of = batches.iter().flat_map(|b| b.sources.iter().zip(b.ids.chunks(b.seq)));
        of.filter(|(from, _)| **from == source).flat_map(|(_, ids)| ids.to_vec()).take(64).collect()
    };
    assert_eq!(first(before[0].sources[0], &batches), first(before[0].sources[0], &before));
    // Only short files: no row is ever whole, and a smaller context is what helps.
    check_refused(text_config(paths[3..].to_vec()), &["short.txt", "one.txt", "13 tokens", "smaller data.context"]);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = |bytes: &[u8]| {
        let path = folder.path().join("a.txt");
        std::fs::write(&path, bytes).unwrap();
        first_batches(&text_config(vec![path]), 3)
    };
    let text = text_of(200, 1);
    assert_eq!(tokens(text.as_bytes()), tokens(format!("\u{feff}{text}").as_bytes()));
}
