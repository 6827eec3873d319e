//! One worker process.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};

use super::{identity, log_file};

/// How often a group whose leader has ended is looked at.
const GROUP_LOOK: Duration = Duration::from_millis(20);
/// How long what a worker left is waited for: it was killed, and gives its memory back.
const GROUP_WAIT: Duration = Duration::from_secs(10);

/// Everything it takes to start a worker.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The model it serves.
    pub model: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to our own environment.
    pub env: BTreeMap<String, String>,
    /// Where its output goes.
    pub log: PathBuf,
    /// What would be right where the program cannot be started.
    pub remedy: &'static str,
}

/// [`Launch::remedy`] of our own workers.
pub const WORKER_REMEDY: &str =
    "set `python` of the model, or SHOAL_PYTHON, to an interpreter that has shoal[serve]";

/// The same of those that run vLLM.
pub const VLLM_REMEDY: &str =
    "set `python` of the model, or SHOAL_PYTHON, to an interpreter that has shoal[vllm]";

impl Launch {
    /// The command of a worker of ours: `PYTHON -m shoal.worker --control SOCKET --model NAME ARGS`.
    #[must_use]
    pub fn worker_command(python: &Path, control_socket: &Path, model: &str, args: &[String]) -> Vec<String> {
        Self::python_command(python, "shoal.worker", control_socket, model, args)
    }

    /// The command of one that runs vLLM: `PYTHON -m shoal.vllm.serve --control SOCKET --model NAME -- ARGS`, whose
    /// arguments are vLLM's.
    #[must_use]
    pub fn vllm_command(python: &Path, control_socket: &Path, model: &str, args: &[String]) -> Vec<String> {
        let args: Vec<String> = std::iter::once("--".to_owned()).chain(args.iter().cloned()).collect();
        Self::python_command(python, "shoal.vllm.serve", control_socket, model, &args)
    }

    /// What follows the module in a command of [`worker_command`](Self::worker_command).
    pub(super) fn worker_args(&self) -> &[String] {
        self.command.get(3..).unwrap_or_default()
    }

    fn python_command(
        python: &Path,
        module: &str,
        control_socket: &Path,
        model: &str,
        args: &[String],
    ) -> Vec<String> {
        let fixed = [
            python.to_string_lossy().into_owned(),
            "-m".to_owned(),
            module.to_owned(),
            "--control".to_owned(),
            control_socket.to_string_lossy().into_owned(),
            "--model".to_owned(),
            model.to_owned(),
        ];
        fixed.into_iter().chain(args.iter().cloned()).collect()
    }
}

/// Why a worker could not be started or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SupervisorError {
    /// The log could not be opened.
    #[error("the log {path} of model {model:?} cannot be written: {source}")]
    Log {
        /// The model.
        model: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The program could not be started.
    #[error("model {model:?}: {program} cannot be started ({source}); {remedy}")]
    Spawn {
        /// The model.
        model: String,
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
        /// What would be right.
        remedy: &'static str,
    },
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its status; none where nobody can tell, because another server started it.
    pub status: Option<ExitStatus>,
    /// How long it lived.
    pub lived: Duration,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status.map(|status| (status.code(), status.signal())) {
            Some((Some(code), _)) => write!(f, "exited with status {code}")?,
            Some((None, Some(signal))) => write!(f, "was ended by signal {signal}")?,
            Some((None, None)) | None => f.write_str("ended")?,
        }
        write!(f, " after {:.1} s", self.lived.as_secs_f64())
    }
}

/// A worker that was started. Dropping it kills the process.
#[derive(Debug)]
pub struct WorkerProcess {
    child: Child,
    pid: u32,
    started: Instant,
    log: PathBuf,
    /// Where its own output begins in the log, which its predecessors wrote to as well.
    log_from: u64,
}

