//! The Hugging Face families, one file each: what `config.json` says and what is refused, where the tensors lie, which models
//! the family can express. `docs/add_a_family.md` walks through a file.
//!
//! Nothing outside its file knows a family's name but the list below. What families share is in `hf_keys.rs` (reading keys),
//! `hf_config.rs` (the keys all have), `hf_tensors.rs` (tables of tensors) and `express.rs` (between a file and our model).

mod olmoe;
mod mixtral;
mod llama;
#[cfg(all(test, feature = "model"))]
mod pebble;

use std::fmt;
use std::hash::{Hash, Hasher};

#[cfg(feature = "model")]
use mixtura_nn::ModelConfig;
use serde_json::{Map, Value};

use crate::hf_config::HfConfig;
use crate::hf_keys::{Keys, Parsed};
use crate::layout::ParameterLayout;

/// Every family, in the order in which a model is offered to them: the specific ones first. A model is written in the first
/// that can express it.
pub(crate) static FAMILIES: &[&HfFamily] = &[
    &olmoe::OLMOE,
    &mixtral::MIXTRAL,
    &llama::LLAMA,
    // The one that docs/add_a_family.md makes up.
    #[cfg(all(test, feature = "model"))]
    &pebble::PEBBLE,
];

/// What a family's file defines.
pub struct HfFamily {
    /// The value of `model_type`, which names the family.
    pub(crate) model_type: &'static str,
    /// The class name under `architectures`.
    pub(crate) architecture: &'static str,
    /// `config.json` read: this family's keys and defaults, and every key refused that would change the numbers.
    pub(crate) read: fn(&Keys) -> Parsed<HfConfig>,
    /// `config.json` written: the keys that only some families have, added to those that all have.
    pub(crate) write: fn(&HfConfig, &mut Map<String, Value>),
    /// Where each of our parameters lies in this family's tensors.
    pub(crate) layout: fn(&HfConfig) -> Vec<ParameterLayout>,
    /// A model in this family's terms, or the first thing that the family lacks: half a sentence for an error.
    #[cfg(feature = "model")]
    pub(crate) express: fn(&ModelConfig) -> Result<HfConfig, String>,
    /// The other way round: the model that a file of this family describes.
    #[cfg(feature = "model")]
    pub(crate) model: fn(&HfConfig) -> ModelConfig,
}

/// A family is its `model_type`.
impl PartialEq for HfFamily {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl Eq for HfFamily {}

impl Hash for HfFamily {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.model_type.hash(state);
    }
}

impl fmt::Debug for HfFamily {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.model_type)
    }
}

