//! Blocks on their way up: found, read, verified, handed over.

use std::io;
use std::time::Instant;

use shoal_core::store::format::{Entry, is_removed, padded};
use shoal_core::store::key::StoreKey;

use super::super::medium::Verb;
use super::{Flight, Worker};
use crate::store::{Buffer, Fetched, Miss, Promise};

/// A block that somebody waits for.
pub(super) struct Reading {
    slot: u32,
    entry: Entry,
    /// Where it goes in the end, when the disk could not read to it.
    target: Option<Buffer>,
    /// Nobody waits any more once it is answered.
    promise: Option<Promise<Fetched>>,
}

impl Reading {
    pub(super) fn refuse(mut self, miss: Miss) {
        if let Some(promise) = self.promise.take() {
            promise.answer(Err(miss));
        }
    }

    /// Answers whoever waited too long. The transfer goes on, and has its memory to itself.
    pub(super) fn look(&mut self, now: Instant, is_late: bool) {
        let is_over = |promise: &mut Promise<Fetched>| promise.deadline() <= now || is_late;
        if let Some(promise) = self.promise.take_if(is_over) {
            promise.answer(Err(Miss::Deadline));
        }
    }
}

impl Worker {
    pub(super) fn take_get(
        &mut self,
        key: &StoreKey,
        target: Buffer,
        promise: Promise<Fetched>,
        now: Instant,
    ) {
        if promise.is_cancelled() {
            return promise.answer(Err(Miss::Cancelled));
        }
        if promise.deadline() <= now {
            return promise.answer(Err(Miss::Deadline));
        }
        let Some((slot, entry)) = self.with_log(|log| log.find(key)) else {
            self.shared.notes.lock().counts.absent += 1;
            return promise.answer(Err(Miss::Absent));
        };
        if entry.is_sealed() && !self.codec.is_sealing() {
            self.with_log(|log| log.unpin(slot));
            return promise.answer(Err(Miss::Locked));
        }
        let bytes = u64::from(entry.bytes);
        let mut target = target;
        let room = target.as_mut_slice().map_or(0, |memory| memory.len()) as u64;
        if bytes > room {
            self.with_log(|log| log.unpin(slot));
            return promise.answer(Err(Miss::TooLong { bytes, bytes_max: room }));
        }
        let length = usize::try_from(padded(bytes)).unwrap_or(usize::MAX);
        let (buffer, target) = if target.is_direct(entry.bytes as usize) {
            (target, None)
        } else {
            (Buffer::zeroed(length), Some(target))
        };
        let offset = u64::from(slot) * self.segment_bytes + entry.offset;
        let reading = Reading { slot, entry, target, promise: Some(promise) };
        self.start(Flight::Get(reading), Verb::Read, offset, Some(buffer), length);
    }

    /// The bytes of an entry if they are right. Else it is dropped from the index, unless it was removed meanwhile.
    pub(super) fn verify(
        &mut self,
        slot: u32,
        entry: &Entry,
        result: io::Result<usize>,
        buffer: Option<Buffer>,
        now: Instant,
    ) -> Result<Buffer, Miss> {
        let wanted = padded(entry.bytes.into());
        let doing = "cannot read a block";
        let reason = match (result, buffer) {
            (Ok(read), Some(mut buffer)) if read as u64 == wanted => {
                self.shared.notes.lock().counts.bytes_read += wanted;
                // Before anything is decrypted, which leaves other bytes.
                let was_removed = is_removed(self.secret, &entry.key, buffer.as_slice());
                let payload = buffer.as_mut_slice().and_then(|memory| memory.get_mut(..entry.bytes as usize));
                if payload.is_some_and(|payload| self.codec.open(entry, payload)) {
                    return Ok(buffer);
                }
                let was_there = self.with_log(|log| {
                    let is_there = log.is_at(slot, entry);
                    if is_there {
                        log.remove(&entry.key);
                    }
                    is_there
                });
                if was_removed {
                    return Err(Miss::Absent);
                }
                self.shared.notes.lock().counts.corrupt += 1;
                if was_there {
                    self.failed(doing, &format!("{} is damaged", entry.key), now);
                }
                return Err(Miss::Corrupt);
            }
            (Ok(read), _) => {
                io::Error::new(io::ErrorKind::UnexpectedEof, format!("{read} of {wanted} bytes"))
            }
            (Err(error), _) => error,
        };
        self.failed(doing, &reason, now);
        Err(Miss::Failed { doing, reason: reason.to_string() })
    }

    pub(super) fn got(
        &mut self,
        reading: Reading,
        result: io::Result<usize>,
        buffer: Option<Buffer>,
        since: Instant,
        now: Instant,
    ) {
        let Reading { slot, entry, target, promise } = reading;
        let verified = self.verify(slot, &entry, result, buffer, now);
        self.with_log(|log| log.unpin(slot));
        let buffer = match verified {
            Ok(buffer) => buffer,
            Err(miss) => {
                if let Some(promise) = promise {
                    promise.answer(Err(miss));
                }
                return;
            }
        };
        let bytes = entry.bytes as usize;
        {
            let mut notes = self.shared.notes.lock();
            notes.counts.hits += 1;
            notes.speed.saw(bytes, now.saturating_duration_since(since));
        }
        if !self.has_served {
            self.has_served = true;
            self.health.served();
        }
        let Some(promise) = promise else { return };
        let buffer = match target {
            None => buffer,
            Some(mut target) => {
                if let Some(memory) = target.as_mut_slice() {
                    memory[..bytes].copy_from_slice(&buffer.as_slice()[..bytes]);
                }
                target
            }
        };
        promise.answer(Ok(Fetched { buffer, bytes }));
    }
}
