//! `shoal simulate` for people, and for programs.

use std::fmt::Write as _;

use shoal_core::simulate::{Figures, Report};

use super::super::{Failure, Out};
use super::document::{Decision, Document};

const HEADINGS: [&str; 8] =
    ["MODEL", "REQUESTS", "FIRST TOKEN p50", "p99", "WAKES", "MOVED", "THRASH", "RESIDENT"];

pub(super) fn json(document: &Document, out: Out<'_>) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(document).map_err(|error| Failure::new(error.to_string()))?;
    writeln!(out, "{text}")?;
    Ok(())
}

pub(super) fn text(document: &Document, out: Out<'_>) -> Result<(), Failure> {
    write!(out, "{}", summary(document))?;
    Ok(())
}

/// A decision, the time in front.
pub(super) fn decision(decision: &Decision, out: Out<'_>) -> Result<(), Failure> {
    writeln!(out, "{}", told(decision))?;
    Ok(())
}

fn told(decision: &Decision) -> String {
    let Decision { at_s, act, model, bytes, reason } = decision;
    let what = match (*act, bytes) {
        ("evict", Some(bytes)) => format!("{model} gives {bytes} up"),
        ("restore", Some(_)) => format!("{model} is woken"),
        ("grant", Some(bytes)) => format!("{model} gets {bytes}"),
        ("deny", _) => format!("{model} is refused"),
        _ => format!("{model} waits"),
    };
    format!("{at_s:>10.3} s  {what}: {reason}")
}

fn summary(document: &Document) -> String {
    let mut text = format!(
        "{}: {} requests, {}\n",
        document.configuration, document.trace.requests, document.trace.from
    );
    for sentence in &document.assumes.sentences {
        let _ = writeln!(text, "  {sentence}");
    }
    let models = document.models.iter().map(|model| {
        format!(
            "{} {} ({}), back in {}",
            model.name,
            model.weights_bytes,
            model.size_from,
            seconds(model.wake_s)
        )
    });
    for model in models {
        let _ = writeln!(text, "  {model}");
    }
    let (ours, lru) = (&document.result, &document.whole_model_lru);
    let _ = writeln!(text, "\npolicy {}", ours.policy);
    text.push_str(&table(ours));
    text.push_str("\nwhole-model LRU, with the same speeds\n");
    text.push_str(&table(lru));
    let ratio = &document.ratio;
    let parts = [
        ("first token p50", ratio.first_token_p50),
        ("p99", ratio.first_token_p99),
        ("mean", ratio.first_token_mean),
        ("wakes", ratio.wakes),
        ("moved", ratio.moved),
        ("thrash", ratio.thrash),
    ];
    let parts = parts.map(|(name, ratio)| {
        format!("{name} {}", ratio.map_or_else(|| "-".to_owned(), |part| format!("{part:.2}")))
    });
    let _ = writeln!(text, "\nwhole-model LRU over {}: {}", ours.policy, parts.join(", "));
    text
}

fn table(report: &Report) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(report.models.iter().chain([&report.total]).map(row));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (index, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // The name to the left, figures to the right.
            let _ =
                if index == 0 { write!(line, "{cell:<width$}  ") } else { write!(line, "{cell:>width$}  ") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    for model in &report.models {
        text.push_str(&troubles(model));
    }
    if let Some(why) = &report.plan_refused_why {
        let _ =
            writeln!(text, "value decided {} of {} times instead: {why}", report.plans_refused, report.plans);
    }
    text
}

fn row(figures: &Figures) -> [String; 8] {
    let first = figures.first_token_s;
    let time = |of: Option<f64>| of.map_or_else(|| "-".to_owned(), seconds);
    [
        figures.name.clone(),
        figures.requests.to_string(),
        time(first.map(|spread| spread.p50)),
        time(first.map(|spread| spread.p99)),
        figures.wakes.to_string(),
        figures.moved_bytes.to_string(),
        format!("{:.3}", figures.thrash_index),
        format!("{:.0} %", figures.resident * 100.0),
    ]
}

/// What of a model's requests had no answer.
fn troubles(figures: &Figures) -> String {
    let mut text = String::new();
    let Figures { name, refused, timed_out, broken_off, refused_why, .. } = figures;
    let requests = |count: u64| if count == 1 { "1 request".to_owned() } else { format!("{count} requests") };
    if *refused > 0 {
        let why = refused_why.as_deref().unwrap_or("too many waited already, or for ever");
        let _ = writeln!(text, "{name}: {} refused: {why}", requests(*refused));
    }
    if *timed_out > 0 {
        let _ = writeln!(text, "{name}: {} waited longer than wait_s_max", requests(*timed_out));
    }
    if *broken_off > 0 {
        let _ = writeln!(
            text,
            "{name}: the answers of {} broke off, because it could not come back",
            requests(*broken_off)
        );
    }
    text
}

fn seconds(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.3} s") } else { format!("{seconds:.1} s") }
}
