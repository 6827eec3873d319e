//! A few threads with one bounded queue.
//!
//! Apart because whatever has to wait or copy for a tier does it here, and never in a caller (I10). A job that is refused
//! or left over is dropped, and the promises in it say so.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

struct State<J> {
    jobs: VecDeque<J>,
    is_closed: bool,
    /// Threads that have not let go of their workers.
    threads: Vec<ThreadId>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    work: Condvar,
    ended: Condvar,
    jobs_max: usize,
}

/// The threads end when this is dropped, each after the job it is at.
pub(crate) struct Crew<J>(Arc<Shared<J>>);

/// Gives a crew jobs; does not keep it alive.
pub(crate) struct Desk<J>(Arc<Shared<J>>);

impl<J> fmt::Debug for Crew<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").field("waiting", &self.0.state.lock().jobs.len()).finish_non_exhaustive()
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
        mut worker: impl FnMut(Desk<J>) -> W,
    ) -> io::Result<Self> {
        let state = State { jobs: VecDeque::new(), is_closed: false, threads: Vec::new() };
        let (work, ended) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::new(state), work, ended, jobs_max });
        let crew = Self(shared);
        for number in 0..threads.max(1) {
            let (mut work, shared) = (worker(crew.desk()), Arc::clone(&crew.0));
            let serve = move || {
                while let Some(job) = shared.next() {
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
        let left = std::mem::take(&mut state.jobs);
        drop(state);
        self.work.notify_all();
        // Not under the lock: what answers for them may ask again.
        drop(left);
    }

    fn next(&self) -> Option<J> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
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