impl WorkerProcess {
    /// Start a worker. Its standard input is empty, its output goes to the log.
    ///
    /// Call it on a thread that lives as long as the server: a task spawned on the runtime does (its threads end with
    /// it), `spawn_blocking` and `block_in_place` do not. The parent-death signal that a worker asks for comes when the
    /// *thread* that started it ends, and an idle thread of the blocking pool ends after seconds.
    ///
    /// # Errors
    /// [`SupervisorError`]: the log cannot be written, the program cannot be run.
    pub fn start(launch: &Launch) -> Result<Self, SupervisorError> {
        let log_error =
            |source| SupervisorError::Log { model: launch.model.clone(), path: launch.log.clone(), source };
        let output = log_file::open_log(&launch.log).map_err(log_error)?;
        let errors = output.try_clone().map_err(log_error)?;
        let log_from = output.metadata().map_err(log_error)?.len();
        let program = launch.command.first().cloned().unwrap_or_default();
        let child = Command::new(&program)
            .args(launch.command.iter().skip(1))
            .envs(&launch.env)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            // A Ctrl-C in the terminal is for the server, which ends its workers in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| SupervisorError::Spawn {
                model: launch.model.clone(),
                program,
                source,
                remedy: launch.remedy,
            })?;
        let pid = child.id().unwrap_or_default();
        Ok(Self { child, pid, started: Instant::now(), log: launch.log.clone(), log_from })
    }

    /// Its process id, also after it ended.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Where its own output begins in its log.
    #[must_use]
    pub const fn log_from(&self) -> u64 {
        self.log_from
    }

    /// The last line that this process wrote to its log, shortened; none where it wrote nothing.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        log_file::last_line(&self.log, self.log_from)
    }

    /// Wait until the process is gone, its memory with it. May be dropped and called again.
    ///
    /// # Errors
    /// The operating system cannot tell.
    pub async fn wait(&mut self) -> std::io::Result<Exit> {
        let status = self.child.wait().await?;
        Ok(Exit { status: Some(status), lived: self.started.elapsed() })
    }

    /// Ask it to end (SIGTERM), and make it (SIGKILL) after `patience`.
    ///
    /// # Errors
    /// The operating system cannot tell whether it ended.
    pub async fn end(&mut self, patience: Duration) -> std::io::Result<Exit> {
        self.signal(Signal::TERM);
        if let Ok(exit) = tokio::time::timeout(patience, self.wait()).await {
            return exit;
        }
        self.child.start_kill()?;
        self.wait().await
    }

    /// [`end`](Self::end), of all that it started as well: the whole process group, as far as it stayed in it.
    ///
    /// # Errors
    /// The operating system cannot tell whether it ended.
    pub async fn end_group(&mut self, patience: Duration) -> std::io::Result<Exit> {
        self.signal_group(Signal::TERM);
        let in_time = tokio::time::timeout(patience, self.wait_group()).await;
        let exit = if let Ok(exit) = in_time {
            exit?
        } else {
            self.signal_group(Signal::KILL);
            self.wait().await?
        };
        // What outlived it, its memory included: it is gone when this comes back.
        self.clear_group().await;
        Ok(exit)
    }

    /// Kills the whole group at once.
    pub fn kill_group(&self) {
        self.signal_group(Signal::KILL);
    }

    /// Once it is gone: ends what it started and left in its group, and waits a bounded time until that is gone too, with
    /// what it holds of the device.
    pub async fn clear_group(&self) {
        clear_group(self.pid).await;
    }

    /// Waits until the process and everything else in its group is gone.
    async fn wait_group(&mut self) -> std::io::Result<Exit> {
        let exit = self.wait().await?;
        while group_runs(self.pid).await {
            tokio::time::sleep(GROUP_LOOK).await;
        }
        Ok(exit)
    }

    fn signal_group(&self, signal: Signal) {
        signal_group(self.pid, signal);
    }

    fn signal(&self, signal: Signal) {
        // `id` is None once it was waited for: only then could the number belong to somebody else.
        let Some(pid) = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) else {
            return;
        };
        if let Err(error) = rustix::process::kill_process(pid, signal) {
            tracing::debug!(%error, pid = self.pid, "a worker was gone before its signal");
        }
    }
}

/// The group that a process leads or led, whose number no other group gets while anything of it lives.
fn group(leader: u32) -> Option<Pid> {
    i32::try_from(leader).ok().and_then(Pid::from_raw)
}

fn signal_group(leader: u32, signal: Signal) {
    let Some(group) = group(leader) else { return };
    if let Err(error) = rustix::process::kill_process_group(group, signal) {
        tracing::debug!(%error, pid = leader, "a group of processes was gone before its signal");
    }
}

/// Ends what is left of a group whose leader is gone, and waits a bounded time until that is gone too.
pub(super) async fn clear_group(leader: u32) {
    let deadline = Instant::now() + GROUP_WAIT;
    while group_runs(leader).await {
        if Instant::now() >= deadline {
            tracing::warn!(pid = leader, "what a worker or command started is still there");
            return;
        }
        signal_group(leader, Signal::KILL);
        tokio::time::sleep(GROUP_LOOK).await;
    }
}

