//! A worker that a template forked: not our child, but it ends with us, and its status can be had.
//!
//! It waits for a byte from a pipe before it does anything, so that there is none that the server does not know of; and the
//! end of that pipe, however it comes about, is what a parent's death is to a worker that was started by itself.

use std::io::{self, PipeWriter, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::sync::oneshot;

use super::process::clear_group;
use super::{Exit, Survivor};

/// How long the template's word on how a child ended is waited for.
const STATUS_WAIT: Duration = Duration::from_millis(500);

/// Such a process. Dropping it kills the process.
#[derive(Debug)]
pub struct Forked {
    process: Survivor,
    log_from: u64,
    told: Option<oneshot::Receiver<i32>>,
    status: Option<ExitStatus>,
    /// Open as long as this server lives and has the worker, and wants it.
    pipe: Option<PipeWriter>,
}

impl Forked {
    pub(super) const fn new(
        process: Survivor,
        log_from: u64,
        told: oneshot::Receiver<i32>,
        pipe: PipeWriter,
    ) -> Self {
        Self { process, log_from, told: Some(told), status: None, pipe: Some(pipe) }
    }

    /// Lets it begin. One that has ended by now is seen to end.
    pub fn go(&self) {
        let Some(mut pipe) = self.pipe.as_ref() else { return };
        if let Err(error) = pipe.write_all(b"g") {
            tracing::debug!(%error, pid = self.pid(), "a forked worker was gone before its word");
        }
    }

    /// Tells one that was not let go that nobody wants it any more: it ends without a word.
    pub fn give_up(&mut self) {
        self.pipe = None;
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where its own output begins in its log.
    #[must_use]
    pub const fn log_from(&self) -> u64 {
        self.log_from
    }

    /// The last line that it wrote to its log.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        self.process.last_line()
    }

    /// Waits until the process is gone, its memory with it. May be dropped and called again.
    ///
    /// # Errors
    /// The operating system cannot tell.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        let exit = self.process.wait().await?;
        if let Some(told) = self.told.as_mut() {
            let said = tokio::time::timeout(STATUS_WAIT, told).await;
            self.told = None;
            self.status = said.ok().and_then(Result::ok).map(ExitStatus::from_raw);
        }
        if self.status.is_none() {
            self.status = self.process.descriptor().and_then(|process| inherited(process).ok()?);
        }
        Ok(Exit { status: self.status, ..exit })
    }

    /// Asks it to end (SIGTERM), and makes it (SIGKILL) after `patience`.
    ///
    /// # Errors
    /// The operating system cannot tell whether it ended.
    pub async fn end(&mut self, patience: Duration) -> io::Result<Exit> {
        // How it ends is waited for here, and then what the template says of it.
        self.process.end(patience).await?;
        self.wait().await
    }

    /// Once it is gone: ends what it started and left in its group.
    pub async fn clear_group(&self) {
        clear_group(self.pid()).await;
    }
}

/// The status of a process that its template left to us, as happens to a server that is the first process of a container;
/// none while it runs. Nothing is left of one whose status was given.
///
/// # Errors
/// It is not ours to wait for, so nobody here can tell.
pub(super) fn inherited(process: BorrowedFd<'_>) -> io::Result<Option<ExitStatus>> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let Some(status) = waitid(WaitId::PidFd(process), options)? else { return Ok(None) };
    let raw = status.exit_status().map(|code| (code & 0xff) << 8).or(status.terminating_signal());
    Ok(raw.map(ExitStatus::from_raw))
}
