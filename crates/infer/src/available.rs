//! How much memory there is, and how much of it this process holds.

use std::path::{Path, PathBuf};

/// What bounds the memory that this process can still get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// Bytes left.
    pub bytes: u64,
    /// Who says so, for a person.
    pub bound: String,
}

impl Available {
    /// The tightest of the system's free memory, the limits of the control groups that the process is in, and its own resource
    /// limits; `None` where nothing tells.
    pub fn now() -> Option<Self> {
        Self::under(Path::new("/"))
    }

    /// As [`now`](Self::now), with `/proc` and `/sys` below `root`.
    pub fn under(root: &Path) -> Option<Self> {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let mut bounds = Vec::new();
        bounds.extend(
            read("proc/meminfo")
                .and_then(|text| kib(&text, "MemAvailable:"))
                .map(|bytes| Self { bytes, bound: "the system (MemAvailable)".into() }),
        );
        if let Some(groups) = read("proc/self/cgroup") {
            bounds.extend(groups.lines().filter_map(|line| in_groups(root, line)));
        }
        if let (Some(limits), Some(status)) = (read("proc/self/limits"), read("proc/self/status")) {
            for (name, held) in [("Max address space", "VmSize:"), ("Max data size", "VmData:")] {
                let limit =
                    limits.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
                let left = limit.map(|limit: u64| limit.saturating_sub(kib(&status, held).unwrap_or(0)));
                bounds.extend(left.map(|bytes| Self { bytes, bound: format!("the process's limit \"{name}\"") }));
            }
        }
        bounds.into_iter().min_by_key(|bound| bound.bytes)
    }
}

/// What the process holds now, in bytes; 0 where the system does not tell.
pub fn held() -> u64 {
    std::fs::read_to_string("/proc/self/status").ok().and_then(|text| kib(&text, "VmRSS:")).unwrap_or(0)
}

/// The number of KiB after `name` in a file of `/proc`, as bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Where a version of control groups keeps what.
struct Files {
    mounts: &'static [&'static str],
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`: file pages that are dropped when memory is wanted.
    reclaimable: &'static str,
}

/// The tightest limit of a line of `/proc/self/cgroup`, over the group and those above it: version 2, or the memory controller of
/// version 1. In a container the group's own path may not be visible: then its root is the container's group.
fn in_groups(root: &Path, line: &str) -> Option<Available> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    const VERSION_2: Files = Files {
        mounts: &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
        limit: "memory.max",
        usage: "memory.current",
        reclaimable: "inactive_file ",
    };
    const VERSION_1: Files = Files {
        mounts: &["sys/fs/cgroup/memory"],
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
        reclaimable: "total_inactive_file ",
    };
    let files = match controllers {
        "" => VERSION_2,
        _ if controllers.split(',').any(|controller| controller == "memory") => VERSION_1,
        _ => return None,
    };
    let left = |group: &PathBuf| {
        let number = |name: &str| std::fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
        let reclaimable = std::fs::read_to_string(group.join("memory.stat")).ok().and_then(|stat| {
            stat.lines().find_map(|line| line.strip_prefix(files.reclaimable))?.trim().parse::<u64>().ok()
        });
        let used = number(files.usage)?.saturating_sub(reclaimable.unwrap_or(0));
        // Without a limit, version 2 says "max" and version 1 a number near 2^63.
        Some(number(files.limit).filter(|&limit| limit < 1 << 60)?.saturating_sub(used))
    };
    let groups = files.mounts.iter().flat_map(|mount| {
        let mount = root.join(mount);
        let group = mount.join(path);
        let above: Vec<PathBuf> =
            group.ancestors().take_while(|at| at.starts_with(&mount)).map(Path::to_path_buf).collect();
        above
    });
    let tightest = groups.filter_map(|group| Some((left(&group)?, group))).min()?;
    let (bytes, group) = tightest;
    Some(Available { bytes, bound: format!("the limit of the control group {}", group.display()) })
}

/// Bytes for people.
pub fn gib(bytes: u64) -> String {
    match bytes as f64 / (1u64 << 30) as f64 {
        gib if gib >= 0.995 => format!("{gib:.1} GiB"),
        gib => format!("{:.0} MiB", gib * 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a temporary directory");
        std::fs::write(path, text).expect("a temporary file");
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_tightest_bound_counts() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let root = root.path();
        assert_eq!(Available::under(root), None);
        write(root, "proc/meminfo", "MemTotal:  20971520 kB\nMemAvailable:   10485760 kB\n");
        let bound = || Available::under(root).expect("meminfo is there");
        assert_eq!(bound().bytes, 10 * GIB);

        // Version 2: the group has no limit, the one above has 8 GiB, of which 3 are in use and 1 of those can be dropped.
        write(root, "proc/self/cgroup", "0::/box/run\n");
        write(root, "sys/fs/cgroup/box/run/memory.max", "max\n");
        write(root, "sys/fs/cgroup/box/run/memory.current", "1\n");
        write(root, "sys/fs/cgroup/box/memory.max", &format!("{}\n", 8 * GIB));
        write(root, "sys/fs/cgroup/box/memory.current", &format!("{}\n", 3 * GIB));
        write(root, "sys/fs/cgroup/box/memory.stat", &format!("anon 5\ninactive_file {GIB}\n"));
        assert_eq!(bound().bytes, 6 * GIB);
        assert!(bound().bound.contains("box"), "{}", bound().bound);

        // Version 1, inside a container: only the root of its hierarchy is visible.
        write(root, "proc/self/cgroup", "7:blkio:/\n4:memory:/docker/abc\n0::/\n");
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", &format!("{}\n", 5 * GIB));
        write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", &format!("{GIB}\n"));
        assert_eq!(bound().bytes, 4 * GIB);
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(bound().bytes, 10 * GIB);

        // `ulimit -v`.
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax address space         4294967296  unlimited  bytes\nMax data size  unlimited unlimited bytes\n";
        write(root, "proc/self/limits", limits);
        write(root, "proc/self/status", "VmSize:\t 1048576 kB\nVmData:\t 1 kB\n");
        assert_eq!(bound().bytes, 3 * GIB);
        assert!(bound().bound.contains("address space"));
    }

    #[test]
    fn bytes_are_told_in_mib_and_gib() {
        assert_eq!([gib(300 << 20), gib(GIB), gib(13 * GIB + GIB / 3)], ["300 MiB", "1.0 GiB", "13.3 GiB"]);
    }
}
