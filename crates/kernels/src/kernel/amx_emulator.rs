//! Test only: AMX on machines without it. The tile instructions of the real kernels fault there; the handler installed here decodes
//! them (VEX prefix, SIB addressing), does what Intel's manual says, and resumes after them. So the inline assembly itself is what the
//! tests run, bit for bit, on any machine with AVX-512-BF16.
//!
//! `TDPBF16PS`, from the manual's pseudo-code and confirmed on hardware: per output, the sixteen even products by FMA from zero, the
//! sixteen odd ones likewise, the two sums added, then added to C; denormals in and out are zero.
#![allow(unsafe_code)]

use super::scalar::{flush, fma_flushed};
use crate::isa::Isa;
use std::cell::UnsafeCell;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static INSTALLED: AtomicBool = AtomicBool::new(false);
static PRODUCTS: AtomicUsize = AtomicUsize::new(0);

/// Whether tile instructions are emulated in this process.
pub(crate) fn installed() -> bool {
    INSTALLED.load(Ordering::Acquire)
}

/// Makes `Isa::Amx` run here; true if it does, for real or emulated.
pub(crate) fn install() -> bool {
    static ONCE: Once = Once::new();
    let available = Isa::available();
    if available.contains(&Isa::Amx) {
        return true;
    }
    if !available.contains(&Isa::Avx512Bf16) {
        return false;
    }
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid one to fill in; the handler has the signature SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_illegal_instruction;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
        }
        INSTALLED.store(true, Ordering::Release);
    });
    true
}

/// A tile: 16 rows of 64 bytes.
type Tile = [[u8; 64]; 16];

struct State {
    configured: bool,
    row_bytes: [usize; 8],
    rows: [usize; 8],
    tiles: [Tile; 8],
}

thread_local! {
    static STATE: UnsafeCell<State> =
        const { UnsafeCell::new(State { configured: false, row_bytes: [0; 8], rows: [0; 8], tiles: [[[0; 64]; 16]; 8] }) };
}

extern "C" fn on_illegal_instruction(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the third argument is the interrupted thread's ucontext_t, ours to change; the state is the thread's own
    // and the faulting instruction is not inside this handler.
    let known = unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        STATE.with(|state| emulate(registers, &mut *state.get()))
    };
    if !known {
        const TEXT: &[u8] = b"amx_emulator: an illegal instruction that is no tile instruction\n";
        // SAFETY: write and abort may be called from a signal handler.
        unsafe {
            libc::write(2, TEXT.as_ptr().cast(), TEXT.len());
            libc::abort();
        }
    }
}

/// Position in `gregs` of the register with this x86 number.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// A memory operand: its address and, for tile loads and stores, the row stride from the index register.
struct Memory {
    address: usize,
    stride: usize,
}

/// Executes the instruction at RIP and steps over it; false if it is not a tile instruction.
unsafe fn emulate(registers: &mut [libc::greg_t; 23], state: &mut State) -> bool {
    let start = registers[libc::REG_RIP as usize] as usize as *const u8;
    // SAFETY: the processor fetched the instruction from here; an instruction of ours has at least 5 bytes.
    let byte = |at: usize| unsafe { *start.add(at) };
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 {
        return false;
    }
    let extend = |bit: u8| usize::from(byte(1) >> bit & 1 == 0) << 3;
    let (index_high, base_high) = (extend(6), extend(5));
    let (vvvv, prefix) = (usize::from(!byte(2) >> 3 & 15), byte(2) & 3);
    let (opcode, modrm) = (byte(3), byte(4));
    let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
    let register = |number: usize| registers[GREGS[number] as usize] as usize;
    let mut length = 5;
    let mut memory = Memory { address: 0, stride: 0 };
    if mode != 3 {
        if rm == 4 {
            let sib = byte(5);
            length += 1;
            let (scale, index, base) =
                (sib >> 6, usize::from(sib >> 3 & 7) | index_high, usize::from(sib & 7) | base_high);
            if base & 7 == 5 && mode == 0 {
                return false;
            }
            memory.address = register(base);
            memory.stride = if index == 4 { 0 } else { register(index) << scale };
        } else if rm == 5 && mode == 0 {
            // RIP-relative: the displacement counts from the end of the instruction.
            memory.address = start as usize + length + 4;
            // SAFETY: as above.
            let displacement = unsafe { start.add(length).cast::<i32>().read_unaligned() };
            memory.address = memory.address.wrapping_add_signed(displacement as isize);
            length += 4;
        } else {
            memory.address = register(rm | base_high);
        }
        let displacement = match mode {
            1 => {
                length += 1;
                byte(length - 1) as i8 as isize
            }
            2 => {
                length += 4;
                // SAFETY: as above.
                unsafe { start.add(length - 4).cast::<i32>().read_unaligned() as isize }
            }
            _ => 0,
        };
        memory.address = memory.address.wrapping_add_signed(displacement);
    }
    match (opcode, prefix, mode) {
        // SAFETY: the operand is a TileConfig of the kernels.
        (0x49, 0, 0..=2) => unsafe { configure(state, memory.address as *const u8) },
        (0x49, 0, 3) => state.configured = false,
        (0x49, 3, 3) => state.tiles[reg] = [[0; 64]; 16],
        // SAFETY: the kernels vouch for every row of the tile.
        (0x4b, 3, 0..=2) => unsafe { load(state, reg, &memory) },
        // SAFETY: as above.
        (0x4b, 2, 0..=2) => unsafe { store(state, reg, &memory) },
        (0x5c, 2, 3) => multiply(state, reg, rm, vvvv),
        _ => return false,
    }
    registers[libc::REG_RIP as usize] += length as libc::greg_t;
    true
}