/// The family of `docs/add_a_family.md` is its file and its line in the list, and everything works.
#[cfg(all(test, feature = "model"))]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use burn::tensor::Device;
    use mixtura_nn::{Decoder, MoeConfig, NamedParameters, QkNorm};
    use mixtura_routing::{Noise, Normalize, RouterConfig};

    use serde_json::json;

    use super::*;
    use crate::{CheckpointError, Family, SaveOptions, TensorStore, load_config, load_model, save_model};

    fn model() -> ModelConfig {
        let router = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
        let moe = MoeConfig { router, ..MoeConfig::new(3, 2, 8) };
        ModelConfig { vocab: 40, qk_norm: QkNorm::PerHead, moe: Some(moe), ..ModelConfig::new(16, 2, 2, 32) }
    }

    fn bits(decoder: &Decoder) -> Vec<(String, Vec<u32>)> {
        let mut all = Vec::new();
        decoder.for_each_parameter(|info, values| {
            all.push((info.name.clone(), values.iter().map(|v| v.to_bits()).collect()));
        });
        all
    }

    /// The directory's `config.json` with some keys changed.
    fn change(dir: &Path, change: impl Fn(&mut Map<String, Value>)) {
        let path = dir.join("config.json");
        let mut keys = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut keys);
        std::fs::write(&path, serde_json::to_vec(&keys).unwrap()).unwrap();
    }

    #[test]
    fn a_new_family_is_chosen_written_read_and_refused_from_its_file_alone() {
        let family = Family::from_model_type("pebble").unwrap();
        assert_eq!(Family::of(&model()), family);
        let decoder = Decoder::new(&model(), 1, &Device::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("m");
        save_model(&dir, &decoder, family, &SaveOptions::default()).unwrap();
        let again = load_model(&dir, &Device::default()).unwrap();
        assert_eq!((again.family, again.config), (family, model()));
        assert!(bits(&again.decoder) == bits(&decoder));
        let store = TensorStore::open(&dir).unwrap();
        let names: BTreeSet<_> = store.tensors().map(|tensor| tensor.name.as_str()).collect();
        assert!(names.contains("model.layers.1.pebbles.2.up.weight"), "{names:?}");
        let (_, norm) = store.find("model.layers.0.self_attn.k_norm.weight").unwrap();
        assert_eq!(norm.shape, [8]);

        // As another program writes it, without our own configuration.
        change(&dir, |keys| drop(keys.remove("mixtura")));
        let theirs = load_model(&dir, &Device::default()).unwrap();
        assert_eq!(Family::of(&theirs.config), family);
        assert!(bits(&theirs.decoder) == bits(&decoder));

        change(&dir, |keys| drop(keys.insert("num_shared_pebbles".into(), json!(1))));
        let error = load_config(&dir).unwrap_err();
        assert!(matches!(&error, CheckpointError::Unsupported { key, .. } if key == "num_shared_pebbles"), "{error}");
        change(&dir, |keys| drop(keys.insert("model_type".into(), json!("gravel"))));
        let error = load_config(&dir).unwrap_err().to_string();
        assert!(error.contains("known are olmoe, mixtral, llama, pebble, mixtura"), "{error}");

        let full = ModelConfig { qk_norm: QkNorm::Full, ..model() };
        let decoder = Decoder::new(&full, 1, &Device::default()).unwrap();
        let error = save_model(&dir, &decoder, family, &SaveOptions::default()).unwrap_err().to_string();
        assert!(error.contains("the pebble layout cannot hold this model: qk_norm must be PerHead"), "{error}");
    }

    #[test]
    fn the_walk_through_shows_the_file_of_its_family() {
        let page = include_str!("../../../docs/add_a_family.md");
        let blocks = page.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap());
        let lines = |text: &str| text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect::<Vec<_>>();
        let shown: Vec<String> = blocks.flat_map(lines).collect();
        assert_eq!(shown, lines(include_str!("families/pebble.rs")));
    }

    #[test]
    fn no_code_but_a_familys_own_file_knows_its_name() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let files = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        let files = [files(&source), files(&source.join("families"))].concat();
        let files: Vec<_> = files.iter().filter(|path| path.is_file() && !path.ends_with("families.rs")).collect();
        assert!(files.len() > 20, "{files:?}");
        for path in files {
            let text = std::fs::read_to_string(path).unwrap().to_lowercase().replace("llama.cpp", "another program");
            let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            for family in FAMILIES {
                let own = path.ends_with(format!("families/{}.rs", family.model_type));
                assert_eq!(code.contains(family.model_type), own, "{} and {family:?}", path.display());
            }
        }
    }

    #[test]
    fn every_family_has_a_name_of_its_own_and_reads_what_it_writes() {
        let names: BTreeSet<_> = Family::all().map(Family::model_type).collect();
        assert_eq!(names.len(), FAMILIES.len() + 1);
        let router = |noise| RouterConfig { noise, ..RouterConfig::default() };
        let mixture = |noise| Some(MoeConfig { router: router(noise), ..MoeConfig::new(3, 2, 8) });
        let plain = ModelConfig { vocab: 40, ..ModelConfig::new(16, 2, 2, 32) };
        let mut models = vec![ModelConfig { moe: None, d_dense: Some(24), ..plain.clone() }];
        for qk_norm in [QkNorm::None, QkNorm::Full, QkNorm::PerHead] {
            for clip_qkv in [None, Some(4.0)] {
                for noise in [Noise::None, Noise::Jitter { eps: 0.01 }] {
                    models.push(ModelConfig { qk_norm, clip_qkv, moe: mixture(noise), ..plain.clone() });
                }
            }
        }
        let mut expressed = BTreeSet::new();
        for (family, model) in FAMILIES.iter().flat_map(|family| models.iter().map(move |model| (family, model))) {
            let Ok(config) = (family.express)(model) else { continue };
            expressed.insert(family.model_type);
            assert_eq!(config.family, *family);
            let json = config.to_json(crate::StoredType::F32, &crate::TokenIds::default());
            assert_eq!(HfConfig::parse(&json), Ok(config.clone()));
            // What the file says is the model again, in everything that decides a logit.
            assert_eq!(crate::compare::first_difference(&(family.model)(&config), model), None, "{family:?} {model:?}");
        }
        assert_eq!(expressed.len(), FAMILIES.len(), "a family expresses none of the models: {expressed:?}");
    }
}
