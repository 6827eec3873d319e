//! One model's process: started or forked when the core says so, written down, watched, and seen to its end.
//!
//! Apart from the other tasks because it alone starts and ends what costs memory, and what it does has an order: written down
//! before it can be heard, seen to be gone before the next. A start may wait for a template that imports, and the model be
//! configured otherwise or go meanwhile: the core wakes it then, and is asked again before anything begins.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;

use super::Shared;
use super::tasks::KILLED_WAIT_MAX;
use crate::broker::millis;
use crate::config::{Engine, ModelConfig, ServerConfig};
use crate::supervisor::identity;
use crate::supervisor::{Entry, Exit, Forked, Launch, Survivor, VLLM_REMEDY, WORKER_REMEDY, WorkerProcess};

/// A worker's process: one that this server started or had forked, or one of a server before.
enum Process {
    Ours(WorkerProcess),
    Forked(Forked),
    Before(Survivor),
}

impl Process {
    const fn pid(&self) -> u32 {
        match self {
            Self::Ours(process) => process.pid(),
            Self::Forked(process) => process.pid(),
            Self::Before(process) => process.pid(),
        }
    }

    const fn log_from(&self) -> u64 {
        match self {
            Self::Ours(process) => process.log_from(),
            Self::Forked(process) => process.log_from(),
            // Written down already.
            Self::Before(_) => 0,
        }
    }

    fn last_line(&self) -> Option<String> {
        match self {
            Self::Ours(process) => process.last_line(),
            Self::Forked(process) => process.last_line(),
            Self::Before(process) => process.last_line(),
        }
    }

    async fn wait(&mut self) -> std::io::Result<Exit> {
        match self {
            Self::Ours(process) => process.wait().await,
            Self::Forked(process) => process.wait().await,
            Self::Before(process) => process.wait().await,
        }
    }

    async fn end(&mut self, patience: Duration) -> std::io::Result<Exit> {
        match self {
            Self::Ours(process) => process.end(patience).await,
            Self::Forked(process) => process.end(patience).await,
            Self::Before(process) => process.end(patience).await,
        }
    }

    /// What an ended one started ends too, and with it what that holds of the device.
    async fn clear_group(&self) {
        match self {
            Self::Ours(process) => process.clear_group().await,
            Self::Forked(process) => process.clear_group().await,
            Self::Before(_) => {}
        }
    }
}

/// Starts a model's worker when it is told to, and sees it end. The first may be there already.
pub(super) async fn keep(shared: Arc<Shared>, place: usize, mut before: Option<Survivor>) {
    let (start, end, end_ms_max) = shared.with(|core, _| {
        let model = &core.models[place];
        (Arc::clone(&model.start), Arc::clone(&model.end), core.timing.end_ms_max)
    });
    let patience = Duration::from_millis(end_ms_max);
    // The next one is not forked: whatever was wrong with one that was may have been just that.
    let mut by_itself = false;
    loop {
        let (mut process, _socket) = if let Some(process) = before.take() {
            let socket = shared.with(|core, _| core.models[place].socket.clone());
            (Process::Before(process), SocketFile::new(socket))
        } else {
            tokio::select! {
                () = shared.cancel.cancelled() => return,
                () = start.notified() => {}
            }
            // A worker that died by itself was also told to end, when its connection closed: that was not meant for
            // the next one.
            let _stale = end.notified().now_or_never();
            let begun = tokio::select! {
                () = shared.cancel.cancelled() => return,
                begun = begin(&shared, place, by_itself) => begun,
                // What was asked for meanwhile ends without a word: its pipe closes here.
                () = unwanted(&shared, place, &end) => Err(NotBegun::Unwanted),
            };
            match begun {
                Ok(begun) => begun,
                Err(NotBegun::Failed) => continue,
                Err(NotBegun::Unwanted) => {
                    shared.with(|core, now_ms| core.handle_unwanted(place, now_ms));
                    continue;
                }
            }
        };
        let pid = process.pid();
        let exit = tokio::select! {
            () = shared.cancel.cancelled() => None,
            exit = process.wait() => Some(exit),
            () = end.notified() => {
                tokio::select! {
                    () = shared.cancel.cancelled() => None,
                    exit = async {
                        // It may be on its way out already: that is its own, better way to end.
                        match tokio::time::timeout(patience, process.wait()).await {
                            Ok(exit) => exit,
                            Err(_) => process.end(patience).await,
                        }
                    } => Some(exit),
                }
            }
        };
        // The server ends: it is killed, and seen to be gone.
        let exit = match exit {
            Some(exit) => exit,
            None => match tokio::time::timeout(KILLED_WAIT_MAX, process.end(Duration::ZERO)).await {
                Ok(exit) => exit,
                Err(_) => return,
            },
        };
        match exit {
            Ok(exit) => {
                process.clear_group().await;
                shared.journal.lock().ended(pid);
                shared.pool.lock().process_gone(place, Instant::now());
                let last_line = process.last_line();
                by_itself = matches!(process, Process::Forked(_))
                    && shared.with(|core, _| !core.models[place].was_ready);
                shared.with(|core, now_ms| core.handle_exited(place, &exit, last_line, now_ms));
            }
            Err(error) => {
                tracing::error!(pid, %error, "a worker cannot be waited for; its lease is kept");
                return;
            }
        }
    }
}