unsafe fn configure(state: &mut State, config: *const u8) {
    // SAFETY: the caller lends the 64 bytes of the configuration.
    let config = unsafe { std::slice::from_raw_parts(config, 64) };
    state.configured = config[0] == 1;
    for tile in 0..8 {
        state.row_bytes[tile] = usize::from(u16::from_le_bytes([config[16 + 2 * tile], config[17 + 2 * tile]]));
        state.rows[tile] = usize::from(config[48 + tile]);
        state.tiles[tile] = [[0; 64]; 16];
    }
}

unsafe fn load(state: &mut State, tile: usize, memory: &Memory) {
    assert_configured(state);
    state.tiles[tile] = [[0; 64]; 16];
    for row in 0..state.rows[tile] {
        let source = (memory.address + row * memory.stride) as *const u8;
        // SAFETY: the caller vouches for the row.
        let source = unsafe { std::slice::from_raw_parts(source, state.row_bytes[tile]) };
        state.tiles[tile][row][..source.len()].copy_from_slice(source);
    }
}

unsafe fn store(state: &State, tile: usize, memory: &Memory) {
    assert_configured(state);
    for row in 0..state.rows[tile] {
        let target = (memory.address + row * memory.stride) as *mut u8;
        // SAFETY: the caller vouches for the row.
        unsafe { std::ptr::copy_nonoverlapping(state.tiles[tile][row].as_ptr(), target, state.row_bytes[tile]) };
    }
}

/// C += A B: C `[rows, 16]` f32, A `[rows, 16 pairs]`, B `[16 pairs, 16 columns]`.
fn multiply(state: &mut State, c: usize, a: usize, b: usize) {
    PRODUCTS.fetch_add(1, Ordering::Relaxed);
    assert_configured(state);
    let bf16 =
        |row: &[u8; 64], at: usize| f32::from_bits(u32::from(u16::from_le_bytes([row[2 * at], row[2 * at + 1]])) << 16);
    for row in 0..state.rows[c] {
        for column in 0..state.row_bytes[c] / 4 {
            let (mut even, mut odd) = (0f32, 0f32);
            for pair in 0..state.row_bytes[a] / 4 {
                let (a_row, b_row) = (&state.tiles[a][row], &state.tiles[b][pair]);
                even = fma_flushed(bf16(a_row, 2 * pair), bf16(b_row, 2 * column), even);
                odd = fma_flushed(bf16(a_row, 2 * pair + 1), bf16(b_row, 2 * column + 1), odd);
            }
            let at = 4 * column;
            let out: &mut [u8] = &mut state.tiles[c][row][at..at + 4];
            let old = f32::from_le_bytes([out[0], out[1], out[2], out[3]]);
            out.copy_from_slice(&flush(flush(old) + flush(even + odd)).to_le_bytes());
        }
    }
}

/// Hardware faults on an unconfigured tile; a panic cannot leave a signal handler, so end the process.
fn assert_configured(state: &State) {
    if !state.configured {
        const TEXT: &[u8] = b"amx_emulator: a tile instruction without ldtilecfg\n";
        // SAFETY: write and abort may be called from a signal handler.
        unsafe {
            libc::write(2, TEXT.as_ptr().cast(), TEXT.len());
            libc::abort();
        }
    }
}

#[test]
fn the_inline_assembly_itself_is_what_the_tests_run() {
    use crate::gemm::{Accum, matmul};
    use crate::pack::{MatView, PackedB};
    use crate::precision::Precision;
    if !install() || !installed() {
        return; // Real AMX, or a machine whose other kernels AMX mode could not use.
    }
    let before = PRODUCTS.load(Ordering::Relaxed);
    let packed = PackedB::pack(Isa::Amx, Precision::Bf16, 1, 64, 32, MatView::row_major(&[1.0; 64 * 32], 64, 32));
    let mut c = vec![0.0; 40 * 32];
    matmul(Isa::Amx, &[1.0; 40 * 64], 40, &packed, &mut c, Accum::Replace);
    assert!(c.iter().all(|&x| x == 64.0));
    // 40 rows are a block of 32 and a ragged one of 8: 2 steps of k, 4 + 2 products each.
    assert!(PRODUCTS.load(Ordering::Relaxed) - before >= 12);
}
