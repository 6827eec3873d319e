//! A worker that a server before this one started: not our child, so it is watched and signalled by a descriptor.
//!
//! A descriptor of a process means that process for ever, also when its number is used again; so a signal reaches it or
//! nobody. It is opened first and the start compared then. Where the kernel has no such descriptors (before Linux 5.3, some
//! sandboxes) the number and the start are compared right before each signal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::identity::started;
use super::{Exit, log_file};

/// How often a process without a descriptor is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Such a process. Dropping it kills the process, unless it was let go.
#[derive(Debug)]
pub struct Survivor {
    pid: u32,
    start: u64,
    handle: Option<AsyncFd<OwnedFd>>,
    began: Duration,
    adopted: std::time::Instant,
    log: PathBuf,
    log_from: u64,
    is_gone: bool,
}

impl Survivor {
    /// Finds the process with this number and start; none where it is gone. `lived` is how long it has lived by now. Must be
    /// called inside a tokio runtime.
    #[must_use]
    pub fn find(pid: u32, start: u64, lived: Duration, log: PathBuf, log_from: u64) -> Option<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let handle = match pidfd_open(number, PidfdFlags::NONBLOCK) {
            Ok(handle) => Some(handle),
            Err(Errno::SRCH) => return None,
            Err(error) => {
                tracing::debug!(%error, pid, "no descriptor of a process; it is looked at instead");
                None
            }
        };
        if started(pid) != Some(start) {
            return None;
        }
        let handle = handle.and_then(registered);
        let adopted = std::time::Instant::now();
        Some(Self { pid, start, handle, began: lived, adopted, log, log_from, is_gone: false })
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// What means this process and no other, where the kernel has such descriptors.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.handle.as_ref().map(|handle| handle.get_ref().as_fd())
    }

    /// The last line that it wrote to its log.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        log_file::last_line(&self.log, self.log_from)
    }

    /// Waits until the process is gone, its memory with it. May be dropped and called again.
    ///
    /// # Errors
    /// The operating system cannot tell.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        match &self.handle {
            // Readable once it has ended.
            Some(handle) => drop(handle.readable().await?),
            None => {
                while started(self.pid) == Some(self.start) {
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
        self.is_gone = true;
        Ok(Exit { status: None, lived: self.began + self.adopted.elapsed() })
    }

    /// Asks it to end (SIGTERM), and makes it (SIGKILL) after `patience`.
    ///
    /// # Errors
    /// The operating system cannot tell whether it ended.
    pub async fn end(&mut self, patience: Duration) -> io::Result<Exit> {
        self.signal(Signal::TERM);
        if let Ok(exit) = tokio::time::timeout(patience, self.wait()).await {
            return exit;
        }
        self.signal(Signal::KILL);
        self.wait().await
    }

    fn signal(&self, signal: Signal) {
        let sent = match &self.handle {
            Some(handle) => pidfd_send_signal(handle.get_ref(), signal),
            None if started(self.pid) == Some(self.start) => {
                let Some(number) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
                kill_process(number, signal)
            }
            None => return,
        };
        if let Err(error) = sent {
            tracing::debug!(%error, pid = self.pid, "a worker was gone before its signal");
        }
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe, for handles that could lie about their descriptor; this one owns it"
)]
fn registered(handle: OwnedFd) -> Option<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(handle, Interest::READABLE).ok()
}

impl Drop for Survivor {
    fn drop(&mut self) {
        if !self.is_gone {
            self.signal(Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    use tokio::io::{AsyncBufReadExt, BufReader};

    use super::*;

    fn sleeper(script: &str) -> (Child, u64) {
        let child = Command::new("/bin/sh").args(["-c", script]).stdout(Stdio::piped()).spawn();
        let child = child.expect("a process");
        let start = started(child.id()).expect("it runs");
        (child, start)
    }

    fn find(pid: u32, start: u64) -> Option<Survivor> {
        Survivor::find(pid, start, Duration::from_secs(9), PathBuf::from("/none"), 0)
    }

    #[tokio::test]
    async fn its_end_is_seen_and_brought_about() {
        let (mut child, start) = sleeper("exec sleep 100");
        let mut found = find(child.id(), start).expect("it runs");
        let still = tokio::time::timeout(Duration::from_millis(50), found.wait()).await;
        assert!(still.is_err(), "it lives");
        let exit = found.end(Duration::from_secs(10)).await.expect("known");
        assert!(exit.lived >= Duration::from_secs(9), "{exit:?}");
        assert_eq!(child.wait().expect("known").signal(), Some(15));
        assert!(find(child.id(), start).is_none());
    }

    #[tokio::test]
    async fn one_that_ignores_the_request_is_made_to_end() {
        let (mut child, start) = sleeper("trap '' TERM; echo up; while :; do sleep 0.05; done");
        let mut found = find(child.id(), start).expect("it runs");
        // It says so once it ignores the request; before, it would obey it.
        let said = child.stdout.take().expect("piped");
        let mut said = BufReader::new(tokio::process::ChildStdout::from_std(said).expect("a pipe"));
        let mut line = String::new();
        let read = tokio::time::timeout(Duration::from_secs(30), said.read_line(&mut line));
        read.await.expect("in time").expect("text");
        assert_eq!(line, "up\n");
        found.end(Duration::from_millis(100)).await.expect("known");
        assert_eq!(child.wait().expect("known").signal(), Some(9));
    }

    /// The number was used again: whoever has it now is nobody of ours.
    #[tokio::test]
    async fn another_process_of_the_same_number_is_not_touched() {
        let (mut child, start) = sleeper("exec sleep 100");
        for wrong in [start + 1, start.saturating_sub(1), 0] {
            assert!(find(child.id(), wrong).is_none());
        }
        assert!(child.try_wait().expect("known").is_none(), "it was let be");
        // Also without a descriptor, by looking.
        let by_number = Survivor {
            pid: child.id(),
            start: start + 1,
            handle: None,
            began: Duration::ZERO,
            adopted: std::time::Instant::now(),
            log: PathBuf::new(),
            log_from: 0,
            is_gone: false,
        };
        by_number.signal(Signal::KILL);
        drop(by_number);
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.try_wait().expect("known").is_none(), "it was let be");
        child.kill().expect("it runs");
        child.wait().expect("ended");
    }

    #[tokio::test]
    async fn without_a_descriptor_it_is_looked_at() {
        let (mut child, start) = sleeper("exec sleep 100");
        let mut found = find(child.id(), start).expect("it runs");
        found.handle = None;
        let waited = tokio::spawn(async move { found.end(Duration::from_secs(5)).await.map(|_| ()) });
        // Nobody waits for it: what is left of it counts as gone.
        waited.await.expect("no panic").expect("known");
        assert_eq!(child.wait().expect("known").signal(), Some(15));
    }
}
