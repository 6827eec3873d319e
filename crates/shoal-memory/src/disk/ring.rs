//! A medium on the kernel's ring (`io_uring`): a deep queue from one thread, past the page cache, to and from memory that the
//! kernel knows beforehand.
//!
//! Apart because it is the one place in this crate with `unsafe`: the kernel reaches memory by address while we do other
//! things. What makes that sound: a request in flight owns its [`Buffer`], which neither moves its bytes nor lends them
//! to anybody (I5); a request is dropped only after the kernel said that it is done, and leaked if it never does; what is
//! registered is held.

#![expect(unsafe_code, reason = "hands memory that requests in flight own to the kernel by address")]

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use shoal_device::HostSlab;

use super::file::LogFile;
use super::medium::{Done, Means, Medium, Op, Verb, Waker};
use crate::store::Buffer;

/// Slabs that may be registered at a time.
const SLABS_MAX: u32 = 64;
/// The kernel registers no more than this in one piece.
const SLAB_BYTES_MAX: u64 = 1 << 30;
/// The bell's name among completions.
const BELL: u64 = u64::MAX;
/// How long a medium that is dropped waits for the kernel to let go of memory.
const DROP_WAIT: Duration = Duration::from_secs(2);

/// An eventfd that the ring listens to, so that other threads can end a wait.
#[derive(Debug)]
struct Bell {
    descriptor: OwnedFd,
    is_rung: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { descriptor, is_rung: AtomicBool::new(false) })
    }

    /// After what is to be heard of was put where the listener looks.
    fn ring(&self) {
        if !self.is_rung.swap(true, Ordering::AcqRel) {
            // It can only fail when it is rung already.
            let _ = rustix::io::write(self.descriptor.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    /// Before the listener looks. The descriptor is emptied first: whoever rings between the two has put before what the
    /// listener is about to see. The other way round its ring would be read away, and nobody would ring again.
    fn hear(&self) {
        // Empty is fine: somebody else's ring was answered already.
        let _ = rustix::io::read(self.descriptor.as_fd(), &mut [0; 8]);
        self.is_rung.store(false, Ordering::Release);
    }
}

#[derive(Debug)]
struct Flight {
    op: Op,
    moved: usize,
}

/// See the module.
pub(super) struct Ring {
    io: IoUring,
    file: LogFile,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    finished: Vec<Done>,
    bell: Arc<Bell>,
    is_listening: bool,
    /// By their index in the kernel's table; empty where the kernel has none.
    slabs: Vec<Option<Arc<HostSlab>>>,
    reasons: Vec<String>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Ring {
    /// # Errors
    /// The kernel has no ring for us (`PermissionDenied` and `Unsupported` are usual in containers), or one too old.
    pub(super) fn new(file: LogFile, depth: usize, mut reasons: Vec<String>) -> io::Result<Self> {
        let depth = depth.clamp(1, 1024);
        let entries = u32::try_from(depth + 2).unwrap_or(u32::MAX).next_power_of_two();
        let ring = IoUring::new(entries)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring of a kernel before 5.11"));
        }
        let bell = Arc::new(Bell::new()?);
        let slabs = match ring.submitter().register_buffers_sparse(SLABS_MAX) {
            Ok(()) => (0..SLABS_MAX).map(|_| None).collect(),
            Err(error) => {
                reasons.push(format!("memory is not registered with io_uring: {error}"));
                Vec::new()
            }
        };
        Ok(Self {
            io: ring,
            file,
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            finished: Vec::new(),
            bell,
            is_listening: false,
            slabs,
            reasons,
        })
    }

    /// The index in the kernel's table of the slab that a range lies in.
    fn registered(&self, address: u64, bytes: u64) -> Option<u16> {
        let holds = |slab: &Arc<HostSlab>| {
            address >= slab.address() && address + bytes <= slab.address() + slab.bytes().0
        };
        let index = self.slabs.iter().position(|slab| slab.as_ref().is_some_and(holds))?;
        u16::try_from(index).ok()
    }

    fn entry(&mut self, index: usize) -> Option<squeue::Entry> {
        let file = Fd(self.file.file.as_raw_fd());
        let flight = self.flights.get_mut(index)?.as_mut()?;
        let Flight { op, moved } = flight;
        if op.verb == Verb::Sync {
            let sync = opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build();
            return Some(sync.user_data(index as u64));
        }
        let offset = op.offset + *moved as u64;
        let left = op.bytes.checked_sub(*moved)?;
        let length = u32::try_from(left).ok()?;
        let start = *moved;
        let buffer = op.buffer.as_mut()?;
        // The address of what is left; both borrows end here, the bytes stay where they are.
        let address = match op.verb {
            Verb::Read => buffer.as_mut_slice()?.get_mut(start..op.bytes)?.as_mut_ptr(),
            _ => buffer.as_slice().get(start..op.bytes)?.as_ptr().cast_mut(),
        };
        let is_read = op.verb == Verb::Read;
        let entry = match (self.registered(address.addr() as u64, left as u64), is_read) {
            (Some(slab), true) => opcode::ReadFixed::new(file, address, length, slab).offset(offset).build(),
            (Some(slab), false) => {
                opcode::WriteFixed::new(file, address, length, slab).offset(offset).build()
            }
            (None, true) => opcode::Read::new(file, address, length).offset(offset).build(),
            (None, false) => opcode::Write::new(file, address, length).offset(offset).build(),
        };
        Some(entry.user_data(index as u64))
    }

    /// Queues what is left of a flight; whether that went.
    fn push(&mut self, index: usize) -> bool {
        let Some(entry) = self.entry(index) else { return false };
        let mut queue = self.io.submission();
        // SAFETY: the flight owns the memory that the entry names and stays in `flights` until its completion is seen
        // (I5), or is leaked; the file is held by `self` and outlives the ring.
        unsafe { queue.push(&entry) }.is_ok()
    }

    fn finish(&mut self, index: usize, result: io::Result<usize>) {
        if let Some(flight) = self.flights.get_mut(index).and_then(Option::take) {
            self.free.push(index);
            self.finished.push(Done { token: flight.op.token, result, buffer: flight.op.buffer });
        }
    }

    fn listen(&mut self) {
        if self.is_listening {
            return;
        }
        let poll = opcode::PollAdd::new(Fd(self.bell.descriptor.as_raw_fd()), libc::POLLIN as u32).build();
        let mut queue = self.io.submission();
        // SAFETY: the entry names no memory; the descriptor is held by `self`.
        self.is_listening = unsafe { queue.push(&poll.user_data(BELL)) }.is_ok();
    }

    fn drain(&mut self) {
        let completions: Vec<(u64, i32)> =
            self.io.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (name, result) in completions {
            if name == BELL {
                self.is_listening = false;
                self.bell.hear();
                continue;
            }
            let Ok(index) = usize::try_from(name) else { continue };
            self.landed(index, result);
        }
    }

    /// What the kernel says of a flight.
    fn landed(&mut self, index: usize, result: i32) {
        let Some(flight) = self.flights.get_mut(index).and_then(Option::as_mut) else { return };
        let Ok(moved) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(-result);
            let again = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
            if !again || !self.push(index) {
                self.finish(index, Err(error));
            }
            return;
        };
        flight.moved += moved;
        let (total, wanted) = (flight.moved, flight.op.bytes);
        // The rest of a short transfer is asked for, unless there is none or direct I/O could not begin there.
        let can_go_on = moved > 0 && total < wanted && (!self.file.is_direct || total % 4096 == 0);
        if !can_go_on || !self.push(index) {
            self.finish(index, Ok(total));
        }
    }
}

impl Medium for Ring {
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
        let Some(index) = self.free.pop() else { return Err(op) };
        self.flights[index] = Some(Flight { op, moved: 0 });
        if !self.push(index) {
            self.finish(index, Err(io::ErrorKind::InvalidInput.into()));
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) {
        self.listen();
        let submitted = if self.finished.is_empty() && !timeout.is_zero() {
            let timespec = Timespec::from(timeout);
            self.io.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
        } else {
            self.io.submit()
        };
        if let Err(error) = submitted {
            let is_usual = matches!(
                Errno::from_io_error(&error),
                Some(Errno::TIME | Errno::INTR | Errno::BUSY | Errno::AGAIN)
            );
            if !is_usual {
                tracing::warn!(%error, "io_uring takes no requests");
                std::thread::sleep(timeout.min(Duration::from_millis(10)));
            }
        }
        self.drain();
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        self.drain();
        done.append(&mut self.finished);
    }

    fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len() + self.finished.len()
    }

    fn depth(&self) -> usize {
        self.flights.len()
    }

    fn waker(&self) -> Waker {
        let bell = Arc::clone(&self.bell);
        Arc::new(move || bell.ring())
    }

    fn register(&mut self, slab: &Arc<HostSlab>) -> bool {
        if slab.bytes().0 > SLAB_BYTES_MAX
            || self.slabs.iter().flatten().any(|other| Arc::ptr_eq(other, slab))
        {
            return false;
        }
        let Some(index) = self.slabs.iter().position(Option::is_none) else { return false };
        let piece = libc::iovec {
            iov_base: ptr::with_exposed_provenance_mut(usize::try_from(slab.address()).unwrap_or(0)),
            iov_len: usize::try_from(slab.bytes().0).unwrap_or(0),
        };
        let place = u32::try_from(index).unwrap_or(u32::MAX);
        // SAFETY: the slab is mapped memory of this length, and is held in `slabs` until it is unregistered.
        let registered = unsafe { self.io.submitter().register_buffers_update(place, &[piece], None) };
        match registered {
            Ok(()) => self.slabs[index] = Some(Arc::clone(slab)),
            Err(error) => tracing::debug!(%error, "a slab is not registered with io_uring"),
        }
        self.slabs[index].is_some()
    }

    fn unregister(&mut self, slab: &Arc<HostSlab>) {
        let is_it =
            |other: &Option<Arc<HostSlab>>| other.as_ref().is_some_and(|other| Arc::ptr_eq(other, slab));
        let Some(index) = self.slabs.iter().position(is_it) else { return };
        let nothing = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let place = u32::try_from(index).unwrap_or(u32::MAX);
        // SAFETY: an empty piece takes the place; the kernel keeps the old one until its requests are done.
        let removed = unsafe { self.io.submitter().register_buffers_update(place, &[nothing], None) };
        match removed {
            Ok(()) => self.slabs[index] = None,
            Err(error) => tracing::warn!(%error, "a slab stays registered with io_uring, and so it stays"),
        }
    }

    fn means(&self) -> Means {
        Means { engine: "io_uring", is_direct: self.file.is_direct, reasons: self.reasons.clone() }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let until = Instant::now() + DROP_WAIT;
        while self.free.len() < self.flights.len() && Instant::now() < until {
            self.wait(Duration::from_millis(50));
        }
        let stuck = self.flights.iter_mut().filter_map(Option::take);
        let leaked: u64 = stuck
            .map(|flight| {
                let bytes = flight.op.bytes as u64;
                mem::forget::<Option<Buffer>>(flight.op.buffer);
                bytes
            })
            .sum();
        if leaked > 0 {
            tracing::error!(
                leaked,
                "a disk never answered: memory that it may still touch is never used again"
            );
            // Registered slabs and the file stay too.
            mem::forget(mem::take(&mut self.slabs));
            mem::forget::<Arc<File>>(Arc::clone(&self.file.file));
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Whether the kernel would tell the listener.
    fn is_heard(bell: &Bell) -> bool {
        let mut asked = [PollFd::new(&bell.descriptor, PollFlags::IN)];
        poll(&mut asked, Some(&rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 1)
    }

    #[test]
    fn a_bell_that_is_rung_while_it_is_heard_can_be_heard_again() {
        let bell = Arc::new(Bell::new().expect("there are descriptors"));
        let ringer = Arc::clone(&bell);
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        let ringing = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                ringer.ring();
            }
        });
        // It is heard when the kernel says so, and somebody rings meanwhile each time. A bell that is stuck is waited for in
        // vain.
        let until = Instant::now() + Duration::from_secs(20);
        let mut heard = 0;
        while heard < 2_000 && Instant::now() < until {
            if is_heard(&bell) {
                bell.hear();
                heard += 1;
            } else {
                std::thread::yield_now();
            }
        }
        is_over.store(true, Ordering::Relaxed);
        ringing.join().expect("the other thread ends");
        bell.ring();
        assert!(is_heard(&bell), "it counts as rung, and nobody is told");
    }
}
