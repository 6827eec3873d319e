//! Events in words, as the server's log has them: sizes and times with units, the reason at the end.
//!
//! For people; programs read the events themselves (`/api/v1/events`), whose numbers are exact.

use std::fmt;

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;

use super::event::EventKind;
use super::snapshot::ModelStatus;

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ServerStarted { device, budget } => {
                write!(f, "server started on {device} with {budget} to share")
            }
            Self::ServerStopping { reason } => write!(f, "server is stopping: {reason}"),
            Self::Reloaded { added, removed, restarted, changed, policies, needs_restart } => {
                let parts = [
                    ("added", added),
                    ("removed", removed),
                    ("started anew", restarted),
                    ("changed", changed),
                    ("read anew", policies),
                    ("only at the next start", needs_restart),
                ];
                write!(f, "configuration read again ({})", parted(parts))
            }
            Self::ReloadRefused { reason } => {
                write!(f, "a configuration was not taken, and nothing changed: {reason}")
            }
            Self::StatusChanged { from, to, after_ms, bytes, reason } => {
                write!(f, "{} -> {} after {}", status(*from), status(*to), Ms(*after_ms))?;
                if !bytes.is_zero() {
                    write!(f, ", {bytes} of weights on the device")?;
                }
                if reason.is_empty() { Ok(()) } else { write!(f, ": {reason}") }
            }
            Self::WorkerStarted { pid, starts, reason } => {
                write!(f, "worker {pid} started (start {starts}): {reason}")
            }
            Self::WorkerAdopted { pid, leased, host, after_ms, .. } => write!(
                f,
                "worker {pid} of the server before goes on after {}, with {leased} on the device and {host} of host \
                 memory",
                Ms(*after_ms)
            ),
            Self::WorkerLeft { pid, reason } => {
                write!(f, "worker {pid} of the server before is ended: {reason}")
            }
            Self::WorkerLoading { phase, done, total } => write!(f, "{phase}: {done} of {total}"),
            Self::WorkerReady { pid, weights } => write!(f, "worker {pid} is ready, {weights} of weights"),
            Self::WorkerExited { pid, status, returning, .. } if !returning.is_zero() => {
                write!(f, "worker {pid} ended ({status}); {returning} are on their way back")
            }
            Self::WorkerExited { pid, status, returned, .. } => {
                write!(f, "worker {pid} ended ({status}); {returned} came back")
            }
            Self::RestartScheduled { delay_ms, reason } => {
                write!(f, "starts again in {}: {reason}", Ms(*delay_ms))
            }
            Self::ModelFailed { code, reason } => write!(f, "cannot be served ({code}): {reason}"),
            Self::RequestParked { parked } => write!(f, "{} for the model", waiting(*parked)),
            Self::RequestRefused { reason } => write!(f, "a request was refused: {reason}"),
            Self::WakeStarted { bytes, reason } => write!(f, "wakes, {bytes} to bring back: {reason}"),
            Self::WakeBacked { bytes, after_ms, parked } => {
                let said = format!("has its memory after {}, {bytes} are coming", Ms(*after_ms));
                for_it(f, &said, *parked)
            }
            Self::WakeDone { bytes, duration_ms, parked } => {
                for_it(f, &format!("awake: {bytes} in {}", Ms(*duration_ms)), *parked)
            }
            Self::WakeFailed { reason } => write!(f, "did not wake: {reason}"),
            Self::EvictStarted { bytes, reason, .. } => write!(f, "gives up {bytes}: {reason}"),
            Self::EvictDone { bytes, copied, duration_ms, error } => {
                write!(f, "gave up {bytes} in {}, ", Ms(*duration_ms))?;
                if copied.is_zero() {
                    f.write_str("nothing to copy")?;
                } else {
                    write!(f, "{copied} copied first")?;
                }
                error.as_ref().map_or(Ok(()), |error| write!(f, "; {error}"))
            }
            Self::EvictTimedOut { bytes, missing, after_ms } => {
                write!(f, "gave up too little in {}: {missing} of {bytes} missing", Ms(*after_ms))
            }
            Self::LeaseGranted { lease, bytes, leased, reason, .. } => {
                write!(f, "lease for {} +{bytes}, {leased} leased in all: {reason}", kind(*lease))
            }
            Self::LeaseDenied { lease, bytes, reason, .. } => {
                write!(f, "no lease of {bytes} for {}: {reason}", kind(*lease))
            }
            Self::LeaseReturned { lease, bytes, leased } => {
                write!(f, "lease for {} -{bytes}, {leased} leased in all", kind(*lease))
            }
            Self::Drifted { .. }
            | Self::DeviceTaken { .. }
            | Self::MemoryReturned { .. }
            | Self::DriverLost { .. }
            | Self::DriverFound { .. }
            | Self::OverheadCorrected { .. } => driver(f, self),
            Self::WorkerSilent { .. } | Self::WorkerHeard { .. } | Self::WorkerHung { .. } => {
                silence(f, self)
            }
            Self::ProtocolError { reason } => write!(f, "broke the protocol and is ended: {reason}"),
            Self::Thrashing { thrashed, served } => thrashing(f, *thrashed, *served),
            Self::PolicyRefused { policy, instead, reason } => {
                write!(f, "a plan of {policy} was not obeyed, {instead} decided: {reason}")
            }
            Self::Pinned { pinned: true } => f.write_str("pinned"),
            Self::Pinned { pinned: false } => f.write_str("no longer pinned"),
        }
    }
}

