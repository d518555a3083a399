//! With [`HugePages`] as the program's allocator, a large `Vec` costs a page fault for 2 MiB, whoever allocated it.

use mixtura_kernels::aligned::HugePages;

#[global_allocator]
static MEMORY: HugePages = HugePages;

/// Page faults of this process so far: the tenth field of `/proc/self/stat`, after the name in brackets.
#[cfg(target_os = "linux")]
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let fields = stat.rsplit(')').next().expect("the name is in brackets");
    fields.split_whitespace().nth(7).and_then(|n| n.parse().ok()).expect("minflt is the tenth field")
}

#[test]
#[cfg(target_os = "linux")]
fn a_large_vec_that_is_read_and_then_written_takes_few_page_faults() {
    /// 128 MiB: 32 768 pages of 4 KiB, twice that many faults if each is read first.
    const LEN: usize = 32 << 20;
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if !setting.contains("[madvise]") && !setting.contains("[always]") {
        eprintln!("skipped: this system gives no transparent huge pages ({})", setting.trim());
        return;
    }
    let before = faults();
    let mut moments = vec![0.0f32; LEN];
    let sum: f32 = moments.iter().step_by(1024).sum();
    moments.iter_mut().step_by(1024).for_each(|m| *m += 1.0 + sum);
    let made = faults() - before;
    // 64 huge pages, read and written, and the ends; a system short of whole huge pages falls back to small ones for some.
    assert!(made < 8192, "{made} page faults for 128 MiB");

    // Growing keeps what was there.
    moments.extend_from_slice(&[7.0; 3]);
    assert_eq!((moments[0], moments[1], moments[LEN]), (1.0, 0.0, 7.0));
}
