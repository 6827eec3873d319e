//! Keys that say how memory is shared: which policy decides, and what each model wants of it.
//!
//! Apart from [`super::parse`], which reads what a server and a model are. Whatever contradicts itself is found here, with
//! the line of the key that would have to change.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::policy::BUILTIN;
use toml::de::{DeTable, DeValue};

use super::error::{Problem, ProblemKind};
use super::parse::{ModelSection, Reader, Sited, one_of};
use super::{Engine, ModelConfig};
use crate::broker::host_need;

/// The keys of a model that are read here.
pub(super) const SHARING_KEYS: [&str; 3] = ["preload", "sleep", "apart"];
/// What the name of a policy begins with that is a function of Python.
pub(crate) const OUTSIDE: &str = "python:";
/// How long such a policy may take for one decision, by default.
const POLICY_WAIT_DEFAULT: Duration = Duration::from_millis(100);
const POLICY_WAIT_MIN: Duration = Duration::from_millis(1);
const POLICY_WAIT_MAX: Duration = Duration::from_secs(10);
const DEPTHS: [&str; 3] = ["none", "host", "source"];
const EVICTS: [&str; 2] = ["auto", "never"];

/// How deep a model may sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SleepDepth {
    /// It does not: once its weights are on the device they stay.
    None,
    /// As far as host memory: its copy there is always kept.
    Host,
    /// As far as the files that it came from, where host memory is short.
    #[default]
    Source,
}

impl SleepDepth {
    /// As in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Host => "host",
            Self::Source => "source",
        }
    }
}

/// How the server shares memory: `policy`, `shadow` and `evict` of `[server]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Who decides.
    pub policy: String,
    /// Who watches, and is only counted.
    pub shadow: Option<String>,
    /// How long a policy in a process of its own may take for one decision.
    pub policy_wait: Duration,
    /// Models are put to sleep for each other's sake. Where not, somebody has to say so each time.
    pub evicts: bool,
}

impl Default for Sharing {
    fn default() -> Self {
        Self { policy: BUILTIN[0].to_owned(), shadow: None, policy_wait: POLICY_WAIT_DEFAULT, evicts: true }
    }
}

impl Sharing {
    pub(super) fn read<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>) -> Self {
        let policy = |text: &str| -> Result<String, String> {
            if let Some(callable) = text.strip_prefix(OUTSIDE) {
                return callable_name(callable).map(|name| format!("{OUTSIDE}{name}"));
            }
            let or = format!("; or \"{OUTSIDE}MODULE:FUNCTION\", a function of Python");
            if BUILTIN.contains(&text) { Ok(text.to_owned()) } else { Err(one_of(text, &BUILTIN) + &or) }
        };
        let evicts = reader.parsed(table, "evict", |text| match text {
            "auto" => Ok(true),
            "never" => Ok(false),
            _ => Err(one_of(text, &EVICTS)),
        });
        Self {
            policy: reader
                .parsed(table, "policy", policy)
                .map_or_else(|| Self::default().policy, |name| name.value),
            shadow: reader.parsed(table, "shadow", policy).map(|name| name.value),
            policy_wait: reader
                .duration(table, "policy_wait", POLICY_WAIT_MIN, POLICY_WAIT_MAX)
                .unwrap_or(POLICY_WAIT_DEFAULT),
            evicts: evicts.is_none_or(|evicts| evicts.value),
        }
    }
}

/// Whether a policy of this name is a function of Python, which decides in a process of its own.
#[must_use]
pub fn is_outside(policy: &str) -> bool {
    policy.starts_with(OUTSIDE)
}

/// `package.module:function`; the last point may stand for the colon.
fn callable_name(text: &str) -> Result<String, String> {
    let is_name = |part: &str| {
        part.chars().enumerate().all(|(at, c)| c == '_' || c.is_alphabetic() || at > 0 && c.is_alphanumeric())
            && !part.is_empty()
    };
    let (module, function) = text.split_once(':').or_else(|| text.rsplit_once('.')).unwrap_or(("", text));
    if !module.split('.').all(is_name) || !function.split('.').all(is_name) {
        return Err(format!(
            "{text:?} names no function of a module; write \"{OUTSIDE}package.module:function\""
        ));
    }
    Ok(format!("{module}:{function}"))
}

/// What a `[[model]]` says of sharing, as written.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each field is the key of the same name; see ModelConfig")]
pub struct SharingSection {
    pub preload: bool,
    pub sleep: Option<Sited<SleepDepth>>,
    pub apart: Vec<Sited<String>>,
}

