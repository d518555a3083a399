//! By which way this CPU computes the matrix products of a precision, and why.
//!
//! A [`Precision`] promises what is rounded and in which order sums are made. A [`Way`] is the instructions that keep the promise. Ways
//! differ in speed by up to four between CPUs of one instruction set: `VDPBF16PS` does two products per lane, at the rate of an FMA on
//! some CPUs and at half of it or less on others. So the way is chosen from what the CPU is:
//!
//! | precision | AMX | `VDPBF16PS` | FMA |
//! | --- | --- | --- | --- |
//! | `f32` | – | – | one chain per sum |
//! | `bf16` | tiles | two chains per 32 k, the other half of each pair zeroed: half the rate of the instruction | two chains per 32 k |
//! | `bf16-native` | tiles | one chain, the odd k of each pair first | the same chain, operand by operand |
//!
//! The choice cannot change a bit of `f32` or `bf16`. In `bf16-native` FMAs and `VDPBF16PS` give the same bits, and tiles those of
//! `bf16`: only whether a machine has AMX decides. A run writes down which way it began with and [`Choice::like`] goes on in the same order
//! anywhere, so no run changes its sums on the way.
//!
//! `MIXTURA_WAY=fma|vdpbf16ps|amx` forces a way, [`Isa::current`] limits them.

use crate::isa::Isa;
use crate::precision::Precision;
use crate::roofline;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// Instructions that compute bf16 products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// FMAs on operands widened to f32: AVX-512, AVX2, or plain code.
    Fma,
    /// `VDPBF16PS` on 512-bit vectors.
    Vdpbf16ps,
    /// AMX tiles.
    Amx,
}

impl Way {
    /// Every way, the most general first.
    pub const ALL: [Way; 3] = [Way::Fma, Way::Vdpbf16ps, Way::Amx];

    /// The name `MIXTURA_WAY` and run configs use.
    pub fn name(self) -> &'static str {
        match self {
            Way::Fma => "fma",
            Way::Vdpbf16ps => "vdpbf16ps",
            Way::Amx => "amx",
        }
    }

    /// The instruction set that computes this way, if `isa` includes it: kernels take the way as their instruction set.
    pub fn on(self, isa: Isa) -> Option<Isa> {
        match self {
            Way::Fma => Some(isa.min(Isa::Avx512)),
            Way::Vdpbf16ps => (isa >= Isa::Avx512Bf16).then_some(Isa::Avx512Bf16),
            Way::Amx => (isa >= Isa::Amx).then_some(Isa::Amx),
        }
    }

    /// The way that kernels take for `precision` when `isa` is what they are given: the inverse of [`Way::on`].
    pub fn of(isa: Isa, precision: Precision) -> Way {
        match isa {
            Isa::Amx if precision.is_bf16() => Way::Amx,
            Isa::Avx512Bf16 if precision.is_bf16() => Way::Vdpbf16ps,
            _ => Way::Fma,
        }
    }

    /// The ways that `isa` includes.
    pub fn available(isa: Isa) -> Vec<Way> {
        Way::ALL.into_iter().filter(|way| way.on(isa).is_some()).collect()
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text that named no way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWay(pub String);

impl fmt::Display for UnknownWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a way to compute bf16 products; use fma, vdpbf16ps or amx", self.0)
    }
}

impl std::error::Error for UnknownWay {}

impl FromStr for Way {
    type Err = UnknownWay;

    fn from_str(name: &str) -> Result<Way, UnknownWay> {
        let same = |way: &Way| way.name().eq_ignore_ascii_case(name);
        Way::ALL.into_iter().find(same).ok_or_else(|| UnknownWay(name.to_string()))
    }
}

/// Why `MIXTURA_WAY` cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WayError {
    /// Not a name of a way.
    Unknown(UnknownWay),
    /// A way that the instruction set in use lacks.
    Unavailable {
        /// What was asked for.
        asked: Way,
        /// The instruction set in use.
        isa: Isa,
    },
}

impl fmt::Display for WayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WayError::Unknown(unknown) => write!(f, "MIXTURA_WAY: {unknown}"),
            WayError::Unavailable { asked, isa } => {
                let names: Vec<&str> = Way::available(*isa).into_iter().map(Way::name).collect();
                write!(
                    f,
                    "MIXTURA_WAY={asked}: the instruction set in use ({isa}) has no {asked}; it has {}",
                    names.join(", ")
                )
            }
        }
    }
}

impl std::error::Error for WayError {}

