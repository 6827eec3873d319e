//! Rows in the form of `benches/results`.

use std::env;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use shoal_device::{CudaDevice, Device};

/// Measured values of one thing, in order of size.
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    pub(crate) fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }
}

/// What a value is held against.
#[derive(Clone, Copy, Default)]
pub(crate) struct Bounds {
    pub(crate) ceiling: Option<f64>,
    pub(crate) peer: Option<(&'static str, f64)>,
    pub(crate) target: Option<f64>,
}

#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Value>,
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

impl Report {
    pub(crate) fn add(&mut self, case: &str, unit: &str, values: Vec<f64>, bounds: Bounds) {
        let samples = Samples::new(values);
        let value = samples.median();
        let (metric, better) = match unit {
            "ms" | "us" => ("time", "lower"),
            "x" => ("ratio", "lower"),
            "share" => ("ratio", "higher"),
            "cores" | "multiprocessors" => ("use", "lower"),
            _ => ("rate", "higher"),
        };
        let met =
            bounds.target.map(|target| if better == "lower" { value <= target } else { value >= target });
        let (first, last) = (samples.0[0], samples.0[samples.0.len() - 1]);
        println!(
            "{case:52} {value:9.2} {unit:5} [{first:.2} {last:.2}] ceiling {:?} target {:?} {}",
            bounds.ceiling.map(round),
            bounds.target.map(round),
            met.map_or("", |met| if met { "met" } else { "MISSED" }),
        );
        self.rows.push(json!({
            "case": case, "metric": metric, "value": round(value), "unit": unit, "better": better,
            "ceiling": bounds.ceiling.map(round), "peer": bounds.peer.map(|peer| peer.0),
            "peer_value": bounds.peer.map(|peer| peer.1), "target": bounds.target.map(round), "met": met,
            "samples": samples.0.len(), "spread": [round(first), round(last)],
        }));
    }

    /// Writes the file that `$SHOAL_RESULT` names.
    pub(crate) fn write(&self, cuda: &CudaDevice) {
        let from_environment = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let (major, minor) = cuda.facts().cuda;
        let text = json!({
            "device": cuda.info().name, "driver": from_environment("SHOAL_DRIVER"),
            "cuda": format!("{major}.{minor}"), "torch": null, "python": null,
            "shoal_commit": from_environment("SHOAL_COMMIT"), "date": today(), "rows": self.rows,
        });
        if let Some(path) = from_environment("SHOAL_RESULT") {
            fs::write(path, format!("{text:#}\n")).unwrap();
        }
    }
}

/// Days since the epoch as a date (Howard Hinnant's algorithm).
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let days = i64::try_from(seconds / 86_400).unwrap() + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}
