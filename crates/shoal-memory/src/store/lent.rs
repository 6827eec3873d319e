//! A block that a tier lends where it lies, before anybody has looked whether it is what was put.
//!
//! Apart because a checksum takes as long as a copy over the link: whoever copies the block has it verified at the same time,
//! by other threads, and uses none that was not (I8).

use std::fmt;
use std::sync::Arc;

use shoal_device::HostBuffer;

use super::{Held, Miss};

type Verify<'a> = Box<dyn Fn() -> Result<(), Miss> + Send + Sync + 'a>;

/// A block in page-locked memory, not verified yet. What the tier forgets meanwhile stays until this is dropped.
pub struct Lent<'a> {
    held: Held,
    buffer: Arc<HostBuffer>,
    verify: Verify<'a>,
}

impl fmt::Debug for Lent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("held", &self.held).finish_non_exhaustive()
    }
}

impl<'a> Lent<'a> {
    /// Lends a block, which begins where `buffer` begins. `verify` says whether it is what was put; a tier drops it if not.
    #[must_use]
    pub fn new(
        held: Held,
        buffer: Arc<HostBuffer>,
        verify: impl Fn() -> Result<(), Miss> + Send + Sync + 'a,
    ) -> Self {
        Self { held, buffer, verify: Box::new(verify) }
    }

    /// The block, which may be damaged.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.held.as_slice()
    }

    /// The memory that it lies in, from its start on.
    #[must_use]
    pub const fn buffer(&self) -> &Arc<HostBuffer> {
        &self.buffer
    }

    /// Whether the block is what was put. It takes as long as a checksum of it, on the caller's thread.
    ///
    /// # Errors
    /// [`Miss::Corrupt`].
    pub fn verify(&self) -> Result<(), Miss> {
        (self.verify)()
    }

    /// The same, and `then` is called with the length of a block that is right.
    pub(crate) fn counted(self, then: impl Fn(usize) + Send + Sync + 'a) -> Self {
        let (verify, bytes) = (self.verify, self.held.as_slice().len());
        Self { verify: Box::new(move || verify().inspect(|()| then(bytes))), ..self }
    }
}