/// A way, and why it was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The way.
    pub way: Way,
    /// What kernels are given as their instruction set, so that they take this way.
    pub isa: Isa,
    /// A clause that follows "FMA, because".
    pub reason: String,
}

impl Choice {
    /// The way of this process for a precision. Decided once.
    ///
    /// # Panics
    /// With the text of the error if `MIXTURA_ISA` or `MIXTURA_WAY` cannot be followed; a program that wants to report that itself calls
    /// [`Isa::try_current`] and [`forced`] first.
    pub fn of(precision: Precision) -> Choice {
        static CHOICES: OnceLock<[Choice; 3]> = OnceLock::new();
        let all = CHOICES.get_or_init(|| {
            let forced = forced().unwrap_or_else(|error| panic!("{error}"));
            let (isa, speed) = (Isa::current(), dot_speed(Isa::current()));
            [Precision::F32, Precision::Bf16, Precision::Bf16Native].map(|p| choose(p, isa, forced, &speed))
        });
        all[precision as usize].clone()
    }

    /// The precision and way that give the bits of a run in `precision` that began with `began`, the fastest here; and, where this
    /// machine would not have chosen so itself, a sentence about it.
    ///
    /// A run that began on tiles is `bf16`, which every way computes; one that began on FMAs or `VDPBF16PS` goes on with either, not on
    /// tiles. `None`: a run from before ways were written down, which takes what [`Choice::of`] says.
    pub fn like(precision: Precision, began: Option<Way>) -> (Precision, Choice, Option<String>) {
        let own = Choice::of(precision);
        let (Precision::Bf16Native, Some(began)) = (precision, began) else { return (precision, own, None) };
        let tiles = |way: Way| way == Way::Amx;
        if tiles(began) == tiles(own.way) {
            return (precision, own, None);
        }
        if tiles(began) {
            let choice = Choice::of(Precision::Bf16);
            let note = format!(
                "this run sums as AMX tiles do, and there are none here: the same order is computed by {} (precision bf16)",
                choice.way
            );
            return (Precision::Bf16, choice, Some(note));
        }
        let isa = Isa::current().min(Isa::Avx512Bf16);
        let choice = choose(precision, isa, None, &dot_speed(isa));
        let note = format!(
            "this run began without AMX and keeps the order of its sums: computed by {}, not on tiles",
            choice.way
        );
        (precision, choice, Some(note))
    }
}

/// The precision that trains fastest on this machine, and why: what `precision = "auto"` means.
///
/// bf16 is worth its rounding where the products have instructions of their own. Multiplied by FMAs it runs at the rate of f32.
pub fn fastest() -> (Precision, String) {
    let native = Choice::of(Precision::Bf16Native);
    match native.way {
        Way::Fma => (Precision::F32, format!("bf16 products would be FMAs like those of f32 ({})", native.reason)),
        way => (Precision::Bf16Native, format!("its products have their own instructions, {way}: {}", native.reason)),
    }
}

/// What `MIXTURA_WAY` asks for: `None` if it is unset or empty.
pub fn forced() -> Result<Option<Way>, WayError> {
    match std::env::var("MIXTURA_WAY") {
        Ok(name) if !name.is_empty() => {
            let asked: Way = name.parse().map_err(WayError::Unknown)?;
            let isa = Isa::current();
            asked.on(isa).map(|_| Some(asked)).ok_or(WayError::Unavailable { asked, isa })
        }
        _ => Ok(None),
    }
}

/// `VDPBF16PS` must do this many times the operations of FMAs to be taken for `bf16-native` on a CPU that is in no table: the figure is
/// measured in the run, on a machine that may be busy.
const MARGIN: f64 = 1.5;
/// In the order of the tiles half of what `VDPBF16PS` multiplies is zeros, and FMAs reach nine tenths of their rate.
const MARGIN_EXACT: f64 = 1.8;

fn choose(precision: Precision, isa: Isa, forced: Option<Way>, speed: &DotSpeed) -> Choice {
    let take = |way: Way, reason: String| Choice { way, isa: way.on(isa).unwrap_or(isa), reason };
    if precision == Precision::F32 {
        return Choice { way: Way::Fma, isa, reason: "f32 has no other".into() };
    }
    if let Some(way) = forced.filter(|way| way.on(isa).is_some()) {
        return take(way, "MIXTURA_WAY asks for it".into());
    }
    if isa == Isa::Amx {
        return take(Way::Amx, "the CPU has tiles".into());
    }
    if isa < Isa::Avx512Bf16 {
        return take(Way::Fma, format!("{isa} has no VDPBF16PS"));
    }
    let margin = if precision == Precision::Bf16Native { MARGIN } else { MARGIN_EXACT };
    let way = if speed.ratio >= margin && speed.same_bits { Way::Vdpbf16ps } else { Way::Fma };
    take(way, speed.to_string())
}

