//! The cache's own thread: maps what is expected, gives back what is empty.
//!
//! Apart because it has its own time. It sleeps until it is called or until the demand that it has seen grows old; it asks
//! for a lease without waiting for one, and after a refusal, or a reclaim, it keeps still for a while: what was just taken
//! from this process is not for it to take again. It holds no lock while it maps or waits, and never the GIL. It ends with
//! its cache, which waits for it: all that it waits for has a deadline of a fraction of a second.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use shoal_core::kv::demand::MOMENT;

use super::Shared;

/// How long it sleeps while nothing is asked for.
const IDLE: Duration = Duration::from_mins(1);
/// How soon it looks again at what could not be freed because a step ran.
const RETRY: Duration = Duration::from_millis(20);
/// How long it keeps still after a refusal, at first and at most.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long it keeps still after memory was reclaimed.
const PAUSE_RECLAIMED: Duration = Duration::from_secs(2);

/// The thread; dropping it ends it.
#[derive(Debug)]
pub(super) struct Ahead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    pub(super) fn start(shared: &Arc<Shared>) -> Self {
        let own = Arc::clone(shared);
        let started = thread::Builder::new().name("shoal-kv-ahead".to_owned()).spawn(move || own.run());
        if let Err(error) = &started {
            tracing::warn!(%error, "no thread maps KV memory ahead of need, and none gives it back by itself");
        }
        Self { shared: Arc::clone(shared), thread: started.ok() }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.signal.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that maps KV memory ahead has panicked");
        }
    }
}

impl Shared {
    /// Calls the thread.
    #[inline]
    pub(super) fn call(&self) {
        self.signal.call();
    }

    /// Keeps the thread from mapping for a while.
    pub(crate) fn pause(&self) {
        self.signal.pause(Instant::now() + PAUSE_RECLAIMED);
    }

    /// Whether the thread is to map nothing now: the cache ends, or memory was just taken from it.
    pub(super) fn is_stopped(&self) -> bool {
        self.signal.is_stopped()
    }

    fn run(&self) {
        let mut wait = IDLE;
        let mut pause = PAUSE;
        loop {
            if !self.signal.wait(Instant::now() + wait) {
                return;
            }
            let (is_quiet, clocks, has_surplus) = {
                let mut state = self.state.lock();
                let is_quiet = state.advance(self.started.elapsed());
                let overage = state.overage();
                if !overage.is_zero()
                    && let Err(error) = state.evict_granules(overage)
                {
                    tracing::error!(%error, "cannot evict what is above the limit");
                }
                (is_quiet, state.clocks(), state.has_surplus())
            };
            wait = if is_quiet && self.settle_leaving_soon() { IDLE } else { MOMENT };
            if !self.is_stopped() {
                match self.map_spare() {
                    Ok(true) => pause = PAUSE,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::debug!(%error, "no memory to map ahead now");
                        self.signal.pause(Instant::now() + pause);
                        pause = (pause * 2).min(PAUSE_MAX);
                    }
                }
            }
            if has_surplus {
                match self.release_surplus(&clocks) {
                    Ok(true) if self.settle_leaving_soon() => {}
                    Ok(true) => wait = wait.min(MOMENT),
                    Ok(false) => wait = RETRY,
                    Err(error) => {
                        tracing::debug!(%error, "empty KV memory stays for now");
                        wait = wait.min(MOMENT);
                    }
                }
            }
        }
    }
}
