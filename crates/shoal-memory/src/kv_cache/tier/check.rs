//! Verifying blocks while they are copied, on several threads.
//!
//! Apart because a copy over the link and a checksum both take all of a block: done one after the other, a restore takes
//! twice the link's time, or more. A thread does 14 GiB/s, so a few of them keep up with a link. What is used in the end is
//! what comes before the first block that is not right.

use std::num::NonZero;
use std::thread;

use parking_lot::Mutex;

use crate::store::Miss;

/// Bytes for which one more thread is worth its start.
const BYTES_PER_THREAD: usize = 8 << 20;
const THREADS_MAX: usize = 12;
/// Small blocks are handed out so many bytes at a time.
const BYTES_AT_ONCE: usize = 1 << 20;
/// What a thread that also copies may verify between two looks at the link: longer blocks take longer than what is queued
/// there, and the link would wait for it (8 MiB among twelve threads: longer than two jobs of 32).
const BYTES_BETWEEN_MAX: usize = 2 << 20;

#[derive(Debug)]
struct State {
    next: usize,
    end: usize,
    /// The first that is not right, as far as is known.
    bad: Option<(usize, Miss)>,
}

/// Blocks in a row that are verified in order.
pub(super) struct Checks<F> {
    check: F,
    at_once: usize,
    is_short: bool,
    state: Mutex<State>,
}

impl<F: Fn(usize) -> Result<(), Miss> + Sync> Checks<F> {
    /// Of so many blocks, each of so many bytes; `check` says whether one is right.
    pub(super) fn new(blocks: usize, block_bytes: usize, check: F) -> Self {
        let state = Mutex::new(State { next: 0, end: blocks, bad: None });
        let at_once = (BYTES_AT_ONCE / block_bytes.max(1)).max(1);
        Self { check, at_once, is_short: block_bytes <= BYTES_BETWEEN_MAX, state }
    }

    /// Verifies the next few between two looks at something else, if that is short or nobody else does it. False: there is
    /// nothing to be done.
    pub(super) fn step_between(&self, is_alone: bool) -> bool {
        (self.is_short || is_alone) && self.step()
    }

    /// Verifies the next few. False: none is left that matters.
    pub(super) fn step(&self) -> bool {
        let (first, end) = {
            let mut state = self.state.lock();
            let end = state.bad.as_ref().map_or(state.end, |(bad, _)| state.end.min(*bad));
            let first = state.next;
            let last = (first + self.at_once).min(end);
            if first >= last {
                return false;
            }
            state.next = last;
            (first, last)
        };
        for block in first..end {
            if let Err(miss) = (self.check)(block) {
                let mut state = self.state.lock();
                if state.bad.as_ref().is_none_or(|(bad, _)| block < *bad) {
                    state.bad = Some((block, miss));
                }
                break;
            }
        }
        true
    }

    /// Only so many blocks matter.
    pub(super) fn end_at(&self, blocks: usize) {
        let mut state = self.state.lock();
        state.end = state.end.min(blocks);
    }

    /// How many come before the first that is known to be wrong, of so many in all: more need not be copied.
    pub(super) fn right_of(&self, blocks: usize) -> usize {
        self.state.lock().bad.as_ref().map_or(blocks, |(bad, _)| blocks.min(*bad))
    }

    /// The first that is not right, if it comes no later than where [`end_at`](Self::end_at) put the end: all before it is
    /// right then. Ask when nothing is left to be verified and no thread is at it.
    pub(super) fn bad(self) -> Option<(usize, Miss)> {
        let State { bad, end, .. } = self.state.into_inner();
        bad.filter(|(bad, _)| *bad <= end)
    }

    /// Runs `work` on this thread while others verify as many bytes; comes back when all that matters is verified.
    /// `work` is told whether no other thread does.
    pub(super) fn beside<R>(&self, bytes: usize, work: impl FnOnce(bool) -> R) -> R
    where
        F: Send,
    {
        thread::scope(|scope| {
            let mut is_alone = true;
            for _ in 1..threads(bytes) {
                let verify = || while self.step() {};
                let spawned =
                    thread::Builder::new().name("shoal-verify".to_owned()).spawn_scoped(scope, verify);
                if let Err(error) = spawned {
                    // This one does it alone.
                    tracing::debug!(%error, "no more threads to verify blocks");
                    break;
                }
                is_alone = false;
            }
            let done = work(is_alone);
            while self.step() {}
            done
        })
    }
}

/// How many threads verify so many bytes, the caller's one of them: a fourth of the cores has other work. Half of 16 cores
/// verified 40 GiB/s beside copies, less than a link of 51 brings.
fn threads(bytes: usize) -> usize {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    (bytes / BYTES_PER_THREAD).clamp(1, (cores * 3 / 4).clamp(1, THREADS_MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_is_verified_once_and_the_first_bad_one_is_found() {
        for (blocks, bytes, bad) in
            [(1, 100, None), (1000, 4096, None), (1000, 4096, Some(700)), (40, 2 << 20, Some(0))]
        {
            for _ in 0..20 {
                let seen = Mutex::new(BTreeSet::new());
                let check = |block| {
                    assert!(seen.lock().insert(block), "twice");
                    // Later ones are wrong too: the first counts.
                    if bad.is_some_and(|bad| block >= bad) { Err(Miss::Corrupt) } else { Ok(()) }
                };
                let checks = Checks::new(blocks, bytes, check);
                checks.beside(1 << 30, |_| ());
                assert!(!checks.step());
                assert_eq!(checks.right_of(blocks), bad.unwrap_or(blocks));
                assert_eq!(checks.bad(), bad.map(|bad| (bad, Miss::Corrupt)));
                assert!(seen.into_inner().len() >= bad.unwrap_or(blocks));
            }
        }
    }

    /// Threads that verify may be done before anything is copied, or come after all of it.
    #[test]
    fn all_before_a_bad_one_is_copied_whoever_is_first() {
        for bad in [None, Some(0), Some(1), Some(5), Some(127)] {
            for waits in [false, true] {
                let check = |block| if Some(block) == bad { Err(Miss::Corrupt) } else { Ok(()) };
                let checks = Checks::new(128, 2 << 20, check);
                let mut copied = 0;
                checks.beside(1 << 30, |_| {
                    while waits && checks.step() {}
                    loop {
                        let right = checks.right_of(128);
                        if copied >= right {
                            break;
                        }
                        copied = (copied + 7).min(right);
                    }
                    checks.end_at(copied);
                });
                assert!(copied >= bad.unwrap_or(128), "{copied} of {bad:?}");
                assert_eq!(checks.bad(), bad.map(|bad| (bad, Miss::Corrupt)), "it is dropped, not met again");
            }
        }
    }

    #[test]
    fn who_copies_verifies_long_blocks_only_alone() {
        for (bytes, is_alone, steps) in
            [(2 << 20, false, true), (8 << 20, false, false), (2 << 20, true, true), (8 << 20, true, true)]
        {
            let checks = Checks::new(1, bytes, |_| Ok(()));
            assert_eq!(checks.step_between(is_alone), steps, "{bytes} bytes, alone: {is_alone}");
        }
        // Few bytes are no work for a second thread.
        assert!(Checks::new(1, 4096, |_| Ok(())).beside(4096, |is_alone| is_alone));
    }

    #[test]
    fn what_does_not_matter_any_more_is_not_verified() {
        let check = |block| if block < 10 { Ok(()) } else { Err(Miss::Corrupt) };
        let checks = Checks::new(100, 1 << 20, check);
        checks.end_at(10);
        checks.beside(0, |_| ());
        assert_eq!(checks.bad(), None);
    }
}
