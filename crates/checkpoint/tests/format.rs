//! Every way a safetensors file, an index or a manifest can be wrong gives its own error, with the tensor's name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mixtura_checkpoint::*;
use proptest::prelude::*;

/// A file with this JSON as its header and `data` zero bytes behind it.
fn file_of(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn entry(name: &str, dtype: &str, shape: &str, begin: usize, end: usize) -> String {
    format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}")
}

fn refused(json: &str, data: usize) -> HeaderError {
    parse_header(&file_of(json, data)).expect_err(json)
}

#[test]
fn a_well_formed_header_is_read() {
    let json = format!("{{{},{}}}", entry("a", "F32", "[2]", 0, 8), entry("b", "BF16", "[]", 8, 10));
    let header = parse_header(&file_of(&json, 10)).unwrap();
    assert_eq!(header.tensors.len(), 2);
    assert_eq!((header.tensors[1].begin, header.tensors[1].end), (8 + json.len() + 8, 8 + json.len() + 10));
}

#[test]
fn an_empty_file_is_too_short() {
    assert_eq!(parse_header(&[]), Err(HeaderError::TooShort { len: 0 }));
}

#[test]
fn an_absurd_header_length_is_refused_before_anything_is_allocated() {
    let error = parse_header(&[0xff; 64]).unwrap_err();
    assert!(matches!(error, HeaderError::TooLarge { declared: u64::MAX, .. }));
}

#[test]
fn a_header_that_is_cut_off_says_so() {
    let bytes = file_of("{}                ", 0);
    assert_eq!(parse_header(&bytes[..12]), Err(HeaderError::TruncatedHeader { declared: 18, available: 4 }));
}

#[test]
fn a_header_that_is_no_text_or_no_json_says_so() {
    let mut bytes = file_of("{}", 0);
    bytes[8] = 0xff;
    assert_eq!(parse_header(&bytes), Err(HeaderError::NotUtf8 { valid_up_to: 0 }));
    assert!(matches!(refused("[1, 2]", 0), HeaderError::NotJson { .. }));
    assert!(matches!(refused("{\"a\":", 0), HeaderError::NotJson { .. }));
}

#[test]
fn a_bad_entry_names_its_tensor() {
    for json in [
        "{\"layer.w\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        "{\"layer.w\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        "{\"layer.w\":{\"dtype\":\"F32\",\"shape\":[1]}}",
        "{\"layer.w\":7}",
    ] {
        assert!(matches!(refused(json, 4), HeaderError::BadEntry { tensor, .. } if tensor == "layer.w"), "{json}");
    }
    assert!(matches!(refused("{\"__metadata__\":{\"a\":1}}", 0), HeaderError::BadMetadata { .. }));
}

#[test]
fn a_tensor_listed_twice_is_refused() {
    let json = format!("{{{0},{0}}}", entry("w", "F32", "[1]", 0, 4));
    assert_eq!(refused(&json, 4), HeaderError::Duplicate { tensor: "w".into() });
}

#[test]
fn overlapping_tensors_name_each_other() {
    let json = format!("{{{},{}}}", entry("a", "F32", "[2]", 0, 8), entry("b", "F32", "[2]", 4, 12));
    assert!(matches!(refused(&json, 12), HeaderError::Overlap { tensor, other, .. } if tensor == "b" && other == "a"));
    let backwards = format!("{{{}}}", entry("a", "F32", "[2]", 8, 0));
    assert!(matches!(refused(&backwards, 8), HeaderError::Gap { .. } | HeaderError::Overlap { .. }));
}

#[test]
fn bytes_that_belong_to_no_tensor_are_refused() {
    let json = format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("b", "F32", "[1]", 8, 12));
    assert_eq!(refused(&json, 12), HeaderError::Gap { tensor: "b".into(), from: 4, to: 8 });
    let json = format!("{{{}}}", entry("a", "F32", "[1]", 0, 4));
    assert_eq!(refused(&json, 6), HeaderError::TrailingBytes { described: 4, available: 6 });
}

#[test]
fn offsets_beyond_the_file_name_the_first_tensor_that_is_not_whole() {
    let json = format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("b", "F32", "[4]", 4, 20));
    assert_eq!(refused(&json, 10), HeaderError::Truncated { tensor: "b".into(), end: 20, available: 10 });
}

