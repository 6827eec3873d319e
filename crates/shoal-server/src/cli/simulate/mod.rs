//! `shoal simulate`: what a configuration would do with a trace of requests, in virtual time.
//!
//! The world is [`shoal_core::simulate`], the policy the server's own. Here: what the configuration, the files of models
//! and the command line say of them ([`inputs`]), and how it is told ([`document`], [`print`](mod@print)). Starts nothing,
//! and takes nothing from the machine that it runs on but the configuration, the sizes of files and the trace, so that the
//! same input gives the same output everywhere.

mod document;
mod inputs;
mod outside;
mod print;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::PossibleValue;
use shoal_core::bytes::ByteCount;
use shoal_core::policy::{Action, BUILTIN, Lru, builtin};
use shoal_core::simulate::{Arrival, Pattern, play};

use self::document::{Decision, Document, Ratio};
use self::inputs::Inputs;
use self::outside::Outside;
use super::{Failure, Out, between};
use crate::config::{OUTSIDE, is_outside};

/// What `shoal simulate` is asked.
#[derive(Debug, clap::Args)]
pub(super) struct SimulateArguments {
    /// The configuration; looked for as `serve` does
    file: Option<PathBuf>,
    /// The requests, a JSON object a line: `at_s`, `model`, and optionally `prompt_tokens`, `max_tokens`; `-` reads
    /// standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "minutes", "rate", "pattern"])]
    trace: Option<PathBuf>,
    /// Without a trace: requests made from this number
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// For how long they come
    #[arg(long, default_value_t = 60.0, value_parser = minutes)]
    minutes: f64,
    /// How many a minute, all models together
    #[arg(long, default_value_t = 30.0, value_parser = rate)]
    rate: f64,
    /// How they come: `conversations`, `steady` or `rounds`
    #[arg(long, default_value = "conversations")]
    pattern: Choice,
    /// Device bytes for all models together, in place of the configuration's
    #[arg(long, value_name = "SIZE", value_parser = size)]
    device_budget: Option<ByteCount>,
    /// Host bytes for copies of weights, in place of the configuration's
    #[arg(long, value_name = "SIZE", value_parser = size)]
    host_budget: Option<ByteCount>,
    /// What the weights of a model take, where its files are not here: `--size chat=15GiB`
    #[arg(long, value_name = "MODEL=SIZE", value_parser = size_of)]
    size: Vec<(String, ByteCount)>,
    /// How long the program of an `engine = "command"` takes to start, in seconds: `--start big=40`
    #[arg(long, value_name = "MODEL=SECONDS", value_parser = start_of)]
    start: Vec<(String, f64)>,
    /// What each worker's process has on the device beside weights, as long as it runs
    #[arg(long, value_name = "SIZE", value_parser = size)]
    overhead: Option<ByteCount>,
    /// How fast weights come from host memory, in GiB a second
    #[arg(long, default_value_t = 24.0, value_parser = speed)]
    link_gib_s: f64,
    /// How fast they come from their files, where host memory has no copy, in GiB a second
    #[arg(long, default_value_t = 2.0, value_parser = speed)]
    source_gib_s: f64,
    /// Tokens of prompts that a model computes in a second
    #[arg(long, default_value_t = 5_000.0, value_parser = tokens)]
    prefill_tokens_s: f64,
    /// Tokens of one answer in a second
    #[arg(long, default_value_t = 50.0, value_parser = tokens)]
    decode_tokens_s: f64,
    /// Who decides, in place of the configuration's: `value`, `lru`, or `python:MODULE:FUNCTION`
    #[arg(long)]
    policy: Option<String>,
    /// Print every decision, with its time and its reason
    #[arg(long)]
    why: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A [`Pattern`] on the command line.
#[derive(Clone, Copy, Debug)]
struct Choice(Pattern);

impl ValueEnum for Choice {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [Choice; 3] = [Choice(Pattern::ALL[0]), Choice(Pattern::ALL[1]), Choice(Pattern::ALL[2])];
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()))
    }
}

