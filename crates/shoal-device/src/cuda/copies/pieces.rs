//! Page-locked memory in which a kernel reads what to copy.
//!
//! Apart because a kernel's arguments hold a few hundred pieces at most, and a table must stay until its kernel is done: a
//! job holds it and gives it back when it ends. There are only so many; whoever needs one more waits for a job to end.

#![expect(unsafe_code, reason = "writes page-locked memory of its own by address")]

use core::ptr;
use core::slice;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::copy_plan::Run;

use crate::cuda::context::Context;
use crate::error::DeviceError;

/// Pieces of one table, so of one kernel: at 4 KiB each that is 32 MiB, less than a millisecond.
pub(super) const PIECES_MAX: usize = 8192;
/// Tables that there are at most: 12 MiB.
pub(super) const TABLES_MAX: usize = 64;

/// As `kernels/copy.cu` reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Piece {
    source: u64,
    target: u64,
    bytes: u64,
}

const TABLE_BYTES: u64 = (PIECES_MAX * size_of::<Piece>()) as u64;

#[derive(Debug, Default)]
struct Book {
    /// Addresses of tables that no job holds.
    free: Vec<u64>,
    made: usize,
}

/// All tables of a device object.
#[derive(Debug)]
pub(super) struct PiecesPool {
    context: Arc<Context>,
    book: Mutex<Book>,
}

impl PiecesPool {
    pub(super) fn new(context: &Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), book: Mutex::default() })
    }

    /// A table, empty. `None`: all are held by jobs.
    pub(super) fn take(self: &Arc<Self>) -> Result<Option<Pieces>, DeviceError> {
        let at = {
            let mut book = self.book.lock();
            let free = book.free.pop();
            if free.is_none() {
                if book.made >= TABLES_MAX {
                    return Ok(None);
                }
                book.made += 1;
            }
            free
        };
        let at = match at {
            Some(at) => at,
            None => self.make().inspect_err(|_| self.book.lock().made -= 1)?,
        };
        Ok(Some(Pieces { pool: Arc::clone(self), at, count: 0 }))
    }

    fn make(&self) -> Result<u64, DeviceError> {
        let _bound = self.context.bind()?;
        self.context.driver().host_allocate(TABLE_BYTES)
    }
}

impl Drop for PiecesPool {
    fn drop(&mut self) {
        let tables = core::mem::take(&mut self.book.get_mut().free);
        let outcome = self.context.bind().and_then(|_bound| {
            tables.into_iter().try_for_each(|at| {
                // SAFETY: from `host_allocate`; tables that jobs use hold this object, so there are none.
                unsafe { self.context.driver().host_free(at) }
            })
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "page-locked tables could not be given back");
        }
    }
}

/// A table, of one job at a time.
#[derive(Debug)]
pub(super) struct Pieces {
    pool: Arc<PiecesPool>,
    at: u64,
    count: usize,
}

impl Pieces {
    /// Writes what to copy, at most [`PIECES_MAX`] pieces.
    pub(super) fn fill(&mut self, units: &[Run]) {
        let units = &units[..units.len().min(PIECES_MAX)];
        let address = usize::try_from(self.at).expect("64-bit addresses");
        let start = ptr::with_exposed_provenance_mut::<Piece>(address);
        // SAFETY: inside the live table of plain numbers, which is aligned to a page and nobody else's.
        let table = unsafe { slice::from_raw_parts_mut(start, units.len()) };
        for (piece, unit) in table.iter_mut().zip(units) {
            *piece = Piece { source: unit.source, target: unit.target, bytes: unit.bytes };
        }
        self.count = units.len();
    }

    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn count(&self) -> u64 {
        self.count as u64
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        self.pool.book.lock().free.push(self.at);
    }
}
