//! How much of a simulated device each live process holds.
//!
//! Apart because it is the one thing that processes share: a small file, `sim-<ordinal>.ledger`, with a header
//! and fixed slots of (process, bytes). Whoever has a slot holds a lock on its bytes through an open file
//! description; the kernel drops the lock with the process, however that ends, so a slot counts only while it is
//! locked, and a SIGKILL gives the share back. Growing a share is check and write under a lock of the header, so
//! the sum never exceeds the capacity (I1); shrinking is one write of one's own slot. A child made by `fork`
//! holds the same file description: the share then returns when both are gone, as does the memory itself.

#![expect(unsafe_code, reason = "fcntl's locks of open file descriptions have no safe wrapper")]

use core::mem;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;

use crate::error::DeviceError;

const MAGIC: u64 = u64::from_le_bytes(*b"shoalsm1");
/// Header: magic, capacity, slots; then slots of (process, bytes).
const HEADER_BYTES: u64 = 64;
const SLOT_BYTES: u64 = 16;
const SLOTS: u64 = 256;
const FILE_BYTES: usize = 64 + 16 * 256;
const _: () = assert!(FILE_BYTES as u64 == HEADER_BYTES + SLOT_BYTES * SLOTS);
/// The header's lock is held for microseconds; a process stopped inside it makes the others fail, not hang.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);

/// One process's share of a simulated device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub process: u32,
    /// What its frames hold.
    pub bytes: ByteCount,
}

/// The live holders of a simulated device, by its runtime directory; empty when nobody has it open.
///
/// # Errors
/// `Ledger` when there is a file that cannot be read.
pub fn holders(runtime_dir: &Path, ordinal: u32) -> Result<Vec<Holder>, DeviceError> {
    let path = path_of(runtime_dir, DeviceId(ordinal));
    let file = match OpenOptions::new().read(true).open(&path) {
        Ok(file) => LedgerFile { file, path },
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(refuse(&path, "cannot be opened", &error)),
    };
    let Some(image) = file.read()? else { return Ok(Vec::new()) };
    file.live_slots(&image, None)
}

fn path_of(runtime_dir: &Path, id: DeviceId) -> PathBuf {
    runtime_dir.join(format!("sim-{}.ledger", id.0))
}

fn refuse(path: &Path, reason: &'static str, error: &io::Error) -> DeviceError {
    let source = error.raw_os_error().map(Errno::from_raw_os_error);
    DeviceError::Ledger { path: path.to_owned(), reason, source }
}

/// A byte range of the file.
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    bytes: u64,
}

const HEADER: Range = Range { start: 0, bytes: HEADER_BYTES };

fn slot_range(slot: u64) -> Range {
    Range { start: HEADER_BYTES + slot * SLOT_BYTES, bytes: SLOT_BYTES }
}

