//! The order of the modules in `lib.rs` is the order in which they use each other: no circles, and nothing uses the reference.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules of `lib.rs` from top to bottom.
fn modules() -> Vec<String> {
    let text = fs::read_to_string(src().join("lib.rs")).unwrap();
    let named =
        |line: &str| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';').map(str::to_string);
    text.lines().filter_map(named).collect()
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The files of a module: a file of its name and everything under `name/`.
fn files(module: &str) -> Vec<PathBuf> {
    let mut found = vec![src().join(format!("{module}.rs"))];
    let mut folders = vec![src().join(module)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() { folders.push(entry) } else { found.push(entry) }
        }
    }
    found
}

/// The modules that a file names after `crate::`, comments and unit tests left out.
fn used(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap().lines().map(|line| line.split("//").next().unwrap());
    let word = |rest: &str| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    code.flat_map(|line| line.split("crate::").skip(1)).map(word).collect()
}

#[test]
fn a_module_uses_only_modules_above_it() {
    let order = modules();
    assert!(order.len() > 15 && order.last().unwrap() == "reference", "{order:?}");
    let mut uses = 0;
    for (at, module) in order.iter().enumerate() {
        for file in files(module) {
            for name in used(&file) {
                // Types named by their re-export at the root belong to no module here, and no code uses them so.
                let of = order.iter().position(|m| *m == name);
                let of = of.unwrap_or_else(|| panic!("{}: crate::{name} is not a module of lib.rs", file.display()));
                assert!(of <= at, "{} uses crate::{name}, which stands below {module} in lib.rs", file.display());
                uses += 1;
            }
        }
    }
    assert!(uses > 150, "only {uses} uses were found: the search is broken");
}
