//! Worker processes: started, watched, ended. Knows nothing of leases or models beyond a name.
//!
//! Apart because a process is the one thing that can vanish without a word: what the server believes of a worker ends
//! with [`WorkerProcess::wait`], never with a guess. A worker writes to a file, never to a pipe of ours, so that a
//! server that is slow or gone cannot block it. It ends by itself when the control socket closes, and by a parent-death
//! signal that `shoal.worker` asks for before anything else, so also while it imports and loads (over programs of
//! `engine = "command"` stands a [`Watcher`] instead). That signal is tied to the thread that called
//! [`WorkerProcess::start`].

mod backoff;
mod log_file;
mod measure;
mod process;
mod watcher;

pub use backoff::Backoff;
pub use log_file::{LOG_BYTES_MAX, bound_log, last_line, open_log, tail};
pub use measure::measure_group;
pub use process::{Exit, Launch, SupervisorError, WORKER_REMEDY, WorkerProcess};
pub use watcher::Watcher;
