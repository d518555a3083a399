//! Parameters by name: `layers.0.attention.qkv`, `layers.0.moe.experts.gate_up`, `embed.weight`, ...
//!
//! Names come from Burn's own walk over a module, so a parameter cannot be forgotten here. The walk's order is the order
//! of every list in this file. Weights are lent as slices; an update happens in place when nothing else holds the tensor.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor, TensorData};
use mixtura_ops::{PackCell, PackRoom, with_slice, with_slice_mut};
use mixtura_routing::names::nearest;

use crate::error::LoadError;
use crate::role::{Role, Roles};

/// What is known about a parameter without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterInfo {
    /// Dotted path from the root of the model.
    pub name: String,
    /// Sizes, weights as `[in, out]`, experts as `[E, in, out]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

impl ParameterInfo {
    /// Whether weight decay applies, which follows from the role.
    pub fn decays(&self) -> bool {
        self.role.decays()
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A model whose parameters can be listed, read, loaded and updated by name.
///
/// Implemented for the modules of this crate; `hollow` gives a cheap stand-in while the parameters are away.
pub trait NamedParameters: Module {
    /// A value of the same type without the weights, put in place of `self` while its parameters are being mapped.
    fn hollow(&self) -> Self;

    /// Lends the cell of every packed weight.
    fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell));

    /// Drops every packed copy of a weight, so that the weights can be changed in place.
    fn clear_packs(&self) {
        self.for_each_cell(&mut PackCell::clear);
    }

    /// Packs weights in `room` for each use instead of keeping the packs: less memory where a weight changes as often as it is used,
    /// as in training without accumulation. Changes no bit.
    fn share_packs(&self, room: &PackRoom) {
        self.for_each_cell(&mut |cell| cell.share(room));
    }

    /// Keeps packs until their weight changes, as a new model does: faster where weights are used many times, as in generation.
    fn keep_packs(&self) {
        self.for_each_cell(&mut PackCell::keep);
    }

    /// What every parameter is for. A module made of others passes theirs on ([`Roles::with`]) and says what its own are for; a
    /// parameter that it says nothing about is an error of its author, and listing the parameters panics with its name.
    fn roles(&self) -> Roles;

    /// Every parameter, in order; no value is read or drawn.
    fn parameter_infos(&self) -> Vec<ParameterInfo> {
        let mut infos = Vec::new();
        self.visit(&mut Visit::new(self.roles(), |info: ParameterInfo, _: &dyn Fn() -> Flat| infos.push(info)));
        infos
    }

    /// Whether weights are held packed only, so that there are no values of them to lend.
    fn is_sealed(&self) -> bool {
        let mut sealed = false;
        self.for_each_cell(&mut |cell| sealed |= cell.is_sealed());
        sealed
    }

    /// Lends every parameter in order: `f(info, values)`.
    ///
    /// # Panics
    /// If the model is sealed.
    fn for_each_parameter(&self, mut f: impl FnMut(&ParameterInfo, &[f32]))
    where
        Self: Sized,
    {
        assert!(!self.is_sealed(), "the weights of a sealed model are packed: there are no values to lend");
        self.visit(&mut Visit::new(self.roles(), |info: ParameterInfo, flat: &dyn Fn() -> Flat| {
            with_slice(&flat().value, |values| f(&info, values));
        }));
    }

    /// Lends every parameter in order for an update in place: `f(index, info, values)`.
    ///
    /// # Panics
    /// If the model is sealed.
    fn for_each_parameter_mut(&mut self, mut f: impl FnMut(usize, &ParameterInfo, &mut [f32]))
    where
        Self: Sized,
    {
        assert!(!self.is_sealed(), "the weights of a sealed model are packed: there are no values to update");
        self.clear_packs();
        let roles = self.roles();
        let whole = std::mem::replace(self, self.hollow());
        let mut index = 0;
        *self = whole.map(&mut Map::new(roles, |info: &ParameterInfo, values: &mut [f32]| {
            f(index, info, values);
            index += 1;
        }));
    }

    /// Takes this model's gradients out of `gradients`, flat and in parameter order; `None` where a parameter had no part
    /// in the loss. Nothing else holds them then, so they can be scaled and summed in place.
    fn take_gradients(&self, gradients: &mut Gradients) -> Vec<Option<Tensor<1>>>
    where
        Self: Sized,
    {
        let mut taken = Vec::new();
        self.visit(&mut TakeGradients { gradients, taken: &mut taken });
        taken
    }

