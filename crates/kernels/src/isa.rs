//! Which instruction set the kernels run on: found once at run time, or forced by `MIXTURA_ISA`.
//!
//! A plain build carries every path; the choice is made on the machine that runs it. In the `f32` and `bf16` precisions the choice
//! changes the speed and never the bits.
#![allow(unsafe_code)]

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// An instruction set a kernel can be asked to use, slowest first. Kernels take it as their first argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust; runs anywhere.
    Scalar,
    /// AVX2 with FMA: 8 lanes.
    Avx2,
    /// AVX-512 (F, BW, DQ, VL): 16 lanes.
    Avx512,
    /// AVX-512 with `vdpbf16ps`.
    Avx512Bf16,
    /// AVX-512 with `vdpbf16ps`, and AMX bf16 tiles for the matrix products.
    Amx,
}

/// Why the instruction set asked for in `MIXTURA_ISA` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IsaError {
    /// Not a name of an instruction set.
    Unknown(String),
    /// A known instruction set that this machine lacks.
    Unavailable {
        /// What was asked for.
        asked: Isa,
        /// What this machine has.
        available: Vec<Isa>,
    },
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IsaError::Unknown(name) => {
                write!(f, "MIXTURA_ISA={name:?} is not an instruction set; use scalar, avx2, avx512, avx512bf16 or amx")
            }
            IsaError::Unavailable { asked, available } => {
                let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
                write!(f, "MIXTURA_ISA={asked}: this machine has no {asked}; it has {}", names.join(", "))
            }
        }
    }
}

impl std::error::Error for IsaError {}

impl Isa {
    /// The instruction set of this process: `MIXTURA_ISA` if set, else the fastest one available. Decided once.
    ///
    /// # Panics
    /// With the text of [`IsaError`] if `MIXTURA_ISA` names something this machine cannot run; a program that wants to report that
    /// itself calls [`Isa::try_current`] first.
    pub fn current() -> Isa {
        match Isa::try_current() {
            Ok(isa) => isa,
            Err(error) => panic!("{error}"),
        }
    }

    /// Like [`Isa::current`], with the error as a value.
    pub fn try_current() -> Result<Isa, IsaError> {
        static CURRENT: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        CURRENT
            .get_or_init(|| match std::env::var("MIXTURA_ISA") {
                Ok(name) if !name.is_empty() => {
                    let asked: Isa = name.parse()?;
                    let available = Isa::available();
                    if available.contains(&asked) { Ok(asked) } else { Err(IsaError::Unavailable { asked, available }) }
                }
                _ => Ok(*Isa::available().last().unwrap_or(&Isa::Scalar)),
            })
            .clone()
    }

    /// Every instruction set this machine can run, slowest first; never empty.
    pub fn available() -> Vec<Isa> {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(detect).clone()
    }

    /// The name `MIXTURA_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }

    /// Whether 512-bit vectors may be used.
    pub fn has_avx512(self) -> bool {
        self >= Isa::Avx512
    }

    /// Whether 256-bit vectors and FMA may be used.
    pub fn has_avx2(self) -> bool {
        self >= Isa::Avx2
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Isa, IsaError> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx]
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| IsaError::Unknown(name.to_string()))
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    let mut found = vec![Isa::Scalar];
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return found;
    }
    found.push(Isa::Avx2);
    if !["avx512f", "avx512bw", "avx512dq", "avx512vl"].iter().all(|&name| avx512_feature(name)) {
        return found;
    }
    found.push(Isa::Avx512);
    if !is_x86_feature_detected!("avx512bf16") {
        return found;
    }
    found.push(Isa::Avx512Bf16);
    if amx_usable() {
        found.push(Isa::Amx);
    }
    found
}

#[cfg(target_arch = "x86_64")]
fn avx512_feature(name: &str) -> bool {
    match name {
        "avx512f" => is_x86_feature_detected!("avx512f"),
        "avx512bw" => is_x86_feature_detected!("avx512bw"),
        "avx512dq" => is_x86_feature_detected!("avx512dq"),
        _ => is_x86_feature_detected!("avx512vl"),
    }
}

/// CPUID says AMX-TILE and AMX-BF16, and the kernel grants this process the tile state.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_usable() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    if std::arch::x86_64::__cpuid(0).eax < 7 {
        return false;
    }
    let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
    if edx & AMX_BF16 == 0 || edx & AMX_TILE == 0 {
        return false;
    }
    // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM, 18) only asks for permission to use tile registers; it touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_usable() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    vec![Isa::Scalar]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_and_scalar_is_always_there() {
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx] {
            assert_eq!(isa.name().parse::<Isa>(), Ok(isa));
        }
        assert_eq!(Isa::available()[0], Isa::Scalar);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_list() {
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("sse9") && error.contains("avx512bf16"), "{error}");
    }
}