/// Whether anything of a group runs. What is left of those that ended does not, and may stay for long: orphans are waited
/// for by the first process of a machine or container, which may be one that waits for nobody.
async fn group_runs(leader: u32) -> bool {
    let Some(group) = group(leader) else { return false };
    if rustix::process::test_kill_process_group(group).is_err() {
        return false;
    }
    let looked = tokio::task::spawn_blocking(move || {
        let all = identity::all();
        let mut members = all.iter().filter(|(_, seen)| seen.group == leader).peekable();
        // Where none is shown, what the kernel says of the group counts.
        members.peek().is_none() || members.any(|(_, seen)| !seen.is_over)
    });
    looked.await.unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(directory: &Path, script: &str) -> Launch {
        Launch {
            model: "ash".to_owned(),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: [("GREETING".to_owned(), "good day".to_owned())].into(),
            log: directory.join("ash.log"),
            remedy: WORKER_REMEDY,
        }
    }

    #[tokio::test]
    async fn output_goes_to_the_log_and_the_status_is_told() -> Result<(), Box<dyn std::error::Error>> {
        let scratch = tempfile::tempdir()?;
        let mut worker =
            WorkerProcess::start(&launch(scratch.path(), "echo $GREETING; echo oh >&2; exit 3"))?;
        let exit = worker.wait().await?;
        assert_eq!(exit.status.and_then(|status| status.code()), Some(3));
        assert!(exit.to_string().starts_with("exited with status 3 after"), "{exit}");
        assert_eq!(log_file::tail(&scratch.path().join("ash.log"), 100), "good day\noh\n");
        assert_eq!(worker.last_line().as_deref(), Some("oh"));
        let mut silent = WorkerProcess::start(&launch(scratch.path(), "exit 3"))?;
        silent.wait().await?;
        assert_eq!(silent.last_line(), None, "the line before was another worker's");
        Ok(())
    }

    #[tokio::test]
    async fn one_that_ignores_the_request_is_made_to_end() -> Result<(), Box<dyn std::error::Error>> {
        let scratch = tempfile::tempdir()?;
        let script = "trap '' TERM; echo up; while :; do sleep 0.05; done";
        let mut worker = WorkerProcess::start(&launch(scratch.path(), script))?;
        let log = scratch.path().join("ash.log");
        while log_file::tail(&log, 10).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let exit = worker.end(Duration::from_millis(100)).await?;
        assert_eq!(exit.status.and_then(|status| status.signal()), Some(9));
        Ok(())
    }

    /// A process that ignores SIGTERM is left behind by a leader that obeys it.
    #[tokio::test]
    async fn a_group_is_ended_with_all_that_is_in_it() -> Result<(), Box<dyn std::error::Error>> {
        let scratch = tempfile::tempdir()?;
        let script = "(trap '' TERM; echo $(exec sh -c 'echo $PPID'); while :; do sleep 0.05; done) & wait";
        let mut worker = WorkerProcess::start(&launch(scratch.path(), script))?;
        let log = scratch.path().join("ash.log");
        while log_file::tail(&log, 100).trim().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let left: i32 = log_file::tail(&log, 100).trim().parse()?;
        // All of it passes, for who ignores the request; the leader is to end by the request and not by what follows.
        let exit = worker.end_group(Duration::from_secs(5)).await?;
        assert_eq!(exit.status.and_then(|status| status.signal()), Some(15));
        let left = Pid::from_raw(left).ok_or("a process")?;
        let is_zombie = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", left.as_raw_nonzero()));
            stat.is_ok_and(|stat| stat.contains(") Z"))
        };
        for _ in 0..6_000 {
            if rustix::process::test_kill_process(left).is_err() || is_zombie() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err("what it started outlived it".into())
    }

    #[tokio::test]
    async fn what_a_worker_leaves_is_ended_after_it() -> Result<(), Box<dyn std::error::Error>> {
        let scratch = tempfile::tempdir()?;
        let script = "(trap '' TERM; while :; do sleep 0.05; done) & exit 7";
        let mut worker = WorkerProcess::start(&launch(scratch.path(), script))?;
        let exit = worker.wait().await?;
        assert_eq!(exit.status.and_then(|status| status.code()), Some(7));
        worker.clear_group().await;
        let group = group(worker.pid).ok_or("a group")?;
        let entries = std::fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.path()));
        let alive =
            entries.filter_map(|path| std::fs::read_to_string(path.join("stat")).ok()).filter(|stat| {
                let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
                let state = fields.next();
                state != Some("Z") && fields.nth(1) == Some(&group.as_raw_nonzero().to_string())
            });
        assert_eq!(alive.count(), 0, "what it started lives on");
        Ok(())
    }

    #[test]
    fn arguments_of_vllm_follow_a_mark() {
        let command = Launch::vllm_command(
            Path::new("/py"),
            Path::new("/run/control.sock"),
            "ash",
            &["--enforce-eager".to_owned()],
        );
        let wanted =
            ["/py", "-m", "shoal.vllm.serve", "--control", "/run/control.sock", "--model", "ash", "--"];
        assert_eq!(command[..8], wanted);
        assert_eq!(command[8..], ["--enforce-eager"]);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() -> Result<(), Box<dyn std::error::Error>> {
        let scratch = tempfile::tempdir()?;
        let mut wrong = launch(scratch.path(), "");
        wrong.command = vec!["/no/such/python".to_owned()];
        let error = WorkerProcess::start(&wrong).err().ok_or("it started")?;
        assert!(error.to_string().contains("/no/such/python"), "{error}");
        Ok(())
    }

    #[tokio::test]
    async fn what_is_left_of_a_group_that_nobody_waits_for_is_not_waited_for() {
        use std::os::unix::process::CommandExt;

        let mut leader =
            std::process::Command::new("sleep").arg("100").process_group(0).spawn().expect("it runs");
        let pid = leader.id();
        assert!(group_runs(pid).await);
        leader.kill().expect("it runs");
        let began = Instant::now();
        clear_group(pid).await;
        assert!(began.elapsed() < GROUP_WAIT / 2, "{:?}", began.elapsed());
        assert!(identity::seen(pid).is_some_and(|seen| seen.is_over), "nobody has waited for it");
        leader.wait().expect("ended");
    }
}
