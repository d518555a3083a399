//! f32 products with a B that is held in bf16: what an inference of bf16 weights in precision f32 multiplies.
//!
//! The weights are half as long in memory as in f32, and a bf16 widens to f32 without rounding; so a product is that of f32 with the
//! widened weights, bit for bit: A is not rounded, an output is one chain of FMAs over exactly K, and denormals are what they are.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::fma;
use super::{Mode, Operand, Panel, scalar};
use crate::isa::Isa;
use crate::lanes::Lanes;
use crate::workspace::Workspace;
use bytemuck::{Pod, Zeroable};

/// An f32 that is multiplied with bf16s.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct Wide(pub(crate) f32);

impl Operand for Wide {
    type B = u16;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn from_f32(x: f32) -> Wide {
        Wide(x)
    }

    fn convert(_isa: Isa, source: &[f32], out: &mut [Wide]) {
        out.copy_from_slice(bytemuck::cast_slice(source));
    }

    fn convert_all<'a>(_isa: Isa, source: &'a [f32], _room: &'a mut Workspace<Wide>) -> &'a [Wide] {
        bytemuck::cast_slice(source)
    }

    #[inline(always)]
    fn store_lanes<L: Lanes>(lanes: L, out: &mut [Wide]) {
        f32::store_lanes(lanes, bytemuck::cast_slice_mut(out));
    }

    #[inline(always)]
    fn load_lanes<L: Lanes>(source: &[Wide]) -> L {
        f32::load_lanes(bytemuck::cast_slice(source))
    }

    fn widen(_isa: Isa, source: &[Wide], out: &mut [f32]) {
        out.copy_from_slice(bytemuck::cast_slice(source));
    }

    unsafe fn panel(mode: Mode, panel: Panel<Wide>) {
        // SAFETY: the caller's promises are those of the callees; `mode_for` checked that the machine has the ISA.
        unsafe {
            match mode.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => fma::avx512_wide(panel),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => fma::avx2_wide(panel),
                _ => scalar::panel_wide(panel),
            }
        }
    }
}