/// Why no process came of an order to start.
enum NotBegun {
    /// It could not be started, and the core has heard why.
    Failed,
    /// What it was ordered for has gone meanwhile.
    Unwanted,
}

/// Until a start that has no process yet is not wanted any more.
async fn unwanted(shared: &Shared, place: usize, end: &Notify) {
    while shared.with(|core, _| core.wants_start(place)) {
        end.notified().await;
    }
}

/// Starts a worker, and writes it down before it can hear that it may outlive this server. One that is forked does
/// nothing before that, and may have to be waited for: this may be dropped meanwhile.
async fn begin(shared: &Shared, place: usize, by_itself: bool) -> Result<(Process, SocketFile), NotBegun> {
    let config = shared.with(|core, _| Arc::clone(&core.config));
    let (launch, path, model) = launch(shared, &config, place);
    let fingerprint = config.fingerprint(&model);
    if !shared.with(|core, _| core.wants_start(place)) {
        return Err(NotBegun::Unwanted);
    }
    let socket = SocketFile::fresh(path.clone());
    let forked = if by_itself { None } else { shared.templates.fork(shared, &config, &model, &launch).await };
    // Whatever was forked meanwhile ends as it is dropped.
    if !shared.with(|core, _| core.wants_start(place)) {
        return Err(NotBegun::Unwanted);
    }
    let started = forked.map_or_else(
        || WorkerProcess::start(&launch).map(Process::Ours),
        |forked| Ok(Process::Forked(forked)),
    );
    let mut process = match started {
        Ok(process) => process,
        Err(error) => {
            shared.with(|core, now_ms| core.handle_not_started(place, error.to_string(), now_ms));
            return Err(NotBegun::Failed);
        }
    };
    let pid = process.pid();
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let starts = shared.with(|core, _| core.models[place].starts + 1);
    let is_kept = {
        let mut journal = shared.journal.lock();
        // One that has ended by now is seen to end below.
        if let Some(start) = identity::started(pid) {
            journal.started(Entry {
                model: launch.model.clone(),
                pid,
                start,
                socket: path,
                fingerprint,
                log: launch.log.clone(),
                log_from: process.log_from(),
                starts,
                at_ms: millis(unix),
            });
        }
        journal.is_kept()
    };
    let is_wanted = shared.with(|core, now_ms| {
        core.is_journaled = is_kept;
        core.models[place].is_forked = matches!(process, Process::Forked(_));
        core.handle_started(place, pid, now_ms)
    });
    if let Process::Forked(forked) = &mut process {
        if is_wanted { forked.go() } else { forked.give_up() }
    }
    Ok((process, socket))
}

/// A worker's data socket: whatever stands in its place goes before the worker starts, and what it leaves goes after it.
pub(super) struct SocketFile(PathBuf);

impl SocketFile {
    /// One that somebody listens at.
    pub(super) const fn new(path: PathBuf) -> Self {
        Self(path)
    }

    fn fresh(path: PathBuf) -> Self {
        let file = Self(path);
        file.remove();
        file
    }

    fn remove(&self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, socket = %self.0.display(), "a stale socket could not be removed");
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

fn launch(shared: &Shared, config: &ServerConfig, place: usize) -> (Launch, PathBuf, ModelConfig) {
    let control = config.control_socket();
    let (model, log, socket) = shared.with(|core, _| {
        let model = &core.models[place];
        (model.config.clone(), model.log.clone(), model.socket.clone())
    });
    let command = match model.engine {
        Engine::Worker => {
            let control = control.to_string_lossy();
            model
                .args
                .iter()
                .map(|arg| arg.replace("{control}", &control).replace("{model}", &model.name))
                .collect()
        }
        Engine::Vllm => Launch::vllm_command(config.python_of(&model), &control, &model.name, &model.args),
        Engine::Transformers | Engine::Command => {
            Launch::worker_command(config.python_of(&model), &control, &model.name, &model.args)
        }
    };
    let mut env = model.env.clone();
    let mut remedy = WORKER_REMEDY;
    if model.engine == Engine::Vllm {
        remedy = VLLM_REMEDY;
        // The process that greets is a child of the one that has to know this, and that long before it greets.
        env.insert("SHOAL_SPEC".to_owned(), config.spec_of(&model).to_string());
        env.insert("SHOAL_DATA_SOCKET".to_owned(), socket.to_string_lossy().into_owned());
    }
    env.insert("SHOAL_RUNTIME_DIR".to_owned(), config.runtime_dir.to_string_lossy().into_owned());
    env.insert("SHOAL_CONTROL".to_owned(), control.to_string_lossy().into_owned());
    // A worker that finds another parent was orphaned before it could ask for a signal at our end.
    env.insert("SHOAL_SERVER_PID".to_owned(), std::process::id().to_string());
    env.insert("SHOAL_MODEL".to_owned(), model.name.clone());
    // `nvidia-smi` counts GPUs in the order of the bus, so workers shall too.
    env.entry("CUDA_DEVICE_ORDER".to_owned()).or_insert_with(|| "PCI_BUS_ID".to_owned());
    // Its output is a log: lines must not wait in a buffer for the process to end.
    env.entry("PYTHONUNBUFFERED".to_owned()).or_insert_with(|| "1".to_owned());
    (Launch { model: model.name.clone(), command, env, log, remedy }, socket, model)
}
