//! What a disk's log lies on: one file that is read and written at offsets, many requests at a time.
//!
//! Apart because there are four of them: a ring of the kernel's, threads, a simulated disk that fails on request, and
//! whatever a test wraps around one of these. A request owns its memory until it is done; nothing else may touch that.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use shoal_device::HostSlab;

use crate::store::Buffer;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Fills the buffer from the file.
    Read,
    /// Writes the buffer to the file.
    Write,
    /// Writes out what the system still keeps in caches.
    Sync,
}

/// A request to a [`Medium`].
#[derive(Debug)]
pub struct Op {
    /// Names it in its [`Done`].
    pub token: u64,
    /// What it does.
    pub verb: Verb,
    /// Where in the file: a multiple of 4 KiB.
    pub offset: u64,
    /// Its memory, aligned to 4 KiB; none for a sync.
    pub buffer: Option<Buffer>,
    /// How many bytes from the buffer's start: a multiple of 4 KiB.
    pub bytes: usize,
}

/// A request that is over.
#[derive(Debug)]
pub struct Done {
    /// Which.
    pub token: u64,
    /// How many bytes were moved, or why none.
    pub result: io::Result<usize>,
    /// Its memory.
    pub buffer: Option<Buffer>,
}

/// How a medium works, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Means {
    /// `io_uring`, `threads` or `simulated`.
    pub engine: &'static str,
    /// Whether it goes past the page cache.
    pub is_direct: bool,
    /// Why it is not the better way, where it is not.
    pub reasons: Vec<String>,
}

/// Wakes whoever waits in [`Medium::wait`], from any thread.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A file with many requests at a time. Used by one thread.
pub trait Medium: fmt::Debug + Send {
    /// The file's length.
    ///
    /// # Errors
    /// The system's.
    fn bytes(&mut self) -> io::Result<u64>;

    /// Makes the file longer, with room on the disk behind it.
    ///
    /// # Errors
    /// The system's; a full disk is `StorageFull`.
    fn grow(&mut self, bytes: u64) -> io::Result<()>;

    /// Cuts off what lies beyond.
    ///
    /// # Errors
    /// The system's.
    fn shrink(&mut self, bytes: u64) -> io::Result<()>;

    /// Takes a request; gives it back when [`Medium::depth`] are under way.
    ///
    /// # Errors
    /// The request.
    fn submit(&mut self, op: Op) -> Result<(), Op>;

    /// Starts what was taken, and waits until something is done, somebody wakes, or the time is over.
    fn wait(&mut self, timeout: Duration);

    /// What is done by now.
    fn reap(&mut self, done: &mut Vec<Done>);

    /// Requests taken and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Most requests at a time.
    fn depth(&self) -> usize;

    /// Ends a [`Medium::wait`] from another thread.
    fn waker(&self) -> Waker;

    /// Tells the medium of memory that requests will lie in, which may make them cheaper. Whether it does.
    fn register(&mut self, slab: &Arc<HostSlab>) -> bool {
        let _ = slab;
        false
    }

    /// Forgets such memory.
    fn unregister(&mut self, slab: &Arc<HostSlab>) {
        let _ = slab;
    }

    /// How it works.
    fn means(&self) -> Means;
}
