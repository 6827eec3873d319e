//! A process that has imported all that workers need and forks them: `PYTHON -m shoal.worker.template`.
//!
//! Apart because it is no worker: it holds no lease and no memory of a device, and whatever it does, workers can be started
//! without it. So everything here ends in bounded time, with a [`Forked`] or with a sentence why there is none, and a
//! template that does not answer in time or says something else is killed. Its children do nothing before
//! [`Forked::go`] and end where that is never called; they end with the server and not with the template.
//!
//! Which models are forked, and when a template is started, is decided by `shelf::templates`.

mod orphans;
mod talk;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::process::{Child as Process, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::talk::{Order, Said, Talk};
use super::forked::Forked;
use super::identity::{self, Seen};
use super::{Launch, Survivor, log_file};
use crate::bounded::bounded;

/// Orders that may wait for it.
const ORDERS_MAX: usize = 16;
/// How much of a sentence of its own is kept.
const REASON_CHARS_MAX: usize = 240;
/// How long what it said before it ended may take to be heard.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(200);
/// Room in its arguments for those that a child shows as its own.
const SHOWN_BYTES: usize = 512;
/// How often one that takes no more orders is looked at, whether anybody still waits for how a child of it ends.
const WATCHED_LOOK: Duration = Duration::from_millis(500);
/// How long one that was killed is waited for.
const KILLED_WAIT_MAX: Duration = Duration::from_secs(5);

/// How long a template is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// From its start until it has imported all: as long as a worker may take to say hello. One that is started by itself
    /// would import as much meanwhile, so the first one loses nothing by waiting, unless the template hangs where that one
    /// would not. To give up sooner is what costs, where the machine is that busy: all is imported once more.
    pub ready: Duration,
    /// From an order to its answer.
    pub answer: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self { ready: Duration::from_mins(2), answer: Duration::from_secs(5) }
    }
}

/// What a template is started with.
#[derive(Clone, Debug)]
pub struct TemplateLaunch {
    /// The interpreter.
    pub python: PathBuf,
    /// Added to our own environment.
    pub env: BTreeMap<String, String>,
    /// Where its own output goes.
    pub log: PathBuf,
    /// How long it is waited for.
    pub waits: Waits,
}

/// A template that runs, or is about to. Dropping it ends the process, once none of the workers forked from it lives: it
/// alone can tell how they end. They go on whatever becomes of it.
#[derive(Debug)]
pub struct Template {
    pid: u32,
    began: Instant,
    orders: mpsc::Sender<Asked>,
    /// Whether it has imported all.
    ready: watch::Receiver<bool>,
    end: Arc<OnceLock<End>>,
}

#[derive(Debug)]
struct End {
    at: Instant,
    why: Why,
}

/// Why one takes no more orders, in a sentence, and whether the next one would end of the same.
#[derive(Clone, Debug)]
struct Why {
    reason: String,
    is_lasting: bool,
}

impl From<String> for Why {
    fn from(reason: String) -> Self {
        Self { reason, is_lasting: false }
    }
}

/// An order and who waits for the answer.
struct Asked {
    launch: Launch,
    log: OwnedFd,
    pipe: OwnedFd,
    answer: oneshot::Sender<Result<Born, String>>,
}

/// A child that waits for its word.
struct Born {
    pid: u32,
    start: u64,
    status: oneshot::Receiver<i32>,
}

