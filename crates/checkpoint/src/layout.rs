//! Where every number of a model lies in a family's tensors: one table, used for reading and for writing.
//!
//! Our weights are `[in, out]`, a family's are `[out, in]`; our attention has one matrix for queries, keys and values, theirs
//! three; our experts are one tensor `[E, D, 2F]` (gate columns, then up columns), theirs three per expert. So each of our
//! parameters is covered by [`Piece`]s, and a piece is a block of a row-major matrix that equals one stored tensor, transposed
//! or not. Reading copies blocks one way, writing the other way, and neither can disagree with the other.
//!
//! A family's table is made in its file in `families/`, of the parts in `hf_tensors.rs`.
//!
//! Legend: D width, E experts, F hidden width, V vocabulary, H query heads, G key-value heads, P head width.

use std::collections::BTreeSet;

use mixtura_routing::names::nearest;
use safetensors::Dtype;

use crate::error::{CheckpointError, Result};
use crate::file::{SafetensorsFile, Values};
use crate::header::TensorInfo;
use crate::hf_config::HfConfig;
use crate::store::TensorStore;

/// One of our parameters and the pieces that cover it.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterLayout {
    /// Our name, such as `layers.0.attention.qkv`.
    pub name: String,
    /// Our shape.
    pub shape: Vec<usize>,
    /// Together they cover every element once.
    pub pieces: Vec<Piece>,
}

/// A stored tensor and the block of our parameter that it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Where it lies on the disk; the first is what we write, the others are accepted when reading.
    pub places: Vec<Place>,
    /// First element of the block in our parameter.
    pub first: usize,
    /// Elements from one row of the block to the next.
    pub stride: usize,
    /// Rows of the block.
    pub rows: usize,
    /// Columns of the block.
    pub cols: usize,
    /// Whether the stored matrix is `[cols, rows]`.
    pub transposed: bool,
}

/// A stored tensor, or a run of elements of a larger one.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// Tensor name on the disk.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// First element of the run; 0 unless the tensor stacks several pieces.
    pub first: usize,
}

impl ParameterLayout {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The same tensor on both sides.
    pub(crate) fn plain(name: &str, shape: &[usize], stored: String) -> Self {
        let elements = shape.iter().product();
        let place = Place { name: stored, shape: shape.to_vec(), first: 0 };
        let piece =
            Piece { places: vec![place], first: 0, stride: elements, rows: 1, cols: elements, transposed: false };
        Self { name: name.into(), shape: shape.to_vec(), pieces: vec![piece] }
    }

    /// `[in, out]` here; there `[out_i, in]` side by side, one tensor for each part.
    pub(crate) fn linear(name: &str, inputs: usize, parts: &[(String, usize)]) -> Self {
        let total: usize = parts.iter().map(|(_, outputs)| outputs).sum();
        let mut first = 0;
        let mut pieces = Vec::new();
        for (stored, outputs) in parts {
            let place = Place { name: stored.clone(), shape: vec![*outputs, inputs], first: 0 };
            pieces.push(Piece {
                places: vec![place],
                first,
                stride: total,
                rows: inputs,
                cols: *outputs,
                transposed: true,
            });
            first += outputs;
        }
        Self { name: name.into(), shape: vec![inputs, total], pieces }
    }
}

impl Piece {
    fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// Stored order to ours.
    pub fn scatter(&self, stored: &[f32], ours: &mut [f32]) {
        self.for_each_pair(|s, o| ours[o] = stored[s]);
    }

    /// Ours to stored order.
    pub fn gather(&self, ours: &[f32]) -> Vec<f32> {
        let mut stored = vec![0.0; self.elements()];
        self.for_each_pair(|s, o| stored[s] = ours[o]);
        stored
    }

    /// Calls `f(stored position, our position)` for every element, in tiles of 32 x 32 so that both sides of a transposition
    /// stay in the first-level cache.
    fn for_each_pair(&self, mut f: impl FnMut(usize, usize)) {
        const TILE: usize = 32;
        if !self.transposed {
            for r in 0..self.rows {
                for c in 0..self.cols {
                    f(r * self.cols + c, self.first + r * self.stride + c);
                }
            }
            return;
        }
        for r0 in (0..self.rows).step_by(TILE) {
            for c0 in (0..self.cols).step_by(TILE) {
                for r in r0..self.rows.min(r0 + TILE) {
                    for c in c0..self.cols.min(c0 + TILE) {
                        f(c * self.rows + r, self.first + r * self.stride + c);
                    }
                }
            }
        }
    }
}

/// The table of a Hugging Face family.
pub fn family_layout(config: &HfConfig) -> Vec<ParameterLayout> {
    (config.family.layout)(config)
}

/// The table of our own layout: every parameter as it is.
pub fn native_layout(parameters: &[(String, Vec<usize>)]) -> Vec<ParameterLayout> {
    parameters.iter().map(|(name, shape)| ParameterLayout::plain(name, shape, name.clone())).collect()
}