#[test]
fn a_shape_that_does_not_fit_its_bytes_is_refused() {
    let json = format!("{{{}}}", entry("a", "F32", "[3]", 0, 8));
    assert!(matches!(refused(&json, 8), HeaderError::SizeMismatch { expected: 12, found: 8, .. }));
    let json = format!("{{{}}}", entry("a", "F32", "[4294967296,4294967296]", 0, 8));
    assert!(matches!(refused(&json, 8), HeaderError::Overflow { .. }));
}

fn write(path: &Path, tensors: &[(&str, &[usize], &[f32])]) -> WrittenFile {
    let tensors = tensors.iter().map(|(name, shape, values)| TensorOut::borrowed(*name, shape, values)).collect();
    write_safetensors(path, tensors, &BTreeMap::new()).unwrap()
}

#[test]
fn every_truncation_of_a_real_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    write(&path, &[("a", &[2, 2], &[1.0, 2.0, 3.0, 4.0]), ("b", &[3], &[5.0, 6.0, 7.0])]);
    let whole = fs::read(&path).unwrap();
    assert!(parse_header(&whole).is_ok());
    for len in 0..whole.len() {
        assert!(parse_header(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
    }
}

#[test]
fn what_is_written_is_read_back_and_both_libraries_agree() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let values: Vec<f32> = (0..40_000).map(|i| (i as f32).sin()).collect();
    let written =
        write(&path, &[("b.weight", &[200, 200], &values), ("a \"quoted\" name", &[1], &[f32::MIN_POSITIVE])]);

    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.read_f32(file.info("b.weight").unwrap()).unwrap(), values);
    assert_eq!(file.metadata()["format"], "pt");
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, written.bytes);
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("b.weight").unwrap().shape(), [200, 200]);
    assert_eq!(theirs.len(), 2);
}

#[test]
fn half_width_types_widen_and_integers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let json = format!(
        "{{{},{},{},{}}}",
        entry("double", "F64", "[1]", 0, 8),
        entry("brain", "BF16", "[1]", 8, 10),
        entry("half", "F16", "[1]", 10, 12),
        entry("count", "I64", "[1]", 12, 20)
    );
    let mut bytes = file_of(&json, 0);
    bytes.extend_from_slice(&1.5f64.to_le_bytes());
    bytes.extend_from_slice(&half::bf16::from_f32(-2.5).to_le_bytes());
    bytes.extend_from_slice(&half::f16::from_f32(0.25).to_le_bytes());
    bytes.extend_from_slice(&7i64.to_le_bytes());
    fs::write(&path, bytes).unwrap();

    let file = SafetensorsFile::open(&path).unwrap();
    for (name, value) in [("double", 1.5), ("brain", -2.5), ("half", 0.25)] {
        assert_eq!(file.read_f32(file.info(name).unwrap()).unwrap(), [value]);
    }
    let error = file.read_f32(file.info("count").unwrap()).unwrap_err();
    assert!(matches!(error, CheckpointError::WrongDtype { tensor, found, .. } if tensor == "count" && found == "I64"));
}

#[test]
fn shards_must_all_be_there_and_hold_what_the_index_says() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("one.safetensors"), &[("a", &[1], &[1.0])]);
    write(&at("two.safetensors"), &[("b", &[1], &[2.0])]);
    let index = |map: &str| fs::write(at(INDEX_FILE), format!("{{\"weight_map\":{{{map}}}}}")).unwrap();

    index("\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"");
    let store = TensorStore::open(dir.path()).unwrap();
    assert_eq!(store.tensors().count(), 2);

    index("\"a\":\"one.safetensors\",\"c\":\"three.safetensors\"");
    let error = TensorStore::open(dir.path()).unwrap_err();
    assert!(
        matches!(error, CheckpointError::ShardMissing { shard, tensor, .. } if shard == "three.safetensors" && tensor == "c")
    );

    index("\"a\":\"two.safetensors\"");
    let error = TensorStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::NotInShard { tensor, .. } if tensor == "a"));

    index("\"a\":\"../one.safetensors\"");
    let error = TensorStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Format { source: FormatError::UnsafePath { .. }, .. }));

    fs::write(at(INDEX_FILE), "{\"weight_map\": 3}").unwrap();
    let error = TensorStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Format { source: FormatError::Json { .. }, .. }));

    fs::remove_file(at(INDEX_FILE)).unwrap();
    assert!(matches!(TensorStore::open(dir.path()).unwrap_err(), CheckpointError::NotFound { .. }));
}