impl Template {
    /// Starts the process, and a task of `tracker` that talks with it until nobody has the template any more or `cancel` says
    /// so. To be called where [`WorkerProcess::start`](super::WorkerProcess::start) may be.
    ///
    /// # Errors
    /// It cannot be started; why, in a sentence.
    pub fn start(
        launch: &TemplateLaunch,
        cancel: CancellationToken,
        tracker: &TaskTracker,
    ) -> Result<Self, String> {
        let say = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let output = log_file::open_log(&launch.log)
            .map_err(|error| say(&format!("its log {} cannot be written", launch.log.display()), error))?;
        let errors = output.try_clone().map_err(|error| say("its log cannot be shared", error))?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()
            .and_then(|(ours, theirs)| ours.set_nonblocking(true).map(|()| (ours, theirs)))
            .map_err(|error| say("no socket for it", error))?;
        let talk = UnixStream::from_std(ours).map_err(|error| say("no socket for it", error))?;
        let child = Command::new(&launch.python)
            .args(["-m", "shoal.worker.template", &" ".repeat(SHOWN_BYTES)])
            .envs(&launch.env)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| say(&format!("{} cannot be started", launch.python.display()), error))?;
        let pid = child.id().unwrap_or_default();
        let (orders, asked) = mpsc::channel(ORDERS_MAX);
        let (is_ready, ready) = watch::channel(false);
        let end = Arc::new(OnceLock::new());
        let keeper = Keeper {
            pid,
            end: Arc::clone(&end),
            talk: Talk::new(talk),
            asked,
            is_ready,
            waits: launch.waits,
            children: HashMap::new(),
            orders: 0,
        };
        tracker.spawn(keep(keeper, child, Arc::clone(&end), cancel));
        Ok(Self { pid, began: Instant::now(), orders, ready, end })
    }

    /// Its process id, also after it ended.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// How long it took orders, and when it took the last; none while it does. Its process may be there still, to tell how
    /// its children end.
    #[must_use]
    pub fn ended(&self) -> Option<(Duration, Instant)> {
        self.end.get().map(|end| (end.at.duration_since(self.began), end.at))
    }

    /// Forks a worker, which waits for [`Forked::go`]. Waits for the template to have imported all, and gives up in bounded
    /// time. A child that comes after it was given up, or after this future was dropped, ends without a word.
    ///
    /// # Errors
    /// Why there is none, in a sentence. The template takes no more orders then, but where all that is wrong is this one, its
    /// child, the log or the pipe.
    pub async fn fork(&self, launch: &Launch) -> Result<Forked, String> {
        let output = log_file::open_log(&launch.log).map_err(|error| error.to_string())?;
        let log_from = output.metadata().map_err(|error| error.to_string())?.len();
        let (theirs, ours) = std::io::pipe().map_err(|error| format!("no pipe for it: {error}"))?;
        let mut ready = self.ready.clone();
        if ready.wait_for(|is_ready| *is_ready).await.is_err() {
            return Err(self.why_gone());
        }
        let (answer, answered) = oneshot::channel();
        let asked = Asked { launch: launch.clone(), log: OwnedFd::from(output), pipe: theirs.into(), answer };
        // Its keeper answers each in bounded time, so whoever waits behind others does as well.
        if self.orders.send(asked).await.is_err() {
            return Err(self.why_gone());
        }
        let Ok(answer) = answered.await else { return Err(self.why_gone()) };
        let Born { pid, start, status } = answer?;
        let process = Survivor::find(pid, start, Duration::ZERO, launch.log.clone(), log_from)
            .ok_or_else(|| "the process that it forked ended at once".to_owned())?;
        Ok(Forked::new(process, log_from, status, ours))
    }

    fn why_gone(&self) -> String {
        self.end.get().map_or_else(|| "the template is ending".to_owned(), |end| end.why.reason.clone())
    }

    /// Why another of the same kind would end of the same, where it would.
    #[must_use]
    pub fn why_never(&self) -> Option<String> {
        self.end.get().filter(|end| end.why.is_lasting).map(|end| end.why.reason.clone())
    }
}

/// One process, from its start to its end.
async fn keep(mut keeper: Keeper, mut process: Process, end: Arc<OnceLock<End>>, cancel: CancellationToken) {
    let pid = keeper.pid;
    let why = {
        let mut run = std::pin::pin!(keeper.run());
        tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            ended = &mut run => ended.err(),
            // A child that has the socket still would keep its end from being seen there.
            status = process.wait() => match tokio::time::timeout(LAST_WORDS_WAIT, &mut run).await {
                Ok(ended) => ended.err(),
                Err(_) => Some(Why::from(status.map_or_else(
                    |error| format!("its process cannot be waited for: {error}"),
                    |status| format!("its process ended ({status})"),
                ))),
            },
        }
    };
    if let Some(why) = why {
        over(pid, &end, why);
    } else {
        let why = "no model needs it any more".to_owned().into();
        let _first = end.set(End { at: Instant::now(), why });
    }
    let given_up = keeper.children.iter().filter(|(_, child)| child.told.is_closed());
    let given_up: Vec<_> = given_up.map(|(pid, child)| (*pid, child.start)).collect();
    let told: Vec<_> = keeper.children.keys().copied().collect();
    // Those who wait hear of it once it can say why, and a child that was not told of ends as its pipe closes.
    drop(keeper);
    let orphans = orphans::of(pid, given_up, told).await;
    if let Err(error) = process.start_kill() {
        tracing::debug!(%error, pid, "a template was gone before its signal");
    }
    if tokio::time::timeout(KILLED_WAIT_MAX, process.wait()).await.is_err() {
        tracing::warn!(pid, "a template that was killed is still there");
    }
    if !cancel.is_cancelled() {
        orphans::reap(orphans).await;
    }
}

