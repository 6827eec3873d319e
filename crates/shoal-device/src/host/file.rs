//! Memory that several processes can map: a file in memory, by its descriptor.
//!
//! Apart from mapping it, because who makes and keeps it need not use it: a server owns the memory of its workers' copies
//! without touching a byte. Its length is sealed, so a mapping of it can never fault.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
    memfd_create,
};
use shoal_core::bytes::ByteCount;

use super::memory::HUGE_PAGE_BYTES;
use crate::device::HostBacking;
use crate::error::DeviceError;

/// A file in memory of fixed length. It takes memory only once somebody touches it.
#[derive(Debug)]
pub struct HostFile {
    file: OwnedFd,
    bytes: ByteCount,
    backing: HostBacking,
}

impl HostFile {
    /// Makes one of so many bytes, rounded up to huge pages; all of it reads as zeroes.
    ///
    /// # Errors
    /// `System`: no descriptor is left, or the machine has no such backing. `Misaligned` for a backing that is private.
    pub fn create(bytes: ByteCount, backing: HostBacking) -> Result<Self, DeviceError> {
        let granularity = ByteCount(HUGE_PAGE_BYTES);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let flags = match backing {
            HostBacking::ReservedHugePages => flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            HostBacking::SharedHugePages => flags,
            HostBacking::HugePages | HostBacking::SmallPages => {
                return Err(DeviceError::Misaligned {
                    what: "a file of private memory",
                    value: bytes.0,
                    granularity,
                });
            }
        };
        let bytes = bytes.round_up_to(granularity);
        let failed = |call| move |source| DeviceError::system(call, source);
        let file = memfd_create("shoal-host", flags).map_err(failed("memfd_create"))?;
        ftruncate(&file, bytes.0).map_err(failed("ftruncate"))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(failed("fcntl(F_ADD_SEALS)"))?;
        Ok(Self { file, bytes, backing })
    }

    /// One that another process made and handed over.
    ///
    /// # Errors
    /// `System` if it is no file in memory, `LengthMismatch` if it is not `bytes` long, `InUse` if it could still become
    /// shorter.
    pub fn of(file: OwnedFd, bytes: ByteCount, backing: HostBacking) -> Result<Self, DeviceError> {
        let failed = |call| move |source| DeviceError::system(call, source);
        let seals = fcntl_get_seals(&file).map_err(failed("fcntl(F_GET_SEALS)"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(DeviceError::InUse { what: "host memory that may still become shorter", handle: 0 });
        }
        let found = fstat(&file).map_err(failed("fstat"))?.st_size;
        let found = ByteCount(u64::try_from(found).unwrap_or(0));
        if found != bytes {
            return Err(DeviceError::LengthMismatch { source_bytes: found, target_bytes: bytes });
        }
        Ok(Self { file, bytes, backing })
    }

    /// Its length.
    #[must_use]
    pub const fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// What it is made of.
    #[must_use]
    pub const fn backing(&self) -> HostBacking {
        self.backing
    }

    /// Gives its memory back to the machine; whoever maps it reads zeroes from then on (I12).
    ///
    /// # Errors
    /// `System`.
    pub fn discard(&self) -> Result<(), DeviceError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, 0, self.bytes.0)
            .map_err(|source| DeviceError::system("fallocate", source))
    }

    /// Another descriptor of the same file.
    ///
    /// # Errors
    /// `System`: none is left.
    pub fn try_clone(&self) -> Result<Self, DeviceError> {
        let file = rustix::io::fcntl_dupfd_cloexec(&self.file, 0)
            .map_err(|source| DeviceError::system("fcntl(F_DUPFD_CLOEXEC)", source))?;
        Ok(Self { file, bytes: self.bytes, backing: self.backing })
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<HostFile> for OwnedFd {
    fn from(file: HostFile) -> Self {
        file.file
    }
}
