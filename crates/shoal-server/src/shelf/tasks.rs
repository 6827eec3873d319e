//! The tasks around the core: they carry bytes and watch processes, and decide nothing.

use futures_util::FutureExt;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker};
use shoal_device::HostBacking;
use shoal_device::host::HostFile;
use tokio::sync::{mpsc, oneshot};

use super::host_pool::Lent;
use super::survivors::{self, Found};
use super::{Caller, RouteError, RouteSink, Shared, policy_process, steward, templates};
use crate::broker::{Core, Decision, Reached, Wanted, millis};
use crate::config::{Engine, ModelConfig, ServerConfig};
use crate::control::{ControlError, Greeted, Listener, Outgoing};
use crate::supervisor::identity;
use crate::supervisor::{
    Entry, Exit, Forked, LOG_BYTES_MAX, Launch, Survivor, VLLM_REMEDY, WORKER_REMEDY, WorkerProcess,
    bound_log, open_log,
};

/// Messages that may wait for a worker to read them.
const MESSAGES_MAX: usize = 256;
/// Answers to requests for memory that may wait for a worker to read them.
const SLAB_ANSWERS_MAX: usize = 64;
/// Decisions that may wait to be written.
const DECISIONS_MAX: usize = 1_024;
/// After how many decisions the log's length is looked at.
const DECISIONS_BETWEEN_LOOKS: u32 = 256;
/// How often the length of the workers' logs is looked at.
const LOGS_LOOK: Duration = Duration::from_secs(5);
/// How long to wait before accepting again when that failed (no descriptors left).
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// How long a process that was killed as the server ends is waited for. It may hang in the kernel.
pub(super) const KILLED_WAIT_MAX: Duration = Duration::from_secs(5);

/// Starts them all. They end with the shared token.
pub(super) fn start(shared: &Arc<Shared>, listener: Listener, found: Vec<Found>) {
    tokio::spawn(keep_time(Arc::clone(shared)));
    tokio::spawn(keep_logs(Arc::clone(shared)));
    tokio::spawn(accept(Arc::clone(shared), listener));
    let patience = Duration::from_millis(shared.with(|core, _| core.timing.end_ms_max));
    let mut going_on = BTreeMap::new();
    for found in found {
        match found.model {
            Ok(place) => drop(going_on.insert(place, found.process)),
            Err(_) => drop(tokio::spawn(survivors::end(Arc::clone(shared), found, patience))),
        }
    }
    for place in 0..shared.with(|core, _| core.models.len()) {
        keep(shared, place, going_on.remove(&place));
    }
}

/// Starts the task of one place.
pub(super) fn keep(shared: &Arc<Shared>, place: usize, before: Option<Survivor>) {
    if shared.with(|core, _| core.models[place].is_rigid()) {
        tokio::spawn(steward::keep(Arc::clone(shared), place));
    } else {
        tokio::spawn(keep_process(Arc::clone(shared), place, before));
    }
}

/// Workers' logs stay bounded also while their workers live.
async fn keep_logs(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = tokio::time::sleep(LOGS_LOOK) => {}
        }
        let overdue = shared.pool.lock().overdue(Instant::now());
        let_go(overdue);
        let mut logs: Vec<PathBuf> =
            shared.with(|core, _| core.models.iter().map(|model| model.log.clone()).collect());
        let log_dir = shared.with(|core, _| core.config.log_dir.clone());
        logs.extend(policy_process::LOGS.map(|log| log_dir.join(log)));
        logs.push(log_dir.join(templates::LOG));
        let looked = tokio::task::spawn_blocking(move || {
            for path in logs {
                if let Err(error) = bound_log(&path, LOG_BYTES_MAX) {
                    tracing::warn!(%error, log = %path.display(), "a long log could not be put aside");
                }
            }
        });
        if looked.await.is_err() {
            return;
        }
    }
}