/// It takes no more orders. What was wrong first counts.
fn over(pid: u32, end: &OnceLock<End>, why: Why) {
    let reason = why.reason.clone();
    if end.set(End { at: Instant::now(), why }).is_ok() {
        let what = "a template takes no more orders; workers are started by themselves meanwhile";
        tracing::warn!(pid, reason, "{what}");
    } else {
        tracing::debug!(pid, reason, "a template ends that takes no more orders");
    }
}

struct Keeper {
    pid: u32,
    end: Arc<OnceLock<End>>,
    talk: Talk,
    asked: mpsc::Receiver<Asked>,
    is_ready: watch::Sender<bool>,
    waits: Waits,
    /// Those that have not ended.
    children: HashMap<u32, Child>,
    orders: u64,
}

struct Child {
    start: u64,
    /// Who waits for its status, unless it was given up.
    told: oneshot::Sender<i32>,
}

impl Keeper {
    /// Until nobody asks any more, or it can fork no more, and none of its workers lives.
    ///
    /// # Errors
    /// Why it cannot be asked any more, in a sentence.
    async fn run(&mut self) -> Result<(), Why> {
        match self.hear(self.waits.ready, "has not imported what workers need").await? {
            Said::Ready { bytes, seconds } => {
                let mib = bytes >> 20;
                tracing::info!(
                    pid = self.pid,
                    seconds,
                    resident_mib = mib,
                    "workers are forked from a process that has imported what they need"
                );
            }
            Said::Failed { reason, lasting } => {
                let reason = bounded(&reason, REASON_CHARS_MAX);
                let what =
                    if lasting { "be what workers are forked from" } else { "import what workers need" };
                return Err(Why { reason: format!("it cannot {what}: {reason}"), is_lasting: lasting });
            }
            other => return Err(format!("it said {other:?} before it was ready").into()),
        }
        self.is_ready.send_replace(true);
        while self.end.get().is_none() {
            tokio::select! {
                asked = self.asked.recv() => match asked {
                    Some(asked) => self.fork(asked).await?,
                    None => break,
                },
                said = self.talk.next() => match said {
                    Ok(Some(Said::Ended { pid, status })) => self.ended(pid, status),
                    said => return Err(out_of_turn(said).into()),
                },
            }
        }
        Ok(self.see_out().await?)
    }

    /// Takes no more orders, and hears how those end that somebody watches.
    async fn see_out(&mut self) -> Result<(), String> {
        self.asked.close();
        while let Ok(asked) = self.asked.try_recv() {
            drop(asked);
        }
        while self.children.values().any(|child| !child.told.is_closed()) {
            // Whoever watches one sees its end also where this template does not tell of it.
            match tokio::time::timeout(WATCHED_LOOK, self.talk.next()).await {
                Err(_) => {}
                Ok(Ok(Some(Said::Ended { pid, status }))) => self.ended(pid, status),
                Ok(said) => return Err(out_of_turn(said)),
            }
        }
        Ok(())
    }

    async fn fork(&mut self, asked: Asked) -> Result<(), String> {
        self.orders += 1;
        let Asked { launch, log, pipe, answer } = asked;
        let order = Order {
            fork: self.orders,
            args: launch.worker_args().to_vec(),
            model: launch.model,
            env: launch.env,
        };
        let said =
            tokio::time::timeout(self.waits.answer, self.talk.say(&order, [log.as_fd(), pipe.as_fd()]));
        match said.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(format!("it cannot be told whom to fork: {error}")),
            Err(_) => return Err("it does not read whom to fork".to_owned()),
        }
        drop((log, pipe));
        let deadline = Instant::now() + self.waits.answer;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.hear(left, "has not answered an order").await? {
                Said::Ended { pid, status } => self.ended(pid, status),
                Said::Forked { fork, pid, start } if fork == order.fork => {
                    // One that has ended by now, and was waited for, is nobody's.
                    let is_other = |seen: Seen| seen.start == start && seen.parent != self.pid;
                    if identity::seen(pid).is_some_and(is_other) {
                        return Err(format!("it named process {pid}, which is no child of it"));
                    }
                    let (sender, status) = oneshot::channel();
                    self.children.insert(pid, Child { start, told: sender });
                    // Nobody may be waiting any more: then the child finds its pipe closed.
                    let _heard = answer.send(Ok(Born { pid, start, status }));
                    return Ok(());
                }
                Said::Refused { fork, reason } if fork == order.fork => {
                    let reason = bounded(&reason, REASON_CHARS_MAX);
                    let _heard = answer.send(Err(format!("it refused: {reason}")));
                    return Ok(());
                }
                Said::Unfit { fork, reason } if fork == order.fork => {
                    // Before whoever asked hears of it, and asks for another.
                    let reason = bounded(&reason, REASON_CHARS_MAX);
                    over(self.pid, &self.end, format!("it can fork no more: {reason}").into());
                    return Ok(());
                }
                other => return Err(out_of_turn(Ok(Some(other)))),
            }
        }
    }

    fn ended(&mut self, pid: u32, status: i32) {
        if let Some(child) = self.children.remove(&pid) {
            let _heard = child.told.send(status);
        }
    }

    async fn hear(&mut self, wait_max: Duration, what: &str) -> Result<Said, String> {
        match tokio::time::timeout(wait_max, self.talk.next()).await {
            Ok(Ok(Some(said))) => Ok(said),
            Ok(said) => Err(out_of_turn(said)),
            Err(_) => Err(format!("it {what} in time")),
        }
    }
}

