//! Every layer on a second Burn backend, NdArray, against Flex. Needs the feature `ndarray`, which only tests turn on:
//! `cargo test --workspace --features mixtura-nn/ndarray --test second_backend`.

mod common;
#[path = "common/elsewhere.rs"]
mod elsewhere;

use burn::tensor::{DType, Device};
use elsewhere::Place;

#[expect(deprecated, reason = "until Burn removes it, the one other backend that needs no device")]
fn place() -> Place {
    Place { device: Device::ndarray(), dtype: DType::F32 }
}

#[test]
fn every_router_trains_on_ndarray_as_on_flex() {
    elsewhere::check_routers(&place());
}

#[test]
fn burns_optimizer_trains_a_layer_on_ndarray_as_on_flex() {
    elsewhere::check_burns_optimizer(&place());
}

#[test]
fn every_soft_layer_trains_on_ndarray_as_on_flex() {
    elsewhere::check_soft_layers(&place());
}

#[test]
fn every_decoder_takes_a_step_on_ndarray_as_on_flex() {
    elsewhere::check_decoders(&place());
}

#[test]
fn every_decoder_saves_loads_and_decodes_on_ndarray_as_on_flex() {
    elsewhere::check_decoding(&place());
}
