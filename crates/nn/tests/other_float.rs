//! Layers whose tensors are not f32: a module cast to f64 on Flex runs the portable twins, as it would on another backend.

mod common;
#[path = "common/elsewhere.rs"]
mod elsewhere;

use burn::tensor::{DType, Device};
use elsewhere::Place;

fn place() -> Place {
    Place { device: Device::flex(), dtype: DType::F64 }
}

#[test]
fn every_router_trains_in_f64_as_in_f32() {
    elsewhere::check_routers(&place());
}

#[test]
fn burns_optimizer_trains_a_layer_in_f64_as_in_f32() {
    elsewhere::check_burns_optimizer(&place());
}

#[test]
fn every_soft_layer_trains_in_f64_as_in_f32() {
    elsewhere::check_soft_layers(&place());
}

#[test]
fn every_decoder_takes_a_step_in_f64_as_in_f32() {
    elsewhere::check_decoders(&place());
}

#[test]
fn every_decoder_decodes_in_f64_as_in_f32() {
    elsewhere::check_decoding(&place());
}
