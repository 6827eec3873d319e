//! Who lends memory for host copies: a server, whose memory outlives the process.
//!
//! Apart from the arena, which makes its own memory where nobody lends any, and from the control socket, over which a
//! server does ([`crate::BrokerClient`]).

use std::fmt;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_device::host::HostFile;

/// Memory that was lent.
#[derive(Debug)]
pub struct LentSlab {
    /// Its number, by which it is given back.
    pub slab: u64,
    /// The memory.
    pub file: HostFile,
    /// It reads as zeroes; else it holds whatever this model's last process left there.
    pub is_zeroed: bool,
}

/// Lends memory for host copies.
pub trait SlabSource: fmt::Debug + Send + Sync {
    /// Exactly so many bytes, within `deadline`.
    ///
    /// # Errors
    /// Why not, in a sentence.
    fn borrow_slab(&self, bytes: ByteCount, deadline: Duration) -> Result<LentSlab, String>;

    /// The memory is unmapped and not needed any more.
    fn return_slab(&self, slab: u64);
}