#[test]
fn a_manifest_of_another_format_or_a_newer_version_is_refused() {
    let good = Manifest::new(7, Some(1.25));
    assert_eq!(Manifest::parse(&good.to_json()).unwrap(), good);
    for (from, to) in [
        ("mixtura-checkpoint", "other"),
        ("\"version\": 1", "\"version\": 99"),
        ("\"step\"", "\"unknown\""),
        ("\"files\": {}", "\"files\": {\"../x\": {\"bytes\": 0, \"blake3\": \"\"}}"),
    ] {
        let text = String::from_utf8(good.to_json()).unwrap();
        assert!(text.contains(from), "{text}");
        assert!(Manifest::parse(text.replace(from, to).as_bytes()).is_err(), "{from} -> {to}");
    }
}

proptest! {
    #[test]
    fn any_tensors_survive_a_round_trip(
        shapes in prop::collection::vec(prop::collection::vec(0usize..5, 0..4), 0..6),
        bf16 in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let stored = if bf16 { StoredType::Bf16 } else { StoredType::F32 };
        let values: Vec<Vec<f32>> = shapes
            .iter()
            .enumerate()
            .map(|(i, s)| (0..s.iter().product::<usize>()).map(|j| (i * 8 + j) as f32).collect())
            .collect();
        let tensors = shapes
            .iter()
            .zip(&values)
            .enumerate()
            .map(|(i, (s, v))| TensorOut::lazy(format!("t{i}"), s, stored, || std::borrow::Cow::Borrowed(v)))
            .collect();
        let mut bytes = Vec::new();
        let written = write_to(&mut bytes, tensors, &BTreeMap::new()).unwrap();
        fs::write(&path, bytes).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        for (i, (shape, values)) in shapes.iter().zip(&values).enumerate() {
            let info = file.info(&format!("t{i}")).unwrap();
            prop_assert_eq!(&info.shape, shape);
            prop_assert_eq!(&file.read_f32(info).unwrap(), values);
            let hash = blake3::hash(file.bytes(info)).to_hex().to_string();
            prop_assert!(written.tensors.iter().any(|t| t.name == info.name && t.blake3 == hash));
        }
    }

    #[test]
    fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_header(&bytes);
        let _ = ShardIndex::parse(&bytes);
        let _ = Manifest::parse(&bytes);
        let _ = HfConfig::parse(&bytes);
    }

    #[test]
    fn a_damaged_header_never_gives_offsets_outside_the_file(at in 0usize..400, byte in any::<u8>()) {
        let json = format!("{{{},{}}}", entry("a", "F32", "[2,2]", 0, 16), entry("b", "BF16", "[3]", 16, 22));
        let mut bytes = file_of(&json, 22);
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(header) = parse_header(&bytes) {
            prop_assert!(header.tensors.iter().all(|t| t.begin <= t.end && t.end <= bytes.len()));
        }
    }

    #[test]
    fn a_damaged_config_is_refused_or_survives_being_written_again(
        family in 0usize..3,
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0usize..3), 1..4),
    ) {
        let name = ["olmoe", "mixtral", "llama"][family];
        let Some(Family::Hf(family)) = Family::from_model_type(name) else { panic!("{name}") };
        let moe = HfMoe { experts: 8, top_k: 2, normalize: name == "mixtral", aux_coefficient: 0.01, jitter: 0.0 };
        let config = HfConfig {
            family, vocab: 96, hidden: 32, intermediate: 16, layers: 2, heads: 4, kv_heads: 2, head_dim: Some(8), context: 64,
            rope_theta: 1e4, norm_eps: 1e-5, clip_qkv: (name == "olmoe").then_some(8.0), tied: false,
            moe: (name != "llama").then_some(moe), native: None,
        };
        let ids = TokenIds::default();
        let mut bytes = config.to_json(StoredType::F32, &ids);
        prop_assert_eq!(HfConfig::parse(&bytes), Ok(config));
        for (at, byte, how) in cuts {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, b"0123456789.-e\"{}[],:ntf"[byte as usize % 23]),
                _ => drop(bytes.remove(at)),
            }
        }
        if let Ok(config) = HfConfig::parse(&bytes) {
            if config.layers * config.moe.as_ref().map_or(1, |moe| moe.experts) < 1000 {
                family_layout(&config);
            }
            prop_assert_eq!(HfConfig::parse(&config.to_json(StoredType::F32, &ids)), Ok(config));
        }
    }
}
