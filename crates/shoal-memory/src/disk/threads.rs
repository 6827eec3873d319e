//! A medium of threads that read and write with plain positioned calls: where `io_uring` is forbidden.
//!
//! Apart because it is the fallback (containers often forbid `io_uring`). One request at a time a thread, so the disk's queue
//! is as deep as there are threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::file::LogFile;
use super::medium::{Done, Means, Medium, Op, Verb, Waker};

/// Most threads: they mostly sleep, and a disk is busy with fewer.
const THREADS_MAX: usize = 16;

#[derive(Debug, Default)]
struct State {
    todo: VecDeque<Op>,
    done: Vec<Done>,
    is_woken: bool,
    is_closing: bool,
}

#[derive(Debug, Default)]
struct Meeting {
    state: Mutex<State>,
    work: Condvar,
    news: Condvar,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Threads {
    file: LogFile,
    meeting: Arc<Meeting>,
    in_flight: usize,
    depth: usize,
    reasons: Vec<String>,
}

impl Threads {
    /// # Errors
    /// No thread could be started.
    pub(super) fn new(file: LogFile, depth: usize, reasons: Vec<String>) -> io::Result<Self> {
        let meeting = Arc::new(Meeting::default());
        let medium = Self { file, meeting, in_flight: 0, depth: depth.clamp(1, THREADS_MAX), reasons };
        for number in 0..medium.depth {
            let (meeting, file) = (Arc::clone(&medium.meeting), Arc::clone(&medium.file.file));
            let spawned = thread::Builder::new()
                .name(format!("shoal-disk-{number}"))
                .spawn(move || serve(&meeting, &file));
            if number == 0 {
                spawned?;
            }
        }
        Ok(medium)
    }
}

fn serve(meeting: &Meeting, file: &File) {
    loop {
        let op = {
            let mut state = meeting.state.lock();
            loop {
                if let Some(op) = state.todo.pop_front() {
                    break op;
                }
                if state.is_closing {
                    return;
                }
                meeting.work.wait(&mut state);
            }
        };
        let done = carry_out(op, file);
        meeting.state.lock().done.push(done);
        meeting.news.notify_one();
    }
}

fn carry_out(op: Op, file: &File) -> Done {
    let Op { token, verb, offset, mut buffer, bytes } = op;
    let result = match (verb, buffer.as_mut()) {
        (Verb::Sync, _) => file.sync_data().map(|()| 0),
        (Verb::Read, Some(buffer)) => {
            match buffer.as_mut_slice().and_then(|memory| memory.get_mut(..bytes)) {
                Some(memory) => file.read_exact_at(memory, offset).map(|()| bytes),
                None => Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        (Verb::Write, Some(buffer)) => match buffer.as_slice().get(..bytes) {
            Some(memory) => file.write_all_at(memory, offset).map(|()| bytes),
            None => Err(io::ErrorKind::InvalidInput.into()),
        },
        (Verb::Read | Verb::Write, None) => Err(io::ErrorKind::InvalidInput.into()),
    };
    Done { token, result, buffer }
}

impl Medium for Threads {
    fn bytes(&mut self) -> io::Result<u64> {
        self.file.bytes()
    }

    fn grow(&mut self, bytes: u64) -> io::Result<()> {
        self.file.grow(bytes)
    }

    fn shrink(&mut self, bytes: u64) -> io::Result<()> {
        self.file.shrink(bytes)
    }

    fn submit(&mut self, op: Op) -> Result<(), Op> {
        if self.in_flight >= self.depth {
            return Err(op);
        }
        self.in_flight += 1;
        self.meeting.state.lock().todo.push_back(op);
        self.meeting.work.notify_one();
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut state = self.meeting.state.lock();
        while state.done.is_empty() && !state.is_woken {
            if self.meeting.news.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.is_woken = false;
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        let mut state = self.meeting.state.lock();
        self.in_flight -= state.done.len();
        done.append(&mut state.done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn waker(&self) -> Waker {
        let meeting = Arc::clone(&self.meeting);
        Arc::new(move || {
            meeting.state.lock().is_woken = true;
            meeting.news.notify_one();
        })
    }

    fn means(&self) -> Means {
        Means { engine: "threads", is_direct: self.file.is_direct, reasons: self.reasons.clone() }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // A thread that hangs in a call keeps its request's memory and the file; the others end.
        self.meeting.state.lock().is_closing = true;
        self.meeting.work.notify_all();
    }
}