async fn keep_time(shared: Arc<Shared>) {
    let moved = shared.with(|core, _| Arc::clone(&core.timer_moved));
    loop {
        let at = shared.with(|core, _| core.timer_ms);
        let ring = async {
            match at {
                Some(at) => tokio::time::sleep_until(shared.base + Duration::from_millis(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = moved.notified() => {}
            () = ring => shared.with(Core::handle_timer),
        }
    }
}

async fn accept(shared: Arc<Shared>, listener: Listener) {
    loop {
        let accepted = tokio::select! {
            () = shared.cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(stream) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    match Listener::greet(stream).await {
                        Ok(greeted) => converse(shared, greeted).await,
                        Err(error) => {
                            tracing::warn!(%error, "somebody on the control socket was turned away");
                        }
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "the control socket does not accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// One worker's connection, from its hello to its end.
async fn converse(shared: Arc<Shared>, greeted: Greeted) {
    let Greeted { model, pid, holds, answers_pings, mut incoming, mut outgoing } = greeted;
    let (sender, receiver) = mpsc::channel(MESSAGES_MAX);
    let greeted = shared.with(|core, now_ms| {
        let greeting = core.handle_greeted(&model, pid, sender, holds.as_deref(), now_ms)?;
        if answers_pings {
            core.handle_answers(greeting.place, now_ms);
        }
        Ok::<_, String>(greeting)
    });
    let greeting = match greeted {
        Ok(greeting) => greeting,
        Err(reason) => {
            tracing::warn!(model, pid, reason, "a worker was turned away");
            if let Err(error) = outgoing.say(&FromServer::Refused { reason }).await {
                tracing::debug!(%error, "it does not hear why");
            }
            return;
        }
    };
    trim(&shared);
    let (slab_sender, slab_receiver) = mpsc::channel(SLAB_ANSWERS_MAX);
    let writer = tokio::spawn(write(outgoing, receiver, slab_receiver));
    let reason = loop {
        let message = tokio::select! {
            () = shared.cancel.cancelled() => break None,
            message = incoming.next() => message,
        };
        match message {
            Ok(Some(FromWorker::SlabRequest { request, bytes })) => {
                let answer = lend(&shared, greeting.place, request, bytes);
                if slab_sender.try_send(answer).is_err() {
                    break Some("it asks for memory and does not read the answers".to_owned());
                }
            }
            Ok(Some(FromWorker::SlabHeld { slab, bytes, is_set_aside })) => {
                if let Err(reason) =
                    take_on(&shared, greeting.place, slab, bytes, is_set_aside, incoming.take_file())
                {
                    tracing::warn!(model, slab, reason, "a slab of the server before stays its worker's own");
                }
            }
            Ok(Some(FromWorker::SlabReturn { slab })) => {
                let back = shared.pool.lock().take_back(greeting.place, slab);
                let_go(back);
            }
            Ok(Some(message)) => {
                if matches!(message, FromWorker::Ready { .. }) {
                    let unused = shared.pool.lock().is_ready(greeting.place);
                    let_go(unused);
                }
                shared
                    .with(|core, now_ms| core.handle_message(greeting.place, greeting.pid, message, now_ms));
            }
            Ok(None) => break None,
            // A socket that breaks is a worker that ended: how it exited and its log say more.
            Err(error @ ControlError::Io(_)) => {
                tracing::debug!(model, pid, %error, "a worker's connection broke");
                break None;
            }
            Err(error) => break Some(error.to_string()),
        }
    };
    shared.with(|core, now_ms| core.handle_disconnected(greeting, reason, now_ms));
    // Its queue is closed by now, or the worker is gone; either way it ends.
    writer.abort();
}

/// An answer to a request for memory, and the memory.
type SlabAnswer = (FromServer, Option<HostFile>);

async fn write(
    mut outgoing: Outgoing,
    mut receiver: mpsc::Receiver<FromServer>,
    mut slabs: mpsc::Receiver<SlabAnswer>,
) {
    loop {
        let said = tokio::select! {
            message = receiver.recv() => match message {
                Some(message) => outgoing.say(&message).await,
                None => return,
            },
            Some((message, file)) = slabs.recv() => match file {
                Some(file) => outgoing.say_with(&message, file.as_fd()).await,
                None => outgoing.say(&message).await,
            },
        };
        if let Err(error) = said {
            tracing::warn!(%error, "a worker could not be told something");
            return;
        }
    }
}

/// Memory for a worker's host copies, or why not.
fn lend(shared: &Shared, place: usize, request: u64, bytes: ByteCount) -> SlabAnswer {
    let mut gone = Vec::new();
    let budget = shared.with(|core, _| core.models[place].host_share);
    let lent = shared.pool.lock().lend(place, bytes, budget, &mut gone);
    let_go(gone);
    match lent {
        Ok(Lent { slab, file, is_zeroed }) => {
            let is_set_aside = file.backing() == HostBacking::ReservedHugePages;
            (FromServer::SlabGrant { request, slab, bytes, is_set_aside, is_zeroed }, Some(file))
        }
        Err(reason) => (FromServer::SlabDeny { request, reason }, None),
    }
}

/// Memory that a server before had lent to a worker that goes on.
fn take_on(
    shared: &Shared,
    place: usize,
    slab: u64,
    bytes: ByteCount,
    is_set_aside: bool,
    file: Option<OwnedFd>,
) -> Result<(), String> {
    let backing = if is_set_aside { HostBacking::ReservedHugePages } else { HostBacking::SharedHugePages };
    let file = file.ok_or_else(|| "no file came with it".to_owned())?;
    let file = HostFile::of(file, bytes, backing).map_err(|error| error.to_string())?;
    shared.pool.lock().adopt(place, slab, file)
}

/// Memory that ended workers left makes way for the shares of those that live (I1).
fn trim(shared: &Shared) {
    let (live, room) = shared.with(|core, _| {
        let live: Vec<bool> = core.models.iter().map(|model| !model.host_share.is_zero()).collect();
        let given: ByteCount = core.models.iter().map(|model| model.host_share).sum();
        (live, core.config.host_budget.saturating_sub(given))
    });
    let gone = shared.pool.lock().trim(&live, room);
    let_go(gone);
}

/// Gives memory back to the machine, which takes a moment where it is much.
pub(super) fn let_go(files: impl IntoIterator<Item = HostFile> + Send + 'static) {
    let files: Vec<HostFile> = files.into_iter().collect();
    if !files.is_empty() {
        tokio::task::spawn_blocking(move || drop(files));
    }
}

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
async fn keep_process(shared: Arc<Shared>, place: usize, mut before: Option<Survivor>) {
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
            };
            match begun {
                Some(begun) => begun,
                None => continue,
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

/// Starts a worker, and writes it down before it can hear that it may outlive this server. One that is forked does
/// nothing before that.
async fn begin(shared: &Shared, place: usize, by_itself: bool) -> Option<(Process, SocketFile)> {
    let stops = || shared.with(|core, _| core.stopping);
    let config = shared.with(|core, _| Arc::clone(&core.config));
    let (launch, path, model) = launch(shared, &config, place);
    let fingerprint = config.fingerprint(&model);
    if stops() {
        return None;
    }
    let socket = SocketFile::fresh(path.clone());
    let forked = if by_itself { None } else { shared.templates.fork(shared, &config, &model, &launch).await };
    // Nobody counts on it any more: whatever was forked meanwhile ends as it is dropped.
    if stops() {
        return None;
    }
    let started = forked.map_or_else(
        || WorkerProcess::start(&launch).map(Process::Ours),
        |forked| Ok(Process::Forked(forked)),
    );
    let mut process = match started {
        Ok(process) => process,
        Err(error) => {
            shared.with(|core, now_ms| core.handle_not_started(place, error.to_string(), now_ms));
            return None;
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
        core.handle_started(place, pid, now_ms)
    });
    if let Process::Forked(forked) = &mut process {
        if is_wanted { forked.go() } else { forked.give_up() }
    }
    Some((process, socket))
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

/// Brings a model back because it was pinned, unless it is let go before.
pub(super) async fn bring_pinned(
    shared: Arc<Shared>,
    place: usize,
    name: String,
    unwanted: oneshot::Receiver<()>,
) {
    let wait_max = shared.with(|core, _| core.config.limits.wait_max);
    let deadline = Instant::now() + wait_max;
    tokio::select! {
        () = shared.cancel.cancelled() => {}
        _ = unwanted => {}
        reached = shared.reach(&name, Wanted::Wake, deadline) => {
            let failed = reached.err().map(|error| error.to_string());
            shared.with(|core, now_ms| core.handle_pin_woke(place, failed, now_ms));
        }
    }
}

/// A place in a model's queue, given up when dropped.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) shared: Arc<Shared>,
    pub(super) place: usize,
    pub(super) ticket: u64,
    pub(super) wanted: Wanted,
    pub(super) answer: oneshot::Receiver<Result<Reached, RouteError>>,
}

impl Waiting {
    /// Gives the place up because its time is over. Gives what it was waiting for.
    pub(super) fn give_up(&self) -> String {
        self.shared.with(|core, now_ms| core.handle_too_late(self.place, self.ticket, now_ms))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.answer.close();
        match self.answer.try_recv() {
            // Answered, and nobody took it: the request it stands for is over.
            Ok(Ok(_)) => {
                if let Wanted::Route(caller) = &self.wanted {
                    self.shared.with(|core, now_ms| core.handle_route_ended(self.place, caller, now_ms));
                }
            }
            Ok(Err(_)) => {}
            Err(oneshot::error::TryRecvError::Empty | oneshot::error::TryRecvError::Closed) => {
                self.shared.with(|core, now_ms| core.handle_left(self.place, self.ticket, now_ms));
            }
        }
    }
}

/// Hears how a routed request goes.
#[derive(Debug)]
pub(super) struct Sink {
    shared: Arc<Shared>,
    place: usize,
    caller: Caller,
}

impl Sink {
    pub(super) const fn new(shared: Arc<Shared>, place: usize, caller: Caller) -> Self {
        Self { shared, place, caller }
    }
}

impl RouteSink for Sink {
    fn first_byte(&self, after: Duration, was_asleep: bool) {
        self.shared.with(|core, now_ms| {
            let model = &mut core.models[self.place];
            model.pulse.worked(now_ms);
            let times = if was_asleep { &mut model.first_byte_asleep } else { &mut model.first_byte_awake };
            times.push(after.as_secs_f64() * 1_000.0);
        });
    }

    fn tokens(&self, count: u64) {
        self.shared.with(|core, _| core.models[self.place].counts.tokens_routed += count);
    }

    fn more_bytes(&self) {
        self.shared.with(|core, now_ms| core.models[self.place].pulse.worked(now_ms));
    }

    fn no_byte(&self, waited: Duration) {
        self.shared.with(|core, now_ms| core.handle_no_byte(self.place, millis(waited), now_ms));
    }

    fn ended(&self) {
        self.shared.with(|core, now_ms| core.handle_route_ended(self.place, &self.caller, now_ms));
    }
}

/// Writes decisions, one JSON object a line, to `decisions.ndjson` (bounded as the workers' logs are). On a thread of its
/// own: it ends when the last sender is dropped.
pub(super) fn decision_log(log_dir: &Path) -> mpsc::Sender<Decision> {
    let (sender, mut receiver) = mpsc::channel::<Decision>(DECISIONS_MAX);
    let path = log_dir.join("decisions.ndjson");
    let write = move || {
        let mut file = None;
        let mut written = 0u32;
        while let Some(decision) = receiver.blocking_recv() {
            // Plain data: there is nothing in it that cannot be written.
            let Ok(mut line) = serde_json::to_string(&decision) else { continue };
            if file.is_none() || written.is_multiple_of(DECISIONS_BETWEEN_LOOKS) {
                file = open_log(&path).inspect_err(|error| tracing::warn!(%error, "no decision log")).ok();
            }
            written = written.wrapping_add(1);
            line.push('\n');
            if let Some(open) = &mut file
                && let Err(error) = open.write_all(line.as_bytes())
            {
                tracing::warn!(%error, "a decision was not written");
                file = None;
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("shoal-decisions".to_owned()).spawn(write) {
        tracing::warn!(%error, "no thread for the decision log");
    }
    sender
}