/// Tensors that say nothing a model needs: old checkpoints store the rotary frequencies, which follow from the config.
fn is_ignorable(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// A store in which every piece of a table was found, in the right shape and a readable type, and nothing else.
#[derive(Debug)]
pub struct CheckedTensors<'a> {
    table: &'a [ParameterLayout],
    store: &'a TensorStore,
}

impl<'a> CheckedTensors<'a> {
    /// Checks headers only; no tensor data is read.
    pub fn new(table: &'a [ParameterLayout], store: &'a TensorStore) -> Result<Self> {
        let path = || store.path().to_path_buf();
        let mut used: BTreeSet<&str> = BTreeSet::new();
        let mut missing: Vec<&Place> = Vec::new();
        for place in table.iter().flat_map(|p| &p.pieces).map(|piece| find(store, piece).ok_or(&piece.places[0])) {
            match place {
                Err(place) => missing.push(place),
                Ok((place, file, info)) => {
                    if info.shape != place.shape {
                        let (expected, found) = (place.shape.clone(), info.shape.clone());
                        let path = file.path().to_path_buf();
                        return Err(CheckpointError::ShapeMismatch {
                            path,
                            tensor: info.name.clone(),
                            expected,
                            found,
                        });
                    }
                    file.readable(info)?;
                    used.insert(&info.name);
                }
            }
        }
        if let Some(first) = missing.first() {
            let unused = store.tensors().map(|tensor| &*tensor.name).filter(|name| !used.contains(name));
            return Err(CheckpointError::MissingTensor {
                path: path(),
                tensor: first.name.clone(),
                expected: first.shape.clone(),
                missing: missing.len(),
                nearest_name: nearest(&first.name, unused).map(str::to_string),
            });
        }
        let extra: Vec<_> = store
            .tensors()
            .filter(|t| !used.contains(&*t.name) && !is_ignorable(&t.name) && !repeats_the_embedding(store, t))
            .collect();
        if let Some(first) = extra.first() {
            let (tensor, found) = (first.name.clone(), first.shape.clone());
            return Err(CheckpointError::ExtraTensor { path: path(), tensor, found, extra: extra.len() });
        }
        Ok(Self { table, store })
    }

    /// The parameters of the table.
    pub fn parameters(&self) -> &'a [ParameterLayout] {
        self.table
    }

    /// The pieces of one parameter, as they are stored, each checked to be finite.
    pub fn stored(&self, parameter: &'a ParameterLayout) -> Result<Vec<(&'a Piece, Values<'a>)>> {
        parameter.pieces.iter().map(|piece| Ok((piece, self.piece(piece)?))).collect()
    }

    fn piece(&self, piece: &'a Piece) -> Result<Values<'a>> {
        let (place, file, info) = find(self.store, piece).expect("checked in `new`");
        let values = file.values(info, place.first, piece.elements())?;
        match values.first_non_finite() {
            None => Ok(values),
            Some((index, value)) => {
                let (path, tensor) = (file.path().to_path_buf(), info.name.clone());
                Err(CheckpointError::NonFinite { path, tensor, index: place.first + index, value })
            }
        }
    }

    /// Whether all of a parameter is stored in this type; no value is read.
    pub fn is_stored_in(&self, parameter: &ParameterLayout, dtype: Dtype) -> bool {
        let has_it = |piece: &Piece| find(self.store, piece).expect("checked in `new`").2.dtype == dtype;
        parameter.pieces.iter().all(has_it)
    }

    /// Gives back the memory that the file's pages of one parameter take in this process.
    pub fn release(&self, parameter: &ParameterLayout) {
        for piece in &parameter.pieces {
            let (_, file, info) = find(self.store, piece).expect("checked in `new`");
            file.release(info);
        }
    }

    /// The values of one parameter in our layout.
    pub fn read(&self, parameter: &'a ParameterLayout) -> Result<Vec<f32>> {
        if let [whole] = &parameter.pieces[..]
            && !whole.transposed
        {
            return Ok(self.piece(whole)?.into_f32().into_owned());
        }
        let mut ours = vec![0.0; parameter.elements()];
        for piece in &parameter.pieces {
            piece.scatter(&self.piece(piece)?.into_f32(), &mut ours);
        }
        Ok(ours)
    }
}

fn find<'a>(store: &'a TensorStore, piece: &'a Piece) -> Option<(&'a Place, &'a SafetensorsFile, &'a TensorInfo)> {
    piece.places.iter().find_map(|place| store.find(&place.name).map(|(file, info)| (place, file, info)))
}

/// Some writers store the tied output projection although it is the embedding; as long as it is, nothing is lost.
fn repeats_the_embedding(store: &TensorStore, tensor: &TensorInfo) -> bool {
    if tensor.name != "lm_head.weight" {
        return false;
    }
    let (Some((file, head)), Some((other, embed))) =
        (store.find(&tensor.name), store.find("model.embed_tokens.weight"))
    else {
        return false;
    };
    head.shape == embed.shape && head.dtype == embed.dtype && file.bytes(head) == other.bytes(embed)
}
