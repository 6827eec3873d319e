//! The log's file: made, grown with room behind it, cut.
//!
//! Apart because the ring and the threads share it, and because file systems differ in what they allow.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use rustix::io::Errno;

use crate::store::Aligned;

/// An open log.
#[derive(Clone, Debug)]
pub(super) struct LogFile {
    pub(super) file: Arc<File>,
    /// Whether reads and writes go past the page cache.
    pub(super) is_direct: bool,
}

impl LogFile {
    /// Opens or makes the file, past the page cache if its file system allows; else says why not.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn open(path: &Path, wants_direct: bool) -> io::Result<(Self, Option<String>)> {
        Self::open_as(path, OFlags::RDWR | OFlags::CREATE, wants_direct)
    }

    /// [`LogFile::open`] of a file that is there, to be read alone.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn open_to_read(path: &Path, wants_direct: bool) -> io::Result<(Self, Option<String>)> {
        Self::open_as(path, OFlags::RDONLY, wants_direct)
    }

    fn open_as(path: &Path, access: OFlags, wants_direct: bool) -> io::Result<(Self, Option<String>)> {
        let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        if wants_direct {
            match open(path, flags | OFlags::DIRECT, mode) {
                Ok(descriptor) => {
                    let file = Arc::new(File::from(descriptor));
                    // Some file systems take the flag and refuse the first read.
                    match file.read_at(Aligned::zeroed(1).as_mut_slice(), 0) {
                        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                        Err(error) => return Err(error),
                        Ok(_) => return Ok((Self { file, is_direct: true }, None)),
                    }
                }
                Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let file = Arc::new(File::from(open(path, flags, mode)?));
        let reason = if wants_direct {
            "the file system refuses direct I/O, so blocks pass through the page cache"
        } else {
            "direct I/O is switched off"
        };
        Ok((Self { file, is_direct: false }, Some(reason.to_owned())))
    }

    pub(super) fn bytes(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }

    pub(super) fn grow(&self, bytes: u64) -> io::Result<()> {
        let length = self.bytes()?;
        if bytes <= length {
            return Ok(());
        }
        match fallocate(&*self.file, FallocateFlags::empty(), length, bytes - length) {
            // Nothing is kept ready there; a full disk shows in writes.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.file.set_len(bytes),
            Err(errno) => {
                // A part may have been added.
                let _ = self.file.set_len(length);
                Err(errno.into())
            }
            Ok(()) => Ok(()),
        }
    }

    pub(super) fn shrink(&self, bytes: u64) -> io::Result<()> {
        if self.bytes()? > bytes { self.file.set_len(bytes) } else { Ok(()) }
    }
}
