//! What can be wrong with a configuration, as fields; the words are made here and nowhere else.

use std::path::PathBuf;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No file was named and none lies where one is looked for.
    #[error("no shoal.toml: looked for {}", list(looked_at))]
    NotFound {
        /// Where it was looked for, in that order.
        looked_at: Vec<PathBuf>,
    },
    /// The file cannot be read.
    #[error("{}: {source}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file can be read, but says something it must not.
    #[error("{}", lines(file, problems))]
    Wrong {
        /// The file.
        file: PathBuf,
        /// Everything that is wrong, at least one thing, in the file's order.
        problems: Vec<Problem>,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", then ")
}

fn lines(file: &std::path::Path, problems: &[Problem]) -> String {
    let line = |problem: &Problem| match problem.line {
        0 => format!("{}: {}", file.display(), problem.kind),
        line => format!("{}:{line}:{}: {}", file.display(), problem.column, problem.kind),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// One mistake, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1; 0 where no line is to blame.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// The mistake.
    pub kind: ProblemKind,
}

/// A mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// Not TOML.
    #[error("{message}")]
    Syntax {
        /// What the TOML parser says.
        message: String,
    },
    /// A key nobody reads.
    #[error("unknown key `{key}` in {section}{}", hint(nearest.as_deref()))]
    UnknownKey {
        /// The key.
        key: String,
        /// `[server]`, `[[model]]`, ...
        section: String,
        /// The right key that is spelt most alike, if one is.
        nearest: Option<&'static str>,
    },
    /// A value of the wrong type.
    #[error("`{key}` must be {expected}, not {found}")]
    WrongType {
        /// The key.
        key: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A value of the right type that means nothing.
    #[error("`{key}`: {why}")]
    BadValue {
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        why: String,
    },
    /// A key that must be there.
    #[error("{section} lacks `{key}`")]
    Missing {
        /// The key.
        key: &'static str,
        /// Where.
        section: String,
    },
    /// Two models of one name.
    #[error("two models are named {name:?} (the first in line {first_line}); names must differ")]
    TwoOfOneName {
        /// The name.
        name: String,
        /// The line of the first.
        first_line: usize,
    },
    /// No model at all.
    #[error("no [[model]]: a server needs at least one, with `name` and `source`")]
    NoModel,
    /// Anybody on the network could use the models.
    #[error(
        "`listen` is {listen}, which other machines can reach, so `api_key_file` must be set too \
         (a file with one key a line); to serve this machine only, listen on 127.0.0.1"
    )]
    OpenToAll {
        /// The address.
        listen: String,
    },
    /// The device cannot be used.
    #[error("{why}")]
    Device {
        /// Why, and what to write instead.
        why: String,
    },
    /// Guaranteed minimums that cannot all be kept.
    #[error("the models' `min` add up to {sum}, more than the device budget of {budget}")]
    MinimumsExceedBudget {
        /// The sum.
        sum: shoal_core::bytes::ByteCount,
        /// The budget.
        budget: shoal_core::bytes::ByteCount,
    },
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |nearest| format!("; did you mean `{nearest}`?"))
}
