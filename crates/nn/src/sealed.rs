//! A decoder whose large weights exist only as the kernels read them, for inference.
//!
//! Whoever has the weights (a checkpoint's files) is a [`WeightSource`]: it is asked for every weight once, packed where the kernels want
//! it packed. What is read otherwise than by a matrix product (norms, routers, gates, experts without a network, soft layers, whose
//! experts are mixed before they are used) comes as values and is kept as parameters, as in training. The forward pass is the same code on
//! the same numbers, so it gives the same bits.
//!
//! Legend: V vocabulary, D model width, E experts, F hidden width, K inputs, N outputs.

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Activation, ExpertWeights, PackCell, PackedB, SealedWeight, stand_in};

use crate::block::Feedforward;
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::ConfigError;
use crate::ffn::Experts;
use crate::parameters::{NamedParameters, ParameterInfo, Replace};

/// Where the weights of a sealed decoder come from, by parameter name. All of them are for one precision, which is the source's to know.
pub trait WeightSource {
    /// Why a weight cannot be had.
    type Error;

    /// `[K, N]`, packed.
    fn matrix(&mut self, name: &str) -> Result<PackedB, Self::Error>;

    /// The `[V, D]` table `name`, packed as its transpose, and whether the pack holds the table's numbers exactly.
    fn transposed(&mut self, name: &str) -> Result<(PackedB, bool), Self::Error>;

    /// The experts' `[E, D, 2F]` (or `[E, D, F]` without a gate) and `[E, F, D]`, packed.
    fn experts(&mut self, gate_up: &str, down: &str, activation: Activation) -> Result<ExpertWeights, Self::Error>;

    /// The `[V, D]` table `name` in bf16 if that is how it is stored; `None` asks for its values instead.
    fn table(&mut self, name: &str) -> Result<Option<Vec<u16>>, Self::Error>;

    /// The values of a parameter.
    fn values(&mut self, parameter: &ParameterInfo) -> Result<Vec<f32>, Self::Error>;
}

/// Why a sealed decoder was not made.
#[derive(Debug, thiserror::Error)]
pub enum SealError<E> {
    /// The configuration cannot be built.
    #[error(transparent)]
    Config(ConfigError),
    /// The source has not got a weight.
    #[error(transparent)]
    Source(E),
}

impl Decoder {
    /// A model for inference with the weights of `source`, each held once. On Flex; forward passes must be in the source's precision.
    pub fn sealed<S: WeightSource>(config: &ModelConfig, source: &mut S) -> Result<Self, SealError<S::Error>> {
        let mut decoder = Self::new(config, 0, &Device::default()).map_err(SealError::Config)?;
        decoder.seal(source).map_err(SealError::Source)?;
        Ok(decoder)
    }

    fn seal<S: WeightSource>(&mut self, source: &mut S) -> Result<(), S::Error> {
        let infos = self.parameter_infos();
        let mut sealed = Sealed { source, names: Vec::new() };
        match &mut self.head {
            Some(head) => {
                sealed.table("embed.weight", &mut self.embed.weight, &self.embed.cell)?;
                sealed.matrix("head.weight", &mut head.weight, &head.cell)?;
            }
            None => sealed.tied("embed.weight", &mut self.embed.weight, &self.embed.cell)?,
        }
        for (i, block) in self.layers.iter_mut().enumerate() {
            let at = |tail: &str| format!("layers.{i}.{tail}");
            let attention = &mut block.attention;
            sealed.matrix(&at("attention.qkv"), &mut attention.qkv, &attention.qkv_cell)?;
            sealed.matrix(&at("attention.out"), &mut attention.out, &attention.out_cell)?;
            match &mut block.ffn {
                Feedforward::Mlp(network) => sealed.experts(&at("mlp"), network)?,
                Feedforward::Moe(moe) => {
                    sealed.experts(&at("moe.experts"), &mut moe.experts)?;
                    for (w, experts) in moe.other_widths.iter_mut().enumerate() {
                        sealed.experts(&at(&format!("moe.other_widths.{w}")), experts)?;
                    }
                    if let Some(shared) = &mut moe.shared {
                        sealed.experts(&at("moe.shared"), shared)?;
                    }
                }
                Feedforward::Soft(_) => {}
            }
        }
        let Sealed { source, names } = sealed;
        if let Some(name) = names.iter().find(|&name| !infos.iter().any(|info| info.name == *name)) {
            panic!("`{name}` was sealed, but no parameter of the model is called so");
        }
        let mut values = BTreeMap::new();
        for info in infos.iter().filter(|info| !names.contains(&info.name)) {
            values.insert(info.name.clone(), source.values(info)?);
        }
        let whole = std::mem::replace(self, self.hollow());
        *self = whole.map(&mut Replace::of(values));
        Ok(())
    }

    /// Memory that the weights take as they are held: packed, or as parameters.
    pub fn weight_bytes(&self) -> usize {
        let mut packed = 0;
        self.for_each_cell(&mut |cell| packed += cell.bytes());
        let mut values = 0;
        self.visit(&mut CountHeld(&mut values));
        packed + values * size_of::<f32>()
    }
}

/// Counts the numbers that parameters hold, those of stand-ins as one each.
struct CountHeld<'a>(&'a mut usize);

impl burn::module::ModuleVisitor for CountHeld<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        *self.0 += mixtura_ops::held(&param.val());
    }
}

/// Moves weights into their cells and remembers which.
struct Sealed<'a, S> {
    source: &'a mut S,
    names: Vec<String>,
}

impl<S: WeightSource> Sealed<'_, S> {
    fn matrix(&mut self, name: &str, weight: &mut Param<Tensor<2>>, cell: &PackCell) -> Result<(), S::Error> {
        let packed = self.source.matrix(name)?;
        self.put(name, weight, cell, SealedWeight::Matrix(packed));
        Ok(())
    }

    fn tied(&mut self, name: &str, weight: &mut Param<Tensor<2>>, cell: &PackCell) -> Result<(), S::Error> {
        let (packed, exact) = self.source.transposed(name)?;
        if exact {
            self.put(name, weight, cell, SealedWeight::Tied(packed));
        } else {
            // Tokens are looked up in the numbers before rounding, which stay a parameter.
            cell.seal(SealedWeight::Projection(packed));
        }
        Ok(())
    }

    fn table(&mut self, name: &str, weight: &mut Param<Tensor<2>>, cell: &PackCell) -> Result<(), S::Error> {
        if let Some(rows) = self.source.table(name)? {
            self.put(name, weight, cell, SealedWeight::Table(rows));
        }
        Ok(())
    }

    fn experts(&mut self, name: &str, experts: &mut Experts) -> Result<(), S::Error> {
        let names = [format!("{name}.gate_up"), format!("{name}.down")];
        let packed = self.source.experts(&names[0], &names[1], experts.activation().kernel())?;
        replace(&mut experts.gate_up);
        replace(&mut experts.down);
        experts.cell().seal(SealedWeight::Experts(packed));
        self.names.extend(names);
        Ok(())
    }

    fn put(&mut self, name: &str, weight: &mut Param<Tensor<2>>, cell: &PackCell, packed: SealedWeight) {
        replace(weight);
        cell.seal(packed);
        self.names.push(name.into());
    }
}

/// A stand-in of the same shape.
fn replace<const D: usize>(weight: &mut Param<Tensor<D>>) {
    let (shape, device) = (weight.lazy_shape().dims::<D>(), weight.lazy_device());
    *weight = Param::initialized(ParamId::new(), stand_in(shape, &device));
}
