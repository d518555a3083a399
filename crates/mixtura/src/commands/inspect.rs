//! `mixtura inspect`: what a model is made of, and with data how its experts are used.

mod data;

use mixtura_nn::{LayerFfn, NamedParameters, ParameterCounts};
use mixtura_train::probe::ProbeRow;
use mixtura_train::table::{Table, grouped};
use serde::Serialize;

use crate::cli::InspectArgs;
use crate::commands::inspect::data::Load;
use crate::commands::prepare;
use crate::failure::Failure;
use crate::model_dir::{Held, Model};
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    path: String,
    family: String,
    parameters: ParameterCounts,
    layers: Vec<Layer>,
    tensors: Vec<Tensor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<Vec<Load>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    specialisation: Option<Vec<ProbeRow>>,
}

#[derive(Serialize)]
struct Layer {
    layer: usize,
    /// `dense`, `sparse`, or the kind of a soft layer.
    kind: &'static str,
    experts: usize,
    top_k: usize,
    d_expert: usize,
    d_shared: usize,
    d_dense: usize,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    values: usize,
    rms: f64,
}

/// Inspects.
pub fn run(args: &InspectArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.threads)?;
    if args.data.is_none() && (args.windows.context.is_some() || args.windows.text_field.is_some()) {
        return Err(Failure::usage("--context and --text-field say how data is read; they need --data"));
    }
    let model = Model::load(&args.model, Held::Parameters, output)?;
    let config = &model.loaded.config;
    let parameters = config.parameter_counts().map_err(|e| Failure::running(e.to_string()))?;
    let layer = |layer: usize| {
        let mut found = Layer { layer, kind: "dense", experts: 0, top_k: 0, d_expert: 0, d_shared: 0, d_dense: 0 };
        match (config.layer_ffn(layer), &config.moe) {
            (Ok(LayerFfn::Moe { experts, d_expert, d_shared }), Some(moe)) => {
                found.kind = moe.soft.map_or("sparse", |soft| soft.kind());
                (found.experts, found.top_k, found.d_expert, found.d_shared) = (experts, moe.top_k, d_expert, d_shared);
            }
            (Ok(LayerFfn::Dense { d_dense }), _) => found.d_dense = d_dense,
            _ => {}
        }
        found
    };
    let mut tensors = Vec::new();
    model.decoder().for_each_parameter(|info, values| {
        let squares: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let rms = (squares / values.len().max(1) as f64).sqrt();
        tensors.push(Tensor { name: info.name.clone(), shape: info.shape.clone(), values: values.len(), rms });
    });
    let document = Document {
        path: model.path.display().to_string(),
        family: model.loaded.family.to_string(),
        parameters,
        layers: (0..config.layers).map(layer).collect(),
        tensors,
        load: args.data.as_ref().map(|file| data::load(&model, file.as_deref(), &args.windows)).transpose()?,
        specialisation: match &args.data {
            Some(_) => data::specialisation(&model)?,
            None => None,
        },
    };
    Ok(output.result(&document, || text(&document))?)
}

fn text(document: &Document) -> String {
    let ParameterCounts { total, active, .. } = document.parameters;
    let mut text = format!(
        "{}: {} layout, {} parameters, {} active per token\n\n",
        document.path,
        document.family,
        grouped(total as u64),
        grouped(active as u64)
    );
    let mut layers = Table::new(["layer", "kind", "experts", "top k", "expert width", "shared width", "dense width"]);
    for Layer { layer, kind, experts, top_k, d_expert, d_shared, d_dense } in &document.layers {
        let sizes = [experts, top_k, d_expert, d_shared, d_dense].map(usize::to_string);
        layers.row([layer.to_string(), kind.to_string()].into_iter().chain(sizes));
    }
    text.push_str(&format!("{layers}\n"));
    let mut tensors = Table::new(["tensor", "shape", "values", "rms"]);
    for tensor in &document.tensors {
        let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
        tensors.row([tensor.name.clone(), shape, grouped(tensor.values as u64), format!("{:.4}", tensor.rms)]);
    }
    text.push_str(&tensors.to_string());
    if let Some(load) = &document.load {
        text.push_str(&data::text(load, document.specialisation.as_deref()));
    }
    text
}
