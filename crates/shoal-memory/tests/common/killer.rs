//! A medium that ends its process at one of its steps: before a request is made, while it is under way, and after it is done and
//! before anybody hears of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use shoal_memory::disk::{Done, Means, Medium, Op, Waker};

/// Counts steps, and ends the process at one of them.
#[derive(Debug)]
pub(crate) struct Killer {
    pub(crate) inner: Box<dyn Medium>,
    pub(crate) steps: Arc<AtomicU64>,
    pub(crate) last: u64,
}

impl Killer {
    pub(crate) fn step(&mut self) {
        if self.steps.fetch_add(1, Ordering::Relaxed) == self.last {
            // What was handed over is on its way by now.
            self.inner.wait(Duration::ZERO);
            kill_process(getpid(), Signal::KILL).expect("killed");
        }
    }
}

impl Medium for Killer {
    fn bytes(&mut self) -> io::Result<u64> {
        self.inner.bytes()
    }
    fn grow(&mut self, bytes: u64) -> io::Result<()> {
        self.step();
        self.inner.grow(bytes)?;
        self.step();
        Ok(())
    }
    fn shrink(&mut self, bytes: u64) -> io::Result<()> {
        self.inner.shrink(bytes)
    }
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        self.step();
        self.inner.submit(op)?;
        self.step();
        Ok(())
    }
    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
    fn reap(&mut self, done: &mut Vec<Done>) {
        let before = done.len();
        self.inner.reap(done);
        if done.len() > before {
            self.step();
        }
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn waker(&self) -> Waker {
        self.inner.waker()
    }
    fn means(&self) -> Means {
        self.inner.means()
    }
}
