//! A few threads with a bounded queue, and one more for what may wait.
//!
//! Apart because whatever has to wait or copy for a tier does it here, and never in a caller (I10). A job that is refused
//! or left over is dropped, and the promises in it say so. What may wait comes after all else, on some of the threads only:
//! long jobs that nobody waits for keep no short ones waiting. Nor are they passed over for ever.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// So many jobs may be done before one that may wait, if none of those is under way.
const PASSED_OVER_MAX: usize = 64;

/// Bounds of what may wait.
#[derive(Clone, Copy, Default)]
pub(crate) struct Later {
    /// Most jobs of it that wait.
    pub(crate) jobs_max: usize,
    /// Most threads that are at it at a time.
    pub(crate) threads_max: usize,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// What may wait.
    later: VecDeque<J>,
    /// Threads that are at what may wait.
    at_later: usize,
    /// Jobs that were taken before the oldest of those.
    passed_over: usize,
    is_closed: bool,
    /// Threads that have not let go of their workers.
    threads: Vec<ThreadId>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    work: Condvar,
    ended: Condvar,
    jobs_max: usize,
    later: Later,
}

/// A job that a thread is at. Dropping it says that it is done, or that its thread panicked.
struct AtLater<'a, J>(&'a Shared<J>);

impl<J> Drop for AtLater<'_, J> {
    fn drop(&mut self) {
        self.0.state.lock().at_later -= 1;
        self.0.work.notify_one();
    }
}

/// The threads end when this is dropped, each after the job it is at.
pub(crate) struct Crew<J>(Arc<Shared<J>>);

/// Gives a crew jobs; does not keep it alive.
pub(crate) struct Desk<J>(Arc<Shared<J>>);

impl<J> fmt::Debug for Crew<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        let (jobs, later) = (state.jobs.len(), state.later.len());
        f.debug_struct("Crew").field("waiting", &jobs).field("later", &later).finish_non_exhaustive()
    }
}

impl<J> Clone for Desk<J> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<J: Send + 'static> Crew<J> {
    /// Starts up to `threads` threads, each with a worker of its own.
    ///
    /// # Errors
    /// Not even one could be started.
    pub(crate) fn start<W: FnMut(J) + Send + 'static>(
        name: &str,
        threads: usize,
        jobs_max: usize,
        worker: impl FnMut(Desk<J>) -> W,
    ) -> io::Result<Self> {
        Self::start_with(name, threads, jobs_max, Later::default(), worker)
    }

    /// The same, with a queue for what may wait.
    ///
    /// # Errors
    /// Not even one could be started.
    pub(crate) fn start_with<W: FnMut(J) + Send + 'static>(
        name: &str,
        threads: usize,
        jobs_max: usize,
        later: Later,
        mut worker: impl FnMut(Desk<J>) -> W,
    ) -> io::Result<Self> {
        let state = State {
            jobs: VecDeque::new(),
            later: VecDeque::new(),
            at_later: 0,
            passed_over: 0,
            is_closed: false,
            threads: Vec::new(),
        };
        let (work, ended) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::new(state), work, ended, jobs_max, later });
        let crew = Self(shared);
        for number in 0..threads.max(1) {
            let (mut work, shared) = (worker(crew.desk()), Arc::clone(&crew.0));
            let serve = move || {
                while let Some((job, is_later)) = shared.next() {
                    let _at = is_later.then(|| AtLater(&*shared));
                    work(job);
                }
                drop(work);
                shared.state.lock().threads.retain(|thread| *thread != thread::current().id());
                shared.ended.notify_all();
            };
            // Not before its number is written down, so that none is missed.
            let mut state = crew.0.state.lock();
            match thread::Builder::new().name(format!("{name}-{number}")).spawn(serve) {
                Ok(handle) => state.threads.push(handle.thread().id()),
                Err(error) if number == 0 => return Err(error),
                Err(_) => {}
            }
        }
        Ok(crew)
    }

    /// Takes no more jobs and waits until the threads have let go of what they work with, for so long at most; one that
    /// is its own thread does not wait for itself. Whether they have.
    pub(crate) fn close(&self, deadline: Duration) -> bool {
        self.0.shut();
        let until = Instant::now() + deadline;
        let mut state = self.0.state.lock();
        loop {
            if state.threads.iter().all(|thread| *thread == thread::current().id()) {
                return true;
            }
            if self.0.ended.wait_until(&mut state, until).timed_out() {
                return false;
            }
        }
    }

    pub(crate) fn desk(&self) -> Desk<J> {
        Desk(Arc::clone(&self.0))
    }
}

