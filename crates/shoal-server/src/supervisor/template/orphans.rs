//! What a template that ended left: children that nobody else waits for where orphans are this server's, which is so when it
//! is the first process of a container.
//!
//! A child whose worker this server watches is waited for there ([`Forked`](crate::supervisor::Forked)). Here are those that
//! were given up, or that the template never told of.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::supervisor::forked::inherited;
use crate::supervisor::identity;

/// How long they may take to end: nothing keeps them once their pipes have closed.
const END_WAIT_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(50);

/// A child, meant by a descriptor from before its template ended.
pub(super) struct Orphan(OwnedFd);

impl Orphan {
    /// None where it is gone, or the kernel has no such descriptors.
    fn find(pid: u32, start: u64) -> Option<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let handle = pidfd_open(number, PidfdFlags::NONBLOCK).ok()?;
        identity::seen(pid).is_some_and(|seen| seen.start == start).then_some(Self(handle))
    }
}

/// Those of a template's children that nobody watches: `given_up` by number and start, and those that it has not told of
/// (`told` has the numbers of all others), where it is still there to be asked whose they are.
pub(super) async fn of(template: u32, given_up: Vec<(u32, u64)>, told: Vec<u32>) -> Vec<Orphan> {
    let looked = tokio::task::spawn_blocking(move || {
        let untold = identity::all().into_iter();
        let untold = untold.filter(|(pid, seen)| seen.parent == template && !told.contains(pid));
        let all = given_up.into_iter().chain(untold.map(|(pid, seen)| (pid, seen.start)));
        all.filter_map(|(pid, start)| Orphan::find(pid, start)).collect()
    });
    looked.await.unwrap_or_default()
}

/// Once their template is gone: waits a bounded time until nothing is left of those that came to this server.
pub(super) async fn reap(mut orphans: Vec<Orphan>) {
    let deadline = Instant::now() + END_WAIT_MAX;
    loop {
        orphans.retain(|orphan| matches!(inherited(orphan.0.as_fd()), Ok(None)));
        if orphans.is_empty() || Instant::now() >= deadline {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}
