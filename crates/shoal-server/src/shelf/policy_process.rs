//! The process of a policy that is a function of Python: `PYTHON -m shoal.policy MODULE:FUNCTION`.
//!
//! The server has no Python in it, and a function that hangs must not hang it. So the function runs in a process of its
//! own and is asked over pipes: one JSON object a line, [`Question`] out, [`Answer`] back, one at a time. Nothing is decided
//! here; the core asks, waits and does without ([`crate::broker`]). What it prints goes to `policy.out` beside the workers'
//! logs, or to `policy-shadow.out` where it only watches.
//!
//! One that ends, says something else, or says nothing for much longer than it may take is ended and started again, with
//! growing pauses. It ends with this server: dropping it kills it, and it asks for a signal at the server's death.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;
use shoal_core::policy::Plan;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

use super::Shared;
use super::policy_code::Code;
use crate::bounded::bounded;
use crate::broker::outside::{Question, REASON_CHARS_MAX, Standing};
use crate::broker::{Core, millis};
use crate::config::OUTSIDE;
use crate::supervisor::{Backoff, last_line, open_log};

/// What the one that decides prints, and what the one that watches; no model's log is called so.
pub(super) const LOGS: [&str; 2] = ["policy.out", "policy-shadow.out"];
/// From its start until it says that it can be asked; it may import much.
const START_WAIT_MAX: Duration = Duration::from_mins(1);
/// How many times longer than it may take before it is ended, and the least of that.
const SILENCE_WAITS: u32 = 20;
const SILENCE_MIN: Duration = Duration::from_secs(2);
/// The longest answer.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// What the process says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    /// The question's number; none where it says that it can be asked, or why it cannot.
    question: Option<u64>,
    #[serde(default)]
    plan: Option<Plan>,
    /// What it raised, in a sentence.
    #[serde(default)]
    error: Option<String>,
    /// Where it says that it can be asked: the files that its policy was read from.
    #[serde(default)]
    files: Vec<PathBuf>,
}

/// One policy, and where its questions come from.
struct Keeper {
    shared: Arc<Shared>,
    id: u64,
    name: String,
    log: &'static str,
    silence_max: Duration,
    questions: mpsc::Receiver<Question>,
}

/// Starts the tasks of those policies outside that have none yet.
pub(super) fn keep_all(shared: &Arc<Shared>) {
    let waiting = shared.with(|core, _| {
        let Core { outside, outside_shadow, config, .. } = core;
        let wait = config.sharing.policy_wait;
        let silence_max = (wait * SILENCE_WAITS).max(SILENCE_MIN);
        let policies = [outside, outside_shadow].into_iter().zip(LOGS);
        let fresh = policies.filter_map(|(policy, log)| {
            let policy = policy.as_mut()?;
            let (id, name, questions) = (policy.id, policy.name.clone(), policy.take_questions()?);
            Some(Keeper { shared: Arc::clone(shared), id, name, log, silence_max, questions })
        });
        fresh.collect::<Vec<_>>()
    });
    for keeper in waiting {
        tokio::spawn(keeper.keep());
    }
}

impl Keeper {
    /// Until nobody asks any more, or the server ends.
    async fn keep(mut self) {
        let mut backoff = Backoff::default();
        let cancel = self.shared.cancel.clone();
        loop {
            let began = Instant::now();
            let reason = tokio::select! {
                () = cancel.cancelled() => return,
                ended = self.run() => match ended {
                    Ok(()) => return,
                    Err(reason) => bounded(&reason, REASON_CHARS_MAX),
                },
            };
            tracing::warn!(policy = self.name, reason, "the process of a policy is started again");
            let wait = backoff.ended(began.elapsed());
            self.stands(Standing::Down(reason));
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            if self.questions.is_closed() {
                return;
            }
        }
    }

    fn stands(&self, standing: Standing) {
        self.shared.with(|core, now_ms| core.handle_policy_stands(self.id, standing, now_ms));
    }

    /// One process, from its start to its end.
    ///
    /// # Errors
    /// Why it cannot be asked any more, in a sentence that says the same each time for the same cause.
    async fn run(&mut self) -> Result<(), String> {
        let began = SystemTime::now();
        let mut process = Process::start(&self.shared, &self.name, self.log)?;
        let ready = process.hear(START_WAIT_MAX).await?;
        if let Some(error) = ready.error {
            return Err(format!("it cannot be used: {error}"));
        }
        let code = tokio::task::spawn_blocking(move || Code::of(ready.files, began)).await;
        let (id, code) = (self.id, code.unwrap_or_default());
        self.shared.with(|core, _| core.handle_policy_read(id, code));
        // What the one before was asked and did not hear: nobody waits for that any more.
        while self.questions.try_recv().is_ok() {}
        self.stands(Standing::Ready);
        loop {
            let question = tokio::select! {
                question = self.questions.recv() => question,
                ended = process.ended() => return Err(ended),
            };
            let Some(question) = question else { return Ok(()) };
            process.ask(&question).await?;
            let answer = process.hear(self.silence_max).await?;
            if answer.question != Some(question.number) {
                return Err("it answered another question than it was asked".to_owned());
            }
            let plan = match (answer.plan, answer.error) {
                (_, Some(error)) => Err(format!("it raised {error}")),
                (Some(plan), None) => Ok(plan),
                (None, None) => Err("it gave no plan".to_owned()),
            };
            let (id, number) = (self.id, question.number);
            self.shared.with(|core, now_ms| core.handle_planned(id, number, plan, now_ms));
        }
    }
}

/// A process and the pipes to it. Dropping it kills the process.
struct Process {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    log: PathBuf,
    log_from: u64,
}