impl<J> Shared<J> {
    fn shut(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        let left = (std::mem::take(&mut state.jobs), std::mem::take(&mut state.later));
        drop(state);
        self.work.notify_all();
        // Not under the lock: what answers for them may ask again.
        drop(left);
    }

    /// The next job, and whether it is one that may wait.
    fn next(&self) -> Option<(J, bool)> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return None;
            }
            let is_due =
                state.jobs.is_empty() || (state.at_later == 0 && state.passed_over >= PASSED_OVER_MAX);
            if is_due
                && state.at_later < self.later.threads_max
                && let Some(job) = state.later.pop_front()
            {
                (state.at_later, state.passed_over) = (state.at_later + 1, 0);
                return Some((job, true));
            }
            if let Some(job) = state.jobs.pop_front() {
                state.passed_over += usize::from(!state.later.is_empty());
                return Some((job, false));
            }
            self.work.wait(&mut state);
        }
    }
}

impl<J> Desk<J> {
    /// Queues a job, or gives it back with how many wait.
    pub(crate) fn ask(&self, job: J) -> Result<(), (J, usize)> {
        self.push(job, self.0.jobs_max)
    }

    /// Queues a job that may wait, or gives it back with how many of those wait.
    pub(crate) fn ask_later(&self, job: J) -> Result<(), (J, usize)> {
        let mut state = self.0.state.lock();
        let waiting = state.later.len();
        if state.is_closed || waiting >= self.0.later.jobs_max {
            return Err((job, waiting));
        }
        state.later.push_back(job);
        drop(state);
        self.0.work.notify_one();
        Ok(())
    }

    /// Queues what goes on with something that was queued before, whose number has a bound elsewhere.
    pub(crate) fn go_on(&self, job: J) {
        // Of a crew that is closed nobody expects anything.
        drop(self.push(job, usize::MAX));
    }

    fn push(&self, job: J, jobs_max: usize) -> Result<(), (J, usize)> {
        let mut state = self.0.state.lock();
        let waiting = state.jobs.len();
        if state.is_closed || waiting >= jobs_max {
            return Err((job, waiting));
        }
        state.jobs.push_back(job);
        drop(state);
        self.0.work.notify_one();
        Ok(())
    }
}