fn out_of_turn(said: std::io::Result<Option<Said>>) -> String {
    match said {
        Ok(None) => "its process ended".to_owned(),
        Ok(Some(said)) => format!("it said what it was not asked: {said:?}"),
        Err(error) => format!("it said what nobody understands: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::supervisor::WORKER_REMEDY;

    const LONG: Duration = Duration::from_mins(1);

    fn template(directory: &Path, ready: Duration, script: &str) -> (Template, TaskTracker) {
        let launch = TemplateLaunch {
            python: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_python.sh").into(),
            env: [("SCRIPT".to_owned(), script.to_owned())].into(),
            log: directory.join("template.out"),
            waits: Waits { ready, ..Waits::default() },
        };
        let tracker = TaskTracker::new();
        let template = Template::start(&launch, CancellationToken::new(), &tracker).expect("a process");
        (template, tracker)
    }

    fn launch(directory: &Path) -> Launch {
        Launch {
            model: "ash".to_owned(),
            command: ["python", "-m", "shoal.worker"].map(str::to_owned).to_vec(),
            env: BTreeMap::new(),
            log: directory.join("ash.log"),
            remedy: WORKER_REMEDY,
        }
    }

    #[tokio::test]
    async fn one_that_is_never_ready_is_waited_for_no_longer_and_killed() {
        let scratch = tempfile::tempdir().expect("a directory");
        let (template, tracker) = template(scratch.path(), Duration::from_millis(300), "exec sleep 100");
        let began = Instant::now();
        let why = template.fork(&launch(scratch.path())).await.expect_err("it sleeps");
        assert_eq!(why, "it has not imported what workers need in time");
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        assert!(template.ended().is_some());
        tracker.close();
        tracker.wait().await;
        assert!(!Path::new(&format!("/proc/{}", template.pid())).exists(), "it was not waited for");
        assert_eq!(template.fork(&launch(scratch.path())).await.expect_err("it is gone"), why);
    }

    #[tokio::test]
    async fn what_it_said_last_is_heard_before_how_it_ended() {
        let scratch = tempfile::tempdir().expect("a directory");
        let last = r#"echo '{"say":"failed","reason":"no torch","lasting":false}' >&0; exit 1"#;
        let (template, _tracker) = template(scratch.path(), LONG, last);
        let why = template.fork(&launch(scratch.path())).await.expect_err("it failed");
        assert_eq!(why, "it cannot import what workers need: no torch");
    }

    #[tokio::test]
    async fn its_end_is_seen_where_a_child_of_it_has_the_socket_still() {
        let scratch = tempfile::tempdir().expect("a directory");
        let (template, _tracker) = template(scratch.path(), LONG, "exec 3<&0; sleep 20 & exit 3");
        let began = Instant::now();
        let why = template.fork(&launch(scratch.path())).await.expect_err("it ended");
        assert_eq!(why, "its process ended (exit status: 3)");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn it_ends_when_nobody_has_it() {
        let scratch = tempfile::tempdir().expect("a directory");
        let script = r#"echo '{"say":"ready","bytes":1,"seconds":0.1}' >&0; exec sleep 100"#;
        let (template, tracker) = template(scratch.path(), LONG, script);
        let (pid, mut ready) = (template.pid(), template.ready.clone());
        ready.wait_for(|is_ready| *is_ready).await.expect("it is ready");
        drop(template);
        tracker.close();
        tracker.wait().await;
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
