//! Models for inference: every weight goes from its file into the form the kernels read, once, in the file's own number type.
//!
//! A bf16 weight stays bf16 in every precision and never passes through f32. Pages of the file that were read are given back weight by
//! weight, so the process never holds the file beside the model.
//!
//! Legend: E experts, K inputs, N outputs, V vocabulary, D width.

use std::path::Path;

use mixtura_nn::{Decoder, ParameterInfo, SealError, WeightSource};
use mixtura_ops::{Activation, Columns, Elements, ExpertWeights, Numerics, PackedB, Precision, Source};
use safetensors::Dtype;

use crate::checkpoints::CONFIG_FILE;
use crate::error::{CheckpointError, Result};
use crate::file::Values;
use crate::layout::{CheckedTensors, ParameterLayout, Piece};
use crate::model::{LoadedModel, layout_in, load_config, verify};
use crate::store::TensorStore;
use crate::token_ids::TokenIds;

/// Loads the model in `dir`, whatever known layout it has, for inference in the precision of `numerics`: each weight is held once.
///
/// ```no_run
/// # use mixtura_checkpoint::load_sealed;
/// # use mixtura_ops::Numerics;
/// let model = load_sealed("olmoe-1b-7b".as_ref(), Numerics::default())?;
/// println!("{} bytes of weights", model.decoder.weight_bytes());
/// # Ok::<(), mixtura_checkpoint::CheckpointError>(())
/// ```
pub fn load_sealed(dir: &Path, numerics: Numerics) -> Result<LoadedModel> {
    let (config, family) = load_config(dir)?;
    let ids = TokenIds::read(dir)?;
    let store = TensorStore::open(dir)?;
    let table = layout_in(dir, family, &config)?;
    let tensors = CheckedTensors::new(&table, &store)?;
    verify(dir)?;
    let decoder = Decoder::sealed(&config, &mut Files { tensors, numerics });
    let decoder = decoder.map_err(|error| match error {
        SealError::Config(e) => CheckpointError::Config { path: dir.join(CONFIG_FILE), reason: e.to_string() },
        SealError::Source(e) => e,
    })?;
    Ok(LoadedModel { decoder, config, family, ids })
}

/// About the memory that [`load_sealed`] will take, from the headers of the files alone.
pub fn sealed_bytes(dir: &Path, precision: Precision) -> Result<u64> {
    let width = |dtype| match dtype {
        Dtype::BF16 => 2,
        _ if precision.is_bf16() => 2,
        _ => 4,
    };
    Ok(TensorStore::open(dir)?.tensors().map(|tensor| tensor.elements() as u64 * width(tensor.dtype)).sum())
}

/// The files of a model as the source of its weights.
struct Files<'a> {
    tensors: CheckedTensors<'a>,
    numerics: Numerics,
}

impl Files<'_> {
    fn parameter(&self, name: &str) -> &ParameterLayout {
        let found = self.tensors.parameters().iter().find(|parameter| parameter.name == name);
        found.unwrap_or_else(|| panic!("no parameter `{name}` in the model's table"))
    }

    /// `experts` matrices, the last two axes of `shape`.
    fn pack(&self, parameter: &ParameterLayout, stored: &[Stored], columns: Columns) -> PackedB {
        let (experts, k, n) = match parameter.shape[..] {
            [k, n] => (1, k, n),
            [experts, k, n] => (experts, k, n),
            _ => panic!("`{}` of shape {:?} is no matrix", parameter.name, parameter.shape),
        };
        let Numerics { isa, precision } = self.numerics;
        let pack = |source| PackedB::from_stored(isa, precision, experts, k, n, columns, source);
        let narrow: Option<Vec<_>> = stored.iter().map(|(piece, values)| Some((*piece, values.bf16()?))).collect();
        let wide: Option<Vec<_>> = stored.iter().map(|(piece, values)| Some((*piece, values.f32()?))).collect();
        match (narrow, wide) {
            (Some(pieces), _) => pack(Slices::of(&pieces, experts, k, n).source(Elements::Bf16)),
            (None, Some(pieces)) => pack(Slices::of(&pieces, experts, k, n).source(Elements::F32)),
            (None, None) => panic!("the pieces of `{}` are of two number types", parameter.name),
        }
    }
}