/// How `VDPBF16PS` compares with FMAs.
#[derive(Clone, Debug, PartialEq)]
struct DotSpeed {
    /// Its operations per second over those of f32 FMAs, two for each of its products.
    ratio: f64,
    /// Whether it is two FMAs with denormals flushed, bit for bit.
    same_bits: bool,
    /// Where the ratio comes from.
    source: &'static str,
}

impl fmt::Display for DotSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VDPBF16PS runs at {:.1}x the rate of FMAs here ({})", self.ratio, self.source)?;
        if !self.same_bits {
            f.write_str(" and rounds otherwise")?;
        }
        Ok(())
    }
}

/// A kind of CPU whose ratio is known from a quiet machine.
struct Known {
    vendor: &'static str,
    family: u32,
    models: std::ops::RangeInclusive<u32>,
    ratio: f64,
    source: &'static str,
}

/// Zen 5: 903 GFLOP/s of `vdpbf16ps` to 475 of FMAs on two cores of an EPYC. Emerald Rapids with AMX hidden: 164 to 173 to 325 to 349;
/// Sapphire Rapids (0x8f) has the same cores. Zen 4, Cooper Lake and Granite Rapids have not been met: they are measured when met.
const KNOWN: [Known; 3] = [
    Known { vendor: "AuthenticAMD", family: 0x1a, models: 0..=0xff, ratio: 1.9, source: "measured on Zen 5" },
    Known { vendor: "GenuineIntel", family: 6, models: 0xcf..=0xcf, ratio: 0.5, source: "measured on Emerald Rapids" },
    Known { vendor: "GenuineIntel", family: 6, models: 0x8f..=0x8f, ratio: 0.5, source: "the cores of Emerald Rapids" },
];

/// From the table if this CPU is in it, else measured now: some milliseconds, on machines with the instruction only.
fn dot_speed(isa: Isa) -> DotSpeed {
    static SPEED: OnceLock<DotSpeed> = OnceLock::new();
    if isa < Isa::Avx512Bf16 {
        return DotSpeed { ratio: 0.0, same_bits: false, source: "there is none" };
    }
    SPEED
        .get_or_init(|| {
            let same_bits = roofline::dot_is_two_fmas();
            match cpu().and_then(|cpu| known(&cpu)) {
                Some(known) => DotSpeed { ratio: known.ratio, same_bits, source: known.source },
                None => DotSpeed { ratio: roofline::dot_over_fma(), same_bits, source: "measured at the start" },
            }
        })
        .clone()
}

fn known(cpu: &Cpu) -> Option<&'static Known> {
    KNOWN.iter().find(|k| k.vendor == cpu.vendor && k.family == cpu.family && k.models.contains(&cpu.model))
}

/// What CPUID says the CPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// "AuthenticAMD", "GenuineIntel", ...
    pub vendor: String,
    /// Base and extended family, added as the manuals say.
    pub family: u32,
    /// Base and extended model.
    pub model: u32,
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} family {:#x} model {:#x}", self.vendor, self.family, self.model)
    }
}

/// This CPU; `None` where there is no CPUID.
#[cfg(target_arch = "x86_64")]
pub fn cpu() -> Option<Cpu> {
    use std::arch::x86_64::__cpuid;
    let leaf = __cpuid(0);
    let letters: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    let (family, model) = family_and_model(__cpuid(1).eax);
    Some(Cpu { vendor: String::from_utf8_lossy(&letters).into_owned(), family, model })
}

/// This CPU; `None` where there is no CPUID.
#[cfg(not(target_arch = "x86_64"))]
pub fn cpu() -> Option<Cpu> {
    None
}