fn word(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("inside the file");
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&image[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[derive(Debug)]
struct LedgerFile {
    file: File,
    path: PathBuf,
}

impl LedgerFile {
    fn error(&self, reason: &'static str, error: &io::Error) -> DeviceError {
        refuse(&self.path, reason, error)
    }

    /// The file's content, or `None` while it has not been set up.
    fn read(&self) -> Result<Option<[u8; FILE_BYTES]>, DeviceError> {
        let mut image = [0; FILE_BYTES];
        match self.file.read_exact_at(&mut image, 0) {
            Ok(()) => Ok((word(&image, 0) == MAGIC).then_some(image)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(self.error("cannot be read", &error)),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.file.write_all_at(bytes, at).map_err(|error| self.error("cannot be written", &error))
    }

    fn fcntl(&self, command: libc::c_int, kind: libc::c_int, range: Range) -> io::Result<libc::flock> {
        let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
        // SAFETY: `flock` is a plain C struct of integers, for which all zeroes is a value.
        let mut lock: libc::flock = unsafe { mem::zeroed() };
        lock.l_type = libc::c_short::try_from(kind).map_err(too_large)?;
        lock.l_whence = 0;
        lock.l_start = i64::try_from(range.start).map_err(too_large)?;
        lock.l_len = i64::try_from(range.bytes).map_err(too_large)?;
        // SAFETY: the descriptor is open as long as `self`, and `lock` is a valid `flock` for the whole call.
        let answer = unsafe { libc::fcntl(self.file.as_raw_fd(), command, &raw mut lock) };
        if answer == -1 { Err(io::Error::last_os_error()) } else { Ok(lock) }
    }

    /// Takes a lock if nobody else has it.
    fn try_lock(&self, range: Range) -> Result<bool, DeviceError> {
        match self.fcntl(libc::F_OFD_SETLK, libc::F_WRLCK, range) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(error) => Err(self.error("cannot be locked (a file system with locks is needed)", &error)),
        }
    }

    fn unlock(&self, range: Range) {
        if let Err(error) = self.fcntl(libc::F_OFD_SETLK, libc::F_UNLCK, range) {
            tracing::error!(%error, path = %self.path.display(), "a ledger's lock could not be given back");
        }
    }

    /// Whether somebody else holds a lock there.
    fn is_locked(&self, range: Range) -> Result<bool, DeviceError> {
        let lock = self
            .fcntl(libc::F_OFD_GETLK, libc::F_WRLCK, range)
            .map_err(|error| self.error("cannot be asked for locks", &error))?;
        Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
    }

    fn lock_header(&self) -> Result<HeaderLock<'_>, DeviceError> {
        let deadline = Instant::now() + LOCK_WAIT_MAX;
        let mut pause = Duration::from_micros(20);
        while !self.try_lock(HEADER)? {
            if Instant::now() >= deadline {
                return Err(DeviceError::Ledger {
                    path: self.path.clone(),
                    reason: "stayed locked by another process for 5 s (is one stopped?)",
                    source: None,
                });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
        Ok(HeaderLock { file: self })
    }

    /// The shares of processes that still live, without `own`.
    fn live_slots(&self, image: &[u8], own: Option<u64>) -> Result<Vec<Holder>, DeviceError> {
        let mut live = Vec::new();
        for slot in (0..SLOTS).filter(|slot| Some(*slot) != own) {
            let at = slot_range(slot).start;
            let (process, bytes) = (word(image, at), word(image, at + 8));
            if process != 0 && self.is_locked(slot_range(slot))? {
                let process = u32::try_from(process).unwrap_or_default();
                live.push(Holder { process, bytes: ByteCount(bytes) });
            }
        }
        Ok(live)
    }
}

/// The right to grow a share, until dropped.
struct HeaderLock<'a> {
    file: &'a LedgerFile,
}

impl Drop for HeaderLock<'_> {
    fn drop(&mut self) {
        self.file.unlock(HEADER);
    }
}

/// This device object's share, and the way to the others'.
#[derive(Debug)]
pub(super) struct Ledger {
    id: DeviceId,
    capacity: ByteCount,
    file: LedgerFile,
    slot: u64,
    /// Our share. The lock also keeps threads of this process apart, which a lock of the file does not.
    held: Mutex<ByteCount>,
}

impl Ledger {
    pub(super) fn open(id: DeviceId, capacity: ByteCount, runtime_dir: &Path) -> Result<Self, DeviceError> {
        let path = path_of(runtime_dir, id);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(runtime_dir)
            .map_err(|error| refuse(runtime_dir, "the runtime directory cannot be made", &error))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| refuse(&path, "cannot be opened for writing", &error))?;
        let file = LedgerFile { file, path };
        let slot = {
            let _header = file.lock_header()?;
            Self::join(id, capacity, &file)?
        };
        Ok(Self { id, capacity, file, slot, held: Mutex::new(ByteCount::ZERO) })
    }

    /// Agrees on the capacity and takes a slot. Under the header's lock.
    fn join(id: DeviceId, requested: ByteCount, file: &LedgerFile) -> Result<u64, DeviceError> {
        let image = file.read()?;
        let is_shared = file.is_locked(Range { start: HEADER_BYTES, bytes: SLOT_BYTES * SLOTS })?;
        match image {
            Some(image) if is_shared => {
                let capacity = ByteCount(word(&image, 8));
                if capacity != requested {
                    return Err(DeviceError::CapacityMismatch { device: id, capacity, requested });
                }
            }
            None if is_shared => {
                let reason =
                    "is in use by another version of shoal; stop it or choose another runtime directory";
                return Err(DeviceError::Ledger { path: file.path.clone(), reason, source: None });
            }
            // Nobody lives: whatever is written there is of the dead.
            _ => {
                let mut image = [0; FILE_BYTES];
                image[..8].copy_from_slice(&MAGIC.to_le_bytes());
                image[8..16].copy_from_slice(&requested.0.to_le_bytes());
                image[16..24].copy_from_slice(&SLOTS.to_le_bytes());
                file.write(0, &image)?;
            }
        }
        for slot in 0..SLOTS {
            if file.try_lock(slot_range(slot))? {
                let mut entry = [0; 16];
                entry[..8].copy_from_slice(&u64::from(process::id()).to_le_bytes());
                file.write(slot_range(slot).start, &entry)?;
                return Ok(slot);
            }
        }
        let reason = "all 256 slots are taken; close some of the processes that use this device";
        Err(DeviceError::Ledger { path: file.path.clone(), reason, source: None })
    }

    /// What all live processes hold, and what this device object holds.
    pub(super) fn used(&self) -> Result<(ByteCount, ByteCount), DeviceError> {
        let held = self.held.lock();
        Ok((self.used_by_others()? + *held, *held))
    }

    fn used_by_others(&self) -> Result<ByteCount, DeviceError> {
        let image = self.file.read()?;
        let links = self.file.file.metadata().map(|metadata| metadata.nlink());
        let (Some(image), Ok(1..)) = (image, links) else {
            let reason = "was deleted or damaged while in use; restart what uses this device";
            return Err(DeviceError::Ledger { path: self.file.path.clone(), reason, source: None });
        };
        Ok(self.file.live_slots(&image, Some(self.slot))?.iter().map(|holder| holder.bytes).sum())
    }

    /// Grows our share, if the sum of all shares stays within the capacity.
    pub(super) fn charge(&self, requested: ByteCount) -> Result<(), DeviceError> {
        let mut held = self.held.lock();
        let _header = self.file.lock_header()?;
        let free = self.capacity.saturating_sub(self.used_by_others()? + *held);
        if requested > free {
            let (device, capacity) = (self.id, self.capacity);
            return Err(DeviceError::OutOfMemory { device, requested, free, capacity });
        }
        let grown = *held + requested;
        self.write_share(grown)?;
        *held = grown;
        Ok(())
    }

    /// Shrinks our share.
    pub(super) fn refund(&self, bytes: ByteCount) -> Result<(), DeviceError> {
        let mut held = self.held.lock();
        let shrunk = held.saturating_sub(bytes);
        // Ours is less now whatever becomes of the write; the file then says too much, which is the safe side.
        *held = shrunk;
        self.write_share(shrunk)
    }

    fn write_share(&self, bytes: ByteCount) -> Result<(), DeviceError> {
        self.file.write(slot_range(self.slot).start + 8, &bytes.0.to_le_bytes())
    }
}