impl WeightSource for Files<'_> {
    type Error = CheckpointError;

    fn matrix(&mut self, name: &str) -> Result<PackedB> {
        let parameter = self.parameter(name);
        let stored = self.tensors.stored(parameter)?;
        let packed = self.pack(parameter, &alike(stored), Columns::Plain);
        self.tensors.release(parameter);
        Ok(packed)
    }

    fn transposed(&mut self, name: &str) -> Result<(PackedB, bool)> {
        let parameter = self.parameter(name);
        let [v, d] = parameter.shape[..] else { panic!("`{name}` is no table") };
        let stored = alike(self.tensors.stored(parameter)?);
        let [(_, values)] = &stored[..] else { panic!("the table `{name}` lies in one tensor") };
        let Numerics { isa, precision } = self.numerics;
        let pack = |elements| PackedB::from_stored(isa, precision, 1, d, v, Columns::Plain, Source::ByColumn(elements));
        let (packed, exact) = match values {
            Values::F32(rows) => {
                (pack(Elements::F32(&rows.chunks(d).collect::<Vec<_>>())), precision == Precision::F32)
            }
            Values::Bf16(rows) => (pack(Elements::Bf16(&rows.chunks(d).collect::<Vec<_>>())), true),
        };
        drop(stored);
        self.tensors.release(parameter);
        Ok((packed, exact))
    }

    fn experts(&mut self, gate_up: &str, down: &str, activation: Activation) -> Result<ExpertWeights> {
        let (first, second) = (self.parameter(gate_up), self.parameter(down));
        let mut stored = self.tensors.stored(first)?;
        let pieces = stored.len();
        stored.extend(self.tensors.stored(second)?);
        // Both in one number type.
        let stored = alike(stored);
        let columns = if activation.is_gated() { Columns::GateUp } else { Columns::Plain };
        let gate_up = self.pack(first, &stored[..pieces], columns);
        let down = self.pack(second, &stored[pieces..], Columns::Plain);
        drop(stored);
        self.tensors.release(first);
        self.tensors.release(second);
        Ok(ExpertWeights::from_packed(activation, gate_up, down))
    }

    fn table(&mut self, name: &str) -> Result<Option<Vec<u16>>> {
        let parameter = self.parameter(name);
        if !self.tensors.is_stored_in(parameter, Dtype::BF16) {
            return Ok(None);
        }
        let stored = self.tensors.stored(parameter)?;
        let [(_, Values::Bf16(rows))] = &stored[..] else { panic!("the table `{name}` lies in one tensor") };
        let rows = rows.to_vec();
        self.tensors.release(parameter);
        Ok(Some(rows))
    }

    fn values(&mut self, parameter: &ParameterInfo) -> Result<Vec<f32>> {
        let parameter = self.parameter(&parameter.name);
        let values = self.tensors.read(parameter);
        self.tensors.release(parameter);
        values
    }
}

/// A block of a parameter and its values as the file has them.
type Stored<'a> = (&'a Piece, Values<'a>);

/// The same in one number type: f32, unless all are bf16.
fn alike(stored: Vec<Stored>) -> Vec<Stored> {
    if stored.iter().all(|(_, values)| values.bf16().is_some()) {
        return stored;
    }
    stored.into_iter().map(|(piece, values)| (piece, Values::F32(values.into_f32()))).collect()
}

/// The pieces of `experts` matrices `[k, n]` as packing reads them: whole matrices by rows, or every column.
struct Slices<'a, X> {
    by_row: bool,
    list: Vec<&'a [X]>,
}

impl<'a, X> Slices<'a, X> {
    fn of(pieces: &[(&Piece, &'a [X])], experts: usize, k: usize, n: usize) -> Self {
        if let [(piece, values)] = pieces
            && !piece.transposed
        {
            return Self { by_row: true, list: values.chunks(k * n).collect() };
        }
        let mut list: Vec<&[X]> = vec![&[]; experts * n];
        for (piece, values) in pieces {
            assert!(piece.transposed && piece.rows == k, "a matrix in several tensors is stored [out, in]");
            let (expert, column) = (piece.first / (k * n), piece.first % (k * n));
            list[expert * n + column..][..piece.cols]
                .iter_mut()
                .zip(values.chunks(k))
                .for_each(|(to, from)| *to = from);
        }
        Self { by_row: false, list }
    }

    fn source<'b>(&'b self, elements: impl FnOnce(&'b [&'a [X]]) -> Elements<'b>) -> Source<'b> {
        if self.by_row { Source::ByRow(elements(&self.list)) } else { Source::ByColumn(elements(&self.list)) }
    }
}
