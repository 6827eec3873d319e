//! A policy that is a function of Python, asked as the server asks it: `python -m shoal.policy`, a JSON object a line.
//!
//! Apart from the server's own keeper of such processes, which must never wait for one: here nothing else goes on, so a
//! question waits for its answer. The first trouble (it cannot be imported, raises, says nothing for long, ends) ends the
//! simulation: `value` would decide in its place in a server, and figures of a mixture would mislead.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Deserialize;
use shoal_core::policy::{Plan, Policy, ShelfState, Value};

use crate::bounded::bounded;
use crate::config::OUTSIDE;

/// The longest that one answer, and the start with all imports, may take.
const ANSWER_WAIT_MAX: Duration = Duration::from_mins(1);
/// The longest line that it may say.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
const TROUBLE_CHARS_MAX: usize = 500;

/// What it says.
#[derive(Debug, Deserialize)]
struct Answer {
    question: Option<u64>,
    #[serde(default)]
    plan: Option<Plan>,
    #[serde(default)]
    error: Option<String>,
}

/// The policy.
#[derive(Debug)]
pub(super) struct Outside {
    name: String,
    asks: Mutex<Asks>,
}

#[derive(Debug)]
struct Asks {
    process: Process,
    to: ChildStdin,
    lines: Receiver<String>,
    number: u64,
    trouble: Option<String>,
}

/// Ends with this.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Outside {
    /// Starts `python -m shoal.policy` for `name` (`python:module:function`), whose module may lie in `directory`.
    ///
    /// # Errors
    /// A sentence: it cannot be started or imported.
    pub(super) fn start(name: &str, python: &Path, directory: &Path) -> Result<Self, String> {
        let shown = python.display();
        let spawned = Command::new(python)
            .args(["-B", "-m", "shoal.policy", name.trim_start_matches(OUTSIDE), "--path"])
            .arg(directory)
            .env("SHOAL_SERVER_PID", std::process::id().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = spawned.map_err(|error| {
            format!("{shown} cannot be started ({error}); set SHOAL_PYTHON to an interpreter that has shoal")
        })?;
        let pipes = (child.stdin.take(), child.stdout.take());
        let process = Process(child);
        let (Some(to), Some(from)) = pipes else { return Err(format!("{shown} was started without pipes")) };
        let mut asks = Asks { process, to, lines: lines_of(from), number: 0, trouble: None };
        asks.hear()?;
        Ok(Self { name: name.to_owned(), asks: Mutex::new(asks) })
    }

    /// What went wrong, if anything did.
    pub(super) fn trouble(&self) -> Option<String> {
        self.asks.lock().trouble.clone()
    }
}

impl Policy for Outside {
    fn name(&self) -> &str {
        &self.name
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        let mut asks = self.asks.lock();
        if asks.trouble.is_none() {
            match asks.ask(state, now_ms) {
                Ok(plan) => return plan,
                Err(why) => asks.trouble = Some(why),
            }
        }
        // Only so that the play comes to its end: nobody is shown what comes of it.
        Value.plan(state, now_ms)
    }
}

impl Asks {
    fn ask(&mut self, state: &ShelfState, now_ms: u64) -> Result<Plan, String> {
        self.number += 1;
        let question = serde_json::json!({"question": self.number, "now_ms": now_ms, "state": state});
        let told = writeln!(self.to, "{question}").and_then(|()| self.to.flush());
        told.map_err(|error| format!("its process does not listen any more ({error})"))?;
        let answer = self.hear()?;
        match answer.plan {
            Some(plan) if answer.question == Some(self.number) => Ok(plan),
            _ => Err("it answers another question than it was asked".to_owned()),
        }
    }

    fn hear(&mut self) -> Result<Answer, String> {
        let line = self.lines.recv_timeout(ANSWER_WAIT_MAX).map_err(|_| match self.process.0.try_wait() {
            Ok(Some(status)) => format!("its process ended ({status})"),
            _ => format!("it said nothing for {} s, or ended", ANSWER_WAIT_MAX.as_secs()),
        })?;
        let answer: Answer = serde_json::from_str(&line)
            .map_err(|error| format!("what it says is no answer ({error}): {}", bounded(&line, 80)))?;
        match &answer.error {
            Some(why) => Err(bounded(why, TROUBLE_CHARS_MAX)),
            None => Ok(answer),
        }
    }
}

/// Lines as they come, one ahead at most; a thread reads them, so that waiting for one has an end.
fn lines_of(from: ChildStdout) -> Receiver<String> {
    let (said, lines) = sync_channel(1);
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        loop {
            let mut line = String::new();
            let read = from.by_ref().take(ANSWER_BYTES_MAX).read_line(&mut line);
            if !read.is_ok_and(|bytes| bytes > 0) || said.send(line).is_err() {
                return;
            }
        }
    });
    lines
}
