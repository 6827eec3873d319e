//! Memory that a tier reads from and writes to while its owner waits.
//!
//! Apart because what a disk or a link touches by address must stay where it is and be nobody else's meanwhile, and that
//! is a promise of these types: heap memory that is owned, and ranges of the host arena that are lent.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use shoal_core::store::format::{UNIT, UNIT_LEN, padded};
use shoal_device::{HostBuffer, HostView, HostViewMut};

/// Zeroed memory that begins where direct I/O can begin.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl fmt::Debug for Aligned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aligned").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Aligned {
    /// `bytes` of it, rounded up to what direct I/O moves at least (4 KiB).
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        let bytes = usize::try_from(padded(bytes.max(1) as u64)).unwrap_or(bytes);
        let memory = vec![0; bytes + UNIT_LEN];
        let start = memory.as_ptr().align_offset(UNIT_LEN).min(UNIT_LEN);
        Self { memory, start, bytes }
    }

    /// A copy of `bytes`, with zeroes behind it.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        copy
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.bytes]
    }

    /// Memory that it takes, with what its beginning was moved by (4 KiB).
    pub(crate) const fn taken_bytes(&self) -> u64 {
        self.memory.len() as u64
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}

/// Memory of a request. It neither moves nor is anybody else's while a tier has it.
#[derive(Debug)]
pub enum Buffer {
    /// Memory of its own.
    Own(Aligned),
    /// A range of the arena, lent for reading.
    Host(HostView),
    /// A range of the arena, lent for writing.
    HostMut(HostViewMut),
    /// Any of these, on loan: dropped, it goes back to whoever lent it.
    OnLoan(OnLoan),
}

/// Where memory on loan comes back to, when whatever had it is done with it.
#[derive(Debug, Default)]
pub(crate) struct Home {
    memory: Mutex<Option<Buffer>>,
    came: Condvar,
}

impl Home {
    /// The memory, as soon as it is back, until then at most.
    pub(crate) fn wait(&self, until: Instant) -> Option<Buffer> {
        let mut memory = self.memory.lock();
        while memory.is_none() {
            if self.came.wait_until(&mut memory, until).timed_out() {
                break;
            }
        }
        memory.take()
    }
}

/// Memory on loan.
#[derive(Debug)]
pub struct OnLoan {
    /// Always there until it is dropped or taken.
    memory: Option<Box<Buffer>>,
    home: Arc<Home>,
}

impl OnLoan {
    /// Lends memory, and says where it comes back to.
    pub(crate) fn lend(memory: Buffer) -> (Buffer, Arc<Home>) {
        let home = Arc::new(Home::default());
        (Buffer::OnLoan(Self { memory: Some(Box::new(memory)), home: Arc::clone(&home) }), home)
    }
}

impl Drop for OnLoan {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            *self.home.memory.lock() = Some(*memory);
            self.home.came.notify_all();
        }
    }
}

impl Buffer {
    /// Zeroed memory of its own, at least `bytes`.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        Self::Own(Aligned::zeroed(bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Own(memory) => memory.as_slice(),
            Self::Host(view) => view.as_slice(),
            Self::HostMut(view) => view.as_slice(),
            Self::OnLoan(loan) => loan.memory.as_ref().map_or(&[], |memory| memory.as_slice()),
        }
    }

    /// The memory itself, where it was on loan.
    #[must_use]
    pub(crate) fn kept(self) -> Self {
        match self {
            Self::OnLoan(mut loan) => {
                loan.memory.take().map_or_else(|| Self::zeroed(0), |memory| memory.kept())
            }
            other => other,
        }
    }

    /// The arena's buffer that it lies in, if it does.
    pub(crate) const fn host(&self) -> Option<&Arc<HostBuffer>> {
        match self {
            Self::Host(view) => Some(view.buffer()),
            Self::HostMut(view) => Some(view.buffer()),
            Self::Own(_) | Self::OnLoan(_) => None,
        }
    }

    /// The same bytes, from now on for reading only where they are the arena's: they can be had several times then, and
    /// copied from.
    #[must_use]
    pub(crate) fn shared(self) -> Self {
        match self {
            Self::HostMut(view) => Self::Host(view.shared()),
            other => other,
        }
    }

    /// Another hold of the same bytes, where they are shared.
    pub(crate) fn again(&self) -> Option<Self> {
        match self {
            Self::Host(view) => Some(Self::Host(view.again())),
            Self::Own(_) | Self::HostMut(_) | Self::OnLoan(_) => None,
        }
    }

    /// The bytes, to be written; none where they are lent for reading.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match self {
            Self::Own(memory) => Some(memory.as_mut_slice()),
            Self::Host(_) => None,
            Self::HostMut(view) => Some(view.as_mut_slice()),
            Self::OnLoan(loan) => loan.memory.as_mut().and_then(|memory| memory.as_mut_slice()),
        }
    }

    /// Whether direct I/O can move `bytes` of it, padding included, without a copy between.
    pub(crate) fn is_direct(&self, bytes: usize) -> bool {
        let memory = self.as_slice();
        memory.as_ptr().addr().is_multiple_of(UNIT_LEN) && padded(bytes as u64) <= memory.len() as u64
    }

    /// Whether its first `bytes` end where a unit of the disk ends, so that nothing has to be added.
    pub(crate) fn is_direct_source(&self, bytes: usize) -> bool {
        (bytes as u64).is_multiple_of(UNIT) && self.is_direct(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn memory_on_loan_comes_back() {
        let (mut loan, home) = OnLoan::lend(Buffer::zeroed(4096));
        loan.as_mut_slice().expect("it may be written to")[0] = 7;
        assert!(home.wait(Instant::now()).is_none(), "somebody has it");
        let other = std::thread::spawn(move || drop(loan));
        let back = home.wait(Instant::now() + Duration::from_mins(1)).expect("it is back");
        assert_eq!(back.as_slice()[0], 7);
        other.join().expect("the other thread ends");

        let (loan, home) = OnLoan::lend(back);
        assert!(matches!(loan.kept(), Buffer::Own(_)));
        assert!(home.wait(Instant::now()).is_none(), "what was kept does not come back");
    }

    #[test]
    fn memory_of_its_own_is_aligned_and_padded() {
        for bytes in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let memory = Aligned::zeroed(bytes);
            assert_eq!(memory.as_slice().as_ptr().addr() % UNIT_LEN, 0);
            assert_eq!(memory.as_slice().len() as u64, padded(bytes.max(1) as u64));
        }
        let copy = Buffer::Own(Aligned::copy_of(&[7; 5000]));
        assert!(copy.is_direct(5000) && !copy.is_direct_source(5000));
        assert_eq!(&copy.as_slice()[4999..5001], [7, 0]);
    }
}
