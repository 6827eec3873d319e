//! Keys of `[server]` that say how long a worker may be silent before it is ended.
//!
//! Apart from [`super::parse`], which reads what a server is, because both mean "never" by 0.

use std::time::Duration;

use toml::de::DeTable;

use super::parse::Reader;

const SILENT_KEY: &str = "silent_s_max";
const STUCK_KEY: &str = "stuck_s_max";
const SILENT_MIN: u64 = 5;
const STUCK_MIN: u64 = 10;
const MOST: u64 = 86_400;

/// How long a worker may be silent; `None`: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Its process does not answer.
    pub silent_max: Option<Duration>,
    /// Its process answers, and nothing comes of the requests that it has.
    pub stuck_max: Option<Duration>,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silent_max: Some(Duration::from_mins(1)), stuck_max: Some(Duration::from_mins(15)) }
    }
}

impl Patience {
    pub(super) fn read<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>) -> Self {
        let default = Self::default();
        Self {
            silent_max: one(reader, table, SILENT_KEY, SILENT_MIN, default.silent_max),
            stuck_max: one(reader, table, STUCK_KEY, STUCK_MIN, default.stuck_max),
        }
    }
}

/// What one key says, or `default` where it says nothing that can be.
fn one<'i>(
    reader: &mut Reader<'i>,
    table: &DeTable<'i>,
    key: &str,
    least: u64,
    default: Option<Duration>,
) -> Option<Duration> {
    let Some(seconds) = reader.seconds(table, key) else { return default };
    if seconds == 0 {
        return None;
    }
    if !(least..=MOST).contains(&seconds) {
        let why = format!("must be 0 (never), or between {least} s and {} h", MOST / 3_600);
        table.get(key).into_iter().for_each(|value| reader.bad(value, key, why.clone()));
    }
    Some(Duration::from_secs(seconds))
}
