//! What one job of many copies holds: each mapping and buffer once, however many of its blocks are copied.

use core::hash::{BuildHasherDefault, Hasher};
use std::collections::HashMap;
use std::sync::Arc;

use super::host::{JobUse, Ranges};
use super::stream::Span;
use super::{HostBuffer, Mapping, check_range};
use crate::device::{Device, RawCopy, RawSpan, Space};
use crate::error::DeviceError;

/// Addresses of live objects differ as they are: one multiplication spreads them.
#[derive(Clone, Copy, Debug, Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, address: usize) {
        let mixed = (self.0 ^ address as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// Things found by their address; the last one found is found at once.
#[derive(Debug)]
struct Distinct<T, E> {
    found: Vec<(Arc<T>, E)>,
    places: HashMap<usize, usize, BuildHasherDefault<AddressHasher>>,
    last: Option<(usize, usize)>,
}

impl<T, E> Default for Distinct<T, E> {
    fn default() -> Self {
        Self { found: Vec::new(), places: HashMap::default(), last: None }
    }
}

impl<T, E: Default> Distinct<T, E> {
    /// The entry of `thing`, made if `check` takes it.
    fn entry(
        &mut self,
        thing: &Arc<T>,
        check: impl FnOnce(&T) -> Result<(), DeviceError>,
    ) -> Result<&mut E, DeviceError> {
        let address = Arc::as_ptr(thing).addr();
        let place = match self.last {
            Some((last, place)) if last == address => place,
            _ => {
                if let Some(place) = self.places.get(&address) {
                    *place
                } else {
                    check(thing)?;
                    self.found.push((Arc::clone(thing), E::default()));
                    self.places.insert(address, self.found.len() - 1);
                    self.found.len() - 1
                }
            }
        };
        self.last = Some((address, place));
        Ok(&mut self.found[place].1)
    }
}

/// Copies by address, and what keeps those addresses good.
#[derive(Debug)]
pub(super) struct HeldCopies<'a> {
    device: &'a Arc<dyn Device>,
    mappings: Distinct<Mapping, ()>,
    buffers: Distinct<HostBuffer, Ranges>,
    copies: Vec<RawCopy>,
}

/// What a job of many copies keeps alive.
#[derive(Debug)]
#[expect(dead_code, reason = "held for its Drop")]
pub(super) struct CopiesKeep {
    mappings: Vec<(Arc<Mapping>, ())>,
    uses: Vec<JobUse>,
}

impl<'a> HeldCopies<'a> {
    /// Checks a list. Nothing is entered as in use yet.
    pub(super) fn new(device: &'a Arc<dyn Device>, copies: &[(Span, Span)]) -> Result<Self, DeviceError> {
        let (mappings, buffers) = (Distinct::default(), Distinct::default());
        let mut held = Self { device, mappings, buffers, copies: Vec::with_capacity(copies.len()) };
        for (source, target) in copies {
            let (source_bytes, target_bytes) = (source.bytes(), target.bytes());
            if source_bytes != target_bytes {
                return Err(DeviceError::LengthMismatch { source_bytes, target_bytes });
            }
            let copy = RawCopy { source: held.span(source, false)?, target: held.span(target, true)? };
            held.copies.push(copy);
        }
        Ok(held)
    }

    fn span(&mut self, span: &Span, writes: bool) -> Result<RawSpan, DeviceError> {
        let device = self.device;
        let check = |other: &Arc<dyn Device>| {
            if Arc::ptr_eq(device, other) {
                return Ok(());
            }
            let (device, handle) = (device.info().id, 0);
            Err(DeviceError::UnknownHandle { device, what: "span of another device", handle })
        };
        match span {
            Span::Device { mapping, offset, bytes } => {
                self.mappings.entry(mapping, |mapping| check(mapping.device()))?;
                check_range("mapping", *offset, *bytes, mapping.bytes())?;
                let at = mapping.address().offset(*offset).0;
                Ok(RawSpan { space: Space::Device, at, bytes: *bytes })
            }
            Span::Host { buffer, offset, bytes } => {
                let ranges = self.buffers.entry(buffer, |buffer| check(buffer.device()))?;
                ranges.add(buffer.use_of(*offset, *bytes, writes)?);
                Ok(RawSpan { space: Space::Host, at: buffer.address() + offset.0, bytes: *bytes })
            }
        }
    }

    /// Enters all of it as in use by a job, or on an error nothing.
    pub(super) fn enter(self) -> Result<(Vec<RawCopy>, CopiesKeep), DeviceError> {
        let entered = self.buffers.found.into_iter().map(|(buffer, ranges)| buffer.enter_job_many(ranges));
        let uses = entered.collect::<Result<Vec<_>, _>>()?;
        Ok((self.copies, CopiesKeep { mappings: self.mappings.found, uses }))
    }
}
