//! A trace of requests as text: one JSON object a line.
//!
//! ```text
//! {"at_s": 0.5, "model": "chat", "prompt_tokens": 300, "max_tokens": 120}
//! {"at_s": 2, "model": "code"}
//! ```
//!
//! Times are seconds from any one beginning, in any order; empty lines are passed over. Apart from the world that plays it,
//! because a trace is read from outside: every mistake has its line and its field, and everything is bounded.

use serde_json::Value;

use super::kind::Arrival;

/// The most requests of a trace.
pub const REQUESTS_MAX: usize = 1_000_000;
/// The longest line.
pub const LINE_BYTES_MAX: usize = 4_096;
/// The latest time (a year).
pub const AT_S_MAX: f64 = 366.0 * 86_400.0;
/// The most tokens of a prompt or an answer.
pub const TOKENS_MAX: u64 = 10_000_000;
/// Names of models that an error tells.
const NAMES_TOLD_MAX: usize = 32;
const FIELDS: [&str; 4] = ["at_s", "model", "prompt_tokens", "max_tokens"];

/// A request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// When (milliseconds from the beginning).
    pub at_ms: u64,
    /// For which model, by its place.
    pub model: usize,
    /// Tokens of its prompt, where the trace says.
    pub prompt_tokens: Option<u32>,
    /// Tokens of its answer, where the trace says.
    pub max_tokens: Option<u32>,
}

/// How fast requests are answered by a model that is there, and what a request has that says nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Service {
    /// Tokens of prompts computed in a second.
    pub prefill_tokens_s: f64,
    /// Tokens of one answer in a second.
    pub decode_tokens_s: f64,
    /// Tokens of a prompt that has no `prompt_tokens`.
    pub prompt_tokens: u32,
    /// Tokens of an answer that has no `max_tokens`.
    pub max_tokens: u32,
}

impl Default for Service {
    fn default() -> Self {
        Self { prefill_tokens_s: 5_000.0, decode_tokens_s: 50.0, prompt_tokens: 500, max_tokens: 200 }
    }
}

impl Service {
    /// How long a request takes.
    #[must_use]
    pub fn arrival(&self, asked: &Asked) -> Arrival {
        let prompt = asked.prompt_tokens.unwrap_or(self.prompt_tokens);
        let answer = asked.max_tokens.unwrap_or(self.max_tokens);
        let first_ms = ms_of(f64::from(prompt), self.prefill_tokens_s);
        let runs_ms = first_ms + ms_of(f64::from(answer), self.decode_tokens_s);
        Arrival { at_ms: asked.at_ms, model: asked.model, first_ms, runs_ms }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative; a cast saturates")]
fn ms_of(tokens: f64, tokens_s: f64) -> u64 {
    ((tokens / tokens_s * 1_000.0).ceil() as u64).min(u64::MAX >> 16)
}

/// What is wrong with a trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// A line that is no JSON object.
    #[error("line {line}: {why}; a line is a JSON object such as {{\"at_s\": 0.5, \"model\": \"chat\"}}")]
    NotAnObject {
        /// From 1.
        line: usize,
        /// What it is.
        why: String,
    },
    /// A line that is too long.
    #[error("line {line} has {bytes} bytes; {LINE_BYTES_MAX} are the most")]
    LongLine {
        /// From 1.
        line: usize,
        /// Its length.
        bytes: usize,
    },
    /// A field that must be there.
    #[error("line {line} lacks `{field}`")]
    Missing {
        /// From 1.
        line: usize,
        /// Which.
        field: &'static str,
    },
    /// A field that nobody reads.
    #[error("line {line}: unknown field `{field}`; there are {}", FIELDS.join(", "))]
    Unknown {
        /// From 1.
        line: usize,
        /// Which.
        field: String,
    },
    /// A value that means nothing.
    #[error("line {line}: `{field}` must be {expected}, not {found}")]
    Wrong {
        /// From 1.
        line: usize,
        /// Which.
        field: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A model that the configuration does not have.
    #[error("line {line}: `model` is {model:?}; the configuration has {}", known.join(", "))]
    UnknownModel {
        /// From 1.
        line: usize,
        /// Which.
        model: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// More requests than are read.
    #[error("line {line}: more than {REQUESTS_MAX} requests")]
    TooMany {
        /// From 1.
        line: usize,
    },
    /// No request at all.
    #[error("there is no request in it")]
    Empty,
}

/// Reads a trace of requests for models of these names, and sorts it by time.
///
/// # Errors
/// The first thing that is wrong, with its line and its field.
pub fn parse(text: &str, models: &[&str]) -> Result<Vec<Asked>, TraceError> {
    let mut asked = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        if text.trim().is_empty() {
            continue;
        }
        if asked.len() == REQUESTS_MAX {
            return Err(TraceError::TooMany { line });
        }
        asked.push(read(line, text, models)?);
    }
    if asked.is_empty() {
        return Err(TraceError::Empty);
    }
    asked.sort_by_key(|one| one.at_ms);
    Ok(asked)
}

fn read(line: usize, text: &str, models: &[&str]) -> Result<Asked, TraceError> {
    if text.len() > LINE_BYTES_MAX {
        return Err(TraceError::LongLine { line, bytes: text.len() });
    }
    let value: Value = serde_json::from_str(text)
        .map_err(|error| TraceError::NotAnObject { line, why: format!("not JSON ({error})") })?;
    let Value::Object(fields) = value else {
        return Err(TraceError::NotAnObject { line, why: format!("this is {}", shown(&value)) });
    };
    if let Some(field) = fields.keys().find(|field| !FIELDS.contains(&field.as_str())) {
        return Err(TraceError::Unknown { line, field: field.chars().take(64).collect() });
    }
    let wrong = |field, expected: String, found: &Value| TraceError::Wrong {
        line,
        field,
        expected,
        found: shown(found),
    };
    let needed = |field| fields.get(field).ok_or(TraceError::Missing { line, field });

    let at_s = needed("at_s")?;
    let seconds = at_s.as_f64().filter(|seconds| (0.0..=AT_S_MAX).contains(seconds));
    let seconds = seconds.ok_or_else(|| wrong("at_s", format!("seconds from 0 to {AT_S_MAX}"), at_s))?;
    let model = needed("model")?;
    let name = model.as_str().ok_or_else(|| wrong("model", "a model's name".to_owned(), model))?;
    let place = models.iter().position(|known| *known == name).ok_or_else(|| {
        let mut known: Vec<String> =
            models.iter().take(NAMES_TOLD_MAX).map(|name| (*name).to_owned()).collect();
        if models.len() > NAMES_TOLD_MAX {
            known.push(format!("and {} others", models.len() - NAMES_TOLD_MAX));
        }
        TraceError::UnknownModel { line, model: name.chars().take(64).collect(), known }
    })?;
    let tokens = |field| match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(found) => {
            let count = found.as_u64().filter(|count| (1..=TOKENS_MAX).contains(count));
            let count = count.and_then(|count| u32::try_from(count).ok());
            count
                .map(Some)
                .ok_or_else(|| wrong(field, format!("a whole number from 1 to {TOKENS_MAX}"), found))
        }
    };
    Ok(Asked {
        at_ms: ms_of(seconds, 1.0),
        model: place,
        prompt_tokens: tokens("prompt_tokens")?,
        max_tokens: tokens("max_tokens")?,
    })
}

/// A value as a sentence can say it.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 40 { text } else { text.chars().take(40).chain("...".chars()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODELS: [&str; 2] = ["chat", "code"];