    /// Replaces every parameter. `source` yields (name, shape, values); it must hold exactly the parameters of this model.
    /// On an error nothing has changed.
    fn load_named<'a>(
        &mut self,
        source: impl IntoIterator<Item = (String, Vec<usize>, std::borrow::Cow<'a, [f32]>)>,
    ) -> Result<(), LoadError>
    where
        Self: Sized,
    {
        let infos = self.parameter_infos();
        let shapes: BTreeMap<&str, &[usize]> = infos.iter().map(|i| (i.name.as_str(), i.shape.as_slice())).collect();
        let mut values = BTreeMap::new();
        for (name, found, data) in source {
            let Some(&expected) = shapes.get(name.as_str()) else {
                let nearest = nearest(&name, infos.iter().map(|info| info.name.as_str())).map(str::to_string);
                return Err(LoadError::Unknown { nearest, name });
            };
            if expected != found || data.len() != found.iter().product::<usize>() {
                return Err(LoadError::Shape { name, expected: expected.to_vec(), found });
            }
            if values.insert(name.clone(), data.into_owned()).is_some() {
                return Err(LoadError::Twice { name });
            }
        }
        if let Some(info) = infos.iter().find(|info| !values.contains_key(&info.name)) {
            return Err(LoadError::Missing { name: info.name.clone(), shape: info.shape.clone() });
        }
        self.clear_packs();
        let whole = std::mem::replace(self, self.hollow());
        *self = whole.map(&mut Replace::of(values));
        Ok(())
    }
}

/// The place in a module tree. An enum's variant replaces the name of the field that holds it.
#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        if container.starts_with("Enum") {
            self.0.pop();
        }
        self.0.push(if container.starts_with("Enum") { name.to_lowercase() } else { name.to_string() });
    }

    /// The name that an enum's variant replaced is not restored: its own exit comes next.
    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum") {
            self.0.pop();
        }
    }

    fn name(&self) -> String {
        self.0.join(".")
    }

    fn info(&self, roles: &Roles, shape: Vec<usize>) -> ParameterInfo {
        let name = self.name();
        let role = roles.of(&name).unwrap_or_else(|| {
            panic!(
                "nothing says what the parameter {name}, of shape {shape:?}, is for: add it to NamedParameters::roles"
            )
        });
        ParameterInfo { name, shape, role }
    }
}

/// A parameter as one row of values, sharing the parameter's storage.
struct Flat {
    value: Tensor<1>,
}

struct Visit<F> {
    path: Path,
    roles: Roles,
    f: F,
}

impl<F: FnMut(ParameterInfo, &dyn Fn() -> Flat)> Visit<F> {
    fn new(roles: Roles, f: F) -> Self {
        Self { path: Path::default(), roles, f }
    }
}

impl<F: FnMut(ParameterInfo, &dyn Fn() -> Flat)> ModuleVisitor for Visit<F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let shape = param.lazy_shape().to_vec();
        let flat = || Flat { value: flat(param.val().inner()) };
        (self.f)(self.path.info(&self.roles, shape), &flat);
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let values = tensor.shape().num_elements();
    tensor.reshape([values])
}

struct Map<F> {
    path: Path,
    roles: Roles,
    f: F,
}

impl<F: FnMut(&ParameterInfo, &mut [f32])> Map<F> {
    fn new(roles: Roles, f: F) -> Self {
        Self { path: Path::default(), roles, f }
    }
}

impl<F: FnMut(&ParameterInfo, &mut [f32])> ModuleMapper for Map<F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let info = self.path.info(&self.roles, tensor.dims().to_vec());
        let tensor = with_slice_mut(tensor, |values| (self.f)(&info, values));
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// Gives parameters new values, by name; those that are not named stay.
pub(crate) struct Replace {
    path: Path,
    values: BTreeMap<String, Vec<f32>>,
}

impl Replace {
    pub(crate) fn of(values: BTreeMap<String, Vec<f32>>) -> Self {
        Self { path: Path::default(), values }
    }
}

impl ModuleMapper for Replace {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (shape, device) = (param.lazy_shape(), param.lazy_device());
        let Some(values) = self.values.remove(&self.path.name()) else { return param };
        let tensor = Tensor::from_data(TensorData::new(values, shape), &device);
        let id = param.id;
        param.transform_for_load(tensor, id)
    }
}

struct TakeGradients<'a> {
    gradients: &'a mut Gradients,
    taken: &'a mut Vec<Option<Tensor<1>>>,
}

impl ModuleVisitor for TakeGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.taken.push(param.val().grad_remove(self.gradients).map(flat));
    }
}
