//! Memory for host copies over the control socket.
//!
//! Apart from leases because a file comes with the answer: one that nobody waits for any more is closed and returned.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::FromWorker;
use shoal_device::HostBacking;
use shoal_device::host::HostFile;

use super::{BrokerClient, REQUESTS_MAX};
use crate::slab_source::{LentSlab, SlabSource};

/// A grant as it was heard.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) slab: u64,
    pub(super) bytes: ByteCount,
    pub(super) is_set_aside: bool,
    pub(super) is_zeroed: bool,
    pub(super) file: Option<OwnedFd>,
}

impl Granted {
    fn lent(self) -> Result<LentSlab, String> {
        let Self { slab, bytes, is_set_aside, is_zeroed, file } = self;
        let backing =
            if is_set_aside { HostBacking::ReservedHugePages } else { HostBacking::SharedHugePages };
        let file = file.ok_or_else(|| "no file came with the grant".to_owned())?;
        let file = HostFile::of(file, bytes, backing).map_err(|error| error.to_string())?;
        Ok(LentSlab { slab, file, is_zeroed })
    }
}

impl BrokerClient {
    /// Who lends memory for host copies, if the server does: for `ManagerOptions::slabs`.
    #[must_use]
    pub fn slab_source(self: &Arc<Self>) -> Option<Arc<dyn SlabSource>> {
        self.lends_slabs.then(|| Arc::clone(self) as _)
    }

    pub(super) fn hear_slab(&self, request: u64, granted: Granted) {
        let slab = granted.slab;
        let answer = granted.lent();
        let is_usable = answer.is_ok();
        let (is_wanted, epoch) = {
            let mut state = self.state.lock();
            // Where no descriptor is left, the slab is this process's own in the eyes of another server.
            let kept = answer.as_ref().ok().and_then(|lent| lent.file.try_clone().ok());
            let is_wanted = match state.slab_requests.get_mut(&request) {
                Some(waiting @ None) => {
                    *waiting = Some(answer);
                    true
                }
                _ => false,
            };
            if let Some(file) = kept.filter(|_| is_wanted) {
                state.lent.insert(slab, file);
            }
            (is_wanted, state.epoch)
        };
        if is_wanted {
            self.changed.notify_all();
        }
        if !is_usable || !is_wanted {
            // It cannot be used, or came too late.
            self.say(epoch, &FromWorker::SlabReturn { slab });
        }
    }
}

impl SlabSource for BrokerClient {
    fn borrow_slab(&self, bytes: ByteCount, deadline: Duration) -> Result<LentSlab, String> {
        let until = Instant::now() + deadline;
        let (request, epoch) = {
            let mut state = self.state.lock();
            if let Some(reason) = &state.closed {
                return Err(reason.clone());
            }
            if state.slab_requests.len() >= REQUESTS_MAX {
                return Err(format!("{REQUESTS_MAX} requests for memory are waiting already"));
            }
            state.requests_made += 1;
            let request = state.requests_made;
            state.slab_requests.insert(request, None);
            (request, state.epoch)
        };
        self.say(epoch, &FromWorker::SlabRequest { request, bytes });
        let mut state = self.state.lock();
        while matches!(state.slab_requests.get(&request), Some(None))
            && state.closed.is_none()
            && !self.changed.wait_until(&mut state, until).timed_out()
        {}
        let answer = state.slab_requests.remove(&request).flatten();
        let closed = state.closed.clone();
        drop(state);
        // A grant that comes later finds nobody and is returned.
        answer.unwrap_or_else(|| Err(closed.unwrap_or_else(|| format!("no answer within {deadline:?}"))))
    }

    fn return_slab(&self, slab: u64) {
        let epoch = {
            let mut state = self.state.lock();
            state.lent.remove(&slab);
            state.epoch
        };
        self.say(epoch, &FromWorker::SlabReturn { slab });
    }
}