impl<J> Drop for Crew<J> {
    fn drop(&mut self) {
        self.0.shut();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{channel, sync_channel};
    use std::time::Duration;

    use super::*;

    const WAIT: Duration = Duration::from_mins(1);

    #[test]
    fn a_queue_has_an_end_and_leftovers_are_dropped() {
        let (done, dones) = channel();
        let (gate, gates) = sync_channel::<()>(0);
        let gates = Arc::new(Mutex::new(gates));
        let crew = Crew::start("test", 1, 2, |_| {
            let (done, gates) = (done.clone(), Arc::clone(&gates));
            move |job: Arc<u32>| {
                done.send(*job).expect("somebody listens");
                let _ = gates.lock().recv_timeout(WAIT);
            }
        })
        .expect("a thread");
        let desk = crew.desk();
        let jobs: Vec<_> = (0..4).map(Arc::new).collect();
        desk.ask(Arc::clone(&jobs[0])).expect("room");
        assert_eq!(dones.recv_timeout(WAIT), Ok(0));
        desk.ask(Arc::clone(&jobs[1])).expect("room");
        desk.ask(Arc::clone(&jobs[2])).expect("room");
        let refused = desk.ask(Arc::clone(&jobs[3])).expect_err("two wait");
        assert_eq!(refused.1, 2);
        drop(refused);
        desk.go_on(Arc::clone(&jobs[3]));
        drop(crew);
        assert_eq!(Arc::strong_count(&jobs[1]), 1, "dropped, and nobody waits for it");
        assert_eq!(Arc::strong_count(&jobs[3]), 1);
        drop(gate);
        assert!(desk.ask(Arc::clone(&jobs[1])).is_err(), "it is closed");
    }

    /// A crew of one thread that says what it does, once it was let go.
    fn one_thread(
        later: Later,
    ) -> (Crew<u32>, std::sync::mpsc::Receiver<u32>, std::sync::mpsc::SyncSender<()>) {
        let (done, dones) = channel();
        let (gate, gates) = sync_channel::<()>(0);
        let gates = Arc::new(Mutex::new(gates));
        let crew = Crew::start_with("test", 1, 1000, later, |_| {
            let (done, gates) = (done.clone(), Arc::clone(&gates));
            move |job: u32| {
                done.send(job).expect("somebody listens");
                let _ = gates.lock().recv_timeout(WAIT);
            }
        });
        (crew.expect("a thread"), dones, gate)
    }

    #[test]
    fn what_may_wait_comes_last_but_comes() {
        let (crew, dones, gate) = one_thread(Later { jobs_max: 2, threads_max: 1 });
        let desk = crew.desk();
        desk.ask(0).expect("room");
        assert_eq!(dones.recv_timeout(WAIT), Ok(0));
        for job in [1000, 1001] {
            desk.ask_later(job).expect("room");
        }
        assert_eq!(desk.ask_later(1002).expect_err("two wait"), (1002, 2));
        for job in 1..100 {
            desk.ask(job).expect("what may wait takes no room");
        }
        // Its thread is let go on from job to job.
        drop(gate);
        let order: Vec<u32> = (0..101).map(|_| dones.recv_timeout(WAIT).expect("it goes on")).collect();
        let at = |job| order.iter().position(|other| *other == job).expect("it was done");
        assert_eq!((at(1000), at(1001)), (PASSED_OVER_MAX, 100));
        assert!(order.iter().filter(|job| **job < 1000).is_sorted());
    }

    #[test]
    fn what_may_wait_leaves_threads_to_others() {
        let (done, dones) = channel();
        let (gate, gates) = sync_channel::<()>(0);
        let gates = Arc::new(Mutex::new(gates));
        let later = Later { jobs_max: 9, threads_max: 2 };
        let crew = Crew::start_with("test", 3, 9, later, |_| {
            let (done, gates) = (done.clone(), Arc::clone(&gates));
            move |job: u32| {
                done.send(job).expect("somebody listens");
                if job >= 1000 {
                    let _ = gates.lock().recv_timeout(WAIT);
                }
            }
        })
        .expect("threads");
        let desk = crew.desk();
        for job in 1000..1005 {
            desk.ask_later(job).expect("room");
        }
        let first = [dones.recv_timeout(WAIT), dones.recv_timeout(WAIT)];
        assert!(first.iter().all(|job| job.is_ok_and(|job| job >= 1000)));
        for job in 0..9 {
            desk.ask(job).expect("room");
            assert_eq!(dones.recv_timeout(WAIT), Ok(job), "a thread is left, and no third of those began");
        }
        drop(gate);
        for _ in 0..3 {
            assert!(dones.recv_timeout(WAIT).is_ok_and(|job| job >= 1000), "they come in the end");
        }
        assert!(crew.close(WAIT));
    }

    #[test]
    fn after_closing_nothing_is_held() {
        let held = Arc::new(());
        let crew = Crew::start("test", 3, 9, |_| {
            let held = Arc::clone(&held);
            move |()| drop(Arc::clone(&held))
        })
        .expect("threads");
        for _ in 0..9 {
            let _ = crew.desk().ask(());
        }
        assert!(crew.close(WAIT));
        // The closure that makes workers went with its call, so this is all.
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
