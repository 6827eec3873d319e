//! The tasks around the core: they carry bytes and watch processes, and decide nothing.

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
use super::{Caller, RouteError, RouteSink, Shared, policy_process, processes, steward, templates};
use crate::broker::{Core, Decision, Reached, Wanted, millis};
use crate::control::{ControlError, Greeted, Listener, Outgoing};
use crate::supervisor::{LOG_BYTES_MAX, Survivor, bound_log, open_log};

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
        tokio::spawn(processes::keep(Arc::clone(shared), place, before));
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