pub(super) fn simulate(arguments: &SimulateArguments, out: Out<'_>, errors: Out<'_>) -> Result<(), Failure> {
    let inputs = Inputs::read(arguments, errors)?;
    let trace: Vec<Arrival> = inputs.asked.iter().map(|asked| inputs.service.arrival(asked)).collect();

    let mut decisions = Decisions::new(arguments.why, (!arguments.json).then_some(&mut *out));
    let mut told = |at_ms, action: &Action| decisions.hear(at_ms, action, &inputs);
    let result = if is_outside(&inputs.policy) {
        let directory = inputs.file.parent().unwrap_or(Path::new("."));
        let failed = |why| Failure::new(format!("{}: {why}", inputs.policy));
        let policy = Outside::start(&inputs.policy, &inputs.python, directory).map_err(failed)?;
        let result = play(&policy, &inputs.settings, &inputs.kinds, &trace, &mut told);
        policy.trouble().map_or(Ok(result), |why| Err(failed(why)))?
    } else {
        let policy = builtin(&inputs.policy).ok_or_else(|| {
            let known = BUILTIN.join(", ");
            wrong(format!(
                "there is no policy {:?}; there are {known}, and {OUTSIDE}MODULE:FUNCTION",
                inputs.policy
            ))
        })?;
        play(policy.as_ref(), &inputs.settings, &inputs.kinds, &trace, &mut told)
    };
    let lru = play(&Lru, &inputs.settings, &inputs.kinds, &trace, &mut |_, _| {});
    let Decisions { kept, left_out, printed, .. } = decisions;
    printed?;
    let document = Document {
        configuration: inputs.file.display().to_string(),
        ratio: Ratio::of(&lru.total, &result.total),
        assumes: inputs.assumes.clone(),
        trace: inputs.trace.clone(),
        models: inputs.facts(),
        result,
        whole_model_lru: lru,
        decisions: (arguments.why && arguments.json).then_some(kept),
        decisions_left_out: left_out,
    };
    if arguments.json { print::json(&document, out) } else { print::text(&document, out) }
}

/// Decisions that a document has at most.
const DECISIONS_MAX: usize = 100_000;

/// Decisions as they are made, for those who asked for them: printed at once for people, kept for a document.
struct Decisions<'a> {
    wanted: bool,
    out: Option<Out<'a>>,
    printed: Result<(), Failure>,
    kept: Vec<Decision>,
    left_out: u64,
    /// The newest request of each model that was told to wait: it is told so with every plan.
    waits: BTreeMap<u32, u64>,
}

impl<'a> Decisions<'a> {
    fn new(wanted: bool, out: Option<Out<'a>>) -> Self {
        Self { wanted, out, printed: Ok(()), kept: Vec::new(), left_out: 0, waits: BTreeMap::new() }
    }

    fn hear(&mut self, at_ms: u64, action: &Action, inputs: &Inputs) {
        if !self.wanted {
            return;
        }
        if let Action::Wait { model, request, .. } = action
            && self.waits.insert(model.0, *request) == Some(*request)
        {
            return;
        }
        let decision = Decision::of(at_ms, action, &inputs.kinds);
        if let Some(out) = &mut self.out {
            if self.printed.is_ok() {
                self.printed = print::decision(&decision, *out);
            }
        } else if self.kept.len() < DECISIONS_MAX {
            self.kept.push(decision);
        } else {
            self.left_out += 1;
        }
    }
}

/// Asked for wrongly.
fn wrong(message: impl Into<String>) -> Failure {
    Failure { code: 2, message: message.into() }
}

fn size(text: &str) -> Result<ByteCount, String> {
    text.parse::<ByteCount>().map_err(|error| error.to_string())
}

fn named(text: &str) -> Result<(String, &str), String> {
    let (name, value) =
        text.split_once('=').ok_or_else(|| format!("{text:?} has no `=` after a model's name"))?;
    Ok((name.to_owned(), value))
}

fn size_of(text: &str) -> Result<(String, ByteCount), String> {
    let (name, value) = named(text)?;
    let bytes = size(value)?;
    if bytes.is_zero() { Err("a model of no bytes".to_owned()) } else { Ok((name, bytes)) }
}

fn start_of(text: &str) -> Result<(String, f64), String> {
    let (name, value) = named(text)?;
    Ok((name, above_zero(value, 3_600.0)?))
}

fn above_zero(text: &str, most: f64) -> Result<f64, String> {
    let value = between(text, most)?;
    if value > 0.0 { Ok(value) } else { Err(format!("must be more than 0, and at most {most}")) }
}

/// Two weeks at most.
fn minutes(text: &str) -> Result<f64, String> {
    above_zero(text, 20_160.0)
}

fn rate(text: &str) -> Result<f64, String> {
    above_zero(text, 60_000.0)
}

fn speed(text: &str) -> Result<f64, String> {
    let value = above_zero(text, 10_000.0)?;
    if value >= 0.001 { Ok(value) } else { Err("must be at least 0.001".to_owned()) }
}

fn tokens(text: &str) -> Result<f64, String> {
    let value = above_zero(text, 1e9)?;
    if value >= 0.01 { Ok(value) } else { Err("must be at least 0.01".to_owned()) }
}