impl Process {
    fn start(shared: &Shared, name: &str, log: &str) -> Result<Self, String> {
        let config = shared.with(|core, _| Arc::clone(&core.config));
        let log = config.log_dir.join(log);
        let output = open_log(&log)
            .map_err(|error| format!("its log {} cannot be written: {error}", log.display()))?;
        let log_from = output.metadata().map_or(0, |about| about.len());
        let directory = config.file.parent().unwrap_or(std::path::Path::new("/"));
        let spawned = Command::new(&config.python)
            // Python takes bytecode for that of a file which was written in the same second and is as long.
            .args(["-B", "-m", "shoal.policy", name.trim_start_matches(OUTSIDE), "--path"])
            .arg(directory)
            .env("SHOAL_SERVER_PID", std::process::id().to_string())
            .env("PYTHONUNBUFFERED", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        let python = config.python.display();
        let mut child = spawned.map_err(|error| {
            format!("{python} cannot be started ({error}); set SHOAL_PYTHON to an interpreter that has shoal")
        })?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(to), Some(from)) => Ok(Self { child, to, from: BufReader::new(from), log, log_from }),
            _ => Err(format!("{python} was started without pipes")),
        }
    }

    /// How it ended, in a sentence.
    async fn ended(&mut self) -> String {
        let how = match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let last = last_line(&self.log, self.log_from).map(|line| format!(": {line}")).unwrap_or_default();
        format!("its process ended ({how}){last}")
    }

    async fn ask(&mut self, question: &Question) -> Result<(), String> {
        // Plain data: there is nothing in it that cannot be written.
        let mut line = serde_json::to_vec(question).map_err(|error| error.to_string())?;
        line.push(b'\n');
        if tokio::time::timeout(SILENCE_MIN, self.to.write_all(&line)).await.is_ok_and(|said| said.is_ok()) {
            return Ok(());
        }
        Err(self.gone_or("it does not read its questions").await)
    }

    /// Its next line.
    async fn hear(&mut self, wait_max: Duration) -> Result<Answer, String> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.from).take(ANSWER_BYTES_MAX as u64 + 1);
        match tokio::time::timeout(wait_max, bounded.read_until(b'\n', &mut line)).await {
            Err(_) => return Err(format!("it said nothing for {} ms and was ended", millis(wait_max))),
            Ok(Err(error)) => return Err(error.to_string()),
            Ok(Ok(_)) if line.len() > ANSWER_BYTES_MAX => {
                return Err(format!("its answer is longer than {ANSWER_BYTES_MAX} bytes"));
            }
            Ok(Ok(_)) if line.ends_with(b"\n") => {}
            Ok(Ok(_)) => return Err(self.gone_or("its answer is not whole").await),
        }
        serde_json::from_slice(&line).map_err(|error| format!("it answered what is no plan: {error}"))
    }

    /// How it ended, where it did; else `otherwise`.
    async fn gone_or(&mut self, otherwise: &str) -> String {
        tokio::time::timeout(SILENCE_MIN, self.ended()).await.unwrap_or_else(|_| otherwise.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::policy::ShelfState;

    use super::*;
    use crate::config::{MachineMemory, ServerConfig, Surroundings, parse};
    use crate::shelf::Shelf;

    /// A shelf without models whose interpreter is `tests/fake_policy.py`.
    fn shelf(scratch: &std::path::Path) -> Shelf {
        let surroundings = Surroundings {
            working_dir: scratch.to_owned(),
            home: None,
            config_home: None,
            state_home: scratch.join("state"),
            cache_home: scratch.join("cache"),
            runtime_dir: scratch.join("run"),
            python: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_policy.py").into(),
            memory: MachineMemory::default(),
            shared_memory: None,
            nvidia: None,
            gpus: None,
            budgets_before: None,
        };
        let text = "[server]\ndevice = 'sim'\ndevice_budget = '1GiB'\nhost_budget = '1GiB'\n[[model]]\nname = 'a'\nsource = 'b/c'";
        let config: ServerConfig = parse(text)
            .and_then(|file| file.resolve(&scratch.join("shoal.toml"), &surroundings))
            .unwrap_or_else(|problems| panic!("{problems:?}"));
        std::fs::create_dir_all(&config.log_dir).expect("made");
        Shelf::start(Arc::new(config)).expect("the shelf starts")
    }

    /// One thread, so that nothing comes between what the keeper does without waiting.
    #[tokio::test(flavor = "current_thread")]
    async fn what_the_one_before_did_not_hear_is_not_asked_of_the_next() {
        let scratch = tempfile::tempdir_in("/tmp").expect("a directory");
        let shelf = shelf(scratch.path());
        let (sender, questions) = mpsc::channel(1);
        let question = |number| Question { number, now_ms: 0, state: Arc::new(ShelfState::default()) };
        sender.try_send(question(1)).expect("there is room");
        let mut keeper = Keeper {
            shared: Arc::clone(shelf.shared()),
            id: u64::MAX,
            name: "python:a:b".to_owned(),
            log: LOGS[0],
            silence_max: Duration::from_mins(1),
            questions,
        };
        let asked = async {
            // Taken once there is room, and with that once the first one is gone.
            sender.send(question(2)).await.expect("it is kept");
            loop {
                let asked = std::fs::read_to_string(scratch.path().join("asked")).unwrap_or_default();
                if asked.ends_with('\n') {
                    return asked;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let asked = tokio::select! {
            ended = keeper.run() => panic!("{ended:?}"),
            asked = asked => asked,
            () = tokio::time::sleep(Duration::from_mins(1)) => panic!("it was never asked"),
        };
        assert_eq!(asked, "2\n");
    }
}