impl EventKind {
    /// True for what whoever runs the server should look at.
    #[must_use]
    pub const fn is_trouble(&self) -> bool {
        matches!(
            self,
            Self::ModelFailed { .. }
                | Self::WakeFailed { .. }
                | Self::EvictTimedOut { .. }
                | Self::ProtocolError { .. }
                | Self::WorkerSilent { .. }
                | Self::WorkerHung { .. }
                | Self::DriverLost { .. }
                | Self::Thrashing { .. }
                | Self::PolicyRefused { .. }
                | Self::WorkerLeft { .. }
                | Self::ReloadRefused { .. }
                | Self::RestartScheduled { .. }
        )
    }
}

fn thrashing(f: &mut fmt::Formatter<'_>, thrashed: ByteCount, served: ByteCount) -> fmt::Result {
    write!(
        f,
        "models come back soon after they left: {thrashed} within a minute, where requests were answered with {served}; \
         fewer models at once, a longer `quantum` or more memory would help"
    )
}

/// What a worker did not say.
fn silence(f: &mut fmt::Formatter<'_>, what: &EventKind) -> fmt::Result {
    match what {
        EventKind::WorkerSilent { pid, silent_ms, silent_ms_max, leased } => {
            let (silent, end) = (Ms(*silent_ms), Ms(*silent_ms_max));
            write!(
                f,
                "worker {pid} has not answered for {silent} and has {leased} leased; at {end} it is ended"
            )
        }
        EventKind::WorkerHeard { pid, after_ms } => {
            write!(f, "worker {pid} answers again, after {}", Ms(*after_ms))
        }
        EventKind::WorkerHung { pid, leased, reason } => {
            write!(f, "worker {pid} is ended, and {leased} come back with it: {reason}")
        }
        _ => Ok(()),
    }
}

/// What the device's driver showed, or a worker of it.
fn driver(f: &mut fmt::Formatter<'_>, what: &EventKind) -> fmt::Result {
    match what {
        EventKind::Drifted { seen, leased } => {
            write!(f, "has {seen} of the device by the driver's word, {leased} of it leased")
        }
        EventKind::DeviceTaken { others, drift, taken, left, owed, who } => {
            device_taken(f, (*others, *drift, *taken, *left, *owed), who)
        }
        EventKind::MemoryReturned { pid, bytes, after_ms, seen: true } => {
            write!(f, "{bytes} of process {pid} are free, {} after its end", Ms(*after_ms))
        }
        EventKind::MemoryReturned { pid, bytes, after_ms, .. } => write!(
            f,
            "{bytes} of process {pid} were not seen to be free within {}; what is missing counts as others'",
            Ms(*after_ms)
        ),
        EventKind::DriverLost { reason } => {
            write!(f, "what is taken of the device cannot be read, and the ledger alone counts: {reason}")
        }
        EventKind::OverheadCorrected { overhead, uncovered } if uncovered.is_zero() => {
            write!(f, "takes {overhead} besides its regions")
        }
        EventKind::OverheadCorrected { overhead, uncovered } => {
            write!(f, "takes {overhead} besides its regions, {uncovered} of it not covered yet")
        }
        EventKind::DriverFound { source } => write!(f, "what is taken of the device is read again: {source}"),
        _ => Ok(()),
    }
}

type Figures = (ByteCount, ByteCount, ByteCount, ByteCount, ByteCount);

fn device_taken(
    f: &mut fmt::Formatter<'_>,
    (others, drift, taken, left, owed): Figures,
    who: &[String],
) -> fmt::Result {
    if taken.is_zero() {
        return write!(f, "all of the device's budget can be shared again: {left}");
    }
    write!(f, "{taken} of the device's budget are taken, {left} are left to share: others have {others}")?;
    if !who.is_empty() {
        write!(f, " ({})", who.join(", "))?;
    }
    if !drift.is_zero() {
        write!(f, ", models {drift} beyond their leases")?;
    }
    if owed.is_zero() { Ok(()) } else { write!(f, "; {owed} are to come back") }
}

