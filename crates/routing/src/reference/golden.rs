//! Golden vectors: recomputes every case of a file and compares, which is what `mixtura route check FILE` prints.
//!
//! A case is a function from its inputs to a JSON object; one comparison walks what the file expects and what was computed.
//! Nothing is compared with a constant of ours, so a file with other numbers, or other shapes, under the same ids works.
//! Inputs that a case does not carry come from the file's own case `F1`.

mod case;
mod compare;
mod foundation;
mod capacity_based;
mod soft_cases;
mod modern;
mod theory_cases;

pub use case::{Case, Matrix};

use crate::error::RoutingError;
use crate::names::nearest;
use compare::compare;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What can be wrong with a golden-vector file or one of its cases.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// Not JSON.
    #[error("not a golden-vector file: {reason}")]
    Json {
        /// What the parser found, with line and column.
        reason: String,
    },
    /// A field that must be there is not.
    #[error("case {case}: field {field} is missing")]
    Missing {
        /// Case id, or its index where it has none.
        case: String,
        /// Dotted path of the field.
        field: String,
    },
    /// A field holds something else than it should.
    #[error("case {case}: {field} should be {expected}, found {found}")]
    Kind {
        /// Case id.
        case: String,
        /// Dotted path of the field.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Two cases with one id.
    #[error("case {case} appears twice")]
    Duplicate {
        /// Case id.
        case: String,
    },
    /// `--case` names none of the file's cases.
    #[error("the file has no case {case}{}", nearest.as_ref().map_or(String::new(), |n| format!("; nearest is {n}")))]
    NoSuchCase {
        /// The id asked for.
        case: String,
        /// The most similar id in the file.
        nearest: Option<String>,
    },
    /// The case's numbers cannot be routed.
    #[error("case {case}: {source}")]
    Routing {
        /// Case id.
        case: String,
        /// Why.
        source: RoutingError,
    },
}

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Every number within the case's tolerance.
    Passed,
    /// A number, a shape or a field differs, or the case could not be computed.
    Failed,
    /// Not computed by this crate.
    Skipped,
}

/// One case's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The case's id.
    pub id: String,
    /// How it ended.
    pub status: Status,
    /// Largest absolute difference of any number; absent unless numbers were compared.
    pub max_abs_diff: Option<f64>,
    /// Why it failed or was skipped; empty when it passed.
    pub message: String,
}

/// All results; serialises to the JSON that `mixtura route check --json` prints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Cases that passed.
    pub passed: usize,
    /// Cases that failed.
    pub failed: usize,
    /// Cases that were skipped.
    pub skipped: usize,
    /// In the file's order.
    pub cases: Vec<CaseReport>,
}

/// A parsed golden-vector file.
#[derive(Debug, Clone)]
pub struct GoldenFile {
    cases: Vec<ParsedCase>,
}

#[derive(Debug, Clone)]
struct ParsedCase {
    id: String,
    tol: f64,
    inputs: Value,
    expected: Value,
    /// Keys of `inputs.facts` as the file orders them; JSON objects lose their order in [`Value`].
    subjects: Vec<String>,
}

impl GoldenFile {
    /// Parses the text of a file: `{"meta", "cases": [{"id", "section", "desc", "tol", "inputs", "expected"}]}`.
    pub fn parse(text: &str) -> Result<Self, GoldenError> {
        let root: Value = serde_json::from_str(text).map_err(|e| GoldenError::Json { reason: e.to_string() })?;
        let list = root.get("cases").ok_or_else(|| missing("(file)", "cases"))?;
        let list = list.as_array().ok_or_else(|| GoldenError::Kind {
            case: "(file)".to_string(),
            field: "cases".to_string(),
            expected: "a list".to_string(),
            found: kind(list).to_string(),
        })?;
        let default_tol = root.pointer("/meta/default_tol").and_then(Value::as_f64);
        let mut cases: Vec<ParsedCase> = Vec::with_capacity(list.len());
        for (index, entry) in list.iter().enumerate() {
            let id = entry.get("id").and_then(Value::as_str).ok_or_else(|| missing(&format!("#{index}"), "id"))?;
            if cases.iter().any(|c| c.id == id) {
                return Err(GoldenError::Duplicate { case: id.to_string() });
            }
            let field = |name: &str| entry.get(name).cloned().ok_or_else(|| missing(id, name));
            let tol = entry.get("tol").and_then(Value::as_f64).or(default_tol).ok_or_else(|| missing(id, "tol"))?;
            let (inputs, expected) = (field("inputs")?, field("expected")?);
            cases.push(ParsedCase { id: id.to_string(), tol, inputs, expected, subjects: Vec::new() });
        }
        // A second, typed reading for the one place where the order of keys matters.
        if let Ok(order) = serde_json::from_str::<case::KeyOrder>(text) {
            cases.iter_mut().zip(order.subjects()).for_each(|(case, subjects)| case.subjects = subjects);
        }
        Ok(Self { cases })
    }

