//! bf16 as plain `u16`: the upper half of an f32, rounded to nearest even. NaNs stay NaNs (quiet), infinities stay infinities,
//! denormal bf16 values are kept here and flushed by the matrix products.

/// Rounds to the nearest bf16, ties to even.
#[inline(always)]
pub fn from_f32(x: f32) -> u16 {
    (rounded_bits(x) >> 16) as u16
}

/// The f32 bits of the nearest bf16: the bf16 in the upper half, zeros below.
#[inline(always)]
pub(crate) fn rounded_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    let quiet_nan = (bits | 0x40_0000) & 0xffff_0000;
    if (bits & 0x7fff_ffff) > 0x7f80_0000 { quiet_nan } else { rounded }
}

/// The f32 of the same value.
#[inline(always)]
pub fn to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Rounds to bf16 and back.
#[inline(always)]
pub fn round(x: f32) -> f32 {
    to_f32(from_f32(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_even_and_specials_survive() {
        assert_eq!(from_f32(1.0), 0x3f80);
        assert_eq!(from_f32(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(from_f32(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(from_f32(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert_eq!(from_f32(f32::INFINITY), 0x7f80);
        assert_eq!(from_f32(f32::MAX), 0x7f80);
        assert!(to_f32(from_f32(f32::from_bits(0x7f80_0001))).is_nan());
        for half in (0..=u16::MAX).filter(|&half| !to_f32(half).is_nan()) {
            assert_eq!(from_f32(to_f32(half)), half);
        }
    }
}
