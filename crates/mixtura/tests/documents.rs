//! What the documents and comments say about the repository is compared with the repository: which crate uses which, which test proves
//! which row, and whether files and functions that are named exist.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file below a directory, as a path from the root of the repository. What is hidden there is other people's: `bench/compare` keeps
/// an environment, models and sources of its peers in such directories.
fn files_below(directory: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_string()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(repository().join(&directory)).unwrap().map(Result::unwrap) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = format!("{directory}/{name}");
            if entry.file_type().unwrap().is_dir() {
                if !name.starts_with('.') {
                    directories.push(path);
                }
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn crates() -> BTreeSet<String> {
    let entries = std::fs::read_dir(repository().join("crates")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The crates of this workspace that a crate uses outside its tests.
fn used_by(name: &str) -> BTreeSet<String> {
    let manifest = read(&format!("crates/{name}/Cargo.toml"));
    let section = manifest.split("\n[").find(|section| section.starts_with("dependencies]")).unwrap_or("");
    let names = section.lines().filter_map(|line| line.strip_prefix("mixtura-"));
    names.map(|name| name.split(['.', ' ', '=']).next().unwrap().to_string()).collect()
}

#[test]
fn the_figure_of_the_crates_is_what_their_manifests_say() {
    let page = read("ARCHITECTURE.md");
    let figure = page.split("```text\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let mut drawn: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in figure.lines() {
        if let Some((left, right)) = line.split_once(" -> ") {
            let name = left.split_whitespace().last().unwrap();
            drawn.insert(name.to_string(), right.split(", ").map(|name| name.trim().to_string()).collect());
        } else if let Some((names, _)) = line.split_once("use none of the others") {
            drawn.extend(names.split_whitespace().map(|name| (name.to_string(), BTreeSet::new())));
        }
    }
    let manifests: BTreeMap<String, BTreeSet<String>> =
        crates().into_iter().map(|name| (name.clone(), used_by(&name))).collect();
    assert_eq!(drawn, manifests, "the figure (left) and the manifests (right) differ");

    for name in crates() {
        assert!(page.contains(&format!("\n| `{name}` |")), "the table of ARCHITECTURE.md has no row for {name}");
        assert!(
            read("README.md").contains(&format!("\ncrates/{name} ")),
            "the tree in README.md has no line for {name}"
        );
    }
    for pure in ["routing", "kernels"] {
        assert!(!read(&format!("crates/{pure}/Cargo.toml")).contains("burn"), "{pure} knows Burn");
    }
}

/// The names of the test functions of a source file.
fn tests_of(path: &str) -> BTreeSet<String> {
    let text = read(path);
    let mut found = BTreeSet::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        if line == "#[test]" {
            is_test = true;
        } else if let (true, Some(rest)) = (is_test, line.strip_prefix("fn ")) {
            found.insert(rest.split('(').next().unwrap().to_string());
            is_test = false;
        }
    }
    found
}

/// Pieces of a line in backticks.
fn quoted(line: &str) -> Vec<&str> {
    line.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_row_of_the_numerics_contract_names_tests_that_exist() {
    let page = read("docs/numerics.md");
    let table = page.split("## The table").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(rows.len() >= 11, "{} rows", rows.len());
    for row in rows {
        let statement = row.split(" | ").next().unwrap();
        let mut file = None;
        let mut tests = 0;
        for name in quoted(row.rsplit(" | ").next().unwrap()) {
            if name.ends_with(".rs") {
                file = Some(format!("crates/{name}"));
                continue;
            }
            let file = file.as_ref().unwrap_or_else(|| panic!("{statement}: {name} has no file before it"));
            assert!(tests_of(file).contains(name), "{statement}\nnames {name}, which is no test of {file}");
            tests += 1;
        }
        assert!(tests > 0, "{statement}\nnames no test");
    }
}

/// Files of an example, which its reader would make.
const IMAGINED: &[&str] = &["crates/routing/src/policy/near_best.rs", "near_best.rs"];

#[test]
fn files_that_documents_and_comments_name_exist() {
    let directories = ["crates", "docs", "configs", "fixtures", "bench", "fuzz", ".ci"];
    let mut all: Vec<String> = directories.into_iter().flat_map(files_below).collect();
    all.extend(std::fs::read_dir(repository()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()));
    let exists = |name: &str| all.iter().any(|path| path == name || path.ends_with(&format!("/{name}")));
    let is_file = |name: &str| {
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
        let rooted = directories.iter().any(|directory| name.starts_with(&format!("{directory}/")));
        plain && (name.ends_with(".rs") || name.ends_with(".md") || name.ends_with(".py") || rooted)
    };
    let mut missing = Vec::new();
    let mut named = 0;
    for path in all.iter().filter(|path| path.ends_with(".md") || path.ends_with(".rs") || path.ends_with("Cargo.toml"))
    {
        // A day's record speaks of what was there on that day.
        if path.starts_with("docs/LOG.md") || path.starts_with("bench/results") || path.contains("/target/") {
            continue;
        }
        for (number, line) in read(path).lines().enumerate() {
            let comment = match path.rsplit('.').next().unwrap() {
                "md" => Some(line),
                "rs" => line.find("//").map(|at| &line[at..]),
                _ => line.find('#').map(|at| &line[at..]),
            };
            let links = comment
                .into_iter()
                .flat_map(|text| text.split("](").skip(1))
                .filter_map(|rest| rest.split([')', '#']).next());
            let links = links.filter(|link| !link.contains("://") && path.ends_with(".md") && !link.is_empty());
            let names = comment.into_iter().flat_map(quoted).filter(|name| is_file(name));
            for name in names.chain(links).filter(|name| !IMAGINED.contains(name)) {
                named += 1;
                if !exists(name.trim_start_matches("../").trim_end_matches('/')) && !repository().join(name).exists() {
                    missing.push(format!("{path}:{}: {name}", number + 1));
                }
            }
        }
    }
    assert!(named > 60, "only {named} files are named");
    assert!(missing.is_empty(), "no such file:\n{}", missing.join("\n"));
}

#[test]
fn functions_and_variants_that_documents_name_exist() {
    let sources: String =
        files_below("crates").iter().filter(|path| path.ends_with(".rs")).map(|path| read(path)).collect();
    let words: BTreeSet<&str> = sources.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
    let pages = ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "STYLE.md", "CHANGELOG.md"].map(String::from);
    let pages = pages.into_iter().chain(files_below("docs").into_iter().filter(|page| page != "docs/LOG.md"));
    let mut missing = Vec::new();
    for page in pages {
        for line in read(&page).lines() {
            let paths = quoted(line).into_iter().filter(|name| name.contains("::") && !name.contains(' '));
            for part in paths.flat_map(|path| path.split("::")).filter(|part| !part.contains(['<', '{'])) {
                let part = part.trim_end_matches("()");
                if !words.contains(part) && !part.starts_with("mixtura_") {
                    missing.push(format!("{page}: {part} in {line}"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "the sources know nothing of\n{}", missing.join("\n"));
}

/// An op is one file that uses what is below it; `fused.rs` knows no op, so there is no circle to follow when reading one.
#[test]
fn the_files_of_ops_use_one_another_in_one_direction() {
    let files = files_below("crates/ops/src").into_iter().filter(|path| !path.ends_with("lib.rs"));
    let uses: BTreeMap<String, BTreeSet<String>> = files
        .map(|path| {
            let text = read(&path);
            let code =
                text.split("#[cfg(test)]").next().unwrap().lines().filter(|line| !line.trim_start().starts_with("//"));
            let names = code.flat_map(|line| line.split("crate::").skip(1)).filter_map(|rest| rest.split_once("::"));
            let name = path.trim_start_matches("crates/ops/src/").trim_end_matches(".rs");
            (name.to_string(), names.map(|(name, _)| name.to_string()).collect())
        })
        .collect();
    assert!(uses["linear"].contains("fused") && uses.len() > 10, "{uses:?}");
    // What uses only what is settled is settled.
    let mut settled: BTreeSet<&str> = BTreeSet::new();
    loop {
        let before = settled.len();
        let known = |name: &String| settled.contains(name.as_str()) || !uses.contains_key(name);
        let next: Vec<&str> =
            uses.iter().filter(|(_, of)| of.iter().all(known)).map(|(name, _)| name.as_str()).collect();
        settled.extend(next);
        if settled.len() == before {
            break;
        }
    }
    let circle: Vec<&String> = uses.keys().filter(|name| !settled.contains(name.as_str())).collect();
    assert!(circle.is_empty(), "these files use one another in a circle: {circle:?}");
}