    /// The ids, in the file's order.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.cases.iter().map(|c| c.id.as_str())
    }

    /// Recomputes every case.
    pub fn check(&self) -> Report {
        Report::from_cases(self.cases.iter().map(|case| self.check_one(case)).collect())
    }

    /// Recomputes one case.
    pub fn check_case(&self, id: &str) -> Result<Report, GoldenError> {
        let case = self.cases.iter().find(|c| c.id == id);
        let case = case.ok_or_else(|| GoldenError::NoSuchCase {
            case: id.to_string(),
            nearest: nearest(id, self.ids()).map(str::to_string),
        })?;
        Ok(Report::from_cases(vec![self.check_one(case)]))
    }

    fn check_one(&self, parsed: &ParsedCase) -> CaseReport {
        let report =
            |status, max_abs_diff, message| CaseReport { id: parsed.id.clone(), status, max_abs_diff, message };
        let run = match lookup(&parsed.id) {
            Lookup::Run(run) => run,
            Lookup::Later(why) => return report(Status::Skipped, None, format!("not yet: {why}")),
            Lookup::Unknown => {
                let hint = nearest(&parsed.id, KNOWN.iter().map(|(id, _)| *id));
                let hint = hint.map_or(String::new(), |n| format!("; nearest known id is {n}"));
                return report(Status::Failed, None, format!("unknown case id{hint}"));
            }
        };
        let fixture = self.cases.iter().find(|c| c.id == "F1").map(|c| &c.inputs);
        let case = Case::new(&parsed.id, &parsed.inputs, &parsed.expected, fixture, &parsed.subjects);
        match run(&case) {
            Err(error) => report(Status::Failed, None, error.to_string()),
            Ok(found) => {
                let difference = compare(&parsed.expected, &found, parsed.tol);
                match difference.message {
                    None => report(Status::Passed, Some(difference.max_abs_diff), String::new()),
                    Some(message) => report(Status::Failed, Some(difference.max_abs_diff), message),
                }
            }
        }
    }
}

impl Report {
    fn from_cases(cases: Vec<CaseReport>) -> Self {
        let count = |status| cases.iter().filter(|c| c.status == status).count();
        Self { passed: count(Status::Passed), failed: count(Status::Failed), skipped: count(Status::Skipped), cases }
    }
}

type Run = fn(&Case) -> Result<Value, GoldenError>;

enum Lookup {
    Run(Run),
    Later(&'static str),
    Unknown,
}

/// Every known id; `None` = computed elsewhere or later.
const KNOWN: &[(&str, Option<Run>)] = &[
    ("F1", Some(foundation::fixture)),
    ("T1.ties", Some(foundation::ties)),
    ("T2.edge", Some(foundation::edge)),
    ("C0.capacity", Some(foundation::capacity)),
    ("B1.noisy_topk", Some(foundation::noisy_top_k)),
    ("C2.switch", Some(foundation::switch)),
    ("E1.mixtral", Some(foundation::mixtral)),
    ("E2.dropless", Some(foundation::dropless)),
    ("E14.olmoe", Some(foundation::olmoe)),
    ("A1.jacobs", None),
    ("A2.hme_em", None),
    ("A3.toy_eval", None),
    ("A4.eigen", None),
    ("B2.hierarchical", Some(capacity_based::hierarchical)),
    ("B3.batchwise", Some(capacity_based::batchwise)),
    ("C1.gshard_top2", Some(capacity_based::gshard)),
    ("C3.stmoe", Some(capacity_based::st_moe)),
    ("C4.ds_top1", Some(capacity_based::deepspeed_top1)),
    ("C5.ds_top2", Some(capacity_based::deepspeed_top2)),
    ("C6.ds_topk", Some(capacity_based::deepspeed_top_k)),
    ("C7.residual_mos", Some(capacity_based::residual)),
    ("C8.tutel", Some(capacity_based::tutel)),
    ("C9.vmoe_bpr", Some(capacity_based::v_moe)),
    ("C10.aoe", Some(capacity_based::aggregation)),
    ("D1.expert_choice", Some(soft_cases::expert_choice)),
    ("D2.soft_moe", Some(soft_cases::soft_moe)),
    ("D2.identity_map", Some(soft_cases::identity)),
    ("D3.remoe", Some(soft_cases::relu)),
    ("D4.lory_smear", Some(soft_cases::merging)),
    ("D5.mot", Some(soft_cases::mixture_of_tokens)),
    ("D6.block_causal_soft", Some(soft_cases::block_causal)),
    ("D7.causality", Some(soft_cases::causality)),
    ("E3.deepseekmoe", Some(modern::deepseek_moe)),
    ("E4.deepseek_v3", Some(modern::deepseek_v3)),
    ("E5.global_batch_lbl", Some(modern::global_batch)),
    ("E6.qwen_shared", Some(modern::shared_expert)),
    ("E7.hash", Some(modern::hash)),
    ("E8.base", Some(modern::base)),
    ("E9.sinkhorn", Some(modern::sinkhorn)),
    ("E10.cosine", Some(modern::cosine)),
    ("E11.moepp", Some(modern::moe_plus_plus)),
    ("E12.hmoe", Some(modern::heterogeneous)),
    ("E13.mlp_gate", Some(modern::mlp_gate)),
    ("F1.aux_lower_bound", Some(theory_cases::lower_bound)),
    ("F2.aux_n2", Some(theory_cases::two_experts)),
    ("F3.aux_gradient", Some(theory_cases::stop_gradient)),
    ("G1.combine_norm", Some(theory_cases::combine_norm)),
    ("G1.upcycle_init", Some(theory_cases::upcycle)),
    ("G2.prune_merge", Some(theory_cases::prune_and_merge)),
    ("G3.alltoall", None),
    ("G4.2dh", None),
    ("G5.volume", None),
    ("H1.sats", Some(theory_cases::similarity)),
    ("H2.logic_dataset", Some(theory_cases::logic)),
    ("H3.sampler", Some(theory_cases::sampler)),
];

fn lookup(id: &str) -> Lookup {
    match KNOWN.iter().find(|(known, _)| *known == id) {
        None => Lookup::Unknown,
        Some((_, Some(run))) => Lookup::Run(*run),
        Some((id, None)) => Lookup::Later(match id.starts_with('A') {
            true => "classical mixtures are not part of routing",
            false => "exchange between ranks is not part of routing",
        }),
    }
}

fn missing(case: &str, field: &str) -> GoldenError {
    GoldenError::Missing { case: case.to_string(), field: field.to_string() }
}

/// A value's JSON type, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