/// Milliseconds, as seconds where that reads better.
struct Ms(u64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1000 {
            return write!(f, "{} ms", self.0);
        }
        write!(f, "{}.{} s", self.0 / 1000, self.0 % 1000 / 100)
    }
}

/// Those parts that have anything in them.
fn parted<const PARTS: usize>(parts: [(&str, &Vec<String>); PARTS]) -> String {
    let parts = parts.iter().filter(|(_, names)| !names.is_empty());
    let parts: Vec<String> = parts.map(|(what, names)| format!("{what}: {}", names.join(", "))).collect();
    if parts.is_empty() { "nothing changed".to_owned() } else { parts.join("; ") }
}

fn waiting(requests: u64) -> String {
    if requests == 1 { "1 request waits".to_owned() } else { format!("{requests} requests wait") }
}

/// What is said of a wake, and who waited for it, where somebody did.
fn for_it(f: &mut fmt::Formatter<'_>, said: &str, parked: u64) -> fmt::Result {
    if parked == 0 { f.write_str(said) } else { write!(f, "{said}, {} for it", waited(parked)) }
}

fn waited(requests: u64) -> String {
    if requests == 1 { "1 request waited".to_owned() } else { format!("{requests} requests waited") }
}

const fn kind(kind: LeaseKind) -> &'static str {
    match kind {
        LeaseKind::Weights => "weights",
        LeaseKind::Kv => "KV",
        LeaseKind::Overhead => "overhead",
    }
}

/// A status in words.
pub(crate) const fn status(status: ModelStatus) -> &'static str {
    match status {
        ModelStatus::Waiting => "waiting",
        ModelStatus::Starting => "starting",
        ModelStatus::Asleep => "asleep",
        ModelStatus::Waking => "waking",
        ModelStatus::Awake => "awake",
        ModelStatus::PartlyResident => "partly resident",
        ModelStatus::Draining => "draining",
        ModelStatus::Restarting => "restarting",
        ModelStatus::Failed => "failed",
        ModelStatus::Stopped => "stopped",
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::bytes::ByteCount;

    use super::*;

    #[test]
    fn events_are_told_in_words_with_units() {
        let reason = || "because".to_owned();
        for (event, words) in [
            (
                EventKind::ServerStarted { device: "sim".to_owned(), budget: ByteCount::mib(540) },
                "server started on sim with 540 MiB to share",
            ),
            (
                EventKind::StatusChanged {
                    from: ModelStatus::Awake,
                    to: ModelStatus::PartlyResident,
                    after_ms: 61_500,
                    bytes: ByteCount::mib(96),
                    reason: reason(),
                },
                "awake -> partly resident after 61.5 s, 96 MiB of weights on the device: because",
            ),
            (EventKind::RequestParked { parked: 1 }, "1 request waits for the model"),
            (
                EventKind::WakeDone { bytes: ByteCount::mib(96), duration_ms: 1234, parked: 2 },
                "awake: 96 MiB in 1.2 s, 2 requests waited for it",
            ),
            (
                EventKind::WakeBacked { bytes: ByteCount::mib(96), after_ms: 12, parked: 1 },
                "has its memory after 12 ms, 96 MiB are coming, 1 request waited for it",
            ),
            (
                EventKind::WakeDone { bytes: ByteCount::mib(96), duration_ms: 999, parked: 0 },
                "awake: 96 MiB in 999 ms",
            ),
            (
                EventKind::EvictDone {
                    bytes: ByteCount::mib(8),
                    copied: ByteCount::mib(2),
                    duration_ms: 3,
                    error: Some("the rest is in use".to_owned()),
                },
                "gave up 8 MiB in 3 ms, 2 MiB copied first; the rest is in use",
            ),
            (
                EventKind::LeaseGranted {
                    lease: LeaseKind::Kv,
                    bytes: ByteCount::mib(2),
                    leased: ByteCount::mib(1536),
                    reason: reason(),
                    waited_ms: 0,
                    decision: Some(3),
                },
                "lease for KV +2 MiB, 1.5 GiB leased in all: because",
            ),
            (
                EventKind::OverheadCorrected { overhead: ByteCount::mib(3), uncovered: ByteCount::mib(1) },
                "takes 3 MiB besides its regions, 1 MiB of it not covered yet",
            ),
        ] {
            assert_eq!(event.to_string(), words);
        }
    }
}