    #[test]
    fn lines_become_requests_by_time() {
        let text = "{\"at_s\": 2, \"model\": \"code\", \"max_tokens\": null}\n\n\
                    {\"at_s\": 0.5, \"model\": \"chat\", \"prompt_tokens\": 300, \"max_tokens\": 120}\r\n";
        let asked = parse(text, &MODELS).expect("a trace");
        assert_eq!(
            asked,
            [
                Asked { at_ms: 500, model: 0, prompt_tokens: Some(300), max_tokens: Some(120) },
                Asked { at_ms: 2_000, model: 1, prompt_tokens: None, max_tokens: None },
            ]
        );
        let service =
            Service { prefill_tokens_s: 1_000.0, decode_tokens_s: 100.0, prompt_tokens: 50, max_tokens: 10 };
        let arrivals: Vec<_> = asked.iter().map(|one| service.arrival(one)).collect();
        assert_eq!((arrivals[0].first_ms, arrivals[0].runs_ms), (300, 1_500));
        assert_eq!((arrivals[1].first_ms, arrivals[1].runs_ms), (50, 150));
    }

    #[test]
    fn every_mistake_has_its_line_and_its_field() {
        let good = "{\"at_s\": 0, \"model\": \"chat\"}\n";
        for (line, expected) in [
            ("at 5 chat", "line 2: not JSON"),
            ("[1]", "line 2: this is [1]; a line is a JSON object"),
            ("{}", "line 2 lacks `at_s`"),
            ("{\"at_s\": 1}", "line 2 lacks `model`"),
            (
                "{\"at_s\": -1, \"model\": \"chat\"}",
                "line 2: `at_s` must be seconds from 0 to 31622400, not -1",
            ),
            (
                "{\"at_s\": \"1\", \"model\": \"chat\"}",
                "`at_s` must be seconds from 0 to 31622400, not \"1\"",
            ),
            ("{\"at_s\": 1e300, \"model\": \"chat\"}", "`at_s` must be"),
            ("{\"at_s\": 1, \"model\": 5}", "`model` must be a model's name, not 5"),
            ("{\"at_s\": 1, \"model\": \"chad\"}", "`model` is \"chad\"; the configuration has chat, code"),
            (
                "{\"at_s\": 1, \"model\": \"chat\", \"max_token\": 5}",
                "unknown field `max_token`; there are at_s, model",
            ),
            (
                "{\"at_s\": 1, \"model\": \"chat\", \"max_tokens\": 0}",
                "`max_tokens` must be a whole number from 1 to 10000000, not 0",
            ),
            ("{\"at_s\": 1, \"model\": \"chat\", \"prompt_tokens\": 1.5}", "`prompt_tokens` must be"),
        ] {
            let said = parse(&format!("{good}{line}\n"), &MODELS).expect_err(line).to_string();
            assert!(said.contains(expected) && said.contains("line 2"), "{line}: {said}");
        }
        assert_eq!(parse(" \n\n", &MODELS), Err(TraceError::Empty));
    }

    #[test]
    fn everything_is_bounded() {
        let long = format!("{{\"at_s\": 0, \"model\": \"{}\"}}", "x".repeat(LINE_BYTES_MAX));
        assert_eq!(parse(&long, &MODELS), Err(TraceError::LongLine { line: 1, bytes: long.len() }));
        let many = "{\"at_s\":0,\"model\":\"chat\"}\n".repeat(REQUESTS_MAX + 1);
        assert_eq!(parse(&many, &MODELS), Err(TraceError::TooMany { line: REQUESTS_MAX + 1 }));
    }
}
