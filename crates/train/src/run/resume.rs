//! Going on with a run from its newest intact checkpoint.
//!
//! A run goes on with what it was started with: its own copy of the tokenizer, files of the same content. Where the config or a file
//! is another now, that is said by name, or refused where it would change the data.

use std::collections::BTreeSet;
use std::path::Path;

use mixtura_checkpoint::{Checkpoint, newest_loadable};
use mixtura_data::{DataError, Dataset, FileContent, Tokenizer, TokenizerChoice, reopen};
use toml::Value;

use super::under_way::{HeldBack, Run};
use super::{RunOptions, RunReport, announce_tokenizer, plan_memory, write_contents};
use crate::config::RunConfig;
use crate::error::TrainError;
use crate::progress::warn;
use crate::run_dir::{RunDir, write_whole};
use crate::trainer::{RUN_FILE, Trainer};

/// Goes on with the run in `path` from its newest intact checkpoint, or from the start if it has none. `steps` is the new length of
/// the whole run, which may be finished.
pub fn resume(path: &Path, steps: Option<u64>, options: &RunOptions) -> Result<RunReport, TrainError> {
    let dir = RunDir::reopen(path)?;
    let mut config = read_config(&dir.config())?;
    let (checkpoint, damaged) = newest_loadable(&dir.checkpoints())?;
    damaged.iter().for_each(|error| warn(&format!("a damaged checkpoint is passed over: {error}")));
    if let Err(error) = config.validate_training(&dir.config().display().to_string()) {
        warn(&format!("this run goes on as it was begun, but a new one would be refused: {error}"));
    }
    let refuse = |message: String| Err(TrainError::RunDirectory { path: path.to_path_buf(), message });
    let asked = steps.unwrap_or(config.train.steps);
    let finished = steps_of_final(&dir, config.train.steps);
    config.train.steps = asked;
    let made = checkpoint.as_ref().map_or(0, Checkpoint::step);
    match finished {
        _ if asked == 0 => return refuse("it cannot be a run of 0 steps".into()),
        Some(of) if asked == of && steps.is_none() => {
            return refuse(format!(
                "this run has made all its {of} steps; its model is in final/. --steps N, N above {of}, makes it longer"
            ));
        }
        Some(of) if asked <= of => {
            return refuse(format!("this run has made {of} steps; {asked} would not make it longer"));
        }
        Some(_) if checkpoint.is_none() => {
            return refuse(
                "it has no intact checkpoint to go on from, only final/, which has no optimizer state".into(),
            );
        }
        None if asked < made => return refuse(format!("this run has made {made} steps; it cannot end after {asked}")),
        _ => {}
    }

    let known = known_contents(&dir);
    let tokenizer = checkpoint.as_ref().map(own_tokenizer).transpose()?;
    if let (Some(own), Some(checkpoint)) = (&tokenizer, &checkpoint) {
        warn_of_other_tokenizer(&config, own, checkpoint);
    }
    if tokenizer.is_none() {
        announce_tokenizer(&config, options);
    }
    let data = reopen(&config.data, tokenizer, &known)?;
    let Dataset { tokenizer, train, validation, evaluation, contents, .. } = data;
    config.fit_vocabulary(tokenizer.vocab_size())?;
    let memory = plan_memory(&config, options)?;
    let mut trainer = Trainer::new(&config, train)?;
    trainer.contents = contents;
    let mut remarks = Vec::new();
    if let Some(checkpoint) = &checkpoint {
        // The keys first: another file under another name is a changed key.
        match trainer.restore(checkpoint) {
            Err(error @ TrainError::Data(DataError::State { .. })) => {
                FileContent::check(&known, &trainer.contents, "this run")?;
                return Err(error);
            }
            other => other?,
        }
        // A record that cannot be read any more (of another version, say) has nothing to compare with.
        if let Ok(was) = read_config(&checkpoint.path().join(RUN_FILE)) {
            warn_of_changes(&was, &config, made);
            if was.train.steps != asked {
                remarks.push(what_it_does_to_the_schedule(&config, was.train.steps, made));
            }
        }
    }
    // From here on files are written.
    options.interrupt.save_first();
    if let Some(of) = finished {
        let aside = format!("final-step-{of}");
        dir.set_final_aside(&aside)?;
        remarks.push(format!("the model of the first {of} steps is in {aside}/ now"));
    }
    if steps.is_some() {
        write_whole(&dir.config(), &config.to_toml())?;
    }
    if trainer.contents != known {
        write_contents(&dir, &trainer.contents)?;
    }
    let held_back = HeldBack { tokenizer, validation, evaluation };
    Run::new(config, dir, trainer, held_back, memory, options)?.carry_out(&remarks)
}

fn read_config(file: &Path) -> Result<RunConfig, TrainError> {
    let text = std::fs::read_to_string(file).map_err(|e| TrainError::io("read", file, e))?;
    RunConfig::parse_saved(&text, &file.display().to_string())
}

