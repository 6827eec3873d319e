//! Worker processes: started, watched, ended. Knows nothing of leases or models beyond a name.
//!
//! Apart because a process is the one thing that can vanish without a word: what the server believes of a worker ends
//! with [`WorkerProcess::wait`], never with a guess. A worker writes to a file, never to a pipe of ours, so that a
//! server that is slow or gone cannot block it. Until its welcome it ends with the server, by a parent-death signal that
//! `shoal.worker` asks for before anything else (over programs of `engine = "command"` stands a [`Watcher`] instead); that
//! signal is tied to the thread that called [`WorkerProcess::start`]. From its welcome on it waits for another server for a
//! while when this one is gone; that one finds it by the [`Journal`] and watches it as a [`Survivor`].
//!
//! A worker may also be forked, by a [`Template`]. Then it is that one's child, and a [`Forked`] to us.

mod backoff;
mod forked;
pub(crate) mod identity;
mod journal;
mod log_file;
mod measure;
mod process;
mod survivor;
mod template;
mod watcher;

pub use backoff::Backoff;
pub use forked::Forked;
pub use journal::{Entry, Journal, Left};
pub use log_file::{LOG_BYTES_MAX, bound_log, last_line, open_log, tail};
pub(crate) use measure::group_of;
pub use measure::ram_of_group;
pub use process::{Exit, Launch, SupervisorError, VLLM_REMEDY, WORKER_REMEDY, WorkerProcess};
pub use survivor::Survivor;
pub use template::{Template, TemplateLaunch, Waits};
pub use watcher::Watcher;