impl SharingSection {
    pub(super) fn read<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>, engine: Engine) -> Self {
        let depth = |text: &str| {
            match text {
            "none" => Ok(SleepDepth::None),
            "host" if engine == Engine::Command => {
                Err("a command has no copy in host memory; write \"none\" (it is never ended for others) or leave it out"
                    .to_owned())
            }
            "host" => Ok(SleepDepth::Host),
            "source" => Ok(SleepDepth::Source),
            _ => Err(one_of(text, &DEPTHS)),
        }
        };
        let read = Self {
            preload: reader.boolean(table, "preload"),
            sleep: reader.parsed(table, "sleep", depth),
            apart: names(reader, table),
        };
        if let (Some(value), Some(SleepDepth::None)) =
            (table.get("keep_alive"), read.sleep.as_ref().map(|sleep| sleep.value))
        {
            reader.bad(
                value,
                "keep_alive",
                "puts the model to sleep, and sleep = \"none\" says that it does not; leave one out",
            );
        }
        read
    }
}

fn names<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>) -> Vec<Sited<String>> {
    const EXPECTED: &str = "a list of models' names, such as [\"code\"]";
    let Some(value) = table.get("apart") else { return Vec::new() };
    let DeValue::Array(items) = value.get_ref() else {
        reader.wrong_type(value, "apart", EXPECTED);
        return Vec::new();
    };
    let mut names = Vec::new();
    for item in items {
        match item.get_ref().as_str() {
            Some(name) => names.push(reader.sited(&item.span(), name.to_owned())),
            None => reader.wrong_type(item, "apart", EXPECTED),
        }
    }
    names
}

/// Whether models that stand apart can.
pub(super) fn check_apart(models: &[ModelSection], problems: &mut Vec<Problem>) {
    let known: BTreeMap<&str, &ModelSection> =
        models.iter().map(|model| (model.name.value.as_str(), model)).collect();
    for model in models {
        for other in &model.sharing.apart {
            let name = other.value.as_str();
            let why = if name == model.name.value {
                "a model cannot stand apart from itself".to_owned()
            } else if let Some(found) = known.get(name) {
                match [model, found].into_iter().find_map(|one| Some((&one.name.value, stays(one)?))) {
                    Some((who, key)) => format!(
                        "{:?} and {name:?} are never on the device together, but {key} keeps {who:?} there; leave one of \
                         the two out",
                        model.name.value
                    ),
                    None => continue,
                }
            } else {
                let names = known.keys().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
                format!("there is no model {name:?}; there are {names}")
            };
            problems.push(other.problem(ProblemKind::BadValue { key: "apart".to_owned(), why }));
        }
    }
}

/// The key that keeps a model on the device for good.
fn stays(model: &ModelSection) -> Option<&'static str> {
    match () {
        () if model.pin => Some("`pin`"),
        () if model.min.is_some() => Some("`min`"),
        () if model.sharing.sleep.as_ref().is_some_and(|sleep| sleep.value == SleepDepth::None) => {
            Some("`sleep = \"none\"`")
        }
        () => None,
    }
}

/// Makes what one model says of another hold both ways.
pub(super) fn both_ways(models: &mut [ModelConfig]) {
    let said: Vec<(String, String)> = models
        .iter()
        .flat_map(|model| model.apart.iter().map(|other| (other.clone(), model.name.clone())))
        .collect();
    for (model, other) in said {
        let Some(model) = models.iter_mut().find(|known| known.name == model) else { continue };
        if !model.apart.contains(&other) {
            model.apart.push(other);
        }
    }
}

/// Whether all copies that are to stay in host memory fit there, as far as the models' files tell.
pub(super) fn check_host(
    models: &[ModelConfig],
    sites: &[Option<Sited<SleepDepth>>],
    budget: ByteCount,
    problems: &mut Vec<Problem>,
) {
    let mut sum = ByteCount::ZERO;
    for (model, site) in models.iter().zip(sites) {
        let (SleepDepth::Host, Some(weights), Some(site)) = (model.sleep, model.weights, site) else {
            continue;
        };
        sum = ByteCount(sum.0.saturating_add(host_need(weights).0));
        if sum > budget {
            let why = format!(
                "the copies that are to stay in host memory need {sum}, this one included, and `host_budget` is {budget}; \
                 raise it, or write \"source\""
            );
            problems.push(site.problem(ProblemKind::BadValue { key: "sleep".to_owned(), why }));
            return;
        }
    }
}
