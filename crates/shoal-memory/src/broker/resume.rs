//! Another server at the same socket, when the one before is gone.
//!
//! Apart because it is the one place where a connection changes. What is held is read and the epoch moved on in one step
//! under the state's lock, so that every change of it is either in the hello or said after it, never both and never
//! neither: the new server's ledger begins where this process's own count stands (I1). Nothing is unmapped because of it.

use std::io::{BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, VERSION, WorkerHolds};
use shoal_device::HostBacking;
use shoal_device::host::HostFile;

use super::files::FileStream;
use super::{Answer, BrokerClient, WRITE_WAIT, line};

/// How often another server is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long it may take to say welcome.
const WELCOME_WAIT: Duration = Duration::from_secs(10);
/// The longest wait that a server may ask for.
const WAIT_MAX: Duration = Duration::from_hours(1);

/// Why a server did not take this process on.
enum Failure {
    /// Nobody is there, or nobody that answers: later, perhaps.
    NotYet(String),
    /// It does not want this process.
    Refused(String),
}

/// The wait that a server asked for.
pub(super) fn wait_of(ms: u64) -> Duration {
    Duration::from_millis(ms).min(WAIT_MAX)
}

/// The reading thread: hears one server after another, until there is none.
pub(super) fn listen(client: &Weak<BrokerClient>, mut reader: BufReader<FileStream>) {
    loop {
        let reason = hear_all(client, &mut reader);
        let Some(reason) = reason else { return };
        match find(client, &reason) {
            Some(next) => reader = next,
            None => return,
        }
    }
}

/// Hears one server until its connection ends, and gives why; none where nobody listens any more.
fn hear_all(client: &Weak<BrokerClient>, reader: &mut BufReader<FileStream>) -> Option<String> {
    let mut line = Vec::new();
    loop {
        match line::read(reader, &mut line, None) {
            Ok(said) => {
                let brings_file = matches!(said, FromServer::SlabGrant { .. });
                let file = brings_file.then(|| reader.get_mut().take_file()).flatten();
                client.upgrade()?.hear(said, file);
            }
            Err(reason) => return Some(reason),
        }
    }
}

/// Looks for another server within the time that the last one gave; closes the client where none comes.
fn find(client: &Weak<BrokerClient>, reason: &str) -> Option<BufReader<FileStream>> {
    let (wait, until) = {
        let client = client.upgrade()?;
        let state = client.state.lock();
        let wait = if state.shutdown.is_some() { Duration::ZERO } else { state.server_wait };
        (wait, Instant::now() + wait)
    };
    if wait.is_zero() {
        client.upgrade()?.close(reason);
        return None;
    }
    tracing::warn!(reason, wait_s = wait.as_secs(), "the server is gone; another is waited for");
    loop {
        let client = client.upgrade()?;
        if client.closed().is_some() {
            return None;
        }
        match client.resume(until) {
            Ok(reader) => {
                tracing::info!("another server has taken this worker on");
                return Some(reader);
            }
            Err(Failure::Refused(why)) => {
                client.close(&format!("another server does not take this worker on: {why}"));
                return None;
            }
            Err(Failure::NotYet(why)) if Instant::now() >= until => {
                client.close(&format!("{reason}; no other came within {} s ({why})", wait.as_secs()));
                return None;
            }
            Err(Failure::NotYet(_)) => {}
        }
        drop(client);
        thread::sleep(LOOK_EVERY);
    }
}

impl BrokerClient {
    /// One try: greets whoever listens there with what this process holds.
    fn resume(self: &Arc<Self>, until: Instant) -> Result<BufReader<FileStream>, Failure> {
        let failed =
            |doing: &'static str| move |error: std::io::Error| Failure::NotYet(format!("{doing}: {error}"));
        let socket = UnixStream::connect(&self.path).map_err(failed("connect"))?;
        socket.set_write_timeout(Some(WRITE_WAIT)).map_err(failed("set a deadline"))?;
        let clone = || socket.try_clone().map_err(failed("share the socket"));
        let (reading, shutting) = (clone()?, clone()?);
        {
            let mut writer = self.writer.lock();
            writer.socket = clone()?;
            *self.socket.lock() = shutting;
            let (epoch, lines, slabs) = self.standing();
            // From here on this epoch's lines may be said, and wait for this lock behind the hello.
            writer.epoch = epoch;
            let mut lines = lines.into_iter();
            for hello in lines.by_ref().take(1) {
                writer.socket.write_all(&encode(&hello)?).map_err(failed("say hello"))?;
            }
            for (slab, file) in slabs {
                let is_set_aside = file.backing() == HostBacking::ReservedHugePages;
                let held = encode(&FromWorker::SlabHeld { slab, bytes: file.bytes(), is_set_aside })?;
                send_with(&mut writer.socket, &held, &file).map_err(failed("hand a slab over"))?;
            }
            for request in lines {
                writer.socket.write_all(&encode(&request)?).map_err(failed("ask again"))?;
            }
        }
        let mut reader = BufReader::new(FileStream::new(reading));
        let first = line::read_before(&mut reader, until.min(Instant::now() + WELCOME_WAIT));
        match first.map_err(Failure::NotYet)? {
            FromServer::Welcome { version: VERSION, server_wait_ms, forwards_when_backed, .. } => {
                let mut state = self.state.lock();
                state.server_wait = wait_of(server_wait_ms);
                state.forwards_when_backed = forwards_when_backed;
                if state.closed.is_some() {
                    return Err(Failure::Refused("this worker has ended".to_owned()));
                }
                Ok(reader)
            }
            FromServer::Welcome { version, .. } => {
                Err(Failure::Refused(format!("it speaks version {version}, this worker {VERSION}")))
            }
            FromServer::Refused { reason } => Err(Failure::Refused(reason)),
            other => Err(Failure::Refused(format!("its first line is {other:?}"))),
        }
    }

    /// Begins an epoch: its number, the hello with what is held, the requests that are open, and the slabs.
    fn standing(&self) -> (u64, Vec<FromWorker>, Vec<(u64, HostFile)>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.epoch += 1;
        let holds = WorkerHolds {
            weights: state.held.get(LeaseKind::Weights),
            kv: state.held.get(LeaseKind::Kv),
            overhead: state.held.get(LeaseKind::Overhead),
            host_budget: self.host_budget,
            capabilities: state.capabilities.clone(),
            usage: state.usage.clone(),
        };
        let hello = FromWorker::Hello {
            version: VERSION,
            model: self.model.clone(),
            pid: self.pid,
            holds: Some(Box::new(holds)),
            answers_pings: true,
        };
        let waiting = state.requests.iter().filter(|(_, asked)| matches!(asked.answer, Answer::Waiting));
        let mut waiting: Vec<_> =
            waiting.map(|(request, asked)| (*request, asked.said(*request, now))).collect();
        waiting.sort_by_key(|(request, _)| *request);
        let lines = std::iter::once(hello).chain(waiting.into_iter().map(|(_, said)| said)).collect();
        let slabs =
            state.lent.iter().filter_map(|(slab, file)| Some((*slab, file.try_clone().ok()?))).collect();
        (state.epoch, lines, slabs)
    }
}

fn encode(said: &FromWorker) -> Result<Vec<u8>, Failure> {
    line::encode(said).map_err(Failure::Refused)
}

/// Writes a line with a file, which comes with its first byte.
fn send_with(socket: &mut UnixStream, line: &[u8], file: &HostFile) -> std::io::Result<()> {
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(std::io::Error::other("no room for a descriptor"));
    }
    let sent = sendmsg(&*socket, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    socket.write_all(&line[sent..])
}