/// The steps behind `final/`, if it is there: those that its own record of the run names.
fn steps_of_final(dir: &RunDir, planned: u64) -> Option<u64> {
    let model = dir.final_model();
    let recorded = || read_config(&model.join(RUN_FILE)).ok().map(|config| config.train.steps);
    model.exists().then(|| recorded().unwrap_or(planned))
}

/// What the files held so far. A record that is gone or unreadable costs a hash per file, no more: the checkpoint has them too.
fn known_contents(dir: &RunDir) -> Vec<FileContent> {
    let text = std::fs::read(dir.contents()).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn own_tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer, TrainError> {
    Ok(Tokenizer::from_file(&checkpoint.path().join("tokenizer.json"))?)
}

/// The run goes on with its own tokenizer whatever became of the file; a person who changed the file should know.
fn warn_of_other_tokenizer(config: &RunConfig, own: &Tokenizer, checkpoint: &Checkpoint) {
    let Some(TokenizerChoice::File(path)) = &config.data.tokenizer else { return };
    let what = match Tokenizer::from_file(path) {
        Ok(named) if named.to_json() == own.to_json() => return,
        Ok(_) => format!("{} is not the tokenizer that this run was started with", path.display()),
        Err(error) => error.to_string(),
    };
    warn(&format!("{what}; the run goes on with its own copy, {}", checkpoint.path().join("tokenizer.json").display()));
}

/// Names every key of the config that differs from the one that the checkpoint of step `made` was saved under.
fn warn_of_changes(was: &RunConfig, is: &RunConfig, made: u64) {
    let is = is.with_names_only();
    // What a new length does is said in full.
    for (key, was, is) in differences(was, &is).into_iter().filter(|(key, ..)| key != "train.steps") {
        warn(&format!("{key} was {was} until step {made} and is {is} from here on"));
    }
}

/// Keys with another value, and both values.
fn differences(was: &RunConfig, is: &RunConfig) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    if let (Ok(was), Ok(is)) = (Value::try_from(was), Value::try_from(is)) {
        compare("", Some(&was), Some(&is), &mut found);
    }
    found
}

fn compare(key: &str, was: Option<&Value>, is: Option<&Value>, found: &mut Vec<(String, String, String)>) {
    match (was, is) {
        (Some(Value::Table(a)), Some(Value::Table(b))) => {
            let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(&inner, a.get(name), b.get(name), found);
            }
        }
        _ if was != is => {
            let text = |value: Option<&Value>| value.map_or("not given".into(), Value::to_string);
            found.push((key.to_string(), text(was), text(is)));
        }
        _ => {}
    }
}

/// The rate of the next step as it was planned and as it is now: the schedule is a function of the step and of the number of steps.
fn what_it_does_to_the_schedule(config: &RunConfig, planned: u64, made: u64) -> String {
    let now = config.train.steps;
    let rate = |step: u64, steps: u64| config.optimizer.lr * config.schedule.factor(step, steps);
    let (ended, goes_on) = (rate(made.saturating_sub(1), planned), rate(made, now));
    let kind = format!("{:?}", config.schedule.kind).to_lowercase();
    let mut words = format!("the run has {now} steps now instead of {planned}, and so has its {kind} schedule");
    if ended == goes_on {
        words += &format!(": the learning rate goes on at {goes_on:.3e}");
    } else {
        words += &format!(": the learning rate was {ended:.3e} in the last step and is {goes_on:.3e} in the next");
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_key_is_named_with_both_values() {
        let text = "[model]\nd_model = 64\nlayers = 2\nheads = 2\ncontext = 64\nd_dense = 64\n[data]\ncontext = 64\n";
        let parse = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
            RunConfig::parse(text, "test", &set).unwrap()
        };
        let changes = |set: &[&str]| {
            let found = differences(&parse(&[]), &parse(set));
            found.into_iter().map(|(key, was, is)| format!("{key}: {was} -> {is}")).collect::<Vec<_>>()
        };
        assert!(changes(&[]).is_empty());
        assert_eq!(
            changes(&["optimizer.lr=0.5", "train.steps=7"]),
            ["optimizer.lr: 0.001 -> 0.5", "train.steps: 1000 -> 7"]
        );
        assert_eq!(changes(&["data.tokenizer=byte"]), ["data.tokenizer: not given -> \"byte\""]);
    }

    #[test]
    fn a_new_length_says_what_becomes_of_the_rate() {
        let text = "[model]\nd_model = 64\nlayers = 2\nheads = 2\ncontext = 64\nd_dense = 64\n[data]\ncontext = 64\n\
                    [optimizer]\nlr = 1.0\n[schedule]\nwarmup = 0\n";
        let longer = |kind: &str| {
            let set = [format!("schedule.kind={kind}"), "train.steps=200".into()];
            what_it_does_to_the_schedule(&RunConfig::parse(text, "test", &set).unwrap(), 100, 100)
        };
        assert!(longer("constant").ends_with("goes on at 1.000e0"), "{}", longer("constant"));
        // Half way down the cosine from 1 to 0.1 instead of at its end.
        assert!(longer("cosine").contains("was 1.002e-1 in the last step and is 5.500e-1"), "{}", longer("cosine"));
    }
}