/// From the signature in leaf 1: the extended family counts where the base is 15, the extended model where it is 6 or 15.
#[cfg(any(test, target_arch = "x86_64"))]
fn family_and_model(signature: u32) -> (u32, u32) {
    let bits = |from: u32, count: u32| (signature >> from) & ((1 << count) - 1);
    let (family, model) = (bits(8, 4), bits(4, 4));
    let extended = if family == 6 || family == 15 { bits(16, 4) << 4 } else { 0 };
    (if family == 15 { family + bits(20, 8) } else { family }, extended | model)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(ratio: f64) -> DotSpeed {
        DotSpeed { ratio, same_bits: true, source: "measured in a test" }
    }

    fn way(precision: Precision, isa: Isa, ratio: f64) -> Way {
        choose(precision, isa, None, &speed(ratio)).way
    }

    #[test]
    fn every_way_is_chosen_where_it_is_fastest() {
        use Precision::{Bf16, Bf16Native, F32};
        for precision in [Bf16, Bf16Native] {
            assert_eq!(way(precision, Isa::Amx, 0.5), Way::Amx);
            assert_eq!(way(precision, Isa::Avx512Bf16, 1.9), Way::Vdpbf16ps, "Zen 5");
            assert_eq!(way(precision, Isa::Avx512Bf16, 0.5), Way::Fma, "Emerald Rapids with AMX hidden");
            assert_eq!(way(precision, Isa::Avx2, 0.0), Way::Fma);
        }
        // Masked, the instruction does half of this.
        assert_eq!(
            (way(Bf16, Isa::Avx512Bf16, 1.6), way(Bf16Native, Isa::Avx512Bf16, 1.6)),
            (Way::Fma, Way::Vdpbf16ps)
        );
        assert_eq!(choose(F32, Isa::Amx, Some(Way::Amx), &speed(2.0)).isa, Isa::Amx);
    }

    #[test]
    fn an_instruction_that_rounds_otherwise_is_not_taken() {
        let other = DotSpeed { same_bits: false, ..speed(2.0) };
        let choice = choose(Precision::Bf16Native, Isa::Avx512Bf16, None, &other);
        assert!(choice.way == Way::Fma && choice.reason.contains("rounds otherwise"), "{choice:?}");
    }

    #[test]
    fn a_way_is_forced_where_the_instruction_set_has_it() {
        for forced in Way::ALL {
            let choice = choose(Precision::Bf16Native, Isa::Amx, Some(forced), &speed(0.5));
            assert_eq!((choice.way, Some(choice.isa)), (forced, forced.on(Isa::Amx)));
            assert!(choice.reason.contains("MIXTURA_WAY"));
        }
        assert_eq!(Way::available(Isa::Avx2), [Way::Fma]);
        for way in Way::available(Isa::Amx) {
            assert_eq!(way.on(Isa::Amx).map(|isa| Way::of(isa, Precision::Bf16)), Some(way));
        }
        assert_eq!(Way::Fma.on(Isa::Avx512Bf16), Some(Isa::Avx512));
    }

    #[test]
    fn the_reason_names_the_ratio_and_its_source() {
        let emerald = Cpu { vendor: "GenuineIntel".into(), family: 6, model: 0xcf };
        let known = known(&emerald).unwrap();
        let speed = DotSpeed { ratio: known.ratio, same_bits: true, source: known.source };
        let choice = choose(Precision::Bf16Native, Isa::Avx512Bf16, None, &speed);
        assert_eq!(choice.way, Way::Fma);
        assert_eq!(choice.reason, "VDPBF16PS runs at 0.5x the rate of FMAs here (measured on Emerald Rapids)");
        assert!(super::known(&Cpu { model: 0x6a, ..emerald }).is_none());
    }

    #[test]
    fn signatures_are_read_as_the_manuals_say() {
        // EPYC 7003, Xeon Emerald Rapids, EPYC 9005.
        assert_eq!(family_and_model(0x00a0_0f11), (0x19, 0x01));
        assert_eq!(family_and_model(0x000c_06f2), (0x06, 0xcf));
        assert_eq!(family_and_model(0x00b0_0f21), (0x1a, 0x02));
    }

    #[test]
    fn names_parse_back_and_others_are_refused() {
        for way in Way::ALL {
            assert_eq!(way.name().parse(), Ok(way));
        }
        assert!("gpu".parse::<Way>().unwrap_err().to_string().contains("vdpbf16ps"));
    }

    #[test]
    fn a_run_goes_on_in_the_order_it_began_with() {
        for began in Way::ALL.into_iter().map(Some).chain([None]) {
            let (precision, choice, note) = Choice::like(Precision::Bf16Native, began);
            let on_tiles = precision == Precision::Bf16 || choice.way == Way::Amx;
            if let Some(began) = began {
                assert_eq!(on_tiles, began == Way::Amx, "{began}: {precision} by {}", choice.way);
                let own = Choice::of(Precision::Bf16Native).way;
                assert_eq!(note.is_some(), (began == Way::Amx) != (own == Way::Amx));
            }
        }
        assert_eq!(Choice::like(Precision::F32, Some(Way::Amx)).0, Precision::F32);
    }
}
